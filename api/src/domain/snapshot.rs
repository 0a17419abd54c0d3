//! Snapshots: a machine as it was at one moment, kept under a name.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::host::Shape;
use super::id::{SandboxId, SnapshotId, UserId};
use super::layer::Layers;
use super::resources::{Booted, Resources};
use super::sandbox::{Spec, Status};

/// A snapshot that the user asked for. It does not change; sandboxes are made from it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Its id.
    pub id: SnapshotId,
    /// Whose it is; `None` is the local principal.
    pub owner: Option<UserId>,
    /// The user's name for it, which is no other's. One that is only among those of its sandbox has the
    /// sandbox's id and a `/` before it.
    pub name: Option<String>,
    /// What the user says of it.
    pub description: Option<String>,
    /// The sandbox that it was taken of.
    pub sandbox: SandboxId,
    /// What that is made of.
    pub spec: Spec,
    /// What that was when it was taken.
    pub status: Status,
    /// What it consists of.
    pub layers: Layers,
    /// What the host says of its layers; `None` while it is being taken.
    pub content: Option<LayersInfo>,
    /// When it was taken.
    pub created_at: Timestamp,
}

impl Snapshot {
    /// The name of a snapshot among those of this sandbox.
    pub fn name_of(sandbox: &SandboxId, name: &str) -> String {
        format!("{sandbox}/{name}")
    }

    /// Its name among the snapshots of its sandbox.
    pub fn own_name(&self) -> Option<&str> {
        let name = self.name.as_deref()?;
        Some(name.rsplit_once('/').map_or(name, |(_, name)| name))
    }
}

/// What there is to say of layers that are there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayersInfo {
    /// Size on the disk, in bytes. Some of it may be shared with others.
    pub size_bytes: u64,
    /// SHA-256, as hexadecimal digits, of the manifest of the top memory layer, which holds those of
    /// all memory and state; without memory, of the image of the top disk layer.
    pub checksum: String,
}

/// The machines that are alike enough to start from one warm snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Model {
    /// What they are made of.
    pub shape: Shape,
    /// What they can become while they run; `None` if they cannot change.
    pub booted: Option<Booted>,
}

impl Model {
    /// What such a machine has, beside what its shape says.
    pub fn resources(&self) -> Resources {
        Resources {
            booted: self.booted,
            ..Resources::default()
        }
    }
}

/// The snapshot that sandboxes of one model are started from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WarmSnapshot {
    /// Digest of all that it was made from; see [`Host::warm_key`](super::Host::warm_key).
    pub key: String,
    /// The machine that it is of.
    pub model: Model,
    /// What it consists of.
    pub layers: Layers,
    /// Size on the disk, in bytes.
    pub size_bytes: u64,
    /// When a sandbox was last started from it, or it was made.
    pub used_at: Timestamp,
}
