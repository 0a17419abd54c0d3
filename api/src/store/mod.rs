//! The records of sandboxes, snapshots and templates in SQLite.
//!
//! One connection in WAL mode, used on threads that may block. A transaction that was committed
//! survives a crash of the daemon. After a crash of the machine the last ones may be missing, as are
//! the sandboxes they told of; but one that changes who holds a layer is on the disk when it is
//! told.

mod accounts;
mod file;
mod layers;
mod migrations;
mod pages;
mod runs;
mod scans;
mod snapshots;
mod templates;

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use jiff::Timestamp;
use rusqlite::{Connection, OptionalExtension, Row, params};

use crate::domain::{
    Desired, Id, KeyId, LayerId, Layers, Page, Quota, Run, Sandbox, SandboxId, Snapshot,
    SnapshotId, Spec, Status, Store, StoreError, Subnet, TakenAddresses, Template, TemplateId,
    Totals, UserId, WarmSnapshot,
};
pub use file::open as open_file;
pub use migrations::MigrateError;

const COLUMNS: &str = "id, template, vcpus, memory_mb, timeout_sec, desired, status, \
                       status_reason, created_at, started_at, last_active_at, updated_at, timings, \
                       layers, saving, network, address, forwards, name, stopped_at, is_kept, kept, \
                       disk_mb, owner, api_key, snapshot, resources";

/// Sandboxes in a file.
#[derive(Clone)]
pub struct SqliteStore {
    connection: Arc<Mutex<Connection>>,
}

/// How many statements stay prepared: more than there are here. Any other is parsed anew each time.
const STATEMENTS: usize = 128;

/// Why the store is not usable.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// It is no database, or cannot be read or written.
    #[error("the database {path} cannot be opened", path = path.display())]
    Open {
        /// Where it is.
        path: PathBuf,
        /// What SQLite says.
        #[source]
        source: rusqlite::Error,
    },
    /// Its tables cannot be brought up to date.
    #[error("the database {path} cannot be brought up to date", path = path.display())]
    Migrate {
        /// Where it is.
        path: PathBuf,
        /// Why.
        #[source]
        source: MigrateError,
    },
}

impl SqliteStore {
    /// Opens the database `path`, makes it if it is not there, and brings its tables up to date.
    ///
    /// # Errors
    /// It is not usable.
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        let failed = |source| OpenError::Open {
            path: path.to_owned(),
            source,
        };
        let mut connection = open_file(path).map_err(failed)?;
        connection
            .execute_batch("PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL;")
            .map_err(failed)?;
        connection.set_prepared_statement_cache_capacity(STATEMENTS);
        migrations::run(&mut connection).map_err(|source| OpenError::Migrate {
            path: path.to_owned(),
            source,
        })?;
        Ok(Self {
            connection: Arc::new(Mutex::new(connection)),
        })
    }

    async fn with<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Connection) -> Result<T, rusqlite::Error> + Send + 'static,
    ) -> Result<T, StoreError> {
        let connection = Arc::clone(&self.connection);
        let task = tokio::task::spawn_blocking(move || {
            // A panic within a transaction rolls it back, so the connection stays good.
            work(&mut connection.lock().unwrap_or_else(PoisonError::into_inner))
        });
        match task.await {
            Ok(result) => result.map_err(|error| StoreError(Box::new(error))),
            Err(error) => Err(StoreError(Box::new(error))),
        }
    }
}

#[async_trait]
impl Store for SqliteStore {
    async fn insert(&self, sandbox: &Sandbox) -> Result<bool, StoreError> {
        let sandbox = sandbox.clone();
        self.with(move |connection| {
            let sql = format!(
                "INSERT INTO sandboxes ({COLUMNS}) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, \
                 ?11, ?12, ?13, ?14, ?15, ?16, ?17, ?18, ?19, ?20, ?21, ?22, ?23, ?24, ?25, ?26, \
                 ?27) ON CONFLICT (id) DO NOTHING"
            );
            let holder = sandbox.id.as_str();
            layers::change(connection, holder, held(&sandbox), |transaction| {
                let inserted = write(transaction, &sql, &sandbox)? == 1;
                if inserted {
                    runs::follow(transaction, &sandbox)?;
                }
                Ok(inserted)
            })
            .map(|(inserted, _)| inserted)
        })
        .await
    }

    async fn get(&self, id: &SandboxId) -> Result<Option<Sandbox>, StoreError> {
        let id = id.clone();
        self.with(move |connection| {
            connection
                .prepare_cached(&format!("SELECT {COLUMNS} FROM sandboxes WHERE id = ?1"))?
                .query_row([id.as_str()], read)
                .optional()
        })
        .await
    }

    async fn find(&self, name: &str) -> Result<Vec<Sandbox>, StoreError> {
        let name = name.to_owned();
        self.with(move |connection| {
            connection
                .prepare_cached(&format!(
                    "SELECT {COLUMNS} FROM sandboxes WHERE name = ?1 AND status <> 'stopped' \
                     ORDER BY rowid DESC"
                ))?
                .query_map([name], read)?
                .collect()
        })
        .await
    }

    async fn page(&self, page: &Page) -> Result<(Vec<Sandbox>, u64), StoreError> {
        let page = page.clone();
        self.with(move |connection| pages::read(connection, &page))
            .await
    }

    async fn totals(&self, owner: Option<&UserId>) -> Result<Totals, StoreError> {
        let owner = owner.cloned();
        self.with(move |connection| pages::totals(connection, owner.as_ref()))
            .await
    }

    async fn update(&self, sandbox: &Sandbox) -> Result<Vec<LayerId>, StoreError> {
        let sandbox = sandbox.clone();
        self.with(move |connection| {
            let sql = "UPDATE sandboxes SET template = ?2, vcpus = ?3, memory_mb = ?4, \
                       timeout_sec = ?5, desired = ?6, status = ?7, status_reason = ?8, \
                       created_at = ?9, started_at = ?10, last_active_at = ?11, updated_at = ?12, \
                       timings = ?13, layers = ?14, saving = ?15, network = ?16, \
                       address = ?17, forwards = ?18, name = ?19, stopped_at = ?20, is_kept = ?21, \
                       kept = ?22, disk_mb = ?23, owner = ?24, api_key = ?25, \
                       snapshot = ?26, resources = ?27 WHERE id = ?1";
            let holder = sandbox.id.as_str();
            layers::change(
                connection,
                holder,
                held(&sandbox),
                |transaction| match write(transaction, sql, &sandbox)? {
                    1 => runs::follow(transaction, &sandbox).map(|()| true),
                    changed => Err(rusqlite::Error::StatementChangedRows(changed)),
                },
            )
            .map(|(_, released)| released)
        })
        .await
    }

    async fn runs(&self, owner: Option<&UserId>, since: Timestamp) -> Result<Vec<Run>, StoreError> {
        let owner = owner.cloned();
        self.with(move |connection| runs::since(connection, owner.as_ref(), since))
            .await
    }

    async fn quota_of_key(&self, key: &KeyId) -> Result<Option<Quota>, StoreError> {
        let key = key.clone();
        self.with(move |connection| {
            connection
                .prepare_cached("SELECT quota FROM api_keys WHERE id = ?1")?
                .query_row([key.as_str()], |row| from_json(row, 0))
                .optional()
        })
        .await
    }

    async fn list_live(&self) -> Result<Vec<Sandbox>, StoreError> {
        self.with(|connection| {
            connection
                .prepare_cached(&format!(
                    "SELECT {COLUMNS} FROM sandboxes WHERE status NOT IN ('stopped', 'error') \
                     ORDER BY created_at DESC, rowid DESC"
                ))?
                .query_map([], read)?
                .collect()
        })
        .await
    }

    async fn list_latest(&self, limit: u32) -> Result<Vec<Sandbox>, StoreError> {
        self.with(move |connection| {
            connection
                .prepare_cached(&format!(
                    "SELECT {COLUMNS} FROM sandboxes ORDER BY created_at DESC, rowid DESC LIMIT ?1"
                ))?
                .query_map([limit], read)?
                .collect()
        })
        .await
    }

    async fn taken_addresses(&self, subnet: Subnet) -> Result<TakenAddresses, StoreError> {
        self.with(move |connection| {
            let mut taken = TakenAddresses::default();
            let mut statement = connection.prepare_cached(
                "SELECT address FROM sandboxes \
                 WHERE address IS NOT NULL AND status NOT IN ('stopped', 'error')",
            )?;
            for row in statement.query_map([], address)? {
                taken.all.insert(row?);
            }
            let mut statement = connection.prepare_cached(
                "SELECT address FROM sandboxes WHERE address IS NOT NULL ORDER BY rowid DESC",
            )?;
            // No further than to the first that is in it.
            for row in statement.query_map([], address)? {
                let address = row?;
                if subnet.contains(address) {
                    taken.last = Some(address);
                    break;
                }
            }
            Ok(taken)
        })
        .await
    }

    async fn insert_snapshot(&self, snapshot: &Snapshot) -> Result<bool, StoreError> {
        let snapshot = snapshot.clone();
        self.with(move |connection| snapshots::insert(connection, &snapshot))
            .await
    }

    async fn update_snapshot(&self, snapshot: &Snapshot) -> Result<Vec<LayerId>, StoreError> {
        let snapshot = snapshot.clone();
        self.with(move |connection| snapshots::update(connection, &snapshot))
            .await
    }

    async fn rename_snapshot(&self, snapshot: &Snapshot) -> Result<Vec<LayerId>, StoreError> {
        let snapshot = snapshot.clone();
        self.with(move |connection| snapshots::rename(connection, &snapshot))
            .await
    }

    async fn get_snapshot(&self, id: &SnapshotId) -> Result<Option<Snapshot>, StoreError> {
        let id = id.clone();
        self.with(move |connection| snapshots::get(connection, &id))
            .await
    }

    async fn find_snapshot(&self, name: &str) -> Result<Vec<Snapshot>, StoreError> {
        let name = name.to_owned();
        self.with(move |connection| snapshots::find(connection, &name))
            .await
    }

    async fn list_snapshots(&self) -> Result<Vec<Snapshot>, StoreError> {
        self.with(|connection| snapshots::list(connection)).await
    }

    async fn remove_snapshot(&self, id: &SnapshotId) -> Result<Vec<LayerId>, StoreError> {
        let id = id.clone();
        self.with(move |connection| snapshots::remove(connection, &id))
            .await
    }

    async fn put_warm(&self, warm: &WarmSnapshot) -> Result<Vec<LayerId>, StoreError> {
        let warm = warm.clone();
        self.with(move |connection| snapshots::put_warm(connection, &warm))
            .await
    }

    async fn list_warm(&self) -> Result<Vec<(WarmSnapshot, bool)>, StoreError> {
        self.with(|connection| snapshots::list_warm(connection))
            .await
    }

    async fn remove_warm(&self, key: &str) -> Result<Vec<LayerId>, StoreError> {
        let key = key.to_owned();
        self.with(move |connection| snapshots::remove_warm(connection, &key))
            .await
    }

    async fn insert_template(&self, template: &Template) -> Result<bool, StoreError> {
        let template = template.clone();
        self.with(move |connection| templates::insert(connection, &template))
            .await
    }

    async fn update_template(
        &self,
        template: &Template,
    ) -> Result<Option<Vec<LayerId>>, StoreError> {
        let template = template.clone();
        self.with(move |connection| templates::update(connection, &template))
            .await
    }

    async fn find_template(&self, name: &str) -> Result<Option<Template>, StoreError> {
        let name = name.to_owned();
        self.with(move |connection| templates::find(connection, &name))
            .await
    }

    async fn list_templates(&self) -> Result<Vec<Template>, StoreError> {
        self.with(|connection| templates::list(connection)).await
    }

    async fn remove_template(&self, id: &TemplateId) -> Result<Vec<LayerId>, StoreError> {
        let id = id.clone();
        self.with(move |connection| templates::remove(connection, &id))
            .await
    }

    async fn held_layers(&self) -> Result<BTreeSet<LayerId>, StoreError> {
        self.with(|connection| layers::held(connection)).await
    }
}

/// The layers that a sandbox holds.
fn held(sandbox: &Sandbox) -> BTreeSet<LayerId> {
    let others = sandbox.saving.iter().chain(&sandbox.kept);
    let others = others.flat_map(Layers::all);
    sandbox.layers.all().chain(others).cloned().collect()
}

/// A value for a column that holds JSON.
fn to_json(value: &impl serde::Serialize) -> rusqlite::Result<String> {
    serde_json::to_string(value)
        .map_err(|error| rusqlite::Error::ToSqlConversionFailure(Box::new(error)))
}

/// The value of a column that holds JSON.
fn from_json<T: serde::de::DeserializeOwned>(row: &Row<'_>, column: usize) -> rusqlite::Result<T> {
    serde_json::from_str(&row.get::<_, String>(column)?)
        .map_err(|error| bad(column, Box::new(error)))
}

/// The id in a column that may have none.
fn optional_id<T>(row: &Row<'_>, column: usize) -> rusqlite::Result<Option<T>>
where
    T: FromStr<Err: std::error::Error + Send + Sync + 'static>,
{
    let text: Option<String> = row.get(column)?;
    text.map(|text| text.parse().map_err(|error| bad(column, Box::new(error))))
        .transpose()
}

/// The address in the first column.
fn address(row: &Row<'_>) -> rusqlite::Result<Ipv4Addr> {
    let text: String = row.get(0)?;
    text.parse::<Ipv4Addr>()
        .map_err(|error| bad(0, Box::new(error)))
}

fn bad(column: usize, error: Box<dyn std::error::Error + Send + Sync>) -> rusqlite::Error {
    rusqlite::Error::FromSqlConversionFailure(column, rusqlite::types::Type::Text, error)
}

fn time(column: usize, micros: i64) -> rusqlite::Result<Timestamp> {
    Timestamp::from_microsecond(micros).map_err(|error| {
        let integer = rusqlite::types::Type::Integer;
        rusqlite::Error::FromSqlConversionFailure(column, integer, Box::new(error))
    })
}

fn write(connection: &Connection, sql: &str, sandbox: &Sandbox) -> rusqlite::Result<usize> {
    let timings = sandbox.timings.as_ref().map(to_json).transpose()?;
    let saving = sandbox.saving.as_ref().map(to_json).transpose()?;
    let network = sandbox.spec.network.as_ref().map(to_json).transpose()?;
    let kept = sandbox.kept.as_ref().map(to_json).transpose()?;
    connection.prepare_cached(sql)?.execute(params![
        sandbox.id.as_str(),
        sandbox.spec.template,
        sandbox.spec.vcpus,
        sandbox.spec.memory_mb,
        sandbox.spec.timeout_sec,
        sandbox.desired.as_str(),
        sandbox.status.as_str(),
        sandbox.status_reason,
        sandbox.created_at.as_microsecond(),
        sandbox.started_at.map(Timestamp::as_microsecond),
        sandbox.last_active_at.map(Timestamp::as_microsecond),
        sandbox.updated_at.as_microsecond(),
        timings,
        to_json(&sandbox.layers)?,
        saving,
        network,
        sandbox.address.map(|address| address.to_string()),
        to_json(&sandbox.forwards)?,
        sandbox.name,
        sandbox.stopped_at.map(Timestamp::as_microsecond),
        sandbox.is_kept,
        kept,
        sandbox.spec.disk_mb,
        sandbox.owner.as_ref().map(Id::as_str),
        sandbox.key.as_ref().map(Id::as_str),
        sandbox.snapshot,
        to_json(&sandbox.spec.resources)?,
    ])
}

fn read(row: &Row<'_>) -> rusqlite::Result<Sandbox> {
    let optional_time = |column: usize| -> rusqlite::Result<Option<Timestamp>> {
        row.get::<_, Option<i64>>(column)?
            .map(|micros| time(column, micros))
            .transpose()
    };
    let id: String = row.get(0)?;
    let desired: String = row.get(5)?;
    let status: String = row.get(6)?;
    let timings: Option<String> = row.get(12)?;
    let saving: Option<String> = row.get(14)?;
    let network: Option<String> = row.get(15)?;
    let address: Option<String> = row.get(16)?;
    let kept: Option<String> = row.get(21)?;
    Ok(Sandbox {
        id: id.parse().map_err(|error| bad(0, Box::new(error)))?,
        name: row.get(18)?,
        spec: Spec {
            template: row.get(1)?,
            vcpus: row.get(2)?,
            memory_mb: row.get(3)?,
            timeout_sec: row.get(4)?,
            network: network.map(|_| from_json(row, 15)).transpose()?,
            disk_mb: row.get(22)?,
            resources: from_json(row, 26)?,
        },
        desired: Desired::from_word(&desired)
            .ok_or_else(|| bad(5, format!("unknown wish {desired:?}").into()))?,
        status: Status::from_word(&status)
            .ok_or_else(|| bad(6, format!("unknown status {status:?}").into()))?,
        status_reason: row.get(7)?,
        created_at: time(8, row.get(8)?)?,
        started_at: optional_time(9)?,
        last_active_at: optional_time(10)?,
        stopped_at: optional_time(19)?,
        updated_at: time(11, row.get(11)?)?,
        timings: timings.map(|_| from_json(row, 12)).transpose()?,
        layers: from_json(row, 13)?,
        saving: saving.map(|_| from_json(row, 14)).transpose()?,
        is_kept: row.get(20)?,
        kept: kept.map(|_| from_json(row, 21)).transpose()?,
        address: address
            .map(|address| address.parse())
            .transpose()
            .map_err(|error| bad(16, Box::new(error)))?,
        forwards: from_json(row, 17)?,
        owner: optional_id(row, 23)?,
        key: optional_id(row, 24)?,
        snapshot: row.get(25)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::{Booted, Resources, Timings, Transition};

    fn sandbox(second: i64) -> Sandbox {
        let spec = Spec {
            template: "minimal".into(),
            vcpus: 32,
            memory_mb: 512,
            timeout_sec: 300,
            network: None,
            disk_mb: None,
            resources: Resources {
                cpu_limit_percent: Some(80),
                memory_limit_percent: Some(90),
                booted: Some(Booted::with_room(2, 512, 4096)),
            },
        };
        Sandbox::new(
            SandboxId::random(),
            spec,
            Layers::default(),
            Timestamp::from_second(second).unwrap(),
        )
    }

    #[tokio::test]
    async fn what_was_written_is_there_after_a_crash() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("db");
        let mut written = sandbox(1);
        {
            let store = SqliteStore::open(&path).unwrap();
            assert!(store.insert(&written).await.unwrap());
            assert!(!store.insert(&written).await.unwrap(), "the id is taken");
            let timings = Timings {
                total_us: 7,
                ..Timings::default()
            };
            let now = Timestamp::from_microsecond(2_000_001).unwrap();
            written.apply(Transition::Started(timings), now).unwrap();
            store.update(&written).await.unwrap();
            // A crash: no connection is closed, and so no write-ahead log is folded in.
            Box::leak(Box::new(store));
        }
        let store = SqliteStore::open(&path).unwrap();
        assert_eq!(store.get(&written.id).await.unwrap(), Some(written));
    }

    #[tokio::test]
    async fn the_list_is_of_the_living_newest_first() {
        let dir = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(&dir.path().join("db")).unwrap();
        let now = Timestamp::from_second(9).unwrap();
        let (old, new, twin) = (sandbox(1), sandbox(2), sandbox(2));
        let (mut failed, mut stopped) = (sandbox(3), sandbox(4));
        failed
            .apply(Transition::Failed { reason: "x".into() }, now)
            .unwrap();
        stopped
            .apply(Transition::Stopped { reason: None }, now)
            .unwrap();
        for sandbox in [&old, &new, &twin, &failed, &stopped] {
            assert!(store.insert(sandbox).await.unwrap());
        }
        let ids = store
            .list_live()
            .await
            .unwrap()
            .into_iter()
            .map(|sandbox| sandbox.id);
        assert_eq!(ids.collect::<Vec<_>>(), [twin.id, new.id, old.id]);
        assert_eq!(store.get(&stopped.id).await.unwrap(), Some(stopped));
        assert_eq!(store.get(&SandboxId::random()).await.unwrap(), None);
        assert!(
            store.update(&sandbox(5)).await.is_err(),
            "nothing to update"
        );
    }

    #[tokio::test]
    async fn a_file_that_is_no_database_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("db");
        std::fs::write(
            &path,
            "this is not a database, but it is long enough to be read",
        )
        .unwrap();
        assert!(matches!(
            SqliteStore::open(&path),
            Err(OpenError::Open { .. })
        ));
    }
}
