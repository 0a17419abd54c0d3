//! Who asks for something, and whose things they see.
//!
//! A thing belongs to a user, or to nobody. Nobody's are those of the local principal, which is
//! whoever asks without credentials on the machine itself. A user sees their own things; an
//! administrator and the local principal see all. An API key acts for the account that it was made
//! for, and may do what that may.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::id::{KeyId, UserId};

/// What a user may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Sees and touches their own things.
    User,
    /// Sees and touches everything, and makes administrators.
    Admin,
}

impl Role {
    /// The role as a word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::User => "user",
            Self::Admin => "admin",
        }
    }

    /// The role that is called so.
    pub fn from_word(word: &str) -> Option<Self> {
        [Self::User, Self::Admin]
            .into_iter()
            .find(|role| role.as_str() == word)
    }
}

/// A user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// For programs; never given to another.
    pub id: UserId,
    /// For people; unique.
    pub name: String,
    /// What they may do.
    pub role: Role,
}

/// Whom an API key acts for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Account {
    /// The local principal.
    Local,
    /// A user.
    User(User),
}

/// Who asks for something.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Principal {
    /// Somebody on this machine, without credentials; or the daemon itself.
    Local,
    /// A user with a token.
    User(User),
    /// Somebody with an API key.
    Key {
        /// Which.
        id: KeyId,
        /// Whom it acts for.
        account: Account,
    },
}

impl Principal {
    /// The user who acts, if it is not the local principal.
    pub fn user(&self) -> Option<&User> {
        match self {
            Self::User(user)
            | Self::Key {
                account: Account::User(user),
                ..
            } => Some(user),
            Self::Local
            | Self::Key {
                account: Account::Local,
                ..
            } => None,
        }
    }

    /// The API key that acts.
    pub fn key(&self) -> Option<&KeyId> {
        match self {
            Self::Key { id, .. } => Some(id),
            Self::Local | Self::User(_) => None,
        }
    }

    /// Whose the things are that it makes; `None` is the local principal.
    pub fn owner(&self) -> Option<&UserId> {
        self.user().map(|user| &user.id)
    }

    /// Whether it sees and touches everything, and may do what only administrators may.
    pub fn is_admin(&self) -> bool {
        self.user().is_none_or(|user| user.role == Role::Admin)
    }

    /// Whether a thing of this owner is its own.
    pub fn owns(&self, owner: Option<&UserId>) -> bool {
        self.owner() == owner
    }

    /// Whether it sees and touches a thing of this owner.
    pub fn may_see(&self, owner: Option<&UserId>) -> bool {
        self.is_admin() || self.owns(owner)
    }
}

impl fmt::Display for Principal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.user() {
            Some(user) => f.write_str(user.id.as_str()),
            None => f.write_str("local"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_sees_what() {
        let user = |role| User {
            id: UserId::random(),
            name: "n".into(),
            role,
        };
        let (one, other, admin) = (user(Role::User), user(Role::User), user(Role::Admin));
        let key = |account| Principal::Key {
            id: KeyId::random(),
            account,
        };
        let owners = [None, Some(&one.id), Some(&other.id), Some(&admin.id)];
        let table = [
            (Principal::Local, [true, true, true, true]),
            (key(Account::Local), [true, true, true, true]),
            (Principal::User(admin.clone()), [true, true, true, true]),
            (key(Account::User(admin.clone())), [true, true, true, true]),
            (Principal::User(one.clone()), [false, true, false, false]),
            (key(Account::User(one.clone())), [false, true, false, false]),
            (Principal::User(other.clone()), [false, false, true, false]),
        ];
        for (principal, sees) in table {
            assert_eq!(
                owners.map(|owner| principal.may_see(owner)),
                sees,
                "{principal:?}"
            );
            assert!(principal.owns(principal.owner()));
        }
    }
}
