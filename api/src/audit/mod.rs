//! What was done, by whom: an append-only record of every call that changes something and of every
//! event of accounts.
//!
//! Records are a chain: each has the SHA-256 of itself and of the hash before it, so that one that is
//! changed, removed or put in between shows. What is missing at the end shows by the file beside it that
//! says how far it went; see [`head`].
//!
//! Of refusals that anybody can cause without end, the first is a record, and the number of the others
//! another; see [`denials`].
//!
//! A record is on the disk before the answer of its call begins. One task writes; all that wait
//! while it writes are written together next, in one transaction. A call that is not answered, since its
//! caller hung up or the daemon ends, has a record that says so; see [`UnderWay`].

mod chain;
mod compliance;
mod denials;
mod head;
mod under_way;
mod writer;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use jiff::Timestamp;
use rusqlite::{Connection, OpenFlags, Row, params};
use serde_json::Value;
use tokio::task::JoinHandle;
use tokio_util::task::TaskTracker;

pub use chain::{Broken, Intact};
pub use compliance::frameworks;
use denials::Denials;
pub use under_way::{UNANSWERED, UnderWay};
use writer::Writer;

/// Name of the file in the data directory.
pub const FILE: &str = "audit.db";
/// The most records of one answer.
pub const MAX_LIMIT: u32 = 1000;

const COLUMNS: &str = "seq, time, action_type, resource_type, resource_id, user_id, source_ip, \
                       outcome, details, frameworks, hash";

/// What was done.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// When, in microseconds since 1970.
    pub time: Timestamp,
    /// What, as in `vm_create`.
    pub action_type: String,
    /// To what kind of thing, as in `vm`.
    pub resource_type: String,
    /// To which, if it was one.
    pub resource_id: Option<String>,
    /// By which user; `local` is whoever is on this machine, and `anonymous` is nobody known.
    pub user_id: String,
    /// From which address.
    pub source_ip: Option<String>,
    /// `success`, `denied` (no credentials, no right to it, or too much), `failure`, or [`UNANSWERED`].
    pub outcome: String,
    /// More of it. Never a secret, the content of a file, or the environment of a command.
    pub details: Value,
    /// For which frameworks it counts.
    pub frameworks: Vec<String>,
}

/// Which records.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// Not before.
    pub start: Option<Timestamp>,
    /// Not after.
    pub end: Option<Timestamp>,
    /// Only of this action.
    pub action_type: Option<String>,
    /// Only of this kind of thing.
    pub resource_type: Option<String>,
    /// Only by this user.
    pub user_id: Option<String>,
    /// How many at most.
    pub limit: u32,
    /// How many of the latest are left out.
    pub offset: u64,
}

/// Why there is no audit log.
#[derive(Debug, thiserror::Error)]
pub enum AuditError {
    /// The file cannot be opened, read or written.
    #[error("the audit log {path} cannot be used", path = path.display())]
    File {
        /// Where it is.
        path: PathBuf,
        /// What SQLite says.
        #[source]
        source: rusqlite::Error,
    },
    /// The file beside it cannot be read or written that says how far it went.
    #[error("{path}, which says how far the audit log went, cannot be used", path = path.display())]
    Head {
        /// Where it is.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// It is broken.
    #[error(transparent)]
    Broken(#[from] Broken),
    /// The writer has ended.
    #[error("the audit log is not written any more; the log of the daemon says why")]
    Ended,
}

/// The audit log; clones share it.
#[derive(Clone)]
pub struct AuditLog {
    path: Arc<PathBuf>,
    writer: Writer,
    denials: Denials,
    /// What is being written. It goes on if who wanted it written goes away.
    writes: TaskTracker,
    reader: Arc<Mutex<Connection>>,
}

impl AuditLog {
    /// The log in the file `path`, which is made if it is not there.
    ///
    /// # Errors
    /// The file is not usable.
    pub fn open(path: &Path) -> Result<Self, AuditError> {
        let failed = |source| AuditError::File {
            path: path.to_owned(),
            source,
        };
        let writer = Writer::start(path)?;
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let reader = Connection::open_with_flags(path, flags).map_err(failed)?;
        Ok(Self {
            path: Arc::new(path.to_owned()),
            writer,
            denials: Denials::default(),
            writes: TaskTracker::new(),
            reader: Arc::new(Mutex::new(reader)),
        })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes down what was done. When this returns it is on the disk; it will be there too if this does
    /// not return, since the caller went away.
    ///
    /// # Errors
    /// It is not.
    pub async fn record(&self, entry: Entry) -> Result<(), AuditError> {
        written(self.write(entry)).await
    }

    fn write(&self, entry: Entry) -> JoinHandle<Result<(), AuditError>> {
        let writer = self.writer.clone();
        self.writes.spawn(async move { writer.write(entry).await })
    }

    /// Whether it can be read, and what was to be written last is on the disk. The error is a sentence.
    ///
    /// # Errors
    /// It cannot, or is not.
    pub async fn check(&self) -> Result<(), String> {
        if self.writer.has_failed() {
            return Err(
                "the last records of the audit log were not written; the daemon's log says why"
                    .to_owned(),
            );
        }
        let reader = Arc::clone(&self.reader);
        let read = tokio::task::spawn_blocking(move || {
            let reader = reader.lock().unwrap_or_else(PoisonError::into_inner);
            reader.query_row("SELECT max(seq) FROM records", [], |_| Ok(()))
        });
        match read.await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(format!("the audit log cannot be read: {error}")),
            Err(_) => Err("the audit log cannot be read".to_owned()),
        }
    }

    /// Writes down a refusal that its caller can cause any number of times: the first of a kind from one
    /// source in a minute at once, the others together at the minute's end.
    ///
    /// # Errors
    /// It is not.
    pub async fn record_denied(&self, entry: Entry) -> Result<(), AuditError> {
        let (denials, writer) = (self.denials.clone(), self.writer.clone());
        let write = async move { denials.record(&writer, entry).await };
        written(self.writes.spawn(write)).await
    }

    /// Writes down how many refusals there were until now, and waits for what is being written.
    pub async fn flush(&self) {
        self.denials.flush(&self.writer).await;
        self.writes.close();
        self.writes.wait().await;
        self.writes.reopen();
    }

    /// The latest records of a filter, latest first, and how many there are in all.
    ///
    /// # Errors
    /// The file cannot be read.
    pub async fn list(&self, filter: Filter) -> Result<(Vec<Entry>, u64), AuditError> {
        let (reader, path) = (Arc::clone(&self.reader), Arc::clone(&self.path));
        let task = tokio::task::spawn_blocking(move || {
            let reader = reader.lock().unwrap_or_else(PoisonError::into_inner);
            read(&reader, &filter)
        });
        let read = task.await.map_err(|_| AuditError::Ended)?;
        read.map_err(|source| AuditError::File {
            path: path.as_ref().clone(),
            source,
        })
    }
}

async fn written(task: JoinHandle<Result<(), AuditError>>) -> Result<(), AuditError> {
    task.await.unwrap_or(Err(AuditError::Ended))
}

/// Checks the chain of the log in the file `path`, which a daemon may be writing to.
///
/// # Errors
/// It is broken, or cannot be read.
pub fn verify(path: &Path) -> Result<Intact, AuditError> {
    let failed = |source| AuditError::File {
        path: path.to_owned(),
        source,
    };
    // First, for the log may go on meanwhile.
    let told = head::read(path).map_err(|source| head_failed(path, source))?;
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags).map_err(failed)?;
    Ok(chain::verify(&connection, told).map_err(failed)??)
}

fn head_failed(log: &Path, source: std::io::Error) -> AuditError {
    let path = head::path_of(log);
    AuditError::Head { path, source }
}

fn read(connection: &Connection, filter: &Filter) -> rusqlite::Result<(Vec<Entry>, u64)> {
    let condition = "FROM records WHERE (?1 IS NULL OR time >= ?1) AND (?2 IS NULL OR time <= ?2) \
                     AND (?3 IS NULL OR action_type = ?3) AND (?4 IS NULL OR resource_type = ?4) \
                     AND (?5 IS NULL OR user_id = ?5)";
    let start = filter.start.map(Timestamp::as_microsecond);
    let end = filter.end.map(Timestamp::as_microsecond);
    let Filter {
        action_type,
        resource_type,
        user_id,
        ..
    } = filter;
    let total: i64 = connection
        .prepare_cached(&format!("SELECT count(*) {condition}"))?
        .query_row(
            params![start, end, action_type, resource_type, user_id],
            |row| row.get(0),
        )?;
    let sql = format!("SELECT {COLUMNS} {condition} ORDER BY seq DESC LIMIT ?6 OFFSET ?7");
    let limit = filter.limit.min(MAX_LIMIT);
    let offset = i64::try_from(filter.offset).unwrap_or(i64::MAX);
    let records = connection
        .prepare_cached(&sql)?
        .query_map(
            params![
                start,
                end,
                action_type,
                resource_type,
                user_id,
                limit,
                offset
            ],
            |row| read_row(row).map(|(_, entry, _)| entry),
        )?
        .collect::<rusqlite::Result<_>>()?;
    Ok((records, total.cast_unsigned()))
}

fn read_row(row: &Row<'_>) -> rusqlite::Result<(u64, Entry, Vec<u8>)> {
    let bad = |column, error: Box<dyn std::error::Error + Send + Sync>| {
        rusqlite::Error::FromSqlConversionFailure(column, rusqlite::types::Type::Text, error)
    };
    let (details, frameworks): (String, String) = (row.get(8)?, row.get(9)?);
    let time = Timestamp::from_microsecond(row.get(1)?).map_err(|error| bad(1, error.into()))?;
    let entry = Entry {
        time,
        action_type: row.get(2)?,
        resource_type: row.get(3)?,
        resource_id: row.get(4)?,
        user_id: row.get(5)?,
        source_ip: row.get(6)?,
        outcome: row.get(7)?,
        details: serde_json::from_str(&details).map_err(|error| bad(8, error.into()))?,
        frameworks: serde_json::from_str(&frameworks).map_err(|error| bad(9, error.into()))?,
    };
    Ok((row.get::<_, i64>(0)?.cast_unsigned(), entry, row.get(10)?))
}
