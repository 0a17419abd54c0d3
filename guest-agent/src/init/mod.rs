//! From the kernel's start of `/init` to a guest that programs can run in.
//!
//! ```text
//! initramfs:   /sys /dev /proc ─> modules ─> root device ─> root mounted at /root
//! root disk:   moved to / ─> /run /dev/pts /dev/shm /tmp /sys/fs/cgroup ─> lo, host name
//! ```
//!
//! The agent itself goes on running from the initramfs' memory: the root disk needs no part of
//! it, and a program cannot replace it. Without `root=` the guest stays in the initramfs.

mod cmdline;
mod grow;
mod hotplug;
mod modules;
mod uevent;

use std::{
    ffi::CString,
    fs, io,
    os::{
        fd::AsRawFd,
        unix::fs::{DirBuilderExt, PermissionsExt, symlink},
    },
    path::{Path, PathBuf},
    time::Duration,
};

use cmdline::BootOptions;
pub use hotplug::{online_added_cpus, online_cpus};
use rustix::{
    io::Errno,
    mount::{MountFlags, mount, mount_move},
    process::{Resource, Rlimit, chdir, chroot, setrlimit},
    system::sethostname,
};
use uevent::Uevents;

use crate::log::{info, use_kernel_log, warning};

/// How long the root device may take to appear.
const ROOT_TIMEOUT: Duration = Duration::from_secs(30);
/// Where the root disk is mounted before it becomes `/`.
const NEW_ROOT: &str = "/root";
/// How many files a program of the guest may open: what it gets, and up to what it may raise.
const OPEN_FILES: (u64, u64) = (1024, 1 << 20);
/// The directory of cgroup v2 in which execs get theirs.
pub const CGROUPS: &str = "/sys/fs/cgroup/agent";

/// Why there is no guest to serve.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    /// A file system that the agent needs cannot be mounted.
    #[error("cannot mount {what} at {at}")]
    Mount {
        /// The device or type.
        what: String,
        /// Where.
        at: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The command line cannot be read.
    #[error("cannot read /proc/cmdline")]
    Cmdline(#[source] io::Error),
    /// Waiting for devices is impossible.
    #[error("cannot wait for devices")]
    Uevents(#[source] io::Error),
    /// The root device did not appear.
    #[error(
        "the root device {0} has not appeared within {ROOT_TIMEOUT:?}; is there a disk, and does \
         the kernel have its driver?"
    )]
    NoRoot(PathBuf),
    /// The root disk cannot become `/`.
    #[error("cannot move into the root disk")]
    Switch(#[source] io::Error),
}

/// Sets the guest up.
///
/// # Errors
/// [`InitError`]
pub fn run() -> Result<(), InitError> {
    let device_flags = MountFlags::NOSUID | MountFlags::NOEXEC;
    let kernel_flags = device_flags | MountFlags::NODEV;
    mount_new("sysfs", "/sys", kernel_flags, c"")?;
    // Before anything else: this moment is what a boot timer waits for.
    tell_boot_timer();
    mount_new("devtmpfs", "/dev", device_flags, c"mode=0755")?;
    use_kernel_log();
    mount_new("proc", "/proc", kernel_flags, c"")?;
    hotplug::online_memory();
    let line = fs::read_to_string("/proc/cmdline").map_err(InitError::Cmdline)?;
    let options = BootOptions::parse(&line);
    modules::load(Path::new("/modules"));

    if let Some(root) = &options.root {
        mount_root(root, &options)?;
        switch_root().map_err(InitError::Switch)?;
    }
    furnish(&options);
    Ok(())
}

/// Mounts a file system that the kernel makes up, unless it is there already.
fn mount_new(
    kind: &str,
    at: &str,
    flags: MountFlags,
    data: &std::ffi::CStr,
) -> Result<(), InitError> {
    // Fails where the directory exists; whether it is there, mount will tell.
    let _ = fs::DirBuilder::new().mode(0o755).create(at);
    match mount(kind, at, kind, flags, data) {
        Ok(()) | Err(Errno::BUSY) => Ok(()),
        Err(error) => Err(InitError::Mount {
            what: kind.to_owned(),
            at: at.into(),
            source: error.into(),
        }),
    }
}

fn mount_root(root: &Path, options: &BootOptions) -> Result<(), InitError> {
    if !root.exists() {
        let uevents = Uevents::subscribe().map_err(InitError::Uevents)?;
        if !uevents
            .wait_for(root, ROOT_TIMEOUT)
            .map_err(InitError::Uevents)?
        {
            return Err(InitError::NoRoot(root.to_owned()));
        }
    }
    let _ = fs::DirBuilder::new().mode(0o755).create(NEW_ROOT);
    let mut flags = MountFlags::empty();
    flags.set(MountFlags::RDONLY, options.read_only);
    let data = CString::new(options.flags.as_str()).unwrap_or_default();
    let mut last = io::Error::from(io::ErrorKind::InvalidInput);
    for kind in &options.filesystems {
        match mount(root, NEW_ROOT, kind.as_str(), flags, &*data) {
            Ok(()) => {
                if !options.read_only {
                    fill_disk(root);
                }
                return Ok(());
            }
            Err(error) => last = error.into(),
        }
    }
    Err(InitError::Mount {
        what: format!("{} ({})", root.display(), options.filesystems.join(", ")),
        at: NEW_ROOT.into(),
        source: last,
    })
}

/// Makes the root file system as large as its disk. One that stays as it was is of use too.
fn fill_disk(root: &Path) {
    match grow::grow(root, Path::new(NEW_ROOT)) {
        Ok(None) => {}
        Ok(Some(size)) => info!("the root file system has grown to {} MiB", size >> 20),
        Err(error) => warning!("the root file system does not fill its disk: {error}"),
    }
}

/// Makes the root disk `/`, and takes the mounted file systems along.
fn switch_root() -> io::Result<()> {
    for at in ["dev", "proc", "sys"] {
        let target = Path::new(NEW_ROOT).join(at);
        // An image may lack the directory; on a read-only one the move then fails.
        let _ = fs::DirBuilder::new().mode(0o755).create(&target);
        mount_move(Path::new("/").join(at), target)?;
    }
    chdir(NEW_ROOT)?;
    mount_move(".", "/")?;
    chroot(".")?;
    chdir("/")?;
    Ok(())
}

/// Tells the boot timer of the VMM, if it has one, that the first process runs: reading the
/// attribute makes the kernel evaluate an ACPI method, which writes to the timer's register.
fn tell_boot_timer() {
    // Fails without a timer.
    let _ = fs::read("/sys/bus/acpi/devices/MVSB0001:00/sun");
}

/// What programs expect to find. None of it is worth giving the guest up for.
fn furnish(options: &BootOptions) {
    let common = MountFlags::NOSUID | MountFlags::NODEV;
    let _ = fs::create_dir("/dev/pts");
    let _ = fs::create_dir("/dev/shm");
    for (kind, at, flags, data) in [
        ("tmpfs", "/run", common, c"mode=0755,size=20%"),
        (
            "devpts",
            "/dev/pts",
            MountFlags::NOSUID | MountFlags::NOEXEC,
            c"gid=5,mode=0620,ptmxmode=0666",
        ),
        ("tmpfs", "/dev/shm", common, c"mode=1777"),
        (
            "cgroup2",
            "/sys/fs/cgroup",
            common | MountFlags::NOEXEC,
            c"nsdelegate",
        ),
    ] {
        warn(mount_new(kind, at, flags, data));
    }
    for (name, target) in [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "/proc/self/fd/0"),
        ("/dev/stdout", "/proc/self/fd/1"),
        ("/dev/stderr", "/proc/self/fd/2"),
    ] {
        let _ = symlink(target, name);
    }
    warn(make_tmp());
    warn(loopback_up());
    warn(name_host(options));
    // More may be open at once than the kernel's default hard limit for the first process.
    let (current, maximum) = OPEN_FILES;
    warn(setrlimit(
        Resource::Nofile,
        Rlimit {
            current: Some(current),
            maximum: Some(maximum),
        },
    ));
}

fn warn<E: std::error::Error>(result: Result<(), E>) {
    if let Err(error) = result {
        warning!("{}", crate::log::chain(&error));
    }
}

/// `/tmp` stays on the root disk, which is larger than the memory; only where that cannot be
/// written, memory has to do.
fn make_tmp() -> Result<(), InitError> {
    match fs::DirBuilder::new().mode(0o1777).create("/tmp") {
        // The mask of the process may have taken bits away.
        Ok(()) => {
            let _ = fs::set_permissions("/tmp", fs::Permissions::from_mode(0o1777));
        }
        Err(_) if rustix::fs::access("/tmp", rustix::fs::Access::WRITE_OK).is_ok() => {}
        Err(_) => {
            let flags = MountFlags::NOSUID | MountFlags::NODEV;
            mount_new("tmpfs", "/tmp", flags, c"mode=1777")?;
        }
    }
    Ok(())
}

/// Brings the loopback interface up (netdevice(7)); the kernel gives it its addresses then.
fn loopback_up() -> io::Result<()> {
    let socket = rustix::net::socket_with(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::DGRAM,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )?;
    // SAFETY: ifreq is plain numbers, for which zero is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(*b"lo\0") {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
    // SAFETY: SIOCSIFFLAGS reads an ifreq.
    match unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Sets the host name: from the command line, else from the root disk.
fn name_host(options: &BootOptions) -> io::Result<()> {
    let name = match &options.hostname {
        Some(name) => name.clone(),
        None => match fs::read_to_string("/etc/hostname") {
            Ok(text) => text,
            Err(_) => return Ok(()),
        },
    };
    let name = name.trim();
    if !name.is_empty() {
        sethostname(name.as_bytes())?;
        info!("host name {name}");
    }
    Ok(())
}
