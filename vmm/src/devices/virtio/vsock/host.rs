//! The UNIX sockets behind the device: the listener that leads to the guest, the connection of
//! a host program, and the greeting by which that program names a port.
//!
//! A host program that goes away while it is written to must not end the VMM by SIGPIPE: the
//! Rust runtime ignores that signal in every program from its start.

use std::collections::VecDeque;
use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SocketAddrUnix, SocketFlags, SocketType};
use vm_memory::{ReadVolatile, VolatileMemoryError, WriteVolatile};

use crate::devices::virtio::buffers::Buffers;

/// Host programs that may wait to be accepted, e.g. while the guest boots.
const BACKLOG: i32 = 128;

/// The longest path: what a UNIX address holds, with its final zero, less `_4294967295`.
const MAX_PATH: usize = 108 - 1 - 11;

/// The longest greeting is `CONNECT 4294967294\n`.
const MAX_GREETING: usize = 19;

/// Why there is no socket device.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// The path is too long.
    #[error(
        "{}: the path of the socket has {} bytes; with the number of a port behind it, at \
         most {MAX_PATH} fit",
        path.display(),
        path.as_os_str().len()
    )]
    PathTooLong {
        /// The path.
        path: PathBuf,
    },
    /// The path belongs to a process that lives.
    #[error("{}: another process listens on this socket; end it, or choose another path",
        path.display())]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// The path belongs to something else.
    #[error("{}: there is a file that is no socket; move it away, or choose another path",
        path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The socket cannot be made.
    #[error("{}: cannot listen on this socket", path.display())]
    Listen {
        /// The path.
        path: PathBuf,
        /// How the host answered.
        #[source]
        source: io::Error,
    },
    /// The device's descriptors cannot be made.
    #[error("cannot make the descriptors of the socket device")]
    Descriptors {
        /// How the host answered.
        #[source]
        source: io::Error,
    },
}

/// The UNIX socket that host programs connect to. The file goes when this does, unless it is out
/// of reach by then.
#[derive(Debug)]
pub(super) struct Listener {
    socket: OwnedFd,
    path: PathBuf,
    /// What the paths of host programs' sockets begin with; `path` unless the directory has moved.
    base: PathBuf,
    /// Device and inode of the file, which someone may have replaced since.
    identity: Option<(u64, u64)>,
}

impl Listener {
    /// Listens at `path`, for the own user alone. What a dead process left there is replaced.
    ///
    /// # Errors
    /// The path is not usable, or in use.
    pub(super) fn bind(path: &Path) -> Result<Self, VsockError> {
        let owned = || path.to_owned();
        if path.as_os_str().len() > MAX_PATH {
            return Err(VsockError::PathTooLong { path: owned() });
        }
        let failed = |error: Errno| VsockError::Listen {
            path: owned(),
            source: error.into(),
        };
        let address = SocketAddrUnix::new(path).map_err(failed)?;
        remove_stale(path, &address)?;
        let socket = stream_socket().map_err(failed)?;
        // On Linux, the mode of the unbound socket is that of the file, from the first moment.
        rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR).map_err(failed)?;
        rustix::net::bind(&socket, &address).map_err(|error| match error {
            Errno::ADDRINUSE => VsockError::InUse { path: owned() },
            other => failed(other),
        })?;
        let listener = Self {
            socket,
            path: owned(),
            base: owned(),
            identity: identity(path),
        };
        rustix::net::listen(&listener.socket, BACKLOG).map_err(failed)?;
        Ok(listener)
    }

    /// Takes the next host program that waits; `None` if there is none.
    pub(super) fn accept(&self) -> io::Result<Option<UnixStream>> {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        loop {
            return match rustix::net::accept_with(&self.socket, flags) {
                Ok(socket) => Ok(Some(socket.into())),
                Err(Errno::AGAIN) => Ok(None),
                Err(Errno::INTR | Errno::CONNABORTED) => continue,
                Err(other) => Err(other.into()),
            };
        }
    }

    /// The directory of the sockets is at `directory` from now on, and the file of this one no
    /// longer this process's to remove.
    pub(super) fn move_to(&mut self, directory: &Path) {
        self.base = directory.join(self.path.file_name().unwrap_or_default());
        self.identity = None;
    }

    /// Connects to the host program that serves `port`. Never waits.
    pub(super) fn connect_port(&self, port: u32) -> io::Result<UnixStream> {
        let address = SocketAddrUnix::new(port_path(&self.base, port))?;
        let socket = stream_socket()?;
        rustix::net::connect(&socket, &address)?;
        Ok(socket.into())
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if self.identity.is_some() && identity(&self.path) == self.identity {
            // The file may be gone.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    let metadata = fs::symlink_metadata(path).ok()?;
    Some((metadata.dev(), metadata.ino()))
}

/// The UNIX socket of the host program that serves `port`.
fn port_path(path: &Path, port: u32) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!("_{port}"));
    name.into()
}

fn stream_socket() -> Result<OwnedFd, Errno> {
    rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::NONBLOCK | SocketFlags::CLOEXEC,
        None,
    )
}

/// Removes a socket that nobody listens on any more.
fn remove_stale(path: &Path, address: &SocketAddrUnix) -> Result<(), VsockError> {
    let owned = || path.to_owned();
    let failed = |source| VsockError::Listen {
        path: owned(),
        source,
    };
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.file_type().is_socket() => {}
        Ok(_) => return Err(VsockError::NotASocket { path: owned() }),
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
    }
    let probe = stream_socket().map_err(|error| failed(error.into()))?;
    match rustix::net::connect(probe, address) {
        // A full backlog answers EAGAIN, a socket of another type EPROTOTYPE.
        Ok(()) | Err(Errno::AGAIN | Errno::PROTOTYPE) => Err(VsockError::InUse { path: owned() }),
        Err(Errno::CONNREFUSED) => match fs::remove_file(path) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(failed(error)),
            _ => Ok(()),
        },
        Err(Errno::NOENT) => Ok(()),
        Err(other) => Err(failed(other.into())),
    }
}

/// What a host program has said so far.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Greeting {
    /// The line is not complete yet.
    Incomplete,
    /// It wants to reach this port of the guest.
    Connect(u32),
    /// It is gone, or speaks another language.
    Bad,
}

/// Reads the greeting, and not a byte beyond it.
pub(super) fn read_greeting(mut socket: &UnixStream) -> io::Result<Greeting> {
    let mut bytes = [0; MAX_GREETING];
    let len = loop {
        match rustix::net::recv(socket, &mut bytes, RecvFlags::PEEK) {
            Ok((len, _)) => break len,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Ok(Greeting::Incomplete),
            Err(other) => return Err(other.into()),
        }
    };
    match bytes[..len].iter().position(|&byte| byte == b'\n') {
        Some(end) => {
            socket.read_exact(&mut bytes[..=end])?;
            Ok(parse_greeting(&bytes[..end]).map_or(Greeting::Bad, Greeting::Connect))
        }
        None if len == 0 || len == MAX_GREETING => Ok(Greeting::Bad),
        None => Ok(Greeting::Incomplete),
    }
}

/// The port in the line `CONNECT <port>`.
fn parse_greeting(line: &[u8]) -> Option<u32> {
    let digits = line.strip_prefix(b"CONNECT ")?;
    if !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let port = std::str::from_utf8(digits).ok()?.parse().ok()?;
    // VMADDR_PORT_ANY is no port.
    (port != u32::MAX).then_some(port)
}

/// The connection of a host program, and what it has not yet read.
#[derive(Debug)]
pub(super) struct HostStream {
    socket: UnixStream,
    unread: VecDeque<u8>,
    /// There may be something to read. Set by the edges of epoll, cleared by a read that finds
    /// nothing: while it is set, no edge is needed to know it.
    pub(super) readable: bool,
}

impl HostStream {
    /// `readable` tells whether an edge of epoll may have come already.
    pub(super) fn new(socket: UnixStream, readable: bool) -> Self {
        Self {
            socket,
            unread: VecDeque::new(),
            readable,
        }
    }

    /// Bytes that the host program has not yet read.
    pub(super) fn unread(&self) -> usize {
        self.unread.len()
    }

    /// Drops what the host program will not read, and tells how much that was.
    pub(super) fn discard(&mut self) -> usize {
        std::mem::take(&mut self.unread).len()
    }

    /// Tells the host program that it reached the guest.
    pub(super) fn confirm(&self, port: u32) -> io::Result<()> {
        // A fresh socket has room for this line.
        (&self.socket).write_all(format!("OK {port}\n").as_bytes())
    }

    /// Reads up to `limit` bytes into `buffers`. `Some(0)` is the end of the stream, `None`
    /// nothing for now.
    pub(super) fn read(
        &mut self,
        buffers: &Buffers<'_>,
        limit: usize,
    ) -> io::Result<Option<usize>> {
        let mut total = 0;
        for slice in buffers.slices() {
            let len = slice.len().min(limit - total);
            if len == 0 {
                break;
            }
            let mut part = slice.subslice(0, len).map_err(io::Error::other)?;
            match retry(|| (&self.socket).read_volatile(&mut part)) {
                Ok(read) => {
                    total += read;
                    if read < len {
                        break;
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.readable = false;
                    return Ok((total > 0).then_some(total));
                }
                Err(_) if total > 0 => break,
                Err(error) => return Err(error),
            }
        }
        Ok(Some(total))
    }

    /// Writes the data in `buffers`, and keeps what the host program does not take now. Returns
    /// the number of bytes it took.
    pub(super) fn write(&mut self, buffers: &Buffers<'_>) -> io::Result<usize> {
        let mut total = 0;
        for slice in buffers.slices() {
            let mut written = 0;
            while self.unread.is_empty() && written < slice.len() {
                let rest = slice.offset(written).map_err(io::Error::other)?;
                match retry(|| (&self.socket).write_volatile(&rest)) {
                    Ok(0) => return Err(ErrorKind::WriteZero.into()),
                    Ok(count) => written += count,
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    Err(error) => return Err(error),
                }
            }
            total += written;
            if written < slice.len() {
                let mut rest = vec![0; slice.len() - written];
                slice
                    .offset(written)
                    .map_err(io::Error::other)?
                    .copy_to(&mut rest);
                self.unread.extend(&rest);
            }
        }
        Ok(total)
    }

    /// Writes what was kept, as far as the host program takes it. Returns the number of bytes.
    pub(super) fn flush(&mut self) -> io::Result<usize> {
        let mut total = 0;
        while !self.unread.is_empty() {
            let (front, _) = self.unread.as_slices();
            match (&self.socket).write(front) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(written) => {
                    self.unread.drain(..written);
                    total += written;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(total),
                Err(error) => return Err(error),
            }
        }
        // An idle connection holds no memory.
        self.unread = VecDeque::new();
        Ok(total)
    }

    /// Ends one direction of the stream. That it has ended already is no matter.
    pub(super) fn shutdown(&self, how: Shutdown) {
        let _ = self.socket.shutdown(how);
    }
}

impl AsFd for HostStream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Repeats a read or write of guest memory that a signal interrupted.
fn retry(mut operation: impl FnMut() -> Result<usize, VolatileMemoryError>) -> io::Result<usize> {
    loop {
        match operation() {
            Ok(count) => return Ok(count),
            Err(VolatileMemoryError::IOError(error)) if error.kind() == ErrorKind::Interrupted => {}
            Err(VolatileMemoryError::IOError(error)) => return Err(error),
            Err(other) => return Err(io::Error::other(other)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener};

    use super::*;

    #[test]
    fn greeting_is_one_exact_line() {
        assert_eq!(parse_greeting(b"CONNECT 1024"), Some(1024));
        assert_eq!(parse_greeting(b"CONNECT 0"), Some(0));
        assert_eq!(parse_greeting(b"CONNECT 4294967294"), Some(u32::MAX - 1));
        for bad in [
            &b"CONNECT 4294967295"[..],
            b"CONNECT 4294967296",
            b"CONNECT ",
            b"CONNECT",
            b"CONNECT +5",
            b"CONNECT -5",
            b"CONNECT 5 ",
            b"CONNECT 5\r",
            b"CONNECT  5",
            b"connect 5",
            b"GET / HTTP/1.1",
            b"",
            b"CONNECT \xff",
        ] {
            assert_eq!(parse_greeting(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn greeting_leaves_what_follows() {
        let (mut client, server) = UnixStream::pair().unwrap();
        server.set_nonblocking(true).unwrap();
        assert_eq!(read_greeting(&server).unwrap(), Greeting::Incomplete);
        client.write_all(b"CONNE").unwrap();
        assert_eq!(read_greeting(&server).unwrap(), Greeting::Incomplete);
        client.write_all(b"CT 52\nhello").unwrap();
        assert_eq!(read_greeting(&server).unwrap(), Greeting::Connect(52));
        let mut rest = [0; 5];
        (&server).read_exact(&mut rest).unwrap();
        assert_eq!(&rest, b"hello");
    }

    #[test]
    fn greeting_without_end_is_bad() {
        let (mut client, server) = UnixStream::pair().unwrap();
        server.set_nonblocking(true).unwrap();
        client.write_all(&[b'A'; MAX_GREETING]).unwrap();
        assert_eq!(read_greeting(&server).unwrap(), Greeting::Bad);

        let (client, server) = UnixStream::pair().unwrap();
        drop(client);
        assert_eq!(read_greeting(&server).unwrap(), Greeting::Bad);
    }

    #[test]
    fn listener_is_private_and_goes_with_its_owner() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vsock");
        let listener = Listener::bind(&path).unwrap();
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(matches!(
            Listener::bind(&path),
            Err(VsockError::InUse { .. })
        ));
        assert!(UnixStream::connect(&path).is_ok());
        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn listener_replaces_only_what_is_stale() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vsock");
        // The standard library leaves the file behind.
        drop(UnixListener::bind(&path).unwrap());
        let listener = Listener::bind(&path).unwrap();

        // A file that took the place of ours is not ours to remove.
        fs::remove_file(&path).unwrap();
        fs::write(&path, "precious").unwrap();
        drop(listener);
        assert!(matches!(
            Listener::bind(&path),
            Err(VsockError::NotASocket { .. })
        ));
        assert_eq!(fs::read(&path).unwrap(), b"precious");

        fs::remove_file(&path).unwrap();
        let _datagrams = UnixDatagram::bind(&path).unwrap();
        assert!(matches!(
            Listener::bind(&path),
            Err(VsockError::InUse { .. })
        ));
    }

    #[test]
    fn listener_needs_a_path_that_leaves_room_for_ports() {
        let directory = tempfile::tempdir().unwrap();
        let mut path = directory.path().as_os_str().to_owned();
        path.push("/");
        path.push("x".repeat(MAX_PATH - path.len()));
        let longest = port_path(Path::new(&path), u32::MAX);
        assert!(SocketAddr::from_pathname(&longest).is_ok());
        assert!(Listener::bind(Path::new(&path)).is_ok());
        path.push("x");
        let too_long = port_path(Path::new(&path), u32::MAX);
        assert!(SocketAddr::from_pathname(&too_long).is_err());
        assert!(matches!(
            Listener::bind(Path::new(&path)),
            Err(VsockError::PathTooLong { .. })
        ));
        let missing = directory.path().join("missing").join("vsock");
        assert!(matches!(
            Listener::bind(&missing),
            Err(VsockError::Listen { source, .. }) if source.kind() == ErrorKind::NotFound
        ));
    }

    #[test]
    fn ports_have_sockets_of_their_own() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vsock");
        let listener = Listener::bind(&path).unwrap();
        assert_eq!(
            listener.connect_port(7).unwrap_err().kind(),
            ErrorKind::NotFound
        );
        let service = UnixListener::bind(directory.path().join("vsock_7")).unwrap();
        let mut client = listener.connect_port(7).unwrap();
        client.write_all(b"hi").unwrap();
        let mut bytes = [0; 2];
        service.accept().unwrap().0.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"hi");
    }

    #[test]
    fn a_directory_that_moves_takes_its_sockets_along() {
        let directory = tempfile::tempdir().unwrap();
        let old = directory.path().join("old");
        let new = directory.path().join("new");
        fs::create_dir(&old).unwrap();
        let mut listener = Listener::bind(&old.join("vsock")).unwrap();
        fs::rename(&old, &new).unwrap();
        listener.move_to(&new);
        let _service = UnixListener::bind(new.join("vsock_7")).unwrap();
        listener.connect_port(7).unwrap();
        drop(listener);
        assert!(new.join("vsock").exists());
    }
}
