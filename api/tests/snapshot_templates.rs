//! Snapshots as templates: sandboxes that are made from them by name or id, and snapshots that replace
//! others of their name, over the API on a host that runs nothing.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on may panic")]

mod support;

use api::domain::{Egress, NetworkInfo, Start, Store};
use serde_json::{Value, json};
use support::{Api, Fault};

async fn api() -> Api {
    Api::new(1 << 20, 1 << 20).await
}

async fn made(api: &Api, body: &Value) -> Value {
    let (status, made) = api.call("POST", "/v1/sandboxes", &body.to_string()).await;
    assert_eq!(status, 201, "{body}: {made}");
    made
}

async fn refused(api: &Api, path: &str, body: &Value, status: u16) -> String {
    let (got, answer) = api.call("POST", path, &body.to_string()).await;
    assert_eq!(got.as_u16(), status, "{body}: {answer}");
    answer["error"]["message"].as_str().unwrap().to_owned()
}

async fn snapshot(api: &Api, sandbox: &str, query: &str, name: &str, memory: bool) -> Value {
    let body = json!({"sandbox_id": sandbox, "name": name, "include_memory": memory});
    let path = format!("/v1/snapshots{query}");
    let (status, taken) = api.call("POST", &path, &body.to_string()).await;
    assert_eq!(status, 201, "{taken}");
    taken
}

/// Each layer on the host is held by a record, and each that is held is on the host.
async fn assert_layers_are_settled(api: &Api) {
    let held = api.store.held_layers().await.unwrap();
    assert_eq!(*api.host.layers.lock().unwrap(), held);
}

#[tokio::test]
async fn a_snapshot_is_a_template_by_name_and_id() {
    let api = api().await;
    let parent = made(&api, &json!({"vcpus": 3, "memory_mb": 1024})).await;
    let parent = parent["id"].as_str().unwrap();
    let warm = snapshot(&api, parent, "", "with-memory", true).await;
    let cold = snapshot(&api, parent, "", "disk-only", false).await;
    for (taken, name) in [(&warm, "with-memory"), (&cold, "disk-only")] {
        assert_eq!(
            (&taken["name"], &taken["type"]),
            (&json!(name), &json!("snapshot"))
        );
    }

    // With memory it goes on, and is what it was, whatever is asked for.
    for name in ["with-memory", warm["id"].as_str().unwrap()] {
        let body = json!({"template": name, "vcpus": 1, "memory_mb": 256, "timeout_sec": 77});
        let sandbox = made(&api, &body).await;
        let start = api.host.starts.lock().unwrap().last().unwrap().clone();
        assert_eq!((start.start, start.layers.memory.len()), (Start::Fork, 1));
        assert_eq!(start.shape.template, "minimal");
        assert_eq!((start.shape.vcpus, start.shape.memory_mb), (3, 1024));
        assert_eq!(
            (
                &sandbox["template"],
                &sandbox["vcpus"],
                &sandbox["timeout_sec"]
            ),
            (&json!(name), &json!(3), &json!(77))
        );
        assert_eq!(sandbox["timings_ms"]["start"], "fork");
    }
    // Without, it boots from the disk, and can have another shape.
    let sandbox = made(&api, &json!({"template": "disk-only", "vcpus": 1})).await;
    let start = api.host.starts.lock().unwrap().last().unwrap().clone();
    assert_eq!((start.start, start.layers.memory.len()), (Start::Cold, 0));
    assert_eq!(start.layers.disk.len(), 2);
    assert_eq!((start.shape.vcpus, start.shape.memory_mb), (1, 1024));
    assert_eq!(sandbox["timings_ms"]["start"], "cold");

    // Where it is from is known to the next daemon too.
    let path = format!("/v1/sandboxes/{}", sandbox["id"].as_str().unwrap());
    let api = api.restart().await;
    assert_eq!(api.call("GET", &path, "").await.1["template"], "disk-only");

    let unknown = json!({"template": "with-memery"});
    let text = refused(&api, "/v1/sandboxes", &unknown, 400).await;
    assert!(text.contains("unknown template"), "{text}");
    let bad = json!({"template": "with-memory", "vcpus": 99});
    let text = refused(&api, "/v1/sandboxes", &bad, 400).await;
    assert!(text.contains("vcpus"), "{text}");
    assert_layers_are_settled(&api).await;
}

#[tokio::test]
async fn a_snapshot_that_is_in_use_is_deleted_and_what_is_made_from_it_goes_on() {
    let api = api().await;
    let parent = api.create().await;
    snapshot(&api, &parent, "", "base", true).await;
    let child = made(&api, &json!({"template": "base"})).await;
    let child = child["id"].as_str().unwrap();
    let (status, _) = api
        .call("DELETE", &format!("/v1/sandboxes/{parent}"), "")
        .await;
    assert_eq!(status, 204);
    let (status, _) = api.call("DELETE", "/v1/snapshots/base", "").await;
    assert_eq!(status, 204);
    let gone = json!({"template": "base"});
    refused(&api, "/v1/sandboxes", &gone, 400).await;
    assert_layers_are_settled(&api).await;
    for operation in ["pause", "resume", "fork"] {
        let path = format!("/v1/capsules/{child}/{operation}");
        let (status, answer) = api.call("POST", &path, "{}").await;
        assert!(status.is_success(), "{operation}: {answer}");
    }
    assert_layers_are_settled(&api).await;
}

#[tokio::test]
async fn a_sandbox_of_a_snapshot_that_does_not_start_is_in_error() {
    let api = api().await;
    let parent = api.create().await;
    snapshot(&api, &parent, "", "base", true).await;
    *api.host.fault.lock().unwrap() = Some(Fault::NotRestored);
    refused(&api, "/v1/sandboxes", &json!({"template": "base"}), 502).await;
    let (_, all) = api.call("GET", "/v1/sandboxes?all=true", "").await;
    assert_eq!(all[0]["status"], "error");
    assert_layers_are_settled(&api).await;
    made(&api, &json!({"template": "base"})).await;
}

#[tokio::test]
async fn a_snapshot_replaces_another_once_it_is_taken() {
    let api = api().await;
    let parent = api.create().await;
    let first = snapshot(&api, &parent, "", "base", true).await;
    let again = json!({"sandbox_id": parent, "name": "base"});
    let text = refused(&api, "/v1/snapshots", &again, 409).await;
    assert!(text.contains("exists already"), "{text}");

    // One that is not taken replaces nothing.
    *api.host.fault.lock().unwrap() = Some(Fault::NotSaved);
    refused(&api, "/v1/snapshots?overwrite=true", &again, 502).await;
    assert_eq!(api.call("GET", "/v1/snapshots", "").await.1, json!([first]));
    assert_layers_are_settled(&api).await;

    let second = snapshot(&api, &parent, "?overwrite=true", "base", true).await;
    assert_ne!(first["id"], second["id"]);
    assert_eq!(
        api.call("GET", "/v1/snapshots", "").await.1,
        json!([second])
    );
    assert_eq!(api.call("GET", "/v1/snapshots/base", "").await.1, second);
    assert_layers_are_settled(&api).await;
    // There need not be one.
    snapshot(&api, &parent, "?overwrite=true", "other", false).await;
    refused(&api, "/v1/snapshots?overwrite=perhaps", &again, 400).await;

    // A daemon that ends before it is taken leaves the old one.
    *api.host.fault.lock().unwrap() = Some(Fault::CrashBeforeSave);
    let (router, body) = (api.router.clone(), again.to_string());
    let request = axum::http::Request::post("/v1/snapshots?overwrite=true")
        .header("host", "localhost")
        .body(axum::body::Body::from(body))
        .unwrap();
    let task = tokio::spawn(tower::ServiceExt::oneshot(router, request));
    while api.host.fault.lock().unwrap().is_some() {
        tokio::task::yield_now().await;
    }
    task.abort();
    let api = api.restart().await;
    assert_eq!(api.call("GET", "/v1/snapshots/base", "").await.1, second);
    assert_eq!(api.store.list_snapshots().await.unwrap().len(), 2);
}

#[tokio::test]
async fn templates_are_listed_in_the_shape_of_snapshots_and_keep_their_names() {
    let api = api().await;
    let parent = api.create().await;
    let nameless = json!({"sandbox_id": parent}).to_string();
    let (_, nameless) = api.call("POST", "/v1/snapshots", &nameless).await;
    assert_eq!(
        nameless["name"], nameless["id"],
        "a client deletes it by its name"
    );
    let (_, snapshots) = api.call("GET", "/v1/snapshots?type=snapshot", "").await;
    assert_eq!(snapshots, json!([nameless]));
    let (_, bases) = api.call("GET", "/v1/snapshots?type=base", "").await;
    let names: Vec<_> = bases
        .as_array()
        .unwrap()
        .iter()
        .map(|base| &base["name"])
        .collect();
    assert_eq!(names, ["broken", "minimal"]);
    for base in bases.as_array().unwrap() {
        assert_eq!(
            (&base["type"], &base["protected"]),
            (&json!("base"), &json!(true))
        );
        assert!(base["created_at"].as_str().unwrap().ends_with('Z'));
    }
    let (status, _) = api.call("GET", "/v1/snapshots?type=other", "").await;
    assert_eq!(status, 400);
    let taken = json!({"sandbox_id": parent, "name": "minimal"});
    let text = refused(&api, "/v1/snapshots", &taken, 409).await;
    assert!(text.contains("a template is named \"minimal\""), "{text}");
}

#[tokio::test]
async fn what_is_made_from_a_snapshot_is_connected_as_that_was() {
    let api = api().await;
    let network = NetworkInfo {
        name: "chbr0".into(),
        subnet: "192.168.200.0/24".parse().unwrap(),
        default_egress: Egress::All,
    };
    let before = api.create().await;
    snapshot(&api, &before, "", "unconnected", true).await;
    snapshot(&api, &before, "", "unconnected-disk", false).await;
    api.host.networks.lock().unwrap().push(network);
    let limits = json!({"bytes_per_sec": 1_000_000});
    let closed = json!({"network": {"egress": {"policy": "none"}, "rate_limits": limits}});
    let parent = made(&api, &closed).await;
    snapshot(&api, parent["id"].as_str().unwrap(), "", "closed", true).await;

    let connection = |api: &Api| {
        let start = api.host.starts.lock().unwrap().last().unwrap().clone();
        start.nic.map(|nic| nic.connection)
    };
    // A sandbox that was closed off does not open up by the way.
    let child = made(&api, &json!({"template": "closed"})).await;
    assert_ne!(child["guest_ip"], parent["guest_ip"]);
    let inherited = connection(&api).unwrap();
    assert_eq!(inherited.egress, Egress::None);
    assert_eq!(inherited.rate_limits.bytes_per_sec, Some(1_000_000));
    let open = json!({"template": "closed", "network": {"egress": {"policy": "all"}}});
    made(&api, &open).await;
    assert_eq!(connection(&api).unwrap().egress, Egress::All);

    // Memory without a network card stays without one.
    let child = made(&api, &json!({"template": "unconnected"})).await;
    assert_eq!((connection(&api), &child["guest_ip"]), (None, &Value::Null));
    let asked = json!({"template": "unconnected", "network": {"address": "192.168.200.77"}});
    let text = refused(&api, "/v1/sandboxes", &asked, 400).await;
    assert!(text.contains("without a network card"), "{text}");
    made(&api, &json!({"template": "unconnected-disk"})).await;
    assert_eq!(connection(&api).unwrap().egress, Egress::All);
}

#[tokio::test]
async fn a_machine_is_made_from_a_snapshot() {
    let api = api().await;
    let parent = api.create().await;
    snapshot(&api, &parent, "", "base", true).await;
    let token = {
        let body = json!({"username": "ann", "password": "Str0ng-pass!", "role": "admin"});
        api.call("POST", "/api/v1/auth/register", &body.to_string())
            .await;
        api.token("ann", "Str0ng-pass!").await
    };
    let headers = [("authorization", token.as_str())];
    let call = async |path: &str, body: &Value| {
        let body = body.to_string();
        api.call_as("POST", path, &body, &headers).await
    };
    // An administrator who has no snapshot of the name finds the only one.
    let body = json!({"name": "one", "template": "base"});
    let (status, vm) = call("/api/v1/vms", &body).await;
    assert_eq!(
        (status.as_u16(), &vm["template"]),
        (201, &json!("base")),
        "{vm}"
    );
    let (status, _) = api.call("DELETE", "/v1/snapshots/base", "").await;
    assert_eq!(status, 204);
    let (status, started) = call("/api/v1/vms/one/start", &json!({})).await;
    assert_eq!(status, 200, "{started}");
    let start = api.host.starts.lock().unwrap().last().unwrap().clone();
    assert_eq!(start.layers.memory.len(), 1);
    let disk = json!({"name": "two", "template": "base"});
    let (status, _) = call("/api/v1/vms", &disk).await;
    assert_eq!(status, 422, "it is deleted");
}
