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
//! ```
//!
//! `stopped` is final. A sandbox that is `running` or on the way there has processes on the host;
//! one that is `paused` has files only. The [`Manager`](super::Manager) alone makes transitions,
//! each by [`Sandbox::apply`], which refuses one that is not drawn here.

use std::fmt;
use std::net::Ipv4Addr;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::id::{LayerId, SandboxId};
use super::layer::Layers;
use super::network::{Connection, Egress, Forward};
use super::timings::Timings;

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
            Self::Stopped => "stopped",
            Self::Error => "error",
        }
    }

    /// The state of that name.
    pub fn from_word(word: &str) -> Option<Self> {
        [
            Self::Pending,
            Self::Running,
            Self::Pausing,
            Self::Paused,
            Self::Resuming,
            Self::Stopped,
            Self::Error,
        ]
        .into_iter()
        .find(|status| status.as_str() == word)
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
    /// It shall be saved, and have no processes.
    Paused,
    /// It shall be gone.
    Stopped,
}

impl Desired {
    /// The word for it in the store.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        }
    }

    /// The wish of that name.
    pub fn from_word(word: &str) -> Option<Self> {
        [Self::Running, Self::Paused, Self::Stopped]
            .into_iter()
            .find(|desired| desired.as_str() == word)
    }
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
    /// Idle time after which it is set aside, in seconds; 0 is never.
    pub timeout_sec: u32,
    /// How it is connected; `None` if it has no network card.
    pub network: Option<Connection>,
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
    /// Why it is `stopped` or `error`, or why it is `paused` still although it was to be resumed, as
    /// a sentence.
    pub status_reason: Option<String>,
    /// When it was asked for.
    pub created_at: Timestamp,
    /// When its agent first answered.
    pub started_at: Option<Timestamp>,
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
    /// Its address in the network, if it has a network card. It is nobody else's before it ends.
    pub address: Option<Ipv4Addr>,
    /// Ports of the host that lead into it.
    pub forwards: Vec<Forward>,
}

/// Something that happened to a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Transition {
    /// The agent answered, for the first time or after a resume.
    Started(Timings),
    /// It was used.
    Used,
    /// It is based on other layers than before.
    Based(Layers),
    /// Of the layers that it is based on, some of the disk have become one.
    Merged {
        /// Those, bottom first. If it is not based on them any more, nothing changes.
        layers: Vec<LayerId>,
        /// What they have become.
        into: LayerId,
    },
    /// It is to be paused, and will then be based on these layers.
    Pausing(Layers),
    /// It was saved.
    Paused,
    /// It was not saved, runs on, and is based on these layers.
    NotPaused(Layers),
    /// It may reach something else than before.
    Egress(Egress),
    /// Other ports of the host lead into it than before.
    Forwards(Vec<Forward>),
    /// It is to be resumed.
    Resuming,
    /// It was not resumed.
    NotResumed {
        /// Why, as a sentence.
        reason: String,
    },
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
    /// A sandbox that was asked for at `now`, to be started from `layers`, or booted if there are
    /// none.
    pub fn new(id: SandboxId, spec: Spec, layers: Layers, now: Timestamp) -> Self {
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
            layers,
            saving: None,
            address: None,
            forwards: Vec::new(),
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
        use Status::{Error, Paused, Pausing, Pending, Resuming, Running};
        match (self.status, transition) {
            (Pending | Resuming, Transition::Started(timings)) => {
                self.status = Running;
                self.timings = Some(timings);
                self.started_at.get_or_insert(now);
                self.last_active_at = Some(now);
            }
            (Running, Transition::Used) => self.last_active_at = Some(now),
            (Pending | Running, Transition::Based(layers)) => self.layers = layers,
            (Pending | Running | Pausing | Paused | Resuming, Transition::Egress(egress))
                if self.spec.network.is_some() =>
            {
                if let Some(connection) = &mut self.spec.network {
                    connection.egress = egress;
                }
            }
            (Pending | Running | Pausing | Paused | Resuming, Transition::Forwards(forwards)) => {
                self.forwards = forwards
            }
            (Running | Paused, Transition::Merged { layers, into }) => {
                if let Some(merged) = self.layers.merged(&layers, &into) {
                    self.layers = merged;
                }
            }
            (Running, Transition::Pausing(next)) => {
                self.status = Pausing;
                self.want(Desired::Paused);
                self.saving = Some(next);
            }
            (Pausing, Transition::Paused) => {
                self.status = Paused;
                self.layers = self.saving.take().unwrap_or_default();
            }
            (Pausing, Transition::NotPaused(layers)) => {
                self.status = Running;
                self.want(Desired::Running);
                self.saving = None;
                self.layers = layers;
            }
            (Paused, Transition::Resuming) => {
                self.status = Resuming;
                self.want(Desired::Running);
                self.status_reason = None;
            }
            (Resuming, Transition::NotResumed { reason }) => {
                self.status = Paused;
                self.want(Desired::Paused);
                self.status_reason = Some(reason);
            }
            (Pending | Running | Pausing | Paused, Transition::Failed { reason }) => {
                self.end(Error, Some(reason));
            }
            (_, Transition::Unwanted) => self.desired = Desired::Stopped,
            (
                Pending | Running | Pausing | Paused | Resuming | Error,
                Transition::Stopped { reason },
            ) => {
                self.desired = Desired::Stopped;
                self.end(Status::Stopped, reason);
            }
            (from, transition) => return Err(IllegalTransition { from, transition }),
        }
        self.updated_at = now;
        Ok(())
    }

    /// Whoever was asked to delete it does not forget it.
    fn want(&mut self, desired: Desired) {
        if self.desired != Desired::Stopped {
            self.desired = desired;
        }
    }

    fn end(&mut self, status: Status, reason: Option<String>) {
        self.status = status;
        self.status_reason = reason.or_else(|| self.status_reason.take());
        self.layers = Layers::default();
        self.saving = None;
        self.forwards = Vec::new();
    }
}

#[cfg(test)]
mod tests {
    use super::super::network::RateLimits;
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn spec() -> Spec {
        Spec {
            template: "minimal".into(),
            vcpus: 1,
            memory_mb: 512,
            timeout_sec: 300,
            network: None,
        }
    }

    fn sandbox_in(status: Status) -> Sandbox {
        let mut sandbox = Sandbox::new(SandboxId::random(), spec(), Layers::default(), at(1));
        sandbox.status = status;
        sandbox
    }

    fn layers() -> Layers {
        Layers::default().saved(LayerId::random(), LayerId::random())
    }

    fn failed() -> Transition {
        Transition::Failed { reason: "x".into() }
    }

    fn stopped() -> Transition {
        Transition::Stopped { reason: None }
    }

    #[test]
    fn the_state_machine_has_just_these_transitions() {
        use Status::{Error, Paused, Pausing, Pending, Resuming, Running, Stopped};
        const ALL: [Status; 7] = [Pending, Running, Pausing, Paused, Resuming, Stopped, Error];
        let not_resumed = || Transition::NotResumed { reason: "x".into() };
        let merged = Transition::Merged {
            layers: Vec::new(),
            into: LayerId::random(),
        };
        let table: [(Transition, &[(Status, Status)]); 12] = [
            (merged, &[(Running, Running), (Paused, Paused)]),
            (
                Transition::Started(Timings::default()),
                &[(Pending, Running), (Resuming, Running)],
            ),
            (Transition::Used, &[(Running, Running)]),
            (
                Transition::Based(layers()),
                &[(Pending, Pending), (Running, Running)],
            ),
            (
                Transition::Forwards(Vec::new()),
                &[
                    (Pending, Pending),
                    (Running, Running),
                    (Pausing, Pausing),
                    (Paused, Paused),
                    (Resuming, Resuming),
                ],
            ),
            (Transition::Pausing(layers()), &[(Running, Pausing)]),
            (Transition::Paused, &[(Pausing, Paused)]),
            (Transition::NotPaused(layers()), &[(Pausing, Running)]),
            (Transition::Resuming, &[(Paused, Resuming)]),
            (not_resumed(), &[(Resuming, Paused)]),
            (
                failed(),
                &[
                    (Pending, Error),
                    (Running, Error),
                    (Pausing, Error),
                    (Paused, Error),
                ],
            ),
            (
                stopped(),
                &[
                    (Pending, Stopped),
                    (Running, Stopped),
                    (Pausing, Stopped),
                    (Paused, Stopped),
                    (Resuming, Stopped),
                    (Error, Stopped),
                ],
            ),
        ];
        for (transition, drawn) in table {
            for from in ALL {
                let mut sandbox = sandbox_in(from);
                let before = sandbox.clone();
                let result = sandbox.apply(transition.clone(), at(9));
                match drawn.iter().find(|(start, _)| *start == from) {
                    Some((_, status)) => {
                        assert_eq!(result, Ok(()), "{from} {transition:?}");
                        assert_eq!(sandbox.status, *status, "{from} {transition:?}");
                        assert_eq!(sandbox.updated_at, at(9));
                    }
                    None => {
                        let transition = transition.clone();
                        assert_eq!(result, Err(IllegalTransition { from, transition }));
                        assert_eq!(sandbox, before);
                    }
                }
            }
        }
    }

    #[test]
    fn a_sandbox_is_based_on_what_it_was_saved_to_until_it_ends() {
        let mut sandbox = sandbox_in(Status::Running);
        let (first, second) = (layers(), layers());
        let mut apply = |transition| {
            sandbox.apply(transition, at(2)).unwrap();
            (sandbox.desired, sandbox.layers.clone())
        };
        let none = Layers::default();
        let pausing = apply(Transition::Pausing(first.clone()));
        assert_eq!(pausing, (Desired::Paused, none.clone()));
        let running = apply(Transition::NotPaused(none.clone()));
        assert_eq!(running, (Desired::Running, none.clone()));
        apply(Transition::Pausing(first.clone()));
        assert_eq!(apply(Transition::Paused), (Desired::Paused, first.clone()));
        assert_eq!(
            apply(Transition::Resuming),
            (Desired::Running, first.clone())
        );
        let reason = "x".to_owned();
        assert_eq!(
            apply(Transition::NotResumed { reason }),
            (Desired::Paused, first.clone())
        );
        apply(Transition::Resuming);
        assert_eq!(
            apply(Transition::Started(Timings::default())),
            (Desired::Running, first)
        );
        assert_eq!(
            apply(Transition::Based(second.clone())),
            (Desired::Running, second)
        );
        assert_eq!(apply(failed()), (Desired::Running, none));
    }

    #[test]
    fn only_a_sandbox_with_a_card_has_a_policy_and_only_while_it_lives() {
        let to_all = || Transition::Egress(Egress::All);
        let mut without = sandbox_in(Status::Running);
        assert!(without.apply(to_all(), at(2)).is_err());
        let mut sandbox = sandbox_in(Status::Paused);
        sandbox.spec.network = Some(Connection {
            egress: Egress::None,
            rate_limits: RateLimits::default(),
        });
        sandbox.apply(to_all(), at(2)).unwrap();
        let egress = |sandbox: &Sandbox| sandbox.spec.network.clone().unwrap().egress;
        assert_eq!(egress(&sandbox), Egress::All);
        sandbox.apply(stopped(), at(3)).unwrap();
        let back = Transition::Egress(Egress::None);
        assert!(sandbox.apply(back, at(4)).is_err());
        assert_eq!(egress(&sandbox), Egress::All);
    }

    #[test]
    fn a_wish_to_delete_is_never_forgotten() {
        let mut sandbox = sandbox_in(Status::Pausing);
        for transition in [
            Transition::Unwanted,
            Transition::Paused,
            Transition::Resuming,
            Transition::NotResumed { reason: "x".into() },
        ] {
            sandbox.apply(transition, at(2)).unwrap();
            assert_eq!(sandbox.desired, Desired::Stopped);
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
}
