//! Programs of others, from PyPI. `scripts/test-python` installs them and runs this.
//!
//! schemathesis makes requests up from the description of the API, good ones and bad ones, and compares
//! the answers with it. What commands and files of sandboxes do here, they do to the agent's machine, so
//! the agent is jailed.

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
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use place::Daemon;
use serde_json::json;

/// Enough to create what is there to be found, and few enough for this machine.
const CONFIG: &str = "
[auth]
requests_per_minute = 0
requests_per_hour = 0
[auth.user_quota]
sandboxes = 6
[auth.local_quota]
sandboxes = 6
";

/// What the script of [`vmm::install`] starts; does nothing in a run of the tests.
#[test]
fn as_a_vmm() {
    vmm::run();
}

/// Makes a program that is the agent in a machine of its own: with the programs of this one, without its
/// files, processes and network.
fn jailed_agent(dir: &Path) -> PathBuf {
    let script = format!(
        r#"#!/bin/bash
set -e
socket=${{2#unix:}}
mkdir "$socket.d"
ln -s "$(/usr/bin/basename "$socket").d/s" "$socket"
exec /usr/bin/bwrap --die-with-parent --unshare-pid --unshare-net --unshare-ipc --unshare-uts \
    --ro-bind /usr/bin /usr/bin --symlink usr/bin /bin --symlink usr/lib64 /lib64 \
    --ro-bind /usr/lib/x86_64-linux-gnu /usr/lib/x86_64-linux-gnu --symlink usr/lib /lib \
    --ro-bind /usr/lib64 /usr/lib64 \
    --proc /proc --dev /dev --tmpfs /tmp --dir /root --dir /etc --clearenv \
    --bind "$socket.d" /host --ro-bind {agent} /agent /agent --listen unix:/host/s
"#,
        agent = agent::binary().display()
    );
    let path = dir.join("jailed-agent");
    fs::write(&path, script).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// A file beside the requirements of these programs.
fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/python")
        .join(name)
}

/// The `Authorization` of a new administrator.
fn administrator(daemon: &Daemon) -> String {
    let user = json!({"username": "root", "password": "Correct-Horse-9", "role": "admin"});
    let answer = daemon.call("POST", "/api/v1/auth/register", &user.to_string());
    assert_eq!(answer.status, 201, "{:?}", answer.json());
    let answer = daemon.call("POST", "/api/v1/auth/login", &user.to_string());
    answer.json()["access_token"].as_str().unwrap().to_owned()
}

/// The ids of some sandboxes that run.
fn sandboxes(daemon: &Daemon) -> Vec<String> {
    let created = (0..3).map(|_| daemon.call("POST", "/v1/sandboxes", "{}").json());
    let ids = created.map(|sandbox| sandbox["id"].as_str().unwrap().to_owned());
    ids.collect()
}

/// Runs schemathesis with these arguments; nothing may be found.
fn examine(daemon: &Daemon, arguments: &[&str]) {
    let program = std::env::var_os("MVS_SCHEMATHESIS").unwrap();
    let config = daemon.path("schemathesis.toml");
    let ids = json!({"values": sandboxes(daemon)})["values"].to_string();
    let text = fs::read_to_string(file("schemathesis.toml")).unwrap();
    fs::write(&config, text.replace("[\"IDS\"]", &ids)).unwrap();
    let examples = std::env::var("MVS_SCHEMATHESIS_EXAMPLES");
    let status = Command::new(program)
        .arg("--config-file")
        .arg(config)
        .arg("run")
        .arg(format!("http://{}/openapi.json", daemon.address()))
        .args(["--max-examples", examples.as_deref().unwrap_or("10")])
        .args(arguments)
        // It writes caches to where it runs.
        .current_dir(daemon.path(""))
        .status()
        .unwrap();
    if !status.success() {
        let log = fs::read_to_string(daemon.path("daemon.log")).unwrap();
        let errors: Vec<_> = log
            .lines()
            .filter(|line| !line.contains("\"INFO\""))
            .collect();
        panic!(
            "it has found something, see above; the daemon says:\n{}",
            errors.join("\n")
        );
    }
}

fn jailed() -> Daemon {
    let config = tempfile::NamedTempFile::new().unwrap();
    fs::write(config.path(), CONFIG).unwrap();
    let config = format!("--config={}", config.path().display());
    Daemon::start_with(jailed_agent, &[&config, "--upload-bytes=100000"])
}

#[test]
#[ignore = "needs schemathesis: run by scripts/test-python"]
fn schemathesis_finds_nothing_with_a_token() {
    let daemon = jailed();
    let header = format!("Authorization: Bearer {}", administrator(&daemon));
    examine(&daemon, &["--header", &header]);
}

#[test]
#[ignore = "needs schemathesis: run by scripts/test-python"]
fn schemathesis_finds_nothing_without_a_token() {
    examine(&jailed(), &[]);
}

#[test]
#[ignore = "needs py-microvm: run by scripts/test-python"]
fn every_method_of_py_microvm_works() {
    let daemon = Daemon::start(&[]);
    let status = Command::new(std::env::var_os("MVS_PY_MICROVM").unwrap())
        .arg(file("py_microvm.py"))
        .arg(format!("http://{}", daemon.address()))
        .arg(administrator(&daemon))
        .arg(daemon.path(""))
        .status()
        .unwrap();
    assert!(status.success(), "something does not, see above");
}
