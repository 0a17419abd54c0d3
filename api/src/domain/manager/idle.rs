//! Sandboxes that nobody uses are set aside after their timeout.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;
use tokio::time::sleep_until;
use tracing::{Instrument, info, info_span, warn};

use super::super::error::ExecError;
use super::super::idle::{Begun, SettingAside, Using};
use super::super::sandbox::{Sandbox, Status};
use super::Manager;
use crate::chain;

/// How many sandboxes are set aside at the same time: a pause writes memory to the disk.
const AT_ONCE: usize = 4;

/// What becomes of a sandbox that was idle for as long as its timeout.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WhenIdle {
    /// It is paused.
    #[default]
    Pause,
    /// It is deleted.
    Delete,
}

/// A sandbox that runs and is in use, so that it is not set aside.
#[derive(Debug)]
pub struct InUse {
    /// Its record when the use began.
    pub sandbox: Sandbox,
    pub(super) using: Using,
}

impl Manager {
    /// The sandbox of that id, if it runs. One that is just being paused because it was idle is
    /// resumed: who uses it comes first.
    ///
    /// # Errors
    /// It does not run.
    pub async fn running(&self, id: &str) -> Result<InUse, ExecError> {
        let id = self.get(id).await?.id;
        loop {
            match self.inner.idle.begin(&id) {
                Begun::Using(using) => {
                    let sandbox = self.get(id.as_str()).await?;
                    return match sandbox.status {
                        Status::Running => Ok(InUse { sandbox, using }),
                        _ => Err(ExecError::NotRunning(sandbox.standing())),
                    };
                }
                Begun::BeingSetAside(done) => {
                    done.cancelled().await;
                    if let Err(source) = self.resume(id.as_str()).await {
                        // It was not paused, or stays so, which is found next.
                        info!(sandbox = %id, error = %chain(&source), "not resumed for its user");
                    }
                }
            }
        }
    }

    /// Sets aside what is idle for too long, until it is dropped.
    pub async fn set_aside_idle(&self) {
        let idle = &self.inner.idle;
        let mut under_way = JoinSet::new();
        loop {
            while under_way.len() < AT_ONCE
                && let Some(aside) = idle.set_aside()
            {
                let manager = self.clone();
                let span = info_span!("idle", sandbox = %aside.id());
                under_way.spawn(async move { manager.set_aside(&aside).await }.instrument(span));
            }
            let deadline = idle.next_deadline().filter(|_| under_way.len() < AT_ONCE);
            tokio::select! {
                Some(_) = under_way.join_next() => {}
                () = idle.changed() => {}
                () = async {
                    match deadline {
                        Some(deadline) => sleep_until(deadline).await,
                        None => std::future::pending().await,
                    }
                } => {}
            }
        }
    }

    /// Who cannot be set aside runs on, and is tried again after another timeout.
    async fn set_aside(&self, aside: &SettingAside) {
        let id = aside.id().as_str();
        info!("the sandbox was idle for as long as its timeout");
        let problem = match self.inner.limits.when_idle {
            WhenIdle::Pause => self.pause(id).await.err().map(|error| chain(&error)),
            WhenIdle::Delete => self.destroy(id).await.err().map(|error| chain(&error)),
        };
        if let Some(error) = problem {
            warn!(error, "the sandbox is idle and was not set aside");
        }
    }

    /// Follows whether a sandbox runs.
    pub(super) fn watch(&self, sandbox: &Sandbox) {
        self.watch_since(sandbox, Duration::ZERO);
    }

    /// The same of one that has not been used for this long.
    pub(super) fn watch_since(&self, sandbox: &Sandbox, idle_for: Duration) {
        match sandbox.status {
            Status::Running if sandbox.spec.timeout_sec > 0 => {
                let timeout = Duration::from_secs(sandbox.spec.timeout_sec.into());
                self.inner.idle.watch_since(&sandbox.id, timeout, idle_for);
            }
            Status::Paused | Status::Off | Status::Stopped | Status::Error => {
                self.inner.idle.forget(&sandbox.id);
            }
            Status::Pending
            | Status::Running
            | Status::Pausing
            | Status::Resuming
            | Status::Stopping => {}
        }
    }
}
