//! Bytes of any number in little memory.
//!
//! A [`Spool`] keeps the first bytes in memory and moves to a file without a name when they get
//! more. The file is gone as soon as the spool is, also when the daemon crashes.

use std::collections::HashMap;
use std::io::{self, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::{Bytes, BytesMut};
use tokio::fs::File;
use tokio::io::{AsyncReadExt, AsyncSeekExt, AsyncWriteExt};

use super::id::UserId;

/// Where the files of spools are, and how much they may take.
#[derive(Debug)]
pub struct SpoolSpace {
    dir: PathBuf,
    /// How much those of one owner may take together, in bytes.
    most: u64,
    taken: Mutex<HashMap<Option<UserId>, u64>>,
}

impl SpoolSpace {
    /// In this directory, with so many bytes for each owner.
    pub fn new(dir: PathBuf, most: u64) -> Arc<Self> {
        let taken = Mutex::default();
        Arc::new(Self { dir, most, taken })
    }

    /// An empty spool of this owner, that holds up to `threshold` bytes in memory and more in a file.
    pub fn spool(self: &Arc<Self>, owner: Option<&UserId>, threshold: usize) -> Spool {
        Spool {
            taken: Taken {
                space: Arc::clone(self),
                owner: owner.cloned(),
                bytes: 0,
            },
            threshold,
            memory: BytesMut::new(),
            file: None,
            len: 0,
            utf8: Utf8Check::default(),
        }
    }

    /// Where the files are.
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

/// What the file of one spool takes, until this is dropped.
#[derive(Debug)]
struct Taken {
    space: Arc<SpoolSpace>,
    owner: Option<UserId>,
    bytes: u64,
}

impl Taken {
    /// Takes more, if as much is left.
    fn take(&mut self, bytes: u64) -> io::Result<()> {
        let mut all = self.lock();
        let taken = all.get(&self.owner).copied().unwrap_or(0);
        match taken.checked_add(bytes) {
            Some(sum) if sum <= self.space.most => {
                all.insert(self.owner.clone(), sum);
                drop(all);
                self.bytes += bytes;
                Ok(())
            }
            _ => Err(io::Error::new(
                io::ErrorKind::QuotaExceeded,
                "what waits on the daemon's disk for its owner is too much; wait until other uploads and \
                 answers are done",
            )),
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Option<UserId>, u64>> {
        let taken = self.space.taken.lock();
        taken.unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        let mut all = self.lock();
        let left = all.get(&self.owner).map_or(0, |taken| taken - self.bytes);
        match left {
            0 => all.remove(&self.owner),
            left => all.insert(self.owner.clone(), left),
        };
    }
}

/// Bytes that are being collected.
#[derive(Debug)]
pub struct Spool {
    taken: Taken,
    threshold: usize,
    memory: BytesMut,
    file: Option<File>,
    len: u64,
    utf8: Utf8Check,
}

impl Spool {
    /// Appends bytes.
    ///
    /// # Errors
    /// The file cannot be made or written, such as on a full disk; [`io::ErrorKind::QuotaExceeded`] if its
    /// owner has too much in such files.
    pub async fn push(&mut self, bytes: &[u8]) -> io::Result<()> {
        let is_little = self.file.is_none() && self.memory.len() + bytes.len() <= self.threshold;
        if !is_little {
            self.taken.take((self.memory.len() + bytes.len()) as u64)?;
        }
        self.utf8.push(bytes);
        self.len += bytes.len() as u64;
        if is_little {
            self.memory.extend_from_slice(bytes);
            return Ok(());
        }
        let file = match &mut self.file {
            Some(file) => file,
            none => {
                let dir = self.taken.space.dir.clone();
                let file =
                    tokio::task::spawn_blocking(move || tempfile::tempfile_in(dir)).await??;
                let mut file = File::from_std(file);
                file.write_all(&self.memory).await?;
                self.memory = BytesMut::new();
                none.insert(file)
            }
        };
        file.write_all(bytes).await
    }

    /// Ends the collection.
    ///
    /// # Errors
    /// The file cannot be written or read.
    pub async fn finish(mut self) -> io::Result<Spooled> {
        if let Some(file) = &mut self.file {
            file.flush().await?;
            file.seek(SeekFrom::Start(0)).await?;
        }
        Ok(Spooled {
            memory: self.memory.freeze(),
            file: self.file,
            _taken: self.taken,
            len: self.len,
            is_utf8: self.utf8.finish(),
        })
    }

    /// Bytes so far.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there are no bytes so far.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// Bytes that were collected, to be read once from their start.
#[derive(Debug)]
pub struct Spooled {
    memory: Bytes,
    file: Option<File>,
    _taken: Taken,
    len: u64,
    is_utf8: bool,
}

impl Spooled {
    /// Number of bytes in all.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether they are UTF-8 text.
    pub fn is_utf8(&self) -> bool {
        self.is_utf8
    }

    /// The next bytes, at most `max`; `None` at the end.
    ///
    /// # Errors
    /// The file cannot be read.
    pub async fn next_chunk(&mut self, max: usize) -> io::Result<Option<Bytes>> {
        if let Some(file) = &mut self.file {
            let mut chunk = BytesMut::with_capacity(max);
            while chunk.len() < max {
                let limit = (max - chunk.len()) as u64;
                if (&mut *file).take(limit).read_buf(&mut chunk).await? == 0 {
                    break;
                }
            }
            return Ok((!chunk.is_empty()).then(|| chunk.freeze()));
        }
        let chunk = self.memory.split_to(max.min(self.memory.len()));
        Ok((!chunk.is_empty()).then_some(chunk))
    }
}

/// Tells whether bytes that come in pieces are UTF-8.
#[derive(Debug, Default)]
struct Utf8Check {
    /// The start of a character whose other bytes are still to come.
    partial: Vec<u8>,
    failed: bool,
}

impl Utf8Check {
    fn push(&mut self, mut bytes: &[u8]) {
        // A character has at most four bytes, so this loop runs three times at most.
        while !self.failed && !self.partial.is_empty() {
            let Some((&byte, rest)) = bytes.split_first() else {
                return;
            };
            self.partial.push(byte);
            bytes = rest;
            match std::str::from_utf8(&self.partial) {
                Ok(_) => self.partial.clear(),
                Err(error) => self.failed = error.error_len().is_some(),
            }
        }
        if self.failed {
            return;
        }
        if let Err(error) = std::str::from_utf8(bytes) {
            match error.error_len() {
                Some(_) => self.failed = true,
                None => self
                    .partial
                    .extend_from_slice(&bytes[error.valid_up_to()..]),
            }
        }
    }

    fn finish(&self) -> bool {
        !self.failed && self.partial.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    async fn drain(mut spooled: Spooled, max: usize) -> Vec<u8> {
        let mut all = Vec::new();
        while let Some(chunk) = spooled.next_chunk(max).await.unwrap() {
            assert!(chunk.len() <= max);
            all.extend_from_slice(&chunk);
        }
        all
    }

    #[tokio::test]
    async fn little_stays_in_memory_and_much_goes_to_a_nameless_file() {
        let dir = tempfile::tempdir().unwrap();
        let space = SpoolSpace::new(dir.path().to_owned(), 1000);
        let mut spool = space.spool(None, 10);
        spool.push(b"0123456789").await.unwrap();
        assert!(spool.file.is_none());
        spool.push(b"a").await.unwrap();
        assert!(spool.file.is_some() && spool.memory.is_empty());
        assert_eq!(spool.len(), 11);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        let spooled = spool.finish().await.unwrap();
        assert_eq!(spooled.len(), 11);
        assert_eq!(drain(spooled, 4).await, b"0123456789a");
    }

    #[tokio::test]
    async fn files_of_one_owner_take_so_much_together_and_give_it_back() {
        let dir = tempfile::tempdir().unwrap();
        let space = SpoolSpace::new(dir.path().to_owned(), 10);
        let user = UserId::random();
        let taken = |owner: Option<&UserId>| {
            let all = space.taken.lock().unwrap();
            all.get(&owner.cloned()).copied()
        };
        let mut first = space.spool(Some(&user), 4);
        first.push(b"1234").await.unwrap();
        assert_eq!(taken(Some(&user)), None, "memory is none of it");
        first.push(b"567").await.unwrap();
        let mut second = space.spool(Some(&user), 0);
        second.push(b"123").await.unwrap();
        assert_eq!(taken(Some(&user)), Some(10));
        let full = second.push(b"4").await.unwrap_err();
        assert_eq!(full.kind(), io::ErrorKind::QuotaExceeded);
        // Another owner has their own, and what is read has not gone yet.
        let mut other = space.spool(None, 0);
        other.push(b"1234567890").await.unwrap();
        let first = first.finish().await.unwrap();
        assert_eq!(taken(Some(&user)), Some(10));
        drop(first);
        assert_eq!(taken(Some(&user)), Some(3));
        second.push(b"4567890").await.unwrap();
        drop((second, other));
        assert!(space.taken.lock().unwrap().is_empty());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn what_goes_in_comes_out(
            pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..12),
            threshold in 0..100usize,
            max in 1..50usize,
        ) {
            let all = pieces.concat();
            let dir = tempfile::tempdir().unwrap();
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            runtime.block_on(async {
                let space = SpoolSpace::new(dir.path().to_owned(), u64::MAX);
                let mut spool = space.spool(None, threshold);
                for piece in &pieces {
                    spool.push(piece).await.unwrap();
                }
                let spooled = spool.finish().await.unwrap();
                assert_eq!(spooled.is_utf8(), std::str::from_utf8(&all).is_ok());
                assert_eq!(drain(spooled, max).await, all);
            });
        }

        #[test]
        fn text_is_text_however_it_is_cut(text in "\\PC{0,40}", cut in 1..5usize) {
            let mut check = Utf8Check::default();
            for piece in text.as_bytes().chunks(cut) {
                check.push(piece);
            }
            prop_assert!(check.finish());
            check.push(b"\xc3");
            prop_assert!(!check.finish());
            check.push(b"(");
            prop_assert!(!check.finish());
        }
    }
}
