//! Copies of what a measure reads again and again, on a local file system.
//!
//! The emulated machine shares its outer machine's files over a protocol that is slow and does
//! not cache all of them: without a copy, a boot would mostly measure the reading of the kernel.

use std::{
    io,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use tempfile::TempDir;

/// Why something could not be copied.
#[derive(Debug, thiserror::Error)]
pub enum StageError {
    /// No directory for the copies.
    #[error("cannot make a temporary directory")]
    Directory(#[source] io::Error),
    /// `cp` could not be run.
    #[error("cannot run cp")]
    Run(#[source] io::Error),
    /// `cp` failed, and said why.
    #[error("cannot copy {path}: {message}", path = path.display())]
    Copy {
        /// What was to be copied.
        path: PathBuf,
        /// What cp wrote.
        message: String,
    },
}

/// A directory of copies, removed when dropped.
#[derive(Debug)]
pub struct Stage(TempDir);

impl Stage {
    /// An empty one, in `TMPDIR` or /tmp.
    ///
    /// # Errors
    /// The directory cannot be made.
    pub fn new() -> Result<Self, StageError> {
        tempfile::Builder::new()
            .prefix("microvm-bench-")
            .tempdir()
            .map(Self)
            .map_err(StageError::Directory)
    }

    /// Where the copies are.
    pub fn directory(&self) -> &Path {
        self.0.path()
    }

    /// Copies a file or a directory to `name` and returns the copy's path. Holes stay holes.
    ///
    /// # Errors
    /// It does not exist or cannot be read, or there is no room.
    pub fn copy(&self, path: &Path, name: &str) -> Result<PathBuf, StageError> {
        let copy = self.0.path().join(name);
        let output = Command::new("cp")
            .args(["--recursive", "--preserve=mode", "--sparse=always"])
            .args(["--dereference", "--no-target-directory", "--"])
            .args([path, copy.as_path()])
            .stdin(Stdio::null())
            .output()
            .map_err(StageError::Run)?;
        if !output.status.success() {
            return Err(StageError::Copy {
                path: path.to_owned(),
                message: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
            });
        }
        Ok(copy)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn copies_are_complete_and_go_away() {
        let stage = Stage::new().unwrap();
        let source = tempfile::tempdir().unwrap();
        fs::write(source.path().join("file"), "content").unwrap();

        let copy = stage.copy(source.path(), "directory").unwrap();
        assert_eq!(fs::read_to_string(copy.join("file")).unwrap(), "content");
        let error = stage.copy(Path::new("/no/such/file"), "x").unwrap_err();
        assert!(error.to_string().contains("/no/such/file"), "{error}");

        let directory = stage.directory().to_owned();
        drop(stage);
        assert!(!directory.exists());
    }
}
