//! What takes a machine of its own; see `tests/run`.

use e2e_tests::vmm::Machine;

use crate::boot::assert_vcpus;

#[test]
fn thirty_two_vcpus_come_online() {
    let vmm = Machine::new().cpus("boot=32").memory("size=512M").boot();
    assert_vcpus(vmm.agent(), 32);
}
