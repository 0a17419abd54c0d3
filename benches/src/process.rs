//! A VMM's process: started, waited on together with what it should do, and ended.

use std::{
    fs::{self, File},
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, ExitStatus, Stdio},
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    process::{Pid, PidfdFlags, pidfd_open},
};

use crate::{clock, clock::Moment, interrupt};

/// How much of what a process wrote goes into an error, in bytes from its end.
const OUTPUT_TAIL: usize = 2_000;

/// Why a process could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// No file for its messages.
    #[error("cannot make a file for its messages")]
    Output(#[source] io::Error),
    /// It cannot be run.
    #[error("cannot run {program}")]
    Spawn {
        /// The program.
        program: String,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// It cannot be watched.
    #[error("cannot watch it")]
    Watch(#[source] Errno),
}

/// Why what was waited for did not happen.
#[derive(Debug, thiserror::Error)]
pub enum WaitError {
    /// The process ended first.
    #[error("the process ended first ({status}){}", said(output))]
    Ended {
        /// How it ended.
        status: ExitStatus,
        /// The end of what it wrote.
        output: String,
    },
    /// The time ran out.
    #[error("not within the time limit{}", said(output))]
    TimedOut {
        /// The end of what the process wrote.
        output: String,
    },
    /// A signal came.
    #[error("interrupted by a signal")]
    Interrupted,
    /// The kernel refused to wait.
    #[error("cannot wait")]
    Failed(#[source] io::Error),
}

fn said(output: &str) -> String {
    match output.trim() {
        "" => ", having said nothing".to_owned(),
        output => format!(", having said: {output}"),
    }
}

/// A running process, killed when dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
    pidfd: OwnedFd,
    output: PathBuf,
}

impl Process {
    /// Starts `command` with a pipe for its output and a file in `directory` for its messages.
    ///
    /// # Errors
    /// The file cannot be made or the program cannot be run.
    pub fn start(command: &mut Command, directory: &Path) -> Result<Self, StartError> {
        let output = directory.join("messages");
        let messages = File::create(&output).map_err(StartError::Output)?;
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(messages)
            .spawn()
            .map_err(|source| StartError::Spawn {
                program: command.get_program().to_string_lossy().into_owned(),
                source,
            })?;
        let watch = |mut child: Child| {
            let pidfd = Pid::from_raw(child.id().cast_signed())
                .ok_or(Errno::SRCH)
                .and_then(|pid| pidfd_open(pid, PidfdFlags::empty()));
            match pidfd {
                Ok(pidfd) => Ok((child, pidfd)),
                Err(error) => {
                    let _ = child.kill();
                    let _ = child.wait();
                    Err(StartError::Watch(error))
                }
            }
        };
        let (child, pidfd) = watch(child)?;
        Ok(Self {
            child,
            pidfd,
            output,
        })
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The pipe of its standard output; `None` the second time.
    pub fn take_stdout(&mut self) -> Option<ChildStdout> {
        self.child.stdout.take()
    }

    /// Waits until one of `wanted` can be read, and tells which. One of them comes before the
    /// end of the process if both have happened.
    ///
    /// # Errors
    /// The process ended, `deadline` passed or a signal came first.
    pub fn wait_for(
        &mut self,
        wanted: &[BorrowedFd<'_>],
        deadline: Moment,
    ) -> Result<usize, WaitError> {
        loop {
            if interrupt::interrupted() {
                return Err(WaitError::Interrupted);
            }
            let left = deadline.saturating_sub(clock::now());
            if left.is_zero() {
                let output = self.said();
                return Err(WaitError::TimedOut { output });
            }
            let pidfd = self.pidfd.as_fd();
            let mut polled: Vec<PollFd<'_>> = wanted
                .iter()
                .chain([&pidfd])
                .map(|&fd| PollFd::from_borrowed_fd(fd, PollFlags::IN))
                .collect();
            match poll(&mut polled, Some(&timespec(left))) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(WaitError::Failed(error.into())),
            }
            match polled.iter().position(|fd| !fd.revents().is_empty()) {
                Some(index) if index < wanted.len() => return Ok(index),
                Some(_) => {
                    let status = self.child.wait().map_err(WaitError::Failed)?;
                    let output = self.said();
                    return Err(WaitError::Ended { status, output });
                }
                None => {}
            }
        }
    }

    /// The end of what it wrote to its messages.
    fn said(&self) -> String {
        let output = fs::read(&self.output).unwrap_or_default();
        let tail = &output[output.len().saturating_sub(OUTPUT_TAIL)..];
        String::from_utf8_lossy(tail).trim().to_owned()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn timespec(time: Duration) -> Timespec {
    // Lossless: nobody waits for 2^63 seconds.
    Timespec {
        tv_sec: time.as_secs().cast_signed(),
        tv_nsec: i64::from(time.subsec_nanos()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    fn shell(script: &str) -> (tempfile::TempDir, Process) {
        let directory = tempfile::tempdir().unwrap();
        let process =
            Process::start(Command::new("sh").args(["-c", script]), directory.path()).unwrap();
        (directory, process)
    }

    fn within(time: Duration) -> Moment {
        clock::now() + time
    }

    #[test]
    fn what_is_wanted_comes_before_the_end() {
        let (_directory, mut process) = shell("echo yes");
        let mut stdout = process.take_stdout().unwrap();
        let index = process
            .wait_for(&[stdout.as_fd()], within(Duration::from_secs(60)))
            .unwrap();
        assert_eq!(index, 0);
        let mut text = String::new();
        stdout.read_to_string(&mut text).unwrap();
        assert_eq!(text, "yes\n");
    }

    #[test]
    fn an_early_end_is_told_with_its_status_and_words() {
        let (_directory, mut process) = shell("echo no such disk >&2; exit 3");
        let error = process
            .wait_for(&[], within(Duration::from_secs(60)))
            .unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, WaitError::Ended { status, .. } if status.code() == Some(3)));
        assert!(text.contains("no such disk"), "{text}");
    }

    #[test]
    fn a_silent_process_runs_into_the_time_limit_and_is_killed() {
        let (_directory, mut process) = shell("exec sleep 600");
        let error = process
            .wait_for(&[], within(Duration::from_millis(20)))
            .unwrap_err();
        assert!(matches!(error, WaitError::TimedOut { .. }));
        let id = process.id();
        drop(process);
        assert!(!Path::new(&format!("/proc/{id}")).exists());
    }

    #[test]
    fn a_missing_program_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let error =
            Process::start(&mut Command::new("/no/such/vmm"), directory.path()).unwrap_err();
        assert!(error.to_string().contains("/no/such/vmm"));
    }
}
