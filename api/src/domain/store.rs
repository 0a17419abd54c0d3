//! Where sandboxes are written down.

use std::error::Error;

use async_trait::async_trait;

use super::sandbox::{Sandbox, SandboxId};

/// The records of all sandboxes, gone ones included. What was written survives a crash of the
/// daemon.
#[async_trait]
pub trait SandboxStore: Send + Sync {
    /// Adds a sandbox; `false` if its id is taken.
    ///
    /// # Errors
    /// The store failed; nothing is added.
    async fn insert(&self, sandbox: &Sandbox) -> Result<bool, StoreError>;

    /// The sandbox of that id.
    ///
    /// # Errors
    /// The store failed.
    async fn get(&self, id: &SandboxId) -> Result<Option<Sandbox>, StoreError>;

    /// Replaces the record of a sandbox that is there.
    ///
    /// # Errors
    /// The store failed; the record is as it was.
    async fn update(&self, sandbox: &Sandbox) -> Result<(), StoreError>;

    /// The sandboxes that are pending or running, newest first.
    ///
    /// # Errors
    /// The store failed.
    async fn list_live(&self) -> Result<Vec<Sandbox>, StoreError>;
}

/// The store failed.
#[derive(Debug, thiserror::Error)]
#[error("the sandbox store failed")]
pub struct StoreError(#[source] pub Box<dyn Error + Send + Sync>);
