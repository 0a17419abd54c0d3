//! A disk image on the host, raw or qcow2.
//!
//! What an image holds may come from a guest, so nothing is concluded from it: the format is what
//! the configuration says (and what a qcow2 header says of its backing file), and a file that an
//! image names is opened only if the configuration allows it.

use std::collections::BTreeSet;
use std::io;
use std::path::PathBuf;

use imago::io_buffers::{IoVector, IoVectorMut};
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{FormatAccess, StorageOpenOptions, SyncFormatAccess};

use super::ImageFiles;
use crate::config::ImageType;
use crate::devices::virtio::buffers::Buffers;

/// The most images that may lie beneath one another. It ends a chain that leads back to itself.
pub(super) const MAX_LAYERS: usize = 64;

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
    /// The image names another backing file than when it was opened.
    #[error("{path} has another backing file than a moment ago: who else writes to it?", path = path.display())]
    Changed {
        /// The image.
        path: PathBuf,
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
    /// Reads the image that `files` hold. Needs no path.
    ///
    /// # Errors
    /// One of the files is not what it should be.
    pub fn new(files: ImageFiles) -> Result<Self, ImageError> {
        let (path, writable) = (files.path.clone(), files.writable);
        let layer = build_layer(files)?;
        let access = SyncFormatAccess::try_from(layer)
            .map_err(|source| ImageError::Open { path, source })?;
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

/// Reads the image and those beneath it.
fn build_layer(files: ImageFiles) -> Result<FormatAccess<imago::file::File>, ImageError> {
    let ImageFiles {
        path,
        image_type,
        file,
        writable,
        backing,
    } = files;
    let options = StorageOpenOptions::new().filename(&path).write(writable);
    let file = match imago::file::File::from_open_file(file, options) {
        Ok(file) => file,
        Err(source) => return Err(ImageError::Open { path, source }),
    };
    let format_error = |path, format| {
        move |source| ImageError::Format {
            path,
            format,
            source,
        }
    };
    match image_type {
        ImageType::Raw => Raw::open_image_sync(file, writable)
            .map(FormatAccess::new)
            .map_err(format_error(path, "raw")),
        ImageType::Qcow2 => {
            let mut image: Qcow2<_> = Qcow2::open_image_sync(file, writable)
                .map_err(format_error(path.clone(), "qcow2"))?;
            if image.requires_external_data_file() {
                return Err(ImageError::DataFile { path });
            }
            image.set_data_file(None);
            let (name, backing) = backing.unzip();
            if name.as_ref() != image.implicit_backing_file() {
                return Err(ImageError::Changed { path });
            }
            image.set_backing(backing.map(|files| build_layer(*files)).transpose()?);
            Ok(FormatAccess::new(image))
        }
    }
}
