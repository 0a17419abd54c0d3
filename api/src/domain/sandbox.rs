//! A sandbox and the states that it goes through.
//!
//! ```text
//!              create
//!                │
//!                ▼
//!           ┌─────────┐   the agent answered   ┌─────────┐
//!           │ pending │───────────────────────►│ running │
//!           └─┬─────┬─┘                        └─┬─────┬─┘
//!     did not │     │ deleted,       its vmm died│     │ deleted, powered off,
//!      start  │     │ daemon ended   or panicked │     │ rebooted, daemon ended
//!             ▼     └──────────┐  ┌──────────────┘     │
//!         ┌───────┐            │  │    ┌───────────────┘
//!         │ error │◄───────────┼──┘    │
//!         └───┬───┘            ▼       ▼
//!             │ deleted      ┌───────────┐
//!             └─────────────►│  stopped  │
//!                            └───────────┘
//! ```
//!
//! `stopped` is final. The [`Manager`](super::Manager) alone makes transitions, each by
//! [`Sandbox::apply`], which refuses one that is not drawn here.

use std::fmt;
use std::str::FromStr;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// Name of a sandbox: `sb-` and eight hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SandboxId(String);

impl SandboxId {
    /// Length of every id in bytes.
    pub const LEN: usize = 11;

    /// A random id. Two may collide: whoever stores it tries again.
    pub fn random() -> Self {
        Self(format!("sb-{:08x}", rand::random::<u32>()))
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for SandboxId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A string is not the id of a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a sandbox id is `sb-` and eight hexadecimal digits")]
pub struct ParseIdError;

impl FromStr for SandboxId {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let digits = text.strip_prefix("sb-").ok_or(ParseIdError)?;
        let is_digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        if digits.len() == 8 && digits.bytes().all(is_digit) {
            Ok(Self(text.to_owned()))
        } else {
            Err(ParseIdError)
        }
    }
}

impl TryFrom<String> for SandboxId {
    type Error = ParseIdError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<SandboxId> for String {
    fn from(id: SandboxId) -> Self {
        id.0
    }
}

/// Where a sandbox stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// It is being started; its agent has not answered yet.
    Pending,
    /// Its agent has answered.
    Running,
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
            Self::Stopped => "stopped",
            Self::Error => "error",
        }
    }

    /// The state of that name.
    pub fn from_word(word: &str) -> Option<Self> {
        [Self::Pending, Self::Running, Self::Stopped, Self::Error]
            .into_iter()
            .find(|status| status.as_str() == word)
    }

    /// Whether the host may hold anything for a sandbox in this state.
    pub fn is_live(self) -> bool {
        matches!(self, Self::Pending | Self::Running)
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What the user wants a sandbox to be. Written before the act, so that a daemon that crashes
/// in between knows at its next start what to finish.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Desired {
    /// It shall run.
    Running,
    /// It shall be gone.
    Stopped,
}

impl Desired {
    /// The word for it in the store.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Stopped => "stopped",
        }
    }

    /// The wish of that name.
    pub fn from_word(word: &str) -> Option<Self> {
        [Self::Running, Self::Stopped]
            .into_iter()
            .find(|desired| desired.as_str() == word)
    }
}

/// How long each phase of a start took, in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Timings {
    /// Directories, disk overlay and sockets were made.
    pub prepare_us: u64,
    /// Start of the `vmm` process to just before the guest's first instruction.
    pub vmm_us: u64,
    /// The guest's first instruction to the agent's first words.
    pub boot_us: u64,
    /// All of it.
    pub total_us: u64,
}

/// What a sandbox is made of, after defaults and limits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spec {
    /// Template whose root disk it starts from.
    pub template: String,
    /// Virtual CPUs.
    pub vcpus: u8,
    /// RAM in MiB.
    pub memory_mb: u32,
    /// Idle time after which it may be set aside, in seconds; 0 is never. Recorded, not yet
    /// acted on.
    pub timeout_sec: u32,
}

/// A sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sandbox {
    /// Its name.
    pub id: SandboxId,
    /// What it is made of.
    pub spec: Spec,
    /// What the user wants it to be.
    pub desired: Desired,
    /// What it is.
    pub status: Status,
    /// Why it is `stopped` or `error`, as a sentence.
    pub status_reason: Option<String>,
    /// When it was asked for.
    pub created_at: Timestamp,
    /// When its agent first answered.
    pub started_at: Option<Timestamp>,
    /// When it was last used.
    pub last_active_at: Option<Timestamp>,
    /// When this record last changed.
    pub updated_at: Timestamp,
    /// How long its start took.
    pub timings: Option<Timings>,
}

/// Something that happened to a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Transition {
    /// The agent answered.
    Started(Timings),
    /// It was used.
    Used,
    /// It did not start, or ended as it was not meant to.
    Failed {
        /// Why, as a sentence.
        reason: String,
    },
    /// The user wants it gone.
    Unwanted,
    /// It ended as it was meant to.
    Stopped {
        /// Why, as a sentence; `None` keeps the reason that is there.
        reason: Option<String>,
    },
}

/// A transition that the state machine does not have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a sandbox that is {from} cannot take the transition {transition:?}")]
pub struct IllegalTransition {
    /// The state that the sandbox is in.
    pub from: Status,
    /// What was asked of it.
    pub transition: Transition,
}

impl Sandbox {
    /// A sandbox that was asked for at `now`.
    pub fn new(id: SandboxId, spec: Spec, now: Timestamp) -> Self {
        Self {
            id,
            spec,
            desired: Desired::Running,
            status: Status::Pending,
            status_reason: None,
            created_at: now,
            started_at: None,
            last_active_at: None,
            updated_at: now,
            timings: None,
        }
    }

    /// Makes a transition.
    ///
    /// # Errors
    /// The state machine does not have it; the sandbox is unchanged.
    pub fn apply(
        &mut self,
        transition: Transition,
        now: Timestamp,
    ) -> Result<(), IllegalTransition> {
        match (self.status, transition) {
            (Status::Pending, Transition::Started(timings)) => {
                self.status = Status::Running;
                self.timings = Some(timings);
                self.started_at = Some(now);
                self.last_active_at = Some(now);
            }
            (Status::Running, Transition::Used) => self.last_active_at = Some(now),
            (Status::Pending | Status::Running, Transition::Failed { reason }) => {
                self.status = Status::Error;
                self.status_reason = Some(reason);
            }
            (_, Transition::Unwanted) => self.desired = Desired::Stopped,
            (Status::Pending | Status::Running | Status::Error, Transition::Stopped { reason }) => {
                self.status = Status::Stopped;
                self.desired = Desired::Stopped;
                self.status_reason = reason.or_else(|| self.status_reason.take());
            }
            (from, transition) => return Err(IllegalTransition { from, transition }),
        }
        self.updated_at = now;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn sandbox_in(status: Status) -> Sandbox {
        let spec = Spec {
            template: "minimal".into(),
            vcpus: 1,
            memory_mb: 512,
            timeout_sec: 300,
        };
        let mut sandbox = Sandbox::new(SandboxId::random(), spec, at(1));
        sandbox.status = status;
        sandbox
    }

    fn failed() -> Transition {
        Transition::Failed { reason: "x".into() }
    }

    fn stopped() -> Transition {
        Transition::Stopped { reason: None }
    }

    #[test]
    fn the_state_machine_has_just_these_transitions() {
        use Status::{Error, Pending, Running, Stopped};
        let table = [
            (
                Pending,
                Transition::Started(Timings::default()),
                Some(Running),
            ),
            (Running, Transition::Started(Timings::default()), None),
            (Stopped, Transition::Started(Timings::default()), None),
            (Error, Transition::Started(Timings::default()), None),
            (Pending, Transition::Used, None),
            (Running, Transition::Used, Some(Running)),
            (Stopped, Transition::Used, None),
            (Error, Transition::Used, None),
            (Pending, failed(), Some(Error)),
            (Running, failed(), Some(Error)),
            (Stopped, failed(), None),
            (Error, failed(), None),
            (Pending, stopped(), Some(Stopped)),
            (Running, stopped(), Some(Stopped)),
            (Error, stopped(), Some(Stopped)),
            (Stopped, stopped(), None),
        ];
        for (from, transition, expected) in table {
            let mut sandbox = sandbox_in(from);
            let before = sandbox.clone();
            let result = sandbox.apply(transition.clone(), at(9));
            match expected {
                Some(status) => {
                    assert_eq!(result, Ok(()), "{from} {transition:?}");
                    assert_eq!(sandbox.status, status, "{from} {transition:?}");
                    assert_eq!(sandbox.updated_at, at(9));
                }
                None => {
                    assert_eq!(result, Err(IllegalTransition { from, transition }));
                    assert_eq!(sandbox, before);
                }
            }
        }
    }

    #[test]
    fn a_start_stamps_the_times() {
        let mut sandbox = sandbox_in(Status::Pending);
        sandbox
            .apply(Transition::Started(Timings::default()), at(5))
            .unwrap();
        assert_eq!(sandbox.started_at, Some(at(5)));
        assert_eq!(sandbox.last_active_at, Some(at(5)));
        sandbox.apply(Transition::Used, at(7)).unwrap();
        assert_eq!(sandbox.started_at, Some(at(5)));
        assert_eq!(sandbox.last_active_at, Some(at(7)));
    }

    #[test]
    fn deleting_a_failed_sandbox_keeps_the_reason() {
        let mut sandbox = sandbox_in(Status::Running);
        sandbox.apply(failed(), at(2)).unwrap();
        sandbox.apply(Transition::Unwanted, at(3)).unwrap();
        sandbox.apply(stopped(), at(3)).unwrap();
        assert_eq!(sandbox.status_reason.as_deref(), Some("x"));
        assert_eq!(sandbox.desired, Desired::Stopped);
    }

    #[test]
    fn ids_parse_only_as_they_are_made() {
        for _ in 0..100 {
            let id = SandboxId::random();
            assert_eq!(id.as_str().len(), SandboxId::LEN);
            assert_eq!(id.as_str().parse(), Ok(id.clone()));
        }
        for bad in [
            "",
            "sb-",
            "sb-1234567",
            "sb-123456789",
            "sb-1234567G",
            "SB-12345678",
            "../sb-12345678",
            "sb-1234567A",
        ] {
            assert_eq!(bad.parse::<SandboxId>(), Err(ParseIdError), "{bad}");
        }
    }
}
