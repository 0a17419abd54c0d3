//! Pause and resume, snapshots, forks and warm snapshots, over the API on a host that runs nothing:
//! who is in which state, and who holds which layer, whatever goes wrong and whenever the daemon ends.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on may panic")]

mod support;

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;
use std::time::Duration;

use api::domain::{End, LayerId, Layers, Sandbox, SandboxId, Status, Store};
use axum::http::StatusCode;
use proptest::prelude::*;
use serde_json::{Value, json};
use support::{Api, Fault, MergeFault};

async fn api() -> Api {
    Api::new(1 << 20, 1 << 20).await
}

fn path(id: &str, operation: &str) -> String {
    format!("/v1/sandboxes/{id}{operation}")
}

async fn ok(api: &Api, path: &str, body: &str) -> Value {
    let (status, answer) = api.call("POST", path, body).await;
    assert!(status.is_success(), "{path}: {status} {answer}");
    answer
}

async fn refused(api: &Api, (method, path, body): (&str, &str, &str), code: (u16, &str)) -> String {
    let (status, answer) = api.call(method, path, body).await;
    let got = (status.as_u16(), answer["error"]["code"].as_str().unwrap());
    assert_eq!(got, code, "{method} {path}: {answer}");
    answer["error"]["message"].as_str().unwrap().to_owned()
}

async fn status(api: &Api, id: &str) -> Value {
    api.call("GET", &path(id, ""), "").await.1["status"].clone()
}

/// Each layer on the host is held by a record, and each that is held is on the host.
async fn assert_layers_are_settled(api: &Api) {
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
        let path = path(&id, operation);
        let request = api.call("POST", &path, r#"{"count": 2}"#);
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
            ok(&api, &path.replace("pause", "resume"), "").await;
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
            let deleted = api.call("DELETE", &self::path(clone, ""), "").await;
            assert_eq!(deleted.0, StatusCode::NO_CONTENT);
        }
        for operation in ["/fork", "/pause", "/resume"] {
            ok(&api, &self::path(&id, operation), "{}").await;
            assert_layers_are_settled(&api).await;
        }
    }
}

/// Lets a request go on to the point at which the daemon is to end.
async fn crash<T>(api: &Api, request: impl Future<Output = T>) -> Option<T> {
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

/// The disk layers of a sandbox.
async fn disk_of(api: &Api, id: &str) -> Vec<LayerId> {
    let sandbox = api.store.get(&id.parse().unwrap()).await.unwrap().unwrap();
    sandbox.layers.disk
}

#[tokio::test]
async fn long_chains_of_disk_layers_are_merged() {
    let api = Api::merging(4).await;
    let id = api.create().await;
    let snapshot = json!({ "sandbox_id": id }).to_string();
    for generation in 1..=3 {
        ok(&api, "/v1/snapshots", &snapshot).await;
        assert_eq!(disk_of(&api, &id).await.len(), generation);
    }
    let before = disk_of(&api, &id).await;
    let alone = json!({"sandbox_id": id, "name": "alone", "include_memory": false}).to_string();
    ok(&api, "/v1/snapshots", &alone).await;
    api.manager.merges_done().await;
    let merge = api.host.merges.lock().unwrap().pop().unwrap();
    assert_eq!(merge.layers[..2], before[1..]);
    assert_eq!(
        disk_of(&api, &id).await,
        [before[0].clone(), merge.into.clone()]
    );
    // The one without memory has its checksum of what it was.
    let all = api.store.list_snapshots().await.unwrap();
    assert_eq!(all[0].layers.disk.len(), 4);
    assert_layers_are_settled(&api).await;

    // So it never ends, and what is saved goes on from what was merged.
    for _ in 0..100 {
        ok(&api, &path(&id, "/pause"), "").await;
        ok(&api, &path(&id, "/resume"), "").await;
        api.manager.merges_done().await;
        assert!(disk_of(&api, &id).await.len() < 5);
    }
    let last = api.host.starts.lock().unwrap().last().unwrap().clone();
    assert_eq!(last.layers.disk[0], before[0]);
    for snapshot in api.store.list_snapshots().await.unwrap() {
        let path = format!("/v1/snapshots/{}", snapshot.id);
        api.call("DELETE", &path, "").await;
    }
    assert_layers_are_settled(&api).await;
    assert!(api.host.layers.lock().unwrap().len() < 9);
}

#[tokio::test]
async fn all_that_have_the_layers_get_the_merged_one() {
    let api = Api::merging(4).await;
    let id = api.create().await;
    for _ in 0..3 {
        ok(&api, &path(&id, "/pause"), "").await;
        ok(&api, &path(&id, "/resume"), "").await;
    }
    // Its merge fails, and is made up for by the next.
    *api.host.merge_fault.lock().unwrap() = Some(MergeFault::NotMerged);
    ok(&api, &path(&id, "/pause"), "").await;
    api.manager.merges_done().await;
    assert_eq!(disk_of(&api, &id).await.len(), 4);
    let body = json!({"sandbox_id": id, "name": "base"}).to_string();
    ok(&api, "/v1/snapshots", &body).await;
    let forked = ok(&api, &path(&id, "/fork"), r#"{"count": 2}"#).await;
    let forks: Vec<String> = forked["sandboxes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|fork| fork["id"].as_str().unwrap().to_owned())
        .collect();
    // This one has one layer more by then, the others have those alone.
    ok(&api, &path(&id, "/resume"), "").await;
    ok(&api, &path(&id, "/pause"), "").await;
    api.manager.merges_done().await;
    let own = disk_of(&api, &id).await;
    assert_eq!(own.len(), 2, "{own:?}");
    // Those have four, of which its merge took five: they merge their own.
    ok(&api, &path(&forks[0], "/pause"), "").await;
    api.manager.merges_done().await;
    assert_eq!(disk_of(&api, &forks[0]).await.len(), 2);
    assert_layers_are_settled(&api).await;
    for fork in &forks {
        api.call("DELETE", &path(fork, ""), "").await;
    }
    let forked = ok(&api, "/v1/snapshots/base/fork", "{}").await;
    assert_eq!(forked["sandboxes"][0]["status"], "running");
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

/// Waits until there are so many warm snapshots.
async fn wait_for_warm(api: &Api, count: usize) {
    while api.store.list_warm().await.unwrap().len() != count {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

async fn create(api: &Api, memory_mb: u32) -> Value {
    let body = json!({ "memory_mb": memory_mb }).to_string();
    ok(api, "/v1/sandboxes", &body).await
}

#[tokio::test]
async fn the_first_of_a_shape_boots_and_the_next_start_warm() {
    let api = Api::warm(1 << 20).await;
    let first = create(&api, 256).await;
    assert_eq!(first["timings_ms"]["start"], "cold");
    wait_for_warm(&api, 1).await;
    for _ in 0..2 {
        assert_eq!(create(&api, 256).await["timings_ms"]["start"], "warm");
    }
    assert_eq!(create(&api, 512).await["timings_ms"]["start"], "cold");
    wait_for_warm(&api, 2).await;
    // Of each it was noted first what machines touch.
    let mut noted = api.host.working_sets.lock().unwrap().clone();
    let warm = api.store.list_warm().await.unwrap();
    noted.retain(|layers| warm.iter().any(|(warm, _)| warm.layers == *layers));
    assert_eq!(noted.len(), 2);
    assert_layers_are_settled(&api).await;

    let api = api.restart().await;
    assert_layers_are_settled(&api).await;
    assert_eq!(create(&api, 256).await["timings_ms"]["start"], "warm");
    assert_eq!(api.store.list_warm().await.unwrap().len(), 2);
}

#[tokio::test]
async fn a_warm_snapshot_that_does_not_start_is_dropped_and_the_sandbox_boots() {
    let api = Api::warm(1 << 20).await;
    create(&api, 256).await;
    wait_for_warm(&api, 1).await;
    *api.host.fault.lock().unwrap() = Some(Fault::NotRestored);
    let sandbox = create(&api, 256).await;
    assert_eq!(sandbox["status"], "running");
    assert_eq!(sandbox["timings_ms"]["start"], "cold_fallback");
    assert!(api.store.list_warm().await.unwrap().is_empty());
    assert_layers_are_settled(&api).await;
    // It is not tried again.
    assert_eq!(create(&api, 256).await["timings_ms"]["start"], "cold");
    assert!(api.store.list_warm().await.unwrap().is_empty());
}

#[tokio::test]
async fn warm_snapshots_stay_within_their_budget() {
    // Each has 100 bytes, so there is room for two.
    let api = Api::warm(250).await;
    for (memory_mb, expected) in [(200, 1), (300, 2)] {
        create(&api, memory_mb).await;
        wait_for_warm(&api, expected).await;
    }
    // The oldest is used, which makes the other the least recently used; but a sandbox is based on
    // it, and so it stays.
    let newer = create(&api, 300).await;
    create(&api, 200).await;
    let shapes = async || {
        let all = api.store.list_warm().await.unwrap();
        let mut shapes: Vec<_> = all
            .iter()
            .map(|(warm, _)| warm.model.shape.memory_mb)
            .collect();
        shapes.sort_unstable();
        shapes
    };
    create(&api, 400).await;
    let is_over = || {
        let saves = api.host.saves.lock().unwrap().len();
        let machines = api.host.sandboxes.lock().unwrap().len();
        (saves, machines, api.host.layers.lock().unwrap().len()) == (3, 5, 4)
    };
    while !is_over() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(shapes().await, [200, 300], "both are in use");
    let id = newer["id"].as_str().unwrap();
    api.call("DELETE", &path(id, ""), "").await;
    create(&api, 500).await;
    while shapes().await != [200, 500] {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert_layers_are_settled(&api).await;
}

/// Something that is done to one of the sandboxes, or the snapshots.
#[derive(Debug, Clone)]
enum Step {
    Create,
    Pause(usize),
    Resume(usize),
    Fork(usize),
    Snapshot(usize),
    SnapshotDisk(usize),
    ForkSnapshot(usize),
    Delete(usize),
    DeleteSnapshot(usize),
    Die(usize),
    Restart,
}

fn step() -> impl Strategy<Value = (Step, Option<Fault>, Option<MergeFault>)> {
    let which = 0..6_usize;
    let step = prop_oneof![
        2 => Just(Step::Create),
        4 => which.clone().prop_map(Step::Pause),
        4 => which.clone().prop_map(Step::Resume),
        2 => which.clone().prop_map(Step::Fork),
        2 => which.clone().prop_map(Step::Snapshot),
        2 => which.clone().prop_map(Step::SnapshotDisk),
        1 => which.clone().prop_map(Step::ForkSnapshot),
        2 => which.clone().prop_map(Step::Delete),
        1 => which.clone().prop_map(Step::DeleteSnapshot),
        1 => which.prop_map(Step::Die),
        1 => Just(Step::Restart),
    ];
    let fault = prop_oneof![
        Just(Fault::NotSaved),
        Just(Fault::NotSavedAndLess),
        Just(Fault::NotAtRest),
        Just(Fault::NotRestored),
        Just(Fault::CrashBeforeSave),
        Just(Fault::CrashBetweenLayers),
        Just(Fault::CrashAfterSave),
        Just(Fault::CrashBeforeStart),
        Just(Fault::CrashAfterStart),
    ];
    let merge_fault = prop_oneof![
        Just(MergeFault::NotMerged),
        Just(MergeFault::CrashBefore),
        Just(MergeFault::CrashAfter),
    ];
    (
        step,
        prop::option::weighted(0.2, fault),
        prop::option::weighted(0.2, merge_fault),
    )
}

/// Does a step. `true` if the daemon has ended in it.
async fn take(api: &Api, step: &Step, fault: Option<Fault>) -> bool {
    let live = api.store.list_live().await.unwrap();
    let sandbox = |which: usize| {
        let id = live
            .get(which % live.len().max(1))
            .map(|live| live.id.as_str());
        id.unwrap_or("sb-00000000").to_owned()
    };
    let snapshots = api.store.list_snapshots().await.unwrap();
    let snapshot = |which: usize| {
        let found = snapshots.get(which % snapshots.len().max(1));
        found.map_or("sn-00000000".to_owned(), |found| found.id.to_string())
    };
    let fork = r#"{"count": 2}"#.to_owned();
    let (method, path, body) = match step {
        Step::Create => ("POST", "/v1/sandboxes".to_owned(), "{}".to_owned()),
        Step::Pause(which) => ("POST", path(&sandbox(*which), "/pause"), String::new()),
        Step::Resume(which) => ("POST", path(&sandbox(*which), "/resume"), String::new()),
        Step::Fork(which) => ("POST", path(&sandbox(*which), "/fork"), fork),
        Step::Snapshot(which) => {
            let body = json!({ "sandbox_id": sandbox(*which) });
            ("POST", "/v1/snapshots".to_owned(), body.to_string())
        }
        Step::SnapshotDisk(which) => {
            let body = json!({ "sandbox_id": sandbox(*which), "include_memory": false });
            ("POST", "/v1/snapshots".to_owned(), body.to_string())
        }
        Step::ForkSnapshot(which) => {
            let path = format!("/v1/snapshots/{}/fork", snapshot(*which));
            ("POST", path, fork)
        }
        Step::Delete(which) => ("DELETE", path(&sandbox(*which), ""), String::new()),
        Step::DeleteSnapshot(which) => {
            let path = format!("/v1/snapshots/{}", snapshot(*which));
            ("DELETE", path, String::new())
        }
        Step::Die(which) => {
            let id = sandbox(*which);
            let runs = live
                .iter()
                .any(|live| live.id.as_str() == id && live.status == Status::Running);
            if runs {
                let reason = "it was killed".to_owned();
                api.host.end(&id, End::Failed { reason });
                while status(api, &id).await == "running" {
                    tokio::task::yield_now().await;
                }
            }
            return false;
        }
        Step::Restart => return true,
    };
    *api.host.fault.lock().unwrap() = fault;
    let request = api.call(method, &path, &body);
    let crashes = format!("{fault:?}").contains("Crash");
    if !crashes {
        let (status, answer) = request.await;
        let is_ours = status.as_u16() != 500;
        assert!(is_ours, "{method} {path}: {answer}");
        *api.host.fault.lock().unwrap() = None;
        return false;
    }
    let answer = crash(api, request).await;
    *api.host.fault.lock().unwrap() = None;
    answer.is_none()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_layers_are_held_and_sandboxes_are_whole(
        steps in prop::collection::vec(step(), 1..32),
    ) {
        let mut steps = steps.into_iter();
        let mut crashed = None;
        loop {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            crashed = runtime.block_on(life_of_a_daemon(crashed, &mut steps));
            // Here all ends that the daemon has under way.
            drop(runtime);
            if crashed.is_none() {
                break;
            }
        }
    }
}

type Steps = std::vec::IntoIter<(Step, Option<Fault>, Option<MergeFault>)>;

/// A daemon after one that has crashed, if one has. Takes steps until they are all taken, or returns
/// what is left when it crashes itself.
async fn life_of_a_daemon(crashed: Option<Api>, steps: &mut Steps) -> Option<Api> {
    let api = match crashed {
        Some(crashed) => {
            let before = crashed.store.list_live().await.unwrap();
            let api = crashed.restart().await;
            for sandbox in before {
                let after = api.store.get(&sandbox.id).await.unwrap().unwrap().status;
                let expected: &[Status] = match sandbox.status {
                    Status::Running => &[Status::Running],
                    Status::Pausing => &[Status::Running, Status::Paused],
                    Status::Paused | Status::Resuming => &[Status::Paused],
                    _ => &[Status::Error],
                };
                assert!(expected.contains(&after), "{after} after {sandbox:?}");
            }
            api
        }
        None => Api::merging(3).await,
    };
    assert_all_is_well(&api).await;
    for (step, fault, merge_fault) in steps.by_ref() {
        *api.host.merge_fault.lock().unwrap() = merge_fault;
        if take(&api, &step, fault).await {
            return Some(api);
        }
        // A merge comes to its end, or to where the daemon ends.
        let is_stuck = || api.host.is_stuck.load(Ordering::SeqCst);
        tokio::select! {
            () = api.manager.merges_done() => {}
            () = async { while !is_stuck() { tokio::task::yield_now().await } } => {}
        }
        if is_stuck() {
            return Some(api);
        }
        assert_all_is_well(&api).await;
    }
    None
}

async fn assert_all_is_well(api: &Api) {
    // What ended by itself lets go of its layers a moment later than it is told.
    let there = || api.host.layers.lock().unwrap().clone();
    let mut turns = 0;
    while api.store.held_layers().await.unwrap() != there() {
        turns += 1;
        assert!(turns < 20_000, "layers are left, or missing");
        tokio::task::yield_now().await;
    }
    assert_layers_are_settled(api).await;
    for sandbox in api.store.list_live().await.unwrap() {
        let runs = api.host.sandboxes.lock().unwrap().contains(&sandbox.id);
        assert_eq!(runs, sandbox.status == Status::Running, "{sandbox:?}");
    }
}

/// The ids of the machines that are ready, once they are so many.
async fn wait_for_ready(api: &Api, count: usize) -> BTreeSet<SandboxId> {
    loop {
        let ready: BTreeSet<_> = api.host.ready.lock().unwrap().keys().cloned().collect();
        if ready.len() == count {
            return ready;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test]
async fn ready_machines_are_handed_out_once_and_replaced() {
    let api = Api::pooled(2).await;
    assert_eq!(create(&api, 256).await["timings_ms"]["start"], "cold");
    let ready = wait_for_ready(&api, 2).await;
    assert_eq!(api.store.list_live().await.unwrap().len(), 1, "no record");
    let mut taken = BTreeSet::new();
    for expected in ["pool", "pool", "warm"] {
        let sandbox = create(&api, 256).await;
        assert_eq!(sandbox["timings_ms"]["start"], expected);
        let id: SandboxId = sandbox["id"].as_str().unwrap().parse().unwrap();
        assert_eq!(ready.contains(&id), expected == "pool");
        assert!(taken.insert(id.clone()));
        ok(&api, &path(id.as_str(), "/exec"), r#"{"cmd": "echo"}"#).await;
    }
    {
        let claims = api.host.claims.lock().unwrap();
        let [a, b] = [&claims[0], &claims[1]];
        assert!(
            a.identity.hostname == a.id.as_str() && a.identity.machine_id != b.identity.machine_id
        );
    }
    let next = wait_for_ready(&api, 2).await;
    assert!(next.is_disjoint(&taken));
    // Another shape has its own.
    assert_eq!(create(&api, 512).await["timings_ms"]["start"], "cold");
    wait_for_ready(&api, 4).await;
    assert_layers_are_settled(&api).await;

    api.manager.shutdown(false).await;
    assert!(api.host.ready.lock().unwrap().is_empty());
    let api = api.restart().await;
    assert_eq!(create(&api, 256).await["timings_ms"]["start"], "warm");
    wait_for_ready(&api, 2).await;
}

#[tokio::test]
async fn a_ready_machine_that_ends_is_replaced_and_never_handed_out() {
    let api = Api::pooled(1).await;
    create(&api, 256).await;
    let first = wait_for_ready(&api, 1).await.pop_first().unwrap();
    api.host.lose(&first);
    let second = wait_for_ready(&api, 1).await.pop_first().unwrap();
    assert_ne!(first, second);
    assert_eq!(create(&api, 256).await["id"], second.as_str());

    // One that ends at the moment that it is claimed: its sandbox starts nevertheless.
    let third = wait_for_ready(&api, 1).await.pop_first().unwrap();
    *api.host.fault.lock().unwrap() = Some(Fault::NotClaimed);
    let sandbox = create(&api, 256).await;
    assert_eq!(sandbox["id"], third.as_str());
    assert_eq!(sandbox["status"], "running");
    assert_eq!(sandbox["timings_ms"]["start"], "warm");
    assert_eq!(api.store.list_warm().await.unwrap().len(), 1);
    assert_layers_are_settled(&api).await;
}

#[tokio::test]
async fn ready_machines_of_a_warm_snapshot_that_is_dropped_are_ended() {
    let api = Api::pooled(2).await;
    create(&api, 256).await;
    wait_for_ready(&api, 2).await;
    for expected in ["pool", "pool"] {
        assert_eq!(create(&api, 256).await["timings_ms"]["start"], expected);
    }
    *api.host.fault.lock().unwrap() = Some(Fault::NotRestored);
    assert_eq!(
        create(&api, 256).await["timings_ms"]["start"],
        "cold_fallback"
    );
    assert!(api.store.list_warm().await.unwrap().is_empty());
    assert_eq!(create(&api, 256).await["timings_ms"]["start"], "cold");
    assert!(api.host.ready.lock().unwrap().is_empty());
    assert_layers_are_settled(&api).await;
}

#[tokio::test]
async fn a_sandbox_from_the_pool_is_paused_forked_and_deleted_like_any_other() {
    let api = Api::pooled(1).await;
    create(&api, 256).await;
    wait_for_ready(&api, 1).await;
    let sandbox = create(&api, 256).await;
    assert_eq!(sandbox["timings_ms"]["start"], "pool");
    let id = sandbox["id"].as_str().unwrap();
    ok(&api, &path(id, "/fork"), r#"{"count": 2}"#).await;
    ok(&api, &path(id, "/pause"), "").await;
    assert_layers_are_settled(&api).await;
    ok(&api, &path(id, "/resume"), "").await;
    let (status, _) = api.call("DELETE", &path(id, ""), "").await;
    assert_eq!(status, StatusCode::NO_CONTENT);
    assert_layers_are_settled(&api).await;
}
