//! Pause and resume.

use tracing::{Instrument, error, info};

use super::super::error::{CreateError, LookupError, PauseError, ResumeError};
use super::super::host::{HostError, SaveRequest};
use super::super::id::{LayerId, SandboxId};
use super::super::layer::MAX_DISK;
use super::super::sandbox::{Sandbox, Status, Transition};
use super::super::store::StoreError;
use super::super::timings::Start;
use super::Manager;
use super::create::{reason_of, request_for};
use crate::chain;

impl Manager {
    /// Saves a sandbox and ends its processes. It goes on if the caller goes away. Commands that
    /// run in it end with [`HostError::Paused`].
    ///
    /// # Errors
    /// It is in another state, or was not saved and runs on.
    pub async fn pause(&self, id: &str) -> Result<Sandbox, PauseError> {
        let id = self.get(id).await?.id;
        let manager = self.clone();
        tokio::spawn(async move { manager.pause_known(&id).await }.in_current_span())
            .await
            .unwrap_or(Err(PauseError::Interrupted))
    }

    async fn pause_known(&self, id: &SandboxId) -> Result<Sandbox, PauseError> {
        let store = |source: StoreError| PauseError::Lookup(source.into());
        let _turn = self.inner.turns.take(id).await;
        let sandbox = self.get(id.as_str()).await?;
        if sandbox.status != Status::Running {
            return Err(PauseError::NotRunning(sandbox.status));
        }
        if sandbox.layers.disk.len() >= MAX_DISK {
            return Err(PauseError::TooManyLayers(sandbox.layers.disk.len()));
        }
        let mut layers = sandbox.layers;
        let request = SaveRequest {
            id: id.clone(),
            keep: layers.kept_memory(),
            layers: layers.saved(LayerId::random(), LayerId::random()),
            include_memory: true,
        };
        let pausing = self.record(id, Transition::Pausing(request.layers.clone()));
        match pausing.await.map_err(store)? {
            Some(sandbox) if sandbox.status == Status::Pausing => {}
            // It ended in the meantime.
            Some(sandbox) => return Err(PauseError::NotRunning(sandbox.status)),
            None => return Err(LookupError::NotFound.into()),
        }
        match self.inner.host.pause(request).await {
            Ok(saved) => {
                info!(sandbox = %id, new_bytes = saved.new_bytes, stall_us = saved.timings.stall_us,
                    "sandbox is paused");
                match self.record(id, Transition::Paused).await.map_err(store)? {
                    Some(sandbox) => {
                        self.merge_in_background(&sandbox.layers);
                        Ok(sandbox)
                    }
                    None => Err(LookupError::NotFound.into()),
                }
            }
            Err(source) => {
                if let HostError::NotSaved { keep, .. } = &source {
                    layers.memory.truncate(*keep);
                    self.record(id, Transition::NotPaused(layers))
                        .await
                        .map_err(store)?;
                }
                // Otherwise it has ended, and whoever ended it, or the host's event, says why.
                Err(PauseError::Host(source))
            }
        }
    }

    /// Starts a sandbox from what was saved, and waits until its agent has answered. It goes on if
    /// the caller goes away.
    ///
    /// # Errors
    /// It is in another state, or is paused as before.
    pub async fn resume(&self, id: &str) -> Result<Sandbox, ResumeError> {
        let id = self.get(id).await?.id;
        let manager = self.clone();
        tokio::spawn(async move { manager.resume_known(&id).await }.in_current_span())
            .await
            .unwrap_or(Err(ResumeError::Interrupted))
    }

    async fn resume_known(&self, id: &SandboxId) -> Result<Sandbox, ResumeError> {
        let store = |source: StoreError| ResumeError::Lookup(source.into());
        let _starting = self.inner.pool.starting();
        let _turn = self.inner.turns.take(id).await;
        let status = self.get(id.as_str()).await?.status;
        if status != Status::Paused {
            return Err(ResumeError::NotPaused(status));
        }
        if self.is_closing() {
            return Err(ResumeError::ShuttingDown);
        }
        let sandbox = match self.record_start(id, Transition::Resuming).await? {
            Some(sandbox) if sandbox.status == Status::Resuming => sandbox,
            Some(sandbox) => return Err(ResumeError::NotPaused(sandbox.status)),
            None => return Err(LookupError::NotFound.into()),
        };
        let request = request_for(&sandbox, Start::Resume);
        match self.inner.host.create(request).await {
            Ok(created) => {
                self.open_forwards(&sandbox).await;
                let started = Transition::Started(created.timings);
                match self.started(id, started).await {
                    Ok(sandbox) => Ok(sandbox),
                    Err(CreateError::EndedAtOnce { id, reason }) => {
                        Err(ResumeError::EndedAtOnce { id, reason })
                    }
                    Err(CreateError::Store(source)) => Err(store(source)),
                    // Its disk cannot be kept, so that it was ended again.
                    Err(CreateError::Host { source, .. }) => self.not_resumed(id, source).await,
                    Err(other) => {
                        error!(sandbox = %id, error = %chain(&other), "resume not recorded");
                        Err(ResumeError::Interrupted)
                    }
                }
            }
            Err(source) => self.not_resumed(id, source).await,
        }
    }

    /// Writes down that a sandbox is paused as before.
    async fn not_resumed(&self, id: &SandboxId, source: HostError) -> Result<Sandbox, ResumeError> {
        let reason = reason_of(&source);
        let recorded = self.record(id, Transition::NotResumed { reason }).await;
        recorded.map_err(|source| ResumeError::Lookup(source.into()))?;
        Err(ResumeError::Host(source))
    }
}
