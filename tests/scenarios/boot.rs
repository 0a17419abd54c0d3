//! Guests come up with the hardware that they were promised.

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
}
