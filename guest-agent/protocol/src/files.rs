//! Files: query values and descriptions.

use serde::{Deserialize, Serialize};

use crate::{
    MAX_PATH,
    query::{percent_decode, percent_encode},
};

/// The query of the file operations.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FileQuery {
    /// The file's absolute path.
    pub path: Vec<u8>,
    /// Permission bits to give the file, 0 to 0o7777; on the wire in octal. Only for writing.
    pub mode: Option<u32>,
    /// Owner to give the file, in the form of [`ExecRequest::user`](crate::ExecRequest::user).
    /// Only for writing.
    pub user: Option<String>,
}

/// Why a query is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FileQueryError {
    /// There is no `path`.
    #[error("the query has no path; expected ?path=/absolute/path")]
    NoPath,
    /// The path does not start with `/`.
    #[error("the path is not absolute; expected it to start with /")]
    RelativePath,
    /// The path has a NUL byte.
    #[error("the path holds a NUL byte")]
    NulInPath,
    /// The path is longer than [`MAX_PATH`].
    #[error("the path has {0} bytes; expected at most {MAX_PATH}")]
    PathTooLong(usize),
    /// The mode is not octal or too large.
    #[error("the mode is not an octal number from 0 to 7777")]
    BadMode,
    /// The value is not valid percent-encoding, or not UTF-8 where it has to be.
    #[error("the value of {0} is not percent-encoded text")]
    BadEncoding(&'static str),
    /// A name is given twice.
    #[error("{0} is given twice")]
    Duplicate(&'static str),
    /// A name is unknown.
    #[error("the query has an unknown name; expected path, mode or user")]
    UnknownName,
}

impl FileQuery {
    /// A query for `path` alone.
    pub fn new(path: impl Into<Vec<u8>>) -> Self {
        Self {
            path: path.into(),
            ..Self::default()
        }
    }

    /// The query string, without the `?`.
    pub fn encode(&self) -> String {
        let mut out = format!("path={}", percent_encode(&self.path));
        if let Some(mode) = self.mode {
            out.push_str(&format!("&mode={mode:o}"));
        }
        if let Some(user) = &self.user {
            out.push_str("&user=");
            out.push_str(&percent_encode(user.as_bytes()));
        }
        out
    }

    /// Reads a query string, and checks the path and the mode.
    ///
    /// # Errors
    /// [`FileQueryError`], whose text can be shown to whoever made the request.
    pub fn parse(query: &str) -> Result<Self, FileQueryError> {
        let (mut path, mut mode, mut user) = (None, None, None);
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let (name, slot) = match name {
                "path" => ("path", &mut path),
                "mode" => ("mode", &mut mode),
                "user" => ("user", &mut user),
                _ => return Err(FileQueryError::UnknownName),
            };
            let value = percent_decode(value).ok_or(FileQueryError::BadEncoding(name))?;
            if slot.replace(value).is_some() {
                return Err(FileQueryError::Duplicate(name));
            }
        }
        let path = path.ok_or(FileQueryError::NoPath)?;
        match path {
            _ if path.first() != Some(&b'/') => return Err(FileQueryError::RelativePath),
            _ if path.contains(&0) => return Err(FileQueryError::NulInPath),
            _ if path.len() > MAX_PATH => return Err(FileQueryError::PathTooLong(path.len())),
            _ => {}
        }
        let mode = mode.map(|digits| parse_mode(&digits)).transpose()?;
        let user = user
            .map(String::from_utf8)
            .transpose()
            .map_err(|_| FileQueryError::BadEncoding("user"))?;
        Ok(Self { path, mode, user })
    }
}

fn parse_mode(digits: &[u8]) -> Result<u32, FileQueryError> {
    let text = std::str::from_utf8(digits).map_err(|_| FileQueryError::BadMode)?;
    if text.is_empty() || !text.bytes().all(|b| b.is_ascii_digit()) {
        return Err(FileQueryError::BadMode);
    }
    match u32::from_str_radix(text, 8) {
        Ok(mode) if mode <= 0o7777 => Ok(mode),
        _ => Err(FileQueryError::BadMode),
    }
}

/// What kind of file an [`Entry`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EntryKind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A FIFO.
    Fifo,
    /// A UNIX socket.
    Socket,
    /// A character device.
    CharDevice,
    /// A block device.
    BlockDevice,
    /// Something else.
    #[serde(other)]
    Other,
}

/// The description of one file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Its last path component (`/` for the root directory). Bytes that are not UTF-8 are
    /// replaced by U+FFFD.
    pub name: String,
    /// The name's bytes, percent-encoded, where it is not UTF-8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub raw_name: Option<String>,
    /// What it is.
    pub kind: EntryKind,
    /// Permission bits, 0 to 0o7777.
    pub mode: u32,
    /// Numeric user id of the owner.
    pub uid: u32,
    /// Numeric group id of the owner.
    pub gid: u32,
    /// Size in bytes.
    pub size: u64,
    /// Last modification in microseconds since the Unix epoch.
    pub mtime_us: i64,
    /// Where a symbolic link points, with U+FFFD for what is not UTF-8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn bad_queries_are_told_apart() {
        use FileQueryError as E;
        let long = format!("path=/{}", "x".repeat(MAX_PATH));
        for (query, error) in [
            ("", E::NoPath),
            ("mode=644", E::NoPath),
            ("path=", E::RelativePath),
            ("path", E::RelativePath),
            ("path=etc/passwd", E::RelativePath),
            ("path=/a%00b", E::NulInPath),
            (long.as_str(), E::PathTooLong(MAX_PATH + 1)),
            ("path=/a%4", E::BadEncoding("path")),
            ("path=/a&mode=", E::BadMode),
            ("path=/a&mode=8", E::BadMode),
            ("path=/a&mode=%2b7", E::BadMode),
            ("path=/a&mode=10000", E::BadMode),
            ("path=/a&mode=777777777777777", E::BadMode),
            ("path=/a&user=%ff", E::BadEncoding("user")),
            ("path=/a&path=/b", E::Duplicate("path")),
            ("path=/a&depth=1", E::UnknownName),
        ] {
            assert_eq!(FileQuery::parse(query), Err(error), "{query}");
        }
    }

    proptest! {
        #[test]
        fn queries_survive(
            tail in prop::collection::vec(1..=255u8, 0..200),
            mode in prop::option::of(0..=0o7777u32),
            user in prop::option::of("[^\0]{0,20}"),
        ) {
            let mut path = vec![b'/'];
            path.extend(tail);
            let query = FileQuery { path, mode, user };
            prop_assert_eq!(FileQuery::parse(&query.encode()), Ok(query));
        }

        #[test]
        fn hostile_queries_are_read_or_refused(query: String) {
            let _ = FileQuery::parse(&query);
        }
    }
}
