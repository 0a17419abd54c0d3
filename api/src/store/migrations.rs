//! How the tables came to be what they are.
//!
//! Each step is applied once, in order, in a transaction of its own together with the new
//! `user_version`, which counts the steps that were applied.

use rusqlite::Connection;

/// The steps. Applied ones are never changed; new ones are added at the end.
const STEPS: &[&str] = &[
    "
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
",
    "
    -- A CHECK cannot be changed in place.
    CREATE TABLE new_sandboxes (
        id             TEXT PRIMARY KEY,
        template       TEXT NOT NULL,
        vcpus          INTEGER NOT NULL,
        memory_mb      INTEGER NOT NULL,
        timeout_sec    INTEGER NOT NULL,
        desired        TEXT NOT NULL CHECK (desired IN ('running', 'paused', 'stopped')),
        status         TEXT NOT NULL CHECK (status IN ('pending', 'running', 'pausing', 'paused',
                                                       'resuming', 'stopped', 'error')),
        status_reason  TEXT,
        created_at     INTEGER NOT NULL,
        started_at     INTEGER,
        last_active_at INTEGER,
        updated_at     INTEGER NOT NULL,
        timings        TEXT,
        layers         TEXT NOT NULL DEFAULT '{}', -- JSON: ids of the layers that it is based on
        saving         TEXT                        -- JSON: of those that it is being saved to
    ) STRICT;
    INSERT INTO new_sandboxes (id, template, vcpus, memory_mb, timeout_sec, desired, status,
                               status_reason, created_at, started_at, last_active_at, updated_at,
                               timings)
        SELECT id, template, vcpus, memory_mb, timeout_sec, desired, status, status_reason,
               created_at, started_at, last_active_at, updated_at, timings
        FROM sandboxes ORDER BY rowid;
    DROP TABLE sandboxes;
    ALTER TABLE new_sandboxes RENAME TO sandboxes;
    CREATE INDEX live_sandboxes ON sandboxes (created_at)
        WHERE status NOT IN ('stopped', 'error');
    CREATE TABLE snapshots (
        id             TEXT PRIMARY KEY,
        name           TEXT UNIQUE,
        description    TEXT,
        sandbox        TEXT NOT NULL,
        template       TEXT NOT NULL,
        vcpus          INTEGER NOT NULL,
        memory_mb      INTEGER NOT NULL,
        timeout_sec    INTEGER NOT NULL,
        layers         TEXT NOT NULL,
        content        TEXT,             -- JSON: size and checksum; NULL while it is being taken
        created_at     INTEGER NOT NULL
    ) STRICT;
    CREATE TABLE warm_snapshots (
        key            TEXT PRIMARY KEY,
        template       TEXT NOT NULL,
        vcpus          INTEGER NOT NULL,
        memory_mb      INTEGER NOT NULL,
        layers         TEXT NOT NULL,
        size_bytes     INTEGER NOT NULL,
        used_at        INTEGER NOT NULL
    ) STRICT;
    -- Who holds which layer: the number of a layer's rows is its reference count.
    CREATE TABLE layer_refs (
        holder         TEXT NOT NULL, -- id of a sandbox or snapshot, or `warm:` and a key
        layer          TEXT NOT NULL,
        PRIMARY KEY (holder, layer)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX holders ON layer_refs (layer);
",
    "
    ALTER TABLE sandboxes ADD COLUMN network TEXT;  -- JSON: how it is connected; NULL: not at all
    ALTER TABLE sandboxes ADD COLUMN address TEXT;
    ALTER TABLE sandboxes ADD COLUMN forwards TEXT NOT NULL DEFAULT '[]'; -- JSON
    CREATE UNIQUE INDEX addresses ON sandboxes (address)
        WHERE address IS NOT NULL AND status NOT IN ('stopped', 'error');
    ALTER TABLE snapshots ADD COLUMN network TEXT;
",
    "
    CREATE TABLE templates (
        id             TEXT PRIMARY KEY,
        name           TEXT NOT NULL UNIQUE,
        source         TEXT NOT NULL,    -- this and those below: JSON
        status         TEXT NOT NULL,
        settings       TEXT NOT NULL,
        layers         TEXT NOT NULL,
        content        TEXT,             -- NULL unless it is ready
        created_at     INTEGER NOT NULL
    ) STRICT;
",
    "
    -- The states are the program's to check: a CHECK cannot be changed in place.
    CREATE TABLE new_sandboxes (
        id             TEXT PRIMARY KEY,
        template       TEXT NOT NULL,
        vcpus          INTEGER NOT NULL,
        memory_mb      INTEGER NOT NULL,
        timeout_sec    INTEGER NOT NULL,
        desired        TEXT NOT NULL,
        status         TEXT NOT NULL,
        status_reason  TEXT,
        created_at     INTEGER NOT NULL,
        started_at     INTEGER,
        last_active_at INTEGER,
        updated_at     INTEGER NOT NULL,
        timings        TEXT,
        layers         TEXT NOT NULL,
        saving         TEXT,
        network        TEXT,
        address        TEXT,
        forwards       TEXT NOT NULL DEFAULT '[]',
        name           TEXT,
        stopped_at     INTEGER,
        is_kept        INTEGER NOT NULL DEFAULT 0,
        kept           TEXT,             -- JSON: ids of the layers that it is based on once it is off
        disk_mb        INTEGER
    ) STRICT;
    INSERT INTO new_sandboxes (id, template, vcpus, memory_mb, timeout_sec, desired, status,
                               status_reason, created_at, started_at, last_active_at, updated_at,
                               timings, layers, saving, network, address, forwards)
        SELECT id, template, vcpus, memory_mb, timeout_sec, desired, status, status_reason,
               created_at, started_at, last_active_at, updated_at, timings, layers, saving, network,
               address, forwards
        FROM sandboxes ORDER BY rowid;
    DROP TABLE sandboxes;
    ALTER TABLE new_sandboxes RENAME TO sandboxes;
    CREATE INDEX live_sandboxes ON sandboxes (created_at)
        WHERE status NOT IN ('stopped', 'error');
    CREATE UNIQUE INDEX addresses ON sandboxes (address)
        WHERE address IS NOT NULL AND status NOT IN ('stopped', 'error');
    CREATE UNIQUE INDEX names ON sandboxes (name) WHERE name IS NOT NULL AND status <> 'stopped';
    ALTER TABLE snapshots ADD COLUMN disk_mb INTEGER;
    ALTER TABLE snapshots ADD COLUMN status TEXT NOT NULL DEFAULT 'running'; -- its sandbox's
",
    "
    CREATE TABLE users (
        id             TEXT PRIMARY KEY,
        name           TEXT NOT NULL UNIQUE COLLATE NOCASE,
        role           TEXT NOT NULL CHECK (role IN ('user', 'admin')),
        password       TEXT NOT NULL,    -- hash, with its algorithm and salt (PHC string)
        created_at     INTEGER NOT NULL
    ) STRICT;
    CREATE TABLE api_keys (
        id             TEXT PRIMARY KEY,
        hash           BLOB NOT NULL UNIQUE, -- SHA-256 of the key
        name           TEXT NOT NULL,
        prefix         TEXT NOT NULL,
        account        TEXT REFERENCES users (id), -- whom it acts for; NULL: the local principal
        created_at     INTEGER NOT NULL,
        last_used_at   INTEGER
    ) STRICT;
    -- Id of the user whose it is; NULL: the local principal's.
    ALTER TABLE sandboxes ADD COLUMN owner TEXT;
    ALTER TABLE snapshots ADD COLUMN owner TEXT;
    ALTER TABLE templates ADD COLUMN owner TEXT;
",
    "
    -- Whose name it is, nobody else can tell.
    DROP INDEX names;
    CREATE UNIQUE INDEX names ON sandboxes (name, coalesce(owner, ''))
        WHERE name IS NOT NULL AND status <> 'stopped';
",
    "
    -- So are names of snapshots.
    CREATE TABLE new_snapshots (
        id             TEXT PRIMARY KEY,
        name           TEXT,
        description    TEXT,
        sandbox        TEXT NOT NULL,
        template       TEXT NOT NULL,
        vcpus          INTEGER NOT NULL,
        memory_mb      INTEGER NOT NULL,
        timeout_sec    INTEGER NOT NULL,
        layers         TEXT NOT NULL,
        content        TEXT,
        created_at     INTEGER NOT NULL,
        network        TEXT,
        disk_mb        INTEGER,
        status         TEXT NOT NULL,
        owner          TEXT
    ) STRICT;
    INSERT INTO new_snapshots SELECT id, name, description, sandbox, template, vcpus, memory_mb,
               timeout_sec, layers, content, created_at, network, disk_mb, status, owner
        FROM snapshots ORDER BY rowid;
    DROP TABLE snapshots;
    ALTER TABLE new_snapshots RENAME TO snapshots;
    CREATE UNIQUE INDEX snapshot_names ON snapshots (coalesce(owner, ''), name)
        WHERE name IS NOT NULL;
",
    "
    ALTER TABLE sandboxes ADD COLUMN api_key TEXT;
    ALTER TABLE api_keys ADD COLUMN quota TEXT NOT NULL DEFAULT '{}'; -- JSON
",
    // The snapshot that a sandbox was made from.
    "ALTER TABLE sandboxes ADD COLUMN snapshot TEXT;",
    "
    CREATE TABLE scans (
        id             TEXT PRIMARY KEY,
        owner          TEXT,             -- id of the user who asked for it; NULL: the local principal
        kind           TEXT NOT NULL,
        is_under_way   INTEGER NOT NULL,
        record         TEXT NOT NULL     -- JSON
    ) STRICT;
    CREATE INDEX scans_under_way ON scans (is_under_way);
",
    "
    ALTER TABLE sandboxes ADD COLUMN resources TEXT NOT NULL DEFAULT '{}'; -- JSON: limits, and the machine
    ALTER TABLE snapshots ADD COLUMN resources TEXT NOT NULL DEFAULT '{}';
",
    "
    CREATE TABLE runs (
        sandbox        TEXT NOT NULL,
        owner          TEXT,             -- of the sandbox
        began          INTEGER NOT NULL,
        ended          INTEGER,          -- NULL: it runs
        vcpus          INTEGER NOT NULL,
        memory_mb      INTEGER NOT NULL
    ) STRICT;
    CREATE INDEX run_ends ON runs (ended);
    CREATE UNIQUE INDEX open_runs ON runs (sandbox) WHERE ended IS NULL;
    INSERT INTO runs SELECT id, owner, coalesce(started_at, updated_at), NULL, vcpus, memory_mb
        FROM sandboxes WHERE status = 'running';
",
    "
    ALTER TABLE warm_snapshots ADD COLUMN booted TEXT; -- JSON; NULL: its machines cannot change
",
];

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
    fn records_of_the_first_version_are_kept() {
        let mut connection = Connection::open_in_memory().unwrap();
        run_steps(&mut connection, &STEPS[..1]).unwrap();
        connection
            .execute_batch(
                "INSERT INTO sandboxes VALUES ('sb-00000001', 'minimal', 1, 512, 300, 'stopped', \
                 'error', 'why', 1, 2, 3, 4, '{}')",
            )
            .unwrap();
        run(&mut connection).unwrap();
        let kept: (String, String, i64, String) = connection
            .query_row(
                "SELECT id, status_reason, updated_at, layers FROM sandboxes",
                [],
                |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?)),
            )
            .unwrap();
        assert_eq!(kept, ("sb-00000001".into(), "why".into(), 4, "{}".into()));
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
