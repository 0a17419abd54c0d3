//! Where sandboxes, snapshots and templates are written down.

use std::collections::BTreeSet;
use std::error::Error;
use std::net::Ipv4Addr;

use async_trait::async_trait;
use jiff::Timestamp;

use super::id::{KeyId, LayerId, SandboxId, SnapshotId, TemplateId, UserId};
use super::network::Subnet;
use super::quota::Quota;
use super::runs::Run;
use super::sandbox::{Sandbox, Status};
use super::snapshot::{Snapshot, WarmSnapshot};
use super::template::Template;

/// The records of all sandboxes, gone ones included, of all snapshots, and of all templates. What was written
/// survives a crash of the daemon, and of the machine where a layer depends on it.
///
/// Each record holds the layers that it names. Changes of a record tell which layers nobody holds
/// any more.
#[async_trait]
pub trait Store: Send + Sync {
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

    /// The sandboxes of that name that are not deleted, newest first: one of each owner at most.
    ///
    /// # Errors
    /// The store failed.
    async fn find(&self, name: &str) -> Result<Vec<Sandbox>, StoreError>;

    /// The sandboxes of a page of the list of those that are not deleted, and how many there are on all
    /// pages of it.
    ///
    /// # Errors
    /// The store failed.
    async fn page(&self, page: &Page) -> Result<(Vec<Sandbox>, u64), StoreError>;

    /// How many sandboxes there are of this user, or of everybody.
    ///
    /// # Errors
    /// The store failed.
    async fn totals(&self, owner: Option<&UserId>) -> Result<Totals, StoreError>;

    /// Replaces the record of a sandbox that is there. Returns the layers that it was the last to
    /// hold.
    ///
    /// # Errors
    /// The store failed; the record is as it was.
    async fn update(&self, sandbox: &Sandbox) -> Result<Vec<LayerId>, StoreError>;

    /// What sandboxes ran at `since` or later, deleted ones included: of this owner, or all. Records of
    /// sandboxes that are inserted or updated tell it.
    ///
    /// # Errors
    /// The store failed.
    async fn runs(&self, owner: Option<&UserId>, since: Timestamp) -> Result<Vec<Run>, StoreError>;

    /// The quota of an API key; `None` if there is no such key any more.
    ///
    /// # Errors
    /// The store failed.
    async fn quota_of_key(&self, key: &KeyId) -> Result<Option<Quota>, StoreError>;

    /// The sandboxes that are neither stopped nor in error, newest first.
    ///
    /// # Errors
    /// The store failed.
    async fn list_live(&self) -> Result<Vec<Sandbox>, StoreError>;

    /// All sandboxes, gone ones included, newest first and at most `limit`.
    ///
    /// # Errors
    /// The store failed.
    async fn list_latest(&self, limit: u32) -> Result<Vec<Sandbox>, StoreError>;

    /// The addresses that sandboxes have which are neither stopped nor in error, and the one that was
    /// given last.
    ///
    /// # Errors
    /// The store failed.
    async fn taken_addresses(&self, subnet: Subnet) -> Result<TakenAddresses, StoreError>;

    /// Adds a snapshot; `false` if its id or name is taken.
    ///
    /// # Errors
    /// The store failed; nothing is added.
    async fn insert_snapshot(&self, snapshot: &Snapshot) -> Result<bool, StoreError>;

    /// Replaces the record of a snapshot that is there. Returns the layers that it was the last to
    /// hold.
    ///
    /// # Errors
    /// The store failed; the record is as it was.
    async fn update_snapshot(&self, snapshot: &Snapshot) -> Result<Vec<LayerId>, StoreError>;

    /// Gives a snapshot that is there its name and content, and in the same step removes the one of
    /// that name and owner, if there is one. Returns the layers that this was the last to hold.
    ///
    /// # Errors
    /// The store failed; both are as they were.
    async fn rename_snapshot(&self, snapshot: &Snapshot) -> Result<Vec<LayerId>, StoreError>;

    /// The snapshot of that id.
    ///
    /// # Errors
    /// The store failed.
    async fn get_snapshot(&self, id: &SnapshotId) -> Result<Option<Snapshot>, StoreError>;

    /// The snapshots of that name; each owner may have one.
    ///
    /// # Errors
    /// The store failed.
    async fn find_snapshot(&self, name: &str) -> Result<Vec<Snapshot>, StoreError>;

    /// All snapshots, newest first.
    ///
    /// # Errors
    /// The store failed.
    async fn list_snapshots(&self) -> Result<Vec<Snapshot>, StoreError>;

    /// Removes a snapshot, if it is there. Returns the layers that it was the last to hold.
    ///
    /// # Errors
    /// The store failed; it is as it was.
    async fn remove_snapshot(&self, id: &SnapshotId) -> Result<Vec<LayerId>, StoreError>;

    /// Adds a warm snapshot, or replaces the one of the same key. Returns the layers that the old
    /// one was the last to hold.
    ///
    /// # Errors
    /// The store failed; it is as it was.
    async fn put_warm(&self, warm: &WarmSnapshot) -> Result<Vec<LayerId>, StoreError>;

    /// All warm snapshots, least recently used first, each with whether others hold layers of it.
    ///
    /// # Errors
    /// The store failed.
    async fn list_warm(&self) -> Result<Vec<(WarmSnapshot, bool)>, StoreError>;

    /// Removes a warm snapshot, if it is there. Returns the layers that it was the last to hold.
    ///
    /// # Errors
    /// The store failed; it is as it was.
    async fn remove_warm(&self, key: &str) -> Result<Vec<LayerId>, StoreError>;

    /// Adds a template; `false` if its id or name is taken.
    ///
    /// # Errors
    /// The store failed; nothing is added.
    async fn insert_template(&self, template: &Template) -> Result<bool, StoreError>;

    /// Replaces the record of a template. Returns the layers that it was the last to hold; `None` if
    /// it is not there.
    ///
    /// # Errors
    /// The store failed; the record is as it was.
    async fn update_template(
        &self,
        template: &Template,
    ) -> Result<Option<Vec<LayerId>>, StoreError>;

    /// The template of that name.
    ///
    /// # Errors
    /// The store failed.
    async fn find_template(&self, name: &str) -> Result<Option<Template>, StoreError>;

    /// All templates, by name.
    ///
    /// # Errors
    /// The store failed.
    async fn list_templates(&self) -> Result<Vec<Template>, StoreError>;

    /// Removes a template, if it is there. Returns the layers that it was the last to hold.
    ///
    /// # Errors
    /// The store failed; it is as it was.
    async fn remove_template(&self, id: &TemplateId) -> Result<Vec<LayerId>, StoreError>;

    /// All layers that are held.
    ///
    /// # Errors
    /// The store failed.
    async fn held_layers(&self) -> Result<BTreeSet<LayerId>, StoreError>;
}

/// Which sandboxes of a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    /// Only those of this user; `None` for everybody's.
    pub owner: Option<UserId>,
    /// Only those in one of these states; `None` for all that are not deleted.
    pub statuses: Option<Vec<Status>>,
    /// Only those that were started, or were not, ever.
    pub was_started: Option<bool>,
    /// What they are sorted by.
    pub sort: SortBy,
    /// Whether the greatest comes first.
    pub is_descending: bool,
    /// How many, at most.
    pub limit: u32,
    /// How many come before.
    pub offset: u64,
}

/// Sandboxes, counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Totals {
    /// How many are not deleted.
    pub all: u64,
    /// How many of them run.
    pub running: u64,
    /// vCPUs of those that run.
    pub vcpus: u64,
    /// Memory of those that run, in MiB.
    pub memory_mb: u64,
}

/// What a list is sorted by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SortBy {
    /// When they were asked for.
    CreatedAt,
    /// Their names, or ids where they have none.
    Name,
    /// Their states' words.
    Status,
    /// Virtual CPUs.
    Vcpus,
    /// RAM.
    MemoryMb,
}

/// Addresses that sandboxes have.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TakenAddresses {
    /// All of them.
    pub all: BTreeSet<Ipv4Addr>,
    /// The one of the subnet that was given last, whether its sandbox is still there or not.
    pub last: Option<Ipv4Addr>,
}

/// The store failed.
#[derive(Debug, thiserror::Error)]
#[error("the sandbox store failed")]
pub struct StoreError(#[source] pub Box<dyn Error + Send + Sync>);
