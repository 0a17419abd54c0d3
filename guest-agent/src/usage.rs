//! What the guest takes of its memory and its root file system.

use std::fs;
use std::io;

use agent_protocol::Usage;

/// Asks the kernel.
///
/// # Errors
/// It does not tell, or what it tells makes no sense.
pub fn measure() -> io::Result<Usage> {
    let meminfo = fs::read_to_string("/proc/meminfo")?;
    let memory = |name| field(&meminfo, name).ok_or(io::ErrorKind::InvalidData);
    let root = rustix::fs::statvfs("/")?;
    let bytes = |blocks: u64| blocks.saturating_mul(root.f_frsize);
    let stat = fs::read_to_string("/proc/stat")?;
    Ok(Usage {
        cpus: cpus(&stat),
        memory_total: memory("MemTotal:")?,
        memory_available: memory("MemAvailable:")?,
        disk_total: bytes(root.f_blocks),
        disk_used: bytes(root.f_blocks.saturating_sub(root.f_bfree)),
        disk_available: bytes(root.f_bavail),
    })
}

/// How many processors are in use, by /proc/stat: it has a line for each after the one for all.
fn cpus(stat: &str) -> u32 {
    let lines = stat.lines().skip(1);
    let count = lines.take_while(|line| line.starts_with("cpu")).count();
    u32::try_from(count).unwrap_or(u32::MAX)
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
    fn each_processor_has_a_line() {
        assert_eq!(cpus("cpu  1 2\ncpu0 1 2\ncpu2 1 2\nintr 1\ncpu9\n"), 2);
        assert_eq!(cpus(""), 0);
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
