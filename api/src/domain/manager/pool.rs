//! The pool: machines that were restored from warm snapshots before anybody asked for them. Their
//! guests have not run since; each has the name that its sandbox will have.
//!
//! ```text
//!                       refill, when it is quiet
//!                  ┌──────────────────────────────────┐
//!                  ▼                                  │
//!  warm snapshot ─────► preparing ─────► ready ── create ──► (a sandbox)
//!                           │              │
//!                           │              ├── its VMM ends: refill
//!                           └──────────────┴── its snapshot is dropped; nobody has used the shape for
//!                                              a while; another shape needs the room; the daemon
//!                                              ends: destroyed
//! ```
//!
//! There is a shelf for each warm snapshot that was used lately. One task ([`Manager::keep_pool`])
//! fills and clears them, one machine at a time, and not while sandboxes are being started: a machine
//! for later is not to slow down one for now. No record is kept of machines in the pool. What a crash
//! leaves of them, the next daemon removes with the rest.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tracing::{debug, error, info, warn};

use super::super::host::{PrepareRequest, Shape};
use super::super::id::SandboxId;
use super::super::layer::Layers;
use super::super::network::RateLimits;
use super::super::resources::Resources;
use super::super::sandbox::Spec;
use super::super::snapshot::WarmSnapshot;
use super::Manager;
use crate::chain;

/// For how long no sandbox has been started when it is quiet: the first command in one that was just
/// started belongs to its start.
const QUIET: Duration = Duration::from_millis(500);
/// How long a shelf waits for it to be quiet. On a host with many processors it may never be.
const PATIENCE: Duration = Duration::from_secs(5);

/// What the pool may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoolLimits {
    /// Machines of one warm snapshot; with 0 there is no pool.
    pub per_shape: usize,
    /// Machines in all.
    pub total: usize,
    /// Their guests' RAM in all, in MiB, as if they used all of it.
    pub memory_mb: u64,
    /// How long they are kept when nobody uses their shape.
    pub idle: Duration,
}

/// The machines that are ready.
#[derive(Debug, Default)]
pub struct Pool {
    state: Mutex<State>,
    /// There may be something to do.
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// By the key of the warm snapshot.
    shelves: HashMap<String, Shelf>,
    /// Sandboxes that are being started.
    starts: usize,
    /// When the last of them was done.
    last_start: Option<Instant>,
}

#[derive(Debug)]
struct Shelf {
    shape: Shape,
    layers: Layers,
    used_at: Instant,
    /// When the last machine was taken from it, or it was new.
    wanting_since: Instant,
    ready: Vec<SandboxId>,
    is_preparing: bool,
    /// The last one could not be made, or one had to give way. Nothing is made until the next use.
    rests: bool,
}

/// What is to be done next.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    Prepare {
        key: String,
        shape: Shape,
        layers: Layers,
    },
    Destroy(Vec<SandboxId>),
    /// Look again then.
    WaitUntil(Instant),
    /// Until something changes.
    Wait,
}

impl Shelf {
    fn count(&self) -> usize {
        self.ready.len() + usize::from(self.is_preparing)
    }
}

impl State {
    fn count(&self) -> usize {
        self.shelves.values().map(Shelf::count).sum()
    }

    fn memory_mb(&self) -> u64 {
        let of = |shelf: &Shelf| u64::from(shelf.shape.memory_mb) * shelf.count() as u64;
        self.shelves.values().map(of).sum()
    }

    /// When it is quiet, if nobody starts anything until then; `None` while something is started.
    fn quiet_at(&self, now: Instant) -> Option<Instant> {
        (self.starts == 0).then(|| self.last_start.map_or(now, |at| at + QUIET))
    }

    fn next(&mut self, limits: &PoolLimits, now: Instant) -> Step {
        let expired = |shelf: &Shelf| now >= shelf.used_at + limits.idle;
        let old: Vec<_> = self
            .shelves
            .extract_if(|_, shelf| !shelf.is_preparing && expired(shelf))
            .flat_map(|(_, shelf)| shelf.ready)
            .collect();
        if !old.is_empty() {
            return Step::Destroy(old);
        }
        let mut look_at = self
            .shelves
            .values()
            .map(|shelf| shelf.used_at + limits.idle)
            .min();
        if let Some((key, shelf)) = self
            .shelves
            .iter()
            .filter(|(_, shelf)| {
                !shelf.rests && !shelf.is_preparing && shelf.ready.len() < limits.per_shape
            })
            .max_by_key(|(_, shelf)| shelf.used_at)
        {
            let patient_until = shelf.wanting_since + PATIENCE;
            let start_at = self
                .quiet_at(now)
                .map_or(patient_until, |quiet| quiet.min(patient_until));
            if start_at <= now {
                let (key, used_at) = (key.clone(), shelf.used_at);
                let memory_mb = u64::from(shelf.shape.memory_mb);
                let fits =
                    self.count() < limits.total && self.memory_mb() + memory_mb <= limits.memory_mb;
                if fits {
                    return self.prepare(key);
                }
                // The least recently used gives way, unless it is this one.
                let can_fit = memory_mb <= limits.memory_mb;
                let other = self
                    .shelves
                    .values_mut()
                    .filter(|other| can_fit && !other.ready.is_empty() && other.used_at < used_at)
                    .min_by_key(|other| other.used_at);
                if let Some(id) = other.and_then(|other| {
                    other.rests = true;
                    other.ready.pop()
                }) {
                    return Step::Destroy(vec![id]);
                }
            } else {
                look_at = look_at.map(|at| at.min(start_at));
            }
        }
        look_at.map_or(Step::Wait, Step::WaitUntil)
    }

    /// The shelf of a warm snapshot that is used now.
    fn open(&mut self, warm: &WarmSnapshot, now: Instant) -> &mut Shelf {
        let shelf = self
            .shelves
            .entry(warm.key.clone())
            .or_insert_with(|| Shelf {
                shape: warm.model.shape.clone(),
                layers: warm.layers.clone(),
                used_at: now,
                wanting_since: now,
                ready: Vec::new(),
                is_preparing: false,
                rests: false,
            });
        shelf.used_at = now;
        shelf.rests = false;
        shelf
    }

    fn prepare(&mut self, key: String) -> Step {
        match self.shelves.get_mut(&key) {
            Some(shelf) => {
                shelf.is_preparing = true;
                Step::Prepare {
                    shape: shelf.shape.clone(),
                    layers: shelf.layers.clone(),
                    key,
                }
            }
            None => Step::Wait,
        }
    }
}

/// A sandbox is being started, as long as this is there.
pub struct Starting<'a>(&'a Pool);

impl Drop for Starting<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.starts -= 1;
        state.last_start = Some(Instant::now());
        drop(state);
        self.0.changed.notify_one();
    }
}

impl Pool {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a machine of this name is ready.
    pub fn has(&self, id: &SandboxId) -> bool {
        let state = self.state();
        let mut shelves = state.shelves.values();
        shelves.any(|shelf| shelf.ready.contains(id))
    }

    /// Tells that a sandbox is being started.
    pub fn starting(&self) -> Starting<'_> {
        self.state().starts += 1;
        Starting(self)
    }

    /// Waits until no sandbox has been started for a while, or for long enough.
    pub async fn until_quiet(&self) {
        let patient_until = Instant::now() + PATIENCE;
        loop {
            let now = Instant::now();
            let quiet_at = self.state().quiet_at(now).unwrap_or(now + QUIET);
            let at = quiet_at.min(patient_until);
            if at <= now {
                return;
            }
            tokio::time::sleep_until(at.into()).await;
        }
    }

    /// Notes that a warm snapshot is used, or new: machines of it are made ready from now on.
    fn open(&self, warm: &WarmSnapshot) {
        self.state().open(warm, Instant::now());
        self.changed.notify_one();
    }

    /// Notes that a warm snapshot is used, and takes a ready machine of it, if there is one.
    fn take(&self, warm: &WarmSnapshot) -> Option<SandboxId> {
        let now = Instant::now();
        let mut state = self.state();
        let shelf = state.open(warm, now);
        // That a key has another snapshot than before is the end of its shelf; it just is not yet.
        if shelf.layers != warm.layers || shelf.ready.is_empty() {
            return None;
        }
        // The oldest.
        let id = shelf.ready.remove(0);
        shelf.wanting_since = now;
        drop(state);
        self.changed.notify_one();
        Some(id)
    }

    /// Forgets the machines of a warm snapshot, which are returned.
    fn close(&self, key: &str) -> Vec<SandboxId> {
        let shelf = self.state().shelves.remove(key);
        shelf.map(|shelf| shelf.ready).unwrap_or_default()
    }

    /// Forgets a machine that has ended.
    pub fn lost(&self, id: &SandboxId) {
        let mut state = self.state();
        let mut was_here = false;
        for shelf in state.shelves.values_mut() {
            let before = shelf.ready.len();
            shelf.ready.retain(|ready| ready != id);
            if shelf.ready.len() < before {
                shelf.wanting_since = Instant::now();
                was_here = true;
            }
        }
        drop(state);
        if was_here {
            self.changed.notify_one();
        }
    }

    /// Takes in what came of a preparation. Returns whether the machine, if there is one, is kept.
    fn put(&self, key: &str, layers: &Layers, ready: Option<&SandboxId>) -> bool {
        let mut state = self.state();
        let shelf = state.shelves.get_mut(key);
        let Some(shelf) = shelf.filter(|shelf| shelf.layers == *layers) else {
            return false;
        };
        shelf.is_preparing = false;
        match ready {
            Some(id) => shelf.ready.push(id.clone()),
            None => shelf.rests = true,
        }
        true
    }

    /// Has the pool looked at once more.
    pub fn wake(&self) {
        self.changed.notify_one();
    }
}

impl Manager {
    /// Keeps the pool, until the daemon shuts down.
    pub async fn keep_pool(&self) {
        let limits = self.inner.limits.pool;
        if limits.per_shape == 0 {
            return;
        }
        while !self.is_closing() {
            let step = self.inner.pool.state().next(&limits, Instant::now());
            match step {
                Step::Prepare { key, shape, layers } => {
                    self.prepare_one(&key, shape, layers).await;
                }
                Step::Destroy(ids) => self.destroy_ready(&ids).await,
                Step::WaitUntil(at) => tokio::select! {
                    () = self.inner.pool.changed.notified() => {}
                    () = tokio::time::sleep_until(at.into()) => {}
                },
                Step::Wait => self.inner.pool.changed.notified().await,
            }
        }
    }

    async fn prepare_one(&self, key: &str, shape: Shape, layers: Layers) {
        let id = match self.free_id().await {
            Ok(id) => id,
            Err(source) => {
                error!(error = %chain(&source), "the pool is not filled");
                self.inner.pool.put(key, &layers, None);
                return;
            }
        };
        let _unrecorded = self.inner.reconciler.hold(&id);
        let template = shape.template.clone();
        let prepared = async {
            let request = PrepareRequest {
                id: id.clone(),
                shape,
                layers: layers.clone(),
                nic: self.unconnected_nic().await?,
                scratch_mb: None,
                disk_mb: None,
                resources: Resources::default(),
            };
            self.inner.host.prepare(request).await
        };
        let prepared = prepared.await;
        let is_ready = prepared.is_ok();
        match prepared {
            Ok(()) => debug!(sandbox = %id, template, "a machine is ready"),
            Err(_) if self.is_closing() => {}
            Err(source) => warn!(template, error = %chain(&source), "no machine is ready"),
        }
        let kept = self.inner.pool.put(key, &layers, is_ready.then_some(&id));
        if is_ready && !kept {
            self.destroy_ready(&[id]).await;
        }
    }

    /// An id that no sandbox has had.
    async fn free_id(&self) -> Result<SandboxId, super::super::store::StoreError> {
        loop {
            let id = SandboxId::random();
            if self.inner.store.get(&id).await?.is_none() {
                return Ok(id);
            }
        }
    }

    /// Ends machines that are no longer in the pool.
    pub(super) async fn destroy_ready(&self, ids: &[SandboxId]) {
        for id in ids {
            match self.inner.host.destroy(id).await {
                Ok(()) => debug!(sandbox = %id, "a ready machine was removed"),
                Err(source) => error!(sandbox = %id, error = chain(&source), "a machine is left"),
            }
        }
    }

    /// Has machines of a warm snapshot made ready.
    pub(super) fn open_shelf(&self, warm: &WarmSnapshot) {
        if self.inner.limits.pool.per_shape > 0 {
            self.inner.pool.open(warm);
        }
    }

    /// A ready machine of a warm snapshot that will do for this sandbox, if there is one. There will
    /// be others. The rate limits of a card are its VMM's from its start on, and these have none; and
    /// these are in the host's first network.
    pub(super) fn take_ready(&self, warm: &WarmSnapshot, spec: &Spec) -> Option<SandboxId> {
        let connection = spec.network.as_ref();
        let is_special = connection
            .is_some_and(|it| it.rate_limits != RateLimits::default() || it.network.is_some());
        if self.inner.limits.pool.per_shape == 0 || is_special {
            return None;
        }
        self.inner.pool.take(warm)
    }

    /// Ends the ready machines of a warm snapshot that is dropped.
    pub(super) async fn close_shelf(&self, key: &str) {
        let ids = self.inner.pool.close(key);
        if !ids.is_empty() {
            info!(
                count = ids.len(),
                "ready machines of a dropped warm snapshot are ended"
            );
            self.destroy_ready(&ids).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::super::super::id::LayerId;
    use super::super::super::snapshot::Model;
    use super::*;

    const LIMITS: PoolLimits = PoolLimits {
        per_shape: 2,
        total: 3,
        memory_mb: 1000,
        idle: Duration::from_secs(60),
    };

    fn warm(key: &str, memory_mb: u32) -> WarmSnapshot {
        WarmSnapshot {
            key: key.to_owned(),
            model: Model {
                shape: Shape {
                    template: "minimal".to_owned(),
                    vcpus: 1,
                    memory_mb,
                },
                booted: None,
            },
            layers: Layers::default().saved(LayerId::random(), LayerId::random()),
            size_bytes: 1,
            used_at: Timestamp::UNIX_EPOCH,
        }
    }

    /// Does what is to be done at `now` until there is nothing. Returns which keys a machine was made
    /// ready for, and how many were destroyed.
    fn settle(pool: &Pool, now: Instant) -> (Vec<String>, usize) {
        let (mut made, mut destroyed) = (Vec::new(), 0);
        loop {
            let step = pool.state().next(&LIMITS, now);
            match step {
                Step::Prepare { key, layers, .. } => {
                    assert!(pool.put(&key, &layers, Some(&SandboxId::random())));
                    made.push(key);
                }
                Step::Destroy(ids) => destroyed += ids.len(),
                Step::WaitUntil(at) => {
                    assert!(at > now);
                    return (made, destroyed);
                }
                Step::Wait => return (made, destroyed),
            }
        }
    }

    #[test]
    fn a_shelf_is_filled_when_it_is_quiet_and_each_machine_is_taken_once() {
        let pool = Pool::default();
        let a = warm("a", 100);
        let starting = pool.starting();
        assert_eq!(pool.take(&a), None);
        let now = Instant::now();
        assert_eq!(settle(&pool, now).0, [""; 0], "a sandbox is being started");
        drop(starting);
        let now = Instant::now();
        assert_eq!(settle(&pool, now).0, [""; 0], "one has just been started");
        assert_eq!(settle(&pool, now + QUIET).0, ["a", "a"]);
        let (first, second) = (pool.take(&a).unwrap(), pool.take(&a).unwrap());
        assert_ne!(first, second);
        assert_eq!(pool.take(&a), None);

        // It does not wait for ever.
        let _starting = pool.starting();
        let now = Instant::now();
        assert_eq!(settle(&pool, now).0, [""; 0]);
        assert_eq!(settle(&pool, now + PATIENCE).0, ["a", "a"]);
    }

    #[test]
    fn one_that_ended_is_replaced_and_not_handed_out() {
        let pool = Pool::default();
        let a = warm("a", 100);
        pool.open(&a);
        assert_eq!(settle(&pool, Instant::now()).0, ["a", "a"]);
        let lost = pool.state().shelves["a"].ready[1].clone();
        pool.lost(&lost);
        assert_eq!(settle(&pool, Instant::now()).0, ["a"]);
        let taken = [pool.take(&a).unwrap(), pool.take(&a).unwrap()];
        assert!(!taken.contains(&lost));
    }

    #[test]
    fn what_was_used_last_has_the_room() {
        let pool = Pool::default();
        let (a, b) = (warm("a", 100), warm("b", 200));
        pool.open(&a);
        let now = Instant::now();
        assert_eq!(settle(&pool, now).0, ["a", "a"]);
        pool.open(&b);
        // Of three in all, there is one left, and one has to give way.
        let (made, destroyed) = settle(&pool, Instant::now());
        assert_eq!(
            (made.as_slice(), destroyed),
            (["b", "b"].map(String::from).as_slice(), 1)
        );
        assert_eq!(pool.state().shelves["a"].ready.len(), 1);
        // The other way round, when it is used again.
        assert!(pool.take(&a).is_some());
        let (made, destroyed) = settle(&pool, Instant::now() + QUIET);
        assert_eq!(
            (made.as_slice(), destroyed),
            (["a", "a"].map(String::from).as_slice(), 1)
        );
        // A guest that is too large for all of it gets no machine, and the others none of its room.
        let c = warm("c", 1001);
        pool.open(&c);
        let (made, destroyed) = settle(&pool, Instant::now());
        assert_eq!((made, destroyed), (Vec::new(), 0));
    }

    #[test]
    fn what_nobody_uses_goes() {
        let pool = Pool::default();
        let a = warm("a", 100);
        pool.open(&a);
        let now = Instant::now();
        assert_eq!(settle(&pool, now).0, ["a", "a"]);
        assert_eq!(settle(&pool, now + LIMITS.idle / 2), (Vec::new(), 0));
        assert_eq!(settle(&pool, now + 2 * LIMITS.idle), (Vec::new(), 2));
        assert!(pool.state().shelves.is_empty());
    }

    #[test]
    fn a_machine_of_a_snapshot_that_is_gone_is_not_kept() {
        let pool = Pool::default();
        let a = warm("a", 100);
        pool.open(&a);
        let step = pool.state().next(&LIMITS, Instant::now());
        let Step::Prepare { key, layers, .. } = step else {
            panic!("{step:?}");
        };
        assert!(pool.close("a").is_empty());
        assert!(!pool.put(&key, &layers, Some(&SandboxId::random())));
        // Nor for another of the same key.
        pool.open(&warm("a", 100));
        assert!(!pool.put(&key, &layers, Some(&SandboxId::random())));
    }

    #[test]
    fn what_cannot_be_made_is_tried_again_with_the_next_use() {
        let pool = Pool::default();
        let a = warm("a", 100);
        pool.open(&a);
        let step = pool.state().next(&LIMITS, Instant::now());
        assert!(matches!(step, Step::Prepare { .. }));
        pool.put("a", &a.layers, None);
        assert_eq!(settle(&pool, Instant::now() + PATIENCE), (Vec::new(), 0));
        assert_eq!(pool.take(&a), None);
        assert_eq!(settle(&pool, Instant::now()).0, ["a", "a"]);
    }
}
