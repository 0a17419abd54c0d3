//! What sandboxes are made from: kernel, initramfs, and a root disk for each template.
//!
//! A template is a raw ext4 image that is only ever read. Each sandbox writes to a qcow2 overlay
//! of its own on it, or on what another one has written, so creating one copies nothing.

mod overlay;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

pub use overlay::{Base, Chain, OverlayError};

/// The images of this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Images {
    /// Guest kernel.
    pub kernel: PathBuf,
    /// Initial RAM file system with the guest agent.
    pub initramfs: PathBuf,
    /// Root disks by template name.
    pub templates: BTreeMap<String, PathBuf>,
}

/// An image that is not usable.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// It cannot be opened.
    #[error("the {what} {path} cannot be read; build it with `make images`, or name another with {flag}", path = path.display())]
    Open {
        /// What it is for.
        what: String,
        /// Where it should be.
        path: PathBuf,
        /// The flag that names another.
        flag: &'static str,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// It is no file, or an empty one.
    #[error("the {what} {path} is not a file with content", path = path.display())]
    NotAFile {
        /// What it is for.
        what: String,
        /// Where it is.
        path: PathBuf,
    },
    /// The directory of images cannot be listed.
    #[error("the directory of images {path} cannot be listed", path = path.display())]
    List {
        /// Where it is.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// There is no template at all.
    #[error(
        "there is no template: {path} holds no *.ext4; build one with `make images`, or name one \
         with --template NAME=PATH",
        path = path.display()
    )]
    NoTemplate {
        /// Where they should be.
        path: PathBuf,
    },
}

impl Images {
    /// The images in `dir`: `vmlinux`, `initramfs.cpio`, and each `NAME.ext4` as template NAME.
    ///
    /// # Errors
    /// The directory is there and cannot be listed.
    pub fn in_dir(dir: &Path) -> Result<Self, ImageError> {
        let list = |source| ImageError::List {
            path: dir.to_owned(),
            source,
        };
        let mut templates = BTreeMap::new();
        match std::fs::read_dir(dir) {
            Ok(entries) => {
                for entry in entries {
                    let path = entry.map_err(list)?.path();
                    let is_disk = path
                        .extension()
                        .is_some_and(|extension| extension == "ext4");
                    if let (true, Some(name)) = (is_disk, path.file_stem()) {
                        templates.insert(name.to_string_lossy().into_owned(), path);
                    }
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(list(error)),
        }
        Ok(Self {
            kernel: dir.join("vmlinux"),
            initramfs: dir.join("initramfs.cpio"),
            templates,
        })
    }

    /// Checks that every image can be read.
    ///
    /// # Errors
    /// The first one that cannot.
    pub fn check(&self, dir: &Path) -> Result<(), ImageError> {
        check_file("guest kernel", &self.kernel, "--kernel")?;
        check_file("initramfs", &self.initramfs, "--initramfs")?;
        for (name, path) in &self.templates {
            check_file(
                &format!("disk of template {name:?}"),
                path,
                "--template NAME=PATH",
            )?;
        }
        if self.templates.is_empty() {
            return Err(ImageError::NoTemplate {
                path: dir.to_owned(),
            });
        }
        Ok(())
    }
}

fn check_file(what: &str, path: &Path, flag: &'static str) -> Result<(), ImageError> {
    let metadata = std::fs::File::open(path)
        .and_then(|file| file.metadata())
        .map_err(|source| ImageError::Open {
            what: what.to_owned(),
            path: path.to_owned(),
            flag,
            source,
        })?;
    if metadata.is_file() && metadata.len() > 0 {
        Ok(())
    } else {
        Err(ImageError::NotAFile {
            what: what.to_owned(),
            path: path.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_ext4_image_is_a_template() {
        let dir = tempfile::tempdir().unwrap();
        for name in [
            "vmlinux",
            "initramfs.cpio",
            "minimal.ext4",
            "python-3.13.ext4",
        ] {
            std::fs::write(dir.path().join(name), "x").unwrap();
        }
        let images = Images::in_dir(dir.path()).unwrap();
        let names: Vec<_> = images.templates.keys().collect();
        assert_eq!(names, ["minimal", "python-3.13"]);
        images.check(dir.path()).unwrap();
    }

    #[test]
    fn what_is_missing_or_empty_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path();
        let error = |_: ()| {
            Images::in_dir(path)
                .unwrap()
                .check(path)
                .unwrap_err()
                .to_string()
        };
        assert!(error(()).contains("guest kernel"));
        std::fs::write(path.join("vmlinux"), "").unwrap();
        assert!(error(()).contains("not a file with content"));
        std::fs::write(path.join("vmlinux"), "x").unwrap();
        assert!(error(()).contains("--initramfs"));
        std::fs::write(path.join("initramfs.cpio"), "x").unwrap();
        assert!(error(()).contains("there is no template"));
        std::fs::create_dir(path.join("minimal.ext4")).unwrap();
        assert!(error(()).contains("disk of template \"minimal\""));
    }
}
