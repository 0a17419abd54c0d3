//! The process that stays outside of the PID namespace, since only a child can be in a new one.
//!
//! To whoever started the VMM it *is* the VMM: it has the process id that they know, passes their
//! signals on, and ends as the VMM ends, by the same status or the same signal. It is jailed like
//! the VMM, keeps no descriptor but standard error, and its own filter leaves it a handful of
//! system calls.
//!
//! ```text
//!           SIGTERM, SIGINT, SIGUSR1, SIGUSR2: passed on
//!              ┌───┐
//!              ▼   │        VMM ended
//!   fork ──► waiting ──────────────────────► ends likewise
//!              │                              ▲
//!              │ SIGHUP, SIGQUIT              │ VMM ended
//!              └──────────► VMM killed ───────┘ (ends by the signal)
//! ```
//!
//! SIGQUIT is how to end the VMM at once and still know that nothing of it is left when its
//! process id is gone. If the waiter itself is killed, the kernel kills the VMM.

use std::ffi::c_int;
use std::io::{self, PipeReader, PipeWriter};
use std::mem;
use std::os::fd::{AsRawFd, RawFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Signal, set_parent_process_death_signal};

use super::seccomp::{self, ThreadKind};
use super::{JailError, check, step};

/// Signals that are for the VMM.
const PASSED_ON: [c_int; 4] = [libc::SIGTERM, libc::SIGINT, libc::SIGUSR1, libc::SIGUSR2];

/// Signals that end the VMM at once. By default they would end the waiter alone.
const DEADLY: [c_int; 2] = [libc::SIGHUP, libc::SIGQUIT];

/// The parent of the VMM.
pub(super) struct Waiter {
    child: libc::pid_t,
    signals: libc::sigset_t,
    /// The VMM sees this end close.
    keep: PipeWriter,
}

/// Forks. Returns `None` in the child, which is the VMM. Its parent has to confine itself as the
/// VMM does, and then to [wait](Waiter::wait).
pub(super) fn fork() -> Result<Option<Waiter>, JailError> {
    let failed = "start the first process of the namespace";
    // Its writing end lives as long as the waiter.
    let (alive, keep) = io::pipe().map_err(step(failed))?;
    let signals = signals();
    // SAFETY: all zeros are a valid sigset_t.
    let mut before: libc::sigset_t = unsafe { mem::zeroed() };
    // From before the fork, so that the waiter misses none.
    // SAFETY: the pointers are to live variables.
    let result =
        unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const signals, &raw mut before) };
    if result != 0 {
        return Err(step(failed)(io::Error::from_raw_os_error(result)));
    }
    // SAFETY: the process has one thread, so that its child is whole.
    let child = check(unsafe { libc::fork() }).map_err(step(failed))?;
    if child != 0 {
        return Ok(Some(Waiter {
            child,
            signals,
            keep,
        }));
    }
    drop(keep);
    // SAFETY: the pointer is to a live variable.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, std::ptr::null_mut()) };
    // After all changes of identity, each of which would clear it; giving up capabilities does not
    // (`commit_creds` of the kernel).
    set_parent_process_death_signal(Some(Signal::KILL)).map_err(step("die with its waiter"))?;
    if has_ended(&alive) {
        let gone = io::Error::from(io::ErrorKind::BrokenPipe);
        return Err(step("die with its waiter")(gone));
    }
    Ok(None)
}

impl Waiter {
    /// The waiter's life.
    pub(super) fn wait(self) -> ! {
        wait(self.child, &self.signals, self.keep.as_raw_fd())
    }
}

/// Whether the waiter was gone before the kernel was told to tell of its end.
fn has_ended(alive: &PipeReader) -> bool {
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let mut fds = [PollFd::new(alive, PollFlags::IN)];
    !matches!(poll(&mut fds, Some(&now)), Ok(0))
}

fn signals() -> libc::sigset_t {
    // SAFETY: all zeros are a valid argument of sigemptyset, which initializes it; the pointer is
    // to a live variable.
    unsafe {
        let mut set: libc::sigset_t = mem::zeroed();
        libc::sigemptyset(&raw mut set);
        for signal in PASSED_ON.into_iter().chain(DEADLY).chain([libc::SIGCHLD]) {
            libc::sigaddset(&raw mut set, signal);
        }
        set
    }
}

fn wait(child: libc::pid_t, signals: &libc::sigset_t, keep: RawFd) -> ! {
    close_all_but(keep);
    unmap_code();
    if let Err(error) = seccomp::apply_now(ThreadKind::Waiter { child }) {
        say(&format!("vmm: {}\n", crate::error_chain(&error)));
        // SAFETY: ends this process, and so the VMM.
        unsafe { libc::_exit(1) }
    }
    let mut deadly = None;
    loop {
        let mut status = 0;
        // SAFETY: the pointer is to a live variable.
        let ended = unsafe { libc::waitpid(child, &raw mut status, libc::WNOHANG) };
        if ended == child {
            match deadly {
                Some(signal) => die(signal),
                None => end_likewise(status),
            }
        }
        // SAFETY: the set is initialized, and no information on the signal is asked for.
        let signal = unsafe { libc::sigwaitinfo(signals, std::ptr::null_mut()) };
        let passed_on = if DEADLY.contains(&signal) {
            deadly = Some(signal);
            libc::SIGKILL
        } else if PASSED_ON.contains(&signal) {
            signal
        } else {
            // The child has changed its state, or a signal was lost.
            continue;
        };
        // SAFETY: the child has not been waited for, so that its id is still its own.
        unsafe { libc::kill(child, passed_on) };
    }
}

/// Takes the code that the process has run so far, and its constants, out of its page table. It has read the command
/// line and opened what the VMM needs, and runs none of that again; what it does run is mapped anew
/// when it gets there.
fn unmap_code() {
    unsafe extern "C" fn of_object(
        info: *mut libc::dl_phdr_info,
        _size: libc::size_t,
        _data: *mut libc::c_void,
    ) -> c_int {
        // SAFETY: dl_iterate_phdr passes a valid pointer, to program headers that are mapped as
        // long as the object is, and this program unloads none.
        let (base, headers) = unsafe {
            let info = &*info;
            let count = usize::from(info.dlpi_phnum);
            (
                info.dlpi_addr,
                std::slice::from_raw_parts(info.dlpi_phdr, count),
            )
        };
        let page = crate::memory::PAGE_SIZE;
        for header in headers {
            if header.p_type != libc::PT_LOAD || header.p_flags & libc::PF_W != 0 {
                continue;
            }
            let start = base.wrapping_add(header.p_vaddr);
            let end = start.wrapping_add(header.p_memsz).next_multiple_of(page);
            let start = start / page * page;
            // SAFETY: the segment is mapped from its file and has never been written to, as it is
            // not writable and has no relocations: the kernel finds the same bytes there again. It
            // refuses what is no file, such as the vDSO.
            unsafe {
                libc::madvise(
                    start as *mut libc::c_void,
                    (end - start) as usize,
                    libc::MADV_DONTNEED,
                )
            };
        }
        0
    }
    // SAFETY: the callback only reads what it is given.
    unsafe { libc::dl_iterate_phdr(Some(of_object), std::ptr::null_mut()) };
}

/// Closes all descriptors but standard error and `keep`.
fn close_all_but(keep: RawFd) {
    let mut first = 0;
    let mut kept = [libc::STDERR_FILENO, keep];
    kept.sort_unstable();
    for fd in kept {
        if first < fd {
            // SAFETY: nothing in this process uses any of them again.
            unsafe { libc::close_range(first as u32, fd as u32 - 1, 0) };
        }
        first = fd + 1;
    }
    // SAFETY: as above.
    unsafe { libc::close_range(first as u32, u32::MAX, 0) };
}

fn end_likewise(status: c_int) -> ! {
    if libc::WIFSIGNALED(status) {
        let signal = libc::WTERMSIG(status);
        if signal == libc::SIGSYS {
            say(
                "vmm: killed by SIGSYS: a thread made a system call that its filter forbids; \
                 the kernel's log has its number (type=1326, syscall=)\n",
            );
        }
        die(signal);
    }
    // SAFETY: ends this process, which has nothing to clean up.
    unsafe { libc::_exit(libc::WEXITSTATUS(status)) }
}

/// Ends this process by a signal.
fn die(signal: c_int) -> ! {
    // SAFETY: the set is initialized by sigemptyset, every pointer is to a live variable, and
    // the default action needs no handler.
    unsafe {
        let mut set: libc::sigset_t = mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, signal);
        libc::signal(signal, libc::SIG_DFL);
        libc::kill(libc::getpid(), signal);
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, std::ptr::null_mut());
        // Only a signal whose default is not to end a process leads here.
        libc::_exit(1)
    }
}

fn say(text: &str) {
    // SAFETY: the pointer and length are those of a live string. What cannot be written is lost.
    unsafe { libc::write(libc::STDERR_FILENO, text.as_ptr().cast(), text.len()) };
}
