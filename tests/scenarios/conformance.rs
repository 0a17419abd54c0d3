//! What clients of the two published APIs expect, with real guests and a network.

use std::net::TcpStream;

use ::conformance::wrenn::{self, UPLOAD_BYTES};
use ::conformance::{Answer, Client, microvm};
use e2e_tests::daemon::Daemon;
use e2e_tests::http::Request;
use e2e_tests::outside::Outside;
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
