//! From one state of a sandbox to another.

use jiff::Timestamp;

use super::super::id::LayerId;
use super::super::layer::Layers;
use super::super::network::{Egress, KeptForward};
use super::super::resources::Resources;
use super::super::timings::Timings;
use super::{Desired, Sandbox, Status};

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
    Forwards(Vec<KeptForward>),
    /// It has other resources than before.
    Resized {
        /// Virtual CPUs.
        vcpus: u8,
        /// RAM in MiB.
        memory_mb: u32,
        /// What else there is to them.
        resources: Resources,
    },
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
    /// What was saved of it, or its disk, is no longer on the host.
    Lost {
        /// What it is, as a sentence.
        reason: String,
    },
    /// It is to be started from these layers; it is off.
    PoweringOn(Layers),
    /// It is kept, and based on these layers when it is off.
    Kept(Layers),
    /// It is to be powered off.
    PoweringOff,
    /// It is to go on from these layers, which are those of a snapshot.
    RolledBack(Layers),
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
    /// Makes a transition.
    ///
    /// # Errors
    /// The state machine does not have it; the sandbox is unchanged.
    pub fn apply(
        &mut self,
        transition: Transition,
        now: Timestamp,
    ) -> Result<(), IllegalTransition> {
        use Status::{Error, Off, Paused, Pausing, Pending, Resuming, Running, Stopping};
        // Deleted, it ends; otherwise, where another ends, one that is kept is off.
        let rests = self.is_kept && self.desired != Desired::Stopped;
        match (self.status, transition) {
            (Pending | Resuming, Transition::Started(timings)) => {
                self.status = Running;
                self.timings = Some(timings);
                self.started_at.get_or_insert(now);
                self.last_active_at = Some(now);
            }
            (Running, Transition::Used) => self.last_active_at = Some(now),
            (Pending | Running, Transition::Based(layers)) => self.layers = layers,
            (Off, Transition::PoweringOn(layers)) => {
                self.status = Pending;
                self.want(Desired::Running);
                self.status_reason = None;
                self.started_at = None;
                // Until it has a disk of its own, it comes back to what it was.
                if self.layers != layers {
                    self.kept = Some(std::mem::replace(&mut self.layers, layers));
                }
            }
            (Pending | Resuming | Running, Transition::Kept(layers)) => {
                self.is_kept = true;
                self.kept = Some(layers);
            }
            (Running, Transition::PoweringOff) if self.kept.is_some() => {
                self.status = Stopping;
                self.want(Desired::Off);
            }
            (Off | Paused, Transition::RolledBack(layers)) => {
                self.status = Off;
                self.want(Desired::Off);
                self.is_kept = true;
                self.layers = layers;
            }
            (Pending | Running | Pausing | Stopping, Transition::Failed { reason }) if rests => {
                self.rest(Some(reason), now);
            }
            (Pending | Running | Pausing | Stopping, Transition::Stopped { reason }) if rests => {
                self.rest(reason, now);
            }
            (Off | Pending | Running | Pausing | Paused | Resuming, Transition::Egress(egress))
                if self.spec.network.is_some() =>
            {
                if let Some(connection) = &mut self.spec.network {
                    connection.egress = egress;
                }
            }
            (
                Off | Pending | Running | Pausing | Paused | Resuming,
                Transition::Forwards(forwards),
            ) => self.forwards = forwards,
            (Off | Running | Paused, Transition::Merged { layers, into }) => {
                let merged = |before: &Layers| before.merged(&layers, &into);
                if let Some(merged) = merged(&self.layers) {
                    self.layers = merged;
                }
                if let Some(merged) = self.kept.as_ref().and_then(merged) {
                    self.kept = Some(merged);
                }
            }
            (Running, Transition::Pausing(next)) => {
                self.status = Pausing;
                self.want(Desired::Paused);
                self.saving = Some(next);
            }
            (Pausing, Transition::Paused) => {
                self.status = Paused;
                self.kept = None;
                self.layers = self.saving.take().unwrap_or_default();
            }
            (Pausing, Transition::NotPaused(layers)) => {
                self.status = Running;
                self.want(Desired::Running);
                self.saving = None;
                self.layers = layers;
            }
            (
                Off | Running,
                Transition::Resized {
                    vcpus,
                    memory_mb,
                    resources,
                },
            ) => {
                self.spec.vcpus = vcpus;
                self.spec.memory_mb = memory_mb;
                self.spec.resources = resources;
            }
            (Paused, Transition::Resuming) => {
                self.status = Resuming;
                self.want(Desired::Running);
                self.status_reason = None;
            }
            (Resuming, Transition::NotResumed { reason }) => {
                self.status = Paused;
                self.kept = None;
                self.want(Desired::Paused);
                self.status_reason = Some(reason);
            }
            // Of one that is at rest nothing fails any more: what is told then is of a run that is over.
            (Pending | Running | Pausing | Stopping, Transition::Failed { reason })
            | (Paused | Off, Transition::Lost { reason }) => self.end(Error, Some(reason)),
            (_, Transition::Unwanted) => self.desired = Desired::Stopped,
            // Of one that is off and stays so, it is told twice.
            (Off, Transition::Stopped { reason }) if rests => {
                return Err(IllegalTransition {
                    from: Off,
                    transition: Transition::Stopped { reason },
                });
            }
            (
                Pending | Running | Pausing | Paused | Resuming | Stopping | Off | Error,
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

    /// It is off. What it was based on, it is based on still, if it has no disk of its own yet.
    fn rest(&mut self, reason: Option<String>, now: Timestamp) {
        if self.status == Status::Stopping {
            self.status_reason = None;
        } else {
            self.status_reason = reason;
        }
        if self.status != Status::Pending {
            self.stopped_at = Some(now);
        }
        self.status = Status::Off;
        self.want(Desired::Off);
        self.saving = None;
        if let Some(kept) = self.kept.take() {
            self.layers = kept;
        }
    }

    fn end(&mut self, status: Status, reason: Option<String>) {
        self.status = status;
        self.status_reason = reason.or_else(|| self.status_reason.take());
        self.layers = Layers::default();
        self.saving = None;
        self.kept = None;
        self.forwards = Vec::new();
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::id::SandboxId;
    use super::super::super::network::{Connection, RateLimits};
    use super::super::Spec;
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
            disk_mb: None,
            resources: Resources::default(),
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
        use Status::{Error, Off, Paused, Pausing, Pending, Resuming, Running, Stopped, Stopping};
        const ALL: [Status; 9] = [
            Pending, Running, Pausing, Paused, Resuming, Stopping, Off, Stopped, Error,
        ];
        let not_resumed = || Transition::NotResumed { reason: "x".into() };
        let merged = Transition::Merged {
            layers: Vec::new(),
            into: LayerId::random(),
        };
        let table: [(Transition, &[(Status, Status)]); 17] = [
            (merged, &[(Running, Running), (Paused, Paused), (Off, Off)]),
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
                Transition::Kept(layers()),
                &[(Pending, Pending), (Resuming, Resuming), (Running, Running)],
            ),
            (Transition::PoweringOn(layers()), &[(Off, Pending)]),
            // That of one whose disk is kept is tested below.
            (Transition::PoweringOff, &[]),
            (
                Transition::RolledBack(layers()),
                &[(Off, Off), (Paused, Off)],
            ),
            (
                Transition::Forwards(Vec::new()),
                &[
                    (Pending, Pending),
                    (Running, Running),
                    (Pausing, Pausing),
                    (Paused, Paused),
                    (Resuming, Resuming),
                    (Off, Off),
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
                    (Stopping, Error),
                ],
            ),
            (
                Transition::Lost { reason: "x".into() },
                &[(Paused, Error), (Off, Error)],
            ),
            (
                stopped(),
                &[
                    (Pending, Stopped),
                    (Running, Stopped),
                    (Pausing, Stopped),
                    (Paused, Stopped),
                    (Resuming, Stopped),
                    (Stopping, Stopped),
                    (Off, Stopped),
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
    fn one_that_is_kept_is_off_where_another_ends() {
        use Status::{Off, Pausing, Pending, Running, Stopping};
        let (base, own) = (layers(), layers());
        for (status, transition) in [
            (Pending, failed()),
            (Running, failed()),
            (Pausing, failed()),
            (Stopping, failed()),
            (Pending, stopped()),
            (Running, stopped()),
            (Pausing, stopped()),
            (Stopping, stopped()),
        ] {
            let mut sandbox = sandbox_in(status);
            sandbox.layers = base.clone();
            sandbox.is_kept = true;
            sandbox.kept = (status != Pending).then(|| own.clone());
            let mut deleted = sandbox.clone();
            sandbox.apply(transition.clone(), at(5)).unwrap();
            assert_eq!((sandbox.status, sandbox.desired), (Off, Desired::Off));
            let (expected, stopped_at) = match status {
                Pending => (&base, None),
                _ => (&own, Some(at(5))),
            };
            assert_eq!(&sandbox.layers, expected, "{status} {transition:?}");
            assert_eq!(sandbox.stopped_at, stopped_at);
            assert_eq!((&sandbox.kept, &sandbox.saving), (&None, &None));
            // What is told twice, or too late, changes nothing.
            assert!(sandbox.apply(stopped(), at(6)).is_err());
            assert!(sandbox.apply(failed(), at(6)).is_err());
            assert_eq!(&sandbox.layers, expected);
            // Deleted, it ends as others do.
            deleted.apply(Transition::Unwanted, at(5)).unwrap();
            deleted.apply(stopped(), at(5)).unwrap();
            assert_eq!(deleted.status, Status::Stopped);
            assert!(deleted.layers.is_empty() && deleted.kept.is_none());
        }
    }

    #[test]
    fn one_that_is_kept_is_powered_on_and_off_and_deleted() {
        let first = layers();
        let now = Timestamp::now();
        let mut sandbox = Sandbox::new_off(SandboxId::random(), spec(), first.clone(), now);
        assert!(sandbox.apply(Transition::PoweringOff, at(1)).is_err());
        let on = Transition::PoweringOn(first.clone());
        sandbox.apply(on, at(2)).unwrap();
        let kept = first.saved_disk(LayerId::random());
        sandbox
            .apply(Transition::Kept(kept.clone()), at(3))
            .unwrap();
        let started = Transition::Started(Timings::default());
        sandbox.apply(started, at(3)).unwrap();
        assert_eq!((sandbox.started_at, &sandbox.layers), (Some(at(3)), &first));
        sandbox.apply(Transition::PoweringOff, at(4)).unwrap();
        assert_eq!(sandbox.status, Status::Stopping);
        assert_eq!(sandbox.desired, Desired::Off);
        sandbox.apply(stopped(), at(5)).unwrap();
        assert_eq!((sandbox.status, &sandbox.layers), (Status::Off, &kept));
        sandbox.apply(Transition::Unwanted, at(6)).unwrap();
        sandbox.apply(stopped(), at(6)).unwrap();
        assert_eq!(sandbox.status, Status::Stopped);
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
            network: None,
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
