//! vCPUs that come and go while the machine runs.
//!
//! Every vCPU is in one of these states, of which the guest sees whether it is present:
//!
//! ```text
//!             set_target: inserted                    set_target: removal requested
//!    Absent ───────────────────────► Present ─────────────────────────► Leaving
//!      ▲                               │  ▲                                │  │
//!      │                               │  └────── the guest refuses ───────┘  │
//!      └── the guest ejects it ────────┴──────────────────────────────────────┘
//! ```
//!
//! The host asks, the guest acts: an inserted vCPU runs once the guest starts it, and one that is
//! to leave runs until the guest has stopped and ejected it. A vCPU that is absent is kept out of
//! the guest, whatever interrupts other vCPUs send it. vCPU 0 never leaves.
//!
//! The guest's ACPI reads and writes these registers of 32 bits, from the methods of the
//! processor devices; a bit stands for the vCPU of that number:
//!
//! | offset | register | read | write |
//! |---|---|---|---|
//! | 0 | present | the vCPUs that are present | nothing |
//! | 4 | inserted | those inserted and not yet seen | clears the bits written |
//! | 8 | leaving | those to eject and not yet seen | clears the bits written |
//! | 12 | eject | 0 | ejects the vCPU of the number written |
//! | 16 | status | 0 | outcome for a vCPU: number, status of `_OST` << 8, event << 24 |

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use super::bus::BusDevice;
use super::events::{PlatformEvent, PlatformEvents};
use crate::events::{Event, EventStream};
use crate::kvm::vcpu::VcpuGate;
use crate::memory::GuestMemory;

/// Size of the registers in bytes.
pub const REGISTERS_SIZE: u16 = 20;

const PRESENT: u64 = 0;
const INSERTED: u64 = 4;
const LEAVING: u64 = 8;
const EJECT: u64 = 12;
const STATUS: u64 = 16;

/// The event of `_OST` that is the answer to a request to eject (ACPI 6.5, table 6.70).
const EVENT_EJECT_REQUEST: u8 = 3;
/// "Ejection in progress" (table 6.72): not an outcome yet.
const STATUS_IN_PROGRESS: u16 = 0x84;

/// Why the number of vCPUs was not changed.
#[derive(Debug, thiserror::Error)]
pub enum TargetError {
    /// The machine cannot have as many, or as few.
    #[error("{asked} vCPUs asked for; this machine has 1 to {max}")]
    Range {
        /// The number asked for.
        asked: u8,
        /// The most that it can have.
        max: u8,
    },
    /// The guest has not done yet what was asked before.
    #[error("the guest has not yet given up the vCPUs that it was asked for")]
    RemovalPending,
    /// The guest cannot be told.
    #[error("cannot raise the interrupt")]
    Interrupt(#[source] io::Error),
}

/// Keeps a vCPU out of the guest, or lets it in.
pub trait Gate: Send + Sync {
    /// Keeps it out.
    fn park(&self);
    /// Lets it in.
    fn unpark(&self);
}

impl Gate for VcpuGate {
    fn park(&self) {
        Self::park(self);
    }

    fn unpark(&self) {
        Self::unpark(self);
    }
}

/// Which vCPUs a guest has, in a snapshot. A bit stands for the vCPU of that number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuHotplugState {
    present: u32,
    leaving: u32,
    unseen_inserted: u32,
    unseen_leaving: u32,
}

/// The vCPUs of one machine. Clones are about the same.
#[derive(Clone)]
pub struct CpuHotplug {
    state: Arc<Mutex<State>>,
    interrupt: PlatformEvents,
    events: EventStream,
}

struct State {
    gates: Vec<Arc<dyn Gate>>,
    present: u32,
    /// Those of `present` that the guest was asked to eject.
    leaving: u32,
    /// Those of `present` that the guest has not seen come.
    unseen_inserted: u32,
    /// Those of `leaving` whose request the guest has not seen.
    unseen_leaving: u32,
}

impl State {
    fn absent(&self) -> impl DoubleEndedIterator<Item = usize> + use<> {
        let present = self.present;
        (0..self.gates.len()).filter(move |index| present & (1 << index) == 0)
    }
}

impl CpuHotplug {
    /// Registers and control for vCPUs with these gates, at most 32, of which the first `boot`
    /// are present. The others are parked.
    pub fn new(
        gates: Vec<Arc<dyn Gate>>,
        boot: u8,
        interrupt: PlatformEvents,
        events: EventStream,
    ) -> Self {
        for gate in gates.iter().skip(boot.into()) {
            gate.park();
        }
        let present = (1_u64 << boot.min(32)) as u32;
        Self {
            state: Arc::new(Mutex::new(State {
                gates,
                present: present.wrapping_sub(1),
                leaving: 0,
                unseen_inserted: 0,
                unseen_leaving: 0,
            })),
            interrupt,
            events,
        }
    }

    /// The registers, for the bus.
    pub fn registers(&self) -> CpuRegisters {
        CpuRegisters(self.clone())
    }

    /// How many vCPUs the guest has, those included that it has yet to start or to give up.
    pub fn present(&self) -> u8 {
        self.state().present.count_ones() as u8
    }

    /// Asks the guest for as many vCPUs. The event stream tells what came of it: `vcpus_changed`
    /// when it has taken note of new ones and for each that it has given up,
    /// `vcpu_removal_refused` if it keeps one.
    ///
    /// Asking once more for the number that the guest is already on its way to tells it again.
    ///
    /// # Errors
    /// Not that many are possible, or an earlier request to give up vCPUs has not been served.
    pub fn set_target(&self, target: u8) -> Result<(), TargetError> {
        let mut state = self.state();
        // At most 32.
        let max = state.gates.len() as u8;
        if !(1..=max).contains(&target) {
            return Err(TargetError::Range { asked: target, max });
        }
        let staying = (state.present & !state.leaving).count_ones();
        let target = u32::from(target);
        if target != staying && state.leaving != 0 {
            return Err(TargetError::RemovalPending);
        }
        if target > staying {
            let count = (target - staying) as usize;
            let chosen: Vec<_> = state.absent().take(count).collect();
            for index in chosen {
                state.present |= 1 << index;
                state.unseen_inserted |= 1 << index;
                // Before the guest knows of it: it may start it at once.
                if let Some(gate) = state.gates.get(index) {
                    gate.unpark();
                }
            }
        } else if target < staying {
            // The last ones, so that numbers stay low. Never 0: at least one stays.
            for index in (1..32).rev() {
                let bit = 1 << index;
                if (state.present & !state.leaving).count_ones() > target
                    && state.present & bit != 0
                {
                    state.leaving |= bit;
                }
            }
        }
        state.unseen_leaving = state.leaving;
        if state.unseen_inserted | state.unseen_leaving == 0 {
            return Ok(());
        }
        drop(state);
        self.interrupt
            .raise(PlatformEvent::Cpus)
            .map_err(TargetError::Interrupt)
    }

    /// Which vCPUs the guest has, for a snapshot.
    pub fn save(&self) -> CpuHotplugState {
        let state = self.state();
        CpuHotplugState {
            present: state.present,
            leaving: state.leaving,
            unseen_inserted: state.unseen_inserted,
            unseen_leaving: state.unseen_leaving,
        }
    }

    /// Takes over which vCPUs the guest has. Bits of vCPUs that there are not count for nothing,
    /// and vCPU 0 is always there.
    pub fn restore(&self, saved: CpuHotplugState) {
        let mut state = self.state();
        let all = (1_u64 << state.gates.len().min(32)) - 1;
        state.present = saved.present & all as u32 | 1;
        state.leaving = saved.leaving & state.present & !1;
        state.unseen_inserted = saved.unseen_inserted & state.present;
        state.unseen_leaving = saved.unseen_leaving & state.leaving;
        for (index, gate) in state.gates.iter().enumerate() {
            if state.present & (1 << index) == 0 {
                gate.park();
            } else {
                gate.unpark();
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn changed(&self, vcpus: u8) {
        self.events.emit(&Event::VcpusChanged { vcpus });
    }

    fn seen_inserted(&self, bits: u32) {
        let mut state = self.state();
        let news = state.unseen_inserted & bits;
        state.unseen_inserted &= !bits;
        let vcpus = state.present.count_ones() as u8;
        drop(state);
        if news != 0 {
            self.changed(vcpus);
        }
    }

    fn eject(&self, index: u32) {
        let mut state = self.state();
        let bit = 1_u32.checked_shl(index).unwrap_or(0);
        // The guest stands on vCPU 0.
        if index == 0 || state.present & bit == 0 {
            return;
        }
        state.present &= !bit;
        state.leaving &= !bit;
        state.unseen_inserted &= !bit;
        state.unseen_leaving &= !bit;
        if let Some(gate) = state.gates.get(index as usize) {
            gate.park();
        }
        let vcpus = state.present.count_ones() as u8;
        drop(state);
        self.changed(vcpus);
    }

    /// What `_OST` says: the number of the vCPU, the status and the event that it is about.
    fn outcome(&self, value: u32) {
        let [index, status_low, status_high, event] = value.to_le_bytes();
        let status = u16::from_le_bytes([status_low, status_high]);
        tracing::debug!(index, status, event, "the guest's word on a vCPU");
        if event != EVENT_EJECT_REQUEST || matches!(status, 0 | STATUS_IN_PROGRESS) {
            return;
        }
        let mut state = self.state();
        let bit = 1_u32.checked_shl(index.into()).unwrap_or(0);
        if state.leaving & bit == 0 {
            return;
        }
        state.leaving &= !bit;
        state.unseen_leaving &= !bit;
        drop(state);
        self.events.emit(&Event::VcpuRemovalRefused { vcpu: index });
    }
}

/// The registers of [`CpuHotplug`].
pub struct CpuRegisters(CpuHotplug);

impl BusDevice for CpuRegisters {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let Ok(data) = <&mut [u8; 4]>::try_from(data) else {
            return;
        };
        let state = self.0.state();
        let value = match offset {
            PRESENT => state.present,
            INSERTED => state.unseen_inserted,
            LEAVING => state.unseen_leaving,
            _ => 0,
        };
        *data = value.to_le_bytes();
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let Ok(data) = data.try_into() else { return };
        let value = u32::from_le_bytes(data);
        match offset {
            INSERTED => self.0.seen_inserted(value),
            LEAVING => self.0.state().unseen_leaving &= !value,
            EJECT => self.0.eject(value),
            STATUS => self.0.outcome(value),
            _ => {}
        }
    }

    fn describe(&self, _memory: &GuestMemory) -> Vec<String> {
        let state = self.0.state();
        vec![format!(
            "vCPU hotplug present={:#x} leaving={:#x} unseen_inserted={:#x} unseen_leaving={:#x}",
            state.present, state.leaving, state.unseen_inserted, state.unseen_leaving
        )]
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Instant;

    use proptest::prelude::*;
    use vmm_sys_util::eventfd::EventFd;

    use super::*;

    #[derive(Default)]
    struct FakeGate(AtomicBool);

    impl Gate for FakeGate {
        fn park(&self) {
            self.0.store(true, Ordering::SeqCst);
        }

        fn unpark(&self) {
            self.0.store(false, Ordering::SeqCst);
        }
    }

    struct Guest {
        hotplug: CpuHotplug,
        registers: CpuRegisters,
        gates: Vec<Arc<FakeGate>>,
    }

    impl Guest {
        fn new(boot: u8, max: u8) -> Self {
            let gates: Vec<_> = (0..max).map(|_| Arc::new(FakeGate::default())).collect();
            let interrupt = PlatformEvents::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
            let shared = gates.iter().map(|gate| gate.clone() as Arc<dyn Gate>);
            let events = EventStream::new(Instant::now(), None);
            let hotplug = CpuHotplug::new(shared.collect(), boot, interrupt, events);
            let registers = hotplug.registers();
            Self {
                hotplug,
                registers,
                gates,
            }
        }

        fn read(&mut self, offset: u64) -> u32 {
            let mut data = [0; 4];
            self.registers.read(offset, &mut data);
            u32::from_le_bytes(data)
        }

        fn write(&mut self, offset: u64, value: u32) {
            self.registers.write(offset, &value.to_le_bytes());
        }

        fn parked(&self) -> Vec<bool> {
            let gates = self.gates.iter();
            gates.map(|gate| gate.0.load(Ordering::SeqCst)).collect()
        }

        fn interrupts(&self) -> u64 {
            self.hotplug.interrupt.irqfd().read().unwrap_or(0)
        }
    }

    #[test]
    fn vcpus_come_and_go() {
        let mut guest = Guest::new(1, 4);
        assert_eq!(guest.parked(), [false, true, true, true]);
        guest.hotplug.set_target(3).unwrap();
        assert_eq!(guest.interrupts(), 1);
        assert_eq!(guest.parked(), [false, false, false, true]);
        assert_eq!((guest.read(PRESENT), guest.read(INSERTED)), (0b111, 0b110));
        guest.write(INSERTED, 0b110);
        assert_eq!(guest.read(INSERTED), 0);
        guest.hotplug.set_target(3).unwrap();
        assert_eq!(guest.interrupts(), 0, "there is nothing to tell");

        guest.hotplug.set_target(1).unwrap();
        assert_eq!(guest.interrupts(), 1);
        assert_eq!(guest.read(LEAVING), 0b110);
        guest.write(LEAVING, 0b110);
        assert_eq!((guest.read(LEAVING), guest.hotplug.present()), (0, 3));
        let early = guest.hotplug.set_target(2);
        assert!(matches!(early, Err(TargetError::RemovalPending)));
        guest.hotplug.set_target(1).unwrap();
        assert_eq!(guest.read(LEAVING), 0b110, "told again");
        guest.write(EJECT, 2);
        assert_eq!(guest.parked(), [false, false, true, true]);
        guest.write(EJECT, 1);
        assert_eq!((guest.read(PRESENT), guest.hotplug.present()), (1, 1));
        assert_eq!(guest.parked(), [false, true, true, true]);

        guest.hotplug.set_target(4).unwrap();
        assert_eq!(guest.read(PRESENT), 0b1111);
    }

    #[test]
    fn a_guest_may_keep_a_vcpu() {
        let mut guest = Guest::new(2, 2);
        guest.hotplug.set_target(1).unwrap();
        // In progress, about another event, for another vCPU: no outcome.
        for value in [0x0300_8401, 0x0100_0101, 0x0300_0100, 0x0300_01ff] {
            guest.write(STATUS, value);
            assert!(guest.hotplug.set_target(2).is_err(), "{value:#x}");
        }
        guest.write(STATUS, 0x0300_8201);
        assert_eq!((guest.read(LEAVING), guest.hotplug.present()), (0, 2));
        guest.hotplug.set_target(2).unwrap();
        guest.hotplug.set_target(1).unwrap();
        assert_eq!(guest.read(LEAVING), 0b10);
    }

    #[test]
    fn a_machine_has_as_many_vcpus_as_it_was_made_with() {
        let guest = Guest::new(32, 32);
        assert_eq!(guest.hotplug.present(), 32);
        for target in [0, 33, u8::MAX] {
            let refused = guest.hotplug.set_target(target);
            assert!(matches!(refused, Err(TargetError::Range { max: 32, .. })));
        }
    }

    proptest! {
        /// Whatever a guest writes: vCPU 0 stays, absent ones are parked, present ones are not.
        #[test]
        fn gates_follow_what_is_present(
            steps in prop::collection::vec(
                (any::<bool>(), 0_u8..6, 0_u64..24, prop_oneof![0_u32..8, any::<u32>()]), 0..60),
        ) {
            let mut guest = Guest::new(2, 4);
            for (host, target, offset, value) in steps {
                if host {
                    let _ = guest.hotplug.set_target(target);
                } else {
                    guest.write(offset, value);
                }
                let present = guest.read(PRESENT);
                prop_assert_eq!(present & !0b1111, 0);
                prop_assert_eq!(present & 1, 1);
                let expected: Vec<_> = (0..4).map(|index| present & (1 << index) == 0).collect();
                prop_assert_eq!(guest.parked(), expected);
                prop_assert_eq!((guest.read(INSERTED) | guest.read(LEAVING)) & !present, 0);
            }
        }
    }
}
