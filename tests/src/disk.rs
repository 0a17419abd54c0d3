//! A file system on a block device of the host.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::mount::{UnmountFlags, unmount};
use tempfile::TempDir;

use crate::setup::scratch;

/// A mounted ext4 on a loop device of its own. Dropping it unmounts it, and frees the device.
pub struct BlockFileSystem {
    mounted: PathBuf,
    _directory: TempDir,
}

impl BlockFileSystem {
    /// One of that many bytes.
    ///
    /// # Panics
    /// The host has no loop device, or this process is not root.
    pub fn mount(size: u64) -> Self {
        let directory = scratch();
        let image = directory.path().join("image");
        let mounted = directory.path().join("mounted");
        File::create_new(&image).unwrap().set_len(size).unwrap();
        fs::create_dir(&mounted).unwrap();
        run(Command::new("/sbin/mke2fs")
            .args(["-q", "-t", "ext4"])
            .arg(&image));
        run(Command::new("mount")
            .args(["-o", "loop"])
            .args([&image, &mounted]));
        Self {
            mounted,
            _directory: directory,
        }
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.mounted
    }

    /// Its device, as in `7:0`.
    ///
    /// # Panics
    /// It is not mounted any more.
    pub fn device(&self) -> String {
        let device = fs::metadata(&self.mounted).unwrap().dev();
        format!(
            "{}:{}",
            rustix::fs::major(device),
            rustix::fs::minor(device)
        )
    }
}

impl Drop for BlockFileSystem {
    fn drop(&mut self) {
        let _ = unmount(&self.mounted, UnmountFlags::DETACH);
    }
}

fn run(command: &mut Command) {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {output:?}");
}
