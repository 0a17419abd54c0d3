//! What is told of sandboxes to people: those that are gone, and consoles.

use super::super::error::ExecError;
use super::super::sandbox::{Sandbox, Status};
use super::super::store::StoreError;
use super::Manager;

/// The most sandboxes of a list that has gone ones in it.
const MAX_LATEST: u32 = 1000;

impl Manager {
    /// The latest sandboxes, whatever became of them, newest first: a thousand at most.
    ///
    /// # Errors
    /// The store failed.
    pub async fn list_latest(&self) -> Result<Vec<Sandbox>, StoreError> {
        let mut sandboxes = self.inner.store.list_latest(MAX_LATEST).await?;
        sandboxes.retain(|sandbox| self.principal.may_see(sandbox.owner.as_ref()));
        Ok(sandboxes)
    }

    /// What a sandbox that runs has written to its console, as text; the end of it, if it is much.
    /// That somebody looks keeps no sandbox from being idle.
    ///
    /// # Errors
    /// It does not run, or its console cannot be read.
    pub async fn console(&self, id: &str) -> Result<String, ExecError> {
        let sandbox = self.get(id).await?;
        match sandbox.status {
            Status::Running => self
                .inner
                .host
                .console(&sandbox.id)
                .await
                .map_err(ExecError::Host),
            _ => Err(ExecError::NotRunning(sandbox.standing())),
        }
    }
}
