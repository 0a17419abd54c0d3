//! A tap in a network of its own.

use std::fs::{File, OpenOptions};
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

/// A tap that stays as long as this value, with an address on the host's side.
pub struct Tap {
    name: String,
    _control: File,
}

impl Tap {
    /// Moves this thread, and the processes that it starts from now on, into a new network that
    /// holds only a loopback interface and this tap with this address (prefix of 24 bits). With
    /// `multi_queue` the tap can have several queues, and must be opened so.
    ///
    /// # Panics
    /// This process may not do so.
    pub fn in_new_network(name: &str, address: Ipv4Addr, multi_queue: bool) -> Self {
        // SAFETY: a network namespace of its own touches no memory and no open descriptor of
        // this thread or others.
        unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }
            .expect("a network namespace, which needs root");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/net/tun")
            .expect("/dev/net/tun");
        let mut request = interface(name);
        // netdevice(7), Documentation/networking/tuntap.rst: a tap with the header that the
        // VMM's card writes.
        let queues = if multi_queue {
            libc::IFF_MULTI_QUEUE
        } else {
            0
        };
        request.ifr_ifru.ifru_flags =
            (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | queues) as libc::c_short;
        ioctl(&file, libc::TUNSETIFF, &mut request).expect("TUNSETIFF");
        // SAFETY: takes a number; the tap stays when its file is closed, until its namespace
        // goes away.
        let kept = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETPERSIST, 1) };
        assert_eq!(kept, 0, "TUNSETPERSIST: {}", io::Error::last_os_error());
        drop(file);

        let control = socket_with(
            AddressFamily::INET,
            SocketType::DGRAM,
            SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        let control = File::from(control);
        let mut request = interface(name);
        for (operation, value) in [
            (libc::SIOCSIFADDR, address),
            (libc::SIOCSIFNETMASK, Ipv4Addr::new(255, 255, 255, 0)),
        ] {
            request.ifr_ifru.ifru_addr = socket_address(value);
            ioctl(&control, operation, &mut request).expect("an address for the tap");
        }
        for name in [name, "lo"] {
            let mut request = interface(name);
            request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
            ioctl(&control, libc::SIOCSIFFLAGS, &mut request).expect("an interface that is up");
        }
        Self {
            name: name.to_owned(),
            _control: control,
        }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }
}

fn interface(name: &str) -> libc::ifreq {
    // SAFETY: ifreq is plain numbers, for which zero is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    assert!(name.len() < request.ifr_name.len());
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    request
}

fn socket_address(address: Ipv4Addr) -> libc::sockaddr {
    // SAFETY: sockaddr_in is plain numbers, for which zero is valid.
    let mut internet: libc::sockaddr_in = unsafe { std::mem::zeroed() };
    internet.sin_family = libc::AF_INET as libc::sa_family_t;
    internet.sin_addr.s_addr = u32::from_ne_bytes(address.octets());
    // SAFETY: both are plain numbers and of one size.
    unsafe { std::mem::transmute(internet) }
}

fn ioctl(file: &File, operation: libc::Ioctl, request: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: the operations used here read and write an ifreq.
    match unsafe { libc::ioctl(file.as_raw_fd(), operation, std::ptr::from_mut(request)) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
