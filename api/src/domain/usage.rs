//! What sandboxes and their host take, and how the host is.

use async_trait::async_trait;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::error::LookupError;
use super::host::HostError;
use super::id::SandboxId;
use super::sandbox::{Sandbox, Standing};
use super::store::Totals;

/// What a running sandbox takes of its host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmmUsage {
    /// Processor time of its VMM since that was started, in microseconds: of its guest, and of the
    /// devices.
    pub cpu_us: u64,
    /// How long ago its VMM was started, in microseconds.
    pub age_us: u64,
    /// Memory of the host that its VMM occupies, in bytes. What it shares with others is in here.
    pub memory_bytes: u64,
    /// Space that its disk takes on the host's, in bytes, without the layers that it is based on.
    pub disk_bytes: u64,
}

/// What a guest takes of what it has, by its own account.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestUsage {
    /// Processors that its kernel uses.
    pub cpus: u32,
    /// Memory that its kernel hands out, in bytes.
    pub memory_total: u64,
    /// Of that, what programs could still have.
    pub memory_available: u64,
    /// Size of its root file system, in bytes.
    pub disk_total: u64,
    /// Of that, what is taken.
    pub disk_used: u64,
    /// Of that, what users other than root could still take.
    pub disk_available: u64,
}

/// What has passed a network card since its machine was made or restored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CardUsage {
    /// Bytes that the guest has received.
    pub received_bytes: u64,
    /// Frames that the guest has received.
    pub received_frames: u64,
    /// Bytes that the guest has sent.
    pub sent_bytes: u64,
    /// Frames that the guest has sent.
    pub sent_frames: u64,
}

/// All that there is to measure of a running sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SandboxUsage {
    /// What it takes of its host.
    pub vmm: VmmUsage,
    /// What it takes of what it has.
    pub guest: GuestUsage,
    /// What has passed its network card, if it has one.
    pub card: Option<CardUsage>,
    /// Size of its disk, as its guest sees it, in bytes.
    pub disk_size: u64,
}

/// What is taken of a host, by all that runs on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostUsage {
    /// How many processors it has.
    pub cpus: u32,
    /// Time that all processors together were not idle since it was booted, in microseconds.
    pub cpu_busy_us: u64,
    /// Time of all processors together since it was booted, in microseconds.
    pub cpu_total_us: u64,
    /// Its memory, in bytes.
    pub memory_total: u64,
    /// Of that, what programs could still have.
    pub memory_available: u64,
    /// Size of the file system that sandboxes' disks lie in, in bytes.
    pub disk_total: u64,
    /// Of that, what is taken.
    pub disk_used: u64,
    /// Of that, what the daemon could still take.
    pub disk_available: u64,
}

/// Which VMM a host has, in its own words.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmmVersion {
    /// The version of the program.
    pub build: String,
    /// The version of Cloud Hypervisor whose API it has.
    pub api: String,
}

/// How a part of a host is; why it is not well, as a sentence.
pub type PartHealth = Result<(), String>;

/// How a host is, as far as its parts were asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostHealth {
    /// Whether virtual machines can be started: KVM can be opened, and the VMM answers.
    pub vmm: Result<VmmVersion, String>,
    /// Whether the networks of sandboxes are there; `None` if there are to be none.
    pub network: Option<PartHealth>,
    /// Whether there is room for disks.
    pub disk: PartHealth,
    /// Whether kernel, agent and templates can be read.
    pub images: PartHealth,
}

/// Tells what a host and its sandboxes take, and how it is.
#[async_trait]
pub trait MeterHost: Send + Sync {
    /// What is taken of the host.
    ///
    /// # Errors
    /// It cannot tell.
    async fn host_usage(&self) -> Result<HostUsage, HostError>;

    /// What each of its running sandboxes takes of it. Guests are not asked, so that those that sleep go
    /// on sleeping. One that ends meanwhile is left out.
    ///
    /// # Errors
    /// It cannot tell.
    async fn vmm_usages(&self) -> Result<Vec<(SandboxId, VmmUsage)>, HostError>;

    /// All that there is to measure of a running sandbox.
    ///
    /// # Errors
    /// It does not run, or its VMM or agent does not answer soon.
    async fn sandbox_usage(&self, id: &SandboxId) -> Result<SandboxUsage, HostError>;

    /// How it is.
    async fn health(&self) -> HostHealth;
}

/// What was measured of a sandbox at one time.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// When.
    pub at: Timestamp,
    /// Share of the time of all its vCPUs that its VMM has had since the point before, 0 to 100.
    pub cpu_percent: f64,
    /// See [`VmmUsage::memory_bytes`].
    pub memory_bytes: u64,
    /// See [`VmmUsage::disk_bytes`].
    pub disk_bytes: u64,
}

/// What was measured of a sandbox just now.
#[derive(Debug, Clone, PartialEq)]
pub struct Measured {
    /// Which.
    pub sandbox: Sandbox,
    /// When.
    pub at: Timestamp,
    /// Share of the time of all its vCPUs that its VMM has had in the last seconds, 0 to 100.
    pub cpu_percent: f64,
    /// What it takes.
    pub usage: SandboxUsage,
}

/// What was measured of a host just now, and of the sandboxes on it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HostMeasured {
    /// When.
    pub at: Timestamp,
    /// Share of the time of all its processors that was not idle in the last seconds, 0 to 100.
    pub cpu_percent: f64,
    /// What is taken of it.
    pub usage: HostUsage,
    /// What there is on it.
    pub totals: Totals,
}

/// Why nothing was measured.
#[derive(Debug, thiserror::Error)]
pub enum MeasureError {
    /// There is none of that id, or the store failed.
    #[error(transparent)]
    Lookup(#[from] LookupError),
    /// It does not run.
    #[error("sandbox is not running (status: {0})")]
    NotRunning(Standing),
    /// The host cannot tell.
    #[error(transparent)]
    Host(HostError),
}
