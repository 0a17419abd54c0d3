//! What becomes of sandboxes when the daemon is asked to end. A program stands in for the VMM, with the
//! real agent behind it.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on may panic")]

#[path = "support/agent.rs"]
mod agent;
#[path = "support/daemon.rs"]
mod daemon;
#[path = "support/vmm.rs"]
mod vmm;

use std::fs::{self, File};
use std::io::{BufRead, Read};
use std::net::TcpStream;

use api::audit;
use daemon::{Daemon, Place, answer, runs};
use rusqlite::Connection;
use rustix::fs::FileType;
use rustix::process::Signal;
use serde_json::{Value, json};

/// What the script of [`vmm::install`] starts; does nothing in a run of the tests.
#[test]
fn as_a_vmm() {
    vmm::run();
}

fn place() -> Place {
    let place = Place::new();
    vmm::install(&place.path(""), "as_a_vmm", agent::binary());
    place
}

fn call(daemon: &Daemon, path: &str, body: &Value) -> Value {
    let (status, answer) = answer(daemon.send("POST", path, &body.to_string()));
    assert!((200..300).contains(&status), "{path}: {status} {answer}");
    answer
}

fn create(daemon: &Daemon) -> String {
    let sandbox = call(daemon, "/v1/sandboxes", &json!({}));
    format!("/v1/sandboxes/{}", sandbox["id"].as_str().unwrap())
}

/// Asks a daemon to end, which does so well.
fn stop(daemon: &mut Daemon, signal: Signal) {
    daemon.signal(signal);
    let status = daemon.process.wait().unwrap();
    assert_eq!(status.code(), Some(0));
}

fn vmms(place: &Place) -> Vec<String> {
    let pids = fs::read_to_string(place.path("pid")).unwrap();
    pids.lines().map(str::to_owned).collect()
}

#[test]
fn sandboxes_run_on_when_the_daemon_ends_in_order() {
    let place = place();
    // What the settings say if nobody says anything.
    let default = fs::read_to_string("sandboxd.example.toml").unwrap();
    assert!(default.contains("\non_stop = \"keep\"\n"));
    let keep = ["--on-stop=keep"];
    let mut daemon = Daemon::start_with(&place, &keep);
    let (one, other) = (create(&daemon), create(&daemon));
    let script = "setsid sleep 1000 >/dev/null 2>&1 & echo $!";
    let exec = json!({"cmd": "/bin/sh", "args": ["-c", script]});
    let started = call(&daemon, &format!("{one}/exec"), &exec);
    let sleeper = started["stdout"].as_str().unwrap().trim().to_owned();
    call(&daemon, &format!("{other}/pause"), &json!({}));
    let paused = create(&daemon);
    call(&daemon, &format!("{paused}/pause"), &json!({}));
    call(&daemon, &format!("{other}/resume"), &json!({}));
    let before = vmms(&place);
    for signal in [Signal::TERM, Signal::INT] {
        stop(&mut daemon, signal);
        assert!(runs(&sleeper), "what runs in a sandbox goes on");
        daemon = Daemon::start_with(&place, &keep);
        assert_eq!(vmms(&place), before, "none was started anew");
        for (sandbox, status) in [(&one, "running"), (&other, "running"), (&paused, "paused")] {
            let row = daemon.get(sandbox);
            assert_eq!(row["status"], status, "{row}");
        }
        let exec = json!({"cmd": "/bin/sh", "args": ["-c", format!("kill -0 {sleeper}")]});
        assert_eq!(call(&daemon, &format!("{one}/exec"), &exec)["exit_code"], 0);
    }
    // They are as any other: saved, and gone when they are deleted.
    call(&daemon, &format!("{one}/fork"), &json!({}));
    let rows = daemon.get("/v1/sandboxes");
    for row in rows.as_array().unwrap() {
        let path = format!("/v1/sandboxes/{}", row["id"].as_str().unwrap());
        assert_eq!(answer(daemon.send("DELETE", &path, "")).0, 204);
    }
    stop(&mut daemon, Signal::TERM);
    for vmm in vmms(&place) {
        place.assert_nothing_is_left(&vmm);
    }
}

#[test]
fn sandboxes_are_paused_when_the_daemon_ends_if_it_is_to() {
    let place = place();
    let mut daemon = Daemon::start_with(&place, &["--on-stop=pause"]);
    let sandboxes: Vec<_> = (0..5).map(|_| create(&daemon)).collect();
    stop(&mut daemon, Signal::TERM);
    for vmm in vmms(&place) {
        assert!(!runs(&vmm), "it has no process");
    }
    let mut daemon = Daemon::start_with(&place, &["--on-stop=delete"]);
    for sandbox in &sandboxes {
        assert_eq!(daemon.get(sandbox)["status"], "paused");
    }
    call(&daemon, &format!("{}/resume", sandboxes[0]), &json!({}));
    // One that runs is ended with the daemon that is to do so; the others stay as they are.
    stop(&mut daemon, Signal::TERM);
    let last = vmms(&place).pop().unwrap();
    place.assert_nothing_is_left(&last);
    let mut daemon = Daemon::start_with(&place, &[]);
    assert_eq!(daemon.get(&sandboxes[0])["status"], "stopped");
    for sandbox in &sandboxes[1..] {
        assert_eq!(daemon.get(sandbox)["status"], "paused");
    }
    stop(&mut daemon, Signal::TERM);
}

#[test]
fn what_cannot_be_paused_runs_on() {
    let place = place();
    let mut daemon = Daemon::start_with(&place, &["--on-stop=pause"]);
    let (one, other) = (create(&daemon), create(&daemon));
    fs::write(place.path("no-space"), "").unwrap();
    stop(&mut daemon, Signal::TERM);
    fs::remove_file(place.path("no-space")).unwrap();
    assert!(vmms(&place).iter().all(|vmm| runs(vmm)));
    let daemon = Daemon::start_with(&place, &["--on-stop=delete"]);
    for sandbox in [&one, &other] {
        assert_eq!(daemon.get(sandbox)["status"], "running");
    }
    daemon.signal(Signal::TERM);
}

/// A command that runs on and on, once it does: until somebody hangs up, it holds the second of the two
/// fifos open.
fn run_on(daemon: &Daemon, place: &Place, sandbox: &str, name: &str) -> (TcpStream, File) {
    let [begun, held] = ["begun", "held"].map(|what| place.path(&format!("{name}-{what}")));
    for fifo in [&begun, &held] {
        rustix::fs::mknodat(rustix::fs::CWD, fifo, FileType::Fifo, 0o600.into(), 0).unwrap();
    }
    let script = format!(
        "exec 3>{held}; echo yes >{begun}; exec sleep 1000",
        held = held.display(),
        begun = begun.display()
    );
    let exec = json!({"cmd": "/bin/sh", "args": ["-c", script], "timeout_sec": 3600});
    let stream = daemon.send("POST", &format!("{sandbox}/exec"), &exec.to_string());
    let held = File::open(held).unwrap();
    assert_eq!(fs::read(begun).unwrap(), b"yes\n");
    (stream, held)
}

#[test]
fn a_command_whose_connection_ends_is_on_record() {
    let place = place();
    let mut daemon = Daemon::start_with(&place, &["--on-stop=keep"]);
    let sandbox = create(&daemon);
    let (gone, mut held) = run_on(&daemon, &place, &sandbox, "gone");
    drop(gone);
    // It ends with its caller.
    assert_eq!(held.read_to_end(&mut Vec::new()).unwrap(), 0);
    let _ends_with_the_daemon = run_on(&daemon, &place, &sandbox, "late");
    // In order, and at once.
    daemon.signal(Signal::TERM);
    let mut log = daemon.stderr.take().unwrap().lines();
    log.find(|line| line.as_ref().unwrap().contains("shutting down"))
        .unwrap()
        .unwrap();
    stop(&mut daemon, Signal::TERM);
    let records = Connection::open(place.path("data").join(audit::FILE)).unwrap();
    let sql = "SELECT action_type, outcome, details ->> 'unanswered' FROM records";
    let mut statement = records.prepare(sql).unwrap();
    let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)));
    let rows: Vec<(String, String, Option<String>)> =
        rows.unwrap().collect::<Result<_, _>>().unwrap();
    let ended = Some("the connection ended".to_owned());
    let exec = ("vm_exec".to_owned(), "unanswered".to_owned(), ended);
    let create = ("vm_create".to_owned(), "success".to_owned(), None);
    assert_eq!(rows, [create, exec.clone(), exec]);
    // It takes the sandbox with it.
    stop(&mut Daemon::start(&place), Signal::TERM);
}
