//! Work in a sandbox of which nothing may be lost, whatever is done to the sandbox.

use crate::daemon::Sandbox;
use crate::until;

/// What is at work in a sandbox: a process that counts and appends each number to a file that it
/// keeps open, a server that numbers its answers, and a tree of files.
const WORK: &str = r#"
mkdir -p /root/tree/a/b && head -c 300000 /dev/urandom >/root/tree/a/b/file
for n in 1 2 3 4 5 6 7 8; do echo "content $n" >"/root/tree/a/$n"; done
cat >/root/count.pl <<'END'
$| = 1; open(my $log, '>>', '/root/log') or die; $log->autoflush(1);
for (my $n = 1;; $n++) { print $log "$n\n"; select(undef, undef, undef, 0.05) }
END
cat >/root/serve.pl <<'END'
use IO::Socket::INET;
my $server = IO::Socket::INET->new(LocalAddr => '127.0.0.1:7777', Listen => 8, ReuseAddr => 1) or die;
open(my $up, '>', '/root/up'); close($up);
for (my $n = 1;; $n++) { my $client = $server->accept() or next; print $client "answer $n\n" }
END
setsid perl -MIO::Handle /root/count.pl </dev/null >/dev/null 2>&1 &
setsid perl /root/serve.pl </dev/null >/dev/null 2>&1 &
while ! [ -e /root/up ] || ! [ -s /root/log ]; do sleep 0.1; done
"#;

const ASK: &str = r#"perl -MIO::Socket::INET -e \
    'my $s = IO::Socket::INET->new("127.0.0.1:7777") or die; print scalar <$s>'"#;

/// The work of one sandbox, and what it must be like.
#[derive(Clone)]
pub struct Work {
    tree: String,
    asked: u32,
    counted: u64,
}

impl Work {
    /// Begins it.
    pub fn begin(sandbox: &Sandbox<'_>) -> Self {
        sandbox.must(WORK);
        Self {
            tree: tree(sandbox),
            asked: 0,
            counted: 0,
        }
    }

    /// Whether its files are there, as they were.
    pub fn has_its_files(&self, sandbox: &Sandbox<'_>) -> bool {
        tree(sandbox) == self.tree
    }

    /// It goes on where it was, and nothing of it is lost.
    pub fn assert_goes_on(&mut self, sandbox: &Sandbox<'_>) {
        self.asked += 1;
        assert_eq!(sandbox.must(ASK), format!("answer {}", self.asked));
        assert!(self.has_its_files(sandbox));
        let last = || -> u64 {
            // The last line may be half written.
            let last = sandbox.must("tail -n 2 /root/log | head -n 1");
            last.parse().unwrap()
        };
        let counted = last();
        assert!(counted >= self.counted, "{counted} after {}", self.counted);
        until("the process goes on counting", || last() > counted + 2);
        let gaps = "awk 'NR != $1 { print NR, $0; exit }' /root/log 2>/dev/null || \
                    perl -ne 'print, exit if $_ != $.' /root/log";
        assert_eq!(sandbox.must(gaps), "", "numbers are lost or doubled");
        self.counted = counted;
    }
}

fn tree(sandbox: &Sandbox<'_>) -> String {
    sandbox.must("cd /root/tree && find . -type f | sort | xargs sha256sum | sha256sum")
}

/// How often a scenario does the same, or with how many: `variable` says so for a run that goes on for long.
pub fn soak(variable: &str, otherwise: u64) -> u64 {
    let given = std::env::var(variable);
    given.map_or(otherwise, |given| given.parse().unwrap())
}
