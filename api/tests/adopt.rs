//! Sandboxes that outlive the daemon: it is killed while they run, and at each point of what it does
//! with them. A program stands in for the VMM, with the real agent behind it.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on may panic")]

#[path = "support/agent.rs"]
mod agent;
#[path = "support/daemon.rs"]
mod daemon;
#[path = "support/vmm.rs"]
mod vmm;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use daemon::{Daemon, Place, answer, runs};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

/// What the script of [`vmm::install`] starts; does nothing in a run of the tests.
#[test]
fn as_a_vmm() {
    vmm::run();
}

struct Bench {
    place: Place,
    daemon: Daemon,
}

impl Bench {
    fn new() -> Self {
        let place = Place::new();
        vmm::install(&place.path(""), "as_a_vmm", agent::binary());
        let daemon = Daemon::start(&place);
        Self { place, daemon }
    }

    fn call(&self, method: &str, path: &str, body: &str) -> Value {
        let (status, answer) = answer(self.daemon.send(method, path, body));
        assert!((200..300).contains(&status), "{path}: {status} {answer}");
        answer
    }

    /// The path of a new sandbox.
    fn create(&self, body: &str) -> String {
        let sandbox = self.call("POST", "/v1/sandboxes", body);
        format!("/v1/sandboxes/{}", sandbox["id"].as_str().unwrap())
    }

    fn status(&self, sandbox: &str) -> Value {
        self.daemon.get(sandbox)["status"].clone()
    }

    fn exec(&self, sandbox: &str, script: &str) -> String {
        let body = json!({"cmd": "/bin/sh", "args": ["-c", script]}).to_string();
        let result = self.call("POST", &format!("{sandbox}/exec"), &body);
        assert_eq!(result["exit_code"], 0, "{result}");
        result["stdout"].as_str().unwrap().trim().to_owned()
    }

    /// The ids of the processes that were started as VMMs, in order.
    fn vmms(&self) -> Vec<String> {
        let pids = fs::read_to_string(self.place.path("pid")).unwrap();
        pids.lines().map(str::to_owned).collect()
    }

    fn kill(&mut self) {
        self.daemon.signal(Signal::KILL);
        self.daemon.process.wait().unwrap();
    }

    fn restart(&mut self) {
        self.daemon = Daemon::start(&self.place);
    }

    fn make_fifo(&self, name: &str) {
        let path = self.place.path(name);
        assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
    }

    /// What the VMM of a sandbox says of it.
    fn info(&self, sandbox: &str) -> Value {
        let id = sandbox.rsplit('/').next().unwrap();
        let socket = self.place.path("run/sandboxes").join(id).join("api.sock");
        let mut stream = UnixStream::connect(socket).unwrap();
        write!(stream, "GET /api/v1/vm.info HTTP/1.1\r\n\r\n").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        serde_json::from_str(text.split_once("\r\n\r\n").unwrap().1).unwrap()
    }

    /// The machine of a sandbox runs, and writes to the file that its sandbox is saved from.
    fn assert_is_whole(&self, sandbox: &str) {
        assert_eq!(self.exec(sandbox, "echo well"), "well");
        let info = self.info(sandbox);
        assert_eq!(info["state"], "Running");
        let id = sandbox.rsplit('/').next().unwrap();
        let directory = self.place.path("data/sandboxes").join(id);
        let disk = fs::metadata(directory.join("disk.qcow2")).unwrap();
        assert_eq!(info["disk"], disk.ino());
        assert!(!directory.join("next.qcow2").exists());
        // A file of a layer is never written to.
        for layer in fs::read_dir(self.place.path("data/layers")).unwrap() {
            for file in fs::read_dir(layer.unwrap().path()).unwrap() {
                assert_ne!(file.unwrap().metadata().unwrap().ino(), disk.ino());
            }
        }
    }

    fn layers(&self) -> usize {
        fs::read_dir(self.place.path("data/layers"))
            .unwrap()
            .count()
    }
}

fn until(what: &str, is_so: impl Fn() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < Duration::from_secs(60), "never: {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn running_sandboxes_outlive_a_daemon_that_is_killed() {
    let mut bench = Bench::new();
    let (one, other) = (bench.create("{}"), bench.create("{}"));
    bench.exec(
        &one,
        "setsid sleep 1000 >/dev/null 2>&1 & echo $! >/tmp/adopt.$PPID; echo $PPID",
    );
    let vmms = bench.vmms();
    for _ in 0..3 {
        bench.kill();
        assert!(vmms.iter().all(|vmm| runs(vmm)));
        bench.restart();
        assert_eq!(bench.vmms(), vmms, "none was started anew");
        for sandbox in [&one, &other] {
            assert_eq!(bench.status(sandbox), "running");
            bench.assert_is_whole(sandbox);
        }
    }
    // They can do all that any other can.
    bench.call("POST", &format!("{one}/fork"), r#"{"count": 1}"#);
    bench.assert_is_whole(&one);
    bench.call("POST", &format!("{one}/pause"), "");
    assert!(!runs(&vmms[0]), "it is paused, and its VMM is left");
    bench.call("POST", &format!("{one}/resume"), "");
    bench.assert_is_whole(&one);

    // One whose VMM ends while there is no daemon is lost, and one that ends later tells why.
    bench.kill();
    let kill = |pid: &str| {
        let pid = Pid::from_raw(pid.parse().unwrap()).unwrap();
        kill_process(pid, Signal::KILL).unwrap();
    };
    kill(&vmms[1]);
    until("the VMM has ended", || !runs(&vmms[1]));
    bench.restart();
    let row = bench.daemon.get(&other);
    assert_eq!(row["status"], "error");
    let reason = row["status_reason"].as_str().unwrap();
    assert!(reason.contains("its vmm has ended since"), "{reason}");
    kill(bench.vmms().last().unwrap());
    until("its end is told", || bench.status(&one) == "error");
    let reason = bench.daemon.get(&one)["status_reason"].to_string();
    assert!(reason.contains("as when it is killed"), "{reason}");

    let list = bench.daemon.get("/v1/sandboxes");
    let child = format!("/v1/sandboxes/{}", list[0]["id"].as_str().unwrap());
    assert_eq!(list.as_array().unwrap().len(), 1, "the fork: {list}");
    bench.assert_is_whole(&child);
    let (status, _) = answer(bench.daemon.send("DELETE", &child, ""));
    assert_eq!((status, bench.layers()), (204, 0));
    for vmm in bench.vmms() {
        bench.place.assert_nothing_is_left(&vmm);
    }
    bench.daemon.signal(Signal::TERM);
}

#[test]
fn wherever_a_daemon_is_killed_each_sandbox_is_as_before_or_as_after() {
    // What is asked for; the request to the VMM in which, and before or after which, the daemon is
    // killed; and what the sandbox is then.
    let pause = ["vm.pause", "vm.snapshot"].map(|at| ("/pause", at));
    let fork = ["vm.pause", "vm.snapshot", "vm.replace-disk", "vm.resume"].map(|at| ("/fork", at));
    for (operation, request) in pause.into_iter().chain(fork) {
        for when in ["before", "after"] {
            let case = format!("{operation} {when} {request}");
            println!("{case}");
            let mut bench = Bench::new();
            let sandbox = bench.create("{}");
            // So that it is based on something, and has been saved before.
            for operation in ["/pause", "/resume", "/fork"] {
                bench.call("POST", &format!("{sandbox}{operation}"), "{}");
            }
            let list = bench.daemon.get("/v1/sandboxes");
            let child = format!("/v1/sandboxes/{}", list[0]["id"].as_str().unwrap());
            assert_ne!(child, sandbox);

            let point = format!("stop-{when}-{request}");
            bench.make_fifo(&point);
            let path = format!("{sandbox}{operation}");
            let asking = bench.daemon.send("POST", &path, "{}");
            // Opening it waits until the VMM is there.
            let stopped = fs::File::options()
                .write(true)
                .open(bench.place.path(&point))
                .unwrap();
            bench.kill();
            fs::remove_file(bench.place.path(&point)).unwrap();
            drop((asking, stopped));
            bench.restart();

            let rows = bench.daemon.get("/v1/sandboxes");
            assert_eq!(rows.as_array().unwrap().len(), 2, "{case}: {rows}");
            let row = bench.daemon.get(&sandbox);
            assert_eq!(row["status"], "running", "{case}: {row}");
            for sandbox in [&sandbox, &child] {
                bench.assert_is_whole(sandbox);
                for operation in ["/fork", "/pause", "/resume", "/fork"] {
                    bench.call("POST", &format!("{sandbox}{operation}"), "{}");
                }
                bench.assert_is_whole(sandbox);
            }
            let rows = bench.daemon.get("/v1/sandboxes");
            for row in rows.as_array().unwrap() {
                let path = format!("/v1/sandboxes/{}", row["id"].as_str().unwrap());
                let (status, _) = answer(bench.daemon.send("DELETE", &path, ""));
                assert_eq!(status, 204, "{case}");
            }
            assert_eq!(bench.layers(), 0, "{case}");
            for vmm in bench.vmms() {
                bench.place.assert_nothing_is_left(&vmm);
            }
            bench.daemon.signal(Signal::TERM);
        }
    }
}

#[test]
fn a_sandbox_that_was_being_started_is_not_taken_over() {
    let mut bench = Bench::new();
    let sandbox = bench.create("{}");
    bench.call("POST", &format!("{sandbox}/pause"), "");
    for (path, expected) in [
        ("/v1/sandboxes".to_owned(), "error"),
        (format!("{sandbox}/resume"), "paused"),
    ] {
        bench.make_fifo("stop-at-start");
        let asking = bench.daemon.send("POST", &path, "{}");
        let at_start = bench.place.path("stop-at-start");
        let stopped = fs::File::options().write(true).open(&at_start).unwrap();
        let vmm = bench.vmms().pop().unwrap();
        let id = bench.place.id();
        bench.kill();
        fs::remove_file(at_start).unwrap();
        drop((asking, stopped));
        bench.restart();
        let row = bench.daemon.get(&format!("/v1/sandboxes/{id}"));
        assert_eq!(row["status"], expected, "{row}");
        bench.place.assert_nothing_is_left(&vmm);
    }
    bench.call("POST", &format!("{sandbox}/resume"), "");
    bench.assert_is_whole(&sandbox);
    bench.daemon.signal(Signal::TERM);
}

#[test]
fn an_idle_timeout_that_passes_while_there_is_no_daemon_is_kept_at_its_start() {
    let mut bench = Bench::new();
    let sandbox = bench.create(r#"{"timeout_sec": 2}"#);
    let other = bench.create(r#"{"timeout_sec": 1000}"#);
    bench.exec(&sandbox, "true");
    bench.kill();
    thread::sleep(Duration::from_secs(2));
    bench.restart();
    let begun = Instant::now();
    until("it is paused", || bench.status(&sandbox) == "paused");
    assert!(
        begun.elapsed() < Duration::from_secs(5),
        "{:?}",
        begun.elapsed()
    );
    assert_eq!(bench.status(&other), "running");
    bench.call("POST", &format!("{sandbox}/resume"), "");
    bench.assert_is_whole(&sandbox);
    bench.daemon.signal(Signal::TERM);
}
