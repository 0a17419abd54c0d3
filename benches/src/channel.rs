//! The way to a guest's vsock ports and from them, for either kind of VMM.
//!
//! Our VMM has the host's side as UNIX sockets: a guest's connection to port P of the host
//! arrives at `<socket>_P`, and a connection to a guest's port starts with the line `CONNECT P`
//! at `<socket>`, which is answered by `OK` and a number. QEMU leaves the host's side to the
//! kernel (vhost), so there it is AF_VSOCK (vsock(7)). A connected socket of either kind answers
//! to the same system calls, so both are handed out as [`UnixStream`], of which nothing that
//! looks at an address may be used.

use std::{
    io::{self, Read, Write},
    mem,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    time::Duration,
};

/// The longest answer to `CONNECT` that makes sense, in bytes.
const MAX_CONNECT_ANSWER: usize = 32;

/// Where the host's side of a guest's vsock device is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Channel {
    /// A VMM's UNIX socket.
    Unix(PathBuf),
    /// The kernel's AF_VSOCK; the guest has this context id.
    Vsock(u32),
}

impl Channel {
    /// Listens for the guest's connections to `port` of the host.
    ///
    /// # Errors
    /// The socket is in use, or this kernel has no vsock.
    pub fn listen(&self, port: u32) -> io::Result<Listener> {
        match self {
            Self::Unix(socket) => {
                UnixListener::bind(listening_path(socket, port)).map(Listener::Unix)
            }
            Self::Vsock(cid) => {
                let socket = vsock_socket()?;
                let (address, len) = vsock_address(libc::VMADDR_CID_ANY, port);
                // SAFETY: the address is valid for its length.
                check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len) })?;
                // SAFETY: takes numbers only.
                check(unsafe { libc::listen(socket.as_raw_fd(), 1) })?;
                Ok(Listener::Vsock {
                    socket,
                    guest: *cid,
                })
            }
        }
    }

    /// Connects to `port` of the guest. Reading and writing give up after `timeout`.
    ///
    /// # Errors
    /// Nobody listens there, or the VMM is gone.
    pub fn connect(&self, port: u32, timeout: Duration) -> io::Result<UnixStream> {
        match self {
            Self::Unix(socket) => {
                let mut stream = limited(UnixStream::connect(socket)?, timeout)?;
                stream.write_all(format!("CONNECT {port}\n").as_bytes())?;
                let answer = read_line(&mut stream, MAX_CONNECT_ANSWER)?;
                if !answer.starts_with(b"OK ") {
                    return Err(io::Error::other(format!(
                        "CONNECT {port} was answered with {:?}",
                        String::from_utf8_lossy(&answer)
                    )));
                }
                Ok(stream)
            }
            Self::Vsock(cid) => {
                let socket = vsock_socket()?;
                let (address, len) = vsock_address(*cid, port);
                // SAFETY: the address is valid for its length.
                check(unsafe {
                    libc::connect(socket.as_raw_fd(), (&raw const address).cast(), len)
                })?;
                limited(socket.into(), timeout)
            }
        }
    }
}

/// Receives a guest's connections.
#[derive(Debug)]
pub enum Listener {
    /// From a VMM.
    Unix(UnixListener),
    /// From the kernel.
    Vsock {
        /// The listening socket.
        socket: OwnedFd,
        /// Context id of the guest whose connections are wanted.
        guest: u32,
    },
}

impl Listener {
    /// The next connection; `None` if it came from another guest. Reading and writing give up
    /// after `timeout`.
    ///
    /// # Errors
    /// Of accept.
    pub fn accept(&self, timeout: Duration) -> io::Result<Option<UnixStream>> {
        let stream = match self {
            Self::Unix(listener) => listener.accept()?.0,
            Self::Vsock { socket, guest } => {
                let (mut peer, mut len) = vsock_address(0, 0);
                // SAFETY: the address is valid for its length, which the kernel does not exceed.
                let fd = check(unsafe {
                    libc::accept4(
                        socket.as_raw_fd(),
                        (&raw mut peer).cast(),
                        &raw mut len,
                        libc::SOCK_CLOEXEC,
                    )
                })?;
                // SAFETY: the descriptor is new, and nobody else's.
                let stream = unsafe { OwnedFd::from_raw_fd(fd) };
                if peer.svm_cid != *guest {
                    return Ok(None);
                }
                stream.into()
            }
        };
        limited(stream, timeout).map(Some)
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(listener) => listener.as_fd(),
            Self::Vsock { socket, .. } => socket.as_fd(),
        }
    }
}

/// Reads up to a newline, which is not returned, and not a byte further.
///
/// # Errors
/// The line is longer than `limit` or has no end.
pub fn read_line(stream: &mut impl Read, limit: usize) -> io::Result<Vec<u8>> {
    let mut line = Vec::new();
    let mut byte = [0];
    while line.len() <= limit {
        stream.read_exact(&mut byte)?;
        if byte == [b'\n'] {
            return Ok(line);
        }
        line.extend(byte);
    }
    Err(io::Error::new(
        io::ErrorKind::InvalidData,
        format!("a line is longer than {limit} bytes"),
    ))
}

/// Where our VMM looks for a listener on `port` of the host.
fn listening_path(socket: &Path, port: u32) -> PathBuf {
    let mut path = socket.as_os_str().to_owned();
    path.push(format!("_{port}"));
    path.into()
}

fn limited(stream: UnixStream, timeout: Duration) -> io::Result<UnixStream> {
    stream.set_read_timeout(Some(timeout))?;
    stream.set_write_timeout(Some(timeout))?;
    Ok(stream)
}

fn vsock_socket() -> io::Result<OwnedFd> {
    // SAFETY: takes numbers only.
    let fd =
        check(unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) })?;
    // SAFETY: the descriptor is new, and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn vsock_address(cid: u32, port: u32) -> (libc::sockaddr_vm, libc::socklen_t) {
    // SAFETY: sockaddr_vm is plain numbers, for which zero is valid.
    let mut address: libc::sockaddr_vm = unsafe { mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = cid;
    address.svm_port = port;
    (address, size_of_val(&address) as libc::socklen_t)
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(60);

    #[test]
    fn a_guests_connection_arrives_beside_the_vmms_socket() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("vsock");
        let listener = Channel::Unix(socket.clone()).listen(1025).unwrap();
        let mut guest = UnixStream::connect(directory.path().join("vsock_1025")).unwrap();
        guest.write_all(b"hello\nrest").unwrap();
        let mut stream = listener.accept(TIMEOUT).unwrap().unwrap();
        assert_eq!(read_line(&mut stream, 5).unwrap(), b"hello");
        let error = read_line(&mut stream, 2).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn the_connect_handshake_leaves_the_streams_own_bytes() {
        let answer = |answer: &'static [u8]| {
            let directory = tempfile::tempdir().unwrap();
            let socket = directory.path().join("vsock");
            let listener = UnixListener::bind(&socket).unwrap();
            let vmm = thread::spawn(move || {
                let (mut stream, _) = listener.accept().unwrap();
                let request = read_line(&mut stream, 32).unwrap();
                stream.write_all(answer).unwrap();
                request
            });
            let result = Channel::Unix(socket).connect(1024, TIMEOUT);
            assert_eq!(vmm.join().unwrap(), b"CONNECT 1024");
            result
        };
        let mut stream = answer(b"OK 1073741824\nHTTP").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        assert_eq!(text, "HTTP");

        let error = answer(b"no\n").unwrap_err().to_string();
        assert!(error.contains("\"no\""), "{error}");
        answer(b"").unwrap_err();
    }
}
