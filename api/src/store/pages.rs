//! Pages of the list of sandboxes.

use rusqlite::{Connection, params};

use super::{COLUMNS, read as read_row};
use crate::domain::{Page, Sandbox, SortBy, Totals, UserId};

/// When a sandbox last ran; null if it never did.
const LAST_START: &str = "coalesce(started_at, stopped_at)";
/// The state of a sandbox as who follows it would call it, so that those that are on the way to a state stand
/// with those that are there, and those that never ran by themselves.
const SHOWN_STATUS: &str = "CASE \
    WHEN status IN ('off', 'pending') AND coalesce(started_at, stopped_at) IS NULL THEN 'created' \
    WHEN status IN ('off', 'pending', 'stopping') THEN 'stopped' \
    WHEN status IN ('pausing', 'paused', 'resuming') THEN 'paused' \
    ELSE status END";

/// The sandboxes of a page, and how many there are on all pages.
pub fn read(connection: &Connection, page: &Page) -> rusqlite::Result<(Vec<Sandbox>, u64)> {
    let filter = "FROM sandboxes WHERE status <> 'stopped' \
                  AND (?1 = '' OR instr(?1, ',' || status || ',') > 0) \
                  AND (?2 IS NULL OR (last_start IS NOT NULL) = ?2) \
                  AND (?3 IS NULL OR owner = ?3)";
    let filter = filter.replace("last_start", LAST_START);
    let words = match &page.statuses {
        Some(statuses) => {
            let words: Vec<_> = statuses.iter().map(|status| status.as_str()).collect();
            format!(",{},", words.join(","))
        }
        None => String::new(),
    };
    let column = match page.sort {
        SortBy::CreatedAt => "created_at",
        SortBy::Name => "coalesce(name, id)",
        SortBy::Status => SHOWN_STATUS,
        SortBy::Vcpus => "vcpus",
        SortBy::MemoryMb => "memory_mb",
    };
    let order = if page.is_descending { "DESC" } else { "ASC" };
    let owner = page.owner.as_ref().map(UserId::as_str);
    let filters = params![words, page.was_started, owner];
    let total: i64 = connection
        .prepare_cached(&format!("SELECT count(*) {filter}"))?
        .query_row(filters, |row| row.get(0))?;
    let sql = format!(
        "SELECT {COLUMNS} {filter} ORDER BY {column} {order}, rowid {order} LIMIT ?4 OFFSET ?5"
    );
    let offset = i64::try_from(page.offset).unwrap_or(i64::MAX);
    let sandboxes = connection
        .prepare_cached(&sql)?
        .query_map(
            params![words, page.was_started, owner, page.limit, offset],
            read_row,
        )?
        .collect::<rusqlite::Result<_>>()?;
    Ok((sandboxes, total.cast_unsigned()))
}

/// How many sandboxes there are of this user, or of everybody.
pub fn totals(connection: &Connection, owner: Option<&UserId>) -> rusqlite::Result<Totals> {
    let sql = "SELECT count(*), count(*) FILTER (WHERE status = 'running'), \
               coalesce(sum(vcpus) FILTER (WHERE status = 'running'), 0), \
               coalesce(sum(memory_mb) FILTER (WHERE status = 'running'), 0) \
               FROM sandboxes WHERE status <> 'stopped' AND (?1 IS NULL OR owner = ?1)";
    connection
        .prepare_cached(sql)?
        .query_row([owner.map(UserId::as_str)], |row| {
            let count = |column| row.get(column).map(i64::cast_unsigned);
            Ok(Totals {
                all: count(0)?,
                running: count(1)?,
                vcpus: count(2)?,
                memory_mb: count(3)?,
            })
        })
}
