//! A virtual machine as KVM knows it: memory slots, in-kernel interrupt controllers and timer.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use kvm_bindings::{
    CpuId, KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VcpuFd, VmFd};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use crate::arch::x86_64::cpuid::{self, MissingFeature};
use crate::arch::x86_64::layout::KVM_TSS_ADDR;
use crate::kvm::state::{Clocks, StateError, VcpuState, VmState, XsaveSize};
use crate::kvm::vcpu::{Vcpu, VcpuError};
use crate::memory::GuestMemory;

/// Why KVM gave no virtual machine.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// No KVM.
    #[error("cannot open /dev/kvm (`vmm doctor` says what to do)")]
    Open(#[source] kvm_ioctls::Error),
    /// A KVM of another age.
    #[error("KVM speaks API version {found}, this VMM needs {KVM_API_VERSION}")]
    ApiVersion {
        /// The version found.
        found: i32,
    },
    /// A KVM that cannot do what every machine needs.
    #[error("KVM lacks the capability {cap:?} (`vmm doctor` lists all that are needed)")]
    Capability {
        /// The first missing capability.
        cap: Cap,
    },
    /// An ioctl failed.
    #[error("{ioctl} failed")]
    Ioctl {
        /// Name of the ioctl.
        ioctl: &'static str,
        /// What the kernel says.
        #[source]
        source: kvm_ioctls::Error,
    },
}

/// Why there are no vCPUs in the states that others had.
#[derive(Debug, thiserror::Error)]
pub enum RestoreVcpusError {
    /// They cannot be made.
    #[error(transparent)]
    Create(#[from] VcpuError),
    /// The processor is another one.
    #[error("the guest was started on a processor that can do more than this one")]
    Processor(#[from] MissingFeature),
    /// The state cannot be set.
    #[error(transparent)]
    State(#[from] StateError),
}

fn ioctl(ioctl: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> VmError {
    move |source| VmError::Ioctl { ioctl, source }
}

/// What every machine needs.
pub const REQUIRED_CAPABILITIES: [Cap; 15] = [
    Cap::Irqchip,
    Cap::Ioeventfd,
    Cap::Irqfd,
    Cap::UserMemory,
    Cap::SetTssAddr,
    Cap::Pit2,
    Cap::PitState2,
    Cap::AdjustClock,
    Cap::Debugregs,
    Cap::MpState,
    Cap::VcpuEvents,
    Cap::Xcrs,
    Cap::Xsave,
    Cap::ExtCpuid,
    Cap::ImmediateExit,
];

/// Opens the host's KVM.
///
/// # Errors
/// It is not there, or this process may not use it.
pub fn open() -> Result<Kvm, VmError> {
    Kvm::new().map_err(VmError::Open)
}

/// A virtual machine without vCPUs.
pub struct Vm {
    kvm: Kvm,
    fd: Arc<VmFd>,
    /// KVM maps it as long as the machine exists.
    _memory: GuestMemory,
    /// The model-specific registers that KVM can read and set.
    msr_indices: Arc<[u32]>,
    xsave: XsaveSize,
}

impl Vm {
    /// Creates the machine with its memory, interrupt controllers and timer.
    ///
    /// # Errors
    /// KVM is too old, or refuses.
    pub fn new(kvm: Kvm, memory: GuestMemory) -> Result<Self, VmError> {
        let found = kvm.get_api_version();
        if found != KVM_API_VERSION as i32 {
            return Err(VmError::ApiVersion { found });
        }
        if let Some(cap) = REQUIRED_CAPABILITIES
            .into_iter()
            .find(|cap| !kvm.check_extension(*cap))
        {
            return Err(VmError::Capability { cap });
        }
        // Before KVM_GET_SUPPORTED_CPUID: older kernels otherwise report half of AMX, and the
        // guest then faults when it enables the state.
        request_amx_permission();

        let fd = create_vm(&kvm)?;
        fd.set_tss_address(KVM_TSS_ADDR)
            .map_err(ioctl("KVM_SET_TSS_ADDR"))?;
        // Interrupt controllers and timer before any vCPU: KVM gives a vCPU its local APIC when
        // it is created, and only if the machine has an in-kernel irqchip by then.
        fd.create_irq_chip().map_err(ioctl("KVM_CREATE_IRQCHIP"))?;
        // Port 0x61 (speaker) is handled in the kernel too, or its accesses would exit.
        let pit = kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        };
        fd.create_pit2(pit).map_err(ioctl("KVM_CREATE_PIT2"))?;

        for (slot, region) in (0..).zip(memory.iter()) {
            let slot = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
            };
            // SAFETY: the range is a mapping of its own that belongs to `memory`, of which this
            // object keeps a clone until the machine is gone.
            unsafe { fd.set_user_memory_region(slot) }
                .map_err(ioctl("KVM_SET_USER_MEMORY_REGION"))?;
        }
        let msr_indices = kvm
            .get_msr_index_list()
            .map_err(ioctl("KVM_GET_MSR_INDEX_LIST"))?;
        Ok(Self {
            kvm,
            xsave: XsaveSize::of(&fd),
            fd: Arc::new(fd),
            _memory: memory,
            msr_indices: msr_indices.as_slice().into(),
        })
    }

    /// Creates the vCPUs 0 to `count` - 1, each with its CPUID.
    ///
    /// # Errors
    /// KVM refuses one of them.
    pub fn create_vcpus(&self, count: u8) -> Result<Vec<Vcpu>, VcpuError> {
        let supported = self.supported_cpuid()?;
        (0..count)
            .map(|index| {
                let cpuid = cpuid::for_vcpu(&supported, index, count);
                Vcpu::new(&self.fd, index, &cpuid)
            })
            .collect()
    }

    /// Creates vCPUs in these states.
    ///
    /// # Errors
    /// The processor lacks something that the guest may use, or KVM refuses.
    pub fn restore_vcpus(&self, states: &[VcpuState]) -> Result<Vec<Vcpu>, RestoreVcpusError> {
        let supported = self.supported_cpuid()?;
        let vcpus = (0..)
            .zip(states)
            .map(|(index, state)| {
                cpuid::check_supported(&state.cpuid, &supported)?;
                let cpuid =
                    CpuId::from_entries(&state.cpuid).map_err(|_| VcpuError::TooManyEntries)?;
                Ok(Vcpu::new(&self.fd, index, &cpuid)?)
            })
            .collect::<Result<Vec<_>, RestoreVcpusError>>()?;
        // Only now, when all are there: an interrupt that one of them has pending may be for
        // another.
        for (vcpu, state) in vcpus.iter().zip(states) {
            vcpu.restore(state, self.xsave)?;
        }
        Ok(vcpus)
    }

    fn supported_cpuid(&self) -> Result<CpuId, VcpuError> {
        self.kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(|source| VcpuError::Ioctl {
                ioctl: "KVM_GET_SUPPORTED_CPUID",
                source,
            })
    }

    /// Whether [`prefault`](super::prefault::prefault) does anything on this host.
    pub fn can_prefault(&self) -> bool {
        super::prefault::is_supported(&self.kvm)
    }

    /// What reads the state of a vCPU of this machine, on the vCPU's thread.
    pub fn vcpu_saver(&self) -> impl Fn(&VcpuFd) -> Result<VcpuState, StateError> + Clone + use<> {
        let (msr_indices, xsave) = (Arc::clone(&self.msr_indices), self.xsave);
        move |fd| VcpuState::save(fd, &msr_indices, xsave)
    }

    /// Reads what belongs to no vCPU. vCPUs and devices rest.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn save(&self) -> Result<VmState, StateError> {
        VmState::save(&self.fd)
    }

    /// Sets what belongs to no vCPU, when the vCPUs have their state and before any device raises
    /// an interrupt.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn restore(&self, state: &VmState) -> Result<(), StateError> {
        state.restore(&self.fd)
    }

    /// Sets the clock of a machine whose vCPUs do not run.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn set_clock(&self, clocks: &Clocks) -> Result<(), StateError> {
        clocks.set(&self.fd)
    }

    /// Binds `irqfd` to an interrupt line: writing to it raises an edge on the line.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn register_irqfd(&self, irqfd: &EventFd, gsi: u32) -> Result<(), VmError> {
        self.fd
            .register_irqfd(irqfd, gsi)
            .map_err(ioctl("KVM_IRQFD"))
    }

    /// Binds `eventfd` to the register at `address`: a 32-bit write of `value` there signals it
    /// instead of leaving the guest.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn register_ioeventfd(
        &self,
        eventfd: &EventFd,
        address: u64,
        value: u32,
    ) -> Result<(), VmError> {
        self.fd
            .register_ioevent(eventfd, &IoEventAddress::Mmio(address), value)
            .map_err(ioctl("KVM_IOEVENTFD"))
    }
}

/// `KVM_CREATE_VM` is interrupted by any signal, and by the kernel's own freezer.
fn create_vm(kvm: &Kvm) -> Result<VmFd, VmError> {
    loop {
        match kvm.create_vm() {
            Err(error) if error.errno() == libc::EINTR => {}
            result => return result.map_err(ioctl("KVM_CREATE_VM")),
        }
    }
}

/// Asks the host kernel to let guests use the AMX tile data (Documentation/arch/x86/xstate.rst).
fn request_amx_permission() {
    // `asm/prctl.h`, and the number of the state in XCR0 (Intel SDM volume 1, 13.1).
    const ARCH_REQ_XCOMP_GUEST_PERM: libc::c_int = 0x1025;
    const XFEATURE_XTILEDATA: libc::c_ulong = 18;
    // SAFETY: this operation takes a number and writes to no memory. It fails where the
    // processor or the kernel does not know AMX, and then there is nothing to permit.
    unsafe {
        libc::syscall(
            libc::SYS_arch_prctl,
            ARCH_REQ_XCOMP_GUEST_PERM,
            XFEATURE_XTILEDATA,
        )
    };
}

impl std::fmt::Debug for Vm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vm")
            .field("fd", &self.fd.as_raw_fd())
            .finish()
    }
}
