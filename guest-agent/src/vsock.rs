//! Stream sockets of AF_VSOCK (vsock(7)).
//!
//! A connected one answers to the same system calls as a connected AF_UNIX stream; only the
//! addresses differ. So connections are handed out as [`UnixStream`], of which nothing that
//! looks at an address may be used.

use std::{
    io, mem,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

use tokio::{
    io::{Interest, unix::AsyncFd},
    net::UnixStream,
};

/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;

/// Accepts connections from the host.
#[derive(Debug)]
pub struct Listener(AsyncFd<OwnedFd>);

impl Listener {
    /// Listens on `port`.
    ///
    /// # Errors
    /// Of socket, bind or listen, such as EAFNOSUPPORT of a kernel without vsock.
    pub fn bind(port: u32) -> io::Result<Self> {
        let socket = socket()?;
        let (address, len) = address(libc::VMADDR_CID_ANY, port);
        // SAFETY: the address is valid for its length.
        check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len) })?;
        // SAFETY: takes numbers only.
        check(unsafe { libc::listen(socket.as_raw_fd(), BACKLOG) })?;
        // SAFETY: an OwnedFd names the same open socket as long as it lives.
        let socket = unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE)? };
        Ok(Self(socket))
    }

    /// The next connection from the host. Connections from elsewhere, such as from a program in
    /// the guest over the loopback transport, are closed: they would reach root's rights.
    ///
    /// # Errors
    /// Of accept, such as too many open files.
    pub async fn accept(&self) -> io::Result<UnixStream> {
        loop {
            let (socket, cid) = self.0.async_io(Interest::READABLE, accept).await?;
            if cid == libc::VMADDR_CID_HOST {
                return stream(socket);
            }
        }
    }
}

/// Connects to `port` of the host.
///
/// # Errors
/// Of connect, such as ECONNRESET if nobody listens there.
pub async fn connect_to_host(port: u32) -> io::Result<UnixStream> {
    let socket = socket()?;
    let (address, len) = address(libc::VMADDR_CID_HOST, port);
    // SAFETY: the address is valid for its length.
    let result =
        check(unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), len) });
    match result {
        Err(e) if e.raw_os_error() != Some(libc::EINPROGRESS) => return Err(e),
        _ => {}
    }
    let stream = stream(socket)?;
    stream.writable().await?;
    match stream.take_error()? {
        Some(error) => Err(error),
        None => Ok(stream),
    }
}

fn socket() -> io::Result<OwnedFd> {
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: takes numbers only.
    let fd = check(unsafe { libc::socket(libc::AF_VSOCK, kind, 0) })?;
    // SAFETY: the descriptor is new, and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn accept(listener: &OwnedFd) -> io::Result<(OwnedFd, u32)> {
    let (mut peer, mut len) = address(0, 0);
    let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: the address is valid for its length, which the kernel does not exceed.
    let fd = check(unsafe {
        libc::accept4(
            listener.as_raw_fd(),
            (&raw mut peer).cast(),
            &raw mut len,
            flags,
        )
    })?;
    // SAFETY: the descriptor is new, and nobody else's.
    Ok((unsafe { OwnedFd::from_raw_fd(fd) }, peer.svm_cid))
}

fn stream(socket: OwnedFd) -> io::Result<UnixStream> {
    UnixStream::from_std(socket.into())
}

fn address(cid: u32, port: u32) -> (libc::sockaddr_vm, libc::socklen_t) {
    // SAFETY: sockaddr_vm is plain numbers, for which zero is valid.
    let mut address: libc::sockaddr_vm = unsafe { mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = cid;
    address.svm_port = port;
    (address, size_of_val(&address) as libc::socklen_t)
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}
