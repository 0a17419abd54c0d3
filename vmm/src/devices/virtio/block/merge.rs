//! Merging layers of a disk: many qcow2 images, one on top of the other, become one that takes the
//! place of all of them.
//!
//! What is beneath the lowest is no part of it: where none of the layers says anything, neither does
//! the new image. Where one says that there are zeros, the new one says so too, whatever is beneath.
//!
//! The layers are what guests have made of them, so this happens in a jail, and what is wrong with
//! them is wrong with the merge alone.

use std::fs::File;
use std::io;
use std::path::PathBuf;

use imago::StorageOpenOptions;
use imago::format::access::FormatAccess;
use imago::format::builder::FormatCreateBuilder;
use imago::format::drivers::ShallowMapping;
use imago::qcow2::Qcow2;

use super::SECTOR_SIZE;
use super::files::lock;
use super::image::{MAX_LAYERS, wait};

/// The cluster of all images, in bytes: that of `imago` and of QEMU, if nobody asks for another.
const CLUSTER: u64 = 64 << 10;
/// How much is read at a time, in bytes. A multiple of the cluster.
const PIECE: u64 = 1 << 20;

type Access = FormatAccess<imago::file::File>;

/// Why layers were not merged.
#[derive(Debug, thiserror::Error)]
pub enum MergeError {
    /// Too few or too many.
    #[error("{0} layers were given: expected 2 to {MAX_LAYERS}")]
    Count(usize),
    /// No size of a disk.
    #[error("a disk cannot have {0} bytes: expected a multiple of {SECTOR_SIZE}, and not 0")]
    Size(u64),
    /// A file is in use by somebody who writes to it, or cannot be used.
    #[error("{what} cannot be used")]
    File {
        /// Which.
        what: String,
        /// What the host says.
        #[source]
        source: io::Error,
    },
    /// A layer is not what a VMM makes of an overlay.
    #[error("{what} is damaged: {problem}")]
    Damaged {
        /// Which.
        what: String,
        /// What is wrong.
        problem: &'static str,
    },
    /// A layer cannot be read.
    #[error("{what} cannot be read")]
    Read {
        /// Which.
        what: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The new image cannot be written.
    #[error("the new image cannot be written")]
    Write(#[source] io::Error),
}

/// A layer, without what is beneath it.
struct Layer {
    what: String,
    access: Access,
}

/// What the layers say of a range.
enum Content<'a> {
    /// Nothing.
    Nothing,
    Zeros,
    /// What is in this one.
    Data(&'a Layer),
}

/// Writes what `layers`, the topmost first, say of a disk of `size` bytes to the empty file `output`,
/// as a qcow2 image, and makes it durable.
///
/// # Errors
/// `output` is of no use.
pub fn merge(layers: Vec<File>, output: File, size: u64) -> Result<(), MergeError> {
    if !(2..=MAX_LAYERS).contains(&layers.len()) {
        return Err(MergeError::Count(layers.len()));
    }
    if size == 0 || !size.is_multiple_of(SECTOR_SIZE) {
        return Err(MergeError::Size(size));
    }
    let layers: Vec<_> = layers
        .into_iter()
        .enumerate()
        .map(|(index, file)| Layer::open(format!("layer {index} from the top"), file, size))
        .collect::<Result<_, _>>()?;
    let durable = output.try_clone().map_err(MergeError::Write)?;
    let output = create(output, size)?;
    let mut buffer = vec![0; PIECE as usize];
    let mut offset = 0;
    while offset < size {
        let (content, len) = find(&layers, offset, size - offset)?;
        match content {
            Content::Nothing => {}
            Content::Zeros => wait(output.write_zeroes(offset, len)).map_err(MergeError::Write)?,
            Content::Data(layer) => copy(layer, &output, offset, len, &mut buffer)?,
        }
        offset += len;
    }
    wait(output.flush()).map_err(MergeError::Write)?;
    drop(output);
    durable.sync_all().map_err(MergeError::Write)
}

impl Layer {
    fn open(what: String, file: File, size: u64) -> Result<Self, MergeError> {
        let bad = |problem| MergeError::Damaged {
            what: what.clone(),
            problem,
        };
        let failed = |source| MergeError::File {
            what: what.clone(),
            source,
        };
        lock(&file, false).map_err(failed)?;
        let file = imago_file(file, false).map_err(failed)?;
        let mut image: Qcow2<_> =
            Qcow2::open_image_sync(file, false).map_err(|source| MergeError::Read {
                what: what.clone(),
                source,
            })?;
        if image.requires_external_data_file() {
            return Err(bad("it keeps its data in another file"));
        }
        image.set_data_file(None);
        image.set_backing(None);
        let access = FormatAccess::new(image);
        if access.size() != size {
            return Err(bad("it is of another size"));
        }
        // What is merged a part of a cluster at a time would lose the rest.
        if access.inner().zero_granularity() != Some(CLUSTER) {
            return Err(bad("its clusters are not of 64 KiB"));
        }
        Ok(Self { what, access })
    }

    fn damaged(&self, problem: &'static str) -> MergeError {
        MergeError::Damaged {
            what: self.what.clone(),
            problem,
        }
    }

    fn unread(&self) -> impl FnOnce(io::Error) -> MergeError {
        let what = self.what.clone();
        move |source| MergeError::Read { what, source }
    }
}

fn imago_file(file: File, writable: bool) -> io::Result<imago::file::File> {
    let options = StorageOpenOptions::new()
        .filename(PathBuf::from("inherited"))
        .write(writable);
    imago::file::File::from_open_file(file, options)
}

fn create(file: File, size: u64) -> Result<Access, MergeError> {
    let failed = |source| MergeError::File {
        what: "the new image".to_owned(),
        source,
    };
    lock(&file, true).map_err(failed)?;
    if file.metadata().map_err(failed)?.len() != 0 {
        let text = "it is not empty";
        return Err(failed(io::Error::new(io::ErrorKind::AlreadyExists, text)));
    }
    let again = file.try_clone().map_err(failed)?;
    let file = imago_file(file, true).map_err(failed)?;
    let builder = Qcow2::<imago::file::File>::create_builder(file).size(size);
    wait(builder.create()).map_err(MergeError::Write)?;
    let file = imago_file(again, true).map_err(failed)?;
    let mut image: Qcow2<_> = Qcow2::open_image_sync(file, true).map_err(MergeError::Write)?;
    image.set_data_file(None);
    image.set_backing(None);
    Ok(FormatAccess::new(image))
}

/// What the layers say of the disk from `offset` on, and for how many bytes, `max` at most.
fn find(layers: &[Layer], offset: u64, max: u64) -> Result<(Content<'_>, u64), MergeError> {
    let mut len = max;
    for layer in layers {
        let (mapping, of_this) =
            wait(layer.access.get_shallow_mapping(offset, len)).map_err(layer.unread())?;
        len = len.min(of_this);
        if len == 0 {
            return Err(layer.damaged("it ends before its size"));
        }
        match mapping {
            ShallowMapping::Zero {
                explicit: false, ..
            } => {}
            ShallowMapping::Zero { explicit: true, .. } => return Ok((Content::Zeros, len)),
            ShallowMapping::Raw { .. } | ShallowMapping::Special { .. } => {
                return Ok((Content::Data(layer), len));
            }
            _ => return Err(layer.damaged("it leads somewhere else")),
        }
    }
    Ok((Content::Nothing, len))
}

/// Copies a range of one layer; clusters of zeros become such without content.
fn copy(
    layer: &Layer,
    output: &Access,
    mut offset: u64,
    len: u64,
    buffer: &mut [u8],
) -> Result<(), MergeError> {
    let end = offset + len;
    while offset < end {
        let piece = PIECE.min(end - offset) as usize;
        let bytes = &mut buffer[..piece];
        wait(layer.access.read(&mut *bytes, offset)).map_err(layer.unread())?;
        for cluster in bytes.chunks(CLUSTER as usize) {
            let written = if cluster.iter().all(|&byte| byte == 0) {
                wait(output.write_zeroes(offset, cluster.len() as u64))
            } else {
                wait(output.write(cluster, offset))
            };
            written.map_err(MergeError::Write)?;
            offset += cluster.len() as u64;
        }
    }
    Ok(())
}
