//! Records and host that disagree, each in its own way, and are made to agree.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on may panic")]

mod support;

use std::sync::atomic::Ordering;

use api::domain::{Desired, Divergence, Layers, SandboxId, Status, Store};
use axum::http::StatusCode;
use support::Api;

async fn api() -> Api {
    Api::new(1 << 20, 1 << 20).await
}

/// How many were healed, of those kinds of which some were.
fn healed(api: &Api) -> Vec<(Divergence, u64)> {
    let all = api.manager.divergences().into_iter();
    all.filter(|(_, count)| *count > 0).collect()
}

/// Compares records and host twice: what is so once only is left alone.
async fn reconcile(api: &Api) {
    api.manager.reconcile().await;
    assert_eq!(healed(api), [], "what is found once is marked only");
    api.manager.reconcile().await;
}

/// Writes this down without doing anything.
async fn put(api: &Api, id: &SandboxId, status: Status) {
    let mut sandbox = api.store.get(id).await.unwrap().unwrap();
    sandbox.status = status;
    api.store.update(&sandbox).await.unwrap();
}

async fn status(api: &Api, id: &SandboxId) -> Status {
    api.store.get(id).await.unwrap().unwrap().status
}

async fn create(api: &Api) -> SandboxId {
    api.create().await.parse().unwrap()
}

#[tokio::test]
async fn where_nothing_is_wrong_nothing_is_done() {
    let api = Api::pooled(2).await;
    let (one, other) = (create(&api).await, create(&api).await);
    api.manager.pause(other.as_str()).await.unwrap();
    while api.host.ready.lock().unwrap().len() < 2 {
        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
    }
    for _ in 0..4 {
        api.manager.reconcile().await;
    }
    assert_eq!(healed(&api), []);
    assert_eq!(
        api.host.ready.lock().unwrap().len(),
        2,
        "the pool is nobody's"
    );
    assert_eq!(status(&api, &one).await, Status::Running);
    assert_eq!(status(&api, &other).await, Status::Paused);
}

#[tokio::test]
async fn one_that_runs_without_a_machine_is_in_error() {
    let api = api().await;
    let (id, other) = (create(&api).await, create(&api).await);
    api.host.sandboxes.lock().unwrap().retain(|it| *it != id);
    reconcile(&api).await;
    assert_eq!(healed(&api), [(Divergence::NoProcess, 1)]);
    assert_eq!(status(&api, &id).await, Status::Error);
    assert_eq!(status(&api, &other).await, Status::Running);
}

#[tokio::test]
async fn a_machine_or_files_without_a_record_go() {
    let api = api().await;
    let id = create(&api).await;
    let (machine, files) = (SandboxId::random(), SandboxId::random());
    api.host.sandboxes.lock().unwrap().push(machine);
    api.host.left.lock().unwrap().insert(files);
    reconcile(&api).await;
    assert_eq!(healed(&api), [(Divergence::NoRecord, 2)]);
    assert_eq!(*api.host.sandboxes.lock().unwrap(), [id]);
    assert!(api.host.left.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_machine_of_one_that_is_paused_goes_and_it_can_be_resumed() {
    let api = api().await;
    let id = create(&api).await;
    api.manager.pause(id.as_str()).await.unwrap();
    api.host.sandboxes.lock().unwrap().push(id.clone());
    reconcile(&api).await;
    assert_eq!(healed(&api), [(Divergence::StillThere, 1)]);
    assert!(api.host.sandboxes.lock().unwrap().is_empty());
    let resumed = api.manager.resume(id.as_str()).await.unwrap();
    assert_eq!(resumed.status, Status::Running);
}

#[tokio::test]
async fn what_nobody_is_at_is_as_before_or_as_after() {
    for (was, runs, expected) in [
        (Status::Pending, true, Status::Error),
        (Status::Pending, false, Status::Error),
        (Status::Pausing, true, Status::Running),
        (Status::Pausing, false, Status::Error),
        (Status::Resuming, true, Status::Paused),
        (Status::Resuming, false, Status::Paused),
        (Status::Stopping, true, Status::Stopped),
    ] {
        let api = api().await;
        let id = create(&api).await;
        put(&api, &id, was).await;
        if !runs {
            api.host.sandboxes.lock().unwrap().clear();
        }
        reconcile(&api).await;
        assert_eq!(healed(&api), [(Divergence::HalfDone, 1)], "{was}");
        assert_eq!(status(&api, &id).await, expected, "{was}");
        let is_there = api.host.sandboxes.lock().unwrap().contains(&id);
        assert_eq!(is_there, expected == Status::Running, "{was}");
    }
}

#[tokio::test]
async fn what_somebody_is_at_is_left_alone() {
    let api = api().await;
    let id = create(&api).await;
    *api.host.save_takes.lock().unwrap() = std::time::Duration::from_millis(500);
    let pausing = {
        let (manager, id) = (api.manager.clone(), id.clone());
        tokio::spawn(async move { manager.pause(id.as_str()).await })
    };
    while status(&api, &id).await != Status::Pausing {
        tokio::task::yield_now().await;
    }
    for _ in 0..4 {
        api.manager.reconcile().await;
    }
    assert_eq!(healed(&api), []);
    assert_eq!(pausing.await.unwrap().unwrap().status, Status::Paused);
}

#[tokio::test]
async fn a_delete_is_finished() {
    let api = api().await;
    let id = create(&api).await;
    let mut sandbox = api.store.get(&id).await.unwrap().unwrap();
    sandbox.desired = Desired::Stopped;
    api.store.update(&sandbox).await.unwrap();
    reconcile(&api).await;
    assert_eq!(healed(&api), [(Divergence::HalfDeleted, 1)]);
    assert_eq!(status(&api, &id).await, Status::Stopped);
    assert!(api.host.sandboxes.lock().unwrap().is_empty());
}

#[tokio::test]
async fn one_whose_layers_are_gone_is_in_error() {
    let api = api().await;
    let (id, other) = (create(&api).await, create(&api).await);
    api.manager.pause(other.as_str()).await.unwrap();
    let kept = api.host.layers.lock().unwrap().clone();
    api.manager.pause(id.as_str()).await.unwrap();
    *api.host.layers.lock().unwrap() = kept;
    reconcile(&api).await;
    assert_eq!(healed(&api), [(Divergence::NoLayers, 1)]);
    assert_eq!(status(&api, &id).await, Status::Error);
    assert_eq!(status(&api, &other).await, Status::Paused);
    let layers = api.store.get(&id).await.unwrap().unwrap().layers;
    assert_eq!(layers, Layers::default());
}

#[tokio::test]
async fn one_that_is_cut_off_is_connected_as_soon_as_it_is_seen() {
    let api = api().await;
    let (id, gone) = (create(&api).await, create(&api).await);
    api.host.cut_off.lock().unwrap().push(id.clone());
    api.manager.reconcile().await;
    assert_eq!(healed(&api), [(Divergence::CutOff, 1)]);
    assert_eq!(status(&api, &id).await, Status::Running);
    // What cannot be mended keeps nothing else from being healed.
    api.host.has_no_bridge.store(true, Ordering::Relaxed);
    api.host.sandboxes.lock().unwrap().retain(|it| *it != gone);
    api.manager.reconcile().await;
    api.manager.reconcile().await;
    let expected = [(Divergence::NoProcess, 1), (Divergence::CutOff, 1)];
    assert_eq!(healed(&api), expected);
}

#[tokio::test]
async fn what_a_daemon_finds_at_its_start_is_counted_too() {
    let api = api().await;
    let (gone, half) = (create(&api).await, create(&api).await);
    api.host.sandboxes.lock().unwrap().retain(|it| *it != gone);
    put(&api, &half, Status::Pending).await;
    let api = api.restart().await;
    let expected = [(Divergence::NoProcess, 1), (Divergence::HalfDone, 1)];
    assert_eq!(healed(&api), expected);
    let (status, _) = api.call("GET", "/v1/sandboxes", "").await;
    assert_eq!(status, StatusCode::OK);
}

#[tokio::test]
async fn an_idle_timeout_that_nobody_waits_for_is_kept() {
    let api = api().await;
    let id = create(&api).await;
    // It runs, and whoever wrote that down has told nobody.
    api.manager.pause(id.as_str()).await.unwrap();
    api.host.sandboxes.lock().unwrap().push(id.clone());
    let mut sandbox = api.store.get(&id).await.unwrap().unwrap();
    sandbox.status = Status::Running;
    sandbox.last_active_at = Some(jiff::Timestamp::UNIX_EPOCH);
    api.store.update(&sandbox).await.unwrap();
    reconcile(&api).await;
    assert_eq!(healed(&api), [(Divergence::Unwatched, 1)]);
    while status(&api, &id).await != Status::Paused {
        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
    }
}
