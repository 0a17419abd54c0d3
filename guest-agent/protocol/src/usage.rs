//! What a guest takes of what it has.

use serde::{Deserialize, Serialize};

/// The answer to `GET /v1/usage`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Processors that its kernel uses.
    pub cpus: u32,
    /// Memory that its kernel hands out, in bytes: `MemTotal` of /proc/meminfo.
    pub memory_total: u64,
    /// Of that, what programs could still have, in bytes: `MemAvailable` of /proc/meminfo.
    pub memory_available: u64,
    /// Size of the root file system, in bytes.
    pub disk_total: u64,
    /// Of that, what is taken, in bytes.
    pub disk_used: u64,
    /// Of that, what users other than root could still take, in bytes; as in `df`.
    pub disk_available: u64,
}
