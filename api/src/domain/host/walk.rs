//! Walks of the files of a guest.

use futures_util::stream::BoxStream;

use super::{FileInfo, HostError};

/// What to walk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WalkSpec {
    /// The directory to begin at, absolute.
    pub path: String,
    /// How many files and directories to tell at most.
    pub max_entries: u64,
    /// How many directories deep to go; with 0, only what is in `path` is told.
    pub max_depth: u32,
    /// How much the guest may send, in bytes.
    pub max_bytes: u64,
    /// Directories that are told but not entered, absolute.
    pub skip: Vec<String>,
}

/// What a walk comes to. Symbolic links are told and not followed, and directories of other file systems are
/// not entered. The guest says all of it, and may lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WalkStep {
    /// A file or directory.
    Entry(FileInfo),
    /// The directory of this path could not be listed, or not wholly.
    Unreadable(String),
    /// Not all was walked; nothing follows.
    Cut(WalkCut),
}

/// Why not all was walked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WalkCut {
    /// There are more entries than were asked for.
    Entries,
    /// Some lie deeper than was asked for.
    Depth,
    /// It would have been too much for the guest's agent, or more bytes than were asked for.
    Size,
}

/// The steps of a walk; one that ends without an error is over.
pub type WalkSteps = BoxStream<'static, Result<WalkStep, HostError>>;
