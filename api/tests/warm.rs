//! Warm snapshots, and machines that are ready before anybody asks for them, over the API on a host that
//! runs nothing.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on may panic")]

mod support;

use std::collections::BTreeSet;
use std::time::Duration;

use api::domain::{SandboxId, Store};
use axum::http::StatusCode;
use serde_json::{Value, json};
use support::saved::{assert_layers_are_settled, ok, path};
use support::{Api, Fault};

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
