//! A sandbox and the states that it goes through.
//!
//! ```text
//!              create, fork                 not saved
//!                │                     ┌──────────────────┐
//!                ▼                     ▼                  │
//!           ┌─────────┐ answered  ┌─────────┐  pause  ┌───┴─────┐
//!           │ pending │──────────►│ running │────────►│ pausing │
//!           └────┬────┘           └─┬───────┘         └─┬─────┬─┘
//!                │         its vmm  │  ▲                │     │ saved
//!        did not │         died or  │  │ the agent      │     ▼
//!         start  │         panicked │  │ answered       │  ┌────────┐
//!                ▼                  │ ┌┴─────────┐      │  │ paused │
//!             ┌───────┐ ◄───────────┘ │ resuming │◄─────┼──┤        │
//!             │ error │ ◄─────────────┼──────────┼──────┘  └────────┘
//!             └───┬───┘               └────┬─────┘ resume   ▲   │ what was saved
//!                 │                        └────────────────┘   │ is gone: error
//!                 │ deleted                 not resumed
//!                 ▼
//!           ┌─────────┐  from each state: deleted. From pending, running and pausing also:
//!           │ stopped │  powered off or rebooted by the guest, daemon ended
//!           └─────────┘
//!
//! A sandbox whose disk is kept comes to rest where another ends:
//!
//!           create                    not started
//!             │                  ┌──────────────────┐
//!             ▼                  ▼                  │
//!          ┌─────┐  start    ┌───┴─┐ answered  ┌────┴────┐
//!          │     │──────────►│ pending │────────►│ running │──┐ powered off, rebooted or lost by
//!          │ off │           └─────────┘         └────┬────┘  │ the guest, its vmm or the daemon
//!          │     │◄────────────┐            stop      ▼       │
//!          │     │   ended     │                ┌──────────┐  │
//!          │     │◄────────────┴────────────────┤ stopping │  │
//!          └─────┘◄─────────────────────────────┴──────────┴──┘
//!             ▲ rolled back to a snapshot: from off and paused
//! ```
//!
//! `stopped` is final. A sandbox that is `running` or on the way there has processes on the host;
//! one that is `paused` or `off` has files only. One is kept that was made to be, or was stopped by
//! its user once. The [`Manager`](super::Manager) alone makes transitions,
//! each by [`Sandbox::apply`], which refuses one that is not drawn here.

mod status;
mod transition;

use std::net::Ipv4Addr;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::id::{KeyId, SandboxId, UserId};
use super::layer::Layers;
use super::network::{Connection, KeptForward};
use super::resources::Resources;
use super::timings::Timings;
pub use status::{Desired, Standing, Status};
pub use transition::{IllegalTransition, Transition};

/// What a sandbox is made of, after defaults and limits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spec {
    /// Template whose root disk it starts from.
    pub template: String,
    /// Virtual CPUs.
    pub vcpus: u8,
    /// RAM in MiB.
    pub memory_mb: u32,
    /// Idle time after which it is set aside, in seconds; 0 is never.
    pub timeout_sec: u32,
    /// How it is connected; `None` if it has no network card.
    pub network: Option<Connection>,
    /// Size of its disk in MiB; `None` for that of its template.
    pub disk_mb: Option<u32>,
    /// How much of its machine it may use, and what that can become.
    pub resources: Resources,
}

/// A sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sandbox {
    /// What it is called by the daemon.
    pub id: SandboxId,
    /// The user's name for it, which no other has that is not deleted.
    pub name: Option<String>,
    /// Whose it is; `None` is the local principal.
    pub owner: Option<UserId>,
    /// The API key that it was made with.
    pub key: Option<KeyId>,
    /// The snapshot that it was made from, as its creator called it; `None` if it was made from its
    /// template.
    pub snapshot: Option<String>,
    /// What it is made of.
    pub spec: Spec,
    /// What the user wants it to be.
    pub desired: Desired,
    /// What it is.
    pub status: Status,
    /// Why it is `stopped` or `error`, or why it is `paused` still although it was to be resumed, as
    /// a sentence.
    pub status_reason: Option<String>,
    /// When it was asked for.
    pub created_at: Timestamp,
    /// When its agent first answered; of one that was off since, when it did after that.
    pub started_at: Option<Timestamp>,
    /// When it was last powered off.
    pub stopped_at: Option<Timestamp>,
    /// When it was last used.
    pub last_active_at: Option<Timestamp>,
    /// When this record last changed.
    pub updated_at: Timestamp,
    /// How long its last start took.
    pub timings: Option<Timings>,
    /// What it is based on while it lives: what it was restored from, or saved to since.
    pub layers: Layers,
    /// What it will be based on once it is paused, while it is `pausing`.
    pub saving: Option<Layers>,
    /// Whether it comes to rest as `off`, with its disk, where another ends.
    pub is_kept: bool,
    /// What it will be based on once it is off, if that is not what it is based on now: the topmost of the
    /// disk is what it writes to, or, until its first start is done, that is what it was based on before.
    pub kept: Option<Layers>,
    /// Its address in the network, if it has a network card. It is nobody else's before it ends.
    pub address: Option<Ipv4Addr>,
    /// Ports of the host that lead into it.
    pub forwards: Vec<KeptForward>,
}

impl Sandbox {
    /// A sandbox that was asked for at `now`, to be started from `layers`, or booted if there are
    /// none.
    pub fn new(id: SandboxId, mut spec: Spec, layers: Layers, now: Timestamp) -> Self {
        if layers.memory.is_empty() {
            // The machine that it was copied from is not the one that will be booted.
            spec.resources.booted = None;
        }
        Self {
            id,
            name: None,
            owner: None,
            key: None,
            snapshot: None,
            spec,
            desired: Desired::Running,
            status: Status::Pending,
            status_reason: None,
            created_at: now,
            started_at: None,
            stopped_at: None,
            last_active_at: None,
            updated_at: now,
            timings: None,
            layers,
            saving: None,
            is_kept: false,
            kept: None,
            address: None,
            forwards: Vec::new(),
        }
    }

    /// One that is off, and whose disk is kept.
    pub fn new_off(id: SandboxId, spec: Spec, layers: Layers, now: Timestamp) -> Self {
        Self {
            desired: Desired::Off,
            status: Status::Off,
            is_kept: true,
            ..Self::new(id, spec, layers, now)
        }
    }

    /// Whether what it writes to now, while it runs, is on a disk that is kept. It is not if it was saved and
    /// writes to another since.
    pub fn keeps_its_disk(&self) -> bool {
        let kept = self.kept.as_ref().and_then(|kept| kept.disk.split_last());
        kept.is_some_and(|(_, below)| below == self.layers.disk)
    }

    /// What it is called for people: its name, or its id.
    pub fn shown(&self) -> String {
        let name = self.name.clone();
        name.unwrap_or_else(|| self.id.to_string())
    }

    /// Where it stands.
    pub fn standing(&self) -> Standing {
        Standing {
            status: self.status,
            was_on: self.started_at.or(self.stopped_at).is_some(),
        }
    }

    /// What its creator named as its template: that, or a snapshot.
    pub fn made_from(&self) -> &str {
        self.snapshot.as_deref().unwrap_or(&self.spec.template)
    }
}
