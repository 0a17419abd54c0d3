//! Snapshots.

use serde_json::{Value, json};

use super::{api, call, get, is_like, post, running};

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
