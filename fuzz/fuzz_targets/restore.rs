//! The state of a device in a snapshot, which somebody hostile may have written: whatever it says, the
//! device refuses it, or goes on and can be saved again.
#![no_main]

use std::thread;
use std::time::Instant;

use libfuzzer_sys::arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use vmm::devices::bus::BusDevice;
use vmm::devices::virtio::state::VirtioState;
use vmm::devices::virtio::worker::{self, Parts};
use vmm::devices::virtio::{Interrupt, VirtioDevice};
use vmm::events::EventStream;
use vmm::memory::GuestMemory;
use vmm_fuzz::devices::{self, Guest, Host};
use vmm_fuzz::event_loop::{Stop, eventfd};
use vmm_fuzz::ignore_sigpipe;

/// The status register (virtio 1.2, 4.2.2).
const STATUS: u64 = 0x70;

fuzz_target!(init: ignore_sigpipe(), |input: &[u8]| {
    // An input that is too short for a device says nothing.
    let _ = devices::attack(&mut Unstructured::new(input), Restore);
});

/// The rest of the input is the text of the state.
struct Restore;

impl Guest for Restore {
    fn attack(
        self,
        input: &mut Unstructured<'_>,
        memory: GuestMemory,
        device: impl VirtioDevice + 'static,
        _host: Host,
    ) -> Result<()> {
        let Ok(state) = serde_json::from_slice::<VirtioState>(input.bytes(input.len())?) else {
            return Ok(());
        };
        let interrupt = Interrupt::new(eventfd());
        let events = EventStream::new(Instant::now(), None);
        let mut parts =
            worker::split("fuzzed".to_owned(), device, memory, interrupt, events).unwrap();
        if parts.restore(&state).is_err() {
            return Ok(());
        }
        let Parts {
            transport,
            worker,
            handle,
            ..
        } = parts;
        let stop = Stop::default();
        thread::scope(|scope| {
            let serve = stop.clone();
            let event_loop = scope.spawn(move || serve.run(worker));
            handle.resume().unwrap();
            // A driver that has broken its rings has no device any more, which is no error here.
            let _ = handle.pause();
            handle.save().unwrap();
            handle.resume().unwrap();
            transport
                .lock()
                .unwrap()
                .write(STATUS, &0_u32.to_le_bytes());
            let mut status = [0xff; 4];
            transport.lock().unwrap().read(STATUS, &mut status);
            assert_eq!(status, [0; 4]);
            stop.stop();
            event_loop.join().unwrap();
        });
        Ok(())
    }
}
