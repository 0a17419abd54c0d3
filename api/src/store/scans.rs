//! The records of scans.

use std::time::Duration;

use async_trait::async_trait;
use rusqlite::{OptionalExtension, Row, params};

use super::{SqliteStore, bad};
use crate::domain::{StoreError, UserId};
use crate::scan::{MAX_KEPT, Scan, ScanId, ScanKind, ScanStatus, ScanStore, Work};

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

    async fn under_way(&self, limit: u32) -> Result<Vec<Scan>, StoreError> {
        self.with(move |connection| {
            connection
                .prepare_cached(
                    "SELECT record FROM scans WHERE is_under_way ORDER BY rowid DESC LIMIT ?1",
                )?
                .query_map([limit], read)?
                .collect()
        })
        .await
    }

    async fn count_under_way(&self, owner: Option<&UserId>) -> Result<u32, StoreError> {
        let owner = owner.cloned();
        self.with(move |connection| {
            connection
                .prepare_cached("SELECT count(*) FROM scans WHERE owner IS ?1 AND is_under_way")?
                .query_row([owner.as_ref().map(UserId::as_str)], |row| row.get(0))
        })
        .await
    }

    async fn latest_work(
        &self,
        owner: Option<&UserId>,
        kind: ScanKind,
        limit: u32,
    ) -> Result<Vec<Work>, StoreError> {
        let owner = owner.cloned();
        self.with(move |connection| {
            let owner = owner.as_ref().map(UserId::as_str);
            connection
                .prepare_cached(
                    "SELECT machines, work_ms FROM \
                     (SELECT record ->> 'machines' AS machines, record ->> 'work_ms' AS work_ms \
                     FROM scans WHERE owner IS ?1 AND kind = ?2 AND NOT is_under_way \
                     ORDER BY rowid DESC LIMIT ?3) WHERE work_ms IS NOT NULL",
                )?
                .query_map(params![owner, kind.as_str(), limit], |row| {
                    Ok(Work {
                        machines: row.get(0)?,
                        took: Duration::from_millis(row.get::<_, u32>(1)?.into()),
                    })
                })?
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
            work_ms: None,
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
        let left = store.under_way(9).await.unwrap();
        assert_eq!(left, std::slice::from_ref(&running));
        let mut ended = running;
        ended.status = ScanStatus::Failed;
        store.update_scan(&ended).await.unwrap();
        assert_eq!(store.under_way(9).await.unwrap(), []);
        assert_eq!(store.scan(&ended.id).await.unwrap(), Some(ended));
        assert!(store.update_scan(&oldest).await.is_err());
    }

    #[tokio::test]
    async fn what_is_under_way_is_counted_by_owner_whatever_others_have() {
        let dir = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(&dir.path().join("db")).unwrap();
        let users = [UserId::random(), UserId::random()];
        let [one, other] = users.each_ref().map(Some);
        for (owner, status, count) in [
            (one, ScanStatus::Started, 3),
            (one, ScanStatus::Completed, 1),
            (None, ScanStatus::Started, 2),
            (other, ScanStatus::Started, MAX_KEPT + 1),
        ] {
            for _ in 0..count {
                assert!(store.insert_scan(&scan(owner, status)).await.unwrap());
            }
        }
        assert_eq!(store.count_under_way(one).await.unwrap(), 3);
        assert_eq!(store.count_under_way(None).await.unwrap(), 2);
        assert_eq!(store.count_under_way(other).await.unwrap(), MAX_KEPT + 1);
        assert_eq!(store.under_way(9).await.unwrap().len(), 9);
    }

    #[tokio::test]
    async fn work_is_that_of_the_owners_latest_scans() {
        let dir = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(&dir.path().join("db")).unwrap();
        let (user, other) = (UserId::random(), UserId::random());
        let add = async |owner, work_ms, change: fn(&mut Scan)| {
            let mut scan = scan(owner, ScanStatus::Completed);
            scan.work_ms = work_ms;
            change(&mut scan);
            assert!(store.insert_scan(&scan).await.unwrap());
        };
        let one = Some(&user);
        add(one, Some(9000), |_| {}).await;
        add(one, Some(100), |scan| scan.machines = 7).await;
        add(one, None, |scan| scan.status = ScanStatus::Cancelled).await;
        add(one, Some(200), |_| {}).await;
        add(one, Some(300), |scan| scan.kind = ScanKind::Compliance).await;
        add(None, Some(400), |_| {}).await;
        add(Some(&other), Some(500), |_| {}).await;
        add(one, None, |scan| scan.status = ScanStatus::Started).await;
        let work = async |owner| {
            store
                .latest_work(owner, ScanKind::Configuration, 3)
                .await
                .unwrap()
        };
        let took = |machines, ms| Work {
            machines,
            took: Duration::from_millis(ms),
        };
        assert_eq!(work(one).await, [took(1, 200), took(7, 100)]);
        assert_eq!(work(None).await, [took(1, 400)]);
    }
}
