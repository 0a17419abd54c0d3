//! Machines that are kept, stopped while their guests do not want to.

use std::thread;
use std::time::Instant;

use e2e_tests::PATIENCE;
use e2e_tests::admin::Admin;
use e2e_tests::daemon::Daemon;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

#[test]
fn force_ends_a_stop_that_waits_for_the_guest_and_the_disk_is_kept() {
    let daemon = Daemon::start();
    let admin = Admin::register(&daemon);
    let vm = json!({"name": "vm", "memory_mb": 192});
    let made = admin.must(&daemon, "POST", "/vms", &vm);
    admin.must(&daemon, "POST", "/vms/vm/start", &Value::Null);
    let sandbox = daemon.sandbox(made["id"].as_str().unwrap());
    sandbox.must("echo kept >/root/kept && sync");
    // It has ten seconds from the agent, and the stop an hour.
    sandbox.must(
        "sh -c 'trap \"\" TERM; touch /run/deaf; while :; do sleep 1; done' >/dev/null 2>&1 & \
         until [ -e /run/deaf ]; do sleep 0.1; done",
    );
    thread::scope(|scope| {
        let patient = scope.spawn(|| {
            let stop = json!({"timeout_seconds": 3600});
            admin.call(&daemon, "POST", "/vms/vm/stop", &stop)
        });
        let deadline = Instant::now() + PATIENCE;
        while admin.must(&daemon, "GET", "/vms/vm", &Value::Null)["status"] == "running" {
            assert!(Instant::now() < deadline, "it is not stopped");
        }
        let force = json!({"force": true});
        let forced = admin.must(&daemon, "POST", "/vms/vm/stop", &force);
        assert_eq!(forced["status"], "stopped", "{forced}");
        let (status, answer) = patient.join().unwrap();
        assert_eq!((status, &answer["status"]), (200, &json!("stopped")));
    });
    daemon
        .process
        .stderr
        .wait_for("cutting the power of a sandbox");
    admin.must(&daemon, "POST", "/vms/vm/start", &Value::Null);
    assert_eq!(sandbox.must("cat /root/kept"), "kept");
    sandbox.delete();
}

#[test]
fn a_machine_whose_vmm_dies_as_it_is_stopped_keeps_its_disk() {
    let daemon = Daemon::start();
    let admin = Admin::register(&daemon);
    let vm = json!({"name": "vm", "memory_mb": 192});
    let made = admin.must(&daemon, "POST", "/vms", &vm);
    let sandbox = daemon.sandbox(made["id"].as_str().unwrap());
    let status = || admin.must(&daemon, "GET", "/vms/vm", &Value::Null)["status"].take();
    let mut written = String::new();
    for (round, operation) in ["stop", "restart", "stop", "restart"].iter().enumerate() {
        if status() != "running" {
            admin.must(&daemon, "POST", "/vms/vm/start", &Value::Null);
        }
        written.push_str(&format!("{round}\n"));
        sandbox.must(&format!("echo {round} >>/root/kept && sync"));
        let pid = Pid::from_raw(sandbox.vmm_pid().cast_signed()).unwrap();
        kill_process(pid, Signal::KILL).unwrap();
        // Before the daemon has seen that, while it sees to it, or after.
        let path = format!("/vms/vm/{operation}");
        let (answered, answer) = admin.call(&daemon, "POST", &path, &json!({"force": true}));
        assert!([200, 409, 502].contains(&answered), "{answered} {answer}");
        // The end is told by now, or was no news.
        let deadline = Instant::now() + PATIENCE;
        while sandbox.find_outer_pid().is_none() && status() == "running" {
            assert!(Instant::now() < deadline, "its end is not told");
        }
        assert_ne!(status(), "error", "{operation}: {answered} {answer}");
    }
    if status() != "running" {
        admin.must(&daemon, "POST", "/vms/vm/start", &Value::Null);
    }
    assert_eq!(sandbox.must("cat /root/kept"), written.trim_end());
    sandbox.delete();
}
