//! Parts of files.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::stream::{self, BoxStream, StreamExt};

/// How much is read at a time, in bytes.
const CHUNK: u64 = 256 * 1024;

/// A part of a file, to be read from its start to its end. Several of one file do not disturb each
/// other.
#[derive(Debug, Clone)]
pub struct Section {
    file: Arc<File>,
    position: u64,
    left: u64,
}

impl Section {
    /// The `size` bytes of `file` from `position` on.
    pub fn new(file: &Arc<File>, position: u64, size: u64) -> Self {
        Self {
            file: Arc::clone(file),
            position,
            left: size,
        }
    }

    /// All of a file, as long as it is now.
    ///
    /// # Errors
    /// Its length is not known.
    pub fn whole(file: &Arc<File>) -> io::Result<Self> {
        let size = file.metadata()?.len();
        Ok(Self::new(file, 0, size))
    }

    /// How many bytes are left, unless the file was cut short.
    pub fn left(&self) -> u64 {
        self.left
    }

    /// All that is left, if it is no more than `most` bytes.
    ///
    /// # Errors
    /// It is more, or cannot be read.
    pub fn read_small(mut self, most: u64) -> io::Result<Vec<u8>> {
        if self.left > most {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        let mut bytes = Vec::new();
        self.read_to_end(&mut bytes)?;
        Ok(bytes)
    }
}

/// The bytes of a section, as a stream.
pub fn chunks(section: Section) -> BoxStream<'static, io::Result<Bytes>> {
    stream::unfold(Some(section), async |section| {
        let mut section = section?;
        let read = tokio::task::spawn_blocking(move || {
            let mut chunk = Vec::new();
            let read = section.by_ref().take(CHUNK).read_to_end(&mut chunk);
            (read.map(|_| Bytes::from(chunk)), section)
        });
        match read.await {
            Ok((Ok(chunk), _)) if chunk.is_empty() => None,
            Ok((Ok(chunk), section)) => Some((Ok(chunk), Some(section))),
            Ok((Err(error), _)) => Some((Err(error), None)),
            Err(error) => Some((Err(io::Error::other(error)), None)),
        }
    })
    .boxed()
}

impl Read for Section {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.left).unwrap_or(usize::MAX);
        let most = most.min(buffer.len());
        if most == 0 {
            return Ok(0);
        }
        let count = self.file.read_at(&mut buffer[..most], self.position)?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.position += count as u64;
        self.left -= count as u64;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn sections_are_read_apart_and_to_their_ends() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"0123456789").unwrap();
        let file = Arc::new(file);
        let (mut one, other) = (Section::new(&file, 2, 3), Section::whole(&file).unwrap());
        let mut two = [0; 2];
        one.read_exact(&mut two).unwrap();
        assert_eq!(other.read_small(10).unwrap(), b"0123456789");
        assert_eq!((&two, one.left()), (b"23", 1));
        assert_eq!(one.read_small(10).unwrap(), b"4");
        let long = Section::new(&file, 5, 6);
        let error = long.clone().read_small(5).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::FileTooLarge);
        let error = long.read_small(6).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
