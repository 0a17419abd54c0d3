//! Where a guest virtual address is, by the guest's page tables (Intel SDM, volume 3, 4.5).
//!
//! `KVM_TRANSLATE` would tell as well, but as for a supervisor's access: with SMAP it refuses the
//! memory of programs. What the tables permit is of no interest here.

use kvm_bindings::kvm_sregs;
use vm_memory::{Bytes, GuestAddress};

use super::DebugError;
use crate::memory::GuestMemory;

// Control registers: Intel SDM volume 3, 2.5; EFER: 2.2.1; entries of page tables: 4.5.
const CR0_PG: u64 = 1 << 31;
const CR4_LA57: u64 = 1 << 12;
const EFER_LMA: u64 = 1 << 10;

const PRESENT: u64 = 1 << 0;
/// The entry is a page, not a table; in the two levels above the lowest.
const LARGE: u64 = 1 << 7;
/// Bits 12 to 51 of an entry and of CR3.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Bits of an address that are within a page, and those that each level of tables takes.
const PAGE_BITS: u32 = 12;
const INDEX_BITS: u32 = 9;

/// Where `address` is for a vCPU with these registers.
///
/// # Errors
/// It is nowhere, or the vCPU uses page tables of 32 bits.
pub(super) fn translate(
    memory: &GuestMemory,
    registers: &kvm_sregs,
    address: u64,
) -> Result<GuestAddress, DebugError> {
    if registers.cr0 & CR0_PG == 0 {
        return Ok(GuestAddress(address));
    }
    if registers.efer & EFER_LMA == 0 {
        return Err(DebugError::Paging32);
    }
    let levels = if registers.cr4 & CR4_LA57 == 0 { 4 } else { 5 };
    walk(memory, registers.cr3, levels, address).ok_or(DebugError::NotMapped { address })
}

fn walk(memory: &GuestMemory, cr3: u64, levels: u32, address: u64) -> Option<GuestAddress> {
    // Addresses are as wide as the tables translate, with copies of their last bit above.
    let unused = u64::BITS - PAGE_BITS - INDEX_BITS * levels;
    if (address << unused).cast_signed() >> unused != address.cast_signed() {
        return None;
    }
    let mut table = cr3 & ADDRESS;
    for level in (0..levels).rev() {
        let bits = PAGE_BITS + INDEX_BITS * level;
        let index = address >> bits & ((1 << INDEX_BITS) - 1);
        let entry: u64 = memory.read_obj(GuestAddress(table + 8 * index)).ok()?;
        if entry & PRESENT == 0 {
            return None;
        }
        if level == 0 || level <= 2 && entry & LARGE != 0 {
            let offset = (1 << bits) - 1;
            return Some(GuestAddress(entry & ADDRESS & !offset | address & offset));
        }
        table = entry & ADDRESS;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory(entries: &[(u64, u64)]) -> GuestMemory {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        for (address, entry) in entries {
            memory.write_obj(*entry, GuestAddress(*address)).unwrap();
        }
        memory
    }

    fn registers(cr4: u64) -> kvm_sregs {
        kvm_sregs {
            cr0: CR0_PG,
            // Flags in the low bits are no part of the address.
            cr3: 0x1018,
            cr4,
            efer: EFER_LMA,
            ..Default::default()
        }
    }

    fn found(memory: &GuestMemory, registers: &kvm_sregs, address: u64) -> Option<u64> {
        let result = translate(memory, registers, address);
        result.ok().map(|address| address.0)
    }

    #[test]
    fn pages_of_all_sizes_are_found() {
        // Not executable, global, and software's own bits: none of them matters.
        let flags = 1 << 63 | 1 << 58 | 0x161;
        let memory = memory(&[
            (0x1000 + 8 * 256, 0x2000 | 1),
            (0x2000 + 8 * 2, 0x3000 | 1),
            (0x2000 + 8 * 3, 0x40_0000_0000 | LARGE | flags),
            (0x3000 + 8 * 4, 0x4000 | 1),
            (0x3000 + 8 * 5, 0x20_0000 | LARGE | flags),
            (0x4000 + 8 * 6, 0x7000 | flags),
            (0x4000 + 8 * 7, 0x7000),
        ]);
        let base = 0xffff_8000_0000_0000;
        let found = |address| found(&memory, &registers(0), address);
        let small = base | 2 << 30 | 4 << 21 | 6 << 12;
        assert_eq!(found(small | 0x123), Some(0x7123));
        assert_eq!(found(small + 0x1000), None, "not present");
        assert_eq!(found(base | 2 << 30 | 5 << 21 | 0x12_3456), Some(0x32_3456));
        assert_eq!(found(base | 3 << 30 | 0x3234_5678), Some(0x40_3234_5678));
        assert_eq!(found(base), None);
        assert_eq!(found(small & !(1 << 63)), None, "not canonical");
        assert_eq!(found(0), None);
    }

    #[test]
    fn tables_may_have_five_levels_or_be_off() {
        let memory = memory(&[(0x1000, 0x1000 | 1), (0x1000 + 8, 0x1000 | LARGE | 1)]);
        // A table that is its own entry.
        assert_eq!(found(&memory, &registers(CR4_LA57), 0x10), Some(0x1010));
        assert_eq!(found(&memory, &registers(0), 0x10), Some(0x1010));
        let wide = 1 << 48;
        assert_eq!(found(&memory, &registers(0), wide), None);
        // LARGE means nothing in the topmost level: the entry leads to the same table.
        assert_eq!(found(&memory, &registers(CR4_LA57), wide), Some(0x1000));

        let mut off = registers(0);
        off.cr0 = 0;
        assert_eq!(found(&memory, &off, 0x1234_5678), Some(0x1234_5678));
        let mut legacy = registers(0);
        legacy.efer = 0;
        let error = translate(&memory, &legacy, 0).unwrap_err();
        assert!(matches!(error, DebugError::Paging32));
    }

    #[test]
    fn tables_outside_of_memory_lead_nowhere() {
        let memory = memory(&[(0x1000, ADDRESS | 1)]);
        assert_eq!(found(&memory, &registers(0), 0), None);
    }
}
