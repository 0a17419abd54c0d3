//! A root file system that fills its disk: one on a disk that is larger than its image was grows as it
//! is mounted.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

/// `_IOW('f', 16, __u64)` of `fs/ext4/ext4.h`: makes a mounted ext4 have so many blocks.
const EXT4_IOC_RESIZE_FS: libc::Ioctl = 0x4008_6610_u32 as libc::Ioctl;
/// `_IOR(0x12, 114, size_t)` of `linux/fs.h`: size of a block device in bytes.
const BLKGETSIZE64: libc::Ioctl = 0x8008_1272_u32 as libc::Ioctl;
/// The type of ext2, ext3 and ext4 (linux/magic.h).
const EXT4_MAGIC: rustix::fs::FsWord = 0xef53;
/// What may be left of a disk, in bytes. The kernel makes no group of blocks that has no room for more
/// than its own tables, and images are made in whole MiB.
const SLACK: u64 = 16 << 20;

/// Makes the file system that is mounted at `at` as large as its device. Returns its new size, in bytes,
/// as `statfs` tells it; `None` if there was nothing to do.
///
/// # Errors
/// It is as large as it was, or the kernel has stopped half way, at a size that is as good.
pub fn grow(device: &Path, at: &Path) -> io::Result<Option<u64>> {
    let mounted = File::open(at)?;
    let stat = rustix::fs::fstatfs(&mounted)?;
    if stat.f_type != EXT4_MAGIC {
        return Ok(None);
    }
    let size = device_size(&File::open(device)?)?;
    let block = u64::try_from(stat.f_bsize).unwrap_or(0);
    let Some(blocks) = wanted(size, block, stat.f_blocks) else {
        return Ok(None);
    };
    // SAFETY: the request reads a number of 64 bits, which lives as long as the call.
    let done = unsafe { libc::ioctl(mounted.as_raw_fd(), EXT4_IOC_RESIZE_FS, &raw const blocks) };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    let grown = rustix::fs::fstatfs(&mounted)?.f_blocks;
    Ok((grown > stat.f_blocks).then_some(grown.saturating_mul(block)))
}

/// How many blocks a file system is to have on a device of `size` bytes; `None` if it has as many
/// already, or nearly.
fn wanted(size: u64, block: u64, has: u64) -> Option<u64> {
    let blocks = size.checked_div(block)?;
    // What `statfs` tells is without the tables of the file system: about 1.6 % of an ext4. If they take
    // more, the kernel is asked for what it has done, and does nothing.
    let grows = blocks.saturating_sub(has).checked_mul(block)? > SLACK + size / 32;
    grows.then_some(blocks)
}

fn device_size(device: &File) -> io::Result<u64> {
    let mut size = 0_u64;
    // SAFETY: the request writes a number of 64 bits, which lives as long as the call.
    match unsafe { libc::ioctl(device.as_raw_fd(), BLKGETSIZE64, &raw mut size) } {
        0 => Ok(size),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn it_grows_if_it_is_worth_it() {
        let blocks = |mib: u64| mib * MIB / 4096;
        assert_eq!(
            wanted(10_240 * MIB, 4096, blocks(500)),
            Some(blocks(10_240))
        );
        // Its own tables, and the rest of the last group.
        assert_eq!(wanted(512 * MIB, 4096, blocks(500)), None);
        assert_eq!(wanted(512 * MIB, 4096, blocks(512)), None);
        assert_eq!(wanted(512 * MIB, 4096, blocks(1024)), None);
        assert_eq!(wanted(512 * MIB, 0, 1), None);
        assert_eq!(wanted(u64::MAX, 1, 0), Some(u64::MAX));
    }

    #[test]
    fn what_is_no_ext4_or_no_device_is_left_alone() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(device_size(file.as_file()).is_err());
        assert!(
            grow(Path::new("/proc/version"), Path::new("/proc"))
                .unwrap()
                .is_none()
        );
    }
}
