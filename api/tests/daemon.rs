//! The daemon as a process: what it says when it cannot start, and what it leaves when it ends or
//! is killed. A script stands in for the VMM.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on may panic")]

#[path = "support/agent.rs"]
mod agent;
#[path = "support/daemon.rs"]
mod daemon;
#[path = "support/vmm.rs"]
mod vmm;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Command;
use std::thread;

use daemon::{Daemon, Place, answer, runs};
use rustix::process::Signal;
use serde_json::{Value, json};

/// Does as an agent that takes its identity, and returns what it is told.
fn take_identity(listener: UnixListener) -> Value {
    let (mut stream, _) = listener.accept().unwrap();
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut line = || {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    };
    assert_eq!(line(), "CONNECT 1024");
    stream.write_all(b"OK 1073741824\n").unwrap();
    assert_eq!(line(), "POST /v1/resumed HTTP/1.1");
    let mut length = 0;
    loop {
        let header = line();
        match header.split_once(": ") {
            Some((name, value)) if name.eq_ignore_ascii_case("content-length") => {
                length = value.parse().unwrap();
            }
            Some(_) => {}
            None => break,
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    let done = json!({"realtime_ns": 0, "seeded": false, "clock": false, "hostname": false,
                      "machine_id": false, "problems": []});
    let done = done.to_string();
    write!(
        stream,
        "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{done}",
        done.len()
    )
    .unwrap();
    serde_json::from_slice(&body).unwrap()
}

/// What the script of [`vmm::install`] starts; does nothing in a run of the tests.
#[test]
fn as_a_vmm() {
    vmm::run();
}

#[test]
fn after_a_crash_in_a_pause_the_sandbox_is_as_before_or_as_after() {
    let place = Place::new();
    vmm::install(&place.path(""), "as_a_vmm", agent::binary());
    let mut daemon = Daemon::start(&place);
    let create = |daemon: &Daemon| {
        let (status, sandbox) = answer(daemon.send("POST", "/v1/sandboxes", "{}"));
        assert_eq!(status, 201, "{sandbox}");
        format!("/v1/sandboxes/{}", sandbox["id"].as_str().unwrap())
    };
    let layers = || fs::read_dir(place.path("data/layers")).unwrap().count();
    let (paused, running) = (create(&daemon), create(&daemon));
    let (status, _) = answer(daemon.send("POST", &format!("{paused}/pause"), ""));
    assert_eq!((status, layers()), (200, 2));

    let fifo = place.path("hang");
    let made = Command::new("mkfifo").arg(&fifo).status().unwrap();
    assert!(made.success());
    let pausing = daemon.send("POST", &format!("{running}/pause"), "");
    // Opening it waits until the VMM is at it.
    let hung = fs::File::options().write(true).open(&fifo).unwrap();
    assert_eq!(
        daemon.get(&running)["status"],
        "paused",
        "or on the way there"
    );
    daemon.signal(Signal::KILL);
    daemon.process.wait().unwrap();
    drop((pausing, hung));
    fs::remove_file(fifo).unwrap();

    let daemon = Daemon::start(&place);
    assert_eq!(layers(), 2, "what was not complete is gone");
    assert_eq!(daemon.get(&running)["status"], "running");
    let (status, row) = answer(daemon.send("POST", &format!("{running}/pause"), ""));
    assert_eq!((status, &row["status"]), (200, &json!("paused")), "{row}");
    assert_eq!(daemon.get(&paused)["status"], "paused");
    let (status, row) = answer(daemon.send("POST", &format!("{paused}/resume"), ""));
    assert_eq!((status, &row["status"]), (200, &json!("running")), "{row}");
    daemon.signal(Signal::TERM);
}

#[test]
fn what_is_missing_is_named() {
    let place = Place::new();
    for (file, expected) in [
        ("images/vmlinux", "the guest kernel"),
        ("images/initramfs.cpio", "the initramfs"),
        ("images/minimal.ext4", "there is no template"),
        ("vmm", "the vmm binary"),
    ] {
        let (here, away) = (place.path(file), place.path("away"));
        fs::rename(&here, &away).unwrap();
        let text = place.refusal(&[]);
        assert!(text.contains(expected), "{text}");
        fs::rename(&away, &here).unwrap();
    }
    let text = place.refusal(&["--template=other=/no/where.ext4"]);
    assert!(
        text.contains("\"other\" /no/where.ext4 cannot be read"),
        "{text}"
    );
    let key = place.path("data/token.key");
    fs::create_dir_all(place.path("data")).unwrap();
    fs::write(&key, [7; 32]).unwrap();
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
    let text = place.refusal(&[]);
    assert!(text.contains("can be read by others"), "{text}");
    fs::remove_file(key).unwrap();
    let long = format!("--runtime-dir=/tmp/{}", "x".repeat(100));
    assert!(place.refusal(&[&long]).contains("choose a shorter one"));
}

#[test]
fn what_is_taken_is_named() {
    let place = Place::new();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let text = place.refusal(&["--listen", &address]);
    assert!(
        text.contains(&format!("{address} cannot be listened on")),
        "{text}"
    );

    let daemon = Daemon::start(&place);
    let text = place.refusal(&[]);
    assert!(text.contains("another sandboxd uses"), "{text}");
    daemon.signal(Signal::TERM);
}

#[test]
fn asked_to_end_it_ends_its_sandboxes_first() {
    let place = Place::new();
    let mut daemon = Daemon::start(&place);
    let request = daemon.send("POST", "/v1/sandboxes", "{}");
    let vmm = place.vmm();
    let id = place.id();
    daemon.signal(Signal::TERM);
    // The request is in flight; asked again, the daemon waits for it no longer.
    daemon.signal(Signal::INT);
    assert_eq!(daemon.process.wait().unwrap().code(), Some(0));
    drop(request);
    place.assert_nothing_is_left(&vmm);

    let daemon = Daemon::start(&place);
    let row = daemon.get(&format!("/v1/sandboxes/{id}"));
    assert!(
        row["status"] == "stopped" || row["status"] == "error",
        "{row}"
    );
    daemon.signal(Signal::TERM);
}

#[test]
fn what_cannot_be_taken_over_after_a_crash_is_ended_and_says_why() {
    let place = Place::new();
    let mut daemon = Daemon::start(&place);
    let request = daemon.send("POST", "/v1/sandboxes", "{}");
    let vmm = place.vmm();
    let id = place.id();
    let vsock = place.path("run/sandboxes").join(&id).join("vsock.sock");
    // The daemon turns to the agent as soon as it is told that it serves.
    let listener = UnixListener::bind(vsock).unwrap();
    let agent = thread::spawn(|| take_identity(listener));
    let ready = json!({"version": "1", "kernel": "6", "entered_us": 1, "serving_us": 2});
    let socket = place
        .path("run/sandboxes")
        .join(&id)
        .join("vsock.sock_1025");
    UnixStream::connect(socket)
        .unwrap()
        .write_all(ready.to_string().as_bytes())
        .unwrap();
    let (status, sandbox) = answer(request);
    assert_eq!((status, &sandbox["status"]), (201, &json!("running")));
    let told = agent.join().unwrap();
    assert_eq!(told["hostname"], json!(id));
    daemon.signal(Signal::KILL);
    daemon.process.wait().unwrap();
    assert!(runs(&vmm), "the VMM has ended with the daemon");

    // This VMM does not answer.
    let daemon = Daemon::start_with(&place, &["--boot-timeout-sec=1"]);
    place.assert_nothing_is_left(&vmm);
    let row = daemon.get(&format!("/v1/sandboxes/{id}"));
    assert_eq!(row["status"], "error");
    let reason = row["status_reason"].as_str().unwrap();
    for part in ["the daemon ended without notice", "could not be taken over"] {
        assert!(reason.contains(part), "{reason}");
    }
    assert_eq!(daemon.get("/v1/sandboxes"), json!([]));
    daemon.signal(Signal::TERM);
}
