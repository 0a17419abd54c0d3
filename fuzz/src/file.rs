//! Files that exist in memory only.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use rustix::fs::{MemfdFlags, memfd_create};

/// A file without a place in any directory. It lives as long as this does.
pub struct MemoryFile(File);

impl MemoryFile {
    /// A file of these bytes.
    ///
    /// # Panics
    /// The host has no memory or descriptors left.
    pub fn new(content: &[u8]) -> Self {
        let mut file = File::from(memfd_create(c"fuzz", MemfdFlags::CLOEXEC).unwrap());
        file.write_all(content).unwrap();
        Self(file)
    }

    /// A path by which this process can open it.
    pub fn path(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.0.as_raw_fd()).into()
    }
}
