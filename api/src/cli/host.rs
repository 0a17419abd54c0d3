//! Which daemon to talk to, and who it is told that asks.

use std::env;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use clap::Args;
use hyper::Uri;
use hyper::header::HeaderValue;

/// The longest API key in bytes.
const MAX_KEY: u64 = 4096;

/// Where the daemon is.
#[derive(Debug, Args)]
pub struct HostArgs {
    /// The daemon. If it asks for an API key, that comes from MVS_API_KEY, or from the file that
    /// MVS_API_KEY_FILE names, which only its owner may be allowed to read
    /// [file by default: ~/.config/microvm-sandbox/api-key]
    #[arg(
        long,
        env = "MVS_HOST",
        value_name = "URL",
        default_value = "http://127.0.0.1:8000"
    )]
    pub host: String,
}

/// The address or the key is of no use.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// No address.
    #[error("{0:?} is no address of a daemon: expected http://HOST:PORT or HOST:PORT")]
    Address(String),
    /// Another protocol.
    #[error(
        "{0:?}: only http is spoken; reach a daemon elsewhere through a tunnel, such as ssh -L"
    )]
    Scheme(String),
    /// The key has characters that no key has.
    #[error("the API key from {0} must be printable ASCII, and not empty")]
    Key(String),
    /// The file cannot be read.
    #[error("the API key cannot be read from {path}")]
    Read {
        /// Which one.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Others can read the file.
    #[error("others can read the API key in {path}: run `chmod 600 {path}`")]
    Mode {
        /// Which one.
        path: PathBuf,
    },
}

/// `HOST:PORT` of what the user gave.
///
/// # Errors
/// It is none.
pub fn authority(host: &str) -> Result<String, HostError> {
    let address = || HostError::Address(host.to_owned());
    let rest = match host.split_once("://") {
        Some(("http", rest)) => rest,
        Some(_) => return Err(HostError::Scheme(host.to_owned())),
        None => host,
    };
    let uri: Uri = format!("http://{}", rest.trim_end_matches('/'))
        .parse()
        .map_err(|_| address())?;
    let authority = uri.authority().ok_or_else(address)?;
    let is_plain = uri.path() == "/" && uri.query().is_none() && !authority.as_str().contains('@');
    if !is_plain || authority.host().is_empty() {
        return Err(address());
    }
    Ok(match authority.port() {
        Some(_) => authority.to_string(),
        None if authority.as_str() != authority.host() => return Err(address()),
        None => format!("{authority}:80"),
    })
}

/// The API key, if there is one.
///
/// # Errors
/// There is one that is of no use.
pub fn api_key() -> Result<Option<HeaderValue>, HostError> {
    if let Some(key) = env::var_os("MVS_API_KEY") {
        let key = key.to_str().map(str::to_owned).unwrap_or_default();
        return header(&key, "MVS_API_KEY").map(Some);
    }
    let (path, is_named) = match env::var_os("MVS_API_KEY_FILE") {
        Some(path) => (PathBuf::from(path), true),
        None => match config_dir() {
            Some(dir) => (dir.join("microvm-sandbox/api-key"), false),
            None => return Ok(None),
        },
    };
    let read = |source| HostError::Read {
        path: path.clone(),
        source,
    };
    let file = match File::open(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound && !is_named => return Ok(None),
        opened => opened.map_err(read)?,
    };
    if file.metadata().map_err(read)?.permissions().mode() & 0o077 != 0 {
        return Err(HostError::Mode { path });
    }
    let mut key = String::new();
    file.take(MAX_KEY).read_to_string(&mut key).map_err(read)?;
    header(key.trim(), &path.display().to_string()).map(Some)
}

fn config_dir() -> Option<PathBuf> {
    let absolute = |path: &PathBuf| path.is_absolute();
    let given = env::var_os("XDG_CONFIG_HOME").map(PathBuf::from);
    let home = || Some(PathBuf::from(env::var_os("HOME")?).join(".config"));
    given.filter(absolute).or_else(home).filter(absolute)
}

fn header(key: &str, from: &str) -> Result<HeaderValue, HostError> {
    let bad = || HostError::Key(from.to_owned());
    if key.is_empty() || !key.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(bad());
    }
    let mut value = HeaderValue::from_str(key).map_err(|_| bad())?;
    value.set_sensitive(true);
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_with_and_without_scheme_and_port() {
        for (given, expected) in [
            ("http://127.0.0.1:8000", "127.0.0.1:8000"),
            ("http://localhost:8080/", "localhost:8080"),
            ("127.0.0.1:1", "127.0.0.1:1"),
            ("[::1]:8000", "[::1]:8000"),
            ("http://box", "box:80"),
        ] {
            assert_eq!(authority(given).unwrap(), expected);
        }
        for bad in [
            "",
            "http://",
            ":80",
            "a b",
            "http://x/y",
            "x:y",
            "http://u@x",
            "x:",
        ] {
            assert!(authority(bad).is_err(), "{bad}");
        }
        let error = authority("https://x").unwrap_err();
        assert!(error.to_string().contains("tunnel"), "{error}");
    }
}
