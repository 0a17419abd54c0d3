//! The end of the daemon, as it was asked for.
//!
//! ```text
//!   on_stop   what runs                            what is on the way, and nobody's
//!   ───────   ─────────                            ────────────────────────────────
//!   keep      runs on, and the next daemon         ended: machines of the pool and of builds, and
//!             takes it over                        starts that are not done in time
//!   pause     paused; what cannot be runs on       the same
//!   delete    ended; off if its disk is kept       the same
//! ```
//!
//! What runs on is left as a crash would leave it, but that nobody is in the midst of anything. One that is
//! being saved all the same is settled by the next daemon: see [`recover`](super::recover).

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::{StreamExt, stream};
use tracing::{error, info, warn};

use super::super::id::SandboxId;
use super::super::sandbox::{Desired, Sandbox, Status, Transition};
use super::super::store::StoreError;
use super::Manager;
use crate::chain;

/// How long whoever is at a sandbox has to be done with it.
const PATIENCE: Duration = Duration::from_secs(30);
/// How many sandboxes are paused at a time.
const PAUSES_AT_A_TIME: usize = 4;

/// What becomes of sandboxes that run when the daemon is asked to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnStop {
    /// They run on.
    #[default]
    Keep,
    /// They are paused.
    Pause,
    /// They are ended, and those whose disk is not kept are gone.
    Delete,
}

impl Manager {
    /// Pauses every sandbox that runs; one that cannot be paused runs on. No more are started.
    pub async fn pause_all(&self) {
        self.inner.closing.store(true, Ordering::Release);
        let live = match self.inner.store.list_live().await {
            Ok(live) => live,
            Err(source) => {
                error!(error = %chain(&source), "no sandbox is paused; they run on");
                return;
            }
        };
        let runs = live
            .into_iter()
            .filter(|sandbox| sandbox.status == Status::Running);
        stream::iter(runs)
            .for_each_concurrent(PAUSES_AT_A_TIME, async |sandbox| {
                if let Err(source) = self.pause(sandbox.id.as_str()).await {
                    warn!(sandbox = %sandbox.id, error = %chain(&source), "not paused; it runs on");
                }
            })
            .await;
    }

    /// Ends what is on the way, and every sandbox that runs unless these are to run on, and writes that
    /// down. Paused ones stay. Returns whether any runs on.
    pub async fn shutdown(&self, runs_on: bool) -> bool {
        let runs_on = self.end_or_leave(runs_on).await;
        self.inner.events.close();
        runs_on
    }

    async fn end_or_leave(&self, runs_on: bool) -> bool {
        self.inner.closing.store(true, Ordering::Release);
        self.inner.pool.wake();
        let staying = match runs_on {
            true => self.staying().await,
            false => Ok(BTreeSet::new()),
        };
        let staying = match staying {
            Ok(staying) => staying,
            Err(source) => {
                error!(error = %chain(&source), "the records cannot be read; all is left as it is");
                return true;
            }
        };
        self.inner.host.shutdown(&staying).await;
        self.merges_done().await;
        match self.inner.store.list_live().await {
            Ok(live) => self.record_ends(live, &staying).await,
            Err(source) => error!(error = %chain(&source), "end of sandboxes not recorded"),
        }
        if !staying.is_empty() {
            info!(
                sandboxes = staying.len(),
                "sandboxes run on; the next daemon with this data_dir takes them over"
            );
        }
        !staying.is_empty()
    }

    /// The sandboxes that run, once nobody is at them, or after a while in any case.
    async fn staying(&self) -> Result<BTreeSet<SandboxId>, StoreError> {
        let live = self.inner.store.list_live().await?;
        let settled = async {
            for sandbox in &live {
                drop(self.inner.turns.take(&sandbox.id).await);
            }
        };
        if tokio::time::timeout(PATIENCE, settled).await.is_err() {
            warn!("sandboxes are still being started or saved; the next daemon settles them");
        }
        let live = self.inner.store.list_live().await?;
        let stays = |sandbox: &Sandbox| {
            matches!(sandbox.status, Status::Running | Status::Pausing)
                && sandbox.desired != Desired::Stopped
        };
        let staying = live.into_iter().filter(stays);
        Ok(staying.map(|sandbox| sandbox.id).collect())
    }

    async fn record_ends(&self, live: Vec<Sandbox>, staying: &BTreeSet<SandboxId>) {
        for sandbox in live {
            if staying.contains(&sandbox.id) {
                continue;
            }
            // Whoever was at it has been told that it ended, and has written that down by then.
            let _turn = self.inner.turns.take(&sandbox.id).await;
            if let Err(source) = self.record_shutdown(&sandbox.id).await {
                error!(sandbox = %sandbox.id, error = %chain(&source), "end of sandbox not recorded");
            }
        }
    }

    async fn record_shutdown(&self, id: &SandboxId) -> Result<(), StoreError> {
        let status = self
            .inner
            .store
            .get(id)
            .await?
            .map(|sandbox| sandbox.status);
        let reason = "daemon shut down".to_owned();
        let transition = match status {
            Some(Status::Resuming) => Transition::NotResumed { reason },
            Some(Status::Pending | Status::Running | Status::Pausing | Status::Stopping) => {
                Transition::Stopped {
                    reason: Some(reason),
                }
            }
            Some(Status::Paused | Status::Off | Status::Stopped | Status::Error) | None => {
                return Ok(());
            }
        };
        self.record(id, transition).await.map(drop)
    }
}
