//! Signals as a descriptor: the owner of the machine takes them between two other things.

use std::io;
use std::mem;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};

/// What a signal asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Received {
    /// The VMM is to end in order (SIGINT, SIGTERM).
    End,
    /// The log is to say what state the machine is in (SIGUSR1).
    Describe,
}

/// SIGINT, SIGTERM and SIGUSR1, which no longer end the process by themselves.
pub struct Signals {
    fd: OwnedFd,
}

impl Signals {
    /// Takes the signals away from the default handlers. Threads started later inherit that, so
    /// it is called before there are any.
    ///
    /// # Errors
    /// The host has no descriptor left.
    pub fn new() -> io::Result<Self> {
        // SAFETY: a zeroed sigset_t is a valid argument for sigemptyset, which initializes it;
        // every pointer is to a live local variable.
        let fd = unsafe {
            let mut set: libc::sigset_t = mem::zeroed();
            libc::sigemptyset(&raw mut set);
            for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGUSR1] {
                libc::sigaddset(&raw mut set, signal);
            }
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
        Ok(Self { fd })
    }

    /// The next signal that has come. One that came several times before it was taken comes once.
    pub fn next(&self) -> Option<Received> {
        let mut info = [0; size_of::<libc::signalfd_siginfo>()];
        // Fails only if there is none.
        let length = rustix::io::read(&self.fd, &mut info).ok()?;
        let number = info.get(..length)?.first_chunk()?;
        // `ssi_signo` comes first (signalfd(2)).
        match u32::from_ne_bytes(*number).cast_signed() {
            libc::SIGUSR1 => Some(Received::Describe),
            _ => Some(Received::End),
        }
    }
}

impl AsFd for Signals {
    /// Readable while there is a signal to take.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_are_taken_one_by_one() {
        // The signals are sent to this thread, which alone has them blocked.
        let signals = Signals::new().unwrap();
        let send = |signal| {
            // SAFETY: sends a signal that this thread has blocked to this thread.
            let result = unsafe { libc::pthread_kill(libc::pthread_self(), signal) };
            assert_eq!(result, 0);
        };
        assert_eq!(signals.next(), None);
        send(libc::SIGUSR1);
        send(libc::SIGUSR1);
        assert_eq!(signals.next(), Some(Received::Describe));
        assert_eq!(signals.next(), None);
        send(libc::SIGTERM);
        assert_eq!(signals.next(), Some(Received::End));
        send(libc::SIGINT);
        assert_eq!(signals.next(), Some(Received::End));
        assert_eq!(signals.next(), None);
    }
}
