//! The registers and tables with which Linux is entered by the 64-bit boot protocol
//! (Documentation/arch/x86/boot.rst, "64-bit Boot Protocol"): long mode, flat segments,
//! the first GiB mapped to itself, interrupts off, `rsi` pointing to the boot parameters.

use kvm_bindings::{kvm_fpu, kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::layout::{
    BOOT_STACK_POINTER, GDT_ADDR, IDT_ADDR, PD_ADDR, PDPT_ADDR, PML4_ADDR, ZERO_PAGE_ADDR,
};
use crate::memory::GuestMemory;

// Control registers: Intel SDM volume 3, 2.5; EFER: 2.2.1.
const CR0_PE: u64 = 1 << 0;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

// Entries of page tables: Intel SDM volume 3, 4.5.
const PAGE_PRESENT: u64 = 1 << 0;
const PAGE_WRITABLE: u64 = 1 << 1;
const PAGE_LARGE: u64 = 1 << 7;
/// In bytes.
const LARGE_PAGE_SIZE: u64 = 2 << 20;

/// Bit 1 of RFLAGS always reads as one (Intel SDM volume 1, 3.4.3).
const RFLAGS_RESERVED: u64 = 1 << 1;

/// Descriptors at the selectors that the boot protocol asks for: `__BOOT_CS` 0x10 and
/// `__BOOT_DS` 0x18.
const GDT: [u64; 4] = [
    0,
    0,
    // Code: base 0, limit 4 GiB, present, execute/read, long mode.
    0x00af_9b00_0000_ffff,
    // Data: base 0, limit 4 GiB, present, read/write.
    0x00cf_9300_0000_ffff,
];
const BOOT_CS: u16 = 0x10;
const BOOT_DS: u16 = 0x18;

/// Writes the descriptor and page tables that [`boot_sregs`] points to.
///
/// # Errors
/// The guest has no RAM there.
pub fn write_boot_tables(memory: &GuestMemory) -> Result<(), GuestMemoryError> {
    for (entry, address) in GDT.iter().zip((GDT_ADDR.0..).step_by(8)) {
        memory.write_obj(*entry, GuestAddress(address))?;
    }
    memory.write_obj(0_u64, IDT_ADDR)?;

    memory.write_obj(PDPT_ADDR.0 | PAGE_PRESENT | PAGE_WRITABLE, PML4_ADDR)?;
    memory.write_obj(PD_ADDR.0 | PAGE_PRESENT | PAGE_WRITABLE, PDPT_ADDR)?;
    for index in 0..512 {
        let entry = (index * LARGE_PAGE_SIZE) | PAGE_PRESENT | PAGE_WRITABLE | PAGE_LARGE;
        memory.write_obj(entry, GuestAddress(PD_ADDR.0 + index * 8))?;
    }
    Ok(())
}

/// General registers of the boot vCPU.
pub fn boot_regs(entry: GuestAddress) -> kvm_regs {
    kvm_regs {
        rip: entry.0,
        rsi: ZERO_PAGE_ADDR.0,
        rsp: BOOT_STACK_POINTER,
        rbp: BOOT_STACK_POINTER,
        rflags: RFLAGS_RESERVED,
        ..Default::default()
    }
}

/// Turns the special registers of a vCPU at reset into those of the boot vCPU. What KVM set
/// (the APIC base, the task register's base) is kept.
pub fn boot_sregs(reset: &kvm_sregs) -> kvm_sregs {
    let mut sregs = *reset;
    let code = kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: BOOT_CS,
        type_: 0xb,
        present: 1,
        s: 1,
        l: 1,
        g: 1,
        ..Default::default()
    };
    let data = kvm_segment {
        selector: BOOT_DS,
        type_: 0x3,
        db: 1,
        l: 0,
        ..code
    };
    sregs.cs = code;
    for segment in [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.fs,
        &mut sregs.gs,
        &mut sregs.ss,
    ] {
        *segment = data;
    }
    // Long mode needs a busy 64-bit task state segment (Intel SDM volume 3, 26.3.1.2).
    sregs.tr.type_ = 0xb;
    sregs.tr.present = 1;
    sregs.gdt.base = GDT_ADDR.0;
    sregs.gdt.limit = (size_of_val(&GDT) - 1) as u16;
    sregs.idt.base = IDT_ADDR.0;
    sregs.idt.limit = 7;

    sregs.cr0 |= CR0_PE | CR0_PG;
    sregs.cr3 = PML4_ADDR.0;
    sregs.cr4 |= CR4_PAE;
    sregs.efer |= EFER_LME | EFER_LMA;
    sregs
}

/// The floating point state of a processor after reset (Intel SDM volume 3, table 10-1).
pub fn reset_fpu() -> kvm_fpu {
    kvm_fpu {
        fcw: 0x37f,
        mxcsr: 0x1f80,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_tables_map_the_first_gib_to_itself() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        write_boot_tables(&memory).unwrap();

        for address in [0_u64, 0x10_0000, 0x3fff_ffff] {
            let table = |base: u64, index: u64| {
                let entry: u64 = memory.read_obj(GuestAddress(base + index * 8)).unwrap();
                assert_eq!(entry & (PAGE_PRESENT | PAGE_WRITABLE), 3);
                entry
            };
            let pml4e = table(PML4_ADDR.0, address >> 39);
            let pdpte = table(pml4e & !0xfff, (address >> 30) & 0x1ff);
            let pde = table(pdpte & !0xfff, (address >> 21) & 0x1ff);
            assert_ne!(pde & PAGE_LARGE, 0);
            assert_eq!((pde & !0x1f_ffff) + (address & 0x1f_ffff), address);
        }
    }

    #[test]
    fn segment_registers_agree_with_the_descriptors() {
        let sregs = boot_sregs(&kvm_sregs::default());
        for segment in [sregs.cs, sregs.ds, sregs.ss] {
            let descriptor = GDT[usize::from(segment.selector / 8)];
            let bits = |shift: u32, width: u32| (descriptor >> shift) & ((1 << width) - 1);
            assert_eq!(bits(40, 4), u64::from(segment.type_));
            assert_eq!(bits(44, 1), u64::from(segment.s));
            assert_eq!(bits(47, 1), u64::from(segment.present));
            assert_eq!(bits(53, 1), u64::from(segment.l));
            assert_eq!(bits(54, 1), u64::from(segment.db));
            assert_eq!(bits(55, 1), u64::from(segment.g));
        }
    }
}
