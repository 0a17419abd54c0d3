//! Memory device (virtio 1.2, 5.15): a region of guest physical addresses behind the boot RAM,
//! whose blocks the driver plugs and unplugs as the host asks for more or less.
//!
//! ```text
//!             PLUG, up to the requested size
//!  unplugged ────────────────────────────────► plugged
//!      ▲                                          │
//!      └──── UNPLUG, UNPLUG_ALL: given back ──────┘
//! ```
//!
//! The driver moves blocks; the host only says what it aims at. A reset of the device leaves them
//! as they are, since the guest's memory does not go away with a driver.
//!
//! The whole region is mapped, and costs the host nothing where it was never touched. What a
//! guest writes to an unplugged block is its own affair: the specification leaves open what
//! happens, no other guest can see it, and what the guest can occupy in this way is bounded by
//! the size of the region.

mod blocks;

use std::ops::Range;

use tracing::debug;
use vm_memory::GuestAddress;
use vmm_sys_util::epoll::EventSet;

use super::buffers::{Buffers, ChainBuffers};
use super::queue::{ActiveQueue, Chain};
use super::state::{DeviceState, OwnState, RestoreError};
use super::{
    Activation, Control, ControlError, Counters, DeviceError, DeviceKind, Source, VirtioDevice,
    config_space,
};
use crate::memory::GuestMemory;
use crate::memory::discard::discard;
use blocks::{BlockState, Blocks};

/// Size and alignment of a block in bytes: that of a huge page, so that neither the host nor the
/// guest has to split one.
pub const BLOCK_SIZE: u64 = 2 << 20;

/// The driver does not touch unplugged blocks (virtio 1.2, 5.15.3).
const F_UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;

/// Descriptors of the queue.
const QUEUE_SIZE: u16 = 64;
/// A request is one buffer each way; more descriptors than these are no use to anybody.
const MAX_DESCRIPTORS: usize = 8;

/// `struct virtio_mem_req`: type, padding, address, number of blocks, padding.
const REQUEST_SIZE: usize = 24;
/// `struct virtio_mem_resp`: type, padding, state.
const RESPONSE_SIZE: usize = 10;

// Types of requests (virtio 1.2, 5.15.6).
const REQUEST_PLUG: u16 = 0;
const REQUEST_UNPLUG: u16 = 1;
const REQUEST_UNPLUG_ALL: u16 = 2;
const REQUEST_STATE: u16 = 3;

/// The answer to a request (virtio 1.2, 5.15.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Answer {
    Ack,
    /// More than the host asked for.
    Nack,
    /// Not now: the host did not do its part.
    Busy,
    Error,
    State(BlockState),
}

impl Answer {
    fn bytes(self) -> [u8; RESPONSE_SIZE] {
        let (kind, state) = match self {
            Self::Ack => (0_u16, 0),
            Self::Nack => (1, 0),
            Self::Busy => (2, 0),
            Self::Error => (3, 0),
            Self::State(state) => (0, state as u16),
        };
        let mut bytes = [0; RESPONSE_SIZE];
        bytes[..2].copy_from_slice(&kind.to_le_bytes());
        bytes[8..].copy_from_slice(&state.to_le_bytes());
        bytes
    }
}

/// The memory device.
#[derive(Debug)]
pub struct Mem {
    region: Region,
    queue: Option<ActiveQueue>,
}

/// The memory, whoever drives it.
#[derive(Debug)]
struct Region {
    start: GuestAddress,
    /// Size in bytes.
    size: u64,
    /// What the host aims at, in bytes.
    requested: u64,
    blocks: Blocks,
}

impl Mem {
    /// A device for the region of `size` bytes at `start`, both multiples of [`BLOCK_SIZE`], that
    /// asks its driver to plug `requested` bytes of it.
    pub fn new(start: GuestAddress, size: u64, requested: u64) -> Self {
        // Lossless: this VMM is built for 64-bit hosts only.
        let total = (size / BLOCK_SIZE) as usize;
        Self {
            region: Region {
                start,
                size,
                requested: requested.min(size),
                blocks: Blocks::new(total),
            },
            queue: None,
        }
    }

    fn serve(&mut self) -> Result<(), DeviceError> {
        let Some(queue) = &mut self.queue else {
            return Ok(());
        };
        queue.serve(|memory, chain| Ok(self.region.answer_chain(memory, chain)))
    }
}

impl Region {
    fn plugged(&self) -> u64 {
        self.blocks.count() as u64 * BLOCK_SIZE
    }

    /// Answers the request in `chain` and returns the length of the answer.
    fn answer_chain(&mut self, memory: &GuestMemory, chain: Chain) -> u32 {
        match ChainBuffers::collect(memory, chain, MAX_DESCRIPTORS) {
            Ok(ChainBuffers { readable, writable }) => self
                .answer_request(memory, readable, &writable)
                .unwrap_or_else(|| {
                    debug!("mem: no room for a request or for its answer");
                    0
                }),
            Err(error) => {
                debug!(%error, "mem: malformed request");
                0
            }
        }
    }

    fn answer_request(
        &mut self,
        memory: &GuestMemory,
        mut request: Buffers<'_>,
        response: &Buffers<'_>,
    ) -> Option<u32> {
        let request: [u8; REQUEST_SIZE] = request.read_front()?;
        if response.len() < RESPONSE_SIZE {
            return None;
        }
        let [
            k0,
            k1,
            _,
            _,
            _,
            _,
            _,
            _,
            a0,
            a1,
            a2,
            a3,
            a4,
            a5,
            a6,
            a7,
            n0,
            n1,
            ..,
        ] = request;
        let address = u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]);
        let range = self.range(address, u16::from_le_bytes([n0, n1]));
        let answer = match u16::from_le_bytes([k0, k1]) {
            REQUEST_PLUG => self.plug(range),
            REQUEST_UNPLUG => self.unplug(memory, range),
            REQUEST_UNPLUG_ALL => self.unplug_all(memory),
            REQUEST_STATE => range.map_or(Answer::Error, |(_, state)| Answer::State(state)),
            _ => Answer::Error,
        };
        Some(response.copy_from(&answer.bytes()) as u32)
    }

    /// The blocks that a request names, and their state; `None` unless they are aligned and
    /// within the region.
    fn range(&self, address: u64, count: u16) -> Option<(Range<usize>, BlockState)> {
        let offset = address.checked_sub(self.start.0)?;
        if !offset.is_multiple_of(BLOCK_SIZE) {
            return None;
        }
        let first = usize::try_from(offset / BLOCK_SIZE).ok()?;
        let range = first..first.checked_add(usize::from(count))?;
        let state = self.blocks.state(range.clone())?;
        Some((range, state))
    }

    fn plug(&mut self, range: Option<(Range<usize>, BlockState)>) -> Answer {
        let Some((range, state)) = range else {
            return Answer::Error;
        };
        // Neither of the two is larger than the region.
        if self.plugged() + range.len() as u64 * BLOCK_SIZE > self.requested {
            return Answer::Nack;
        }
        if state != BlockState::Unplugged {
            return Answer::Error;
        }
        self.blocks.set(range, true);
        Answer::Ack
    }

    fn unplug(
        &mut self,
        memory: &GuestMemory,
        range: Option<(Range<usize>, BlockState)>,
    ) -> Answer {
        let Some((range, BlockState::Plugged)) = range else {
            return Answer::Error;
        };
        let start = GuestAddress(self.start.0 + range.start as u64 * BLOCK_SIZE);
        if !give_back(memory, start, range.len() as u64 * BLOCK_SIZE) {
            return Answer::Busy;
        }
        self.blocks.set(range, false);
        Answer::Ack
    }

    fn unplug_all(&mut self, memory: &GuestMemory) -> Answer {
        if !give_back(memory, self.start, self.size) {
            return Answer::Busy;
        }
        self.blocks.clear();
        Answer::Ack
    }
}

fn give_back(memory: &GuestMemory, start: GuestAddress, size: u64) -> bool {
    discard(memory, start, size)
        .inspect_err(|error| {
            let error = crate::error_chain(error);
            tracing::warn!(error, "mem: unplugged memory cannot be given back");
        })
        .is_ok()
}

impl VirtioDevice for Mem {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Mem
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        F_UNPLUGGED_INACCESSIBLE
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let region = &self.region;
        // block_size, node_id and padding, addr, region_size, usable_region_size, plugged_size,
        // requested_size (virtio 1.2, 5.15.4)
        let fields = [
            BLOCK_SIZE,
            0,
            region.start.0,
            region.size,
            region.size,
            region.plugged(),
            region.requested,
        ];
        config_space::read(&fields.map(u64::to_le_bytes).concat(), offset, data);
    }

    /// `region_bytes`, `requested_bytes` and `plugged_bytes`, as they are now.
    fn counters(&self) -> Counters {
        Counters::from([
            ("region_bytes", self.region.size),
            ("requested_bytes", self.region.requested),
            ("plugged_bytes", self.region.plugged()),
        ])
    }

    fn control(&mut self, control: Control) -> Result<(), ControlError> {
        let Control::ResizeMemory { size } = control else {
            return Err(ControlError::NotSupported);
        };
        let limit = self.region.size;
        if size > limit || !size.is_multiple_of(BLOCK_SIZE) {
            return Err(ControlError::Refused(format!(
                "{size} bytes of plugged memory asked for; possible are up to {limit} bytes, in \
                 steps of {} MiB",
                BLOCK_SIZE >> 20
            )));
        }
        self.region.requested = size;
        Ok(())
    }

    fn save(&mut self) -> Result<DeviceState, ControlError> {
        Ok(DeviceState {
            queues: self.queue.as_ref().map(|queue| vec![queue.save()]),
            own: OwnState::Mem {
                requested: self.region.requested,
                plugged: self.region.blocks.plugged_runs(),
            },
        })
    }

    fn restore(&mut self, own: &OwnState) -> Result<(), RestoreError> {
        let OwnState::Mem { requested, plugged } = own else {
            return Err(RestoreError::OwnState);
        };
        let region = &mut self.region;
        if *requested > region.size {
            return Err(RestoreError::PluggedMemory);
        }
        region.requested = *requested;
        region.blocks.clear();
        for (first, count) in plugged {
            let range = *first..first.saturating_add(*count);
            if region.blocks.state(range.clone()).is_none() {
                return Err(RestoreError::PluggedMemory);
            }
            region.blocks.set(range, true);
        }
        Ok(())
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
