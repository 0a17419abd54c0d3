//! Who the jailed process is, and what of the host it sees: nothing.

use std::fmt;
use std::fs;
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{CWD, Mode, mkdir};
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount,
    mount_change, mount_remount, move_mount, open_tree, unmount,
};
use rustix::process::{chdir, getegid, geteuid, getpid, pivot_root, umask};
use rustix::thread::{
    Gid, Uid, UnshareFlags, set_thread_groups, set_thread_res_gid, set_thread_res_uid,
    unshare_unsafe,
};

use super::{FIRST_UID, JailConfig, JailError, SOCKET_DIRECTORY, check, step};

/// The user and group of a jailed process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    uid: u32,
    gid: u32,
    /// Whether it is one of its own, which takes root to get.
    own: bool,
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { uid, gid, own } = self;
        let note = if *own {
            ""
        } else {
            " (the caller's own: without root there is none for each machine, and its other \
             groups stay)"
        };
        write!(f, "uid {uid}, gid {gid}{note}")
    }
}

impl Identity {
    /// Who this process becomes: the user and group of `config` or, without root, who it is.
    ///
    /// # Errors
    /// `config` asks for root, or for a change that only root can make.
    pub fn choose(config: &JailConfig) -> Result<Self, JailError> {
        Self::choose_as(geteuid().as_raw(), getegid().as_raw(), config)
    }

    fn choose_as(own_uid: u32, own_gid: u32, config: &JailConfig) -> Result<Self, JailError> {
        let identity = if own_uid == 0 {
            // Unlike any other at this time: a process id has one process.
            let default = FIRST_UID + getpid().as_raw_nonzero().get().unsigned_abs();
            let uid = config.uid.unwrap_or(default);
            Self {
                uid,
                gid: config.gid.unwrap_or(uid),
                own: true,
            }
        } else {
            let (uid, gid) = (config.uid.unwrap_or(own_uid), config.gid.unwrap_or(own_gid));
            if (uid, gid) != (own_uid, own_gid) {
                return Err(JailError::NotRoot { uid, gid });
            }
            Self {
                uid,
                gid,
                own: false,
            }
        };
        // The largest number means "no change" to the system calls.
        if [identity.uid, identity.gid]
            .iter()
            .any(|id| matches!(*id, 0 | u32::MAX))
        {
            return Err(JailError::Root);
        }
        Ok(identity)
    }
}

/// Leaves all namespaces of the host, becomes `identity`, and has nothing in its file system but
/// the directory `sockets` under its new name. The next child is the first process of the new PID
/// namespace.
pub(super) fn enter(identity: &Identity, sockets: Option<&Path>) -> Result<(), JailError> {
    // The working directory moves along into the new mount namespace, and so is found there
    // whoever may search the directories above it.
    chdir(sockets.unwrap_or(Path::new("/"))).map_err(step("open the directory of the sockets"))?;
    if identity.own {
        // Before the user namespace, in which it would need a mapping for each.
        set_thread_groups(&[]).map_err(step("drop the supplementary groups"))?;
        let mapper = Mapper::start(identity)?;
        unshare()?;
        mapper.map()?;
    } else {
        unshare()?;
        map_self(identity).map_err(step("map the user into the new namespace"))?;
    }
    mount_change(
        "/",
        MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
    )
    // A host may give the namespace and none of its powers.
    .map_err(|error| JailError::Namespaces(error.into()))?;
    let sockets = sockets.map(|_| clone_working_directory()).transpose()?;
    // A user who is not mapped can create no file. Capabilities are not lost by this: it is not
    // root of the new namespace that goes.
    let (uid, gid) = (Uid::from_raw(identity.uid), Gid::from_raw(identity.gid));
    set_thread_res_gid(gid, gid, gid).map_err(step("become its group"))?;
    set_thread_res_uid(uid, uid, uid).map_err(step("become its user"))?;
    empty_root(sockets)?;
    umask(Mode::RWXG | Mode::RWXO);
    Ok(())
}

fn unshare() -> Result<(), JailError> {
    let all = UnshareFlags::NEWUSER
        | UnshareFlags::NEWNS
        | UnshareFlags::NEWPID
        | UnshareFlags::NEWNET
        | UnshareFlags::NEWIPC
        | UnshareFlags::NEWUTS
        | UnshareFlags::NEWCGROUP;
    // SAFETY: descriptors stay shared (no CLONE_FILES), so none changes its meaning for others.
    unsafe { unshare_unsafe(all) }.map_err(|error| JailError::Namespaces(error.into()))
}

/// Maps the user and group of the process onto themselves; anyone may do so much
/// (user_namespaces(7)).
fn map_self(identity: &Identity) -> io::Result<()> {
    let Identity { uid, gid, .. } = identity;
    fs::write("/proc/self/setgroups", "deny")?;
    fs::write("/proc/self/gid_map", format!("{gid} {gid} 1"))?;
    fs::write("/proc/self/uid_map", format!("{uid} {uid} 1"))
}

/// A child that stays in the old user namespace with its privileges, to map into the new one a
/// user whom the process itself is not.
struct Mapper {
    child: libc::pid_t,
    go: PipeWriter,
}

impl Mapper {
    fn start(identity: &Identity) -> Result<Self, JailError> {
        let (wait, go) = io::pipe().map_err(step("make a pipe"))?;
        let Identity { uid, gid, .. } = identity;
        let pid = getpid().as_raw_nonzero();
        let maps = [
            (format!("/proc/{pid}/gid_map"), format!("{gid} {gid} 1")),
            (format!("/proc/{pid}/uid_map"), format!("{uid} {uid} 1")),
        ];
        // SAFETY: the process has one thread, so that its child is whole.
        let child = check(unsafe { libc::fork() }).map_err(step("start a child"))?;
        if child != 0 {
            return Ok(Self { child, go });
        }
        drop(go);
        let status = c_status(write_maps(wait, &maps));
        // SAFETY: ends this process, which has nothing to clean up.
        unsafe { libc::_exit(status) }
    }

    fn map(self) -> Result<(), JailError> {
        let failed = "map the user into the new namespace";
        let Self { child, mut go } = self;
        go.write_all(b"!").map_err(step(failed))?;
        let mut status = 0;
        // SAFETY: the pointer is to a live variable.
        while unsafe { libc::waitpid(child, &raw mut status, 0) } < 0 {
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(step(failed)(error));
            }
        }
        match libc::WEXITSTATUS(status) {
            0 if libc::WIFEXITED(status) => Ok(()),
            error => Err(step(failed)(io::Error::from_raw_os_error(error))),
        }
    }
}

fn write_maps(mut wait: PipeReader, maps: &[(String, String)]) -> io::Result<()> {
    let mut go = [0];
    wait.read_exact(&mut go)?;
    maps.iter().try_for_each(|(path, map)| fs::write(path, map))
}

/// The exit status that tells of an error: its number.
fn c_status(result: io::Result<()>) -> i32 {
    result.map_or_else(|error| error.raw_os_error().unwrap_or(libc::EIO), |()| 0)
}

/// A copy of the mount that the working directory is in, with that directory as its root.
fn clone_working_directory() -> Result<OwnedFd, JailError> {
    open_tree(
        CWD,
        "",
        OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_EMPTY_PATH,
    )
    .map_err(step("mount the directory of the sockets"))
}

/// Makes an empty, read-only file system the root, with `sockets` as the only directory in it.
fn empty_root(sockets: Option<OwnedFd>) -> Result<(), JailError> {
    /// Any directory that is there will do: the process leaves it in a moment.
    const SCAFFOLD: &str = "/proc";
    let inert = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount(
        "none",
        SCAFFOLD,
        "tmpfs",
        inert,
        c"mode=0555,size=4k,nr_inodes=2",
    )
    .map_err(step("mount an empty file system"))?;
    chdir(SCAFFOLD).map_err(step("go to the new root"))?;
    let read_only = inert | MountFlags::RDONLY | MountFlags::BIND;
    if let Some(sockets) = sockets {
        let name = SOCKET_DIRECTORY.trim_start_matches('/');
        mkdir(name, Mode::RUSR | Mode::XUSR).map_err(step("make the directory of the sockets"))?;
        move_mount(
            &sockets,
            "",
            CWD,
            name,
            MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
        )
        .map_err(step("mount the directory of the sockets"))?;
        mount_remount(name, read_only, "")
            .map_err(step("make the directory of the sockets read-only"))?;
    }
    // With the same directory twice, the old root comes to lie on the new one (pivot_root(2)).
    pivot_root(".", ".").map_err(step("change the root"))?;
    unmount(".", UnmountFlags::DETACH).map_err(step("leave the old root"))?;
    chdir("/").map_err(step("go to the new root"))?;
    mount_remount("/", read_only, "").map_err(step("make the new root read-only"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(uid: Option<u32>, gid: Option<u32>) -> JailConfig {
        JailConfig {
            uid,
            gid,
            cgroup: None,
        }
    }

    #[test]
    fn root_never_stays_root() {
        let identity = Identity::choose_as(0, 0, &config(None, None)).unwrap();
        assert!(identity.own && identity.uid >= FIRST_UID && identity.gid == identity.uid);
        let identity = Identity::choose_as(0, 0, &config(Some(5), Some(6))).unwrap();
        assert_eq!((identity.uid, identity.gid), (5, 6));
        for bad in [0, u32::MAX] {
            for config in [config(Some(bad), Some(7)), config(Some(7), Some(bad))] {
                let error = Identity::choose_as(0, 0, &config).unwrap_err();
                assert!(matches!(error, JailError::Root));
            }
        }
    }

    #[test]
    fn others_stay_who_they_are() {
        let identity = Identity::choose_as(1000, 100, &config(None, Some(100))).unwrap();
        assert!(!identity.own && identity.uid == 1000 && identity.gid == 100);
        assert!(identity.to_string().contains("without root"));
        let error = Identity::choose_as(1000, 100, &config(Some(5), None)).unwrap_err();
        assert!(matches!(error, JailError::NotRoot { uid: 5, gid: 100 }));
    }
}
