//! Processes under test: started so that none outlives its scenario.

use std::collections::BTreeMap;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};

use crate::PATIENCE;
use crate::log::Log;

/// A running process. Dropping it kills it.
pub struct Process {
    name: String,
    child: Child,
    pidfd: OwnedFd,
    status: Option<ExitStatus>,
    /// What it says on standard error.
    pub stderr: Log,
}

impl Process {
    /// Starts `command`, which inherits the descriptors `inherited` under their numbers.
    ///
    /// # Panics
    /// It cannot be started.
    pub fn spawn(name: &str, mut command: Command, inherited: &[BorrowedFd<'_>]) -> Self {
        use std::os::fd::AsRawFd;
        let numbers: Vec<RawFd> = inherited.iter().map(AsRawFd::as_raw_fd).collect();
        // SAFETY: between fork and exec only async-signal-safe functions may be called, and
        // prctl(2) and fcntl(2) are. The descriptors are borrowed by the caller until after the
        // spawn.
        unsafe {
            command.pre_exec(move || {
                rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
                for &number in &numbers {
                    let descriptor = BorrowedFd::borrow_raw(number);
                    rustix::io::fcntl_setfd(descriptor, rustix::io::FdFlags::empty())?;
                }
                Ok(())
            });
        }
        let mut child = command
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{name} cannot be started: {error}"));
        let pid = Pid::from_child(&child);
        Self {
            name: name.to_owned(),
            pidfd: pidfd_open(pid, PidfdFlags::empty()).expect("a pidfd"),
            stderr: Log::follow(
                &format!("standard error of {name}"),
                child.stderr.take().unwrap(),
            ),
            child,
            status: None,
        }
    }

    /// Its id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Readable once the process has ended.
    pub fn pidfd(&self) -> &OwnedFd {
        &self.pidfd
    }

    /// Sends it a signal.
    ///
    /// # Panics
    /// It is gone.
    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal)
            .unwrap_or_else(|error| panic!("no signal to {}: {error}", self.name));
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// It does not end.
    pub fn wait(&mut self) -> ExitStatus {
        if let Some(status) = self.status {
            return status;
        }
        assert!(
            wait_readable(&[&self.pidfd]).is_some(),
            "{} does not end",
            self.name
        );
        let status = self.child.wait().unwrap();
        self.status = Some(status);
        status
    }

    /// Waits for its end, and returns its exit status.
    ///
    /// # Panics
    /// It does not end, or a signal ends it.
    pub fn exit_code(&mut self) -> i32 {
        let status = self.wait();
        status
            .code()
            .unwrap_or_else(|| panic!("{} was killed by signal {:?}", self.name, status.signal()))
    }

    /// Whether its end has been waited for.
    pub fn has_ended(&self) -> bool {
        self.status.is_some()
    }

    /// The most memory that it has had resident, in KiB.
    pub fn peak_kib(&self) -> u64 {
        peak_kib(self.pid())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.status.is_none() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        if std::thread::panicking() {
            self.stderr.print_tail();
        }
    }
}

/// Waits until one of the descriptors is readable, and returns which; `None` if none gets so.
pub fn wait_readable(descriptors: &[&OwnedFd]) -> Option<usize> {
    let mut polled: Vec<PollFd<'_>> = descriptors
        .iter()
        .map(|descriptor| PollFd::new(*descriptor, PollFlags::IN))
        .collect();
    let patience = Timespec {
        tv_sec: PATIENCE.as_secs().cast_signed(),
        tv_nsec: 0,
    };
    loop {
        match poll(&mut polled, Some(&patience)) {
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => panic!("poll: {error}"),
            Ok(_) => return polled.iter().position(|fd| !fd.revents().is_empty()),
        }
    }
}

/// The most memory that a process has had resident, in KiB.
///
/// # Panics
/// There is no such process.
pub fn peak_kib(pid: u32) -> u64 {
    status_kib(
        &std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap(),
        "VmHWM:",
    )
}

/// Proportional memory of a process in KiB by what is mapped, without mappings as large as a
/// guest's memory.
///
/// # Panics
/// There is no such process.
pub fn overhead_kib(pid: u32) -> BTreeMap<String, u64> {
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let kib = |line: &str| {
        line.split_whitespace()
            .nth(1)
            .unwrap()
            .parse::<u64>()
            .unwrap()
    };
    let mut total = BTreeMap::new();
    let (mut name, mut is_guest) = (String::new(), false);
    for line in smaps.lines() {
        if line.starts_with("Size:") {
            is_guest = kib(line) >= 64 * 1024;
            if name == "anonymous" {
                name = format!("anonymous of {}", kib(line));
            }
        } else if line.starts_with("Pss:") && !is_guest {
            *total.entry(name.clone()).or_default() += kib(line);
        } else if line.as_bytes()[0].is_ascii_hexdigit() && line.contains('-') {
            let path = line.split_whitespace().nth(5).unwrap_or("anonymous");
            path.rsplit('/')
                .next()
                .unwrap_or(path)
                .clone_into(&mut name);
        }
    }
    total.retain(|_, kib| *kib > 0);
    total
}

/// How many descriptors a process has open.
///
/// # Panics
/// There is no such process.
pub fn descriptors_of(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .count()
}

/// A field in KiB of the text of a `/proc/PID/status`.
///
/// # Panics
/// It is not there.
pub fn status_kib(status: &str, field: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix(field));
    let number = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    number.unwrap_or_else(|| panic!("no {field} in {status:?}"))
}

/// The process that runs the guest: `vmm` itself or, if it is jailed, its one child.
///
/// # Panics
/// There is no such process.
pub fn innermost(vmm: u32) -> u32 {
    match children_of(vmm).as_slice() {
        [] => vmm,
        [jailed] => *jailed,
        many => panic!("process {vmm} has several children: {many:?}"),
    }
}

/// Ids of the processes whose parent is `parent`.
pub fn children_of(parent: u32) -> Vec<u32> {
    let children = all().into_iter().filter(|(_, of)| *of == parent);
    children.map(|(pid, _)| pid).collect()
}

/// Ids of the processes that have `text` in their arguments, and whose parent has not.
pub fn with_argument(text: &str) -> Vec<u32> {
    let has = |pid: u32| {
        let arguments = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&arguments).contains(text)
    };
    let found = all().into_iter().filter(|(pid, of)| has(*pid) && !has(*of));
    found.map(|(pid, _)| pid).collect()
}

/// All processes, each with its parent.
fn all() -> Vec<(u32, u32)> {
    let mut processes = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        // A process that ends in between has no file any more.
        let Ok(stat) = std::fs::read_to_string(entry.path().join("stat")) else {
            continue;
        };
        // proc_pid_stat(5): the name, which may hold anything, ends with the last parenthesis.
        let after_name = stat.rsplit_once(')').map(|(_, rest)| rest);
        let ppid = after_name.and_then(|rest| rest.split_whitespace().nth(1)?.parse().ok());
        processes.extend(ppid.map(|ppid| (pid, ppid)));
    }
    processes.sort_unstable();
    processes
}
