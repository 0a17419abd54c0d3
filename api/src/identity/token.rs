//! Tokens: JSON Web Tokens, signed with HMAC-SHA-256 and a key of this daemon.
//!
//! The library is given a provider that knows this algorithm alone, so that what another one would
//! accept cannot be asked for.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use hmac::{Hmac, Mac};
use jiff::Timestamp;
use jsonwebtoken::crypto::{CryptoProvider, JwtSigner, JwtVerifier, KeyUtils};
use jsonwebtoken::errors::{ErrorKind, Result as JwtResult};
use jsonwebtoken::signature::{Error as SignatureError, Signer, Verifier};
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use serde::{Deserialize, Serialize};
use sha2::Sha256;

use crate::domain::UserId;

/// How long a token is good, in seconds.
pub const TOKEN_SECONDS: u64 = 3600;
/// How far the clocks of two machines may be apart, in seconds.
const LEEWAY_SECONDS: u64 = 10;
/// Who made a token, and for whom.
const SERVICE: &str = "microvm-sandbox";
/// Length of the key in bytes: that of the hash (RFC 7518, section 3.2).
const KEY_LEN: usize = 32;

/// What a token says.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Claims {
    iss: String,
    aud: String,
    sub: UserId,
    iat: i64,
    nbf: i64,
    exp: i64,
}

/// Why there is no key.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    /// The file cannot be made or read.
    #[error("the key of tokens {path} cannot be made or read", path = path.display())]
    Io {
        /// Where it is.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// Others can read it.
    #[error(
        "the key of tokens {path} can be read by others: make it private with `chmod 600`, or \
         delete it, which ends all tokens",
        path = path.display()
    )]
    Open {
        /// Where it is.
        path: PathBuf,
    },
    /// It is not what this daemon writes.
    #[error(
        "the key of tokens {path} is not 32 bytes long: delete it, which ends all tokens",
        path = path.display()
    )]
    Length {
        /// Where it is.
        path: PathBuf,
    },
}

/// Makes and reads tokens.
#[derive(Clone)]
pub struct Tokens {
    signing: EncodingKey,
    checking: DecodingKey,
    rules: Validation,
}

impl Tokens {
    /// With the key of the file `path`, which is made if it is not there.
    ///
    /// # Errors
    /// There is no key, or others can read it.
    pub fn open(path: &Path) -> Result<Self, KeyFileError> {
        Ok(Self::new(&key(path)?))
    }

    fn new(key: &[u8; KEY_LEN]) -> Self {
        // It may be there already: it is the same for all.
        let _ = PROVIDER.install_default();
        let mut rules = Validation::new(Algorithm::HS256);
        rules.leeway = LEEWAY_SECONDS;
        rules.validate_nbf = true;
        rules.set_issuer(&[SERVICE]);
        rules.set_audience(&[SERVICE]);
        rules.set_required_spec_claims(&["exp", "nbf", "iss", "aud", "sub"]);
        Self {
            signing: EncodingKey::from_secret(key),
            checking: DecodingKey::from_secret(key),
            rules,
        }
    }

    /// A token of this user; `None` if the library fails.
    pub fn issue(&self, user: &UserId, now: Timestamp) -> Option<String> {
        let now = now.as_second();
        let claims = Claims {
            iss: SERVICE.to_owned(),
            aud: SERVICE.to_owned(),
            sub: user.clone(),
            iat: now,
            nbf: now,
            exp: now.saturating_add_unsigned(TOKEN_SECONDS),
        };
        jsonwebtoken::encode(&Header::new(Algorithm::HS256), &claims, &self.signing).ok()
    }

    /// Whose token this is; `None` if it is not one of this daemon that is good now.
    pub fn check(&self, token: &str) -> Option<UserId> {
        let token = jsonwebtoken::decode::<Claims>(token, &self.checking, &self.rules);
        token.ok().map(|token| token.claims.sub)
    }
}

fn key(path: &Path) -> Result<[u8; KEY_LEN], KeyFileError> {
    let failed = |source| KeyFileError::Io {
        path: path.to_owned(),
        source,
    };
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return make_key(path).map_err(failed);
        }
        Err(error) => return Err(failed(error)),
    };
    let path = path.to_owned();
    if file.metadata().map_err(failed)?.permissions().mode() & 0o077 != 0 {
        return Err(KeyFileError::Open { path });
    }
    let mut bytes = Vec::new();
    let most = KEY_LEN as u64 + 1;
    Read::by_ref(&mut file)
        .take(most)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    bytes.try_into().map_err(|_| KeyFileError::Length { path })
}

/// Makes a key. It has its name only when all of it is on the disk.
fn make_key(path: &Path) -> io::Result<[u8; KEY_LEN]> {
    let mut key = [0; KEY_LEN];
    rustix::rand::getrandom(&mut key, rustix::rand::GetRandomFlags::empty())?;
    let draft = path.with_extension("new");
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&draft)?;
    file.write_all(&key)?;
    file.sync_all()?;
    std::fs::rename(&draft, path)?;
    if let Some(dir) = path.parent() {
        File::open(dir)?.sync_all()?;
    }
    Ok(key)
}

static PROVIDER: CryptoProvider = CryptoProvider {
    signer_factory: |algorithm, key| match algorithm {
        Algorithm::HS256 => Ok(Box::new(HmacSha256::new(key.as_bytes())?)),
        _ => Err(ErrorKind::InvalidAlgorithm.into()),
    },
    verifier_factory: |algorithm, key| match algorithm {
        Algorithm::HS256 => Ok(Box::new(HmacSha256::new(key.try_get_as_bytes()?)?)),
        _ => Err(ErrorKind::InvalidAlgorithm.into()),
    },
    key_utils: KeyUtils::new_unimplemented(),
};

struct HmacSha256(Hmac<Sha256>);

impl HmacSha256 {
    fn new(key: &[u8]) -> JwtResult<Self> {
        let keyed = Hmac::new_from_slice(key).map_err(|_| ErrorKind::InvalidKeyFormat)?;
        Ok(Self(keyed))
    }
}

impl Signer<Vec<u8>> for HmacSha256 {
    fn try_sign(&self, message: &[u8]) -> Result<Vec<u8>, SignatureError> {
        let mac = self.0.clone().chain_update(message);
        Ok(mac.finalize().into_bytes().to_vec())
    }
}

impl JwtSigner for HmacSha256 {
    fn algorithm(&self) -> Algorithm {
        Algorithm::HS256
    }
}

impl Verifier<Vec<u8>> for HmacSha256 {
    fn verify(&self, message: &[u8], signature: &Vec<u8>) -> Result<(), SignatureError> {
        // In constant time.
        let mac = self.0.clone().chain_update(message);
        mac.verify_slice(signature)
            .map_err(|_| SignatureError::new())
    }
}

impl JwtVerifier for HmacSha256 {
    fn algorithm(&self) -> Algorithm {
        Algorithm::HS256
    }
}

#[cfg(test)]
mod tests {
    use base64::Engine;
    use base64::engine::general_purpose::URL_SAFE_NO_PAD;
    use jiff::ToSpan;
    use serde_json::{Value, json};

    use super::*;

    /// A token of these parts, signed with this key.
    fn token(header: &Value, claims: &Value, key: &[u8]) -> String {
        let encode = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let message = format!("{}.{}", encode(header), encode(claims));
        let signature = HmacSha256::new(key).unwrap().try_sign(message.as_bytes());
        format!("{message}.{}", URL_SAFE_NO_PAD.encode(signature.unwrap()))
    }

    #[test]
    fn a_token_is_good_for_an_hour() {
        let tokens = Tokens::new(&[7; KEY_LEN]);
        let user = UserId::random();
        let now = Timestamp::now();
        let issued = |seconds_ago: i64| {
            let then = now.checked_sub(seconds_ago.seconds()).unwrap();
            tokens.check(&tokens.issue(&user, then).unwrap())
        };
        assert_eq!(issued(0).as_ref(), Some(&user));
        assert_eq!(issued(3500).as_ref(), Some(&user));
        assert_eq!(issued(3605).as_ref(), Some(&user), "within the leeway");
        assert_eq!(issued(3700), None, "expired");
        assert_eq!(issued(-5).as_ref(), Some(&user), "within the leeway");
        assert_eq!(issued(-100), None, "not yet");
    }

    #[test]
    fn forged_tokens_are_none() {
        let key = [7; KEY_LEN];
        let tokens = Tokens::new(&key);
        let user = UserId::random();
        let now = Timestamp::now().as_second();
        let header = json!({"alg": "HS256", "typ": "JWT"});
        let good = json!({"iss": SERVICE, "aud": SERVICE, "sub": user.as_str(), "iat": now,
                          "nbf": now, "exp": now + 60});
        let with = |name: &str, value: Value| {
            let mut claims = good.clone();
            claims[name] = value;
            token(&header, &claims, &key)
        };
        let without = |name: &str| {
            let mut claims = good.clone();
            claims.as_object_mut().unwrap().remove(name);
            token(&header, &claims, &key)
        };
        let whole = token(&header, &good, &key);
        assert_eq!(tokens.check(&whole), Some(user));
        let (message, _) = whole.rsplit_once('.').unwrap();
        let mut bad = vec![
            token(&header, &good, &[8; KEY_LEN]),
            token(&header, &good, &[]),
            with("iss", json!("other")),
            with("aud", json!("other")),
            with("sub", json!("../../etc")),
            with("exp", json!(now - 60)),
            with("exp", json!("never")),
            with("exp", Value::Null),
            with("exp", json!(1e300)),
            with("nbf", json!(now + 60)),
            with("nbf", json!("never")),
            format!("{message}."),
            message.to_owned(),
            format!("{whole}x"),
            String::new(),
            "..".to_owned(),
        ];
        bad.extend(["exp", "nbf", "iss", "aud", "sub"].map(without));
        for algorithm in ["none", "None", "HS384", "HS512", "RS256", "ES256", ""] {
            let header = json!({"alg": algorithm, "typ": "JWT"});
            let signed = token(&header, &good, &key);
            let (message, _) = signed.rsplit_once('.').unwrap();
            bad.extend([format!("{message}."), signed]);
        }
        for token in bad {
            assert_eq!(tokens.check(&token), None, "{token}");
        }
    }

    #[test]
    fn the_key_is_made_once_and_is_private() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token.key");
        let token = Tokens::open(&path)
            .unwrap()
            .issue(&UserId::random(), Timestamp::now())
            .unwrap();
        let mode = || std::fs::metadata(&path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(), 0o600);
        assert!(Tokens::open(&path).unwrap().check(&token).is_some());
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        assert!(matches!(
            Tokens::open(&path),
            Err(KeyFileError::Open { .. })
        ));
        std::fs::remove_file(&path).unwrap();
        assert!(Tokens::open(&path).unwrap().check(&token).is_none());
        for content in ["short", &"x".repeat(33)] {
            std::fs::write(&path, content).unwrap();
            assert!(matches!(
                Tokens::open(&path),
                Err(KeyFileError::Length { .. })
            ));
        }
    }
}
