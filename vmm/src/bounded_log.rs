//! A log that starts over when it is full, since guests make it grow.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// A log that starts over when it is full.
pub struct BoundedLog {
    file: File,
    size: u64,
    limit: u64,
}

impl BoundedLog {
    /// Creates the log, readable by its owner only; what the file held is gone. It starts over at
    /// `limit` bytes.
    ///
    /// # Errors
    /// The file cannot be created.
    pub fn create(path: &Path, limit: u64) -> io::Result<Self> {
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .custom_flags(libc::O_CLOEXEC)
            .open(path)?;
        Ok(Self {
            file,
            size: 0,
            limit,
        })
    }

    /// Goes on with the log behind what it holds, or creates it, readable by its owner only. What is
    /// no regular file, such as a pipe, cannot start over, and need not.
    ///
    /// # Errors
    /// The file cannot be opened for writing.
    pub fn append(path: &Path, limit: u64) -> io::Result<Self> {
        let file = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .custom_flags(libc::O_CLOEXEC)
            .open(path)?;
        let metadata = file.metadata()?;
        Ok(Self {
            size: metadata.len(),
            limit: if metadata.is_file() { limit } else { u64::MAX },
            file,
        })
    }
}

impl Write for BoundedLog {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        if self.size.saturating_add(data.len() as u64) > self.limit {
            self.file.set_len(0)?;
            self.file.rewind()?;
            self.size = 0;
        }
        let written = self.file.write(data)?;
        self.size += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
