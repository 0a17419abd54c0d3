//! The files of a snapshot: found, made and opened. In the jail nothing is found any more, so they
//! are opened before, or come as descriptors.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::manifest::Manifest;
use super::{Prefault, RestoreConfig};
use crate::config::VmConfig;

// Names of files in the directory of a snapshot.
const MANIFEST: &str = "manifest.json";
const STATE: &str = "state.json";
const MEMORY: &str = "memory-ranges";
const CONFIG: &str = "config.json";
const WORKING_SET: &str = "working-set.json";

/// The largest configuration that is read, in bytes.
const MAX_CONFIG: u64 = 1 << 20;

/// The largest state that is read, in bytes: 32 vCPUs of some 100 KiB, and devices.
pub(super) const MAX_STATE: u64 = 16 << 20;

/// Why a file of a snapshot cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It cannot be opened.
    #[error("cannot open {path}", path = path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What the host says.
        #[source]
        source: io::Error,
    },
    /// It cannot be made.
    #[error("cannot make {path}; the directory has to exist, without a snapshot in it", path = path.display())]
    Create {
        /// The file.
        path: PathBuf,
        /// What the host says.
        #[source]
        source: io::Error,
    },
    /// It is not a new, regular file.
    #[error("the descriptor of the {what} is not of an empty regular file")]
    NotNew {
        /// What it is for.
        what: &'static str,
    },
    /// It cannot be read.
    #[error("cannot read the snapshot")]
    Read(#[source] io::Error),
    /// It cannot be written.
    #[error("cannot write the snapshot")]
    Write(#[source] io::Error),
    /// It is larger than it can be.
    #[error("a file of the snapshot is larger than the {limit} bytes that it can have")]
    TooLarge {
        /// The most that it can have, in bytes.
        limit: u64,
    },
    /// The configuration makes no sense.
    #[error("{path} is not the configuration of a virtual machine", path = path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: serde_json::Error,
    },
}

/// The files that a snapshot is written to.
#[derive(Debug)]
pub struct Destination {
    manifest: File,
    state: File,
    memory: File,
    /// `memory` once more, for those who may not write to it.
    readable: Option<File>,
    /// What was made, and is removed if it comes to nothing.
    made: Option<Made>,
}

#[derive(Debug)]
struct Made {
    directory: File,
    paths: Vec<PathBuf>,
    finished: std::cell::Cell<bool>,
}

impl Destination {
    /// New files in `directory`, which exists and holds no snapshot, that of the configuration
    /// included. They are removed again unless they are [finished](Self::finish).
    ///
    /// # Errors
    /// The files cannot be made.
    pub fn create(directory: &Path, config: &VmConfig) -> Result<Self, FileError> {
        let mut made = Made {
            directory: open(directory)?,
            paths: Vec::new(),
            finished: false.into(),
        };
        let mut make = |name| {
            let path = directory.join(name);
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&path)
                .map_err(|source| FileError::Create {
                    path: path.clone(),
                    source,
                })?;
            made.paths.push(path);
            Ok::<_, FileError>(file)
        };
        let (manifest, state, memory) = (make(MANIFEST)?, make(STATE)?, make(MEMORY)?);
        let text = serde_json::to_vec(config).map_err(|error| FileError::Write(error.into()))?;
        write(&make(CONFIG)?, &text)?;
        Ok(Self {
            manifest,
            state,
            readable: Some(open(&directory.join(MEMORY))?),
            memory,
            made: Some(made),
        })
    }

    /// The files behind these descriptors, which the caller made and will remove if need be: of the
    /// manifest, the state and the memory, new and empty, and perhaps that of the memory once more,
    /// read-only.
    ///
    /// # Errors
    /// They are not empty, or no files.
    pub fn from_files(
        [manifest, state, memory]: [File; 3],
        readable: Option<File>,
    ) -> Result<Self, FileError> {
        for (what, file) in [
            ("manifest", &manifest),
            ("state", &state),
            ("memory", &memory),
        ] {
            check_new(what, file)?;
        }
        Ok(Self {
            manifest,
            state,
            memory,
            readable,
            made: None,
        })
    }

    /// The file that memory is written to.
    pub(super) fn memory(&self) -> &File {
        &self.memory
    }

    /// The memory, to be mapped from.
    pub(super) fn memory_to_read(&self) -> Result<Option<File>, FileError> {
        let readable = self.readable.as_ref().map(File::try_clone);
        readable.transpose().map_err(FileError::Read)
    }

    /// Writes state and manifest when the memory has been written. All of it is durable when this
    /// returns.
    ///
    /// # Errors
    /// The host does not take it.
    pub(super) fn finish(&self, manifest: &Manifest, state: &[u8]) -> Result<(), FileError> {
        self.memory.sync_all().map_err(FileError::Write)?;
        write(&self.state, state)?;
        let text = manifest
            .to_json()
            .map_err(|error| FileError::Write(error.into()))?;
        write(&self.manifest, &text)?;
        if let Some(made) = &self.made {
            made.directory.sync_all().map_err(FileError::Write)?;
            made.finished.set(true);
        }
        Ok(())
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        if self.finished.get() {
            return;
        }
        for path in &self.paths {
            // A snapshot without a manifest is none, if nothing else can be done.
            if let Err(error) = std::fs::remove_file(path) {
                tracing::warn!(path = %path.display(), %error, "part of a snapshot is left");
            }
        }
    }
}

/// A snapshot that others are based on.
#[derive(Debug)]
pub struct Base {
    pub(super) manifest: File,
    pub(super) memory: File,
    pub(super) working_set: Option<File>,
}

/// The file that a working set is written to.
#[derive(Debug)]
pub struct WorkingSetFile(File);

impl WorkingSetFile {
    /// A new file in the directory of the snapshot.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn create(directory: &Path) -> Result<Self, FileError> {
        let path = directory.join(WORKING_SET);
        OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map(Self)
            .map_err(|source| FileError::Create { path, source })
    }

    /// The empty file behind a descriptor.
    ///
    /// # Errors
    /// It is not empty, or no file.
    pub fn from_file(file: File) -> Result<Self, FileError> {
        check_new("working set", &file)?;
        Ok(Self(file))
    }

    /// Fills it, and makes sure that it stays filled.
    pub(super) fn write(&self, bytes: &[u8]) -> Result<(), FileError> {
        write(&self.0, bytes)
    }
}

fn check_new(what: &'static str, file: &File) -> Result<(), FileError> {
    let metadata = file.metadata().map_err(FileError::Write)?;
    if metadata.is_file() && metadata.len() == 0 {
        Ok(())
    } else {
        Err(FileError::NotNew { what })
    }
}

/// The open files of a snapshot, of which nothing has been read.
#[derive(Debug)]
pub struct Source {
    pub(super) manifest: File,
    pub(super) state: File,
    pub(super) memory: File,
    /// Nearest first.
    pub(super) bases: Vec<Base>,
    pub(super) prefault: Prefault,
    pub(super) working_set: Option<File>,
    pub(super) verify: bool,
}

impl Source {
    /// Opens the files.
    ///
    /// # Errors
    /// One of them cannot be opened.
    pub fn open(config: &RestoreConfig) -> Result<Self, FileError> {
        let working_set = |directory: &Path| match open(&directory.join(WORKING_SET)) {
            _ if config.prefault != Prefault::WorkingSet => Ok(None),
            Err(FileError::Open { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                Ok(None)
            }
            opened => opened.map(Some),
        };
        let base = |directory: &PathBuf| {
            Ok(Base {
                manifest: open(&directory.join(MANIFEST))?,
                memory: open(&directory.join(MEMORY))?,
                working_set: working_set(directory)?,
            })
        };
        Ok(Self {
            manifest: open(&config.source.join(MANIFEST))?,
            state: open(&config.source.join(STATE))?,
            memory: open(&config.source.join(MEMORY))?,
            bases: config
                .bases
                .iter()
                .map(base)
                .collect::<Result<_, FileError>>()?,
            prefault: config.prefault,
            working_set: working_set(&config.source)?,
            verify: config.verify,
        })
    }
}

/// The configuration of the machine that the snapshot in `directory` is of.
///
/// # Errors
/// There is none.
pub fn read_config(directory: &Path) -> Result<VmConfig, FileError> {
    let path = directory.join(CONFIG);
    let text = read_up_to(&open(&path)?, MAX_CONFIG)?;
    serde_json::from_slice(&text).map_err(|source| FileError::Config { path, source })
}

fn open(path: &Path) -> Result<File, FileError> {
    OpenOptions::new()
        .read(true)
        // A FIFO would hold up the open until someone writes to it.
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(|source| FileError::Open {
            path: path.to_owned(),
            source,
        })
}

/// Fills a file, and makes sure that it stays filled.
fn write(file: &File, bytes: &[u8]) -> Result<(), FileError> {
    file.write_all_at(bytes, 0)
        .and_then(|()| file.sync_all())
        .map_err(FileError::Write)
}

/// All of a file that has at most `limit` bytes.
pub(super) fn read_up_to(file: &File, limit: u64) -> Result<Vec<u8>, FileError> {
    let size = file.metadata().map_err(FileError::Read)?.len();
    if size > limit {
        return Err(FileError::TooLarge { limit });
    }
    let mut bytes = vec![0; size as usize];
    file.read_exact_at(&mut bytes, 0).map_err(FileError::Read)?;
    Ok(bytes)
}
