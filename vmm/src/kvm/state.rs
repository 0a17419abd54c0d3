//! What KVM holds of a machine, read to save it and set to restore it.
//!
//! The order of the calls is part of the interface (Documentation/virt/kvm/api.rst and the code of
//! arch/x86/kvm): several of them change what others return or were told. Each has its reason
//! beside it.

use kvm_bindings::{
    CpuId, KVM_CLOCK_TSC_STABLE, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KVM_MAX_CPUID_ENTRIES, Msrs, Xsave, kvm_clock_data, kvm_cpuid_entry2, kvm_debugregs,
    kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_pit_state2, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

/// IA32_TIME_STAMP_COUNTER (Intel SDM volume 4).
const MSR_TSC: u32 = 0x10;
/// IA32_TSC_DEADLINE.
const MSR_TSC_DEADLINE: u32 = 0x6e0;

/// MSRs that one call takes at most (`MAX_IO_MSRS` of KVM).
const MAX_MSRS: usize = 256;

/// How far the frequencies of two time stamp counters may be apart for a guest not to notice, in
/// parts per million (`tsc_tolerance_ppm` of KVM).
const TSC_TOLERANCE_PPM: u64 = 250;

/// Why the state was not read or not set.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// An ioctl failed.
    #[error("{ioctl} failed")]
    Ioctl {
        /// Name of the ioctl.
        ioctl: &'static str,
        /// What the kernel says.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// More than KVM takes.
    #[error("the state of a vCPU holds more entries than KVM takes")]
    TooManyEntries,
    /// The host cannot set a register that matters.
    #[error("this host cannot set the model-specific register {index:#x} to {value:#x}")]
    Msr {
        /// Number of the register.
        index: u32,
        /// What it should hold.
        value: u64,
    },
    /// The extended state has another size than on this host.
    #[error("the extended processor state has {words} words, on this host it has {expected}")]
    Xsave {
        /// Size in the snapshot.
        words: usize,
        /// Size on this host.
        expected: usize,
    },
    /// The clocks run at different speeds.
    #[error(
        "the guest's time stamp counter runs at {saved} kHz, this host's at {host} kHz, and it \
         cannot be scaled"
    )]
    TscFrequency {
        /// At the snapshot.
        saved: u32,
        /// Here.
        host: u32,
    },
}

fn ioctl(ioctl: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> StateError {
    move |source| StateError::Ioctl { ioctl, source }
}

/// A vCPU.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VcpuState {
    /// What the processor reports of itself.
    pub cpuid: Vec<kvm_cpuid_entry2>,
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    /// 1024 words, and what the host has beyond that.
    xsave: Vec<u32>,
    xcrs: kvm_xcrs,
    debug_regs: kvm_debugregs,
    lapic: kvm_lapic_state,
    /// In the order in which they are set.
    msrs: Vec<kvm_msr_entry>,
    /// Frequency of the time stamp counter in kHz.
    tsc_khz: u32,
    events: kvm_vcpu_events,
}

/// Size of the extended state on this host, in words: `kvm_xsave` and what follows it.
#[derive(Debug, Clone, Copy)]
pub struct XsaveSize {
    extra_words: usize,
    /// Whether the host knows that there can be more than `kvm_xsave`.
    has_xsave2: bool,
}

impl XsaveSize {
    /// As the machine's KVM tells.
    pub fn of(vm: &VmFd) -> Self {
        // A size in bytes, or 0.
        let bytes = vm.check_extension_int(Cap::Xsave2);
        let beyond = usize::try_from(bytes)
            .unwrap_or(0)
            .saturating_sub(size_of::<kvm_xsave>());
        Self {
            extra_words: beyond.div_ceil(size_of::<u32>()),
            has_xsave2: bytes > 0,
        }
    }
}

impl VcpuState {
    /// Reads the state of a vCPU that does not run, on its own thread. `msr_indices` are those that
    /// KVM knows of.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn save(fd: &VcpuFd, msr_indices: &[u32], size: XsaveSize) -> Result<Self, StateError> {
        // First, since reading it makes KVM act on INIT and SIPI that have come, which changes
        // registers.
        let mp_state = fd.get_mp_state().map_err(ioctl("KVM_GET_MP_STATE"))?;
        let regs = fd.get_regs().map_err(ioctl("KVM_GET_REGS"))?;
        let sregs = fd.get_sregs().map_err(ioctl("KVM_GET_SREGS"))?;
        let xsave = get_xsave(fd, size)?;
        let xcrs = fd.get_xcrs().map_err(ioctl("KVM_GET_XCRS"))?;
        let debug_regs = fd.get_debug_regs().map_err(ioctl("KVM_GET_DEBUGREGS"))?;
        let lapic = fd.get_lapic().map_err(ioctl("KVM_GET_LAPIC"))?;
        let tsc_khz = fd.get_tsc_khz().map_err(ioctl("KVM_GET_TSC_KHZ"))?;
        // Read each time, never kept: KVM itself changes entries, with the state of the APIC.
        let cpuid = fd
            .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
            .map_err(ioctl("KVM_GET_CPUID2"))?;
        let msrs = get_msrs(fd, msr_indices)?;
        // Last: everything above may still deliver or take back an exception.
        let events = fd.get_vcpu_events().map_err(ioctl("KVM_GET_VCPU_EVENTS"))?;
        Ok(Self {
            cpuid: cpuid.as_slice().to_vec(),
            mp_state,
            regs,
            sregs,
            xsave,
            xcrs,
            debug_regs,
            lapic,
            msrs: in_order(msrs),
            tsc_khz,
            events,
        })
    }

    /// Gives the state to a vCPU that was just created.
    ///
    /// # Errors
    /// The host's processor or KVM cannot hold it.
    pub fn restore(&self, fd: &VcpuFd, size: XsaveSize) -> Result<(), StateError> {
        let cpuid = CpuId::from_entries(&self.cpuid).map_err(|_| StateError::TooManyEntries)?;
        // Before everything that depends on it.
        fd.set_cpuid2(&cpuid).map_err(ioctl("KVM_SET_CPUID2"))?;
        self.match_tsc(fd)?;
        fd.set_mp_state(self.mp_state)
            .map_err(ioctl("KVM_SET_MP_STATE"))?;
        fd.set_regs(&self.regs).map_err(ioctl("KVM_SET_REGS"))?;
        fd.set_sregs(&self.sregs).map_err(ioctl("KVM_SET_SREGS"))?;
        // Before the state that it enables parts of.
        fd.set_xcrs(&self.xcrs).map_err(ioctl("KVM_SET_XCRS"))?;
        self.set_xsave(fd, size)?;
        fd.set_debug_regs(&self.debug_regs)
            .map_err(ioctl("KVM_SET_DEBUGREGS"))?;
        // After the base of the APIC, which is in the special registers, and before the MSR of its
        // timer's deadline.
        fd.set_lapic(&self.lapic).map_err(ioctl("KVM_SET_LAPIC"))?;
        self.set_msrs(fd)?;
        // Last: KVM_SET_REGS clears exceptions.
        fd.set_vcpu_events(&self.events)
            .map_err(ioctl("KVM_SET_VCPU_EVENTS"))
    }

    fn match_tsc(&self, fd: &VcpuFd) -> Result<(), StateError> {
        let host = fd.get_tsc_khz().map_err(ioctl("KVM_GET_TSC_KHZ"))?;
        let saved = self.tsc_khz;
        let apart = u64::from(host.abs_diff(saved)) * 1_000_000;
        if apart <= u64::from(saved) * TSC_TOLERANCE_PPM {
            return Ok(());
        }
        fd.set_tsc_khz(saved)
            .map_err(|_| StateError::TscFrequency { saved, host })
    }

    fn set_xsave(&self, fd: &VcpuFd, size: XsaveSize) -> Result<(), StateError> {
        let region = kvm_xsave::default().region.len();
        let wrong = || StateError::Xsave {
            words: self.xsave.len(),
            expected: region + size.extra_words,
        };
        if self.xsave.len() != region + size.extra_words {
            return Err(wrong());
        }
        let (front, extra) = self.xsave.split_at(region);
        let mut xsave = Xsave::new(size.extra_words).map_err(|_| wrong())?;
        xsave.as_mut_slice().copy_from_slice(extra);
        // SAFETY: the length of the variable part stays as it is.
        let fixed = unsafe { xsave.as_mut_fam_struct() };
        fixed.xsave.region.copy_from_slice(front);
        // SAFETY: the structure has the size that KVM_CAP_XSAVE2 names, and so all that KVM reads.
        unsafe { fd.set_xsave2(&xsave) }.map_err(ioctl("KVM_SET_XSAVE"))
    }

    fn set_msrs(&self, fd: &VcpuFd) -> Result<(), StateError> {
        let mut rest = self.msrs.as_slice();
        while !rest.is_empty() {
            let (batch, _) = rest.split_at(rest.len().min(MAX_MSRS));
            let msrs = Msrs::from_entries(batch).map_err(|_| StateError::TooManyEntries)?;
            // KVM stops at the first that it refuses, and tells how many it took.
            let accepted = fd.set_msrs(&msrs).map_err(ioctl("KVM_SET_MSRS"))?;
            rest = rest.get(accepted..).unwrap_or_default();
            if accepted < batch.len()
                && let Some((refused, others)) = rest.split_first()
            {
                if !holds(fd, refused) {
                    return Err(StateError::Msr {
                        index: refused.index,
                        value: refused.data,
                    });
                }
                rest = others;
            }
        }
        Ok(())
    }
}

/// Whether the vCPU's register holds the value, as one that cannot be written may.
fn holds(fd: &VcpuFd, entry: &kvm_msr_entry) -> bool {
    let asked = kvm_msr_entry {
        index: entry.index,
        ..Default::default()
    };
    let Ok(mut msrs) = Msrs::from_entries(&[asked]) else {
        return false;
    };
    let read = fd.get_msrs(&mut msrs);
    matches!(read, Ok(1)) && msrs.as_slice().iter().all(|msr| msr.data == entry.data)
}

fn get_xsave(fd: &VcpuFd, size: XsaveSize) -> Result<Vec<u32>, StateError> {
    if !size.has_xsave2 {
        let xsave = fd.get_xsave().map_err(ioctl("KVM_GET_XSAVE"))?;
        return Ok(xsave.region.to_vec());
    }
    let mut xsave = Xsave::new(size.extra_words).map_err(|_| StateError::TooManyEntries)?;
    // SAFETY: the structure has the size that KVM_CAP_XSAVE2 names, and so room for all that KVM
    // writes.
    unsafe { fd.get_xsave2(&mut xsave) }.map_err(ioctl("KVM_GET_XSAVE2"))?;
    let mut words = xsave.as_fam_struct_ref().xsave.region.to_vec();
    words.extend_from_slice(xsave.as_slice());
    Ok(words)
}

/// Reads all MSRs that can be read: KVM lists some that are there only with features that this
/// vCPU has not.
fn get_msrs(fd: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, StateError> {
    let mut found = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let (batch, _) = rest.split_at(rest.len().min(MAX_MSRS));
        let asked: Vec<_> = batch
            .iter()
            .map(|index| kvm_msr_entry {
                index: *index,
                ..Default::default()
            })
            .collect();
        let mut msrs = Msrs::from_entries(&asked).map_err(|_| StateError::TooManyEntries)?;
        // KVM stops at the first that it refuses, and tells how many it read.
        let read = fd.get_msrs(&mut msrs).map_err(ioctl("KVM_GET_MSRS"))?;
        found.extend_from_slice(msrs.as_slice().get(..read).unwrap_or_default());
        let skipped = usize::from(read < batch.len());
        rest = rest.get(read + skipped..).unwrap_or_default();
    }
    Ok(found)
}

/// The MSRs in the order in which they are to be set: the deadline of the timer last, since it is
/// compared with the time stamp counter when it is set.
///
/// A deadline of 0 is one that has passed, or none. Were it one that passed while its interrupt was
/// on the way, the interrupt would be lost; as a deadline that passes just now, it comes once too
/// often, which a kernel bears.
fn in_order(mut msrs: Vec<kvm_msr_entry>) -> Vec<kvm_msr_entry> {
    let now = msrs.iter().find(|msr| msr.index == MSR_TSC);
    let now = now.map_or(0, |msr| msr.data);
    for msr in &mut msrs {
        if msr.index == MSR_TSC_DEADLINE && msr.data == 0 {
            msr.data = now;
        }
    }
    msrs.sort_by_key(|msr| msr.index == MSR_TSC_DEADLINE);
    msrs
}

/// What belongs to no single vCPU: interrupt controllers, timer and clock.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmState {
    pit: kvm_pit_state2,
    clock: kvm_clock_data,
    pic_master: kvm_irqchip,
    pic_slave: kvm_irqchip,
    ioapic: kvm_irqchip,
}

impl VmState {
    /// Reads the state of a machine whose vCPUs and devices rest.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn save(fd: &VmFd) -> Result<Self, StateError> {
        let chip = |chip_id| {
            let mut chip = kvm_irqchip {
                chip_id,
                ..Default::default()
            };
            fd.get_irqchip(&mut chip)
                .map_err(ioctl("KVM_GET_IRQCHIP"))?;
            Ok(chip)
        };
        let pit = fd.get_pit2().map_err(ioctl("KVM_GET_PIT2"))?;
        let mut clock = fd.get_clock().map_err(ioctl("KVM_GET_CLOCK"))?;
        // A property of the host, and not for KVM_SET_CLOCK to be told.
        clock.flags &= !KVM_CLOCK_TSC_STABLE;
        Ok(Self {
            pit,
            clock,
            pic_master: chip(KVM_IRQCHIP_PIC_MASTER)?,
            pic_slave: chip(KVM_IRQCHIP_PIC_SLAVE)?,
            ioapic: chip(KVM_IRQCHIP_IOAPIC)?,
        })
    }

    /// Gives the state to a machine whose vCPUs have theirs.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn restore(&self, fd: &VmFd) -> Result<(), StateError> {
        fd.set_pit2(&self.pit).map_err(ioctl("KVM_SET_PIT2"))?;
        set_clock(fd, self.clock.clock)?;
        for chip in [&self.pic_master, &self.pic_slave, &self.ioapic] {
            fd.set_irqchip(chip).map_err(ioctl("KVM_SET_IRQCHIP"))?;
        }
        Ok(())
    }
}

/// Lets the guest's clock go on from `ns`: without the flag of the host's time, no time has passed for
/// it meanwhile.
fn set_clock(fd: &VmFd, ns: u64) -> Result<(), StateError> {
    let clock = kvm_clock_data {
        clock: ns,
        ..Default::default()
    };
    fd.set_clock(&clock).map_err(ioctl("KVM_SET_CLOCK"))
}

/// The clocks of a machine that has been restored and has not run since. They are set when it is
/// restored, since other state depends on them, and once more when it begins to run, so that nothing
/// has passed for it in between: a guest that finds that it was away has much to catch up on.
///
/// Its timers may have run out by the real time meanwhile, and their interrupts come early; a kernel
/// then looks at its clock and sets them anew.
#[derive(Debug, Clone)]
pub struct Clocks {
    ns: u64,
    /// Of each vCPU that has one.
    tsc: Vec<Option<u64>>,
}

impl Clocks {
    /// Those in the state of a machine.
    pub fn of(vcpus: &[VcpuState], vm: &VmState) -> Self {
        let tsc = |vcpu: &VcpuState| {
            let tsc = vcpu.msrs.iter().find(|msr| msr.index == MSR_TSC);
            tsc.map(|msr| msr.data)
        };
        Self {
            ns: vm.clock.clock,
            tsc: vcpus.iter().map(tsc).collect(),
        }
    }

    /// What each vCPU's counter shows, in the order of the vCPUs. KVM takes values that are set within
    /// a second of each other, as time goes, for one and the same: so the counters stay in step.
    pub fn tsc(&self) -> &[Option<u64>] {
        &self.tsc
    }

    /// Sets the machine's clock. Its vCPUs have theirs and do not run.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn set(&self, fd: &VmFd) -> Result<(), StateError> {
        set_clock(fd, self.ns)
    }
}

/// Sets the time stamp counter of a vCPU that does not run, on its own thread.
///
/// # Errors
/// KVM refuses.
pub fn set_tsc(fd: &VcpuFd, value: u64) -> Result<(), StateError> {
    let entry = kvm_msr_entry {
        index: MSR_TSC,
        data: value,
        ..Default::default()
    };
    let msrs = Msrs::from_entries(&[entry]).map_err(|_| StateError::TooManyEntries)?;
    match fd.set_msrs(&msrs).map_err(ioctl("KVM_SET_MSRS"))? {
        1 => Ok(()),
        _ => Err(StateError::Msr {
            index: MSR_TSC,
            value,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn msr(index: u32, data: u64) -> kvm_msr_entry {
        kvm_msr_entry {
            index,
            data,
            ..Default::default()
        }
    }

    #[test]
    fn the_deadline_comes_last_and_none_is_now() {
        for (deadline, expected) in [(0, 700), (900, 900)] {
            let msrs = in_order(vec![
                msr(MSR_TSC_DEADLINE, deadline),
                msr(MSR_TSC, 700),
                msr(0x174, 1),
            ]);
            let found: Vec<_> = msrs.iter().map(|msr| (msr.index, msr.data)).collect();
            let expected = [(MSR_TSC, 700), (0x174, 1), (MSR_TSC_DEADLINE, expected)];
            assert_eq!(found, expected);
        }
    }
}
