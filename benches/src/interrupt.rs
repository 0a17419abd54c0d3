//! SIGINT, SIGTERM and SIGHUP end a measure in order: what it started is ended too.

use std::{
    io,
    sync::atomic::{AtomicBool, Ordering},
};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

extern "C" fn note(_signal: libc::c_int) {
    INTERRUPTED.store(true, Ordering::Relaxed);
}

/// From now on these signals are noted, and interrupt what waits.
///
/// # Errors
/// The kernel refuses.
pub fn catch_signals() -> io::Result<()> {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        // SAFETY: sigaction is plain numbers and pointers, for which zero is valid: no flags (so
        // that waiting calls return EINTR) and an empty mask.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = note as *const () as libc::sighandler_t;
        // SAFETY: the handler does nothing but store to an atomic, which any signal may
        // interrupt.
        if unsafe { libc::sigaction(signal, &raw const action, std::ptr::null_mut()) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Whether such a signal came.
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}
