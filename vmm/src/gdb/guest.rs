//! The guest as a debugger handles it: vCPUs that are held, run or do one step, their registers,
//! and memory by guest virtual address.

use std::sync::Arc;
use std::sync::mpsc::Receiver;

use gdbstub_arch::x86::reg::X86_64CoreRegs;
use kvm_bindings::{KVM_GUESTDBG_INJECT_DB, kvm_debug_exit_arch, kvm_guest_debug};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};

use super::DebugError;
use super::breakpoints::{self, Breakpoints, Cause, INT3, Patch};
use super::{paging, registers};
use crate::kvm::vcpu::VcpuGate;
use crate::memory::GuestMemory;

/// Bytes of a page.
const PAGE: u64 = 4096;

/// An exit of a vCPU for the debugger. The vCPU is held since.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stop {
    pub(super) vcpu: usize,
    pub(super) exit: kvm_debug_exit_arch,
}

/// What a vCPU is to do when the guest goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    /// It stays where it is.
    Stay,
    /// It runs.
    Run,
    /// It does one step.
    Step,
}

/// A guest with a debugger.
pub(super) struct Guest {
    vcpus: Vec<Arc<VcpuGate>>,
    /// What each vCPU was last told to do.
    actions: Vec<Action>,
    memory: GuestMemory,
    stops: Receiver<Stop>,
    breakpoints: Breakpoints,
    /// The vCPU that stopped last. Its page tables are those that breakpoints are set by.
    current: usize,
}

impl Guest {
    /// A guest whose vCPUs are held and tell of their stops to `stops`.
    pub(super) fn new(
        vcpus: Vec<Arc<VcpuGate>>,
        memory: GuestMemory,
        stops: Receiver<Stop>,
    ) -> Self {
        Self {
            actions: vec![Action::Stay; vcpus.len()],
            vcpus,
            memory,
            stops,
            breakpoints: Breakpoints::default(),
            current: 0,
        }
    }

    /// How many vCPUs there are, those included that the guest does not have at the moment.
    pub(super) fn vcpus(&self) -> usize {
        self.vcpus.len()
    }

    /// The vCPU that stopped last.
    pub(super) fn current(&self) -> usize {
        self.current
    }

    fn with_vcpu<T: Send + 'static>(
        &self,
        index: usize,
        task: impl FnOnce(&VcpuFd) -> T + Send + 'static,
    ) -> Result<T, DebugError> {
        let vcpu = self.vcpus.get(index).ok_or(DebugError::NoVcpu)?;
        Ok(vcpu.with_fd(task)?)
    }

    /// Holds all vCPUs: when this returns, none is in the guest.
    pub(super) fn hold(&mut self) -> Result<(), DebugError> {
        for vcpu in &self.vcpus {
            vcpu.hold();
        }
        for index in 0..self.vcpus.len() {
            // The guest's watchdogs are not to take it for a hang. KVM refuses it for a guest
            // that does not use its clock, and has no such watchdog either.
            let _ = self.with_vcpu(index, VcpuFd::kvmclock_ctrl)?;
        }
        // What else has come to a stop is at a breakpoint, where it will stop again, or was
        // stopped by an exception of its own.
        while let Ok(stop) = self.stops.try_recv() {
            if let Cause::Guest(injection) = self.cause(&stop) {
                self.inject(&stop, injection)?;
            }
        }
        Ok(())
    }

    /// Tells every vCPU what to do, by its index, and lets them go.
    pub(super) fn go_on(&mut self, actions: &[Action]) -> Result<(), DebugError> {
        for (index, action) in actions.iter().enumerate() {
            let debug = self.breakpoints.guest_debug(*action == Action::Step);
            self.set_guest_debug(index, debug)?;
        }
        self.actions = actions.to_vec();
        for (vcpu, action) in self.vcpus.iter().zip(actions) {
            if *action != Action::Stay {
                vcpu.release();
            }
        }
        Ok(())
    }

    /// The next stop of a vCPU, if one has come; all are held then. Exceptions of the guest's own
    /// are given back to it.
    pub(super) fn next_stop(&mut self) -> Result<Option<(usize, Cause)>, DebugError> {
        while let Ok(stop) = self.stops.try_recv() {
            match self.cause(&stop) {
                Cause::Guest(injection) => {
                    self.inject(&stop, injection)?;
                    if let Some(vcpu) = self.vcpus.get(stop.vcpu) {
                        vcpu.release();
                    }
                }
                cause => {
                    self.hold()?;
                    self.current = stop.vcpu;
                    return Ok(Some((stop.vcpu, cause)));
                }
            }
        }
        Ok(None)
    }

    /// Takes everything back that a debugger did, and lets the guest run without one.
    pub(super) fn let_go(&mut self) -> Result<(), DebugError> {
        self.hold()?;
        let software: Vec<u64> = self.breakpoints.software.keys().copied().collect();
        for address in software {
            self.remove_software(address)?;
        }
        self.breakpoints.clear_hardware();
        for index in 0..self.vcpus.len() {
            self.set_guest_debug(index, breakpoints::no_debugger())?;
        }
        for vcpu in &self.vcpus {
            vcpu.release();
        }
        Ok(())
    }

    fn is_stepping(&self, vcpu: usize) -> bool {
        self.actions.get(vcpu) == Some(&Action::Step)
    }

    fn cause(&self, stop: &Stop) -> Cause {
        self.breakpoints
            .cause(&stop.exit, self.is_stepping(stop.vcpu))
    }

    /// Gives an exception back to the guest, with what DR6 says about it: KVM leaves the guest's
    /// own DR6 as it was.
    fn inject(&self, stop: &Stop, injection: u32) -> Result<(), DebugError> {
        let mut debug = self.breakpoints.guest_debug(self.is_stepping(stop.vcpu));
        debug.control |= injection;
        let dr6 = stop.exit.dr6;
        self.with_vcpu(stop.vcpu, move |vcpu| {
            if injection == KVM_GUESTDBG_INJECT_DB {
                let mut registers = vcpu.get_debug_regs()?;
                registers.dr6 = dr6;
                vcpu.set_debug_regs(&registers)?;
            }
            vcpu.set_guest_debug(&debug)
        })??;
        Ok(())
    }

    fn set_guest_debug(&self, vcpu: usize, debug: kvm_guest_debug) -> Result<(), DebugError> {
        self.with_vcpu(vcpu, move |vcpu| vcpu.set_guest_debug(&debug))??;
        Ok(())
    }

    /// The registers of a vCPU.
    pub(super) fn registers(&self, vcpu: usize) -> Result<X86_64CoreRegs, DebugError> {
        Ok(self.with_vcpu(vcpu, registers::read)??)
    }

    /// Changes the registers of a vCPU.
    pub(super) fn set_registers(
        &self,
        vcpu: usize,
        wanted: X86_64CoreRegs,
    ) -> Result<(), DebugError> {
        self.with_vcpu(vcpu, move |vcpu| registers::write(vcpu, &wanted))?
    }

    /// Where a guest virtual address is, by the page tables of a vCPU.
    fn translate(&self, vcpu: usize, address: u64) -> Result<GuestAddress, DebugError> {
        let registers = self.with_vcpu(vcpu, VcpuFd::get_sregs)??;
        paging::translate(&self.memory, &registers, address)
    }

    /// Reads memory from a guest virtual address on, up to the first page that is not there, and
    /// returns how much that was.
    pub(super) fn read(
        &self,
        vcpu: usize,
        address: u64,
        data: &mut [u8],
    ) -> Result<usize, DebugError> {
        let mut done = 0;
        while done < data.len() {
            let at = address.wrapping_add(done as u64);
            let end = data.len().min(done + left_in_page(at));
            let read = self.translate(vcpu, at).and_then(|at| {
                let part = data.get_mut(done..end).unwrap_or_default();
                Ok(self.memory.read_slice(part, at)?)
            });
            match read {
                Ok(()) => done = end,
                Err(_) if done > 0 => break,
                Err(error) => return Err(error),
            }
        }
        Ok(done)
    }

    /// Writes memory from a guest virtual address on, whatever its page tables permit.
    ///
    /// # Errors
    /// A page is not there; what comes before it is written.
    pub(super) fn write(&self, vcpu: usize, address: u64, data: &[u8]) -> Result<(), DebugError> {
        let (mut at, mut rest) = (address, data);
        while !rest.is_empty() {
            let (part, after) = rest.split_at(rest.len().min(left_in_page(at)));
            self.memory.write_slice(part, self.translate(vcpu, at)?)?;
            at = at.wrapping_add(part.len() as u64);
            rest = after;
        }
        Ok(())
    }

    /// Puts a software breakpoint into the guest's memory.
    pub(super) fn add_software(&mut self, address: u64) -> Result<(), DebugError> {
        if !self.breakpoints.software.contains_key(&address) {
            let at = self.translate(self.current, address)?;
            let original = self.memory.read_obj(at)?;
            self.memory.write_obj(INT3, at)?;
            let patch = Patch { at, original };
            self.breakpoints.software.insert(address, patch);
        }
        Ok(())
    }

    /// Takes a software breakpoint out again. `false` if there is none.
    pub(super) fn remove_software(&mut self, address: u64) -> Result<bool, DebugError> {
        let Some(patch) = self.breakpoints.software.remove(&address) else {
            return Ok(false);
        };
        // The guest may have put something else there meanwhile.
        if self.memory.read_obj::<u8>(patch.at)? == INT3 {
            self.memory.write_obj(patch.original, patch.at)?;
        }
        Ok(true)
    }

    /// Takes a debug register for a breakpoint. `false` if none is free.
    pub(super) fn add_hardware(&mut self, address: u64) -> bool {
        self.breakpoints.add_hardware(address)
    }

    /// Gives the debug register of a breakpoint back. `false` if there is no such breakpoint.
    pub(super) fn remove_hardware(&mut self, address: u64) -> bool {
        self.breakpoints.remove_hardware(address)
    }
}

fn left_in_page(address: u64) -> usize {
    (PAGE - address % PAGE) as usize
}
