//! A host outside: a network namespace with a link to the one that a scenario's daemon runs in. What
//! passes between them leaves the machine by no way.

use std::io;
use std::process::Command;
use std::sync::mpsc;
use std::thread;

/// The near end's address, of this scenario's own host. The networks are those for documentation
/// (RFC 5737), which lead nowhere.
pub const NEAR: &str = "203.0.113.1";
/// The outside host's addresses.
pub const FAR: [&str; 2] = ["203.0.113.2", "203.0.113.3"];
/// A private address of the outside host.
pub const PRIVATE: &str = "10.99.0.1";
/// The address at which clouds serve metadata, which the outside host has as well.
pub const METADATA: &str = "169.254.169.254";

type Job = Box<dyn FnOnce() + Send>;

/// The host outside, as long as this value.
pub struct Outside {
    jobs: mpsc::Sender<Job>,
}

impl Outside {
    /// Moves this thread, and the processes that it starts from now on, into a new network, and makes
    /// a host outside of it. The way back from there is to [`NEAR`] alone.
    ///
    /// # Panics
    /// This process may not do so.
    pub fn beside_new_network() -> Self {
        new_network();
        let (jobs, received) = mpsc::channel::<Job>();
        let (thread, its_id) = mpsc::channel();
        thread::spawn(move || {
            new_network();
            thread.send(rustix::thread::gettid()).unwrap();
            for job in received {
                job();
            }
        });
        let thread = its_id.recv().unwrap().as_raw_nonzero();
        let outside = Self { jobs };
        ip("link set lo up");
        ip(&format!(
            "link add up0 type veth peer name out0 netns {thread}"
        ));
        ip(&format!("address add {NEAR}/24 dev up0"));
        ip("link set up0 up");
        ip("route add 10.99.0.0/24 dev up0");
        ip("route add 169.254.0.0/16 dev up0");
        outside.run(|| {
            ip("link set lo up");
            for address in FAR {
                ip(&format!("address add {address}/24 dev out0"));
            }
            ip(&format!("address add {PRIVATE}/24 dev out0"));
            ip(&format!("address add {METADATA}/16 dev out0"));
            ip("link set out0 up");
        });
        outside
    }

    /// What this comes to on a thread of the host outside. Sockets that it makes are that host's,
    /// wherever they are used.
    ///
    /// # Panics
    /// It panics.
    pub fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let (reply, result) = mpsc::channel();
        let job = Box::new(move || reply.send(work()).unwrap());
        self.jobs.send(job).expect("the thread of the host outside");
        result.recv().expect("a result of the host outside")
    }
}

fn new_network() {
    // SAFETY: a network namespace of its own touches no memory and no open descriptor of this
    // thread or others.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }
        .expect("a network namespace, which needs root");
}

/// Runs ip(8) with these words.
///
/// # Panics
/// It fails.
pub fn ip(words: &str) -> String {
    output("ip", words).unwrap()
}

/// The rules of the packet filter.
///
/// # Panics
/// They cannot be read.
pub fn filter() -> String {
    output("nft", "list ruleset").unwrap()
}

fn output(program: &str, words: &str) -> io::Result<String> {
    let output = Command::new(program)
        .args(words.split_ascii_whitespace())
        .output()?;
    let error = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        return Err(io::Error::other(format!("{program} {words}: {error}")));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
