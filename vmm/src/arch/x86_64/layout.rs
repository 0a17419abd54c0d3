//! The guest physical address space and the other fixed numbers of the machine.
//!
//! ```text
//! 0x0000_0000  real mode IDT and BIOS data, unused
//! 0x0000_0500  GDT                                     RAM
//! 0x0000_7000  boot parameters ("zero page")           RAM
//! 0x0000_8ff0  boot stack, growing down                RAM
//! 0x0000_9000  page tables for the first GiB           RAM
//! 0x0002_0000  kernel command line                     RAM
//! 0x0009_fc00  end of low RAM
//! 0x000e_0000  ACPI tables                             reserved
//! 0x000f_e000  VM generation ID                        reserved
//! 0x000f_fff0  reset vector                            reserved
//! 0x0010_0000  kernel; initramfs at the top of low RAM RAM
//! 0xc000_0000  32-bit device area                      no RAM
//!   0xd000_0000  virtio-mmio, 4 KiB a device
//!   0xfec0_0000  I/O APIC
//!   0xfee0_0000  local APIC
//!   0xfffb_d000  KVM's task state segment (Intel)
//! 0x1_0000_0000  the rest of the RAM                   RAM
//! ```

use vm_memory::GuestAddress;

/// Where the flat segment descriptors of the boot state are.
pub const GDT_ADDR: GuestAddress = GuestAddress(0x500);
/// Where the (empty) interrupt descriptor table of the boot state is.
pub const IDT_ADDR: GuestAddress = GuestAddress(0x520);
/// `struct boot_params` (Documentation/arch/x86/zero-page.rst).
pub const ZERO_PAGE_ADDR: GuestAddress = GuestAddress(0x7000);
/// Initial stack pointer.
pub const BOOT_STACK_POINTER: u64 = 0x8ff0;
/// Page map level 4; the two levels below follow at one page each.
pub const PML4_ADDR: GuestAddress = GuestAddress(0x9000);
/// Page directory pointer table.
pub const PDPT_ADDR: GuestAddress = GuestAddress(0xa000);
/// Page directory: 512 entries of 2 MiB.
pub const PD_ADDR: GuestAddress = GuestAddress(0xb000);

/// The kernel command line.
pub const CMDLINE_ADDR: GuestAddress = GuestAddress(0x2_0000);
/// Room for the command line with its terminating NUL: `COMMAND_LINE_SIZE` of x86 Linux.
pub const CMDLINE_CAPACITY: usize = 2048;

/// End of the RAM below 1 MiB, where a BIOS would keep its extended data area.
pub const LOW_RAM_END: GuestAddress = GuestAddress(0x9_fc00);
/// ACPI tables, in the area where Linux also searches without being told.
pub const ACPI_ADDR: GuestAddress = GuestAddress(0xe_0000);
/// The 16 bytes of the VM generation ID, alone on their page.
pub const VMGENID_ADDR: GuestAddress = GuestAddress(0xf_e000);
/// End of the ACPI tables.
pub const ACPI_END: GuestAddress = VMGENID_ADDR;
/// Where a processor in real mode starts after a reset (F000:FFF0).
pub const RESET_VECTOR: GuestAddress = GuestAddress(0xf_fff0);
/// Start of the RAM above 1 MiB; a kernel is loaded no lower.
pub const HIGH_RAM_START: GuestAddress = GuestAddress(0x10_0000);

/// Start of the 32-bit device area, in which there is no RAM.
pub const DEVICE_AREA_START: GuestAddress = GuestAddress(0xc000_0000);
/// End of the 32-bit device area.
pub const DEVICE_AREA_END: GuestAddress = GuestAddress(0x1_0000_0000);

/// Registers of the first virtio-mmio device.
pub const VIRTIO_MMIO_START: u64 = 0xd000_0000;
/// Distance between the registers of two virtio-mmio devices.
pub const VIRTIO_MMIO_SIZE: u64 = 0x1000;

/// I/O APIC, where KVM has it.
pub const IOAPIC_ADDR: u32 = 0xfec0_0000;
/// Local APIC, where KVM has it.
pub const LAPIC_ADDR: u32 = 0xfee0_0000;
/// Three pages for KVM_SET_TSS_ADDR, which Intel processors without unrestricted guest need.
pub const KVM_TSS_ADDR: usize = 0xfffb_d000;

/// Interrupt line of COM1.
pub const SERIAL_GSI: u32 = 4;
/// Interrupt line of the generic event device.
pub const GED_GSI: u32 = 5;
/// First interrupt line of the virtio devices.
pub const VIRTIO_GSI_START: u32 = 6;
/// Last interrupt line of the I/O APIC that KVM emulates.
pub const GSI_LAST: u32 = 23;
/// The most virtio devices: one interrupt line each.
pub const MAX_VIRTIO_DEVICES: usize = (GSI_LAST - VIRTIO_GSI_START + 1) as usize;

/// I/O ports of COM1.
pub const SERIAL_PORT: u16 = 0x3f8;
/// Number of I/O ports of a 16550.
pub const SERIAL_PORT_COUNT: u16 = 8;
/// Data port of the keyboard controller.
pub const I8042_DATA_PORT: u16 = 0x60;
/// Status and command port of the keyboard controller.
pub const I8042_COMMAND_PORT: u16 = 0x64;
/// Panic notification (Documentation of QEMU, specs/pvpanic).
pub const PVPANIC_PORT: u16 = 0x505;
/// ACPI sleep control register (ACPI 6.5, 4.8.3.7).
pub const SLEEP_CONTROL_PORT: u16 = 0x600;
/// ACPI sleep status register.
pub const SLEEP_STATUS_PORT: u16 = 0x601;
/// ACPI reset register.
pub const RESET_PORT: u16 = 0x602;
/// Register of the pending platform events ([`crate::devices::events`]).
pub const EVENT_PORT: u16 = 0x610;
/// Size of that register in bytes.
pub const EVENT_PORT_COUNT: u16 = 4;
/// CPU hotplug registers ([`crate::devices::cpu_hotplug`]).
pub const CPU_HOTPLUG_PORT: u16 = 0x620;
/// Register that takes the guest's marker for the boot timer ([`crate::boot_timer`]), one byte.
pub const BOOT_TIMER_PORT: u16 = 0x640;

const _: () = assert!(MAX_VIRTIO_DEVICES == 18);
const _: () =
    assert!(VIRTIO_MMIO_START + MAX_VIRTIO_DEVICES as u64 * VIRTIO_MMIO_SIZE <= IOAPIC_ADDR as u64);
