//! `/v1`: every operation of the API that it follows, with every status that it names. Each answer is
//! validated against that API's own schemas.

use std::collections::BTreeSet;

use jsonschema::Draft;
use serde_json::{Value, json};

use crate::{Answer, Client, FORM, form};

/// Paths, parameters, schemas and statuses of the API that `/v1` follows.
pub const DOCUMENT: &str = include_str!("wrenn.json");

/// What the daemon under test is to take as an upload, in bytes.
pub const UPLOAD_BYTES: usize = 1000;

/// Nothing is required of answers there, so that an empty object would do. Here all is that is named,
/// but what sandboxes without a network card do not have.
const OF_THE_NETWORK: [&str; 2] = ["guest_ip", "host_ip"];

/// What differs from one daemon under test to another.
pub struct Place<'a> {
    /// Fields of a sandbox that starts.
    pub sandbox: Value,
    /// Path of a file that can be written in it.
    pub file: &'a str,
    /// Whether it has a network card.
    pub has_network: bool,
    /// Has sandboxes fail to start from now on, and returns the fields of one that does.
    pub broken: &'a dyn Fn() -> Value,
}

/// Makes schemas of version 3.0 with `nullable` those of JSON Schema, and requires all properties but
/// these.
fn strict(schema: &mut Value, optional: &[&str]) {
    match schema {
        Value::Array(items) => items.iter_mut().for_each(|item| strict(item, optional)),
        Value::Object(fields) => {
            if fields.get("nullable") == Some(&Value::Bool(true)) {
                let kind = fields["type"].clone();
                fields.insert("type".to_owned(), json!([kind, "null"]));
            }
            if let Some(Value::Object(properties)) = fields.get("properties") {
                let names = properties.keys();
                let required = names.filter(|name| !optional.contains(&name.as_str()));
                let required: Vec<_> = required.cloned().collect();
                fields.insert("required".to_owned(), json!(required));
            }
            let values = fields.values_mut();
            values.for_each(|value| strict(value, optional));
        }
        _ => {}
    }
}

/// The operations that were tried, and what their answers must be like.
struct Conformance<'a> {
    document: Value,
    client: &'a dyn Client,
    seen: BTreeSet<(String, String, u16)>,
}

impl Conformance<'_> {
    /// The answer of an operation, which must have this status and be what that status is to be.
    fn call(&mut self, method: &str, path: &str, id: &str, body: &Value, status: u16) -> Answer {
        let url = path.replace("{id}", id);
        let body = match body {
            Value::Null => String::new(),
            body => body.to_string(),
        };
        let json = [("Content-Type", "application/json")];
        let answer = self.client.send(method, &url, &json, body.as_bytes());
        self.check(method, path, &answer, status);
        answer
    }

    fn upload(&mut self, id: &str, to: &str, content: &[u8], status: u16) {
        let path = "/v1/sandboxes/{id}/files/write";
        let (url, form) = (path.replace("{id}", id), form(&[("path", to)], content));
        let kind = [("Content-Type", FORM)];
        let answer = self.client.send("POST", &url, &kind, &form);
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

/// Tries every operation with every status that the document names.
pub fn every_operation(client: &dyn Client, place: &Place<'_>) {
    const ALL: &str = "/v1/sandboxes";
    const ONE: &str = "/v1/sandboxes/{id}";
    const EXEC: &str = "/v1/sandboxes/{id}/exec";
    const PAUSE: &str = "/v1/sandboxes/{id}/pause";
    const RESUME: &str = "/v1/sandboxes/{id}/resume";
    const READ: &str = "/v1/sandboxes/{id}/files/read";
    let optional: &[&str] = match place.has_network {
        true => &[],
        false => &OF_THE_NETWORK,
    };
    let mut document: Value = serde_json::from_str(DOCUMENT).unwrap();
    strict(&mut document["components"], optional);
    let mut api = Conformance {
        document,
        client,
        seen: BTreeSet::new(),
    };
    let none = Value::Null;
    let nobody = "sb-00000000";

    let created = api.call("POST", ALL, "", &place.sandbox, 201).json();
    let id = created["id"].as_str().unwrap().to_owned();
    for (field, default) in [
        ("template", json!("minimal")),
        ("vcpus", json!(1)),
        ("memory_mb", json!(512)),
        ("timeout_sec", json!(300)),
    ] {
        let expected = place.sandbox.get(field).unwrap_or(&default);
        assert_eq!(created[field], *expected, "{field}");
    }
    assert_eq!(created["status"], "running");
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

    let content: Vec<u8> = (0..=u8::MAX).cycle().take(UPLOAD_BYTES).collect();
    api.upload(&id, place.file, &content, 204);
    api.upload(&id, place.file, &[0; UPLOAD_BYTES + 1], 413);
    let path = json!({"path": place.file});
    let read = api.call("POST", READ, &id, &path, 200);
    assert_eq!(read.body, content, "the refused one has changed nothing");
    api.call("POST", READ, &id, &json!({"path": "/no/such"}), 404);
    api.call("POST", READ, nobody, &path, 404);

    api.call("POST", RESUME, &id, &none, 409);
    let paused = api.call("POST", PAUSE, &id, &none, 200).json();
    assert_eq!(paused["status"], "paused");
    api.call("POST", PAUSE, &id, &none, 409);
    api.call("POST", EXEC, &id, &command, 409);
    api.upload(&id, place.file, b"", 409);
    let resumed = api.call("POST", RESUME, &id, &none, 200).json();
    assert_eq!(resumed["status"], "running");
    api.call("POST", EXEC, &id, &command, 200);

    api.call("DELETE", ONE, &id, &none, 204);
    let gone = api.call("GET", ONE, &id, &none, 200).json();
    assert_eq!(gone["status"], "stopped");
    let listed = api.call("GET", ALL, "", &none, 200).json();
    assert_eq!(listed, json!([]));

    let failed = api.call("POST", ALL, "", &(place.broken)(), 502).json();
    assert_eq!(failed["error"]["code"], "agent_error");
    assert_eq!(api.untried(), []);
}
