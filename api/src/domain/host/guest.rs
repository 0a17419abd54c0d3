//! Commands and files in a guest.

use std::collections::BTreeMap;
use std::io;

use bytes::Bytes;
use futures_util::stream::BoxStream;
use serde::{Deserialize, Serialize};

/// Run this command.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecRequest {
    /// Program and arguments; no shell is involved.
    pub argv: Vec<String>,
    /// Variables to set beside those that a login has.
    pub env: BTreeMap<String, String>,
    /// Working directory, absolute; the home of root if not given.
    pub cwd: Option<String>,
    /// Seconds after which the command is killed with all its children.
    pub timeout_sec: u32,
}

/// Something that a command did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExecEvent {
    /// It was started. Nothing comes before.
    Started {
        /// Its process id in the guest.
        pid: u32,
    },
    /// It wrote to its standard output.
    Stdout(Bytes),
    /// It wrote to its standard error.
    Stderr(Bytes),
    /// It ended. Nothing follows.
    Exited(ExitInfo),
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitInfo {
    /// Exit status; 128 and the signal's number if a signal ended it, 127 if there is no such
    /// program.
    pub code: i32,
    /// It was killed because it outran its timeout.
    pub timed_out: bool,
}

/// Write this file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WriteFileRequest {
    /// Absolute path in the guest.
    pub path: String,
    /// Permission bits; `None` for those of the file that is replaced, or 0644.
    pub mode: Option<u32>,
}

/// Read this file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReadFileRequest {
    /// Absolute path in the guest.
    pub path: String,
}

/// A file that is being read.
pub struct FileContent {
    /// Its size in bytes, where it is known beforehand.
    pub size: Option<u64>,
    /// Its bytes.
    pub content: BoxStream<'static, io::Result<Bytes>>,
}

/// What a file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileKind {
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
    Other,
}

/// A file in a guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileInfo {
    /// Absolute path. What is not UTF-8 is replaced by U+FFFD.
    pub path: String,
    /// What it is.
    pub kind: FileKind,
    /// Permission bits, 0 to 0o7777.
    pub mode: u32,
    /// Numeric user id of its owner.
    pub uid: u32,
    /// Numeric group id of its owner.
    pub gid: u32,
    /// Size in bytes.
    pub size: u64,
    /// Last modification, in microseconds since the Unix epoch.
    pub mtime_us: i64,
    /// Where a symbolic link points.
    pub target: Option<String>,
}
