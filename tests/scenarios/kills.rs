//! Daemons and VMMs that are killed in the midst of what they do.

use std::collections::BTreeMap;
use std::thread;
use std::time::Duration;

use e2e_tests::daemon::{Daemon, Sandbox};
use e2e_tests::work::{Work, soak};
use e2e_tests::{report, until};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

fn small() -> Value {
    json!({"memory_mb": 192})
}

/// Numbers that are the same in every run with the same seed (MVS_SOAK_SEED): xorshift.
struct Chance(u64);

impl Chance {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

/// A request whose answer nobody waits for: the daemon or the VMM may be killed in the midst of it.
fn ask(daemon: &Daemon, path: String) -> thread::JoinHandle<()> {
    let address = daemon.address();
    thread::spawn(move || {
        let stream = std::net::TcpStream::connect(address).unwrap();
        let request = e2e_tests::http::Request::new("POST", &path);
        let _ = request.send(stream, std::io::empty(), 0);
    })
}

/// Sandboxes at work, paused and resumed over and over. Now and then the daemon or the VMM of one of
/// them is killed, in the midst of a pause, of a resume or while it runs. Each is afterwards as before or
/// as after, checked by content; when the daemon was killed, one that ran runs on in the same process.
/// Only one whose own VMM was killed while it ran is gone, and says why.
#[test]
fn under_kills_each_sandbox_is_as_before_or_as_after() {
    let sandboxes = soak("MVS_SOAK_SANDBOXES", 2);
    let cycles = soak("MVS_SOAK_CYCLES", 3);
    // One cycle of so many has a kill in it.
    let kills = soak("MVS_SOAK_KILLS", 1).max(1);
    let seed = soak("MVS_SOAK_SEED", 6);
    report(&format!("seed {seed}"));
    // Neighbouring seeds shall have nothing in common; xorshift never leaves 0.
    let mut chance = Chance(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let mut daemon = Daemon::start_with(&["--warm-disk-bytes", "1073741824"]);
    let mut all: Vec<(String, Work)> = Vec::new();
    let mut outcomes = BTreeMap::<String, u32>::new();
    for cycle in 1..=cycles {
        while (all.len() as u64) < sandboxes {
            let sandbox = daemon.create(&small());
            let mut work = Work::begin(&sandbox);
            work.assert_goes_on(&sandbox);
            sandbox.pause();
            all.push((sandbox.id, work));
        }
        for (id, work) in &mut all {
            let kill = (chance.below(kills) == 0).then(|| (chance.below(5), chance.below(2500)));
            let what = match kill {
                None => {
                    let sandbox = daemon.sandbox(id);
                    sandbox.resume();
                    work.assert_goes_on(&sandbox);
                    sandbox.pause();
                    "not killed"
                }
                Some((what @ 0..2, after_ms)) => {
                    // In a resume: what was saved stays, whatever becomes of the attempt.
                    let asking = ask(&daemon, daemon.sandbox(id).path("/resume"));
                    thread::sleep(Duration::from_millis(after_ms));
                    daemon = killed(daemon, id, what == 0);
                    asking.join().unwrap();
                    match what {
                        0 => "the daemon killed in a resume",
                        _ => "the VMM killed in a resume",
                    }
                }
                Some((4, _)) => {
                    // In neither.
                    let sandbox = daemon.sandbox(id);
                    sandbox.resume();
                    work.assert_goes_on(&sandbox);
                    let before = sandbox.outer_pid();
                    daemon = daemon.crash();
                    let sandbox = daemon.sandbox(id);
                    assert_eq!(sandbox.outer_pid(), before, "it was started anew");
                    assert_eq!(sandbox.get()["status"], "running");
                    "the daemon killed while it runs"
                }
                Some((what, after_ms)) => {
                    let sandbox = daemon.sandbox(id);
                    sandbox.resume();
                    work.assert_goes_on(&sandbox);
                    let asking = ask(&daemon, sandbox.path("/pause"));
                    thread::sleep(Duration::from_millis(after_ms));
                    daemon = killed(daemon, id, what == 2);
                    asking.join().unwrap();
                    match what {
                        2 => "the daemon killed in a pause",
                        _ => "the VMM killed in a pause",
                    }
                }
            };
            let sandbox = daemon.sandbox(id);
            let (outcome, lives) = match kill {
                None => ("paused", true),
                Some((what, _)) => {
                    let became = what_became_of(&daemon, &sandbox);
                    assert!(
                        became.1 || matches!(what, 1 | 3),
                        "{what}: {}",
                        sandbox.get()
                    );
                    became
                }
            };
            *outcomes.entry(format!("{what}: {outcome}")).or_default() += 1;
            if lives && kill.is_some() {
                work.assert_goes_on(&sandbox);
                sandbox.pause();
            }
        }
        all.retain(|(id, _)| daemon.sandbox(id).get()["status"] != "error");
        report(&format!("after cycle {cycle} of {cycles}: {outcomes:?}"));
    }
    for (id, work) in &mut all {
        let sandbox = daemon.sandbox(id);
        sandbox.resume();
        work.assert_goes_on(&sandbox);
        sandbox.delete();
    }
}

/// Resumes a sandbox that something was killed of, unless it runs or is lost. Returns what it was, and
/// whether it runs now.
fn what_became_of(daemon: &Daemon, sandbox: &Sandbox<'_>) -> (&'static str, bool) {
    let mut outcome = None;
    until("it has come to rest", || {
        let (status, answer) = daemon.call("POST", &sandbox.path("/resume"), "");
        let record = sandbox.get();
        outcome = match (status, record["status"].as_str().unwrap()) {
            (200, _) => Some(("paused", true)),
            // That its VMM was killed may not be known yet.
            (409, "running") => {
                let answers = sandbox.try_exec(&["true"], 60).0 == 200;
                answers.then_some(("running", true))
            }
            (409, "error") => {
                assert!(record["status_reason"].is_string(), "{record}");
                Some(("lost, for it ran", false))
            }
            // The end of its VMM is written down a moment later than it is told.
            (409, _) => None,
            _ => panic!("{status} {answer}; {record}"),
        };
        outcome.is_some()
    });
    outcome.unwrap()
}

/// Kills the daemon, and starts the next one; or the VMM of a sandbox, if there is one.
fn killed(daemon: Daemon, id: &str, is_daemon: bool) -> Daemon {
    if is_daemon {
        return daemon.crash();
    }
    let vmm = daemon.sandbox(id).find_outer_pid();
    // It may have ended since.
    if let Some(pid) = vmm.and_then(|pid| Pid::from_raw(pid.cast_signed())) {
        let _ = kill_process(pid, Signal::KILL);
    }
    daemon
}

#[test]
fn a_daemon_that_is_killed_in_a_pause_leaves_the_sandbox_before_or_after() {
    let mut daemon = Daemon::start();
    let mut outcomes = Vec::new();
    for cycle in 0..soak("MVS_SOAK_CYCLES", 3) {
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
        thread::sleep(Duration::from_millis(300 + 450 * (cycle % 7)));
        daemon = daemon.crash();
        asking.join().unwrap();
        let sandbox = daemon.sandbox(&id);
        let status = sandbox.get()["status"].as_str().unwrap().to_owned();
        match status.as_str() {
            "paused" => {
                sandbox.resume();
                work.assert_goes_on(&sandbox);
            }
            // It was not saved, and goes on.
            "running" => {
                assert!(daemon.layers().is_empty(), "{:?}", daemon.layers());
                work.assert_goes_on(&sandbox);
                sandbox.pause();
                sandbox.resume();
                work.assert_goes_on(&sandbox);
            }
            other => panic!("it is {other}"),
        }
        outcomes.push(status);
        daemon.sandbox(&id).delete();
        assert!(daemon.layers().is_empty(), "{:?}", daemon.layers());
    }
    report(&format!("killed in the midst of a pause: {outcomes:?}"));
}
