//! The one place that waits for processes.
//!
//! As the init process (or, outside of a guest, as a child subreaper) the agent inherits every
//! orphan. It waits for all children alike, whenever SIGCHLD says that there are some, hands the
//! status of those that somebody asked for to them, and drops the rest. Nobody else may call a
//! wait function.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    io,
    rc::Rc,
};

use rustix::process::{Pid, WaitOptions, WaitStatus};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{Notify, oneshot},
    task::JoinHandle,
};

/// Waits for children. All users are on one thread.
#[derive(Debug, Default)]
pub struct Reaper {
    waiting: RefCell<HashMap<Pid, oneshot::Sender<WaitStatus>>>,
    childless: Cell<bool>,
    changed: Notify,
}

impl Reaper {
    /// Starts to wait for children.
    ///
    /// # Errors
    /// If the SIGCHLD handler cannot be installed.
    pub fn start() -> io::Result<(Rc<Self>, JoinHandle<()>)> {
        let reaper = Rc::new(Self::default());
        let mut child = signal(SignalKind::child())?;
        let task = tokio::task::spawn_local({
            let reaper = reaper.clone();
            async move {
                loop {
                    reaper.reap();
                    if child.recv().await.is_none() {
                        return;
                    }
                }
            }
        });
        Ok((reaper, task))
    }

    /// The exit status of a child, once it has one. To be called before control returns to the
    /// runtime after the child was made.
    pub fn exit_of(&self, pid: Pid) -> oneshot::Receiver<WaitStatus> {
        let (sender, receiver) = oneshot::channel();
        self.waiting.borrow_mut().insert(pid, sender);
        receiver
    }

    /// Whether the exit of `pid` was asked for and has not been seen, so that the number still
    /// belongs to that child.
    pub fn expects(&self, pid: Pid) -> bool {
        self.waiting.borrow().contains_key(&pid)
    }

    /// Returns when no child is left.
    pub async fn all_gone(&self) {
        loop {
            // Registered before looking, so that a change in between is not missed.
            let changed = self.changed.notified();
            self.reap();
            if self.childless.get() {
                return;
            }
            changed.await;
        }
    }

    fn reap(&self) {
        loop {
            match rustix::process::wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => {
                    if let Some(sender) = self.waiting.borrow_mut().remove(&pid) {
                        // The one who asked may have given up.
                        let _ = sender.send(status);
                    }
                }
                Ok(None) => {
                    self.childless.set(false);
                    break;
                }
                // The only other failure, ECHILD, says that there are no children.
                Err(_) => {
                    self.childless.set(true);
                    break;
                }
            }
        }
        self.changed.notify_waiters();
    }
}
