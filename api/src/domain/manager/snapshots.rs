//! Snapshots and forks.

use std::num::NonZero;
use std::sync::atomic::{AtomicBool, Ordering};

use futures_util::StreamExt;
use futures_util::stream;
use jiff::Timestamp;
use tracing::{Instrument, debug, error, info};

use super::super::error::{ForkError, SnapshotError};
use super::super::events::Change;
use super::super::host::{HostError, SaveRequest, Saved};
use super::super::id::{LayerId, SandboxId, SnapshotId};
use super::super::layer::MAX_DISK;
use super::super::request::{self, SnapshotSpec};
use super::super::sandbox::{Sandbox, Status, Transition};
use super::super::snapshot::Snapshot;
use super::super::store::StoreError;
use super::super::timings::{SaveTimings, Start};
use super::super::turns::Turn;
use super::Manager;
use super::create::Wishes;
use crate::chain;

/// How many sandboxes of one fork are started at a time, at most.
const MAX_STARTS: usize = 16;

/// What came of a fork.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Forked {
    /// The new sandboxes, which run.
    pub sandboxes: Vec<Sandbox>,
    /// Those that did not start, and why, as a sentence.
    pub failed: Vec<(SandboxId, String)>,
    /// How long the parent was held up, if it was running.
    pub stall: Option<SaveTimings>,
}

/// A snapshot that is written down, and is to be taken.
struct NewSnapshot {
    snapshot: Snapshot,
    /// The name that it gets once it is taken, from the one that has it now.
    name: Option<String>,
    /// How the sandbox is to be saved; `None` if it is.
    save: Option<SaveRequest>,
}

/// The name of a snapshot, or of one among those of its sandbox, is taken.
fn name_taken(name: &str) -> SnapshotError {
    SnapshotError::NameTaken(name.rsplit('/').next().unwrap_or_default().to_owned())
}

/// How many sandboxes of one fork are started at a time: enough that no processor waits for another
/// thing than the next start. More would take the processors from each other, and all the longer for
/// the guests' own clocks, which tick meanwhile.
fn starts_at_a_time() -> usize {
    let cpus = std::thread::available_parallelism().map_or(MAX_STARTS, NonZero::get);
    (2 * cpus + 2).min(MAX_STARTS)
}

impl Manager {
    /// Takes a snapshot of a sandbox that runs, which is held up while it is saved, or is paused. It goes on if the caller goes away.
    ///
    /// # Errors
    /// There is none; the sandbox is as before.
    pub async fn snapshot(&self, id: &str, spec: SnapshotSpec) -> Result<Snapshot, SnapshotError> {
        request::check_snapshot(&spec).map_err(SnapshotError::Invalid)?;
        let id = self.get(id).await?.id;
        let manager = self.clone();
        let task = async move {
            let turn = manager.inner.turns.take(&id).await;
            let (snapshot, _) = manager.take_snapshot(&id, spec, &turn).await?;
            let name = snapshot.own_name().map(str::to_owned);
            let id = snapshot.id.clone();
            let taken = Change::SnapshotTaken { id, name };
            manager.tell_of(&snapshot, taken).await;
            Ok(snapshot)
        };
        tokio::spawn(task.in_current_span())
            .await
            .unwrap_or(Err(SnapshotError::Interrupted))
    }

    /// Takes a snapshot. The caller has the turn at the sandbox.
    pub(super) async fn take_snapshot(
        &self,
        id: &SandboxId,
        spec: SnapshotSpec,
        _turn: &Turn,
    ) -> Result<(Snapshot, Option<SaveTimings>), SnapshotError> {
        let NewSnapshot {
            mut snapshot,
            name,
            save,
        } = self.insert_snapshot(id, spec).await?;
        let taken = self.save_for(&mut snapshot, name, save).await;
        if taken.is_err() {
            let released = self.inner.store.remove_snapshot(&snapshot.id).await?;
            self.discard(&released).await;
        }
        let saved = taken?;
        info!(sandbox = %id, snapshot = %snapshot.id, stall_us = saved.as_ref().map(|saved| saved.timings.stall_us),
            "snapshot taken");
        Ok((snapshot, saved.map(|saved| saved.timings)))
    }

    /// Writes down a snapshot that is to be taken, so that it holds the layers from now on.
    async fn insert_snapshot(
        &self,
        id: &SandboxId,
        spec: SnapshotSpec,
    ) -> Result<NewSnapshot, SnapshotError> {
        let host = self.inner.host.describe().await;
        let host = host.map_err(SnapshotError::Host)?;
        let _records = self.inner.records.lock().await;
        let sandbox = self.get(id.as_str()).await?;
        let save = match sandbox.status {
            Status::Running if sandbox.layers.disk.len() >= MAX_DISK => {
                return Err(SnapshotError::TooManyLayers(sandbox.layers.disk.len()));
            }
            Status::Running => {
                let (keep, layers) = if spec.include_memory {
                    let layers = sandbox.layers.saved(LayerId::random(), LayerId::random());
                    (sandbox.layers.kept_memory(), layers)
                } else {
                    let layers = sandbox.layers.saved_disk(LayerId::random());
                    (layers.memory.len(), layers)
                };
                Some(SaveRequest {
                    id: id.clone(),
                    keep,
                    layers,
                    include_memory: spec.include_memory,
                })
            }
            Status::Paused => None,
            Status::Off if !sandbox.layers.disk.is_empty() => None,
            _ => return Err(SnapshotError::NotSaveable(sandbox.standing())),
        };
        let name = match spec.name {
            Some(name) if spec.is_own => Some(Snapshot::name_of(id, &name)),
            Some(name) if self.is_template(&name, &host).await? => {
                return Err(SnapshotError::NameOfTemplate(name));
            }
            name => name,
        };
        let mut has_name_later = false;
        if let Some(name) = &name {
            has_name_later = match self.own_snapshot(name).await? {
                Some(other) if spec.overwrite && other.content.is_some() => true,
                Some(_) => return Err(name_taken(name)),
                None => false,
            };
        }
        let layers = save.as_ref().map_or(&sandbox.layers, |save| &save.layers);
        let layers = match spec.include_memory {
            true => layers.clone(),
            false => layers.without_memory(),
        };
        let mut snapshot = Snapshot {
            id: SnapshotId::random(),
            owner: self.principal.owner().cloned(),
            name: name.clone().filter(|_| !has_name_later),
            description: spec.description,
            sandbox: id.clone(),
            spec: sandbox.spec,
            status: sandbox.status,
            layers,
            content: None,
            created_at: Timestamp::now(),
        };
        while !self.inner.store.insert_snapshot(&snapshot).await? {
            snapshot.id = SnapshotId::random();
        }
        Ok(NewSnapshot {
            snapshot,
            name: name.filter(|_| has_name_later),
            save,
        })
    }

    /// The principal's own snapshot of this name, also if it is still being taken.
    async fn own_snapshot(&self, name: &str) -> Result<Option<Snapshot>, StoreError> {
        let named = self.inner.store.find_snapshot(name).await?;
        Ok(named.into_iter().find(|other| self.owns(other)))
    }

    /// Saves the sandbox, if it runs, and completes the record, with this name if there is one.
    async fn save_for(
        &self,
        snapshot: &mut Snapshot,
        name: Option<String>,
        save: Option<SaveRequest>,
    ) -> Result<Option<Saved>, SnapshotError> {
        let host = &self.inner.host;
        let saved = match save {
            Some(request) => Some(self.save_running(request).await?),
            None => None,
        };
        let content = host
            .inspect(&snapshot.layers)
            .await
            .map_err(SnapshotError::Host)?;
        snapshot.content = Some(content.ok_or_else(|| {
            SnapshotError::Host(HostError::Internal {
                reason: "layers of the sandbox are missing".to_owned(),
            })
        })?);
        match name {
            Some(name) => self.take_over(snapshot, name).await?,
            None => drop(self.inner.store.update_snapshot(snapshot).await?),
        }
        Ok(saved)
    }

    /// Completes a snapshot, which gets the name of another, and that is removed.
    async fn take_over(&self, snapshot: &mut Snapshot, name: String) -> Result<(), SnapshotError> {
        let (replaced, released) = {
            let _records = self.inner.records.lock().await;
            let replaced = self.own_snapshot(&name).await?;
            if replaced
                .as_ref()
                .is_some_and(|other| other.content.is_none())
            {
                return Err(name_taken(&name));
            }
            snapshot.name = Some(name);
            let released = self.inner.store.rename_snapshot(snapshot).await?;
            (replaced, released)
        };
        self.discard(&released).await;
        if let Some(replaced) = replaced {
            let name = replaced.own_name().map(str::to_owned);
            let id = replaced.id.clone();
            self.tell_of(&replaced, Change::SnapshotDeleted { id, name })
                .await;
        }
        Ok(())
    }

    async fn save_running(&self, request: SaveRequest) -> Result<Saved, SnapshotError> {
        let (id, layers) = (&request.id, &request.layers);
        let result = self.inner.host.snapshot(request.clone()).await;
        let based_on = match &result {
            Ok(_) => Some(layers.clone()),
            Err(HostError::NotSaved { keep, .. }) => {
                let mut layers = self.get(id.as_str()).await?.layers;
                let is_changed = layers.memory.len() > *keep;
                layers.memory.truncate(*keep);
                is_changed.then_some(layers)
            }
            Err(_) => None,
        };
        if let Some(layers) = based_on {
            let based = self.record(id, Transition::Based(layers.clone())).await?;
            // What it writes to now is another than before.
            if based.is_some_and(|sandbox| sandbox.is_kept && sandbox.status == Status::Running) {
                self.keep_root(id).await.map_err(|source| {
                    error!(sandbox = %id, error = chain(&source),
                        "the disk that the sandbox writes to now is not kept until it is stopped");
                    SnapshotError::Host(source)
                })?;
            }
            self.merge_in_background(&layers);
        }
        match result {
            Ok(saved) if !request.include_memory && !saved.is_at_rest => {
                Err(SnapshotError::NotAtRest)
            }
            other => other.map_err(SnapshotError::Host),
        }
    }

    /// All snapshots, newest first.
    ///
    /// # Errors
    /// The store failed.
    pub async fn list_snapshots(&self) -> Result<Vec<Snapshot>, StoreError> {
        let mut snapshots = self.inner.store.list_snapshots().await?;
        snapshots.retain(|snapshot| snapshot.content.is_some() && self.sees(snapshot));
        Ok(snapshots)
    }

    /// The snapshot of this id or name.
    ///
    /// # Errors
    /// There is none, or the store failed.
    pub async fn get_snapshot(&self, id: &str) -> Result<Snapshot, SnapshotError> {
        let found = match id.parse() {
            Ok(id) => {
                let found = self.inner.store.get_snapshot(&id).await?;
                found.filter(|snapshot| self.sees(snapshot))
            }
            Err(_) => self.choose(self.inner.store.find_snapshot(id).await?),
        };
        found
            .filter(|snapshot| snapshot.content.is_some())
            .ok_or(SnapshotError::NotFound)
    }

    /// The snapshot of this sandbox, by its id or name.
    ///
    /// # Errors
    /// There is none, or the store failed.
    pub async fn snapshot_of(
        &self,
        sandbox: &SandboxId,
        name: &str,
    ) -> Result<Snapshot, SnapshotError> {
        let own = Snapshot::name_of(sandbox, name);
        let found = match self.get_snapshot(&own).await {
            Err(SnapshotError::NotFound) => self.get_snapshot(name).await?,
            found => found?,
        };
        match found.sandbox == *sandbox {
            true => Ok(found),
            false => Err(SnapshotError::NotFound),
        }
    }

    /// Deletes a snapshot. Sandboxes that were made from it are as before.
    ///
    /// # Errors
    /// There is none, or the store failed.
    pub async fn delete_snapshot(&self, id: &str) -> Result<(), SnapshotError> {
        let snapshot = self.remove_snapshot(id).await?;
        let name = snapshot.own_name().map(str::to_owned);
        let id = snapshot.id.clone();
        let deleted = Change::SnapshotDeleted { id, name };
        self.tell_of(&snapshot, deleted).await;
        Ok(())
    }

    /// The same, without telling anybody: of one that was made in passing. Returns what it was.
    pub(super) async fn remove_snapshot(&self, id: &str) -> Result<Snapshot, SnapshotError> {
        let (snapshot, released) = {
            let _records = self.inner.records.lock().await;
            let snapshot = self.get_snapshot(id).await?;
            info!(snapshot = %snapshot.id, "snapshot deleted");
            let released = self.inner.store.remove_snapshot(&snapshot.id).await?;
            (snapshot, released)
        };
        self.discard(&released).await;
        Ok(snapshot)
    }

    /// Makes sandboxes from one that runs, which goes on, or is paused, and waits until the agents
    /// have answered. It goes on if the caller goes away.
    ///
    /// # Errors
    /// Nothing was forked. That single ones did not start is told in [`Forked`].
    pub async fn fork(&self, id: &str, count: i64) -> Result<Forked, ForkError> {
        let count = self.check_fork(count)?;
        let id = self.get(id).await.map_err(SnapshotError::from)?.id;
        let manager = self.clone();
        let task = async move {
            let turn = manager.inner.turns.take(&id).await;
            let spec = SnapshotSpec::default();
            let (snapshot, stall) = manager.take_snapshot(&id, spec, &turn).await?;
            drop(turn);
            let pending = manager.insert_forks(snapshot.id.as_str(), count).await;
            // The sandboxes hold the layers now.
            if let Err(source) = manager.remove_snapshot(snapshot.id.as_str()).await {
                error!(snapshot = %snapshot.id, error = %chain(&source), "snapshot is left");
            }
            Ok(manager.start_forks(pending?, stall).await)
        };
        tokio::spawn(task.in_current_span())
            .await
            .unwrap_or(Err(ForkError::Interrupted))
    }

    /// Makes sandboxes from a snapshot, named by id or name, and waits until the agents have
    /// answered. It goes on if the caller goes away.
    ///
    /// # Errors
    /// As for [`Manager::fork`].
    pub async fn fork_snapshot(&self, id: &str, count: i64) -> Result<Forked, ForkError> {
        let count = self.check_fork(count)?;
        let (manager, id) = (self.clone(), id.to_owned());
        let task = async move {
            let pending = manager.insert_forks(&id, count).await?;
            Ok(manager.start_forks(pending, None).await)
        };
        tokio::spawn(task.in_current_span())
            .await
            .unwrap_or(Err(ForkError::Interrupted))
    }

    fn check_fork(&self, count: i64) -> Result<usize, ForkError> {
        if self.is_closing() {
            return Err(ForkError::ShuttingDown);
        }
        request::check_count(count).map_err(ForkError::Invalid)
    }

    /// Writes down the sandboxes of a fork.
    async fn insert_forks(
        &self,
        snapshot: &str,
        count: usize,
    ) -> Result<Vec<(Sandbox, Turn)>, SnapshotError> {
        let mut pending = Vec::with_capacity(count);
        let inserted = async {
            let _records = self.inner.records.lock().await;
            let snapshot = self.get_snapshot(snapshot).await?;
            for _ in 0..count {
                pending.push(
                    self.insert(&snapshot.spec, &snapshot.layers, &Wishes::default())
                        .await?,
                );
            }
            Ok(())
        };
        if let Err(source) = inserted.await {
            for (sandbox, _) in pending {
                let reason = "the fork that it belongs to could not be written down".to_owned();
                self.record(&sandbox.id, Transition::Failed { reason })
                    .await?;
            }
            return Err(source);
        }
        Ok(pending)
    }

    async fn start_forks(
        &self,
        pending: Vec<(Sandbox, Turn)>,
        stall: Option<SaveTimings>,
    ) -> Forked {
        let _starting = self.inner.pool.starting();
        let at_a_time = starts_at_a_time();
        // Those that are started later profit from what the first one is seen to touch.
        let is_first_of_many = AtomicBool::new(pending.len() > at_a_time);
        let starts = pending.into_iter().map(|(sandbox, turn)| async {
            let id = sandbox.id.clone();
            let layers = sandbox.layers.clone();
            let start = match layers.memory.is_empty() {
                true => Start::Cold,
                false => Start::Fork,
            };
            let started = self.start(sandbox, start).await;
            if started.is_ok()
                && start == Start::Fork
                && is_first_of_many.swap(false, Ordering::Relaxed)
                && let Err(source) = self.inner.host.note_working_set(&id, &layers).await
            {
                // Another may have noted it, for an earlier fork of the same snapshot.
                debug!(sandbox = %id, error = %chain(&source), "its working set is not noted");
            }
            drop(turn);
            started.map_err(|source| (id, chain(&source)))
        });
        let results: Vec<_> = stream::iter(starts).buffered(at_a_time).collect().await;
        let mut forked = Forked {
            sandboxes: Vec::new(),
            failed: Vec::new(),
            stall,
        };
        for result in results {
            match result {
                Ok(sandbox) => forked.sandboxes.push(sandbox),
                Err(failed) => forked.failed.push(failed),
            }
        }
        forked
    }
}
