//! What tests of sandboxes that are saved do and look at.

use std::collections::BTreeSet;
use std::time::Duration;

use api::domain::{Layers, Store};
use serde_json::Value;

use super::Api;

/// The path of an operation of a sandbox.
pub fn path(id: &str, operation: &str) -> String {
    format!("/v1/sandboxes/{id}{operation}")
}

/// The answer to a POST that succeeds.
pub async fn ok(api: &Api, path: &str, body: &str) -> Value {
    let (status, answer) = api.call("POST", path, body).await;
    assert!(status.is_success(), "{path}: {status} {answer}");
    answer
}

/// The message of the answer to a request that is refused with this status and code.
pub async fn refused(
    api: &Api,
    (method, path, body): (&str, &str, &str),
    code: (u16, &str),
) -> String {
    let (status, answer) = api.call(method, path, body).await;
    let got = (status.as_u16(), answer["error"]["code"].as_str().unwrap());
    assert_eq!(got, code, "{method} {path}: {answer}");
    answer["error"]["message"].as_str().unwrap().to_owned()
}

/// The status of a sandbox.
pub async fn status(api: &Api, id: &str) -> Value {
    api.call("GET", &path(id, ""), "").await.1["status"].clone()
}

/// Each layer on the host is held by a record, and each that is held is on the host.
pub async fn assert_layers_are_settled(api: &Api) {
    let held = api.store.held_layers().await.unwrap();
    let there = api.host.layers.lock().unwrap().clone();
    assert_eq!(there, held);
    let mut named = BTreeSet::new();
    for sandbox in api.store.list_live().await.unwrap() {
        named.extend(sandbox.layers.all().cloned());
        named.extend(sandbox.saving.iter().flat_map(Layers::all).cloned());
    }
    for snapshot in api.store.list_snapshots().await.unwrap() {
        named.extend(snapshot.layers.all().cloned());
    }
    for (warm, _) in api.store.list_warm().await.unwrap() {
        named.extend(warm.layers.all().cloned());
    }
    assert_eq!(held, named);
}

/// Lets a request go on to the point at which the daemon is to end.
pub async fn crash<T>(api: &Api, request: impl Future<Output = T>) -> Option<T> {
    let reached = async {
        while api.host.fault.lock().unwrap().is_some() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    let mut request = std::pin::pin!(request);
    tokio::select! {
        answer = &mut request => Some(answer),
        () = reached => None,
    }
}
