//! What a machine needs of the host: everything that is found by a path or a name, or takes a
//! privilege to open. Opened first, so that the machine can be built, and run, by a process that
//! has neither paths nor privileges any more (see [`crate::sandboxing`]).
//!
//! Only what must be read to find the next file is read here: what the files hold may be hostile,
//! and is for [`crate::builder`] to judge.

use std::path::{Path, PathBuf};

use kvm_ioctls::Kvm;

use crate::arch::x86_64::boot::BootFile;
use crate::bounded_log::BoundedLog;
use crate::builder::BuildError;
use crate::config::{ConfigError, ConsoleMode, SerialConfig, VmConfig};
use crate::devices::legacy::serial::{LOG_LIMIT, Output};
use crate::devices::virtio::block::{Block, ImageFiles};
use crate::devices::virtio::net::Net;
use crate::devices::virtio::rng::Rng;
use crate::devices::virtio::vsock::Vsock;
use crate::kvm::vm;
use crate::memory::pagemap::Pagemap;
use crate::sandboxing::{self, JailConfig, JailError};
use crate::snapshot::{RestoreConfig, Source};

/// The open files, sockets and devices of one machine.
pub struct HostResources {
    pub(crate) kvm: Kvm,
    pub(crate) origin: Origin,
    pub(crate) devices: Devices,
    /// Where the sockets of host programs are.
    socket_directory: Option<PathBuf>,
    /// `None` if the host does not show it; there are no snapshots then.
    pub(crate) pagemap: Option<Pagemap>,
}

/// Where the guest comes from.
pub(crate) enum Origin {
    /// It boots.
    Boot(BootFiles),
    /// It goes on.
    Snapshot(Source),
}

/// What a guest boots.
pub(crate) struct BootFiles {
    pub(crate) kernel: BootFile,
    pub(crate) initramfs: Option<BootFile>,
}

/// What devices stand on.
pub(crate) struct Devices {
    /// In the order of the configuration.
    pub(crate) disks: Vec<ImageFiles>,
    /// In the order of the configuration. Cards hold a tap and read nothing from it yet.
    pub(crate) net: Vec<Net>,
    pub(crate) vsock: Option<Vsock>,
    pub(crate) rng: Rng,
    /// `None` if the machine has no serial port.
    pub(crate) serial: Option<Output>,
}

impl HostResources {
    /// Checks `config` and opens all that it names, for a machine that boots, or goes on from a
    /// snapshot.
    ///
    /// # Errors
    /// The configuration is wrong, or something of the host cannot be used.
    pub fn open(config: &VmConfig, snapshot: Option<&RestoreConfig>) -> Result<Self, BuildError> {
        config.validate()?;
        let origin = match (snapshot, &config.payload) {
            (Some(snapshot), _) => Origin::Snapshot(Source::open(snapshot)?),
            (None, Some(payload)) => Origin::Boot(BootFiles {
                kernel: BootFile::open(&payload.kernel)?,
                initramfs: payload
                    .initramfs
                    .as_deref()
                    .map(BootFile::open)
                    .transpose()?,
            }),
            (None, None) => return Err(ConfigError::NoPayload.into()),
        };
        Ok(Self {
            kvm: vm::open()?,
            devices: Devices::open(config, snapshot.is_some())?,
            origin,
            socket_directory: config
                .vsock
                .as_ref()
                .map(|vsock| directory_of(&vsock.socket)),
            pagemap: Pagemap::open()
                .inspect_err(|error| tracing::info!(%error, "no page table to make snapshots with"))
                .ok(),
        })
    }

    /// Takes all of this into the jail. The process that returns is another than the one that
    /// called (see [`sandboxing::enter`]).
    ///
    /// # Errors
    /// The jail cannot be entered.
    pub fn jail(mut self, jail: &JailConfig) -> Result<Self, JailError> {
        // That of the other process is of no use in this one.
        self.pagemap = sandboxing::enter(jail, self.socket_directory.as_deref())?;
        if let Some(vsock) = &mut self.devices.vsock {
            vsock.move_to(Path::new(sandboxing::SOCKET_DIRECTORY));
        }
        Ok(self)
    }
}

impl Devices {
    /// Opens what the devices of `config` stand on. The log of a serial port that `continues` keeps
    /// what is in it.
    fn open(config: &VmConfig, continues: bool) -> Result<Self, BuildError> {
        Ok(Self {
            disks: config
                .disks
                .iter()
                .map(Block::open)
                .collect::<Result<_, _>>()?,
            net: config.net.iter().map(Net::new).collect::<Result<_, _>>()?,
            vsock: config.vsock.as_ref().map(Vsock::new).transpose()?,
            rng: Rng::new(&config.rng)?,
            serial: serial_output(&config.serial, continues)?,
        })
    }
}

/// The directory of a file.
fn directory_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}

fn serial_output(config: &SerialConfig, continues: bool) -> Result<Option<Output>, BuildError> {
    Ok(Some(match (config.mode, &config.file) {
        (ConsoleMode::Off, _) => return Ok(None),
        (ConsoleMode::Tty, _) => Output::Stdout,
        (ConsoleMode::File, Some(path)) => Output::Log(serial_log(path, continues)?),
        (ConsoleMode::File, None) => return Err(ConfigError::SerialFile.into()),
        (ConsoleMode::Null, _) => Output::Null,
    }))
}

fn serial_log(path: &Path, continues: bool) -> Result<BoundedLog, BuildError> {
    let log = if continues {
        BoundedLog::append(path, LOG_LIMIT)
    } else {
        BoundedLog::create(path, LOG_LIMIT)
    };
    log.map_err(|source| BuildError::SerialFile {
        path: path.to_owned(),
        source,
    })
}
