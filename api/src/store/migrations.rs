//! How the tables came to be what they are.
//!
//! Each step is applied once, in order, in a transaction of its own together with the new
//! `user_version`, which counts the steps that were applied.

use rusqlite::Connection;

/// The steps. Applied ones are never changed; new ones are added at the end.
const STEPS: &[&str] = &["
    CREATE TABLE sandboxes (
        id             TEXT PRIMARY KEY,
        template       TEXT NOT NULL,
        vcpus          INTEGER NOT NULL,
        memory_mb      INTEGER NOT NULL,
        timeout_sec    INTEGER NOT NULL,
        desired        TEXT NOT NULL CHECK (desired IN ('running', 'stopped')),
        status         TEXT NOT NULL CHECK (status IN ('pending', 'running', 'stopped', 'error')),
        status_reason  TEXT,
        created_at     INTEGER NOT NULL, -- this and the other times: microseconds since 1970, UTC
        started_at     INTEGER,
        last_active_at INTEGER,
        updated_at     INTEGER NOT NULL,
        timings        TEXT              -- JSON, durations in microseconds
    ) STRICT;
    CREATE INDEX live_sandboxes ON sandboxes (created_at)
        WHERE status IN ('pending', 'running');
"];

/// Why the tables are not what this version needs.
#[derive(Debug, thiserror::Error)]
pub enum MigrateError {
    /// A later version has been here.
    #[error(
        "its version is {found}, and this program knows versions up to {known}: use the program \
         that wrote it, or another data_dir"
    )]
    TooNew {
        /// Version of the tables.
        found: u32,
        /// The latest version that this program knows.
        known: u32,
    },
    /// A step failed; the tables are as they were before it.
    #[error("step {step} failed")]
    Step {
        /// Which, from 1.
        step: u32,
        /// What SQLite says.
        #[source]
        source: rusqlite::Error,
    },
    /// The version cannot be read.
    #[error("its version cannot be read")]
    Version(#[source] rusqlite::Error),
}

/// Applies the steps that are missing.
pub fn run(connection: &mut Connection) -> Result<(), MigrateError> {
    run_steps(connection, STEPS)
}

fn run_steps(connection: &mut Connection, steps: &[&str]) -> Result<(), MigrateError> {
    let found: u32 = connection
        .pragma_query_value(None, "user_version", |row| row.get(0))
        .map_err(MigrateError::Version)?;
    let mut known = 0;
    for sql in steps {
        known += 1;
        if known <= found {
            continue;
        }
        let failed = |source| MigrateError::Step {
            step: known,
            source,
        };
        let transaction = connection.transaction().map_err(failed)?;
        transaction.execute_batch(sql).map_err(failed)?;
        transaction
            .pragma_update(None, "user_version", known)
            .map_err(failed)?;
        transaction.commit().map_err(failed)?;
    }
    if found > known {
        return Err(MigrateError::TooNew { found, known });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(connection: &Connection) -> u32 {
        connection
            .pragma_query_value(None, "user_version", |row| row.get(0))
            .unwrap()
    }

    #[test]
    fn steps_are_applied_once_and_in_order() {
        let mut connection = Connection::open_in_memory().unwrap();
        let steps = ["CREATE TABLE a (x)", "INSERT INTO a VALUES (1)"];
        run_steps(&mut connection, &steps[..1]).unwrap();
        assert_eq!(version(&connection), 1);
        for _ in 0..2 {
            run_steps(&mut connection, &steps).unwrap();
            assert_eq!(version(&connection), 2);
        }
        let rows: u32 = connection
            .query_row("SELECT count(*) FROM a", [], |row| row.get(0))
            .unwrap();
        assert_eq!(rows, 1);
    }

    #[test]
    fn a_step_that_fails_leaves_nothing_behind() {
        let mut connection = Connection::open_in_memory().unwrap();
        let steps = [
            "CREATE TABLE a (x)",
            "CREATE TABLE b (x); CREATE TABLE a (x)",
        ];
        let error = run_steps(&mut connection, &steps).unwrap_err();
        assert!(matches!(error, MigrateError::Step { step: 2, .. }));
        assert_eq!(version(&connection), 1);
        run_steps(&mut connection, &["", "CREATE TABLE b (x)"]).unwrap();
    }

    #[test]
    fn a_later_version_is_not_touched() {
        let mut connection = Connection::open_in_memory().unwrap();
        run(&mut connection).unwrap();
        connection
            .pragma_update(None, "user_version", 1000)
            .unwrap();
        assert!(matches!(
            run(&mut connection),
            Err(MigrateError::TooNew { found: 1000, .. })
        ));
    }
}
