//! The records of snapshots.

use std::collections::BTreeSet;

use rusqlite::{Connection, OptionalExtension, Row, Transaction, params};

use super::{bad, from_json, layers, optional_id, time, to_json};
use crate::domain::{Id, LayerId, Model, Shape, Snapshot, SnapshotId, Spec, Status, WarmSnapshot};

const COLUMNS: &str = "id, name, description, sandbox, template, vcpus, memory_mb, timeout_sec, \
                       layers, content, created_at, network, disk_mb, \
                       status, owner, resources";
const WARM_COLUMNS: &str = "key, template, vcpus, memory_mb, layers, size_bytes, used_at, booted";

pub fn insert(connection: &mut Connection, snapshot: &Snapshot) -> rusqlite::Result<bool> {
    let held = snapshot.layers.all().cloned().collect();
    let json = to_json(&snapshot.layers)?;
    let content = snapshot.content.as_ref().map(to_json).transpose()?;
    let network = snapshot.spec.network.as_ref().map(to_json).transpose()?;
    layers::change(connection, snapshot.id.as_str(), held, |transaction| {
        let sql = format!(
            "INSERT INTO snapshots ({COLUMNS}) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, \
             ?11, ?12, ?13, ?14, ?15, ?16) ON CONFLICT DO NOTHING"
        );
        let inserted = transaction.execute(
            &sql,
            params![
                snapshot.id.as_str(),
                snapshot.name,
                snapshot.description,
                snapshot.sandbox.as_str(),
                snapshot.spec.template,
                snapshot.spec.vcpus,
                snapshot.spec.memory_mb,
                snapshot.spec.timeout_sec,
                json,
                content,
                snapshot.created_at.as_microsecond(),
                network,
                snapshot.spec.disk_mb,
                snapshot.status.as_str(),
                snapshot.owner.as_ref().map(Id::as_str),
                to_json(&snapshot.spec.resources)?,
            ],
        )?;
        Ok(inserted == 1)
    })
    .map(|(inserted, _)| inserted)
}

/// Writes down what can be said of a snapshot only once it is taken, and other layers. Returns those
/// that nobody holds any more.
pub fn update(connection: &mut Connection, snapshot: &Snapshot) -> rusqlite::Result<Vec<LayerId>> {
    let content = snapshot.content.as_ref().map(to_json).transpose()?;
    let held = snapshot.layers.all().cloned().collect();
    layers::change(connection, snapshot.id.as_str(), held, |transaction| {
        let changed = transaction.execute(
            "UPDATE snapshots SET content = ?2, layers = ?3 WHERE id = ?1",
            params![snapshot.id.as_str(), content, to_json(&snapshot.layers)?],
        )?;
        match changed {
            1 => Ok(true),
            changed => Err(rusqlite::Error::StatementChangedRows(changed)),
        }
    })
    .map(|(_, released)| released)
}

/// Gives a snapshot its name and content, and removes whatever has the name. Returns the layers that
/// nobody holds any more.
pub fn rename(connection: &mut Connection, snapshot: &Snapshot) -> rusqlite::Result<Vec<LayerId>> {
    let owner = snapshot.owner.as_ref().map(Id::as_str);
    let content = snapshot.content.as_ref().map(to_json).transpose()?;
    let other: Option<String> = connection
        .prepare_cached("SELECT id FROM snapshots WHERE name = ?1 AND owner IS ?2 AND id <> ?3")?
        .query_row(params![snapshot.name, owner, snapshot.id.as_str()], |row| {
            row.get(0)
        })
        .optional()?;
    let rename = |transaction: &Transaction<'_>| {
        if let Some(other) = &other {
            transaction.execute("DELETE FROM snapshots WHERE id = ?1", [other])?;
        }
        let changed = transaction.execute(
            "UPDATE snapshots SET name = ?2, content = ?3 WHERE id = ?1",
            params![snapshot.id.as_str(), snapshot.name, content],
        )?;
        match changed {
            1 => Ok(true),
            changed => Err(rusqlite::Error::StatementChangedRows(changed)),
        }
    };
    match &other {
        Some(other) => layers::change(connection, other, BTreeSet::new(), rename),
        None => {
            let held = snapshot.layers.all().cloned().collect();
            layers::change(connection, snapshot.id.as_str(), held, rename)
        }
    }
    .map(|(_, released)| released)
}

pub fn get(connection: &Connection, id: &SnapshotId) -> rusqlite::Result<Option<Snapshot>> {
    connection
        .prepare_cached(&format!("SELECT {COLUMNS} FROM snapshots WHERE id = ?1"))?
        .query_row([id.as_str()], read)
        .optional()
}

pub fn find(connection: &Connection, name: &str) -> rusqlite::Result<Vec<Snapshot>> {
    connection
        .prepare_cached(&format!("SELECT {COLUMNS} FROM snapshots WHERE name = ?1"))?
        .query_map([name], read)?
        .collect()
}

pub fn list(connection: &Connection) -> rusqlite::Result<Vec<Snapshot>> {
    connection
        .prepare_cached(&format!(
            "SELECT {COLUMNS} FROM snapshots ORDER BY created_at DESC, rowid DESC"
        ))?
        .query_map([], read)?
        .collect()
}

pub fn remove(connection: &mut Connection, id: &SnapshotId) -> rusqlite::Result<Vec<LayerId>> {
    let id = id.as_str();
    layers::change(connection, id, BTreeSet::new(), |transaction| {
        let removed = transaction.execute("DELETE FROM snapshots WHERE id = ?1", [id])?;
        Ok(removed == 1)
    })
    .map(|(_, released)| released)
}

fn read(row: &Row<'_>) -> rusqlite::Result<Snapshot> {
    let (id, sandbox): (String, String) = (row.get(0)?, row.get(3)?);
    let content: Option<String> = row.get(9)?;
    let network: Option<String> = row.get(11)?;
    let status: String = row.get(13)?;
    Ok(Snapshot {
        id: id.parse().map_err(|error| bad(0, Box::new(error)))?,
        name: row.get(1)?,
        description: row.get(2)?,
        sandbox: sandbox.parse().map_err(|error| bad(3, Box::new(error)))?,
        spec: Spec {
            template: row.get(4)?,
            vcpus: row.get(5)?,
            memory_mb: row.get(6)?,
            timeout_sec: row.get(7)?,
            network: network.map(|_| from_json(row, 11)).transpose()?,
            disk_mb: row.get(12)?,
            resources: from_json(row, 15)?,
        },
        status: Status::from_word(&status)
            .ok_or_else(|| bad(13, format!("unknown status {status:?}").into()))?,
        layers: from_json(row, 8)?,
        content: content.map(|_| from_json(row, 9)).transpose()?,
        created_at: time(10, row.get(10)?)?,
        owner: optional_id(row, 14)?,
    })
}

fn warm_holder(key: &str) -> String {
    format!("warm:{key}")
}

pub fn put_warm(
    connection: &mut Connection,
    warm: &WarmSnapshot,
) -> rusqlite::Result<Vec<LayerId>> {
    let held = warm.layers.all().cloned().collect();
    let json = to_json(&warm.layers)?;
    layers::change(connection, &warm_holder(&warm.key), held, |transaction| {
        let sql = format!(
            "INSERT OR REPLACE INTO warm_snapshots ({WARM_COLUMNS}) \
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)"
        );
        transaction.execute(
            &sql,
            params![
                warm.key,
                warm.model.shape.template,
                warm.model.shape.vcpus,
                warm.model.shape.memory_mb,
                json,
                warm.size_bytes.cast_signed(),
                warm.used_at.as_microsecond(),
                warm.model.booted.as_ref().map(to_json).transpose()?,
            ],
        )?;
        Ok(true)
    })
    .map(|(_, released)| released)
}

pub fn list_warm(connection: &Connection) -> rusqlite::Result<Vec<(WarmSnapshot, bool)>> {
    connection
        .prepare_cached(&format!(
            "SELECT {WARM_COLUMNS}, EXISTS (
                 -- Layers of its disk may be its template's.
                 SELECT 1 FROM json_each(warm_snapshots.layers, '$.memory') AS memory
                 JOIN layer_refs AS other ON other.layer = memory.value
                 WHERE other.holder <> 'warm:' || warm_snapshots.key)
             FROM warm_snapshots ORDER BY used_at, key"
        ))?
        .query_map([], |row| {
            let booted: Option<String> = row.get(7)?;
            let warm = WarmSnapshot {
                key: row.get(0)?,
                model: Model {
                    shape: Shape {
                        template: row.get(1)?,
                        vcpus: row.get(2)?,
                        memory_mb: row.get(3)?,
                    },
                    booted: booted.map(|_| from_json(row, 7)).transpose()?,
                },
                layers: from_json(row, 4)?,
                size_bytes: row.get::<_, i64>(5)?.cast_unsigned(),
                used_at: time(6, row.get(6)?)?,
            };
            Ok((warm, row.get(8)?))
        })?
        .collect()
}

pub fn remove_warm(connection: &mut Connection, key: &str) -> rusqlite::Result<Vec<LayerId>> {
    layers::change(
        connection,
        &warm_holder(key),
        BTreeSet::new(),
        |transaction| {
            let removed =
                transaction.execute("DELETE FROM warm_snapshots WHERE key = ?1", [key])?;
            Ok(removed == 1)
        },
    )
    .map(|(_, released)| released)
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::super::SqliteStore;
    use super::*;
    use crate::domain::{
        Booted, Layers, LayersInfo, Resources, Sandbox, SandboxId, Store, Transition, UserId,
    };

    fn spec() -> Spec {
        Spec {
            template: "minimal".into(),
            vcpus: 1,
            memory_mb: 512,
            timeout_sec: 300,
            network: None,
            disk_mb: None,
            resources: Resources {
                cpu_limit_percent: None,
                memory_limit_percent: Some(90),
                booted: Some(Booted::with_room(2, 512, 4096)),
            },
        }
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn layers() -> Layers {
        Layers::default().saved(LayerId::random(), LayerId::random())
    }

    fn snapshot(name: Option<&str>, layers: &Layers) -> Snapshot {
        Snapshot {
            id: SnapshotId::random(),
            owner: Some(UserId::random()),
            name: name.map(str::to_owned),
            description: None,
            sandbox: SandboxId::random(),
            spec: spec(),
            status: Status::Paused,
            layers: layers.clone(),
            content: None,
            created_at: at(1),
        }
    }

    #[tokio::test]
    async fn a_layer_is_released_by_the_last_who_holds_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("db");
        let store = SqliteStore::open(&path).unwrap();
        let (shared, own) = (layers(), layers());
        let mut sandbox = Sandbox::new(SandboxId::random(), spec(), shared.clone(), at(1));
        assert!(store.insert(&sandbox).await.unwrap());
        let named = snapshot(Some("one"), &shared);
        assert!(store.insert_snapshot(&named).await.unwrap());
        let mut same_name = snapshot(Some("one"), &own);
        same_name.owner = named.owner.clone();
        assert!(!store.insert_snapshot(&same_name).await.unwrap());
        let warm = WarmSnapshot {
            key: "key".into(),
            model: Model {
                shape: Shape {
                    template: "minimal".into(),
                    vcpus: 1,
                    memory_mb: 512,
                },
                booted: spec().resources.booted,
            },
            layers: shared.clone(),
            size_bytes: u64::from(u32::MAX) + 1,
            used_at: at(2),
        };
        store.put_warm(&warm).await.unwrap();
        let held = shared.all().cloned().collect();
        assert_eq!(store.held_layers().await.unwrap(), held);

        // What it is being saved to is held from the beginning.
        let transition = Transition::Started(crate::domain::Timings::default());
        sandbox.apply(transition, at(2)).unwrap();
        let next = shared.saved(own.memory[0].clone(), own.disk[0].clone());
        sandbox.apply(Transition::Pausing(next), at(3)).unwrap();
        assert_eq!(store.update(&sandbox).await.unwrap(), []);
        assert_eq!(store.held_layers().await.unwrap().len(), 4);

        // A crash: no connection is closed.
        Box::leak(Box::new(store));
        let store = SqliteStore::open(&path).unwrap();
        let stopped = Transition::Stopped { reason: None };
        sandbox.apply(stopped, at(4)).unwrap();
        let mut released = store.update(&sandbox).await.unwrap();
        released.sort();
        let mut expected: Vec<_> = own.all().cloned().collect();
        expected.sort();
        assert_eq!(released, expected);
        assert_eq!(store.remove_snapshot(&named.id).await.unwrap(), []);
        assert_eq!(store.remove_snapshot(&named.id).await.unwrap(), []);
        let listed = store.list_warm().await.unwrap();
        assert_eq!(listed, [(warm, false)]);
        let mut released = store.remove_warm("key").await.unwrap();
        released.sort();
        let mut expected: Vec<_> = shared.all().cloned().collect();
        expected.sort();
        assert_eq!(released, expected);
        assert!(store.held_layers().await.unwrap().is_empty());
    }

    #[tokio::test]
    async fn a_snapshot_is_read_as_it_was_written() {
        let dir = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(&dir.path().join("db")).unwrap();
        let (mut first, second) = (snapshot(Some("one"), &layers()), snapshot(None, &layers()));
        for snapshot in [&first, &second] {
            assert!(store.insert_snapshot(snapshot).await.unwrap());
        }
        first.content = Some(LayersInfo {
            size_bytes: 7,
            checksum: "c0ffee".into(),
        });
        store.update_snapshot(&first).await.unwrap();
        assert_eq!(
            store.get_snapshot(&first.id).await.unwrap(),
            Some(first.clone())
        );
        assert_eq!(store.find_snapshot("one").await.unwrap(), [first.clone()]);
        assert_eq!(store.find_snapshot("two").await.unwrap(), []);
        let both = [second, first.clone()];
        assert_eq!(store.list_snapshots().await.unwrap(), both);
        assert!(
            store
                .rename_snapshot(&snapshot(Some("one"), &layers()))
                .await
                .is_err()
        );
        assert_eq!(store.list_snapshots().await.unwrap().len(), 2);

        // One that takes over a name takes it from its owner's only.
        let stranger = snapshot(Some("one"), &first.layers);
        let mut heir = snapshot(None, &layers());
        heir.owner = first.owner.clone();
        for snapshot in [&stranger, &heir] {
            assert!(store.insert_snapshot(snapshot).await.unwrap());
        }
        heir.name = Some("one".into());
        heir.content = first.content.clone();
        assert_eq!(store.rename_snapshot(&heir).await.unwrap(), []);
        assert_eq!(store.get_snapshot(&first.id).await.unwrap(), None);
        assert_eq!(
            store.get_snapshot(&heir.id).await.unwrap(),
            Some(heir.clone())
        );
        assert_eq!(store.find_snapshot("one").await.unwrap().len(), 2);
        let last = snapshot(None, &first.layers);
        store.remove_snapshot(&stranger.id).await.unwrap();
        let mut next = Snapshot {
            owner: heir.owner.clone(),
            ..last
        };
        assert!(store.insert_snapshot(&next).await.unwrap());
        next.name = Some("one".into());
        let mut released = store.rename_snapshot(&next).await.unwrap();
        released.sort();
        let mut expected: Vec<_> = heir.layers.all().cloned().collect();
        expected.sort();
        assert_eq!(released, expected);

        let unknown = snapshot(None, &layers());
        assert!(store.update_snapshot(&unknown).await.is_err());
        assert_eq!(store.get_snapshot(&unknown.id).await.unwrap(), None);
    }
}
