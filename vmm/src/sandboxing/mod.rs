//! The jail: what a guest that has taken over its VMM finds is an empty room.
//!
//! The VMM opens all that it needs (see [`crate::resources`]), enters the jail, and only then looks
//! at anything that may be hostile. What it has then is its open descriptors and nothing else.
//!
//! ```text
//!  started process                                    waiter
//!  ───────────────                                    ──────
//!  open everything                              ┌───► holds no descriptor but standard error,
//!  join the cgroup, drop supplementary groups   │     passes signals on, waits, ends as the
//!  new user, mount, pid, net, ipc, uts and      │     VMM ended; if it dies, the VMM does
//!    cgroup namespaces; own uid and gid         │
//!  empty read-only root; old root detached      │     VMM, PID 1 of its namespace
//!  limits ──────────────────────────────────────┤     ───────────────────────────
//!                                           fork└───► its own page table, opened
//!                                                     no capability, no new privileges
//!  (the waiter: both of these too)                    Landlock
//!                                                     filter of system calls for all threads,
//!                                                     then one more for each kind of thread
//! ```
//!
//! All of it happens while the process has one thread: a user namespace cannot be entered by a
//! process with several, and a fork would lose them.
//!
//! A step that cannot be taken is an error: there is no jail with holes. Two things are taken if
//! they are there, and the log says so if not: Landlock, which the kernel may lack, and a session
//! keyring of its own.
//!
//! | Layer | Module |
//! |---|---|
//! | namespaces, own uid, root file system | [`namespaces`] |
//! | capabilities, limits, keyring | `privileges` |
//! | file system and signals once more, by Landlock | `landlock` |
//! | system calls | [`seccomp`] |
//! | the process that stays outside of the PID namespace | `waiter` |

mod landlock;
pub mod namespaces;
mod privileges;
pub mod seccomp;
mod waiter;

use std::ffi::c_int;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, open};
use rustix::process::{DumpableBehavior, set_dumpable_behavior};

use self::namespaces::Identity;
pub use self::seccomp::{SeccompError, ThreadKind};
use crate::memory::pagemap::Pagemap;

/// Where the directory with the sockets of host programs is in the jail.
pub const SOCKET_DIRECTORY: &str = "/vsock";

/// The first uid that is chosen if root names none. The range from here up is unused by
/// distributions, containers and systemd (see its UIDS-GIDS.md).
pub const FIRST_UID: u32 = 0x7100_0000;

/// How to jail.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct JailConfig {
    /// The user to become, if started as root. Nothing else should run as this user. By default,
    /// [`FIRST_UID`] and the process's id.
    pub uid: Option<u32>,
    /// The group to become, if started as root; by default the number of the user.
    pub gid: Option<u32>,
    /// Directory of a cgroup (version 2) to move into first.
    pub cgroup: Option<PathBuf>,
}

/// Why the jail could not be entered.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// Root asked to stay root.
    #[error("--jail: uid and gid must be 1 to 4294967294; root has no place in a jail")]
    Root,
    /// Only root can become someone else.
    #[error(
        "--jail: uid={uid},gid={gid} was asked for, but only root can become another user; start \
         as root, or leave both away to keep your own"
    )]
    NotRoot {
        /// The user asked for.
        uid: u32,
        /// The group asked for.
        gid: u32,
    },
    /// The kernel gives no namespaces.
    #[error(
        "this host allows this user no namespaces; the sysctls user.max_user_namespaces (not 0), \
         kernel.unprivileged_userns_clone (1, if there is one) and \
         kernel.apparmor_restrict_unprivileged_userns (0, if there is one) decide, and in a \
         container its seccomp profile; or start as root, or without --jail"
    )]
    Namespaces(#[source] io::Error),
    /// The cgroup takes no process.
    #[error("cannot join the cgroup {path}", path = path.display())]
    Cgroup {
        /// Its directory.
        path: PathBuf,
        /// What the host says.
        #[source]
        source: io::Error,
    },
    /// Another step failed.
    #[error("cannot jail the process: {action}")]
    Step {
        /// What was tried.
        action: &'static str,
        /// What the host says.
        #[source]
        source: io::Error,
    },
    /// No filter.
    #[error("cannot filter the system calls")]
    Seccomp(#[from] SeccompError),
}

/// Makes an error of a step.
fn step<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> JailError {
    move |source| JailError::Step {
        action,
        source: source.into(),
    }
}

/// The result of a system call that answers -1 and sets `errno` if it fails.
fn check(result: c_int) -> io::Result<c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Enters the jail. The process that returns is another than the one that called, with all of its
/// descriptors; that one stays behind as the waiter, and ends as this one ends. Returns the
/// process's page table, which snapshots are made with, if the host shows it.
///
/// `sockets` is the directory that guest programs reach sockets of the host in; it becomes
/// [`SOCKET_DIRECTORY`]. The process must have no other thread.
///
/// # Errors
/// One of the steps failed. The process is then in no state to run anything, and should end.
pub fn enter(config: &JailConfig, sockets: Option<&Path>) -> Result<Option<Pagemap>, JailError> {
    let pagemap = enter_unfiltered(config, sockets)?;
    seccomp::begin()?;
    Ok(pagemap)
}

/// [`enter`] but for the filter of system calls: what the other layers hold by themselves.
///
/// # Errors
/// As for [`enter`].
pub fn enter_unfiltered(
    config: &JailConfig,
    sockets: Option<&Path>,
) -> Result<Option<Pagemap>, JailError> {
    let identity = Identity::choose(config)?;
    if let Some(path) = &config.cgroup {
        // A PID of 0 is the writer.
        std::fs::write(path.join("cgroup.procs"), "0").map_err(|source| JailError::Cgroup {
            path: path.clone(),
            source,
        })?;
    }
    let keyring = privileges::leave_keyring();
    let proc = open("/proc", OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
    namespaces::enter(&identity, sockets)?;
    privileges::limit_resources()?;
    let waiter = waiter::fork()?;
    let pagemap = match (&waiter, proc) {
        (None, Ok(proc)) => own_pagemap(&proc),
        _ => None,
    };
    privileges::drop_all()?;
    let landlock = landlock::restrict(waiter.is_some());
    if let Some(waiter) = waiter {
        waiter.wait();
    }
    tracing::info!(
        user = %identity,
        landlock = %landlock,
        keyring = keyring.as_ref().map_or_else(ToString::to_string, |()| "own".to_owned()),
        cgroup = config.cgroup.as_ref().map_or_else(|| "none given".to_owned(), |path| path.display().to_string()),
        "jailed"
    );
    Ok(pagemap)
}

/// The page table of this process, where `proc` is the host's `/proc`.
fn own_pagemap(proc: &OwnedFd) -> Option<Pagemap> {
    // What /proc shows of a process that has changed its user is root's, until the process says
    // that it has nothing to hide. That ends with the capabilities.
    let shown = set_dumpable_behavior(DumpableBehavior::Dumpable).map_err(io::Error::from);
    shown
        .and_then(|()| Pagemap::open_in(proc))
        .inspect_err(|error| tracing::info!(%error, "no page table to make snapshots with"))
        .ok()
}
