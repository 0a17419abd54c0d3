//! Puts to use what the host adds to the running guest.
//!
//! Memory the kernel takes into use by itself, once it was told to. CPUs it only announces.

use std::{
    fs::{self, DirEntry, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
};

use super::uevent::Uevents;
use crate::log::{info, warning};

const SYSFS: &str = "/sys";
/// What the kernel announces when a CPU was added, up to the CPU's number.
const CPU_ADDED: &str = "add@/devices/system/cpu/cpu";

/// Lets memory come into use as it is added, and all that was added already. What can be moved is
/// preferred for it, as long as that leaves enough to the kernel, so that it can be taken away
/// again. A kernel without memory hotplug knows nothing of all this.
pub fn online_memory() {
    online_memory_in(Path::new(SYSFS));
}

fn online_memory_in(sysfs: &Path) {
    let memory = sysfs.join("devices/system/memory");
    let policy = sysfs.join("module/memory_hotplug/parameters/online_policy");
    for (file, value) in [
        (policy, "auto-movable"),
        (memory.join("auto_online_blocks"), "online"),
    ] {
        if file.exists() {
            set(&file, value);
        }
    }
    for block in numbered(&memory, "memory") {
        set_if(&block.join("state"), "offline", "online");
    }
}

/// Brings every CPU into use that is there. The kernel may have left them for now: while it boots it interrupts all
/// that are in use hundreds of times, which more vCPUs than the host has CPUs keep it waiting for.
///
/// # Errors
/// The kernel's announcements of CPUs that come later cannot be read.
pub fn online_cpus() -> io::Result<Uevents> {
    // Before the look at what is there, so that none is missed.
    let uevents = Uevents::subscribe();
    online_cpus_in(Path::new(SYSFS), None);
    uevents
}

/// Brings CPUs into use as they are added.
///
/// # Errors
/// The kernel's announcements cannot be read.
pub async fn online_added_cpus(uevents: Uevents) -> io::Result<()> {
    // Bringing a CPU up takes a while.
    let bring_up = |cpu| async move {
        let _ = tokio::task::spawn_blocking(move || online_cpus_in(Path::new(SYSFS), cpu)).await;
    };
    let mut announcements = uevents.listen()?;
    loop {
        match announcements.next().await? {
            Some(text) => {
                if let Some(cpu) = added_cpu(&text) {
                    bring_up(Some(cpu)).await;
                }
            }
            None => bring_up(None).await,
        }
    }
}

/// The number of the CPU that an announcement says was added.
fn added_cpu(announcement: &str) -> Option<u32> {
    announcement.strip_prefix(CPU_ADDED)?.parse().ok()
}

/// Brings a CPU into use, or all.
fn online_cpus_in(sysfs: &Path, cpu: Option<u32>) {
    let cpus = sysfs.join("devices/system/cpu");
    let found = match cpu {
        Some(cpu) => vec![cpus.join(format!("cpu{cpu}"))],
        None => numbered(&cpus, "cpu"),
    };
    for cpu in found {
        // The first CPU cannot be taken out of use, and so has no such file.
        set_if(&cpu.join("online"), "0", "1");
    }
}

/// The directories of these names with a number behind, in the order of their numbers.
fn numbered(directory: &Path, prefix: &str) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(directory) else {
        return Vec::new();
    };
    let number = |entry: &DirEntry| -> Option<u32> {
        let name = entry.file_name();
        name.to_str()?.strip_prefix(prefix)?.parse().ok()
    };
    let mut found: Vec<_> = entries
        .filter_map(Result::ok)
        .filter_map(|entry| Some((number(&entry)?, entry.path())))
        .collect();
    found.sort_unstable();
    found.into_iter().map(|(_, path)| path).collect()
}

fn set_if(file: &Path, current: &str, value: &str) {
    if fs::read_to_string(file).is_ok_and(|content| content.trim() == current) && set(file, value) {
        info!("{}: {value}", file.display());
    }
}

fn set(file: &Path, value: &str) -> bool {
    let written = OpenOptions::new()
        .write(true)
        .open(file)
        .and_then(|mut file| file.write_all(value.as_bytes()));
    if let Err(error) = &written {
        warning!("cannot write {value} to {}: {error}", file.display());
    }
    written.is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn make(root: &Path, files: &[(&str, &str)]) {
        for (name, content) in files {
            let file = root.join(name);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, content).unwrap();
        }
    }

    fn content(root: &Path, name: &str) -> String {
        fs::read_to_string(root.join(name)).unwrap()
    }

    #[test]
    fn offline_memory_and_what_comes_later_are_put_to_use() {
        let sysfs = tempfile::tempdir().unwrap();
        let root = sysfs.path();
        online_memory_in(root);
        assert_eq!(fs::read_dir(root).unwrap().count(), 0, "nothing is made");

        let memory = "devices/system/memory";
        let policy = "module/memory_hotplug/parameters/online_policy";
        let files = [
            "auto_online_blocks",
            "memory0/state",
            "memory32/state",
            "power/state",
        ];
        let [auto, first, added, other] = files.map(|file| format!("{memory}/{file}"));
        make(
            root,
            &[
                (policy, "contig-zones\n"),
                (&auto, "offline\n"),
                (&first, "online\n"),
                (&added, "offline\n"),
                (&other, "offline\n"),
            ],
        );
        online_memory_in(root);
        assert!(content(root, policy).starts_with("auto-movable"));
        assert!(content(root, &auto).starts_with("online"));
        assert!(content(root, &first).starts_with("online\n"));
        assert!(content(root, &added).starts_with("online"));
        assert!(content(root, &other).starts_with("offline"));
    }

    #[test]
    fn added_cpus_are_put_to_use() {
        let sysfs = tempfile::tempdir().unwrap();
        let root = sysfs.path();
        let [one, two, three] = [1, 2, 3].map(|cpu| format!("devices/system/cpu/cpu{cpu}/online"));
        make(root, &[(&one, "0\n"), (&two, "1\n"), (&three, "0\n")]);
        make(root, &[("devices/system/cpu/cpu0/topology/die_id", "0\n")]);
        make(root, &[("devices/system/cpu/cpuidle/online", "0\n")]);

        online_cpus_in(root, Some(3));
        assert_eq!(content(root, &one), "0\n");
        assert!(content(root, &three).starts_with('1'));
        online_cpus_in(root, None);
        assert!(content(root, &one).starts_with('1'));
        assert_eq!(content(root, "devices/system/cpu/cpuidle/online"), "0\n");
    }

    #[test]
    fn announcements_of_cpus_are_told_from_others() {
        assert_eq!(added_cpu("add@/devices/system/cpu/cpu12"), Some(12));
        for other in [
            "remove@/devices/system/cpu/cpu12",
            "add@/devices/system/cpu/cpufreq",
            "add@/devices/system/cpu/cpu1/cache",
            "",
        ] {
            assert_eq!(added_cpu(other), None, "{other}");
        }
    }
}
