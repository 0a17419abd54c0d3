//! Files: describe, list, read, remove, and make directories. Writing is in [`write`](mod@write),
//! and walking a tree in [`walk`].
//!
//! Everything here blocks and is to be called on a thread for blocking work.

pub mod walk;
pub mod write;

use std::{
    ffi::OsStr,
    fs::{self, File, Metadata, OpenOptions},
    io::{self, Read},
    os::unix::{
        ffi::OsStrExt,
        fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
};

use agent_protocol::{Entry, EntryKind, ErrorCode, percent_encode};
use bytes::Bytes;

use crate::{body::CHUNK, users::UserError};

/// About how many bytes of a listing are made at once.
const LISTING_CHUNK: usize = 16 * 1024;

/// Why an operation on a file failed.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The system refused.
    #[error("cannot {action} {path}")]
    System {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A file was expected.
    #[error("{0} is a directory; expected a file")]
    IsADirectory(PathBuf),
    /// A regular file was expected.
    #[error("{0} is a device, FIFO or socket; expected a regular file")]
    NotARegularFile(PathBuf),
    /// The owner is not there.
    #[error("cannot give the file to this user")]
    User(#[from] UserError),
}

impl FileError {
    fn system<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> Self + 'a {
        move |source| Self::System {
            action,
            path: path.to_owned(),
            source,
        }
    }

    /// The code that the host gets.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::IsADirectory(_) => ErrorCode::IsADirectory,
            Self::NotARegularFile(_) => ErrorCode::NotARegularFile,
            Self::User(UserError::Malformed(_)) => ErrorCode::BadRequest,
            Self::User(UserError::Database { .. }) => ErrorCode::Internal,
            Self::User(_) => ErrorCode::UnknownUser,
            Self::System { source, .. } => match source.raw_os_error() {
                Some(libc::ENOENT) => ErrorCode::NotFound,
                Some(libc::EISDIR) => ErrorCode::IsADirectory,
                Some(libc::ENOTDIR | libc::EEXIST) => ErrorCode::NotADirectory,
                Some(libc::EACCES | libc::EPERM | libc::EROFS | libc::EBUSY) => {
                    ErrorCode::PermissionDenied
                }
                Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => ErrorCode::NoSpace,
                Some(libc::ENAMETOOLONG | libc::ELOOP | libc::EINVAL) => ErrorCode::BadPath,
                Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM) => ErrorCode::OutOfResources,
                Some(libc::ENXIO | libc::ENODEV) => ErrorCode::NotARegularFile,
                _ => ErrorCode::Internal,
            },
        }
    }
}

/// Describes the file at `path`; a symbolic link is not followed.
///
/// # Errors
/// [`FileError`]
pub fn stat(path: &Path) -> Result<Entry, FileError> {
    let metadata = fs::symlink_metadata(path).map_err(FileError::system("look at", path))?;
    let name = path.file_name().unwrap_or(OsStr::new("/"));
    Ok(entry(name, &metadata, || fs::read_link(path)))
}

/// Makes the directory `path` and its parents, as far as they are not there. Whether it is new, and
/// what it is.
///
/// # Errors
/// [`FileError`]
pub fn make_dir(path: &Path) -> Result<(bool, Entry), FileError> {
    let failed = FileError::system("make the directory", path);
    let parent = path.parent().unwrap_or(path);
    let is_new = match fs::create_dir_all(parent).and_then(|()| fs::create_dir(path)) {
        Ok(()) => true,
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => false,
        Err(e) => return Err(failed(e)),
    };
    Ok((is_new, stat(path)?))
}

/// Removes the file `path`, or the directory with all that is in it. A symbolic link is removed
/// itself, and none is followed.
///
/// # Errors
/// [`FileError`]; a part of a directory may be gone.
pub fn remove(path: &Path) -> Result<(), FileError> {
    let failed = FileError::system("remove", path);
    let removed = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(e) => Err(e),
    };
    removed.map_err(failed)
}

fn entry(name: &OsStr, metadata: &Metadata, target: impl FnOnce() -> io::Result<PathBuf>) -> Entry {
    let kind = metadata.file_type();
    Entry {
        name: name.to_string_lossy().into_owned(),
        raw_name: match name.to_str() {
            Some(_) => None,
            None => Some(percent_encode(name.as_bytes())),
        },
        kind: match () {
            () if kind.is_file() => EntryKind::File,
            () if kind.is_dir() => EntryKind::Directory,
            () if kind.is_symlink() => EntryKind::Symlink,
            () if kind.is_fifo() => EntryKind::Fifo,
            () if kind.is_socket() => EntryKind::Socket,
            () if kind.is_char_device() => EntryKind::CharDevice,
            () if kind.is_block_device() => EntryKind::BlockDevice,
            () => EntryKind::Other,
        },
        mode: metadata.mode() & 0o7777,
        uid: metadata.uid(),
        gid: metadata.gid(),
        size: metadata.len(),
        mtime_us: mtime_us(metadata),
        target: if kind.is_symlink() {
            target().ok().map(|t| t.to_string_lossy().into_owned())
        } else {
            None
        },
    }
}

/// Last modification in microseconds since the Unix epoch.
pub fn mtime_us(metadata: &Metadata) -> i64 {
    metadata
        .mtime()
        .saturating_mul(1_000_000)
        .saturating_add(metadata.mtime_nsec() / 1_000)
}

/// A listing in the making.
#[derive(Debug)]
pub struct Listing {
    entries: fs::ReadDir,
    path: PathBuf,
}

impl Listing {
    /// Opens the directory `path`.
    ///
    /// # Errors
    /// [`FileError`]
    pub fn open(path: &Path) -> Result<Self, FileError> {
        Ok(Self {
            entries: fs::read_dir(path).map_err(FileError::system("list", path))?,
            path: path.to_owned(),
        })
    }

    /// The next lines, each a JSON [`Entry`]; `None` at the end.
    ///
    /// # Errors
    /// Of reading the directory.
    pub fn next_lines(&mut self) -> io::Result<Option<Bytes>> {
        let mut lines = Vec::with_capacity(LISTING_CHUNK);
        for found in &mut self.entries {
            let found = found?;
            let metadata = match found.metadata() {
                Ok(metadata) => metadata,
                // It was removed in the meantime.
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                Err(e) => return Err(e),
            };
            let name = found.file_name();
            let entry = entry(&name, &metadata, || fs::read_link(self.path.join(&name)));
            serde_json::to_writer(&mut lines, &entry)?;
            lines.push(b'\n');
            if lines.len() + 1024 > LISTING_CHUNK {
                break;
            }
        }
        Ok(Some(Bytes::from(lines)).filter(|lines| !lines.is_empty()))
    }
}

/// A file being read.
#[derive(Debug)]
pub struct Reading {
    file: File,
    /// Its metadata when it was opened.
    pub metadata: Metadata,
    left: Option<u64>,
}

impl Reading {
    /// Opens the regular file `path`.
    ///
    /// # Errors
    /// [`FileError`]
    pub fn open(path: &Path) -> Result<Self, FileError> {
        // Without O_NONBLOCK, opening a FIFO waits for a writer.
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(path)
            .map_err(FileError::system("open", path))?;
        let metadata = file
            .metadata()
            .map_err(FileError::system("look at", path))?;
        if metadata.is_dir() {
            return Err(FileError::IsADirectory(path.to_owned()));
        }
        if !metadata.is_file() {
            return Err(FileError::NotARegularFile(path.to_owned()));
        }
        // Files that the kernel makes up as they are read, as in /proc, report no size.
        let left = Some(metadata.len()).filter(|&len| len > 0);
        Ok(Self {
            file,
            metadata,
            left,
        })
    }

    /// How many bytes follow, if that is known.
    pub fn len(&self) -> Option<u64> {
        self.left
    }

    /// The next bytes; `None` at the end.
    ///
    /// # Errors
    /// Of the read; also if the file has become shorter than was promised.
    pub fn next_chunk(&mut self) -> io::Result<Option<Bytes>> {
        let want = self.left.map_or(CHUNK, |left| {
            usize::try_from(left).map_or(CHUNK, |left| left.min(CHUNK))
        });
        if want == 0 {
            return Ok(None);
        }
        let mut chunk = vec![0; want];
        let len = loop {
            match self.file.read(&mut chunk) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                result => break result?,
            }
        };
        chunk.truncate(len);
        match &mut self.left {
            Some(_) if len == 0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            Some(left) => *left = left.saturating_sub(u64::try_from(len).unwrap_or(*left)),
            None if len == 0 => return Ok(None),
            None => {}
        }
        Ok(Some(chunk.into()))
    }
}
