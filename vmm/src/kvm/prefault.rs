//! Filling KVM's own page table before the guest comes to a page: `KVM_PRE_FAULT_MEMORY`, since Linux 6.12
//! (Documentation/virt/kvm/api.rst, 4.143).
//!
//! It does what a read by the guest would, without leaving the guest for it. A page that the host has
//! mapped writable is writable for the guest from then on.

use std::io;
use std::ops::Range;

use kvm_bindings::{KVM_CAP_PRE_FAULT_MEMORY, KVMIO, kvm_pre_fault_memory};
use kvm_ioctls::{Kvm, VcpuFd};
use vm_memory::{Address, GuestAddress};
use vmm_sys_util::ioctl::{_IOC_READ, _IOC_WRITE, ioctl_expr, ioctl_with_mut_ref};

/// The request, with its structure's size and both directions in it (`linux/kvm.h`).
const KVM_PRE_FAULT_MEMORY: libc::c_ulong = ioctl_expr(
    _IOC_READ | _IOC_WRITE,
    KVMIO,
    0xd5,
    size_of::<kvm_pre_fault_memory>() as u32,
);

/// Whether this host's KVM can do it, which takes paging in two stages by the processor.
pub fn is_supported(kvm: &Kvm) -> bool {
    kvm.check_extension_raw(u64::from(KVM_CAP_PRE_FAULT_MEMORY)) > 0
}

/// Has these pages mapped for all vCPUs of the machine, of which this is one that does not run.
///
/// # Errors
/// KVM does not do it: the pages from the first failed one on come when the guest touches them.
pub fn prefault(vcpu: &VcpuFd, runs: &[Range<GuestAddress>]) -> io::Result<()> {
    for run in runs {
        let mut left = kvm_pre_fault_memory {
            gpa: run.start.raw_value(),
            size: run.end.unchecked_offset_from(run.start),
            ..Default::default()
        };
        while left.size > 0 {
            // SAFETY: `left` is the structure that this request takes, and KVM writes no more than that.
            let result = unsafe { ioctl_with_mut_ref(vcpu, KVM_PRE_FAULT_MEMORY, &mut left) };
            // What is done so far is in `left`, whether the call ended well or was interrupted.
            if result < 0 {
                let error = io::Error::last_os_error();
                match error.raw_os_error() {
                    Some(libc::EINTR | libc::EAGAIN) => {}
                    _ => return Err(error),
                }
            }
        }
    }
    Ok(())
}
