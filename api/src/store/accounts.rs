//! The records of users and API keys.

use async_trait::async_trait;
use jiff::Timestamp;
use rusqlite::{Connection, OptionalExtension, Row, params};

use super::{SqliteStore, bad, from_json, time, to_json};
use crate::domain::{Account, KeyId, Role, StoreError, User, UserId};
use crate::identity::{AccountStore, Inserted, KeyRecord, UserRecord};

const USER: &str = "id, name, role, password, created_at";
const KEY: &str =
    "k.id, k.name, k.prefix, k.created_at, k.last_used_at, k.account, u.name, u.role, k.quota";

#[async_trait]
impl AccountStore for SqliteStore {
    async fn insert_user(
        &self,
        record: &UserRecord,
        only_first: bool,
    ) -> Result<Inserted, StoreError> {
        let record = record.clone();
        self.with(move |connection| {
            durably(connection, |transaction| {
                let one = |sql: &str, name: &str| -> rusqlite::Result<bool> {
                    transaction.prepare(sql)?.exists([name])
                };
                let name = &record.user.name;
                // First, so that whoever may add nobody does not hear who there is.
                if only_first && transaction.prepare("SELECT 1 FROM users")?.exists([])? {
                    return Ok(Inserted::NotFirst);
                }
                if one("SELECT 1 FROM users WHERE name = ?1", name)? {
                    return Ok(Inserted::NameTaken);
                }
                transaction.execute(
                    &format!("INSERT INTO users ({USER}) VALUES (?1, ?2, ?3, ?4, ?5)"),
                    params![
                        record.user.id.as_str(),
                        name,
                        record.user.role.as_str(),
                        record.password,
                        record.created_at.as_microsecond(),
                    ],
                )?;
                Ok(Inserted::Yes)
            })
        })
        .await
    }

    async fn has_users(&self) -> Result<bool, StoreError> {
        self.with(|connection| connection.prepare_cached("SELECT 1 FROM users")?.exists([]))
            .await
    }

    async fn user(&self, id: &UserId) -> Result<Option<UserRecord>, StoreError> {
        let id = id.clone();
        self.with(move |connection| user(connection, "id", id.as_str()))
            .await
    }

    async fn user_named(&self, name: &str) -> Result<Option<UserRecord>, StoreError> {
        let name = name.to_owned();
        self.with(move |connection| user(connection, "name", &name))
            .await
    }

    async fn insert_key(&self, record: &KeyRecord, hash: [u8; 32]) -> Result<bool, StoreError> {
        let record = record.clone();
        self.with(move |connection| {
            durably(connection, |transaction| {
                let account = match &record.account {
                    Account::Local => None,
                    Account::User(user) => Some(user.id.as_str()),
                };
                let inserted = transaction.execute(
                    "INSERT INTO api_keys (id, hash, name, prefix, account, created_at, quota) \
                     VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7) ON CONFLICT DO NOTHING",
                    params![
                        record.id.as_str(),
                        hash,
                        record.name,
                        record.prefix,
                        account,
                        record.created_at.as_microsecond(),
                        to_json(&record.quota)?,
                    ],
                )?;
                Ok(inserted == 1)
            })
        })
        .await
    }

    async fn key_of(&self, hash: [u8; 32]) -> Result<Option<KeyRecord>, StoreError> {
        self.with(move |connection| {
            connection
                .prepare_cached(&keys_where("k.hash = ?1"))?
                .query_row([hash], read_key)
                .optional()
        })
        .await
    }

    async fn list_keys(&self) -> Result<Vec<KeyRecord>, StoreError> {
        self.with(|connection| {
            let order = "true ORDER BY k.created_at DESC, k.rowid DESC";
            connection
                .prepare_cached(&keys_where(order))?
                .query_map([], read_key)?
                .collect()
        })
        .await
    }

    async fn remove_key(&self, id: &KeyId) -> Result<bool, StoreError> {
        let id = id.clone();
        self.with(move |connection| {
            durably(connection, |transaction| {
                let sql = "DELETE FROM api_keys WHERE id = ?1";
                Ok(transaction.execute(sql, [id.as_str()])? == 1)
            })
        })
        .await
    }

    async fn key_used(&self, id: &KeyId, at: Timestamp) -> Result<(), StoreError> {
        let id = id.clone();
        self.with(move |connection| {
            connection
                .prepare_cached("UPDATE api_keys SET last_used_at = ?2 WHERE id = ?1")?
                .execute(params![id.as_str(), at.as_microsecond()])
                .map(|_| ())
        })
        .await
    }
}

/// Does this in a transaction that is on the disk when it is done: a key that was revoked stays
/// revoked.
fn durably<T>(
    connection: &mut Connection,
    work: impl FnOnce(&Connection) -> rusqlite::Result<T>,
) -> rusqlite::Result<T> {
    connection.pragma_update(None, "synchronous", "FULL")?;
    let result = connection.transaction().and_then(|transaction| {
        let done = work(&transaction)?;
        transaction.commit()?;
        Ok(done)
    });
    connection.pragma_update(None, "synchronous", "NORMAL")?;
    result
}

fn user(
    connection: &Connection,
    column: &str,
    value: &str,
) -> rusqlite::Result<Option<UserRecord>> {
    connection
        .prepare_cached(&format!("SELECT {USER} FROM users WHERE {column} = ?1"))?
        .query_row([value], |row| {
            Ok(UserRecord {
                user: User {
                    id: user_id(row, 0)?,
                    name: row.get(1)?,
                    role: role(row, 2)?,
                },
                password: row.get(3)?,
                created_at: time(4, row.get(4)?)?,
            })
        })
        .optional()
}

fn keys_where(condition: &str) -> String {
    format!("SELECT {KEY} FROM api_keys k LEFT JOIN users u ON u.id = k.account WHERE {condition}")
}

fn read_key(row: &Row<'_>) -> rusqlite::Result<KeyRecord> {
    let id: String = row.get(0)?;
    let last_used: Option<i64> = row.get(4)?;
    let account: Option<String> = row.get(5)?;
    Ok(KeyRecord {
        id: id.parse().map_err(|error| bad(0, Box::new(error)))?,
        name: row.get(1)?,
        prefix: row.get(2)?,
        created_at: time(3, row.get(3)?)?,
        last_used_at: last_used.map(|micros| time(4, micros)).transpose()?,
        account: match account {
            None => Account::Local,
            Some(_) => Account::User(User {
                id: user_id(row, 5)?,
                name: row.get(6)?,
                role: role(row, 7)?,
            }),
        },
        quota: from_json(row, 8)?,
    })
}

fn user_id(row: &Row<'_>, column: usize) -> rusqlite::Result<UserId> {
    let text: String = row.get(column)?;
    text.parse().map_err(|error| bad(column, Box::new(error)))
}

fn role(row: &Row<'_>, column: usize) -> rusqlite::Result<Role> {
    let word: String = row.get(column)?;
    Role::from_word(&word).ok_or_else(|| bad(column, format!("unknown role {word:?}").into()))
}
