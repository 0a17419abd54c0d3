//! What the records say, and what is so: the two are compared every so often, and made to agree.
//!
//! | divergence | what is found | what is done |
//! |---|---|---|
//! | `no_process` | one that runs has no machine | error, or off if its disk is kept |
//! | `still_there` | one that is paused or off has a machine, or files of one | they go |
//! | `half_done` | nobody is at one that is on the way somewhere | as at the start of a daemon: before or after |
//! | `half_deleted` | nobody is at one that was to be deleted | it is deleted |
//! | `unwatched` | nobody waits for the idle timeout of one that runs | somebody does; if it has passed, it is set aside |
//! | `no_record` | a machine, or what is left of one, is in no record and nobody's | it goes |
//! | `no_layers` | layers that one is based on which is paused or off are gone | error |
//! | `cut_off` | others on the host have changed what connects one that runs, or holds it back | it is connected as before |
//!
//! All of these are found at the start of the daemon too, by [`Manager::recover`], and counted here: at
//! that time an idle timeout may have passed while there was no daemon. That an agent does not answer is
//! no divergence: it is asked when its machine is taken over and when it is used, and not in between, for
//! that would wake guests that sleep.
//!
//! What is found once is marked only, for it may be that somebody is at it and has not yet written it
//! down. What is found the next time again is acted on, by whoever has the sandbox's turn, and if it is
//! so then. So nothing that is done here comes between what requests and the idle timeout do. Networks
//! alone are repaired as soon as they are seen, and by the host, which knows who else is at them: until
//! then nothing may hold a guest's packets back.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tracing::{error, warn};

use super::super::host::{HostError, Presence};
use super::super::id::SandboxId;
use super::super::sandbox::{Desired, Sandbox, Status, Transition};
use super::super::store::StoreError;
use super::Manager;
use super::recover::{RecoverError, idle_for};
use crate::chain;

/// A way in which records and host disagree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Divergence {
    /// One that runs has no machine.
    NoProcess,
    /// One that is paused or off has a machine, or files of one.
    StillThere,
    /// Nobody is at one that is on the way somewhere.
    HalfDone,
    /// Nobody is at one that was to be deleted.
    HalfDeleted,
    /// Nobody waits for the idle timeout of one that runs.
    Unwatched,
    /// A machine, or what is left of one, is in no record.
    NoRecord,
    /// Layers that one is based on which is paused or off are gone.
    NoLayers,
    /// Others on the host have changed what connects one that runs, or holds it back.
    CutOff,
}

impl Divergence {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::NoProcess,
        Self::StillThere,
        Self::HalfDone,
        Self::HalfDeleted,
        Self::Unwatched,
        Self::NoRecord,
        Self::NoLayers,
        Self::CutOff,
    ];

    /// The word for it, in logs and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NoProcess => "no_process",
            Self::StillThere => "still_there",
            Self::HalfDone => "half_done",
            Self::HalfDeleted => "half_deleted",
            Self::Unwatched => "unwatched",
            Self::NoRecord => "no_record",
            Self::NoLayers => "no_layers",
            Self::CutOff => "cut_off",
        }
    }

    /// That of a sandbox that is live, of which the host has this; `None` if there is none. Layers are
    /// looked at elsewhere.
    fn of(sandbox: &Sandbox, presence: Option<Presence>, is_watched: bool) -> Option<Self> {
        if sandbox.desired == Desired::Stopped {
            return Some(Self::HalfDeleted);
        }
        match (sandbox.status, presence) {
            (Status::Running, Some(Presence::Runs)) => {
                let is_to_be = sandbox.spec.timeout_sec > 0;
                (is_to_be && !is_watched).then_some(Self::Unwatched)
            }
            // It is ending, which is told by an event.
            (Status::Running, Some(Presence::OnTheWay)) => None,
            (Status::Running, Some(Presence::Left) | None) => Some(Self::NoProcess),
            (Status::Pending | Status::Pausing | Status::Resuming | Status::Stopping, _) => {
                Some(Self::HalfDone)
            }
            (Status::Paused | Status::Off, Some(_)) => Some(Self::StillThere),
            (Status::Paused | Status::Off | Status::Stopped | Status::Error, _) => None,
        }
    }
}

/// What is known of divergences.
#[derive(Debug, Default)]
pub struct Reconciler {
    /// Those that were found the last time.
    marked: Mutex<BTreeSet<(SandboxId, Divergence)>>,
    /// How many of each were healed.
    healed: [AtomicU64; Divergence::ALL.len()],
    unrecorded: Arc<Mutex<BTreeSet<SandboxId>>>,
}

/// A machine that is in no record, for as long as this is there.
#[derive(Debug)]
pub struct Unrecorded {
    all: Arc<Mutex<BTreeSet<SandboxId>>>,
    id: SandboxId,
}

impl Drop for Unrecorded {
    fn drop(&mut self) {
        locked(&self.all).remove(&self.id);
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Reconciler {
    /// A machine of this name is somebody's although it is in no record.
    pub fn hold(&self, id: &SandboxId) -> Unrecorded {
        locked(&self.unrecorded).insert(id.clone());
        Unrecorded {
            all: Arc::clone(&self.unrecorded),
            id: id.clone(),
        }
    }

    fn is_held(&self, id: &SandboxId) -> bool {
        locked(&self.unrecorded).contains(id)
    }

    /// Marks what was found now. Returns what was found before too.
    fn mark(&self, found: BTreeSet<(SandboxId, Divergence)>) -> BTreeSet<(SandboxId, Divergence)> {
        let mut marked = locked(&self.marked);
        let again = marked.intersection(&found).cloned().collect();
        *marked = found;
        again
    }

    /// Counts one that is healed, and logs it.
    pub fn healed(&self, id: &SandboxId, divergence: Divergence) {
        warn!(sandbox = %id, divergence = divergence.as_str(), "records and host disagreed; healed");
        self.healed[divergence as usize].fetch_add(1, Ordering::Relaxed);
    }
}

/// Why records and host may still disagree.
#[derive(Debug, thiserror::Error)]
enum ReconcileError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Host(#[from] HostError),
    #[error(transparent)]
    Recover(#[from] RecoverError),
}

impl Manager {
    /// How many divergences of each kind were healed since the daemon was started.
    pub fn divergences(&self) -> [(Divergence, u64); Divergence::ALL.len()] {
        let healed = &self.inner.reconciler.healed;
        Divergence::ALL.map(|kind| (kind, healed[kind as usize].load(Ordering::Relaxed)))
    }

    /// Compares records and host every `period`, until it is dropped.
    pub async fn reconcile_every(&self, period: Duration) {
        loop {
            tokio::time::sleep(period).await;
            self.reconcile().await;
        }
    }

    /// Compares records and host once, and heals what was found the last time and is found again.
    pub async fn reconcile(&self) {
        let (repaired, outcome) = self.inner.host.repair_networks().await;
        for id in repaired {
            self.inner.reconciler.healed(&id, Divergence::CutOff);
        }
        if let Err(source) = outcome {
            error!(error = %chain(&source), "a network is not as it was set up");
        }
        let found = match self.find_divergences().await {
            Ok(found) => found,
            Err(source) => {
                error!(error = %chain(&source), "records and host cannot be compared");
                return;
            }
        };
        for (id, divergence) in self.inner.reconciler.mark(found) {
            if let Err(source) = self.heal(&id, divergence).await {
                error!(sandbox = %id, divergence = divergence.as_str(), error = %chain(&source),
                    "records and host disagree still");
            }
        }
    }

    async fn find_divergences(&self) -> Result<BTreeSet<(SandboxId, Divergence)>, ReconcileError> {
        let present: BTreeMap<_, _> = self.inner.host.present().await?.into_iter().collect();
        let live = self.inner.store.list_live().await?;
        let mut found = BTreeSet::new();
        for sandbox in &live {
            let divergence = self
                .divergence_of(sandbox, present.get(&sandbox.id).copied())
                .await?;
            found.extend(divergence.map(|it| (sandbox.id.clone(), it)));
        }
        let recorded: BTreeSet<_> = live.iter().map(|sandbox| &sandbox.id).collect();
        let others = present.into_keys().filter(|id| !recorded.contains(id));
        found.extend(
            others
                .filter(|id| !self.is_unrecorded(id))
                .map(|id| (id, Divergence::NoRecord)),
        );
        Ok(found)
    }

    async fn divergence_of(
        &self,
        sandbox: &Sandbox,
        presence: Option<Presence>,
    ) -> Result<Option<Divergence>, ReconcileError> {
        let is_watched = self.inner.idle.is_watched(&sandbox.id);
        if let Some(divergence) = Divergence::of(sandbox, presence, is_watched) {
            return Ok(Some(divergence));
        }
        let rests = matches!(sandbox.status, Status::Paused | Status::Off);
        let is_whole = !rests || self.has(&sandbox.layers).await?;
        Ok((!is_whole).then_some(Divergence::NoLayers))
    }

    /// Whether a machine is somebody's although it is in no record.
    fn is_unrecorded(&self, id: &SandboxId) -> bool {
        self.inner.reconciler.is_held(id) || self.inner.pool.has(id)
    }

    async fn heal(&self, id: &SandboxId, divergence: Divergence) -> Result<(), ReconcileError> {
        // Whoever has the turn is at it.
        let Some(_turn) = self.inner.turns.try_take(id) else {
            return Ok(());
        };
        let host = &self.inner.host;
        let present = host.present().await?;
        let presence = present.into_iter().find(|(found, _)| found == id);
        let presence = presence.map(|(_, presence)| presence);
        let found = self.inner.store.get(id).await?;
        let live =
            found.filter(|sandbox| !matches!(sandbox.status, Status::Stopped | Status::Error));
        let Some(sandbox) = live else {
            if divergence == Divergence::NoRecord && presence.is_some() && !self.is_unrecorded(id) {
                host.sweep(id).await?;
                self.inner.reconciler.healed(id, divergence);
            }
            return Ok(());
        };
        if self.divergence_of(&sandbox, presence).await? != Some(divergence) {
            return Ok(());
        }
        let failed = |reason: &str| Transition::Failed {
            reason: reason.to_owned(),
        };
        let transition = match divergence {
            Divergence::NoRecord | Divergence::CutOff => return Ok(()),
            Divergence::StillThere => None,
            Divergence::Unwatched => {
                self.watch_since(&sandbox, idle_for(&sandbox));
                self.inner.reconciler.healed(id, divergence);
                return Ok(());
            }
            Divergence::NoProcess => Some(failed("its vmm is gone, and nobody has told why")),
            Divergence::NoLayers => Some(Transition::Lost {
                reason: "what was saved of it is no longer on the host".to_owned(),
            }),
            Divergence::HalfDeleted => Some(Transition::Stopped { reason: None }),
            Divergence::HalfDone => Some(match sandbox.status {
                Status::Pausing if presence == Some(Presence::Runs) => {
                    Transition::NotPaused(sandbox.layers.clone())
                }
                Status::Pausing if self.is_saved(&sandbox).await? => Transition::Paused,
                Status::Resuming => Transition::NotResumed {
                    reason: "what was resuming it has ended in the midst of it".to_owned(),
                },
                Status::Stopping => Transition::Stopped { reason: None },
                _ => failed("what was at it has ended in the midst of it"),
            }),
        };
        if !matches!(transition, Some(Transition::NotPaused(_))) {
            host.sweep(id).await?;
        }
        if let Some(transition) = transition {
            self.record(id, transition).await?;
        }
        self.inner.reconciler.healed(id, divergence);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::super::super::layer::Layers;
    use super::super::super::resources::Resources;
    use super::super::super::sandbox::Spec;
    use super::*;

    #[test]
    fn each_divergence_is_told_from_what_is_as_it_should_be() {
        use Divergence::{HalfDeleted, HalfDone, NoProcess, StillThere, Unwatched};
        use Presence::{Left, OnTheWay, Runs};
        let spec = Spec {
            template: "minimal".into(),
            vcpus: 1,
            memory_mb: 512,
            timeout_sec: 300,
            network: None,
            disk_mb: None,
            resources: Resources::default(),
        };
        let id = SandboxId::random();
        let mut sandbox = Sandbox::new(id, spec, Layers::default(), Timestamp::UNIX_EPOCH);
        for (status, presence, is_watched, expected) in [
            (Status::Running, Some(Runs), true, None),
            (Status::Running, Some(Runs), false, Some(Unwatched)),
            (Status::Running, Some(OnTheWay), true, None),
            (Status::Running, Some(Left), true, Some(NoProcess)),
            (Status::Running, None, true, Some(NoProcess)),
            (Status::Paused, None, false, None),
            (Status::Paused, Some(Runs), false, Some(StillThere)),
            (Status::Off, Some(Left), false, Some(StillThere)),
            (Status::Pending, None, false, Some(HalfDone)),
            (Status::Pausing, Some(Runs), true, Some(HalfDone)),
            (Status::Resuming, Some(OnTheWay), false, Some(HalfDone)),
            (Status::Stopping, None, false, Some(HalfDone)),
        ] {
            sandbox.status = status;
            sandbox.desired = Desired::Running;
            assert_eq!(
                Divergence::of(&sandbox, presence, is_watched),
                expected,
                "{status}"
            );
            sandbox.desired = Desired::Stopped;
            let deleted = Divergence::of(&sandbox, presence, is_watched);
            assert_eq!(deleted, Some(HalfDeleted));
        }
        sandbox.desired = Desired::Running;
        sandbox.spec.timeout_sec = 0;
        sandbox.status = Status::Running;
        assert_eq!(Divergence::of(&sandbox, Some(Runs), false), None);
    }

    #[test]
    fn what_is_found_once_is_marked_and_what_is_found_again_is_acted_on() {
        let reconciler = Reconciler::default();
        let [one, other] = [(); 2].map(|()| (SandboxId::random(), Divergence::NoProcess));
        let (a, b) = (BTreeSet::from([one]), BTreeSet::from([other]));
        assert!(reconciler.mark(a.clone()).is_empty());
        assert_eq!(reconciler.mark(&a | &b), a);
        assert_eq!(reconciler.mark(b.clone()), b);
        assert!(reconciler.mark(BTreeSet::new()).is_empty());
        assert!(reconciler.mark(b).is_empty());
    }

    #[test]
    fn kinds_are_counted_by_their_place() {
        for (place, kind) in Divergence::ALL.into_iter().enumerate() {
            assert_eq!(kind as usize, place);
        }
    }
}
