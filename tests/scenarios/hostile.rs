//! A guest that attacks every device of its machine harms nobody but itself.

use std::fs::File;
use std::net::Ipv4Addr;

use e2e_tests::log::Log;
use e2e_tests::network::Tap;
use e2e_tests::process::descriptors_of;
use e2e_tests::report;
use e2e_tests::setup::setup;
use e2e_tests::terminal::terminal;
use e2e_tests::vmm::Machine;
use rustix::process::Signal;

/// Attacks of one guest.
const ROUNDS: u32 = 3000;
const MEMORY_MIB: u64 = 64;
/// What the VMM may need beside the guest's memory at the worst: a frame and a request at a time
/// for each queue, and what the guest leaves unread in 64 sockets.
const OVERHEAD_MIB: u64 = 64;
/// Sockets, taps, images, eventfds: what an idle machine has, with some room.
const DESCRIPTORS: usize = 128;

#[test]
fn attacks_on_every_device_leave_a_vmm_that_ends_in_order() {
    let seeds = std::env::var("MVS_SOAK_SEEDS").map_or(1, |seeds| seeds.parse().unwrap());
    let tap = Tap::in_new_network("mvs-hostile0", Ipv4Addr::new(10, 93, 0, 1), false);
    for seed in 1..=seeds {
        let machine = Machine::without_disk();
        let (one, two) = (
            machine.directory().join("one.raw"),
            machine.directory().join("two.raw"),
        );
        for image in [&one, &two] {
            File::create(image).unwrap().set_len(64 << 20).unwrap();
        }
        let card = format!("tap={}", tap.name());
        let (user, programs) = terminal();
        let mut vmm = machine
            .kernel(&setup().hostile_guest)
            .initramfs(None)
            .kernel_parameter(&format!("seed={seed} rounds={ROUNDS} linger=1"))
            .memory(&format!(
                "size={MEMORY_MIB}M,hotplug_method=virtio-mem,hotplug_size=128M"
            ))
            .disk(format!("path={},num_queues=2", one.display()))
            .disk(format!("path={},readonly=on", two.display()))
            .arguments(&["--net", &card, "--balloon", "size=0"])
            .terminal(programs)
            .start();
        let screen = Log::follow("the terminal", File::from(user));
        screen.wait_for("rounds against 7 devices are over");

        let peak = vmm.process.peak_kib();
        let descriptors = descriptors_of(vmm.process.pid());
        report(&format!(
            "after {ROUNDS} attacks with seed {seed}: peak memory {peak} KiB of a vmm with \
             {MEMORY_MIB} MiB of guest memory, {descriptors} descriptors"
        ));
        assert!(peak < (MEMORY_MIB + OVERHEAD_MIB) << 10);
        assert!(descriptors < DESCRIPTORS);
        vmm.process.signal(Signal::TERM);
        vmm.expect_end(0, "shutdown");
        let events = vmm.all_events();
        assert!(
            events.iter().any(|(name, _)| name == "device_error"),
            "no device has noticed anything: {events:?}"
        );
        assert!(events.len() < 100, "{} events", events.len());
    }
}
