//! SIGINT and SIGTERM as a descriptor of the event loop: the machine is ended in order.

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use event_manager::{EventOps, Events, MutEventSubscriber};
use vmm_sys_util::epoll::EventSet;

use crate::exit::{ExitReason, ExitSignal};

/// Ends the machine on SIGINT and SIGTERM.
pub struct Signals {
    fd: OwnedFd,
    exit: ExitSignal,
}

impl Signals {
    /// Takes the signals away from the default handlers. Threads started later inherit that, so
    /// it is called before there are any.
    ///
    /// # Errors
    /// The host has no descriptor left.
    pub fn new(exit: ExitSignal) -> io::Result<Self> {
        // SAFETY: a zeroed sigset_t is a valid argument for sigemptyset, which initializes it;
        // every pointer is to a live local variable.
        let fd = unsafe {
            let mut set: libc::sigset_t = mem::zeroed();
            libc::sigemptyset(&raw mut set);
            libc::sigaddset(&raw mut set, libc::SIGINT);
            libc::sigaddset(&raw mut set, libc::SIGTERM);
            let result =
                libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
            if result != 0 {
                return Err(io::Error::from_raw_os_error(result));
            }
            libc::signalfd(-1, &raw const set, libc::SFD_NONBLOCK | libc::SFD_CLOEXEC)
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: signalfd has just returned this descriptor, and nobody else has it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self { fd, exit })
    }
}

impl MutEventSubscriber for Signals {
    fn process(&mut self, _events: Events, ops: &mut EventOps) {
        self.exit.end(ExitReason::Requested);
        // Level-triggered and left unread: one signal is enough.
        let _ = ops.remove(Events::empty_raw(self.fd.as_raw_fd()));
    }

    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = ops.add(Events::new_raw(self.fd.as_raw_fd(), EventSet::IN)) {
            tracing::error!(%error, "SIGINT and SIGTERM cannot be watched");
        }
    }
}
