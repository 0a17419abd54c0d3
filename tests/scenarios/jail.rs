//! A real guest's VMM in its jail: what it is, what it sees, what it costs, and that it still
//! does its work.

use std::collections::BTreeMap;
use std::fs;
use std::net::Ipv4Addr;
use std::path::Path;

use e2e_tests::agent::sh;
use e2e_tests::network::Tap;
use e2e_tests::pattern::Pattern;
use e2e_tests::process::innermost;
use e2e_tests::report;
use e2e_tests::vmm::Machine;
use rustix::process::Signal;

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
    let tap = Tap::in_new_network("mvs-jail0", host);
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
