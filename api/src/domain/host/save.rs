//! What a host is told of a sandbox whose state is kept, and what it tells.

use serde::{Deserialize, Serialize};

use super::super::id::{LayerId, SandboxId};
use super::super::layer::Layers;
use super::super::timings::SaveTimings;
use super::CreateRequest;

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
