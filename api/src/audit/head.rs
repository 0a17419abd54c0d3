//! How far the log went: number and hash of its last record, in a file beside it.
//!
//! The chain alone does not show that records are missing at its end. The file is written after the
//! records are on the disk, so that it never tells of one that a crash took; after a loss of power it may
//! tell of an earlier one.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::chain::START;
use crate::hex;

/// Length of what the file has: the number with 20 digits, a space, the hash with 64, and the line's end.
const LENGTH: usize = 20 + 1 + 64 + 1;

/// Where a chain stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    /// Number of the last record; 0 if there is none.
    pub seq: u64,
    /// Its hash.
    pub hash: [u8; 32],
}

/// What the file says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Told {
    /// There is no such file.
    Nothing,
    /// What no daemon has written.
    Garbage,
    /// This.
    Head(Head),
}

/// The file, open to be written.
#[derive(Debug)]
pub struct HeadFile(File);

impl Head {
    /// Where a chain begins.
    pub const fn start() -> Self {
        Self {
            seq: 0,
            hash: START,
        }
    }

    fn line(&self) -> String {
        format!("{:020} {}\n", self.seq, hex(&self.hash))
    }

    fn parse(line: &str) -> Option<Self> {
        let (seq, digits) = line.strip_suffix('\n')?.split_once(' ')?;
        let mut head = Self::start();
        head.seq = seq.parse().ok()?;
        for (byte, pair) in head.hash.iter_mut().zip(digits.as_bytes().chunks(2)) {
            *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
        }
        // What is written back is the same, so all of it was read.
        (head.line() == line).then_some(head)
    }
}

/// Where the file of this log is.
pub fn path_of(log: &Path) -> PathBuf {
    log.with_extension("head")
}

/// What the file of this log says.
///
/// # Errors
/// It is there and cannot be read.
pub fn read(log: &Path) -> io::Result<Told> {
    let file = match File::open(path_of(log)) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Told::Nothing),
        file => file?,
    };
    let mut text = Vec::with_capacity(LENGTH + 1);
    file.take(LENGTH as u64 + 1).read_to_end(&mut text)?;
    let head = std::str::from_utf8(&text).ok().and_then(Head::parse);
    Ok(head.map_or(Told::Garbage, Told::Head))
}

impl HeadFile {
    /// The file of this log, which is made if it is not there, and says this now.
    ///
    /// # Errors
    /// It cannot be made or written.
    pub fn create(log: &Path, head: Head) -> io::Result<Self> {
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path_of(log))?;
        file.set_len(LENGTH as u64)?;
        let file = Self(file);
        file.write(head)?;
        // From here on the file keeps its length, and each write is within one block of it.
        file.0.sync_all()?;
        Ok(file)
    }

    /// Writes down where the log is.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write(&self, head: Head) -> io::Result<()> {
        self.0.write_all_at(head.line().as_bytes(), 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("audit.db");
        assert_eq!(read(&log).unwrap(), Told::Nothing);
        let file = HeadFile::create(&log, Head::start()).unwrap();
        assert_eq!(read(&log).unwrap(), Told::Head(Head::start()));
        let head = Head {
            seq: u64::MAX,
            hash: std::array::from_fn(|at| u8::try_from(at * 8).unwrap()),
        };
        file.write(head).unwrap();
        assert_eq!(read(&log).unwrap(), Told::Head(head));
        let line = head.line();
        assert_eq!(line.len(), LENGTH);
        for garbage in [
            String::new(),
            line[..LENGTH - 1].to_owned(),
            format!("{line}\n"),
            line.replacen('1', "+", 1),
            line.to_uppercase(),
            "x".repeat(LENGTH),
        ] {
            std::fs::write(path_of(&log), &garbage).unwrap();
            assert_eq!(read(&log).unwrap(), Told::Garbage, "{garbage:?}");
        }
    }
}
