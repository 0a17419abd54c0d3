//! The owner of all sandboxes.
//!
//! Every change is written before and after the act: a create writes `pending`, starts the
//! sandbox, and writes `running` or `error`; a pause writes `pausing` and where it saves to, saves,
//! and writes `paused`; a delete writes the wish, ends the sandbox, and writes `stopped`. What ends
//! by itself is told by the host's events. One lock is held while a record is read, changed and
//! written back, never while the host works. Who takes a sandbox from one state to another has its
//! [turn](super::turns) for all of that.

mod builds;
mod console;
mod create;
mod directories;
mod events;
mod exec;
mod from_snapshot;
mod idle;
mod inspect;
mod merge;
mod meter;
mod network;
mod oci;
mod pause;
mod pool;
mod ports;
mod power;
mod processes;
mod quota;
mod reconcile;
mod record;
mod recover;
mod resize;
mod runs;
mod scope;
mod shutdown;
mod snapshots;
mod templates;
mod warm;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use tokio::sync::Mutex;
use tracing::{Instrument, info};

use super::error::{DestroyError, LookupError};
use super::events::Events;
use super::exec::ExecLimits;
use super::haste::Haste;
use super::host::Host;
use super::id::SandboxId;
use super::idle::Idle;
use super::observe::Observer;
use super::principal::Principal;
use super::quota::Quotas;
use super::sandbox::{Sandbox, Transition};
use super::spool::Spool;
use super::store::{Page, Store, StoreError};
use super::turns::Turns;
use builds::Builds;
pub use directories::MAX_DEPTH;
pub use idle::{InUse, WhenIdle};
pub use inspect::Inspected;
use merge::Merges;
use meter::Meter;
pub use network::SandboxNetwork;
use pool::Pool;
pub use pool::PoolLimits;
pub use ports::PortConnection;
pub use power::StopSpec;
pub use processes::{ProcessSpec, check_size};
pub use reconcile::Divergence;
use reconcile::Reconciler;
pub use recover::RecoverError;
pub use shutdown::OnStop;
pub use snapshots::Forked;
use warm::Warm;

/// What the manager allows.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Output of commands.
    pub exec: ExecLimits,
    /// Size on the disk of all warm snapshots, in bytes; with 0 there are none.
    pub warm_bytes: u64,
    /// What becomes of a sandbox that was idle for as long as its timeout.
    pub when_idle: WhenIdle,
    /// Machines that are ready before they are asked for.
    pub pool: PoolLimits,
    /// From how many disk layers on those of a sandbox are merged in the background.
    pub merge_from: usize,
    /// How much the sandboxes of one owner may have together.
    pub quotas: Quotas,
}

/// The owner of all sandboxes, acting for one principal; clones share it.
#[derive(Clone)]
pub struct Manager {
    inner: Arc<Inner>,
    /// For whom it acts.
    principal: Arc<Principal>,
}

struct Inner {
    host: Arc<dyn Host>,
    store: Arc<dyn Store>,
    limits: Limits,
    /// Held while a record is read, changed and written back.
    records: Mutex<()>,
    turns: Turns,
    haste: Haste,
    warm: Warm,
    idle: Arc<Idle>,
    pool: Pool,
    merges: Merges,
    builds: Builds,
    reconciler: Reconciler,
    events: Events,
    meter: Meter,
    observer: OnceLock<Arc<dyn Observer>>,
    closing: AtomicBool,
}

impl Manager {
    /// A manager of what is in `store`, on `host`, which acts for the local principal.
    pub fn new(host: Arc<dyn Host>, store: Arc<dyn Store>, limits: Limits) -> Self {
        Self {
            inner: Arc::new(Inner {
                host,
                store,
                limits,
                records: Mutex::new(()),
                turns: Turns::default(),
                haste: Haste::default(),
                warm: Warm::default(),
                idle: Arc::default(),
                pool: Pool::default(),
                merges: Merges::default(),
                builds: Builds::default(),
                reconciler: Reconciler::default(),
                events: Events::default(),
                meter: Meter::default(),
                observer: OnceLock::new(),
                closing: AtomicBool::new(false),
            }),
            principal: Arc::new(Principal::Local),
        }
    }

    /// The same, acting for `principal`: what that makes is its own, and what it may not see is not
    /// there.
    pub fn acting_for(&self, principal: Principal) -> Self {
        Self {
            inner: Arc::clone(&self.inner),
            principal: Arc::new(principal),
        }
    }

    /// Has this told of all changes from now on. The first one is; there is no second.
    pub fn observe(&self, observer: Arc<dyn Observer>) {
        let _ = self.inner.observer.set(observer);
    }

    fn is_closing(&self) -> bool {
        self.inner.closing.load(Ordering::Acquire)
    }

    /// The sandboxes that run, are on the way there, are paused, or are off; newest first.
    ///
    /// # Errors
    /// The store failed.
    pub async fn list(&self) -> Result<Vec<Sandbox>, StoreError> {
        let mut sandboxes = self.inner.store.list_live().await?;
        sandboxes.retain(|sandbox| self.sees(sandbox));
        Ok(sandboxes)
    }

    /// The sandboxes of a page of the list of those that are not deleted, and how many there are on all
    /// pages of it.
    ///
    /// # Errors
    /// The store failed.
    pub async fn page(&self, page: &Page) -> Result<(Vec<Sandbox>, u64), StoreError> {
        let owner = self.only_of().or_else(|| page.owner.clone());
        let page = Page {
            owner,
            ..page.clone()
        };
        self.inner.store.page(&page).await
    }

    /// One sandbox, by its id, gone ones included, or by its name, if it is not deleted. One of somebody
    /// else is not there, unless the principal sees all.
    ///
    /// # Errors
    /// There is none, or the store failed.
    pub async fn get(&self, id: &str) -> Result<Sandbox, LookupError> {
        let found = match id.parse() {
            Ok(id) => {
                let found = self.inner.store.get(&id).await?;
                found.filter(|sandbox| self.sees(sandbox))
            }
            Err(_) => self.choose(self.inner.store.find(id).await?),
        };
        found
            .filter(|sandbox| self.principal.may_see(sandbox.owner.as_ref()))
            .ok_or(LookupError::NotFound)
    }

    /// Ends a sandbox. Its record stays. It goes on if the caller goes away.
    ///
    /// # Errors
    /// There is none of that id, or something of it is left.
    pub async fn destroy(&self, id: &str) -> Result<(), DestroyError> {
        let id = self.get(id).await?.id;
        let manager = self.clone();
        tokio::spawn(async move { manager.destroy_known(&id).await }.in_current_span())
            .await
            .unwrap_or(Err(DestroyError::Interrupted))
    }

    async fn destroy_known(&self, id: &SandboxId) -> Result<(), DestroyError> {
        let store = |source: StoreError| DestroyError::Lookup(source.into());
        self.record(id, Transition::Unwanted).await.map_err(store)?;
        let destroy = || async {
            let destroyed = self.inner.host.destroy(id).await;
            destroyed.map_err(DestroyError::Host)
        };
        // This ends whatever somebody is doing with it; the second makes sure that it has not begun
        // anew in between.
        destroy().await?;
        let _turn = self.inner.turns.take(id).await;
        destroy().await?;
        self.record(id, Transition::Stopped { reason: None })
            .await
            .map_err(store)?;
        info!(sandbox = %id, "sandbox deleted");
        Ok(())
    }

    /// Where output and uploads are spooled.
    pub fn limits(&self) -> &Limits {
        &self.inner.limits
    }

    /// An empty spool of the principal, that holds up to `threshold` bytes in memory.
    pub fn spool(&self, threshold: usize) -> Spool {
        let space = &self.inner.limits.exec.spool;
        space.spool(self.principal.owner(), threshold)
    }
}
