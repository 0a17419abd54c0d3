//! The agent's side of a terminal (pty(7)).

use std::{io, os::fd::OwnedFd};

use agent_protocol::TerminalSize;
use rustix::{
    fs::{Gid, Mode, Uid},
    pty::OpenptFlags,
    termios::{InputModes, OptionalActions, Winsize},
};
use tokio::io::unix::AsyncFd;

/// The side of a terminal on which one types and sees. Dropping it hangs the terminal up.
#[derive(Debug)]
pub struct Terminal(AsyncFd<OwnedFd>);

impl Terminal {
    /// A terminal of this size, and the side of it that programs read and write, which belongs to
    /// this user and group.
    ///
    /// # Errors
    /// The guest has no terminals, or no more.
    pub fn open(size: TerminalSize, uid: u32, gid: u32) -> io::Result<(Self, OwnedFd)> {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let ours = rustix::pty::openpt(flags)?;
        rustix::pty::unlockpt(&ours)?;
        let theirs = rustix::pty::ioctl_tiocgptpeer(&ours, flags)?;
        if rustix::process::geteuid().is_root() {
            let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
            rustix::fs::fchown(&theirs, Some(uid), Some(gid))?;
            rustix::fs::fchmod(&theirs, Mode::from_raw_mode(0o620))?;
        }
        let mut modes = rustix::termios::tcgetattr(&theirs)?;
        // An erase takes a whole character away.
        modes.input_modes |= InputModes::IUTF8;
        rustix::termios::tcsetattr(&theirs, OptionalActions::Now, &modes)?;
        rustix::io::ioctl_fionbio(&ours, true)?;
        // SAFETY: an OwnedFd names the same open file as long as it lives.
        let terminal = Self(unsafe { AsyncFd::register(ours)? });
        terminal.resize(size)?;
        Ok((terminal, theirs))
    }

    /// Changes the size, which the processes in the foreground are told by SIGWINCH.
    ///
    /// # Errors
    /// Of ioctl.
    pub fn resize(&self, size: TerminalSize) -> io::Result<()> {
        let size = Winsize {
            ws_col: size.cols,
            ws_row: size.rows,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        Ok(rustix::termios::tcsetwinsize(&self.0, size)?)
    }

    /// What was written to it; 0 bytes once no program has it open.
    ///
    /// # Errors
    /// Of read.
    pub async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let mut ready = self.0.readable().await?;
            match ready.try_io(|fd| Ok(rustix::io::read(fd, &mut *buffer)?)) {
                Ok(Err(error)) if error.raw_os_error() == Some(libc::EIO) => return Ok(0),
                Ok(result) => return result,
                Err(_) => {}
            }
        }
    }

    /// How many bytes can be read at once.
    pub fn waiting(&self) -> u64 {
        // A terminal that has been hung up holds nothing.
        rustix::io::ioctl_fionread(&self.0).unwrap_or(0)
    }

    /// Types `bytes`; waits while nobody reads what was typed.
    ///
    /// # Errors
    /// Of write.
    pub async fn write(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let mut ready = self.0.writable().await?;
            if let Ok(written) = ready.try_io(|fd| Ok(rustix::io::write(fd, bytes)?)) {
                bytes = &bytes[written?..];
            }
        }
        Ok(())
    }
}
