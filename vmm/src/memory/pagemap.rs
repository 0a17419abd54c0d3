//! Which pages of a private mapping hold content of their own, and no longer that of the file
//! they were mapped from (Documentation/admin-guide/mm/pagemap.rst of Linux).
//!
//! The kernel keeps this anyway, so that telling what a guest has changed costs it nothing while it
//! runs: no dirty log, no write protection, and what devices and KVM itself write is in it too.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use rustix::fs::{CWD, Mode, OFlags, openat};

use super::PAGE_SIZE;

/// The page is in memory.
const PRESENT: u64 = 1 << 63;
/// The page is in swap.
const SWAPPED: u64 = 1 << 62;
/// The page belongs to a file: the mapping has not changed it.
const OF_FILE: u64 = 1 << 61;

/// Pages of a mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pages {
    /// With content of their own.
    Own,
    /// In memory, with the content of the file that they are mapped from.
    OfFile,
}

impl Pages {
    /// Whether the page of this entry is one of them.
    fn has(self, entry: u64) -> bool {
        let is_of_file = entry & OF_FILE != 0;
        match self {
            Self::Own => entry & (PRESENT | SWAPPED) != 0 && !is_of_file,
            Self::OfFile => entry & PRESENT != 0 && is_of_file,
        }
    }
}

/// Bytes of an entry.
const ENTRY: usize = 8;
/// Entries that are read at a time.
const BATCH: usize = 4096;

/// The page table of this process, as far as the kernel shows it.
#[derive(Debug)]
pub struct Pagemap(File);

impl Pagemap {
    /// The page table of the calling process. A fork has another one.
    ///
    /// # Errors
    /// `/proc` is not there, or the kernel was built without `CONFIG_PROC_PAGE_MONITOR`.
    pub fn open() -> io::Result<Self> {
        let proc = openat(
            CWD,
            "/proc",
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        Self::open_in(&proc)
    }

    /// The same, where `proc` is the directory `/proc`, which need not be in reach by its name.
    ///
    /// # Errors
    /// As for [`open`](Self::open).
    pub fn open_in(proc: &OwnedFd) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let file = openat(proc, "self/pagemap", flags, Mode::empty())?;
        Ok(Self(file.into()))
    }

    /// The runs of such pages in `len` bytes from `address` on, as offsets from there in bytes. Both
    /// are multiples of the size of a page.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub fn runs(&self, address: usize, len: u64, pages: Pages) -> io::Result<Vec<Range<u64>>> {
        let first = address as u64 / PAGE_SIZE;
        let count = len / PAGE_SIZE;
        let mut runs: Vec<Range<u64>> = Vec::new();
        let mut buffer = vec![0; BATCH * ENTRY];
        let mut page = 0;
        while page < count {
            let batch = (count - page).min(BATCH as u64);
            // Lossless: at most a batch.
            let bytes = &mut buffer[..batch as usize * ENTRY];
            self.0.read_exact_at(bytes, (first + page) * ENTRY as u64)?;
            for entry in bytes.chunks_exact(ENTRY) {
                let entry = entry.try_into().map_or(0, u64::from_ne_bytes);
                if pages.has(entry) {
                    let start = page * PAGE_SIZE;
                    match runs.last_mut() {
                        Some(run) if run.end == start => run.end += PAGE_SIZE,
                        _ => runs.push(start..start + PAGE_SIZE),
                    }
                }
                page += 1;
            }
        }
        Ok(runs)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsRawFd;
    use std::ptr;

    use super::*;

    #[test]
    fn only_pages_that_were_written_are_own_pages() {
        let mut file = tempfile::tempfile().unwrap();
        let pages = 2 * BATCH as u64 + 3;
        let size = (pages * PAGE_SIZE) as usize;
        file.write_all(&[7; 3 * PAGE_SIZE as usize]).unwrap();
        file.set_len(size as u64).unwrap();
        // SAFETY: a new private mapping at an address of the kernel's choice.
        let base = unsafe {
            libc::mmap(
                ptr::null_mut(),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE,
                file.as_raw_fd(),
                0,
            )
        };
        assert_ne!(base, libc::MAP_FAILED);
        let byte = |page: u64| base.cast::<u8>().wrapping_add((page * PAGE_SIZE) as usize);
        let last = pages - 1;
        // SAFETY: all addresses lie in the mapping, which nobody else uses.
        unsafe {
            assert_eq!(byte(0).read_volatile(), 7);
            assert_eq!(byte(BATCH as u64).read_volatile(), 0);
            byte(1).write_volatile(1);
            byte(2).write_volatile(1);
            byte(BATCH as u64 - 1).write_volatile(1);
            byte(BATCH as u64).write_volatile(1);
            byte(last).write_volatile(1);
        }
        let pagemap = Pagemap::open().unwrap();
        let runs = |pages| pagemap.runs(base as usize, size as u64, pages).unwrap();
        let read = runs(Pages::OfFile);
        assert!(read.iter().any(|run| run.contains(&0)), "{read:?}");
        let runs = runs(Pages::Own);
        let run = |from: u64, to: u64| from * PAGE_SIZE..to * PAGE_SIZE;
        let batch = BATCH as u64;
        let expected = [run(1, 3), run(batch - 1, batch + 1), run(last, last + 1)];
        assert_eq!(runs, expected);
        // SAFETY: the mapping is this test's own.
        unsafe { libc::munmap(base, size) };
    }
}
