//! A queue of an active device: taking chains from the driver, giving them back, and telling it.
//!
//! The rules that every device shares are kept here:
//!
//! - One visit takes at most [`VISIT_CHAINS`] chains, so that a driver that adds buffers as fast
//!   as the device uses them does not keep the event loop from the other devices. What is left
//!   waits for the next turn of the loop, which the queue's own eventfd brings about.
//! - Notifications are asked for again only when the queue was found empty, and the queue is
//!   looked at once more afterwards (virtio 1.2, 2.7.7.1): a buffer that came in between is not
//!   forgotten.
//! - The interrupt is raised once a visit, if the driver asked for it (2.7.7.2).

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, GuestAddress};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::state::SavedQueue;
use super::{Activation, DeviceError, Interrupt, Source};
use crate::memory::GuestMemory;

/// The most chains that one visit to a queue takes.
pub const VISIT_CHAINS: usize = 64;

/// A chain of descriptors that the driver made available.
pub type Chain = DescriptorChain<Arc<GuestMemory>>;

/// A queue of an active device.
#[derive(Debug)]
pub struct ActiveQueue {
    index: usize,
    queue: Queue,
    memory: Arc<GuestMemory>,
    interrupt: Interrupt,
    /// Readable while chains are left over from a visit.
    unfinished: EventFd,
    /// Whether chains were used since the driver was last told.
    used: bool,
}

impl ActiveQueue {
    /// The queues of an activated device that has `N` of them.
    ///
    /// # Errors
    /// The activation has another number of queues, or the host has no descriptors left.
    pub fn from_activation<const N: usize>(
        activation: Activation,
    ) -> Result<[Self; N], DeviceError> {
        Self::all(activation)?
            .try_into()
            .map_err(|queues: Vec<_>| DeviceError::Host {
                action: "taking over the queues",
                source: io::Error::other(format!(
                    "the device has {N} queues, the transport {}",
                    queues.len()
                )),
            })
    }

    /// The queues of an activated device.
    ///
    /// # Errors
    /// The host has no descriptors left.
    pub fn all(activation: Activation) -> Result<Vec<Self>, DeviceError> {
        let memory = Arc::new(activation.memory);
        activation
            .queues
            .into_iter()
            .enumerate()
            .map(|(index, queue)| {
                Ok(Self {
                    index,
                    queue,
                    memory: Arc::clone(&memory),
                    interrupt: activation.interrupt.clone(),
                    unfinished: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
                    used: false,
                })
            })
            .collect::<io::Result<Vec<_>>>()
            .map_err(|source| DeviceError::Host {
                action: "creating the eventfd of a queue",
                source,
            })
    }

    /// How far the device has come with the queue.
    pub fn save(&self) -> SavedQueue {
        SavedQueue::of(&self.queue)
    }

    /// The guest memory that the chains of this queue point into.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// What to watch so that leftover chains get their turn. Once it is ready, the device has to
    /// visit the queue.
    pub fn source(&self, token: u32) -> Source {
        Source {
            fd: self.unfinished.as_raw_fd(),
            token,
            events: EventSet::IN,
        }
    }

    /// Serves the available chains: `handle` does what a chain asks for and returns the number of
    /// bytes that it wrote to the chain, counted from the first writable one.
    ///
    /// # Errors
    /// The rings are malformed, or `handle` failed.
    pub fn serve(
        &mut self,
        mut handle: impl FnMut(&GuestMemory, Chain) -> Result<u32, DeviceError>,
    ) -> Result<(), DeviceError> {
        let memory = Arc::clone(&self.memory);
        let mut visit = self.visit()?;
        while let Some(chain) = visit.next()? {
            let head = chain.head_index();
            let written = handle(&memory, chain)?;
            visit.queue.add_used(head, written)?;
        }
        self.announce()
    }

    /// Starts to take chains within the bounds of a visit.
    ///
    /// # Errors
    /// The rings are malformed.
    pub fn visit(&mut self) -> Result<Visit<'_>, DeviceError> {
        self.begin()?;
        Ok(Visit {
            queue: self,
            turns: 0,
        })
    }

    /// Starts to take chains in the device's own order: it says itself when it goes on with
    /// leftover chains ([`resume_later`](Self::resume_later)), waits for new ones
    /// ([`enable_notification`](Self::enable_notification)) and tells the driver
    /// ([`announce`](Self::announce)).
    ///
    /// # Errors
    /// The rings are malformed.
    pub fn begin(&mut self) -> Result<(), DeviceError> {
        // Whatever was left over is seen now. The eventfd does not block, and the only other
        // failure is that it was not set.
        let _ = self.unfinished.read();
        self.disable_notification()
    }

    /// The number of descriptors that the driver chose.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Takes the next available chain. A queue that the driver did not enable has none.
    ///
    /// # Errors
    /// The driver claims more available chains than the queue has room for.
    pub fn pop(&mut self) -> Result<Option<Chain>, DeviceError> {
        if !self.queue.ready() {
            return Ok(None);
        }
        match self.queue.iter(Arc::clone(&self.memory)) {
            Ok(mut chains) => Ok(chains.next()),
            Err(source) => Err(self.malformed(source)),
        }
    }

    /// Makes the chain that was taken last, and not used, available again.
    pub fn undo_pop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Gives a chain back to the driver, `written` bytes of it written.
    ///
    /// # Errors
    /// The chain's head lies outside of the descriptor table.
    pub fn add_used(&mut self, head: u16, written: u32) -> Result<(), DeviceError> {
        self.queue
            .add_used(self.memory.as_ref(), head, written)
            .map_err(|source| self.malformed(source))?;
        self.used = true;
        Ok(())
    }

    /// Asks the driver to notify the device of new chains. Returns whether there are some
    /// already, for which no notification may come.
    ///
    /// # Errors
    /// The rings are malformed.
    pub fn enable_notification(&mut self) -> Result<bool, DeviceError> {
        if !self.queue.ready() {
            return Ok(false);
        }
        self.queue
            .enable_notification(self.memory.as_ref())
            .map_err(|source| self.malformed(source))
    }

    /// How many chains the driver has made available so far, modulo 2^16.
    ///
    /// # Errors
    /// The rings are malformed.
    pub fn offered(&self) -> Result<u16, DeviceError> {
        self.queue
            .avail_idx(self.memory.as_ref(), Ordering::Acquire)
            .map(|index| index.0)
            .map_err(|source| self.malformed(source))
    }

    /// Asks the driver to notify the device of the chain after the first `offered` ones, whether
    /// or not the device has taken those.
    ///
    /// # Errors
    /// The rings are malformed.
    pub fn notify_beyond(&mut self, offered: u16) -> Result<(), DeviceError> {
        // Without the feature, the driver notifies the device of all or of none.
        self.enable_notification()?;
        if !self.queue.event_idx_enabled() {
            return Ok(());
        }
        // Behind the used ring: flags, index, and 8 bytes an element (virtio 1.2, 2.7.8).
        let place = 4 + 8 * u64::from(self.queue.size());
        let used = GuestAddress(self.queue.used_ring());
        let result = match used.checked_add(place) {
            Some(address) => self
                .memory
                .store(offered.to_le(), address, Ordering::SeqCst)
                .map_err(virtio_queue::Error::GuestMemory),
            None => Err(virtio_queue::Error::AddressOverflow),
        };
        result.map_err(|source| self.malformed(source))
    }

    /// Tells the driver not to notify the device of new chains.
    fn disable_notification(&mut self) -> Result<(), DeviceError> {
        if !self.queue.ready() {
            return Ok(());
        }
        self.queue
            .disable_notification(self.memory.as_ref())
            .map_err(|source| self.malformed(source))
    }

    /// Raises the interrupt if chains were used and the driver wants to know.
    ///
    /// # Errors
    /// The rings are malformed, or the interrupt could not be raised.
    pub fn announce(&mut self) -> Result<(), DeviceError> {
        if !self.used {
            return Ok(());
        }
        self.used = false;
        let wanted = self
            .queue
            .needs_notification(self.memory.as_ref())
            .map_err(|source| self.malformed(source))?;
        if wanted {
            self.interrupt
                .signal_used_buffers()
                .map_err(|source| DeviceError::Host {
                    action: "raising the interrupt",
                    source,
                })?;
        }
        Ok(())
    }

    /// Brings about another visit in a later turn of the event loop.
    ///
    /// # Errors
    /// The eventfd refused.
    pub fn resume_later(&self) -> Result<(), DeviceError> {
        self.unfinished
            .write(1)
            .map_err(|source| DeviceError::Host {
                action: "putting a queue off",
                source,
            })
    }

    fn malformed(&self, source: virtio_queue::Error) -> DeviceError {
        DeviceError::Queue {
            index: self.index,
            source,
        }
    }
}

/// A bounded walk through the available chains.
pub struct Visit<'q> {
    /// The queue, to give chains back.
    pub queue: &'q mut ActiveQueue,
    /// Looks at the ring, each of which may find a chain.
    turns: usize,
}

impl Visit<'_> {
    /// The next chain. `None` ends the visit: either the driver will notify the device of the next
    /// chain, or the queue's [`source`](ActiveQueue::source) is ready.
    ///
    /// # Errors
    /// The rings are malformed.
    #[expect(clippy::should_implement_trait, reason = "fallible")]
    pub fn next(&mut self) -> Result<Option<Chain>, DeviceError> {
        while self.turns < VISIT_CHAINS {
            self.turns += 1;
            if let Some(chain) = self.queue.pop()? {
                return Ok(Some(chain));
            }
            if !self.queue.enable_notification()? {
                return Ok(None);
            }
            self.queue.disable_notification()?;
        }
        self.queue.resume_later()?;
        Ok(None)
    }
}

#[cfg(test)]
mod tests;
