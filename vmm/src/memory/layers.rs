//! Guest memory in files: written when a machine is saved, mapped when it is restored.
//!
//! ```text
//!  guest memory     │ own │ L1 │ own │ L1 │  L0  │ own │ zero │ L0 │      private mappings
//!                   └─────┴────┴─────┴────┴──────┴─────┴──────┴────┘
//!  layer 1 (file)            ████       ██                               changes since layer 0
//!  layer 0 (file)          ████████████████████████           ██████     everything but zeros
//! ```
//!
//! A layer holds each of its pages at the page's offset (see [`Extents`]); in between it has holes.
//! Memory is mapped from its layers privately and read when the guest touches it, so that nobody
//! ever writes to a layer, and all machines with a layer in common share its pages. A page that is
//! in no layer is zero and costs nothing.
//!
//! What a machine has changed since is what its page table has as the machine's own
//! ([`Pagemap`]). Saving it makes one more layer, which the machine then is mapped from as well:
//! so the next one is again as small as what has changed in between.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use sha2::{Digest, Sha256};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::extents::Extents;
use super::pagemap::{Pagemap, Pages};
use super::{GuestMemory, PAGE_SIZE, is_zero};

/// How much memory is read at a time.
const CHUNK: u64 = 64 * PAGE_SIZE;

/// Gaps of zeros up to this size between pages of a layer become part of it: a mapping more costs
/// more than such a hole in a file.
const SMALL_GAP: u64 = 16 * PAGE_SIZE;

/// The most runs of pages of a layer, each of which becomes a mapping. All layers of a machine
/// together have to stay below `vm.max_map_count`, which is 65530 by default.
pub const MAX_RUNS: usize = 8192;

/// The most layers of a machine.
pub const MAX_LAYERS: usize = 7;

/// SHA-256.
pub type Hash = [u8; 32];

/// Why memory was not written to a layer.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// It is not known what has changed.
    #[error("cannot tell which pages of its memory the guest has changed")]
    Pagemap(#[source] io::Error),
    /// The layer cannot be written.
    #[error("cannot write the guest's memory")]
    Write(#[source] io::Error),
    /// Guest memory cannot be read.
    #[error("cannot read the guest's memory")]
    Read(#[source] vm_memory::GuestMemoryError),
}

/// Why memory was not mapped from a layer.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// The layer is too short, or holds pages that the guest has not.
    #[error(
        "the memory file holds pages up to {end:#x}; it has {file:#x} bytes, the guest {guest:#x}"
    )]
    Size {
        /// End of its last page.
        end: u64,
        /// Size of the file.
        file: u64,
        /// Size of the guest's memory.
        guest: u64,
    },
    /// Too many mappings.
    #[error("the memory file has {runs} runs of pages, more than {MAX_RUNS}")]
    Runs {
        /// How many.
        runs: usize,
    },
    /// The file cannot be read.
    #[error("cannot read the memory file")]
    Read(#[source] io::Error),
    /// The host refuses the mapping.
    #[error("cannot map the guest's memory from a file")]
    Map(#[source] io::Error),
    /// What is in the file is not what was written to it.
    #[error("the memory file has been damaged: its checksum is not that of the snapshot")]
    Damaged,
}

/// A file with part of a guest's memory. It does not change any more.
#[derive(Debug)]
pub struct Layer {
    file: File,
    pages: Extents,
}

/// What was written to a file.
#[derive(Debug)]
pub struct Written {
    /// The pages that it holds.
    pub pages: Extents,
    /// Their content, in order.
    pub hash: Hash,
    /// Pages that the machine has as its own, or from layers that were not kept, and that the file
    /// does not hold, since they are zero.
    zero: Extents,
}

impl Layer {
    /// The layer in `file`, which holds `pages`.
    ///
    /// # Errors
    /// The file has not all of them.
    pub fn new(file: File, pages: Extents, memory: u64) -> Result<Self, MapError> {
        let len = file.metadata().map_err(MapError::Read)?.len();
        let runs = pages.iter().len();
        if pages.end() > len || pages.end() > memory {
            return Err(MapError::Size {
                end: pages.end(),
                file: len,
                guest: memory,
            });
        }
        if runs > MAX_RUNS {
            return Err(MapError::Runs { runs });
        }
        Ok(Self { file, pages })
    }

    /// Reads all of the layer and compares it with what it was when it was written.
    ///
    /// # Errors
    /// It has been damaged, or cannot be read.
    pub fn verify(&self, expected: &Hash) -> Result<(), MapError> {
        let mut hasher = Sha256::new();
        let mut buffer = vec![0; CHUNK as usize];
        for chunk in self.pages.iter().flat_map(chunks) {
            let bytes = part(&mut buffer, &chunk);
            self.file
                .read_exact_at(bytes, chunk.start)
                .map_err(MapError::Read)?;
            hasher.update(bytes);
        }
        if Hash::from(hasher.finalize()) == *expected {
            Ok(())
        } else {
            Err(MapError::Damaged)
        }
    }
}

/// The layers that a machine's memory is mapped from, lowest first.
#[derive(Debug, Default)]
pub struct Layers(Vec<Layer>);

impl Layers {
    /// Maps `memory`, which has not been used yet, from `layers`, lowest first. With `prefault`,
    /// all that they hold is read at once.
    ///
    /// # Errors
    /// The host refuses.
    pub fn map(memory: &GuestMemory, layers: Vec<Layer>, prefault: bool) -> Result<Self, MapError> {
        for layer in &layers {
            map(memory, layer)?;
        }
        if prefault {
            for layer in &layers {
                for piece in layer.pages.iter().flat_map(|run| pieces(memory, run)) {
                    if let Err(error) = advise(&piece, libc::MADV_POPULATE_READ) {
                        tracing::debug!(%error, "memory is not prefaulted");
                    }
                }
            }
        }
        Ok(Self(layers))
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether the memory is mapped from no file.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Writes to `file`, which is empty, all of `memory` that differs from the lowest `keep` layers.
    /// Nobody may write to the memory meanwhile. Nothing is durable yet.
    ///
    /// # Errors
    /// The file is of no use. The memory is as it was.
    pub fn save(
        &self,
        memory: &GuestMemory,
        pagemap: &Pagemap,
        keep: usize,
        file: &File,
    ) -> Result<Written, SaveError> {
        let union = |layers: &[Layer]| {
            layers
                .iter()
                .fold(Extents::default(), |all, layer| all.union(&layer.pages))
        };
        let (kept, others) = self.0.split_at(keep.min(self.0.len()));
        let (kept, others) = (union(kept), union(others));
        let candidates = own_pages(memory, pagemap)
            .map_err(SaveError::Pagemap)?
            .union(&others);

        let mut buffer = vec![0; CHUNK as usize];
        let mut read = |chunk: &Range<u64>, visit: VisitChunk<'_>| -> Result<(), SaveError> {
            for piece in pieces(memory, chunk.clone()) {
                let bytes = part(&mut buffer, &piece.offsets);
                memory
                    .read_slice(bytes, piece.guest)
                    .map_err(SaveError::Read)?;
                visit(piece.offsets.start, bytes).map_err(SaveError::Write)?;
            }
            Ok(())
        };

        let mut pages = Extents::default();
        for chunk in candidates.iter().flat_map(chunks) {
            read(&chunk, &mut |start, bytes| {
                for (offset, page) in (start..).step_by(PAGE_SIZE as usize).zip(pages_of(bytes)) {
                    if !is_zero(page) || kept.contains(offset) {
                        pages.append(offset..offset + PAGE_SIZE);
                    }
                }
                Ok(())
            })?;
        }
        let zero = candidates.without(&pages);
        let pages = join_runs(&pages, &kept);

        let size = pieces(memory, 0..u64::MAX).last();
        file.set_len(size.map_or(0, |piece| piece.offsets.end))
            .map_err(SaveError::Write)?;
        let mut hasher = Sha256::new();
        for chunk in pages.iter().flat_map(chunks) {
            read(&chunk, &mut |start, bytes| {
                hasher.update(&*bytes);
                write_sparsely(file, start, bytes)
            })?;
        }
        Ok(Written {
            zero: zero.without(&pages),
            pages,
            hash: hasher.finalize().into(),
        })
    }

    /// Maps `memory`, of which `written` was just written to `file`, from the lowest `keep` layers
    /// and this one. What the guest finds there stays the same.
    ///
    /// # Errors
    /// The host refuses a mapping. The layers are right nevertheless: what could not be mapped
    /// from the file has the same content, and just is not shared.
    pub fn rebase(
        &mut self,
        memory: &GuestMemory,
        keep: usize,
        file: File,
        written: &Written,
    ) -> Result<(), MapError> {
        let layer = Layer {
            file,
            pages: written.pages.clone(),
        };
        let mapped = map(memory, &layer);
        self.0.truncate(keep);
        self.0.push(layer);
        mapped?;
        written
            .zero
            .iter()
            .flat_map(|run| pieces(memory, run))
            .try_for_each(|piece| map_piece(&piece, None))
    }
}

/// Called with an offset and what is there.
type VisitChunk<'a> = &'a mut dyn FnMut(u64, &mut [u8]) -> io::Result<()>;

/// A part of guest memory that lies in one region.
pub(super) struct Piece {
    pub(super) offsets: Range<u64>,
    pub(super) guest: GuestAddress,
    pub(super) host: *mut u8,
}

impl Piece {
    /// Lossless: this VMM is built for 64-bit hosts only, and the piece is mapped.
    pub(super) fn len(&self) -> usize {
        (self.offsets.end - self.offsets.start) as usize
    }
}

/// The pieces of the memory at `offsets`.
pub(super) fn pieces(
    memory: &GuestMemory,
    offsets: Range<u64>,
) -> impl Iterator<Item = Piece> + '_ {
    let mut base = 0;
    memory.iter().filter_map(move |region| {
        let (start, end) = (base, base + region.len());
        base = end;
        let offsets = offsets.start.max(start)..offsets.end.min(end);
        (!offsets.is_empty()).then(|| {
            let within = offsets.start - start;
            Piece {
                guest: region.start_addr().unchecked_add(within),
                host: region.as_ptr().wrapping_add(within as usize),
                offsets,
            }
        })
    })
}

/// The size of all memory in bytes.
pub fn size_of(memory: &GuestMemory) -> u64 {
    memory.iter().map(GuestMemoryRegion::len).sum()
}

fn own_pages(memory: &GuestMemory, pagemap: &Pagemap) -> io::Result<Extents> {
    let mut all = Vec::new();
    for piece in pieces(memory, 0..u64::MAX) {
        let runs = pagemap.runs(piece.host as usize, piece.len() as u64, Pages::Own)?;
        let start = piece.offsets.start;
        all.extend(
            runs.into_iter()
                .map(|run| start + run.start..start + run.end),
        );
    }
    Ok(Extents::of(all))
}

/// Fills gaps between runs: small ones that hold zeros, and whatever else it takes for no more than
/// [`MAX_RUNS`] to be left.
fn join_runs(pages: &Extents, kept: &Extents) -> Extents {
    let all_gaps = pages.gaps_to_fill(1);
    let small = all_gaps
        .iter()
        .filter(|gap| gap.end - gap.start <= SMALL_GAP);
    let small = Extents::of(small.collect());
    let zero = small.iter().filter(|gap| {
        let gap = Extents::of(vec![gap.clone()]);
        gap.without(kept) == gap
    });
    let joined = pages.union(&Extents::of(zero.collect()));
    joined.union(&joined.gaps_to_fill(MAX_RUNS))
}

/// Writes the pages in `bytes` that are not zero.
fn write_sparsely(file: &File, start: u64, bytes: &[u8]) -> io::Result<()> {
    let mut at = 0;
    let is_zero_at = |at: usize| bytes.get(at..at + PAGE_SIZE as usize).is_none_or(is_zero);
    while at < bytes.len() {
        let first = at;
        while at < bytes.len() && !is_zero_at(at) {
            at += PAGE_SIZE as usize;
        }
        if at > first {
            file.write_all_at(&bytes[first..at], start + first as u64)?;
        } else {
            at += PAGE_SIZE as usize;
        }
    }
    Ok(())
}

fn pages_of(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    bytes.chunks_exact(PAGE_SIZE as usize)
}

/// A run in parts that fit into the buffer.
fn chunks(run: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let end = run.end;
    run.step_by(CHUNK as usize)
        .map(move |start| start..end.min(start + CHUNK))
}

/// As much of the buffer as `chunk` takes.
fn part<'b>(buffer: &'b mut [u8], chunk: &Range<u64>) -> &'b mut [u8] {
    let len = (chunk.end - chunk.start).min(buffer.len() as u64);
    &mut buffer[..len as usize]
}

fn map(memory: &GuestMemory, layer: &Layer) -> Result<(), MapError> {
    for piece in layer.pages.iter().flat_map(|run| pieces(memory, run)) {
        map_piece(&piece, Some(&layer.file))?;
    }
    Ok(())
}

/// Maps a piece of guest memory anew: from its place in a file, or zero.
fn map_piece(piece: &Piece, file: Option<&File>) -> Result<(), MapError> {
    let anonymous = if file.is_none() {
        libc::MAP_ANONYMOUS
    } else {
        0
    };
    // SAFETY: the piece lies within one region of guest memory, which is a mapping of its own, and
    // whose content is nobody's but the guest's; nobody accesses it at the moment. The file is open,
    // and a file that is cut short later ends this process at worst, by SIGBUS.
    let mapped = unsafe {
        libc::mmap(
            piece.host.cast(),
            piece.len(),
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE | anonymous,
            file.map_or(-1, AsRawFd::as_raw_fd),
            file.map_or(0, |_| piece.offsets.start.cast_signed()),
        )
    };
    if mapped == libc::MAP_FAILED {
        return Err(MapError::Map(io::Error::last_os_error()));
    }
    Ok(())
}

/// Maps the pages of a piece: with `MADV_POPULATE_READ` those of its file, with `MADV_POPULATE_WRITE`
/// copies of the machine's own.
pub(super) fn advise(piece: &Piece, advice: libc::c_int) -> io::Result<()> {
    // SAFETY: the range is mapped, and neither advice changes content.
    let result = unsafe { libc::madvise(piece.host.cast(), piece.len(), advice) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests;
