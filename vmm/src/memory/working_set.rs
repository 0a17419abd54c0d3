//! The working set of a machine: the pages that it touches first when it goes on from a snapshot.
//!
//! A page that is mapped from a file costs a restored machine a fault when it is touched, in the
//! midst of what it is at, and another one if it is written. All machines that go on from one snapshot
//! begin with nearly the same pages, so one of them tells which those are, and the others have them
//! mapped beforehand, many with one call: those that are only read from the file, shared with
//! everybody, and those that are written as copies of their own.
//!
//! KVM's own page table is filled from that of the VMM: beforehand too where KVM can do that (see
//! [`prefault`](crate::kvm::prefault)), and page by page otherwise, as the guest comes to them.

use std::io;
use std::ops::Range;

use serde::{Deserialize, Serialize};
use vm_memory::{Address, GuestAddress};

use super::GuestMemory;
use super::extents::Extents;
use super::layers::{advise, pieces, size_of};
use super::pagemap::{Pagemap, Pages};

/// The most bytes of a working set: more than a machine touches until its first command has ended.
/// What is beyond comes when it is touched.
const MAX_BYTES: u64 = 64 << 20;

/// The most runs of pages that are read, and that are written: each is a system call.
const MAX_RUNS: usize = 4096;

/// Why a working set is of no use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WorkingSetError {
    /// It has pages that the machine has not.
    #[error("it has pages up to {end:#x}, and the guest's memory ends at {guest:#x}")]
    Outside {
        /// End of its last page.
        end: u64,
        /// Size of the guest's memory.
        guest: u64,
    },
    /// It is too large.
    #[error("it has {bytes} bytes in {runs} runs, more than {MAX_BYTES} in twice {MAX_RUNS}")]
    TooLarge {
        /// Its size.
        bytes: u64,
        /// In how many pieces.
        runs: usize,
    },
}

/// Pages that a machine touches first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WorkingSet {
    /// Those that it reads.
    read: Extents,
    /// Those that it writes.
    written: Extents,
}

impl WorkingSet {
    /// What a machine has touched since it was restored, as its page table tells.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub fn of(memory: &GuestMemory, pagemap: &Pagemap) -> io::Result<Self> {
        let runs = |pages| -> io::Result<Extents> {
            let mut all = Extents::default();
            for piece in pieces(memory, 0..u64::MAX) {
                let start = piece.offsets.start;
                for run in pagemap.runs(piece.host as usize, piece.len() as u64, pages)? {
                    all.append(start + run.start..start + run.end);
                }
            }
            Ok(all)
        };
        let written = first(&runs(Pages::Own)?, MAX_BYTES);
        let left = MAX_BYTES.saturating_sub(written.bytes());
        Ok(Self {
            read: first(&runs(Pages::OfFile)?, left),
            written,
        })
    }

    /// Checks one that comes from a file.
    ///
    /// # Errors
    /// It is not one of a machine with this memory.
    pub fn check(&self, memory: &GuestMemory) -> Result<(), WorkingSetError> {
        let (end, guest) = (self.read.end().max(self.written.end()), size_of(memory));
        if end > guest {
            return Err(WorkingSetError::Outside { end, guest });
        }
        let (read, written) = (self.read.iter().len(), self.written.iter().len());
        let bytes = self.read.bytes().saturating_add(self.written.bytes());
        if bytes > MAX_BYTES || read.max(written) > MAX_RUNS {
            let runs = read + written;
            return Err(WorkingSetError::TooLarge { bytes, runs });
        }
        Ok(())
    }

    /// Where the guest has these pages.
    pub fn guest_runs(&self, memory: &GuestMemory) -> Vec<Range<GuestAddress>> {
        let all = self.read.iter().chain(self.written.iter());
        Extents::of(all.collect())
            .iter()
            .flat_map(|run| pieces(memory, run))
            .map(|piece| piece.guest..piece.guest.unchecked_add(piece.len() as u64))
            .collect()
    }

    /// Has these pages of `memory` mapped. The content of none changes. It is an advice: a kernel before
    /// 5.14 does not take it.
    pub fn prefetch(&self, memory: &GuestMemory) {
        for (pages, advice) in [
            (&self.written, libc::MADV_POPULATE_WRITE),
            (&self.read, libc::MADV_POPULATE_READ),
        ] {
            for piece in pages.iter().flat_map(|run| pieces(memory, run)) {
                if let Err(error) = advise(&piece, advice) {
                    tracing::debug!(%error, "the working set is not prefetched");
                    return;
                }
            }
        }
        tracing::info!(
            read = self.read.bytes(),
            written = self.written.bytes(),
            "prefetched the working set"
        );
    }
}

/// The first pages of a set, so many bytes, in no more runs than are allowed.
fn first(pages: &Extents, bytes: u64) -> Extents {
    let mut left = bytes;
    let mut kept = Extents::default();
    for run in pages.iter().take(MAX_RUNS) {
        let end = run.end.min(run.start.saturating_add(left));
        left = left.saturating_sub(end - run.start);
        kept.append(run.start..end);
    }
    kept
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use proptest::prelude::*;
    use vm_memory::Bytes;

    use super::super::layers::{Layer, Layers};
    use super::super::{PAGE_SIZE, allocate};
    use super::*;

    fn page(index: u64) -> GuestAddress {
        GuestAddress(index * PAGE_SIZE)
    }

    fn run(pages: Range<u64>) -> Range<u64> {
        pages.start * PAGE_SIZE..pages.end * PAGE_SIZE
    }

    /// A file of 512 pages, each of which begins with its number.
    fn saved() -> File {
        let file = tempfile::tempfile().unwrap();
        for index in 0..512_u64 {
            let mut content = vec![0; PAGE_SIZE as usize];
            content[..8].copy_from_slice(&index.to_le_bytes());
            file.write_all_at(&content, index * PAGE_SIZE).unwrap();
        }
        file
    }

    /// A machine whose memory is mapped from it.
    fn restored(file: &File) -> GuestMemory {
        let memory = allocate(512 * PAGE_SIZE, false).unwrap();
        let pages = Extents::of(vec![run(0..512)]);
        let layer = Layer::new(file.try_clone().unwrap(), pages, 512 * PAGE_SIZE).unwrap();
        Layers::map(&memory, vec![layer], false).unwrap();
        memory
    }

    #[test]
    fn what_one_machine_touched_the_next_has_before() {
        let pagemap = Pagemap::open().unwrap();
        let file = saved();
        let first = restored(&file);
        let none = WorkingSet::of(&first, &pagemap).unwrap();
        assert_eq!((none.read.bytes(), none.written.bytes()), (0, 0));
        assert_eq!(first.read_obj::<u64>(page(300)).unwrap(), 300);
        first.write_obj(7_u64, page(5)).unwrap();
        first.write_obj(7_u64, page(6)).unwrap();
        let set = WorkingSet::of(&first, &pagemap).unwrap();
        assert_eq!(set.written, Extents::of(vec![run(5..7)]));
        // What is around it, the kernel may have mapped with it.
        assert!(set.read.contains(page(300).0) && !set.read.contains(page(5).0));
        let text = serde_json::to_string(&set).unwrap();
        assert_eq!(serde_json::from_str::<WorkingSet>(&text).unwrap(), set);

        let next = restored(&file);
        set.check(&next).unwrap();
        set.prefetch(&next);
        let mapped = WorkingSet::of(&next, &pagemap).unwrap();
        assert_eq!(mapped.written, set.written);
        assert_eq!(set.read.without(&mapped.read), Extents::default());
        for index in [5, 6, 7, 300, 511] {
            assert_eq!(next.read_obj::<u64>(page(index)).unwrap(), index);
        }
    }

    #[test]
    fn the_guest_has_runs_where_its_memory_is() {
        let at = |read, written| {
            let set = WorkingSet {
                read: Extents::of(read),
                written: Extents::of(written),
            };
            // The part above 4 GiB comes after the hole that devices have below it.
            let gib = 1_u64 << 30;
            let regions = [(GuestAddress(0), 3 << 30), (GuestAddress(4 * gib), 1 << 30)];
            let memory = GuestMemory::from_ranges(&regions).unwrap();
            let runs = set.guest_runs(&memory);
            runs.into_iter()
                .map(|run| (run.start.0 / PAGE_SIZE, run.end.0 / PAGE_SIZE))
                .collect::<Vec<_>>()
        };
        let (hole, high) = ((3 << 30) / PAGE_SIZE, (4_u64 << 30) / PAGE_SIZE);
        assert_eq!(at(vec![], vec![]), []);
        // What is read and written side by side is one run.
        assert_eq!(at(vec![run(1..3), run(5..7)], vec![run(3..5)]), [(1, 7)]);
        // One across the hole is two.
        let across = at(vec![run(hole - 2..hole + 3)], vec![]);
        assert_eq!(across, [(hole - 2, hole), (high, high + 3)]);
    }

    #[test]
    fn what_is_too_large_or_elsewhere_is_refused() {
        let memory = allocate(512 * PAGE_SIZE, false).unwrap();
        let set = |read, written| WorkingSet {
            read: Extents::of(vec![read]),
            written: Extents::of(vec![written]),
        };
        assert_eq!(set(run(0..3), run(511..512)).check(&memory), Ok(()));
        for outside in [set(run(0..3), run(511..513)), set(run(600..601), run(0..0))] {
            let refused = outside.check(&memory);
            assert!(matches!(refused, Err(WorkingSetError::Outside { .. })));
        }
        let large = allocate(128 << 20, false).unwrap();
        let refused = set(0..65 << 20, 0..0).check(&large);
        assert!(matches!(refused, Err(WorkingSetError::TooLarge { .. })));
        let scattered = (0..=MAX_RUNS as u64).map(|index| run(2 * index..2 * index + 1));
        let scattered = WorkingSet {
            read: Extents::of(scattered.collect()),
            written: Extents::default(),
        };
        let refused = scattered.check(&large);
        assert!(matches!(refused, Err(WorkingSetError::TooLarge { .. })));
        // What is recorded is never too large.
        let kept = first(&scattered.read, 3 * PAGE_SIZE);
        assert_eq!(kept.bytes(), 3 * PAGE_SIZE);
        assert_eq!(first(&scattered.read, u64::MAX).iter().len(), MAX_RUNS);
    }

    thread_local! {
        static SAVED: File = saved();
    }

    proptest! {
        #[test]
        fn whatever_is_accepted_changes_no_content(
            read in prop::collection::vec((0_u64..600, 1_u64..40), 0..6),
            written in prop::collection::vec((0_u64..600, 1_u64..40), 0..6),
        ) {
            let extents = |runs: Vec<(u64, u64)>| {
                Extents::of(runs.into_iter().map(|(start, len)| run(start..start + len)).collect())
            };
            let set = WorkingSet { read: extents(read), written: extents(written) };
            let memory = SAVED.with(restored);
            if set.check(&memory).is_ok() {
                set.prefetch(&memory);
            }
            for index in 0..512 {
                prop_assert_eq!(memory.read_obj::<u64>(page(index)).unwrap(), index);
            }
        }
    }
}
