//! Files and directories of the daemon's own, which nobody else is to read, whoever made the directory that
//! they are in and whatever its mode is.

use std::fs::{self, DirBuilder, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use tracing::warn;

/// Makes the directory and those that it is in, where they are not there, and keeps it from others.
///
/// # Errors
/// It cannot be made, or is open to others and cannot be closed.
pub fn directory(path: &Path) -> io::Result<()> {
    const MODE: u32 = 0o700;
    DirBuilder::new().recursive(true).mode(MODE).create(path)?;
    close(path, MODE)
}

/// Makes the file, empty, if it is not there, and keeps it from others. A file that is there is not opened.
///
/// # Errors
/// It cannot be made, or is open to others and cannot be closed.
pub fn file(path: &Path) -> io::Result<()> {
    const MODE: u32 = 0o600;
    let made = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(MODE)
        .open(path);
    match made {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => close(path, MODE),
        Err(error) => Err(error),
    }
}

/// Takes what others may do from a file that is there; `Ok` if it is not.
///
/// # Errors
/// It is open to others and cannot be closed.
pub fn file_if_there(path: &Path) -> io::Result<()> {
    match close(path, 0o600) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// Takes what is not in `mode` from group and others.
fn close(path: &Path, mode: u32) -> io::Result<()> {
    let found = fs::metadata(path)?.mode() & 0o7777;
    if found & 0o077 == 0 {
        return Ok(());
    }
    fs::set_permissions(path, Permissions::from_mode(mode))?;
    warn!(path = %path.display(), mode = format!("{found:o}"), "was open to others, and is not any more");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o7777
    }

    #[test]
    fn what_is_made_and_what_is_there_is_closed_to_others() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        file_if_there(&path).unwrap();
        assert!(!path.exists());
        file(&path).unwrap();
        assert_eq!(mode(&path), 0o600);
        fs::write(&path, "text").unwrap();
        for close in [file, file_if_there] {
            fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
            close(&path).unwrap();
            assert_eq!(mode(&path), 0o600);
        }
        assert_eq!(fs::read(&path).unwrap(), b"text");

        let path = dir.path().join("a/b");
        directory(&path).unwrap();
        assert_eq!(mode(&path), 0o700);
        fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
        directory(&path).unwrap();
        assert_eq!(mode(&path), 0o700);
    }

    #[test]
    fn what_is_closed_stays_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        fs::write(&path, "").unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o400)).unwrap();
        file(&path).unwrap();
        assert_eq!(mode(&path), 0o400);
        assert!(file(&dir.path().join("none/file")).is_err());
    }
}
