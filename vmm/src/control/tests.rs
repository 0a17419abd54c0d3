use std::path::Path;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};

use proptest::prelude::*;

use super::request::{Changes, Fault};
use super::testing::{Ending, FakeLauncher, Journal, config};
use super::*;
use crate::config::{DiskConfig, VsockConfig};

struct Bench {
    control: Control<FakeLauncher>,
    journal: Journal,
    endings: Receiver<Ending>,
    fails: Arc<Mutex<bool>>,
}

impl Bench {
    fn new(on_guest_end: OnGuestEnd) -> Self {
        let (launcher, endings) = FakeLauncher::new();
        let (journal, fails) = (launcher.journal.clone(), launcher.fails.clone());
        let events = EventStream::new(std::time::Instant::now(), None);
        let no_shutdown = on_guest_end == OnGuestEnd::Stay;
        Self {
            control: Control::new(launcher, events, no_shutdown).unwrap(),
            journal,
            endings,
            fails,
        }
    }

    fn act(&mut self, action: Action) -> Result<Answer, Refusal> {
        self.control.act(action)
    }

    /// Takes all messages, as `Control::run` does.
    fn take_messages(&mut self) -> Option<ExitReason> {
        while let Some(message) = self.control.inbox.next() {
            let end = self.control.take(message);
            if end.is_some() {
                return end;
            }
        }
        None
    }

    fn journal(&self) -> Vec<String> {
        mem::take(&mut *self.journal.lock().unwrap())
    }

    fn state(&self) -> &'static str {
        self.control.state.name()
    }
}

fn disk(id: Option<&str>) -> DiskConfig {
    let json = serde_json::json!({"id": id, "path": "/proc/self/exe", "readonly": true});
    serde_json::from_value(json).unwrap()
}

#[test]
fn a_machine_lives() {
    let mut bench = Bench::new(OnGuestEnd::RebootOrExit);
    bench.act(Action::Create(config())).unwrap();
    assert_eq!(bench.state(), "created");
    bench.act(Action::Boot).unwrap();
    bench.act(Action::Pause).unwrap();
    assert_eq!(bench.state(), "paused");
    let core = Action::CoreDump {
        path: "/core".into(),
    };
    bench.act(core).unwrap();
    bench.act(Action::Resume).unwrap();
    bench.act(Action::Nmi).unwrap();
    let Answer::Info(info) = bench.act(Action::Info).unwrap() else {
        panic!("no info");
    };
    assert_eq!((info.state, info.memory_actual_size), ("Running", 1 << 30));
    bench.act(Action::Reboot).unwrap();
    bench.act(Action::Shutdown).unwrap();
    bench.act(Action::Delete).unwrap();
    assert_eq!(bench.state(), "absent");
    let told = [
        "resume", "pause", "core", "resume", "nmi", "stop", "resume", "stop",
    ];
    assert_eq!(bench.journal(), told);
}

/// A snapshot in a directory, as far as the owner of the machine looks at it.
fn restore(directory: &Path) -> Action {
    Action::Restore(Box::new(Restore {
        snapshot: RestoreConfig {
            source: directory.to_owned(),
            bases: Vec::new(),
            prefault: snapshot::Prefault::Off,
            verify: false,
        },
        config: None,
        changes: Changes::default(),
        descriptors: Vec::new(),
        resume: false,
    }))
}

fn snapshot(directory: &Path) -> Action {
    Action::Snapshot {
        target: SnapshotTarget::Directory(directory.to_owned()),
        keep: 0,
    }
}

#[test]
fn a_machine_comes_back() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let mut bench = Bench::new(OnGuestEnd::RebootOrExit);
    let mut machine = config();
    machine.disks = vec![disk(None)];
    bench.act(Action::Create(machine)).unwrap();
    bench.act(Action::Boot).unwrap();
    assert!(matches!(
        bench.act(snapshot(path)),
        Err(Refusal::State { .. })
    ));
    bench.act(Action::Pause).unwrap();
    bench.act(snapshot(path)).unwrap();
    // The fake writes nothing, so that it came to nothing. The configuration is written first.
    assert_eq!(std::fs::read_dir(path).unwrap().count(), 0);
    assert_eq!(bench.state(), "paused");
    let exists = bench.act(restore(path)).unwrap_err();
    assert!(matches!(exists, Refusal::VmExists));
    bench.act(Action::Delete).unwrap();

    let missing = bench.act(restore(path)).unwrap_err();
    assert_eq!((missing.fault(), bench.state()), (Fault::Request, "absent"));
    let saved = serde_json::to_vec(&*config()).unwrap();
    std::fs::write(path.join("config.json"), saved).unwrap();
    *bench.fails.lock().unwrap() = true;
    bench.act(restore(path)).unwrap_err();
    assert_eq!(bench.state(), "absent", "it can be tried again");
    *bench.fails.lock().unwrap() = false;
    bench.journal();
    bench.act(restore(path)).unwrap();
    assert_eq!(bench.state(), "paused");
    bench.act(Action::Resume).unwrap();
    assert_eq!(bench.journal(), ["prefetch", "resume"]);
    bench.act(Action::Delete).unwrap();
    let mut at_once = restore(path);
    if let Action::Restore(restore) = &mut at_once {
        restore.resume = true;
    }
    bench.journal();
    bench.act(at_once).unwrap();
    assert_eq!(bench.journal(), ["prefetch", "resume"]);
    let working_set = || Action::SaveWorkingSet(WorkingSetTarget::Directory(path.to_owned()));
    bench.act(working_set()).unwrap();
    let twice = bench.act(working_set()).unwrap_err();
    assert!(matches!(twice, Refusal::SnapshotFile(_)), "{twice:?}");
    assert_eq!(bench.journal(), ["working set"]);
    std::fs::write(path.join("config.json"), b"{}").unwrap();
    bench.act(Action::Delete).unwrap();
    bench.act(restore(path)).unwrap();
}

#[test]
fn changes_take_the_place_of_what_was_saved_and_keep_its_id() {
    let mut saved = *config();
    saved.disks = vec![disk(Some("root")), disk(Some("data"))];
    let changes = Changes {
        disks: vec![disk(None), disk(Some("new"))],
        vsock: Some(VsockConfig {
            id: None,
            cid: 9,
            socket: "/t".into(),
        }),
        ..Changes::default()
    };
    changes.apply(&mut saved);
    let ids: Vec<_> = saved
        .disks
        .iter()
        .flat_map(|disk| disk.id.clone())
        .collect();
    assert_eq!(ids, ["root", "new"]);
    assert_eq!(saved.vsock.unwrap().cid, 9);
    assert!(saved.net.is_empty());
}

/// Every request in every state: it either works, or says what is wrong and changes nothing.
#[test]
fn misuse_is_refused_and_changes_nothing() {
    type Row = (&'static str, fn() -> Action, [bool; 4]);
    let core = || Action::CoreDump {
        path: "/core".into(),
    };
    // What works in the states absent, created, running and paused.
    let table: [Row; 11] = [
        (
            "create",
            || Action::Create(config()),
            [true, false, false, false],
        ),
        ("delete", || Action::Delete, [true, true, true, true]),
        ("boot", || Action::Boot, [false, true, false, false]),
        ("shutdown", || Action::Shutdown, [false, false, true, true]),
        ("reboot", || Action::Reboot, [false, false, true, true]),
        ("pause", || Action::Pause, [false, false, true, false]),
        ("resume", || Action::Resume, [false, false, false, true]),
        ("info", || Action::Info, [false, true, true, true]),
        ("counters", || Action::Counters, [false, false, true, true]),
        ("nmi", || Action::Nmi, [false, false, true, false]),
        ("core", core, [false, false, false, true]),
    ];
    for (name, action, works) in table {
        for (steps, works) in works.iter().enumerate() {
            let mut bench = Bench::new(OnGuestEnd::RebootOrExit);
            let way = [Action::Create(config()), Action::Boot, Action::Pause];
            for step in way.into_iter().take(steps) {
                bench.act(step).unwrap();
            }
            let (before, _) = (bench.state(), bench.journal());
            match bench.act(action()) {
                Ok(_) => assert!(works, "{name} works when {before}"),
                Err(refusal) => {
                    assert!(!works, "{name} when {before}: {refusal}");
                    assert_eq!(bench.state(), before, "{name}");
                    assert_eq!(bench.journal(), [""; 0], "{name} when {before}");
                    let fault = match (name, before) {
                        (_, "absent") => Fault::NotFound,
                        _ => Fault::Failed,
                    };
                    assert_eq!(refusal.fault(), fault, "{name} when {before}");
                }
            }
        }
    }
}

#[test]
fn a_guest_that_ends_ends_the_process_or_reboots() {
    use OnGuestEnd::{Exit, RebootOrExit, Stay};
    for (on_guest_end, reason, exits, state) in [
        (Exit, ExitReason::PowerOff, true, "created"),
        (Exit, ExitReason::Reboot, true, "created"),
        (RebootOrExit, ExitReason::PowerOff, true, "created"),
        (RebootOrExit, ExitReason::Panic, true, "created"),
        (RebootOrExit, ExitReason::Reboot, false, "running"),
        (Stay, ExitReason::PowerOff, false, "created"),
        (Stay, ExitReason::TripleFault, false, "created"),
        (Stay, ExitReason::Reboot, false, "running"),
    ] {
        let mut bench = Bench::new(on_guest_end);
        if on_guest_end == Exit {
            bench.control.create_and_boot(*config()).unwrap();
        } else {
            bench.act(Action::Create(config())).unwrap();
            bench.act(Action::Boot).unwrap();
        }
        bench.endings.recv().unwrap().end(reason.clone());
        let end = bench.take_messages();
        let told = format!("{on_guest_end:?}, {reason:?}");
        assert_eq!(end, exits.then_some(reason), "{told}");
        assert_eq!(bench.state(), state, "{told}");
    }
}

#[test]
fn the_end_of_a_machine_that_was_replaced_is_no_news() {
    let mut bench = Bench::new(OnGuestEnd::RebootOrExit);
    bench.control.create_and_boot(*config()).unwrap();
    let first = bench.endings.recv().unwrap();
    bench.act(Action::Reboot).unwrap();
    first.end(ExitReason::PowerOff);
    assert_eq!(bench.take_messages(), None);
    assert_eq!(bench.state(), "running");
}

#[test]
fn a_pause_that_meets_the_end_is_refused_and_the_end_is_told() {
    let mut bench = Bench::new(OnGuestEnd::RebootOrExit);
    bench.control.create_and_boot(*config()).unwrap();
    bench.endings.recv().unwrap().end(ExitReason::Panic);
    assert!(matches!(bench.act(Action::Pause), Err(Refusal::Guest(_))));
    assert_eq!(bench.take_messages(), Some(ExitReason::Panic));
}

#[test]
fn a_machine_that_cannot_be_built_leaves_the_configuration() {
    let mut bench = Bench::new(OnGuestEnd::RebootOrExit);
    bench.act(Action::Create(config())).unwrap();
    *bench.fails.lock().unwrap() = true;
    let refusal = bench.act(Action::Boot).unwrap_err();
    assert_eq!(refusal.fault(), Fault::Failed);
    assert_eq!(bench.state(), "created");
    *bench.fails.lock().unwrap() = false;
    bench.act(Action::Boot).unwrap();

    // A reboot that cannot be carried through leaves the machine as it is.
    *bench.fails.lock().unwrap() = true;
    bench.act(Action::Reboot).unwrap_err();
    assert_eq!(bench.state(), "running");

    // A guest's reboot that fails is the end, and says so.
    bench.endings.recv().unwrap().end(ExitReason::Reboot);
    assert!(matches!(bench.take_messages(), Some(ExitReason::Error(_))));
}

#[test]
fn devices_get_ids_and_are_found_by_them() {
    let mut bench = Bench::new(OnGuestEnd::RebootOrExit);
    let mut config = config();
    config.disks = vec![disk(None), disk(Some("_disk2")), disk(None)];
    config.vsock = Some(VsockConfig {
        id: None,
        cid: 3,
        socket: "/s".into(),
    });
    bench.act(Action::Create(config)).unwrap();
    bench.act(Action::AddDisk(disk(None))).unwrap();
    let Answer::Info(info) = bench.act(Action::Info).unwrap() else {
        panic!("no info");
    };
    let ids: Vec<&str> = info
        .config
        .disks
        .iter()
        .flat_map(|disk| disk.id.as_deref())
        .collect();
    assert_eq!(ids, ["_disk0", "_disk2", "_disk1", "_disk4"]);
    assert_eq!(info.config.vsock.unwrap().id.as_deref(), Some("_vsock3"));

    let taken = bench
        .act(Action::AddDisk(disk(Some("_vsock3"))))
        .unwrap_err();
    assert_eq!(taken.fault(), Fault::Conflict);
    let reserved = bench.act(Action::AddDisk(disk(Some("__rng")))).unwrap_err();
    assert_eq!(reserved.fault(), Fault::Conflict);
    let remove = |id: &str| Action::RemoveDevice { id: id.to_owned() };
    bench.act(remove("_vsock3")).unwrap();
    assert_eq!(
        bench.act(remove("_vsock3")).unwrap_err().fault(),
        Fault::NotFound
    );

    bench.act(Action::Boot).unwrap();
    let late = bench.act(Action::AddDisk(disk(None))).unwrap_err();
    assert_eq!(late.fault(), Fault::Request);
}

#[test]
fn quitting_ends_the_machine_and_the_process() {
    let mut bench = Bench::new(OnGuestEnd::Stay);
    bench.control.create_and_boot(*config()).unwrap();
    let (sender, answers) = channel();
    let reply =
        Box::new(move |answer: Result<Answer, Refusal>| sender.send(answer.is_ok()).unwrap());
    bench.control.mailbox().ask(Action::Quit, reply);
    assert_eq!(bench.take_messages(), Some(ExitReason::Requested));
    assert!(answers.recv().unwrap());
    assert_eq!(bench.journal(), ["resume", "stop"]);
}

proptest! {
    /// Whatever is asked in whatever order, the machine is only told what fits its state, and
    /// there are never two: the fakes assert that.
    #[test]
    fn any_order_of_requests_is_safe(choices in prop::collection::vec(0u8..12, 0..100)) {
        let mut bench = Bench::new(OnGuestEnd::Stay);
        for choice in choices {
            let action = match choice {
                0 => Action::Create(config()),
                1 => Action::Delete,
                2 | 3 => Action::Boot,
                4 => Action::Shutdown,
                5 => Action::Reboot,
                6 => Action::Pause,
                7 => Action::Resume,
                8 => Action::Info,
                9 => Action::CoreDump { path: "/core".into() },
                10 => Action::Nmi,
                _ => {
                    // The guest of some machine, dead or alive, powers off.
                    if let Ok(ending) = bench.endings.try_recv() {
                        ending.end(ExitReason::PowerOff);
                    }
                    prop_assert_eq!(bench.take_messages(), None);
                    continue;
                }
            };
            let before = bench.state();
            if bench.act(action).is_err() {
                prop_assert_eq!(bench.state(), before);
            }
        }
    }
}

#[test]
fn the_state_is_described_whatever_it_is() {
    let mut bench = Bench::new(OnGuestEnd::Stay);
    let describe = |bench: &Bench| bench.control.describe();
    assert_eq!(describe(&bench), ["the virtual machine is absent"]);
    bench.act(Action::Create(config())).unwrap();
    assert_eq!(describe(&bench), ["the virtual machine is created"]);
    bench.act(Action::Boot).unwrap();
    let running = ["the virtual machine is running", "runs: true"];
    assert_eq!(describe(&bench), running);
    bench.act(Action::Pause).unwrap();
    let paused = ["the virtual machine is paused", "runs: false"];
    assert_eq!(describe(&bench), paused);
}
