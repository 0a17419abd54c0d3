//! Taking the guest down, as its init process.
//!
//! ```text
//! SIGTERM to all ──all gone, or grace over──> SIGKILL to all ──all gone──> disks ──> reboot(2)
//! ```

use std::time::Duration;

use agent_protocol::ShutdownAction;
use rustix::{
    mount::{MountFlags, mount_remount},
    system::{RebootCommand, reboot},
};
use tokio::{
    signal::unix::{SignalKind, signal},
    time::timeout,
};

use crate::{
    log::{info, warning},
    reaper::Reaper,
};

/// How long processes have between SIGTERM and SIGKILL when a signal asked for the shutdown.
pub const DEFAULT_GRACE: Duration = Duration::from_secs(2);
/// How long to wait for killed processes: one in an uninterruptible system call may never end.
const KILL_GRACE: Duration = Duration::from_secs(2);

/// Stops everything and does `action`. Returns only if the kernel refuses.
pub async fn run(action: ShutdownAction, grace: Duration, reaper: &Reaper) {
    info!("going down: {action:?}");
    signal_all(libc::SIGTERM);
    if timeout(grace, reaper.all_gone()).await.is_err() {
        signal_all(libc::SIGKILL);
        let _ = timeout(KILL_GRACE, reaper.all_gone()).await;
    }
    rustix::fs::sync();
    // Fails on a root that stays busy or was never writable; sync has done the main part.
    let _ = mount_remount("/", MountFlags::RDONLY, c"");
    let command = match action {
        ShutdownAction::Poweroff => RebootCommand::PowerOff,
        ShutdownAction::Reboot => RebootCommand::Restart,
    };
    if let Err(error) = reboot(command) {
        warning!("the kernel refuses to {action:?}: {error}");
    }
}

/// To all processes but the agent itself.
fn signal_all(number: i32) {
    // SAFETY: takes numbers only. As process 1 is the caller, -1 reaches everything else.
    unsafe { libc::kill(-1, number) };
}

/// Returns what a signal asks for: those of the kernel's Ctrl-Alt-Del (SIGINT), of busybox
/// (SIGTERM, SIGUSR1, SIGUSR2), of sysvinit's power failure (SIGPWR), and of systemd's tools
/// (SIGRTMIN+4, SIGRTMIN+5).
///
/// # Errors
/// If a handler cannot be installed.
pub async fn requested() -> std::io::Result<ShutdownAction> {
    let on = |number| signal(SignalKind::from_raw(number));
    let mut interrupt = on(libc::SIGINT)?;
    let mut terminate = on(libc::SIGTERM)?;
    let mut halt = on(libc::SIGUSR1)?;
    let mut off = on(libc::SIGUSR2)?;
    let mut power = on(libc::SIGPWR)?;
    let mut systemd_off = on(libc::SIGRTMIN() + 4)?;
    let mut systemd_reboot = on(libc::SIGRTMIN() + 5)?;
    tokio::select! {
        _ = interrupt.recv() => Ok(ShutdownAction::Reboot),
        _ = terminate.recv() => Ok(ShutdownAction::Reboot),
        _ = systemd_reboot.recv() => Ok(ShutdownAction::Reboot),
        _ = halt.recv() => Ok(ShutdownAction::Poweroff),
        _ = off.recv() => Ok(ShutdownAction::Poweroff),
        _ = power.recv() => Ok(ShutdownAction::Poweroff),
        _ = systemd_off.recv() => Ok(ShutdownAction::Poweroff),
    }
}
