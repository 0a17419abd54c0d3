//! What a real machine keeps at its reset vector is firmware; here it is a few instructions that
//! reset the machine.
//!
//! Linux kernels built with EFI support ignore the ACPI reset register on hardware-reduced
//! machines in favour of EFI's reset, and without EFI then jump to the vector in real mode
//! (`reboot_init` and `native_machine_emergency_restart` in arch/x86/kernel/reboot.c).

use vm_memory::{Bytes, GuestMemoryError};

use super::layout::{RESET_PORT, RESET_VECTOR};
use crate::devices::legacy::power::RESET_VALUE;
use crate::memory::GuestMemory;

/// 16-bit code:
///
/// ```text
///       mov  al, RESET_VALUE    b0 01
///       mov  dx, RESET_PORT     ba 02 06
///       out  dx, al             ee
/// wait: hlt                     f4
///       jmp  wait               eb fd
/// ```
const CODE: [u8; 9] = {
    let [low, high] = RESET_PORT.to_le_bytes();
    [0xb0, RESET_VALUE, 0xba, low, high, 0xee, 0xf4, 0xeb, 0xfd]
};

/// Writes the code to the vector.
///
/// # Errors
/// The guest has no RAM there.
pub fn write(memory: &GuestMemory) -> Result<(), GuestMemoryError> {
    memory.write_slice(&CODE, RESET_VECTOR)
}
