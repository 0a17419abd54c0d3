//! How much of the host's disk one sandbox may take: `io.max` of its cgroup.
//!
//! A limit is one of a whole block device (`Documentation/admin-guide/cgroup-v2.rst` of the kernel).
//! File systems without one, such as a tmpfs, and those that hide theirs, such as btrfs, have none.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// What one sandbox may read of the disk that sandboxes' disks lie on, and as much again what it
/// may write. 0 is no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DiskLimits {
    /// In bytes a second.
    pub bytes_per_sec: u64,
    /// In operations a second.
    pub ops_per_sec: u64,
}

/// A block device: its major and minor number, as in `8:0`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct BlockDevice(String);

impl DiskLimits {
    /// Whether there is a limit.
    pub(super) fn is_some(&self) -> bool {
        *self != Self::default()
    }

    /// The line that sets the limits for `device`.
    pub(super) fn io_max(&self, device: &BlockDevice) -> String {
        let limit = |limit: u64| match limit {
            0 => "max".to_owned(),
            limit => limit.to_string(),
        };
        let (bytes, ops) = (limit(self.bytes_per_sec), limit(self.ops_per_sec));
        let BlockDevice(device) = device;
        format!("{device} rbps={bytes} wbps={bytes} riops={ops} wiops={ops}")
    }
}

impl BlockDevice {
    /// The device that the file system of `path` is on; of a partition, the whole of its disk.
    /// `None` if it is on none.
    pub(super) fn below(path: &Path) -> io::Result<Option<Self>> {
        let device = fs::metadata(path)?.dev();
        let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
        Self::whole(&Path::new("/sys/dev/block").join(format!("{major}:{minor}")))
    }

    /// The device whose directory in sysfs `directory` is, or that it is a partition of.
    fn whole(directory: &Path) -> io::Result<Option<Self>> {
        // The names in /sys/dev/block are links to where the devices are.
        let mut directory = match directory.canonicalize() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            result => result?,
        };
        if directory.join("partition").exists() {
            directory.pop();
        }
        let numbers = fs::read_to_string(directory.join("dev"))?;
        Ok(Some(Self(numbers.trim().to_owned())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_of_reads_and_of_writes() {
        let device = BlockDevice("8:0".to_owned());
        let limits = DiskLimits {
            bytes_per_sec: 1 << 20,
            ops_per_sec: 0,
        };
        assert_eq!(
            limits.io_max(&device),
            "8:0 rbps=1048576 wbps=1048576 riops=max wiops=max"
        );
        assert!(limits.is_some() && !DiskLimits::default().is_some());
    }

    #[test]
    fn a_partition_is_part_of_its_disk() {
        let sys = tempfile::tempdir().unwrap();
        let disk = sys.path().join("devices/disk");
        fs::create_dir_all(disk.join("part1")).unwrap();
        fs::write(disk.join("dev"), "8:0\n").unwrap();
        fs::write(disk.join("part1/dev"), "8:1\n").unwrap();
        fs::write(disk.join("part1/partition"), "1\n").unwrap();
        for (numbers, target) in [("8:0", disk.clone()), ("8:1", disk.join("part1"))] {
            let link = sys.path().join(numbers);
            std::os::unix::fs::symlink(target, &link).unwrap();
            let whole = BlockDevice::whole(&link).unwrap();
            assert_eq!(whole, Some(BlockDevice("8:0".to_owned())), "{numbers}");
        }
        assert_eq!(BlockDevice::whole(&sys.path().join("0:25")).unwrap(), None);
    }

    #[test]
    fn a_file_system_without_a_device_has_none() {
        assert_eq!(BlockDevice::below(Path::new("/proc")).unwrap(), None);
    }
}
