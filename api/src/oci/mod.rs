//! OCI images in archives: what `docker save` writes, and `skopeo copy` to `oci-archive:`, or to
//! `oci:` packed into a tar file.
//!
//! The specifications: image-spec 1.1 (image-layout.md, manifest.md, config.md, layer.md), and for
//! older archives of `docker save` Docker's image specification 1.2. Everything is checked against
//! the digests that lead to it; nothing is written to this host's file systems.

mod layer;
mod manifest;

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufReader};
use std::sync::Arc;

pub use layer::{Directories, LayerScan, Whiteout};
pub use manifest::{Image, LayerBlob};

use crate::archive::{ArchiveError, Kind, Section, walk};

/// The most files in an archive of an image.
const MAX_FILES: usize = 100_000;
/// The most symbolic links that lead from one to the next; old archives have one.
const MAX_LINKS: usize = 4;
/// The largest JSON document in an image, in bytes: what registries take.
const MAX_JSON: u64 = 4 << 20;

/// Why an image is refused.
#[derive(Debug, thiserror::Error)]
pub enum OciError {
    /// The archive is refused.
    #[error("the archive of the image is refused")]
    Archive(#[source] ArchiveError),
    /// A layer is refused.
    #[error("layer {digest} is refused")]
    Layer {
        /// The digest of the layer.
        digest: String,
        /// Why.
        #[source]
        source: ArchiveError,
    },
    /// It cannot be read.
    #[error("it cannot be read")]
    Read(#[from] io::Error),
    /// It is compressed as a whole.
    #[error("the archive is compressed; unpack it with `{0}` first")]
    Compressed(&'static str),
    /// It is no image.
    #[error(
        "the archive holds no image: there is neither index.json, as in an OCI layout, nor \
         manifest.json, as `docker save` writes it"
    )]
    NoImage,
    /// A file is missing.
    #[error("the image has no {0}; it was not written to its end, or refers to other places")]
    Missing(String),
    /// A document makes no sense.
    #[error("{what} of the image makes no sense: {problem}")]
    Document {
        /// Which.
        what: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A digest is not that of the content.
    #[error(
        "the content of {what} is not what its digest says: expected {expected}, and it is {found}"
    )]
    Digest {
        /// What has it.
        what: String,
        /// The digest.
        expected: String,
        /// That of the content.
        found: String,
    },
    /// There are several.
    #[error("the archive holds {0} images for linux/amd64; write one alone to it")]
    SeveralImages(usize),
    /// It is for other machines.
    #[error("the archive holds no image for linux/amd64, but for {0}")]
    Platform(String),
    /// It has too many layers.
    #[error("the image has {0} layers; at most {max} are taken", max = manifest::MAX_LAYERS)]
    TooManyLayers(usize),
    /// Its layers are too large.
    #[error(
        "the layers of the image have more than {0} bytes in all; give its disk more room with disk_mb"
    )]
    TooLarge(u64),
}

/// An archive that may hold an image.
#[derive(Debug)]
pub struct ImageArchive {
    file: Arc<File>,
    files: HashMap<String, (u64, u64)>,
    links: HashMap<String, String>,
}

impl ImageArchive {
    /// Looks at what an archive holds. This blocks.
    ///
    /// # Errors
    /// It is refused.
    pub fn open(file: File) -> Result<Self, OciError> {
        let file = Arc::new(file);
        let whole = Section::whole(&file)?;
        let mut magic = [0; 4];
        if whole.left() >= 4 {
            io::Read::read_exact(&mut whole.clone(), &mut magic)?;
        }
        match magic {
            [0x1f, 0x8b, ..] => return Err(OciError::Compressed("gunzip")),
            [0x28, 0xb5, 0x2f, 0xfd] => return Err(OciError::Compressed("unzstd")),
            _ => {}
        }
        let (mut files, mut links) = (HashMap::new(), HashMap::new());
        walk(BufReader::new(whole), |entry| {
            // Whatever has another name is not part of an image.
            let Ok(path) = String::from_utf8(entry.path) else {
                return Ok(());
            };
            if files.len() + links.len() > MAX_FILES {
                return Err(ArchiveError::TooManyEntries);
            }
            match entry.kind {
                Kind::File => drop(files.insert(path, (entry.position, entry.size))),
                Kind::Symlink => {
                    if let Some(target) = beside(&path, &entry.target) {
                        links.insert(path, target);
                    }
                }
                Kind::Directory | Kind::HardLink | Kind::Special => {}
            }
            Ok(())
        })
        .map_err(OciError::Archive)?;
        Ok(Self { file, files, links })
    }

    /// A file of the archive, if it is there.
    fn find(&self, path: &str) -> Option<Section> {
        let mut path = path;
        for _ in 0..MAX_LINKS {
            if let Some(&(position, size)) = self.files.get(path) {
                return Some(Section::new(&self.file, position, size));
            }
            path = self.links.get(path)?;
        }
        None
    }

    fn get(&self, path: &str) -> Result<Section, OciError> {
        self.find(path)
            .ok_or_else(|| OciError::Missing(path.to_owned()))
    }

    /// A document, whole.
    fn document(&self, path: &str) -> Result<Vec<u8>, OciError> {
        let section = self.get(path)?;
        section
            .read_small(MAX_JSON)
            .map_err(|error| OciError::Document {
                what: path.to_owned(),
                problem: error.to_string(),
            })
    }
}

/// Where a link in an archive leads, within the archive.
fn beside(path: &str, target: &[u8]) -> Option<String> {
    let target = std::str::from_utf8(target).ok()?;
    if target.starts_with('/') {
        return None;
    }
    let mut parts: Vec<_> = path.split('/').collect();
    parts.pop();
    for part in target.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()?),
            part => parts.push(part),
        }
    }
    Some(parts.join("/"))
}

#[cfg(test)]
pub(crate) mod tests {
    use std::io::Write;

    use super::*;

    /// An archive of these files.
    pub fn archive(files: &[(&str, &[u8])]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&tar_of(files)).unwrap();
        file
    }

    /// A tar file of these files. Names that end with a slash are directories.
    pub fn tar_of(files: &[(&str, &[u8])]) -> Vec<u8> {
        let mut tar = tar::Builder::new(Vec::new());
        for (path, content) in files {
            let mut header = tar::Header::new_gnu();
            let kind = match path.ends_with('/') {
                true => tar::EntryType::Directory,
                false => tar::EntryType::Regular,
            };
            header.set_entry_type(kind);
            header.set_mode(0o644);
            header.set_size(content.len() as u64);
            tar.append_data(&mut header, path, *content).unwrap();
        }
        tar.into_inner().unwrap()
    }

    #[test]
    fn what_is_compressed_or_no_archive_is_told_apart() {
        let open = |bytes: &[u8]| {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(bytes).unwrap();
            ImageArchive::open(file)
        };
        assert!(matches!(
            open(&[0x1f, 0x8b, 8, 0]),
            Err(OciError::Compressed("gunzip"))
        ));
        assert!(matches!(
            open(&[0x28, 0xb5, 0x2f, 0xfd]),
            Err(OciError::Compressed("unzstd"))
        ));
        assert!(matches!(open(&[b'x'; 1024]), Err(OciError::Archive(_))));
        assert!(open(b"").unwrap().find("index.json").is_none());
    }

    #[test]
    fn links_stay_in_the_archive_and_end() {
        let mut tar = tar::Builder::new(Vec::new());
        for (path, target) in [
            ("a/layer.tar", "../b/layer.tar"),
            ("b/layer.tar", "../c"),
            ("loop", "loop"),
            ("out", "../../etc/passwd"),
            ("root", "/etc/passwd"),
        ] {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(tar::EntryType::Symlink);
            header.set_size(0);
            tar.append_link(&mut header, path, target).unwrap();
        }
        let mut header = tar::Header::new_gnu();
        header.set_size(1);
        tar.append_data(&mut header, "c", &b"!"[..]).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&tar.into_inner().unwrap()).unwrap();
        let archive = ImageArchive::open(file).unwrap();
        let found = archive.find("a/layer.tar").unwrap();
        assert_eq!(found.read_small(1).unwrap(), b"!");
        for bad in ["loop", "out", "root", "d"] {
            assert!(archive.find(bad).is_none(), "{bad}");
        }
    }
}
