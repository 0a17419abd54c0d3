//! Where a sandbox stands, and where it is to be.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Where a sandbox stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// It is being started; its agent has not answered yet.
    Pending,
    /// Its agent has answered.
    Running,
    /// It is being saved, to be paused.
    Pausing,
    /// It is saved, and has no processes.
    Paused,
    /// It is being started from what was saved; its agent has not answered yet.
    Resuming,
    /// It is being powered off; its disk is kept.
    Stopping,
    /// It is powered off, or was never on, and its disk is kept.
    Off,
    /// It ended as it was meant to, and will not run again.
    Stopped,
    /// It did not start, or ended as it was not meant to.
    Error,
}

impl Status {
    /// The word for it in the store and in the APIs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Running => "running",
            Self::Pausing => "pausing",
            Self::Paused => "paused",
            Self::Resuming => "resuming",
            Self::Stopping => "stopping",
            Self::Off => "off",
            Self::Stopped => "stopped",
            Self::Error => "error",
        }
    }

    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::Pending,
        Self::Running,
        Self::Pausing,
        Self::Paused,
        Self::Resuming,
        Self::Stopping,
        Self::Off,
        Self::Stopped,
        Self::Error,
    ];

    /// The state of that name.
    pub fn from_word(word: &str) -> Option<Self> {
        let mut all = Self::ALL.into_iter();
        all.find(|status| status.as_str() == word)
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Where a sandbox stands, and whether it ever ran.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Standing {
    /// Where it stands.
    pub status: Status,
    /// Whether its agent has ever answered.
    pub was_on: bool,
}

impl fmt::Display for Standing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.status.fmt(f)
    }
}

/// What the user wants a sandbox to be. Written before the act, so that a daemon that crashes
/// in between knows at its next start what to finish.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Desired {
    /// It shall run.
    Running,
    /// It shall be saved, and have no processes.
    Paused,
    /// It shall be powered off, and its disk be kept.
    Off,
    /// It shall be gone.
    Stopped,
}

impl Desired {
    /// The word for it in the store.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Off => "off",
            Self::Stopped => "stopped",
        }
    }

    /// The wish of that name.
    pub fn from_word(word: &str) -> Option<Self> {
        [Self::Running, Self::Paused, Self::Off, Self::Stopped]
            .into_iter()
            .find(|desired| desired.as_str() == word)
    }
}
