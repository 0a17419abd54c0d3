//! Where scans are written down.

use async_trait::async_trait;

use super::{Scan, ScanId, ScanKind};
use crate::domain::{StoreError, UserId};

/// How many scans of one user are kept; of more, the oldest go.
pub const MAX_KEPT: u32 = 200;

/// The records of scans.
#[async_trait]
pub trait ScanStore: Send + Sync {
    /// Adds a scan, and removes the oldest of its owner that are too many and have ended; `false` if its
    /// id is taken.
    ///
    /// # Errors
    /// The store failed; nothing is added.
    async fn insert_scan(&self, scan: &Scan) -> Result<bool, StoreError>;

    /// Replaces the record of a scan.
    ///
    /// # Errors
    /// The store failed; it is as it was.
    async fn update_scan(&self, scan: &Scan) -> Result<(), StoreError>;

    /// The scan of that id.
    ///
    /// # Errors
    /// The store failed.
    async fn scan(&self, id: &ScanId) -> Result<Option<Scan>, StoreError>;

    /// The latest scans, newest first.
    ///
    /// # Errors
    /// The store failed.
    async fn scans(&self, filter: &ScanFilter) -> Result<Vec<Scan>, StoreError>;
}

/// Which scans.
#[derive(Debug, Clone, Default)]
pub struct ScanFilter {
    /// Only of this user; `None` for everybody's.
    pub owner: Option<UserId>,
    /// Only of this kind.
    pub kind: Option<ScanKind>,
    /// Only those that have not ended, or have.
    pub is_under_way: Option<bool>,
    /// How many at most.
    pub limit: u32,
}
