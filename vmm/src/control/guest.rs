//! What the owner of the virtual machine needs of the machine itself.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use crate::builder::BuildError;
use crate::config::VmConfig;
use crate::core_dump::CoreDumpError;
use crate::devices::cpu_hotplug::TargetError;
use crate::devices::virtio::block::ImageFiles;
use crate::devices::virtio::{ControlError, Counters};
use crate::exit::ExitReason;
use crate::kvm::vcpu::StoppedError;
use crate::snapshot::{Destination, RestoreConfig, SnapshotError, WorkingSetFile};

/// Makes machines.
pub trait Launcher {
    /// Whether another machine can be made at all, asked before one is ended to make room for it.
    ///
    /// # Errors
    /// It cannot.
    fn check(&self) -> Result<(), LaunchError>;

    /// Builds the machine that `config` describes, to boot or to go on from `snapshot`, and starts to
    /// serve its devices. Its vCPUs are paused. `ended` is called once, on another thread, when the
    /// machine has ended.
    ///
    /// # Errors
    /// It cannot be built.
    fn launch(
        &mut self,
        config: &VmConfig,
        snapshot: Option<&RestoreConfig>,
        ended: Box<dyn FnOnce() + Send>,
    ) -> Result<Box<dyn Guest>, LaunchError>;
}

/// Why there is no machine.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// It cannot be built.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// The files of another machine are out of reach.
    #[error(
        "the VMM is jailed and can open nothing any more: it boots one machine, once; start \
         another vmm"
    )]
    Jailed,
    /// Nobody could serve its devices.
    #[error("cannot start the thread of the devices")]
    Thread(#[source] io::Error),
    /// The user's terminal cannot be the guest's.
    #[error("cannot give the terminal to the guest")]
    Terminal(#[source] io::Error),
}

/// A machine that has been launched. Dropping it ends it.
pub trait Guest {
    /// Stops the guest between two instructions, and then its devices.
    ///
    /// # Errors
    /// The machine has ended.
    fn pause(&mut self) -> Result<(), GuestError>;

    /// Lets a paused guest run.
    ///
    /// # Errors
    /// The machine has ended.
    fn resume(&mut self) -> Result<(), GuestError>;

    /// Sends every vCPU a non-maskable interrupt.
    ///
    /// # Errors
    /// KVM refuses, or the machine has ended.
    fn nmi(&mut self) -> Result<(), GuestError>;

    /// Presses the power button.
    ///
    /// # Errors
    /// The guest cannot be told.
    fn power_button(&mut self) -> Result<(), GuestError>;

    /// Asks the guest for another number of vCPUs. An event tells when it has complied.
    ///
    /// # Errors
    /// The machine cannot have that many, or the guest has not complied with the last request.
    fn resize_vcpus(&mut self, count: u8) -> Result<(), GuestError>;

    /// Changes the size of the guest's memory, in bytes.
    ///
    /// # Errors
    /// The machine cannot have that much, or cannot change it.
    fn resize_memory(&mut self, size: u64) -> Result<(), GuestError>;

    /// Changes the size of the balloon, in bytes.
    ///
    /// # Errors
    /// The machine has no balloon, or it cannot have that size.
    fn resize_balloon(&mut self, size: u64) -> Result<(), GuestError>;

    /// Tells a disk that its image is to have another size, in bytes.
    ///
    /// # Errors
    /// There is no such disk, or it cannot have that size.
    fn resize_disk(&mut self, id: &str, size: u64) -> Result<(), GuestError>;

    /// Writes the paused machine to `files`, based on the lowest `keep` snapshots that it comes from.
    ///
    /// # Errors
    /// The files are of no use; the machine is as it was, or has ended.
    fn snapshot(&mut self, files: &Destination, keep: usize) -> Result<(), GuestError>;

    /// Has what the machine, which has not run yet, touches first mapped, if that is known and wanted.
    fn prefetch(&mut self);

    /// Writes to `file` what the machine has touched since it was restored.
    ///
    /// # Errors
    /// The file is of no use, or the machine was not restored.
    fn save_working_set(&mut self, file: &WorkingSetFile) -> Result<(), GuestError>;

    /// Puts another image in the place of the one that a disk of the paused machine has.
    ///
    /// # Errors
    /// There is no such disk, or the image is not like the one that it has.
    fn replace_disk(&mut self, id: &str, image: ImageFiles) -> Result<(), GuestError>;

    /// Writes the memory and registers of a paused guest into a new file.
    ///
    /// # Errors
    /// The file cannot be written, or the machine has ended.
    fn core_dump(&mut self, path: &Path) -> Result<(), GuestError>;

    /// What each device has counted, by the device's name.
    fn counters(&self) -> BTreeMap<String, Counters>;

    /// The ids of its devices.
    fn devices(&self) -> Vec<String>;

    /// The memory that the guest has now, in bytes.
    fn memory_size(&self) -> u64;

    /// The registers of its vCPUs and the state of its devices, as lines for people. The guest
    /// goes on as it did.
    fn describe(&self) -> Vec<String>;

    /// Ends the machine, unless it has ended, takes it down, and returns why it ended.
    fn stop(self: Box<Self>) -> ExitReason;
}

/// Why a machine did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// It has ended in the meantime.
    #[error("the machine has just ended")]
    Ended(#[from] StoppedError),
    /// It has no such device.
    #[error("the machine has no device {id:?}")]
    NoDevice {
        /// The name that was asked for.
        id: String,
    },
    /// It has not the hardware.
    #[error("{0}")]
    Unsupported(&'static str),
    /// The device refused.
    #[error("device {id} refused")]
    Device {
        /// Its name.
        id: String,
        /// What it says.
        #[source]
        source: ControlError,
    },
    /// KVM refused.
    #[error("{ioctl} failed")]
    Kvm {
        /// Name of the ioctl.
        ioctl: &'static str,
        /// What the kernel says.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// The number of vCPUs stays as it is.
    #[error("cannot change the number of vCPUs")]
    Vcpus(#[from] TargetError),
    /// The guest cannot be told.
    #[error("cannot press the power button")]
    PowerButton(#[source] io::Error),
    /// No snapshot.
    #[error("cannot make a snapshot")]
    Snapshot(#[from] SnapshotError),
    /// No core file.
    #[error("cannot write the core file")]
    CoreDump(#[from] CoreDumpError),
}
