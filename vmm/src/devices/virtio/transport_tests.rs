//! Drives the registers of a device as a guest would, with the event loop on another thread.

use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
use proptest::prelude::*;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::mmio::MmioTransport;
use super::state::{DeviceState, OwnState, RestoreError, SavedQueue, VirtioState};
use super::worker::{self, Parts};
use super::{
    Activation, Control, ControlError, Counters, DeviceError, DeviceHandle, DeviceKind, Interrupt,
    VirtioDevice,
};
use crate::devices::bus::BusDevice;
use crate::events::EventStream;
use crate::exit::{ExitReason, ExitSignal};
use crate::machine::ExitWatch;
use crate::memory::GuestMemory;

const FEATURES_SELECT: u64 = 0x14;
const FEATURES: u64 = 0x10;
const DRIVER_FEATURES: u64 = 0x20;
const DRIVER_FEATURES_SELECT: u64 = 0x24;
const QUEUE_SELECT: u64 = 0x30;
const QUEUE_SIZE: u64 = 0x38;
const QUEUE_READY: u64 = 0x44;
const QUEUE_NOTIFY: u64 = 0x50;
const INTERRUPT_STATUS: u64 = 0x60;
const INTERRUPT_ACK: u64 = 0x64;
const STATUS: u64 = 0x70;
const QUEUE_DESCRIPTORS: u64 = 0x80;
const QUEUE_AVAILABLE: u64 = 0x90;
const QUEUE_USED: u64 = 0xa0;
const CONFIG_GENERATION: u64 = 0xfc;

const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
const NEEDS_RESET: u32 = 64;
const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;

#[derive(Debug, PartialEq)]
enum Call {
    Activate { features: u64, ready: Vec<bool> },
    Queue(usize),
    Control(Control),
    Pause,
    Reset,
}

struct Fake {
    calls: Sender<Call>,
    fail_on_queue: bool,
    queues: Option<Vec<SavedQueue>>,
}

impl VirtioDevice for Fake {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Rng
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[64, 16]
    }

    fn features(&self) -> u64 {
        1 << 3
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0x5a);
    }

    fn counters(&self) -> Counters {
        Counters::from([("things", 7)])
    }

    fn control(&mut self, control: Control) -> Result<(), ControlError> {
        match control {
            Control::ResizeDisk { .. } => {
                let _ = self.calls.send(Call::Control(control));
                Ok(())
            }
            _ => Err(ControlError::NotSupported),
        }
    }

    fn pause(&mut self) -> Result<(), DeviceError> {
        let _ = self.calls.send(Call::Pause);
        Ok(())
    }

    fn save(&mut self) -> Result<DeviceState, ControlError> {
        Ok(DeviceState {
            queues: self.queues.clone(),
            own: OwnState::Rng {},
        })
    }

    fn restore(&mut self, own: &OwnState) -> Result<(), RestoreError> {
        match own {
            OwnState::Rng {} => Ok(()),
            _ => Err(RestoreError::OwnState),
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        self.queues = Some(activation.queues.iter().map(SavedQueue::of).collect());
        let ready = activation.queues.iter().map(QueueT::ready).collect();
        let features = activation.features;
        let _ = self.calls.send(Call::Activate { features, ready });
        Ok(())
    }

    fn process_queue(&mut self, index: usize) -> Result<(), DeviceError> {
        let _ = self.calls.send(Call::Queue(index));
        if self.fail_on_queue {
            let source = virtio_queue::Error::InvalidChain;
            return Err(DeviceError::Queue { index, source });
        }
        Ok(())
    }

    fn reset(&mut self) {
        let _ = self.calls.send(Call::Reset);
    }
}

/// A guest with one device, and an event loop that serves it.
struct Guest {
    registers: Arc<Mutex<MmioTransport>>,
    handle: DeviceHandle,
    calls: Receiver<Call>,
    exit: ExitSignal,
    event_loop: Option<JoinHandle<()>>,
}

impl Guest {
    fn new(fail_on_queue: bool) -> Self {
        Self::build(fail_on_queue, None).unwrap()
    }

    /// A device in the state that another one had.
    fn restored(state: &VirtioState) -> Result<Self, RestoreError> {
        Self::build(false, Some(state))
    }

    fn build(fail_on_queue: bool, saved: Option<&VirtioState>) -> Result<Self, RestoreError> {
        let (sender, calls) = mpsc::channel();
        let device = Fake {
            calls: sender,
            fail_on_queue,
            queues: None,
        };
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let interrupt = Interrupt::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
        let events = EventStream::new(Instant::now(), None);
        let mut parts =
            worker::split("fake".to_owned(), device, memory, interrupt, events).unwrap();
        if let Some(saved) = saved {
            parts.restore(saved)?;
        }
        let Parts {
            transport,
            worker,
            handle,
            ..
        } = parts;
        let exit = ExitSignal::new().unwrap();
        let watch = exit.clone();
        let event_loop = thread::spawn(move || {
            let mut event_loop = EventManager::<Box<dyn MutEventSubscriber>>::new().unwrap();
            event_loop.add_subscriber(Box::new(worker));
            event_loop.add_subscriber(Box::new(ExitWatch(watch.clone())));
            while watch.reason().is_none() {
                event_loop.run().unwrap();
            }
        });
        Ok(Self {
            registers: transport,
            handle,
            calls,
            exit,
            event_loop: Some(event_loop),
        })
    }

    fn read(&mut self, offset: u64) -> u32 {
        let mut data = [0xff; 4];
        self.registers.lock().unwrap().read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&mut self, offset: u64, value: u32) {
        self.registers
            .lock()
            .unwrap()
            .write(offset, &value.to_le_bytes());
    }

    fn accept(&mut self, features: u64) {
        for (select, half) in [(0, features as u32), (1, (features >> 32) as u32)] {
            self.write(DRIVER_FEATURES_SELECT, select);
            self.write(DRIVER_FEATURES, half);
        }
    }

    /// Goes as far as FEATURES_OK.
    fn negotiate(&mut self) {
        self.write(STATUS, ACKNOWLEDGE);
        self.write(STATUS, ACKNOWLEDGE | DRIVER);
        self.accept(VERSION_1);
        self.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        assert_eq!(self.read(STATUS), ACKNOWLEDGE | DRIVER | FEATURES_OK);
    }

    fn set_up_queue(&mut self, index: u32, address: u32) {
        self.write(QUEUE_SELECT, index);
        self.write(QUEUE_SIZE, 16);
        self.write(QUEUE_DESCRIPTORS, address);
        self.write(QUEUE_AVAILABLE, address.wrapping_add(0x1000));
        self.write(QUEUE_USED, address.wrapping_add(0x2000));
        self.write(QUEUE_READY, 1);
    }

    fn driver_ok(&mut self) {
        self.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    }

    fn stop_event_loop(&mut self) {
        self.exit.end(ExitReason::Requested);
        if let Some(event_loop) = self.event_loop.take() {
            event_loop.join().unwrap();
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.stop_event_loop();
    }
}

#[test]
fn a_driver_that_keeps_to_the_rules_gets_the_device() {
    let mut guest = Guest::new(false);
    assert_eq!(guest.read(0), u32::from_le_bytes(*b"virt"));
    assert_eq!((guest.read(4), guest.read(8)), (2, DeviceKind::Rng as u32));
    guest.write(FEATURES_SELECT, 1);
    assert_eq!(guest.read(FEATURES) & 1, 1, "VERSION_1 is offered");
    guest.write(FEATURES_SELECT, 2);
    assert_eq!(guest.read(FEATURES), 0);

    guest.negotiate();
    guest.set_up_queue(0, 0x1000);
    guest.driver_ok();
    let ready = vec![true, false];
    assert_eq!(
        guest.calls.recv().unwrap(),
        Call::Activate {
            features: VERSION_1,
            ready
        }
    );
    assert_eq!(guest.calls.recv().unwrap(), Call::Queue(0));
    assert_eq!(guest.calls.recv().unwrap(), Call::Queue(1));
    guest.write(QUEUE_NOTIFY, 1);
    assert_eq!(guest.calls.recv().unwrap(), Call::Queue(1));
    assert_eq!(guest.read(0x100), 0x5a5a_5a5a);

    guest.write(STATUS, 0);
    assert_eq!(guest.calls.recv().unwrap(), Call::Reset);
    assert_eq!((guest.read(STATUS), guest.read(QUEUE_READY)), (0, 0));
    guest.negotiate();
}

#[test]
fn registers_and_rings_are_described() {
    let mut guest = Guest::new(false);
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    // The indices, behind the flags of each ring.
    memory.write_obj(7_u16, GuestAddress(0x2002)).unwrap();
    memory.write_obj(5_u16, GuestAddress(0x3002)).unwrap();
    let lines = guest.registers.lock().unwrap().describe(&memory);
    assert!(lines[0].contains("status=0x0 (reset)"), "{lines:?}");
    assert_eq!(lines[1], "queue 0: not ready max_size=64");

    guest.negotiate();
    guest.set_up_queue(0, 0x1000);
    // Rings that are not in the guest's memory are described as well.
    guest.set_up_queue(1, 0xfff0_0000);
    let lines = guest.registers.lock().unwrap().describe(&memory);
    assert!(
        lines[0].contains("(ACKNOWLEDGE DRIVER FEATURES_OK)"),
        "{lines:?}"
    );
    assert!(lines[0].contains("accepted=0x100000000"), "{lines:?}");
    assert!(lines[1].ends_with("available=7 used=5"), "{lines:?}");
    assert!(lines[2].contains("available=("), "{lines:?}");
    assert_eq!(lines.len(), 3);
}

#[test]
fn steps_out_of_order_are_ignored() {
    let mut guest = Guest::new(false);
    guest.write(STATUS, ACKNOWLEDGE | DRIVER);
    guest.set_up_queue(0, 0x1000);
    assert_eq!(guest.read(QUEUE_READY), 0, "queues wait for FEATURES_OK");
    guest.write(STATUS, ACKNOWLEDGE | DRIVER | DRIVER_OK);
    assert_eq!(
        guest.read(STATUS),
        ACKNOWLEDGE | DRIVER,
        "DRIVER_OK needs FEATURES_OK"
    );
    guest.write(STATUS, DRIVER);
    assert_eq!(
        guest.read(STATUS),
        ACKNOWLEDGE | DRIVER,
        "bits cannot be taken back"
    );

    guest.accept(VERSION_1 | 1 << 60);
    guest.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    assert_eq!(
        guest.read(STATUS) & FEATURES_OK,
        0,
        "a feature that was not offered"
    );
    guest.accept(1 << 3);
    guest.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    assert_eq!(guest.read(STATUS) & FEATURES_OK, 0, "a legacy driver");
    assert!(guest.calls.try_recv().is_err());
}

#[test]
fn rings_outside_of_memory_stop_the_device_until_it_is_reset() {
    let mut guest = Guest::new(false);
    guest.negotiate();
    guest.set_up_queue(0, 0xfff0_0000);
    guest.driver_ok();
    assert_ne!(guest.read(STATUS) & NEEDS_RESET, 0);
    assert_eq!(guest.read(INTERRUPT_STATUS), 2, "a change of configuration");
    assert!(
        guest.calls.try_recv().is_err(),
        "the device never saw the rings"
    );

    guest.write(STATUS, 0);
    guest.negotiate();
    guest.set_up_queue(0, 0x1000);
    guest.driver_ok();
    assert_eq!(guest.read(STATUS) & NEEDS_RESET, 0);
    assert!(matches!(guest.calls.recv().unwrap(), Call::Activate { .. }));
}

#[test]
fn a_device_that_gives_up_is_reset_and_tells_so() {
    let mut guest = Guest::new(true);
    guest.negotiate();
    guest.driver_ok();
    assert!(matches!(guest.calls.recv().unwrap(), Call::Activate { .. }));
    assert_eq!(guest.calls.recv().unwrap(), Call::Queue(0));
    assert_eq!(guest.calls.recv().unwrap(), Call::Reset);
    assert_ne!(guest.read(STATUS) & NEEDS_RESET, 0);
}

#[test]
fn a_device_at_rest_is_not_moved_and_catches_up_afterwards() {
    let mut guest = Guest::new(false);
    guest.handle.pause().unwrap();
    assert!(
        guest.calls.try_recv().is_err(),
        "a device without a driver has nothing to finish"
    );
    guest.negotiate();
    guest.driver_ok();
    assert_eq!(guest.calls.iter().take(3).count(), 3);

    guest.handle.pause().unwrap();
    guest.handle.pause().unwrap();
    guest.write(QUEUE_NOTIFY, 1);
    // Requests are served in order: had the notification been, its call would have come.
    guest.handle.counters().unwrap();
    let calls: Vec<_> = guest.calls.try_iter().collect();
    assert_eq!(calls, [Call::Pause]);

    guest.handle.resume().unwrap();
    guest.handle.resume().unwrap();
    assert_eq!(guest.calls.recv().unwrap(), Call::Queue(0));
    assert_eq!(guest.calls.recv().unwrap(), Call::Queue(1));
    assert_eq!(
        guest.calls.recv().unwrap(),
        Call::Queue(1),
        "the notification itself"
    );

    guest.handle.pause().unwrap();
    guest.write(STATUS, 0);
    let calls: Vec<_> = guest.calls.try_iter().collect();
    assert_eq!(calls, [Call::Pause, Call::Reset]);
}

#[test]
fn a_device_goes_on_where_another_one_was() {
    let mut guest = Guest::new(false);
    guest.negotiate();
    guest.set_up_queue(0, 0x1000);
    guest.driver_ok();
    assert!(guest.handle.save().is_err(), "it does not rest");
    guest.handle.pause().unwrap();
    let saved = guest.handle.save().unwrap();
    let text = serde_json::to_string(&saved).unwrap();
    let saved: VirtioState = serde_json::from_str(&text).unwrap();

    let mut other = Guest::restored(&saved).unwrap();
    let active = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;
    assert_eq!(other.read(STATUS), active);
    let features = VERSION_1;
    let ready = vec![true, false];
    assert_eq!(
        other.calls.recv().unwrap(),
        Call::Activate { features, ready }
    );
    assert!(other.calls.try_recv().is_err(), "it rests");
    other.handle.resume().unwrap();
    assert_eq!(other.calls.recv().unwrap(), Call::Queue(0));
    other.handle.pause().unwrap();
    assert_eq!(
        other.handle.save().unwrap(),
        saved,
        "and a third one would go on there"
    );
    other.write(STATUS, 0);
    assert_eq!(other.read(STATUS), 0);

    // One that nobody drives has no queues to go on with.
    let idle = Guest::new(false).handle.save().unwrap();
    assert_eq!(idle.device.queues, None);
    let mut idle = Guest::restored(&idle).unwrap();
    assert_eq!(idle.read(STATUS), 0);
    assert!(idle.calls.try_recv().is_err());
}

#[test]
fn a_state_that_the_device_cannot_have_is_refused() {
    let mut guest = Guest::new(false);
    guest.negotiate();
    guest.set_up_queue(0, 0x1000);
    guest.driver_ok();
    guest.handle.pause().unwrap();
    let saved = guest.handle.save().unwrap();
    let refused = |change: fn(&mut VirtioState)| {
        let mut state = saved.clone();
        change(&mut state);
        Guest::restored(&state).err().unwrap()
    };
    let kind = refused(|state| state.transport.device_id = 2);
    assert!(matches!(kind, RestoreError::Kind { saved: 2, here: 4 }));
    let features = refused(|state| state.transport.driver_features |= 1 << 40);
    assert!(matches!(features, RestoreError::Features { features } if features == 1 << 40));
    let fewer = refused(|state| state.device.queues.as_mut().unwrap().truncate(1));
    assert!(matches!(fewer, RestoreError::Queues { saved: 1, here: 2 }));
    let own = refused(|state| state.device.own = OwnState::Vsock { next_port: 0 });
    assert!(matches!(own, RestoreError::OwnState));
    // Its rings lie beyond the guest's memory.
    let outside = refused(|state| {
        let queue = &mut state.device.queues.as_mut().unwrap()[0];
        let mut text = serde_json::to_value(*queue).unwrap();
        text["used_ring"] = (1_u64 << 40).into();
        *queue = serde_json::from_value(text).unwrap();
    });
    assert!(matches!(outside, RestoreError::Activate(_)));
}

#[test]
fn a_change_of_a_device_is_told_to_its_driver() {
    let mut guest = Guest::new(false);
    let change = Control::ResizeDisk { size: 1 << 20 };
    guest.handle.control(change).unwrap();
    assert_eq!(guest.calls.recv().unwrap(), Call::Control(change));
    assert_eq!(guest.read(CONFIG_GENERATION), 1);
    assert_eq!(guest.read(INTERRUPT_STATUS), 0, "there is no driver yet");

    guest.negotiate();
    guest.driver_ok();
    guest.handle.control(change).unwrap();
    assert_eq!(guest.read(CONFIG_GENERATION), 2);
    assert_eq!(guest.read(INTERRUPT_STATUS), 2, "a change of configuration");
    guest.write(INTERRUPT_ACK, 2);

    let refused = guest.handle.control(Control::ResizeBalloon { size: 0 });
    assert!(matches!(refused, Err(ControlError::NotSupported)));
    assert_eq!(guest.read(CONFIG_GENERATION), 2);
    assert_eq!(guest.read(INTERRUPT_STATUS), 0);
    assert_eq!(guest.handle.counters().unwrap()["things"], 7);
    assert_eq!(guest.handle.name(), "fake");
}

#[test]
fn a_vcpu_does_not_wait_for_an_event_loop_that_has_ended() {
    let mut guest = Guest::new(false);
    guest.negotiate();
    guest.stop_event_loop();
    guest.driver_ok();
    guest.write(STATUS, 0);
    assert_eq!(guest.read(STATUS), 0);
    assert!(matches!(guest.handle.pause(), Err(ControlError::Ended)));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever is written, in whatever width, the registers answer, and a reset leads back to
    /// a device that works.
    #[test]
    fn any_accesses_leave_a_device_that_can_be_reset(
        accesses in prop::collection::vec(
            (0_u64..0x120, prop::sample::select(vec![1_usize, 2, 4, 8]), any::<u64>(), any::<bool>()),
            0..200,
        )
    ) {
        let mut guest = Guest::new(false);
        for (offset, width, value, write) in accesses {
            let mut data = value.to_le_bytes();
            if write {
                guest.registers.lock().unwrap().write(offset, &data[..width]);
            } else {
                guest.registers.lock().unwrap().read(offset, &mut data[..width]);
            }
        }
        guest.write(STATUS, 0);
        guest.negotiate();
        guest.set_up_queue(1, 0x1000);
        guest.driver_ok();
        prop_assert_eq!(guest.read(STATUS) & NEEDS_RESET, 0);
        let activated = guest.calls.iter().any(|call| {
            matches!(call, Call::Activate { ready, .. } if ready == [false, true])
        });
        prop_assert!(activated);
    }
}
