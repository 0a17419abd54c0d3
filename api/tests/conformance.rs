//! What clients of the two published APIs expect, by a daemon as a process without real guests. With
//! them: `tests/scenarios/conformance.rs`.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on may panic")]

#[path = "support/agent.rs"]
mod agent;
#[path = "support/place.rs"]
mod place;
#[path = "support/vmm.rs"]
mod vmm;

use std::fs;
use std::io::{Read, Write};

use conformance::microvm::{self, is_error_like};
use conformance::wrenn::{self, UPLOAD_BYTES};
use conformance::{Answer, Client};
use place::{Daemon, answer};
use rusqlite::Connection;
use rustix::fs::{CWD, FileType, Mode, mknodat};
use serde_json::{Value, json};

/// What the script of [`vmm::install`] starts; does nothing in a run of the tests.
#[test]
fn as_a_vmm() {
    vmm::run();
}

#[test]
fn every_operation_answers_with_every_status_as_the_document_says() {
    let daemon = Daemon::start(&[&format!("--upload-bytes={UPLOAD_BYTES}")]);
    let file = daemon.path("file");
    let place = wrenn::Place {
        sandbox: json!({}),
        file: file.to_str().unwrap(),
        has_network: false,
        broken: &|| {
            let script = "#!/bin/sh\necho no room >&2\nexit 1\n";
            fs::write(daemon.path("vmm"), script).unwrap();
            json!({})
        },
    };
    wrenn::every_operation(&daemon, &place);
}

#[test]
fn every_example_of_the_reference_is_answered_as_it_says() {
    let daemon = Daemon::start(&[]);
    let directory = daemon.path("files");
    fs::create_dir(&directory).unwrap();
    let place = microvm::Place {
        directory: directory.to_str().unwrap(),
        has_network: false,
        has_guests: false,
    };
    let problems = microvm::every_example(&daemon, &place);
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}

/// The `Authorization` of a new administrator.
fn administrator(daemon: &Daemon) -> String {
    let user = json!({"username": "alice", "password": "Correct-horse-7", "role": "admin"});
    daemon.call("POST", "/api/v1/auth/register", &user.to_string());
    let token = daemon.call("POST", "/api/v1/auth/login", &user.to_string());
    let token = token.json();
    format!("Bearer {}", token["access_token"].as_str().unwrap())
}

fn get(daemon: &Daemon, path: &str, bearer: &str) -> Answer {
    Client::send(daemon, "GET", path, &[("Authorization", bearer)], b"")
}

/// Whether this is the reference's error of this status.
fn is_error(answer: &Answer, status: u16) -> Value {
    let error = answer.json();
    assert_eq!(answer.status, status, "{error}");
    assert_eq!(is_error_like(status, &error), Ok(()), "{error}");
    error
}

#[test]
fn a_failure_of_the_daemon_is_500_with_the_id_that_its_log_has() {
    let daemon = Daemon::start(&[]);
    let bearer = administrator(&daemon);
    // A failure of what was asked for, and one of the check of who asks.
    for table in ["sandboxes", "users"] {
        let records = Connection::open(daemon.path("data/sandboxd.db")).unwrap();
        let rename = |from: &str, to: &str| {
            let statement = format!("ALTER TABLE {from} RENAME TO {to}");
            records.execute_batch(&statement).unwrap();
        };
        rename(table, "away");
        let error = is_error(&get(&daemon, "/api/v1/vms", &bearer), 500);
        assert_eq!(error["message"], "An unexpected error occurred");
        let line = daemon.logged("request failed");
        assert_eq!(line["span"]["request_id"], error["request_id"], "{line}");
        let reason = line["fields"]["reason"].as_str().unwrap();
        assert!(
            reason.contains(&format!("no such table: {table}")),
            "{reason}"
        );
        rename("away", table);
        assert_eq!(get(&daemon, "/api/v1/vms", &bearer).status, 200);
    }
}

#[test]
fn what_cannot_be_served_is_503() {
    let mut daemon = Daemon::start(&["--on-stop=pause", "--shutdown-timeout-sec=1"]);
    let bearer = administrator(&daemon);

    // There is no working VMM.
    let (vmm, away) = (daemon.path("vmm"), daemon.path("vmm.away"));
    fs::rename(&vmm, &away).unwrap();
    let error = is_error(&daemon.call("GET", "/api/v1/health", ""), 503);
    assert_eq!(error["components"]["cloud_hypervisor"], "unhealthy");
    fs::rename(&away, &vmm).unwrap();
    assert_eq!(daemon.call("GET", "/api/v1/health", "").status, 200);

    // The daemon is ending, and held up by a sandbox that is being paused.
    let created = daemon.call("POST", "/v1/sandboxes", "{}");
    assert_eq!(created.status, 201);
    let held = daemon.path("stop-before-vm.pause");
    mknodat(CWD, &held, FileType::Fifo, Mode::RWXU, 0).unwrap();
    let mut stream = daemon.connect();
    let body = json!({"vcpus": 1}).to_string();
    write!(
        stream,
        "POST /api/v1/vms HTTP/1.1\r\nHost: localhost\r\nAuthorization: {bearer}\r\n\
         Connection: close\r\nExpect: 100-continue\r\nContent-Length: {}\r\n\r\n",
        body.len()
    )
    .unwrap();
    let go_on = b"HTTP/1.1 100 Continue\r\n\r\n";
    let mut told = [0; 25];
    stream.read_exact(&mut told).unwrap();
    assert_eq!(&told, go_on);
    daemon.terminate();
    // Open once the VMM is asked to pause.
    let held = fs::File::options().write(true).open(held).unwrap();
    stream.write_all(body.as_bytes()).unwrap();
    let error = is_error(&answer(stream), 503);
    let message = error["message"].as_str().unwrap();
    assert!(message.contains("shutting down"), "{message}");
    drop(held);
    daemon.wait();
}
