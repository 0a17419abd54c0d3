//! A device as the rest of the VMM sees it: asked from other threads, answered by the event loop.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use super::DeviceError;
use super::block::{ImageError, ImageFiles};
use super::mmio::MmioTransport;
use super::state::VirtioState;
use super::worker::Link;

/// What a device has done since it was made: name of the counter and its value.
pub type Counters = BTreeMap<&'static str, u64>;

/// A change of a device while its machine exists. It changes the device's configuration space, so
/// a driver that accepted the device is told to look there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Control {
    /// Makes a disk as large as this.
    ResizeDisk {
        /// New size in bytes.
        size: u64,
    },
    /// Asks the guest for this much of its memory.
    ResizeBalloon {
        /// Memory that the guest is to give up, in bytes.
        size: u64,
    },
    /// Offers the guest this much memory beyond what it booted with.
    ResizeMemory {
        /// Plugged memory that is aimed at, in bytes.
        size: u64,
    },
}

/// Why a device was not changed.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// It is not that kind of device.
    #[error("a device of this kind cannot be changed in this way")]
    NotSupported,
    /// It can be changed so, but not to this.
    #[error("{0}")]
    Refused(String),
    /// The host could not do its part.
    #[error("{action}")]
    Host {
        /// What was being done.
        action: &'static str,
        /// How the host answered.
        #[source]
        source: std::io::Error,
    },
    /// The image cannot be used.
    #[error("cannot use the disk image")]
    Image(#[source] ImageError),
    /// It could not finish what it was doing for its driver.
    #[error("the device cannot be brought to rest")]
    Device(#[source] DeviceError),
    /// The machine has ended.
    #[error("the machine has ended")]
    Ended,
}

/// A device of a machine, for every thread but the event loop: each call waits for that.
#[derive(Clone)]
pub struct DeviceHandle {
    name: Arc<str>,
    link: Link,
    transport: Arc<Mutex<MmioTransport>>,
}

impl DeviceHandle {
    pub(super) fn new(name: &str, link: Link, transport: Arc<Mutex<MmioTransport>>) -> Self {
        Self {
            name: name.into(),
            link,
            transport,
        }
    }

    /// The device's name in the API and in events.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Changes the device.
    ///
    /// # Errors
    /// It was not changed.
    pub fn control(&self, control: Control) -> Result<(), ControlError> {
        self.link.control(control)
    }

    /// Puts another image in the place of the one that a disk has. The device rests.
    ///
    /// # Errors
    /// The disk has the image that it had.
    pub fn replace_image(&self, files: ImageFiles) -> Result<(), ControlError> {
        self.link.replace_image(files)
    }

    /// What the device has done so far.
    ///
    /// # Errors
    /// The machine has ended.
    pub fn counters(&self) -> Result<Counters, ControlError> {
        self.link.counters()
    }

    /// Brings the device to rest: when this returns, nothing is under way, and neither the
    /// driver nor the host moves it before [`resume`](Self::resume). The vCPUs are to be paused
    /// already. A device at rest stays so.
    ///
    /// # Errors
    /// What was under way could not be finished, or the machine has ended.
    pub fn pause(&self) -> Result<(), ControlError> {
        self.link.pause()
    }

    /// The state of the device, which rests.
    ///
    /// # Errors
    /// It does not rest, or the machine has ended.
    pub fn save(&self) -> Result<VirtioState, ControlError> {
        let device = self.link.save()?;
        let transport = self.transport.lock();
        let transport = transport.unwrap_or_else(PoisonError::into_inner).save();
        Ok(VirtioState { transport, device })
    }

    /// Lets the device go on, with what has come up for it meanwhile.
    ///
    /// # Errors
    /// The machine has ended.
    pub fn resume(&self) -> Result<(), ControlError> {
        self.link.resume()
    }
}
