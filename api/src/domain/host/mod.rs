//! Where the control side meets the host side.
//!
//! Everything that happens on the machine that runs the guests goes through [`Host`]. Requests,
//! responses and events are plain serializable values, bulk data are streams, and things are
//! named by id, never by a path on the other side. Today the call is a function call.

mod guest;
mod save;
mod start;
mod walk;

use std::collections::BTreeSet;
use std::io;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::stream::BoxStream;
use serde::{Deserialize, Serialize};

use super::id::{LayerId, SandboxId};
use super::layer::Layers;
use super::network::{Egress, Forward, ForwardSpec, NetworkActivity};
use super::posture::Posture;
use super::process::GuestHost;
use super::resources::ResizeRequest;
use super::snapshot::{LayersInfo, Model};
use super::usage::MeterHost;
pub use guest::{
    ExecEvent, ExecRequest, ExitInfo, FileContent, FileInfo, FileKind, ReadFileRequest,
    WriteFileRequest,
};
pub use save::{KeepDiskRequest, KeptDisk, MergeRequest, PowerOffRequest, SaveRequest, Saved};
pub use start::{
    AdoptRequest, Adopted, ClaimRequest, CreateRequest, Created, HostInfo, Identity, ImageDigest,
    ImageInfo, Nic, PrepareRequest, Presence, Shape,
};
pub use walk::{WalkCut, WalkSpec, WalkStep, WalkSteps};

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

    /// A digest of all that a snapshot of a freshly booted machine of this model depends on:
    /// kernel, initramfs, template, VMM, processor. It changes when one of them does. `disk` are the
    /// layers of the template's disk; without any, it is the host's image of that name.
    ///
    /// # Errors
    /// It cannot tell.
    async fn warm_key(&self, model: &Model, disk: &[LayerId]) -> Result<String, HostError>;

    /// What there is to say of an image on the host, by the name of its template.
    ///
    /// # Errors
    /// There is none of that name, or it cannot be read.
    async fn image(&self, name: &str, digest: ImageDigest) -> Result<ImageInfo, HostError>;

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

    /// Walks a directory and those below it; `None` if the sandbox's agent is too old to do that.
    ///
    /// # Errors
    /// There is no such directory; later errors are in the stream.
    async fn walk(&self, id: &SandboxId, spec: &WalkSpec) -> Result<Option<WalkSteps>, HostError>;

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
    /// It was powered off in the midst of it.
    #[error("the sandbox was stopped in the meantime")]
    PoweredOff,
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

impl HostError {
    /// Whether the sandbox was taken from whatever was under way in it, as somebody had asked.
    pub fn is_interruption(&self) -> bool {
        matches!(self, Self::Paused | Self::PoweredOff | Self::Destroyed)
    }
}
