//! The files of a disk image: found, opened and locked, before anything in them is trusted.
//!
//! This is the part of a disk that needs the host's paths. It reads no more of an image than the
//! name of the file that it builds on; the rest is for [`super::Image`], which needs no path and so
//! can do its work in a process that has none.
//!
//! Every file is locked for as long as it is open, so that no two machines write to one image,
//! and none writes to what another builds on. A writer locks all of the file; readers share a lock
//! on its first byte, which leaves the bytes alone by which other programs tell each other what
//! they do with a disk image.

use std::ffi::c_int;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::ImageError;
use super::image::MAX_LAYERS;
use crate::config::{BackingImage, ImageType};

/// An open and locked image, and those that it builds on.
#[derive(Debug)]
pub struct ImageFiles {
    pub(super) path: PathBuf,
    pub(super) image_type: ImageType,
    pub(super) file: File,
    pub(super) writable: bool,
    pub(super) backing: Option<Backing>,
}

/// The image that another one builds on.
#[derive(Debug)]
pub(super) struct Backing {
    /// The name that the other one has for it; `None` if that is not looked at.
    pub(super) name: Option<String>,
    pub(super) files: Box<ImageFiles>,
}

impl ImageFiles {
    /// Opens and locks the image at `path` and, if `backing_files` allows it, the images that it
    /// builds on, read-only.
    ///
    /// # Errors
    /// One of the files cannot be opened, or is in use; or the image builds on another, which is
    /// not allowed or of no known format.
    pub fn open(
        path: &Path,
        image_type: ImageType,
        readonly: bool,
        backing_files: bool,
    ) -> Result<Self, ImageError> {
        open_layer(path, image_type, !readonly, backing_files, MAX_LAYERS)
    }

    /// Opens and locks the image at `path` and, read-only, those that it builds on, nearest first,
    /// whatever the images say of that.
    ///
    /// # Errors
    /// One of the files cannot be opened, or is in use.
    pub fn open_chain(
        path: &Path,
        image_type: ImageType,
        readonly: bool,
        backing: &[BackingImage],
    ) -> Result<Self, ImageError> {
        let mut layers = vec![(path.to_owned(), image_type, open_file(path, !readonly)?)];
        for BackingImage { path, image_type } in backing {
            layers.push((path.clone(), *image_type, open_file(path, false)?));
        }
        Self::chain(layers, !readonly)
    }

    /// The images behind these descriptors, as a chain like that of
    /// [`open_chain`](Self::open_chain). They are locked when the disk takes them.
    ///
    /// # Errors
    /// One of them is not of a file.
    pub fn from_descriptors(images: Vec<(ImageType, File)>) -> Result<Self, ImageError> {
        let layer = |(index, (image_type, file)): (usize, (ImageType, File))| {
            let path = PathBuf::from(format!("descriptor {index}"));
            check_kind(&path, &file)?;
            Ok((path, image_type, file))
        };
        let layers = images.into_iter().enumerate().map(layer);
        Self::chain(layers.collect::<Result<_, _>>()?, true)
    }

    /// Joins images, topmost first.
    fn chain(layers: Vec<(PathBuf, ImageType, File)>, writable: bool) -> Result<Self, ImageError> {
        let top = layers.first().map(|(path, ..)| path.clone());
        let path = top.unwrap_or_default();
        if layers.len() > MAX_LAYERS {
            return Err(ImageError::Layers { path });
        }
        let mut beneath: Option<Self> = None;
        for (index, (path, image_type, file)) in layers.into_iter().enumerate().rev() {
            if beneath.is_some() && image_type == ImageType::Raw {
                return Err(ImageError::RawOnTop { path });
            }
            beneath = Some(Self {
                path,
                image_type,
                file,
                writable: writable && index == 0,
                backing: beneath.map(|files| Backing {
                    name: None,
                    files: Box::new(files),
                }),
            });
        }
        beneath.ok_or(ImageError::Layers { path })
    }

    /// Locks all files as those that were opened by their paths are.
    ///
    /// # Errors
    /// One of them is in use.
    pub(super) fn lock(&self) -> Result<(), ImageError> {
        let mut next = Some(self);
        while let Some(files) = next {
            lock_file(&files.path, &files.file, files.writable)?;
            next = files.backing.as_ref().map(|backing| &*backing.files);
        }
        Ok(())
    }
}

/// Opens the image at `path` and those beneath it, `layers` in all at most.
fn open_layer(
    path: &Path,
    image_type: ImageType,
    writable: bool,
    backing_files: bool,
    layers: usize,
) -> Result<ImageFiles, ImageError> {
    let Some(layers) = layers.checked_sub(1) else {
        return Err(ImageError::Layers {
            path: path.to_owned(),
        });
    };
    let file = open_file(path, writable)?;
    let named = match image_type {
        ImageType::Raw => None,
        ImageType::Qcow2 => qcow2_backing(&file),
    };
    let backing = match named {
        None => None,
        Some(NamedBacking { name, .. }) if !backing_files => {
            return Err(ImageError::BackingDenied {
                path: path.to_owned(),
                backing: name,
            });
        }
        Some(NamedBacking { name, format }) => {
            let image_type = match format.as_slice() {
                b"raw" => ImageType::Raw,
                b"qcow2" => ImageType::Qcow2,
                other => {
                    return Err(ImageError::BackingFormat {
                        path: path.to_owned(),
                        format: String::from_utf8_lossy(other).into_owned(),
                    });
                }
            };
            // A relative name starts where the image lies.
            let beneath = path.parent().unwrap_or(Path::new("")).join(&name);
            let files = open_layer(&beneath, image_type, false, true, layers)?;
            Some(Backing {
                name: Some(name),
                files: Box::new(files),
            })
        }
    };
    Ok(ImageFiles {
        path: path.to_owned(),
        image_type,
        file,
        writable,
        backing,
    })
}

fn open_file(path: &Path, writable: bool) -> Result<File, ImageError> {
    let open = |source| ImageError::Open {
        path: path.to_owned(),
        source,
    };
    let file = OpenOptions::new()
        .read(true)
        .write(writable)
        // A FIFO would hold up the open until someone writes to it.
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(open)?;
    check_kind(path, &file)?;
    lock_file(path, &file, writable)?;
    Ok(file)
}

fn check_kind(path: &Path, file: &File) -> Result<(), ImageError> {
    let metadata = file.metadata().map_err(|source| ImageError::Open {
        path: path.to_owned(),
        source,
    })?;
    let kind = metadata.file_type();
    if kind.is_file() || kind.is_block_device() {
        Ok(())
    } else {
        Err(ImageError::Kind {
            path: path.to_owned(),
        })
    }
}

fn lock_file(path: &Path, file: &File, writable: bool) -> Result<(), ImageError> {
    lock(file, writable).map_err(|source| match source.kind() {
        io::ErrorKind::WouldBlock => ImageError::Locked {
            path: path.to_owned(),
        },
        _ => ImageError::Lock {
            path: path.to_owned(),
            source,
        },
    })
}

/// Gives a lock up before the last copy of the file is closed.
pub(super) fn unlock(file: &File) -> io::Result<()> {
    set_lock(file, libc::F_UNLCK, 0)
}

/// Takes an open file description lock, which goes when the last copy of `file` is closed.
pub(super) fn lock(file: &File, exclusive: bool) -> io::Result<()> {
    let (kind, len) = if exclusive {
        (libc::F_WRLCK, 0)
    } else {
        (libc::F_RDLCK, 1)
    };
    set_lock(file, kind, len)
}

/// Locks or unlocks the first `len` bytes of a file; 0 is all of it.
fn set_lock(file: &File, kind: c_int, len: libc::off_t) -> io::Result<()> {
    let lock = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: len,
        l_pid: 0,
    };
    // SAFETY: the descriptor is open, and F_OFD_SETLK only reads the structure.
    let result: c_int = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &lock) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// What a qcow2 image says of the file that it builds on.
#[derive(Debug, PartialEq, Eq)]
struct NamedBacking {
    name: String,
    /// Empty if the image does not say.
    format: Vec<u8>,
}

/// `QFI\xfb`.
const QCOW2_MAGIC: u32 = 0x5146_49fb;

/// The header of version 3 up to and including `header_length`.
const QCOW2_HEADER: usize = 104;

/// The longest name of a backing file.
const MAX_NAME: u32 = 1023;

/// Type of the header extension that holds the backing file's format.
const BACKING_FORMAT: u32 = 0xe279_2aca;

/// The most header extensions that are looked at; the format knows six.
const MAX_EXTENSIONS: usize = 64;

/// Reads which file the qcow2 image builds on (QEMU's docs/interop/qcow2.rst, "Header" and
/// "Header extensions"). `None` if there is none, or if this is no proper header, which the reader
/// of the image will say.
fn qcow2_backing(image: &File) -> Option<NamedBacking> {
    let mut header = [0; QCOW2_HEADER];
    // An image of version 2 has a shorter header, but at least one cluster.
    image.read_exact_at(&mut header, 0).ok()?;
    let word = |at: usize| Some(u32::from_be_bytes(header.get(at..at + 4)?.try_into().ok()?));
    let (magic, version) = (word(0)?, word(4)?);
    let offset = u64::from(word(8)?) << 32 | u64::from(word(12)?);
    let (len, cluster_bits) = (word(16)?, word(20)?);
    if magic != QCOW2_MAGIC || offset == 0 || len > MAX_NAME || cluster_bits > 21 {
        return None;
    }
    let mut name = vec![0; len as usize];
    image.read_exact_at(&mut name, offset).ok()?;
    let name = String::from_utf8(name).ok()?;

    let mut format = Vec::new();
    if version >= 3 {
        // The extensions lie between the header and the end of the first cluster.
        let mut at = u64::from(word(100)?);
        for _ in 0..MAX_EXTENSIONS {
            let mut extension = [0; 8];
            if at + 8 > 1 << cluster_bits || image.read_exact_at(&mut extension, at).is_err() {
                break;
            }
            let [a, b, c, d, e, f, g, h] = extension;
            let (kind, len) = (
                u32::from_be_bytes([a, b, c, d]),
                u32::from_be_bytes([e, f, g, h]),
            );
            at += 8;
            if kind == 0 {
                break;
            }
            if kind == BACKING_FORMAT && len <= MAX_NAME {
                format = vec![0; len as usize];
                image.read_exact_at(&mut format, at).ok()?;
                break;
            }
            at += u64::from(len).next_multiple_of(8);
        }
    }
    Some(NamedBacking { name, format })
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;

    fn image(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    /// A header of version 3 whose name lies at 200, with these extensions.
    fn header(name: &str, extensions: &[(u32, &[u8])]) -> Vec<u8> {
        let mut bytes = vec![0; 512];
        let mut put = |at: usize, word: u32| bytes[at..at + 4].copy_from_slice(&word.to_be_bytes());
        put(0, QCOW2_MAGIC);
        put(4, 3);
        put(12, 200);
        put(16, name.len() as u32);
        put(20, 16);
        put(100, 104);
        let mut at = 104;
        for (kind, data) in extensions {
            put(at, *kind);
            put(at + 4, data.len() as u32);
            at += 8 + data.len().next_multiple_of(8);
        }
        let mut at = 104;
        for (_, data) in extensions {
            bytes[at + 8..at + 8 + data.len()].copy_from_slice(data);
            at += 8 + data.len().next_multiple_of(8);
        }
        bytes[200..200 + name.len()].copy_from_slice(name.as_bytes());
        bytes
    }

    #[test]
    fn name_and_format_are_found_behind_other_extensions() {
        let extensions: &[(u32, &[u8])] = &[(0x6803_f857, b"abc"), (BACKING_FORMAT, b"raw")];
        assert_eq!(
            qcow2_backing(&image(&header("base.img", extensions))),
            Some(NamedBacking {
                name: "base.img".into(),
                format: b"raw".to_vec(),
            })
        );
        let silent = qcow2_backing(&image(&header("base.img", &[]))).unwrap();
        assert_eq!(silent.format, b"");
        assert_eq!(qcow2_backing(&image(&[7; 512])), None);
    }

    proptest! {
        #[test]
        fn no_header_does_harm(
            start in any::<bool>(),
            mut bytes in prop::collection::vec(any::<u8>(), 0..600),
        ) {
            if start {
                let good = header("x", &[(BACKING_FORMAT, b"raw")]);
                let keep = bytes.len().min(24);
                bytes[..keep].copy_from_slice(&good[..keep]);
            }
            // Names are at most as long as they may be, whatever the header says.
            if let Some(backing) = qcow2_backing(&image(&bytes)) {
                prop_assert!(backing.name.len() <= MAX_NAME as usize);
            }
        }
    }
}
