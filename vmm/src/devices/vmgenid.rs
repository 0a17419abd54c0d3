//! The VM generation ID: 128 random bits that differ for every start of a machine, so that
//! guests which share a past (clones of one snapshot) know that they are not the same
//! (Virtual Machine Generation ID, Microsoft 2018).

use vm_memory::{Bytes, GuestMemoryError};

use crate::arch::x86_64::layout::VMGENID_ADDR;
use crate::memory::GuestMemory;

/// Why a machine got no generation ID.
#[derive(Debug, thiserror::Error)]
pub enum GenerationIdError {
    /// The host gave no random bits.
    #[error("cannot get random bytes from the host")]
    Random(#[source] std::io::Error),
    /// The guest has no RAM there.
    #[error("cannot write the generation ID to guest memory")]
    Memory(#[source] GuestMemoryError),
}

/// Gives the machine a new generation ID, before its vCPUs run.
///
/// # Errors
/// The host gave no random bits, or the guest has no RAM for them.
pub fn renew(memory: &GuestMemory) -> Result<(), GenerationIdError> {
    let mut id = [0; 16];
    let length = rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty())
        .map_err(|error| GenerationIdError::Random(error.into()))?;
    // Up to 256 bytes come whole (getrandom(2)).
    debug_assert_eq!(length, id.len());
    memory
        .write_slice(&id, VMGENID_ADDR)
        .map_err(GenerationIdError::Memory)
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestAddress;

    use super::*;

    #[test]
    fn every_renewal_gives_another_id() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let mut ids = std::collections::HashSet::new();
        for _ in 0..8 {
            renew(&memory).unwrap();
            ids.insert(memory.read_obj::<u128>(VMGENID_ADDR).unwrap());
        }
        assert_eq!(ids.len(), 8);
    }
}
