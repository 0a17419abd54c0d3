//! What happens to sandboxes is told.

use std::time::Instant;

use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use jiff::Timestamp;
use tracing::warn;

use super::super::error::LookupError;
use super::super::events::{Change, Event, Events, Named, Subject, Subscription, changes};
use super::super::host::{ExecEvent, HostError};
use super::super::id::UserId;
use super::super::sandbox::{Sandbox, Status};
use super::super::snapshot::Snapshot;
use super::{InUse, Manager};
use crate::chain;

impl Manager {
    /// What happens from now on to all sandboxes that the principal may see.
    pub fn subscribe(&self) -> Subscription {
        let principal = self.principal.as_ref().clone();
        self.inner.events.subscribe(principal, None)
    }

    /// What happens from now on to one sandbox, until it is deleted; and as what it is known now.
    ///
    /// # Errors
    /// There is none, or it is deleted.
    pub async fn subscribe_to(&self, id: &str) -> Result<(Sandbox, Subscription), LookupError> {
        let id = self.get(id).await?.id;
        let principal = self.principal.as_ref().clone();
        let subscription = self.inner.events.subscribe(principal, Some(id.clone()));
        // Looked at again, so that its end is not missed in between.
        match self.get(id.as_str()).await? {
            sandbox if sandbox.status == Status::Stopped => Err(LookupError::NotFound),
            sandbox => Ok((sandbox, subscription)),
        }
    }

    /// Tells what happened to a sandbox.
    pub(super) fn tell(&self, subject: impl Into<Subject>, change: Change) {
        tell(&self.inner.events, subject.into(), change);
    }

    /// Tells what became of a record. The caller holds the lock of the records, so that the order is
    /// theirs.
    pub(super) fn tell_changes(&self, before: &Sandbox, after: &Sandbox) {
        for change in changes(before, after) {
            self.tell(after, change);
        }
    }

    /// Tells what happened to a snapshot, whose sandbox may be gone.
    pub(super) async fn tell_of(&self, snapshot: &Snapshot, change: Change) {
        let found = self.inner.store.get(&snapshot.sandbox).await;
        let name = match found {
            Ok(sandbox) => sandbox.and_then(|sandbox| sandbox.name),
            Err(source) => {
                warn!(sandbox = %snapshot.sandbox, error = %chain(&source),
                    "told without the name of its sandbox");
                None
            }
        };
        let subject = Subject {
            sandbox: Some(Named {
                id: snapshot.sandbox.clone(),
                name,
            }),
            owner: snapshot.owner.clone(),
        };
        self.tell(subject, change);
    }

    /// Tells that a scan of `owner` has ended, of one sandbox or of all.
    pub fn tell_scan_ended(
        &self,
        of: Option<&Sandbox>,
        owner: Option<UserId>,
        id: String,
        target: String,
        status: &'static str,
    ) {
        let sandbox = of.map(Named::from);
        let change = Change::ScanEnded { id, target, status };
        self.tell(Subject { sandbox, owner }, change);
    }

    /// The same events of a command; once they are dropped, its end is told.
    pub(super) fn telling(
        &self,
        in_use: &InUse,
        events: BoxStream<'static, Result<ExecEvent, HostError>>,
    ) -> BoxStream<'static, Result<ExecEvent, HostError>> {
        let mut command = Followed {
            events: self.inner.events.clone(),
            subject: (&in_use.sandbox).into(),
            start: Instant::now(),
            exit_code: None,
        };
        let events = events.inspect(move |event| command.see(event));
        events.boxed()
    }
}

/// A command whose end is told when this is dropped.
struct Followed {
    events: Events,
    subject: Subject,
    start: Instant,
    exit_code: Option<i32>,
}

impl Followed {
    fn see(&mut self, event: &Result<ExecEvent, HostError>) {
        if let Ok(ExecEvent::Exited(exit)) = event
            && !exit.timed_out
        {
            self.exit_code = Some(exit.code);
        }
    }
}

impl Drop for Followed {
    fn drop(&mut self) {
        let change = Change::CommandExecuted {
            exit_code: self.exit_code,
            duration: self.start.elapsed(),
        };
        tell(&self.events, self.subject.clone(), change);
    }
}

fn tell(events: &Events, subject: Subject, change: Change) {
    events.tell(Event {
        at: Timestamp::now(),
        subject,
        change,
    });
}
