//! The id of the boot that a clone shows, instead of the one that it shares with its siblings.
//!
//! The kernel draws its boot id once, so that all machines that come from one snapshot have the
//! same. A clone gets a file with another id, bound over the kernel's. The file has no name, is held
//! open and written anew for the next generation: so there is one mount at most, and the mount
//! namespaces of containers, which have a copy of it, see the new id too.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, mount_bind, mount_remount};

/// Where the kernel shows its boot id, and draws a random one for each reader of `uuid`.
const KERNEL: &str = "/proc/sys/kernel/random";
/// A file system in memory, for the file.
const FILES: &str = "/run";

/// The boot id of this guest.
#[derive(Debug)]
pub struct BootId {
    kernel: PathBuf,
    files: PathBuf,
    /// Whose boot it is; `None` before the host has said so.
    machine_id: Option<String>,
    /// What is bound over the kernel's file, if anything is.
    shown: Option<File>,
}

impl Default for BootId {
    fn default() -> Self {
        Self::of(KERNEL.into(), FILES.into())
    }
}

impl BootId {
    fn of(kernel: PathBuf, files: PathBuf) -> Self {
        Self {
            kernel,
            files,
            machine_id: None,
            shown: None,
        }
    }

    /// Shows a new random id if the machine has become another one. Returns whether the id that is
    /// shown is this machine's alone; `false` without `/proc`.
    ///
    /// # Errors
    /// It is shown as before.
    pub fn belongs_to(&mut self, machine_id: &str) -> io::Result<bool> {
        let is_clone = match &self.machine_id {
            Some(before) => before != machine_id,
            None => false,
        };
        if !self.path().try_exists()? {
            return Ok(false);
        }
        if is_clone {
            let id = fs::read(self.kernel.join("uuid"))?;
            self.show(&id)?;
        }
        self.machine_id = Some(machine_id.to_owned());
        Ok(true)
    }

    fn path(&self) -> PathBuf {
        self.kernel.join("boot_id")
    }

    fn show(&mut self, id: &[u8]) -> io::Result<()> {
        let path = self.path();
        if let Some(shown) = &self.shown
            && is_same(shown, &path)?
        {
            // All ids have the same length.
            return shown.write_all_at(id, 0);
        }
        let temporary = self.files.join(".boot_id.new");
        // Left by an attempt that failed in the midst of this.
        let _ = fs::remove_file(&temporary);
        let bound = bind(id, &temporary, &path);
        let removed = fs::remove_file(&temporary);
        self.shown = Some(bound?);
        removed
    }
}

/// Binds a new file with this content over `path`, for reading only.
fn bind(content: &[u8], temporary: &Path, path: &Path) -> io::Result<File> {
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o444)
        .open(temporary)?;
    file.write_all_at(content, 0)?;
    mount_bind(temporary, path)?;
    let flags = MountFlags::BIND
        | MountFlags::RDONLY
        | MountFlags::NOSUID
        | MountFlags::NODEV
        | MountFlags::NOEXEC;
    mount_remount(path, flags, c"")?;
    Ok(file)
}

fn is_same(file: &File, path: &Path) -> io::Result<bool> {
    let (one, other) = (file.metadata()?, fs::metadata(path)?);
    Ok((one.dev(), one.ino()) == (other.dev(), other.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One that shows a file without a mount, which takes privileges: what is bound is there already.
    fn shown_in(dir: &Path) -> BootId {
        fs::write(dir.join("uuid"), "11111111-1111-4111-8111-111111111111\n").unwrap();
        fs::write(
            dir.join("boot_id"),
            "00000000-0000-4000-8000-000000000000\n",
        )
        .unwrap();
        let shown = OpenOptions::new()
            .write(true)
            .open(dir.join("boot_id"))
            .unwrap();
        let mut boot_id = BootId::of(dir.to_owned(), dir.to_owned());
        boot_id.shown = Some(shown);
        boot_id
    }

    #[test]
    fn a_machine_has_one_boot_id_and_its_clone_another() {
        let dir = tempfile::tempdir().unwrap();
        let read = || fs::read_to_string(dir.path().join("boot_id")).unwrap();
        let mut boot_id = shown_in(dir.path());
        let kernels = read();
        for _ in 0..2 {
            assert!(boot_id.belongs_to("one").unwrap());
            assert_eq!(read(), kernels);
        }
        assert!(boot_id.belongs_to("two").unwrap());
        let clones = read();
        assert_eq!(clones, "11111111-1111-4111-8111-111111111111\n");
        fs::write(dir.path().join("uuid"), kernels).unwrap();
        assert!(boot_id.belongs_to("two").unwrap());
        assert_eq!(read(), clones);
    }

    #[test]
    fn without_proc_there_is_none_to_show() {
        let dir = tempfile::tempdir().unwrap();
        let mut boot_id = BootId::of(dir.path().join("none"), dir.path().to_owned());
        assert!(!boot_id.belongs_to("one").unwrap());
        assert!(!boot_id.belongs_to("two").unwrap());
    }

    #[test]
    fn what_fails_is_tried_again_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let mut boot_id = shown_in(dir.path());
        boot_id.belongs_to("one").unwrap();
        fs::remove_file(dir.path().join("uuid")).unwrap();
        let before = fs::read(dir.path().join("boot_id")).unwrap();
        for _ in 0..2 {
            assert!(boot_id.belongs_to("two").is_err());
            assert_eq!(fs::read(dir.path().join("boot_id")).unwrap(), before);
        }
    }
}
