//! Holding the root file system still while the host copies its disk: `POST /v1/freeze`.
//!
//! One thread freezes it and thaws it again, whatever becomes of the rest of the agent: those that
//! work on files may all be waiting for the thaw, and the host may be gone.
//!
//! ```text
//! FIFREEZE ──done──► held ──host says so, its connection ends, time is over──► FITHAW
//!     │ fails                                                                   ▲
//!     ▼                  nobody waits for it any more ──────────────────────────┘
//!   error
//! ```

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use tokio::sync::oneshot;

use crate::log::warning;

/// `_IOWR('X', 119, int)` and `_IOWR('X', 120, int)` of `linux/fs.h`.
const FIFREEZE: libc::Ioctl = 0xc004_5877_u32 as libc::Ioctl;
const FITHAW: libc::Ioctl = 0xc004_5878_u32 as libc::Ioctl;
/// Stack of the thread, in bytes.
const STACK: usize = 128 * 1024;

/// Why the file system is not frozen.
#[derive(Debug, thiserror::Error)]
pub enum FreezeError {
    /// No thread, or `/` cannot be opened.
    #[error("the root file system cannot be frozen")]
    Prepare(#[source] io::Error),
    /// The kernel refuses: another is at it (EBUSY), or its type cannot (EOPNOTSUPP).
    #[error("the kernel does not freeze the root file system")]
    Refused(#[source] io::Error),
    /// The thread is gone.
    #[error("the thread that freezes the root file system is gone")]
    Thread,
}

/// A file system that is frozen until this is dropped, or its time is over.
#[derive(Debug)]
pub struct Frozen {
    /// Its end is the order to thaw.
    hold: mpsc::Sender<()>,
    outcome: oneshot::Receiver<bool>,
}

impl Frozen {
    /// Freezes the root file system for `time` at most. Without `is_real` all is the same but that
    /// nothing is frozen.
    ///
    /// # Errors
    /// Nothing is frozen.
    pub async fn freeze(time: Duration, is_real: bool) -> Result<Self, FreezeError> {
        let root = is_real
            .then(|| File::open("/"))
            .transpose()
            .map_err(FreezeError::Prepare)?;
        let (hold, end) = mpsc::channel();
        let (tell, told) = oneshot::channel();
        let (ended, outcome) = oneshot::channel();
        thread::Builder::new()
            .name("freeze".into())
            .stack_size(STACK)
            .spawn(move || {
                let root = root.as_ref();
                let frozen = root.map_or(Ok(()), |root| ask(root, FIFREEZE));
                let is_frozen = frozen.is_ok();
                let is_awaited = tell.send(frozen).is_ok();
                if !is_frozen {
                    return;
                }
                let in_time = is_awaited && wait(&end, time);
                // Fails if somebody else has thawed it.
                let thawed = root.map_or(Ok(()), |root| ask(root, FITHAW));
                if let Err(error) = &thawed {
                    warning!("the root file system was not frozen any more: {error}");
                }
                // Whoever asked may be gone.
                let _ = ended.send(in_time && thawed.is_ok());
            })
            .map_err(FreezeError::Prepare)?;
        told.await
            .map_err(|_| FreezeError::Thread)?
            .map_err(FreezeError::Refused)?;
        Ok(Self { hold, outcome })
    }

    /// Returns when the time is over.
    pub async fn time_is_over(&mut self) {
        let _ = (&mut self.outcome).await;
    }

    /// Thaws it. Returns whether it was frozen until then.
    pub async fn thaw(self) -> bool {
        drop(self.hold);
        self.outcome.await.unwrap_or(false)
    }
}

/// Waits for the order, at most for `time`; returns whether it came.
fn wait(end: &mpsc::Receiver<()>, time: Duration) -> bool {
    !matches!(end.recv_timeout(time), Err(mpsc::RecvTimeoutError::Timeout))
}

fn ask(root: &File, request: libc::Ioctl) -> io::Result<()> {
    // SAFETY: these requests take an argument that the kernel does not look at (`ioctl_fsfreeze`
    // and `ioctl_fsthaw` of fs/ioctl.c).
    match unsafe { libc::ioctl(root.as_raw_fd(), request, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn it_is_held_until_the_order_or_the_end_of_its_time() {
        let long = Duration::from_secs(600);
        let frozen = Frozen::freeze(long, false).await.unwrap();
        assert!(frozen.thaw().await);
        let mut frozen = Frozen::freeze(Duration::from_millis(1), false)
            .await
            .unwrap();
        frozen.time_is_over().await;
        // Dropped like this by a host that goes away.
        let frozen = Frozen::freeze(long, false).await.unwrap();
        let Frozen { hold, outcome } = frozen;
        drop(hold);
        assert!(outcome.await.unwrap());
    }

    #[tokio::test]
    async fn what_was_not_held_is_told() {
        let frozen = Frozen::freeze(Duration::ZERO, false).await.unwrap();
        let Frozen { hold, outcome } = frozen;
        assert!(!outcome.await.unwrap());
        drop(hold);
    }
}
