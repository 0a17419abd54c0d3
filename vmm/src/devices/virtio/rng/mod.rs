//! Entropy device (virtio 1.2, 5.4): fills the buffers of its one queue with random bytes.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use tracing::debug;
use vm_memory::{ReadVolatile, VolatileMemoryError};
use vmm_sys_util::epoll::EventSet;

use super::buffers::{Buffers, ChainBuffers};
use super::queue::ActiveQueue;
use super::state::{DeviceState, OwnState, RestoreError};
use super::{Activation, ControlError, DeviceError, DeviceKind, Source, VirtioDevice};
use crate::config::RngConfig;

/// Descriptors of the queue.
const QUEUE_SIZE: u16 = 64;

/// The most bytes that one chain receives. The device may use less than a buffer holds
/// (virtio 1.2, 5.4.6.2), and random bytes in bulk are for the guest's own generator to make.
const MAX_REQUEST: usize = 64 << 10;

/// Why the entropy device cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum RngError {
    /// The source of random bytes cannot be read.
    #[error("cannot open the entropy source {path}", path = path.display())]
    Open {
        /// The source.
        path: PathBuf,
        /// What the host says.
        #[source]
        source: io::Error,
    },
}

/// The entropy device.
#[derive(Debug)]
pub struct Rng {
    source: File,
    queue: Option<ActiveQueue>,
}

impl Rng {
    /// An entropy device that reads from `config.src`.
    ///
    /// # Errors
    /// The source cannot be opened.
    pub fn new(config: &RngConfig) -> Result<Self, RngError> {
        let source = OpenOptions::new()
            .read(true)
            // A source without bytes must not hold up the other devices.
            .custom_flags(libc::O_NONBLOCK)
            .open(&config.src)
            .map_err(|source| RngError::Open {
                path: config.src.clone(),
                source,
            })?;
        Ok(Self {
            source,
            queue: None,
        })
    }

    fn serve(&mut self) -> Result<(), DeviceError> {
        let Some(queue) = &mut self.queue else {
            return Ok(());
        };
        let source = &self.source;
        queue.serve(
            |memory, chain| match ChainBuffers::collect(memory, chain, QUEUE_SIZE.into()) {
                Ok(buffers) => fill(source, buffers.writable).map_err(|source| DeviceError::Host {
                    action: "reading the entropy source",
                    source,
                }),
                Err(error) => {
                    debug!(%error, "rng: malformed request");
                    Ok(0)
                }
            },
        )
    }
}

/// Fills the front of `buffers` and returns how many bytes that were.
fn fill(mut source: &File, mut buffers: Buffers<'_>) -> io::Result<u32> {
    let request = buffers.len().min(MAX_REQUEST);
    let Some(front) = buffers.split_front(request) else {
        return Ok(0);
    };
    for slice in front.slices() {
        let mut slice = *slice;
        source
            .read_exact_volatile(&mut slice)
            .map_err(|error| match error {
                VolatileMemoryError::IOError(error) => error,
                error => io::Error::other(error),
            })?;
    }
    u32::try_from(request).map_err(io::Error::other)
}

impl VirtioDevice for Rng {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Rng
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn save(&mut self) -> Result<DeviceState, ControlError> {
        Ok(DeviceState {
            queues: self.queue.as_ref().map(|queue| vec![queue.save()]),
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
        let [queue] = ActiveQueue::from_activation(activation)?;
        self.queue = Some(queue);
        Ok(())
    }

    fn sources(&self) -> Vec<Source> {
        self.queue.iter().map(|queue| queue.source(0)).collect()
    }

    fn process_queue(&mut self, _index: usize) -> Result<(), DeviceError> {
        self.serve()
    }

    fn process_source(&mut self, _token: u32, _ready: EventSet) -> Result<(), DeviceError> {
        self.serve()
    }

    fn reset(&mut self) {
        self.queue = None;
    }
}

#[cfg(test)]
mod tests;
