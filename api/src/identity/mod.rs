//! Users, their passwords and tokens, and API keys: who a caller is.

mod keys;
mod lockout;
mod password;
mod store;
mod token;

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::domain::{Principal, Role, StoreError, User, UserId};
pub use keys::{KeyError, MARK as KEY_MARK, NewKey};
use lockout::Lockout;
pub use password::{HashError, Passwords, WeakPassword, weaknesses};
pub use store::{AccountStore, Inserted, KeyRecord, UserRecord};
pub use token::{KeyFileError, TOKEN_SECONDS, Tokens};

/// The longest name of a user in bytes.
const MAX_NAME: usize = 64;

/// Who may register.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Registration {
    /// Anybody who reaches the daemon.
    #[default]
    Open,
    /// The first user, and whom an administrator registers.
    Admin,
}

/// What a user is to be.
#[derive(Debug, Clone)]
pub struct NewUser {
    /// 1 to 64 of `A` to `Z`, `a` to `z`, `0` to `9`, `-` and `_`.
    pub name: String,
    /// Not a weak one.
    pub password: String,
    /// What they may do.
    pub role: Role,
}

/// Why nobody was registered.
#[derive(Debug, thiserror::Error)]
pub enum RegisterError {
    /// The name or the password is not one. All that is wrong with both.
    #[error("the user name or the password is not taken")]
    Invalid {
        /// What is wrong with the name.
        name: Option<&'static str>,
        /// What is wrong with the password.
        password: Vec<WeakPassword>,
    },
    /// Only administrators may do that.
    #[error("{0}")]
    Forbidden(&'static str),
    /// Another has the name.
    #[error("user '{0}' already exists")]
    NameTaken(String),
    /// The password was not hashed.
    #[error(transparent)]
    Hash(#[from] HashError),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Why nobody was logged in.
#[derive(Debug, thiserror::Error)]
pub enum LoginError {
    /// There is no such user, or the password is another.
    #[error("the user name or the password is wrong")]
    Wrong,
    /// Too many failures.
    #[error("too many failures to log in; try again later")]
    Locked(Duration),
    /// The password was not checked.
    #[error(transparent)]
    Hash(#[from] HashError),
    /// No token could be made.
    #[error("no token could be made")]
    Token,
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// What a caller shows.
#[derive(Debug, Clone, Copy)]
pub enum Credential<'a> {
    /// A token of a user.
    Token(&'a str),
    /// An API key.
    Key(&'a str),
}

/// Users and API keys; clones share them.
#[derive(Clone)]
pub struct Identity {
    inner: Arc<Inner>,
}

struct Inner {
    store: Arc<dyn AccountStore>,
    passwords: Passwords,
    tokens: Tokens,
    lockout: Lockout,
    registration: Registration,
}

impl Identity {
    /// The users and keys in `store`, with tokens of `tokens`.
    ///
    /// # Errors
    /// Passwords cannot be hashed.
    pub fn new(
        store: Arc<dyn AccountStore>,
        tokens: Tokens,
        registration: Registration,
    ) -> Result<Self, HashError> {
        Ok(Self {
            inner: Arc::new(Inner {
                store,
                passwords: Passwords::new()?,
                tokens,
                lockout: Lockout::default(),
                registration,
            }),
        })
    }

    /// Adds a user, as asked for by `by`; `None` is somebody without credentials.
    ///
    /// The first user may be an administrator. After that, only administrators make others.
    ///
    /// # Errors
    /// Nobody was added.
    pub async fn register(
        &self,
        new: NewUser,
        by: Option<&Principal>,
    ) -> Result<UserRecord, RegisterError> {
        let name = check_name(&new.name).err();
        let password = weaknesses(&new.password, &new.name);
        if name.is_some() || !password.is_empty() {
            return Err(RegisterError::Invalid { name, password });
        }
        let by_admin = by.is_some_and(|by| by.user().is_some() && by.is_admin());
        let only_first = !by_admin
            && (new.role == Role::Admin || self.inner.registration == Registration::Admin);
        let forbidden = |role| {
            RegisterError::Forbidden(match role {
                Role::Admin => "only an administrator may register another one",
                Role::User => "only an administrator may register users here",
            })
        };
        // Before its password is worked on, which takes one of the few turns for that.
        if only_first && self.inner.store.has_users().await? {
            return Err(forbidden(new.role));
        }
        let record = UserRecord {
            user: User {
                id: UserId::random(),
                name: new.name,
                role: new.role,
            },
            password: self.inner.passwords.hash(new.password).await?,
            created_at: Timestamp::now(),
        };
        match self.inner.store.insert_user(&record, only_first).await? {
            Inserted::Yes => Ok(record),
            Inserted::NameTaken => Err(RegisterError::NameTaken(record.user.name)),
            Inserted::NotFirst => Err(forbidden(record.user.role)),
        }
    }

    /// A token for the user of this name and password, and who that is.
    ///
    /// # Errors
    /// They are wrong, or too many were. The same, and after the same time, for a user that there is
    /// and one that there is not.
    pub async fn login(&self, name: &str, password: String) -> Result<(String, User), LoginError> {
        if check_name(name).is_err() {
            // Such a name is nobody's, as everybody knows.
            return Err(LoginError::Wrong);
        }
        let attempt = self.inner.lockout.begin(&name.to_ascii_lowercase());
        let attempt = attempt.map_err(LoginError::Locked)?;
        let checked = async {
            let record = self.inner.store.user_named(name).await?;
            let hash = record.as_ref().map(|record| record.password.clone());
            let is_right = self.inner.passwords.is_right(password, hash).await?;
            Ok::<_, LoginError>(record.filter(|_| is_right))
        };
        let record = match checked.await {
            Ok(Some(record)) => record,
            // The attempt has failed when it is dropped.
            Ok(None) => return Err(LoginError::Wrong),
            Err(error) => {
                attempt.undecided();
                return Err(error);
            }
        };
        attempt.succeeded();
        let token = self.inner.tokens.issue(&record.user.id, Timestamp::now());
        Ok((token.ok_or(LoginError::Token)?, record.user))
    }

    /// Whether the store can be read.
    pub async fn is_healthy(&self) -> bool {
        self.inner.store.user_named("").await.is_ok()
    }

    /// Who shows this; `None` if it is nobody's, or not any more.
    ///
    /// # Errors
    /// The store failed.
    pub async fn authenticate(
        &self,
        credential: Credential<'_>,
    ) -> Result<Option<Principal>, StoreError> {
        match credential {
            Credential::Token(token) => {
                let Some(id) = self.inner.tokens.check(token) else {
                    return Ok(None);
                };
                // What they may do is as it is now, and not as it was when the token was made.
                let record = self.inner.store.user(&id).await?;
                Ok(record.map(|record| Principal::User(record.user)))
            }
            Credential::Key(key) => self.check_key(key).await,
        }
    }
}

/// Checks the name of a user.
///
/// # Errors
/// It is none: what is expected.
pub fn check_name(name: &str) -> Result<(), &'static str> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"_-".contains(&byte);
    if (1..=MAX_NAME).contains(&name.len()) && name.bytes().all(allowed) {
        Ok(())
    } else {
        Err("must be 1 to 64 of the characters A-Z, a-z, 0-9, - and _")
    }
}
