//! Who holds which layer.

use std::collections::BTreeSet;

use rusqlite::{Connection, Transaction, params};

use super::bad;
use crate::domain::LayerId;

/// Changes a record by `change`, and, in the same transaction, what it holds to `held`. If `change`
/// returns `false`, there was nothing to change, and nothing is held that was not. Returns what
/// `change` did, and the layers that nobody holds any more since.
pub fn change(
    connection: &mut Connection,
    holder: &str,
    held: BTreeSet<LayerId>,
    change: impl FnOnce(&Transaction<'_>) -> rusqlite::Result<bool>,
) -> rusqlite::Result<(bool, Vec<LayerId>)> {
    let before = of(connection, holder)?;
    if before == held {
        let transaction = connection.transaction()?;
        let changed = change(&transaction)?;
        transaction.commit()?;
        return Ok((changed, Vec::new()));
    }
    // Layers are made and removed depending on this. In WAL mode, `NORMAL` leaves it to a later
    // checkpoint to bring a transaction to the disk.
    connection.execute_batch("PRAGMA synchronous = FULL")?;
    let result = change_both(connection, holder, &before, &held, change);
    connection.execute_batch("PRAGMA synchronous = NORMAL")?;
    result
}

fn change_both(
    connection: &mut Connection,
    holder: &str,
    before: &BTreeSet<LayerId>,
    held: &BTreeSet<LayerId>,
    change: impl FnOnce(&Transaction<'_>) -> rusqlite::Result<bool>,
) -> rusqlite::Result<(bool, Vec<LayerId>)> {
    let transaction = connection.transaction()?;
    if !change(&transaction)? {
        return Ok((false, Vec::new()));
    }
    for layer in held.difference(before) {
        transaction
            .prepare_cached("INSERT INTO layer_refs (holder, layer) VALUES (?1, ?2)")?
            .execute(params![holder, layer.as_str()])?;
    }
    let mut released = Vec::new();
    for layer in before.difference(held) {
        transaction
            .prepare_cached("DELETE FROM layer_refs WHERE holder = ?1 AND layer = ?2")?
            .execute(params![holder, layer.as_str()])?;
        let is_held: bool = transaction
            .prepare_cached("SELECT EXISTS (SELECT 1 FROM layer_refs WHERE layer = ?1)")?
            .query_row([layer.as_str()], |row| row.get(0))?;
        if !is_held {
            released.push(layer.clone());
        }
    }
    transaction.commit()?;
    Ok((true, released))
}

/// The layers that this record holds.
fn of(connection: &Connection, holder: &str) -> rusqlite::Result<BTreeSet<LayerId>> {
    connection
        .prepare_cached("SELECT layer FROM layer_refs WHERE holder = ?1")?
        .query_map([holder], |row| parse(&row.get::<_, String>(0)?))?
        .collect()
}

/// All layers that are held.
pub fn held(connection: &Connection) -> rusqlite::Result<BTreeSet<LayerId>> {
    connection
        .prepare_cached("SELECT DISTINCT layer FROM layer_refs")?
        .query_map([], |row| parse(&row.get::<_, String>(0)?))?
        .collect()
}

fn parse(id: &str) -> rusqlite::Result<LayerId> {
    id.parse().map_err(|error| bad(0, Box::new(error)))
}
