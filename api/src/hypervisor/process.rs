//! The process of a VMM: a child of this daemon, or one that an earlier daemon has started.
//!
//! One that is no child is held by a pidfd, which goes on meaning the process that it was opened for
//! whatever becomes of the number; and only if that process was started when the one was that is
//! written down. So no signal reaches a process that has got a used number.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::process::ExitStatus;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::process::Child;

/// Tells one boot of this machine from all others.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Tells one process from all others that have had its number, or will.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Its number.
    pid: i32,
    /// When it was started: field 22 of proc_pid_stat(5), in clock ticks since the machine was.
    start_time: u64,
    /// Which boot of the machine that was.
    boot_id: String,
}

impl ProcessId {
    /// Of the process with this number, which has not been waited for.
    pub fn of(pid: i32) -> io::Result<Self> {
        Ok(Self {
            pid,
            start_time: start_time(pid)?,
            boot_id: fs::read_to_string(BOOT_ID)?.trim().to_owned(),
        })
    }

    /// Its number.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Whether it was started at this time, in clock ticks since the machine was.
    pub fn was_started_at(&self, start_time: u64) -> bool {
        self.start_time == start_time
    }

    /// A handle for it; `None` if it has ended.
    pub fn open(&self) -> io::Result<Option<OwnedFd>> {
        let Some(pid) = Some(self.pid)
            .filter(|pid| *pid > 0)
            .and_then(Pid::from_raw)
        else {
            return Ok(None);
        };
        let handle = match pidfd_open(pid, PidfdFlags::NONBLOCK) {
            Ok(handle) => handle,
            Err(rustix::io::Errno::SRCH) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        // Only now: whichever process this is of, the handle is of that one or an earlier one.
        match Self::of(self.pid) {
            // One that has ended has its number until its parent has waited for it.
            Ok(found) if found == *self => Ok((!has_ended(&handle)?).then_some(handle)),
            Ok(_) => Ok(None),
            Err(error) if is_gone(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// Whether the process behind a handle has ended.
fn has_ended(handle: &OwnedFd) -> io::Result<bool> {
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    Ok(poll(&mut [PollFd::new(handle, PollFlags::IN)], Some(&now))? > 0)
}

/// Whether what /proc says means that there is no such process.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

/// When a process was started, in clock ticks since the machine was.
fn start_time(pid: i32) -> io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The second field is the program's name in parentheses, which may have any in itself.
    let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields);
    let time = fields.split_whitespace().nth(22 - 3);
    time.and_then(|time| time.parse().ok())
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "/proc makes no sense"))
}

/// The process of a VMM.
pub enum Process {
    /// It was started by this daemon. If this is dropped, it is killed.
    Child(Child),
    /// It was started by an earlier one. If this is dropped, it runs on.
    Found(AsyncFd<OwnedFd>),
}

impl Process {
    /// The process behind this handle.
    pub fn found(handle: OwnedFd) -> io::Result<Self> {
        // SAFETY: an owned descriptor is the same one as long as it lives, and is not closed before.
        let handle = unsafe { AsyncFd::register_with_interest(handle, Interest::READABLE) }?;
        Ok(Self::Found(handle))
    }

    /// Waits for its end. The status is told to the parent alone: it is `None` of one that was
    /// started by an earlier daemon.
    pub async fn wait(&mut self) -> io::Result<Option<ExitStatus>> {
        match self {
            Self::Child(child) => child.wait().await.map(Some),
            // A pidfd is readable once its process has ended, and stays so; pidfd_open(2).
            Self::Found(handle) => handle.readable().await.map(|_| None),
        }
    }

    /// Sends it a signal, if it has not ended.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        let sent = match self {
            Self::Child(child) => {
                let pid = child.id().and_then(|id| Pid::from_raw(id.cast_signed()));
                // Until it was waited for, its number is its own.
                pid.map_or(Ok(()), |pid| rustix::process::kill_process(pid, signal))
            }
            Self::Found(handle) => pidfd_send_signal(handle.get_ref(), signal),
        };
        match sent {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[tokio::test]
    async fn a_process_is_found_again_and_no_other_that_has_its_number() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let id = ProcessId::of(child.id().cast_signed()).unwrap();
        for other in [
            ProcessId {
                start_time: id.start_time + 1,
                ..id.clone()
            },
            ProcessId {
                boot_id: "another".to_owned(),
                ..id.clone()
            },
            ProcessId {
                pid: -1,
                ..id.clone()
            },
        ] {
            assert!(other.open().unwrap().is_none(), "{other:?}");
        }
        let mut process = Process::found(id.open().unwrap().unwrap()).unwrap();
        process.signal(Signal::KILL).unwrap();
        assert_eq!(process.wait().await.unwrap(), None);
        assert!(id.open().unwrap().is_none());
        child.wait().unwrap();
        process.signal(Signal::KILL).unwrap();
        assert!(id.open().unwrap().is_none());
    }
}
