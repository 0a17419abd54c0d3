//! A machine, from built to ended.
//!
//! ```text
//!   Machine ──start──► RunningMachine: paused ◄──pause, resume──► running
//!                            │                                       │
//!                            └──stop──► (gone) ◄──guest ends it──────┘
//! ```
//!
//! A started machine has one thread for its devices, the event loop, beside those of its vCPUs.
//! Whoever owns the [`RunningMachine`] is a third party, so that it may wait for a vCPU that
//! waits for the event loop.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use event_manager::{EventManager, EventOps, Events, MutEventSubscriber};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::epoll::EventSet;

use crate::devices::cpu_hotplug::CpuHotplug;
use crate::devices::events::{PlatformEvent, PlatformEvents};
use crate::devices::legacy::serial::SerialPort;
use crate::devices::virtio::{ControlError, Counters, DeviceHandle};
use crate::exit::{ExitReason, ExitSignal};
use crate::gdb::Debugger;
use crate::kvm::prefault::prefault;
use crate::kvm::state::{self, Clocks};
use crate::kvm::vcpu::{Buses, StoppedError, VcpuHandle};
use crate::kvm::vm::Vm;
use crate::memory::working_set::WorkingSet;
use crate::memory::{GuestMemory, Ram};
use crate::sandboxing::ThreadKind;
use crate::sandboxing::seccomp;
use crate::snapshot::{Destination, Lineage, MachineState, SnapshotError, WorkingSetFile};

/// Stack of a thread, in bytes. None needs more, and one of the default 2 MiB may be given a huge
/// page where the host has them for all, all of which then counts as used.
pub(crate) const STACK_SIZE: usize = 512 << 10;

/// The event loop's participants.
pub type EventLoop = EventManager<Box<dyn MutEventSubscriber + Send>>;

/// A machine with all its devices, whose vCPUs are paused and whose devices nobody serves yet.
///
/// The event loop is dropped first, which frees vCPUs that wait for it.
pub struct Machine {
    pub(crate) event_loop: EventLoop,
    pub(crate) exit: ExitSignal,
    pub(crate) parts: Parts,
}

/// What a machine consists of besides its event loop, in the order in which it is dropped: first
/// the debugger, which waits for vCPUs; the vCPUs, whose threads end; then the devices, which remove
/// what they made on the host; then the virtual machine; and its memory last.
pub(crate) struct Parts {
    pub(crate) _debugger: Option<Debugger>,
    pub(crate) vcpus: Vec<VcpuHandle>,
    pub(crate) devices: Vec<DeviceHandle>,
    pub(crate) vm: Vm,
    pub(crate) buses: Arc<Buses>,
    pub(crate) platform_events: PlatformEvents,
    pub(crate) cpu_hotplug: CpuHotplug,
    pub(crate) serial: Option<SerialPort>,
    /// What the memory is mapped from.
    pub(crate) lineage: Lineage,
    /// Of a restored machine that has not run yet.
    pub(crate) clocks: Option<Clocks>,
    /// What is to be mapped before it is touched.
    pub(crate) working_set: Option<WorkingSet>,
    pub(crate) ram: Ram,
}

impl Machine {
    /// Starts the thread that serves the devices. It calls `ended` when the machine has been
    /// ended, by the guest or through [`RunningMachine::stop`].
    ///
    /// # Errors
    /// The host gives no thread.
    pub fn start(self, ended: impl FnOnce() + Send + 'static) -> io::Result<RunningMachine> {
        let Self {
            mut event_loop,
            exit,
            parts,
        } = self;
        let watched = exit.clone();
        let serve = move || {
            if let Err(error) = seccomp::apply(ThreadKind::EventLoop) {
                watched.end(ExitReason::Error(crate::error_chain(&error)));
            }
            while watched.reason().is_none() {
                if let Err(error) = event_loop.run() {
                    watched.end(ExitReason::Error(format!("the event loop failed: {error}")));
                }
            }
            drop(event_loop);
            ended();
        };
        let thread = thread::Builder::new()
            .name("devices".to_owned())
            .stack_size(STACK_SIZE)
            .spawn(serve)?;
        Ok(RunningMachine {
            thread: Some(thread),
            exit,
            parts,
        })
    }
}

/// A machine whose devices are served. It starts out paused. Dropping it ends it.
pub struct RunningMachine {
    /// `None` only while it is dropped.
    thread: Option<JoinHandle<()>>,
    exit: ExitSignal,
    parts: Parts,
}

impl RunningMachine {
    /// Lets the guest run: first the devices, so that no vCPU waits for one, then the vCPUs.
    ///
    /// # Errors
    /// The machine has ended.
    pub fn resume(&mut self) -> Result<(), StoppedError> {
        if let Some(clocks) = self.parts.clocks.take() {
            self.set_clocks(&clocks)?;
        }
        for device in &self.parts.devices {
            device.resume().map_err(|_| StoppedError)?;
        }
        for vcpu in &self.parts.vcpus {
            // So that the guest's watchdogs do not take the pause for a hang. At its end, since it
            // is the guest's next look at the clock that is to know. KVM refuses it for a guest
            // that does not use its clock, which has no such watchdog either.
            let _ = vcpu.with_fd(VcpuFd::kvmclock_ctrl)?;
        }
        self.parts.vcpus.iter().try_for_each(VcpuHandle::resume)
    }

    /// Sets the clocks of a restored machine that has waited to run. Where KVM refuses, they are right
    /// all the same: time has passed for the guest while it waited.
    fn set_clocks(&self, clocks: &Clocks) -> Result<(), StoppedError> {
        for (vcpu, tsc) in self.parts.vcpus.iter().zip(clocks.tsc()) {
            if let Some(tsc) = *tsc
                && let Err(error) = vcpu.with_fd(move |fd| state::set_tsc(fd, tsc))?
            {
                let error = crate::error_chain(&error);
                tracing::warn!(error, "the guest's counter was not set anew");
            }
        }
        if let Err(error) = self.parts.vm.set_clock(clocks) {
            let error = crate::error_chain(&error);
            tracing::warn!(error, "the guest's clock was not set anew");
        }
        Ok(())
    }

    /// Stops all vCPUs between two instructions, then the devices: when this returns, nobody
    /// writes to the guest's memory.
    ///
    /// # Errors
    /// The machine has ended.
    pub fn pause(&self) -> Result<(), StoppedError> {
        self.parts.vcpus.iter().try_for_each(VcpuHandle::pause)?;
        for device in &self.parts.devices {
            match device.pause() {
                Ok(()) => {}
                Err(ControlError::Ended) => return Err(StoppedError),
                // The device has given up on its driver and told so by an event: it rests.
                Err(error) => tracing::warn!(device = device.name(), %error, "pause"),
            }
        }
        Ok(())
    }

    /// The vCPUs.
    pub fn vcpus(&self) -> &[VcpuHandle] {
        &self.parts.vcpus
    }

    /// The vCPUs that the guest has, and the way to change them.
    pub fn cpu_hotplug(&self) -> &CpuHotplug {
        &self.parts.cpu_hotplug
    }

    /// Presses the power button: the guest's system is asked to power off.
    ///
    /// # Errors
    /// The interrupt cannot be raised.
    pub fn press_power_button(&self) -> io::Result<()> {
        self.parts.platform_events.raise(PlatformEvent::PowerButton)
    }

    /// The virtio devices.
    pub fn devices(&self) -> &[DeviceHandle] {
        &self.parts.devices
    }

    /// What each device has counted, by the device's name; nothing of a machine that has ended.
    pub fn counters(&self) -> BTreeMap<String, Counters> {
        let devices = self.parts.devices.iter();
        devices
            .filter_map(|device| Some((device.name().to_owned(), device.counters().ok()?)))
            .collect()
    }

    /// The registers of all devices.
    pub fn buses(&self) -> &Buses {
        &self.parts.buses
    }

    /// The guest's memory.
    pub fn memory(&self) -> &GuestMemory {
        self.parts.ram.memory()
    }

    /// Writes the machine, which is paused, to `files`, based on the lowest `keep` snapshots that its
    /// memory comes from.
    ///
    /// # Errors
    /// The files are of no use. The machine is as it was.
    pub fn snapshot(&mut self, files: &Destination, keep: usize) -> Result<(), SnapshotError> {
        let parts = &mut self.parts;
        parts.lineage.check(keep)?;
        // Devices first: they may raise an interrupt while they write out what they hold back.
        let devices = parts
            .devices
            .iter()
            .map(|device| {
                device.save().map_err(|source| SnapshotError::Device {
                    id: device.name().to_owned(),
                    source,
                })
            })
            .collect::<Result<_, _>>()?;
        let save = parts.vm.vcpu_saver();
        let vcpus = parts
            .vcpus
            .iter()
            .map(|vcpu| Ok(vcpu.with_fd(save.clone())??))
            .collect::<Result<_, SnapshotError>>()?;
        let state = MachineState {
            vcpus,
            vm: parts.vm.save()?,
            cpu_hotplug: parts.cpu_hotplug.save(),
            platform_events: parts.platform_events.pending(),
            serial: parts.serial.as_ref().map(SerialPort::save),
            devices,
        };
        let memory = parts.ram.memory();
        parts.lineage.save(&state, memory, keep, files)
    }

    /// Has what the machine, which has not run yet, touches first mapped, if that is known and wanted.
    pub fn prefetch(&mut self) {
        let parts = &mut self.parts;
        let Some(pages) = parts.working_set.take() else {
            return;
        };
        let memory = parts.ram.memory();
        pages.prefetch(memory);
        let Some(vcpu) = parts.vcpus.first().filter(|_| parts.vm.can_prefault()) else {
            return;
        };
        let runs = pages.guest_runs(memory);
        match vcpu.with_fd(move |fd| prefault(fd, &runs)) {
            Ok(Ok(())) => tracing::info!("the working set is in KVM's page table"),
            Ok(Err(error)) => tracing::debug!(%error, "the working set is not in KVM's page table"),
            // A machine that has ended needs no page.
            Err(StoppedError) => {}
        }
    }

    /// Writes to `file` what the machine has touched since it was restored. It may run meanwhile.
    ///
    /// # Errors
    /// The file is of no use, or the machine was not restored.
    pub fn save_working_set(&self, file: &WorkingSetFile) -> Result<(), SnapshotError> {
        let parts = &self.parts;
        parts.lineage.save_working_set(parts.ram.memory(), file)
    }

    /// Ends the machine, unless it has ended, takes it down, and returns why it ended.
    pub fn stop(self) -> ExitReason {
        self.exit.end(ExitReason::Requested);
        self.exit.reason().cloned().unwrap_or(ExitReason::Requested)
    }
}

impl Drop for RunningMachine {
    fn drop(&mut self) {
        self.exit.end(ExitReason::Requested);
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been reported by the panic hook already.
            let _ = thread.join();
        }
    }
}

/// Wakes the event loop when the machine ends.
pub(crate) struct ExitWatch(pub(crate) ExitSignal);

impl MutEventSubscriber for ExitWatch {
    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        let _ = self.0.event().read();
    }

    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = ops.add(Events::new(self.0.event(), EventSet::IN)) {
            tracing::error!(%error, "the end of the machine cannot be watched");
        }
    }
}
