//! The guest memory that a descriptor chain points to.
//!
//! A chain comes from the guest, so nothing about it holds until it was checked: [`ChainBuffers`]
//! walks it once, and what it returns is bounded, ordered and inside guest memory.

use std::collections::VecDeque;

use virtio_queue::desc::split::Descriptor;
use vm_memory::{GuestAddress, GuestMemory as _, GuestMemoryError, Permissions, VolatileSlice};

use super::queue::Chain;
use crate::memory::GuestMemory;

/// A run of guest memory. (Spelled out, since the general form that vm-memory has for the slices of
/// any memory type is invariant over `'m`.)
pub type GuestSlice<'m> = VolatileSlice<'m, ()>;

/// What is wrong with a descriptor chain.
#[derive(Debug, thiserror::Error)]
pub enum ChainError {
    /// It has a loop, leaves the descriptor table, holds more than 4 GiB or has a bad indirect
    /// table.
    #[error("the descriptor chain does not end where its table does")]
    Broken,
    /// It has more descriptors than the device takes.
    #[error("the descriptor chain has more than {limit} descriptors")]
    TooLong {
        /// The most that the device takes.
        limit: usize,
    },
    /// A device-readable descriptor follows a device-writable one (virtio 1.2, 2.7.4.2).
    #[error("a device-readable descriptor follows a device-writable one")]
    Order,
    /// A device-readable descriptor where the device only writes.
    #[error("a descriptor is device-readable where the device only writes")]
    Direction,
    /// A descriptor points outside of guest memory.
    #[error("a descriptor points outside of guest memory")]
    Memory(#[source] GuestMemoryError),
}

/// The buffers of one descriptor chain.
#[derive(Debug, Default)]
pub struct ChainBuffers<'m> {
    /// What the driver wrote for the device.
    pub readable: Buffers<'m>,
    /// Where the device may write.
    pub writable: Buffers<'m>,
}

impl<'m> ChainBuffers<'m> {
    /// Finds and checks the buffers of `chain`, which may have `limit` descriptors at most.
    ///
    /// # Errors
    /// The chain is malformed. Nothing of it can be trusted then.
    pub fn collect(
        memory: &'m GuestMemory,
        chain: Chain,
        limit: usize,
    ) -> Result<Self, ChainError> {
        let mut buffers = Self::default();
        walk(chain, limit, |descriptor| {
            let (target, access) = if descriptor.is_write_only() {
                (&mut buffers.writable, Permissions::Write)
            } else {
                (&mut buffers.readable, Permissions::Read)
            };
            target.append(memory, descriptor.addr(), descriptor.len() as usize, access)
        })?;
        Ok(buffers)
    }
}

/// The buffers of one descriptor chain, without a hold on guest memory: for a chain that waits, or
/// goes to another thread.
#[derive(Debug, Default)]
pub struct ChainPieces {
    readable: Pieces,
    writable: Pieces,
}

/// Where buffers lie, in the order in which they are to be read or filled.
#[derive(Debug, Default)]
struct Pieces {
    pieces: Vec<(GuestAddress, usize)>,
    len: usize,
}

impl ChainPieces {
    /// Finds and checks the buffers of `chain`, which may have `limit` descriptors at most.
    ///
    /// # Errors
    /// The chain is malformed. Nothing of it can be trusted then.
    pub fn collect(memory: &GuestMemory, chain: Chain, limit: usize) -> Result<Self, ChainError> {
        let mut found = Self::default();
        walk(chain, limit, |descriptor| {
            let (target, access) = if descriptor.is_write_only() {
                (&mut found.writable, Permissions::Write)
            } else {
                (&mut found.readable, Permissions::Read)
            };
            let (addr, len) = (descriptor.addr(), descriptor.len() as usize);
            if !memory.check_range(addr, len, access) {
                let outside = GuestMemoryError::InvalidGuestAddress(addr);
                return Err(ChainError::Memory(outside));
            }
            target.pieces.push((addr, len));
            // Lossless: a chain holds no more than 4 GiB.
            target.len += len;
            Ok(())
        })?;
        Ok(found)
    }

    /// The bytes that the device may read.
    pub fn readable_len(&self) -> usize {
        self.readable.len
    }

    /// The bytes that the device may write.
    pub fn writable_len(&self) -> usize {
        self.writable.len
    }

    /// The buffers themselves.
    ///
    /// # Errors
    /// They do not lie in `memory`, which is another than that in which they were found.
    pub fn buffers<'m>(&self, memory: &'m GuestMemory) -> Result<ChainBuffers<'m>, ChainError> {
        let mut buffers = ChainBuffers::default();
        for (pieces, target, access) in [
            (&self.readable, &mut buffers.readable, Permissions::Read),
            (&self.writable, &mut buffers.writable, Permissions::Write),
        ] {
            for (addr, len) in &pieces.pieces {
                target.append(memory, *addr, *len, access)?;
            }
        }
        Ok(buffers)
    }
}

/// Hands the descriptors of `chain` to `each`, `limit` of them at most.
///
/// # Errors
/// The chain is malformed, or `each` found something wrong.
pub fn walk(
    chain: Chain,
    limit: usize,
    mut each: impl FnMut(Descriptor) -> Result<(), ChainError>,
) -> Result<(), ChainError> {
    let mut complete = false;
    let mut writable = false;
    for (index, descriptor) in chain.enumerate() {
        if index == limit {
            return Err(ChainError::TooLong { limit });
        }
        if writable && !descriptor.is_write_only() {
            return Err(ChainError::Order);
        }
        writable = descriptor.is_write_only();
        // The iterator also ends, without a word, where it cannot follow a link.
        complete = !descriptor.has_next();
        each(descriptor)?;
    }
    if complete {
        Ok(())
    } else {
        Err(ChainError::Broken)
    }
}

/// Guest memory in the order in which it is to be read or filled.
#[derive(Debug, Default)]
pub struct Buffers<'m> {
    slices: VecDeque<GuestSlice<'m>>,
    len: usize,
}

impl<'m> Buffers<'m> {
    /// Appends the `len` bytes at `addr`.
    ///
    /// # Errors
    /// They do not lie in guest memory.
    pub fn append(
        &mut self,
        memory: &'m GuestMemory,
        addr: GuestAddress,
        len: usize,
        access: Permissions,
    ) -> Result<(), ChainError> {
        let slices = memory
            .get_slices(addr, len, access)
            .map_err(ChainError::Memory)?;
        for slice in slices {
            self.push(slice.map_err(ChainError::Memory)?);
        }
        Ok(())
    }

    fn push(&mut self, slice: GuestSlice<'m>) {
        self.len += slice.len();
        self.slices.push_back(slice);
    }

    /// The size in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is not one byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The pieces, none of them empty.
    pub fn slices(&self) -> impl ExactSizeIterator<Item = &GuestSlice<'m>> {
        self.slices.iter()
    }

    /// Cuts off and returns the first `count` bytes, or `None` if there are fewer.
    pub fn split_front(&mut self, count: usize) -> Option<Self> {
        if count > self.len {
            return None;
        }
        let mut front = Self::default();
        while front.len < count {
            let slice = self.slices.pop_front()?;
            let wanted = count - front.len;
            if slice.len() > wanted {
                let (head, tail) = slice.split_at(wanted).ok()?;
                front.push(head);
                self.slices.push_front(tail);
            } else {
                front.push(slice);
            }
        }
        self.len -= count;
        Some(front)
    }

    /// Cuts off and returns the last byte, or `None` if there is none.
    pub fn split_last(&mut self) -> Option<GuestSlice<'m>> {
        let slice = self.slices.pop_back()?;
        let (head, last) = slice.split_at(slice.len().checked_sub(1)?).ok()?;
        self.len -= 1;
        if !head.is_empty() {
            self.slices.push_back(head);
        }
        Some(last)
    }

    /// Reads the first `N` bytes and cuts them off, or returns `None` if there are fewer.
    pub fn read_front<const N: usize>(&mut self) -> Option<[u8; N]> {
        let front = self.split_front(N)?;
        let mut bytes = [0; N];
        front.copy_to(&mut bytes);
        Some(bytes)
    }

    /// Copies to `bytes` as much as fits and returns how much that was.
    pub fn copy_to(&self, bytes: &mut [u8]) -> usize {
        let mut copied = 0;
        for slice in &self.slices {
            copied += slice.copy_to(bytes.get_mut(copied..).unwrap_or_default());
        }
        copied
    }

    /// Copies from `bytes` as much as fits and returns how much that was.
    pub fn copy_from(&self, bytes: &[u8]) -> usize {
        let mut copied = 0;
        for slice in &self.slices {
            let rest = bytes.get(copied..).unwrap_or_default();
            let count = rest.len().min(slice.len());
            slice.copy_from(&rest[..count]);
            copied += count;
        }
        copied
    }
}
