//! Where a sandbox has its files on the host.
//!
//! | Path | What |
//! |---|---|
//! | `<runtime_dir>/sandboxes/<id>/vsock.sock` | the host's side of the guest's vsock |
//! | `<runtime_dir>/sandboxes/<id>/vsock.sock_1025` | where the agent says that it is ready |
//! | `<runtime_dir>/sandboxes/<id>/console.log` | what the guest writes to its serial console |
//! | `<runtime_dir>/sandboxes/<id>/api.sock` | the API of its VMM, for the daemon alone |
//! | `<runtime_dir>/sandboxes/<id>/events` | the FIFO that its VMM writes its events to |
//! | `<runtime_dir>/sandboxes/<id>/stderr` | the FIFO that is its VMM's standard error |
//! | `<runtime_dir>/sandboxes/<id>/machine.json` | what a later daemon has to know of it |
//! | `<data_dir>/sandboxes/<id>/disk.qcow2` | its own disk |
//! | `<data_dir>/sandboxes/<id>/scratch.qcow2` | its second disk, while a template is built in it |
//! | `<data_dir>/empty/` | empty file systems, which second disks are made on |
//! | `<data_dir>/layers/<id>/` | what was saved, of this sandbox or another |

use std::fs::{DirBuilder, Permissions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use agent_protocol::READY_PORT;

use crate::domain::SandboxId;
use crate::private;

/// The longest path of a UNIX socket in bytes: `sun_path` of unix(7) without its zero byte.
const MAX_SOCKET_PATH: usize = 107;

/// The directories of all sandboxes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Paths {
    runtime: PathBuf,
    data: PathBuf,
    layers: PathBuf,
    empty: PathBuf,
}

/// A directory is not usable for sandboxes.
#[derive(Debug, thiserror::Error)]
pub enum PathsError {
    /// Socket paths would be too long.
    #[error(
        "runtime_dir {path} is too long: its sockets' paths would have {len} bytes, and the system \
         allows {MAX_SOCKET_PATH}; choose a shorter one",
        path = path.display()
    )]
    TooLong {
        /// The directory.
        path: PathBuf,
        /// Length of the longest socket path.
        len: usize,
    },
    /// The path would be misread on the VMM's command line.
    #[error(
        "{what} {path} must be absolute, UTF-8, and without comma or control character",
        path = path.display()
    )]
    Characters {
        /// Which directory.
        what: &'static str,
        /// The directory.
        path: PathBuf,
    },
    /// It cannot be made, or be kept from others.
    #[error("{what} {path} cannot be made, or not be kept from others", path = path.display())]
    Make {
        /// Which directory.
        what: &'static str,
        /// The directory.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
}

impl Paths {
    /// Sandboxes below these directories, which are made if they are not there. What is directly in them
    /// is kept from others, so that the directories themselves may have any mode.
    ///
    /// # Errors
    /// They are not usable.
    pub fn new(runtime_dir: &Path, data_dir: &Path) -> Result<Self, PathsError> {
        for (what, path) in [("runtime_dir", runtime_dir), ("data_dir", data_dir)] {
            let is_plain = path
                .to_str()
                .is_some_and(|text| !text.contains(',') && !text.contains(char::is_control));
            if !is_plain || !path.is_absolute() {
                return Err(PathsError::Characters {
                    what,
                    path: path.to_owned(),
                });
            }
        }
        let paths = Self {
            runtime: runtime_dir.join("sandboxes"),
            data: data_dir.join("sandboxes"),
            layers: data_dir.join("layers"),
            empty: data_dir.join("empty"),
        };
        let longest =
            paths.runtime.as_os_str().len() + 1 + SandboxId::LEN + "/vsock.sock_1025".len();
        if longest > MAX_SOCKET_PATH {
            return Err(PathsError::TooLong {
                path: runtime_dir.to_owned(),
                len: longest,
            });
        }
        for (what, path) in [
            ("runtime_dir", &paths.runtime),
            ("data_dir", &paths.data),
            ("data_dir", &paths.layers),
            ("data_dir", &paths.empty),
        ] {
            private::directory(path).map_err(|source| PathsError::Make {
                what,
                path: path.clone(),
                source,
            })?;
        }
        Ok(paths)
    }

    /// Makes the directories of a new sandbox, for its owner alone. The group `jailed`, if there
    /// is one, may reach what it knows the name of in the runtime directory, and no more.
    pub(super) fn make(&self, id: &SandboxId, jailed: Option<u32>) -> io::Result<()> {
        for parent in [&self.runtime, &self.data] {
            DirBuilder::new()
                .mode(0o700)
                .create(parent.join(id.as_str()))?;
        }
        match jailed {
            Some(group) => share(&self.runtime.join(id.as_str()), group, 0o710),
            None => Ok(()),
        }
    }

    /// Removes all files of a sandbox. The error is a sentence.
    pub(super) async fn remove(&self, id: &SandboxId) -> Result<(), String> {
        for parent in [&self.runtime, &self.data] {
            let dir = parent.join(id.as_str());
            match tokio::fs::remove_dir_all(&dir).await {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(format!("{} cannot be removed: {error}", dir.display()));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// The directories that hold a directory for each sandbox.
    pub(super) fn parents(&self) -> [&Path; 2] {
        [&self.runtime, &self.data]
    }

    /// What the VMM's argument that names the vsock begins with, for every sandbox below these
    /// directories and for nothing else.
    pub(super) fn vsock_arg_prefix(&self) -> Vec<u8> {
        let mut prefix = VSOCK_ARG.as_bytes().to_owned();
        prefix.extend_from_slice(self.runtime.as_os_str().as_bytes());
        prefix.push(b'/');
        prefix
    }

    /// The sandbox below these directories whose VMM's argument that names the vsock this is.
    pub(super) fn of_vsock_arg(&self, argument: &[u8]) -> Option<SandboxId> {
        let rest = argument.strip_prefix(self.vsock_arg_prefix().as_slice())?;
        let id = rest.split(|&byte| byte == b'/').next()?;
        std::str::from_utf8(id).ok()?.parse().ok()
    }

    /// The VMM's argument that names the vsock.
    pub(super) fn vsock_arg(&self, id: &SandboxId) -> String {
        format!("{VSOCK_ARG}{}", self.vsock(id).display())
    }

    /// The host's side of the guest's vsock.
    pub fn vsock(&self, id: &SandboxId) -> PathBuf {
        self.runtime.join(id.as_str()).join("vsock.sock")
    }

    /// Where the agent says that it is ready.
    pub fn ready(&self, id: &SandboxId) -> PathBuf {
        self.runtime
            .join(id.as_str())
            .join(format!("vsock.sock_{READY_PORT}"))
    }

    /// What the guest writes to its serial console.
    pub fn console(&self, id: &SandboxId) -> PathBuf {
        self.runtime.join(id.as_str()).join("console.log")
    }

    /// The API of its VMM.
    pub fn api(&self, id: &SandboxId) -> PathBuf {
        self.runtime.join(id.as_str()).join("api.sock")
    }

    /// The FIFO that its VMM writes its events to.
    pub(super) fn events(&self, id: &SandboxId) -> PathBuf {
        self.runtime.join(id.as_str()).join("events")
    }

    /// The FIFO that is its VMM's standard error.
    pub(super) fn stderr(&self, id: &SandboxId) -> PathBuf {
        self.runtime.join(id.as_str()).join("stderr")
    }

    /// What a later daemon has to know of its machine.
    pub(super) fn note(&self, id: &SandboxId) -> PathBuf {
        self.runtime.join(id.as_str()).join("machine.json")
    }

    /// Where that is written before it gets its name.
    pub(super) fn note_draft(&self, id: &SandboxId) -> PathBuf {
        self.runtime.join(id.as_str()).join("machine.json.new")
    }

    /// The sandbox's second disk, if it has one.
    pub(super) fn scratch(&self, id: &SandboxId) -> PathBuf {
        self.data.join(id.as_str()).join("scratch.qcow2")
    }

    /// Where empty file systems are, by their size.
    pub(super) fn empty(&self) -> &Path {
        &self.empty
    }

    /// Where layers are.
    pub(super) fn layers(&self) -> &Path {
        &self.layers
    }

    /// Where the sandbox's next disk is made, before it becomes its own disk.
    pub(super) fn next_disk(&self, id: &SandboxId) -> PathBuf {
        self.data.join(id.as_str()).join("next.qcow2")
    }

    /// The sandbox's own disk.
    pub fn disk(&self, id: &SandboxId) -> PathBuf {
        self.data.join(id.as_str()).join("disk.qcow2")
    }
}

/// Gives a file to a group, with these permissions.
pub(super) fn share(path: &Path, group: u32, mode: u32) -> io::Result<()> {
    // The owner first: who can do anything to it then has no more than before.
    std::os::unix::fs::chown(path, None, Some(group))?;
    std::fs::set_permissions(path, Permissions::from_mode(mode))
}

/// The address is the same in every guest: each has a VMM, and so a vsock, of its own.
const VSOCK_ARG: &str = "cid=3,socket=";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_are_private() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::new(&dir.path().join("run"), &dir.path().join("data")).unwrap();
        let id = SandboxId::random();
        paths.make(&id, None).unwrap();
        for path in [paths.vsock(&id), paths.disk(&id)] {
            let mode = std::fs::metadata(path.parent().unwrap())
                .unwrap()
                .permissions()
                .mode();
            assert_eq!(mode & 0o777, 0o700);
        }
        assert!(
            paths.make(&id, None).is_err(),
            "a directory that is there belongs to someone"
        );
    }

    #[test]
    fn directories_that_somebody_has_made_are_closed_to_others() {
        let dir = tempfile::tempdir().unwrap();
        let (run, data) = (dir.path().join("run"), dir.path().join("data"));
        let kept = ["sandboxes", "layers", "empty"].map(|name| data.join(name));
        for path in &kept {
            std::fs::create_dir_all(path).unwrap();
            std::fs::set_permissions(path, Permissions::from_mode(0o755)).unwrap();
        }
        Paths::new(&run, &data).unwrap();
        for path in &kept {
            let mode = std::fs::metadata(path).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o700, "{}", path.display());
        }
    }

    #[test]
    fn socket_paths_fit_to_the_byte() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().to_str().unwrap().len();
        let rest = MAX_SOCKET_PATH - base - "//sandboxes/sb-01234567/vsock.sock_1025".len();
        let data = dir.path().join("data");
        let fits = dir.path().join("r".repeat(rest));
        let paths = Paths::new(&fits, &data).unwrap();
        let longest = paths.ready(&SandboxId::random());
        assert_eq!(longest.as_os_str().len(), MAX_SOCKET_PATH);
        let error = Paths::new(&dir.path().join("r".repeat(rest + 1)), &data).unwrap_err();
        assert!(
            matches!(error, PathsError::TooLong { len: 108, .. }),
            "{error}"
        );
    }

    #[test]
    fn paths_that_the_vmm_would_misread_are_refused() {
        for bad in ["relative", "/tmp/a,readonly=on", "/tmp/a\nb"] {
            let error = Paths::new(Path::new(bad), Path::new("/tmp")).unwrap_err();
            assert!(matches!(error, PathsError::Characters { .. }), "{error}");
        }
    }
}
