//! Guests that do too much of one thing. What it costs the host is bounded, and all else is served
//! meanwhile.

use std::net::{Ipv4Addr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use agent_protocol::AgentFrame;
use e2e_tests::agent::sh;
use e2e_tests::images::looping_kernel;
use e2e_tests::network::Tap;
use e2e_tests::process::{innermost, overhead_kib};
use e2e_tests::vmm::{ApiSocket, Machine, Vmm};
use e2e_tests::{report, until};
use rustix::process::Signal;
use serde_json::json;

/// The most memory of a VMM beyond its guest's, in KiB: some MiB that it has when idle, and what
/// guest and host programs leave unread in [`STREAMS`] sockets.
const OVERHEAD_KIB: u64 = 32 * 1024;
/// Sockets that nobody reads.
const STREAMS: usize = 32;
/// Where the serial log starts over, in bytes.
const CONSOLE_LIMIT: u64 = 4 << 20;

fn machine() -> Machine {
    Machine::new().jailed().api(ApiSocket::Inherited)
}

/// Everything but what the guest floods works, and the VMM is small.
fn assert_served(vmm: &Vmm, flood: &str) {
    let api = vmm.api();
    assert_eq!(api.get("vmm.ping")["pid"], vmm.process.pid());
    let agent = vmm.agent();
    agent.must(
        "head -c 1M /dev/urandom >/root/file && sync && echo 3 >/proc/sys/vm/drop_caches && \
         sha256sum /root/file && head -c 1000 /dev/hwrng >/dev/null",
    );
    api.put("vm.pause", None);
    assert_eq!(api.state(), "Paused");
    api.put("vm.resume", None);
    assert!(agent.health().init);
    let beyond: u64 = overhead_kib(innermost(vmm.process.pid())).values().sum();
    report(&format!(
        "a flood of {flood}: {beyond} KiB beyond the guest's memory"
    ));
    assert!(beyond < OVERHEAD_KIB, "{beyond} KiB");
}

/// A flood is no news.
fn end(mut vmm: Vmm) {
    vmm.process.signal(Signal::TERM);
    vmm.expect_end(0, "shutdown");
    let events = vmm.all_events();
    assert!(events.len() < 10, "{events:?}");
}

#[test]
fn a_flooded_console() {
    let vmm = machine().boot();
    let console = vmm.directory().join("console.log");
    let _flood = vmm.agent().exec(&sh("yes >/dev/ttyS0"));
    let size = || std::fs::metadata(&console).unwrap().len();
    let before = size();
    until("a flood", || size() > before + 10_000);
    assert_served(&vmm, "the console");
    assert!(size() <= CONSOLE_LIMIT);
    end(vmm);
}

#[test]
fn sockets_that_nobody_reads() {
    let vmm = machine().boot();
    let agent = vmm.agent();
    let mut unread = Vec::new();
    for _ in 0..STREAMS {
        let mut exec = agent.exec(&sh("exec yes"));
        // Its first words are out, and then it has all the time that there is.
        assert!(matches!(exec.next_frame(), Some(AgentFrame::Started(_))));
        assert!(matches!(exec.next_frame(), Some(AgentFrame::Stdout(_))));
        unread.push(exec);
    }
    assert_served(&vmm, "sockets");
    drop(unread);
    end(vmm);
}

#[test]
fn a_network_flooded_from_both_sides() {
    let (host, guest) = (Ipv4Addr::new(10, 77, 0, 1), Ipv4Addr::new(10, 77, 0, 2));
    let tap = Tap::in_new_network("mvs-flood0", host, false);
    let card = format!("tap={}", tap.name());
    let vmm = machine().arguments(&["--net", &card]).boot();
    let agent = vmm.agent();
    agent.must(&format!(
        "ip address add {guest}/24 dev eth0 && ip link set eth0 up && ping -c 1 -W 60 {host}"
    ));
    // It is never read.
    let socket = UdpSocket::bind((host, 0)).unwrap();
    let port = socket.local_addr().unwrap().port();
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                // A queue that is full is what this is for.
                let _ = socket.send_to(&[0; 1400], (guest, 9));
            }
        });
        let _flood = agent.exec(&sh(&format!("nc -u {host} {port} </dev/zero")));
        let api = vmm.api();
        let count = |name: &str| api.get("vm.counters")["_net1"][name].as_u64().unwrap();
        until("a flood", || {
            count("tx_frames") > 1000 && count("rx_frames") > 1000
        });
        assert_served(&vmm, "the network");
        is_over.store(true, Ordering::Relaxed);
    });
    end(vmm);
}

#[test]
fn a_vcpu_that_loops_with_interrupts_off() {
    let machine = Machine::without_disk().jailed().api(ApiSocket::Inherited);
    let kernel = machine.directory().join("kernel");
    std::fs::write(&kernel, looping_kernel()).unwrap();
    let mut vmm = machine.kernel(&kernel).initramfs(None).start();
    let api = vmm.api();
    until("booted", || api.state() == "Running");
    for _ in 0..3 {
        assert_eq!(api.get("vmm.ping")["pid"], vmm.process.pid());
        assert!(api.get("vm.counters").is_object());
        api.put("vm.pause", None);
        assert_eq!(api.state(), "Paused");
        api.put("vm.resume", None);
        assert_eq!(api.state(), "Running");
    }
    api.put("vm.power-button", None);
    api.put("vm.shutdown", None);
    assert_eq!(api.state(), "Created");
    api.put("vmm.shutdown", None);
    assert_eq!(vmm.process.exit_code(), 0);

    // Without the jail, more can be asked of it.
    let machine = Machine::without_disk();
    let mut config = machine.config();
    config["payload"] = json!({"kernel": kernel});
    let core = machine.directory().join("core");
    let mut vmm = machine.serve();
    let api = vmm.api();
    api.put("vm.create", Some(&config));
    api.put("vm.boot", None);
    api.put("vm.reboot", None);
    api.put("vm.pause", None);
    let url = json!({"destination_url": format!("file://{}", core.display())});
    api.put("vm.coredump", Some(&url));
    api.put("vm.resume", None);
    vmm.process.signal(Signal::TERM);
    vmm.expect_end(0, "shutdown");
}
