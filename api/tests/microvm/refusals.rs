//! What does not fit a state, and fields that are wrong.

use serde_json::{Value, json};

use super::{api, call, create_request, get, is_like, post, running, send};
use crate::support::{form, read_json};

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
