//! A tap of the host, opened for frames with a virtio header in front.
//!
//! The interface is that of the kernel's `Documentation/networking/tuntap.rst` and
//! `linux/if_tun.h`.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use libc::{
    IFF_MULTI_QUEUE, IFF_NO_PI, IFF_TAP, IFF_VNET_HDR, IFNAMSIZ, TUN_F_CSUM, TUN_F_TSO_ECN,
    TUN_F_TSO4, TUN_F_TSO6, TUN_F_UFO, c_int, c_short, c_uint, ifreq, iovec,
};
use vm_memory::bitmap::Bitmap;

use super::HEADER_SIZE;
use crate::devices::virtio::buffers::{Buffers, GuestSlice};

const TUN: &str = "/dev/net/tun";

/// The most pieces of one transfer (`UIO_MAXIOV`).
const MAX_PIECES: usize = 1024;

/// Offloads to ask for, the best first. Kernels that do not know one refuse all of a set.
const OFFLOADS: [c_uint; 4] = [
    TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN | TUN_F_UFO,
    TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN,
    TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6,
    TUN_F_CSUM,
];

/// Why a tap cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// Not a name that an interface can have.
    #[error("{name:?} is no interface name: expected 1 to {} bytes without '/' and '%'", IFNAMSIZ - 1)]
    Name {
        /// The name.
        name: String,
    },
    /// No such interface. It would be made by opening it, but then nobody had configured it.
    #[error(
        "there is no interface {name}: create it, for example with `ip tuntap add {name} mode tap vnet_hdr`"
    )]
    Missing {
        /// The name.
        name: String,
    },
    /// The host has no taps.
    #[error("cannot open {TUN}")]
    Tun(#[source] io::Error),
    /// The interface is no tap, belongs to someone else, or is in use.
    #[error(
        "cannot attach to the tap {name}; it must have been made {} multi_queue",
        if *multi_queue { "with" } else { "without" }
    )]
    Attach {
        /// The name.
        name: String,
        /// Whether it is to have several queues.
        multi_queue: bool,
        /// What the host says.
        #[source]
        source: io::Error,
    },
    /// A descriptor that is not open.
    #[error("descriptor {fd} cannot be used")]
    Descriptor {
        /// The descriptor.
        fd: RawFd,
        /// What the host says.
        #[source]
        source: io::Error,
    },
    /// A descriptor that is not a tap as this device needs it.
    #[error("the descriptor is no tap with the flags IFF_NO_PI and IFF_VNET_HDR")]
    Flags,
    /// The tap refuses a setting.
    #[error("cannot set up the tap: {action}")]
    Setup {
        /// The setting.
        action: &'static str,
        /// What the host says.
        #[source]
        source: io::Error,
    },
}

/// An attached tap. Its descriptor does not block.
#[derive(Debug)]
pub struct Tap {
    fd: OwnedFd,
    /// The offloads that it can hand to the guest, as `TUN_F_*` flags.
    offloads: c_uint,
    /// Those that it hands to the guest now, if that is known.
    current: Option<c_uint>,
    mtu: Option<u16>,
}

impl Tap {
    /// Attaches to the existing tap `name`; with `multi_queue`, to one more queue of it.
    ///
    /// # Errors
    /// There is no such tap, it is in use, or the caller may not use it.
    pub fn open(name: &str, multi_queue: bool) -> Result<Self, TapError> {
        let request = request(name)?;
        if !exists(&request) {
            return Err(TapError::Missing {
                name: name.to_owned(),
            });
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(TUN)
            .map_err(TapError::Tun)?;
        attach(file.as_raw_fd(), request, multi_queue).map_err(|source| TapError::Attach {
            name: name.to_owned(),
            multi_queue,
            source,
        })?;
        Self::from_fd(file.into())
    }

    /// Uses a tap through the open descriptor `fd`, which stays open: a machine that is built anew
    /// needs it again.
    ///
    /// # Errors
    /// It is not open, or not a tap as [`from_fd`](Self::from_fd) needs it.
    pub fn duplicate(fd: RawFd) -> Result<Self, TapError> {
        // SAFETY: F_DUPFD_CLOEXEC takes a number and writes to no memory; it fails on a descriptor
        // that is not open.
        let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) };
        check(copy).map_err(|source| TapError::Descriptor { fd, source })?;
        // SAFETY: the descriptor was just made, and belongs to nobody else.
        Self::from_fd(unsafe { OwnedFd::from_raw_fd(copy) })
    }

    /// Takes over a tap that is already attached, with the flags `IFF_TAP`, `IFF_NO_PI` and
    /// `IFF_VNET_HDR`.
    ///
    /// # Errors
    /// It is not such a tap.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, TapError> {
        let request = attached(fd.as_raw_fd()).map_err(|_| TapError::Flags)?;
        let wanted = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
        // SAFETY: TUNGETIFF has set the flags, and any bits are a valid c_short.
        let flags = c_int::from(unsafe { request.ifr_ifru.ifru_flags });
        if flags & wanted != wanted {
            return Err(TapError::Flags);
        }
        let setup = |action| move |source| TapError::Setup { action, source };
        set_nonblocking(fd.as_raw_fd()).map_err(setup("non-blocking mode"))?;
        let size = HEADER_SIZE as c_int;
        // SAFETY: the descriptor is open, and TUNSETVNETHDRSZ only reads an int.
        check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETVNETHDRSZ as _, &raw const size) })
            .map_err(setup("size of the virtio header"))?;
        let mut tap = Self {
            fd,
            offloads: 0,
            current: None,
            mtu: mtu(request),
        };
        tap.offloads = OFFLOADS
            .into_iter()
            .find(|offloads| tap.set_offloads(*offloads).is_ok())
            .unwrap_or(0);
        tap.set_offloads(0).map_err(setup("no offloads"))?;
        Ok(tap)
    }

    /// A datagram socket in place of a tap.
    #[cfg(any(test, fuzzing))]
    #[allow(clippy::unwrap_used, reason = "for tests and fuzz targets only")]
    pub fn fake(fd: OwnedFd) -> Self {
        set_nonblocking(fd.as_raw_fd()).unwrap();
        Self {
            fd,
            offloads: 0,
            current: Some(0),
            mtu: None,
        }
    }

    /// The offloads that the tap can hand to the guest, as `TUN_F_*` flags.
    pub fn offloads(&self) -> c_uint {
        self.offloads
    }

    /// The largest payload of a frame, if the host tells.
    pub fn mtu(&self) -> Option<u16> {
        self.mtu
    }

    /// Says what work the receiver of frames is ready to do itself, as `TUN_F_*` flags.
    ///
    /// # Errors
    /// The kernel does not know the flags, or not in this combination.
    pub fn set_offloads(&mut self, offloads: c_uint) -> io::Result<()> {
        if self.current == Some(offloads) {
            return Ok(());
        }
        let value = libc::c_ulong::from(offloads);
        // SAFETY: the descriptor is open, and TUNSETOFFLOAD takes its argument by value.
        check(unsafe { libc::ioctl(self.fd.as_raw_fd(), libc::TUNSETOFFLOAD as _, value) })?;
        self.current = Some(offloads);
        Ok(())
    }

    /// Receives one frame with its header into `buffers`. `None` if it did not fit: it is lost.
    ///
    /// # Errors
    /// `WouldBlock` if there is no frame, or what else the host says.
    pub fn receive(&self, buffers: &Buffers<'_>) -> io::Result<Option<usize>> {
        // A frame that does not fit is cut off without a word, so one byte more is offered.
        let mut trap = 0_u8;
        let guards: Vec<_> = buffers
            .slices()
            .take(MAX_PIECES - 1)
            .map(GuestSlice::ptr_guard_mut)
            .collect();
        let mut pieces: Vec<_> = guards
            .iter()
            .map(|guard| iovec {
                iov_base: guard.as_ptr().cast(),
                iov_len: guard.len(),
            })
            .collect();
        let room: usize = pieces.iter().map(|piece| piece.iov_len).sum();
        pieces.push(iovec {
            iov_base: (&raw mut trap).cast(),
            iov_len: 1,
        });
        let count = pieces.len() as c_int;
        let received = retry(|| {
            // SAFETY: every piece is memory that may be written: guest memory, which the guards
            // keep mapped, and the trap. Nobody holds references to either.
            unsafe { libc::readv(self.fd.as_raw_fd(), pieces.as_ptr(), count) }
        })?;
        if received == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut rest = received.min(room);
        for slice in buffers.slices() {
            let here = rest.min(slice.len());
            slice.bitmap().mark_dirty(0, here);
            rest -= here;
        }
        Ok((received <= room).then_some(received))
    }

    /// Sends one frame with its header.
    ///
    /// # Errors
    /// The host does not take the frame.
    pub fn send(&self, buffers: &Buffers<'_>) -> io::Result<()> {
        let guards: Vec<_> = buffers.slices().map(GuestSlice::ptr_guard).collect();
        let pieces: Vec<_> = guards
            .iter()
            .map(|guard| iovec {
                iov_base: guard.as_ptr().cast_mut().cast(),
                iov_len: guard.len(),
            })
            .collect();
        let count = pieces.len() as c_int;
        retry(|| {
            // SAFETY: every piece is guest memory, which the guards keep mapped, and writev only
            // reads it.
            unsafe { libc::writev(self.fd.as_raw_fd(), pieces.as_ptr(), count) }
        })
        .map(drop)
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

pub(super) fn check(result: c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

fn retry(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(count) => return Ok(count),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

/// An interface request for `name`.
pub(super) fn request(name: &str) -> Result<ifreq, TapError> {
    let bytes = name.as_bytes();
    // The kernel makes up a number for '%'.
    let fits = (1..IFNAMSIZ).contains(&bytes.len());
    if !fits || bytes.iter().any(|byte| matches!(byte, 0 | b'/' | b'%')) {
        return Err(TapError::Name {
            name: name.to_owned(),
        });
    }
    // SAFETY: all zeros are a valid ifreq.
    let mut request: ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(bytes) {
        *to = *from as libc::c_char;
    }
    Ok(request)
}

fn exists(request: &ifreq) -> bool {
    // SAFETY: the name ends in a zero, since it is shorter than its array.
    unsafe { libc::if_nametoindex(request.ifr_name.as_ptr()) != 0 }
}

pub(super) fn attach(fd: RawFd, mut request: ifreq, multi_queue: bool) -> io::Result<()> {
    let queues = if multi_queue { IFF_MULTI_QUEUE } else { 0 };
    request.ifr_ifru.ifru_flags = (IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | queues) as c_short;
    // SAFETY: the descriptor is open, and TUNSETIFF takes an ifreq.
    check(unsafe { libc::ioctl(fd, libc::TUNSETIFF as _, &raw mut request) })
}

/// Name and flags of an attached tap.
fn attached(fd: RawFd) -> io::Result<ifreq> {
    // SAFETY: all zeros are a valid ifreq.
    let mut request: ifreq = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open, and TUNGETIFF fills in an ifreq.
    check(unsafe { libc::ioctl(fd, libc::TUNGETIFF as _, &raw mut request) })?;
    Ok(request)
}

fn set_nonblocking(fd: RawFd) -> io::Result<()> {
    // SAFETY: the descriptor is open, and neither call takes a pointer.
    unsafe {
        let flags = libc::fcntl(fd, libc::F_GETFL);
        check(flags)?;
        check(libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK))
    }
}

fn mtu(mut request: ifreq) -> Option<u16> {
    // SAFETY: the call takes no pointer; the result is checked before it is owned.
    let socket = unsafe {
        let fd = libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0);
        (fd >= 0).then(|| OwnedFd::from_raw_fd(fd))?
    };
    // SAFETY: the descriptor is open, SIOCGIFMTU reads the name from an ifreq and writes the MTU
    // to it, and any bits are a valid int.
    let mtu = unsafe {
        let result = libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFMTU as _, &raw mut request);
        (result == 0).then_some(request.ifr_ifru.ifru_mtu)?
    };
    u16::try_from(mtu).ok()
}
