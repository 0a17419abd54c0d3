//! Guests come up with the hardware that they were promised.

use e2e_tests::agent::Agent;
use e2e_tests::process::status_kib;
use e2e_tests::setup::setup;
use e2e_tests::vmm::Machine;

#[test]
fn a_guest_boots_to_its_agent() {
    let mut vmm = Machine::new().start();
    let ready = vmm.ready();
    assert!(ready.serving_us >= ready.entered_us);
    let health = vmm.agent().health();
    assert!(health.init, "the agent is process 1");
    assert_eq!(health.kernel, ready.kernel);
    assert_eq!(vmm.agent().must("uname -r"), ready.kernel);
    assert!(vmm.agent().must("cat /etc/os-release").contains("Debian"));
    assert_kernel_is_content(vmm.agent());
    assert_eq!(
        vmm.agent()
            .must("cat /sys/class/misc/hw_random/rng_current"),
        "virtio_rng.0"
    );
}

#[test]
fn a_guest_has_the_vcpus_and_memory_that_it_was_given() {
    for (vcpus, mib) in [(2, 128), (4, 1024)] {
        let vmm = Machine::new()
            .cpus(&format!("boot={vcpus}"))
            .memory(&format!("size={mib}M"))
            .boot();
        assert_vcpus(vmm.agent(), vcpus);
        let memory = vmm.agent().must("cat /proc/meminfo");
        let total = status_kib(&memory, "MemTotal:");
        // The kernel keeps its own code and the table of pages out of the total.
        let given = mib * 1024;
        assert!(
            (given - 48 * 1024..given).contains(&total),
            "{total} KiB of {given}"
        );
        assert_kernel_is_content(vmm.agent());
    }
}

#[test]
fn a_stock_kernel_boots_to_the_agent() {
    let stock = &setup().stock_images;
    let vmm = Machine::new()
        .kernel(stock.join("vmlinuz"))
        .initramfs(Some(stock.join("initramfs.cpio")))
        .cpus("boot=2")
        .boot();
    assert_vcpus(vmm.agent(), 2);
    assert!(vmm.agent().must("uname -v").contains("Debian"));
}

#[test]
fn every_start_has_a_generation_id_of_its_own() {
    let ids = [(); 2].map(|()| {
        let vmm = Machine::without_disk().boot();
        let drivers = vmm
            .agent()
            .list("/sys/bus/platform/drivers/vmgenid")
            .unwrap();
        assert!(
            drivers.iter().any(|entry| entry["kind"] == "symlink"),
            "the kernel's driver has found no device: {drivers:?}"
        );
        vmm.generation_id()
    });
    assert_ne!(ids[0], 0);
    assert_ne!(ids[0], ids[1]);
}

/// Every vCPU takes its turn at a program.
pub fn assert_vcpus(agent: &Agent, vcpus: u32) {
    assert_eq!(agent.must("nproc"), vcpus.to_string());
    let each =
        "for cpu in $(seq 0 $(($(nproc) - 1))); do taskset -c $cpu cat /proc/self/stat; done";
    let stats = agent.must(each);
    // proc_pid_stat(5): field 39 is the CPU that the program ran on last; field 2 is `(cat)`.
    let ran_on: Vec<&str> = stats
        .lines()
        .map(|line| line.split_whitespace().nth(38).unwrap())
        .collect();
    let expected: Vec<String> = (0..vcpus).map(|cpu| cpu.to_string()).collect();
    assert_eq!(ran_on, expected);
}

/// The kernel has found no fault with the machine.
fn assert_kernel_is_content(agent: &Agent) {
    let log = agent.must("dmesg");
    for complaint in [
        "ACPI Error",
        "ACPI BIOS",
        "BUG:",
        "WARNING:",
        "Call Trace",
        "unchecked MSR",
    ] {
        assert!(
            !log.contains(complaint),
            "{complaint} in the kernel's log:\n{log}"
        );
    }
}
