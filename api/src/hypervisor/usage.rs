//! What machines and this host take, by the files of proc(5).

use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use async_trait::async_trait;
use tracing::debug;

use super::LocalHost;
use super::control::Control;
use super::entry::Entry;
use super::process::ProcessId;
use crate::domain::{
    CardUsage, GuestUsage, HostError, HostHealth, HostUsage, MeterHost, SandboxId, SandboxUsage,
    VmmUsage,
};

/// Size of a block that `stat` counts in, in bytes (inode(7)).
const STAT_BLOCK: u64 = 512;

/// Units that the kernel counts in.
#[derive(Debug, Clone, Copy)]
struct Units {
    /// Microseconds of a clock tick.
    tick_us: u64,
    /// Bytes of a page.
    page: u64,
}

impl Units {
    fn of_this_machine() -> io::Result<Self> {
        let ask = |name| {
            // SAFETY: sysconf(3) takes a number and returns one.
            let value = unsafe { libc::sysconf(name) };
            u64::try_from(value).ok().filter(|value| *value > 0)
        };
        let ticks = ask(libc::_SC_CLK_TCK).ok_or(io::ErrorKind::Unsupported)?;
        let page = ask(libc::_SC_PAGESIZE).ok_or(io::ErrorKind::Unsupported)?;
        Ok(Self {
            tick_us: 1_000_000 / ticks.min(1_000_000),
            page,
        })
    }
}

/// What a process has had, by proc_pid_stat(5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Stat {
    /// In user and kernel mode, in clock ticks.
    cpu: u64,
    /// When it was started, in clock ticks since the machine was.
    start: u64,
    /// Resident pages.
    pages: u64,
}

/// A short file of the kernel, which has no size that could be asked for first.
fn read_short(path: &str) -> io::Result<String> {
    let mut text = String::with_capacity(1024);
    fs::File::open(path)?
        .take(64 << 10)
        .read_to_string(&mut text)?;
    Ok(text)
}

impl Stat {
    fn of(pid: i32) -> io::Result<Self> {
        let text = read_short(&format!("/proc/{pid}/stat"))?;
        Self::parse(&text).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    fn parse(text: &str) -> Option<Self> {
        // The second field is the program's name in parentheses, which may have any in itself.
        let (_, fields) = text.rsplit_once(')')?;
        let fields: Vec<_> = fields.split_whitespace().collect();
        // They are counted from 1, and two are gone.
        let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
        Some(Self {
            cpu: field(14)?.checked_add(field(15)?)?,
            start: field(22)?,
            pages: field(24)?,
        })
    }
}

/// What a VMM takes; `None` if it has ended. A jailed one is two processes, of which the second is a child
/// of the first.
fn of_vmm(process: &ProcessId, disks: &[&Path]) -> io::Result<Option<VmmUsage>> {
    let units = Units::of_this_machine()?;
    let pid = process.pid();
    let gone = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => Ok(None),
        _ if error.raw_os_error() == Some(libc::ESRCH) => Ok(None),
        _ => Err(error),
    };
    let first = match Stat::of(pid) {
        Ok(stat) if process.was_started_at(stat.start) => stat,
        Ok(_) => return Ok(None),
        Err(error) => return gone(error),
    };
    let children = read_short(&format!("/proc/{pid}/task/{pid}/children"));
    let children = children.unwrap_or_default();
    let children = children
        .split_whitespace()
        .filter_map(|pid| pid.parse().ok());
    let all = children
        .filter_map(|pid| Stat::of(pid).ok())
        .fold(first, |sum, stat| Stat {
            cpu: sum.cpu.saturating_add(stat.cpu),
            pages: sum.pages.saturating_add(stat.pages),
            ..sum
        });
    let mut disk_bytes = 0_u64;
    for disk in disks {
        match fs::metadata(disk) {
            Ok(file) => disk_bytes += file.blocks().saturating_mul(STAT_BLOCK),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let now_us = u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000
        + u64::try_from(now.tv_nsec).unwrap_or(0) / 1_000;
    Ok(Some(VmmUsage {
        cpu_us: all.cpu.saturating_mul(units.tick_us),
        age_us: now_us.saturating_sub(first.start.saturating_mul(units.tick_us)),
        memory_bytes: all.pages.saturating_mul(units.page),
        disk_bytes,
    }))
}

/// What is taken of this machine, with what its sandboxes write in `data`.
fn of_host(data: &Path) -> io::Result<HostUsage> {
    let bad = || io::Error::from(io::ErrorKind::InvalidData);
    let units = Units::of_this_machine()?;
    let stat = fs::read_to_string("/proc/stat")?;
    let (cpus, busy, total) = processors(&stat).ok_or_else(bad)?;
    let meminfo = fs::read_to_string("/proc/meminfo")?;
    let memory = |name| memory(&meminfo, name).ok_or_else(bad);
    let disk = rustix::fs::statvfs(data)?;
    let bytes = |blocks: u64| blocks.saturating_mul(disk.f_frsize);
    Ok(HostUsage {
        cpus,
        cpu_busy_us: busy.saturating_mul(units.tick_us),
        cpu_total_us: total.saturating_mul(units.tick_us),
        memory_total: memory("MemTotal:")?,
        memory_available: memory("MemAvailable:")?,
        disk_total: bytes(disk.f_blocks),
        disk_used: bytes(disk.f_blocks.saturating_sub(disk.f_bfree)),
        disk_available: bytes(disk.f_bavail),
    })
}

/// How many processors there are, and the time in ticks that they were not idle, and all of it, by
/// /proc/stat (proc_stat(5)).
fn processors(stat: &str) -> Option<(u32, u64, u64)> {
    let mut lines = stat.lines();
    let times: Vec<u64> = lines
        .next()?
        .strip_prefix("cpu ")?
        .split_whitespace()
        // The time of guests, which follows, is in the first two already.
        .take(8)
        .map(str::parse)
        .collect::<Result<_, _>>()
        .ok()?;
    let total = times
        .iter()
        .try_fold(0_u64, |sum, time| sum.checked_add(*time))?;
    let idle = times.get(3)?.checked_add(*times.get(4)?)?;
    let cpus = lines.take_while(|line| line.starts_with("cpu")).count();
    Some((cpus.try_into().ok()?, total.checked_sub(idle)?, total))
}

/// A line of /proc/meminfo, which counts in KiB, in bytes.
fn memory(meminfo: &str, name: &str) -> Option<u64> {
    let rest = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = rest.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

impl LocalHost {
    /// What the VMM of a sandbox takes; `None` if it has ended.
    fn vmm_usage(&self, id: &SandboxId, entry: &Entry) -> io::Result<Option<VmmUsage>> {
        let paths = &self.inner.config.paths;
        match entry.process.get() {
            Some(process) => of_vmm(process, &[&paths.disk(id), &paths.scratch(id)]),
            None => Ok(None),
        }
    }

    fn running_entries(&self) -> Vec<(SandboxId, Arc<Entry>)> {
        let state = self.inner.state();
        let all = state.sandboxes.iter();
        all.filter(|(_, entry)| entry.is_running())
            .map(|(id, entry)| (id.clone(), Arc::clone(entry)))
            .collect()
    }
}

/// Works on a thread that may block.
async fn blocking<T: Send + 'static>(
    what: &'static str,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T, HostError> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|error| Err(io::Error::other(error)))
        .map_err(|error| HostError::Internal {
            reason: format!("{what} cannot be measured: {error}"),
        })
}

#[async_trait]
impl MeterHost for LocalHost {
    async fn host_usage(&self) -> Result<HostUsage, HostError> {
        let data = self.inner.config.paths.parents()[1].to_owned();
        blocking("the host", move || of_host(&data)).await
    }

    async fn vmm_usages(&self) -> Result<Vec<(SandboxId, VmmUsage)>, HostError> {
        let host = self.clone();
        let measure = move || {
            let mut usages = Vec::new();
            let now = Instant::now();
            for (id, entry) in host.running_entries() {
                entry.agent.close_unused(now);
                match host.vmm_usage(&id, &entry) {
                    Ok(usage) => usages.extend(usage.map(|usage| (id, usage))),
                    Err(error) => debug!(sandbox = %id, %error, "sandbox is not measured"),
                }
            }
            Ok(usages)
        };
        blocking("sandboxes", measure).await
    }

    async fn sandbox_usage(&self, id: &SandboxId) -> Result<SandboxUsage, HostError> {
        let entry = self.running(id)?;
        let control = Control::new(self.inner.config.paths.api(id));
        let guest = entry.unless_interrupted(entry.agent.usage());
        let (guest, counters) = tokio::join!(guest, control.counters());
        let guest: GuestUsage = guest?;
        let counters = counters.map_err(|error| HostError::Internal {
            reason: crate::chain(&error),
        })?;
        let card = counters.values().find_map(|counters| {
            let get = |name: &str| counters.get(name).copied();
            Some(CardUsage {
                received_bytes: get("rx_bytes")?,
                received_frames: get("rx_frames")?,
                sent_bytes: get("tx_bytes")?,
                sent_frames: get("tx_frames")?,
            })
        });
        let disk_size = entry.base.disk_size();
        let (host, of) = (self.clone(), id.clone());
        let vmm = blocking("the sandbox", move || host.vmm_usage(&of, &entry)).await?;
        let vmm = vmm.ok_or_else(|| HostError::NotRunning { id: id.clone() })?;
        Ok(SandboxUsage {
            vmm,
            guest,
            card,
            disk_size,
        })
    }

    async fn health(&self) -> HostHealth {
        self.inner.health().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_of_a_process_are_found_behind_any_name() {
        let text =
            "42 (a) b (c)) S 1 42 42 0 -1 4194560 100 0 0 0 30 12 0 0 20 0 3 0 777 1000 55 1";
        let stat = Stat::parse(text).unwrap();
        assert_eq!((stat.cpu, stat.start, stat.pages), (42, 777, 55));
        assert_eq!(Stat::parse("42 (x) S 1"), None);
        assert_eq!(Stat::parse(""), None);
    }

    #[test]
    fn this_process_takes_something_and_another_with_its_number_does_not() {
        let own = i32::try_from(std::process::id()).unwrap();
        let process = ProcessId::of(own).unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), [1; 8192]).unwrap();
        let usage = of_vmm(&process, &[file.path(), Path::new("/no/such")]);
        let usage = usage.unwrap().unwrap();
        assert!(usage.memory_bytes > 1 << 20 && usage.age_us < 3_600_000_000);
        assert!(usage.disk_bytes >= 8192, "{usage:?}");
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let id = ProcessId::of(child.id().cast_signed()).unwrap();
        child.wait().unwrap();
        assert_eq!(of_vmm(&id, &[]).unwrap(), None);
    }

    #[test]
    fn processors_are_counted_and_idle_time_is_not_work() {
        let stat = "cpu  10 1 4 80 5 0 0 2 9 9\ncpu0 5 1 2 40 2 0 0 1 9 9\ncpu1 5 0 2 40 3 0 0 1 0 0\n\
                    intr 5\n";
        assert_eq!(processors(stat), Some((2, 17, 102)));
        assert_eq!(processors("cpu  1 2 3\n"), None);
        assert_eq!(processors("intr 1\n"), None);
    }

    #[test]
    fn this_host_is_measured() {
        let usage = of_host(&std::env::temp_dir()).unwrap();
        assert!(usage.cpus > 0 && usage.cpu_busy_us < usage.cpu_total_us);
        assert!(usage.memory_available < usage.memory_total);
        assert!(usage.disk_used < usage.disk_total);
    }
}
