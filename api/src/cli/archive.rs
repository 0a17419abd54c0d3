//! Archives to send: files of a recipe, and images.

use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use tar::{Builder, EntryType, Header};

use super::recipe::{RecipeError, RecipeFile};

/// A tar file.
#[derive(Debug)]
pub struct ArchiveFile {
    /// The file, at its start.
    pub file: File,
    /// Its size, in bytes.
    pub size: u64,
}

impl ArchiveFile {
    fn of(mut file: File) -> Result<Self, RecipeError> {
        let size = file.seek(SeekFrom::End(0)).map_err(RecipeError::Archive)?;
        file.seek(SeekFrom::Start(0))
            .map_err(RecipeError::Archive)?;
        Ok(Self { file, size })
    }
}

/// An image: an archive as it is, or the directory of a layout, packed.
pub fn image(path: &Path) -> Result<ArchiveFile, RecipeError> {
    let read = |source| RecipeError::Read {
        path: path.to_owned(),
        source,
    };
    if !fs::metadata(path).map_err(read)?.is_dir() {
        return ArchiveFile::of(File::open(path).map_err(read)?);
    }
    if !path.join("index.json").exists() {
        return Err(RecipeError::File {
            path: path.to_owned(),
            problem: "is no OCI layout: it has no index.json",
        });
    }
    let mut tar = new_tar()?;
    add(&mut tar, path, Path::new(""), None)?;
    finish(tar)
}

/// Files of a recipe that is in the directory `dir`, under the paths that they are to have.
pub fn files(dir: &Path, files: &[RecipeFile]) -> Result<ArchiveFile, RecipeError> {
    let mut tar = new_tar()?;
    for file in files {
        let from = dir.join(&file.from);
        let bad = |problem| RecipeError::File {
            path: file.from.clone(),
            problem,
        };
        let mode = match &file.mode {
            None => None,
            Some(mode) => match u32::from_str_radix(mode, 8) {
                Ok(mode) if mode <= 0o7777 => Some(mode),
                _ => return Err(bad("has a mode that is not an octal number up to 7777")),
            },
        };
        let Some(to) = file.to.strip_prefix('/') else {
            return Err(bad("is to be added to a path that is not absolute"));
        };
        add(&mut tar, &from, Path::new(to), mode)?;
    }
    finish(tar)
}

fn new_tar() -> Result<Builder<File>, RecipeError> {
    tempfile::tempfile()
        .map(Builder::new)
        .map_err(RecipeError::Archive)
}

fn finish(tar: Builder<File>) -> Result<ArchiveFile, RecipeError> {
    ArchiveFile::of(tar.into_inner().map_err(RecipeError::Archive)?)
}

/// Adds a file, or a directory with all that is in it.
fn add(
    tar: &mut Builder<File>,
    from: &Path,
    to: &Path,
    mode: Option<u32>,
) -> Result<(), RecipeError> {
    let read = |source| RecipeError::Read {
        path: from.to_owned(),
        source,
    };
    let metadata = fs::symlink_metadata(from).map_err(read)?;
    if metadata.is_dir() {
        let entries = fs::read_dir(from).map_err(read)?;
        let mut names: Vec<PathBuf> = entries
            .map(|entry| entry.map(|entry| entry.file_name().into()))
            .collect::<io::Result<_>>()
            .map_err(read)?;
        // So that the same files are the same archive.
        names.sort();
        for name in names {
            add(tar, &from.join(&name), &to.join(&name), mode)?;
        }
        return Ok(());
    }
    if !metadata.is_file() {
        return Err(RecipeError::File {
            path: from.to_owned(),
            problem: "is neither a file nor a directory; links are not followed",
        });
    }
    let file = File::open(from).map_err(read)?;
    let mut header = Header::new_gnu();
    header.set_entry_type(EntryType::Regular);
    header.set_mode(mode.unwrap_or(metadata.permissions().mode() & 0o7777));
    header.set_size(metadata.len());
    // One that grows meanwhile is taken as far as it went.
    let content = io::Read::take(file, metadata.len());
    tar.append_data(&mut header, to, content)
        .map_err(RecipeError::Archive)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::archive::{ArchiveError, walk};

    #[test]
    fn files_and_directories_are_packed_under_their_new_paths() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("app/sub")).unwrap();
        fs::write(dir.path().join("app/a"), "a").unwrap();
        fs::write(dir.path().join("app/sub/b"), "b").unwrap();
        fs::set_permissions(dir.path().join("app/a"), fs::Permissions::from_mode(0o755)).unwrap();
        let file = |from: &str, to: &str, mode: Option<&str>| RecipeFile {
            from: from.into(),
            to: to.into(),
            mode: mode.map(str::to_owned),
        };
        let packed = files(
            dir.path(),
            &[file("app", "/srv", None), file("app/a", "/x", Some("600"))],
        );
        let mut entries = Vec::new();
        walk(packed.unwrap().file, |entry| {
            let path = String::from_utf8(entry.path).unwrap();
            entries.push((path, entry.mode & 0o700));
            Ok::<_, ArchiveError>(())
        })
        .unwrap();
        let expected = [("srv/a", 0o700), ("srv/sub/b", 0o600), ("x", 0o600)];
        assert_eq!(
            entries,
            expected.map(|(path, mode)| (path.to_owned(), mode))
        );
        std::os::unix::fs::symlink("/etc/passwd", dir.path().join("app/l")).unwrap();
        for bad in [
            file("app", "/srv", None),
            file("app/a", "srv", None),
            file("app/a", "/srv", Some("9")),
        ] {
            let result = files(dir.path(), &[bad]);
            assert!(matches!(result, Err(RecipeError::File { .. })));
        }
        assert!(matches!(image(dir.path()), Err(RecipeError::File { .. })));
        fs::write(dir.path().join("index.json"), "{}").unwrap();
        fs::remove_file(dir.path().join("app/l")).unwrap();
        assert!(image(dir.path()).unwrap().size > 2048);
    }
}
