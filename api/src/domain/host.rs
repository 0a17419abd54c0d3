//! Where the control side meets the host side.
//!
//! Everything that happens on the machine that runs the guests goes through [`Host`]. Requests,
//! responses and events are plain serializable values, bulk data are streams, and things are
//! named by id, never by a path on the other side. Today the call is a function call.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::Ipv4Addr;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::stream::BoxStream;
use serde::{Deserialize, Serialize};

use super::id::{LayerId, SandboxId};
use super::layer::Layers;
use super::network::{
    AddressError, Connection, Egress, Forward, ForwardSpec, NetworkActivity, NetworkInfo,
};
use super::posture::Posture;
use super::process::GuestHost;
use super::resources::{ResizeRequest, Resources};
use super::snapshot::LayersInfo;
use super::timings::{SaveTimings, Start, Timings};
use super::usage::MeterHost;

/// A machine that runs sandboxes.
#[async_trait]
pub trait Host: GuestHost + MeterHost {
    /// What the machine has to offer.
    ///
    /// # Errors
    /// It cannot tell.
    async fn describe(&self) -> Result<HostInfo, HostError>;

    /// Takes over sandboxes that an earlier daemon has left running on this machine, and ends and
    /// removes whatever else it has left but layers. Once, before anything is started. Returns what came
    /// of each: one that was not taken over, with [`HostError::NotRunning`] if it has no process any more,
    /// is ended.
    ///
    /// # Errors
    /// Something is left that cannot be ended or removed.
    async fn adopt(
        &self,
        requests: Vec<AdoptRequest>,
    ) -> Result<Vec<(SandboxId, Result<Adopted, HostError>)>, HostError>;

    /// What it has of which sandboxes, of all that it has anything of but layers.
    ///
    /// # Errors
    /// It cannot tell.
    async fn present(&self) -> Result<Vec<(SandboxId, Presence)>, HostError>;

    /// Ends a sandbox as [`Host::destroy`] does, and removes what is left of one that is nobody's any
    /// more. Only by whoever has the turn at it.
    ///
    /// # Errors
    /// Something is left.
    async fn sweep(&self, id: &SandboxId) -> Result<(), HostError>;

    /// Boots a sandbox, or starts it from layers, and waits until its agent has answered and the
    /// guest knows who it is. The start goes on if the caller goes away.
    ///
    /// # Errors
    /// It did not start; nothing of it is left on the host but the layers.
    async fn create(&self, request: CreateRequest) -> Result<Created, HostError>;

    /// Restores a machine from layers, without letting its guest run, for a sandbox that may be
    /// asked for later. Until it is claimed it is one that the host holds, and not one that runs:
    /// it is destroyed like any other, and its own end is told by [`HostEvent::Lost`]. The work goes
    /// on if the caller goes away.
    ///
    /// # Errors
    /// It was not restored; nothing of it is left on the host but the layers.
    async fn prepare(&self, request: PrepareRequest) -> Result<(), HostError>;

    /// Makes a machine that is prepared a sandbox: lets its guest run, and waits until its agent has
    /// answered and the guest knows who it is. The start goes on if the caller goes away.
    ///
    /// # Errors
    /// It did not start, or none of that id is prepared; nothing of it is left on the host but the
    /// layers.
    async fn claim(&self, request: ClaimRequest) -> Result<Created, HostError>;

    /// Notes which memory a sandbox, which was started from these layers, has touched since, for
    /// others that start from them: they have it before they touch it.
    ///
    /// # Errors
    /// It is not noted. Nothing else depends on it.
    async fn note_working_set(&self, id: &SandboxId, layers: &Layers) -> Result<(), HostError>;

    /// Saves a sandbox to two new layers and ends it. It goes on if the caller goes away.
    ///
    /// # Errors
    /// [`HostError::NotSaved`]: it runs on, and the new layers are not there. With any other error it
    /// does not run.
    async fn pause(&self, request: SaveRequest) -> Result<Saved, HostError>;

    /// Saves a sandbox to new layers, of its memory and disk or of its disk alone, and lets it run
    /// on, based on them. It goes on if the caller goes away.
    ///
    /// # Errors
    /// As for [`Host::pause`].
    async fn snapshot(&self, request: SaveRequest) -> Result<Saved, HostError>;

    /// Makes a new disk layer that takes the place of others, which stay as they are. One at a time, and
    /// with low priority.
    ///
    /// # Errors
    /// The new layer is not there.
    async fn merge_disk(&self, request: MergeRequest) -> Result<(), HostError>;

    /// Whether it has all of these layers.
    ///
    /// # Errors
    /// It cannot tell.
    async fn holds(&self, layers: &Layers) -> Result<bool, HostError>;

    /// What there is to say of these layers; `None` if one of them is not there. Without layers of
    /// memory, all of the topmost of the disk is read.
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

    /// Makes the disk that a running sandbox writes to a layer too, which holds what the sandbox has
    /// written when it ends, however that comes about. Nobody else may be based on the layer before.
    ///
    /// # Errors
    /// The layer is not there.
    async fn keep(&self, id: &SandboxId, layer: &LayerId) -> Result<(), HostError>;

    /// Shuts a sandbox down in order, and cuts its power if it takes too long. Its end is not told by
    /// an event. It goes on if the caller goes away. Returns whether it shut down in order.
    ///
    /// # Errors
    /// Something of it is left.
    async fn power_off(&self, request: PowerOffRequest) -> Result<bool, HostError>;

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

    /// What a sandbox that runs has written to its console, without control characters; the end of
    /// it, if it is much.
    ///
    /// # Errors
    /// It does not run, or its console cannot be read.
    async fn console(&self, id: &SandboxId) -> Result<String, HostError>;

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

    /// What is in a directory, in no order; at most `limit` entries.
    ///
    /// # Errors
    /// There is no such directory, or it has more.
    async fn list_dir(
        &self,
        id: &SandboxId,
        path: &str,
        limit: usize,
    ) -> Result<Vec<FileInfo>, HostError>;

    /// Makes a directory and its parents, as far as they are not there.
    ///
    /// # Errors
    /// It is not there; some of its parents may be.
    async fn make_dir(&self, id: &SandboxId, path: &str) -> Result<FileInfo, HostError>;

    /// Removes a file, or a directory with all that is in it.
    ///
    /// # Errors
    /// There is none, or something is left.
    async fn remove_file(&self, id: &SandboxId, path: &str) -> Result<(), HostError>;
    /// Changes what a running sandbox has, and waits until its guest has complied.
    ///
    /// # Errors
    /// It has what it had: [`HostError::Conflict`] if its machine or this host cannot do that.
    async fn resize(&self, request: ResizeRequest) -> Result<(), HostError>;

    /// Changes what a running sandbox may reach, for its connections as well.
    ///
    /// # Errors
    /// It is as before.
    async fn set_egress(&self, id: &SandboxId, egress: Egress) -> Result<(), HostError>;

    /// Connects the sandboxes again that were cut off from their networks, or that no rule held back any
    /// more, since somebody else on the host has changed something. Returns those, and whether all is as
    /// it should be now.
    async fn repair_networks(&self) -> (Vec<SandboxId>, Result<(), HostError>);

    /// What a running sandbox does in the network.
    ///
    /// # Errors
    /// It cannot tell.
    async fn network_activity(&self, id: &SandboxId) -> Result<NetworkActivity, HostError>;

    /// Lets a port of the host lead into a sandbox, which need not run. It stays until it is closed.
    ///
    /// # Errors
    /// [`HostError::PortInUse`], or the port cannot be had otherwise.
    async fn open_forward(&self, id: &SandboxId, spec: ForwardSpec) -> Result<Forward, HostError>;

    /// Takes ports of the host away that lead into a sandbox, and ends their connections. Those that
    /// do not are fine.
    async fn close_forwards(&self, id: &SandboxId, forwards: &[Forward]);

    /// Tells from now on what happens without being asked for.
    async fn events(&self) -> BoxStream<'static, HostEvent>;

    /// What holds a sandbox, which may be off, and who may read these layers of it.
    ///
    /// # Errors
    /// It cannot be looked at.
    async fn posture(&self, id: &SandboxId, layers: &[LayerId]) -> Result<Posture, HostError>;

    /// Ends every sandbox but these, and starts no more. These run on when the process ends, for the next
    /// one to [adopt](Self::adopt).
    async fn shutdown(&self, staying: &BTreeSet<SandboxId>);
}

/// What a host has to offer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostInfo {
    /// Names of the templates, sorted.
    pub templates: Vec<String>,
    /// RAM of the machine in MiB.
    pub memory_mb: u64,
    /// Whether the processor time of sandboxes can be limited.
    pub limits_cpu: bool,
    /// The networks of its sandboxes, of which the first is for those that ask for none in
    /// particular. Without any, they have no network card.
    pub networks: Vec<NetworkInfo>,
}

impl HostInfo {
    /// The network of this name, or the first.
    ///
    /// # Errors
    /// There is none.
    pub fn network(&self, name: Option<&str>) -> Result<&NetworkInfo, AddressError> {
        let first = self.networks.first().ok_or(AddressError::NoNetwork)?;
        let Some(name) = name else { return Ok(first) };
        let found = self.networks.iter().find(|network| network.name == name);
        found.ok_or_else(|| {
            let known = self.networks.iter().map(|network| network.name.as_str());
            AddressError::UnknownNetwork {
                name: name.to_owned(),
                known: known.collect::<Vec<_>>().join(", "),
            }
        })
    }
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
    /// Its network card; it has none, if there is none.
    pub nic: Option<Nic>,
    /// Size of a second disk, an empty ext4 file system, in MiB; `None` for no such disk.
    pub scratch_mb: Option<u32>,
    /// Size of its disk in MiB; `None` for that of the layers or the template.
    pub disk_mb: Option<u32>,
    /// How much of its machine it may use, and what that can become.
    pub resources: Resources,
}

/// Take this sandbox over, which an earlier daemon has started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AdoptRequest {
    /// Its name.
    pub id: SandboxId,
    /// What it is made of.
    pub shape: Shape,
    /// What it is based on, as far as is known.
    pub layers: Layers,
    /// Its network card, if it has one.
    pub nic: Option<Nic>,
    /// Size of its disk in MiB; `None` for that of its template.
    pub disk_mb: Option<u32>,
}

/// A sandbox was taken over, and runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Adopted {
    /// What it is based on: as in the request, or, if the earlier daemon ended after it had saved it
    /// and before that was told, after that.
    pub layers: Layers,
}

/// What a host has of a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Presence {
    /// It runs, and its agent has answered.
    Runs,
    /// It is starting, is ready but nobody's, or is ending.
    OnTheWay,
    /// Processes, files or rules are left of it, which nobody looks after.
    Left,
}

/// The network card of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nic {
    /// Its address; if there is none, nothing passes the card.
    pub address: Option<Ipv4Addr>,
    /// What it may reach and how much.
    pub connection: Connection,
}

/// Make a machine ready.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrepareRequest {
    /// Its name.
    pub id: SandboxId,
    /// What it is made of.
    pub shape: Shape,
    /// What it is started from: there are memory layers among them.
    pub layers: Layers,
    /// Its network card, if it has one; that of nobody until it is claimed.
    pub nic: Option<Nic>,
    /// Size of a second disk, an empty ext4 file system, in MiB; `None` for no such disk.
    pub scratch_mb: Option<u32>,
    /// Size of its disk in MiB; `None` for that of the layers or the template.
    pub disk_mb: Option<u32>,
    /// How much of its machine it may use, and what that can become.
    pub resources: Resources,
}

/// Start the sandbox that was prepared under this name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClaimRequest {
    /// Its name.
    pub id: SandboxId,
    /// Who its guest is.
    pub identity: Identity,
    /// What its network card is, if it has one.
    pub nic: Option<Nic>,
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

/// Power this sandbox off.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PowerOffRequest {
    /// Which.
    pub id: SandboxId,
    /// How long it has to shut down, in milliseconds; with 0, its power is cut at once.
    pub timeout_ms: u64,
    /// The layer that its disk is kept as, which is on the host's disk when this is done.
    pub layer: Option<LayerId>,
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
    /// What it is based on afterwards: kept layers, and on top of each kind that is saved a new one.
    pub layers: Layers,
    /// Whether its memory is saved. If not, all layers of it are kept, and the guest writes what it
    /// has in memory for its disk to the disk before that is saved.
    pub include_memory: bool,
}

/// Merge these layers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MergeRequest {
    /// Disk layers that lie one on top of the other, bottom first.
    pub layers: Vec<LayerId>,
    /// What they become.
    pub into: LayerId,
}

/// A sandbox was saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    /// Size on the disk, in bytes, of the new layers.
    pub new_bytes: u64,
    /// Whether the root file system was at rest, as after it was unmounted. It is not known to be if
    /// memory was saved too, nor needs to be.
    pub is_at_rest: bool,
    /// How long it took.
    pub timings: SaveTimings,
}

/// Run this command.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecRequest {
    /// Program and arguments; no shell is involved.
    pub argv: Vec<String>,
    /// Variables to set beside those that a login has.
    pub env: BTreeMap<String, String>,
    /// Working directory, absolute; the home of root if not given.
    pub cwd: Option<String>,
    /// Seconds after which the command is killed with all its children.
    pub timeout_sec: u32,
}

/// Something that a command did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExecEvent {
    /// It was started. Nothing comes before.
    Started {
        /// Its process id in the guest.
        pid: u32,
    },
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

/// What a file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileKind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A FIFO.
    Fifo,
    /// A UNIX socket.
    Socket,
    /// A character device.
    CharDevice,
    /// A block device.
    BlockDevice,
    /// Something else.
    Other,
}

/// A file in a guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileInfo {
    /// Absolute path. What is not UTF-8 is replaced by U+FFFD.
    pub path: String,
    /// What it is.
    pub kind: FileKind,
    /// Permission bits, 0 to 0o7777.
    pub mode: u32,
    /// Numeric user id of its owner.
    pub uid: u32,
    /// Numeric group id of its owner.
    pub gid: u32,
    /// Size in bytes.
    pub size: u64,
    /// Last modification, in microseconds since the Unix epoch.
    pub mtime_us: i64,
    /// Where a symbolic link points.
    pub target: Option<String>,
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
    /// A machine that was prepared ended before it was claimed, and nothing of it is left on the
    /// host.
    Lost {
        /// Which one.
        id: SandboxId,
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
    /// Layers were not merged.
    #[error("the layers were not merged: {reason}")]
    NotMerged {
        /// Why, as a sentence.
        reason: String,
    },
    /// It was paused in the midst of it.
    #[error(
        "the sandbox was paused in the meantime; what was under way in it through the API has ended"
    )]
    Paused,
    /// It was destroyed in the meantime.
    #[error("the sandbox was destroyed in the meantime")]
    Destroyed,
    /// Somebody has the port.
    #[error("{reason}")]
    PortInUse {
        /// Which, as a sentence.
        reason: String,
    },
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
    /// No such process in the guest.
    #[error("{reason}")]
    NoProcess {
        /// Which, as a sentence.
        reason: String,
    },
    /// It clashes with what is in the guest.
    #[error("{reason}")]
    Conflict {
        /// With what, as a sentence.
        reason: String,
    },
    /// Nothing in the guest listens on a port.
    #[error("{reason}")]
    PortClosed {
        /// On which, as a sentence.
        reason: String,
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
