//! The platform's events: what the VMM tells the guest's ACPI, by the interrupt of the generic
//! event device (ACPI 6.5, 5.6.9).
//!
//! One interrupt line serves all events. A 32-bit register holds a bit for each that has occurred
//! and was not seen yet; `_EVT` of the event device reads the register, writes the bits back,
//! which clears them, and notifies the devices that they are about.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use vmm_sys_util::eventfd::EventFd;

use super::bus::BusDevice;
use crate::memory::GuestMemory;

/// Something that ACPI tells the guest's system of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum PlatformEvent {
    /// The machine has another generation ID: it was restored, or cloned.
    GenerationChanged = 1 << 0,
    /// The CPU hotplug registers hold something new.
    Cpus = 1 << 1,
    /// The power button was pressed: the system is asked to power off.
    PowerButton = 1 << 2,
}

/// Raises platform events. Clones raise events of the same machine.
#[derive(Debug, Clone)]
pub struct PlatformEvents {
    pending: Arc<AtomicU32>,
    irqfd: Arc<EventFd>,
}

impl PlatformEvents {
    /// Events whose interrupt is raised by writing to `irqfd`.
    pub fn new(irqfd: EventFd) -> Self {
        Self {
            pending: Arc::default(),
            irqfd: Arc::new(irqfd),
        }
    }

    /// Tells the guest of an event. If it was not yet seen, it is not told of twice.
    ///
    /// # Errors
    /// The interrupt cannot be raised.
    pub fn raise(&self, event: PlatformEvent) -> io::Result<()> {
        // The bit first: the guest reads it as soon as the line is raised.
        self.pending.fetch_or(event as u32, Ordering::SeqCst);
        self.irqfd.write(1)
    }

    /// The events that the guest has not seen, a bit for each.
    pub fn pending(&self) -> u32 {
        self.pending.load(Ordering::SeqCst)
    }

    /// Takes over the events that the guest of a snapshot had not seen, and one more: that it has
    /// another generation ID.
    ///
    /// # Errors
    /// The interrupt cannot be raised.
    pub fn restore(&self, pending: u32) -> io::Result<()> {
        self.pending.store(pending, Ordering::SeqCst);
        self.raise(PlatformEvent::GenerationChanged)
    }

    /// The eventfd behind the line, to be bound to its GSI.
    pub fn irqfd(&self) -> &EventFd {
        &self.irqfd
    }

    /// The register, for the bus.
    pub fn register(&self) -> EventRegister {
        EventRegister(self.pending.clone())
    }
}

/// The register of pending events: 32 bits, which are cleared by writing ones.
pub struct EventRegister(Arc<AtomicU32>);

impl BusDevice for EventRegister {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        if let Ok(data) = <&mut [u8; 4]>::try_from(data) {
            *data = self.0.load(Ordering::SeqCst).to_le_bytes();
        }
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        if let Ok(data) = data.try_into() {
            self.0
                .fetch_and(!u32::from_le_bytes(data), Ordering::SeqCst);
        }
    }

    fn describe(&self, _memory: &GuestMemory) -> Vec<String> {
        let pending = self.0.load(Ordering::SeqCst);
        vec![format!("platform events pending={pending:#x}")]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_pending_until_the_guest_has_seen_it() {
        let events = PlatformEvents::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
        let mut register = events.register();
        let mut pending = |clear: u32| {
            let mut data = [0; 4];
            register.read(0, &mut data);
            register.write(0, &clear.to_le_bytes());
            u32::from_le_bytes(data)
        };
        events.raise(PlatformEvent::Cpus).unwrap();
        events.raise(PlatformEvent::PowerButton).unwrap();
        assert_eq!(events.irqfd().read().unwrap(), 2);
        assert_eq!(pending(1 << 1), 0b110);
        assert_eq!(pending(u32::MAX), 0b100);
        assert_eq!(pending(0), 0);

        // Accesses of other widths read as nothing is there, and clear nothing.
        events.raise(PlatformEvent::Cpus).unwrap();
        register.write(0, &[0xff]);
        let mut byte = [0xff];
        register.read(0, &mut byte);
        assert_eq!((byte, register.0.load(Ordering::SeqCst)), ([0xff], 0b10));
    }
}
