//! What a daemon finds at its start: the records of an earlier one, the sandboxes that it has left
//! running, and the layers that were saved.
//!
//! ```text
//!   record                        what is on the host             what becomes of it
//!   ──────                        ───────────────────             ──────────────────
//!   running                       a whole machine                 runs on, taken over
//!                                 another, or none                error, with the reason
//!   pausing                       all of the new layers           paused
//!                                 not, and a whole machine        runs on, taken over
//!                                 neither                         error, with the reason
//!   paused, off                   its layers                      as before
//!                                 not                             error, with the reason
//!   resuming                      whatever                        paused
//!   pending, stopping             whatever                        error, with the reason
//!   to be gone, none              whatever                        ended
//! ```
//!
//! Where this says error, one whose disk is kept is off. What was to happen has happened if it is all there, and has not otherwise.

use std::collections::HashMap;
use std::time::Duration;

use jiff::Timestamp;
use tracing::{error, info, warn};

use super::super::host::{AdoptRequest, Adopted, HostError};
use super::super::layer::Layers;
use super::super::sandbox::{Desired, Sandbox, Status, Transition};
use super::super::store::StoreError;
use super::super::timings::Start;
use super::Manager;
use super::create::{reason_of, request_for};
use super::reconcile::Divergence;
use crate::chain;

/// Why the records were not settled.
#[derive(Debug, thiserror::Error)]
pub enum RecoverError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The host cannot say what it holds, or cannot end or remove what nobody needs.
    #[error("what an earlier daemon has left on the host cannot be settled")]
    Host(#[source] HostError),
}

impl Manager {
    /// Settles the records of an earlier daemon, takes over the sandboxes that it has left running,
    /// ends whatever else it has left, and removes layers that nobody holds.
    ///
    /// # Errors
    /// The store or the host failed.
    pub async fn recover(&self) -> Result<(), RecoverError> {
        let live = self.inner.store.list_live().await?;
        let mut requests = Vec::new();
        for sandbox in &live {
            if self.may_run_on(sandbox).await? {
                requests.push(adopt_request(sandbox));
            }
        }
        let adopted = self.inner.host.adopt(requests).await;
        let mut adopted: HashMap<_, _> = adopted.map_err(RecoverError::Host)?.into_iter().collect();
        for sandbox in &live {
            let found = adopted.remove(&sandbox.id);
            let divergence = found_at_start(sandbox, found.as_ref());
            if let Some(transition) = self.settle(sandbox, found).await? {
                if let Some(divergence) = divergence {
                    self.inner.reconciler.healed(&sandbox.id, divergence);
                }
                self.record(&sandbox.id, transition).await?;
            }
        }
        for sandbox in self.inner.store.list_live().await? {
            self.open_forwards(&sandbox).await;
            if sandbox.status == Status::Running {
                self.watch_since(&sandbox, idle_for(&sandbox));
                self.keep_again(&sandbox).await?;
            }
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
            let template = &warm.model.shape.template;
            let ground = self.ground(template).await?;
            let disk = &ground.layers.disk;
            let key = self.inner.host.warm_key(&warm.model, disk).await;
            // Of a template that is gone, there is none.
            let is_current = key.is_ok_and(|key| key == warm.key);
            if !is_current || !self.has(&warm.layers).await? {
                info!(template, "a warm snapshot is out of date");
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

    /// Keeps the disk that a sandbox writes to now, if it is one whose disk is kept: the earlier daemon may
    /// have ended after the sandbox was given another one.
    async fn keep_again(&self, sandbox: &Sandbox) -> Result<(), StoreError> {
        if !sandbox.is_kept {
            return Ok(());
        }
        if let Err(source) = self.keep_root(&sandbox.id).await {
            error!(sandbox = %sandbox.id, error = %chain(&source),
                "the disk of the sandbox is not kept; it is ended");
            if let Err(source) = self.inner.host.destroy(&sandbox.id).await {
                error!(sandbox = %sandbox.id, error = %chain(&source), "sandbox is left");
            }
            let reason = chain(&source);
            self.record(&sandbox.id, Transition::Failed { reason })
                .await?;
        }
        Ok(())
    }

    /// Whether a sandbox that was live when the daemon ended runs on, if it is whole.
    async fn may_run_on(&self, sandbox: &Sandbox) -> Result<bool, RecoverError> {
        Ok(match (sandbox.desired, sandbox.status) {
            (Desired::Stopped, _) => false,
            (_, Status::Running) => true,
            (_, Status::Pausing) => !self.is_saved(sandbox).await?,
            _ => false,
        })
    }

    /// Whether all of what a sandbox was to be saved to is there.
    pub(super) async fn is_saved(&self, sandbox: &Sandbox) -> Result<bool, RecoverError> {
        match &sandbox.saving {
            Some(next) if !next.is_empty() => self.has(next).await,
            _ => Ok(false),
        }
    }

    /// What has become of a sandbox that was live when the daemon ended; `None` if nothing has.
    /// `found` is what came of taking it over, if that was tried.
    async fn settle(
        &self,
        sandbox: &Sandbox,
        found: Option<Result<Adopted, HostError>>,
    ) -> Result<Option<Transition>, RecoverError> {
        if sandbox.desired == Desired::Stopped {
            return Ok(Some(Transition::Stopped { reason: None }));
        }
        let failed = |reason: String| Some(Transition::Failed { reason });
        let lost = |reason: &str| {
            let reason = reason.to_owned();
            Some(Transition::Lost { reason })
        };
        Ok(match (sandbox.status, found) {
            (Status::Running, Some(Ok(Adopted { layers }))) => {
                (layers != sandbox.layers).then_some(Transition::Based(layers))
            }
            (Status::Pausing, Some(Ok(Adopted { layers }))) => Some(Transition::NotPaused(layers)),
            (Status::Running | Status::Pausing, Some(Err(source))) => {
                failed(not_adopted(sandbox, &source))
            }
            (Status::Pausing, None) => Some(Transition::Paused),
            (Status::Paused, _) if !self.has(&sandbox.layers).await? => {
                lost("what was saved when it was paused is no longer on the host")
            }
            (Status::Paused, _) => None,
            (Status::Off, _) if !self.has(&sandbox.layers).await? => {
                lost("the disk that was kept of it is no longer on the host")
            }
            (Status::Off, _) => None,
            (Status::Resuming, _) => Some(Transition::NotResumed {
                reason: "the daemon ended without notice while the sandbox was being resumed"
                    .to_owned(),
            }),
            (status, _) => failed(format!(
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

fn adopt_request(sandbox: &Sandbox) -> AdoptRequest {
    let request = request_for(sandbox, Start::Resume);
    AdoptRequest {
        id: request.id,
        shape: request.shape,
        layers: request.layers,
        nic: request.nic,
        disk_mb: request.disk_mb,
    }
}

/// Why a sandbox does not run on, as a sentence.
fn not_adopted(sandbox: &Sandbox, source: &HostError) -> String {
    let doing = match sandbox.status {
        Status::Pausing => "the daemon ended without notice while the sandbox was being paused",
        _ => "the daemon ended without notice while the sandbox was running",
    };
    match source {
        HostError::NotRunning { .. } => format!("{doing}, and its vmm has ended since"),
        other => format!(
            "{doing}, and it could not be taken over: {}",
            reason_of(other)
        ),
    }
}

/// How the record of a sandbox disagrees with what was found, if it is settled by a change.
fn found_at_start(
    sandbox: &Sandbox,
    found: Option<&Result<Adopted, HostError>>,
) -> Option<Divergence> {
    match (sandbox.desired, sandbox.status, found) {
        (Desired::Stopped, ..) => Some(Divergence::HalfDeleted),
        (_, Status::Running, Some(Err(_))) => Some(Divergence::NoProcess),
        // That it was saved and goes on is written down a moment later.
        (_, Status::Running, _) => None,
        (_, Status::Paused | Status::Off, _) => Some(Divergence::NoLayers),
        _ => Some(Divergence::HalfDone),
    }
}

/// For how long a sandbox that runs has not been used.
pub(super) fn idle_for(sandbox: &Sandbox) -> Duration {
    let since = sandbox.last_active_at.unwrap_or(sandbox.created_at);
    // A clock that was set back since says nothing.
    Timestamp::now()
        .duration_since(since)
        .try_into()
        .unwrap_or_default()
}
