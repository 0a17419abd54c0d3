//! Passwords: which are taken, and how they are kept.
//!
//! They are kept as Argon2id hashes. Each takes tens of milliseconds of a processor and 19 MiB, which
//! is the point of it; so no more are computed at a time than half of the processors, and only so
//! many wait.

use std::sync::Arc;

use argon2::password_hash::rand_core::OsRng;
use argon2::password_hash::{PasswordHash, PasswordHasher, PasswordVerifier, SaltString};
use argon2::{Algorithm, Argon2, Params, Version};
use tokio::sync::Semaphore;

/// The longest password in bytes: hashing reads all of it.
const MAX_LEN: usize = 256;
/// The fewest characters of a password.
const MIN_CHARS: usize = 8;
/// The most hashes at a time. Below the failures that lock an account, so that one at a time of
/// those who know their password is always let through.
const MAX_AT_ONCE: usize = 4;
/// How many may wait for theirs.
const MAX_WAITING: usize = 64;

/// Why a password is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WeakPassword {
    /// Too few characters.
    #[error("must have at least 8 characters")]
    Short,
    /// Too many bytes.
    #[error("must be at most 256 bytes long")]
    Long,
    /// No `A` to `Z`, or the like.
    #[error("must have an upper case letter")]
    NoUpper,
    /// No `a` to `z`, or the like.
    #[error("must have a lower case letter")]
    NoLower,
    /// No digit.
    #[error("must have a digit")]
    NoDigit,
    /// Letters and digits only.
    #[error("must have a character that is neither a letter nor a digit")]
    NoSpecial,
    /// It has the user's name in it.
    #[error("must not contain the user name")]
    HasName,
}

/// Everything that is wrong with a password of the user of this name.
pub fn weaknesses(password: &str, name: &str) -> Vec<WeakPassword> {
    let has = |class: fn(char) -> bool| password.chars().any(class);
    let mut found = Vec::new();
    let mut note = |is_wrong: bool, what| {
        if is_wrong {
            found.push(what);
        }
    };
    note(password.chars().count() < MIN_CHARS, WeakPassword::Short);
    note(password.len() > MAX_LEN, WeakPassword::Long);
    note(!has(char::is_uppercase), WeakPassword::NoUpper);
    note(!has(char::is_lowercase), WeakPassword::NoLower);
    note(!has(char::is_numeric), WeakPassword::NoDigit);
    note(!has(|c| !c.is_alphanumeric()), WeakPassword::NoSpecial);
    let has_name = !name.is_empty() && password.to_lowercase().contains(&name.to_lowercase());
    note(has_name, WeakPassword::HasName);
    found
}

/// Why no hash was computed.
#[derive(Debug, thiserror::Error)]
pub enum HashError {
    /// Too many wait already.
    #[error("too many passwords are being checked at this moment; try again in a second")]
    Busy,
    /// The algorithm or its thread failed.
    #[error("the password cannot be hashed: {0}")]
    Failed(String),
}

/// Computes hashes, a few at a time. Clones share the limit.
#[derive(Debug, Clone)]
pub struct Passwords {
    argon2: Argon2<'static>,
    waiting: Arc<Semaphore>,
    computing: Arc<Semaphore>,
    /// The hash of no password that anybody has: what an unknown user's is compared with.
    decoy: Arc<str>,
}

impl Passwords {
    /// With the parameters that OWASP recommends: 19 MiB, two passes, one lane.
    ///
    /// # Errors
    /// The algorithm failed.
    pub fn new() -> Result<Self, HashError> {
        let params = Params::new(19 * 1024, 2, 1, None).map_err(failed)?;
        let argon2 = Argon2::new(Algorithm::Argon2id, Version::V0x13, params);
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let decoy = hash(&argon2, &format!("{:032x}", rand::random::<u128>()))?;
        Ok(Self {
            argon2,
            waiting: Arc::new(Semaphore::new(MAX_WAITING)),
            computing: Arc::new(Semaphore::new((processors / 2).clamp(1, MAX_AT_ONCE))),
            decoy: decoy.into(),
        })
    }

    /// The hash to keep of a password.
    ///
    /// # Errors
    /// Too many wait, or the algorithm failed.
    pub async fn hash(&self, password: String) -> Result<String, HashError> {
        let argon2 = self.argon2.clone();
        self.compute(move || hash(&argon2, &password)).await?
    }

    /// Whether `password` is that of `hash`; with `None`, `false` after as long a time.
    ///
    /// # Errors
    /// Too many wait, or the algorithm failed.
    pub async fn is_right(
        &self,
        password: String,
        hash: Option<String>,
    ) -> Result<bool, HashError> {
        if password.len() > MAX_LEN {
            return Ok(false);
        }
        let (argon2, decoy) = (self.argon2.clone(), Arc::clone(&self.decoy));
        self.compute(move || {
            let known = hash.is_some();
            let hash = hash.as_deref().unwrap_or(&decoy);
            let hash = PasswordHash::new(hash).map_err(failed)?;
            let is_right = argon2.verify_password(password.as_bytes(), &hash).is_ok();
            Ok(known && is_right)
        })
        .await?
    }

    async fn compute<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, HashError> {
        let waiting = Arc::clone(&self.waiting);
        let waiting = waiting.try_acquire_owned().map_err(|_| HashError::Busy)?;
        let computing = Arc::clone(&self.computing);
        let computing = computing.acquire_owned().await.map_err(failed)?;
        // Held by the work and not by who waits for it, who may go away.
        tokio::task::spawn_blocking(move || {
            let result = work();
            drop((computing, waiting));
            result
        })
        .await
        .map_err(failed)
    }
}

fn hash(argon2: &Argon2<'_>, password: &str) -> Result<String, HashError> {
    let salt = SaltString::generate(&mut OsRng);
    let hash = argon2.hash_password(password.as_bytes(), &salt);
    Ok(hash.map_err(failed)?.to_string())
}

fn failed(error: impl std::fmt::Display) -> HashError {
    HashError::Failed(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weak_passwords_are_told_why() {
        use WeakPassword::{HasName, Long, NoDigit, NoLower, NoSpecial, NoUpper, Short};
        let table: [(&str, &[WeakPassword]); 9] = [
            ("Correct-horse-7", &[]),
            ("Grüße-Äußerst-7", &[]),
            ("Sh0rt!a", &[Short]),
            ("lower-case-7", &[NoUpper]),
            ("UPPER-CASE-7", &[NoLower]),
            ("No-digits-here", &[NoDigit]),
            ("NoSpecials777", &[NoSpecial]),
            ("Xx-ALICE-1234", &[HasName]),
            ("", &[Short, NoUpper, NoLower, NoDigit, NoSpecial]),
        ];
        for (password, expected) in table {
            assert_eq!(weaknesses(password, "alice"), expected, "{password}");
        }
        let long = format!("Aa1!{}", "x".repeat(MAX_LEN));
        assert_eq!(weaknesses(&long, "alice"), [Long]);
    }

    #[tokio::test]
    async fn a_hash_tells_its_password_from_others() {
        let passwords = Passwords::new().unwrap();
        let hash = passwords.hash("Correct-horse-7".into()).await.unwrap();
        assert!(
            hash.starts_with("$argon2id$v=19$m=19456,t=2,p=1$"),
            "{hash}"
        );
        assert!(!hash.contains("horse"));
        let is_right = |password: &str, hash: Option<&String>| {
            passwords.is_right(password.into(), hash.cloned())
        };
        assert!(is_right("Correct-horse-7", Some(&hash)).await.unwrap());
        assert!(!is_right("Correct-horse-8", Some(&hash)).await.unwrap());
        assert!(!is_right("Correct-horse-7", None).await.unwrap());
        assert!(!is_right(&"x".repeat(1 << 20), Some(&hash)).await.unwrap());
    }

    #[tokio::test]
    async fn only_so_many_wait() {
        let passwords = Passwords::new().unwrap();
        let _all = passwords.waiting.acquire_many(64).await.unwrap();
        let refused = passwords.hash("x".into()).await;
        assert!(matches!(refused, Err(HashError::Busy)));
    }
}
