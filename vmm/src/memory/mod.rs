//! Guest physical memory.

pub mod discard;
pub mod extents;
pub mod layers;
pub mod pagemap;
#[cfg(test)]
pub mod testing;
pub mod working_set;

use std::io;
use std::mem;
use std::ptr;
use std::sync::Arc;

use vm_memory::mmap::{FromRangesError, MmapRegion};
use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vm_memory::{GuestRegionMmap, GuestUsize};

use crate::arch::x86_64::layout::{DEVICE_AREA_END, DEVICE_AREA_START};

/// All RAM of the guest, addressed by guest physical address.
///
/// Cloning is cheap: clones share the same mappings.
pub type GuestMemory = GuestMemoryMmap<()>;

/// Size of a page in bytes.
pub const PAGE_SIZE: u64 = 4096;

/// Whether all bytes are zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == 0)
}

/// Size and alignment of a huge page. Where guest physical and host virtual addresses agree in
/// these low bits, one entry of the nested page table can map all of it.
const HUGE_PAGE: usize = 2 << 20;

/// Why the host gave no memory for the guest.
#[derive(Debug, thiserror::Error)]
pub enum AllocateError {
    /// The host refused.
    #[error("cannot map {size} bytes of guest memory")]
    Map {
        /// The size of the region in bytes.
        size: usize,
        /// What the host says.
        #[source]
        source: io::Error,
    },
    /// The mappings do not form an address space.
    #[error("cannot make an address space of the guest memory")]
    AddressSpace(#[source] FromRangesError),
}

/// Maps `size` bytes of RAM, private, zero, and taken from the host only as the guest touches
/// it; with `huge_pages` in pieces of 2 MiB where the host has them, which costs far fewer exits
/// and some memory that the guest does not use; without, page by page, whatever the host's default.
///
/// The mapping stays until [`Ram`] takes it back, or the process ends.
///
/// # Errors
/// The host refuses the mapping.
pub fn allocate(size: u64, huge_pages: bool) -> Result<GuestMemory, AllocateError> {
    let regions = ram_regions(size)
        .into_iter()
        .map(|(start, size)| map_region(start, size, huge_pages))
        .collect::<Result<Vec<_>, _>>()?;
    GuestMemory::from_regions(regions).map_err(address_space)
}

/// Alignment of the region for memory that is plugged in later: a multiple of the blocks in
/// which Linux adds memory, which are 128 MiB to 2 GiB by the size of the machine.
const PLUGGABLE_ALIGNMENT: u64 = 2 << 30;

/// The guest's memory with a region of `size` more bytes behind `ram` and above the 32-bit device
/// area, and where that region starts. The memory of `ram` is shared.
///
/// # Errors
/// The host refuses the mapping.
pub fn with_pluggable_region(
    ram: &GuestMemory,
    size: u64,
    huge_pages: bool,
) -> Result<(GuestMemory, GuestAddress), AllocateError> {
    let start = ram
        .last_addr()
        .max(DEVICE_AREA_END)
        .raw_value()
        .next_multiple_of(PLUGGABLE_ALIGNMENT);
    let start = GuestAddress(start);
    let region = map_region(start, size as usize, huge_pages)?;
    let memory = ram.insert_region(Arc::new(region)).map_err(address_space)?;
    Ok((memory, start))
}

/// The memory of one machine, given back to the host when dropped: a process that builds one
/// machine after another needs no more than the largest of them does.
pub struct Ram {
    memory: GuestMemory,
}

impl Ram {
    /// Takes charge of what [`allocate`] gave.
    pub fn new(memory: GuestMemory) -> Self {
        Self { memory }
    }

    /// The memory. Clones are dropped before this object is, or the mapping stays.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }
}

impl Drop for Ram {
    fn drop(&mut self) {
        let places: Vec<(GuestAddress, GuestUsize)> = self
            .memory
            .iter()
            .map(|region| (region.start_addr(), region.len()))
            .collect();
        let mut memory = mem::take(&mut self.memory);
        for (start, size) in places {
            let Ok((rest, region)) = memory.remove_region(start, size) else {
                continue;
            };
            memory = rest;
            match Arc::into_inner(region) {
                Some(region) => unmap(&region),
                None => tracing::error!(
                    start = format_args!("{:#x}", start.raw_value()),
                    "guest memory is still in use and stays mapped"
                ),
            }
        }
    }
}

fn unmap(region: &GuestRegionMmap) {
    // SAFETY: `map_region` made the mapping for this region alone, and the caller holds the last
    // reference to it.
    let result = unsafe { libc::munmap(region.as_ptr().cast(), region.size()) };
    if result != 0 {
        let error = io::Error::last_os_error();
        tracing::error!(%error, "guest memory cannot be unmapped");
    }
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

fn map_region(
    start: GuestAddress,
    size: usize,
    huge_pages: bool,
) -> Result<GuestRegionMmap, AllocateError> {
    const PROT: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;
    const FLAGS: libc::c_int = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let map_error = |source| AllocateError::Map { size, source };

    // One huge page more than asked for, so that an aligned piece of the size lies within. The
    // rest is address space only.
    let reserved = size
        .checked_add(HUGE_PAGE)
        .ok_or_else(|| map_error(io::ErrorKind::OutOfMemory.into()))?;
    // SAFETY: a new anonymous mapping at an address of the kernel's choice touches no other.
    let base = unsafe { libc::mmap(ptr::null_mut(), reserved, PROT, FLAGS, -1, 0) };
    if base == libc::MAP_FAILED {
        return Err(map_error(io::Error::last_os_error()));
    }
    let base = base.cast::<u8>();
    let before = base.align_offset(HUGE_PAGE);
    // SAFETY: the offset is below the size of a huge page, by which the mapping is too large.
    let aligned = unsafe { base.add(before) };
    // SAFETY: both ranges lie in the mapping just made, which nobody knows of, and outside the
    // piece of it that is kept. An empty range is refused, and nothing is unmapped then.
    unsafe {
        libc::munmap(base.cast(), before);
        libc::munmap(aligned.add(size).cast(), HUGE_PAGE - before);
    }
    let advice = if huge_pages {
        libc::MADV_HUGEPAGE
    } else {
        libc::MADV_NOHUGEPAGE
    };
    // SAFETY: the range lies in the mapping just made. The advice changes no content.
    let result = unsafe { libc::madvise(aligned.cast(), size, advice) };
    if result != 0 {
        let error = io::Error::last_os_error();
        tracing::debug!(%error, "the host has no transparent huge pages");
    }
    // SAFETY: the range lies in the mapping just made, which nobody else knows and which is
    // unmapped only when the last reference to the region is gone.
    let region =
        unsafe { MmapRegion::build_raw(aligned, size, PROT, FLAGS) }.map_err(address_space)?;
    GuestRegionMmap::new(region, start)
        .ok_or_else(|| address_space(FromRangesError::InvalidGuestRegion))
}

fn address_space(error: impl Into<FromRangesError>) -> AllocateError {
    AllocateError::AddressSpace(error.into())
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

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

    #[test]
    fn the_pluggable_region_lies_behind_all_ram() {
        for (size, expected) in [(64 << 20, 4 << 30), (3 << 30, 4 << 30), (4 << 30, 6 << 30)] {
            let ram = allocate(size, false).unwrap();
            let (memory, start) = with_pluggable_region(&ram, 128 << 20, false).unwrap();
            assert_eq!(start, GuestAddress(expected));
            assert_eq!(memory.num_regions(), ram.num_regions() + 1);
            assert_eq!(memory.last_addr().0, expected + (128 << 20) - 1);
            memory.write_obj(7_u8, GuestAddress(5)).unwrap();
            assert_eq!(ram.read_obj::<u8>(GuestAddress(5)).unwrap(), 7);
        }
    }

    #[test]
    fn ram_is_aligned_for_huge_pages_and_all_of_it_can_be_used() {
        for huge_pages in [false, true] {
            let memory = allocate(5 << 30, huge_pages).unwrap();
            for region in memory.iter() {
                assert_eq!(region.as_ptr() as usize % HUGE_PAGE, 0);
            }
            for address in [0, (3 << 30) - 8, 4 << 30, (6 << 30) - 8] {
                let address = GuestAddress(address);
                assert_eq!(memory.read_obj::<u64>(address).unwrap(), 0);
                memory.write_obj(u64::MAX, address).unwrap();
            }
            assert!(memory.read_obj::<u64>(GuestAddress(3 << 30)).is_err());
        }
    }

    fn is_mapped(address: usize) -> bool {
        let mut resident = 0u8;
        // SAFETY: mincore(2) writes one byte for the one page asked about, and fails with ENOMEM
        // on an address that is not mapped.
        unsafe { libc::mincore(address as *mut libc::c_void, 1, &raw mut resident) == 0 }
    }

    #[test]
    fn ram_goes_back_to_the_host_with_its_owner() {
        // Another test may map something at the same place in between, but not every time.
        let gone = (0..100).any(|_| {
            let ram = Ram::new(allocate(64 << 20, false).unwrap());
            let region = ram.memory().iter().next().unwrap();
            let address = region.as_ptr() as usize;
            assert!(is_mapped(address));
            drop(ram);
            !is_mapped(address)
        });
        assert!(gone);

        // Not while somebody else may touch it.
        let ram = Ram::new(allocate(64 << 20, false).unwrap());
        let memory = ram.memory().clone();
        drop(ram);
        memory.write_obj(1u64, GuestAddress(8)).unwrap();
    }
}
