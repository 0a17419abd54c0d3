//! A guest of 16 bytes that makes a system call.
//!
//! A KVM that emulates part of the processor in software answers every ioctl as a real one
//! does, and can still leave a guest's system call at privilege level 3, where no kernel can
//! serve it. So a guest tries: it starts in 64-bit mode at level 0, returns to level 3 as a
//! kernel does to its programs, makes a system call, and says from the handler which level it
//! has got. Then it does what only level 0 may do, and halts.
//!
//! The handler can tell the level even when that is wrong: the guest runs with IOPL 3, so that
//! OUT is allowed at any level. HLT is not. There is no interrupt descriptor table: every
//! exception becomes a triple fault, which ends the guest.

use std::io;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, Msrs, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MmapRegion,
};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use super::Finding;

const CHECK: &str = "guest";

// Guest memory. One large page maps all of it to itself, open to level 3.
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PD: u64 = 0x3000;
const GDT_BASE: u64 = 0x4000;
const TSS: u64 = 0x5000;
const CODE: u64 = 0x6000;
const MEMORY_SIZE: usize = 0x8000;

/// The guest's program.
#[rustfmt::skip]
const PROGRAM: [u8; 16] = [
    // Level 0 starts here. SYSRET to 64-bit mode: RIP = RCX, RFLAGS = R11, CPL = 3.
    0x48, 0x0f, 0x07,       // 0x00  sysretq
    // Level 3. SYSCALL: RIP = LSTAR, CS from STAR, CPL = 0.
    0x0f, 0x05,             // 0x03  syscall
    // Not reached: the handler does not return.
    0x0f, 0x0b,             // 0x05  ud2
    // The handler. A clean EAX, so that the report holds the selector and nothing else.
    0x31, 0xc0,             // 0x07  xor eax, eax
    0x8c, 0xc8,             // 0x09  mov eax, cs
    0xe7, PORT as u8,       // 0x0b  out PORT, eax
    // #GP at any level but 0.
    0xf4,                   // 0x0d  hlt
    0x0f, 0x0b,             // 0x0e  ud2
];
const LEVEL_3_ENTRY: u64 = CODE + 0x03;
const HANDLER: u64 = CODE + 0x07;
/// The port that the guest reports to.
const PORT: u16 = 0xf4;

// Entries of page tables: Intel SDM volume 3, 4.5.
const PAGE_PRESENT: u64 = 1 << 0;
const PAGE_WRITABLE: u64 = 1 << 1;
const PAGE_USER: u64 = 1 << 2;
const PAGE_LARGE: u64 = 1 << 7;

/// The order is the one that SYSCALL and SYSRET demand: code and data of level 0, then data
/// and code of level 3 (Intel SDM volume 2, SYSCALL and SYSRET).
const GDT: [u64; 7] = [
    0,
    // 0x08: code of level 0: base 0, limit 4 GiB, present, execute/read, 64-bit.
    0x00af_9b00_0000_ffff,
    // 0x10: data of level 0: base 0, limit 4 GiB, present, read/write.
    0x00cf_9300_0000_ffff,
    // 0x18: data of level 3.
    0x00cf_f300_0000_ffff,
    // 0x20: code of level 3.
    0x00af_fb00_0000_ffff,
    // 0x28: task state segment, 64-bit, busy, at TSS, of 0x68 bytes; two entries long.
    0x0000_8b00_0000_0067 | TSS << 16,
    0,
];
const KERNEL_CODE: u16 = 0x08;
const KERNEL_DATA: u16 = 0x10;
const TASK: u16 = 0x28;

// Intel SDM volume 4, table 2-2.
const MSR_STAR: u32 = 0xc000_0081;
const MSR_LSTAR: u32 = 0xc000_0082;
const MSR_FMASK: u32 = 0xc000_0084;
/// SYSCALL takes CS from bits 47:32 and SS from 8 above; SYSRET takes SS from 8 above bits
/// 63:48 and CS from 16 above, with level 3 in both.
const STAR: u64 = (KERNEL_CODE as u64) << 32 | (KERNEL_DATA as u64) << 48;

/// Intel SDM volume 2, CPUID, leaf 0DH.
const CPUID_EXTENDED_STATES: u32 = 0xd;

/// Protection, extension type (fixed to one), numeric errors, paging.
const CR0: u64 = 1 << 0 | 1 << 4 | 1 << 5 | 1 << 31;
/// Physical address extension.
const CR4: u64 = 1 << 5;
/// SYSCALL, long mode enabled and active.
const EFER: u64 = 1 << 0 | 1 << 8 | 1 << 10;
/// Bit 1 is always one; IOPL is 3.
const RFLAGS: u64 = 1 << 1 | 3 << 12;

/// What became of the guest.
#[derive(Debug)]
pub(super) enum Outcome {
    /// It halted, after it had reported this code segment, if any.
    Halted {
        /// The selector in CS, whose lowest two bits are the privilege level.
        reported: Option<u32>,
    },
    /// It met an exception that it had no handler for.
    TripleFault {
        /// What it had reported before.
        reported: Option<u32>,
    },
    /// KVM could not go on.
    InternalError,
    /// The processor did not take the guest's state.
    EntryFailed {
        /// The processor's reason.
        reason: u64,
    },
    /// An exit that this guest gives no cause for.
    Unexpected(String),
    /// It did nothing within the time limit, but could be stopped.
    TimedOut,
    /// It could not be stopped either.
    Stuck,
    /// It could not be made or run.
    Failed(ProbeError),
}

/// Why the guest could not be made or run.
#[derive(Debug, thiserror::Error)]
pub(super) enum ProbeError {
    #[error("{ioctl} failed")]
    Ioctl {
        ioctl: &'static str,
        #[source]
        source: kvm_ioctls::Error,
    },
    #[error("KVM refuses the registers that lead system calls to their handler")]
    Msr,
    #[error("no memory for the guest")]
    Memory(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("no thread for the guest")]
    Thread(#[source] io::Error),
    #[error("the signal that stops the guest cannot be caught")]
    Signal(#[source] vmm_sys_util::errno::Error),
}

/// Runs the guest for at most `limit`, and one second more if it cannot be stopped.
pub(super) fn run(kvm: Kvm, limit: Duration) -> Outcome {
    // The handler does nothing: the signal's arrival alone ends KVM_RUN.
    extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    if let Err(error) = register_signal_handler(SIGRTMIN(), on_kick) {
        return Outcome::Failed(ProbeError::Signal(error));
    }

    let (send, receive) = mpsc::channel();
    let guest = thread::Builder::new()
        .name("doctor-guest".to_owned())
        .spawn(move || {
            let outcome = Guest::new(&kvm).and_then(Guest::run);
            // The receiver has gone if the outcome came too late to matter.
            let _ = send.send(outcome.unwrap_or_else(Outcome::Failed));
        });
    let guest = match guest {
        Ok(guest) => guest,
        Err(error) => return Outcome::Failed(ProbeError::Thread(error)),
    };

    let mut wait = limit;
    // A signal that arrives just before KVM_RUN is lost, so it is sent until it has worked.
    for _ in 0..100 {
        match receive.recv_timeout(wait) {
            Ok(outcome) => return outcome,
            Err(RecvTimeoutError::Disconnected) => {
                return Outcome::Unexpected("the thread that ran it broke off".to_owned());
            }
            Err(RecvTimeoutError::Timeout) => {
                if guest.kill(SIGRTMIN()).is_err() {
                    break;
                }
                wait = Duration::from_millis(10);
            }
        }
    }
    // The thread is in the kernel and stays there; it ends with this process.
    Outcome::Stuck
}

/// The guest, ready to run. The fields are dropped in their order, the memory last.
struct Guest {
    vcpu: VcpuFd,
    _vm: VmFd,
    _memory: GuestMemoryMmap,
}

impl Guest {
    fn new(kvm: &Kvm) -> Result<Self, ProbeError> {
        let vm = kvm.create_vm().map_err(ioctl("KVM_CREATE_VM"))?;
        let memory = memory()?;
        for (slot, region) in (0..).zip(memory.iter()) {
            let slot = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
            };
            // SAFETY: the range is a mapping of its own that belongs to `memory`, which this
            // guest keeps until its virtual machine is gone.
            unsafe { vm.set_user_memory_region(slot) }
                .map_err(ioctl("KVM_SET_USER_MEMORY_REGION"))?;
        }
        let vcpu = vm.create_vcpu(0).map_err(ioctl("KVM_CREATE_VCPU"))?;
        // Before the registers: without long mode in CPUID, KVM refuses EFER and the MSRs.
        let mut cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(ioctl("KVM_GET_SUPPORTED_CPUID"))?;
        // Without extended states, some of which KVM gives only to a process that has asked.
        cpuid.retain(|entry| entry.function != CPUID_EXTENDED_STATES);
        vcpu.set_cpuid2(&cpuid).map_err(ioctl("KVM_SET_CPUID2"))?;
        let reset = vcpu.get_sregs().map_err(ioctl("KVM_GET_SREGS"))?;
        vcpu.set_sregs(&sregs(&reset))
            .map_err(ioctl("KVM_SET_SREGS"))?;
        vcpu.set_regs(&regs()).map_err(ioctl("KVM_SET_REGS"))?;
        let entries =
            [(MSR_STAR, STAR), (MSR_LSTAR, HANDLER), (MSR_FMASK, 0)].map(|(index, data)| {
                kvm_msr_entry {
                    index,
                    data,
                    ..Default::default()
                }
            });
        let msrs = Msrs::from_entries(&entries).map_err(|_| ProbeError::Msr)?;
        if vcpu.set_msrs(&msrs).map_err(ioctl("KVM_SET_MSRS"))? != entries.len() {
            return Err(ProbeError::Msr);
        }
        Ok(Self {
            vcpu,
            _vm: vm,
            _memory: memory,
        })
    }

    fn run(mut self) -> Result<Outcome, ProbeError> {
        let mut reported = None;
        loop {
            match self.vcpu.run() {
                Ok(VcpuExit::IoOut(PORT, data)) if reported.is_none() => {
                    reported = data.try_into().ok().map(u32::from_le_bytes);
                }
                Ok(VcpuExit::Hlt) => return Ok(Outcome::Halted { reported }),
                Ok(VcpuExit::Shutdown) => return Ok(Outcome::TripleFault { reported }),
                Ok(VcpuExit::InternalError) => return Ok(Outcome::InternalError),
                Ok(VcpuExit::FailEntry(reason, _)) => return Ok(Outcome::EntryFailed { reason }),
                Ok(exit) => return Ok(Outcome::Unexpected(format!("{exit:?}"))),
                Err(error) if error.errno() == libc::EINTR => return Ok(Outcome::TimedOut),
                Err(source) => return Err(ioctl("KVM_RUN")(source)),
            }
        }
    }
}

fn ioctl(ioctl: &'static str) -> impl Fn(kvm_ioctls::Error) -> ProbeError {
    move |source| ProbeError::Ioctl { ioctl, source }
}

/// Guest memory with the tables and the program in it.
fn memory() -> Result<GuestMemoryMmap, ProbeError> {
    let region = MmapRegion::new(MEMORY_SIZE).map_err(|error| ProbeError::Memory(error.into()))?;
    let region = GuestRegionMmap::new(region, GuestAddress(0))
        .ok_or_else(|| ProbeError::Memory("the range does not fit".into()))?;
    let memory = GuestMemoryMmap::from_regions(vec![region])
        .map_err(|error| ProbeError::Memory(error.into()))?;
    let table = PAGE_PRESENT | PAGE_WRITABLE | PAGE_USER;
    let mut entries = vec![
        (PML4, PDPT | table),
        (PDPT, PD | table),
        (PD, table | PAGE_LARGE),
    ];
    entries.extend((GDT_BASE..).step_by(8).zip(GDT));
    for (address, entry) in entries {
        memory
            .write_obj(entry, GuestAddress(address))
            .map_err(|error| ProbeError::Memory(error.into()))?;
    }
    memory
        .write_slice(&PROGRAM, GuestAddress(CODE))
        .map_err(|error| ProbeError::Memory(error.into()))?;
    Ok(memory)
}

fn regs() -> kvm_regs {
    kvm_regs {
        rip: CODE,
        rcx: LEVEL_3_ENTRY,
        r11: RFLAGS,
        rflags: RFLAGS,
        ..Default::default()
    }
}

fn sregs(reset: &kvm_sregs) -> kvm_sregs {
    let mut sregs = *reset;
    let data = kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: KERNEL_DATA,
        type_: 0x3,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    for segment in [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.fs,
        &mut sregs.gs,
        &mut sregs.ss,
    ] {
        *segment = data;
    }
    sregs.cs = kvm_segment {
        selector: KERNEL_CODE,
        type_: 0xb,
        db: 0,
        l: 1,
        ..data
    };
    sregs.tr = kvm_segment {
        base: TSS,
        limit: 0x67,
        selector: TASK,
        type_: 0xb,
        present: 1,
        ..Default::default()
    };
    sregs.gdt.base = GDT_BASE;
    sregs.gdt.limit = (size_of_val(&GDT) - 1) as u16;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cr0 = CR0;
    sregs.cr3 = PML4;
    sregs.cr4 = CR4;
    sregs.efer = EFER;
    sregs
}

/// A selector's privilege level.
fn level(selector: u32) -> u32 {
    selector & 3
}

impl From<Outcome> for Finding {
    fn from(outcome: Outcome) -> Self {
        const ELSEWHERE: &str = "run with `scripts/kvm-host COMMAND`, which brings an emulated \
                                 machine whose KVM works, or use a machine with VT-x or AMD-V \
                                 (for a virtual machine: one with nested virtualization).";
        let emulation = |what: String| {
            Finding::fail(
                CHECK,
                format!("{what} This KVM is a software emulation that does not run Linux."),
                ELSEWHERE,
            )
        };
        match outcome {
            Outcome::Halted {
                reported: Some(selector),
            } if level(selector) == 0 => Finding::ok(
                CHECK,
                "A guest made a system call, and its handler ran at privilege level 0.",
            ),
            Outcome::Halted {
                reported: Some(selector),
            }
            | Outcome::TripleFault {
                reported: Some(selector),
            } if level(selector) != 0 => emulation(format!(
                "A guest's system call reached its handler at privilege level {} instead of 0.",
                level(selector)
            )),
            Outcome::TripleFault { reported: Some(_) } => emulation(
                "The handler of a guest's system call showed privilege level 0 but did not \
                 have its rights."
                    .to_owned(),
            ),
            Outcome::TripleFault { reported: None } => emulation(
                "A guest ended in a triple fault before its system call was served.".to_owned(),
            ),
            Outcome::Halted { .. } => {
                emulation("A guest halted without having made its system call.".to_owned())
            }
            Outcome::InternalError => emulation(
                "KVM gave up on an instruction of a guest (KVM_EXIT_INTERNAL_ERROR).".to_owned(),
            ),
            Outcome::Unexpected(exit) => emulation(format!(
                "A guest ended in a way it gave no cause for: {exit}."
            )),
            Outcome::EntryFailed { reason } => Finding::fail(
                CHECK,
                format!("The processor refused the state of a guest (reason {reason:#x})."),
                ELSEWHERE,
            ),
            Outcome::TimedOut => Finding::fail(
                CHECK,
                "A guest of a few instructions did not come to its end within the time limit.",
                format!(
                    "try again when the machine is less busy; if that does not help, {ELSEWHERE}"
                ),
            ),
            Outcome::Stuck => Finding::fail(
                CHECK,
                "A guest of a few instructions neither came to its end nor could be stopped.",
                ELSEWHERE,
            ),
            Outcome::Failed(error) => Finding::fail(
                CHECK,
                format!("A guest could not be run: {}.", crate::error_chain(&error)),
                format!(
                    "see what the kernel says about KVM (`sudo dmesg | grep -i kvm`); if it \
                     does not help, {ELSEWHERE}"
                ),
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Status;
    use super::*;

    fn finding(outcome: Outcome) -> Finding {
        outcome.into()
    }

    fn failure(outcome: Outcome) -> String {
        let finding = finding(outcome);
        assert_eq!(finding.status, Status::Fail);
        assert!(finding.advice.unwrap().contains("scripts/kvm-host"));
        finding.detail
    }

    #[test]
    fn a_system_call_served_at_level_0_is_the_only_success() {
        let halted = |reported| Outcome::Halted { reported };
        assert_eq!(finding(halted(Some(0x08))).status, Status::Ok);
        assert!(failure(halted(Some(0x0b))).contains("level 3 instead of 0"));
        assert!(failure(halted(None)).contains("without having made"));
    }

    #[test]
    fn every_other_end_has_a_sentence_of_its_own() {
        let fault = |reported| Outcome::TripleFault { reported };
        let sentences = [
            failure(fault(Some(0x23))),
            failure(fault(Some(0x08))),
            failure(fault(None)),
            failure(Outcome::InternalError),
            failure(Outcome::EntryFailed {
                reason: 0x8000_0021,
            }),
            failure(Outcome::Unexpected("MmioRead".to_owned())),
            failure(Outcome::TimedOut),
            failure(Outcome::Stuck),
            failure(Outcome::Failed(ProbeError::Msr)),
        ];
        for (index, sentence) in sentences.iter().enumerate() {
            assert!(sentence.ends_with('.'), "{sentence}");
            assert!(!sentences[..index].contains(sentence), "{sentence}");
        }
        assert!(sentences[0].contains("level 3 instead of 0"));
        assert!(sentences[4].contains("0x80000021"));
    }

    #[test]
    fn causes_are_told() {
        let text = failure(Outcome::Failed(ProbeError::Ioctl {
            ioctl: "KVM_CREATE_VM",
            source: kvm_ioctls::Error::new(libc::EBUSY),
        }));
        assert!(text.contains("KVM_CREATE_VM failed: "), "{text}");
        assert!(text.contains("busy"), "{text}");
    }

    #[test]
    fn entry_points_lie_on_the_instructions_they_are_named_after() {
        let at = |address: u64| &PROGRAM[usize::try_from(address - CODE).unwrap()..];
        assert!(at(LEVEL_3_ENTRY).starts_with(&[0x0f, 0x05]));
        assert!(at(HANDLER).starts_with(&[0x31, 0xc0]));
    }

    /// What SYSCALL and SYSRET load must agree with the descriptor table.
    #[test]
    fn selectors_lead_to_segments_of_their_level() {
        let level_of = |selector: u64| (GDT[usize::try_from(selector / 8).unwrap()] >> 45) & 3;
        let (call, back) = ((STAR >> 32) & 0xffff, STAR >> 48);
        for (selector, level) in [(call, 0), (call + 8, 0), (back + 8, 3), (back + 16, 3)] {
            assert_eq!(level_of(selector), level, "selector {selector:#x}");
        }
        let is_64_bit = |selector: u64| (GDT[usize::try_from(selector / 8).unwrap()] >> 53) & 1;
        assert_eq!((is_64_bit(call), is_64_bit(back + 16)), (1, 1));
    }
}
