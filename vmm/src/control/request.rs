//! What the owner of the virtual machine is asked, and how it answers.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};

use rustix::event::{EventfdFlags, eventfd};
use serde::Serialize;

use super::guest::{GuestError, LaunchError};
use crate::builder::BuildError;
use crate::config::{ConfigError, DiskConfig, NetConfig, SerialConfig, VmConfig, VsockConfig};
use crate::devices::cpu_hotplug::TargetError;
use crate::devices::virtio::Counters;
use crate::devices::virtio::block::ImageFiles;
use crate::snapshot::{Destination, FileError, RestoreConfig, SnapshotError, WorkingSetFile};

/// What can be asked.
#[derive(Debug)]
pub enum Action {
    /// Take a configuration, without building anything.
    Create(Box<VmConfig>),
    /// Forget the configuration; a machine that exists is ended first.
    Delete,
    /// Build the machine and let it run.
    Boot,
    /// End the machine at once, as if the power had failed; the configuration stays.
    Shutdown,
    /// End the machine and build it anew.
    Reboot,
    /// Stop the guest between two instructions.
    Pause,
    /// Let a paused guest run.
    Resume,
    /// Describe the virtual machine.
    Info,
    /// Report what the devices have counted.
    Counters,
    /// Press the guest's power button.
    PowerButton,
    /// Send every vCPU a non-maskable interrupt.
    Nmi,
    /// Change vCPUs, memory or balloon.
    Resize(Resize),
    /// Change the size of a disk, in bytes.
    ResizeDisk {
        /// Its id.
        id: String,
        /// Its new size in bytes.
        size: u64,
    },
    /// Add a disk.
    AddDisk(DiskConfig),
    /// Add a network card, and keep the descriptors that its `fds` name.
    AddNet(NetConfig, Vec<OwnedFd>),
    /// Add the socket device.
    AddVsock(VsockConfig),
    /// Remove a device.
    RemoveDevice {
        /// Its id.
        id: String,
    },
    /// Write the paused machine to files.
    Snapshot {
        /// Where to.
        target: SnapshotTarget,
        /// How many of the snapshots that its memory comes from stay its base, from the lowest up.
        keep: usize,
    },
    /// Write down which pages the machine has touched since it was restored.
    SaveWorkingSet(WorkingSetTarget),
    /// Build the machine of a snapshot.
    Restore(Box<Restore>),
    /// Put another image in the place of the one that a disk has.
    ReplaceDisk {
        /// The disk's id.
        id: String,
        /// The image, and those that it builds on.
        image: ImageFiles,
    },
    /// Write the guest's memory and registers into a new file.
    CoreDump {
        /// The file.
        path: PathBuf,
    },
    /// End the machine and the process.
    Quit,
}

/// Where a snapshot is written to.
#[derive(Debug)]
pub enum SnapshotTarget {
    /// New files in this directory.
    Directory(PathBuf),
    /// Files that came as descriptors.
    Files(Destination),
}

/// Where a working set is written to.
#[derive(Debug)]
pub enum WorkingSetTarget {
    /// A new file in the directory of its snapshot.
    Directory(PathBuf),
    /// A file that came as a descriptor.
    File(WorkingSetFile),
}

/// A machine that is to go on.
#[derive(Debug)]
pub struct Restore {
    /// From where.
    pub snapshot: RestoreConfig,
    /// Its configuration; that in the snapshot's directory if there is none.
    pub config: Option<VmConfig>,
    /// What is to be otherwise.
    pub changes: Changes,
    /// Descriptors that `changes` names.
    pub descriptors: Vec<OwnedFd>,
    /// Whether the guest is to run at once.
    pub resume: bool,
}

/// Devices that stand on something else than those of the machine that a snapshot is of. Each list
/// that is not empty takes the place of that in the configuration.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Changes {
    /// Disks.
    pub disks: Vec<DiskConfig>,
    /// Network cards.
    pub net: Vec<NetConfig>,
    /// Socket device.
    pub vsock: Option<VsockConfig>,
    /// Serial port.
    pub serial: Option<SerialConfig>,
}

impl Changes {
    /// Makes them in `config`. A device keeps its id unless it gets one.
    pub(super) fn apply(self, config: &mut VmConfig) {
        let Self {
            disks,
            net,
            vsock,
            serial,
        } = self;
        let keep = |new: &mut Option<String>, old: Option<&Option<String>>| {
            if new.is_none() {
                *new = old.cloned().flatten();
            }
        };
        if !disks.is_empty() {
            let old = std::mem::replace(&mut config.disks, disks);
            for (index, disk) in config.disks.iter_mut().enumerate() {
                keep(&mut disk.id, old.get(index).map(|disk| &disk.id));
            }
        }
        if !net.is_empty() {
            let old = std::mem::replace(&mut config.net, net);
            for (index, card) in config.net.iter_mut().enumerate() {
                keep(&mut card.id, old.get(index).map(|card| &card.id));
            }
        }
        if let Some(mut new) = vsock {
            keep(&mut new.id, config.vsock.as_ref().map(|old| &old.id));
            config.vsock = Some(new);
        }
        if let Some(serial) = serial {
            config.serial = serial;
        }
    }
}

/// A new size; what is `None` stays as it is.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Resize {
    /// vCPUs that are online.
    pub vcpus: Option<u8>,
    /// Memory in bytes.
    pub memory: Option<u64>,
    /// Balloon in bytes.
    pub balloon: Option<u64>,
}

/// A request that was carried out.
#[derive(Debug)]
pub enum Answer {
    /// There is nothing to say about it.
    Done,
    /// The virtual machine.
    Info(Box<VmInfo>),
    /// What each device has counted, by the device's id.
    Counters(BTreeMap<String, Counters>),
}

/// A virtual machine as the API describes it.
#[derive(Debug, Serialize)]
pub struct VmInfo {
    /// Its configuration, with the ids that were given to its devices.
    pub config: VmConfig,
    /// `Created`, `Running` or `Paused`.
    pub state: &'static str,
    /// Memory that the guest has, in bytes.
    pub memory_actual_size: u64,
    /// Its devices, by id; absent as long as they do not exist.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device_tree: Option<BTreeMap<String, DeviceNode>>,
}

/// A device in [`VmInfo`]. All hang on the same bus, and none is on PCI.
#[derive(Debug, Default, Serialize)]
pub struct DeviceNode {
    /// Its id.
    pub id: String,
    /// Nothing: the guest finds the device by ACPI.
    pub resources: [(); 0],
    /// No other device has devices.
    pub children: [(); 0],
}

/// What went wrong, as far as the asker's next step depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The request cannot work, whatever the state.
    Request,
    /// It names something that is not there.
    NotFound,
    /// It names something that is there already.
    Conflict,
    /// The guest has still to do what was asked before.
    Busy,
    /// The state is wrong for it, or the host or the guest failed.
    Failed,
}

/// Why a request was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// There is nothing to act on.
    #[error("there is no virtual machine; vm.create makes one")]
    NoVm,
    /// One process is one virtual machine.
    #[error("there is a virtual machine already; vm.delete removes it")]
    VmExists,
    /// The state does not allow it.
    #[error("the virtual machine is {is}, and has to be {needed}")]
    State {
        /// The state it is in.
        is: &'static str,
        /// The state it has to be in.
        needed: &'static str,
    },
    /// No device of that id.
    #[error("the virtual machine has no device {id:?}")]
    NoDevice {
        /// The id that was asked for.
        id: String,
    },
    /// Two devices of one id.
    #[error("the virtual machine has a device {id:?} already")]
    DuplicateId {
        /// The id.
        id: String,
    },
    /// There can be one socket device only.
    #[error("the virtual machine has a socket device already")]
    SecondVsock,
    /// It has not the hardware.
    #[error("{0}")]
    Unsupported(&'static str),
    /// The configuration is wrong.
    #[error("the configuration describes no possible machine")]
    Config(#[from] ConfigError),
    /// The machine cannot be built.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// A file of a snapshot cannot be used.
    #[error(transparent)]
    SnapshotFile(#[from] FileError),
    /// The machine did not do it.
    #[error("the machine did not do it")]
    Guest(#[source] GuestError),
}

impl Refusal {
    /// What went wrong.
    pub fn fault(&self) -> Fault {
        match self {
            Self::NoVm | Self::NoDevice { .. } => Fault::NotFound,
            Self::DuplicateId { .. } | Self::SecondVsock => Fault::Conflict,
            Self::Unsupported(_)
            | Self::Config(_)
            | Self::Launch(LaunchError::Build(BuildError::Config(_))) => Fault::Request,
            Self::Guest(GuestError::Vcpus(TargetError::RemovalPending)) => Fault::Busy,
            Self::Guest(
                GuestError::Vcpus(TargetError::Range { .. })
                | GuestError::Snapshot(
                    SnapshotError::Layers { .. }
                    | SnapshotError::TooManyLayers(_)
                    | SnapshotError::NotRestored,
                ),
            ) => Fault::Request,
            Self::Launch(LaunchError::Build(error)) if error.is_of_snapshot() => Fault::Request,
            Self::SnapshotFile(
                FileError::Open { .. } | FileError::Config { .. } | FileError::NotNew { .. },
            ) => Fault::Request,
            Self::VmExists
            | Self::State { .. }
            | Self::Launch(_)
            | Self::SnapshotFile(_)
            | Self::Guest(_) => Fault::Failed,
        }
    }
}

impl From<GuestError> for Refusal {
    fn from(error: GuestError) -> Self {
        match error {
            GuestError::NoDevice { id } => Self::NoDevice { id },
            GuestError::Unsupported(why) => Self::Unsupported(why),
            error => Self::Guest(error),
        }
    }
}

/// Called with the answer. If it is dropped instead, the process is ending.
pub type Reply = Box<dyn FnOnce(Result<Answer, Refusal>) + Send>;

pub(super) enum Message {
    Request(Action, Reply),
    /// The machine of this number has ended.
    Ended(u64),
}

/// The way to the owner of the virtual machine.
#[derive(Clone)]
pub struct Mailbox {
    messages: Sender<Message>,
    wake: Arc<OwnedFd>,
}

impl Mailbox {
    /// Asks for something, and returns at once.
    pub fn ask(&self, action: Action, reply: Reply) {
        self.send(Message::Request(action, reply));
    }

    pub(super) fn machine_ended(&self, number: u64) {
        self.send(Message::Ended(number));
    }

    fn send(&self, message: Message) {
        // If the owner is gone the process is ending, and dropping the message says so.
        if self.messages.send(message).is_ok() {
            // Fails only if the counter is full, and then the owner is awake anyway.
            let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        }
    }
}

/// The owner's end of [`Mailbox`].
pub(super) struct Inbox {
    messages: Receiver<Message>,
    wake: Arc<OwnedFd>,
}

impl Inbox {
    /// Makes the descriptor unreadable until the next message.
    pub(super) fn clear_event(&self) {
        let _ = rustix::io::read(&self.wake, &mut [0; 8]);
    }

    pub(super) fn next(&self) -> Option<Message> {
        self.messages.try_recv().ok()
    }
}

impl AsFd for Inbox {
    /// Readable when there is a message.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

/// A mailbox and its inbox.
pub(super) fn mailbox() -> std::io::Result<(Mailbox, Inbox)> {
    let (sender, messages) = mpsc::channel();
    let wake = Arc::new(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?);
    let mailbox = Mailbox {
        messages: sender,
        wake: wake.clone(),
    };
    Ok((mailbox, Inbox { messages, wake }))
}
