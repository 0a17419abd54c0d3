//! Builds a machine from its configuration. Read top to bottom, [`build_for_boot`] is the order in
//! which a machine comes into being, and [`build_from_snapshot`] that in which one comes back; both
//! end paused, before the next instruction of the guest.

mod devices;

use std::io;
use std::sync::Arc;

use event_manager::SubscriberOps;
use kvm_ioctls::Kvm;

use self::devices::{Board, Devices};
use crate::arch::x86_64::acpi::{self, AcpiError};
use crate::arch::x86_64::boot::{self, LoadError};
use crate::arch::x86_64::{regs, reset_vector};
use crate::boot_timer::{BootTimer, Phase};
use crate::config::{ConfigError, ConsoleMode, MemoryConfig, VmConfig};
use crate::debugging::DebuggingAids;
use crate::devices::bus::OverlapError;
use crate::devices::virtio::block::BlockError;
use crate::devices::virtio::mem::Mem;
use crate::devices::virtio::net::NetError;
use crate::devices::virtio::rng::RngError;
use crate::devices::virtio::state::RestoreError;
use crate::devices::virtio::vsock::VsockError;
use crate::devices::virtio::worker::SplitError;
use crate::devices::vmgenid::{self, GenerationIdError};
use crate::events::EventStream;
use crate::exit::ExitSignal;
use crate::kvm::state::{Clocks, StateError};
use crate::kvm::vcpu::{Vcpu, VcpuError};
use crate::kvm::vm::{RestoreVcpusError, Vm, VmError};
use crate::machine::{self, EventLoop, ExitWatch, Machine};
use crate::memory::pagemap::Pagemap;
use crate::memory::working_set::WorkingSet;
use crate::memory::{self, AllocateError, GuestMemory, Ram};
use crate::resources::{BootFiles, Devices as HostDevices, HostResources, Origin};
use crate::sandboxing::JailError;
use crate::snapshot::{FileError, Lineage, LoadError as SnapshotLoadError, Loaded, Source};

/// Why a machine could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// It was not described properly.
    #[error("the configuration describes no possible machine")]
    Config(#[from] ConfigError),
    /// No memory.
    #[error("cannot give the guest its memory")]
    Memory(#[from] AllocateError),
    /// KVM refused the machine.
    #[error("cannot create the virtual machine")]
    Vm(#[from] VmError),
    /// KVM refused a vCPU.
    #[error("cannot create the vCPUs")]
    Vcpu(#[from] VcpuError),
    /// The kernel cannot be booted.
    #[error("cannot load the guest")]
    Load(#[from] LoadError),
    /// The tables do not fit.
    #[error("cannot describe the machine to the guest")]
    Acpi(#[from] AcpiError),
    /// No random bits.
    #[error("cannot give the machine its generation ID")]
    GenerationId(#[from] GenerationIdError),
    /// A disk.
    #[error(transparent)]
    Block(#[from] BlockError),
    /// A network card.
    #[error(transparent)]
    Net(#[from] NetError),
    /// The entropy source.
    #[error("entropy source")]
    Rng(#[from] RngError),
    /// The socket device.
    #[error("socket device")]
    Vsock(#[from] VsockError),
    /// The serial port's file.
    #[error("cannot write the serial port's output to {path}", path = path.display())]
    SerialFile {
        /// The file.
        path: std::path::PathBuf,
        /// What the host says.
        #[source]
        source: io::Error,
    },
    /// A device could not be connected.
    #[error("cannot connect a device")]
    Split(#[from] SplitError),
    /// Two devices at one address.
    #[error("the devices do not fit together")]
    Overlap(#[from] OverlapError),
    /// The host ran out of something.
    #[error("the host has no descriptors left")]
    Host(#[from] io::Error),
    /// A file of the snapshot.
    #[error(transparent)]
    SnapshotFile(#[from] FileError),
    /// The snapshot is of no use here.
    #[error("cannot read the snapshot")]
    Snapshot(#[from] SnapshotLoadError),
    /// The snapshot has other vCPUs.
    #[error("the snapshot has {saved} vCPUs, and the machine {here}; give it as many as it had")]
    VcpuCount {
        /// In the snapshot.
        saved: usize,
        /// Of the machine, at most.
        here: u8,
    },
    /// The vCPUs cannot be restored.
    #[error("cannot restore the vCPUs")]
    RestoreVcpus(#[from] RestoreVcpusError),
    /// Interrupt controllers, timer and clock cannot be restored.
    #[error("cannot restore the virtual machine")]
    RestoreVm(#[source] StateError),
    /// The snapshot has other devices.
    #[error(
        "the snapshot has {saved} devices, and the machine {here}; disks, cards, socket device and \
         balloon have to be as many as they were"
    )]
    DeviceCount {
        /// In the snapshot.
        saved: usize,
        /// Of the machine.
        here: usize,
    },
    /// A device cannot be restored.
    #[error("cannot restore the device {name}")]
    RestoreDevice {
        /// Its name.
        name: String,
        /// Why.
        #[source]
        source: RestoreError,
    },
    /// The process cannot be jailed.
    #[error(transparent)]
    Jail(#[from] JailError),
    /// The event loop cannot be set up.
    #[error("cannot set up the event loop: {0}")]
    EventLoop(event_manager::Error),
}

impl BuildError {
    /// Whether it is the snapshot that is wrong, or wrong for this machine.
    pub fn is_of_snapshot(&self) -> bool {
        matches!(
            self,
            Self::SnapshotFile(_)
                | Self::Snapshot(_)
                | Self::VcpuCount { .. }
                | Self::RestoreVcpus(_)
                | Self::DeviceCount { .. }
                | Self::RestoreDevice { .. }
        )
    }
}

/// Builds the machine that `config` describes, paused before its next instruction: the first one,
/// or the one after the snapshot.
///
/// `host` is what `config` names, opened: from here on, no path and no privilege is needed.
///
/// # Errors
/// A file is not what it should be, or KVM refuses.
pub fn build(
    config: &VmConfig,
    host: HostResources,
    events: EventStream,
    aids: &DebuggingAids,
) -> Result<Machine, BuildError> {
    let HostResources {
        kvm,
        origin,
        devices,
        pagemap,
        ..
    } = host;
    let ground = Ground {
        kvm,
        devices,
        pagemap,
        events,
        aids,
    };
    match origin {
        Origin::Boot(files) => build_for_boot(config, files, ground),
        Origin::Snapshot(source) => build_from_snapshot(config, source, ground),
    }
}

/// What machines of either origin stand on.
struct Ground<'a> {
    kvm: Kvm,
    devices: HostDevices,
    pagemap: Option<Pagemap>,
    events: EventStream,
    aids: &'a DebuggingAids,
}

/// A machine before its first instruction.
fn build_for_boot(
    config: &VmConfig,
    files: BootFiles,
    ground: Ground<'_>,
) -> Result<Machine, BuildError> {
    let timer = &ground.aids.boot_timer;
    let exit = ExitSignal::new()?;
    let mut event_loop = event_loop(&exit)?;

    // In this order, so that the owner of the memory is dropped after everything that uses it.
    let (owner, ram, pluggable) = allocate_memory(&config.memory)?;
    let memory = owner.memory().clone();
    let vm = Vm::new(ground.kvm, memory.clone())?;
    let vcpus = vm.create_vcpus(config.cpus.max_vcpus)?;
    timer.reached(Phase::MachineCreated);
    tracing::info!(
        vcpus = vcpus.len(),
        memory = config.memory.size,
        "created the machine"
    );
    let board = Board {
        vm: &vm,
        vcpus: &vcpus,
        memory: &memory,
        events: &ground.events,
        exit: &exit,
        event_loop: &mut event_loop,
        boot_timer: timer,
    };
    let devices = board.connect(config, ground.devices, pluggable, None)?;
    timer.reached(Phase::DevicesBuilt);

    // The kernel is told of the RAM alone; what is plugged in, its driver finds.
    let cmdline = config
        .payload
        .as_ref()
        .and_then(|payload| payload.cmdline.as_deref());
    let entry = boot::load(
        &ram,
        files.kernel,
        files.initramfs,
        cmdline.unwrap_or_default(),
    )?;
    let described = acpi::Devices {
        serial: config.serial.mode != ConsoleMode::Off,
        boot_timer: timer.is_on(),
        virtio: &devices.virtio,
    };
    acpi::write_tables(&memory, config.cpus, described)?;
    regs::write_boot_tables(&memory).map_err(LoadError::Memory)?;
    reset_vector::write(&memory).map_err(LoadError::Memory)?;
    vmgenid::renew(&memory)?;
    for vcpu in &vcpus {
        vcpu.set_boot_state(entry)?;
    }
    timer.reached(Phase::KernelLoaded);
    tracing::info!(entry = format_args!("{:#x}", entry.0), "loaded the guest");

    let lineage = Lineage::new(ground.pagemap);
    assemble(
        event_loop,
        exit,
        (vm, vcpus),
        devices,
        (owner, lineage, None),
        ground.aids,
    )
}

/// A machine that goes on where another one was when it was saved.
///
/// Every step needs what those before it have set, and what they set would be lost if it came
/// later: KVM gives a vCPU its local APIC only after the interrupt controllers are there; devices
/// raise interrupts, which would be overwritten by the state of the controllers.
fn build_from_snapshot(
    config: &VmConfig,
    source: Source,
    ground: Ground<'_>,
) -> Result<Machine, BuildError> {
    let timer = &ground.aids.boot_timer;
    let exit = ExitSignal::new()?;
    let mut event_loop = event_loop(&exit)?;

    // Clones are many, and each touches little: a huge page for a word would cost more than it
    // gains.
    let small_pages = MemoryConfig {
        thp: false,
        ..config.memory
    };
    let (owner, _, pluggable) = allocate_memory(&small_pages)?;
    let memory = owner.memory().clone();
    let Loaded {
        state,
        lineage,
        working_set,
    } = source.load(&memory, ground.pagemap)?;
    if state.vcpus.len() != usize::from(config.cpus.max_vcpus) {
        return Err(BuildError::VcpuCount {
            saved: state.vcpus.len(),
            here: config.cpus.max_vcpus,
        });
    }
    let vm = Vm::new(ground.kvm, memory.clone())?;
    let vcpus = vm.restore_vcpus(&state.vcpus)?;
    vm.restore(&state.vm).map_err(BuildError::RestoreVm)?;
    timer.reached(Phase::MachineCreated);
    tracing::info!(vcpus = vcpus.len(), "restored the machine");
    let board = Board {
        vm: &vm,
        vcpus: &vcpus,
        memory: &memory,
        events: &ground.events,
        exit: &exit,
        event_loop: &mut event_loop,
        boot_timer: timer,
    };
    let devices = board.connect(config, ground.devices, pluggable, Some(&state))?;
    timer.reached(Phase::DevicesBuilt);
    devices.cpu_hotplug.restore(state.cpu_hotplug);

    let restored = Restored {
        clocks: Clocks::of(&state.vcpus, &state.vm),
        working_set,
    };

    // The guest finds that it is another one before it does anything else.
    vmgenid::renew(&memory)?;
    devices.platform_events.restore(state.platform_events)?;
    tracing::info!(devices = devices.handles.len(), "restored the devices");

    assemble(
        event_loop,
        exit,
        (vm, vcpus),
        devices,
        (owner, lineage, Some(restored)),
        ground.aids,
    )
}

/// What a restored machine needs besides when it begins to run.
struct Restored {
    clocks: Clocks,
    working_set: Option<WorkingSet>,
}

fn event_loop(exit: &ExitSignal) -> Result<EventLoop, BuildError> {
    let mut event_loop = EventLoop::new().map_err(BuildError::EventLoop)?;
    event_loop.add_subscriber(Box::new(ExitWatch(exit.clone())));
    Ok(event_loop)
}

/// The end of both ways: the vCPUs get their threads.
fn assemble(
    event_loop: EventLoop,
    exit: ExitSignal,
    (vm, mut vcpus): (Vm, Vec<Vcpu>),
    devices: Devices,
    (ram, lineage, restored): (Ram, Lineage, Option<Restored>),
    aids: &DebuggingAids,
) -> Result<Machine, BuildError> {
    if let Some(first) = vcpus.first_mut() {
        time_first_entry(first, &aids.boot_timer);
    }
    let (clocks, working_set) = match restored {
        Some(restored) => (Some(restored.clocks), restored.working_set),
        None => (None, None),
    };
    let debugger = aids.debugger(&mut vcpus)?;
    let buses = Arc::new(devices.buses);
    let vcpus = vcpus
        .into_iter()
        .map(|vcpu| vcpu.spawn(buses.clone(), exit.clone()))
        .collect::<Result<Vec<_>, VcpuError>>()?;
    let debugger = debugger
        .map(|debugger| debugger.start(ram.memory().clone(), exit.clone()))
        .transpose()?;
    Ok(Machine {
        event_loop,
        exit,
        parts: machine::Parts {
            _debugger: debugger,
            vcpus,
            devices: devices.handles,
            buses,
            vm,
            platform_events: devices.platform_events,
            cpu_hotplug: devices.cpu_hotplug,
            serial: devices.serial,
            lineage,
            clocks,
            working_set,
            ram,
        },
    })
}

/// All memory of the machine, the part of it that is there at boot, and the device that plugs in
/// the rest.
fn allocate_memory(
    config: &MemoryConfig,
) -> Result<(Ram, GuestMemory, Option<Mem>), AllocateError> {
    let ram = memory::allocate(config.size, config.thp)?;
    let (memory, pluggable) = match config.hotplug_size {
        None | Some(0) => (ram.clone(), None),
        Some(size) => {
            let (memory, start) = memory::with_pluggable_region(&ram, size, config.thp)?;
            let plugged = config.hotplugged_size.unwrap_or(0);
            (memory, Some(Mem::new(start, size, plugged)))
        }
    };
    Ok((Ram::new(memory), ram, pluggable))
}

fn time_first_entry(vcpu: &mut Vcpu, timer: &BootTimer) {
    if timer.is_on() {
        let timer = timer.clone();
        vcpu.on_first_entry(Box::new(move || timer.reached(Phase::FirstEntry)));
    }
}
