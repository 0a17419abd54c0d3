//! Starting a program: fork, set up the child, execve.
//!
//! Everything that allocates happens before the fork. The child then only makes system calls,
//! because the parent may have had other threads, whose locks nobody would release in the child.
//! It reports the step that failed and its errno through a pipe; execve closes the pipe, so that
//! its end without a report means that the program runs.

use std::{
    ffi::{CString, c_char, c_int, c_void},
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd, RawFd},
};

use rustix::{
    pipe::{PipeFlags, pipe_with},
    process::Pid,
};
use tokio::net::unix::pipe::Receiver;

/// Everything that a child needs.
#[derive(Debug)]
pub struct Plan {
    /// Paths to try in turn, as execvp(3) does.
    pub programs: Vec<CString>,
    /// Arguments, the program's name included.
    pub argv: Vec<CString>,
    /// Environment, as `NAME=value`.
    pub env: Vec<CString>,
    /// Directories to try in turn.
    pub cwd: Vec<CString>,
    /// User id, group id and all group ids to take on. `None` keeps the agent's.
    pub credentials: Option<(u32, u32, Vec<u32>)>,
    /// Standard input, output and error.
    pub stdio: [OwnedFd; 3],
    /// Whether standard input is a terminal that is to control the session.
    pub terminal: bool,
    /// The list of processes of the cgroup to enter.
    pub cgroup: Option<File>,
}

/// What a child does between fork and execve, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Step {
    /// Entering the cgroup.
    Cgroup = 1,
    /// Making a session, connecting the standard streams, resetting signals.
    Setup,
    /// Taking on the user and groups.
    Credentials,
    /// Entering the working directory.
    Cwd,
    /// Executing the program.
    Exec,
}

/// A failed start.
#[derive(Debug)]
pub struct Failure {
    /// At which step; `None` in the agent itself.
    pub step: Option<Step>,
    /// Why.
    pub error: io::Error,
}

impl Failure {
    fn own(error: impl Into<io::Error>) -> Self {
        Self {
            step: None,
            error: error.into(),
        }
    }
}

/// A child that has not reported yet.
#[derive(Debug)]
pub struct Launch {
    /// The child.
    pub pid: Pid,
    report: Receiver,
}

/// Forks a child that carries out `plan`.
///
/// # Errors
/// Of pipe or fork.
pub fn fork(plan: Plan) -> Result<Launch, Failure> {
    let (report, child_report) = pipe_with(PipeFlags::CLOEXEC).map_err(Failure::own)?;
    rustix::io::ioctl_fionbio(&report, true).map_err(Failure::own)?;
    let report = Receiver::from_owned_fd(report).map_err(Failure::own)?;

    let argv = pointers(&plan.argv);
    let env = pointers(&plan.env);
    let child = Child {
        plan: &plan,
        argv: &argv,
        env: &env,
        report: child_report.as_fd().as_raw_fd(),
    };
    // SAFETY: fork has no preconditions. The child's side only runs `Child::run`, which makes
    // nothing but async-signal-safe system calls and never returns.
    match unsafe { libc::fork() } {
        -1 => Err(Failure::own(io::Error::last_os_error())),
        0 => child.run(),
        pid => match Pid::from_raw(pid) {
            Some(pid) => Ok(Launch { pid, report }),
            None => Err(Failure::own(io::Error::other(
                "fork returned no process id",
            ))),
        },
    }
}

impl Launch {
    /// Returns when the program runs.
    ///
    /// # Errors
    /// The step that failed. The child has ended or is about to.
    pub async fn started(&self) -> Result<(), Failure> {
        let mut report = [0u8; 5];
        loop {
            self.report.readable().await.map_err(Failure::own)?;
            // The child writes all five bytes at once, and a pipe keeps such a write together.
            match self.report.try_read(&mut report) {
                Ok(0) => return Ok(()),
                Ok(5) => break,
                Ok(_) => {
                    return Err(Failure::own(io::Error::other(
                        "the child's report is cut off",
                    )));
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(Failure::own(e)),
            }
        }
        let [step, errno @ ..] = report;
        Err(Failure {
            step: [
                Step::Cgroup,
                Step::Setup,
                Step::Credentials,
                Step::Cwd,
                Step::Exec,
            ]
            .into_iter()
            .find(|s| *s as u8 == step),
            error: io::Error::from_raw_os_error(i32::from_ne_bytes(errno)),
        })
    }
}

/// The array of pointers, ended by a null pointer, that execve takes. It is valid as long as
/// `strings` is.
fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    strings
        .iter()
        .map(|s| s.as_ptr())
        .chain([std::ptr::null()])
        .collect()
}

/// The child's side. Its methods only make system calls: they must not allocate, lock or panic.
struct Child<'a> {
    plan: &'a Plan,
    argv: &'a [*const c_char],
    env: &'a [*const c_char],
    report: RawFd,
}

impl Child<'_> {
    fn run(&self) -> ! {
        let (step, errno) = self.prepare_and_exec();
        let mut report = [0u8; 5];
        report[0] = step as u8;
        report[1..].copy_from_slice(&errno.to_ne_bytes());
        // SAFETY: the buffer is valid for its length; _exit ends the child without running
        // handlers that belong to the parent. The parent takes a missing report for success of
        // a program that then exits with 127, which is as near as it can get.
        unsafe {
            libc::write(self.report, report.as_ptr().cast::<c_void>(), report.len());
            libc::_exit(127)
        }
    }

    fn prepare_and_exec(&self) -> (Step, c_int) {
        if let Some(cgroup) = &self.plan.cgroup
            && let Err(errno) = join_cgroup(cgroup.as_raw_fd())
        {
            return (Step::Cgroup, errno);
        }
        if let Err(errno) = self.detach() {
            return (Step::Setup, errno);
        }
        if let Some((uid, gid, groups)) = &self.plan.credentials
            && let Err(errno) = become_user(*uid, *gid, groups)
        {
            return (Step::Credentials, errno);
        }
        if let Err(errno) = enter_first(&self.plan.cwd) {
            return (Step::Cwd, errno);
        }
        (Step::Exec, self.exec_first())
    }

    /// Own session, standard streams, default signals, and no other descriptors after execve.
    fn detach(&self) -> Result<(), c_int> {
        // SAFETY: plain system calls on descriptors that the plan owns; `set` is initialized by
        // sigemptyset before it is used.
        unsafe {
            check(libc::setsid())?;
            for (fd, target) in self.plan.stdio.iter().zip(0..) {
                check(libc::dup2(fd.as_raw_fd(), target))?;
            }
            if self.plan.terminal {
                check(libc::ioctl(0, libc::TIOCSCTTY, 0))?;
            }
            // Rust's runtime ignores SIGPIPE, and an ignored signal stays ignored across execve.
            if libc::signal(libc::SIGPIPE, libc::SIG_DFL) == libc::SIG_ERR {
                return Err(errno());
            }
            let mut set = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
            check(libc::sigemptyset(set.as_mut_ptr()))?;
            check(libc::sigprocmask(
                libc::SIG_SETMASK,
                set.as_ptr(),
                std::ptr::null_mut(),
            ))?;
            libc::umask(0o022);
            // All are opened with O_CLOEXEC; this covers what was inherited from whoever started
            // the agent. An old kernel without the call is no reason to fail.
            libc::syscall(
                libc::SYS_close_range,
                3,
                libc::c_uint::MAX,
                libc::CLOSE_RANGE_CLOEXEC,
            );
        }
        Ok(())
    }

    /// Tries the programs in turn; returns the errno that says most.
    fn exec_first(&self) -> c_int {
        let mut result = libc::ENOENT;
        for program in &self.plan.programs {
            // SAFETY: program is a C string, and argv and env are arrays of such, ended by null,
            // that live as long as the plan.
            unsafe { libc::execve(program.as_ptr(), self.argv.as_ptr(), self.env.as_ptr()) };
            match errno() {
                libc::ENOENT | libc::ENOTDIR => {}
                libc::EACCES => result = libc::EACCES,
                other => return other,
            }
        }
        result
    }
}

fn join_cgroup(procs: RawFd) -> Result<(), c_int> {
    // SAFETY: the buffer is valid for one byte. "0" stands for the process that writes.
    match unsafe { libc::write(procs, b"0".as_ptr().cast::<c_void>(), 1) } {
        1 => Ok(()),
        _ => Err(errno()),
    }
}

/// Groups first: afterwards the right to set them is gone. The system calls are made directly,
/// as the C library's functions would change all threads of the parent that it still knows of.
fn become_user(uid: u32, gid: u32, groups: &[u32]) -> Result<(), c_int> {
    // SAFETY: the list is valid for its length; the others take numbers.
    unsafe {
        check_long(libc::syscall(
            libc::SYS_setgroups,
            groups.len(),
            groups.as_ptr(),
        ))?;
        check_long(libc::syscall(libc::SYS_setresgid, gid, gid, gid))?;
        check_long(libc::syscall(libc::SYS_setresuid, uid, uid, uid))
    }
}

fn enter_first(directories: &[CString]) -> Result<(), c_int> {
    let mut result = Err(libc::ENOENT);
    for directory in directories {
        // SAFETY: the path is a C string.
        result = check(unsafe { libc::chdir(directory.as_ptr()) });
        if result.is_ok() {
            break;
        }
    }
    result
}

fn check(result: c_int) -> Result<(), c_int> {
    if result == -1 { Err(errno()) } else { Ok(()) }
}

fn check_long(result: libc::c_long) -> Result<(), c_int> {
    if result == -1 { Err(errno()) } else { Ok(()) }
}

fn errno() -> c_int {
    // SAFETY: the pointer to the thread's errno is always valid.
    unsafe { *libc::__errno_location() }
}
