//! What clients of the two published APIs expect, with real guests and a network.

use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use ::conformance::wrenn::{self, UPLOAD_BYTES};
use ::conformance::{Answer, Client, microvm};
use e2e_tests::daemon::Daemon;
use e2e_tests::http::Request;
use e2e_tests::outside::Outside;
use e2e_tests::setup::setup;
use e2e_tests::until;
use serde_json::json;

struct Asks(Daemon);

impl Client for Asks {
    fn connect(&self) -> TcpStream {
        TcpStream::connect(self.0.address()).unwrap()
    }

    fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
        let mut request = Request::new(method, path);
        for (name, value) in headers {
            request = request.header(name, value);
        }
        let response = self.0.send(request, body, body.len() as u64);
        Answer {
            status: response.status,
            kind: response
                .header("content-type")
                .unwrap_or_default()
                .to_owned(),
            body: response.bytes(),
        }
    }
}

#[test]
fn every_operation_of_v1_answers_with_every_status_as_the_document_says() {
    let _outside = Outside::beside_new_network();
    let garbage = tempfile::NamedTempFile::new().unwrap();
    garbage.as_file().set_len(1 << 20).unwrap();
    let template = format!("broken={}", garbage.path().display());
    let upload = UPLOAD_BYTES.to_string();
    let daemon = Asks(Daemon::start_with(&[
        "--network",
        "on",
        "--upload-bytes",
        &upload,
        "--template",
        &template,
    ]));
    let place = wrenn::Place {
        sandbox: json!({}),
        file: "/root/file",
        has_network: true,
        broken: &|| json!({"template": "broken", "memory_mb": 128}),
    };
    wrenn::every_operation(&daemon, &place);
}

#[test]
fn every_example_of_api_v1_is_answered_as_it_says() {
    let _outside = Outside::beside_new_network();
    let daemon = Asks(Daemon::start_with(&["--network", "on"]));
    let place = microvm::Place {
        directory: "/srv",
        has_network: true,
        has_guests: true,
    };
    let problems = microvm::every_example(&daemon, &place);
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}

#[test]
fn every_method_of_py_microvm_works() {
    let daemon = Asks(Daemon::start());
    let user = json!({"username": "alice", "password": "Correct-horse-7", "role": "user"});
    let ask = |path: &str| {
        let (status, answer) = daemon.0.call("POST", path, &user.to_string());
        assert!(status < 300, "{answer}");
        answer
    };
    ask("/api/v1/auth/register");
    let token = ask("/api/v1/auth/login")["access_token"].take();
    let python = std::env::var_os("MVS_PY_MICROVM")
        .expect("MVS_PY_MICROVM names a python that has py-microvm; `tests/run` sets it");
    let status = Command::new(python)
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("python/py_microvm.py"))
        .arg(format!("http://{}", daemon.0.address()))
        .arg(token.as_str().unwrap())
        .arg("/srv")
        .status()
        .unwrap();
    assert!(status.success(), "something does not, see above");
}

/// The published client of the API that `/v1` follows has tests of itself, which ask a server. They are of
/// the client's authors and are run as they are, but for the time that the client waits. What they want of a
/// template is git, and root's home as the directory to begin in.
#[test]
fn the_tests_of_the_client_wrenn_pass() {
    let variable = |name: &str| {
        std::env::var_os(name).unwrap_or_else(|| panic!("{name} is not set; `tests/run` sets it"))
    };
    let template = format!("minimal={}", setup().python_template.display());
    let arguments = ["--template", &template, "--warm-disk-bytes", "2147483648"];
    let daemon = Daemon::start_with(&arguments);
    until("sandboxes start from memory", || {
        let sandbox = daemon.create(&json!({}));
        let is_warm = sandbox.get()["timings_ms"]["start"] != "cold";
        sandbox.delete();
        is_warm
    });
    let (status, key) = daemon.call("POST", "/v1/api-keys", r#"{"name": "sdk"}"#);
    assert_eq!(status, 201, "{key}");
    let tests = PathBuf::from(variable("MVS_WRENN_TESTS"));
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("python");
    let packages = PathBuf::from(variable("MVS_WRENN_PACKAGES"));
    let modules = std::env::join_paths([packages, own]).unwrap();
    let status = Command::new(variable("MVS_WRENN_PYTHON"))
        .args([
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            "-p",
            "patient_httpx",
            "--durations=5",
            "-rA",
        ])
        .arg(tests.join("test_integration.py"))
        .env("PYTHONPATH", modules)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env("WRENN_BASE_URL", format!("http://{}", daemon.address()))
        .env("WRENN_API_KEY", key["key"].as_str().unwrap())
        .status()
        .unwrap();
    assert!(status.success(), "one has failed, see above");
}
