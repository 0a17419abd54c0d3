//! The kernel's announcements of devices (netlink(7), NETLINK_KOBJECT_UEVENT).

use std::{
    io, mem,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    path::Path,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};
use tokio::io::{Interest, unix::AsyncFd};

/// The multicast group in which the kernel itself announces.
const KERNEL_GROUP: u32 = 1;

/// A subscription to announcements.
#[derive(Debug)]
pub struct Uevents(OwnedFd);

impl Uevents {
    /// Subscribes.
    ///
    /// # Errors
    /// Of socket or bind.
    pub fn subscribe() -> io::Result<Self> {
        // SAFETY: takes numbers only.
        let fd = unsafe {
            libc::socket(
                libc::AF_NETLINK,
                libc::SOCK_DGRAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK,
                libc::NETLINK_KOBJECT_UEVENT,
            )
        };
        if fd == -1 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new, and nobody else's.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: sockaddr_nl is plain numbers, for which zero is valid.
        let mut address: libc::sockaddr_nl = unsafe { mem::zeroed() };
        address.nl_family = libc::AF_NETLINK as libc::sa_family_t;
        address.nl_groups = KERNEL_GROUP;
        let len = size_of_val(&address) as libc::socklen_t;
        // SAFETY: the address is valid for its length.
        if unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len) } == -1 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self(socket))
    }

    /// Returns whether `path` exists, once it does or `timeout` is over. The kernel makes the
    /// device's node before it announces the device, so looking again after each announcement
    /// misses nothing; what they say does not matter.
    ///
    /// # Errors
    /// Of waiting.
    pub fn wait_for(&self, path: &Path, timeout: Duration) -> io::Result<bool> {
        let deadline = Instant::now() + timeout;
        while !path.exists() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            let left = Timespec::try_from(left).map_err(io::Error::other)?;
            let mut fds = [PollFd::new(&self.0, PollFlags::IN)];
            match poll(&mut fds, Some(&left)) {
                Ok(_) | Err(Errno::INTR) => self.drain()?,
                Err(e) => return Err(e.into()),
            }
        }
        Ok(true)
    }

    /// Goes on to hand out what is announced from now on.
    ///
    /// # Errors
    /// Of registering the socket with the runtime.
    pub fn listen(self) -> io::Result<Announcements> {
        // SAFETY: an OwnedFd names the same open socket as long as it lives.
        let socket = unsafe { AsyncFd::register_with_interest(self.0, Interest::READABLE)? };
        Ok(Announcements(socket))
    }

    fn drain(&self) -> io::Result<()> {
        let mut announcement = [0u8; 2048];
        loop {
            match rustix::io::read(&self.0, &mut announcement) {
                Ok(_) => {}
                Err(Errno::AGAIN) => return Ok(()),
                // The queue overflowed and announcements were lost: looking again covers them.
                Err(Errno::NOBUFS | Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }
}

/// A subscription whose announcements are looked at.
#[derive(Debug)]
pub struct Announcements(AsyncFd<OwnedFd>);

impl Announcements {
    /// The first line of the next announcement, as `add@/devices/...`, or `None` after some were
    /// lost.
    ///
    /// # Errors
    /// Of reading.
    pub async fn next(&mut self) -> io::Result<Option<String>> {
        loop {
            let mut ready = self.0.readable().await?;
            let mut announcement = [0u8; 2048];
            let read = |fd: &AsyncFd<OwnedFd>| {
                rustix::io::read(fd.get_ref(), &mut announcement).map_err(io::Error::from)
            };
            match ready.try_io(read) {
                Ok(Ok(length)) => {
                    let line = announcement[..length].split(|byte| *byte == 0).next();
                    let line = line.unwrap_or_default();
                    return Ok(Some(String::from_utf8_lossy(line).into_owned()));
                }
                Ok(Err(error)) if error.raw_os_error() == Some(libc::ENOBUFS) => return Ok(None),
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Err(error),
                // Nothing was there after all.
                Err(_) => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_exists_is_found_at_once_and_what_does_not_is_given_up() {
        let uevents = Uevents::subscribe().unwrap();
        assert!(
            uevents
                .wait_for(Path::new("/dev/null"), Duration::ZERO)
                .unwrap()
        );
        let missing = Path::new("/dev/no-such-device");
        assert!(
            !uevents
                .wait_for(missing, Duration::from_millis(20))
                .unwrap()
        );
    }
}
