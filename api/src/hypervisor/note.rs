//! What a host writes down of each machine, so that a later daemon can take it over.
//!
//! It is in the runtime directory of the sandbox, for the daemon's user alone, and is replaced by a
//! rename: it is what it was or what it is to be. Should the host itself go down, nothing of it
//! matters any more.

use std::fs::{self, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tokio::process::Child;

use super::command::Jail;
use super::nic::Nic;
use super::paths::Paths;
use super::process::ProcessId;
use crate::domain::{Layers, PrepareRequest, SandboxId};

/// The longest note, in bytes: that of a machine with the most layers is some kibibytes.
const MAX_NOTE: u64 = 64 << 10;

/// What is written down of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Note {
    /// Its VMM; of a jailed one, the process that waits for it.
    pub process: ProcessId,
    /// Whether its VMM is jailed.
    pub is_jailed: bool,
    /// The user that its VMM is, if that is one of its own.
    pub user: Option<u32>,
    /// Its cgroup.
    pub cgroup: Option<PathBuf>,
    /// Its tap.
    pub tap: Option<TapNote>,
    /// What it is based on: what it was started from, or saved to and went on from. The disk layers
    /// among these may have been merged since.
    pub layers: Layers,
    /// The file that it writes to: the inode of its overlay on the disk layers.
    pub disk: u64,
}

/// What is written down of a tap.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TapNote {
    /// Its name.
    pub name: String,
    /// Its number.
    pub index: u32,
}

impl Note {
    /// What a later daemon has to know of a machine whose VMM was just started, and whose files are there.
    pub fn of(
        paths: &Paths,
        request: &PrepareRequest,
        vmm: &Child,
        jail: Option<Jail<'_>>,
        nic: Option<&Nic<'_>>,
    ) -> io::Result<Self> {
        let pid = vmm.id().ok_or(io::ErrorKind::NotFound)?;
        Ok(Self {
            process: ProcessId::of(pid.cast_signed())?,
            is_jailed: jail.is_some(),
            user: jail.and_then(|jail| jail.user),
            cgroup: jail.and_then(|jail| jail.cgroup).map(Path::to_owned),
            tap: nic.map(Nic::note),
            layers: request.layers.clone(),
            disk: inode(&paths.disk(&request.id))?,
        })
    }

    /// The note of a sandbox; `None` if there is none.
    pub fn read(paths: &Paths, id: &SandboxId) -> io::Result<Option<Self>> {
        let mut bytes = Vec::new();
        match fs::File::open(paths.note(id)) {
            Ok(file) => file.take(MAX_NOTE).read_to_end(&mut bytes)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        Ok(Some(serde_json::from_slice(&bytes)?))
    }

    /// Writes it down in place of the one that is there.
    pub fn write(&self, paths: &Paths, id: &SandboxId) -> io::Result<()> {
        let (path, draft) = (paths.note(id), paths.note_draft(id));
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&draft)?;
        file.write_all(&serde_json::to_vec(self)?)?;
        fs::rename(draft, path)
    }
}

/// The number of the file of this name.
pub fn inode(path: &Path) -> io::Result<u64> {
    Ok(fs::symlink_metadata(path)?.ino())
}
