//! Giving guest memory back to the host.

use std::io;

use vm_memory::{GuestAddress, GuestMemory as _, GuestMemoryError, Permissions};

use super::GuestMemory;

/// Size of a page, of the guest as of the host: this VMM is built for x86-64 only.
pub const PAGE_SIZE: u64 = 4096;

/// Why memory could not be given back.
#[derive(Debug, thiserror::Error)]
pub enum DiscardError {
    /// Not all of it is guest memory.
    #[error("the range is not guest memory")]
    NotMemory(#[source] GuestMemoryError),
    /// The host refused.
    #[error("the host does not take the memory back")]
    Host(#[source] io::Error),
}

/// Gives the pages that lie wholly within the `length` bytes at `start` back to the host, and
/// returns their size in bytes. The guest finds zeroes there when it next looks.
///
/// # Errors
/// A part of the range is no guest memory, and then nothing was given back; or the host refuses.
pub fn discard(
    memory: &GuestMemory,
    start: GuestAddress,
    length: u64,
) -> Result<u64, DiscardError> {
    let Some((start, length)) = whole_pages(start, length) else {
        return Ok(0);
    };
    let slices: Vec<_> = memory
        .get_slices(start, length, Permissions::Write)
        .and_then(Iterator::collect)
        .map_err(DiscardError::NotMemory)?;
    for slice in slices {
        let guard = slice.ptr_guard_mut();
        // SAFETY: the range lies in a mapping of guest memory, which stays as long as `memory`
        // refers to it. It is private and anonymous, so its pages turn to zeroes; everybody in
        // this process expects guest memory to change at any time.
        let result =
            unsafe { libc::madvise(guard.as_ptr().cast(), slice.len(), libc::MADV_DONTNEED) };
        if result != 0 {
            return Err(DiscardError::Host(io::Error::last_os_error()));
        }
    }
    Ok(length as u64)
}

/// The whole pages within a range, if there are any.
fn whole_pages(start: GuestAddress, length: u64) -> Option<(GuestAddress, usize)> {
    let end = start.0.checked_add(length)? & !(PAGE_SIZE - 1);
    let start = start.0.checked_next_multiple_of(PAGE_SIZE)?;
    let length = end.checked_sub(start).filter(|length| *length > 0)?;
    Some((GuestAddress(start), usize::try_from(length).ok()?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vm_memory::Bytes;

    use super::*;
    use crate::memory::testing::resident;

    const SIZE: u64 = 4 << 20;

    #[test]
    fn discarded_pages_are_no_longer_resident_and_read_as_zero() {
        let memory = crate::memory::allocate(SIZE, false).unwrap();
        memory
            .write_slice(&vec![7; SIZE as usize], GuestAddress(0))
            .unwrap();
        assert_eq!(resident(&memory, 0, SIZE), SIZE);

        // Less than the first and the last of these pages is named.
        let given = discard(&memory, GuestAddress(0x10_0001), 0x10_0000).unwrap();
        assert_eq!(given, 0x10_0000 - PAGE_SIZE);
        assert_eq!(resident(&memory, 0, SIZE), SIZE - given);
        let byte = |address| memory.read_obj::<u8>(GuestAddress(address)).unwrap();
        assert_eq!((byte(0x10_0fff), byte(0x10_1000)), (7, 0));
        assert_eq!((byte(0x1f_ffff), byte(0x20_0000)), (0, 7));
    }

    #[test]
    fn what_is_no_guest_memory_is_refused() {
        let memory = crate::memory::allocate(SIZE, false).unwrap();
        for (start, length) in [
            (SIZE, PAGE_SIZE),
            (SIZE - PAGE_SIZE, 2 * PAGE_SIZE),
            (u64::MAX - 3 * PAGE_SIZE, 2 * PAGE_SIZE),
        ] {
            let result = discard(&memory, GuestAddress(start), length);
            assert!(
                matches!(result, Err(DiscardError::NotMemory(_))),
                "{start:#x}"
            );
        }
    }

    proptest! {
        #[test]
        fn whole_pages_lie_within_the_range(start: u64, length: u64) {
            if let Some((first, size)) = whole_pages(GuestAddress(start), length) {
                prop_assert!(first.0 >= start);
                prop_assert!(first.0 + size as u64 <= start + length);
                prop_assert_eq!((first.0 % PAGE_SIZE, size as u64 % PAGE_SIZE), (0, 0));
            } else {
                // Nothing as long as two pages is without a whole one, unless it wraps.
                prop_assert!(length < 2 * PAGE_SIZE || start.checked_add(length).is_none());
            }
        }
    }
}
