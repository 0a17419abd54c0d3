//! Requests that make no sense, at every operation that the API describes: whatever refuses one, the
//! answer is an error as its dialect tells them.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on may panic")]

mod support;

use axum::body::Body;
use axum::http::{Request, StatusCode};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use support::{Api, read_json};
use tower::ServiceExt;

/// An operation that the API describes.
struct Operation {
    method: String,
    path: String,
    description: Value,
}

/// All of them.
fn operations() -> Vec<Operation> {
    let document = serde_json::to_value(api::http::document()).unwrap();
    let paths = document["paths"].as_object().unwrap().iter();
    paths
        .flat_map(|(path, item)| {
            let operations = item.as_object().unwrap().iter();
            operations.map(|(method, description)| Operation {
                method: method.to_uppercase(),
                path: path.clone(),
                description: description.clone(),
            })
        })
        .collect()
}

impl Operation {
    /// The names of its parameters that are in the path, or in the query.
    fn parameters(&self, place: &str) -> Vec<&str> {
        let all = self.description["parameters"].as_array();
        let there = all.into_iter().flatten().filter(|one| one["in"] == place);
        there.map(|one| one["name"].as_str().unwrap()).collect()
    }

    /// Its path, in which one parameter is this, and the others are what nothing has.
    fn path_with(&self, name: &str, value: &str) -> String {
        let segments = self.path.split('/').map(|segment| {
            let parameter = segment
                .strip_prefix('{')
                .and_then(|it| it.strip_suffix('}'));
            match parameter {
                Some(parameter) if parameter == name => value,
                Some("port" | "host_port") => "80",
                Some(_) => "none",
                None => segment,
            }
        });
        segments.collect::<Vec<_>>().join("/")
    }
}

/// Whoever asks, with credentials that are good for everything.
struct Client {
    api: Api,
    token: String,
}

impl Client {
    /// How many bytes the answer has, which must tell that the client was wrong.
    async fn told(&self, method: &str, path: &str, body: &str) -> usize {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "localhost:8000")
            .header("authorization", &self.token)
            .body(Body::from(body.to_owned()))
            .unwrap();
        let response = self.api.router.clone().oneshot(request).await.unwrap();
        let status = response.status();
        assert!(status.is_client_error(), "{path}: {status}");
        let body = response.into_body().collect().await.unwrap();
        body.to_bytes().len()
    }

    async fn new() -> Self {
        let api = Api::new(1 << 20, 1 << 20).await;
        let token = api.user("root", "admin").await;
        Self { api, token }
    }

    /// The status of the answer, which must be told as it should if it tells of an error.
    async fn ask(&self, method: &str, path: &str, kind: &str, body: &[u8]) -> StatusCode {
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "localhost:8000")
            .header("authorization", &self.token);
        if !kind.is_empty() {
            request = request.header("content-type", kind);
        }
        let request = request.body(Body::from(body.to_vec())).unwrap();
        let what = format!("{method} {path}, {kind:?}, {} bytes", body.len());
        let response = self.api.router.clone().oneshot(request).await.unwrap();
        if response.status().as_u16() < 400 {
            return response.status();
        }
        let content = response.headers().get("content-type").cloned();
        assert_eq!(content.unwrap(), "application/json", "{what}");
        let (status, answer) = read_json(response).await;
        let (code, message) = match path.starts_with("/api/v1/") {
            true => (&answer["error"], &answer["message"]),
            false => (&answer["error"]["code"], &answer["error"]["message"]),
        };
        let is_told = |text: &Value| text.as_str().is_some_and(|text| !text.is_empty());
        assert!(is_told(code) && is_told(message), "{what}: {answer}");
        assert!(!status.is_server_error(), "{what}: {answer}");
        status
    }
}

#[tokio::test]
async fn what_is_no_text_in_a_path_is_an_error_of_the_dialect() {
    let client = Client::new().await;
    let mut checked = 0;
    for operation in operations() {
        for name in operation.parameters("path") {
            let path = operation.path_with(name, "%FF");
            let status = client.ask(&operation.method, &path, "", b"{}").await;
            // What is behind the port of a sandbox is the business of what listens there.
            let expected = match name {
                "path" => StatusCode::NOT_FOUND,
                _ => StatusCode::BAD_REQUEST,
            };
            assert_eq!(status, expected, "{} {path}", operation.method);
            checked += 1;
        }
    }
    assert!(checked > 80, "{checked}");
}

#[tokio::test]
async fn what_makes_no_sense_in_a_query_is_an_error_of_the_dialect() {
    let client = Client::new().await;
    let (mut checked, mut refused) = (0, 0);
    for operation in operations() {
        for name in operation.parameters("query") {
            let path = operation.path_with("", "");
            for query in ["=%FF", "=no such value", "", "=1&same=2"] {
                let query = query.replace("same", name).replace(' ', "%20");
                let path = format!("{path}?{name}{query}");
                let status = client.ask(&operation.method, &path, "", b"").await;
                refused += usize::from(status == StatusCode::BAD_REQUEST);
                checked += 1;
            }
        }
    }
    assert!(checked > 80 && refused > 20, "{refused} of {checked}");
}

#[tokio::test]
async fn errors_do_not_grow_with_the_body() {
    const MOST: usize = 32 << 10;
    let client = Client::new().await;
    client.api.create().await;
    let long = "x".repeat(900 << 10);
    let words = vec![""; 300_000];
    let numbers: serde_json::Map<_, _> = (0..60_000)
        .map(|number| (format!("V{number}"), 1.into()))
        .collect();
    let scan = |fields: Value| {
        let mut body = json!({"scan_type": "configuration", "target": "all"});
        body.as_object_mut()
            .unwrap()
            .extend(fields.as_object().unwrap().clone());
        body
    };
    let bodies = [
        ("/api/v1/security/scan", scan(json!({"frameworks": words}))),
        ("/api/v1/security/scan", scan(json!({"target": long}))),
        (
            "/api/v1/vms/none/execute",
            json!({"command": "x", "environment": numbers}),
        ),
        (
            "/api/v1/vms/none/guest/command",
            json!({"command": "x", "env": numbers}),
        ),
        (
            "/api/v1/vms",
            json!({"os_type": long, "template": long, "name": long}),
        ),
        (
            "/api/v1/auth/register",
            json!({"username": long, "password": long}),
        ),
        ("/v1/sandboxes", json!({"template": long})),
        ("/v1/sandboxes", json!({"vcpus": long})),
        ("/v1/snapshots", json!({"sandbox_id": long})),
        (
            "/v1/templates",
            json!({"name": "x", "recipe": {"base": long, "steps": []}}),
        ),
    ];
    for (path, body) in bodies {
        let told = client.told("POST", path, &body.to_string()).await;
        assert!(told < MOST, "{path}: {told} bytes");
    }
}

#[tokio::test]
async fn bodies_and_methods_that_make_no_sense_are_errors_of_the_dialect() {
    let client = Client::new().await;
    let large = vec![b' '; 3 << 20];
    let mut checked = 0;
    for operation in operations() {
        let path = operation.path_with("", "");
        if !path.contains("/ports/") {
            let status = client.ask("PATCH", &path, "", b"").await;
            assert_eq!(status, StatusCode::METHOD_NOT_ALLOWED, "{path}");
        }
        if operation.description["requestBody"].is_null() {
            continue;
        }
        for body in [&b""[..], b"{", b"[]", b"\"text\"", b"{\"a\": \xff}", &large] {
            for kind in [
                "",
                "text/plain",
                "application/json",
                "multipart/form-data",
                "\u{e4}",
            ] {
                let status = client.ask(&operation.method, &path, kind, body).await;
                // Without a body some have nothing to say, and need not.
                let is_refused = status.is_client_error() || body.is_empty();
                assert!(is_refused, "{} {path} {kind:?}: {status}", operation.method);
                checked += 1;
            }
        }
    }
    assert!(checked > 500, "{checked}");
}
