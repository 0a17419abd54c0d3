//! What is written down of sandboxes, one transition after the other.

use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use jiff::Timestamp;
use tokio::sync::MutexGuard;
use tracing::{debug, error, info, warn};

use super::super::error::StartRefused;
use super::super::host::{End, HostEvent};
use super::super::id::{LayerId, SandboxId};
use super::super::sandbox::{Sandbox, Status, Transition};
use super::super::store::StoreError;
use super::Manager;
use crate::chain;

impl Manager {
    /// Writes down what happens on the host, until it tells no more.
    pub async fn follow(&self, mut events: BoxStream<'static, HostEvent>) {
        while let Some(event) = events.next().await {
            let (id, end) = match event {
                HostEvent::Ended { id, end } => (id, end),
                HostEvent::Lost { id } => {
                    warn!(sandbox = %id, "a ready machine has ended");
                    self.inner.pool.lost(&id);
                    continue;
                }
            };
            let transition = match end {
                End::Orderly { reason } => Transition::Stopped {
                    reason: Some(reason),
                },
                End::Failed { reason } => Transition::Failed { reason },
            };
            if let Err(source) = self.record(&id, transition).await {
                error!(sandbox = %id, error = %chain(&source), "end of sandbox not recorded");
            }
        }
    }

    pub(super) async fn used(&self, id: &SandboxId) {
        if let Err(source) = self.record(id, Transition::Used).await {
            warn!(sandbox = %id, error = %chain(&source), "use of sandbox not recorded");
        }
    }

    /// Makes a transition and writes it down. One that is no longer possible, for something else
    /// came first, leaves the record as it is. Returns the record, if there is one.
    pub(super) async fn record(
        &self,
        id: &SandboxId,
        transition: Transition,
    ) -> Result<Option<Sandbox>, StoreError> {
        let records = self.inner.records.lock().await;
        self.record_locked(id, transition, records).await
    }

    /// The same of one that is to start again, if the quota allows it.
    pub(super) async fn record_start(
        &self,
        id: &SandboxId,
        transition: Transition,
    ) -> Result<Option<Sandbox>, StartRefused> {
        let records = self.inner.records.lock().await;
        if let Some(sandbox) = self.inner.store.get(id).await? {
            self.check_quota_of(&sandbox).await?;
        }
        Ok(self.record_locked(id, transition, records).await?)
    }

    pub(super) async fn record_locked(
        &self,
        id: &SandboxId,
        transition: Transition,
        records: MutexGuard<'_, ()>,
    ) -> Result<Option<Sandbox>, StoreError> {
        let Some(mut sandbox) = self.inner.store.get(id).await? else {
            return Ok(None);
        };
        let earlier = sandbox.clone();
        let released = match sandbox.apply(transition, Timestamp::now()) {
            Ok(()) => {
                let released = self.inner.store.update(&sandbox).await?;
                self.tell_changes(&earlier, &sandbox);
                released
            }
            Err(late) => {
                debug!(sandbox = %id, "{late}");
                Vec::new()
            }
        };
        drop(records);
        let before = earlier.status;
        if sandbox.status != before {
            self.watch(&sandbox);
            if let Some(observer) = self.inner.observer.get() {
                observer.changed(before, &sandbox);
            }
            match (sandbox.status, &sandbox.status_reason) {
                (Status::Error, reason) => warn!(sandbox = %id, from = %before,
                    reason = reason.as_deref(), "sandbox is in error"),
                (status, reason) => info!(sandbox = %id, from = %before, to = %status,
                    reason = reason.as_deref(), "sandbox changed state"),
            }
        }
        if sandbox.forwards.is_empty() && !earlier.forwards.is_empty() {
            let forwards: Vec<_> = earlier.forwards.iter().map(|kept| kept.forward).collect();
            self.inner.host.close_forwards(id, &forwards).await;
        }
        self.discard(&released).await;
        Ok(Some(sandbox))
    }

    /// Removes layers that nobody holds any more. One that stays is removed at the next start.
    pub(super) async fn discard(&self, layers: &[LayerId]) {
        if layers.is_empty() {
            return;
        }
        if let Err(source) = self.inner.host.discard(layers).await {
            error!(error = %chain(&source), "layers are left");
        }
    }
}
