//! The functions on memory that compiled code calls, and the memory that devices are pointed to.

use core::arch::asm;

/// # Safety
/// As `memcpy` of C.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    // SAFETY: the caller keeps to C's rules.
    unsafe {
        asm!("rep movsb", inout("rcx") len => _, inout("rdi") to => _, inout("rsi") from => _,
            options(nostack, preserves_flags));
    }
    to
}

/// # Safety
/// As `memset` of C.
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, byte: i32, len: usize) -> *mut u8 {
    // SAFETY: the caller keeps to C's rules.
    unsafe {
        asm!("rep stosb", inout("rcx") len => _, inout("rdi") to => _, in("al") byte as u8,
            options(nostack, preserves_flags));
    }
    to
}

/// # Safety
/// As `memcmp` of C.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(left: *const u8, right: *const u8, len: usize) -> i32 {
    for index in 0..len {
        // SAFETY: the caller keeps to C's rules. Volatile, or this would become a call of itself.
        let (left, right) = unsafe {
            (
                left.add(index).read_volatile(),
                right.add(index).read_volatile(),
            )
        };
        if left != right {
            return i32::from(left) - i32::from(right);
        }
    }
    0
}

/// Size of the memory that devices are pointed to.
pub const ARENA_SIZE: u64 = 8 << 20;
/// Where it is: above everything that is loaded.
pub const ARENA: u64 = 0x100_0000;

/// Writes into the arena, wherever the offset is.
pub fn put<T: Copy>(offset: u64, value: T) {
    let offset = offset % (ARENA_SIZE - size_of::<T>() as u64);
    // SAFETY: the arena is RAM that nothing else here uses, and the offset was just cut to it.
    unsafe { ((ARENA + offset) as *mut T).write_unaligned(value) };
}

/// The number, or one that as an address is not below the arena.
pub fn high(number: u64) -> u64 {
    if number < ARENA {
        number | ARENA
    } else {
        number
    }
}
