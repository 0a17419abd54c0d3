//! Sandboxes whose disk is kept: made, started, stopped and rolled back, on a host that runs nothing.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on may panic"
)]

mod support;

use std::sync::Arc;
use std::time::Duration;

use api::domain::{
    Change, CreateError, End, News, Page, PowerError, Sandbox, SnapshotSpec, SortBy, Status,
    StopSpec,
};
use support::kept::{STOP, is_tidy, spec};
use support::{Api, Fault};

async fn disk_of(api: &Api, name: &str) -> usize {
    api.manager.get(name).await.unwrap().layers.disk.len()
}

fn status_of(result: Result<Sandbox, PowerError>) -> Status {
    match result {
        Err(PowerError::WrongState { standing, .. }) => standing.status,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_machine_keeps_its_disk_over_stops_and_starts() {
    let api = Api::new(1 << 20, 1 << 20).await;
    let (manager, host) = (&api.manager, &api.host);
    let made = manager.create_off(spec("box")).await.unwrap();
    assert_eq!((made.status, made.started_at), (Status::Off, None));
    assert!(host.starts.lock().unwrap().is_empty());
    assert_eq!(status_of(manager.power_off("box", STOP).await), Status::Off);

    let on = manager.power_on("box").await.unwrap();
    assert_eq!((on.status, &on.id), (Status::Running, &made.id));
    assert_eq!(status_of(manager.power_on("box").await), Status::Running);
    let off = manager.power_off(made.id.as_str(), STOP).await.unwrap();
    assert_eq!((off.status, off.layers.disk.len()), (Status::Off, 1));
    assert!(off.stopped_at.is_some());
    is_tidy(&api).await;

    manager.power_on("box").await.unwrap();
    let started_from = host.starts.lock().unwrap().last().unwrap().clone();
    assert_eq!(started_from.layers, off.layers);
    let restarted = manager.restart("box", STOP).await.unwrap();
    assert_eq!(restarted.status, Status::Running);
    let force = StopSpec {
        force: true,
        ..STOP
    };
    manager.power_off("box", force).await.unwrap();
    let times: Vec<_> = host
        .power_offs
        .lock()
        .unwrap()
        .iter()
        .map(|off| off.timeout_ms)
        .collect();
    assert_eq!(times, [5000, 5000, 0]);
    assert_eq!(disk_of(&api, "box").await, 3);
    is_tidy(&api).await;

    manager.destroy("box").await.unwrap();
    assert!(host.layers.lock().unwrap().is_empty());
    let gone = manager.get(made.id.as_str()).await.unwrap();
    assert_eq!(gone.status, Status::Stopped);
    assert!(manager.get("box").await.is_err(), "its name is free");
    manager.create_off(spec("box")).await.unwrap();
}

#[tokio::test]
async fn names_are_unique_and_plain() {
    let api = Api::new(1 << 20, 1 << 20).await;
    api.manager.create(spec("one")).await.unwrap();
    let taken = api.manager.create_off(spec("one")).await;
    assert!(matches!(taken, Err(CreateError::NameTaken(name)) if name == "one"));
    let long = "x".repeat(65);
    for bad in ["", "a b", "../x", "a\r\nb", "sb-0a1b2c3d", &long, "ä"] {
        let refused = api.manager.create_off(spec(bad)).await;
        assert!(matches!(refused, Err(CreateError::Invalid(_))), "{bad:?}");
    }
    assert_eq!(api.manager.list().await.unwrap().len(), 1);
}

#[tokio::test]
async fn what_ends_by_itself_is_off_with_its_disk() {
    let api = Api::new(1 << 20, 1 << 20).await;
    let made = api.manager.create(spec("box")).await.unwrap();
    let reason = "the guest's kernel panicked".to_owned();
    let failed = End::Failed {
        reason: reason.clone(),
    };
    api.host.end(made.id.as_str(), failed);
    let off = loop {
        let sandbox = api.manager.get("box").await.unwrap();
        if sandbox.status != Status::Running {
            break sandbox;
        }
        tokio::task::yield_now().await;
    };
    assert_eq!((off.status, off.status_reason), (Status::Off, Some(reason)));
    assert_eq!(off.layers.disk.len(), 1);
    is_tidy(&api).await;
    let on = api.manager.power_on("box").await.unwrap();
    assert_eq!((on.status, on.status_reason), (Status::Running, None));

    // One that another dialect has made is kept from its first stop on.
    let id = api.create().await;
    let off = api.manager.power_off(&id, STOP).await.unwrap();
    assert_eq!((off.status, off.layers.disk.len()), (Status::Off, 1));
    let (_, listed) = api.call("GET", "/v1/sandboxes", "").await;
    let listed = listed.as_array().unwrap();
    let of_it = listed.iter().find(|sandbox| sandbox["id"] == id.as_str());
    assert_eq!(of_it.unwrap()["status"], "stopped");
    assert_eq!(listed.len(), 2);
}

#[tokio::test]
async fn a_start_that_fails_leaves_it_off_as_before() {
    let api = Api::new(1 << 20, 1 << 20).await;
    let mut broken = spec("box");
    broken.template = "broken".into();
    api.manager.create_off(broken).await.unwrap();
    let refused = api.manager.power_on("box").await;
    assert!(matches!(refused, Err(PowerError::NotStarted(_))));
    let off = api.manager.get("box").await.unwrap();
    assert_eq!((off.status, off.stopped_at), (Status::Off, None));
    assert_eq!(off.status_reason.as_deref(), Some("it is broken"));
}

#[tokio::test]
async fn a_crash_of_the_daemon_leaves_machines_off_with_their_disks() {
    for (fault, disks) in [
        (None, 1),
        (Some(Fault::CrashBeforeStart), 0),
        (Some(Fault::CrashAfterStart), 0),
        (Some(Fault::CrashBeforeSave), 1),
        (Some(Fault::CrashAfterSave), 1),
    ] {
        let api = Api::new(1 << 20, 1 << 20).await;
        api.manager.create_off(spec("box")).await.unwrap();
        let manager = api.manager.clone();
        let is_start = matches!(
            fault,
            Some(Fault::CrashBeforeStart | Fault::CrashAfterStart)
        );
        if is_start {
            *api.host.fault.lock().unwrap() = fault;
            tokio::spawn(async move { manager.power_on("box").await });
        } else {
            manager.power_on("box").await.unwrap();
            *api.host.fault.lock().unwrap() = fault;
            if fault.is_some() {
                tokio::spawn(async move { manager.power_off("box", STOP).await });
            }
        }
        while fault.is_some() && api.host.fault.lock().unwrap().is_some() {
            tokio::task::yield_now().await;
        }
        let api = api.restart().await;
        if fault.is_none() {
            // It has outlived the daemon.
            let runs = api.manager.get("box").await.unwrap();
            assert_eq!(runs.status, Status::Running);
            is_tidy(&api).await;
            api.manager.power_off("box", STOP).await.unwrap();
        }
        let off = api.manager.get("box").await.unwrap();
        assert_eq!(off.status, Status::Off, "{fault:?}");
        assert_eq!(off.layers.disk.len(), disks, "{fault:?}");
        is_tidy(&api).await;
        assert_eq!(
            api.manager.power_on("box").await.unwrap().status,
            Status::Running
        );
    }
}

#[tokio::test]
async fn a_machine_is_rolled_back_in_place() {
    let api = Api::new(1 << 20, 1 << 20).await;
    let manager = &api.manager;
    let made = manager.create(spec("box")).await.unwrap();
    let named = |name: &str, include_memory| SnapshotSpec {
        name: Some(name.into()),
        description: None,
        include_memory,
        is_own: false,
        overwrite: false,
    };
    let whole = manager.snapshot("box", named("whole", true)).await.unwrap();
    let disk = manager.snapshot("box", named("disk", false)).await.unwrap();
    assert_eq!(whole.status, Status::Running);
    manager.power_off("box", STOP).await.unwrap();
    let resting = manager.snapshot("box", named("off", true)).await.unwrap();
    assert_eq!(resting.status, Status::Off);
    is_tidy(&api).await;

    // Off, and its disk alone: off.
    let off = manager.roll_back("box", "disk").await.unwrap();
    assert_eq!((off.status, &off.layers), (Status::Off, &disk.layers));
    // With memory it runs, from that.
    let on = manager.roll_back("box", whole.id.as_str()).await.unwrap();
    assert_eq!((on.status, &on.id), (Status::Running, &made.id));
    assert_eq!(on.layers, whole.layers);
    // It ran, and boots.
    let on = manager.roll_back("box", "disk").await.unwrap();
    assert_eq!((on.status, &on.layers), (Status::Running, &disk.layers));
    is_tidy(&api).await;
    // What it writes now is kept too.
    let off = manager.power_off("box", STOP).await.unwrap();
    assert_eq!(off.layers.disk.len(), disk.layers.disk.len() + 1);
    for name in ["disk", "whole", "off"] {
        manager.delete_snapshot(name).await.unwrap();
    }
    is_tidy(&api).await;

    let other = manager.create_off(spec("other")).await.unwrap();
    let refused = manager.roll_back(other.id.as_str(), "whole").await;
    assert!(matches!(refused, Err(PowerError::NoSnapshot)));
}

#[tokio::test]
async fn lists_have_pages() {
    let api = Api::new(1 << 20, 1 << 20).await;
    for name in ["b", "c", "a"] {
        api.manager.create_off(spec(name)).await.unwrap();
    }
    api.manager.power_on("c").await.unwrap();
    let gone = api.manager.create_off(spec("gone")).await.unwrap();
    api.manager.destroy(gone.id.as_str()).await.unwrap();
    let list = async |page: Page| {
        let (sandboxes, total) = api.manager.page(&page).await.unwrap();
        let names = sandboxes.into_iter().map(|sandbox| sandbox.name.unwrap());
        (names.collect::<Vec<_>>().join(" "), total)
    };
    let all = Page {
        owner: None,
        statuses: None,
        was_started: None,
        sort: SortBy::Name,
        is_descending: false,
        limit: 50,
        offset: 0,
    };
    assert_eq!(list(all.clone()).await, ("a b c".into(), 3));
    let newest = Page {
        sort: SortBy::CreatedAt,
        is_descending: true,
        limit: 2,
        ..all.clone()
    };
    assert_eq!(list(newest.clone()).await, ("a c".into(), 3));
    assert_eq!(
        list(Page {
            offset: 2,
            ..newest
        })
        .await,
        ("b".into(), 3)
    );
    let off = Page {
        statuses: Some(vec![Status::Off, Status::Pending]),
        was_started: Some(false),
        ..all.clone()
    };
    assert_eq!(list(off.clone()).await, ("a b".into(), 2));
    api.manager.power_off("c", STOP).await.unwrap();
    assert_eq!(list(off.clone()).await, ("a b".into(), 2));
    let was_on = Page {
        was_started: Some(true),
        ..off
    };
    assert_eq!(list(was_on).await, ("c".into(), 1));
    let none = Page {
        statuses: Some(Vec::new()),
        ..all
    };
    assert_eq!(list(none).await, (String::new(), 0));
}

#[tokio::test]
async fn a_machine_that_is_kept_is_paused_and_goes_on() {
    let api = Api::new(1 << 20, 1 << 20).await;
    let manager = &api.manager;
    manager.create_off(spec("box")).await.unwrap();
    manager.power_on("box").await.unwrap();
    for _ in 0..2 {
        let paused = manager.pause("box").await.unwrap();
        assert_eq!((paused.status, paused.kept), (Status::Paused, None));
        *api.host.fault.lock().unwrap() = Some(Fault::NotRestored);
        assert!(manager.resume("box").await.is_err());
        assert_eq!(manager.get("box").await.unwrap().status, Status::Paused);
        let resumed = manager.resume("box").await.unwrap();
        assert_eq!(resumed.status, Status::Running);
        is_tidy(&api).await;
    }
    let off = manager.power_off("box", STOP).await.unwrap();
    assert_eq!((off.status, off.layers.memory.len()), (Status::Off, 0));
    is_tidy(&api).await;
    manager.power_on("box").await.unwrap();
}

#[tokio::test]
async fn what_is_written_after_a_snapshot_whose_disk_was_not_kept_is_kept_by_a_stop() {
    for include_memory in [true, false] {
        let api = Api::new(1 << 20, 1 << 20).await;
        let (manager, host) = (&api.manager, &api.host);
        manager.create_off(spec("box")).await.unwrap();
        manager.power_on("box").await.unwrap();
        let snapshot = SnapshotSpec {
            include_memory,
            ..SnapshotSpec::default()
        };
        *host.fault.lock().unwrap() = Some(Fault::NotKept);
        let failed = manager.snapshot("box", snapshot).await;
        assert!(failed.is_err(), "{failed:?}");
        let on = manager.get("box").await.unwrap();
        assert_eq!(on.status, Status::Running, "it goes on");

        // Nor is it off before it is.
        *host.fault.lock().unwrap() = Some(Fault::NotKept);
        let refused = manager.power_off("box", STOP).await;
        assert!(
            matches!(refused, Err(PowerError::Host { .. })),
            "{refused:?}"
        );
        let on = manager.get("box").await.unwrap();
        assert_eq!(on.status, Status::Running);
        let off = manager.power_off("box", STOP).await.unwrap();
        let (own, below) = off.layers.disk.split_last().unwrap();
        assert_eq!(below, on.layers.disk);
        assert!(host.layers.lock().unwrap().contains(own));
        is_tidy(&api).await;
    }
}

#[tokio::test]
async fn a_stop_with_force_does_not_wait_for_the_guest_that_another_stop_waits_for() {
    let slow = StopSpec {
        timeout: Duration::from_secs(3600),
        ..STOP
    };
    let forced = StopSpec {
        force: true,
        ..slow
    };
    for (is_restart, then_restart) in [(false, false), (false, true), (true, false)] {
        let api = Api::new(1 << 20, 1 << 20).await;
        let host = Arc::clone(&api.host);
        let manager = api.manager.clone();
        manager.create_off(spec("box")).await.unwrap();
        manager.power_on("box").await.unwrap();
        *host.fault.lock().unwrap() = Some(Fault::NotShutDown);
        let first = manager.clone();
        let first = tokio::spawn(async move {
            match is_restart {
                true => first.restart("box", slow).await,
                false => first.power_off("box", slow).await,
            }
        });
        while host.fault.lock().unwrap().is_some() {
            tokio::task::yield_now().await;
        }
        let stopping = manager.get("box").await.unwrap();
        assert_eq!(stopping.status, Status::Stopping);
        assert!(!first.is_finished());
        let last = match then_restart {
            true => manager.restart("box", forced).await,
            false => manager.power_off("box", forced).await,
        };
        let is_on = then_restart && !is_restart;
        let first = first.await.unwrap().unwrap();
        match is_restart {
            // It has started again, and was stopped once more.
            true => assert_eq!(first.status, Status::Running),
            false => assert_eq!(first.status, Status::Off),
        }
        let last = last.unwrap();
        let now = manager.get("box").await.unwrap();
        let expected = if is_on { Status::Running } else { Status::Off };
        assert_eq!((last.status, now.status), (expected, expected));
        is_tidy(&api).await;
        // The next one is as patient as it is asked to be.
        if !is_on {
            manager.power_on("box").await.unwrap();
        }
        *host.fault.lock().unwrap() = Some(Fault::NotShutDown);
        let again = manager.clone();
        let again = tokio::spawn(async move { again.power_off("box", slow).await });
        while host.fault.lock().unwrap().is_some() {
            tokio::task::yield_now().await;
        }
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        assert!(!again.is_finished());
        manager.power_off("box", forced).await.unwrap();
        again.await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn an_end_that_is_told_when_it_is_off_takes_no_disk() {
    let api = Api::new(1 << 20, 1 << 20).await;
    let (manager, host) = (&api.manager, &api.host);
    let made = manager.create(spec("box")).await.unwrap();
    // It has ended; that is told when somebody has stopped it already.
    host.sandboxes.lock().unwrap().clear();
    let off = manager.power_off("box", STOP).await.unwrap();
    assert_eq!((off.status, off.layers.disk.len()), (Status::Off, 1));
    let reason = "the guest's kernel panicked".to_owned();
    host.end(made.id.as_str(), End::Failed { reason });
    // What is told of another comes after it.
    let other = manager.create(spec("other")).await.unwrap();
    let reason = "it was powered off".to_owned();
    host.end(other.id.as_str(), End::Orderly { reason });
    while manager.get("other").await.unwrap().status != Status::Off {
        tokio::task::yield_now().await;
    }
    let still = manager.get("box").await.unwrap();
    assert_eq!((still.status, &still.layers), (Status::Off, &off.layers));
    is_tidy(&api).await;
    manager.power_on("box").await.unwrap();
}

#[tokio::test]
async fn what_is_asked_for_goes_on_when_its_caller_has_gone_though_another_had_the_turn() {
    let api = Api::new(1 << 20, 1 << 20).await;
    let (manager, host) = (api.manager.clone(), Arc::clone(&api.host));
    manager.create(spec("box")).await.unwrap();
    *host.fault.lock().unwrap() = Some(Fault::NotShutDown);
    let slow = StopSpec {
        timeout: Duration::from_secs(3600),
        ..STOP
    };
    let patient = manager.clone();
    let patient = tokio::spawn(async move { patient.power_off("box", slow).await });
    while host.fault.lock().unwrap().is_some() {
        tokio::task::yield_now().await;
    }
    let forced = StopSpec {
        force: true,
        ..STOP
    };
    let mut events = manager.subscribe();
    let restart = manager.clone();
    let restart = tokio::spawn(async move { restart.restart("box", forced).await });
    // Its urging is the last thing that its caller waits for; it hangs up then.
    while !patient.is_finished() {
        tokio::task::yield_now().await;
    }
    restart.abort();
    let mut is_on = false;
    while !is_on {
        if let News::Event(event) = events.next().await.unwrap()
            && let Change::Status { to, .. } = event.change
        {
            is_on = to.status == Status::Running;
        }
    }
    assert_eq!(manager.get("box").await.unwrap().status, Status::Running);
}
