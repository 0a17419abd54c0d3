//! A machine that grows and shrinks while it runs: balloon, plugged memory, vCPUs. In the jail,
//! whose filters of system calls have to know all of it.

use e2e_tests::agent::Agent;
use e2e_tests::process::{innermost, status_kib};
use e2e_tests::until;
use e2e_tests::vmm::{ApiSocket, Machine, Vmm};
use e2e_tests::vmm_api::VmmApi;
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;

/// A running machine with an API.
struct Resizable {
    vmm: Vmm,
    api: VmmApi,
}

impl Resizable {
    fn boot(machine: Machine) -> Self {
        let vmm = machine.jailed().api(ApiSocket::Path).boot();
        let api = vmm.api();
        Self { vmm, api }
    }

    fn agent(&self) -> &Agent {
        self.vmm.agent()
    }

    fn resize(&self, body: &Value) {
        self.api.put("vm.resize", Some(body));
    }

    /// What a device counts, in MiB.
    fn counter(&self, device: &str, name: &str) -> u64 {
        self.api.get("vm.counters")[device][name].as_u64().unwrap() / MIB
    }

    /// Memory of the host that the VMM occupies, in MiB.
    fn resident(&self) -> u64 {
        let path = format!("/proc/{}/status", innermost(self.vmm.process.pid()));
        status_kib(&std::fs::read_to_string(path).unwrap(), "VmRSS:") / 1024
    }

    /// Waits until the latest event of vCPUs tells that there are this many.
    fn wait_for_vcpus(&self, count: u64) {
        let vcpus = |line: &str| {
            let event: Value = serde_json::from_str(line).ok()?;
            (event["event"] == "vcpus_changed").then(|| event["vcpus"].as_u64())?
        };
        let what = format!("an event of {count} vCPUs");
        self.vmm.events().wait_for_text(&what, |text| {
            let latest = text.lines().rev().find_map(vcpus);
            (latest == Some(count)).then_some(())
        });
    }

    /// A field of the guest's /proc/meminfo, in MiB.
    fn meminfo(&self, field: &str) -> u64 {
        status_kib(
            &self.agent().must("cat /proc/meminfo"),
            &format!("{field}:"),
        ) / 1024
    }

    /// Fills that much of the guest's memory.
    fn fill(&self, mib: u64) {
        let script = format!(
            "mkdir -p /run/fill && mount -t tmpfs -o size=100% fill /run/fill && \
             head -c {mib}M /dev/zero >/run/fill/zeroes"
        );
        self.agent().must(&script);
    }

    /// Frees what was filled.
    fn free(&self) {
        self.agent().must("umount /run/fill");
    }

    fn nproc(&self) -> u64 {
        self.agent().must("nproc").trim().parse().unwrap()
    }
}

#[test]
fn the_balloon_takes_memory_from_the_guest_and_gives_it_to_the_host() {
    let machine = Machine::new().memory("size=384M");
    let machine = Resizable::boot(machine.arguments(&["--balloon", "size=0"]));
    machine.fill(200);
    machine.free();
    let (resident, free) = (machine.resident(), machine.meminfo("MemFree"));
    assert!(resident > 200, "{resident}");

    machine.resize(&json!({"desired_balloon": 200 * MIB}));
    until("inflated", || {
        machine.counter("__balloon", "actual_bytes") == 200
    });
    let (small, left) = (machine.resident(), machine.meminfo("MemFree"));
    assert!(
        small + 100 < resident,
        "resident: {resident} to {small} MiB"
    );
    assert!(left + 150 < free, "free in the guest: {free} to {left} MiB");
    let info = machine.api.get("vm.info");
    assert_eq!(info["memory_actual_size"], 184 * MIB);

    machine.resize(&json!({"desired_balloon": 0}));
    until("deflated", || {
        machine.counter("__balloon", "actual_bytes") == 0
    });
    let again = machine.meminfo("MemFree");
    assert!(
        again > left + 150,
        "free in the guest: {left} to {again} MiB"
    );
    machine.fill(200);
    let too_much = json!({"desired_balloon": 385 * MIB});
    let (status, why) = machine.api.call("PUT", "vm.resize", Some(&too_much));
    assert!(
        status >= 400 && why.to_string().contains("does not fit"),
        "{status} {why}"
    );
}

#[test]
fn memory_that_the_guest_frees_goes_back_to_the_host() {
    let machine = Machine::new().memory("size=384M");
    let balloon = "size=0,free_page_reporting=on";
    let machine = Resizable::boot(machine.arguments(&["--balloon", balloon]));
    machine.fill(192);
    let resident = machine.resident();
    machine.free();
    until("free pages are reported", || {
        machine.resident() + 150 < resident
    });
    assert!(machine.counter("__balloon", "reported_bytes") >= 150);
}

#[test]
fn memory_is_plugged_in_and_out() {
    let machine = Machine::new()
        .memory("size=256M,hotplug_method=virtio-mem,hotplug_size=512M,hotplugged_size=128M");
    let machine = Resizable::boot(machine);
    let plugged = |expected| {
        until(&format!("{expected} MiB are plugged in"), || {
            machine.counter("__mem", "plugged_bytes") == expected
        });
        let info = machine.api.get("vm.info");
        assert_eq!(info["memory_actual_size"], (256 + expected) * MIB);
    };
    // Asked for before there was anybody to take it into use.
    plugged(128);
    let few = machine.meminfo("MemTotal");
    assert!(few > 256, "{few}");

    machine.resize(&json!({"desired_ram": 768 * MIB}));
    plugged(512);
    until("added memory is in use", || {
        machine.meminfo("MemTotal") > few + 350
    });
    machine.fill(400);
    machine.free();
    let resident = machine.resident();
    assert!(resident > 400, "{resident}");

    machine.resize(&json!({"desired_ram": 256 * MIB}));
    plugged(0);
    let (total, small) = (machine.meminfo("MemTotal"), machine.resident());
    assert!(total < 256, "MemTotal: {total} MiB");
    assert!(
        small + 200 < resident,
        "resident: {resident} to {small} MiB"
    );
}

#[test]
fn vcpus_come_and_go() {
    let machine = Resizable::boot(Machine::new().cpus("boot=1,max=3"));
    assert_eq!(machine.nproc(), 1);
    for count in [3, 1, 2] {
        machine.resize(&json!({"desired_vcpus": count}));
        until(&format!("{count} CPUs"), || machine.nproc() == count);
        // One that is offline is given up a little later.
        machine.wait_for_vcpus(count);
    }
    // Both of them work.
    machine.agent().must(
        "taskset -c 0 true && taskset -c 1 sh -c 'i=0; while [ $i -lt 1000 ]; do i=$((i+1)); done'",
    );
    let status = |count: u8| {
        let body = json!({"desired_vcpus": count});
        machine.api.call("PUT", "vm.resize", Some(&body)).0
    };
    assert_eq!((status(0), status(4)), (400, 400));
    assert_eq!(machine.nproc(), 2);
}

#[test]
fn the_power_button_takes_the_guest_down() {
    let mut machine = Resizable::boot(Machine::new());
    machine.api.put("vm.power-button", None);
    machine.vmm.expect_end(0, "shutdown");
}
