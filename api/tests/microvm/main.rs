//! `/api/v1` on a host that runs nothing: every example of its reference, and what is refused.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on may panic"
)]

mod guest;
mod machines;
mod network;
mod refusals;
mod snapshots;
#[path = "../support/mod.rs"]
mod support;

use api::domain::{Egress, NetworkInfo};
use axum::body::Body;
use axum::http::{Request, Response};
use serde_json::{Value, json};
use support::{Api, read_json};
use tower::ServiceExt;

const MIB: u64 = 1 << 20;

/// The API, and who calls it.
struct Bench {
    api: Api,
    bearer: String,
}

impl std::ops::Deref for Bench {
    type Target = Api;

    fn deref(&self) -> &Api {
        &self.api
    }
}

async fn api() -> Bench {
    let api = Api::new(MIB, MIB).await;
    *api.host.networks.lock().unwrap() = vec![NetworkInfo {
        name: "chbr0".into(),
        subnet: "192.168.200.0/24".parse().unwrap(),
        default_egress: Egress::All,
    }];
    let bearer = api.user("alice", "admin").await;
    Bench { api, bearer }
}

/// A request to `/api/v1` and its answer.
async fn send(api: &Bench, method: &str, path: &str, kind: &str, body: Body) -> Response<Body> {
    let request = Request::builder()
        .method(method)
        .uri(format!("/api/v1{path}"))
        .header("host", "localhost:8000")
        .header("content-type", kind)
        .header("authorization", &api.bearer)
        .body(body)
        .unwrap();
    api.router.clone().oneshot(request).await.unwrap()
}

async fn call(api: &Bench, method: &str, path: &str, body: Value) -> (u16, Value) {
    let body = match body {
        Value::Null => Body::empty(),
        body => body.to_string().into(),
    };
    let (status, body) = read_json(send(api, method, path, "application/json", body).await).await;
    (status.as_u16(), body)
}

async fn get(api: &Bench, path: &str) -> (u16, Value) {
    call(api, "GET", path, Value::Null).await
}

async fn post(api: &Bench, path: &str, body: Value) -> (u16, Value) {
    call(api, "POST", path, body).await
}

/// Whether `value` has all that `example` has, of the same types; times are RFC 3339.
#[track_caller]
fn is_like(value: &Value, example: &Value) {
    match (value, example) {
        (Value::Object(value), Value::Object(example)) => {
            for (name, example) in example {
                match value.get(name) {
                    Some(value) => is_like(value, example),
                    None => panic!("no {name} in {value:?}"),
                }
            }
        }
        (Value::Array(value), Value::Array(example)) => {
            assert!(!value.is_empty(), "an empty list");
            value.iter().for_each(|value| is_like(value, &example[0]));
        }
        (Value::String(value), Value::String(example)) => {
            if example.parse::<jiff::Timestamp>().is_ok() {
                assert!(value.parse::<jiff::Timestamp>().is_ok(), "{value}");
            }
        }
        (Value::Number(_), Value::Number(_)) | (Value::Bool(_), Value::Bool(_)) => {}
        other => panic!("{other:?}"),
    }
}

fn create_request() -> Value {
    json!({
        "name": "test-vm",
        "os_type": "linux",
        "vcpus": 2,
        "memory_mb": 512,
        "template": "linux-default",
        "network_config": {"bridge": "chbr0", "ip": "192.168.200.100"},
        "storage_config": {"disk_size_gb": 10, "disk_type": "ssd"}
    })
}

async fn running(api: &Bench) {
    assert_eq!(post(api, "/vms", create_request()).await.0, 201);
    let (status, started) = post(api, "/vms/test-vm/start", Value::Null).await;
    assert_eq!(status, 200, "{started}");
}
