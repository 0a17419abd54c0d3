//! Taps: the host's ends of sandboxes' network cards.
//!
//! A tap lives as long as a descriptor of it is open, and no longer: those of a daemon and of VMMs
//! that were killed are gone with them.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

const TUN: &str = "/dev/net/tun";

/// An open tap that nobody has used yet.
#[derive(Debug)]
pub struct Tap {
    /// The descriptor that a VMM reads and writes frames by, with a virtio header in front.
    pub file: OwnedFd,
    /// Its name.
    pub name: String,
    /// Its number.
    pub index: u32,
}

/// Makes a tap whose name is `pattern`, with the first free number for `%d` in it.
pub fn open(pattern: &str) -> io::Result<Tap> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(TUN)?;
    // SAFETY: ifreq is plain numbers, for which zero is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if pattern.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(pattern.bytes()) {
        *to = from.cast_signed();
    }
    // As `vmm` needs it: Documentation/networking/tuntap.rst of the kernel.
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    ioctl(&file, libc::TUNSETIFF as _, &mut request)?;
    let name: Vec<u8> = request
        .ifr_name
        .iter()
        .take_while(|byte| **byte != 0)
        .map(|byte| byte.cast_unsigned())
        .collect();
    // SAFETY: the name ends in a zero, since the kernel has written it.
    let index = unsafe { libc::if_nametoindex(request.ifr_name.as_ptr()) };
    if index == 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(Tap {
        file: file.into(),
        name: String::from_utf8_lossy(&name).into_owned(),
        index,
    })
}

fn ioctl(file: &File, operation: libc::Ioctl, request: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: the descriptor is open, and TUNSETIFF reads and writes an ifreq.
    match unsafe { libc::ioctl(file.as_raw_fd(), operation, std::ptr::from_mut(request)) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
