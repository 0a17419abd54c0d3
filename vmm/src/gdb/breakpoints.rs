//! Breakpoints, and what KVM is told of them.
//!
//! A software breakpoint is an INT3 instruction in the guest's memory, a hardware breakpoint one of
//! the four debug registers, which KVM switches between the debugger's and the guest's own. KVM
//! reports both, and single steps, by `KVM_EXIT_DEBUG` (Linux, Documentation/virt/kvm/api.rst,
//! 4.87). It also reports the guest's own breakpoints then; those are given back to the guest.

use std::collections::BTreeMap;

use kvm_bindings::{
    KVM_GUESTDBG_BLOCKIRQ, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_INJECT_BP, KVM_GUESTDBG_INJECT_DB,
    KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW_BP, KVM_GUESTDBG_USE_SW_BP, kvm_debug_exit_arch,
    kvm_guest_debug,
};
use vm_memory::GuestAddress;

/// The instruction that is a software breakpoint.
pub(super) const INT3: u8 = 0xcc;

/// The exceptions that KVM reports: debug and breakpoint.
const DB_VECTOR: u32 = 1;
const BP_VECTOR: u32 = 3;

/// How many debug registers hold an address.
const SLOTS: usize = 4;
/// DR6: a single step was done.
const DR6_SINGLE_STEP: u64 = 1 << 14;
/// DR6: the debug registers whose condition was met.
const DR6_CONDITIONS: u64 = 0xf;
/// DR7: bit 10 is always set (Intel SDM, volume 3, 18.2.4).
const DR7_RESERVED: u64 = 1 << 10;

/// A software breakpoint that is in the guest's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Patch {
    /// Where.
    pub(super) at: GuestAddress,
    /// The byte that was there.
    pub(super) original: u8,
}

/// All breakpoints, by guest virtual address.
#[derive(Debug, Default)]
pub(super) struct Breakpoints {
    pub(super) software: BTreeMap<u64, Patch>,
    hardware: [Option<u64>; SLOTS],
}

/// Why a vCPU has stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cause {
    /// It has come to a software breakpoint.
    Software,
    /// It has come to a hardware breakpoint.
    Hardware,
    /// It has done one step.
    Step,
    /// It is the guest's own doing: the exception is the guest's to handle. These flags make KVM
    /// raise it.
    Guest(u32),
}

impl Breakpoints {
    /// Takes a debug register for a breakpoint. `false` if none is free.
    pub(super) fn add_hardware(&mut self, address: u64) -> bool {
        if self.hardware.contains(&Some(address)) {
            return true;
        }
        let free = self.hardware.iter_mut().find(|slot| slot.is_none());
        free.map(|slot| *slot = Some(address)).is_some()
    }

    /// Gives the debug register of a breakpoint back. `false` if there is no such breakpoint.
    pub(super) fn remove_hardware(&mut self, address: u64) -> bool {
        let mut slots = self.hardware.iter_mut();
        let slot = slots.find(|slot| **slot == Some(address));
        slot.map(|slot| *slot = None).is_some()
    }

    /// Forgets all hardware breakpoints.
    pub(super) fn clear_hardware(&mut self) {
        self.hardware = [None; SLOTS];
    }

    /// What a vCPU is told that runs, or does one step, with these breakpoints.
    pub(super) fn guest_debug(&self, step: bool) -> kvm_guest_debug {
        let mut debug = kvm_guest_debug {
            control: KVM_GUESTDBG_ENABLE,
            ..Default::default()
        };
        if step {
            // Without interrupts, or the step would often lead into the handler of one.
            debug.control |= KVM_GUESTDBG_SINGLESTEP | KVM_GUESTDBG_BLOCKIRQ;
        }
        if !self.software.is_empty() {
            debug.control |= KVM_GUESTDBG_USE_SW_BP;
        }
        debug.arch.debugreg[7] = DR7_RESERVED;
        for (index, slot) in self.hardware.iter().enumerate() {
            if let Some(address) = slot {
                debug.control |= KVM_GUESTDBG_USE_HW_BP;
                debug.arch.debugreg[index] = *address;
                // Global enable; condition and length of an execution breakpoint are zero.
                debug.arch.debugreg[7] |= 2 << (2 * index);
            }
        }
        debug
    }

    /// Why a vCPU has stopped that was to do one step, or not.
    pub(super) fn cause(&self, exit: &kvm_debug_exit_arch, step: bool) -> Cause {
        match exit.exception {
            BP_VECTOR if self.software.contains_key(&exit.pc) => Cause::Software,
            BP_VECTOR => Cause::Guest(KVM_GUESTDBG_INJECT_BP),
            DB_VECTOR if self.meets_condition(exit.dr6) => Cause::Hardware,
            DB_VECTOR if step && exit.dr6 & DR6_SINGLE_STEP != 0 => Cause::Step,
            DB_VECTOR => Cause::Guest(KVM_GUESTDBG_INJECT_DB),
            // KVM reports no other.
            _ => Cause::Step,
        }
    }

    fn meets_condition(&self, dr6: u64) -> bool {
        let met = dr6 & DR6_CONDITIONS;
        (0..)
            .zip(&self.hardware)
            .any(|(index, slot)| slot.is_some() && met & (1 << index) != 0)
    }
}

/// What a vCPU is told that no debugger cares about.
pub(super) fn no_debugger() -> kvm_guest_debug {
    kvm_guest_debug::default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hardware_breakpoints_are_four() {
        let mut breakpoints = Breakpoints::default();
        for address in [0x10, 0x20, 0x30, 0x40] {
            assert!(breakpoints.add_hardware(address));
            assert!(breakpoints.add_hardware(address), "a second time is none");
        }
        assert!(!breakpoints.add_hardware(0x50));
        assert!(breakpoints.remove_hardware(0x20));
        assert!(!breakpoints.remove_hardware(0x20));
        assert!(breakpoints.add_hardware(0x50));
        let debug = breakpoints.guest_debug(false);
        assert_eq!(debug.arch.debugreg[..4], [0x10, 0x50, 0x30, 0x40]);
        // G0 to G3, and the bit that is always set.
        assert_eq!(debug.arch.debugreg[7], 0b100_1010_1010);
        assert_eq!(debug.control, KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP);
        breakpoints.clear_hardware();
        assert_eq!(breakpoints.guest_debug(false).arch.debugreg[7], 1 << 10);
    }

    #[test]
    fn kvm_is_told_of_what_there_is() {
        let mut breakpoints = Breakpoints::default();
        assert_eq!(breakpoints.guest_debug(false).control, KVM_GUESTDBG_ENABLE);
        let step = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP | KVM_GUESTDBG_BLOCKIRQ;
        assert_eq!(breakpoints.guest_debug(true).control, step);
        let patch = Patch {
            at: GuestAddress(0x1000),
            original: 0x90,
        };
        breakpoints.software.insert(0xffff_1000, patch);
        assert_eq!(
            breakpoints.guest_debug(true).control,
            step | KVM_GUESTDBG_USE_SW_BP
        );
        assert_eq!(no_debugger().control, 0);
    }

    #[test]
    fn the_guests_own_breakpoints_are_told_from_the_debuggers() {
        let mut breakpoints = Breakpoints::default();
        let patch = Patch {
            at: GuestAddress(0),
            original: 0,
        };
        breakpoints.software.insert(0x100, patch);
        breakpoints.add_hardware(0x200);
        let exit = |exception, pc, dr6| kvm_debug_exit_arch {
            exception,
            pc,
            dr6,
            ..Default::default()
        };
        let cause = |exit, step| breakpoints.cause(&exit, step);
        assert_eq!(cause(exit(3, 0x100, 0), false), Cause::Software);
        assert_eq!(
            cause(exit(3, 0x101, 0), true),
            Cause::Guest(KVM_GUESTDBG_INJECT_BP)
        );
        assert_eq!(cause(exit(1, 0x200, 1), false), Cause::Hardware);
        // A register that the debugger does not use.
        assert_eq!(
            cause(exit(1, 0x200, 2), false),
            Cause::Guest(KVM_GUESTDBG_INJECT_DB)
        );
        assert_eq!(cause(exit(1, 0x300, 1 << 14), true), Cause::Step);
        assert_eq!(
            cause(exit(1, 0x300, 1 << 14), false),
            Cause::Guest(KVM_GUESTDBG_INJECT_DB)
        );
    }
}
