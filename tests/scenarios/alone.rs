//! What takes a machine of its own; see `tests/run`.

use e2e_tests::vmm::Machine;

use crate::boot::assert_vcpus;

/// The kernel starts one vCPU, and the agent then the others, one after the other, before it serves: while they
/// start they spin and tick, and thirty-two of them at a time leave one emulated CPU no time for anything
/// else, sometimes for minutes.
#[test]
fn thirty_two_vcpus_come_online() {
    let vmm = Machine::new()
        .cpus("boot=32")
        .memory("size=512M")
        .kernel_parameter("maxcpus=1")
        .boot();
    let agent = vmm.agent();
    assert_eq!(agent.must("cat /sys/devices/system/cpu/present"), "0-31");
    // Does nothing for those that are online, and waits for whoever is bringing one up.
    agent.must("for cpu in $(seq 31); do echo 1 >/sys/devices/system/cpu/cpu$cpu/online; done");
    assert_vcpus(agent, 32);
}
