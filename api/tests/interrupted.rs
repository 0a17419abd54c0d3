//! What is under way in a sandbox when somebody takes it away ends, and says why.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on may panic"
)]

#[path = "support/agent.rs"]
mod agent;
#[path = "support/place.rs"]
mod place;
#[path = "support/vmm.rs"]
mod vmm;

use std::fs;
use std::thread;

use conformance::{Answer, Client};
use place::Daemon;
use serde_json::{Value, json};

/// What the script of [`vmm::install`] starts; does nothing in a run of the tests.
#[test]
fn as_a_vmm() {
    vmm::run();
}

/// What a command is answered that runs when the sandbox is taken away, and what that is answered.
fn taken_away(
    daemon: &Daemon,
    (path, command): (&str, fn(&str) -> Value),
    (method, by, how): (&str, &str, &Value),
    token: &str,
) -> [Answer; 2] {
    let fifo = daemon.path("has-started");
    let _ = fs::remove_file(&fifo);
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &fifo,
        rustix::fs::FileType::Fifo,
        0o600.into(),
        0,
    )
    .unwrap();
    let send = |method: &str, path: &str, body: &Value| {
        let headers = [
            ("Authorization", token),
            ("Content-Type", "application/json"),
        ];
        Client::send(daemon, method, path, &headers, body.to_string().as_bytes())
    };
    let script = format!("echo yes >{}; exec sleep 1000", fifo.display());
    thread::scope(|scope| {
        let under_way = scope.spawn(|| send("POST", path, &command(&script)));
        assert_eq!(fs::read(&fifo).unwrap(), b"yes\n");
        let done = send(method, by, how);
        [under_way.join().unwrap(), done]
    })
}

#[test]
fn a_command_hears_that_its_sandbox_was_stopped_or_deleted() {
    let daemon = Daemon::start(&[]);
    let token = daemon.administrator();
    let of_v1 = |script: &str| json!({"cmd": "sh", "args": ["-c", script], "timeout_sec": 900});
    let of_vms = |script: &str| json!({"command": script, "timeout_seconds": 900});
    let headers = [("Authorization", token.as_str())];
    let create = || {
        let made = Client::send(&daemon, "POST", "/v1/sandboxes", &headers, b"{}").json();
        made["id"].as_str().unwrap().to_owned()
    };

    let id = create();
    let (exec, sandbox) = (
        format!("/v1/sandboxes/{id}/exec"),
        format!("/v1/sandboxes/{id}"),
    );
    let delete = ("DELETE", sandbox.as_str(), &json!({}));
    let [command, deleted] = taken_away(&daemon, (&exec, of_v1), delete, &token);
    assert_eq!(
        (command.status, deleted.status),
        (409, 204),
        "{:?}",
        command.json()
    );
    let error = command.json()["error"].clone();
    assert_eq!(error["code"], "invalid_state", "{error}");
    assert!(
        error["message"]
            .as_str()
            .unwrap()
            .contains("destroyed in the meantime")
    );

    for (by, words) in [
        (json!({"force": true}), "stopped in the meantime"),
        (json!({"timeout_seconds": 1}), "stopped in the meantime"),
    ] {
        let id = create();
        let execute = format!("/api/v1/vms/{id}/execute");
        let stop = format!("/api/v1/vms/{id}/stop");
        let stop = ("POST", stop.as_str(), &by);
        let [command, stopped] = taken_away(&daemon, (&execute, of_vms), stop, &token);
        assert_eq!(stopped.status, 200, "{:?}", stopped.json());
        assert_eq!(command.status, 409, "{by}: {:?}", command.json());
        let message = command.json()["message"].clone();
        assert!(message.as_str().unwrap().contains(words), "{message}");
    }
}
