//! `/api/v1` on a host that runs nothing: every example of its reference, and what is refused.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on may panic"
)]

mod support;

use api::domain::{Egress, NetworkInfo};
use axum::body::Body;
use axum::http::{Request, Response, StatusCode};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use support::{Api, form, read_json};
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

#[tokio::test]
async fn a_machine_from_create_to_delete() {
    let api = api().await;
    let (status, created) = post(&api, "/vms", create_request()).await;
    assert_eq!(status, 201, "{created}");
    let example = json!({
        "name": "string", "id": "string", "status": "created", "os_type": "linux", "vcpus": 2,
        "memory_mb": 512, "created_at": "2025-10-01T12:00:00Z",
        "network_config": {"ip": "192.168.200.100", "bridge": "chbr0"}
    });
    is_like(&created, &example);
    assert_eq!(created["name"], "test-vm");
    assert_eq!(
        (&created["status"], &created["state"]),
        (&json!("created"), &json!("stopped"))
    );
    assert_eq!(created["network_config"]["ip"], "192.168.200.100");
    assert_eq!(created["ip_address"], "192.168.200.100");
    assert!(created["started_at"].is_null());
    let id = created["id"].as_str().unwrap();

    let (status, started) = post(&api, "/vms/test-vm/start", Value::Null).await;
    assert_eq!(status, 200, "{started}");
    assert_eq!(started["message"], "VM started successfully");
    assert_eq!(
        (&started["vm_name"], &started["status"]),
        (&json!("test-vm"), &json!("running"))
    );
    is_like(&started, &json!({"started_at": "2025-10-01T12:05:00Z"}));
    let start = api.host.starts.lock().unwrap().last().unwrap().clone();
    assert_eq!((start.shape.vcpus, start.shape.memory_mb), (2, 512));
    assert_eq!(start.disk_mb, Some(10 * 1024));

    let (status, vm) = get(&api, &format!("/vms/{id}")).await;
    assert_eq!(status, 200);
    let example = json!({
        "name": "string", "id": "string", "status": "running", "os_type": "linux", "vcpus": 2,
        "memory_mb": 512, "created_at": "2025-10-01T12:00:00Z",
        "started_at": "2025-10-01T12:05:00Z", "uptime_seconds": 3600,
        "network_config": {
            "ip": "192.168.200.100", "bridge": "chbr0", "mac_address": "52:54:00:12:34:56"
        }
    });
    is_like(&vm, &example);
    assert_eq!(vm["network_config"]["mac_address"], "52:54:00:a8:c8:64");
    assert_eq!(get(&api, "/vms/test-vm").await.1["id"], id);

    let stop = json!({"force": false, "timeout_seconds": 30});
    let (status, stopped) = post(&api, "/vms/test-vm/stop", stop).await;
    assert_eq!(status, 200, "{stopped}");
    assert_eq!(stopped["message"], "VM stopped successfully");
    assert_eq!(stopped["status"], "stopped");
    is_like(
        &stopped,
        &json!({"vm_name": "x", "stopped_at": "2025-10-01T12:10:00Z"}),
    );
    let (_, refused) = post(&api, "/vms/test-vm/restart", Value::Null).await;
    let message = "VM 'test-vm' is stopped and cannot be restarted: it must be running";
    assert_eq!(refused["message"], message);

    post(&api, "/vms/test-vm/start", Value::Null).await;
    let (status, restarted) = post(&api, "/vms/test-vm/restart", Value::Null).await;
    assert_eq!(status, 200, "{restarted}");
    assert_eq!(restarted["message"], "VM restarted successfully");
    assert_eq!(restarted["status"], "running");
    is_like(
        &restarted,
        &json!({"vm_name": "x", "restarted_at": "2025-10-01T12:15:00Z"}),
    );
    assert_eq!(api.host.power_offs.lock().unwrap().len(), 2);

    let response = send(&api, "DELETE", "/vms/test-vm", "x/y", Body::empty()).await;
    assert_eq!(response.status(), StatusCode::NO_CONTENT);
    for path in ["/vms/test-vm", &format!("/vms/{id}")] {
        assert_eq!(get(&api, path).await.0, 404);
    }
    assert!(api.host.layers.lock().unwrap().is_empty());
}

#[tokio::test]
async fn one_without_a_name_runs_at_once() {
    let api = api().await;
    let (status, vm) = post(&api, "/vms", json!({"template": "minimal"})).await;
    assert_eq!(status, 201, "{vm}");
    assert_eq!(
        (&vm["status"], &vm["state"]),
        (&json!("running"), &json!("running"))
    );
    assert_eq!(vm["name"], vm["id"]);
    let path = format!("/vms/{}", vm["name"].as_str().unwrap());
    assert_eq!(
        post(&api, &format!("{path}/stop"), Value::Null).await.0,
        200
    );
    assert_eq!(get(&api, &path).await.1["status"], "stopped");
}

#[tokio::test]
async fn states_that_do_not_allow_it_are_named() {
    let api = api().await;
    post(&api, "/vms", create_request()).await;
    for (operation, message) in [
        (
            "stop",
            "VM 'test-vm' is created and cannot be stopped: it must be running",
        ),
        (
            "restart",
            "VM 'test-vm' is created and cannot be restarted: it must be running",
        ),
    ] {
        let path = format!("/vms/test-vm/{operation}");
        let refused = post(&api, &path, Value::Null).await;
        assert_eq!(
            refused,
            (409, json!({"error": "conflict", "message": message}))
        );
    }
    // By the same word as where it is asked for, before it has run and after.
    let execute = json!({"command": "true"});
    for word in ["created", "stopped"] {
        assert_eq!(get(&api, "/vms/test-vm").await.1["status"], word);
        let must_run = format!("VM 'test-vm' is {word}; it must be running for this");
        for (status, refused) in [
            post(&api, "/vms/test-vm/execute", execute.clone()).await,
            get(&api, "/vms/test-vm/files/download?path=/tmp/a").await,
            get(&api, "/vms/test-vm/files?path=/tmp").await,
            get(&api, "/vms/test-vm/metrics").await,
        ] {
            assert_eq!(
                (status, refused["message"].as_str()),
                (409, Some(must_run.as_str()))
            );
        }
        if word == "created" {
            for operation in ["start", "stop"] {
                let path = format!("/vms/test-vm/{operation}");
                assert_eq!(post(&api, &path, Value::Null).await.0, 200);
            }
        }
    }
    post(&api, "/vms/test-vm/start", Value::Null).await;
    let (status, refused) = post(&api, "/vms/test-vm/start", Value::Null).await;
    assert_eq!(status, 409);
    let message = "VM 'test-vm' is running and cannot be started: it must be created or stopped";
    assert_eq!(refused["message"], message);
    let taken = post(&api, "/vms", create_request()).await;
    // The name, and the address too.
    let message = "VM 'test-vm' already exists";
    assert_eq!(
        taken,
        (409, json!({"error": "conflict", "message": message}))
    );
}

#[tokio::test]
async fn all_that_is_wrong_is_told_at_once() {
    let api = api().await;
    let request = json!({
        "name": "../../etc/passwd", "os_type": "windows", "vcpus": 99, "memory_mb": 64,
        "template": "nope", "network_config": {"bridge": "br9", "ip": "x"},
        "storage_config": {"disk_size_gb": 1, "disk_type": "tape"}
    });
    let (status, refused) = post(&api, "/vms", request).await;
    assert_eq!(
        (status, &refused["error"]),
        (422, &json!("validation_error"))
    );
    assert_eq!(refused["message"], "Request validation failed");
    let fields: Vec<_> = refused["details"].as_array().unwrap().iter().collect();
    let mut names: Vec<_> = fields
        .iter()
        .map(|field| field["field"].as_str().unwrap())
        .collect();
    names.sort_unstable();
    assert_eq!(
        names,
        [
            "memory_mb",
            "name",
            "network_config.bridge",
            "network_config.ip",
            "os_type",
            "storage_config.disk_type",
            "template",
            "vcpus",
        ]
    );
    is_like(
        &refused["details"],
        &json!([{"field": "memory_mb", "error": "sentence"}]),
    );
    // The template's has 2 GiB.
    let small = json!({"name": "x", "storage_config": {"disk_size_gb": 1}});
    let (status, refused) = post(&api, "/vms", small).await;
    assert_eq!(status, 422);
    assert_eq!(
        refused["details"][0]["field"],
        "storage_config.disk_size_gb"
    );
    for (body, expected) in [("{", 400), ("[]", 400), ("{\"vcpus\": \"2\"}", 422)] {
        let response = send(&api, "POST", "/vms", "application/json", body.into()).await;
        assert_eq!(response.status().as_u16(), expected, "{body}");
    }
    assert_eq!(get(&api, "/vms").await.1["total"], 0);
}

#[tokio::test]
async fn lists_are_filtered_sorted_and_have_pages() {
    let api = api().await;
    for (name, vcpus) in [("b", 2), ("a", 1), ("c", 4)] {
        post(&api, "/vms", json!({"name": name, "vcpus": vcpus})).await;
    }
    post(&api, "/vms/c/start", Value::Null).await;
    post(&api, "/vms/b/start", Value::Null).await;
    post(&api, "/vms/b/stop", Value::Null).await;
    let (status, list) = get(&api, "/vms").await;
    assert_eq!(status, 200);
    let example = json!({
        "vms": [{
            "name": "string", "id": "string", "status": "running", "os_type": "linux", "vcpus": 2,
            "memory_mb": 512, "created_at": "2025-10-01T12:00:00Z",
            "network_config": {"ip": "192.168.200.100", "bridge": "chbr0"}
        }],
        "total": 10, "limit": 50, "offset": 0
    });
    is_like(&list, &example);
    let names = async |query: &str| {
        let (status, list) = get(&api, &format!("/vms?{query}")).await;
        assert_eq!(status, 200, "{list}");
        let vms = list["vms"].as_array().unwrap().iter();
        let names: Vec<_> = vms.map(|vm| vm["name"].as_str().unwrap()).collect();
        format!("{} {}", list["total"], names.join(""))
    };
    for (query, expected) in [
        ("", "3 cab"),
        ("sort=created_at&order=asc", "3 bac"),
        ("sort=name", "3 abc"),
        ("sort=vcpus&order=desc", "3 cba"),
        ("limit=1&offset=1&sort=name", "3 b"),
        ("status=created", "1 a"),
        ("status=running&os_type=linux", "1 c"),
        ("status=stopped", "1 b"),
        ("os_type=windows", "0 "),
    ] {
        assert_eq!(names(query).await, expected, "{query}");
    }
    for (query, field) in [
        ("limit=0", "limit"),
        ("limit=101", "limit"),
        ("offset=-1", "offset"),
        ("sort=id", "sort"),
        ("order=up", "order"),
        ("status=on", "status"),
        ("os_type=dos", "os_type"),
    ] {
        let (status, refused) = get(&api, &format!("/vms?{query}")).await;
        assert_eq!((status, &refused["error"]), (400, &json!("bad_request")));
        assert_eq!(refused["details"]["field"], field);
        assert!(refused["details"]["issue"].is_string());
    }
}

#[tokio::test]
async fn commands_run_by_a_shell() {
    let api = api().await;
    running(&api).await;
    let request = json!({
        "command": "echo hello", "timeout_seconds": 30, "working_directory": "/path/to/dir",
        "environment": {"VAR1": "value1", "VAR2": "value2"}
    });
    let (status, done) = post(&api, "/vms/test-vm/execute", request).await;
    assert_eq!(status, 200, "{done}");
    let example = json!({
        "exit_code": 0, "stdout": "command output", "stderr": "error output",
        "execution_time_seconds": 1.5, "command": "string", "executed_at": "2025-10-01T12:20:00Z"
    });
    is_like(&done, &example);
    assert_eq!(
        (&done["stdout"], &done["exit_code"]),
        (&json!("ran echo hello\n"), &json!(0))
    );
    let (command, _) = api.host.commands.lock().unwrap().last().unwrap().clone();
    assert_eq!(command.argv, ["/bin/sh", "-c", "echo hello"]);
    assert_eq!(
        (command.cwd.as_deref(), command.timeout_sec),
        (Some("/path/to/dir"), 30)
    );
    assert_eq!(command.env["VAR2"], "value2");

    let fail = json!({"command": "fail"});
    assert_eq!(
        post(&api, "/vms/test-vm/execute", fail).await.1["exit_code"],
        3
    );
    let late = json!({"command": "late", "timeout_seconds": 1});
    let (status, late) = post(&api, "/vms/test-vm/execute", late).await;
    assert_eq!((status, &late["error"]), (504, &json!("timeout")));
    assert_eq!(
        (&late["stdout"], &late["exit_code"]),
        (&json!("so far"), &json!(137))
    );
    for (body, field) in [
        (json!({}), "command"),
        (
            json!({"command": "x", "timeout_seconds": 0}),
            "timeout_seconds",
        ),
        (
            json!({"command": "x", "timeout_seconds": 3601}),
            "timeout_seconds",
        ),
        (
            json!({"command": "x", "environment": {"A": 1}}),
            "environment.A",
        ),
    ] {
        let (status, refused) = post(&api, "/vms/test-vm/execute", body).await;
        assert_eq!(
            (status, &refused["details"][0]["field"]),
            (422, &json!(field))
        );
    }
    let nobody = post(&api, "/vms/nope/execute", json!({"command": "x"})).await;
    let message = "VM 'nope' not found";
    assert_eq!(
        nobody,
        (404, json!({"error": "not_found", "message": message}))
    );
}

#[tokio::test]
async fn files_go_in_and_out() {
    let api = api().await;
    running(&api).await;
    let multipart = "multipart/form-data; boundary=X";
    let upload = async |fields: &[(&str, &[u8])]| {
        let path = "/vms/test-vm/files/upload";
        let (status, body) =
            read_json(send(&api, "POST", path, multipart, form(fields).into()).await).await;
        (status.as_u16(), body)
    };
    // In each order.
    let (file, path, mode): (&[u8], &[u8], &[u8]) = (b"0123456789", b"/srv/ab.txt", b"600");
    for fields in [
        [("file", file), ("path", path), ("permissions", mode)],
        [("path", path), ("permissions", mode), ("file", file)],
    ] {
        let (status, done) = upload(&fields).await;
        assert_eq!(status, 200, "{done}");
        let example = json!({
            "message": "File uploaded successfully", "vm_name": "string",
            "remote_path": "/path/to/file", "size_bytes": 1024,
            "uploaded_at": "2025-10-01T12:25:00Z"
        });
        is_like(&done, &example);
        assert_eq!(done["message"], "File uploaded successfully");
        assert_eq!(
            (&done["remote_path"], &done["size_bytes"]),
            (&json!("/srv/ab.txt"), &json!(10))
        );
        let files = api.host.files.lock().unwrap();
        assert_eq!(files["/srv/ab.txt"], b"0123456789");
        assert_eq!(*api.host.last_mode.lock().unwrap(), Some(0o600));
    }
    let big = vec![0; usize::try_from(MIB).unwrap() + 1];
    assert_eq!(upload(&[("path", b"/big"), ("file", &big)]).await.0, 413);
    assert_eq!(upload(&[("path", b"/x")]).await.0, 422);
    assert_eq!(
        upload(&[("path", b"/x"), ("permissions", b"rwx"), ("file", b"")])
            .await
            .0,
        422
    );

    let download = async |path: &str, range: &str| {
        let request = Request::get(format!("/api/v1/vms/test-vm/files/download?path={path}"))
            .header("host", "localhost")
            .header("range", range)
            .header("authorization", &api.bearer)
            .body(Body::empty())
            .unwrap();
        let response = api.router.clone().oneshot(request).await.unwrap();
        let (parts, body) = response.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        (parts.status.as_u16(), parts.headers, body)
    };
    let (status, headers, body) = download("/srv/ab.txt", "none").await;
    assert_eq!((status, &body[..]), (200, &b"0123456789"[..]));
    assert_eq!(headers["content-type"], "application/octet-stream");
    assert_eq!(headers["content-length"], "10");
    assert_eq!(
        headers["content-disposition"],
        "attachment; filename=\"ab.txt\""
    );
    assert_eq!(headers["accept-ranges"], "bytes");
    let (status, headers, body) = download("/srv/ab.txt", "bytes=2-4").await;
    assert_eq!((status, &body[..]), (206, &b"234"[..]));
    assert_eq!(headers["content-range"], "bytes 2-4/10");
    assert_eq!(headers["content-length"], "3");
    let (status, headers, _) = download("/srv/ab.txt", "bytes=10-").await;
    assert_eq!(
        (status, &headers["content-range"]),
        (416, &"bytes */10".parse().unwrap())
    );
    assert_eq!(download("/srv/none", "none").await.0, 404);

    upload(&[("file", b"x"), ("path", b"/srv/sub/deep")]).await;
    let (status, list) = get(&api, "/vms/test-vm/files?path=/srv").await;
    assert_eq!(status, 200, "{list}");
    let example = json!({
        "files": [{
            "name": "filename.txt", "path": "/path/to/filename.txt", "size_bytes": 1024,
            "is_directory": false, "permissions": "644", "modified_at": "2025-10-01T12:00:00Z"
        }],
        "directory": "/path/to/dir"
    });
    is_like(&list, &example);
    let paths = |list: &Value| -> Vec<String> {
        let files = list["files"].as_array().unwrap().iter();
        files
            .map(|file| file["path"].as_str().unwrap().to_owned())
            .collect()
    };
    assert_eq!(list["directory"], "/srv");
    assert_eq!(paths(&list), ["/srv/ab.txt", "/srv/sub"]);
    assert_eq!(
        (&list["files"][0]["name"], &list["files"][0]["permissions"]),
        (&json!("ab.txt"), &json!("750"))
    );
    assert_eq!(list["files"][1]["is_directory"], true);
    let (_, all) = get(&api, "/vms/test-vm/files?path=/srv&recursive=true").await;
    assert_eq!(paths(&all), ["/srv/ab.txt", "/srv/sub", "/srv/sub/deep"]);
    assert_eq!(get(&api, "/vms/test-vm/files?recursive=maybe").await.0, 400);

    let long = "d".repeat(2 << 20);
    let deep = (0..20).map(|number| (format!("/deep/{long}/{number}"), Vec::new()));
    api.host.files.lock().unwrap().extend(deep);
    let (status, _) = get(&api, "/vms/test-vm/files?path=/deep").await;
    assert_eq!(status, 200);
    let (status, error) = get(&api, "/vms/test-vm/files?path=/deep&recursive=true").await;
    assert_eq!(status, 400, "a guest decides how long paths are");
    let message = error["message"].as_str().unwrap();
    assert!(message.contains("list a part of them"), "{message}");
}

#[tokio::test]
async fn snapshots_are_taken_restored_and_deleted() {
    let api = api().await;
    running(&api).await;
    let request = json!({"name": "one", "description": "string", "include_memory": true});
    let (status, taken) = post(&api, "/vms/test-vm/snapshots", request.clone()).await;
    assert_eq!(status, 201, "{taken}");
    let example = json!({
        "name": "string", "vm_name": "string", "created_at": "2025-10-01T12:30:00Z",
        "size_bytes": 1_073_741_824, "description": "string", "checksum": "sha256:abc123..."
    });
    is_like(&taken, &example);
    assert_eq!(
        (&taken["name"], &taken["vm_name"]),
        (&json!("one"), &json!("test-vm"))
    );
    assert_eq!(taken["checksum"], "sha256:c0ffee");
    let (status, refused) = post(&api, "/vms/test-vm/snapshots", request.clone()).await;
    assert_eq!((status, &refused["error"]), (409, &json!("conflict")));
    // Another machine's has the same name.
    post(&api, "/vms", json!({})).await;
    let (_, list) = get(&api, "/vms?sort=name").await;
    let other = list["vms"][0]["name"].as_str().unwrap().to_owned();
    assert_eq!(
        post(&api, &format!("/vms/{other}/snapshots"), request)
            .await
            .0,
        201
    );
    let disk = json!({"name": "disk", "include_memory": false});
    assert_eq!(post(&api, "/vms/test-vm/snapshots", disk).await.0, 201);

    let (status, list) = get(&api, "/vms/test-vm/snapshots").await;
    assert_eq!(status, 200);
    let example = json!({"snapshots": [{
        "name": "string", "vm_name": "string", "created_at": "2025-10-01T12:00:00Z",
        "size_bytes": 1_073_741_824,
        "metadata": {"vm_status": "running", "vcpus": 2, "memory_mb": 512}
    }]});
    is_like(&list, &example);
    let snapshots = list["snapshots"].as_array().unwrap();
    assert_eq!(
        (&snapshots[0]["name"], &snapshots[1]["name"]),
        (&json!("disk"), &json!("one"))
    );
    let metadata = json!({
        "vm_status": "running", "vcpus": 2, "memory_mb": 512, "include_memory": true
    });
    assert_eq!(snapshots[1]["metadata"], metadata);

    let (status, restored) = post(&api, "/vms/test-vm/snapshots/one/restore", Value::Null).await;
    assert_eq!(status, 200, "{restored}");
    assert_eq!(restored["message"], "VM restored successfully");
    let example = json!({
        "vm_name": "string", "snapshot_name": "string", "restored_at": "2025-10-01T12:35:00Z"
    });
    is_like(&restored, &example);
    assert_eq!(
        (&restored["snapshot_name"], &restored["status"]),
        (&json!("one"), &json!("running"))
    );
    let start = api.host.starts.lock().unwrap().last().unwrap().clone();
    assert_eq!((start.layers.memory.len(), start.layers.disk.len()), (1, 1));
    post(&api, "/vms/test-vm/stop", Value::Null).await;
    let (_, restored) = post(&api, "/vms/test-vm/snapshots/disk/restore", Value::Null).await;
    assert_eq!(restored["status"], "stopped");

    for (method, path) in [
        ("POST", format!("/vms/{other}/snapshots/disk/restore")),
        ("DELETE", format!("/vms/{other}/snapshots/disk")),
        ("POST", "/vms/test-vm/snapshots/nope/restore".to_owned()),
    ] {
        assert_eq!(
            call(&api, method, &path, Value::Null).await.0,
            404,
            "{path}"
        );
    }
    for _ in 0..2 {
        let deleted = call(&api, "DELETE", "/vms/test-vm/snapshots/one", Value::Null).await;
        assert!([204, 404].contains(&deleted.0));
    }
    assert_eq!(
        get(&api, "/vms/test-vm/snapshots").await.1["snapshots"]
            .as_array()
            .unwrap()
            .len(),
        1
    );
}

#[tokio::test]
async fn a_machine_without_a_name_that_does_not_start_is_gone() {
    let api = api().await;
    let (status, refused) = post(&api, "/vms", json!({"template": "broken"})).await;
    assert_eq!(status, 502, "{refused}");
    let message = refused["message"].as_str().unwrap();
    assert!(message.starts_with("VM 'sb-"), "{message}");
    let (_, list) = get(&api, "/vms").await;
    assert_eq!((&list["vms"], &list["total"]), (&json!([]), &json!(0)));
}

#[tokio::test]
async fn a_port_or_address_of_anothers_machine_is_told_as_any_that_is_taken() {
    let mut api = api().await;
    running(&api).await;
    let path = "/vms/test-vm/network/port-forward";
    let web = |port: u16| json!({"host_port": port, "guest_port": 80});
    assert_eq!(post(&api, path, web(8080)).await.0, 201);
    api.host.taken_ports.lock().unwrap().push(9090);

    api.bearer = api.user("bob", "user").await;
    let (status, created) = post(&api, "/vms", json!({"name": "test-vm"})).await;
    assert_eq!(status, 201, "{created}");
    let refused = async |port: u16| {
        let (status, refused) = post(&api, path, web(port)).await;
        assert_eq!(status, 409, "{refused}");
        refused.to_string().replace(&port.to_string(), "PORT")
    };
    assert_eq!(refused(8080).await, refused(9090).await);

    let at = |name: &str, ip: &str| json!({"name": name, "network_config": {"ip": ip}});
    let (own, hers) = ("192.168.200.50", "192.168.200.100");
    assert_eq!(post(&api, "/vms", at("own", own)).await.0, 201);
    let refused = async |ip: &str| {
        let (status, refused) = post(&api, "/vms", at("other", ip)).await;
        assert_eq!(status, 409, "{refused}");
        refused.to_string().replace(ip, "IP")
    };
    assert_eq!(refused(own).await, refused(hers).await);
}

#[tokio::test]
async fn networks_and_forwards() {
    let api = api().await;
    running(&api).await;
    let (status, networks) = get(&api, "/networks").await;
    let expected = json!({"networks": [{
        "name": "chbr0", "type": "bridge", "subnet": "192.168.200.0/24",
        "gateway": "192.168.200.1", "dhcp_enabled": true, "vms_connected": 1
    }]});
    assert_eq!((status, networks), (200, expected));
    let web = json!({
        "host_port": 8080, "guest_port": 80, "protocol": "tcp", "description": "Web server"
    });
    let path = "/vms/test-vm/network/port-forward";
    let (status, opened) = post(&api, path, web.clone()).await;
    assert_eq!(status, 201, "{opened}");
    let expected = json!({
        "message": "Port forward configured", "vm_name": "test-vm", "host_port": 8080,
        "guest_port": 80, "protocol": "tcp", "host_address": "127.0.0.1",
        "description": "Web server"
    });
    assert_eq!(opened, expected);
    assert_eq!(post(&api, path, web).await.0, 409);
    api.host.taken_ports.lock().unwrap().push(9000);
    let taken = json!({"host_port": 9000, "guest_port": 80});
    assert_eq!(post(&api, path, taken).await.0, 409);
    for description in ["x".repeat(257), "x\n".to_owned()] {
        let wrong = json!({"guest_port": 81, "description": description});
        assert_eq!(post(&api, path, wrong).await.0, 422);
    }
    let wrong = json!({"host_port": 0, "guest_port": 65_536, "protocol": "icmp"});
    let (status, refused) = post(&api, path, wrong).await;
    assert_eq!(
        (status, refused["details"].as_array().unwrap().len()),
        (422, 3)
    );

    let (status, network) = get(&api, "/vms/test-vm/network").await;
    assert_eq!(status, 200, "{network}");
    let expected = json!({
        "vm_name": "test-vm", "ip_address": "192.168.200.100",
        "mac_address": "52:54:00:a8:c8:64", "bridge_name": "chbr0",
        "network_interface": "chbr0-0001", "connectivity_status": "connected",
        "port_forwards": [{
            "host_port": 8080, "guest_port": 80, "protocol": "tcp", "host_address": "127.0.0.1",
            "description": "Web server"
        }]
    });
    assert_eq!(network, expected);
    // Over a stop.
    post(&api, "/vms/test-vm/stop", Value::Null).await;
    let (_, network) = get(&api, "/vms/test-vm/network").await;
    assert_eq!(network["connectivity_status"], "disconnected");
    assert_eq!(network["port_forwards"][0]["description"], "Web server");
    let one = format!("{path}/8080");
    assert_eq!(
        call(&api, "DELETE", &format!("{one}?protocol=udp"), Value::Null)
            .await
            .0,
        404
    );
    assert_eq!(call(&api, "DELETE", &one, Value::Null).await.0, 204);
    assert_eq!(call(&api, "DELETE", &one, Value::Null).await.0, 404);
}

#[tokio::test]
async fn other_names_for_commands_and_files() {
    let api = api().await;
    running(&api).await;
    let command = json!({"command": "echo hi", "timeout": 5});
    let (status, done) = post(&api, "/vms/test-vm/guest/command", command).await;
    assert_eq!(status, 200, "{done}");
    let example = json!({
        "success": true, "exit_code": 0, "stdout": "", "stderr": "", "execution_time_ms": 1
    });
    is_like(&done, &example);
    assert_eq!(
        (&done["success"], &done["stdout"]),
        (&json!(true), &json!("ran echo hi\n"))
    );

    // A form that says that it is JSON.
    let path = "/vms/test-vm/guest/upload";
    let body = form(&[("file", b"abc"), ("remote_path", b"/srv/f")]);
    let response = send(&api, "POST", path, "application/json", body.into()).await;
    let (status, done) = read_json(response).await;
    assert_eq!(status, StatusCode::OK, "{done}");
    let digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
    let expected = json!({
        "success": true, "remote_path": "/srv/f", "size_bytes": 3, "checksum": digest
    });
    assert_eq!(done, expected);
    for bad in [&b"no form"[..], b"--", b"--\r\n", &[b'-'; 200]] {
        let response = send(&api, "POST", path, "application/json", bad.to_vec().into()).await;
        assert_eq!(response.status(), StatusCode::BAD_REQUEST);
    }
    let download = async |max: u64| {
        let body = json!({"remote_path": "/srv/f", "max_size": max}).to_string();
        let path = "/vms/test-vm/guest/download";
        let response = send(&api, "POST", path, "application/json", body.into()).await;
        let status = response.status().as_u16();
        (
            status,
            response.into_body().collect().await.unwrap().to_bytes(),
        )
    };
    assert_eq!(download(3).await, (200, "abc".into()));
    assert_eq!(download(2).await.0, 413);
}

#[tokio::test]
async fn what_one_dialect_makes_the_other_sees() {
    let api = api().await;
    running(&api).await;
    let id = api.create().await;
    let (_, list) = get(&api, "/vms").await;
    assert_eq!(list["total"], 2);
    assert_eq!(
        get(&api, &format!("/vms/{id}")).await.1["status"],
        "running"
    );
    let (status, sandbox) = api.call("GET", "/v1/sandboxes/test-vm", "").await;
    assert_eq!(
        (status, &sandbox["name"]),
        (StatusCode::OK, &json!("test-vm"))
    );
    assert_eq!(
        api.call("POST", "/v1/sandboxes/test-vm/pause", "").await.0,
        StatusCode::OK
    );
    assert_eq!(get(&api, "/vms/test-vm").await.1["status"], "paused");
    let (status, refused) = post(&api, "/vms/test-vm/start", Value::Null).await;
    assert_eq!(status, 409);
    let message = "VM 'test-vm' is paused and cannot be started: it must be created or stopped";
    assert_eq!(refused["message"], message);
}

#[tokio::test]
async fn a_user_sees_only_their_own() {
    let alice = api().await;
    running(&alice).await;
    let bearer = alice.user("bob", "user").await;
    let Bench { api, bearer: admin } = alice;
    let bob = Bench { api, bearer };
    assert_eq!(get(&bob, "/vms").await.1["total"], 0);
    let nothing = json!({"error": "not_found", "message": "VM 'test-vm' not found"});
    let execute = json!({"command": "true"});
    for (method, path, body) in [
        ("GET", "", Value::Null),
        ("DELETE", "", Value::Null),
        ("POST", "/start", Value::Null),
        ("POST", "/stop", Value::Null),
        ("POST", "/restart", Value::Null),
        ("POST", "/execute", execute.clone()),
        ("POST", "/guest/command", execute),
        ("POST", "/guest/download", json!({"remote_path": "/x"})),
        ("POST", "/guest/upload", Value::Null),
        ("POST", "/files/upload", Value::Null),
        ("GET", "/files", Value::Null),
        ("GET", "/files/download?path=/x", Value::Null),
        ("GET", "/snapshots", Value::Null),
        ("POST", "/snapshots", json!({"name": "x"})),
        ("POST", "/snapshots/x/restore", Value::Null),
        ("DELETE", "/snapshots/x", Value::Null),
        ("GET", "/network", Value::Null),
        ("POST", "/network/port-forward", json!({"guest_port": 80})),
        ("DELETE", "/network/port-forward/8080", Value::Null),
    ] {
        let answer = call(&bob, method, &format!("/vms/test-vm{path}"), body).await;
        assert_eq!(answer, (404, nothing.clone()), "{method} {path}");
    }
    // The same name is theirs too, and is not the other's.
    let own = json!({"name": "test-vm"});
    assert_eq!(post(&bob, "/vms", own.clone()).await.0, 201);
    assert_eq!(post(&bob, "/vms", own).await.0, 409);
    assert_eq!(get(&bob, "/vms").await.1["total"], 1);
    assert_eq!(get(&bob, "/vms/test-vm").await.1["status"], "created");
    let Bench { api, .. } = bob;
    let alice = Bench { api, bearer: admin };
    assert_eq!(get(&alice, "/vms").await.1["total"], 2);
    assert_eq!(get(&alice, "/vms/test-vm").await.1["status"], "running");
    let Bench { api, .. } = alice;
    let nobody = api.call("GET", "/api/v1/vms", "").await;
    assert_eq!(nobody.0, StatusCode::UNAUTHORIZED);
}

/// Names of the fields that an answer says are wrong.
fn wrong_fields((status, refused): (u16, Value)) -> Vec<String> {
    assert_eq!(status, 422, "{refused}");
    let details = refused["details"].as_array().unwrap().iter();
    details
        .map(|detail| detail["field"].as_str().unwrap().to_owned())
        .collect()
}

#[tokio::test]
async fn every_field_that_is_wrong_is_named() {
    let api = api().await;
    running(&api).await;
    let environment = json!({"a=b": "1", "zero": "\u{0}"});
    let execute = json!({
        "command": "true", "working_directory": "srv", "environment": environment,
    });
    let command = json!({"command": "true", "working_dir": "srv", "env": environment});
    let download = json!({"remote_path": "srv", "max_size": -1});
    let snapshot = json!({"name": "no name", "description": "x".repeat(5000)});
    let forward = json!({"guest_port": 80, "description": "x\n", "protocol": "icmp"});
    for (path, body, wrong) in [
        (
            "/execute",
            execute,
            &["working_directory", "environment", "environment"][..],
        ),
        ("/guest/command", command, &["working_dir", "env", "env"]),
        ("/guest/download", download, &["remote_path", "max_size"]),
        ("/snapshots", snapshot, &["name", "description"]),
        (
            "/network/port-forward",
            forward,
            &["protocol", "description"],
        ),
    ] {
        let refused = post(&api, &format!("/vms/test-vm{path}"), body).await;
        assert_eq!(wrong_fields(refused), wrong, "{path}");
    }
    let resources = json!({"vcpus": 99, "memory_mb": 1, "cpu_limit_percent": 0});
    let refused = call(&api, "PUT", "/vms/test-vm/resources", resources).await;
    assert_eq!(
        wrong_fields(refused),
        ["vcpus", "memory_mb", "cpu_limit_percent"]
    );
    for (path, field) in [("/files/upload", "path"), ("/guest/upload", "remote_path")] {
        let form = form(&[(field, b"srv/x"), ("file", b"x")]);
        let kind = "multipart/form-data; boundary=X";
        let path = format!("/vms/test-vm{path}");
        let (status, refused) = read_json(send(&api, "POST", &path, kind, form.into()).await).await;
        assert_eq!(wrong_fields((status.as_u16(), refused)), [field]);
    }
}
