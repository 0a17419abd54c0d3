//! What a daemon finds at its start: the records of an earlier one, whose virtual machines the host
//! has ended, and the layers that were saved.

use tracing::{info, warn};

use super::super::host::HostError;
use super::super::layer::Layers;
use super::super::sandbox::{Desired, Sandbox, Status, Transition};
use super::super::store::StoreError;
use super::Manager;
use super::warm::shape_of_warm;
use crate::chain;

/// Why the records were not settled.
#[derive(Debug, thiserror::Error)]
pub enum RecoverError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The host cannot say what it holds, or cannot remove what nobody needs.
    #[error("the layers of snapshots cannot be settled")]
    Host(#[source] HostError),
}

impl Manager {
    /// Settles the records of an earlier daemon, and removes layers that nobody holds. A sandbox
    /// that was being paused is paused if all of it was saved, and lost, as running ones are, if
    /// not; one that was being resumed is paused.
    ///
    /// # Errors
    /// The store or the host failed.
    pub async fn recover(&self) -> Result<(), RecoverError> {
        for sandbox in self.inner.store.list_live().await? {
            if let Some(transition) = self.settle(&sandbox).await? {
                self.record(&sandbox.id, transition).await?;
            }
        }
        for sandbox in self.inner.store.list_live().await? {
            self.open_forwards(&sandbox).await;
        }
        self.recover_templates().await?;
        for snapshot in self.inner.store.list_snapshots().await? {
            if snapshot.content.is_none() {
                self.inner.store.remove_snapshot(&snapshot.id).await?;
            } else if !self.has(&snapshot.layers).await? {
                warn!(snapshot = %snapshot.id, "layers of a snapshot are missing");
            }
        }
        for (warm, _) in self.inner.store.list_warm().await? {
            let ground = self.ground(&warm.template).await?;
            let disk = &ground.layers.disk;
            let key = self.inner.host.warm_key(&shape_of_warm(&warm), disk).await;
            // Of a template that is gone, there is none.
            let is_current = key.is_ok_and(|key| key == warm.key);
            if !is_current || !self.has(&warm.layers).await? {
                info!(template = warm.template, "a warm snapshot is out of date");
                self.inner.store.remove_warm(&warm.key).await?;
            }
        }
        let held = self.inner.store.held_layers().await?;
        self.inner
            .host
            .retain(&held)
            .await
            .map_err(RecoverError::Host)
    }

    /// What has become of a sandbox that was live when the daemon ended; `None` if nothing has.
    async fn settle(&self, sandbox: &Sandbox) -> Result<Option<Transition>, RecoverError> {
        if sandbox.desired == Desired::Stopped {
            return Ok(Some(Transition::Stopped { reason: None }));
        }
        let failed = |reason: &str| {
            Some(Transition::Failed {
                reason: reason.to_owned(),
            })
        };
        Ok(match sandbox.status {
            Status::Pausing => {
                let next = sandbox.saving.clone().unwrap_or_default();
                if !next.is_empty() && self.has(&next).await? {
                    Some(Transition::Paused)
                } else {
                    failed("the daemon ended without notice while the sandbox was being paused")
                }
            }
            Status::Paused if !self.has(&sandbox.layers).await? => {
                failed("what was saved when it was paused is no longer on the host")
            }
            Status::Paused => None,
            Status::Off if !self.has(&sandbox.layers).await? => {
                failed("the disk that was kept of it is no longer on the host")
            }
            Status::Off => None,
            Status::Resuming => Some(Transition::NotResumed {
                reason: "the daemon ended without notice while the sandbox was being resumed"
                    .to_owned(),
            }),
            status => failed(&format!(
                "the daemon ended without notice while the sandbox was {status}"
            )),
        })
    }

    /// Whether the host has all of these layers.
    pub(super) async fn has(&self, layers: &Layers) -> Result<bool, RecoverError> {
        match self.inner.host.holds(layers).await {
            Ok(holds) => Ok(holds),
            Err(source) => {
                warn!(error = %chain(&source), "layers cannot be looked at");
                Err(RecoverError::Host(source))
            }
        }
    }
}
