//! How much memory a VMM's process takes beyond what it gives its guest.

use std::{fs, io};

use serde::Serialize;

/// Memory of a process without the guest's, in KiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Overhead {
    /// Resident pages, shared ones counted in full.
    pub rss_kib: u64,
    /// Resident pages, each divided by the number of processes that share it.
    pub pss_kib: u64,
}

/// Why the overhead is not known.
#[derive(Debug, thiserror::Error)]
pub enum OverheadError {
    /// The kernel does not tell.
    #[error("cannot read the process's memory map")]
    Read(#[from] io::Error),
    /// No mapping is as large as the guest's memory.
    #[error("no mapping holds {0} KiB of guest memory, so it cannot be told apart")]
    NoGuestMemory(u64),
}

/// The memory of process `pid` without the guest's `guest_kib`: all mappings but the one that
/// is large enough for the guest's memory.
///
/// # Errors
/// The map cannot be read, or no mapping is that large.
pub fn overhead(pid: u32, guest_kib: u64) -> Result<Overhead, OverheadError> {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    overhead_in(&smaps, guest_kib).ok_or(OverheadError::NoGuestMemory(guest_kib))
}

/// Sums up a map as proc_pid_smaps(5) describes it: `Size:` is the first line of each mapping.
fn overhead_in(smaps: &str, guest_kib: u64) -> Option<Overhead> {
    let mut sum = Overhead {
        rss_kib: 0,
        pss_kib: 0,
    };
    let (mut in_guest_memory, mut found) = (false, false);
    for line in smaps.lines() {
        let Some((key, kib)) = field(line) else {
            continue;
        };
        match key {
            "Size" => {
                // Several views of the same memory count as the guest's, each of them. A
                // reservation that is never touched is as large, and has nothing resident.
                in_guest_memory = kib >= guest_kib;
                found |= in_guest_memory;
            }
            "Rss" if !in_guest_memory => sum.rss_kib += kib,
            "Pss" if !in_guest_memory => sum.pss_kib += kib,
            _ => {}
        }
    }
    found.then_some(sum)
}

/// `Key:   123 kB`.
fn field(line: &str) -> Option<(&str, u64)> {
    let (key, value) = line.split_once(':')?;
    let kib = value.trim().strip_suffix(" kB")?.trim().parse().ok()?;
    Some((key, kib))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
55d0c0000000-55d0c0100000 r-xp 00000000 00:01 7   /usr/bin/vmm: old
Size:               1024 kB
KernelPageSize:        4 kB
Rss:                 900 kB
Pss:                 450 kB
Pss_Dirty:             9 kB
VmFlags: rd ex mr mw me
7f0000000000-7f0010000000 rw-p 00000000 00:00 0
Size:             262144 kB
Rss:              70000 kB
Pss:              70000 kB
7f0020000000-7f0020021000 rw-p 00000000 00:00 0   [heap]
Size:                132 kB
Rss:                 100 kB
Pss:                 100 kB
";

    #[test]
    fn the_guests_memory_is_left_out() {
        assert_eq!(
            overhead_in(SMAPS, 262_144),
            Some(Overhead {
                rss_kib: 1000,
                pss_kib: 550
            })
        );
    }

    #[test]
    fn without_a_mapping_for_the_guest_nothing_is_claimed() {
        assert_eq!(overhead_in(SMAPS, 262_145), None);
        assert_eq!(overhead_in("", 1), None);
    }

    #[test]
    fn a_process_can_read_its_own_map() {
        let overhead = overhead(std::process::id(), 1).unwrap();
        assert_eq!(overhead.rss_kib, 0, "every mapping is at least 1 KiB");
    }
}
