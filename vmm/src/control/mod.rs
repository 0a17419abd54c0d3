//! The owner of the virtual machine: one thread that takes one request after the other.
//!
//! ```text
//!                                      restore, to either
//!    ┌──────────────────────────────────────────────┬─────────────────────┐
//!    │      create                 boot             ▼       pause         ▼
//!   NoVm ───────────► Created ─────────────────► Running ───────────► Paused ◄─► snapshot
//!    ▲                 │ ▲ ▲                      │ │ ▲ ▲               │ │
//!    ├──── delete ─────┘ │ └────── shutdown ──────┘ │ │ └─── resume ────┘ │
//!    │                   └───────────────────────── │ │ ──── shutdown ────┤
//!    │                                              │ └───── reboot ──────┤
//!    └──────────────────── delete ──────────────────┴──────── delete ─────┘
//! ```
//!
//! Created is a configuration and nothing else; Running and Paused have a machine as well. Devices
//! are added to and removed from the configuration only, so in state Created.
//!
//! The guest can end the machine too, by powering off, rebooting, a panic or a triple fault. A
//! machine that was booted through the API is built anew when its guest reboots, as on real
//! hardware. Every other end, and every end of a machine that was given on the command line, is
//! the end of the process, whose exit status tells them apart. With `--no-shutdown` the process
//! stays: a reboot is a reboot, and everything else leads to Created.
//!
//! No transition is made by anybody else, and none is interrupted: the thread takes the next
//! message when it is done with the one before. That the guest has ended is a message like any
//! other, and one about a machine that has been replaced meanwhile is dropped.

mod cold;
pub mod guest;
mod kvm;
pub mod request;
#[cfg(any(test, fuzzing))]
#[allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::panic,
    reason = "for tests and fuzz targets only"
)]
pub mod testing;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

pub use kvm::KvmLauncher;

use crate::config::VmConfig;
use crate::events::{Event, EventStream};
use crate::exit::ExitReason;
use crate::log;
use crate::sandboxing::ThreadKind;
use crate::sandboxing::seccomp;
use crate::signals::{Received, Signals};
use crate::snapshot::{self, Destination, RestoreConfig, WorkingSetFile};
use guest::{Guest, Launcher};
use request::{
    Action, Answer, DeviceNode, Inbox, Mailbox, Message, Refusal, Resize, Restore, SnapshotTarget,
    VmInfo, WorkingSetTarget,
};

enum State {
    NoVm,
    Created(Box<VmConfig>),
    Running(Box<Vm>),
    Paused(Box<Vm>),
}

/// A machine and what it was built from.
struct Vm {
    config: Box<VmConfig>,
    guest: Box<dyn Guest>,
    /// Tells this machine from those before it.
    number: u64,
}

impl State {
    fn name(&self) -> &'static str {
        match self {
            Self::NoVm => "absent",
            Self::Created(_) => "created",
            Self::Running(_) => "running",
            Self::Paused(_) => "paused",
        }
    }
}

/// What is to happen when the guest ends its machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum OnGuestEnd {
    /// The process ends.
    Exit,
    /// The process ends, unless the guest rebooted: the machine is then built anew.
    RebootOrExit,
    /// The process stays. After a reboot the machine is built anew.
    Stay,
}

/// Owns the virtual machine.
pub struct Control<L> {
    launcher: L,
    events: EventStream,
    on_guest_end: OnGuestEnd,
    mailbox: Mailbox,
    inbox: Inbox,
    state: State,
    machines: u64,
    /// Those that the configuration names by number. A machine duplicates what it uses, so that
    /// the next one has them too.
    descriptors: Vec<OwnedFd>,
}

impl<L: Launcher> Control<L> {
    /// An owner without a virtual machine. With `no_shutdown` it stays when a guest ends its
    /// machine.
    ///
    /// # Errors
    /// The host has no eventfd left.
    pub fn new(launcher: L, events: EventStream, no_shutdown: bool) -> io::Result<Self> {
        let (mailbox, inbox) = request::mailbox()?;
        let on_guest_end = if no_shutdown {
            OnGuestEnd::Stay
        } else {
            OnGuestEnd::RebootOrExit
        };
        Ok(Self {
            launcher,
            events,
            on_guest_end,
            mailbox,
            inbox,
            state: State::NoVm,
            machines: 0,
            descriptors: Vec::new(),
        })
    }

    /// The way to ask this owner for something.
    pub fn mailbox(&self) -> Mailbox {
        self.mailbox.clone()
    }

    /// Creates the virtual machine of the command line and boots it.
    ///
    /// # Errors
    /// The configuration is wrong, or the machine cannot be built.
    pub fn create_and_boot(&mut self, config: VmConfig) -> Result<(), Refusal> {
        self.create(Box::new(config))?;
        if self.on_guest_end == OnGuestEnd::RebootOrExit {
            self.on_guest_end = OnGuestEnd::Exit;
        }
        self.boot()
    }

    /// Creates the virtual machine of the command line from a snapshot, and lets it run.
    ///
    /// # Errors
    /// The snapshot is of no use, or not for this machine.
    pub fn create_and_restore(&mut self, restore: Restore) -> Result<(), Refusal> {
        self.restore(restore)?;
        if self.on_guest_end == OnGuestEnd::RebootOrExit {
            self.on_guest_end = OnGuestEnd::Exit;
        }
        Ok(())
    }

    /// Serves requests until the process is to end, and returns why it is.
    pub fn run(mut self, signals: &Signals) -> ExitReason {
        if let Err(error) = seccomp::apply(ThreadKind::Control) {
            let reason = ExitReason::Error(crate::error_chain(&error));
            self.stop_guest();
            self.events.emit(&Event::from(&reason));
            return reason;
        }
        loop {
            let result = wait(signals, &self.inbox);
            while let Some(signal) = signals.next() {
                match signal {
                    Received::End => return self.stop_guest().unwrap_or(ExitReason::Requested),
                    Received::Describe => self.log_state(),
                }
            }
            if let Err(error) = result {
                tracing::error!(%error, "poll");
                return self.stop_guest().unwrap_or(ExitReason::Requested);
            }
            self.inbox.clear_event();
            while let Some(message) = self.inbox.next() {
                if let Some(reason) = self.take(message) {
                    return reason;
                }
            }
        }
    }

    fn log_state(&self) {
        for line in self.describe() {
            tracing::info!(target: log::ON_REQUEST, "{line}");
        }
    }

    /// What is known about the virtual machine, as lines for people.
    fn describe(&self) -> Vec<String> {
        let mut lines = vec![format!("the virtual machine is {}", self.state.name())];
        if let State::Running(vm) | State::Paused(vm) = &self.state {
            lines.extend(vm.guest.describe());
        }
        lines
    }

    /// Takes one message. `Some` is the end of the process.
    fn take(&mut self, message: Message) -> Option<ExitReason> {
        match message {
            Message::Request(Action::Quit, reply) => {
                self.stop_guest();
                reply(Ok(Answer::Done));
                Some(ExitReason::Requested)
            }
            Message::Request(action, reply) => {
                reply(self.act(action));
                None
            }
            Message::Ended(number) => self.guest_ended(number),
        }
    }

    fn guest_ended(&mut self, number: u64) -> Option<ExitReason> {
        match &self.state {
            State::Running(vm) | State::Paused(vm) if vm.number == number => {}
            _ => return None,
        }
        let reason = self.stop_guest()?;
        let reboots = reason == ExitReason::Reboot && self.on_guest_end != OnGuestEnd::Exit;
        if reboots {
            let error = self.boot().err()?;
            let reason = ExitReason::Error(crate::error_chain(&error));
            self.events.emit(&Event::from(&reason));
            return (self.on_guest_end != OnGuestEnd::Stay).then_some(reason);
        }
        (self.on_guest_end != OnGuestEnd::Stay).then_some(reason)
    }

    fn act(&mut self, action: Action) -> Result<Answer, Refusal> {
        tracing::debug!(?action, state = self.state.name(), "request");
        match action {
            Action::Create(config) => self.create(config)?,
            Action::Delete => self.delete(),
            Action::Boot => self.boot()?,
            Action::Shutdown => self.shutdown()?,
            Action::Reboot => {
                self.machine()?;
                self.launcher.check()?;
                self.stop_guest();
                self.boot()?;
            }
            Action::Pause => self.pause()?,
            Action::Resume => self.resume()?,
            Action::Info => return self.info(),
            Action::Counters => return Ok(Answer::Counters(self.machine()?.guest.counters())),
            Action::PowerButton => self.running()?.guest.power_button()?,
            Action::Nmi => self.running()?.guest.nmi()?,
            Action::Resize(resize) => self.resize(resize)?,
            Action::ResizeDisk { id, size } => self.machine()?.guest.resize_disk(&id, size)?,
            Action::AddDisk(disk) => cold::add_disk(self.cold()?, disk)?,
            Action::AddNet(net, descriptors) => {
                cold::add_net(self.cold()?, net)?;
                self.descriptors.extend(descriptors);
            }
            Action::AddVsock(vsock) => cold::add_vsock(self.cold()?, vsock)?,
            Action::RemoveDevice { id } => {
                cold::remove(self.cold()?, &id)?;
                self.close_unused_descriptors();
            }
            Action::Snapshot { target, keep } => self.snapshot(target, keep)?,
            Action::SaveWorkingSet(target) => {
                let file = match target {
                    WorkingSetTarget::File(file) => file,
                    WorkingSetTarget::Directory(path) => WorkingSetFile::create(&path)?,
                };
                self.machine()?.guest.save_working_set(&file)?;
            }
            Action::Restore(restore) => self.restore(*restore)?,
            Action::ReplaceDisk { id, image } => self.paused()?.guest.replace_disk(&id, image)?,
            Action::CoreDump { path } => self.paused()?.guest.core_dump(&path)?,
            // `take` ends the process before it comes to this.
            Action::Quit => {}
        }
        Ok(Answer::Done)
    }

    fn create(&mut self, mut config: Box<VmConfig>) -> Result<(), Refusal> {
        if !matches!(self.state, State::NoVm) {
            return Err(Refusal::VmExists);
        }
        cold::assign_ids(&mut config)?;
        config.validate_for_boot()?;
        self.state = State::Created(config);
        Ok(())
    }

    fn restore(&mut self, restore: Restore) -> Result<(), Refusal> {
        if !matches!(self.state, State::NoVm) {
            return Err(Refusal::VmExists);
        }
        self.launcher.check()?;
        let Restore {
            snapshot,
            config,
            changes,
            descriptors,
            resume,
        } = restore;
        let mut config = match config {
            Some(config) => config,
            None => snapshot::read_config(&snapshot.source)?,
        };
        changes.apply(&mut config);
        cold::assign_ids(&mut config)?;
        let (mut guest, number) = self.launch(&config, Some(&snapshot))?;
        self.descriptors.extend(descriptors);
        // Before the guest runs, since a page that it reads in the meantime has to be mapped anew when
        // it gets one of its own.
        guest.prefetch();
        self.state = State::Paused(Box::new(Vm {
            config: Box::new(config),
            guest,
            number,
        }));
        self.events.emit(&Event::Restored);
        if resume { self.resume() } else { Ok(()) }
    }

    fn snapshot(&mut self, target: SnapshotTarget, keep: usize) -> Result<(), Refusal> {
        let vm = self.paused()?;
        let files = match target {
            SnapshotTarget::Files(files) => files,
            SnapshotTarget::Directory(path) => Destination::create(&path, &vm.config)?,
        };
        vm.guest.snapshot(&files, keep)?;
        self.events.emit(&Event::Snapshotted);
        Ok(())
    }

    /// Builds a machine and gives it a number.
    fn launch(
        &mut self,
        config: &VmConfig,
        snapshot: Option<&RestoreConfig>,
    ) -> Result<(Box<dyn Guest>, u64), Refusal> {
        self.machines += 1;
        let number = self.machines;
        let mailbox = self.mailbox.clone();
        let ended = Box::new(move || mailbox.machine_ended(number));
        Ok((self.launcher.launch(config, snapshot, ended)?, number))
    }

    fn delete(&mut self) {
        self.stop_guest();
        if !matches!(mem::replace(&mut self.state, State::NoVm), State::NoVm) {
            self.events.emit(&Event::Deleted);
        }
        self.close_unused_descriptors();
        if self.on_guest_end == OnGuestEnd::Exit {
            // The next one is not from the command line.
            self.on_guest_end = OnGuestEnd::RebootOrExit;
        }
    }

    fn close_unused_descriptors(&mut self) {
        let cards = match &self.state {
            State::NoVm => &[],
            State::Created(config) => config.net.as_slice(),
            State::Running(vm) | State::Paused(vm) => vm.config.net.as_slice(),
        };
        let is_named = |descriptor: &OwnedFd| {
            let mut numbers = cards.iter().filter_map(|card| card.fds.as_ref()).flatten();
            numbers.any(|number| *number == descriptor.as_raw_fd())
        };
        self.descriptors.retain(is_named);
    }

    fn boot(&mut self) -> Result<(), Refusal> {
        let config = match &self.state {
            State::Created(config) => config.clone(),
            State::NoVm => return Err(Refusal::NoVm),
            State::Running(_) | State::Paused(_) => return Err(self.wrong_state("created")),
        };
        let (mut guest, number) = self.launch(&config, None)?;
        self.events.emit(&Event::Booting);
        // A machine that has ended already is told of by a message like any other that ends.
        let _ = guest.resume();
        self.events.emit(&Event::Booted);
        self.state = State::Running(Box::new(Vm {
            config,
            guest,
            number,
        }));
        Ok(())
    }

    /// Ends the machine, if there is one, and returns why it ended.
    fn stop_guest(&mut self) -> Option<ExitReason> {
        match mem::replace(&mut self.state, State::NoVm) {
            State::Running(vm) | State::Paused(vm) => {
                self.state = State::Created(vm.config);
                let reason = vm.guest.stop();
                self.events.emit(&Event::from(&reason));
                Some(reason)
            }
            other => {
                self.state = other;
                None
            }
        }
    }

    fn shutdown(&mut self) -> Result<(), Refusal> {
        self.machine()?;
        self.stop_guest();
        Ok(())
    }

    fn pause(&mut self) -> Result<(), Refusal> {
        self.running()?.guest.pause()?;
        if let State::Running(vm) = mem::replace(&mut self.state, State::NoVm) {
            self.state = State::Paused(vm);
        }
        self.events.emit(&Event::Paused);
        Ok(())
    }

    fn resume(&mut self) -> Result<(), Refusal> {
        self.paused()?.guest.resume()?;
        if let State::Paused(vm) = mem::replace(&mut self.state, State::NoVm) {
            self.state = State::Running(vm);
        }
        self.events.emit(&Event::Resumed);
        Ok(())
    }

    fn resize(&mut self, resize: Resize) -> Result<(), Refusal> {
        if let State::Created(config) = &mut self.state {
            return cold::resize(config, resize);
        }
        let vm = self.running()?;
        if let Some(count) = resize.vcpus {
            vm.guest.resize_vcpus(count)?;
            // So that a reboot keeps it.
            vm.config.cpus.boot_vcpus = count;
        }
        if let Some(size) = resize.memory {
            vm.guest.resize_memory(size)?;
            vm.config.memory.hotplugged_size = size.checked_sub(vm.config.memory.size);
        }
        if let Some(size) = resize.balloon {
            vm.guest.resize_balloon(size)?;
            if let Some(balloon) = &mut vm.config.balloon {
                balloon.size = size;
            }
        }
        Ok(())
    }

    fn info(&self) -> Result<Answer, Refusal> {
        let (config, state, vm) = match &self.state {
            State::NoVm => return Err(Refusal::NoVm),
            State::Created(config) => (config, "Created", None),
            State::Running(vm) => (&vm.config, "Running", Some(vm)),
            State::Paused(vm) => (&vm.config, "Paused", Some(vm)),
        };
        let tree = |ids: Vec<String>| -> BTreeMap<String, DeviceNode> {
            let node = |id: String| DeviceNode {
                id,
                ..DeviceNode::default()
            };
            ids.into_iter().map(|id| (id.clone(), node(id))).collect()
        };
        Ok(Answer::Info(Box::new(VmInfo {
            config: (**config).clone(),
            state,
            memory_actual_size: vm.map_or(config.memory.size, |vm| vm.guest.memory_size()),
            device_tree: vm.map(|vm| tree(vm.guest.devices())),
        })))
    }

    /// The configuration of a virtual machine without a machine.
    fn cold(&mut self) -> Result<&mut VmConfig, Refusal> {
        match &mut self.state {
            State::Created(config) => Ok(config),
            State::NoVm => Err(Refusal::NoVm),
            State::Running(_) | State::Paused(_) => Err(Refusal::Unsupported(
                "devices of a machine that has been booted cannot be added or removed, since \
                 virtio-mmio has no hotplug; do it after vm.shutdown or before vm.boot",
            )),
        }
    }

    fn running(&mut self) -> Result<&mut Vm, Refusal> {
        let wrong = self.wrong_state("running");
        match &mut self.state {
            State::Running(vm) => Ok(vm),
            _ => Err(wrong),
        }
    }

    fn paused(&mut self) -> Result<&mut Vm, Refusal> {
        let wrong = self.wrong_state("paused");
        match &mut self.state {
            State::Paused(vm) => Ok(vm),
            _ => Err(wrong),
        }
    }

    fn machine(&mut self) -> Result<&mut Vm, Refusal> {
        let wrong = self.wrong_state("running or paused");
        match &mut self.state {
            State::Running(vm) | State::Paused(vm) => Ok(vm),
            _ => Err(wrong),
        }
    }

    fn wrong_state(&self, needed: &'static str) -> Refusal {
        match &self.state {
            State::NoVm => Refusal::NoVm,
            state => Refusal::State {
                is: state.name(),
                needed,
            },
        }
    }
}

/// Waits until there is something to do.
fn wait(signals: &Signals, inbox: &Inbox) -> Result<(), Errno> {
    let mut polled = [
        PollFd::new(signals, PollFlags::IN),
        PollFd::new(inbox, PollFlags::IN),
    ];
    match poll(&mut polled, None) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(error),
    }
}
