//! Where users and API keys are written down.

use async_trait::async_trait;
use jiff::Timestamp;

use crate::domain::{Account, KeyId, Quota, StoreError, User, UserId};

/// A user as it is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UserRecord {
    /// The user.
    pub user: User,
    /// Hash of the password.
    pub password: String,
    /// When they registered.
    pub created_at: Timestamp,
}

/// An API key as it is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyRecord {
    /// Its name, for programs.
    pub id: KeyId,
    /// Its name, for people.
    pub name: String,
    /// The first characters of the key.
    pub prefix: String,
    /// Whom it acts for.
    pub account: Account,
    /// How much the sandboxes that are made with it may have together.
    pub quota: Quota,
    /// When it was made.
    pub created_at: Timestamp,
    /// When it was last used, to the minute.
    pub last_used_at: Option<Timestamp>,
}

/// What became of a new user.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Inserted {
    /// It is there.
    Yes,
    /// Another has this name.
    NameTaken,
    /// It was to be added only if there is no other, and there is.
    NotFirst,
}

/// The records of users and API keys. What was written is on the disk.
#[async_trait]
pub trait AccountStore: Send + Sync {
    /// Adds a user; with `only_first` only if there is none yet.
    ///
    /// # Errors
    /// The store failed; nothing is added.
    async fn insert_user(
        &self,
        record: &UserRecord,
        only_first: bool,
    ) -> Result<Inserted, StoreError>;

    /// Whether there are users.
    ///
    /// # Errors
    /// The store failed.
    async fn has_users(&self) -> Result<bool, StoreError>;

    /// The user of that id.
    ///
    /// # Errors
    /// The store failed.
    async fn user(&self, id: &UserId) -> Result<Option<UserRecord>, StoreError>;

    /// The user of that name, whatever the case of its letters.
    ///
    /// # Errors
    /// The store failed.
    async fn user_named(&self, name: &str) -> Result<Option<UserRecord>, StoreError>;

    /// Adds a key with the hash of its secret; `false` if its id is taken.
    ///
    /// # Errors
    /// The store failed; nothing is added.
    async fn insert_key(&self, record: &KeyRecord, hash: [u8; 32]) -> Result<bool, StoreError>;

    /// The key of which this is the hash of the secret.
    ///
    /// # Errors
    /// The store failed.
    async fn key_of(&self, hash: [u8; 32]) -> Result<Option<KeyRecord>, StoreError>;

    /// All keys, newest first.
    ///
    /// # Errors
    /// The store failed.
    async fn list_keys(&self) -> Result<Vec<KeyRecord>, StoreError>;

    /// Removes a key; `false` if it is not there.
    ///
    /// # Errors
    /// The store failed; it is as it was.
    async fn remove_key(&self, id: &KeyId) -> Result<bool, StoreError>;

    /// Writes down when a key was last used, if it is there.
    ///
    /// # Errors
    /// The store failed; it is as it was.
    async fn key_used(&self, id: &KeyId, at: Timestamp) -> Result<(), StoreError>;
}
