//! A cgroup (version 2) for each sandbox: what its processes may take of the host, all together.
//!
//! `Documentation/admin-guide/cgroup-v2.rst` of the kernel describes the files.

use std::fs;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tracing::{info, warn};

use super::disk_limits::{BlockDevice, DiskLimits};
use super::jail::{CgroupParent, JailConfig};
use crate::domain::{PrepareRequest, SandboxId, Shape};

/// The directory below a cgroup of the daemon's that holds those of sandboxes.
const NAME: &str = "microvm-sandbox";

/// What a VMM may take beyond its guest's memory, in bytes: its own, what connections buffer, and
/// page tables of the kernel.
const MEMORY_OVERHEAD: u64 = 128 << 20;

/// The file with the limit of processor time.
const CPU_MAX: &str = "cpu.max";

/// The file with the limit of memory.
const MEMORY_MAX: &str = "memory.max";

/// The type of a tmpfs (linux/magic.h).
const TMPFS_MAGIC: rustix::fs::FsWord = 0x0102_1994;

/// Processes and threads of one VMM.
const MAX_TASKS: u32 = 300;

/// One period of `cpu.max`, in microseconds.
const PERIOD_US: u32 = 100_000;

/// How long processes that have been killed may take to disappear.
const PATIENCE: Duration = Duration::from_secs(10);

/// Where sandboxes have their cgroups.
#[derive(Debug)]
pub(super) struct Cgroups {
    parent: PathBuf,
    /// Disks lie in a file system that is memory. What guests write to them would count as their
    /// VMMs' memory, which could then have no useful limit.
    disks_in_memory: bool,
    /// The line for `io.max`, if there is a limit.
    io_max: Option<String>,
}

/// The cgroup of a sandbox.
#[derive(Debug)]
pub(super) struct Cgroup {
    pub(super) path: PathBuf,
}

impl Cgroups {
    /// Arranges a place for cgroups of sandboxes whose disks lie in `disks`. `None`, and a sentence
    /// in the log, if there is none.
    ///
    /// # Errors
    /// The place that was asked for cannot be used.
    pub(super) fn prepare(jail: &JailConfig, disks: &Path) -> io::Result<Option<Self>> {
        let parent = match &jail.cgroup {
            CgroupParent::None => {
                info!("sandboxes have no cgroups: they were turned off");
                return Ok(None);
            }
            CgroupParent::At(path) => {
                enable_controllers(path)?;
                path.clone()
            }
            CgroupParent::Auto => match below_own() {
                Ok(path) => path,
                Err(error) => {
                    warn!(
                        %error,
                        "sandboxes have no cgroups, and so no limits of memory and CPU time: the \
                         daemon has none of version 2 to divide; run it as root, or as a systemd \
                         service with Delegate=yes"
                    );
                    return Ok(None);
                }
            },
        };
        let disks_in_memory = rustix::fs::statfs(disks)?.f_type == TMPFS_MAGIC;
        if disks_in_memory {
            warn!(
                data_dir = %disks.display(),
                "sandboxes have no limit of memory: their disks are in a tmpfs, and count as memory"
            );
        }
        let io_max = io_max(jail.disk_limits, &parent, disks)?;
        info!(parent = %parent.display(), "sandboxes have cgroups");
        Ok(Some(Self {
            parent,
            disks_in_memory,
            io_max,
        }))
    }

    /// Whether the processor time of sandboxes can be limited.
    pub(super) fn limit_cpu(&self) -> bool {
        let controllers = fs::read_to_string(self.parent.join("cgroup.subtree_control"));
        controllers.is_ok_and(|names| names.split_whitespace().any(|name| name == "cpu"))
    }

    /// Makes the cgroup of a sandbox with its limits, those that the host can keep.
    pub(super) fn create_for(&self, request: &PrepareRequest) -> io::Result<Cgroup> {
        let Shape {
            vcpus, memory_mb, ..
        } = request.shape;
        let limit = request.resources.cpu_limit_percent;
        self.create_with(&request.id, limits(vcpus, memory_mb, limit))
    }

    /// Makes a cgroup with limits for so much, those that the host can keep.
    pub(super) fn create(&self, id: &SandboxId, vcpus: u8, memory_mb: u32) -> io::Result<Cgroup> {
        self.create_with(id, limits(vcpus, memory_mb, None))
    }

    /// Changes the limits of a sandbox that runs. Returns whether its processor time is limited.
    pub(super) fn limit(
        &self,
        id: &SandboxId,
        vcpus: u8,
        memory_mb: u32,
        cpu_limit_percent: Option<u8>,
    ) -> io::Result<bool> {
        let path = self.of(id).path;
        let mut has_cpu_limit = false;
        for (file, limit) in limits(vcpus, memory_mb, cpu_limit_percent) {
            if file == MEMORY_MAX && self.disks_in_memory {
                continue;
            }
            match write(&path.join(file), &limit) {
                Ok(()) => has_cpu_limit |= file == CPU_MAX,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(has_cpu_limit)
    }

    fn create_with(
        &self,
        id: &SandboxId,
        limits: [(&'static str, String); 5],
    ) -> io::Result<Cgroup> {
        let cgroup = self.of(id);
        fs::create_dir(&cgroup.path)?;
        let io_max = self.io_max.iter().map(|line| ("io.max", line.clone()));
        for (file, limit) in limits.into_iter().chain(io_max) {
            if file == MEMORY_MAX && self.disks_in_memory {
                continue;
            }
            match write(&cgroup.path.join(file), &limit) {
                // The controller is not there, or not for this cgroup.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => {
                    let _ = fs::remove_dir(&cgroup.path);
                    return Err(error);
                }
                Ok(()) => {}
            }
        }
        Ok(cgroup)
    }

    /// The cgroup that a sandbox has, if it has one.
    pub(super) fn of(&self, id: &SandboxId) -> Cgroup {
        Cgroup {
            path: self.parent.join(id.as_str()),
        }
    }
}

/// The line for `io.max` of sandboxes below `parent` whose disks lie in `disks`. `None` if there is
/// no limit, or none can be kept, which the log then says.
fn io_max(limits: DiskLimits, parent: &Path, disks: &Path) -> io::Result<Option<String>> {
    if !limits.is_some() {
        return Ok(None);
    }
    let controllers = fs::read_to_string(parent.join("cgroup.controllers"))?;
    let device = BlockDevice::below(disks)?;
    if !controllers.split_whitespace().any(|name| name == "io") {
        warn!("sandboxes have no limit of disk I/O: the host has no controller `io` for them");
        return Ok(None);
    }
    if device.is_none() {
        warn!(
            data_dir = %disks.display(),
            "sandboxes have no limit of disk I/O: their disks are in a file system without a block \
             device of its own, such as a tmpfs or btrfs"
        );
    }
    Ok(device.map(|device| limits.io_max(&device)))
}

/// The files of a sandbox's cgroup that all have, and what is written to them.
fn limits(vcpus: u8, memory_mb: u32, cpu_limit_percent: Option<u8>) -> [(&'static str, String); 5] {
    let memory = (u64::from(memory_mb) << 20) + MEMORY_OVERHEAD;
    let quota = match cpu_limit_percent {
        Some(percent) => u32::from(vcpus) * PERIOD_US / 100 * u32::from(percent.clamp(1, 100)),
        // One more than vCPUs, for the devices.
        None => (u32::from(vcpus) + 1) * PERIOD_US,
    };
    [
        (MEMORY_MAX, memory.to_string()),
        // A VMM without its waiter, or the reverse, is of no use.
        ("memory.oom.group", "1".to_owned()),
        (CPU_MAX, format!("{quota} {PERIOD_US}")),
        ("pids.max", MAX_TASKS.to_string()),
        ("io.weight", "default 100".to_owned()),
    ]
}

/// Writes to a file that must be there: in this file system, none can be made.
fn write(path: &Path, text: &str) -> io::Result<()> {
    fs::OpenOptions::new()
        .write(true)
        .open(path)?
        .write_all(text.as_bytes())
}

impl Cgroup {
    /// Ends what is still in it, and removes it. It may be gone already.
    pub(super) fn remove(&self) -> io::Result<()> {
        match self.remove_existing() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result,
        }
    }

    fn remove_existing(&self) -> io::Result<()> {
        let deadline = Instant::now() + PATIENCE;
        let kill = self.path.join("cgroup.kill");
        match write(&kill, "1") {
            // Linux 5.14. Without it, whoever is in there ends by itself.
            Err(error) if error.kind() == io::ErrorKind::NotFound && self.path.exists() => {}
            result => result?,
        }
        loop {
            // A change of the file after it was opened is told by POLLPRI.
            let events = fs::File::open(self.path.join("cgroup.events"))?;
            let is_empty = io::read_to_string(&events)?
                .lines()
                .any(|line| line == "populated 0");
            if is_empty {
                return fs::remove_dir(&self.path);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            wait_for_change(&events, left)?;
        }
    }
}

fn wait_for_change(file: &impl AsFd, at_most: Duration) -> io::Result<()> {
    let timeout = Timespec {
        tv_sec: at_most.as_secs().cast_signed(),
        tv_nsec: at_most.subsec_nanos().into(),
    };
    let mut fds = [PollFd::new(file, PollFlags::PRI)];
    match poll(&mut fds, Some(&timeout)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// A directory below the daemon's own cgroup for those of sandboxes. A cgroup that divides its
/// resources can have no process, so the daemon moves down too, unless it is in the root.
fn below_own() -> io::Result<PathBuf> {
    let missing = |what| io::Error::new(io::ErrorKind::NotFound, what);
    let membership = fs::read_to_string("/proc/self/cgroup")?;
    let own = membership
        .lines()
        .find_map(|line| line.strip_prefix("0::/"))
        .ok_or_else(|| missing("the daemon is in no cgroup of version 2"))?;
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let root = mount_of_cgroup2(&mounts).ok_or_else(|| missing("none is mounted"))?;
    let own = root.join(own);
    if fs::read_to_string(own.join("cgroup.controllers"))?
        .trim()
        .is_empty()
    {
        return Err(missing("it has no controllers"));
    }
    if own != root {
        let daemon = own.join("daemon");
        make_dir(&daemon)?;
        write(
            &daemon.join("cgroup.procs"),
            &std::process::id().to_string(),
        )?;
    }
    enable_controllers(&own)?;
    let parent = own.join(NAME);
    make_dir(&parent)?;
    enable_controllers(&parent)?;
    Ok(parent)
}

fn make_dir(path: &Path) -> io::Result<()> {
    match fs::create_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        result => result,
    }
}

/// Lets the children of a cgroup have limits, as far as it has the controllers.
fn enable_controllers(cgroup: &Path) -> io::Result<()> {
    let available = fs::read_to_string(cgroup.join("cgroup.controllers"))?;
    for controller in ["cpu", "memory", "pids", "io"] {
        if available.split_whitespace().any(|name| name == controller) {
            write(
                &cgroup.join("cgroup.subtree_control"),
                &format!("+{controller}"),
            )?;
        }
    }
    Ok(())
}

/// Where the hierarchy of version 2 is mounted, by the text of a mountinfo file
/// (proc_pid_mountinfo(5)): the fifth field is the place, and the type follows a dash.
fn mount_of_cgroup2(mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        (after.split(' ').next()? == "cgroup2").then_some(())?;
        Some(PathBuf::from(before.split(' ').nth(4)?))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mount_of_version_2_is_found_among_others() {
        let mounts = "\
            24 1 0:22 / /sys/fs/cgroup ro,nosuid shared:1 - tmpfs tmpfs ro\n\
            25 24 0:23 / /sys/fs/cgroup/cpu rw shared:2 - cgroup cgroup rw,cpu\n\
            26 24 0:24 / /sys/fs/cgroup/unified rw,relatime shared:3 master:1 - cgroup2 c rw\n";
        assert_eq!(
            mount_of_cgroup2(mounts),
            Some("/sys/fs/cgroup/unified".into())
        );
        assert_eq!(mount_of_cgroup2("nonsense\n"), None);
    }

    #[test]
    fn a_cgroup_that_is_gone_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let cgroups = Cgroups {
            parent: dir.path().to_owned(),
            disks_in_memory: false,
            io_max: None,
        };
        cgroups.of(&SandboxId::random()).remove().unwrap();
    }

    #[test]
    fn a_sandbox_may_take_its_share_and_what_its_vmm_needs() {
        let cpu = |percent| std::collections::BTreeMap::from(limits(2, 256, percent));
        assert_eq!(cpu(None)["cpu.max"], "300000 100000");
        assert_eq!(cpu(Some(50))["cpu.max"], "100000 100000");
        assert_eq!(cpu(Some(1))["cpu.max"], "2000 100000");
        assert_eq!(cpu(None)["memory.max"], (384_u64 << 20).to_string());
    }

    #[test]
    fn a_cgroup_belongs_to_one_sandbox() {
        // An ordinary directory has none of the files, as a host without the controllers.
        let dir = tempfile::tempdir().unwrap();
        let cgroups = Cgroups {
            parent: dir.path().to_owned(),
            disks_in_memory: false,
            io_max: None,
        };
        let id = SandboxId::random();
        cgroups.create(&id, 2, 256).unwrap();
        assert!(cgroups.create(&id, 2, 256).is_err());
    }
}
