//! Tar files from strangers.
//!
//! Nothing is unpacked here: what an archive holds is looked at, bounds first, and passed on as
//! bytes. Headers that describe the next entry are read here, for the library would take as much
//! memory for them as they ask for.

mod files;
mod section;

use std::io::{self, Read};

use tar::EntryType;

pub use files::{ArchivedFile, files};
pub use section::Section;

/// The longest path or link target, in bytes: `PATH_MAX` of Linux, with its final zero byte.
const MAX_PATH: usize = 4095;
/// The longest part of a path, in bytes: `NAME_MAX` of Linux.
const MAX_NAME: usize = 255;
/// The longest header that describes the next entry, in bytes. Extended attributes are in there.
const MAX_EXTENSION: u64 = 1 << 20;
/// The most entries of one archive.
const MAX_ENTRIES: u64 = 1_000_000;

/// Why an archive is refused.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// It cannot be read, or is no tar file.
    #[error("it is damaged, or no tar file")]
    Read(#[from] io::Error),
    /// It has too many entries.
    #[error("it has more than {MAX_ENTRIES} entries")]
    TooManyEntries,
    /// A header that describes the next entry is too long, makes no sense, or describes none.
    #[error(
        "a header that describes the next entry is longer than {MAX_EXTENSION} bytes, or makes no sense"
    )]
    Extension,
    /// A path cannot be.
    #[error("the path {path:?} {problem}")]
    Path {
        /// The path.
        path: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// An entry is of a kind that is not taken.
    #[error("{path:?} is {kind}, which is not taken")]
    Kind {
        /// Its path.
        path: String,
        /// What it is.
        kind: &'static str,
    },
}

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// Another name of an entry before it.
    HardLink,
    /// A device or a named pipe.
    Special,
}

/// One entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its path, without slashes at either end, `.`, `..` and empty parts; empty for the root.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: Kind,
    /// Where a link leads, as it is written.
    pub target: Vec<u8>,
    /// Its permission bits; 0644 if they are not told.
    pub mode: u32,
    /// Where its content is in the archive, in bytes from the start.
    pub position: u64,
    /// The size of its content, in bytes.
    pub size: u64,
}

/// Shows every entry of an archive.
///
/// # Errors
/// The archive is refused, or `each` has failed.
pub fn walk<E: From<ArchiveError>>(
    reader: impl Read,
    mut each: impl FnMut(Entry) -> Result<(), E>,
) -> Result<(), E> {
    let mut archive = tar::Archive::new(reader);
    let entries = archive.entries().map_err(ArchiveError::Read)?.raw(true);
    let mut next = Described::default();
    let mut count = 0;
    for entry in entries {
        let mut entry = entry.map_err(ArchiveError::Read)?;
        count += 1;
        if count > MAX_ENTRIES {
            return Err(ArchiveError::TooManyEntries.into());
        }
        let size = entry.size();
        let kind = match entry.header().entry_type() {
            EntryType::XGlobalHeader => {
                // About all entries; a comment, in practice. Read by whoever unpacks.
                extension(&mut entry, size)?;
                continue;
            }
            EntryType::XHeader => {
                next.take_pax(&extension(&mut entry, size)?)?;
                continue;
            }
            EntryType::GNULongName => {
                next.path = Some(text(extension(&mut entry, size)?));
                continue;
            }
            EntryType::GNULongLink => {
                next.target = Some(text(extension(&mut entry, size)?));
                continue;
            }
            EntryType::Regular | EntryType::Continuous => Ok(Kind::File),
            EntryType::Directory => Ok(Kind::Directory),
            EntryType::Symlink => Ok(Kind::Symlink),
            EntryType::Link => Ok(Kind::HardLink),
            EntryType::Char | EntryType::Block | EntryType::Fifo => Ok(Kind::Special),
            EntryType::GNUSparse => Err("a sparse file"),
            _ => Err("of a kind that this program does not know"),
        };
        let described = std::mem::take(&mut next);
        let path = described
            .path
            .unwrap_or_else(|| entry.header().path_bytes().into_owned());
        let kind = kind.map_err(|kind| ArchiveError::Kind {
            path: lossy(&path),
            kind,
        })?;
        // Two readers that disagree on this see different archives.
        if described.size.is_some_and(|other| other != size) {
            return Err(ArchiveError::Extension.into());
        }
        let target = described.target.or_else(|| {
            let target = entry.header().link_name_bytes();
            target.map(std::borrow::Cow::into_owned)
        });
        let target = target.unwrap_or_default();
        check_length(&target)?;
        let is_regular_by_name = kind == Kind::File && path.ends_with(b"/");
        each(Entry {
            path: normal(&path)?,
            // As archives of before POSIX have it.
            kind: if is_regular_by_name {
                Kind::Directory
            } else {
                kind
            },
            target,
            mode: entry.header().mode().unwrap_or(0o644) & 0o7777,
            position: entry.raw_file_position(),
            size,
        })?;
    }
    if next != Described::default() {
        return Err(ArchiveError::Extension.into());
    }
    Ok(())
}

/// What headers before an entry say of it.
#[derive(Debug, Default, PartialEq, Eq)]
struct Described {
    path: Option<Vec<u8>>,
    target: Option<Vec<u8>>,
    size: Option<u64>,
}

impl Described {
    fn take_pax(&mut self, content: &[u8]) -> Result<(), ArchiveError> {
        let mut rest = content;
        while !rest.is_empty() {
            let (key, value) = pax_record(&mut rest).ok_or(ArchiveError::Extension)?;
            match key {
                b"path" => self.path = Some(value.to_owned()),
                b"linkpath" => self.target = Some(value.to_owned()),
                b"size" => {
                    let size = std::str::from_utf8(value).ok();
                    let size = size.and_then(|size| size.parse().ok());
                    self.size = Some(size.ok_or(ArchiveError::Extension)?);
                }
                // As GNU tar writes sparse files, under a name that is not theirs.
                key if key.starts_with(b"GNU.sparse.") => return Err(ArchiveError::Extension),
                _ => {}
            }
        }
        Ok(())
    }
}

/// Takes one record, `LENGTH KEY=VALUE` and a line feed, of which the length is that of all of it
/// (POSIX, pax). The library's own reader takes a line feed in a value for the end.
fn pax_record<'a>(rest: &mut &'a [u8]) -> Option<(&'a [u8], &'a [u8])> {
    let space = rest.iter().take(20).position(|&byte| byte == b' ')?;
    let length: usize = std::str::from_utf8(&rest[..space]).ok()?.parse().ok()?;
    let record = rest.get(space + 1..length)?;
    let (end, record) = record.split_last()?;
    let equals = record.iter().position(|&byte| byte == b'=')?;
    *rest = &rest[length..];
    (*end == b'\n').then(|| (&record[..equals], &record[equals + 1..]))
}

fn extension(entry: &mut impl Read, size: u64) -> Result<Vec<u8>, ArchiveError> {
    if size > MAX_EXTENSION {
        return Err(ArchiveError::Extension);
    }
    let mut content = Vec::new();
    entry.take(MAX_EXTENSION).read_to_end(&mut content)?;
    if content.len() as u64 == size {
        Ok(content)
    } else {
        Err(ArchiveError::Read(io::ErrorKind::UnexpectedEof.into()))
    }
}

/// Without the zero byte at the end.
fn text(mut content: Vec<u8>) -> Vec<u8> {
    if let Some(end) = content.iter().position(|&byte| byte == 0) {
        content.truncate(end);
    }
    content
}

fn check_length(path: &[u8]) -> Result<(), ArchiveError> {
    let problem = if path.len() > MAX_PATH {
        "is longer than 4095 bytes"
    } else if path.contains(&0) {
        "has a zero byte"
    } else {
        return Ok(());
    };
    Err(ArchiveError::Path {
        path: lossy(path),
        problem,
    })
}

/// A path in its shortest form, relative to the root.
///
/// # Errors
/// It leads out of the root, or is no path.
pub fn normal(path: &[u8]) -> Result<Vec<u8>, ArchiveError> {
    check_length(path)?;
    let mut normal = Vec::with_capacity(path.len());
    for part in path.split(|&byte| byte == b'/') {
        let problem = match part {
            b"" | b"." => continue,
            b".." => "has a part `..`",
            part if part.len() > MAX_NAME => "has a part of more than 255 bytes",
            part => {
                if !normal.is_empty() {
                    normal.push(b'/');
                }
                normal.extend_from_slice(part);
                continue;
            }
        };
        return Err(ArchiveError::Path {
            path: lossy(path),
            problem,
        });
    }
    Ok(normal)
}

/// A path for people, of bounded length.
pub fn lossy(path: &[u8]) -> String {
    const SHOWN: usize = 200;
    let mut shown = String::from_utf8_lossy(&path[..path.len().min(SHOWN)]).into_owned();
    if path.len() > SHOWN {
        shown.push('…');
    }
    shown
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn all(bytes: &[u8]) -> Result<Vec<Entry>, ArchiveError> {
        let mut entries = Vec::new();
        walk(bytes, |entry| {
            entries.push(entry);
            Ok::<_, ArchiveError>(())
        })?;
        Ok(entries)
    }

    fn header(kind: EntryType, size: u64) -> tar::Header {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(size);
        header.set_mode(0o4755);
        header
    }

    /// An archive with one entry, whose name is not looked at.
    fn one(name: &[u8], kind: EntryType, content: &[u8]) -> Vec<u8> {
        let mut header = header(kind, content.len() as u64);
        header.as_mut_bytes()[..name.len()].copy_from_slice(name);
        header.set_cksum();
        let mut tar = tar::Builder::new(Vec::new());
        tar.append(&header, content).unwrap();
        tar.into_inner().unwrap()
    }

    #[test]
    fn entries_are_told_as_they_are() {
        let mut tar = tar::Builder::new(Vec::new());
        let mut append = |path: &str, mut header: tar::Header, content: &[u8]| {
            tar.append_data(&mut header, path, content).unwrap();
        };
        append("./a/", header(EntryType::Directory, 0), b"");
        append("a/b", header(EntryType::Regular, 5), b"hello");
        let long = format!("a/{}/c", "x".repeat(200));
        append(&long, header(EntryType::Regular, 1), b"!");
        let mut link = header(EntryType::Symlink, 0);
        tar.append_link(&mut link, "l", "../../etc").unwrap();
        let bytes = tar.into_inner().unwrap();
        let entries = all(&bytes).unwrap();
        let told: Vec<_> = entries
            .iter()
            .map(|entry| {
                (
                    String::from_utf8_lossy(&entry.path).into_owned(),
                    entry.kind,
                )
            })
            .collect();
        let expected = [
            ("a".to_owned(), Kind::Directory),
            ("a/b".to_owned(), Kind::File),
            (long, Kind::File),
            ("l".to_owned(), Kind::Symlink),
        ];
        assert_eq!(told, expected);
        let file = &entries[1];
        assert_eq!(file.mode, 0o4755);
        let start = usize::try_from(file.position).unwrap();
        assert_eq!(&bytes[start..start + 5], b"hello");
        assert_eq!(entries[3].target, b"../../etc");
    }

    #[test]
    fn paths_out_of_the_root_are_refused_and_absolute_ones_are_in_it() {
        for bad in ["..", "../a", "a/../../b", "/..", "a/..", "a\0b"] {
            assert!(
                matches!(normal(bad.as_bytes()), Err(ArchiveError::Path { .. })),
                "{bad:?}"
            );
        }
        assert!(normal(&[b'x'; 256]).is_err());
        assert!(normal("x/".repeat(2048).as_bytes()).is_err());
        assert_eq!(normal(b"/etc//./passwd/").unwrap(), b"etc/passwd");
        assert_eq!(normal(b"./").unwrap(), b"");
        let tar = one(b"../../etc/passwd", EntryType::Regular, b"x");
        assert!(matches!(all(&tar), Err(ArchiveError::Path { .. })));
    }

    #[test]
    fn headers_that_ask_for_too_much_are_refused() {
        let big = vec![b'a'; usize::try_from(MAX_EXTENSION).unwrap() + 1];
        for kind in [
            EntryType::GNULongName,
            EntryType::GNULongLink,
            EntryType::XHeader,
            EntryType::XGlobalHeader,
        ] {
            let tar = one(b"x", kind, &big);
            assert!(
                matches!(all(&tar), Err(ArchiveError::Extension)),
                "{kind:?}"
            );
        }
        // One that describes nothing.
        let tar = one(b"x", EntryType::GNULongName, b"name\0");
        assert!(matches!(all(&tar), Err(ArchiveError::Extension)));
        for pax in [&b"15 size=1234567\n"[..], b"11 size=-1\n", b"nonsense\n"] {
            let mut tar = one(b"x", EntryType::XHeader, pax);
            tar.truncate(1024);
            tar.extend(one(b"x", EntryType::Regular, b"x"));
            assert!(matches!(all(&tar), Err(ArchiveError::Extension)), "{pax:?}");
        }
        // A value may have a line feed in it.
        let mut tar = one(b"x", EntryType::XHeader, b"13 a=b\n0 c=d\n10 path=y\n");
        tar.truncate(1024);
        tar.extend(one(b"x", EntryType::Regular, b"x"));
        assert_eq!(all(&tar).unwrap()[0].path, b"y");
        let sparse = one(b"x", EntryType::GNUSparse, b"");
        assert!(matches!(all(&sparse), Err(ArchiveError::Kind { .. })));
    }

    #[test]
    fn what_breaks_off_or_is_no_archive_is_refused() {
        let tar = one(b"x", EntryType::Regular, &[7; 2000]);
        for length in [700, 1024, 2000] {
            assert!(
                matches!(all(&tar[..length]), Err(ArchiveError::Read(_))),
                "{length}"
            );
        }
        assert!(matches!(all(&[b'x'; 2048]), Err(ArchiveError::Read(_))));
        assert_eq!(all(b"").unwrap(), []);
    }

    proptest! {
        #[test]
        fn no_bytes_are_a_panic_or_a_path_out_of_the_root(
            name in prop::collection::vec(any::<u8>(), 0..100),
            kind: u8,
            content in prop::collection::vec(any::<u8>(), 0..2000),
            flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        ) {
            let mut tar = one(&name, EntryType::new(kind), &content);
            tar.truncate(tar.len() - 1024);
            tar.extend(one(b"after", EntryType::Regular, b"x"));
            for (index, byte) in flips {
                let index = index.index(tar.len());
                tar[index] = byte;
            }
            if let Ok(entries) = all(&tar) {
                for entry in entries {
                    prop_assert!(entry.path.split(|&b| b == b'/').all(|part| part != b".."));
                    prop_assert!(!entry.path.starts_with(b"/"));
                    prop_assert!(entry.path.len() <= MAX_PATH && !entry.path.contains(&0));
                }
            }
        }
    }
}
