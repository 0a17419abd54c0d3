//! The first start of a machine that was made without being started: from the warm snapshot of its model.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on may panic"
)]

mod support;

use std::time::Duration;

use api::domain::{CreateSpec, PowerError, ResourceChange, Sandbox, Start, Status, Store};
use support::kept::{STOP, is_tidy, spec};
use support::{Api, Fault};

fn start_of(sandbox: &Sandbox) -> Start {
    sandbox.timings.unwrap().start
}

async fn warm_count(api: &Api) -> usize {
    api.store.list_warm().await.unwrap().len()
}

/// One that has booted a machine and made the warm snapshot of its model.
async fn warm_api() -> Api {
    let api = Api::warm(1 << 20).await;
    api.manager.create_off(spec("first")).await.unwrap();
    let first = api.manager.power_on("first").await.unwrap();
    assert_eq!(start_of(&first), Start::Cold);
    while warm_count(&api).await != 1 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    api
}

#[tokio::test]
async fn it_is_warm_and_the_machine_can_change_and_keeps_its_own_disk() {
    let api = warm_api().await;
    let manager = &api.manager;
    let warm = api.store.list_warm().await.unwrap()[0].0.clone();
    let made = manager.create_off(spec("box")).await.unwrap();
    let on = manager.power_on("box").await.unwrap();
    assert_eq!((start_of(&on), &on.id), (Start::Warm, &made.id));
    assert_eq!(on.layers, warm.layers);
    let started = api.host.starts.lock().unwrap().last().unwrap().clone();
    assert_eq!(started.resources.booted, warm.model.booted);
    let more = ResourceChange {
        vcpus: Some(2),
        ..ResourceChange::default()
    };
    let grown = manager.set_resources("box", more).await.unwrap();
    assert_eq!(grown.spec.vcpus, 2);

    // From then on its disk is its own, and it boots from that.
    let off = manager.power_off("box", STOP).await.unwrap();
    assert!(off.layers.memory.is_empty());
    assert_eq!(off.layers.disk.len(), warm.layers.disk.len() + 1);
    let again = manager.power_on("box").await.unwrap();
    assert_eq!(start_of(&again), Start::Cold);
    is_tidy(&api).await;

    // A sandbox whose machine cannot change is of another model.
    let unnamed = CreateSpec {
        name: None,
        is_kept: false,
        ..spec("")
    };
    let unnamed = manager.create(unnamed).await.unwrap();
    assert_eq!(start_of(&unnamed), Start::Cold);
    let api = api.restart().await;
    api.manager.create_off(spec("later")).await.unwrap();
    let later = api.manager.power_on("later").await.unwrap();
    assert_eq!(start_of(&later), Start::Warm);
}

#[tokio::test]
async fn what_is_like_no_warm_machine_boots() {
    let api = warm_api().await;
    let disk = CreateSpec {
        disk_mb: Some(5000),
        ..spec("disk")
    };
    api.manager.create_off(disk).await.unwrap();
    api.manager.create_off(spec("limited")).await.unwrap();
    let limit = ResourceChange {
        memory_limit_percent: Some(50),
        ..ResourceChange::default()
    };
    api.manager.set_resources("limited", limit).await.unwrap();
    for name in ["disk", "limited"] {
        let on = api.manager.power_on(name).await.unwrap();
        assert_eq!(start_of(&on), Start::Cold, "{name}");
    }
    assert_eq!(warm_count(&api).await, 1);
}

#[tokio::test]
async fn a_warm_snapshot_that_does_not_start_is_dropped_and_the_machine_boots() {
    let api = warm_api().await;
    api.manager.create_off(spec("box")).await.unwrap();
    *api.host.fault.lock().unwrap() = Some(Fault::NotRestored);
    let on = api.manager.power_on("box").await.unwrap();
    assert_eq!(
        (on.status, start_of(&on)),
        (Status::Running, Start::ColdFallback)
    );
    assert!(on.layers.is_empty());
    assert_eq!(warm_count(&api).await, 0);
    let off = api.manager.power_off("box", STOP).await.unwrap();
    assert_eq!(off.layers.disk.len(), 1);
    is_tidy(&api).await;
}

#[tokio::test]
async fn an_end_of_the_daemon_in_the_midst_leaves_it_off_as_it_was() {
    for fault in [Fault::CrashBeforeStart, Fault::CrashAfterStart] {
        let api = warm_api().await;
        let made = api.manager.create_off(spec("box")).await.unwrap();
        *api.host.fault.lock().unwrap() = Some(fault);
        let manager = api.manager.clone();
        tokio::spawn(async move { manager.power_on("box").await });
        while api.host.fault.lock().unwrap().is_some() {
            tokio::task::yield_now().await;
        }
        let api = api.restart().await;
        let off = api.manager.get("box").await.unwrap();
        assert_eq!((off.status, &off.layers), (Status::Off, &made.layers));
        is_tidy(&api).await;
        // So it is still free to become another.
        let other = ResourceChange {
            memory_mb: Some(1024),
            ..ResourceChange::default()
        };
        api.manager.set_resources("box", other).await.unwrap();
        let on = api.manager.power_on("box").await.unwrap();
        assert_eq!(on.status, Status::Running);
    }
}

#[tokio::test]
async fn one_whose_keeping_fails_is_off_as_it_was() {
    let api = warm_api().await;
    api.manager.create_off(spec("box")).await.unwrap();
    let before = api.manager.get("box").await.unwrap();
    *api.host.fault.lock().unwrap() = Some(Fault::NotKept);
    let refused = api.manager.power_on("box").await;
    assert!(
        matches!(refused, Err(PowerError::NotStarted(_))),
        "{refused:?}"
    );
    let off = api.manager.get("box").await.unwrap();
    assert_eq!((off.status, &off.layers), (Status::Off, &before.layers));
    is_tidy(&api).await;
}

#[tokio::test]
async fn one_that_is_started_at_once_and_has_no_disk_of_its_own_yet_comes_back_to_its_template() {
    for fault in [
        Fault::NotKept,
        Fault::CrashBeforeStart,
        Fault::CrashAfterStart,
    ] {
        let api = Api::warm(1 << 20).await;
        api.manager.create(spec("first")).await.unwrap();
        while warm_count(&api).await != 1 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        *api.host.fault.lock().unwrap() = Some(fault);
        let manager = api.manager.clone();
        let created = tokio::spawn(async move { manager.create(spec("box")).await });
        while api.host.fault.lock().unwrap().is_some() {
            tokio::task::yield_now().await;
        }
        let api = match fault {
            Fault::NotKept => {
                created.await.unwrap().unwrap_err();
                api
            }
            _ => api.restart().await,
        };
        let off = api.manager.get("box").await.unwrap();
        assert_eq!(off.status, Status::Off, "{fault:?}");
        assert!(off.layers.is_empty(), "{fault:?}");
        // So that what it has can be changed.
        let more = ResourceChange {
            vcpus: Some(2),
            ..ResourceChange::default()
        };
        api.manager.set_resources("box", more).await.unwrap();
        api.manager.power_on("box").await.unwrap();
        is_tidy(&api).await;
    }
}
