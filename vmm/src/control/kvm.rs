//! Machines of KVM, as their owner sees them.

use std::collections::BTreeMap;
use std::path::Path;

use super::guest::{Guest, GuestError, LaunchError, Launcher};
use crate::boot_timer::Phase;
use crate::builder::{self, BuildError};
use crate::config::{ConsoleMode, VmConfig};
use crate::core_dump;
use crate::debugging::DebuggingAids;
use crate::devices::virtio::block::ImageFiles;
use crate::devices::virtio::{Control, ControlError, Counters, DeviceHandle};
use crate::events::EventStream;
use crate::exit::ExitReason;
use crate::inspect;
use crate::kvm::vcpu::VcpuHandle;
use crate::machine::RunningMachine;
use crate::resources::HostResources;
use crate::sandboxing::JailConfig;
use crate::snapshot::{Destination, RestoreConfig, WorkingSetFile};
use crate::terminal::RawTerminal;

/// Builds machines on this host's KVM.
pub struct KvmLauncher {
    events: EventStream,
    jail: Jail,
    aids: DebuggingAids,
}

/// Whether the process is to be jailed.
enum Jail {
    No,
    /// With the first machine.
    Wanted(JailConfig),
    /// It is.
    Entered,
}

impl KvmLauncher {
    /// Machines whose devices report to `events`, with these `aids` for debugging.
    ///
    /// With `jail`, the process is jailed when it has opened what the first machine needs, and can
    /// open nothing for a second one. It must have no other thread then, and goes on as another
    /// process (see [`sandboxing::enter`](crate::sandboxing::enter)).
    pub fn new(events: EventStream, jail: Option<JailConfig>, aids: DebuggingAids) -> Self {
        Self {
            events,
            aids,
            jail: jail.map_or(Jail::No, Jail::Wanted),
        }
    }

    /// Opens all that the machine needs, and leaves everything else behind if that is wanted.
    fn open(
        &mut self,
        config: &VmConfig,
        snapshot: Option<&RestoreConfig>,
    ) -> Result<(HostResources, Option<RawTerminal>), LaunchError> {
        self.check()?;
        let host = HostResources::open(config, snapshot)?;
        self.aids.boot_timer.reached(Phase::HostOpened);
        // Before the jail: a process in a PID namespace cannot tell whose terminal it is.
        let terminal = if config.serial.mode == ConsoleMode::Tty {
            RawTerminal::enter().map_err(LaunchError::Terminal)?
        } else {
            None
        };
        let host = match &self.jail {
            Jail::Wanted(jail) => host.jail(jail).map_err(BuildError::from)?,
            Jail::No | Jail::Entered => return Ok((host, terminal)),
        };
        self.jail = Jail::Entered;
        self.aids.boot_timer.reached(Phase::Jailed);
        Ok((host, terminal))
    }
}

impl Launcher for KvmLauncher {
    fn check(&self) -> Result<(), LaunchError> {
        match self.jail {
            Jail::Entered => Err(LaunchError::Jailed),
            Jail::No | Jail::Wanted(_) => Ok(()),
        }
    }

    fn launch(
        &mut self,
        config: &VmConfig,
        snapshot: Option<&RestoreConfig>,
        ended: Box<dyn FnOnce() + Send>,
    ) -> Result<Box<dyn Guest>, LaunchError> {
        let (host, terminal) = self.open(config, snapshot)?;
        let machine = builder::build(config, host, self.events.clone(), &self.aids)?;
        let machine = machine.start(ended).map_err(LaunchError::Thread)?;
        Ok(Box::new(KvmGuest {
            machine,
            memory_size: config.memory.size,
            _terminal: terminal,
        }))
    }
}

struct KvmGuest {
    machine: RunningMachine,
    /// Memory that it was booted with, in bytes.
    memory_size: u64,
    /// Restored when the machine, whose output it shows, is gone.
    _terminal: Option<RawTerminal>,
}

impl KvmGuest {
    fn device(&self, id: &str) -> Result<&DeviceHandle, GuestError> {
        let mut devices = self.machine.devices().iter();
        devices
            .find(|device| device.name() == id)
            .ok_or_else(|| GuestError::NoDevice { id: id.to_owned() })
    }

    /// Asks the devices in turn until one can do it.
    fn control_any(&self, control: Control, lacking: &'static str) -> Result<(), GuestError> {
        for device in self.machine.devices() {
            match device.control(control) {
                Err(ControlError::NotSupported) => {}
                result => return result.map_err(|source| refused(device, source)),
            }
        }
        Err(GuestError::Unsupported(lacking))
    }
}

fn refused(device: &DeviceHandle, source: ControlError) -> GuestError {
    GuestError::Device {
        id: device.name().to_owned(),
        source,
    }
}

impl Guest for KvmGuest {
    fn pause(&mut self) -> Result<(), GuestError> {
        Ok(self.machine.pause()?)
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        Ok(self.machine.resume()?)
    }

    fn nmi(&mut self) -> Result<(), GuestError> {
        for vcpu in self.machine.vcpus() {
            vcpu.with_fd(|vcpu| vcpu.nmi())?
                .map_err(|source| GuestError::Kvm {
                    ioctl: "KVM_NMI",
                    source,
                })?;
        }
        Ok(())
    }

    fn power_button(&mut self) -> Result<(), GuestError> {
        self.machine
            .press_power_button()
            .map_err(GuestError::PowerButton)
    }

    fn resize_vcpus(&mut self, count: u8) -> Result<(), GuestError> {
        Ok(self.machine.cpu_hotplug().set_target(count)?)
    }

    fn resize_memory(&mut self, size: u64) -> Result<(), GuestError> {
        let plugged = size.checked_sub(self.memory_size);
        let size = plugged.ok_or(GuestError::Unsupported(
            "memory that the machine was booted with cannot be unplugged; a balloon can take it",
        ))?;
        self.control_any(
            Control::ResizeMemory { size },
            "the machine has no memory to plug while it runs; give its size before vm.boot",
        )
    }

    fn resize_balloon(&mut self, size: u64) -> Result<(), GuestError> {
        self.control_any(
            Control::ResizeBalloon { size },
            "the machine has no balloon",
        )
    }

    fn resize_disk(&mut self, id: &str, size: u64) -> Result<(), GuestError> {
        let device = self.device(id)?;
        match device.control(Control::ResizeDisk { size }) {
            Err(ControlError::NotSupported) => Err(GuestError::Unsupported(
                "this device cannot change its size while the machine runs",
            )),
            result => result.map_err(|source| refused(device, source)),
        }
    }

    fn snapshot(&mut self, files: &Destination, keep: usize) -> Result<(), GuestError> {
        Ok(self.machine.snapshot(files, keep)?)
    }

    fn prefetch(&mut self) {
        self.machine.prefetch();
    }

    fn save_working_set(&mut self, file: &WorkingSetFile) -> Result<(), GuestError> {
        Ok(self.machine.save_working_set(file)?)
    }

    fn replace_disk(&mut self, id: &str, image: ImageFiles) -> Result<(), GuestError> {
        let device = self.device(id)?;
        match device.replace_image(image) {
            Err(ControlError::NotSupported) => {
                Err(GuestError::Unsupported("this device is no disk"))
            }
            result => result.map_err(|source| refused(device, source)),
        }
    }

    fn core_dump(&mut self, path: &Path) -> Result<(), GuestError> {
        let vcpus = self.machine.vcpus().iter();
        let registers = vcpus
            .map(|vcpu: &VcpuHandle| {
                vcpu.with_fd(core_dump::registers)?
                    .map_err(|source| GuestError::Kvm {
                        ioctl: "reading the registers of a vCPU",
                        source,
                    })
            })
            .collect::<Result<Vec<_>, GuestError>>()?;
        Ok(core_dump::write(path, self.machine.memory(), &registers)?)
    }

    fn counters(&self) -> BTreeMap<String, Counters> {
        self.machine.counters()
    }

    fn devices(&self) -> Vec<String> {
        let devices = self.machine.devices().iter();
        devices.map(|device| device.name().to_owned()).collect()
    }

    fn memory_size(&self) -> u64 {
        let counters = self.machine.counters();
        let sum = |name| -> u64 {
            let values = counters.values().filter_map(|device| device.get(name));
            values.sum()
        };
        // Of the memory device and of the balloon.
        (self.memory_size + sum("plugged_bytes")).saturating_sub(sum("actual_bytes"))
    }

    fn describe(&self) -> Vec<String> {
        inspect::describe(&self.machine)
    }

    fn stop(self: Box<Self>) -> ExitReason {
        self.machine.stop()
    }
}
