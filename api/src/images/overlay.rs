//! A sandbox's own disk: an empty qcow2 image on top of frozen ones, on top of its template's.
//!
//! What a sandbox has written is frozen when it is saved, and a new overlay is stacked on it, which
//! takes the same time whatever its size. An image that was open for writing in a VMM is what that
//! made of it. So the daemon reads none of it, and tells the VMM which images build on which: the
//! names in them are ignored.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use imago::file::File;
use imago::qcow2::Qcow2;
use imago::{FormatCreateBuilder, Storage, StorageOpenOptions};
use serde::{Deserialize, Serialize};
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
    /// The template's image is not what the disk was made on.
    #[error(
        "the template's disk {path} has changed since this disk was made on it; put the old image \
         back",
        path = path.display()
    )]
    TemplateChanged {
        /// Where it is.
        path: PathBuf,
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
    /// An empty file system cannot be made.
    #[error("the empty file system {path} cannot be made", path = path.display())]
    Empty {
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

/// The image of a template, as it was when a disk was made on it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Base {
    /// Where it is, without symbolic links.
    pub path: PathBuf,
    /// Its size in bytes.
    pub size: u64,
    /// Size of the disks on it in bytes, if that is another.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grown: Option<u64>,
    /// Its last modification, in nanoseconds since the Unix epoch.
    pub modified_ns: i128,
}

/// What a new overlay is made on: the image of a template, and frozen overlays on it, bottom first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    /// The template's.
    pub base: Base,
    /// The frozen ones.
    pub layers: Vec<PathBuf>,
    /// What a second disk is made on, if there is to be one.
    pub scratch: Option<Box<Self>>,
}

impl Base {
    /// The image at `path` as it is now.
    ///
    /// # Errors
    /// It cannot be used.
    pub fn of(path: &Path) -> Result<Self, OverlayError> {
        let bad = |source| OverlayError::Template {
            path: path.to_owned(),
            source,
        };
        // The name goes into images on it, where a relative one would be relative to those.
        let path = path.canonicalize().map_err(bad)?;
        let metadata = std::fs::metadata(&path).map_err(bad)?;
        let size = metadata.len();
        if size == 0 || size % SECTOR != 0 {
            let text = format!("its size of {size} bytes is not a multiple of {SECTOR}");
            return Err(bad(io::Error::new(io::ErrorKind::InvalidData, text)));
        }
        let modified_ns =
            i128::from(metadata.mtime()) * 1_000_000_000 + i128::from(metadata.mtime_nsec());
        Ok(Self {
            path,
            size,
            grown: None,
            modified_ns,
        })
    }
}

impl Base {
    /// Size of the disks on it, in bytes.
    pub fn disk_size(&self) -> u64 {
        self.grown.unwrap_or(self.size)
    }

    /// Makes disks on it `size_mb` MiB large, unless they are larger already.
    pub fn grow(&mut self, size_mb: u32) {
        let size = u64::from(size_mb) << 20;
        if size > self.disk_size() {
            self.grown = Some(size);
        }
    }

    /// An empty ext4 file system of `size_mb` MiB in the directory `dir`, which is made if it is not
    /// there. It is made of nothing that anybody else has given.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn empty(dir: &Path, size_mb: u32) -> Result<Self, OverlayError> {
        let path = dir.join(format!("{size_mb}.ext4"));
        let bad = |source| OverlayError::Empty {
            path: path.clone(),
            source,
        };
        if !path.try_exists().map_err(bad)? {
            let draft = tempfile::NamedTempFile::new_in(dir).map_err(bad)?;
            let size = u64::from(size_mb) << 20;
            draft.as_file().set_len(size).map_err(bad)?;
            let output = Command::new("mke2fs")
                .env("PATH", "/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin")
                .args(["-q", "-t", "ext4", "-b", "4096", "-m", "1", "-E"])
                // The file is new, so nothing need be zeroed now, nor by the guest's kernel.
                .arg("assume_storage_prezeroed=1,root_owner=0:0")
                .arg(draft.path())
                .stdin(Stdio::null())
                .output()
                .map_err(|source| {
                    bad(io::Error::other(format!(
                        "mke2fs cannot be run ({source}); install e2fsprogs"
                    )))
                })?;
            if !output.status.success() {
                let said = String::from_utf8_lossy(&output.stderr);
                return Err(bad(io::Error::other(format!("mke2fs: {}", said.trim()))));
            }
            draft.as_file().sync_all().map_err(bad)?;
            // Another may have made it in the meantime: disks may be based on that.
            match draft.persist_noclobber(&path) {
                Ok(_) => {}
                Err(error) if error.error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(bad(error.error)),
            }
        }
        Self::of(&path)
    }
}

impl Chain {
    /// Checks that the template's image is still what the layers were made on.
    ///
    /// # Errors
    /// It is not, or cannot be read.
    pub fn check(&self) -> Result<(), OverlayError> {
        let now = Base {
            grown: self.base.grown,
            ..Base::of(&self.base.path)?
        };
        if now == self.base {
            Ok(())
        } else {
            Err(OverlayError::TemplateChanged {
                path: self.base.path.clone(),
            })
        }
    }

    /// Makes the empty overlay `path` on top. It has the template's size, and can be read and
    /// written by its owner alone.
    ///
    /// # Errors
    /// The images below are unusable, or `path` is there already.
    pub async fn overlay(&self, path: PathBuf) -> Result<(), OverlayError> {
        let runtime = Handle::current();
        let chain = self.clone();
        // The library's file accesses block, and its futures stay on one thread.
        let task = spawn_blocking(move || {
            chain.check()?;
            runtime.block_on(create(&chain, &path))
        });
        task.await.unwrap_or(Err(OverlayError::Interrupted))
    }
}

async fn create(chain: &Chain, path: &Path) -> Result<(), OverlayError> {
    let bad_overlay = |source| OverlayError::Create {
        path: path.to_owned(),
        source,
    };
    let (below, format) = match chain.layers.last() {
        Some(layer) => (layer.canonicalize().map_err(bad_overlay)?, "qcow2"),
        None => (chain.base.path.clone(), "raw"),
    };
    let below = below.into_os_string().into_string().map_err(|_| {
        let text = "the path of the image below is not UTF-8";
        bad_overlay(io::Error::new(io::ErrorKind::InvalidInput, text))
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
        .size(chain.base.disk_size())
        .backing(below, format.to_owned())
        .create()
        .await
        .map_err(bad_overlay)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt, PermissionsExt};

    use imago::{FormatAccess, FormatDriverBuilder, PermissiveImplicitOpenGate};

    use super::*;

    fn chain(template: &Path, layers: &[&Path]) -> Result<Chain, OverlayError> {
        Ok(Chain {
            base: Base::of(template)?,
            layers: layers.iter().map(|&layer| layer.to_owned()).collect(),
            scratch: None,
        })
    }

    async fn create(template: &Path, path: &Path) -> Result<(), OverlayError> {
        chain(template, &[])?.overlay(path.to_owned()).await
    }

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
    async fn a_disk_is_larger_than_its_template() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::write(path("base.ext4"), vec![7; 1 << 20]).unwrap();
        let mut first = chain(&path("base.ext4"), &[]).unwrap();
        first.base.grow(4);
        first.overlay(path("1")).await.unwrap();
        first.base.grow(2);
        assert_eq!(first.base.disk_size(), 4 << 20, "it does not shrink");
        // As it is written down, the size is that of what is made on it too.
        let json = serde_json::to_vec(&first.base).unwrap();
        let mut second = chain(&path("base.ext4"), &[&path("1")]).unwrap();
        second.base = serde_json::from_slice(&json).unwrap();
        second.overlay(path("2")).await.unwrap();
        for name in ["1", "2"] {
            let disk = open(&path(name), true).await;
            assert_eq!(disk.size(), 4 << 20);
            let mut read = [1; 8192];
            disk.read(&mut read[..], (1 << 20) - 4096).await.unwrap();
            assert_eq!(
                (read[4095], read[4096]),
                (7, 0),
                "across the template's end"
            );
            disk.write(&[9; 4096][..], 3 << 20).await.unwrap();
            disk.read(&mut read[..4096], 3 << 20).await.unwrap();
            assert_eq!(read[..4096], [9; 4096]);
            disk.flush().await.unwrap();
        }
        let old = r#"{"path": "/x", "size": 512, "modified_ns": 1}"#;
        let old: Base = serde_json::from_str(old).unwrap();
        assert_eq!((old.grown, old.disk_size()), (None, 512));
    }

    #[test]
    fn an_empty_file_system_is_made_once() {
        let dir = tempfile::tempdir().unwrap();
        let base = Base::empty(dir.path(), 16).unwrap();
        assert_eq!(base.size, 16 << 20);
        // The magic number of ext4's superblock, which begins at 1024.
        let mut magic = [0; 2];
        let file = std::fs::File::open(&base.path).unwrap();
        file.read_exact_at(&mut magic, 1024 + 56).unwrap();
        assert_eq!(magic, [0x53, 0xef]);
        assert_eq!(Base::empty(dir.path(), 16).unwrap(), base);
        let entries = std::fs::read_dir(dir.path()).unwrap();
        assert_eq!(entries.count(), 1, "nothing else is left");
        let error = Base::empty(&dir.path().join("none"), 16).unwrap_err();
        assert!(matches!(error, OverlayError::Empty { .. }), "{error}");
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

    async fn open(path: &Path, write: bool) -> FormatAccess<File> {
        let disk = Qcow2::<File>::builder_path(path)
            .write(write)
            .open(PermissiveImplicitOpenGate::default())
            .await
            .unwrap();
        FormatAccess::new(disk)
    }

    #[tokio::test]
    async fn overlays_are_stacked_and_those_below_do_not_change() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::write(path("base.ext4"), vec![0; 1 << 20]).unwrap();
        let mut layers = Vec::new();
        for number in 1..=5_u8 {
            let top = path(&format!("{number}.qcow2"));
            let below: Vec<&Path> = layers.iter().map(PathBuf::as_path).collect();
            let chain = chain(&path("base.ext4"), &below).unwrap();
            chain.overlay(top.clone()).await.unwrap();
            let disk = open(&top, true).await;
            let at = u64::from(number) * 4096;
            disk.write(&[number; 4096][..], at).await.unwrap();
            disk.write(&[number; 4096][..], 0).await.unwrap();
            disk.flush().await.unwrap();
            layers.push(top);
        }
        for (index, layer) in layers.iter().enumerate() {
            let disk = open(layer, false).await;
            let top = u8::try_from(index + 1).unwrap();
            for number in 0..=5 {
                let mut read = [0; 4096];
                disk.read(&mut read[..], u64::from(number) * 4096)
                    .await
                    .unwrap();
                let expected = match number {
                    0 => top,
                    number if number <= top => number,
                    _ => 0,
                };
                assert_eq!(read, [expected; 4096], "{number} in {top}");
            }
        }
    }

    #[tokio::test]
    async fn a_template_that_was_changed_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::write(path("base.ext4"), vec![0; 1 << 20]).unwrap();
        create(&path("base.ext4"), &path("a")).await.unwrap();
        let chain = chain(&path("base.ext4"), &[&path("a")]).unwrap();
        chain.overlay(path("b")).await.unwrap();
        std::fs::write(path("base.ext4"), vec![0; 2 << 20]).unwrap();
        let error = chain.overlay(path("c")).await.unwrap_err();
        assert!(
            matches!(error, OverlayError::TemplateChanged { .. }),
            "{error}"
        );
        assert!(!path("c").exists());
    }
}
