//! Directories in a sandbox.

use super::super::error::FileError;
use super::super::host::{FileInfo, FileKind, HostError};
use super::super::request;
use super::{InUse, Manager};

/// The most entries of a listing.
const MAX_ENTRIES: usize = 50_000;

/// How much the paths of a listing take together at most, in bytes. Each has those above it in it, so that
/// a few deep ones are worth many.
const MAX_PATHS: usize = 32 << 20;

/// The deepest listing.
pub const MAX_DEPTH: u32 = 64;

/// How much these paths take, and those that links among them lead to.
fn size_of_paths(entries: &[FileInfo]) -> usize {
    let size = |entry: &FileInfo| entry.path.len() + entry.target.as_ref().map_or(0, String::len);
    entries.iter().map(size).sum()
}

impl Manager {
    /// What is in a directory, and in those below it down to `depth`, 1 to [`MAX_DEPTH`]; sorted by
    /// path. Symbolic links are not followed.
    ///
    /// # Errors
    /// There is no such directory, or too much is in it.
    pub async fn list_dir(
        &self,
        in_use: &InUse,
        path: &str,
        depth: u32,
    ) -> Result<Vec<FileInfo>, FileError> {
        request::check_path(path).map_err(FileError::Invalid)?;
        if !(1..=MAX_DEPTH).contains(&depth) {
            let problem = format!("depth must be 1 to {MAX_DEPTH}, not {depth}");
            return Err(FileError::Invalid(problem));
        }
        let (id, host) = (&in_use.sandbox.id, &self.inner.host);
        let mut all = host
            .list_dir(id, path, MAX_ENTRIES)
            .await
            .map_err(FileError::Host)?;
        let mut paths = size_of_paths(&all);
        let mut level = 0..all.len();
        for _ in 1..depth {
            let below = all.len();
            for at in level {
                if all[at].kind != FileKind::Directory {
                    continue;
                }
                let room = MAX_ENTRIES.saturating_sub(all.len());
                match host.list_dir(id, &all[at].path, room).await {
                    Ok(entries) => {
                        paths = paths.saturating_add(size_of_paths(&entries));
                        all.extend(entries);
                    }
                    // It was removed meanwhile, or has a name that is no text.
                    Err(HostError::FileNotFound { .. }) => {}
                    Err(source) => return Err(FileError::Host(source)),
                }
                if paths > MAX_PATHS {
                    return Err(FileError::Host(HostError::Invalid {
                        reason: "the paths of all these files take too much to be listed; list a part of them"
                            .to_owned(),
                    }));
                }
            }
            level = below..all.len();
        }
        all.sort_by(|a, b| a.path.cmp(&b.path));
        self.used(id).await;
        Ok(all)
    }

    /// Makes a directory and its parents, as far as they are not there.
    ///
    /// # Errors
    /// It is not there.
    pub async fn make_dir(&self, in_use: &InUse, path: &str) -> Result<FileInfo, FileError> {
        request::check_path(path).map_err(FileError::Invalid)?;
        let id = &in_use.sandbox.id;
        let made = self.inner.host.make_dir(id, path).await;
        self.used(id).await;
        made.map_err(FileError::Host)
    }

    /// Removes a file, or a directory with all that is in it.
    ///
    /// # Errors
    /// There is none, or something is left.
    pub async fn remove_file(&self, in_use: &InUse, path: &str) -> Result<(), FileError> {
        request::check_path(path).map_err(FileError::Invalid)?;
        if path.bytes().all(|byte| byte == b'/') {
            let problem = "the root directory cannot be removed; delete the sandbox instead";
            return Err(FileError::Invalid(problem.to_owned()));
        }
        let id = &in_use.sandbox.id;
        let removed = self.inner.host.remove_file(id, path).await;
        self.used(id).await;
        removed.map_err(FileError::Host)
    }
}
