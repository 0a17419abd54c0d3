//! Whatever an operation answers is in its description: here, while the agents of sandboxes go away.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on may panic"
)]

#[path = "support/agent.rs"]
mod agent;
#[path = "support/operations.rs"]
mod operations;
#[path = "support/place.rs"]
mod place;
#[path = "support/vmm.rs"]
mod vmm;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use conformance::{Answer, Client};
use operations::{Things, body_for};
use place::Daemon;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

const LIMITS: &str = "
[auth]
requests_per_minute = 0
requests_per_hour = 0
";

/// What the script of [`vmm::install`] starts; does nothing in a run of the tests.
#[test]
fn as_a_vmm() {
    vmm::run();
}

/// Makes a program that is the agent, and notes who it is in `DIR/agents`.
fn noted_agent(dir: &Path) -> PathBuf {
    let (noted, agent) = (dir.join("agents"), agent::binary().display());
    let script = format!(
        "#!/bin/bash\necho $$ >>{}\nexec {agent} \"$@\"\n",
        noted.display()
    );
    let path = dir.join("noted-agent");
    fs::write(&path, script).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// Ends all agents.
fn kill_agents(daemon: &Daemon) {
    let noted = daemon.path("agents");
    for pid in fs::read_to_string(&noted).unwrap().lines() {
        let pid = Pid::from_raw(pid.parse().unwrap()).unwrap();
        kill_process(pid, Signal::KILL).unwrap();
    }
    fs::remove_file(noted).unwrap();
}

/// A form with a file, and its content type.
fn form() -> (String, String) {
    let part = |field: &str, value: &str| {
        format!("--line\r\nContent-Disposition: form-data; name={field}\r\n\r\n{value}\r\n")
    };
    let path = part("path", "/f") + &part("remote_path", "/f");
    let file = part("\"file\"; filename=\"f\"", "x");
    let kind = "multipart/form-data; boundary=line".to_owned();
    (kind, format!("{path}{file}--line--\r\n"))
}

/// The answer to a request that makes sense at this operation.
fn ask(daemon: &Daemon, token: &str, method: &str, path: &str) -> Answer {
    let last = path.rsplit('/').next().unwrap();
    let (kind, body) = match last {
        "write" | "upload" => form(),
        // One that waits for its guest waits for as long.
        "stop" | "restart" => (String::new(), r#"{"timeout_seconds": 1}"#.to_owned()),
        _ => ("application/json".to_owned(), body_for(path).to_owned()),
    };
    let query = match (method, last) {
        ("GET", "download" | "files") => "?path=/",
        _ => "",
    };
    let headers = [("Authorization", token), ("Content-Type", &kind)];
    let path = format!("{path}{query}");
    Client::send(daemon, method, &path, &headers, body.as_bytes())
}

#[test]
fn what_operations_answer_when_the_agent_is_gone_is_in_their_descriptions() {
    let config = tempfile::NamedTempFile::new().unwrap();
    fs::write(config.path(), LIMITS).unwrap();
    let config = format!("--config={}", config.path().display());
    let daemon = Daemon::start_with(noted_agent, &[&config]);
    let token = daemon.administrator();
    let document: Value = serde_json::from_str(&api::http::json().unwrap()).unwrap();
    let (mut failed, mut undocumented) = (0, Vec::new());
    for (path, operations) in document["paths"].as_object().unwrap() {
        if !["sandboxes/{", "capsules/{", "vms/{"]
            .iter()
            .any(|one| path.contains(one))
        {
            continue;
        }
        for (method, operation) in operations.as_object().unwrap() {
            let method = method.to_uppercase();
            let headers = [("Authorization", token.as_str())];
            let made = Client::send(&daemon, "POST", "/v1/sandboxes", &headers, b"{}").json();
            let things = Things {
                sandbox: made["id"].as_str().unwrap().to_owned(),
                snapshot: "none".to_owned(),
                template: "none".to_owned(),
                key: "none".to_owned(),
                scan: "none".to_owned(),
            };
            kill_agents(&daemon);
            let answer = ask(&daemon, &token, &method, &things.fill(path));
            failed += usize::from(answer.status == 502);
            if operation["responses"]
                .get(answer.status.to_string())
                .is_none()
            {
                let text = String::from_utf8_lossy(&answer.body).into_owned();
                undocumented.push(format!("{method} {path}: {} {text}", answer.status));
            }
            let path = format!("/v1/sandboxes/{}", things.sandbox);
            Client::send(&daemon, "DELETE", &path, &headers, b"");
        }
    }
    assert!(undocumented.is_empty(), "{}", undocumented.join("\n"));
    assert!(failed > 20, "only {failed} have asked the agent");
}
