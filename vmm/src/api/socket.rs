//! The socket of the API.
//!
//! A socket file outlives a process that was killed, and then looks like one in use. So a file
//! beside it, `<path>.lock`, is locked for as long as the process lives: whoever has the lock may
//! replace the socket, and two processes never serve the same path.

use std::fs::{self, File};
use std::io;
use std::os::fd::{FromRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

/// Where the API is served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ApiTarget {
    /// A UNIX socket at this path.
    Path(PathBuf),
    /// A listening UNIX stream socket that the VMM inherited.
    Fd(RawFd),
}

/// Why the API cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Another process serves it.
    #[error("another process serves {path}", path = path.display())]
    InUse {
        /// Path of the socket.
        path: PathBuf,
    },
    /// Something that is no socket is in the way.
    #[error("{path} exists and is no socket", path = path.display())]
    NoSocket {
        /// Path of the socket.
        path: PathBuf,
    },
    /// The host refuses.
    #[error("cannot listen on {path}", path = path.display())]
    Path {
        /// Path of the socket, or of its lock.
        path: PathBuf,
        /// What the host says.
        #[source]
        source: io::Error,
    },
    /// The inherited descriptor is of no use.
    #[error("descriptor {fd} is no listening UNIX socket")]
    Fd {
        /// Its number.
        fd: RawFd,
        /// What the host says.
        #[source]
        source: io::Error,
    },
}

/// The listening socket. Dropping it removes its files, if it has any.
#[derive(Debug)]
pub struct Listener {
    socket: UnixListener,
    _files: Option<Files>,
}

/// The socket's file and its lock.
#[derive(Debug)]
struct Files {
    socket: PathBuf,
    lock: PathBuf,
    _locked: File,
}

impl Drop for Files {
    fn drop(&mut self) {
        // Under the lock, so they are this process's own. What cannot be removed, in a jail for
        // one, is replaced by whoever gets the lock next.
        let _ = fs::remove_file(&self.socket);
        let _ = fs::remove_file(&self.lock);
    }
}

impl Listener {
    /// Opens the socket.
    ///
    /// # Errors
    /// Another process serves the path, or the host refuses.
    pub fn open(target: &ApiTarget) -> Result<Self, ListenError> {
        match target {
            ApiTarget::Path(path) => Self::bind(path),
            ApiTarget::Fd(fd) => Self::inherit(*fd),
        }
    }

    fn bind(path: &Path) -> Result<Self, ListenError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| ListenError::Path { path, source }
        };
        let mut lock = path.as_os_str().to_owned();
        lock.push(".lock");
        let lock = PathBuf::from(lock);
        let in_use = || ListenError::InUse {
            path: path.to_owned(),
        };
        let locked = take_lock(&lock)
            .map_err(failed(&lock))?
            .ok_or_else(in_use)?;
        match fs::symlink_metadata(path) {
            Ok(metadata) if metadata.file_type().is_socket() => {
                fs::remove_file(path).map_err(failed(path))?;
            }
            Ok(_) => {
                return Err(ListenError::NoSocket {
                    path: path.to_owned(),
                });
            }
            Err(_) => {}
        }
        let socket = UnixListener::bind(path).map_err(failed(path))?;
        let files = Files {
            socket: path.to_owned(),
            lock,
            _locked: locked,
        };
        socket.set_nonblocking(true).map_err(failed(path))?;
        Ok(Self {
            socket,
            _files: Some(files),
        })
    }

    fn inherit(fd: RawFd) -> Result<Self, ListenError> {
        let failed = |source| ListenError::Fd { fd, source };
        // SAFETY: F_SETFD takes a number and writes to no memory; it fails on a descriptor that
        // is not open.
        if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
            return Err(failed(io::Error::last_os_error()));
        }
        // SAFETY: the descriptor is open, and whoever started the VMM gave it away for this
        // purpose.
        let socket = unsafe { UnixListener::from_raw_fd(fd) };
        let listens = rustix::net::sockopt::socket_acceptconn(&socket);
        if !listens.map_err(|error| failed(error.into()))? {
            return Err(failed(io::ErrorKind::InvalidInput.into()));
        }
        socket.local_addr().map_err(failed)?;
        socket.set_nonblocking(true).map_err(failed)?;
        Ok(Self {
            socket,
            _files: None,
        })
    }

    /// The socket itself, which does not block.
    pub(crate) fn socket(&self) -> &UnixListener {
        &self.socket
    }
}

/// Locks the file at `path`, making it if it is not there. `None` if another process has it.
fn take_lock(path: &Path) -> io::Result<Option<File>> {
    loop {
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(path)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
            result => result?,
        }
        // The process that had it may have removed it in between, and another made a new one.
        let is_current = match fs::symlink_metadata(path) {
            Ok(there) => there.ino() == file.metadata()?.ino(),
            Err(_) => false,
        };
        if is_current {
            return Ok(Some(file));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::IntoRawFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_path_is_served_by_one_and_taken_over_from_the_dead() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("api.sock");
        let target = ApiTarget::Path(path.clone());
        // What a process that was killed leaves behind.
        drop(UnixListener::bind(&path).unwrap());

        let first = Listener::open(&target).unwrap();
        UnixStream::connect(&path).unwrap();
        let second = Listener::open(&target).unwrap_err();
        assert!(matches!(second, ListenError::InUse { .. }), "{second}");
        UnixStream::connect(&path).unwrap();
        drop(first);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
        Listener::open(&target).unwrap();

        fs::write(&path, "precious").unwrap();
        let error = Listener::open(&target).unwrap_err();
        assert!(matches!(error, ListenError::NoSocket { .. }), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    }

    #[test]
    fn only_a_listening_socket_is_inherited() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("api.sock");
        let socket = UnixListener::bind(&path).unwrap();
        Listener::open(&ApiTarget::Fd(socket.into_raw_fd())).unwrap();
        let file = File::open("/dev/null").unwrap();
        Listener::open(&ApiTarget::Fd(file.into_raw_fd())).unwrap_err();
        let (end, _other) = UnixStream::pair().unwrap();
        Listener::open(&ApiTarget::Fd(end.into_raw_fd())).unwrap_err();
    }
}
