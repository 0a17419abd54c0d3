//! A real guest's VMM in its jail: what it is, what it sees, what it costs, and that it still
//! does its work.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use e2e_tests::agent::sh;
use e2e_tests::daemon::Daemon;
use e2e_tests::network::Tap;
use e2e_tests::pattern::{Pattern, assert_pattern};
use e2e_tests::process::innermost;
use e2e_tests::report;
use e2e_tests::until;
use e2e_tests::vmm::{ApiSocket, Machine};
use e2e_tests::vmm_api::VmmApi;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

/// The most memory of a VMM beyond its guest's, in KiB.
const OVERHEAD_KIB: u64 = 5 * 1024;

/// Every thread of both processes has lost all that a process can lose; returns the user.
fn assert_jailed(waiter: u32) -> u32 {
    let vmm = innermost(waiter);
    assert_ne!(vmm, waiter, "there is no waiter");
    let mut user = None;
    for pid in [waiter, vmm] {
        for task in fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
            let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
            let field = |name: &str| {
                let line = status.lines().find_map(|line| line.strip_prefix(name));
                line.unwrap_or_else(|| panic!("no {name} in {status}"))
                    .trim()
            };
            assert_eq!(field("Seccomp:"), "2", "{status}");
            assert_eq!(field("NoNewPrivs:"), "1", "{status}");
            for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
                assert_eq!(field(set), "0000000000000000", "{status}");
            }
            assert_eq!(field("Groups:"), "", "{status}");
            let ids: Vec<&str> = field("Uid:").split_whitespace().collect();
            let uid: u32 = ids[0].parse().unwrap();
            assert!(ids.iter().all(|id| *id == ids[0]), "{status}");
            assert_eq!(*user.get_or_insert(uid), uid, "{status}");
        }
        for namespace in [
            "user",
            "mnt",
            "net",
            "ipc",
            "uts",
            "cgroup",
            "pid_for_children",
        ] {
            let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{namespace}")).unwrap();
            assert_ne!(of(&pid.to_string()), of("self"), "{namespace}");
        }
        assert_eq!(names_in(format!("/proc/{pid}/root")), ["vsock"]);
    }
    let user = user.unwrap();
    assert_ne!(user, 0);
    user
}

fn names_in(directory: impl AsRef<Path>) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// Proportional memory of a process in KiB by what is mapped, without mappings as large as a
/// guest's memory.
fn overhead_kib(pid: u32) -> BTreeMap<String, u64> {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let kib = |line: &str| {
        line.split_whitespace()
            .nth(1)
            .unwrap()
            .parse::<u64>()
            .unwrap()
    };
    let mut total = BTreeMap::new();
    let (mut name, mut is_guest) = (String::new(), false);
    for line in smaps.lines() {
        if line.starts_with("Size:") {
            is_guest = kib(line) >= 64 * 1024;
            if name == "anonymous" {
                name = format!("anonymous of {}", kib(line));
            }
        } else if line.starts_with("Pss:") && !is_guest {
            *total.entry(name.clone()).or_default() += kib(line);
        } else if line.as_bytes()[0].is_ascii_hexdigit() && line.contains('-') {
            let path = line.split_whitespace().nth(5).unwrap_or("anonymous");
            path.rsplit('/')
                .next()
                .unwrap_or(path)
                .clone_into(&mut name);
        }
    }
    total.retain(|_, kib| *kib > 0);
    total
}

/// Waiter and VMM together take no more than this, in KiB.
fn assert_small(waiter: u32, limit: u64) {
    let (outer, inner) = (overhead_kib(waiter), overhead_kib(innermost(waiter)));
    let total: u64 = outer.values().chain(inner.values()).sum();
    report(&format!(
        "memory beyond the guest's, proportional, in KiB: {total}; waiter {outer:?}, vmm {inner:?}"
    ));
    assert!(total <= limit, "{total} KiB");
}

#[test]
fn a_machine_with_every_device_works_in_the_jail() {
    let host = Ipv4Addr::new(10, 213, 0, 1);
    let tap = Tap::in_new_network("mvs-jail0", host, false);
    let machine = Machine::new();
    let directory = machine.directory().to_owned();
    let raw = directory.join("raw");
    fs::write(&raw, Pattern::bytes(1, 1 << 20)).unwrap();
    let mut vmm = machine
        .disk(format!("path={}", raw.display()))
        .arguments(&["--net", &format!("tap={}", tap.name())])
        .jailed()
        .boot();
    let waiter = vmm.process.pid();
    // That it is ready, the guest has told through the one directory that there is.
    assert_jailed(waiter);
    assert_small(waiter, OVERHEAD_KIB);

    let agent = vmm.agent();
    assert_eq!(agent.must("echo $((6 * 7))"), "42");
    assert_eq!(
        agent.must(
            "echo written | dd of=/dev/vdb conv=fsync,notrunc 2>/dev/null; head -c 7 /dev/vdb"
        ),
        "written"
    );
    assert_eq!(&fs::read(&raw).unwrap()[..7], b"written");
    agent.must(&format!(
        "ip address add 10.213.0.2/24 dev eth0 && ip link set eth0 up && ping -c 3 -i 0.2 -W 60 {host}"
    ));
    agent.must("head -c 100000 /dev/hwrng >/dev/null");
    agent.must(
        "dd if=/dev/zero of=/root/large bs=1M count=8 conv=fsync 2>/dev/null; rm /root/large; sync",
    );

    assert_small(waiter, u64::MAX);
    vmm.process.signal(Signal::TERM);
    vmm.expect_end(0, "shutdown");
}

#[test]
fn the_api_of_a_jailed_vmm_serves_the_machine_of_the_command_line() {
    for socket in [ApiSocket::Path, ApiSocket::Inherited] {
        let mut vmm = Machine::new()
            .cpus("boot=1,max=2")
            .arguments(&["--balloon", "size=0"])
            .jailed()
            .api(socket)
            .boot();
        let waiter = vmm.process.pid();
        assert_jailed(waiter);
        let api = vmm.api();
        assert_eq!(api.get("vmm.ping")["pid"], waiter);
        let info = api.get("vm.info");
        assert_eq!(info["state"], "Running");
        for id in ["_disk0", "_vsock1", "__rng", "__balloon"] {
            assert_eq!(info["device_tree"][id]["id"], id, "{info}");
        }

        assert_receives_descriptors(&api, innermost(waiter));

        api.put("vm.pause", None);
        assert_eq!(api.state(), "Paused");
        api.put("vm.resume", None);
        assert_eq!(vmm.agent().must("echo alive"), "alive");
        api.put("vm.nmi", None);
        api.put("vm.resize", Some(&json!({"desired_vcpus": 2})));
        until("2 CPUs", || vmm.agent().must("nproc") == "2");
        api.put("vm.resize", Some(&json!({"desired_balloon": 32 << 20})));
        until("inflated", || {
            api.get("vm.counters")["__balloon"]["actual_bytes"] == 32 << 20
        });
        vmm.agent().must("sync");

        api.put("vm.shutdown", None);
        assert_eq!(api.state(), "Created");
        let (status, why) = api.call("PUT", "vm.boot", None);
        assert_eq!(status, 500, "{why}");
        assert!(why.to_string().contains("jail"), "{why}");
        api.put("vmm.shutdown", None);
        assert_eq!(vmm.process.exit_code(), 0);
    }
}

/// Descriptors that come with a request are received, and closed when it has no use for them: a
/// jailed VMM adds no device.
fn assert_receives_descriptors(api: &VmmApi, vmm: u32) {
    let (_ours, theirs) = UnixStream::pair().unwrap();
    let link = fs::read_link(format!("/proc/self/fd/{}", theirs.as_raw_fd())).unwrap();
    let is_held = || {
        let held = fs::read_dir(format!("/proc/{vmm}/fd")).unwrap();
        let mut links = held.filter_map(|entry| fs::read_link(entry.unwrap().path()).ok());
        links.any(|other| other == link)
    };
    let head = "PUT /api/v1/vm.add-net HTTP/1.1\r\n";
    let mut stream = api.connect_passing(head, &[theirs.as_fd()]);
    until("the descriptor is held", is_held);
    stream
        .write_all(b"Connection: close\r\nContent-Length: 2\r\n\r\n{}")
        .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
    drop(api.settle());
    assert!(!is_held());
}

#[test]
fn a_killed_machine_leaves_no_process_in_the_jail() {
    let mut vmm = Machine::without_disk().jailed().boot();
    let inner = innermost(vmm.process.pid());
    assert_jailed(vmm.process.pid());
    vmm.process.signal(Signal::QUIT);
    vmm.process.wait();
    assert!(!Path::new(&format!("/proc/{inner}")).exists());
}

#[test]
fn a_guest_ends_a_jailed_machine_in_each_of_its_ways() {
    for (key, status, event) in [
        ("b", 10, "reboot"),
        ("c", 11, "panic"),
        ("o", 0, "shutdown"),
    ] {
        let mut vmm = Machine::new().jailed().boot();
        let trigger = format!("echo {key} >/proc/sysrq-trigger");
        let _running = vmm.agent().exec(&sh(&trigger));
        vmm.expect_end(status, event);
    }
}

#[test]
fn a_jail_that_cannot_be_is_refused() {
    for (options, words) in [
        ("uid=0", &["root has no place"][..]),
        (
            "cgroup=/no/such/cgroup",
            &["/no/such/cgroup", "No such file"],
        ),
    ] {
        let mut vmm = Machine::without_disk()
            .arguments(&["--jail", options])
            .start();
        assert_eq!(vmm.process.exit_code(), 1);
        let said = vmm.process.stderr.whole_text();
        for word in words {
            assert!(said.contains(word), "no {word:?} in {said:?}");
        }
    }
}

#[test]
fn a_host_program_that_the_jailed_user_may_not_reach_is_told_of() {
    // Not `jailed()`, which opens the sockets and their directory.
    let vmm = Machine::without_disk().arguments(&["--jail"]).start();
    vmm.process.stderr.wait_for("out of the guest's reach");
}

#[test]
fn sandboxes_are_jailed_each_as_a_user_of_its_own() {
    let daemon = Daemon::start();
    let before = daemon.holdings();
    let mut held = Vec::new();
    let small = json!({"memory_mb": 192});
    let (one, two) = (daemon.create(&small), daemon.create(&small));
    let users = [&one, &two].map(|sandbox| assert_jailed(sandbox.outer_pid()));
    assert_ne!(users[0], users[1]);

    for sandbox in [&one, &two] {
        let cgroup = cgroup_of(sandbox.vmm_pid());
        assert!(cgroup.ends_with(&sandbox.id), "{cgroup:?}");
        assert_eq!(cgroup_of(sandbox.outer_pid()), cgroup);
        held.push(cgroup.clone());
        let limit = |file: &str| fs::read_to_string(cgroup.join(file)).unwrap();
        // The disks of the scenarios are in a tmpfs, whose pages would count as memory.
        assert_eq!(limit("memory.max"), "max\n");
        assert_eq!(limit("pids.max").trim(), "300");
        assert!(limit("cpu.max").ends_with(" 100000\n"));
        // Nothing of it is open to others, and only what it must reach is to its VMM.
        let directory = daemon.runtime_directory(&sandbox.id);
        let metadata = fs::metadata(&directory).unwrap();
        assert_eq!((metadata.uid(), metadata.mode() & 0o777), (0, 0o710));

        assert_eq!(sandbox.must("echo jailed >/root/f; cat /root/f"), "jailed");
        let (status, _) = sandbox.upload("/root/up", Pattern::new(5), 100_000);
        assert_eq!(status, 204);
        assert_pattern(sandbox.download("/root/up"), 5, 100_000);
    }

    // The VMM itself, and then its waiter, die from outside.
    for (sandbox, victim) in [(&one, one.vmm_pid()), (&two, two.outer_pid())] {
        let (outer, inner) = (sandbox.outer_pid(), sandbox.vmm_pid());
        let victim = Pid::from_raw(victim.cast_signed()).unwrap();
        kill_process(victim, Signal::KILL).unwrap();
        let record = sandbox.ended();
        assert_eq!(record["status"], "error", "{record}");
        let reason = record["status_reason"].as_str().unwrap();
        assert!(reason.contains("killed by signal 9"), "{reason}");
        for pid in [outer, inner] {
            assert!(
                !Path::new(&format!("/proc/{pid}")).exists(),
                "process {pid} is left"
            );
        }
    }
    assert_eq!(daemon.holdings(), before);

    // Their users are free again.
    let again = daemon.create(&small);
    assert!(users.contains(&assert_jailed(again.outer_pid())));
    let (outer, inner) = (again.outer_pid(), again.vmm_pid());
    held.push(cgroup_of(inner));
    again.delete();
    for pid in [outer, inner] {
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
    }
    assert_eq!(daemon.holdings(), before);
    for cgroup in held {
        assert!(!cgroup.exists(), "{cgroup:?} is left");
    }
}

/// The directory of a process's cgroup.
fn cgroup_of(pid: u32) -> PathBuf {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"));
    Path::new("/sys/fs/cgroup").join(path.unwrap())
}

#[test]
fn the_jail_of_the_daemon_can_be_turned_off() {
    let daemon = Daemon::start_with(&["--jail", "false"]);
    let sandbox = daemon.create(&json!({"memory_mb": 192}));
    assert_eq!(sandbox.outer_pid(), sandbox.vmm_pid());
    daemon.process.stderr.wait_for("VMMs are not jailed");
    assert_eq!(sandbox.must("echo $((6 * 7))"), "42");
}
