//! Pause and resume, snapshots and forks, over the API on a host that runs nothing: who is in which
//! state, and who holds which layer, whatever goes wrong and whenever the daemon ends.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on may panic")]

mod support;

use std::collections::BTreeSet;
use std::time::Duration;

use api::domain::{End, Sandbox, Status, Store};
use axum::http::StatusCode;
use serde_json::{Value, json};
use support::saved::{assert_layers_are_settled, crash, ok, path, refused, status};
use support::{Api, Fault};

async fn api() -> Api {
    Api::new(1 << 20, 1 << 20).await
}

#[tokio::test]
async fn a_sandbox_is_paused_and_resumed_again_and_again() {
    let api = api().await;
    let id = api.create().await;
    for generation in 1..=6_usize {
        let paused = ok(&api, &path(&id, "/pause"), "").await;
        assert_eq!(paused["status"], "paused");
        assert!(api.host.sandboxes.lock().unwrap().is_empty());
        assert_layers_are_settled(&api).await;
        let (_, list) = api.call("GET", "/v1/sandboxes", "").await;
        assert_eq!(list[0]["status"], "paused");
        let exec = ("POST", &*path(&id, "/exec"), r#"{"cmd": "echo"}"#);
        let text = refused(&api, exec, (409, "invalid_state")).await;
        assert_eq!(text, "sandbox is not running (status: paused)");
        let again = ("POST", &*path(&id, "/pause"), "");
        let text = refused(&api, again, (409, "invalid_state")).await;
        assert_eq!(text, "sandbox is not running (status: paused)");

        let resumed = ok(&api, &path(&id, "/resume"), "").await;
        assert_eq!(resumed["status"], "running");
        assert_eq!(resumed["timings_ms"]["start"], "resume");
        let again = ("POST", &*path(&id, "/resume"), "");
        let text = refused(&api, again, (409, "invalid_state")).await;
        assert_eq!(text, "sandbox is not paused (status: running)");
        ok(&api, &path(&id, "/exec"), r#"{"cmd": "echo"}"#).await;

        let starts = api.host.starts.lock().unwrap();
        let (first, last) = (&starts[0], &starts[generation]);
        assert_eq!(first.identity, last.identity, "it is the same machine");
        assert_eq!(last.layers.disk.len(), generation);
        assert_eq!(last.layers.memory.len(), [1, 2, 3, 4, 2, 3][generation - 1]);
    }
    let (status, _) = api.call("DELETE", &path(&id, ""), "").await;
    assert_eq!(status, StatusCode::NO_CONTENT);
    assert!(api.host.layers.lock().unwrap().is_empty());
    assert_layers_are_settled(&api).await;
    for operation in ["/pause", "/resume"] {
        let request = ("POST", &*path(&id, operation), "");
        let text = refused(&api, request, (409, "invalid_state")).await;
        assert!(text.ends_with("(status: stopped)"), "{text}");
        let request = ("POST", &*path("sb-00000000", operation), "");
        refused(&api, request, (404, "not_found")).await;
    }
}

#[tokio::test]
async fn a_sandbox_that_is_not_saved_runs_on_and_says_why() {
    let api = api().await;
    let id = api.create().await;
    for (fault, kept) in [(Fault::NotSaved, 1), (Fault::NotSavedAndLess, 0)] {
        ok(&api, &path(&id, "/pause"), "").await;
        ok(&api, &path(&id, "/resume"), "").await;
        let before = api.store.held_layers().await.unwrap().len();
        *api.host.fault.lock().unwrap() = Some(fault);
        let request = ("POST", &*path(&id, "/pause"), "");
        let text = refused(&api, request, (502, "agent_error")).await;
        assert!(
            text.contains("runs on") && text.contains("no space left on device"),
            "{text}"
        );
        assert_eq!(status(&api, &id).await, "running");
        assert_layers_are_settled(&api).await;
        let after = api.store.held_layers().await.unwrap().len();
        assert_eq!(before - after, 1 - kept);
        ok(&api, &path(&id, "/exec"), r#"{"cmd": "echo"}"#).await;
    }
    let keep = |index: usize| api.host.saves.lock().unwrap()[index].keep;
    assert_eq!([keep(0), keep(1), keep(2), keep(3)], [0, 1, 1, 2]);
    ok(&api, &path(&id, "/pause"), "").await;
    assert_eq!(keep(4), 1, "the machine is no longer based on the second");
    assert_layers_are_settled(&api).await;
}

#[tokio::test]
async fn a_sandbox_that_is_not_resumed_is_paused_as_before() {
    let api = api().await;
    let id = api.create().await;
    ok(&api, &path(&id, "/pause"), "").await;
    *api.host.fault.lock().unwrap() = Some(Fault::NotRestored);
    let request = ("POST", &*path(&id, "/resume"), "");
    let text = refused(&api, request, (502, "agent_error")).await;
    assert!(
        text.contains("paused as before") && text.contains("another processor"),
        "{text}"
    );
    let (_, row) = api.call("GET", &path(&id, ""), "").await;
    assert_eq!(row["status"], "paused");
    assert_eq!(row["status_reason"], "the snapshot is of another processor");
    assert_layers_are_settled(&api).await;
    let row = ok(&api, &path(&id, "/resume"), "").await;
    assert_eq!(
        (&row["status"], &row["status_reason"]),
        (&json!("running"), &Value::Null)
    );
}

#[tokio::test]
async fn paused_sandboxes_outlive_the_daemon_and_running_ones_do_not() {
    let api = api().await;
    let (paused, running) = (api.create().await, api.create().await);
    ok(&api, &path(&paused, "/pause"), "").await;
    ok(&api, &path(&running, "/pause"), "").await;
    ok(&api, &path(&running, "/resume"), "").await;
    api.manager.shutdown(false).await;
    let api = api.restart().await;
    assert_eq!(status(&api, &paused).await, "paused");
    assert_eq!(status(&api, &running).await, "stopped");
    assert_layers_are_settled(&api).await;
    ok(&api, &path(&paused, "/resume"), "").await;

    ok(&api, &path(&paused, "/pause"), "").await;
    api.host.layers.lock().unwrap().clear();
    let api = api.restart().await;
    let (_, row) = api.call("GET", &path(&paused, ""), "").await;
    assert_eq!(row["status"], "error");
    let reason = row["status_reason"].as_str().unwrap();
    assert!(reason.contains("no longer on the host"), "{reason}");
    assert_layers_are_settled(&api).await;
}

#[tokio::test]
async fn a_daemon_that_ends_in_the_midst_leaves_it_before_or_after() {
    for (operation, fault, expected) in [
        ("/pause", Fault::CrashBeforeSave, "running"),
        ("/pause", Fault::CrashBetweenLayers, "running"),
        ("/pause", Fault::CrashAfterSave, "paused"),
        ("/resume", Fault::CrashBeforeStart, "paused"),
        ("/resume", Fault::CrashAfterStart, "paused"),
        ("/fork", Fault::CrashBeforeSave, "running"),
        ("/fork", Fault::CrashBetweenLayers, "running"),
        ("/fork", Fault::CrashAfterSave, "running"),
        ("/fork", Fault::CrashBeforeStart, "running"),
        ("/fork", Fault::CrashAfterStart, "running"),
    ] {
        let api = api().await;
        let id = api.create().await;
        ok(&api, &path(&id, "/pause"), "").await;
        if operation != "/resume" {
            ok(&api, &path(&id, "/resume"), "").await;
        }
        *api.host.fault.lock().unwrap() = Some(fault);
        let asked = path(&id, operation);
        let request = api.call("POST", &asked, r#"{"count": 2}"#);
        crash(&api, request).await;
        let starts = matches!(fault, Fault::CrashBeforeStart | Fault::CrashAfterStart);
        if operation == "/fork" && starts {
            // The other one has no part in this, and would go on under the next daemon.
            let is_pending = |row: &&Sandbox| row.status == Status::Pending;
            loop {
                let rows = api.store.list_live().await.unwrap();
                if rows.len() == 3 && rows.iter().filter(is_pending).count() == 1 {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
        let api = api.restart().await;
        assert_eq!(status(&api, &id).await, expected, "{operation} {fault:?}");
        assert_layers_are_settled(&api).await;
        assert!(api.store.list_snapshots().await.unwrap().is_empty());
        if expected == "paused" {
            ok(&api, &asked.replace("pause", "resume"), "").await;
        }
        // Nothing runs but what is recorded so, such as those of a fork that had started, nor does it
        // hinder what comes.
        let (_, list) = api.call("GET", "/v1/sandboxes", "").await;
        let running = list.as_array().unwrap().iter();
        let running = running.filter(|row| row["status"] == "running");
        let mut running: Vec<_> = running
            .map(|row| row["id"].as_str().unwrap().to_owned())
            .collect();
        let here = api.host.sandboxes.lock().unwrap().clone();
        let mut here: Vec<_> = here.iter().map(|id| id.as_str().to_owned()).collect();
        running.sort_unstable();
        here.sort_unstable();
        assert!(here.contains(&id), "{operation}");
        assert_eq!(here, running, "{operation}");
        for clone in here.iter().filter(|other| **other != id) {
            assert_eq!(operation, "/fork");
            let deleted = api.call("DELETE", &path(clone, ""), "").await;
            assert_eq!(deleted.0, StatusCode::NO_CONTENT);
        }
        for operation in ["/fork", "/pause", "/resume"] {
            ok(&api, &path(&id, operation), "{}").await;
            assert_layers_are_settled(&api).await;
        }
    }
}

#[tokio::test]
async fn a_running_sandbox_is_forked_and_goes_on() {
    let api = api().await;
    let parent = api.create().await;
    let forked = ok(&api, &path(&parent, "/fork"), r#"{"count": 3}"#).await;
    assert_eq!(forked["stall_ms"], 1.5);
    assert_eq!(forked["failed"], json!([]));
    let children = forked["sandboxes"].as_array().unwrap();
    assert_eq!(children.len(), 3);
    for child in children {
        assert_eq!(child["status"], "running");
        assert_eq!(child["timings_ms"]["start"], "fork");
    }
    assert_eq!(status(&api, &parent).await, "running");
    assert_eq!(api.host.sandboxes.lock().unwrap().len(), 4);
    {
        let starts = api.host.starts.lock().unwrap();
        let machines: BTreeSet<_> = starts
            .iter()
            .map(|start| (&start.identity.machine_id, &start.identity.hostname))
            .collect();
        assert_eq!(machines.len(), 4, "each is a machine of its own");
    }
    assert_layers_are_settled(&api).await;
    assert_eq!(api.call("GET", "/v1/snapshots", "").await.1, json!([]));

    // One memory layer and one disk layer, which all of them share.
    assert_eq!(api.host.layers.lock().unwrap().len(), 2);
    let ids = children.iter().map(|child| child["id"].as_str().unwrap());
    for id in ids.chain([&*parent]) {
        assert_eq!(api.host.layers.lock().unwrap().len(), 2);
        api.call("DELETE", &path(id, ""), "").await;
    }
    assert!(api.host.layers.lock().unwrap().is_empty());

    for (body, word) in [
        (r#"{"count": 0}"#, "1 to 100"),
        (r#"{"count": 101}"#, "1 to 100"),
        ("[]", "JSON"),
    ] {
        let path = path(&parent, "/fork");
        let text = refused(&api, ("POST", &path, body), (400, "invalid_request")).await;
        assert!(text.contains(word), "{text}");
    }
    let request = ("POST", &*path(&parent, "/fork"), "{}");
    refused(&api, request, (409, "invalid_state")).await;
}

#[tokio::test]
async fn of_many_clones_one_tells_the_others_what_they_will_touch() {
    let api = api().await;
    let parent = api.create().await;
    let fork = path(&parent, "/fork");
    ok(&api, &fork, r#"{"count": 1}"#).await;
    assert!(api.host.working_sets.lock().unwrap().is_empty());
    // More than are started at a time on any host.
    let forked = ok(&api, &fork, r#"{"count": 40}"#).await;
    assert_eq!(forked["sandboxes"].as_array().unwrap().len(), 40);
    let id = forked["sandboxes"][0]["id"].as_str().unwrap();
    let clone = api.store.get(&id.parse().unwrap()).await.unwrap().unwrap();
    assert_eq!(*api.host.working_sets.lock().unwrap(), [clone.layers]);
}

#[tokio::test]
async fn sandboxes_of_a_fork_that_do_not_start_are_listed() {
    let api = api().await;
    let parent = api.create().await;
    ok(&api, &path(&parent, "/pause"), "").await;
    *api.host.fault.lock().unwrap() = Some(Fault::NotRestored);
    let forked = ok(&api, &path(&parent, "/fork"), r#"{"count": 2}"#).await;
    assert_eq!(forked["sandboxes"].as_array().unwrap().len(), 1);
    assert_eq!(forked.get("stall_ms"), None, "it was not running");
    let failed = &forked["failed"][0];
    assert!(
        failed["reason"]
            .as_str()
            .unwrap()
            .contains("another processor")
    );
    assert_eq!(status(&api, failed["id"].as_str().unwrap()).await, "error");
    assert_eq!(status(&api, &parent).await, "paused");
    assert_layers_are_settled(&api).await;

    *api.host.fault.lock().unwrap() = Some(Fault::NotRestored);
    let request = ("POST", &*path(&parent, "/fork"), "{}");
    let text = refused(&api, request, (502, "agent_error")).await;
    assert!(text.contains("none of 1"), "{text}");
    assert_layers_are_settled(&api).await;
}

#[tokio::test]
async fn a_parent_that_is_not_saved_runs_on_and_nothing_is_forked() {
    let api = api().await;
    let parent = api.create().await;
    *api.host.fault.lock().unwrap() = Some(Fault::NotSaved);
    let request = ("POST", &*path(&parent, "/fork"), "{}");
    let text = refused(&api, request, (502, "agent_error")).await;
    assert!(text.contains("runs on"), "{text}");
    assert_eq!(status(&api, &parent).await, "running");
    assert_eq!(api.store.list_live().await.unwrap().len(), 1);
    assert_layers_are_settled(&api).await;
    ok(&api, &path(&parent, "/fork"), "{}").await;
}

#[tokio::test]
async fn snapshots_are_taken_listed_started_from_and_deleted() {
    let api = api().await;
    let id = api.create().await;
    let body = json!({"sandbox_id": id, "name": "first", "description": "before the change"});
    let first = ok(&api, "/v1/snapshots", &body.to_string()).await;
    let first_id = first["id"].as_str().unwrap();
    assert_eq!(
        (&first["name"], &first["sandbox_id"]),
        (&json!("first"), &json!(id))
    );
    assert_eq!(
        (&first["size_bytes"], &first["checksum"]),
        (&json!(100), &json!("c0ffee"))
    );
    let taken = ("POST", "/v1/snapshots", &*body.to_string());
    let text = refused(&api, taken, (409, "conflict")).await;
    assert!(text.contains("\"first\" exists already"), "{text}");

    ok(&api, &path(&id, "/pause"), "").await;
    let body = json!({ "sandbox_id": id }).to_string();
    let second = ok(&api, "/v1/snapshots", &body).await;
    let second_id = second["id"].as_str().unwrap();
    let (_, list) = api.call("GET", "/v1/snapshots", "").await;
    assert_eq!(list, json!([second, first]));
    assert_layers_are_settled(&api).await;

    let api = api.restart().await;
    api.call("DELETE", &path(&id, ""), "").await;
    assert_eq!(api.call("GET", "/v1/snapshots", "").await.1, list);
    for name in [first_id, "first", second_id] {
        let (_, found) = api.call("GET", &format!("/v1/snapshots/{name}"), "").await;
        assert!(found["id"].is_string(), "{found}");
        let forked = ok(&api, &format!("/v1/snapshots/{name}/fork"), "{}").await;
        assert_eq!(forked["sandboxes"][0]["status"], "running");
    }
    for name in ["first", second_id] {
        let (status, _) = api
            .call("DELETE", &format!("/v1/snapshots/{name}"), "")
            .await;
        assert_eq!(status, StatusCode::NO_CONTENT);
        let gone = ("DELETE", &*format!("/v1/snapshots/{name}"), "");
        refused(&api, gone, (404, "not_found")).await;
        let gone = ("POST", &*format!("/v1/snapshots/{name}/fork"), "{}");
        refused(&api, gone, (404, "not_found")).await;
    }
    assert_layers_are_settled(&api).await;
    assert_eq!(
        api.host.layers.lock().unwrap().len(),
        4,
        "sandboxes hold them"
    );

    for (body, code) in [
        (json!({}), (400, "invalid_request")),
        (
            json!({"sandbox_id": id, "name": "a/b"}),
            (400, "invalid_request"),
        ),
        (
            json!({"sandbox_id": id, "description": "x".repeat(5000)}),
            (400, "invalid_request"),
        ),
        (json!({"sandbox_id": "sb-00000000"}), (404, "not_found")),
        (json!({ "sandbox_id": id }), (409, "invalid_state")),
    ] {
        refused(&api, ("POST", "/v1/snapshots", &body.to_string()), code).await;
    }
}

#[tokio::test]
async fn sandboxes_from_a_snapshot_without_memory_boot() {
    let api = api().await;
    let id = api.create().await;
    let body = json!({"sandbox_id": id, "name": "disk", "include_memory": false}).to_string();
    let running = ok(&api, "/v1/snapshots", &body).await;
    let (size, has_memory) = (&running["size_bytes"], &running["include_memory"]);
    assert_eq!((size, has_memory), (&json!(50), &json!(false)));
    let last = api.host.saves.lock().unwrap().last().unwrap().clone();
    assert!(!last.include_memory && last.layers.memory.is_empty());
    assert_layers_are_settled(&api).await;

    // Of a paused one, whose disk has two layers by then.
    ok(&api, &path(&id, "/pause"), "").await;
    let body = json!({"sandbox_id": id, "include_memory": false}).to_string();
    let paused = ok(&api, "/v1/snapshots", &body).await;
    assert_eq!(paused["size_bytes"], 100);
    assert_eq!(
        api.host.saves.lock().unwrap().len(),
        2,
        "it is not saved anew"
    );
    let body = json!({ "sandbox_id": id }).to_string();
    let whole = ok(&api, "/v1/snapshots", &body).await;
    assert_eq!(whole["include_memory"], true);
    api.call("DELETE", &path(&id, ""), "").await;
    for (snapshot, start) in [("disk", "cold"), (paused["id"].as_str().unwrap(), "cold")]
        .into_iter()
        .chain([(whole["id"].as_str().unwrap(), "fork")])
    {
        let forked = ok(&api, &format!("/v1/snapshots/{snapshot}/fork"), "{}").await;
        assert_eq!(forked["sandboxes"][0]["timings_ms"]["start"], start);
        // What has booted from a disk is saved as any other.
        let id = forked["sandboxes"][0]["id"].as_str().unwrap();
        ok(&api, &path(id, "/pause"), "").await;
        let resumed = ok(&api, &path(id, "/resume"), "").await;
        assert_eq!(resumed["timings_ms"]["start"], "resume");
        assert_layers_are_settled(&api).await;
    }
}

#[tokio::test]
async fn a_disk_that_was_not_at_rest_is_no_snapshot() {
    let api = api().await;
    let id = api.create().await;
    *api.host.fault.lock().unwrap() = Some(Fault::NotAtRest);
    let body = json!({"sandbox_id": id, "include_memory": false}).to_string();
    let request = ("POST", "/v1/snapshots", &*body);
    let text = refused(&api, request, (502, "agent_error")).await;
    assert!(text.contains("did not stay frozen"), "{text}");
    assert_eq!(api.call("GET", "/v1/snapshots", "").await.1, json!([]));
    assert_layers_are_settled(&api).await;
    ok(&api, "/v1/snapshots", &body).await;
    ok(&api, &path(&id, "/pause"), "").await;
    assert_layers_are_settled(&api).await;
}

#[tokio::test]
async fn deleting_ends_what_is_under_way() {
    let api = api().await;
    let id = api.create().await;
    ok(&api, &path(&id, "/pause"), "").await;
    let pending = path(&id, "/resume");
    let (resumed, (deleted, _)) = tokio::join!(api.call("POST", &pending, ""), async {
        api.call("DELETE", &path(&id, ""), "").await
    });
    assert_eq!(deleted, StatusCode::NO_CONTENT, "{resumed:?}");
    assert_eq!(status(&api, &id).await, "stopped");
    assert!(api.host.sandboxes.lock().unwrap().is_empty());
    assert_layers_are_settled(&api).await;
}

#[tokio::test]
async fn a_vmm_that_dies_takes_its_layers_along() {
    let api = api().await;
    let id = api.create().await;
    ok(&api, &path(&id, "/pause"), "").await;
    ok(&api, &path(&id, "/resume"), "").await;
    let reason = "it was killed".to_owned();
    api.host.end(&id, End::Failed { reason });
    while status(&api, &id).await == "running" || !api.host.layers.lock().unwrap().is_empty() {
        tokio::task::yield_now().await;
    }
    assert_eq!(status(&api, &id).await, "error");
    assert_layers_are_settled(&api).await;
}
