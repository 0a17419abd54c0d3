//! The receive queue (virtio 1.2, 5.1.6.3): frames go from the tap straight into the buffers that
//! the driver supplied.
//!
//! How large a frame is shows only when it is read, so it is read once there is room for the
//! largest. With `MRG_RXBUF` the room is that of several chains, of which the frame takes as many
//! as it fills; without, it is that of one. Chains are checked when they are taken from the queue
//! and then wait here for their frame.
//!
//! A queue may receive from several queues of the tap: the host spreads frames over all of those,
//! whether or not the driver uses as many.

use std::collections::VecDeque;
use std::io;

use tracing::{debug, warn};
use vm_memory::{GuestAddress, GuestMemory as _, Permissions};

use super::counters::NetCounters;
use super::{HEADER_SIZE, NUM_BUFFERS_OFFSET, Tap, timer_failed};
use crate::devices::virtio::DeviceError;
use crate::devices::virtio::buffers::{Buffers, ChainError, walk};
use crate::devices::virtio::queue::{ActiveQueue, Chain};
use crate::memory::GuestMemory;
use crate::rate_limiter::RateLimiter;

/// The most steps of one visit: a step takes a chain from the queue or a frame from the tap.
const VISIT_STEPS: usize = 256;

/// With so many pieces waiting, no more are collected to make room for the largest frame.
const ENOUGH_PIECES: usize = 512;

/// The receiving side of an active device.
pub struct Receiver {
    queue: ActiveQueue,
    /// The largest frame with its header, in bytes.
    largest: usize,
    /// Whether a frame may be spread over several chains.
    mergeable: bool,
    /// Chains that were taken from the queue, in that order.
    waiting: VecDeque<Waiting>,
    /// The bytes in `waiting`.
    room: usize,
    /// The pieces in `waiting`.
    pieces: usize,
    /// Whether a malformed chain was given back from between those in `waiting`.
    gaps: bool,
}

/// One queue of the tap, on which frames come in.
pub struct Inlet {
    tap: Tap,
    /// Whether there may be a frame. The tap tells once, when it gets one and had none before.
    ready: bool,
    /// Whether the tap is gone.
    lost: bool,
}

impl Inlet {
    pub fn new(tap: Tap) -> Self {
        Self {
            tap,
            ready: true,
            lost: false,
        }
    }

    pub fn tap(&self) -> &Tap {
        &self.tap
    }

    pub fn tap_mut(&mut self) -> &mut Tap {
        &mut self.tap
    }

    /// The tap has told that it has a frame, or it is not known what it has told.
    pub fn set_ready(&mut self) {
        self.ready = true;
    }
}

/// A chain that waits for a frame. All of it lies in guest memory.
struct Waiting {
    head: u16,
    pieces: Vec<(GuestAddress, usize)>,
    len: usize,
}

impl Receiver {
    pub fn new(queue: ActiveQueue, largest: usize, mergeable: bool) -> Self {
        Self {
            queue,
            largest,
            mergeable,
            waiting: VecDeque::new(),
            room: 0,
            pieces: 0,
            gaps: false,
        }
    }

    pub fn queue(&self) -> &ActiveQueue {
        &self.queue
    }

    /// Receives frames until there are none, there is no room, the limiter bars the way, or others
    /// have waited enough. Frames are taken from the inlets by turns.
    ///
    /// # Errors
    /// The rings are malformed.
    pub fn receive(
        &mut self,
        inlets: &mut [&mut Inlet],
        limiter: &mut RateLimiter,
        counters: &NetCounters,
    ) -> Result<(), DeviceError> {
        self.queue.begin()?;
        let mut steps = 0;
        let mut turn = 0;
        while inlets.iter().any(|inlet| inlet.ready && !inlet.lost) {
            if steps == VISIT_STEPS {
                self.queue.resume_later()?;
                break;
            }
            steps += 1;
            if self.has_room() {
                let next = (turn + 1) % inlets.len();
                let inlet = &mut inlets[turn];
                turn = next;
                if inlet.ready && !inlet.lost {
                    let most = (self.largest - HEADER_SIZE) as u64;
                    if !limiter.admits(most).map_err(timer_failed)? {
                        break;
                    }
                    self.receive_frame(inlet, limiter, counters)?;
                }
            } else if let Some(chain) = self.queue.pop()? {
                self.take(chain)?;
            } else if !self.queue.enable_notification()? {
                break;
            }
        }
        self.queue.announce()
    }

    /// Makes the chains that wait for a frame available again, so that the rings alone tell what
    /// the driver has given.
    ///
    /// # Errors
    /// The rings are malformed.
    pub fn put_back(&mut self) -> Result<(), DeviceError> {
        while let Some(chain) = self.waiting.pop_back() {
            if self.gaps {
                // Which ones the driver has back already, the ring does not tell.
                self.queue.add_used(chain.head, 0)?;
            } else {
                self.queue.undo_pop();
            }
        }
        (self.room, self.pieces, self.gaps) = (0, 0, false);
        self.queue.announce()
    }

    fn has_room(&self) -> bool {
        if self.mergeable {
            self.room >= self.largest
                || self.pieces >= ENOUGH_PIECES
                // The driver has no more to give.
                || self.waiting.len() == usize::from(self.queue.size())
        } else {
            !self.waiting.is_empty()
        }
    }

    /// Checks a chain and lets it wait. A malformed one goes back empty.
    fn take(&mut self, chain: Chain) -> Result<(), DeviceError> {
        let head = chain.head_index();
        let limit = self.queue.size().into();
        match check(self.queue.memory(), chain, limit) {
            Ok(waiting) if waiting.len >= HEADER_SIZE => {
                self.room += waiting.len;
                self.pieces += waiting.pieces.len();
                self.waiting.push_back(waiting);
                Ok(())
            }
            Ok(waiting) => {
                debug!(waiting.len, "net: receive buffer without room for a header");
                self.reject(head)
            }
            Err(error) => {
                debug!(%error, "net: malformed receive buffer");
                self.reject(head)
            }
        }
    }

    fn reject(&mut self, head: u16) -> Result<(), DeviceError> {
        self.gaps |= !self.waiting.is_empty();
        self.queue.add_used(head, 0)
    }

    fn receive_frame(
        &mut self,
        inlet: &mut Inlet,
        limiter: &mut RateLimiter,
        counters: &NetCounters,
    ) -> Result<(), DeviceError> {
        let memory = self.queue.memory().clone();
        let chains = if self.mergeable {
            self.waiting.len()
        } else {
            1
        };
        let mut buffers = Buffers::default();
        for (addr, len) in self
            .waiting
            .iter()
            .take(chains)
            .flat_map(|chain| &chain.pieces)
        {
            buffers
                .append(&memory, *addr, *len, Permissions::Write)
                .map_err(|error| DeviceError::Host {
                    action: "finding receive buffers again that were in guest memory before",
                    source: io::Error::other(error),
                })?;
        }
        match inlet.tap.receive(&buffers) {
            Ok(Some(len)) if len >= HEADER_SIZE => {
                let frame = (len - HEADER_SIZE) as u64;
                limiter.charge(frame);
                counters.received(frame);
                self.deliver(buffers, len)
            }
            Ok(_) => {
                debug!("net: a frame without header, or too large for its buffer, was dropped");
                limiter.charge(0);
                counters.receive_dropped();
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                inlet.ready = false;
                Ok(())
            }
            Err(error) => {
                warn!(%error, "net: the tap is lost; nothing more will be received from it");
                inlet.lost = true;
                Ok(())
            }
        }
    }

    /// Hands over the chains that the `len` bytes of a frame have filled.
    fn deliver(&mut self, mut buffers: Buffers<'_>, len: usize) -> Result<(), DeviceError> {
        let mut covered = 0;
        let mut count = 0_u16;
        for chain in &self.waiting {
            covered += chain.len;
            count += 1;
            if covered >= len {
                break;
            }
        }
        // The tap leaves this field alone. It is 1 without MRG_RXBUF.
        if buffers.split_front(NUM_BUFFERS_OFFSET).is_some() {
            buffers.copy_from(&count.to_le_bytes());
        }
        let mut rest = len;
        for chain in self.waiting.drain(..usize::from(count)) {
            self.room -= chain.len;
            self.pieces -= chain.pieces.len();
            let here = rest.min(chain.len);
            rest -= here;
            // Lossless: a chain is no longer than 4 GiB - 1.
            self.queue.add_used(chain.head, here as u32)?;
        }
        self.gaps &= !self.waiting.is_empty();
        Ok(())
    }
}

fn check(memory: &GuestMemory, chain: Chain, limit: usize) -> Result<Waiting, ChainError> {
    let mut waiting = Waiting {
        head: chain.head_index(),
        pieces: Vec::new(),
        len: 0,
    };
    walk(chain, limit, |descriptor| {
        let len = descriptor.len() as usize;
        if !descriptor.is_write_only() {
            return Err(ChainError::Direction);
        }
        if !memory.check_range(descriptor.addr(), len, Permissions::Write) {
            return Err(ChainError::Memory(
                vm_memory::GuestMemoryError::InvalidGuestAddress(descriptor.addr()),
            ));
        }
        waiting.pieces.push((descriptor.addr(), len));
        waiting.len += len;
        Ok(())
    })?;
    Ok(waiting)
}
