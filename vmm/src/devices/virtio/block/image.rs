//! A disk image on the host, raw or qcow2.
//!
//! What an image holds may come from a guest, so nothing is concluded from it: the format is what
//! the configuration says (and what a qcow2 header says of its backing file), and a file that an
//! image names is opened only if the configuration allows it.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::task::{Context, Poll, Wake};
use std::thread::{self, Thread};

use imago::format::PreallocateMode;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{FormatAccess, StorageOpenOptions};
use rustix::fs::{FallocateFlags, OFlags};

use super::files::{Backing, ImageFiles, lock, unlock};
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
    /// The page cache cannot be passed by.
    #[error("{path} cannot be used past the page cache: leave out direct=on", path = path.display())]
    Direct {
        /// The file.
        path: PathBuf,
        /// What the host says.
        #[source]
        source: io::Error,
    },
    /// The image keeps its data in another file.
    #[error("{path} keeps its data in another file, which is not supported", path = path.display())]
    DataFile {
        /// The image.
        path: PathBuf,
    },
    /// A raw image builds on nothing.
    #[error("{path} is a raw image, and cannot build on another", path = path.display())]
    RawOnTop {
        /// The image.
        path: PathBuf,
    },
    /// The image counts its own header as free space.
    #[error(
        "{path} is damaged, its reference counts do not cover its header: repair it with \
         `qemu-img check -r all`",
        path = path.display()
    )]
    RefCounts {
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

/// An open disk image, for any number of threads at once.
pub struct Image {
    /// Reading and writing share it. Whoever takes away what others may have looked up, by a
    /// discard or a new size, has it alone.
    access: RwLock<FormatAccess<imago::file::File>>,
    /// The file of the topmost image.
    file: File,
    image_type: ImageType,
    writable: bool,
    /// The size of the image beneath, in bytes.
    backing_size: u64,
    /// How much of the disk one table of a qcow2 image maps, in bytes.
    table_span: Option<u64>,
    /// The tables, by the index of what they map, that are known to be in the file.
    tables: Mutex<BTreeSet<u64>>,
}

impl Image {
    /// Reads the image that `files` hold; with `direct`, past the host's page cache. Needs no path.
    ///
    /// # Errors
    /// One of the files is not what it should be.
    pub fn new(files: ImageFiles, direct: bool) -> Result<Self, ImageError> {
        let (image_type, writable) = (files.image_type, files.writable);
        let file = files.file.try_clone().map_err(|source| ImageError::Open {
            path: files.path.clone(),
            source,
        })?;
        let (access, backing_size) = build_layer(files, direct)?;
        // An L2 table is one cluster of 8-byte entries, each of which maps a cluster. Only images
        // of version 3 tell the size; nothing has made older ones for a decade.
        let cluster = access.inner().zero_granularity();
        Ok(Self {
            table_span: cluster.and_then(|size| size.checked_mul(size / 8)),
            tables: Mutex::default(),
            access: RwLock::new(access),
            file,
            image_type,
            writable,
            backing_size,
        })
    }

    fn shared(&self) -> RwLockReadGuard<'_, FormatAccess<imago::file::File>> {
        self.access.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn alone(&self) -> RwLockWriteGuard<'_, FormatAccess<imago::file::File>> {
        self.access.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// The size of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.shared().size()
    }

    /// Whether the image was opened for writing.
    pub fn writable(&self) -> bool {
        self.writable
    }

    /// Whether the image can give back what is discarded. A qcow2 image of version 2 cannot.
    pub fn can_discard(&self) -> bool {
        self.writable && (self.image_type == ImageType::Raw || self.table_span.is_some())
    }

    /// The unit of what can be given back, in bytes.
    pub fn discard_granularity(&self) -> u64 {
        // Without clusters, that of most file systems.
        const BLOCK: u64 = 4096;
        self.shared().inner().zero_granularity().unwrap_or(BLOCK)
    }

    /// Reads from `offset` in bytes until `buffers` are full.
    ///
    /// # Errors
    /// The host could not read; what `buffers` hold is undefined then.
    pub fn read(&self, buffers: &Buffers<'_>, offset: u64) -> io::Result<()> {
        let (vector, _guard) = IoVectorMut::from_volatile_slice(buffers.slices());
        wait(self.shared().readv(vector, offset))
    }

    /// Writes all of `buffers` at `offset` in bytes. A qcow2 image grows as needed.
    ///
    /// # Errors
    /// The host could not write; what the range holds is undefined then.
    pub fn write(&self, buffers: &Buffers<'_>, offset: u64) -> io::Result<()> {
        let (vector, _guard) = IoVector::from_volatile_slice(buffers.slices());
        let access = self.shared();
        wait(access.writev(vector, offset))?;
        self.settle_tables(&access, offset, buffers.len() as u64)
    }

    /// Gives back the `len` bytes at `offset`, as far as the format and the host can. What they
    /// hold is undefined then, but nothing that was not there before.
    ///
    /// # Errors
    /// The host could not.
    pub fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut access = self.alone();
        match wait(access.discard_to_any(offset, len)) {
            Err(error) if error.kind() != io::ErrorKind::Unsupported => Err(error),
            _ => self.settle_tables(&access, offset, len),
        }
    }

    /// Makes the `len` bytes at `offset` zero. With `give_back` they need not take up space any
    /// more; without, they are as sure to be writable as before.
    ///
    /// # Errors
    /// The host could not; what the range holds is undefined then.
    pub fn write_zeroes(&self, offset: u64, len: u64, give_back: bool) -> io::Result<()> {
        if give_back {
            let mut access = self.alone();
            match wait(access.discard_to_zero(offset, len)) {
                Err(error) if error.kind() == io::ErrorKind::Unsupported => {}
                Err(error) => return Err(error),
                Ok(()) => return self.settle_tables(&access, offset, len),
            }
        }
        let access = self.shared();
        let efficient = match self.image_type {
            ImageType::Raw => self.zero_range(offset, len),
            ImageType::Qcow2 => wait(access.write_zeroes(offset, len)),
        };
        match efficient {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                write_zero_data(&access, offset, len)?;
            }
            other => other?,
        }
        self.settle_tables(&access, offset, len)
    }

    /// Makes a range of a raw image's file zero, whose blocks stay allocated.
    fn zero_range(&self, offset: u64, len: u64) -> io::Result<()> {
        let flags = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        Ok(rustix::fs::fallocate(&self.file, flags, offset, len)?)
    }

    /// Writes the metadata out after the first write to the span of a table.
    ///
    /// A new table is linked into the file at once, but it is counted as used only when the
    /// metadata is written. In between, the death of this process would leave a table that the
    /// next one takes for free space. All other metadata is written in an order in which it may
    /// stop at any point. Others who write to the span wait until that is done.
    fn settle_tables(
        &self,
        access: &FormatAccess<imago::file::File>,
        offset: u64,
        len: u64,
    ) -> io::Result<()> {
        let Some(span) = self.table_span.filter(|span| *span > 0 && len > 0) else {
            return Ok(());
        };
        let mut tables = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        let touched = offset / span..=(offset + len - 1) / span;
        if touched.clone().all(|table| tables.contains(&table)) {
            return Ok(());
        }
        wait(access.flush())?;
        tables.extend(touched);
        Ok(())
    }

    /// Makes everything written so far durable.
    ///
    /// # Errors
    /// The host could not write.
    pub fn flush(&self) -> io::Result<()> {
        if !self.writable {
            return Ok(());
        }
        // First the metadata that is still in memory, then the file: directly, since the library
        // would let nobody else use the file meanwhile.
        if self.image_type == ImageType::Qcow2 {
            wait(self.shared().flush())?;
        }
        self.file.sync_data()
    }

    /// Locks the file of the topmost image again after [`unlock`](Self::unlock).
    ///
    /// # Errors
    /// Somebody else has it.
    pub fn lock(&self) -> io::Result<()> {
        lock(&self.file, self.writable)
    }

    /// Lets others have the file of the topmost image, to read from it.
    ///
    /// # Errors
    /// The host refuses.
    pub fn unlock(&self) -> io::Result<()> {
        unlock(&self.file)
    }

    /// Makes the disk `size` bytes large. What is new reads as zeros.
    ///
    /// # Errors
    /// The host could not; the size is as it was.
    pub fn resize(&self, size: u64) -> io::Result<()> {
        let mut access = self.alone();
        let old = access.size();
        // What lies beneath must not show through.
        let preallocate = if self.backing_size > old {
            PreallocateMode::Zero
        } else {
            PreallocateMode::None
        };
        wait(access.resize(size, preallocate))?;
        wait(access.flush())
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        if self.writable
            && let Err(error) = wait(self.shared().flush())
        {
            tracing::error!(%error, "the metadata of a disk image could not be written");
        }
    }
}

fn write_zero_data(
    access: &FormatAccess<imago::file::File>,
    mut offset: u64,
    len: u64,
) -> io::Result<()> {
    static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
    let end = offset + len;
    while offset < end {
        let count = (end - offset).min(ZEROS.len() as u64);
        wait(access.write(&ZEROS[..count as usize], offset))?;
        offset += count;
    }
    Ok(())
}

/// Brings a future of the image library to its end on this thread. Such a future needs no runtime:
/// it makes system calls that block, and waits for nothing but the locks of others like it.
pub(super) fn wait<F: Future>(future: F) -> F::Output {
    struct Unpark(Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Arc::new(Unpark(thread::current())).into();
    let mut context = Context::from_waker(&waker);
    let mut future = pin!(future);
    loop {
        match future.as_mut().poll(&mut context) {
            Poll::Ready(output) => return output,
            Poll::Pending => thread::park(),
        }
    }
}

/// Reads the image and those beneath it, and returns it and the size of the one beneath.
fn build_layer(
    files: ImageFiles,
    direct: bool,
) -> Result<(FormatAccess<imago::file::File>, u64), ImageError> {
    let ImageFiles {
        path,
        image_type,
        file,
        writable,
        backing,
    } = files;
    if image_type == ImageType::Qcow2 && writable && !counts_its_header(&file) {
        return Err(ImageError::RefCounts { path });
    }
    if direct {
        // Not when it is opened: its header is read in pieces that are not aligned.
        let set = rustix::fs::fcntl_getfl(&file)
            .and_then(|flags| rustix::fs::fcntl_setfl(&file, flags | OFlags::DIRECT));
        if let Err(source) = set {
            let source = source.into();
            return Err(ImageError::Direct { path, source });
        }
    }
    let options = StorageOpenOptions::new()
        .filename(&path)
        .write(writable)
        .direct(direct);
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
            .map(|image| (FormatAccess::new(image), 0))
            .map_err(format_error(path, "raw")),
        ImageType::Qcow2 => {
            let mut image: Qcow2<_> = Qcow2::open_image_sync(file, writable)
                .map_err(format_error(path.clone(), "qcow2"))?;
            if image.requires_external_data_file() {
                return Err(ImageError::DataFile { path });
            }
            image.set_data_file(None);
            let named = image.implicit_backing_file();
            match &backing {
                Some(Backing { name: None, .. }) => {}
                Some(Backing { name, .. }) if name.as_ref() == named => {}
                None if named.is_none() => {}
                _ => return Err(ImageError::Changed { path }),
            }
            let backing = backing
                .map(|backing| build_layer(*backing.files, direct))
                .transpose()?
                .map(|(backing, _)| backing);
            let backing_size = backing.as_ref().map_or(0, FormatAccess::size);
            image.set_backing(backing);
            Ok((FormatAccess::new(image), backing_size))
        }
    }
}

/// Magic and version of the two versions of qcow2.
const QCOW2_V2: u64 = 0x5146_49fb_0000_0002;
const QCOW2_V3: u64 = 0x5146_49fb_0000_0003;

/// Whether a qcow2 image counts its first cluster, which the header is in, as used (QEMU's
/// docs/interop/qcow2.rst, "Header" and "Host cluster management").
///
/// The library allocates what is counted as free, without looking. In place of the header it would
/// find no room for a table, since a table's offset of 0 is that of none, and look for it for ever.
fn counts_its_header(image: &File) -> bool {
    // What lies behind the end of the file, or is too short, is zero for the library too.
    let word = |offset| {
        let mut bytes = [0; 8];
        match image.read_at(&mut bytes, offset) {
            Ok(length) if length == bytes.len() => u64::from_be_bytes(bytes),
            _ => 0,
        }
    };
    // The number of bits of a count, as a power of two.
    let order = match word(0) {
        QCOW2_V2 => 4,
        QCOW2_V3 => word(92) as u32,
        // This is no image at all, which the library will say.
        _ => return true,
    };
    let (table, clusters) = (word(48), word(56) >> 32);
    // The low bits of an offset are reserved.
    let block = word(table) & !0x1ff;
    if clusters == 0 || block == 0 {
        return false;
    }
    let first = word(block);
    let count = match order {
        // Several to a byte, the first in the lowest bits.
        0..3 => first >> 56 & ((1 << (1 << order)) - 1),
        3..6 => first >> (64 - (1 << order)),
        _ => first,
    };
    count > 0
}
