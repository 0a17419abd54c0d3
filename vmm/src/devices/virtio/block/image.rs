//! A disk image on the host, raw or qcow2.
//!
//! What an image holds may come from a guest, so nothing is concluded from it: the format is what
//! the configuration says (and what a qcow2 header says of its backing file), and a file that an
//! image names is opened only if the configuration allows it.
//!
//! Every file is locked for as long as it is open, so that no two machines write to one image,
//! and none writes to what another builds on. A writer locks all of the file; readers share a lock
//! on its first byte, which leaves the bytes alone by which other programs tell each other what
//! they do with a disk image.

use std::collections::BTreeSet;
use std::ffi::c_int;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use imago::io_buffers::{IoVector, IoVectorMut};
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{FormatAccess, StorageOpenOptions, SyncFormatAccess};

use crate::config::ImageType;
use crate::devices::virtio::buffers::Buffers;

/// The most images that may lie beneath one another. It ends a chain that leads back to itself.
const MAX_LAYERS: usize = 64;

/// Why an image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The file cannot be opened.
    #[error("cannot open {path}", path = path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What the host says.
        #[source]
        source: io::Error,
    },
    /// Neither a file nor a block device.
    #[error("{path} is neither a regular file nor a block device", path = path.display())]
    Kind {
        /// The path.
        path: PathBuf,
    },
    /// Someone else uses the file in a way that excludes this one.
    #[error(
        "{path} is in use: an image is written by one machine, or read by any number",
        path = path.display()
    )]
    Locked {
        /// The file.
        path: PathBuf,
    },
    /// The file cannot be locked at all.
    #[error("cannot lock {path}", path = path.display())]
    Lock {
        /// The file.
        path: PathBuf,
        /// What the host says.
        #[source]
        source: io::Error,
    },
    /// The file is not an image of the format it is said to be.
    #[error("{path} cannot be read as a {format} image", path = path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// The format.
        format: &'static str,
        /// What is wrong.
        #[source]
        source: io::Error,
    },
    /// The image is incomplete without its backing file, which is not allowed.
    #[error(
        "{path} has the backing file {backing:?}: set backing_files=on if that file may be read",
        path = path.display()
    )]
    BackingDenied {
        /// The image.
        path: PathBuf,
        /// The backing file that it names.
        backing: String,
    },
    /// The image does not say how its backing file is to be read, or names a format that is not
    /// supported.
    #[error(
        "{path} gives its backing file the format {format:?}; expected \"raw\" or \"qcow2\"",
        path = path.display()
    )]
    BackingFormat {
        /// The image.
        path: PathBuf,
        /// The format that it names, empty if it names none.
        format: String,
    },
    /// The image keeps its data in another file.
    #[error("{path} keeps its data in another file, which is not supported", path = path.display())]
    DataFile {
        /// The image.
        path: PathBuf,
    },
    /// Too many images beneath one another.
    #[error(
        "{path} is the {MAX_LAYERS}th image beneath another; is it its own backing file?",
        path = path.display()
    )]
    Layers {
        /// The image.
        path: PathBuf,
    },
}

/// An open disk image.
pub struct Image {
    access: SyncFormatAccess<imago::file::File>,
    writable: bool,
    /// How much of the disk one table of a qcow2 image maps, in bytes.
    table_span: Option<u64>,
    /// The tables, by the index of what they map, that are known to be in the file.
    tables: BTreeSet<u64>,
}

impl Image {
    /// Opens and locks the image at `path` and, if `backing_files` allows it, the images that it
    /// builds on, read-only.
    ///
    /// # Errors
    /// One of the files cannot be opened, is in use or is not what it should be.
    pub fn open(
        path: &Path,
        image_type: ImageType,
        readonly: bool,
        backing_files: bool,
    ) -> Result<Self, ImageError> {
        let writable = !readonly;
        let layer = open_layer(path, image_type, writable, backing_files, MAX_LAYERS)?;
        let access = SyncFormatAccess::try_from(layer).map_err(|source| ImageError::Open {
            path: path.to_owned(),
            source,
        })?;
        // An L2 table is one cluster of 8-byte entries, each of which maps a cluster. Only images
        // of version 3 tell the size; nothing has made older ones for a decade.
        let cluster = access.inner().inner().zero_granularity();
        Ok(Self {
            table_span: cluster.and_then(|size| size.checked_mul(size / 8)),
            tables: BTreeSet::new(),
            access,
            writable,
        })
    }

    /// The size of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.access.size()
    }

    /// Whether the image was opened for writing.
    pub fn writable(&self) -> bool {
        self.writable
    }

    /// Reads from `offset` in bytes until `buffers` are full.
    ///
    /// # Errors
    /// The host could not read; what `buffers` hold is undefined then.
    pub fn read(&self, buffers: &Buffers<'_>, offset: u64) -> io::Result<()> {
        let (vector, _guard) = IoVectorMut::from_volatile_slice(buffers.slices());
        self.access.readv(vector, offset)
    }

    /// Writes all of `buffers` at `offset` in bytes. A qcow2 image grows as needed.
    ///
    /// # Errors
    /// The host could not write; what the range holds is undefined then.
    pub fn write(&mut self, buffers: &Buffers<'_>, offset: u64) -> io::Result<()> {
        let (vector, _guard) = IoVector::from_volatile_slice(buffers.slices());
        self.access.writev(vector, offset)?;
        self.settle_tables(offset, buffers.len() as u64)
    }

    /// Writes the metadata out after the first write to the span of a table.
    ///
    /// A new table is linked into the file at once, but it is counted as used only when the
    /// metadata is written. In between, the death of this process would leave a table that the
    /// next one takes for free space. All other metadata is written in an order in which it may
    /// stop at any point.
    fn settle_tables(&mut self, offset: u64, len: u64) -> io::Result<()> {
        let Some(span) = self.table_span.filter(|span| *span > 0 && len > 0) else {
            return Ok(());
        };
        let mut new = false;
        for table in offset / span..=(offset + len - 1) / span {
            new |= self.tables.insert(table);
        }
        if new { self.access.flush() } else { Ok(()) }
    }

    /// Makes everything written so far durable.
    ///
    /// # Errors
    /// The host could not write.
    pub fn flush(&self) -> io::Result<()> {
        if !self.writable {
            return Ok(());
        }
        // First the metadata that is still in memory, then the files.
        self.access.flush()?;
        self.access.sync()
    }
}

/// Opens the image at `path` and those beneath it, `layers` in all at most.
fn open_layer(
    path: &Path,
    image_type: ImageType,
    writable: bool,
    backing_files: bool,
    layers: usize,
) -> Result<FormatAccess<imago::file::File>, ImageError> {
    let Some(layers) = layers.checked_sub(1) else {
        return Err(ImageError::Layers {
            path: path.to_owned(),
        });
    };
    let file = open_file(path, writable)?;
    match image_type {
        ImageType::Raw => Raw::open_image_sync(file, writable)
            .map(FormatAccess::new)
            .map_err(|source| ImageError::Format {
                path: path.to_owned(),
                format: "raw",
                source,
            }),
        ImageType::Qcow2 => {
            let mut image: Qcow2<_> =
                Qcow2::open_image_sync(file, writable).map_err(|source| ImageError::Format {
                    path: path.to_owned(),
                    format: "qcow2",
                    source,
                })?;
            if image.requires_external_data_file() {
                return Err(ImageError::DataFile {
                    path: path.to_owned(),
                });
            }
            image.set_data_file(None);
            let backing = match image.implicit_backing_file() {
                None => None,
                Some(backing) if !backing_files => {
                    return Err(ImageError::BackingDenied {
                        path: path.to_owned(),
                        backing: backing.clone(),
                    });
                }
                Some(backing) => {
                    let image_type = match image.implicit_backing_format().map(String::as_str) {
                        Some("raw") => ImageType::Raw,
                        Some("qcow2") => ImageType::Qcow2,
                        other => {
                            return Err(ImageError::BackingFormat {
                                path: path.to_owned(),
                                format: other.unwrap_or_default().to_owned(),
                            });
                        }
                    };
                    // A relative name starts where the image lies.
                    let backing = path.parent().unwrap_or(Path::new("")).join(backing);
                    Some(open_layer(&backing, image_type, false, true, layers)?)
                }
            };
            image.set_backing(backing);
            Ok(FormatAccess::new(image))
        }
    }
}

fn open_file(path: &Path, writable: bool) -> Result<imago::file::File, ImageError> {
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
    let kind = file.metadata().map_err(open)?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(ImageError::Kind {
            path: path.to_owned(),
        });
    }
    lock(&file, writable).map_err(|source| match source.kind() {
        io::ErrorKind::WouldBlock => ImageError::Locked {
            path: path.to_owned(),
        },
        _ => ImageError::Lock {
            path: path.to_owned(),
            source,
        },
    })?;
    let options = StorageOpenOptions::new().filename(path).write(writable);
    imago::file::File::from_open_file(file, options).map_err(open)
}

/// Takes an open file description lock, which goes when `file` is closed.
fn lock(file: &File, exclusive: bool) -> io::Result<()> {
    let (kind, len) = if exclusive {
        (libc::F_WRLCK, 0)
    } else {
        (libc::F_RDLCK, 1)
    };
    let lock = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        // 0 is up to the end, wherever that will be.
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
