//! Builds a machine from its configuration. Read top to bottom, this is the order in which a
//! machine comes into being; it ends paused, before the first instruction of the guest.

use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex};

use event_manager::SubscriberOps;
use vmm_sys_util::eventfd::EventFd;

use crate::arch::x86_64::acpi::{self, AcpiError, VirtioMmioSlot};
use crate::arch::x86_64::boot::{self, LoadError};
use crate::arch::x86_64::layout::{
    BOOT_TIMER_PORT, CPU_HOTPLUG_PORT, EVENT_PORT, EVENT_PORT_COUNT, GED_GSI, I8042_COMMAND_PORT,
    I8042_DATA_PORT, MAX_VIRTIO_DEVICES, PVPANIC_PORT, RESET_PORT, SERIAL_GSI, SERIAL_PORT,
    SERIAL_PORT_COUNT, SLEEP_CONTROL_PORT, VIRTIO_GSI_START, VIRTIO_MMIO_SIZE, VIRTIO_MMIO_START,
};
use crate::arch::x86_64::{regs, reset_vector};
use crate::boot_timer::{BootTimer, Phase};
use crate::config::{ConfigError, ConsoleMode, MemoryConfig, VmConfig};
use crate::debugging::DebuggingAids;
use crate::devices::bus::{BusDevice, OverlapError};
use crate::devices::cpu_hotplug::{self, CpuHotplug, Gate};
use crate::devices::events::PlatformEvents;
use crate::devices::legacy::i8042::KeyboardController;
use crate::devices::legacy::power::PowerRegisters;
use crate::devices::legacy::pvpanic::PanicPort;
use crate::devices::legacy::serial::{Output, SerialInput, SerialPort};
use crate::devices::virtio::balloon::Balloon;
use crate::devices::virtio::block::{Block, BlockError};
use crate::devices::virtio::mem::Mem;
use crate::devices::virtio::net::NetError;
use crate::devices::virtio::rng::RngError;
use crate::devices::virtio::vsock::VsockError;
use crate::devices::virtio::worker::{self, Parts, SplitError};
use crate::devices::virtio::{DeviceHandle, Interrupt, VirtioDevice};
use crate::devices::vmgenid::{self, GenerationIdError};
use crate::events::EventStream;
use crate::exit::ExitSignal;
use crate::kvm::vcpu::{Buses, Vcpu, VcpuError};
use crate::kvm::vm::{Vm, VmError};
use crate::machine::{self, EventLoop, ExitWatch, Machine};
use crate::memory::{self, AllocateError, GuestMemory, Ram};
use crate::resources::HostResources;
use crate::sandboxing::JailError;

/// Register of virtio-mmio to which a driver writes the index of the queue that it notifies
/// (virtio 1.2, 4.2.2).
const QUEUE_NOTIFY: u64 = 0x50;

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
    /// The process cannot be jailed.
    #[error(transparent)]
    Jail(#[from] JailError),
    /// The event loop cannot be set up.
    #[error("cannot set up the event loop: {0}")]
    EventLoop(event_manager::Error),
}

/// Builds the machine that `config` describes, ready to boot.
///
/// `host` is what `config` names, opened: from here on, no path and no privilege is needed.
///
/// # Errors
/// A file is not what it should be, or KVM refuses.
pub fn build_for_boot(
    config: &VmConfig,
    host: HostResources,
    events: EventStream,
    aids: &DebuggingAids,
) -> Result<Machine, BuildError> {
    let timer = &aids.boot_timer;
    let exit = ExitSignal::new()?;
    let mut event_loop = EventLoop::new().map_err(BuildError::EventLoop)?;
    event_loop.add_subscriber(Box::new(ExitWatch(exit.clone())));

    // In this order, so that the owner of the memory is dropped after everything that uses it.
    let (owner, ram, pluggable) = allocate_memory(&config.memory)?;
    let memory = owner.memory().clone();
    let vm = Vm::new(host.kvm, memory.clone())?;
    let mut vcpus = vm.create_vcpus(config.cpus.max_vcpus)?;
    timer.reached(Phase::MachineCreated);
    tracing::info!(
        vcpus = vcpus.len(),
        memory = config.memory.size,
        "created the machine"
    );

    let mut devices = DeviceBuilder {
        vm: &vm,
        memory: &memory,
        events: &events,
        exit: &exit,
        buses: Buses::default(),
        event_loop: &mut event_loop,
        virtio: Vec::new(),
        handles: Vec::new(),
    };
    devices.add_legacy()?;
    let gates = vcpus
        .iter()
        .map(|vcpu| vcpu.gate().clone() as Arc<dyn Gate>)
        .collect();
    let (platform_events, cpu_hotplug) = devices.add_platform(gates, config.cpus.boot_vcpus)?;
    if let Some(output) = host.serial {
        devices.add_serial(output)?;
    }
    if timer.is_on() {
        devices.add_ports(BOOT_TIMER_PORT, 1, timer.register())?;
    }
    // Disks come first, then cards, since the guest names them in the order of their slots.
    for (index, (disk, files)) in config.disks.iter().zip(host.disks).enumerate() {
        let name = name(&disk.id, "disk", index);
        let block = Block::with_files(name.clone(), disk, files, events.clone())?;
        devices.add_virtio(name, block)?;
    }
    for (index, (card, net)) in config.net.iter().zip(host.net).enumerate() {
        devices.add_virtio(name(&card.id, "net", index), net)?;
    }
    if let (Some(vsock), Some(device)) = (&config.vsock, host.vsock) {
        devices.add_virtio(name(&vsock.id, "vsock", 0), device)?;
    }
    devices.add_virtio("__rng".to_owned(), host.rng)?;
    if let Some(balloon) = &config.balloon {
        let balloon = Balloon::new(balloon, config.memory.size);
        devices.add_virtio("__balloon".to_owned(), balloon)?;
    }
    if let Some(mem) = pluggable {
        devices.add_virtio("__mem".to_owned(), mem)?;
    }
    let DeviceBuilder {
        buses,
        virtio,
        handles,
        ..
    } = devices;
    timer.reached(Phase::DevicesBuilt);
    // The kernel is told of the RAM alone; what is plugged in, its driver finds.
    let cmdline = config.payload.cmdline.as_deref().unwrap_or_default();
    let entry = boot::load(&ram, host.kernel, host.initramfs, cmdline)?;
    let described = acpi::Devices {
        serial: config.serial.mode != ConsoleMode::Off,
        boot_timer: timer.is_on(),
        virtio: &virtio,
    };
    acpi::write_tables(&memory, config.cpus, described)?;
    regs::write_boot_tables(&memory).map_err(LoadError::Memory)?;
    reset_vector::write(&memory).map_err(LoadError::Memory)?;
    vmgenid::renew(&memory)?;
    timer.reached(Phase::KernelLoaded);
    tracing::info!(entry = format_args!("{:#x}", entry.0), "loaded the guest");

    let buses = Arc::new(buses);
    if let Some(first) = vcpus.first_mut() {
        time_first_entry(first, timer);
    }
    let debugger = aids.debugger(&mut vcpus)?;
    let vcpus = vcpus
        .into_iter()
        .map(|vcpu| {
            vcpu.set_boot_state(entry)?;
            vcpu.spawn(buses.clone(), exit.clone())
        })
        .collect::<Result<Vec<_>, VcpuError>>()?;

    let debugger = debugger
        .map(|debugger| debugger.start(memory, exit.clone()))
        .transpose()?;

    Ok(Machine {
        event_loop,
        exit,
        parts: machine::Parts {
            _debugger: debugger,
            vcpus,
            devices: handles,
            buses,
            _vm: vm,
            platform_events,
            cpu_hotplug,
            ram: owner,
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

fn eventfd() -> io::Result<EventFd> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
}

/// Connects devices to the machine, one after the other.
struct DeviceBuilder<'a> {
    vm: &'a Vm,
    memory: &'a GuestMemory,
    events: &'a EventStream,
    exit: &'a ExitSignal,
    buses: Buses,
    event_loop: &'a mut EventLoop,
    virtio: Vec<VirtioMmioSlot>,
    handles: Vec<DeviceHandle>,
}

impl DeviceBuilder<'_> {
    fn add_ports(
        &mut self,
        first: u16,
        count: u16,
        device: impl BusDevice + 'static,
    ) -> Result<(), OverlapError> {
        let device = Arc::new(Mutex::new(device));
        self.buses
            .pio
            .insert(u64::from(first), u64::from(count), device)
    }

    fn add_legacy(&mut self) -> Result<(), BuildError> {
        let exit = || self.exit.clone();
        let (keyboard, panic, power) = (
            KeyboardController::new(exit()),
            PanicPort::new(exit()),
            PowerRegisters::new(exit()),
        );
        self.add_ports(
            I8042_DATA_PORT,
            I8042_COMMAND_PORT - I8042_DATA_PORT + 1,
            keyboard,
        )?;
        self.add_ports(PVPANIC_PORT, 1, panic)?;
        self.add_ports(
            SLEEP_CONTROL_PORT,
            RESET_PORT - SLEEP_CONTROL_PORT + 1,
            power,
        )?;
        Ok(())
    }

    /// What the guest's ACPI is told by: the events, and the vCPUs with these gates.
    fn add_platform(
        &mut self,
        gates: Vec<Arc<dyn Gate>>,
        boot_vcpus: u8,
    ) -> Result<(PlatformEvents, CpuHotplug), BuildError> {
        let events = PlatformEvents::new(eventfd()?);
        self.vm.register_irqfd(events.irqfd(), GED_GSI)?;
        self.add_ports(EVENT_PORT, EVENT_PORT_COUNT, events.register())?;
        let cpus = CpuHotplug::new(gates, boot_vcpus, events.clone(), self.events.clone());
        self.add_ports(
            CPU_HOTPLUG_PORT,
            cpu_hotplug::REGISTERS_SIZE,
            cpus.registers(),
        )?;
        Ok((events, cpus))
    }

    fn add_serial(&mut self, output: Output) -> Result<(), BuildError> {
        let is_terminal = matches!(output, Output::Stdout);
        let irqfd = eventfd()?;
        self.vm.register_irqfd(&irqfd, SERIAL_GSI)?;
        let port = SerialPort::new(irqfd, output)?;
        if is_terminal {
            let input = std::fs::File::from(io::stdin().as_fd().try_clone_to_owned()?);
            let input = SerialInput::new(port.clone(), input, self.exit.clone());
            self.event_loop.add_subscriber(Box::new(input));
        }
        self.add_ports(SERIAL_PORT, SERIAL_PORT_COUNT, port)?;
        Ok(())
    }

    fn add_virtio(
        &mut self,
        name: String,
        device: impl VirtioDevice + 'static,
    ) -> Result<(), BuildError> {
        let index = self.virtio.len();
        if index == MAX_VIRTIO_DEVICES {
            return Err(ConfigError::Devices {
                count: index + 1,
                max: MAX_VIRTIO_DEVICES,
            }
            .into());
        }
        // Below the I/O APIC and the last interrupt line, as the limit just checked ensures.
        let address = VIRTIO_MMIO_START + index as u64 * VIRTIO_MMIO_SIZE;
        let gsi = VIRTIO_GSI_START + index as u32;
        let interrupt = Interrupt::new(eventfd()?);
        self.vm.register_irqfd(interrupt.irqfd(), gsi)?;
        tracing::debug!(
            name,
            address = format_args!("{address:#x}"),
            gsi,
            "virtio device"
        );

        let Parts {
            transport,
            worker,
            handle,
            notifications,
        } = worker::split(
            name,
            device,
            self.memory.clone(),
            interrupt,
            self.events.clone(),
        )?;
        for (queue, notification) in (0..).zip(&notifications) {
            self.vm
                .register_ioeventfd(notification, address + QUEUE_NOTIFY, queue)?;
        }
        self.buses
            .mmio
            .insert(address, VIRTIO_MMIO_SIZE, Arc::new(Mutex::new(transport)))?;
        self.event_loop.add_subscriber(Box::new(worker));
        self.handles.push(handle);
        self.virtio.push(VirtioMmioSlot {
            address: address as u32,
            size: VIRTIO_MMIO_SIZE as u32,
            gsi,
        });
        Ok(())
    }
}

fn name(id: &Option<String>, kind: &str, index: usize) -> String {
    id.clone().unwrap_or_else(|| format!("{kind}{index}"))
}
