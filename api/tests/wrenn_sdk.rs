//! The published client of the API that `/v1` follows, unmodified, in an old and in a new version, with a
//! daemon whose guests are the real agent on this machine.

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

use std::process::{Command, Stdio};

use place::Daemon;

/// What the script of [`vmm::install`] starts; does nothing in a run of the tests.
#[test]
fn as_a_vmm() {
    vmm::run();
}

/// A Python that has this version of the client.
fn python(version: &str) -> String {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../scripts/wrenn-sdk");
    let output = Command::new(script)
        .arg(version)
        .stderr(Stdio::inherit())
        .output()
        .unwrap();
    assert!(output.status.success(), "the client is not installed");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

fn session(version: &str) {
    let daemon = Daemon::start(&[]);
    let key = daemon
        .call("POST", "/v1/api-keys", r#"{"name": "sdk"}"#)
        .json();
    let directory = daemon.path("in-sandbox");
    std::fs::create_dir(&directory).unwrap();
    let output = Command::new(python(version))
        .arg(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/tests/wrenn_sdk/session.py"
        ))
        .arg(&directory)
        .env("WRENN_BASE_URL", format!("http://{}", daemon.address()))
        .env("WRENN_API_KEY", key["key"].as_str().unwrap())
        .env_remove("WRENN_PROXY_DOMAIN")
        .output()
        .unwrap();
    let [out, err] = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap());
    assert!(output.status.success(), "{version}: {out}\n{err}");
    assert!(out.starts_with("all is well"), "{out}");
}

#[test]
fn its_client_of_json_terminals_works_unmodified() {
    session("0.1.2");
}

#[test]
fn its_client_of_binary_terminals_works_unmodified() {
    session("0.3.0");
}
