//! Machines: made, started, stopped, listed, deleted, and whose they are.

use api::domain::{Egress, NetworkInfo};
use axum::body::Body;
use axum::http::StatusCode;
use serde_json::{Value, json};

use super::{Bench, api, call, create_request, get, is_like, post, running, send};

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
async fn where_no_machine_can_start_the_service_is_unavailable() {
    let api = api().await;
    running(&api).await;
    post(&api, "/vms/test-vm/stop", Value::Null).await;
    let broken = json!({"name": "broken", "template": "broken"});
    assert_eq!(post(&api, "/vms", broken).await.0, 201);
    assert_eq!(post(&api, "/vms/broken/start", Value::Null).await.0, 502);
    let why = "/dev/kvm cannot be opened";
    api.host.meter.health.lock().unwrap().vmm = Err(why.into());
    for (path, body) in [
        ("/vms/broken/start", Value::Null),
        ("/vms", json!({"template": "broken"})),
    ] {
        let (status, refused) = post(&api, path, body).await;
        assert_eq!(
            (status, &refused["error"]),
            (503, &json!("service_unavailable"))
        );
        let message = refused["message"].as_str().unwrap();
        assert!(
            message.starts_with("Cloud Hypervisor service unavailable"),
            "{message}"
        );
        assert!(!message.contains(why), "{message}");
    }
    // What is wrong with the request is told as ever.
    assert_eq!(post(&api, "/vms/test-vm/stop", Value::Null).await.0, 409);
    assert_eq!(post(&api, "/vms/test-vm/start", Value::Null).await.0, 200);
}

#[tokio::test]
async fn a_machine_whose_network_is_configured_no_more_is_in_no_bridge() {
    let api = api().await;
    let further = NetworkInfo {
        name: "chbr1".into(),
        subnet: "192.168.201.0/24".parse().unwrap(),
        default_egress: Egress::All,
    };
    api.host.networks.lock().unwrap().push(further);
    let made = json!({"name": "other", "network_config": {"bridge": "chbr1"}});
    let (status, made) = post(&api, "/vms", made).await;
    assert_eq!(
        (status, &made["network_config"]["bridge"]),
        (201, &json!("chbr1"))
    );
    api.host.networks.lock().unwrap().pop();
    let (_, vm) = get(&api, "/vms/other").await;
    let (_, network) = get(&api, "/vms/other/network").await;
    assert!(vm["network_config"]["bridge"].is_null(), "{vm}");
    assert!(network["bridge_name"].is_null(), "{network}");
    assert_eq!(vm["ip_address"], made["ip_address"]);
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
        // By the words that are shown: created, running, stopped.
        ("sort=status", "3 acb"),
        ("sort=status&order=desc", "3 bca"),
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
