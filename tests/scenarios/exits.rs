//! However a guest or its VMM ends, the exit status and the last event say how.

use agent_protocol::ShutdownAction;
use e2e_tests::agent::sh;
use e2e_tests::images::faulting_kernel;
use e2e_tests::vmm::Machine;
use rustix::process::Signal;

#[test]
fn power_off_is_status_0() {
    let mut vmm = Machine::new().boot();
    vmm.agent().must("echo written >/root/file");
    vmm.agent().shut_down(ShutdownAction::Poweroff);
    vmm.expect_end(0, "shutdown");
    let names: Vec<String> = vmm.all_events().into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["booting", "booted", "shutdown"]);
    assert!(
        !vmm.directory().join("vsock.sock").exists(),
        "the socket is left behind"
    );
}

#[test]
fn reboot_is_status_10() {
    let mut vmm = Machine::new().boot();
    vmm.agent().shut_down(ShutdownAction::Reboot);
    vmm.expect_end(10, "reboot");

    // The kernel's own, without asking any program.
    let mut vmm = Machine::new().boot();
    let _running = vmm.agent().exec(&sh("echo b >/proc/sysrq-trigger"));
    vmm.expect_end(10, "reboot");
}

#[test]
fn a_panic_is_status_11() {
    let mut vmm = Machine::new().boot();
    let _running = vmm.agent().exec(&sh("echo c >/proc/sysrq-trigger"));
    vmm.expect_end(11, "panic");
    assert!(vmm.console().contains("Kernel panic"));

    // A kernel that finds nothing to start.
    let mut vmm = Machine::without_disk().initramfs(None).start();
    vmm.expect_end(11, "panic");
    assert!(vmm.console().contains("Kernel panic"));
}

#[test]
fn a_triple_fault_is_status_12() {
    let machine = Machine::without_disk();
    let kernel = machine.directory().join("kernel");
    std::fs::write(&kernel, faulting_kernel()).unwrap();
    let mut vmm = machine.kernel(kernel).initramfs(None).start();
    vmm.expect_end(12, "triple_fault");
}

#[test]
fn a_signal_ends_the_vmm_in_order() {
    for signal in [Signal::TERM, Signal::INT] {
        let mut vmm = Machine::without_disk().boot();
        vmm.process.signal(signal);
        vmm.expect_end(0, "shutdown");
        assert!(
            !vmm.directory().join("vsock.sock").exists(),
            "the socket is left behind"
        );
    }
}
