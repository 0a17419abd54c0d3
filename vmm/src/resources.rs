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
use crate::sandboxing::{self, JailConfig, JailError};

/// The open files, sockets and devices of one machine.
pub struct HostResources {
    pub(crate) kvm: Kvm,
    pub(crate) kernel: BootFile,
    pub(crate) initramfs: Option<BootFile>,
    /// In the order of the configuration.
    pub(crate) disks: Vec<ImageFiles>,
    /// In the order of the configuration. Cards hold a tap and read nothing from it yet.
    pub(crate) net: Vec<Net>,
    pub(crate) vsock: Option<Vsock>,
    /// Where the sockets of host programs are.
    socket_directory: Option<PathBuf>,
    pub(crate) rng: Rng,
    /// `None` if the machine has no serial port.
    pub(crate) serial: Option<Output>,
}

impl HostResources {
    /// Checks `config` and opens all that it names.
    ///
    /// # Errors
    /// The configuration is wrong, or something of the host cannot be used.
    pub fn open(config: &VmConfig) -> Result<Self, BuildError> {
        config.validate()?;
        let payload = &config.payload;
        Ok(Self {
            kvm: vm::open()?,
            kernel: BootFile::open(&payload.kernel)?,
            initramfs: payload
                .initramfs
                .as_deref()
                .map(BootFile::open)
                .transpose()?,
            disks: config
                .disks
                .iter()
                .map(Block::open)
                .collect::<Result<_, _>>()?,
            net: config.net.iter().map(Net::new).collect::<Result<_, _>>()?,
            vsock: config.vsock.as_ref().map(Vsock::new).transpose()?,
            socket_directory: config
                .vsock
                .as_ref()
                .map(|vsock| directory_of(&vsock.socket)),
            rng: Rng::new(&config.rng)?,
            serial: serial_output(&config.serial)?,
        })
    }

    /// Takes all of this into the jail. The process that returns is another than the one that
    /// called (see [`sandboxing::enter`]).
    ///
    /// # Errors
    /// The jail cannot be entered.
    pub fn jail(mut self, jail: &JailConfig) -> Result<Self, JailError> {
        sandboxing::enter(jail, self.socket_directory.as_deref())?;
        if let Some(vsock) = &mut self.vsock {
            vsock.move_to(Path::new(sandboxing::SOCKET_DIRECTORY));
        }
        Ok(self)
    }
}

/// The directory of a file.
fn directory_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}

fn serial_output(config: &SerialConfig) -> Result<Option<Output>, BuildError> {
    Ok(Some(match (config.mode, &config.file) {
        (ConsoleMode::Off, _) => return Ok(None),
        (ConsoleMode::Tty, _) => Output::Stdout,
        (ConsoleMode::File, Some(path)) => Output::Log(serial_log(path)?),
        (ConsoleMode::File, None) => return Err(ConfigError::SerialFile.into()),
        (ConsoleMode::Null, _) => Output::Null,
    }))
}

fn serial_log(path: &Path) -> Result<BoundedLog, BuildError> {
    BoundedLog::create(path, LOG_LIMIT).map_err(|source| BuildError::SerialFile {
        path: path.to_owned(),
        source,
    })
}
