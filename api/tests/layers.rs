//! Layers of sandboxes, over the API on a host that runs nothing: long chains are merged, and whatever
//! happens in whatever order, who holds which layer is right.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on may panic")]

mod support;

use std::sync::atomic::Ordering;

use api::domain::{End, LayerId, Status, Store};
use proptest::prelude::*;
use serde_json::json;
use support::saved::{assert_layers_are_settled, crash, ok, path, status};
use support::{Api, Fault, MergeFault};

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
