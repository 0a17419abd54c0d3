//! Virtio devices (Virtual I/O Device specification 1.2) behind the MMIO transport.
//!
//! A device is three things that live on two kinds of threads:
//!
//! - its registers ([`mmio`]), which vCPU threads read and write;
//! - its behaviour, a [`VirtioDevice`], which only the event loop runs;
//! - its [`Interrupt`], which the behaviour raises and the registers report.
//!
//! A vCPU thread never runs device code: a queue notification is an ioeventfd, and activation
//! and reset are messages to the event loop.

pub mod balloon;
pub mod block;
pub mod buffers;
pub mod config_space;
pub mod control;
pub mod interrupt;
pub mod mem;
pub mod mmio;
pub mod net;
pub mod queue;
pub mod rng;
pub mod state;
#[cfg(any(test, fuzzing))]
#[allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::panic,
    reason = "for tests and fuzz targets only"
)]
pub mod testing;
#[cfg(test)]
mod transport_tests;
pub mod vsock;
pub mod worker;

use std::os::fd::RawFd;

use virtio_queue::Queue;
use vmm_sys_util::epoll::EventSet;

pub use control::{Control, ControlError, Counters, DeviceHandle};
pub use interrupt::Interrupt;

use crate::memory::GuestMemory;
use block::ImageFiles;
use state::{DeviceState, OwnState, RestoreError};

/// Virtio device types (virtio 1.2, section 5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum DeviceKind {
    /// Network card (5.1).
    Net = 1,
    /// Block device (5.2).
    Block = 2,
    /// Entropy source (5.4).
    Rng = 4,
    /// Memory balloon (5.5).
    Balloon = 5,
    /// Socket device (5.10).
    Vsock = 19,
    /// Memory device (5.15).
    Mem = 24,
}

/// What a device receives when its driver has set `DRIVER_OK`.
pub struct Activation {
    /// The guest's RAM.
    pub memory: GuestMemory,
    /// The features that device and driver agreed on.
    pub features: u64,
    /// The queues in index order, each checked to lie in guest memory. Queues that the driver
    /// left disabled are there too, not ready.
    pub queues: Vec<Queue>,
    /// Raises the device's interrupt.
    pub interrupt: Interrupt,
}

/// A file descriptor, other than a queue's notification, on which an activated device waits.
#[derive(Debug, Clone, Copy)]
pub struct Source {
    /// Watched from activation to reset. The device owns it and keeps it open that long.
    pub fd: RawFd,
    /// Handed back to [`VirtioDevice::process_source`].
    pub token: u32,
    /// What to wait for. Level-triggered unless it holds `EDGE_TRIGGERED`.
    pub events: EventSet,
}

/// Why a device stopped serving its driver. The transport then sets `DEVICE_NEEDS_RESET`
/// (virtio 1.2, 2.1.2): the guest that broke the device may reset it, and nobody else is
/// touched.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The driver broke the rules of the queue.
    #[error("queue {index}: the driver's rings are malformed")]
    Queue {
        /// Index of the queue.
        index: usize,
        /// What the queue found.
        #[source]
        source: virtio_queue::Error,
    },
    /// The host side of the device failed.
    #[error("{action}")]
    Host {
        /// What was being done.
        action: &'static str,
        /// How the host answered.
        #[source]
        source: std::io::Error,
    },
}

/// The behaviour of a virtio device. Every call comes from the event loop, except those to
/// [`features`](Self::features), [`read_config`](Self::read_config) and
/// [`write_config`](Self::write_config), which serve a register access of a vCPU.
pub trait VirtioDevice: Send {
    /// The device type that the registers report.
    fn kind(&self) -> DeviceKind;

    /// The size limit of each queue, a power of two; the length is the number of queues.
    fn queue_max_sizes(&self) -> &[u16];

    /// The device type's own feature bits. The transport adds `VERSION_1`, `RING_EVENT_IDX`
    /// and `RING_INDIRECT_DESC`.
    fn features(&self) -> u64;

    /// Reads the device configuration space. `data` is 1, 2, 4 or 8 bytes long; whatever lies
    /// past the end of the space stays as it is (zero).
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes the device configuration space. Writes to read-only fields are ignored.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// What the device has done since it was made.
    fn counters(&self) -> Counters {
        Counters::new()
    }

    /// Changes the device, active or not. The configuration space shows the change when this
    /// returns.
    ///
    /// # Errors
    /// The device is as it was.
    fn control(&mut self, _control: Control) -> Result<(), ControlError> {
        Err(ControlError::NotSupported)
    }

    /// Puts another image in the place of the one that the disk has, while nothing is under way.
    ///
    /// # Errors
    /// The disk has the image that it had.
    fn replace_image(&mut self, _files: ImageFiles) -> Result<(), ControlError> {
        Err(ControlError::NotSupported)
    }

    /// Finishes what is under way, so that nothing moves until the event loop calls
    /// [`process_queue`](Self::process_queue) for every queue again.
    ///
    /// # Errors
    /// It cannot be finished: the device will be reset.
    fn pause(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }

    /// How far the device has come with each of its queues, if it is active and rests, and what
    /// else it remembers. What it holds back from the host is written out before.
    ///
    /// # Errors
    /// The host does not take it.
    fn save(&mut self) -> Result<DeviceState, ControlError>;

    /// Takes over what another device of this kind remembered, after
    /// [`activate`](Self::activate) if that was active.
    ///
    /// # Errors
    /// It cannot.
    fn restore(&mut self, own: &OwnState) -> Result<(), RestoreError>;

    /// Starts to serve the driver. The event loop calls [`process_queue`](Self::process_queue)
    /// for every queue right after, since notifications may have come before.
    ///
    /// # Errors
    /// The host resources of the device cannot serve the features or queues agreed on.
    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError>;

    /// The descriptors to watch while the device is active. Asked after `activate` and after a
    /// pause.
    fn sources(&self) -> Vec<Source> {
        Vec::new()
    }

    /// The driver notified queue `index`.
    ///
    /// # Errors
    /// The device cannot go on: it will be reset.
    fn process_queue(&mut self, index: usize) -> Result<(), DeviceError>;

    /// One of [`sources`](Self::sources) is ready.
    ///
    /// # Errors
    /// The device cannot go on: it will be reset.
    fn process_source(&mut self, _token: u32, _ready: EventSet) -> Result<(), DeviceError> {
        Ok(())
    }

    /// Forgets the driver: drops the queues and whatever was under way, so that the device is
    /// as it was before `activate`.
    fn reset(&mut self);
}
