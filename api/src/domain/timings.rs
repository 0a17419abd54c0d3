//! How long things took.

use serde::{Deserialize, Serialize};

/// How a sandbox was started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Start {
    /// Its kernel was booted.
    #[default]
    Cold,
    /// Its kernel was booted, for the warm snapshot of its template could not be restored.
    ColdFallback,
    /// From the warm snapshot of its template.
    Warm,
    /// From the pool: it had been restored from the warm snapshot of its template before it was
    /// asked for.
    Pool,
    /// From a snapshot or another sandbox.
    Fork,
    /// From what was saved when it was paused.
    Resume,
}

/// How long each phase of a start took, in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Timings {
    /// What kind of start it was.
    pub start: Start,
    /// Directories, disk overlay and sockets were made.
    pub prepare_us: u64,
    /// Start of the `vmm` process to just before the guest's first instruction, or to the moment
    /// that a restored guest ran again. Of one from the pool, whose process was there: the time until
    /// it let the guest run.
    pub vmm_us: u64,
    /// From there to the agent's first words after a boot; next to nothing after a restore, since
    /// the agent says nothing by itself.
    pub boot_us: u64,
    /// From there until the agent has answered, and the guest knows who it is and what time it is.
    pub identity_us: u64,
    /// From there until the readiness command of the template has succeeded; 0 without one.
    pub readiness_us: u64,
    /// All of it.
    pub total_us: u64,
}

/// How long a guest was held up to be saved, in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct SaveTimings {
    /// From the request to stop the guest to the moment that it ran again, or that all was saved.
    pub stall_us: u64,
    /// Of that, until memory and state were on the disk.
    pub memory_us: u64,
}
