//! Every operation of the API that `/v1` follows, with every status that it names, by a daemon as a
//! process: each answer is validated against that API's own schemas.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on may panic")]

#[path = "support/agent.rs"]
mod agent;
#[path = "support/place.rs"]
mod place;
#[path = "support/vmm.rs"]
mod vmm;

use std::collections::BTreeSet;
use std::fs;

use jsonschema::Draft;
use place::{Answer, Daemon};
use serde_json::{Value, json};

const FOLLOWED: &str = include_str!("support/wrenn.json");

/// Nothing is required of answers there, so that an empty object would do. Here all is that is named,
/// but what sandboxes without a network card do not have.
const MAY_BE_MISSING: [&str; 2] = ["guest_ip", "host_ip"];

/// What the script of [`vmm::install`] starts; does nothing in a run of the tests.
#[test]
fn as_a_vmm() {
    vmm::run();
}

/// Makes schemas of version 3.0 with `nullable` those of JSON Schema, and requires all properties.
fn strict(schema: &mut Value) {
    match schema {
        Value::Array(items) => items.iter_mut().for_each(strict),
        Value::Object(fields) => {
            if fields.get("nullable") == Some(&Value::Bool(true)) {
                let kind = fields["type"].clone();
                fields.insert("type".to_owned(), json!([kind, "null"]));
            }
            if let Some(Value::Object(properties)) = fields.get("properties") {
                let names = properties.keys();
                let required = names.filter(|name| !MAY_BE_MISSING.contains(&name.as_str()));
                let required: Vec<_> = required.cloned().collect();
                fields.insert("required".to_owned(), json!(required));
            }
            fields.values_mut().for_each(strict);
        }
        _ => {}
    }
}

/// The operations that were tried, and what their answers must be like.
struct Conformance {
    document: Value,
    daemon: Daemon,
    seen: BTreeSet<(String, String, u16)>,
}

impl Conformance {
    fn new() -> Self {
        let mut document: Value = serde_json::from_str(FOLLOWED).unwrap();
        strict(&mut document["components"]);
        Self {
            document,
            daemon: Daemon::start(&["--upload-bytes=1000"]),
            seen: BTreeSet::new(),
        }
    }

    /// The answer of an operation, which must have this status and be what that status is to be.
    fn call(&mut self, method: &str, path: &str, id: &str, body: &Value, status: u16) -> Answer {
        let url = path.replace("{id}", id);
        let body = match body {
            Value::Null => String::new(),
            body => body.to_string(),
        };
        let answer = self.daemon.call(method, &url, &body);
        self.check(method, path, &answer, status);
        answer
    }

    fn upload(&mut self, id: &str, to: &str, content: &[u8], status: u16) {
        let path = "/v1/sandboxes/{id}/files/write";
        let mut form = format!(
            "--X\r\nContent-Disposition: form-data; name=\"path\"\r\n\r\n{to}\r\n\
             --X\r\nContent-Disposition: form-data; name=\"file\"; filename=\"f\"\r\n\r\n"
        )
        .into_bytes();
        form.extend_from_slice(content);
        form.extend_from_slice(b"\r\n--X--\r\n");
        let (url, kind) = (path.replace("{id}", id), "multipart/form-data; boundary=X");
        let answer = self.daemon.send("POST", &url, kind, &form);
        self.check("POST", path, &answer, status);
    }

    fn check(&mut self, method: &str, path: &str, answer: &Answer, status: u16) {
        let at = format!("{method} {path} {status}");
        let text = String::from_utf8_lossy(&answer.body);
        assert_eq!(answer.status, status, "{at}: {text}");
        let method = method.to_lowercase();
        let response = &self.document["paths"][path][&method]["responses"][status.to_string()];
        assert!(response.is_object(), "{at} is not in the document");
        self.seen.insert((path.to_owned(), method, status));
        let Some((kind, media)) = response["content"].as_object().map(|content| {
            let mut all = content.iter();
            all.next().unwrap()
        }) else {
            assert!(answer.body.is_empty(), "{at}: {text}");
            return;
        };
        assert_eq!(&answer.kind, kind, "{at}");
        if kind != "application/json" {
            return;
        }
        let mut schema = media["schema"].clone();
        schema["components"] = self.document["components"].clone();
        let validator = jsonschema::options()
            .with_draft(Draft::Draft202012)
            .should_validate_formats(true)
            .build(&schema)
            .unwrap();
        let value = answer.json();
        let problems: Vec<_> = validator
            .iter_errors(&value)
            .map(|problem| format!("{} {problem}", problem.instance_path()))
            .collect();
        assert!(problems.is_empty(), "{at}: {problems:?} in {text}");
    }

    /// What the document names and nobody has tried.
    fn untried(&self) -> Vec<(&str, &str, &str)> {
        let mut untried = Vec::new();
        for (path, item) in self.document["paths"].as_object().unwrap() {
            for (method, operation) in item.as_object().unwrap() {
                let responses = operation["responses"].as_object().into_iter().flatten();
                for (status, _) in responses {
                    let key = (path.clone(), method.clone(), status.parse().unwrap());
                    if !self.seen.contains(&key) {
                        untried.push((path.as_str(), method.as_str(), status.as_str()));
                    }
                }
            }
        }
        untried
    }
}

#[test]
fn every_operation_answers_with_every_status_as_the_document_says() {
    const ALL: &str = "/v1/sandboxes";
    const ONE: &str = "/v1/sandboxes/{id}";
    const EXEC: &str = "/v1/sandboxes/{id}/exec";
    const PAUSE: &str = "/v1/sandboxes/{id}/pause";
    const RESUME: &str = "/v1/sandboxes/{id}/resume";
    const READ: &str = "/v1/sandboxes/{id}/files/read";
    let mut api = Conformance::new();
    let none = Value::Null;
    let nobody = "sb-00000000";

    let created = api.call("POST", ALL, "", &json!({}), 201).json();
    let id = created["id"].as_str().unwrap().to_owned();
    for (field, expected) in [
        ("status", json!("running")),
        ("template", json!("minimal")),
        ("vcpus", json!(1)),
        ("memory_mb", json!(512)),
        ("timeout_sec", json!(300)),
    ] {
        assert_eq!(created[field], expected, "{field}");
    }
    let listed = api.call("GET", ALL, "", &none, 200).json();
    assert_eq!(listed[0]["id"], json!(id));
    api.call("GET", ONE, &id, &none, 200);
    api.call("GET", ONE, nobody, &none, 404);

    let command = json!({"cmd": "/bin/sh", "args": ["-c", "echo out; echo err >&2; exit 3"]});
    let said = api.call("POST", EXEC, &id, &command, 200).json();
    assert_eq!(
        (&said["stdout"], &said["stderr"]),
        (&json!("out\n"), &json!("err\n"))
    );
    assert_eq!(
        (&said["exit_code"], &said["encoding"]),
        (&json!(3), &json!("utf-8"))
    );
    let binary = json!({"cmd": "/bin/sh", "args": ["-c", "printf '\\377'"]});
    let said = api.call("POST", EXEC, &id, &binary, 200).json();
    assert_eq!(
        (&said["stdout"], &said["encoding"]),
        (&json!("/w=="), &json!("base64"))
    );
    api.call("POST", EXEC, nobody, &command, 404);

    let file = api.daemon.path("file");
    let file = file.to_str().unwrap();
    let content: Vec<u8> = (0..1000_u32).map(|at| (at % 256) as u8).collect();
    api.upload(&id, file, &content, 204);
    api.upload(&id, file, &[0; 1001], 413);
    let read = api.call("POST", READ, &id, &json!({"path": file}), 200);
    assert_eq!(read.body, content, "the refused one has changed nothing");
    api.call("POST", READ, &id, &json!({"path": "/no/such"}), 404);
    api.call("POST", READ, nobody, &json!({"path": file}), 404);

    api.call("POST", RESUME, &id, &none, 409);
    let paused = api.call("POST", PAUSE, &id, &none, 200).json();
    assert_eq!(paused["status"], "paused");
    api.call("POST", PAUSE, &id, &none, 409);
    api.call("POST", EXEC, &id, &command, 409);
    api.upload(&id, file, b"", 409);
    let resumed = api.call("POST", RESUME, &id, &none, 200).json();
    assert_eq!(resumed["status"], "running");
    api.call("POST", EXEC, &id, &command, 200);

    api.call("DELETE", ONE, &id, &none, 204);
    let gone = api.call("GET", ONE, &id, &none, 200).json();
    assert_eq!(gone["status"], "stopped");
    let listed = api.call("GET", ALL, "", &none, 200).json();
    assert_eq!(listed, json!([]));

    fs::write(
        api.daemon.path("vmm"),
        "#!/bin/sh\necho no room >&2\nexit 1\n",
    )
    .unwrap();
    let failed = api.call("POST", ALL, "", &json!({}), 502).json();
    assert_eq!(failed["error"]["code"], "agent_error");
    assert_eq!(api.untried(), []);
}
