//! One request of the driver (virtio 1.2, 5.2.6): a header of 16 bytes, the data, and a status
//! byte that is the last device-writable byte of the chain.
//!
//! How the driver splits these over descriptors is its own affair (2.7.4.3). Whatever is wrong
//! with a request that has room for a status is reported there.

use std::io;
use std::time::Instant;

use tracing::debug;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::disk::Disk;
use super::{MAX_SEGMENTS, SECTOR_SIZE, SEGMENT_SECTORS, SEGMENT_SIZE};
use crate::devices::virtio::buffers::{Buffers, ChainBuffers, GuestSlice};

/// Why a request is completed with an error status.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("the header is incomplete")]
    Header,
    #[error("request type {0} is unknown, or was not offered")]
    Unknown(u32),
    #[error("flags {0:#x} are not supported for this request type")]
    Flags(u32),
    #[error("the data is on the wrong side of the chain for this request type")]
    Direction,
    #[error("{0} bytes of data are not whole sectors, or more than a request may have")]
    Length(usize),
    #[error("{0} bytes are not whole segments, or more than a request may have")]
    Segments(usize),
    #[error("{len} bytes at sector {sector} reach beyond the end of the disk")]
    Range { sector: u64, len: u64 },
    #[error("a segment of {0} sectors is more than was offered")]
    SegmentLength(u32),
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
            Self::Unknown(_) | Self::Flags(_) => VIRTIO_BLK_S_UNSUPP,
            _ => VIRTIO_BLK_S_IOERR,
        }
    }
}

/// Turns the host's answer into a request's.
fn host<T>(operation: &'static str, result: io::Result<T>) -> Result<T, Failure> {
    result.map_err(|source| Failure::Host { operation, source })
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
    pub fn execute(self, disk: &Disk) -> u32 {
        let Self { buffers, status } = self;
        let room = buffers.writable.len();
        let (code, written) = match perform(buffers, disk) {
            Ok(written) => (VIRTIO_BLK_S_OK, written),
            Err(failure) => {
                match &failure {
                    Failure::Host { operation, source } => disk.report(operation, source),
                    failure => debug!(disk = disk.name(), %failure, "bad request"),
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
fn perform(buffers: ChainBuffers<'_>, disk: &Disk) -> Result<usize, Failure> {
    let ChainBuffers {
        readable: mut output,
        writable: input,
    } = buffers;
    let header: [u8; 16] = output.read_front().ok_or(Failure::Header)?;
    let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
    let sector = u64::from_le_bytes(sector);
    let kind = u32::from_le_bytes([t0, t1, t2, t3]);
    let counters = disk.counters();
    match kind {
        VIRTIO_BLK_T_IN => {
            check_direction(&output)?;
            let offset = check_transfer(sector, &input, disk)?;
            let start = Instant::now();
            host("read", disk.image().read(&input, offset))?;
            counters.read.count(input.len(), start.elapsed());
            Ok(input.len())
        }
        VIRTIO_BLK_T_OUT => {
            check_direction(&input)?;
            let offset = check_transfer(sector, &output, disk)?;
            check_writable(disk)?;
            let start = Instant::now();
            host("write", disk.image().write(&output, offset))?;
            settle(disk)?;
            counters.write.count(output.len(), start.elapsed());
            Ok(0)
        }
        VIRTIO_BLK_T_FLUSH => {
            let start = Instant::now();
            host("flush", disk.image().flush())?;
            counters.flush.count(0, start.elapsed());
            Ok(0)
        }
        VIRTIO_BLK_T_GET_ID => Ok(input.copy_from(disk.serial())),
        VIRTIO_BLK_T_DISCARD if disk.discards() => {
            check_direction(&input)?;
            let start = Instant::now();
            let segments = Segment::read_all(output, disk, 0)?;
            for segment in &segments {
                let (offset, len) = segment.bytes();
                host("discard", disk.image().discard(offset, len))?;
            }
            let total: u64 = segments.iter().map(|segment| segment.bytes().1).sum();
            counters.discard.count(total, start.elapsed());
            Ok(0)
        }
        VIRTIO_BLK_T_WRITE_ZEROES if !disk.readonly() => {
            check_direction(&input)?;
            let start = Instant::now();
            let segments = Segment::read_all(output, disk, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP)?;
            for segment in &segments {
                let (offset, len) = segment.bytes();
                let unmap = segment.flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
                let give_back = unmap && disk.discards();
                host(
                    "writing zeros",
                    disk.image().write_zeroes(offset, len, give_back),
                )?;
            }
            settle(disk)?;
            let total: u64 = segments.iter().map(|segment| segment.bytes().1).sum();
            counters.write_zeroes.count(total, start.elapsed());
            Ok(0)
        }
        unknown => Err(Failure::Unknown(unknown)),
    }
}

/// Makes a write durable, if the driver relies on that.
fn settle(disk: &Disk) -> Result<(), Failure> {
    if disk.writethrough() {
        host("flush", disk.image().flush())
    } else {
        Ok(())
    }
}

fn check_direction(other_side: &Buffers<'_>) -> Result<(), Failure> {
    if other_side.is_empty() {
        Ok(())
    } else {
        Err(Failure::Direction)
    }
}

fn check_writable(disk: &Disk) -> Result<(), Failure> {
    if disk.readonly() {
        Err(Failure::ReadOnly)
    } else {
        Ok(())
    }
}

/// The offset in bytes of a transfer that is known to lie within the disk.
fn check_transfer(sector: u64, data: &Buffers<'_>, disk: &Disk) -> Result<u64, Failure> {
    let len = data.len();
    if !(len as u64).is_multiple_of(SECTOR_SIZE) || len > disk.request_max() {
        return Err(Failure::Length(len));
    }
    check_range(sector, len as u64, disk)
}

/// The offset in bytes of `len` bytes, whole sectors, that are known to lie within the disk.
fn check_range(sector: u64, len: u64, disk: &Disk) -> Result<u64, Failure> {
    sector
        .checked_add(len / SECTOR_SIZE)
        .filter(|end| *end <= disk.sectors())
        .and_then(|_| sector.checked_mul(SECTOR_SIZE))
        .ok_or(Failure::Range { sector, len })
}

/// A part of the disk to discard or to make zero. It lies within the disk.
struct Segment {
    offset: u64,
    sectors: u32,
    flags: u32,
}

impl Segment {
    fn bytes(&self) -> (u64, u64) {
        (self.offset, u64::from(self.sectors) * SECTOR_SIZE)
    }

    /// All segments of a request, or what is wrong with the first bad one. Before any of them is
    /// acted on, all are known to be good.
    fn read_all(
        mut data: Buffers<'_>,
        disk: &Disk,
        known_flags: u32,
    ) -> Result<Vec<Self>, Failure> {
        let len = data.len();
        if data.is_empty() || !len.is_multiple_of(SEGMENT_SIZE) {
            return Err(Failure::Segments(len));
        }
        if len > MAX_SEGMENTS as usize * SEGMENT_SIZE {
            return Err(Failure::Segments(len));
        }
        let mut segments = Vec::new();
        while let Some(bytes) = data.read_front::<SEGMENT_SIZE>() {
            let [sector @ .., s0, s1, s2, s3, f0, f1, f2, f3] = bytes;
            let sector = u64::from_le_bytes(sector);
            let sectors = u32::from_le_bytes([s0, s1, s2, s3]);
            let flags = u32::from_le_bytes([f0, f1, f2, f3]);
            if flags & !known_flags != 0 {
                return Err(Failure::Flags(flags));
            }
            if sectors > SEGMENT_SECTORS {
                return Err(Failure::SegmentLength(sectors));
            }
            let offset = check_range(sector, u64::from(sectors) * SECTOR_SIZE, disk)?;
            if sectors == 0 {
                continue;
            }
            segments.push(Self {
                offset,
                sectors,
                flags,
            });
        }
        Ok(segments)
    }
}
