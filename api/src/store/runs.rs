//! The records of when sandboxes ran, which follow those of the sandboxes themselves.

use jiff::{Span, Timestamp};
use rusqlite::{Connection, OptionalExtension, Transaction, params};

use super::time;
use crate::domain::{KEPT_DAYS, Run, Sandbox, Status, UserId};

/// Notes that a sandbox runs, or runs no longer, or has another size, in the transaction that changes
/// its record.
pub fn follow(transaction: &Transaction<'_>, sandbox: &Sandbox) -> rusqlite::Result<()> {
    let known = transaction
        .prepare_cached("SELECT vcpus, memory_mb FROM runs WHERE sandbox = ?1 AND ended IS NULL")?
        .query_row([sandbox.id.as_str()], |row| Ok((row.get(0)?, row.get(1)?)))
        .optional()?;
    // A guest that is shutting down runs until it is off, which may take it an hour.
    let runs = matches!(sandbox.status, Status::Running | Status::Stopping);
    let now = runs.then_some((sandbox.spec.vcpus, sandbox.spec.memory_mb));
    if known == now {
        return Ok(());
    }
    let at = sandbox.updated_at;
    if known.is_some() {
        transaction
            .prepare_cached(
                "UPDATE runs SET ended = max(began, ?2) WHERE sandbox = ?1 AND ended IS NULL",
            )?
            .execute(params![sandbox.id.as_str(), at.as_microsecond()])?;
    }
    if let Some((vcpus, memory_mb)) = now {
        transaction
            .prepare_cached(
                "INSERT INTO runs (sandbox, owner, began, vcpus, memory_mb) \
                 VALUES (?1, ?2, ?3, ?4, ?5)",
            )?
            .execute(params![
                sandbox.id.as_str(),
                sandbox.owner.as_ref().map(UserId::as_str),
                at.as_microsecond(),
                vcpus,
                memory_mb,
            ])?;
        // As long ago as nobody can ask for.
        let kept = Span::new().hours(24 * (KEPT_DAYS + 1));
        let oldest = at.checked_sub(kept).unwrap_or(Timestamp::MIN);
        transaction
            .prepare_cached("DELETE FROM runs WHERE ended < ?1")?
            .execute([oldest.as_microsecond()])?;
    }
    Ok(())
}

/// What ran at `since` or later: of this owner, or all.
pub fn since(
    connection: &Connection,
    owner: Option<&UserId>,
    since: Timestamp,
) -> rusqlite::Result<Vec<Run>> {
    connection
        .prepare_cached(
            "SELECT began, ended, vcpus, memory_mb FROM runs \
             WHERE (ended > ?1 OR ended IS NULL) AND (?2 IS NULL OR owner = ?2) \
             ORDER BY began, rowid",
        )?
        .query_map(
            params![since.as_microsecond(), owner.map(UserId::as_str)],
            |row| {
                let ended: Option<i64> = row.get(1)?;
                Ok(Run {
                    began: time(0, row.get(0)?)?,
                    ended: ended.map(|ended| time(1, ended)).transpose()?,
                    vcpus: row.get(2)?,
                    memory_mb: row.get(3)?,
                })
            },
        )?
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::SqliteStore;
    use super::*;
    use crate::domain::{Layers, SandboxId, Spec, Store};

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn sandbox(owner: Option<UserId>) -> Sandbox {
        let spec = Spec {
            template: "minimal".into(),
            vcpus: 2,
            memory_mb: 512,
            timeout_sec: 300,
            network: None,
            disk_mb: None,
            resources: Default::default(),
        };
        let mut sandbox = Sandbox::new(SandboxId::random(), spec, Layers::default(), at(1));
        sandbox.owner = owner;
        sandbox
    }

    fn run(began: i64, ended: Option<i64>, vcpus: u8) -> Run {
        Run {
            began: at(began),
            ended: ended.map(at),
            vcpus,
            memory_mb: 512,
        }
    }

    #[tokio::test]
    async fn runs_follow_the_records_of_sandboxes() {
        let dir = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(&dir.path().join("db")).unwrap();
        let owner = UserId::random();
        let mut sandbox = sandbox(Some(owner.clone()));
        assert!(store.insert(&sandbox).await.unwrap());
        for (second, status, vcpus) in [
            (10, Status::Running, 2),
            // What changes nothing of it.
            (15, Status::Running, 2),
            (20, Status::Running, 4),
            (30, Status::Pausing, 4),
            (40, Status::Paused, 4),
            // The clock is set back.
            (25, Status::Running, 4),
            (5, Status::Stopped, 4),
            (50, Status::Running, 1),
        ] {
            sandbox.status = status;
            sandbox.spec.vcpus = vcpus;
            sandbox.updated_at = at(second);
            store.update(&sandbox).await.unwrap();
        }
        let all = [
            run(10, Some(20), 2),
            run(20, Some(30), 4),
            run(25, Some(25), 4),
            run(50, None, 1),
        ];
        assert_eq!(store.runs(None, at(0)).await.unwrap(), all);
        assert_eq!(store.runs(Some(&owner), at(20)).await.unwrap(), all[1..]);
        assert_eq!(store.runs(None, at(1000)).await.unwrap(), all[3..]);
        let other = UserId::random();
        assert_eq!(store.runs(Some(&other), at(0)).await.unwrap(), []);

        // Those of long ago are forgotten when another begins.
        sandbox.status = Status::Paused;
        sandbox.updated_at = at(60);
        store.update(&sandbox).await.unwrap();
        let later = 60 + (KEPT_DAYS + 2) * 24 * 3600;
        sandbox.status = Status::Running;
        sandbox.updated_at = at(later);
        store.update(&sandbox).await.unwrap();
        assert_eq!(
            store.runs(None, at(0)).await.unwrap(),
            [run(later, None, 1)]
        );
    }
}
