//! The records of scans.

use async_trait::async_trait;
use rusqlite::{OptionalExtension, Row, params};

use super::{SqliteStore, bad};
use crate::domain::{StoreError, UserId};
use crate::scan::{MAX_KEPT, Scan, ScanFilter, ScanId, ScanKind, ScanStatus, ScanStore};

#[async_trait]
impl ScanStore for SqliteStore {
    async fn insert_scan(&self, scan: &Scan) -> Result<bool, StoreError> {
        let (scan, record) = (scan.clone(), json(scan)?);
        self.with(move |connection| {
            let transaction = connection.transaction()?;
            let owner = scan.owner.as_ref().map(UserId::as_str);
            let inserted = transaction.execute(
                "INSERT INTO scans (id, owner, kind, is_under_way, record) \
                 VALUES (?1, ?2, ?3, ?4, ?5) ON CONFLICT (id) DO NOTHING",
                params![
                    scan.id.as_str(),
                    owner,
                    scan.kind.as_str(),
                    scan.status == ScanStatus::Started,
                    record,
                ],
            )?;
            transaction.execute(
                "DELETE FROM scans WHERE owner IS ?1 AND NOT is_under_way AND rowid NOT IN \
                 (SELECT rowid FROM scans WHERE owner IS ?1 ORDER BY rowid DESC LIMIT ?2)",
                params![owner, MAX_KEPT],
            )?;
            transaction.commit()?;
            Ok(inserted == 1)
        })
        .await
    }

    async fn update_scan(&self, scan: &Scan) -> Result<(), StoreError> {
        let (id, record) = (scan.id.clone(), json(scan)?);
        let is_under_way = scan.status == ScanStatus::Started;
        self.with(move |connection| {
            let updated = connection.execute(
                "UPDATE scans SET record = ?2, is_under_way = ?3 WHERE id = ?1",
                params![id.as_str(), record, is_under_way],
            )?;
            match updated {
                1 => Ok(()),
                _ => Err(rusqlite::Error::QueryReturnedNoRows),
            }
        })
        .await
    }

    async fn scan(&self, id: &ScanId) -> Result<Option<Scan>, StoreError> {
        let id = id.clone();
        self.with(move |connection| {
            connection
                .prepare_cached("SELECT record FROM scans WHERE id = ?1")?
                .query_row([id.as_str()], read)
                .optional()
        })
        .await
    }

    async fn scans(&self, filter: &ScanFilter) -> Result<Vec<Scan>, StoreError> {
        let filter = filter.clone();
        self.with(move |connection| {
            connection
                .prepare_cached(
                    "SELECT record FROM scans WHERE (?1 IS NULL OR owner = ?1) \
                     AND (?2 IS NULL OR kind = ?2) AND (?3 IS NULL OR is_under_way = ?3) \
                     ORDER BY rowid DESC LIMIT ?4",
                )?
                .query_map(
                    params![
                        filter.owner.as_ref().map(UserId::as_str),
                        filter.kind.map(ScanKind::as_str),
                        filter.is_under_way,
                        filter.limit,
                    ],
                    read,
                )?
                .collect()
        })
        .await
    }
}

fn json(scan: &Scan) -> Result<String, StoreError> {
    serde_json::to_string(scan).map_err(|error| StoreError(Box::new(error)))
}

fn read(row: &Row<'_>) -> rusqlite::Result<Scan> {
    let record: String = row.get(0)?;
    serde_json::from_str(&record).map_err(|error| bad(0, error.into()))
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::*;

    fn scan(owner: Option<&UserId>, status: ScanStatus) -> Scan {
        let now = Timestamp::from_second(1).unwrap();
        Scan {
            id: ScanId::random(),
            owner: owner.cloned(),
            kind: ScanKind::Configuration,
            target: "all".into(),
            machines: 1,
            frameworks: Vec::new(),
            status,
            reason: None,
            started_at: now,
            estimated_completion: now,
            completed_at: None,
            results: None,
        }
    }

    #[tokio::test]
    async fn scans_are_kept_the_oldest_of_too_many_go() {
        let dir = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(&dir.path().join("db")).unwrap();
        let user = UserId::random();
        let running = scan(Some(&user), ScanStatus::Started);
        let oldest = scan(Some(&user), ScanStatus::Completed);
        let anothers = scan(None, ScanStatus::Completed);
        for scan in [&running, &oldest, &anothers] {
            assert!(store.insert_scan(scan).await.unwrap());
        }
        assert!(!store.insert_scan(&oldest).await.unwrap());
        for _ in 0..MAX_KEPT {
            let next = scan(Some(&user), ScanStatus::Completed);
            assert!(store.insert_scan(&next).await.unwrap());
        }
        assert_eq!(store.scan(&oldest.id).await.unwrap(), None);
        assert_eq!(store.scan(&anothers.id).await.unwrap(), Some(anothers));
        let under_way = ScanFilter {
            is_under_way: Some(true),
            limit: 9,
            ..ScanFilter::default()
        };
        let left = store.scans(&under_way).await.unwrap();
        assert_eq!(left, std::slice::from_ref(&running));
        let mut ended = running;
        ended.status = ScanStatus::Failed;
        store.update_scan(&ended).await.unwrap();
        assert_eq!(store.scans(&under_way).await.unwrap(), []);
        assert_eq!(store.scan(&ended.id).await.unwrap(), Some(ended));
        assert!(store.update_scan(&oldest).await.is_err());
    }
}
