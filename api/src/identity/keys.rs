//! API keys: random numbers of 256 bits, of which only the SHA-256 is kept. So slow a hash as that of
//! a password would add nothing, since nobody can guess one.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jiff::{SignedDuration, Timestamp};
use sha2::{Digest, Sha256};

use super::{Identity, KeyRecord};
use crate::domain::{Account, KeyId, Principal, Quota, StoreError};

/// What every key begins with, so that one that leaked is recognized.
pub const MARK: &str = "mvs_";
/// Length of a key in characters.
const KEY_LEN: usize = MARK.len() + 43;
/// How much of it is kept to be shown, in characters.
const PREFIX_LEN: usize = MARK.len() + 6;
/// The longest name in characters.
const MAX_NAME_CHARS: usize = 64;
/// How exactly is known when it was last used: each note is a write.
const USED_EVERY: SignedDuration = SignedDuration::from_secs(60);

/// What a key is to be.
#[derive(Debug, Clone)]
pub struct NewKey {
    /// Its name, for people: 1 to 64 characters.
    pub name: String,
    /// Name of the user whom it acts for; `None` is who makes it.
    pub user: Option<String>,
    /// How much the sandboxes that are made with it may have together, within what the account may have.
    pub quota: Quota,
}

/// Why there is no key, or it is still there.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The request makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// Only administrators may do that.
    #[error("only an administrator may make an API key that acts for somebody else")]
    Forbidden,
    /// It would be a way around its quota.
    #[error("an API key that has a quota makes no API keys: use a token, or a key without a quota")]
    HasQuota,
    /// There is no such key, for this caller.
    #[error("API key not found")]
    NotFound,
    /// No random number could be had.
    #[error("the system gives no random numbers")]
    Random(#[source] std::io::Error),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Identity {
    /// Makes a key. The key itself is told this once, and kept nowhere.
    ///
    /// # Errors
    /// There is none.
    pub async fn create_key(
        &self,
        new: NewKey,
        by: &Principal,
    ) -> Result<(String, KeyRecord), KeyError> {
        let chars = new.name.chars().count();
        if !(1..=MAX_NAME_CHARS).contains(&chars) || new.name.chars().any(char::is_control) {
            let text = "name must be 1 to 64 characters, and no control characters";
            return Err(KeyError::Invalid(text.to_owned()));
        }
        if let Some(key) = by.key() {
            let keys = self.inner.store.list_keys().await?;
            let is_limited = |record: &KeyRecord| record.id == *key && record.quota.is_limited();
            if keys.iter().any(is_limited) {
                return Err(KeyError::HasQuota);
            }
        }
        let account = match (new.user, by.user()) {
            (None, None) => Account::Local,
            (None, Some(user)) => Account::User(user.clone()),
            (Some(name), Some(user)) if user.name.eq_ignore_ascii_case(&name) => {
                Account::User(user.clone())
            }
            (Some(_), _) if !by.is_admin() => return Err(KeyError::Forbidden),
            (Some(name), _) => match self.inner.store.user_named(&name).await? {
                Some(record) => Account::User(record.user),
                None => return Err(KeyError::Invalid(format!("there is no user {name:?}"))),
            },
        };
        let mut secret = [0; 32];
        rustix::rand::getrandom(&mut secret, rustix::rand::GetRandomFlags::empty())
            .map_err(|error| KeyError::Random(error.into()))?;
        let key = format!("{MARK}{}", URL_SAFE_NO_PAD.encode(secret));
        let mut record = KeyRecord {
            id: KeyId::random(),
            name: new.name,
            prefix: key.chars().take(PREFIX_LEN).collect(),
            account,
            quota: new.quota,
            created_at: Timestamp::now(),
            last_used_at: None,
        };
        while !self.inner.store.insert_key(&record, hash(&key)).await? {
            record.id = KeyId::random();
        }
        Ok((key, record))
    }

    /// The keys that `by` may see: those that act for the same, or all.
    ///
    /// # Errors
    /// The store failed.
    pub async fn list_keys(&self, by: &Principal) -> Result<Vec<KeyRecord>, StoreError> {
        let mut keys = self.inner.store.list_keys().await?;
        keys.retain(|key| may_see(by, key));
        Ok(keys)
    }

    /// Ends a key.
    ///
    /// # Errors
    /// There is no such key for `by`, or the store failed.
    pub async fn revoke_key(&self, id: &str, by: &Principal) -> Result<(), KeyError> {
        let id: KeyId = id.parse().map_err(|_| KeyError::NotFound)?;
        let keys = self.list_keys(by).await?;
        if keys.iter().any(|key| key.id == id) && self.inner.store.remove_key(&id).await? {
            Ok(())
        } else {
            Err(KeyError::NotFound)
        }
    }

    /// Whom this key acts for; `None` if it is none.
    pub(super) async fn check_key(&self, key: &str) -> Result<Option<Principal>, StoreError> {
        if key.len() != KEY_LEN || !key.starts_with(MARK) {
            return Ok(None);
        }
        let Some(record) = self.inner.store.key_of(hash(key)).await? else {
            return Ok(None);
        };
        let now = Timestamp::now();
        let is_fresh = |used: Timestamp| now.duration_since(used) < USED_EVERY;
        if !record.last_used_at.is_some_and(is_fresh) {
            self.inner.store.key_used(&record.id, now).await?;
        }
        Ok(Some(Principal::Key {
            id: record.id,
            account: record.account,
        }))
    }
}

fn may_see(by: &Principal, key: &KeyRecord) -> bool {
    match &key.account {
        Account::Local => by.is_admin(),
        Account::User(user) => by.may_see(Some(&user.id)),
    }
}

fn hash(key: &str) -> [u8; 32] {
    Sha256::digest(key).into()
}
