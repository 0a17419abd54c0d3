//! What a daemon that crashed left behind: `vmm` processes and files.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tracing::warn;

use super::cgroup::{Cgroup, Cgroups};
use super::note::Note;
use super::paths::Paths;
use crate::domain::SandboxId;

/// How long a killed process may take to disappear.
const KILL_TIMEOUT: Timespec = Timespec {
    tv_sec: 10,
    tv_nsec: 0,
};

/// Something of an earlier daemon is in the way.
#[derive(Debug, thiserror::Error)]
pub enum LeftoverError {
    /// A process does not end.
    #[error("the vmm process {pid} of an earlier daemon cannot be ended")]
    Process {
        /// Its id.
        pid: i32,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// Files cannot be listed or removed.
    #[error("{path} of an earlier daemon cannot be removed", path = path.display())]
    Files {
        /// Where they are.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// The place for cgroups cannot be used.
    #[error(
        "the cgroup that jail.cgroup names cannot be divided; it must be of version 2, have \
         controllers and no processes of its own"
    )]
    Cgroups(#[source] io::Error),
    /// The task that removes it is gone.
    #[error("the clean-up was interrupted")]
    Interrupted,
}

/// Ends the processes and removes the files and cgroups of all sandboxes below `paths` but those that
/// are to be kept.
pub fn remove(
    paths: &Paths,
    cgroups: Option<&Cgroups>,
    keep: &BTreeSet<SandboxId>,
) -> Result<(), LeftoverError> {
    let prefix = paths.vsock_arg_prefix();
    for pid in processes().map_err(|source| LeftoverError::Files {
        path: "/proc".into(),
        source,
    })? {
        let failed = |source| LeftoverError::Process {
            pid: pid.as_raw_nonzero().get(),
            source,
        };
        let Some((process, argument)) = ours(pid, &prefix) else {
            continue;
        };
        let id = paths.of_vsock_arg(&argument);
        if id.is_none_or(|id| !keep.contains(&id)) {
            warn!(
                pid = pid.as_raw_nonzero().get(),
                "ending the vmm process of an earlier daemon"
            );
            end(&process).map_err(&failed)?;
        }
    }
    remove_drafts(paths.empty()).map_err(|source| LeftoverError::Files {
        path: paths.empty().to_owned(),
        source,
    })?;
    for parent in paths.parents() {
        let failed = files_of(parent);
        for entry in fs::read_dir(parent).map_err(&failed)? {
            let path = entry.map_err(&failed)?.path();
            let id = path.file_name().and_then(|name| name.to_str());
            let id: Option<SandboxId> = id.and_then(|id| id.parse().ok());
            if let Some(id) = &id {
                if keep.contains(id) {
                    continue;
                }
                remove_cgroups(paths, cgroups, id).map_err(&failed)?;
            }
            warn!(path = %path.display(), "removing files of an earlier daemon");
            fs::remove_dir_all(&path).map_err(|source| LeftoverError::Files {
                path: path.clone(),
                source,
            })?;
        }
    }
    Ok(())
}

fn files_of(path: &Path) -> impl Fn(io::Error) -> LeftoverError {
    move |source| LeftoverError::Files {
        path: path.to_owned(),
        source,
    }
}

/// The sandboxes below `paths` that there are processes or files of.
pub fn list(paths: &Paths) -> Result<BTreeSet<SandboxId>, LeftoverError> {
    let mut ids = BTreeSet::new();
    let prefix = paths.vsock_arg_prefix();
    for pid in processes().map_err(files_of(Path::new("/proc")))? {
        let argument = ours(pid, &prefix).map(|(_, argument)| argument);
        ids.extend(argument.and_then(|argument| paths.of_vsock_arg(&argument)));
    }
    for parent in paths.parents() {
        for entry in fs::read_dir(parent).map_err(files_of(parent))? {
            let name = entry.map_err(files_of(parent))?.file_name();
            ids.extend(
                name.to_str()
                    .and_then(|name| name.parse::<SandboxId>().ok()),
            );
        }
    }
    Ok(ids)
}

/// Ends the processes and removes the files and the cgroup of one sandbox.
pub fn remove_one(
    paths: &Paths,
    cgroups: Option<&Cgroups>,
    id: &SandboxId,
) -> Result<(), LeftoverError> {
    let prefix = paths.vsock_arg_prefix();
    for pid in processes().map_err(files_of(Path::new("/proc")))? {
        if let Some((process, argument)) = ours(pid, &prefix)
            && paths.of_vsock_arg(&argument).as_ref() == Some(id)
        {
            end(&process).map_err(|source| LeftoverError::Process {
                pid: pid.as_raw_nonzero().get(),
                source,
            })?;
        }
    }
    for parent in paths.parents() {
        let path = parent.join(id.as_str());
        remove_cgroups(paths, cgroups, id).map_err(files_of(&path))?;
        match fs::remove_dir_all(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(files_of(&path)(error));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Removes the cgroup of a sandbox, where it is now or where an earlier daemon has made it.
fn remove_cgroups(paths: &Paths, cgroups: Option<&Cgroups>, id: &SandboxId) -> io::Result<()> {
    // What cannot be read says nothing.
    let note = Note::read(paths, id).ok().flatten();
    let noted = note
        .and_then(|note| note.cgroup)
        .map(|path| Cgroup { path });
    let now = cgroups.map(|cgroups| cgroups.of(id));
    noted
        .into_iter()
        .chain(now)
        .try_for_each(|cgroup| cgroup.remove())
}

/// The sandbox of ours whose VMM this process is, if it is one.
pub fn sandbox_of(paths: &Paths, pid: i32) -> Option<SandboxId> {
    let (_, argument) = ours(Pid::from_raw(pid)?, &paths.vsock_arg_prefix())?;
    paths.of_vsock_arg(&argument)
}

/// Removes empty file systems that were not made to the end.
fn remove_drafts(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.extension().is_none_or(|extension| extension != "ext4") {
            fs::remove_file(path)?;
        }
    }
    Ok(())
}

fn processes() -> io::Result<Vec<Pid>> {
    let mut pids = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let pid = name
            .to_str()
            .and_then(|name| name.parse().ok())
            .and_then(Pid::from_raw);
        pids.extend(pid);
    }
    Ok(pids)
}

/// The process, if it is a VMM for a sandbox of ours: the arguments that it was started with
/// name a socket in our private directory. The handle is taken first. So should the process end
/// and its id be used again, the handle still means the one that ended, and signals to it fail.
fn ours(pid: Pid, prefix: &[u8]) -> Option<(OwnedFd, Vec<u8>)> {
    let process = pidfd_open(pid, PidfdFlags::empty()).ok()?;
    let arguments = fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).ok()?;
    let mut arguments = arguments.split(|&byte| byte == 0);
    let argument = arguments.find(|argument| argument.starts_with(prefix))?;
    Some((process, argument.to_vec()))
}

fn end(process: &OwnedFd) -> io::Result<()> {
    match pidfd_send_signal(process, Signal::KILL) {
        Ok(()) => {}
        Err(rustix::io::Errno::SRCH) => return Ok(()),
        Err(error) => return Err(error.into()),
    }
    // A pidfd is readable once its process has ended; pidfd_open(2).
    let mut fds = [PollFd::new(process, PollFlags::IN)];
    loop {
        match poll(&mut fds, Some(&KILL_TIMEOUT)) {
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            Ok(_) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::process::{CommandExt, ExitStatusExt};
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn only_processes_and_files_of_these_directories_are_ended() {
        let dir = tempfile::tempdir().unwrap();
        let ours = Paths::new(&dir.path().join("run"), &dir.path().join("data")).unwrap();
        let others = Paths::new(&dir.path().join("run2"), &dir.path().join("data2")).unwrap();
        let id = SandboxId::random();
        ours.make(&id, None).unwrap();
        others.make(&id, None).unwrap();
        fs::write(ours.disk(&id), "disk").unwrap();
        // Their standard inputs, which they wait for, are closed with this test at the latest.
        let spawn = |paths: &Paths| {
            let mut process = Command::new("sh")
                .arg0(paths.vsock_arg(&id))
                .args(["-c", "echo up; read word"])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            // A process has its arguments only some time after its start.
            let mut up = [0; 3];
            process
                .stdout
                .as_mut()
                .unwrap()
                .read_exact(&mut up)
                .unwrap();
            process
        };
        let (mut our_vmm, mut other_vmm) = (spawn(&ours), spawn(&others));

        let pid = our_vmm.id().cast_signed();
        assert_eq!(sandbox_of(&ours, pid), Some(id.clone()));
        assert_eq!(sandbox_of(&others, pid), None);
        remove(&ours, None, &BTreeSet::from([id.clone()])).unwrap();
        assert_eq!(our_vmm.try_wait().unwrap(), None);
        assert!(ours.disk(&id).exists());

        assert_eq!(list(&ours).unwrap(), BTreeSet::from([id.clone()]));
        remove_one(&ours, None, &SandboxId::random()).unwrap();
        assert_eq!(our_vmm.try_wait().unwrap(), None);
        remove_one(&ours, None, &id).unwrap();
        // Until it was waited for, it has its number, but no arguments.
        assert_eq!(list(&ours).unwrap(), BTreeSet::new());
        remove(&ours, None, &BTreeSet::new()).unwrap();

        assert_eq!(our_vmm.wait().unwrap().signal(), Some(9));
        assert_eq!(other_vmm.try_wait().unwrap(), None);
        other_vmm.kill().unwrap();
        other_vmm.wait().unwrap();
        assert!(!ours.disk(&id).exists() && !ours.vsock(&id).parent().unwrap().exists());
        assert!(others.vsock(&id).parent().unwrap().exists());
    }
}
