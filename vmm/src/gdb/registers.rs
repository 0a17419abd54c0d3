//! The registers of a vCPU as the debugger has them.

use gdbstub_arch::x86::reg::{X86_64CoreRegs, X86SegmentRegs, X87FpuInternalRegs};
use kvm_bindings::{kvm_fpu, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;

use super::DebugError;

/// Reads them.
pub(super) fn read(vcpu: &VcpuFd) -> Result<X86_64CoreRegs, kvm_ioctls::Error> {
    Ok(to_debugger(
        &vcpu.get_regs()?,
        &vcpu.get_sregs()?,
        &vcpu.get_fpu()?,
    ))
}

/// Writes them, but for the segments, which cannot change: a selector is only the name of one.
///
/// # Errors
/// KVM refuses, or a selector is another than before.
pub(super) fn write(vcpu: &VcpuFd, wanted: &X86_64CoreRegs) -> Result<(), DebugError> {
    if selectors(&vcpu.get_sregs()?) != wanted.segments {
        return Err(DebugError::Segments);
    }
    let mut fpu = vcpu.get_fpu()?;
    fpu_from_debugger(wanted, &mut fpu);
    vcpu.set_fpu(&fpu)?;
    vcpu.set_regs(&regs_from_debugger(wanted, &vcpu.get_regs()?))?;
    Ok(())
}

fn selectors(sregs: &kvm_sregs) -> X86SegmentRegs {
    let selector = |segment: &kvm_segment| u32::from(segment.selector);
    X86SegmentRegs {
        cs: selector(&sregs.cs),
        ss: selector(&sregs.ss),
        ds: selector(&sregs.ds),
        es: selector(&sregs.es),
        fs: selector(&sregs.fs),
        gs: selector(&sregs.gs),
    }
}

fn to_debugger(regs: &kvm_regs, sregs: &kvm_sregs, fpu: &kvm_fpu) -> X86_64CoreRegs {
    X86_64CoreRegs {
        regs: [
            regs.rax, regs.rbx, regs.rcx, regs.rdx, regs.rsi, regs.rdi, regs.rbp, regs.rsp,
            regs.r8, regs.r9, regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
        ],
        // The upper half is reserved.
        eflags: regs.rflags as u32,
        rip: regs.rip,
        segments: selectors(sregs),
        st: fpu
            .fpr
            .map(|register| std::array::from_fn(|index| register[index])),
        fpu: X87FpuInternalRegs {
            fctrl: fpu.fcw.into(),
            fstat: fpu.fsw.into(),
            ftag: full_tags(fpu.ftwx).into(),
            // In 64-bit mode the instruction and operand pointers have no segment.
            fiseg: (fpu.last_ip >> 32) as u32,
            fioff: fpu.last_ip as u32,
            foseg: (fpu.last_dp >> 32) as u32,
            fooff: fpu.last_dp as u32,
            fop: fpu.last_opcode.into(),
        },
        xmm: fpu.xmm.map(u128::from_le_bytes),
        mxcsr: fpu.mxcsr,
    }
}

fn regs_from_debugger(wanted: &X86_64CoreRegs, before: &kvm_regs) -> kvm_regs {
    let [
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rbp,
        rsp,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
    ] = wanted.regs;
    kvm_regs {
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rsp,
        rbp,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip: wanted.rip,
        rflags: before.rflags >> 32 << 32 | u64::from(wanted.eflags),
    }
}

fn fpu_from_debugger(wanted: &X86_64CoreRegs, fpu: &mut kvm_fpu) {
    for (register, wanted) in fpu.fpr.iter_mut().zip(&wanted.st) {
        register[..wanted.len()].copy_from_slice(wanted);
    }
    // All but the tags have 16 bits in the processor, too.
    fpu.fcw = wanted.fpu.fctrl as u16;
    fpu.fsw = wanted.fpu.fstat as u16;
    fpu.ftwx = short_tags(wanted.fpu.ftag as u16);
    fpu.last_ip = u64::from(wanted.fpu.fiseg) << 32 | u64::from(wanted.fpu.fioff);
    fpu.last_dp = u64::from(wanted.fpu.foseg) << 32 | u64::from(wanted.fpu.fooff);
    fpu.last_opcode = wanted.fpu.fop as u16;
    fpu.xmm = wanted.xmm.map(u128::to_le_bytes);
    fpu.mxcsr = wanted.mxcsr;
}

/// The tag word of FXSAVE has a bit for each register that is in use, that of the x87 two bits:
/// 3 is empty (Intel SDM, volume 1, 10.5.1.1). Which kind of number a register holds is not told.
fn full_tags(short: u8) -> u16 {
    (0..8)
        .filter(|index| short & (1 << index) == 0)
        .fold(0, |tags, index| tags | 3 << (2 * index))
}

fn short_tags(full: u16) -> u8 {
    (0..8)
        .filter(|index| full >> (2 * index) & 3 != 3)
        .fold(0, |tags, index| tags | 1 << index)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_debugger_reads_and_writes_back_is_the_same() {
        let mut number = 0_u64;
        let mut next = || {
            number += 0x0101_0101;
            number
        };
        let regs = kvm_regs {
            rax: next(),
            rbx: next(),
            rcx: next(),
            rdx: next(),
            rsi: next(),
            rdi: next(),
            rsp: next(),
            rbp: next(),
            r8: next(),
            r9: next(),
            r10: next(),
            r11: next(),
            r12: next(),
            r13: next(),
            r14: next(),
            r15: next(),
            rip: next(),
            rflags: 0x246,
        };
        let mut sregs = kvm_sregs::default();
        sregs.cs.selector = 0x10;
        sregs.gs.selector = 0x2b;
        let mut fpu = kvm_fpu {
            fcw: 0x37f,
            fsw: 0x3800,
            ftwx: 0b1000_0001,
            last_ip: 0x1234_5678_9abc,
            last_dp: 0xdef0_1234_5678,
            last_opcode: 0x7ff,
            mxcsr: 0x1f80,
            ..Default::default()
        };
        for (index, register) in (1..).zip(&mut fpu.xmm) {
            register.fill(index);
        }
        for (index, register) in (0x21..).zip(&mut fpu.fpr) {
            register[..10].fill(index);
        }

        let seen = to_debugger(&regs, &sregs, &fpu);
        assert_eq!((seen.segments.cs, seen.segments.gs), (0x10, 0x2b));
        assert_eq!((seen.regs[6], seen.regs[7]), (regs.rbp, regs.rsp));
        assert_eq!(seen.fpu.ftag, 0b00_11_11_11_11_11_11_00);
        assert_eq!(regs_from_debugger(&seen, &kvm_regs::default()), regs);
        let mut written = kvm_fpu::default();
        fpu_from_debugger(&seen, &mut written);
        assert_eq!(written, fpu);
    }
}
