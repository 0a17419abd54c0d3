//! A VMM driven through its REST API alone, in the ways of the clients of Cloud Hypervisor.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use agent_protocol::ShutdownAction;
use e2e_tests::PATIENCE;
use e2e_tests::report;
use e2e_tests::setup::scratch;
use e2e_tests::vmm::{ApiSocket, Machine, Vmm};
use serde_json::{Value, json};

/// A VMM with a machine that has been created and not booted.
fn created(machine: Machine) -> Vmm {
    let config = machine.config();
    let vmm = machine.serve();
    vmm.api().put("vm.create", Some(&config));
    vmm
}

fn names_of_events(vmm: &Vmm) -> Vec<String> {
    vmm.all_events().into_iter().map(|(name, _)| name).collect()
}

#[test]
fn a_machine_is_created_booted_paused_resumed_and_powered_off() {
    let mut vmm = created(Machine::new());
    let api = vmm.api();
    assert_eq!(api.get("vmm.ping")["version"], "54.0.0");
    assert_eq!(api.get("vmm.ping")["pid"], vmm.process.pid());
    assert_eq!(api.state(), "Created");
    api.put("vm.boot", None);

    // The guest's kernel starts meanwhile, on the same processor.
    let mut slowest = Duration::ZERO;
    for _ in 0..20 {
        let start = Instant::now();
        api.get("vmm.ping");
        slowest = slowest.max(start.elapsed());
    }
    report(&format!("slowest of 20 pings during a boot: {slowest:?}"));
    vmm.ready();
    assert_eq!(vmm.agent().must("echo alive"), "alive");
    let info = api.get("vm.info");
    assert_eq!(info["state"], "Running");
    assert_eq!(info["memory_actual_size"], info["config"]["memory"]["size"]);
    for id in ["_disk0", "_vsock1", "__rng"] {
        assert_eq!(info["device_tree"][id]["id"], id, "{info}");
    }
    assert!(api.get("vm.counters").is_object());

    api.put("vm.pause", None);
    assert_eq!(api.state(), "Paused");
    // Nobody in the guest answers, and nothing comes out of its devices.
    let socket = vmm.directory().join("vsock.sock");
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.write_all(b"CONNECT 1024\n").unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(1)))
        .unwrap();
    let silence = stream.read(&mut [0; 64]).unwrap_err();
    assert_eq!(silence.kind(), ErrorKind::WouldBlock);
    let core = vmm.directory().join("core");
    let url = json!({"destination_url": format!("file://{}", core.display())});
    api.put("vm.coredump", Some(&url));
    assert_core_file(&core, info["memory_actual_size"].as_u64().unwrap());
    let (status, _) = api.call("PUT", "vm.coredump", Some(&url));
    assert_eq!(status, 500, "a core file was overwritten");

    api.put("vm.resume", None);
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut answer = [0; 2];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"OK");
    drop(stream);
    assert_eq!(vmm.agent().must("echo alive"), "alive");
    api.put("vm.nmi", None);
    assert!(vmm.agent().must("dmesg").contains("NMI received"));

    vmm.agent().shut_down(ShutdownAction::Poweroff);
    vmm.expect_end(0, "shutdown");
    assert_eq!(
        names_of_events(&vmm),
        ["booting", "booted", "paused", "resumed", "shutdown"]
    );
}

/// Checks that the file is an ELF core of that much memory which holds no pages of zeros.
fn assert_core_file(path: &Path, memory: u64) {
    let mut head = [0; 18];
    let mut file = std::fs::File::open(path).unwrap();
    file.read_exact(&mut head).unwrap();
    assert_eq!(&head[..4], b"\x7fELF");
    assert_eq!(head[16..18], [4, 0], "type of the file");
    let metadata = file.metadata().unwrap();
    assert!(metadata.len() >= memory, "{} bytes", metadata.len());
    let stored = metadata.blocks() * 512;
    assert!(stored < memory, "{stored} bytes on disk");
}

#[test]
fn reboots_build_the_machine_anew() {
    let mut vmm = created(Machine::new());
    let api = vmm.api();
    api.put("vm.boot", None);
    vmm.ready();
    vmm.agent().must("echo kept >/root/kept && sync");
    // The guest's, then the host's.
    vmm.agent().shut_down(ShutdownAction::Reboot);
    vmm.ready();
    assert_eq!(vmm.agent().must("cat /root/kept"), "kept");
    api.put("vm.reboot", None);
    vmm.ready();
    assert_eq!(api.state(), "Running");
    api.put("vm.shutdown", None);
    assert_eq!(api.state(), "Created");
    api.put("vm.boot", None);
    vmm.ready();
    api.put("vm.delete", None);
    assert_eq!(api.call("GET", "vm.info", None).0, 404);
    api.put("vmm.shutdown", None);
    assert_eq!(vmm.process.exit_code(), 0);
    let boot = ["booting", "booted"];
    let ends = ["reboot", "shutdown", "shutdown", "shutdown"];
    let mut expected: Vec<&str> = ends
        .iter()
        .flat_map(|end| boot.into_iter().chain([*end]))
        .collect();
    expected.push("deleted");
    assert_eq!(names_of_events(&vmm), expected);
}

#[test]
fn a_machine_of_the_command_line_is_served_too_and_ends_as_ever() {
    let machine = Machine::new();
    let socket = machine.directory().join("api.sock");
    let mut vmm = machine.api(ApiSocket::Path).boot();
    let api = vmm.api();
    assert_eq!(api.state(), "Running");
    let (status, why) = api.call("PUT", "vm.add-disk", Some(&json!({"path": "/dev/null"})));
    assert_eq!(status, 400, "{why}");
    vmm.agent().shut_down(ShutdownAction::Reboot);
    vmm.expect_end(10, "reboot");
    assert!(!socket.exists(), "the API's socket is left behind");
}

/// What the state of a virtual machine should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Absent,
    Created,
    Running,
    Paused,
}

/// The states in which a request works, and the state that it leads to.
fn expected(request: &str, state: State) -> Option<State> {
    use State::{Absent, Created, Paused, Running};
    match (request, state) {
        ("vm.create", Absent) => Some(Created),
        ("vm.delete", _) => Some(Absent),
        ("vm.boot", Created) => Some(Running),
        ("vm.shutdown", Running | Paused) => Some(Created),
        ("vm.reboot", Running | Paused) => Some(Running),
        ("vm.pause", Running) => Some(Paused),
        ("vm.resume", Paused) => Some(Running),
        ("vm.info", Created | Running | Paused) => Some(state),
        ("vm.counters", Running | Paused) => Some(state),
        ("vm.snapshot", Paused) => Some(Paused),
        ("vm.restore", Absent) => Some(Paused),
        _ => None,
    }
}

/// Requests in an order that does not depend on chance, with guests in whatever state their boot
/// has come to. `MVS_SOAK_OPERATIONS` sets how many; 100 by default.
#[test]
fn misuse_in_any_order_neither_hangs_nor_leaks() {
    let operations = std::env::var("MVS_SOAK_OPERATIONS").map_or(100, |count| {
        count.parse().expect("MVS_SOAK_OPERATIONS is a number")
    });
    let machine = Machine::new();
    let config = machine.config();
    let mut vmm = machine.serve();
    let api = vmm.api();
    // What the first machine makes for good, such as the runtime of the API's thread.
    for request in ["vm.create", "vm.boot", "vm.delete"] {
        api.put(request, (request == "vm.create").then_some(&config));
    }
    let before = resources(&vmm);

    // Not vm.nmi: a kernel that has no interrupt table yet ends in a triple fault.
    let requests = [
        "vm.create",
        "vm.boot",
        "vm.delete",
        "vm.shutdown",
        "vm.reboot",
        "vm.pause",
        "vm.resume",
        "vm.info",
        "vm.counters",
        "vm.resize",
        "vm.add-disk",
        "vm.snapshot",
        "vm.restore",
    ];
    // The last one, and one that is not to be made.
    let snapshots = scratch();
    let (kept, refused) = (
        snapshots.path().join("kept"),
        snapshots.path().join("refused"),
    );
    let url = |path: &Path| format!("file://{}", path.display());
    std::fs::create_dir(&refused).unwrap();
    let mut state = State::Absent;
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    let mut counted = 0;
    for _ in 0..operations {
        // xorshift64 (Marsaglia 2003).
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        // Every other request is one that works.
        let fitting =
            |request: &&str| random & (1 << 40) == 0 || expected(request, state).is_some();
        let possible = requests.into_iter().filter(fitting);
        let possible: Vec<&str> = possible
            .filter(|request| *request != "vm.restore" || kept.exists())
            .collect();
        let request = possible[(random % possible.len() as u64) as usize];
        let body = match request {
            "vm.create" => Some(config.clone()),
            "vm.resize" => Some(json!({"desired_balloon": 1})),
            "vm.add-disk" => Some(json!({"path": "/nowhere"})),
            "vm.snapshot" if state == State::Paused => {
                // A machine that comes from the one before does not need its name.
                let _ = std::fs::remove_dir_all(&kept);
                std::fs::create_dir(&kept).unwrap();
                Some(json!({"destination_url": url(&kept)}))
            }
            "vm.snapshot" => Some(json!({"destination_url": url(&refused)})),
            "vm.restore" => Some(json!({"source_url": url(&kept)})),
            _ => None,
        };
        let method = match request {
            "vm.info" | "vm.counters" => "GET",
            _ => "PUT",
        };
        let (status, answer) = api.call(method, request, body.as_ref());
        match expected(request, state) {
            Some(next) => {
                assert!(
                    matches!(status, 200 | 204),
                    "{request} when {state:?}: {answer}"
                );
                state = next;
                counted += 1;
            }
            None => {
                assert!(
                    matches!(status, 400 | 404 | 500),
                    "{request} when {state:?}: {status}"
                );
                assert!(
                    answer.as_array().is_some_and(|chain| chain.len() > 1),
                    "{answer}"
                );
            }
        }
        assert_eq!(api.get("vmm.ping")["version"], "54.0.0");
    }
    assert_eq!(std::fs::read_dir(&refused).unwrap().count(), 0);
    report(&format!(
        "{counted} of {operations} requests were to work, and did"
    ));

    api.put("vm.delete", None);
    assert_eq!(
        resources(&vmm),
        before,
        "descriptors, threads and guest memory"
    );
    // And it still does what it is for.
    api.put("vm.create", Some(&config));
    api.put("vm.boot", None);
    vmm.ready();
    api.put("vmm.shutdown", None);
    vmm.expect_end(0, "shutdown");
}

/// How many descriptors, threads and mappings as large as a guest the process has.
fn resources(vmm: &Vmm) -> Value {
    let _open = vmm.api().settle();
    let proc = format!("/proc/{}", vmm.process.pid());
    let count = |what: &str| std::fs::read_dir(format!("{proc}/{what}")).unwrap().count();
    let maps = std::fs::read_to_string(format!("{proc}/maps")).unwrap();
    let large = maps.lines().filter(|line| {
        let (start, end) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
        let [start, end] = [start, end].map(|text| u64::from_str_radix(text, 16).unwrap());
        end - start >= 128 << 20
    });
    json!({"fds": count("fd"), "threads": count("task"), "guests": large.count()})
}
