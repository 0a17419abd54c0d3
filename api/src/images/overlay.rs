//! A sandbox's own disk: an empty qcow2 image whose backing file is its template's.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use imago::file::File;
use imago::qcow2::Qcow2;
use imago::{FormatCreateBuilder, Storage, StorageOpenOptions};
use tokio::runtime::Handle;
use tokio::task::spawn_blocking;

/// Disks are counted in sectors of this many bytes.
const SECTOR: u64 = 512;

/// Why a sandbox has no disk.
#[derive(Debug, thiserror::Error)]
pub enum OverlayError {
    /// The template's image cannot be used.
    #[error("the template's disk {path} cannot be used", path = path.display())]
    Template {
        /// Where it is.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The overlay cannot be made.
    #[error("the disk overlay {path} cannot be made", path = path.display())]
    Create {
        /// Where it should be.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The task that made it is gone.
    #[error("the creation of the disk overlay was interrupted")]
    Interrupted,
}

/// Makes the overlay `path` on the raw image `template`. It has the template's size, and can be
/// read and written by its owner alone.
///
/// # Errors
/// Either image is unusable, or `path` is there already.
pub async fn create_overlay(template: PathBuf, path: PathBuf) -> Result<(), OverlayError> {
    let runtime = Handle::current();
    // The library's file accesses block, and its futures stay on one thread.
    let task = spawn_blocking(move || runtime.block_on(create(&template, &path)));
    task.await.unwrap_or(Err(OverlayError::Interrupted))
}

async fn create(template: &Path, path: &Path) -> Result<(), OverlayError> {
    let bad_template = |source| OverlayError::Template {
        path: template.to_owned(),
        source,
    };
    let bad_overlay = |source| OverlayError::Create {
        path: path.to_owned(),
        source,
    };

    // The name goes into the image, where a relative one would be relative to the overlay.
    let backing = template.canonicalize().map_err(bad_template)?;
    let size = std::fs::metadata(&backing).map_err(bad_template)?.len();
    if size == 0 || size % SECTOR != 0 {
        let text = format!("its size of {size} bytes is not a multiple of {SECTOR}");
        return Err(bad_template(io::Error::new(
            io::ErrorKind::InvalidData,
            text,
        )));
    }
    let backing = backing.into_os_string().into_string().map_err(|_| {
        bad_template(io::Error::new(
            io::ErrorKind::InvalidInput,
            "its path is not UTF-8",
        ))
    })?;

    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(bad_overlay)?;
    let options = StorageOpenOptions::new().write(true).filename(path);
    let file = File::open(options).await.map_err(bad_overlay)?;
    Qcow2::<File>::create_builder(file)
        .size(size)
        .backing(backing, "raw".to_owned())
        .create()
        .await
        .map_err(bad_overlay)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt, PermissionsExt};

    use imago::{FormatAccess, FormatDriverBuilder, PermissiveImplicitOpenGate};

    use super::*;

    #[tokio::test]
    async fn a_guest_reads_the_template_and_writes_the_overlay() {
        let dir = tempfile::tempdir().unwrap();
        let template = dir.path().join("base.ext4");
        let file = std::fs::File::create(&template).unwrap();
        file.set_len(3 << 20).unwrap();
        file.write_all_at(b"from the template", 1 << 20).unwrap();
        let overlay = dir.path().join("disk.qcow2");
        create(&template, &overlay).await.unwrap();

        let metadata = std::fs::metadata(&overlay).unwrap();
        assert_eq!(metadata.permissions().mode() & 0o777, 0o600);
        assert!(metadata.len() < 1 << 20, "{} bytes", metadata.len());

        let disk = Qcow2::<File>::builder_path(&overlay)
            .write(true)
            .open(PermissiveImplicitOpenGate::default())
            .await
            .unwrap();
        let disk = FormatAccess::new(disk);
        assert_eq!(disk.size(), 3 << 20);
        let mut read = [0; 17];
        disk.read(&mut read[..], 1 << 20).await.unwrap();
        assert_eq!(&read, b"from the template");
        disk.write(&b"from the guest!!!"[..], 1 << 20)
            .await
            .unwrap();
        disk.read(&mut read[..], 1 << 20).await.unwrap();
        assert_eq!(&read, b"from the guest!!!");
        disk.flush().await.unwrap();

        let mut base = [0; 17];
        std::fs::File::open(&template)
            .unwrap()
            .read_exact_at(&mut base, 1 << 20)
            .unwrap();
        assert_eq!(&base, b"from the template");
    }

    #[tokio::test]
    async fn unusable_templates_and_taken_names_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let template = dir.path().join("base.ext4");
        let overlay = dir.path().join("disk.qcow2");
        let result = create(&template, &overlay).await;
        assert!(matches!(result, Err(OverlayError::Template { .. })));
        for bad in ["", "not a multiple of a sector"] {
            std::fs::write(&template, bad).unwrap();
            let result = create(&template, &overlay).await;
            assert!(matches!(result, Err(OverlayError::Template { .. })));
            assert!(!overlay.exists());
        }
        std::fs::write(&template, [0; 1024]).unwrap();
        std::fs::write(&overlay, "taken").unwrap();
        let result = create(&template, &overlay).await;
        assert!(matches!(result, Err(OverlayError::Create { .. })));
        assert_eq!(std::fs::read(&overlay).unwrap(), b"taken");
    }
}
