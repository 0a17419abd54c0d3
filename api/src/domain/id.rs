//! Names of things: a prefix for the kind, and random hexadecimal digits.

use std::fmt;
use std::marker::PhantomData;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A kind of thing that has names.
pub trait Kind {
    /// What it is, with an article.
    const WHAT: &'static str;
    /// Two letters before the dash.
    const PREFIX: &'static str;
    /// Hexadecimal digits after the dash.
    const DIGITS: usize;
}

/// Sandboxes, as in `sb-0a1b2c3d`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum OfSandbox {}
/// Snapshots, as in `sn-0a1b2c3d`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum OfSnapshot {}
/// Layers, as in `ly-0123456789abcdef`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum OfLayer {}

/// Templates that were built, as in `tp-0a1b2c3d`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum OfTemplate {}

/// Users, as in `us-0123456789abcdef`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum OfUser {}

/// API keys, as in `ak-0a1b2c3d`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum OfKey {}

/// Name of a user, for programs.
pub type UserId = Id<OfUser>;
/// Name of an API key, which is no secret.
pub type KeyId = Id<OfKey>;

impl Kind for OfUser {
    const WHAT: &'static str = "a user";
    const PREFIX: &'static str = "us";
    const DIGITS: usize = 16;
}

impl Kind for OfKey {
    const WHAT: &'static str = "an API key";
    const PREFIX: &'static str = "ak";
    const DIGITS: usize = 8;
}

/// Name of a sandbox.
pub type SandboxId = Id<OfSandbox>;
/// Name of a snapshot.
pub type SnapshotId = Id<OfSnapshot>;
/// Name of a layer.
pub type LayerId = Id<OfLayer>;

/// Name of a template that was built, for the daemon alone.
pub type TemplateId = Id<OfTemplate>;

impl Kind for OfTemplate {
    const WHAT: &'static str = "a template";
    const PREFIX: &'static str = "tp";
    const DIGITS: usize = 8;
}

impl Kind for OfSandbox {
    const WHAT: &'static str = "a sandbox";
    const PREFIX: &'static str = "sb";
    const DIGITS: usize = 8;
}

impl Kind for OfSnapshot {
    const WHAT: &'static str = "a snapshot";
    const PREFIX: &'static str = "sn";
    const DIGITS: usize = 8;
}

impl Kind for OfLayer {
    const WHAT: &'static str = "a layer";
    const PREFIX: &'static str = "ly";
    // Nobody asks whether one is taken before it is made.
    const DIGITS: usize = 16;
}

/// The name of one thing of a kind.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String", bound = "K: Kind + Clone")]
pub struct Id<K>(String, PhantomData<K>);

impl<K: Kind> Id<K> {
    /// Length of every id of this kind in bytes.
    pub const LEN: usize = K::PREFIX.len() + 1 + K::DIGITS;

    /// A random id. Where two may collide, whoever stores it tries again.
    pub fn random() -> Self {
        let digits = format!("{:016x}", rand::random::<u64>());
        Self(
            format!("{}-{}", K::PREFIX, &digits[..K::DIGITS]),
            PhantomData,
        )
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl<K> fmt::Display for Id<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A string is not the id of such a thing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the id of {what} is `{prefix}-` and {digits} hexadecimal digits")]
pub struct ParseIdError {
    what: &'static str,
    prefix: &'static str,
    digits: usize,
}

impl<K: Kind> FromStr for Id<K> {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let is_digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        text.strip_prefix(K::PREFIX)
            .and_then(|rest| rest.strip_prefix('-'))
            .filter(|digits| digits.len() == K::DIGITS && digits.bytes().all(is_digit))
            .map(|_| Self(text.to_owned(), PhantomData))
            .ok_or(ParseIdError {
                what: K::WHAT,
                prefix: K::PREFIX,
                digits: K::DIGITS,
            })
    }
}

impl<K: Kind> TryFrom<String> for Id<K> {
    type Error = ParseIdError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl<K> From<Id<K>> for String {
    fn from(id: Id<K>) -> Self {
        id.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_parse_only_as_they_are_made() {
        for _ in 0..100 {
            let id = SandboxId::random();
            assert_eq!(id.as_str().len(), SandboxId::LEN);
            assert_eq!(id.as_str().parse(), Ok(id.clone()));
            assert!(id.as_str().parse::<SnapshotId>().is_err());
            let id = LayerId::random();
            assert_eq!(id.as_str().len(), LayerId::LEN);
            assert_eq!(id.as_str().parse(), Ok(id.clone()));
        }
        for bad in [
            "",
            "sb-",
            "sb-1234567",
            "sb-123456789",
            "sb-1234567G",
            "SB-12345678",
            "../sb-12345678",
            "sb-1234567A",
        ] {
            let error = bad.parse::<SandboxId>().unwrap_err().to_string();
            assert_eq!(
                error,
                "the id of a sandbox is `sb-` and 8 hexadecimal digits"
            );
        }
    }
}
