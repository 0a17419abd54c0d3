//! Accounts of a guest, and their passwords.

use std::collections::HashMap;

use sha_crypt::{PasswordVerifier, ShaCrypt};
use yescrypt::Yescrypt;

use super::evidence::Evidence;
use super::report::{Details, Verdict};

/// The most accounts that are looked at.
const MAX_ACCOUNTS: usize = 1000;
/// How much trying passwords may cost, in the time of one try of SHA-crypt, which is some milliseconds.
const MAX_COST: usize = 400;
/// What one try of yescrypt costs, in the same.
const YESCRYPT_COST: usize = 8;
/// The most rounds of a hash that is tried; the guest chooses them.
const MAX_ROUNDS: u32 = 10_000;
/// What yescrypt's hashes begin with that passwd(1) makes where nothing else is configured, as in Debian:
/// 4096 blocks of 4 KiB (crypt(5)). The guest chooses how much memory and time a hash takes; others are
/// not tried.
const YESCRYPT: &str = "$y$j9T$";
/// Length of the last part of such a hash: 32 bytes, 6 bits a character.
const YESCRYPT_DIGEST: usize = 43;
/// The longest name of an account that is tried as its password, in bytes; useradd(8) makes none that is
/// longer than 32. What SHA-crypt costs grows with the square of a password's length.
const MAX_NAME: usize = 64;
/// The longest hash, in bytes.
const MAX_HASH: usize = 256;
/// Passwords that images are published with, beside the account's name.
const DEFAULTS: [&str; 10] = [
    "password",
    "root",
    "toor",
    "admin",
    "changeme",
    "123456",
    "debian",
    "ubuntu",
    "vagrant",
    "raspberry",
];

/// An account, with its password as it is kept.
struct Account<'a> {
    name: &'a str,
    uid: &'a str,
    password: &'a str,
}

/// The first [`MAX_ACCOUNTS`] accounts.
struct Accounts<'a> {
    first: Vec<Account<'a>>,
    are_all: bool,
}

impl<'a> Accounts<'a> {
    fn of(evidence: &'a Evidence) -> Option<Self> {
        let passwd = evidence.passwd.as_deref()?;
        let hashes = hashes(evidence.shadow.as_deref().unwrap_or_default());
        let mut accounts = passwd.lines().filter_map(|line| {
            let mut fields = line.split(':');
            let (name, password, uid) = (fields.next()?, fields.next()?, fields.next()?);
            let is_named = !name.is_empty() && !name.starts_with('#');
            is_named.then(|| Account {
                name,
                uid,
                password: match password {
                    // Without a line there, nobody can log in by it.
                    "x" => hashes.get(name).copied().unwrap_or("!"),
                    other => other,
                },
            })
        });
        Some(Self {
            first: accounts.by_ref().take(MAX_ACCOUNTS).collect(),
            are_all: accounts.next().is_none(),
        })
    }

    /// What it comes to that of these accounts those are bad.
    fn unless(&self, is_bad: impl Fn(&Account<'_>) -> bool) -> Verdict {
        let bad = self.first.iter().filter(|account| is_bad(account));
        self.verdict(bad.map(|account| account.name).collect())
    }

    /// What it comes to that these were found.
    fn verdict(&self, found: Details) -> Verdict {
        match found.is_empty() && !self.are_all {
            true => Verdict::warning(format_args!("there are more than {MAX_ACCOUNTS} accounts")),
            false => found.into(),
        }
    }
}

/// The hashes of passwords by the names of accounts; of an account with several the first.
fn hashes(shadow: &str) -> HashMap<&str, &str> {
    let mut hashes = HashMap::new();
    for line in shadow.lines() {
        if let Some((name, rest)) = line.split_once(':') {
            let hash = rest.split(':').next().unwrap_or_default();
            hashes.entry(name).or_insert(hash);
        }
    }
    hashes
}

/// Accounts that ask for no password.
pub fn empty_passwords(evidence: &Evidence) -> Verdict {
    match Accounts::of(evidence) {
        None => Verdict::NotApplicable,
        Some(accounts) => accounts.unless(|account| account.password.is_empty()),
    }
}

/// Accounts whose password is one of those that everybody tries first.
pub fn default_passwords(evidence: &Evidence) -> Verdict {
    let Some(accounts) = Accounts::of(evidence) else {
        return Verdict::NotApplicable;
    };
    let (mut found, mut unknown, mut spent) = (Details::default(), Details::default(), 0);
    for account in &accounts.first {
        if account.password.is_empty() || account.password.starts_with(['!', '*']) {
            continue;
        }
        let scheme = Scheme::of(account.password).filter(|scheme| {
            let costs_little = spent + scheme.cost() <= MAX_COST;
            costs_little && account.name.len() <= MAX_NAME
        });
        let Some(scheme) = scheme else {
            unknown.add(format_args!("{}: its hash was not tried", account.name));
            continue;
        };
        spent += scheme.cost();
        let mut candidates = DEFAULTS.into_iter().chain([account.name]);
        if candidates.any(|candidate| scheme.verifies(candidate, account.password)) {
            found.add(account.name);
        }
    }
    match found.is_empty() && !unknown.is_empty() {
        true => Verdict::Warning(unknown),
        false => accounts.verdict(found),
    }
}

/// How a hash was made that can be tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Scheme {
    Sha256,
    Sha512,
    Yescrypt,
}

impl Scheme {
    /// That of a hash, unless a try might take long.
    fn of(hash: &str) -> Option<Self> {
        if hash.len() > MAX_HASH || !hash.is_ascii() {
            return None;
        }
        if let Some(rest) = hash.strip_prefix(YESCRYPT) {
            let is_digit = |byte: u8| byte.is_ascii_alphanumeric() || b"./".contains(&byte);
            let (salt, digest) = rest.split_once('$')?;
            let is_whole = !salt.is_empty() && digest.len() == YESCRYPT_DIGEST;
            let is_text = salt.bytes().chain(digest.bytes()).all(is_digit);
            return (is_whole && is_text).then_some(Self::Yescrypt);
        }
        let (scheme, rest) = match hash.strip_prefix("$6$") {
            Some(rest) => (Self::Sha512, rest),
            None => (Self::Sha256, hash.strip_prefix("$5$")?),
        };
        let is_few = match rest.strip_prefix("rounds=") {
            None => true,
            Some(rest) => {
                let rounds = rest
                    .split('$')
                    .next()
                    .and_then(|rounds| rounds.parse().ok());
                rounds.is_some_and(|rounds: u32| rounds <= MAX_ROUNDS)
            }
        };
        is_few.then_some(scheme)
    }

    /// What it costs to try all passwords.
    fn cost(self) -> usize {
        let tries = DEFAULTS.len() + 1;
        match self {
            Self::Sha256 | Self::Sha512 => tries,
            Self::Yescrypt => tries * YESCRYPT_COST,
        }
    }

    fn verifies(self, candidate: &str, hash: &str) -> bool {
        let candidate = candidate.as_bytes();
        let verified = match self {
            Self::Sha256 => ShaCrypt::SHA256.verify_password(candidate, hash),
            Self::Sha512 => ShaCrypt::SHA512.verify_password(candidate, hash),
            Self::Yescrypt => Yescrypt::default().verify_password(candidate, hash),
        };
        verified.is_ok()
    }
}

/// Accounts whose password is kept in a way that can be broken.
pub fn weak_hashes(evidence: &Evidence) -> Verdict {
    let Some(accounts) = Accounts::of(evidence) else {
        return Verdict::NotApplicable;
    };
    accounts.unless(|account| {
        let hash = account.password;
        let is_locked = hash.is_empty() || hash.starts_with(['!', '*']);
        !is_locked && (hash.starts_with("$1$") || !hash.starts_with('$'))
    })
}

/// Accounts that are root under another name.
pub fn other_roots(evidence: &Evidence) -> Verdict {
    let Some(accounts) = Accounts::of(evidence) else {
        return Verdict::NotApplicable;
    };
    accounts.unless(|account| account.name != "root" && account.uid.parse::<u32>() == Ok(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn evidence(passwd: &str, shadow: &str) -> Evidence {
        Evidence {
            passwd: Some(passwd.to_owned()),
            shadow: Some(shadow.to_owned()),
            ..Evidence::default()
        }
    }

    fn failed(names: &[&str]) -> Verdict {
        Verdict::unless(names)
    }

    #[test]
    fn accounts_are_judged_by_both_files() {
        let weak = evidence(
            "root:x:0:0::/root:/bin/sh\nopen::1:1::/:/bin/sh\nshut:x:2:2::/:\ntoor:*:0:0::/:\nold:x:3:3::/:\n# x::0\n",
            "root::19000:0:::::\nshut:!:1::::::\nold:$1$salt$hash:1::::::\n",
        );
        assert_eq!(empty_passwords(&weak), failed(&["root", "open"]));
        assert_eq!(other_roots(&weak), failed(&["toor"]));
        assert_eq!(weak_hashes(&weak), failed(&["old"]));
        let good = evidence(
            "root:x:0:0::/root:/bin/sh\nlost:x:5:5::/:\n",
            "root:*:1::::::\n",
        );
        for judge in [empty_passwords, default_passwords, weak_hashes, other_roots] {
            assert_eq!(judge(&good), Verdict::Passed);
            assert_eq!(judge(&Evidence::default()), Verdict::NotApplicable);
        }
    }

    #[test]
    fn passwords_that_everybody_tries_are_found_and_costly_hashes_are_not_tried() {
        let hash = |password: &str| {
            use sha_crypt::PasswordHasher;
            let hashed = ShaCrypt::SHA512.hash_password_with_salt(password.as_bytes(), b"saltsalt");
            hashed.unwrap().to_string()
        };
        let with =
            |hash: &str| evidence("bob:x:1:1::/:/bin/sh\n", &format!("bob:{hash}:1::::::\n"));
        assert_eq!(
            default_passwords(&with(&hash("changeme"))),
            failed(&["bob"])
        );
        assert_eq!(default_passwords(&with(&hash("bob"))), failed(&["bob"]));
        assert_eq!(
            default_passwords(&with(&hash("Correct-horse-7"))),
            Verdict::Passed
        );
        for costly in [
            "$6$rounds=999999999$saltsalt$x",
            "$6$rounds=x$saltsalt$x",
            "$y$j9T$salt$hash",
            "$y$jFT$saltsalt$qiLkq8jFcAjUmiH4VA7XBzQ/6oZzZ3D3rRlQvM0dL60",
            &format!("$6${}", "x".repeat(1000)),
        ] {
            let verdict = default_passwords(&with(costly));
            assert!(matches!(verdict, Verdict::Warning(_)), "{costly}");
        }
    }

    #[test]
    fn a_name_that_is_longer_than_any_is_not_tried_as_a_password() {
        use sha_crypt::PasswordHasher;
        let hash = ShaCrypt::SHA512.hash_password_with_salt(b"Correct-horse-7", b"saltsalt");
        let hash = hash.unwrap().to_string();
        for (length, is_tried) in [(MAX_NAME, true), (MAX_NAME + 1, false)] {
            let name = "x".repeat(length);
            let evidence = evidence(&format!("{name}:{hash}:1:1::/:/bin/sh\n"), "");
            let verdict = default_passwords(&evidence);
            assert_eq!(verdict == Verdict::Passed, is_tried, "{verdict:?}");
        }
    }

    #[test]
    fn accounts_that_were_not_looked_at_have_not_passed() {
        let good = "x:!:1:1::/:\n".repeat(MAX_ACCOUNTS - 1) + "#\n\nroot:!:0:0::/root:/bin/sh\n";
        for judge in [empty_passwords, default_passwords, weak_hashes, other_roots] {
            assert_eq!(judge(&evidence(&good, "")), Verdict::Passed);
            let more = format!("{good}toor::0:0::/:\n");
            let verdict = judge(&evidence(&more, ""));
            assert!(matches!(verdict, Verdict::Warning(_)), "{verdict:?}");
        }
    }

    #[test]
    fn hashes_that_debian_makes_are_tried_a_few_at_a_time() {
        use yescrypt::PasswordHasher;
        let made = Yescrypt::default().hash_password_with_salt(b"password", b"saltsaltsaltsalt");
        let hash = made.unwrap().to_string();
        assert_eq!(Scheme::of(&hash), Some(Scheme::Yescrypt), "{hash}");
        let users = |count: usize| {
            let line = |index| format!("u{index}:{hash}:1::::::\n");
            let passwd = (0..count).map(|index| format!("u{index}:x:1:1::/:/bin/sh\n"));
            evidence(
                &passwd.collect::<String>(),
                &(0..count).map(line).collect::<String>(),
            )
        };
        assert_eq!(default_passwords(&users(1)), failed(&["u0"]));
        // The rest costs too much; that does not hide what was found.
        assert_eq!(
            default_passwords(&users(9)),
            failed(&["u0", "u1", "u2", "u3"])
        );
        // One that crypt(3) has made of `changeme`.
        let libcrypt = "$y$j9T$F5Jx5fExrKuPp53xLKQ..1$Lj6JGasT6O4mfFm9ecJyB76GfRc1Wqgm9tsKQpLYBj8";
        assert!(Scheme::Yescrypt.verifies("changeme", libcrypt));
        assert!(!Scheme::Yescrypt.verifies("Correct-horse-7", libcrypt));
    }
}
