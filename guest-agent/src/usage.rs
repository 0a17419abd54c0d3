//! What the guest takes of its memory and its root file system.

use std::fs;
use std::io::{self, Read};

use agent_protocol::Usage;

/// CPUs that are in use, as ranges (Documentation/ABI/stable/sysfs-devices-system-cpu).
const ONLINE: &str = "/sys/devices/system/cpu/online";

/// Asks the kernel, which has all of it at hand: nothing here waits for a disk.
///
/// # Errors
/// It does not tell, or what it tells makes no sense.
pub fn measure() -> io::Result<Usage> {
    let meminfo = read_short("/proc/meminfo")?;
    let memory = |name| field(&meminfo, name).ok_or(io::ErrorKind::InvalidData);
    let root = rustix::fs::statvfs("/")?;
    let bytes = |blocks: u64| blocks.saturating_mul(root.f_frsize);
    let online = read_short(ONLINE)?;
    Ok(Usage {
        cpus: cpus(&online).ok_or(io::ErrorKind::InvalidData)?,
        memory_total: memory("MemTotal:")?,
        memory_available: memory("MemAvailable:")?,
        disk_total: bytes(root.f_blocks),
        disk_used: bytes(root.f_blocks.saturating_sub(root.f_bfree)),
        disk_available: bytes(root.f_bavail),
    })
}

/// A short file of the kernel, which has no size that could be asked for first.
fn read_short(path: &str) -> io::Result<String> {
    let mut text = String::with_capacity(4096);
    fs::File::open(path)?
        .take(64 << 10)
        .read_to_string(&mut text)?;
    Ok(text)
}

/// How many CPUs a list such as `0-3,5` has.
fn cpus(list: &str) -> Option<u32> {
    let ranges = list.trim().split(',').filter(|range| !range.is_empty());
    ranges.into_iter().try_fold(0_u32, |sum, range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last) = (first.parse::<u32>().ok()?, last.parse::<u32>().ok()?);
        sum.checked_add(last.checked_sub(first)?.checked_add(1)?)
    })
}

/// A line of /proc/meminfo, which counts in KiB, in bytes.
fn field(meminfo: &str, name: &str) -> Option<u64> {
    let rest = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = rest.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_of_processors_are_counted() {
        assert_eq!(cpus("0\n"), Some(1));
        assert_eq!(cpus("0-3,5,7-8\n"), Some(7));
        for bad in ["x\n", "3-1", "0-", "0-4294967295"] {
            assert_eq!(cpus(bad), None, "{bad}");
        }
        assert!(measure().unwrap().cpus > 0);
    }

    #[test]
    fn lines_are_found_by_their_whole_name() {
        let text = "MemTotal:        1024 kB\nMemAvailable:  7 kB\nHugePages_Total:  0\n";
        assert_eq!(field(text, "MemTotal:"), Some(1 << 20));
        assert_eq!(field(text, "MemAvailable:"), Some(7 << 10));
        assert_eq!(field(text, "HugePages_Total:"), None);
        assert_eq!(field(text, "MemFree:"), None);
    }
}
