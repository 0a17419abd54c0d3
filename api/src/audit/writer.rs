//! What writes: one task at a time, as long as there is something to write, on a thread that may
//! block.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use jiff::Timestamp;
use rusqlite::{Connection, OptionalExtension, params};
use serde_json::json;
use tokio::sync::{Semaphore, oneshot};
use tracing::error;

use super::chain::{CUT_OFF, hash};
use super::head::{self, Head, HeadFile, Told};
use super::{AuditError, Entry, frameworks, head_failed};
use crate::chain;

/// How many records may wait; who has one more waits to wait.
const MAX_WAITING: usize = 1024;
/// How many are written together.
const MAX_TOGETHER: usize = 256;

type Waiting = (Entry, oneshot::Sender<Result<(), AuditError>>);

/// Takes records.
#[derive(Clone)]
pub struct Writer {
    turns: Arc<Semaphore>,
    file: Arc<AuditFile>,
}

struct AuditFile {
    path: PathBuf,
    waiting: Mutex<Queue>,
    /// Whether what was to be written last is not.
    has_failed: AtomicBool,
    /// Held by the task that writes.
    open: Mutex<Open>,
}

struct Open {
    connection: Connection,
    head: Head,
    head_file: HeadFile,
}

#[derive(Default)]
struct Queue {
    waiting: Vec<Waiting>,
    /// A task writes, and will look into the queue again.
    is_written: bool,
}

impl Writer {
    /// Opens the file.
    pub fn start(path: &Path) -> Result<Self, AuditError> {
        let file = AuditFile {
            path: path.to_owned(),
            waiting: Mutex::default(),
            has_failed: AtomicBool::new(false),
            open: Mutex::new(open(path)?),
        };
        Ok(Self {
            turns: Arc::new(Semaphore::new(MAX_WAITING)),
            file: Arc::new(file),
        })
    }

    /// Whether what was to be written last is not on the disk.
    pub fn has_failed(&self) -> bool {
        self.file.has_failed.load(Ordering::Relaxed)
    }

    /// Writes a record; it is on the disk when this returns.
    pub async fn write(&self, entry: Entry) -> Result<(), AuditError> {
        let _turn = self.turns.acquire().await.map_err(|_| AuditError::Ended)?;
        let (done, written) = oneshot::channel();
        let is_written = {
            let mut queue = self.file.queue();
            queue.waiting.push((entry, done));
            std::mem::replace(&mut queue.is_written, true)
        };
        if !is_written {
            let file = Arc::clone(&self.file);
            tokio::task::spawn_blocking(move || file.write_all());
        }
        written.await.map_err(|_| AuditError::Ended)?
    }
}

impl AuditFile {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes what waits, until nothing does.
    fn write_all(&self) {
        loop {
            let together: Vec<_> = {
                let mut queue = self.queue();
                let count = queue.waiting.len().min(MAX_TOGETHER);
                if count == 0 {
                    queue.is_written = false;
                    return;
                }
                queue.waiting.drain(..count).collect()
            };
            let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
            let is_written = write(&mut open, together, &self.path);
            self.has_failed.store(!is_written, Ordering::Relaxed);
        }
    }
}

/// Opens the log and what says how far it went. If it does not go that far, a record says so from here on.
fn open(path: &Path) -> Result<Open, AuditError> {
    let failed = |source| AuditError::File {
        path: path.to_owned(),
        source,
    };
    let told = head::read(path).map_err(|source| head_failed(path, source))?;
    let (mut connection, mut head) = open_log(path).map_err(failed)?;
    if let Some(cut_off) = cut_off(&connection, head, told).map_err(failed)? {
        error!(details = %cut_off.details, "the audit log was cut off at its end");
        head = insert(&mut connection, head, &[cut_off]).map_err(failed)?;
    }
    let head_file = HeadFile::create(path, head).map_err(|source| head_failed(path, source))?;
    Ok(Open {
        connection,
        head,
        head_file,
    })
}

/// What is to be on record if the log does not go as far as it went.
fn cut_off(connection: &Connection, head: Head, told: Told) -> rusqlite::Result<Option<Entry>> {
    let went_to = match told {
        // A new log has none, nor has one that was written before there were such files.
        Told::Nothing => return Ok(None),
        Told::Head(went) => {
            let hash = connection.query_row(
                "SELECT hash FROM records WHERE seq = ?1",
                [went.seq.cast_signed()],
                |row| row.get::<_, [u8; 32]>(0),
            );
            if went == Head::start() || hash.optional()? == Some(went.hash) {
                return Ok(None);
            }
            Some(went.seq)
        }
        Told::Garbage => None,
    };
    let outcome = "failure";
    Ok(Some(Entry {
        time: Timestamp::now(),
        action_type: CUT_OFF.to_owned(),
        resource_type: "service".to_owned(),
        resource_id: None,
        user_id: "daemon".to_owned(),
        source_ip: None,
        outcome: outcome.to_owned(),
        details: json!({"records": head.seq, "went_to": went_to}),
        frameworks: frameworks(CUT_OFF, "service", outcome)
            .iter()
            .map(|name| (*name).to_owned())
            .collect(),
    }))
}

fn open_log(path: &Path) -> rusqlite::Result<(Connection, Head)> {
    let connection = crate::store::open_file(path)?;
    connection.execute_batch(
        "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;
         CREATE TABLE IF NOT EXISTS records (
             seq            INTEGER PRIMARY KEY, -- 1, 2, 3, …
             time           INTEGER NOT NULL,    -- microseconds since 1970, UTC
             action_type    TEXT NOT NULL,
             resource_type  TEXT NOT NULL,
             resource_id    TEXT,
             user_id        TEXT NOT NULL,
             source_ip      TEXT,
             outcome        TEXT NOT NULL,
             details        TEXT NOT NULL,       -- JSON
             frameworks     TEXT NOT NULL,       -- JSON
             hash           BLOB NOT NULL
         ) STRICT;
         CREATE INDEX IF NOT EXISTS times ON records (time);
         CREATE TRIGGER IF NOT EXISTS no_update BEFORE UPDATE ON records
             BEGIN SELECT RAISE (ABORT, 'audit records do not change'); END;
         CREATE TRIGGER IF NOT EXISTS no_delete BEFORE DELETE ON records
             BEGIN SELECT RAISE (ABORT, 'audit records do not go away'); END;",
    )?;
    let last = connection
        .query_row(
            "SELECT seq, hash FROM records ORDER BY seq DESC LIMIT 1",
            [],
            |row| Ok((row.get::<_, i64>(0)?, row.get(1)?)),
        )
        .optional()?;
    let head = last.map_or(Head::start(), |(seq, hash)| Head {
        seq: seq.cast_unsigned(),
        hash,
    });
    Ok((connection, head))
}

/// Returns whether they are on the disk.
fn write(open: &mut Open, together: Vec<Waiting>, path: &Path) -> bool {
    let (entries, waiting): (Vec<_>, Vec<_>) = together.into_iter().unzip();
    let result = insert(&mut open.connection, open.head, &entries);
    let is_written = result.is_ok();
    match result {
        Ok(next) => {
            open.head = next;
            if let Err(source) = open.head_file.write(next) {
                // It tells of an earlier record then, which is as true.
                error!(error = chain(&source), "audit.head is not written");
            }
            for done in waiting {
                // Who has gone away needs no answer.
                let _ = done.send(Ok(()));
            }
        }
        Err(source) => {
            error!(error = %source, "audit records are not written");
            let text = source.to_string();
            for done in waiting {
                let source = rusqlite::Error::ToSqlConversionFailure(text.clone().into());
                let path = path.to_owned();
                let _ = done.send(Err(AuditError::File { path, source }));
            }
        }
    }
    is_written
}

fn insert(
    connection: &mut Connection,
    mut head: Head,
    entries: &[Entry],
) -> rusqlite::Result<Head> {
    let transaction = connection.transaction()?;
    {
        let mut statement = transaction.prepare_cached(
            "INSERT INTO records VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11)",
        )?;
        for entry in entries {
            head.seq += 1;
            head.hash = hash(&head.hash, head.seq, entry);
            let frameworks = serde_json::Value::from(entry.frameworks.clone());
            statement.execute(params![
                head.seq.cast_signed(),
                entry.time.as_microsecond(),
                entry.action_type,
                entry.resource_type,
                entry.resource_id,
                entry.user_id,
                entry.source_ip,
                entry.outcome,
                entry.details.to_string(),
                frameworks.to_string(),
                head.hash,
            ])?;
        }
    }
    transaction.commit()?;
    Ok(head)
}
