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

use conformance::microvm;
use conformance::wrenn::{self, UPLOAD_BYTES};
use place::Daemon;
use serde_json::json;

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
