//! The guest as `gdbstub` asks for it: each vCPU is a thread, numbered from 1.

use std::num::NonZeroUsize;

use gdbstub::common::{Signal, Tid};
use gdbstub::stub::MultiThreadStopReason;
use gdbstub::target::ext::base::BaseOps;
use gdbstub::target::ext::base::multithread::{
    MultiThreadBase, MultiThreadResume, MultiThreadResumeOps, MultiThreadSchedulerLocking,
    MultiThreadSchedulerLockingOps, MultiThreadSingleStep, MultiThreadSingleStepOps,
};
use gdbstub::target::ext::breakpoints::{
    Breakpoints, BreakpointsOps, HwBreakpoint, HwBreakpointOps, SwBreakpoint, SwBreakpointOps,
};
use gdbstub::target::{Target, TargetError, TargetResult};
use gdbstub_arch::x86::X86_64_SSE;
use gdbstub_arch::x86::reg::X86_64CoreRegs;

use super::DebugError;
use super::breakpoints::Cause;
use super::guest::{Action, Guest};

/// Why the guest has stopped.
pub(super) type StopReason = MultiThreadStopReason<u64>;

/// A guest and what the debugger has said it is to do next.
pub(super) struct DebuggedGuest {
    pub(super) guest: Guest,
    next: Vec<Option<Action>>,
    /// vCPUs of which nothing was said stay where they are, rather than run.
    others_stay: bool,
}

impl DebuggedGuest {
    pub(super) fn new(guest: Guest) -> Self {
        Self {
            next: vec![None; guest.vcpus()],
            others_stay: false,
            guest,
        }
    }

    /// The next stop, if one has come.
    pub(super) fn next_stop(&mut self) -> Result<Option<StopReason>, DebugError> {
        let stop = self.guest.next_stop()?;
        Ok(stop.map(|(vcpu, cause)| match cause {
            Cause::Software => StopReason::SwBreak(tid(vcpu)),
            Cause::Hardware => StopReason::HwBreak(tid(vcpu)),
            Cause::Step | Cause::Guest(_) => signal(vcpu, Signal::SIGTRAP),
        }))
    }

    /// Stops the guest because the debugger says so.
    pub(super) fn interrupt(&mut self) -> Result<StopReason, DebugError> {
        self.guest.hold()?;
        Ok(signal(self.guest.current(), Signal::SIGINT))
    }

    fn set(&mut self, tid: Tid, action: Action) -> Result<(), DebugError> {
        let next = self.next.get_mut(vcpu(tid)).ok_or(DebugError::NoVcpu)?;
        *next = Some(action);
        Ok(())
    }
}

fn signal(vcpu: usize, signal: Signal) -> StopReason {
    StopReason::SignalWithThread {
        tid: tid(vcpu),
        signal,
    }
}

fn tid(vcpu: usize) -> Tid {
    NonZeroUsize::MIN.saturating_add(vcpu)
}

fn vcpu(tid: Tid) -> usize {
    tid.get() - 1
}

/// A request that fails, and tells why in the log only: the protocol has numbers for errors.
fn non_fatal<T>(result: Result<T, DebugError>) -> TargetResult<T, DebuggedGuest> {
    result.map_err(|error| match error {
        DebugError::Ended(_) => TargetError::Fatal(error),
        error => {
            tracing::info!(
                error = crate::error_chain(&error),
                "refused to the debugger"
            );
            TargetError::NonFatal
        }
    })
}

impl Target for DebuggedGuest {
    type Arch = X86_64_SSE;
    type Error = DebugError;

    fn base_ops(&mut self) -> BaseOps<'_, Self::Arch, Self::Error> {
        BaseOps::MultiThread(self)
    }

    fn support_breakpoints(&mut self) -> Option<BreakpointsOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadBase for DebuggedGuest {
    fn read_registers(&mut self, regs: &mut X86_64CoreRegs, tid: Tid) -> TargetResult<(), Self> {
        *regs = non_fatal(self.guest.registers(vcpu(tid)))?;
        Ok(())
    }

    fn write_registers(&mut self, regs: &X86_64CoreRegs, tid: Tid) -> TargetResult<(), Self> {
        non_fatal(self.guest.set_registers(vcpu(tid), regs.clone()))
    }

    fn read_addrs(&mut self, start: u64, data: &mut [u8], tid: Tid) -> TargetResult<usize, Self> {
        non_fatal(self.guest.read(vcpu(tid), start, data))
    }

    fn write_addrs(&mut self, start: u64, data: &[u8], tid: Tid) -> TargetResult<(), Self> {
        non_fatal(self.guest.write(vcpu(tid), start, data))
    }

    fn list_active_threads(&mut self, register: &mut dyn FnMut(Tid)) -> Result<(), DebugError> {
        (0..self.guest.vcpus()).map(tid).for_each(register);
        Ok(())
    }

    fn support_resume(&mut self) -> Option<MultiThreadResumeOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadResume for DebuggedGuest {
    fn resume(&mut self) -> Result<(), DebugError> {
        let default = match self.others_stay {
            true => Action::Stay,
            false => Action::Run,
        };
        let next = self.next.iter();
        let actions: Vec<Action> = next.map(|action| action.unwrap_or(default)).collect();
        self.guest.go_on(&actions)
    }

    fn clear_resume_actions(&mut self) -> Result<(), DebugError> {
        self.next.fill(None);
        self.others_stay = false;
        Ok(())
    }

    /// Signals are those of processes, of which a guest knows nothing.
    fn set_resume_action_continue(
        &mut self,
        tid: Tid,
        _signal: Option<Signal>,
    ) -> Result<(), DebugError> {
        self.set(tid, Action::Run)
    }

    fn support_single_step(&mut self) -> Option<MultiThreadSingleStepOps<'_, Self>> {
        Some(self)
    }

    fn support_scheduler_locking(&mut self) -> Option<MultiThreadSchedulerLockingOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadSingleStep for DebuggedGuest {
    fn set_resume_action_step(
        &mut self,
        tid: Tid,
        _signal: Option<Signal>,
    ) -> Result<(), DebugError> {
        self.set(tid, Action::Step)
    }
}

impl MultiThreadSchedulerLocking for DebuggedGuest {
    fn set_resume_action_scheduler_lock(&mut self) -> Result<(), DebugError> {
        self.others_stay = true;
        Ok(())
    }
}

impl Breakpoints for DebuggedGuest {
    fn support_sw_breakpoint(&mut self) -> Option<SwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_breakpoint(&mut self) -> Option<HwBreakpointOps<'_, Self>> {
        Some(self)
    }
}

impl SwBreakpoint for DebuggedGuest {
    fn add_sw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        non_fatal(self.guest.add_software(address))?;
        Ok(true)
    }

    fn remove_sw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        non_fatal(self.guest.remove_software(address))
    }
}

impl HwBreakpoint for DebuggedGuest {
    fn add_hw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        Ok(self.guest.add_hardware(address))
    }

    fn remove_hw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        Ok(self.guest.remove_hardware(address))
    }
}
