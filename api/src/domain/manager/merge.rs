//! Merging the disk layers of sandboxes that have been saved often, in the background.
//!
//! ```text
//! a save ──► long chain? ──► the host makes one layer of all but the bottom one
//!                                 │ not made: all is as before
//!                                 ▼
//!                for each record that has those layers, one on top of the other: in one
//!                transaction, it has the new one instead; what nobody has any more is removed
//! ```
//!
//! A sandbox that runs keeps the files of the old layers open; it is given the new one when it is
//! resumed, or goes on after it was saved again. Whoever takes a sandbox from one state to another has
//! the old layers or the new one, since a merge waits for its turn.

use tokio::sync::Semaphore;
use tokio_util::task::TaskTracker;
use tracing::{Instrument, info, warn};

use super::super::host::{HostError, MergeRequest};
use super::super::id::LayerId;
use super::super::layer::Layers;
use super::super::sandbox::{Sandbox, Transition};
use super::super::snapshot::Snapshot;
use super::super::store::StoreError;
use super::Manager;
use crate::chain;

/// The merges that are under way.
#[derive(Debug)]
pub struct Merges {
    tasks: TaskTracker,
    /// One at a time.
    turn: Semaphore,
}

impl Default for Merges {
    fn default() -> Self {
        let tasks = TaskTracker::new();
        // So that it can be waited for whenever it is empty; it takes tasks nevertheless.
        tasks.close();
        Self {
            tasks,
            turn: Semaphore::new(1),
        }
    }
}

/// Why layers were not merged.
#[derive(Debug, thiserror::Error)]
enum MergeError {
    #[error(transparent)]
    Host(#[from] HostError),
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Manager {
    /// Waits until no layers are being merged.
    pub async fn merges_done(&self) {
        self.inner.merges.tasks.wait().await;
    }

    /// Merges the disk layers of a sandbox, if there are many, in the background.
    pub(super) fn merge_in_background(&self, layers: &Layers) {
        let Some(layers) = layers.to_merge(self.inner.limits.merge_from) else {
            return;
        };
        let (manager, layers) = (self.clone(), layers.to_vec());
        let task = async move {
            let Ok(_one) = manager.inner.merges.turn.acquire().await else {
                return;
            };
            if manager.is_closing() {
                return;
            }
            if let Err(source) = manager.merge(&layers).await {
                warn!(layers = layers.len(), error = %chain(&source), "disk layers are not merged");
            }
        };
        self.inner.merges.tasks.spawn(task.in_current_span());
    }

    async fn merge(&self, layers: &[LayerId]) -> Result<(), MergeError> {
        let (sandboxes, snapshots) = self.holders(layers).await?;
        if sandboxes.is_empty() && snapshots.is_empty() {
            // Merged already, or gone.
            return Ok(());
        }
        let into = LayerId::random();
        let request = MergeRequest {
            layers: layers.to_vec(),
            into: into.clone(),
        };
        self.inner.host.merge_disk(request).await?;
        // Others may have come to hold them meanwhile.
        let (sandboxes, snapshots) = self.holders(layers).await?;
        let mut is_held = false;
        for sandbox in sandboxes {
            let _turn = self.inner.turns.take(&sandbox.id).await;
            let merged = Transition::Merged {
                layers: layers.to_vec(),
                into: into.clone(),
            };
            let sandbox = self.record(&sandbox.id, merged).await?;
            is_held |= sandbox.is_some_and(|sandbox| sandbox.layers.disk.contains(&into));
        }
        for snapshot in snapshots {
            is_held |= self.merge_snapshot(snapshot, layers, &into).await?;
        }
        if is_held {
            info!(layers = layers.len(), %into, "disk layers are merged");
        } else {
            self.discard(&[into]).await;
        }
        Ok(())
    }

    /// The sandboxes and snapshots that have these layers, one on top of the other.
    async fn holders(
        &self,
        layers: &[LayerId],
    ) -> Result<(Vec<Sandbox>, Vec<Snapshot>), StoreError> {
        let mut sandboxes = self.inner.store.list_live().await?;
        sandboxes.retain(|sandbox| sandbox.layers.has(layers));
        let mut snapshots = self.list_snapshots().await?;
        snapshots.retain(|snapshot| can_merge(snapshot, layers));
        Ok((sandboxes, snapshots))
    }

    /// Gives a snapshot that was taken the layer `into` instead of `layers`. Returns whether it has it.
    async fn merge_snapshot(
        &self,
        snapshot: Snapshot,
        layers: &[LayerId],
        into: &LayerId,
    ) -> Result<bool, MergeError> {
        let Some(merged) = snapshot.layers.merged(layers, into) else {
            return Ok(false);
        };
        let content = self.inner.host.inspect(&merged).await?;
        let released = {
            let _records = self.inner.records.lock().await;
            let Some(mut snapshot) = self.inner.store.get_snapshot(&snapshot.id).await? else {
                return Ok(false);
            };
            snapshot.layers = merged;
            snapshot.content = content.or(snapshot.content);
            self.inner.store.update_snapshot(&snapshot).await?
        };
        self.discard(&released).await;
        Ok(true)
    }
}

/// Whether layers of a snapshot can become one. That which its checksum is of stays as it is.
fn can_merge(snapshot: &Snapshot, layers: &[LayerId]) -> bool {
    let has_checksum_of_disk = snapshot.layers.memory.is_empty();
    snapshot.layers.has(layers)
        && !(has_checksum_of_disk && snapshot.layers.disk.last() == layers.last())
}
