//! Where scans are written down.

use std::time::Duration;

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

    /// The latest scans of anybody that have not ended; `limit` at most.
    ///
    /// # Errors
    /// The store failed.
    async fn under_way(&self, limit: u32) -> Result<Vec<Scan>, StoreError>;

    /// How many scans of this owner have not ended.
    ///
    /// # Errors
    /// The store failed.
    async fn count_under_way(&self, owner: Option<&UserId>) -> Result<u32, StoreError>;

    /// What those took that were completed of the latest `limit` of this owner and kind that have ended.
    ///
    /// # Errors
    /// The store failed.
    async fn latest_work(
        &self,
        owner: Option<&UserId>,
        kind: ScanKind,
        limit: u32,
    ) -> Result<Vec<Work>, StoreError>;
}

/// What a scan took.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Work {
    /// How many machines it was of.
    pub machines: u32,
    /// For how long it was at work.
    pub took: Duration,
}
