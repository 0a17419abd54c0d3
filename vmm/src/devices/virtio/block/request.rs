//! One request of the driver (virtio 1.2, 5.2.6): a header of 16 bytes, the data, and a status
//! byte that is the last device-writable byte of the chain.
//!
//! How the driver splits these over descriptors is its own affair (2.7.4.3). Whatever is wrong
//! with a request that has room for a status is reported there.

use std::io;

use tracing::{debug, warn};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};

use super::{Image, REQUEST_MAX, SECTOR_SIZE};
use crate::devices::virtio::buffers::{Buffers, ChainBuffers, GuestSlice};

/// What requests are carried out on.
pub struct Disk {
    name: String,
    image: Image,
    serial: [u8; VIRTIO_BLK_ID_BYTES as usize],
    /// Whether a write is durable before it is completed.
    writethrough: bool,
    /// Whether the host has failed a request before.
    failed: bool,
}

impl Disk {
    pub fn new(name: String, image: Image, serial: [u8; VIRTIO_BLK_ID_BYTES as usize]) -> Self {
        Self {
            name,
            image,
            serial,
            writethrough: false,
            failed: false,
        }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn readonly(&self) -> bool {
        !self.image.writable()
    }

    /// The size. A last, partial sector is out of the driver's reach.
    pub fn sectors(&self) -> u64 {
        self.image.size() / SECTOR_SIZE
    }

    pub fn set_writethrough(&mut self, writethrough: bool) {
        self.writethrough = writethrough;
    }

    /// Tells of the first failure; a guest can bring about as many as it likes.
    fn report(&mut self, operation: &'static str, error: &io::Error) {
        if self.failed {
            debug!(disk = self.name, operation, %error, "the host failed a request");
        } else {
            self.failed = true;
            warn!(disk = self.name, operation, %error, "the host failed a request; later failures are logged at level debug");
        }
    }
}

/// Why a request is completed with an error status.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("the header is incomplete")]
    Header,
    #[error("request type {0} is unknown")]
    Unknown(u32),
    #[error("the data is on the wrong side of the chain for this request type")]
    Direction,
    #[error("{0} bytes of data are not whole sectors, or more than a request may have")]
    Length(usize),
    #[error("{len} bytes at sector {sector} reach beyond the end of the disk")]
    Range { sector: u64, len: usize },
    #[error("the disk is read-only")]
    ReadOnly,
    #[error("{operation} failed")]
    Host {
        operation: &'static str,
        source: io::Error,
    },
}

impl Failure {
    fn status(&self) -> u32 {
        match self {
            Self::Unknown(_) => VIRTIO_BLK_S_UNSUPP,
            _ => VIRTIO_BLK_S_IOERR,
        }
    }
}

/// A request that can be answered.
pub struct Request<'m> {
    buffers: ChainBuffers<'m>,
    status: GuestSlice<'m>,
}

impl<'m> Request<'m> {
    /// The request in `buffers`, or `None` if there is no room for a status.
    pub fn new(mut buffers: ChainBuffers<'m>) -> Option<Self> {
        let status = buffers.writable.split_last()?;
        Some(Self { buffers, status })
    }

    /// Carries out the request and returns the number of bytes written to the front of the
    /// device-writable part of the chain.
    pub fn execute(self, disk: &mut Disk) -> u32 {
        let Self { buffers, status } = self;
        let room = buffers.writable.len();
        let (code, written) = match perform(buffers, disk) {
            Ok(written) => (VIRTIO_BLK_S_OK, written),
            Err(failure) => {
                match &failure {
                    Failure::Host { operation, source } => disk.report(operation, source),
                    failure => debug!(disk = disk.name, %failure, "bad request"),
                }
                (failure.status(), 0)
            }
        };
        status.copy_from(&[code as u8]);
        // The status counts only if nothing before it was left out (virtio 1.2, 2.7.8.2).
        let used = if written == room { room + 1 } else { written };
        used.try_into().unwrap_or(u32::MAX)
    }
}

/// Does what the request says and returns how many bytes of data were written for the driver.
fn perform(buffers: ChainBuffers<'_>, disk: &mut Disk) -> Result<usize, Failure> {
    let ChainBuffers {
        readable: mut output,
        writable: input,
    } = buffers;
    let header: [u8; 16] = output.read_front().ok_or(Failure::Header)?;
    let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
    let sector = u64::from_le_bytes(sector);
    match u32::from_le_bytes([t0, t1, t2, t3]) {
        VIRTIO_BLK_T_IN => {
            check_direction(&output)?;
            let offset = check_range(sector, &input, disk)?;
            disk.image
                .read(&input, offset)
                .map_err(|source| Failure::Host {
                    operation: "read",
                    source,
                })?;
            Ok(input.len())
        }
        VIRTIO_BLK_T_OUT => {
            check_direction(&input)?;
            let offset = check_range(sector, &output, disk)?;
            if disk.readonly() {
                return Err(Failure::ReadOnly);
            }
            disk.image
                .write(&output, offset)
                .map_err(|source| Failure::Host {
                    operation: "write",
                    source,
                })?;
            if disk.writethrough {
                flush(disk)?;
            }
            Ok(0)
        }
        VIRTIO_BLK_T_FLUSH => flush(disk).map(|()| 0),
        VIRTIO_BLK_T_GET_ID => Ok(input.copy_from(&disk.serial)),
        unknown => Err(Failure::Unknown(unknown)),
    }
}

fn flush(disk: &Disk) -> Result<(), Failure> {
    disk.image.flush().map_err(|source| Failure::Host {
        operation: "flush",
        source,
    })
}

fn check_direction(other_side: &Buffers<'_>) -> Result<(), Failure> {
    if other_side.is_empty() {
        Ok(())
    } else {
        Err(Failure::Direction)
    }
}

/// The offset in bytes of a transfer that is known to lie within the disk.
fn check_range(sector: u64, data: &Buffers<'_>, disk: &Disk) -> Result<u64, Failure> {
    let len = data.len();
    let count = len as u64 / SECTOR_SIZE;
    if !(len as u64).is_multiple_of(SECTOR_SIZE) || len > REQUEST_MAX {
        return Err(Failure::Length(len));
    }
    sector
        .checked_add(count)
        .filter(|end| *end <= disk.sectors())
        .and_then(|_| sector.checked_mul(SECTOR_SIZE))
        .ok_or(Failure::Range { sector, len })
}
