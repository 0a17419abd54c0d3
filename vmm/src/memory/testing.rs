//! Looks at what the host keeps of guest memory.

use vm_memory::{GuestAddress, GuestMemory as _, Permissions};

use super::GuestMemory;
use super::discard::PAGE_SIZE;

/// How many of the `length` bytes at `start` the host has in memory.
pub fn resident(memory: &GuestMemory, start: u64, length: u64) -> u64 {
    let slices = memory
        .get_slices(GuestAddress(start), length as usize, Permissions::Read)
        .unwrap();
    let mut pages = 0;
    for slice in slices {
        let slice = slice.unwrap();
        let mut present = vec![0_u8; slice.len().div_ceil(PAGE_SIZE as usize)];
        let guard = slice.ptr_guard_mut();
        // SAFETY: the range is mapped, and `present` has a byte for each of its pages.
        let result =
            unsafe { libc::mincore(guard.as_ptr().cast(), slice.len(), present.as_mut_ptr()) };
        assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
        pages += present.iter().filter(|page| **page & 1 != 0).count() as u64;
    }
    pages * PAGE_SIZE
}
