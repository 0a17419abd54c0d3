//! The files of an archive, to be written elsewhere one after the other.

use std::fs::File;
use std::io;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::stream::{self, BoxStream, StreamExt};

use super::{ArchiveError, Entry, Kind, Section, lossy, walk};
use crate::archive::section::chunks;

/// The most files, whose paths are all in memory at once.
const MAX_FILES: usize = 100_000;

/// A regular file of an archive.
pub struct ArchivedFile {
    /// Its path, absolute.
    pub path: String,
    /// Its permission bits.
    pub mode: u32,
    /// Its content.
    pub content: BoxStream<'static, io::Result<Bytes>>,
}

/// The regular files of an archive, in their order. Directories come with their files; anything else
/// is refused.
///
/// # Errors
/// In the stream, as its last item: the archive is refused.
pub fn files(archive: File) -> BoxStream<'static, Result<ArchivedFile, ArchiveError>> {
    let archive = Arc::new(archive);
    let listed = Arc::clone(&archive);
    let list = async move {
        let list = tokio::task::spawn_blocking(move || list(&listed)).await;
        match list.unwrap_or_else(|error| Err(io::Error::other(error).into())) {
            Ok(entries) => stream::iter(entries.into_iter().map(Ok)).left_stream(),
            Err(error) => stream::iter([Err(error)]).right_stream(),
        }
    };
    stream::once(list)
        .flatten()
        .map(move |entry| {
            let (path, entry) = entry?;
            let section = Section::new(&archive, entry.position, entry.size);
            Ok(ArchivedFile {
                path,
                mode: entry.mode,
                content: chunks(section),
            })
        })
        .boxed()
}

fn list(archive: &Arc<File>) -> Result<Vec<(String, Entry)>, ArchiveError> {
    let mut files = Vec::new();
    let reader = io::BufReader::new(Section::whole(archive)?);
    walk(reader, |entry| {
        let kind = match entry.kind {
            Kind::Directory => return Ok(()),
            Kind::File if files.len() < MAX_FILES => {
                let path = match std::str::from_utf8(&entry.path) {
                    Ok(path) if !path.is_empty() => format!("/{path}"),
                    _ => {
                        return Err(ArchiveError::Path {
                            path: lossy(&entry.path),
                            problem: "is empty or not UTF-8",
                        });
                    }
                };
                files.push((path, entry));
                return Ok(());
            }
            Kind::File => return Err(ArchiveError::TooManyEntries),
            Kind::Symlink | Kind::HardLink => "a link",
            Kind::Special => "a device or a named pipe",
        };
        Err(ArchiveError::Kind {
            path: lossy(&entry.path),
            kind,
        })
    })?;
    Ok(files)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use tar::{EntryType, Header};

    use super::*;

    fn archive(entries: &[(&str, EntryType, &[u8])]) -> File {
        let mut tar = tar::Builder::new(Vec::new());
        for (path, kind, content) in entries {
            let mut header = Header::new_gnu();
            header.set_entry_type(*kind);
            header.set_mode(0o755);
            header.set_size(content.len() as u64);
            tar.append_data(&mut header, path, *content).unwrap();
        }
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&tar.into_inner().unwrap()).unwrap();
        file
    }

    #[tokio::test]
    async fn files_come_with_paths_modes_and_contents() {
        let large = vec![7; 1 << 20];
        let archive = archive(&[
            ("srv", EntryType::Directory, b""),
            ("srv/a", EntryType::Regular, b"one"),
            ("srv/b", EntryType::Regular, &large),
        ]);
        let mut told = Vec::new();
        let mut files = files(archive);
        while let Some(file) = files.next().await {
            let file = file.unwrap();
            let pieces: Vec<_> = file.content.map(Result::unwrap).collect().await;
            told.push((file.path, file.mode, pieces.concat()));
        }
        let expected = [
            ("/srv/a".to_owned(), 0o755, b"one".to_vec()),
            ("/srv/b".to_owned(), 0o755, large),
        ];
        assert_eq!(told, expected);
    }

    #[tokio::test]
    async fn what_is_no_file_is_refused() {
        for kind in [
            EntryType::Symlink,
            EntryType::Link,
            EntryType::Char,
            EntryType::Fifo,
        ] {
            let archive = archive(&[("a", EntryType::Regular, b""), ("b", kind, b"")]);
            let all: Vec<_> = files(archive).collect().await;
            assert!(
                matches!(&all[..], [Err(ArchiveError::Kind { .. })]),
                "{kind:?}"
            );
        }
    }
}
