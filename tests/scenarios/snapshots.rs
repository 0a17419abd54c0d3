//! Sandboxes that are paused, resumed, forked and started warm: what is in them goes on.

use std::collections::BTreeSet;
use std::fs;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use e2e_tests::daemon::{Daemon, Sandbox};
use e2e_tests::process::children_of;
use e2e_tests::{report, until};
use rustix::mount::{MountFlags, UnmountFlags};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

/// How far a guest's clock may be off, in nanoseconds.
const CLOCK_TOLERANCE_NS: i128 = 50_000_000;

fn small() -> Value {
    json!({"memory_mb": 192})
}

/// How many times a scenario does the same; more by `make soak`.
fn cycles() -> u32 {
    let cycles = std::env::var("MVS_SOAK_CYCLES");
    cycles.map_or(3, |cycles| cycles.parse().unwrap())
}

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
struct Work {
    tree: String,
    asked: u32,
    counted: u64,
}

impl Work {
    fn begin(sandbox: &Sandbox<'_>) -> Self {
        sandbox.must(WORK);
        Self {
            tree: tree(sandbox),
            asked: 0,
            counted: 0,
        }
    }

    /// It goes on where it was, and nothing of it is lost.
    fn assert_goes_on(&mut self, sandbox: &Sandbox<'_>) {
        self.asked += 1;
        assert_eq!(sandbox.must(ASK), format!("answer {}", self.asked));
        assert_eq!(tree(sandbox), self.tree);
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

fn now_ns() -> i128 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    i128::try_from(since.as_nanos()).unwrap()
}

/// The guest's clock is right, as far as can be told through commands: each tells that it is ahead by
/// no less than one number and no more than another.
fn assert_clock(sandbox: &Sandbox<'_>) {
    let (mut least, mut most) = (i128::MIN, i128::MAX);
    for _ in 0..5 {
        let before = now_ns();
        let guest: i128 = sandbox.must("date +%s%N").parse().unwrap();
        least = least.max(guest - now_ns());
        most = most.min(guest - before);
    }
    report(&format!(
        "the guest's clock is ahead by {} to {} ms",
        least / 1_000_000,
        most / 1_000_000
    ));
    assert!(
        least <= CLOCK_TOLERANCE_NS && most >= -CLOCK_TOLERANCE_NS,
        "{least} to {most} ns"
    );
}

/// What tells one machine from another.
fn identity(sandbox: &Sandbox<'_>) -> [String; 4] {
    [
        sandbox.must("cat /proc/sys/kernel/hostname"),
        sandbox.must("cat /etc/machine-id"),
        sandbox.must("head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n'"),
        sandbox.must("cat /proc/sys/kernel/random/uuid"),
    ]
}

#[test]
fn what_runs_goes_on_after_every_pause() {
    let daemon = Daemon::start();
    let sandbox = daemon.create(&small());
    let [hostname, machine_id, ..] = identity(&sandbox);
    assert_eq!(hostname, sandbox.id);
    let mut work = Work::begin(&sandbox);
    for generation in 1..=cycles() {
        work.assert_goes_on(&sandbox);
        let monotonic = sandbox.must("cut -d. -f1 /proc/uptime");
        sandbox.pause();
        assert!(children_of(daemon.process.pid()).is_empty());
        assert!(!daemon.runtime_directory(&sandbox.id).exists());
        let (status, answer) = sandbox.try_exec(&["true"], 10);
        assert_eq!(
            (status, &answer["error"]["code"]),
            (409, &json!("invalid_state"))
        );
        // Long enough for a clock that stood still meanwhile to be seen.
        thread::sleep(Duration::from_secs(2));
        let record = sandbox.resume();
        report(&format!(
            "generation {generation}: {}",
            record["timings_ms"]
        ));
        assert_eq!(record["timings_ms"]["start"], "resume");
        assert_clock(&sandbox);
        let before: u64 = monotonic.parse().unwrap();
        let after: u64 = sandbox.must("cut -d. -f1 /proc/uptime").parse().unwrap();
        assert!(after >= before, "monotonic time went backwards");
        work.assert_goes_on(&sandbox);
        assert_eq!(
            identity(&sandbox)[..2],
            [hostname.clone(), machine_id.clone()]
        );
    }
    sandbox.delete();
    assert!(daemon.layers().is_empty(), "{:?}", daemon.layers());
}

#[test]
fn clones_of_a_snapshot_are_machines_of_their_own() {
    let daemon = Daemon::start();
    let sandbox = daemon.create(&small());
    sandbox.must("echo before >/root/file; sync");
    let body = json!({"sandbox_id": sandbox.id, "name": "base"}).to_string();
    let (status, snapshot) = daemon.call("POST", "/v1/snapshots", &body);
    assert_eq!(status, 201, "{snapshot}");
    assert!(
        snapshot["size_bytes"].as_u64().unwrap() > 1 << 20,
        "{snapshot}"
    );
    assert_eq!(snapshot["checksum"].as_str().unwrap().len(), 64);
    sandbox.must("echo after >/root/file");

    let (status, forked) = daemon.call("POST", "/v1/snapshots/base/fork", r#"{"count": 2}"#);
    assert_eq!(status, 201, "{forked}");
    assert_eq!(forked["failed"], json!([]));
    let ids = forked["sandboxes"].as_array().unwrap().iter();
    let clones: Vec<_> = ids
        .map(|clone| daemon.sandbox(clone["id"].as_str().unwrap()))
        .collect();
    let identities: Vec<_> = clones.iter().chain([&sandbox]).map(identity).collect();
    for what in 0..4 {
        let all: BTreeSet<_> = identities.iter().map(|identity| &identity[what]).collect();
        assert_eq!(all.len(), 3, "{identities:?}");
    }
    for clone in &clones {
        assert_eq!(identity(clone)[0], clone.id);
        assert_eq!(clone.must("cat /root/file"), "before");
        assert_clock(clone);
        clone.must(&format!("echo {} >/root/file", clone.id));
    }
    for clone in &clones {
        assert_eq!(clone.must("cat /root/file"), clone.id);
        clone.delete();
    }
    assert_eq!(sandbox.must("cat /root/file"), "after");
    let (status, _) = daemon.call("GET", "/v1/snapshots/base", "");
    assert_eq!(status, 200);
    sandbox.delete();
    assert_eq!(daemon.layers().len(), 2, "the snapshot's");
    let request = e2e_tests::http::Request::new("DELETE", "/v1/snapshots/base");
    assert_eq!(daemon.send(request, std::io::empty(), 0).status, 204);
    assert!(daemon.layers().is_empty(), "{:?}", daemon.layers());
}

#[test]
fn a_running_parent_is_forked_and_goes_on() {
    let daemon = Daemon::start();
    let parent = daemon.create(&small());
    let mut work = Work::begin(&parent);
    work.assert_goes_on(&parent);
    let mut grown = Vec::new();
    for generation in 1..=2 {
        let (status, forked) = daemon.call("POST", &parent.path("/fork"), r#"{"count": 1}"#);
        assert_eq!(status, 201, "{forked}");
        report(&format!(
            "fork {generation}: the parent stood still for {} ms; {}",
            forked["stall_ms"], forked["sandboxes"][0]["timings_ms"]
        ));
        let child = daemon.sandbox(forked["sandboxes"][0]["id"].as_str().unwrap());
        let mut childs = Work {
            tree: work.tree.clone(),
            asked: work.asked,
            counted: work.counted,
        };
        work.assert_goes_on(&parent);
        childs.assert_goes_on(&child);
        parent.must(&format!("echo {generation} >/root/of-the-parent"));
        child.must(&format!("echo {generation} >/root/of-the-child"));
        // What the parent has written since is not the child's.
        child.must(&format!("! grep -qx {generation} /root/of-the-parent"));
        parent.must("! [ -e /root/of-the-child ]");
        assert_clock(&child);
        grown.push((child, childs));
    }
    // A fork may be paused like any other, and so may its parent.
    for (sandbox, mut work) in grown
        .into_iter()
        .chain([(daemon.sandbox(&parent.id), work)])
    {
        sandbox.pause();
        sandbox.resume();
        work.assert_goes_on(&sandbox);
        sandbox.delete();
    }
    assert!(daemon.layers().is_empty(), "{:?}", daemon.layers());
}

/// A small file system over a directory, until it is dropped.
struct Full<'a>(&'a std::path::Path);

impl<'a> Full<'a> {
    fn over(directory: &'a std::path::Path) -> Self {
        let flags = MountFlags::empty();
        rustix::mount::mount("none", directory, "tmpfs", flags, c"size=2m").unwrap();
        Self(directory)
    }
}

impl Drop for Full<'_> {
    fn drop(&mut self) {
        let unmounted = rustix::mount::unmount(self.0, UnmountFlags::DETACH);
        assert!(unmounted.is_ok() || thread::panicking());
    }
}

#[test]
fn on_a_full_disk_a_sandbox_is_not_paused_and_runs_on() {
    let daemon = Daemon::start();
    let sandbox = daemon.create(&small());
    let mut work = Work::begin(&sandbox);
    let layers = daemon.layers_directory();
    {
        let _full = Full::over(&layers);
        for operation in ["/pause", "/fork"] {
            daemon.refused(
                ("POST", &sandbox.path(operation), "{}"),
                (502, "agent_error"),
                &["runs on", "No space left on device"],
            );
            assert_eq!(sandbox.get()["status"], "running");
            assert!(daemon.layers().is_empty(), "{:?}", daemon.layers());
            work.assert_goes_on(&sandbox);
        }
    }
    sandbox.pause();
    sandbox.resume();
    work.assert_goes_on(&sandbox);
    sandbox.delete();
}

#[test]
fn a_daemon_that_is_killed_in_a_pause_leaves_the_sandbox_before_or_after() {
    let mut daemon = Daemon::start();
    let mut outcomes = Vec::new();
    for cycle in 0..cycles() {
        let id = daemon.create(&small()).id;
        let mut work = Work::begin(&daemon.sandbox(&id));
        work.assert_goes_on(&daemon.sandbox(&id));
        // Somewhere in the midst of it, each time at another point.
        let (address, path) = (daemon.address(), daemon.sandbox(&id).path("/pause"));
        let asking = thread::spawn(move || {
            let stream = std::net::TcpStream::connect(address).unwrap();
            let request = e2e_tests::http::Request::new("POST", &path);
            let _ = request.send(stream, std::io::empty(), 0);
        });
        thread::sleep(Duration::from_millis(300 + 450 * u64::from(cycle % 7)));
        daemon = daemon.crash();
        asking.join().unwrap();
        let sandbox = daemon.sandbox(&id);
        let status = sandbox.get()["status"].as_str().unwrap().to_owned();
        match status.as_str() {
            "paused" => {
                sandbox.resume();
                work.assert_goes_on(&sandbox);
            }
            // As any sandbox that runs when its daemon is killed.
            "error" => assert!(daemon.layers().is_empty(), "{:?}", daemon.layers()),
            other => panic!("it is {other}"),
        }
        outcomes.push(status);
        daemon.sandbox(&id).delete();
        assert!(daemon.layers().is_empty(), "{:?}", daemon.layers());
    }
    report(&format!("killed in the midst of a pause: {outcomes:?}"));
}

#[test]
fn the_second_of_a_shape_starts_warm() {
    let daemon = Daemon::start_with(&["--warm-disk-bytes", "1073741824", "--pool-size", "0"]);
    let first = daemon.create(&small());
    let timings = first.get()["timings_ms"].clone();
    assert_eq!(timings["start"], "cold");
    report(&format!("cold: {timings}"));
    first.delete();
    daemon.process.stderr.wait_for("warm snapshot made");
    let second = daemon.create(&small());
    let third = daemon.create(&small());
    for sandbox in [&second, &third] {
        let timings = sandbox.get()["timings_ms"].clone();
        assert_eq!(timings["start"], "warm");
        report(&format!("warm: {timings}"));
        assert_clock(sandbox);
    }
    let (one, other) = (identity(&second), identity(&third));
    for what in 0..4 {
        assert_ne!(one[what], other[what]);
    }
    assert_eq!((&one[0], &other[0]), (&second.id, &third.id));
    second.must("echo mine >/root/file");
    third.must("! [ -e /root/file ]");
    // Saved again, only what changed since the template's snapshot is written.
    let before = daemon.layers();
    second.pause();
    let new: u64 = daemon
        .layers()
        .difference(&before)
        .map(|layer| size(&daemon.layers_directory().join(layer)))
        .sum();
    report(&format!(
        "a pause of a warm sandbox writes {} KiB",
        new / 1024
    ));
    assert!(new < 40 << 20, "{new} bytes");
    second.resume();
    assert_eq!(second.must("cat /root/file"), "mine");
}

/// The names of the machines that have become ready so far, once they are so many.
fn wait_until_ready(daemon: &Daemon, count: usize) -> Vec<String> {
    let is_ready = |line: &str| {
        let line: Value = serde_json::from_str(line).ok()?;
        let fields = line.get("fields").unwrap_or(&line);
        (fields["message"] == "a machine is ready").then_some(())?;
        Some(fields["sandbox"].as_str()?.to_owned())
    };
    daemon
        .process
        .stderr
        .wait_for_text("ready machines", |text| {
            let ready: Vec<_> = text.lines().filter_map(is_ready).collect();
            (ready.len() >= count).then_some(ready)
        })
}

#[test]
fn a_sandbox_from_the_pool_is_one_of_its_own_whenever_it_is_taken() {
    let mut daemon = Daemon::start_with(&["--warm-disk-bytes", "1073741824", "--pool-size", "2"]);
    daemon.create(&small()).delete();
    let ready = wait_until_ready(&daemon, 2);
    let noted = daemon.layers().into_iter().find_map(|layer| {
        let directory = daemon.layers_directory().join(layer);
        fs::read(directory.join("working-set.json")).ok()
    });
    let noted: Value = serde_json::from_slice(&noted.expect("what machines touch first")).unwrap();
    for pages in ["read", "written"] {
        let runs: Vec<(u64, u64)> =
            serde_json::from_value(noted["content"]["pages"][pages].clone()).unwrap();
        let bytes: u64 = runs.iter().map(|(start, end)| end - start).sum();
        report(&format!(
            "{pages} first: {} KiB in {} runs",
            bytes >> 10,
            runs.len()
        ));
        assert!(bytes > 0 && bytes < 64 << 20);
    }

    // No time passes for them while they wait, however long that is, and their wall clocks are right.
    let uptime = |sandbox: &Sandbox<'_>| {
        let seconds: f64 = sandbox.must("cut -d' ' -f1 /proc/uptime").parse().unwrap();
        Duration::from_secs_f64(seconds)
    };
    let begun = Instant::now();
    let first = daemon.create(&small());
    let at_most = uptime(&first);
    thread::sleep(begun.elapsed() + Duration::from_secs(3));
    let begun = Instant::now();
    let second = daemon.create(&small());
    let now = uptime(&second);
    let own = begun.elapsed();
    assert!(now <= at_most + own, "{now:?}, {at_most:?} and {own:?}");
    assert!(uptime(&second) >= now);
    let sandboxes = [first, second];
    for sandbox in &sandboxes {
        assert!(ready.contains(&sandbox.id));
        let timings = sandbox.get()["timings_ms"].clone();
        assert_eq!(timings["start"], "pool");
        report(&format!("pool: {timings}"));
        assert_clock(sandbox);
    }
    let [one, other] = [identity(&sandboxes[0]), identity(&sandboxes[1])];
    for what in 0..4 {
        assert_ne!(one[what], other[what]);
    }
    assert_eq!((&one[0], &other[0]), (&sandboxes[0].id, &sandboxes[1].id));
    sandboxes[0].must("echo mine >/root/file");
    sandboxes[1].must("! [ -e /root/file ]");
    sandboxes[0].pause();
    sandboxes[0].resume();
    assert_eq!(sandboxes[0].must("cat /root/file"), "mine");
    for sandbox in sandboxes {
        sandbox.delete();
    }

    // One that is killed is replaced, and not handed out.
    let ready = wait_until_ready(&daemon, 4);
    let killed = daemon.sandbox(&ready[3]);
    let pid = Pid::from_raw(killed.outer_pid().cast_signed()).unwrap();
    kill_process(pid, Signal::KILL).unwrap();
    let ready = wait_until_ready(&daemon, 5);
    let sandbox = daemon.create(&small());
    assert!(
        sandbox.id == ready[2] || sandbox.id == ready[4],
        "{}",
        sandbox.id
    );
    sandbox.must("true");

    // A crash leaves nothing of them, and neither does an orderly end.
    let crashed: Vec<_> = ready
        .iter()
        .map(|id| daemon.runtime_directory(id))
        .collect();
    daemon = daemon.crash();
    for directory in crashed {
        assert!(!directory.exists(), "{}", directory.display());
    }
    daemon.create(&small()).delete();
    wait_until_ready(&daemon, 1);
    daemon.stop();
}

/// What the files in a directory occupy, in bytes.
fn size(directory: &std::path::Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let files = fs::read_dir(directory).unwrap();
    files
        .map(|file| file.unwrap().metadata().unwrap().blocks() * 512)
        .sum()
}
