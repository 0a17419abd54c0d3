//! The interrupt of a virtio-mmio device: one line, two reasons.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};
use vmm_sys_util::eventfd::EventFd;

/// Raises the interrupt of one device and remembers why (virtio 1.2, 4.2.2, InterruptStatus).
///
/// Clones raise the same line.
#[derive(Debug, Clone)]
pub struct Interrupt {
    status: Arc<AtomicU32>,
    irqfd: Arc<EventFd>,
}

impl Interrupt {
    /// An interrupt that is raised by writing to `irqfd`.
    pub fn new(irqfd: EventFd) -> Self {
        Self {
            status: Arc::new(AtomicU32::new(0)),
            irqfd: Arc::new(irqfd),
        }
    }

    /// Tells the driver that the device has used buffers of a queue.
    ///
    /// # Errors
    /// The write to the irqfd failed.
    pub fn signal_used_buffers(&self) -> io::Result<()> {
        self.signal(VIRTIO_MMIO_INT_VRING)
    }

    /// Tells the driver that the device's configuration or status changed.
    ///
    /// # Errors
    /// The write to the irqfd failed.
    pub fn signal_config_change(&self) -> io::Result<()> {
        self.signal(VIRTIO_MMIO_INT_CONFIG)
    }

    /// The reasons not yet acknowledged.
    pub fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    /// The driver has seen the reasons in `bits`.
    pub fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::SeqCst);
    }

    /// Takes over the reasons of another device, and raises the line if there are some: whether the
    /// edge had reached the interrupt controller when those were saved is not known, and a driver
    /// that finds nothing new bears it.
    pub fn restore(&self, status: u32) {
        self.status.store(status, Ordering::SeqCst);
        if status != 0 {
            // Fails only if the counter is full, and then the line is about to be raised anyway.
            let _ = self.irqfd.write(1);
        }
    }

    /// The eventfd behind the line, to be bound to a GSI.
    pub fn irqfd(&self) -> &EventFd {
        &self.irqfd
    }

    fn signal(&self, reason: u32) -> io::Result<()> {
        // The status first: the guest reads it as soon as the line is raised.
        self.status.fetch_or(reason, Ordering::SeqCst);
        self.irqfd.write(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_is_reported_until_it_is_acknowledged() {
        let interrupt = Interrupt::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
        interrupt.signal_used_buffers().unwrap();
        interrupt.signal_config_change().unwrap();
        assert_eq!(
            interrupt.status(),
            VIRTIO_MMIO_INT_VRING | VIRTIO_MMIO_INT_CONFIG
        );
        assert_eq!(interrupt.irqfd().read().unwrap(), 2);

        interrupt.acknowledge(VIRTIO_MMIO_INT_VRING);
        assert_eq!(interrupt.status(), VIRTIO_MMIO_INT_CONFIG);

        let restored = Interrupt::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
        restored.restore(0);
        assert!(restored.irqfd().read().is_err());
        restored.restore(interrupt.status());
        assert_eq!(restored.status(), VIRTIO_MMIO_INT_CONFIG);
        assert_eq!(restored.irqfd().read().unwrap(), 1);
    }
}
