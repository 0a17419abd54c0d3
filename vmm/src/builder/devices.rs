//! Connects devices to a machine: their registers to the buses, their interrupts and notifications
//! to KVM, their behaviour to the event loop.

use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex};

use event_manager::SubscriberOps;
use vmm_sys_util::eventfd::EventFd;

use super::BuildError;
use crate::arch::x86_64::acpi::VirtioMmioSlot;
use crate::arch::x86_64::layout::{
    BOOT_TIMER_PORT, CPU_HOTPLUG_PORT, EVENT_PORT, EVENT_PORT_COUNT, GED_GSI, I8042_COMMAND_PORT,
    I8042_DATA_PORT, MAX_VIRTIO_DEVICES, PVPANIC_PORT, RESET_PORT, SERIAL_GSI, SERIAL_PORT,
    SERIAL_PORT_COUNT, SLEEP_CONTROL_PORT, VIRTIO_GSI_START, VIRTIO_MMIO_SIZE, VIRTIO_MMIO_START,
};
use crate::boot_timer::BootTimer;
use crate::config::{ConfigError, VmConfig};
use crate::devices::bus::{BusDevice, OverlapError};
use crate::devices::cpu_hotplug::{self, CpuHotplug, Gate};
use crate::devices::events::PlatformEvents;
use crate::devices::legacy::i8042::KeyboardController;
use crate::devices::legacy::power::PowerRegisters;
use crate::devices::legacy::pvpanic::PanicPort;
use crate::devices::legacy::serial::{Output, SerialInput, SerialPort, SerialRegisters};
use crate::devices::virtio::balloon::Balloon;
use crate::devices::virtio::block::Block;
use crate::devices::virtio::mem::Mem;
use crate::devices::virtio::state::VirtioState;
use crate::devices::virtio::worker::{self, Parts};
use crate::devices::virtio::{DeviceHandle, Interrupt, VirtioDevice};
use crate::events::EventStream;
use crate::exit::ExitSignal;
use crate::kvm::vcpu::{Buses, Vcpu};
use crate::kvm::vm::Vm;
use crate::machine::EventLoop;
use crate::memory::GuestMemory;
use crate::resources::Devices as HostDevices;
use crate::snapshot::MachineState;

/// Register of virtio-mmio to which a driver writes the index of the queue that it notifies
/// (virtio 1.2, 4.2.2).
const QUEUE_NOTIFY: u64 = 0x50;

/// The devices of a machine, connected to it.
pub(super) struct Devices {
    pub(super) buses: Buses,
    /// What the guest is told of the virtio devices.
    pub(super) virtio: Vec<VirtioMmioSlot>,
    pub(super) handles: Vec<DeviceHandle>,
    pub(super) platform_events: PlatformEvents,
    pub(super) cpu_hotplug: CpuHotplug,
    pub(super) serial: Option<SerialPort>,
}

/// What devices are connected to.
pub(super) struct Board<'a> {
    pub(super) vm: &'a Vm,
    pub(super) vcpus: &'a [Vcpu],
    pub(super) memory: &'a GuestMemory,
    pub(super) events: &'a EventStream,
    pub(super) exit: &'a ExitSignal,
    pub(super) event_loop: &'a mut EventLoop,
    pub(super) boot_timer: &'a BootTimer,
}

impl Board<'_> {
    /// Connects all devices of `config`, which stand on `host`; with `saved`, in the state that
    /// those of another machine had.
    ///
    /// # Errors
    /// The host refuses, or a device cannot be in that state.
    pub(super) fn connect(
        self,
        config: &VmConfig,
        host: HostDevices,
        pluggable: Option<Mem>,
        saved: Option<&MachineState>,
    ) -> Result<Devices, BuildError> {
        let vcpus = self.vcpus.iter();
        let gates = vcpus.map(|vcpu| vcpu.gate().clone() as Arc<dyn Gate>);
        let gates = gates.collect();
        let mut devices = DeviceBuilder {
            board: self,
            buses: Buses::default(),
            virtio: Vec::new(),
            handles: Vec::new(),
            saved: saved.map(|state| state.devices.as_slice()),
        };
        devices.add_legacy()?;
        let (platform_events, cpu_hotplug) = devices.add_platform(gates, config.cpus.boot_vcpus)?;
        let registers = saved.and_then(|state| state.serial.as_ref());
        let serial = host
            .serial
            .map(|output| devices.add_serial(output, registers))
            .transpose()?;
        if devices.board.boot_timer.is_on() {
            let register = devices.board.boot_timer.register();
            devices.add_ports(BOOT_TIMER_PORT, 1, register)?;
        }
        // Disks come first, then cards, since the guest names them in the order of their slots.
        for (index, (disk, files)) in config.disks.iter().zip(host.disks).enumerate() {
            let name = name(&disk.id, "disk", index);
            let events = devices.board.events.clone();
            let block = Block::with_files(name.clone(), disk, files, events)?;
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
        if let Some(saved) = saved {
            let (saved, here) = (saved.devices.len(), devices.handles.len());
            if saved != here {
                return Err(BuildError::DeviceCount { saved, here });
            }
        }
        Ok(Devices {
            buses: devices.buses,
            virtio: devices.virtio,
            handles: devices.handles,
            platform_events,
            cpu_hotplug,
            serial,
        })
    }
}

fn eventfd() -> io::Result<EventFd> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
}

/// Connects devices to the machine, one after the other.
struct DeviceBuilder<'a> {
    board: Board<'a>,
    buses: Buses,
    virtio: Vec<VirtioMmioSlot>,
    handles: Vec<DeviceHandle>,
    /// The states that the virtio devices are to have, in order.
    saved: Option<&'a [VirtioState]>,
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
        let exit = || self.board.exit.clone();
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
        self.board.vm.register_irqfd(events.irqfd(), GED_GSI)?;
        self.add_ports(EVENT_PORT, EVENT_PORT_COUNT, events.register())?;
        let cpus = CpuHotplug::new(gates, boot_vcpus, events.clone(), self.board.events.clone());
        self.add_ports(
            CPU_HOTPLUG_PORT,
            cpu_hotplug::REGISTERS_SIZE,
            cpus.registers(),
        )?;
        Ok((events, cpus))
    }

    fn add_serial(
        &mut self,
        output: Output,
        saved: Option<&SerialRegisters>,
    ) -> Result<SerialPort, BuildError> {
        let is_terminal = matches!(output, Output::Stdout);
        let irqfd = eventfd()?;
        self.board.vm.register_irqfd(&irqfd, SERIAL_GSI)?;
        let port = SerialPort::new(irqfd, output, saved)?;
        if is_terminal {
            let input = std::fs::File::from(io::stdin().as_fd().try_clone_to_owned()?);
            let input = SerialInput::new(port.clone(), input, self.board.exit.clone());
            self.board.event_loop.add_subscriber(Box::new(input));
        }
        self.add_ports(SERIAL_PORT, SERIAL_PORT_COUNT, port.clone())?;
        Ok(port)
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
        self.board.vm.register_irqfd(interrupt.irqfd(), gsi)?;
        tracing::debug!(
            name,
            address = format_args!("{address:#x}"),
            gsi,
            "virtio device"
        );

        let mut parts = worker::split(
            name.clone(),
            device,
            self.board.memory.clone(),
            interrupt,
            self.board.events.clone(),
        )?;
        if let Some(state) = self.saved.and_then(|saved| saved.get(index)) {
            parts
                .restore(state)
                .map_err(|source| BuildError::RestoreDevice { name, source })?;
        }
        let Parts {
            transport,
            worker,
            handle,
            notifications,
        } = parts;
        for (queue, notification) in (0..).zip(&notifications) {
            self.board
                .vm
                .register_ioeventfd(notification, address + QUEUE_NOTIFY, queue)?;
        }
        self.buses
            .mmio
            .insert(address, VIRTIO_MMIO_SIZE, transport)?;
        self.board.event_loop.add_subscriber(Box::new(worker));
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
