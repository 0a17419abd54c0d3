//! What state a machine is in, as lines for people, while it runs or rests.
//!
//! Each vCPU is asked on its own thread between two instructions, and goes on at once; each device
//! by the same ways as its guest and its owner ask it. Nothing is stopped, so the lines are not of
//! one moment. There are at most seven for a vCPU, and a few more than queues for a device.

use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE,
    KVM_MP_STATE_SIPI_RECEIVED, KVM_MP_STATE_UNINITIALIZED, kvm_mp_state, kvm_regs, kvm_segment,
    kvm_sregs,
};
use kvm_ioctls::VcpuFd;

use crate::arch::x86_64::layout::{VIRTIO_MMIO_SIZE, VIRTIO_MMIO_START};
use crate::devices::virtio::DeviceHandle;
use crate::machine::RunningMachine;

/// Describes the vCPUs and devices of a machine.
pub fn describe(machine: &RunningMachine) -> Vec<String> {
    let mut lines = Vec::new();
    for (index, vcpu) in machine.vcpus().iter().enumerate() {
        match vcpu.with_fd(VcpuState::of) {
            Ok(Ok(state)) => lines.extend(named(&format!("vcpu{index}"), state.lines())),
            Ok(Err(error)) => {
                lines.push(format!("vcpu{index}: KVM refuses its registers: {error}"))
            }
            Err(error) => lines.push(format!("vcpu{index}: {error}")),
        }
    }
    let memory = machine.memory();
    for (port, described) in machine.buses().pio.describe(memory) {
        lines.extend(named(&format!("port {port:#x}"), described));
    }
    for (address, described) in machine.buses().mmio.describe(memory) {
        // Virtio devices lie in the order in which they were made, and there is nothing else.
        let index = (address - VIRTIO_MMIO_START) / VIRTIO_MMIO_SIZE;
        let Some(device) = machine.devices().get(index as usize) else {
            continue;
        };
        lines.extend(named(device.name(), described));
        lines.extend(named(device.name(), counters(device)));
    }
    lines
}

/// Every line with the name of what it is about.
fn named(name: &str, lines: Vec<String>) -> impl Iterator<Item = String> {
    lines.into_iter().map(move |line| format!("{name}: {line}"))
}

fn counters(device: &DeviceHandle) -> Vec<String> {
    match device.counters() {
        Ok(counters) if counters.is_empty() => Vec::new(),
        Ok(counters) => {
            let counters = counters.iter();
            let texts: Vec<_> = counters
                .map(|(name, count)| format!("{name}={count}"))
                .collect();
            vec![texts.join(" ")]
        }
        Err(error) => vec![format!("its counters are unknown: {error}")],
    }
}

/// The registers of a vCPU that say where it is.
struct VcpuState {
    regs: kvm_regs,
    sregs: kvm_sregs,
    mp_state: kvm_mp_state,
}

impl VcpuState {
    fn of(vcpu: &VcpuFd) -> Result<Self, kvm_ioctls::Error> {
        Ok(Self {
            regs: vcpu.get_regs()?,
            sregs: vcpu.get_sregs()?,
            mp_state: vcpu.get_mp_state()?,
        })
    }

    fn lines(&self) -> Vec<String> {
        let Self { regs, sregs, .. } = self;
        let table = |base: u64, limit: u16| format!("{base:#x}+{limit:#x}");
        vec![
            format!(
                "{} ring={} rip={:#018x} rsp={:#018x} rflags={:#x}",
                self.activity(),
                sregs.cs.dpl,
                regs.rip,
                regs.rsp,
                regs.rflags
            ),
            format!(
                "rax={:#018x} rbx={:#018x} rcx={:#018x} rdx={:#018x}",
                regs.rax, regs.rbx, regs.rcx, regs.rdx
            ),
            format!(
                "rsi={:#018x} rdi={:#018x} rbp={:#018x} r8={:#018x}",
                regs.rsi, regs.rdi, regs.rbp, regs.r8
            ),
            format!(
                "r9={:#018x} r10={:#018x} r11={:#018x} r12={:#018x}",
                regs.r9, regs.r10, regs.r11, regs.r12
            ),
            format!(
                "r13={:#018x} r14={:#018x} r15={:#018x}",
                regs.r13, regs.r14, regs.r15
            ),
            format!(
                "cr0={:#x} cr2={:#x} cr3={:#x} cr4={:#x} cr8={:#x} efer={:#x} apic_base={:#x}",
                sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4, sregs.cr8, sregs.efer, sregs.apic_base
            ),
            format!(
                "cs={} ss={} ds={} es={} fs={} gs={} tr={} gdt={} idt={}",
                segment(&sregs.cs),
                segment(&sregs.ss),
                segment(&sregs.ds),
                segment(&sregs.es),
                segment(&sregs.fs),
                segment(&sregs.gs),
                segment(&sregs.tr),
                table(sregs.gdt.base, sregs.gdt.limit),
                table(sregs.idt.base, sregs.idt.limit),
            ),
        ]
    }

    /// What the vCPU is at (Linux, Documentation/virt/kvm/api.rst, 4.38).
    fn activity(&self) -> String {
        match self.mp_state.mp_state {
            KVM_MP_STATE_RUNNABLE => "runnable".to_owned(),
            KVM_MP_STATE_HALTED => "halted".to_owned(),
            KVM_MP_STATE_UNINITIALIZED => "waits for INIT".to_owned(),
            KVM_MP_STATE_INIT_RECEIVED => "waits for SIPI".to_owned(),
            KVM_MP_STATE_SIPI_RECEIVED => "starts".to_owned(),
            other => format!("mp_state={other}"),
        }
    }
}

fn segment(segment: &kvm_segment) -> String {
    format!("{:#x}@{:#x}", segment.selector, segment.base)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vcpu_is_described_by_where_it_is() {
        let mut state = VcpuState {
            regs: kvm_regs {
                rip: 0x1234,
                r15: 0x5678,
                ..Default::default()
            },
            sregs: kvm_sregs {
                cr3: 0xabc000,
                ..Default::default()
            },
            mp_state: kvm_mp_state {
                mp_state: KVM_MP_STATE_HALTED,
            },
        };
        state.sregs.cs.dpl = 3;
        state.sregs.fs.base = 0xdef0;
        let text = state.lines().join("\n");
        for expected in [
            "halted ring=3 rip=0x0000000000001234",
            "r15=0x0000000000005678",
            "cr3=0xabc000",
            "fs=0x0@0xdef0",
        ] {
            assert!(text.contains(expected), "{expected} in {text}");
        }
        state.mp_state.mp_state = 77;
        assert!(state.lines()[0].starts_with("mp_state=77"));
    }
}
