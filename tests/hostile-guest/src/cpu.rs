//! The processor: entry, page tables, ports and registers.

use core::arch::{asm, global_asm};
use core::fmt;

/// COM1.
const SERIAL: u16 = 0x3f8;
/// The ACPI sleep control register of the machine, and what powers it off: type S5, enable.
const SLEEP_CONTROL: u16 = 0x600;
const POWER_OFF: u8 = 5 << 2 | 1 << 5;
/// Where the command line's address is in the boot parameters
/// (Documentation/arch/x86/boot.rst, cmd_line_ptr).
const COMMAND_LINE_POINTER: usize = 0x228;
const COMMAND_LINE_MAX: usize = 2048;

const PAGE_PRESENT: u64 = 1 << 0;
const PAGE_WRITABLE: u64 = 1 << 1;
const PAGE_LARGE: u64 = 1 << 7;
const LARGE_PAGE_SIZE: u64 = 2 << 20;

// The boot protocol leaves the stack to the kernel, and the SSE registers, which compiled code
// uses, switched off.
global_asm!(
    ".section .text.entry, \"ax\"",
    ".globl _start",
    "_start:",
    "mov rax, cr0",
    "and rax, -5",
    "or rax, 2",
    "mov cr0, rax",
    "mov rax, cr4",
    "or rax, 0x600",
    "mov cr4, rax",
    "lea rsp, [rip + {stack} + {stack_size}]",
    "xor ebp, ebp",
    "mov rdi, rsi",
    "call guest_main",
    "ud2",
    ".text",
    stack = sym STACK,
    stack_size = const STACK_SIZE,
);

const STACK_SIZE: usize = 64 << 10;

#[repr(C, align(4096))]
struct Aligned<T>(T);

static mut STACK: Aligned<[u8; STACK_SIZE]> = Aligned([0; STACK_SIZE]);
/// One page map level 4, one page directory pointer table, four page directories.
static mut TABLES: Aligned<[[u64; 512]; 6]> = Aligned([[0; 512]; 6]);

/// Maps the first 4 GiB to themselves: the boot protocol maps the first alone, and the devices
/// are in the fourth.
pub fn map_four_gib() {
    let tables = &raw mut TABLES;
    let address = tables as u64;
    let page = |index: u64| (address + index * 4096) | PAGE_PRESENT | PAGE_WRITABLE;
    // SAFETY: this is the only thread, and nobody else uses the tables before they are loaded.
    // They map what runs here to where it is.
    unsafe {
        (*tables).0[0][0] = page(1);
        for directory in 0..4 {
            (*tables).0[1][directory] = page(2 + directory as u64);
            for entry in 0..512 {
                let large_page = (directory * 512 + entry) as u64 * LARGE_PAGE_SIZE;
                (*tables).0[2 + directory][entry] =
                    large_page | PAGE_PRESENT | PAGE_WRITABLE | PAGE_LARGE;
            }
        }
        asm!("mov cr3, {}", in(reg) address, options(nostack, preserves_flags));
    }
}

/// The kernel command line.
pub fn command_line(boot_params: *const u8) -> &'static [u8] {
    // SAFETY: the boot protocol passes the boot parameters, and in them the address of a string
    // that ends with a zero byte; both are in the first GiB and stay.
    unsafe {
        let pointer = boot_params.add(COMMAND_LINE_POINTER).cast::<u32>();
        let text = pointer.read_unaligned() as usize as *const u8;
        let len = (0..COMMAND_LINE_MAX)
            .find(|index| *text.add(*index) == 0)
            .unwrap_or(COMMAND_LINE_MAX);
        core::slice::from_raw_parts(text, len)
    }
}

/// Reads an I/O port.
pub fn inb(port: u16) -> u8 {
    let value;
    // SAFETY: an I/O port is no memory of this program.
    unsafe { asm!("in al, dx", out("al") value, in("dx") port, options(nostack, nomem)) };
    value
}

/// Writes an I/O port.
pub fn outb(port: u16, value: u8) {
    // SAFETY: an I/O port is no memory of this program.
    unsafe { asm!("out dx, al", in("al") value, in("dx") port, options(nostack, nomem)) };
}

/// One access of the width of `T` to device memory. The value read is dropped.
pub fn mmio<T: Copy>(address: u64, value: T, write: bool) {
    let register = address as *mut T;
    // SAFETY: the caller passes an address in the area of devices, where no memory is. It may be
    // unaligned, which the processor allows; `read_volatile` must be told through a packed type.
    unsafe {
        if write {
            register.cast::<Packed<T>>().write_volatile(Packed(value));
        } else {
            register.cast::<Packed<T>>().read_volatile();
        }
    }
}

/// A value that may be at any address.
#[repr(C, packed)]
#[derive(Clone, Copy)]
struct Packed<T>(T);

/// Reads a device register of 32 bits.
pub fn read32(address: u64) -> u32 {
    // SAFETY: as for `mmio`; registers are aligned.
    unsafe { (address as *const u32).read_volatile() }
}

/// Writes a device register of 32 bits.
pub fn write32(address: u64, value: u32) {
    // SAFETY: as for `mmio`; registers are aligned.
    unsafe { (address as *mut u32).write_volatile(value) };
}

/// Ends the machine in order.
pub fn power_off() -> ! {
    outb(SLEEP_CONTROL, POWER_OFF);
    halt()
}

/// Ends the machine by a triple fault, which is no end that is expected.
pub fn give_up() -> ! {
    // SAFETY: an empty interrupt descriptor table and an invalid instruction: nothing runs after
    // this.
    unsafe {
        let none = [0_u16; 5];
        asm!("lidt [{}]", "ud2", in(reg) &raw const none, options(noreturn));
    }
}

/// Stops for good.
pub fn halt() -> ! {
    loop {
        // SAFETY: with interrupts off the processor stops here.
        unsafe { asm!("cli", "hlt", options(nostack, nomem)) };
    }
}

/// Text on COM1.
pub struct Serial;

impl Serial {
    /// Out of loopback, no interrupts, no access to the divisor.
    pub fn reset() {
        outb(SERIAL + 3, 3);
        outb(SERIAL + 1, 0);
        outb(SERIAL + 4, 0);
    }
}

impl fmt::Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            outb(SERIAL, byte);
        }
        Ok(())
    }
}
