//! Where the control side meets the host side.
//!
//! Everything that happens on the machine that runs the guests goes through [`Host`]. Requests,
//! responses and events are plain serializable values, bulk data are streams, and things are
//! named by id, never by a path on the other side. Today the call is a function call.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::stream::BoxStream;
use serde::{Deserialize, Serialize};

use super::id::{LayerId, SandboxId};
use super::layer::Layers;
use super::snapshot::LayersInfo;
use super::timings::{SaveTimings, Start, Timings};

/// A machine that runs sandboxes.
#[async_trait]
pub trait Host: Send + Sync {
    /// What the machine has to offer.
    ///
    /// # Errors
    /// It cannot tell.
    async fn describe(&self) -> Result<HostInfo, HostError>;

    /// Boots a sandbox, or starts it from layers, and waits until its agent has answered and the
    /// guest knows who it is. The start goes on if the caller goes away.
    ///
    /// # Errors
    /// It did not start; nothing of it is left on the host but the layers.
    async fn create(&self, request: CreateRequest) -> Result<Created, HostError>;

    /// Saves a sandbox to two new layers and ends it. It goes on if the caller goes away.
    ///
    /// # Errors
    /// [`HostError::NotSaved`]: it runs on, and the new layers are not there. With any other error it
    /// does not run.
    async fn pause(&self, request: SaveRequest) -> Result<Saved, HostError>;

    /// Saves a sandbox to two new layers and lets it run on, based on them. It goes on if the
    /// caller goes away.
    ///
    /// # Errors
    /// As for [`Host::pause`].
    async fn snapshot(&self, request: SaveRequest) -> Result<Saved, HostError>;

    /// What there is to say of these layers; `None` if one of them is not there.
    ///
    /// # Errors
    /// It cannot tell.
    async fn inspect(&self, layers: &Layers) -> Result<Option<LayersInfo>, HostError>;

    /// Removes layers that nobody refers to any more. Those that are not there are removed.
    ///
    /// # Errors
    /// One of them is left.
    async fn discard(&self, layers: &[LayerId]) -> Result<(), HostError>;

    /// Removes all layers but these. Only while nothing is being saved.
    ///
    /// # Errors
    /// One of them is left.
    async fn retain(&self, layers: &BTreeSet<LayerId>) -> Result<(), HostError>;

    /// A digest of all that a snapshot of a freshly booted machine of this shape depends on:
    /// kernel, initramfs, template, VMM, processor. It changes when one of them does. `disk` are the
    /// layers of the template's disk; without any, it is the host's image of that name.
    ///
    /// # Errors
    /// It cannot tell.
    async fn warm_key(&self, shape: &Shape, disk: &[LayerId]) -> Result<String, HostError>;

    /// What there is to say of an image on the host, by the name of its template. The digest is
    /// computed if `with_digest`, which may take seconds; otherwise it is told if it is known.
    ///
    /// # Errors
    /// There is none of that name, or it cannot be read.
    async fn image(&self, name: &str, with_digest: bool) -> Result<ImageInfo, HostError>;

    /// Shuts a sandbox down in order, so that all that it has written is on its disk, and keeps one
    /// of its disks as a new layer. It goes on if the caller goes away.
    ///
    /// # Errors
    /// The new layer is not there. The sandbox may still run.
    async fn keep_disk(&self, request: KeepDiskRequest) -> Result<KeptDisk, HostError>;

    /// Ends a sandbox and removes all that the host holds for it; also one that is still
    /// starting. Unknown ids are fine: the end is reached.
    ///
    /// # Errors
    /// Something is left.
    async fn destroy(&self, id: &SandboxId) -> Result<(), HostError>;

    /// Runs a command. The stream ends after its one [`ExecEvent::Exited`]; dropping the stream
    /// earlier kills the command.
    ///
    /// # Errors
    /// The command was not started.
    async fn exec(
        &self,
        id: &SandboxId,
        request: ExecRequest,
    ) -> Result<BoxStream<'static, Result<ExecEvent, HostError>>, HostError>;

    /// Runs a command that reads `input`. The input is taken as fast as the command reads it, and
    /// ends with the stream, or breaks off, and the command with it, with its first error.
    ///
    /// # Errors
    /// The command was not started.
    async fn exec_with_input(
        &self,
        id: &SandboxId,
        request: ExecRequest,
        input: BoxStream<'static, io::Result<Bytes>>,
    ) -> Result<BoxStream<'static, Result<ExecEvent, HostError>>, HostError>;

    /// Writes a file; it appears under its name only when `content` has ended without an error.
    ///
    /// # Errors
    /// The file is as it was.
    async fn write_file(
        &self,
        id: &SandboxId,
        request: WriteFileRequest,
        content: BoxStream<'static, io::Result<Bytes>>,
    ) -> Result<(), HostError>;

    /// Reads a file.
    ///
    /// # Errors
    /// It cannot be read from its start; later errors are in the stream.
    async fn read_file(
        &self,
        id: &SandboxId,
        request: ReadFileRequest,
    ) -> Result<FileContent, HostError>;

    /// Tells from now on what happens without being asked for.
    async fn events(&self) -> BoxStream<'static, HostEvent>;

    /// Ends every sandbox and starts no more.
    async fn shutdown(&self);
}

/// What a host has to offer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostInfo {
    /// Names of the templates, sorted.
    pub templates: Vec<String>,
    /// RAM of the machine in MiB.
    pub memory_mb: u64,
}

/// What a machine is made of.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Shape {
    /// Template of its root disk.
    pub template: String,
    /// Virtual CPUs.
    pub vcpus: u8,
    /// RAM in MiB.
    pub memory_mb: u32,
}

/// Who a guest is, and keeps being whenever it is resumed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Its host name.
    pub hostname: String,
    /// Its machine id, as in machine-id(5).
    pub machine_id: String,
}

/// Start this sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CreateRequest {
    /// Its name.
    pub id: SandboxId,
    /// What it is made of.
    pub shape: Shape,
    /// Who its guest is.
    pub identity: Identity,
    /// What it is started from; booted, if there are none.
    pub layers: Layers,
    /// What kind of start this is, for the timings.
    pub start: Start,
    /// Size of a second disk, an empty ext4 file system, in MiB; `None` for no such disk.
    pub scratch_mb: Option<u32>,
}

/// What there is to say of an image on the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageInfo {
    /// SHA-256 of the file, as hexadecimal digits.
    pub digest: Option<String>,
    /// Space that it takes on the host's disk, in bytes.
    pub size_bytes: u64,
    /// Its size, in bytes.
    pub disk_bytes: u64,
    /// Its last modification, in microseconds since the Unix epoch.
    pub modified_us: i64,
}

/// Shut this sandbox down and keep one of its disks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeepDiskRequest {
    /// How it was started.
    pub created: CreateRequest,
    /// Whether the second disk is kept, and not the first.
    pub scratch: bool,
    /// The new layer.
    pub layer: LayerId,
    /// Frozen layers of which the digests are wanted too.
    pub others: Vec<LayerId>,
}

/// What was kept of a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptDisk {
    /// SHA-256 of the other layers, in the order in which they were asked for, and of the new one, as
    /// hexadecimal digits.
    pub digests: Vec<String>,
    /// Space that all of these take on the host's disk, in bytes.
    pub size_bytes: u64,
    /// Size that the disk has in a sandbox, in bytes.
    pub disk_bytes: u64,
}

/// A sandbox was started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Created {
    /// How long it took.
    pub timings: Timings,
}

/// Save this sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SaveRequest {
    /// Its name.
    pub id: SandboxId,
    /// How many of the memory layers that it is based on stay its base, from the bottom.
    pub keep: usize,
    /// What it is based on afterwards: kept layers, and on top of each kind a new one.
    pub layers: Layers,
}

/// A sandbox was saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    /// Size on the disk, in bytes, of the two new layers.
    pub new_bytes: u64,
    /// How long it took.
    pub timings: SaveTimings,
}

/// Run this command.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ExecRequest {
    /// Program and arguments; no shell is involved.
    pub argv: Vec<String>,
    /// Variables of its environment, beside those that every command has.
    pub env: BTreeMap<String, String>,
    /// Its working directory, absolute; `None` for the user's home.
    pub cwd: Option<String>,
    /// Seconds after which the command is killed with all its children.
    pub timeout_sec: u32,
}

/// Something that a command did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExecEvent {
    /// It wrote to its standard output.
    Stdout(Bytes),
    /// It wrote to its standard error.
    Stderr(Bytes),
    /// It ended. Nothing follows.
    Exited(ExitInfo),
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitInfo {
    /// Exit status; 128 and the signal's number if a signal ended it, 127 if there is no such
    /// program.
    pub code: i32,
    /// It was killed because it outran its timeout.
    pub timed_out: bool,
}

/// Write this file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WriteFileRequest {
    /// Absolute path in the guest.
    pub path: String,
    /// Permission bits; `None` for those of the file that is replaced, or 0644.
    pub mode: Option<u32>,
}

/// Read this file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReadFileRequest {
    /// Absolute path in the guest.
    pub path: String,
}

/// A file that is being read.
pub struct FileContent {
    /// Its size in bytes, where it is known beforehand.
    pub size: Option<u64>,
    /// Its bytes.
    pub content: BoxStream<'static, io::Result<Bytes>>,
}

/// Something happened on the host without being asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum HostEvent {
    /// A running sandbox ended, and nothing of it is left on the host.
    Ended {
        /// Which one.
        id: SandboxId,
        /// How.
        end: End,
    },
}

/// How a sandbox ended by itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum End {
    /// As the guest asked.
    Orderly {
        /// A sentence.
        reason: String,
    },
    /// Otherwise.
    Failed {
        /// A sentence.
        reason: String,
    },
}

/// Why a host did not do what it was asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum HostError {
    /// No template of that name.
    #[error("no template {name:?} on this host")]
    UnknownTemplate {
        /// The name.
        name: String,
    },
    /// It holds no running sandbox of that id.
    #[error("sandbox {id} does not run on this host")]
    NotRunning {
        /// The id.
        id: SandboxId,
    },
    /// It did not start.
    #[error("the sandbox did not start: {reason}")]
    Start {
        /// Why, as a sentence.
        reason: String,
    },
    /// It was not saved, and runs on.
    #[error("the sandbox was not saved and runs on: {reason}")]
    NotSaved {
        /// Why, as a sentence.
        reason: String,
        /// How many of the memory layers that it was based on it is still based on, from the
        /// bottom: as many as can be kept when it is saved again.
        keep: usize,
    },
    /// It was paused in the midst of it.
    #[error(
        "the sandbox was paused in the meantime; what was under way in it through the API has ended"
    )]
    Paused,
    /// It was destroyed in the meantime.
    #[error("the sandbox was destroyed in the meantime")]
    Destroyed,
    /// Its agent cannot be reached, or went away in the midst of it.
    #[error("the guest agent does not answer: {reason}")]
    AgentUnreachable {
        /// Why, as a sentence.
        reason: String,
    },
    /// Its agent says no.
    #[error("the guest agent refused: {reason}")]
    Agent {
        /// What it says.
        reason: String,
    },
    /// No such file in the guest.
    #[error("file not found: {path}")]
    FileNotFound {
        /// The path.
        path: String,
    },
    /// The request makes no sense to the guest, such as reading a directory.
    #[error("{reason}")]
    Invalid {
        /// What is wrong with it.
        reason: String,
    },
    /// The content that was to be written broke off.
    #[error("the upload broke off: {reason}")]
    Upload {
        /// Why.
        reason: String,
    },
    /// The host itself has a problem.
    #[error("the host has a problem: {reason}")]
    Internal {
        /// Which.
        reason: String,
    },
}
