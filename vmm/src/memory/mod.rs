//! Guest physical memory.

use vm_memory::mmap::FromRangesError;
use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::arch::x86_64::layout::{DEVICE_AREA_END, DEVICE_AREA_START};

/// All RAM of the guest, addressed by guest physical address.
///
/// Cloning is cheap: clones share the same mappings.
pub type GuestMemory = GuestMemoryMmap<()>;

/// The host gave no memory for the guest.
#[derive(Debug, thiserror::Error)]
#[error("cannot map {size} bytes of guest memory")]
pub struct AllocateError {
    size: u64,
    #[source]
    source: FromRangesError,
}

/// Maps `size` bytes of RAM, private, zero, and taken from the host only as the guest touches
/// it.
///
/// # Errors
/// The host refuses the mapping.
pub fn allocate(size: u64) -> Result<GuestMemory, AllocateError> {
    GuestMemory::from_ranges(&ram_regions(size)).map_err(|source| AllocateError { size, source })
}

/// Where `size` bytes of RAM lie: from 0 up to the 32-bit device area, and above it.
fn ram_regions(size: u64) -> Vec<(GuestAddress, usize)> {
    // Lossless: this VMM is built for 64-bit hosts only.
    let low = size.min(DEVICE_AREA_START.0) as usize;
    let high = size.saturating_sub(DEVICE_AREA_START.0) as usize;
    let mut regions = vec![(GuestAddress(0), low)];
    if high > 0 {
        regions.push((DEVICE_AREA_END, high));
    }
    regions
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_leaves_the_device_area_free() {
        assert_eq!(ram_regions(64 << 20), [(GuestAddress(0), 64 << 20)]);
        assert_eq!(ram_regions(3 << 30), [(GuestAddress(0), 3 << 30)]);
        assert_eq!(
            ram_regions(5 << 30),
            [(GuestAddress(0), 3 << 30), (GuestAddress(4 << 30), 2 << 30)]
        );
    }
}
