//! Taking over machines that an earlier daemon has started.
//!
//! ```text
//!  its note ─► its process ─► its vmm answers ─┬─► runs ───────────────────┬─► its agent answers: taken over
//!     │             │              │           └─► stopped, in a save      │          │
//!     │             │              │                  that nobody ends:    │          │
//!     │             │              │                  disk as noted, goes on          │
//!     └─────────────┴──────────────┴────────────────────────┴──────────────┴──────────┘
//!                  not so: it is ended, and what is there of it is removed
//! ```
//!
//! A save that its daemon did not live to see the end of has happened or not. What decides is the
//! note, which is changed while the guest stands still, after its disk was replaced: the file that the
//! note names is the disk, and layers that are in no record are removed.

use std::io;
use std::path::Path;

use rustix::process::Signal;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tracing::{error, info, warn};

use super::Inner;
use super::cgroup::Cgroup;
use super::control::Control;
use super::entry::{Entry, Order};
use super::life::{Begin, Held, Outcome, close, not_started};
use super::machine::{Machine, NotReady};
use super::nic::Nic;
use super::note::{self, Note};
use super::process::Process;
use super::{HostError, LeftoverError, leftovers};
use crate::domain::{AdoptRequest, Adopted, PrepareRequest, Resources, SandboxId};
use crate::images::Chain;

/// A machine that an earlier daemon has started.
pub struct Found {
    /// What is written down of it.
    pub note: Note,
    /// Its process.
    pub process: Process,
}

/// What came of each request.
type Outcomes = Vec<(SandboxId, Result<Adopted, HostError>)>;

impl Found {
    /// Ends it, without a word of why.
    pub(super) async fn end(mut self, id: &SandboxId) {
        let killed = self.process.signal(Signal::KILL);
        let ended = self.process.wait().await;
        if let Err(error) = killed.and(ended.map(drop)) {
            error!(sandbox = %id, %error, "the vmm of an earlier daemon is not ended");
        }
    }
}

impl Inner {
    /// Takes over what is asked for, and ends and removes all else that an earlier daemon has left.
    pub(super) async fn adopt(
        self: &std::sync::Arc<Self>,
        requests: Vec<AdoptRequest>,
    ) -> Result<Outcomes, LeftoverError> {
        let mut outcomes = Vec::new();
        let mut whole = Vec::new();
        for request in requests {
            let id = request.id.clone();
            match self.find(request) {
                Ok(found) => whole.push(found),
                Err(error) => outcomes.push((id, Err(error))),
            }
        }
        let keep: std::collections::BTreeSet<_> = whole
            .iter()
            .map(|(request, ..)| request.id.clone())
            .collect();
        let inner = std::sync::Arc::clone(self);
        let removed = tokio::task::spawn_blocking(move || {
            leftovers::remove(&inner.config.paths, inner.cgroups.as_ref(), &keep)
        });
        removed.await.map_err(|_| LeftoverError::Interrupted)??;
        let mut under_way = Vec::new();
        for (request, found, chain) in whole {
            let id = request.id.clone();
            let (reply, outcome) = tokio::sync::oneshot::channel();
            let begun = self.enter(request, chain, Begin::Found(reply), Some(found));
            under_way.push((id, begun.map(|()| outcome)));
        }
        for (id, outcome) in under_way {
            let outcome = match outcome {
                Ok(outcome) => outcome.await.unwrap_or_else(|_| Err(super::ended_early())),
                Err(error) => Err(error),
            };
            outcomes.push((id, outcome));
        }
        Ok(outcomes)
    }

    /// The process of a sandbox, and what its disk is made on.
    fn find(&self, request: AdoptRequest) -> Result<(PrepareRequest, Found, Chain), HostError> {
        let AdoptRequest {
            id,
            shape,
            layers,
            nic,
            disk_mb,
        } = request;
        let failed = |reason: String| HostError::Start { reason };
        let paths = &self.config.paths;
        let note = Note::read(paths, &id).map_err(|error| {
            failed(format!(
                "what is written down of its machine cannot be read: {error}"
            ))
        })?;
        let not_running = || HostError::NotRunning { id: id.clone() };
        let note = note.ok_or_else(not_running)?;
        let unknown =
            |error: io::Error| failed(format!("its process cannot be looked at: {error}"));
        let handle = note.process.open().map_err(unknown)?;
        let handle = handle.ok_or_else(not_running)?;
        if leftovers::sandbox_of(paths, note.process.pid()) != Some(id.clone()) {
            return Err(failed(
                "the process that is written down is not its vmm".to_owned(),
            ));
        }
        let process = Process::found(handle).map_err(unknown)?;
        // What it was saved to last may not have come to be written down in its record.
        let layers = match note.layers.is_one_save_after(&layers) {
            true => note.layers.clone(),
            false => layers,
        };
        let mut chain = self.chain(&shape, &layers, None)?;
        if let Some(disk_mb) = disk_mb {
            chain.base.grow(disk_mb);
        }
        let request = PrepareRequest {
            id,
            shape,
            layers,
            nic,
            scratch_mb: None,
            disk_mb,
            // Its machine is there, and its cgroup.
            resources: Resources::default(),
        };
        Ok((request, Found { note, process }, chain))
    }

    /// Has a machine that was found go on, and waits until its agent answers.
    async fn settle(
        &self,
        entry: &Entry,
        machine: &mut Machine,
        note: &Note,
        (id, chain): (&SandboxId, &Chain),
    ) -> Result<(), NotReady> {
        let control = machine.control().clone();
        let timeout = self.config.boot_timeout;
        let deadline = Instant::now() + timeout;
        let settled = async {
            let is_stopped = control.is_paused().await.map_err(NotReady::Control)?;
            self.settle_disk(&control, is_stopped, note, (id, chain))
                .await
                .map_err(|error| NotReady::Disk(crate::chain(&error)))?;
            if is_stopped {
                info!(sandbox = %id, "it was being saved when the earlier daemon ended; it goes on");
                control.resume().await.map_err(NotReady::Control)?;
            }
            entry
                .agent
                .healthy(deadline)
                .await
                .map_err(NotReady::Silent)
        };
        tokio::select! {
            biased;
            () = entry.end_asked() => Err(NotReady::Destroyed),
            settled = settled => settled,
            () = machine.exited() => Err(NotReady::Exited(Ok(None))),
            () = tokio::time::sleep_until(deadline) => Err(NotReady::TimedOut(timeout)),
        }
    }

    /// Has the machine write to the file that is noted, under its name.
    async fn settle_disk(
        &self,
        control: &Control,
        is_stopped: bool,
        note: &Note,
        (id, chain): (&SandboxId, &Chain),
    ) -> Result<(), DiskError> {
        let paths = &self.config.paths;
        let (disk, next) = (paths.disk(id), paths.next_disk(id));
        match inode(&next)? {
            Some(found) if found == note.disk => std::fs::rename(&next, &disk)?,
            Some(_) => {
                if is_stopped {
                    // It may have been given the other already, and has not written to it.
                    super::save::hand_over_disk(control, chain, &disk).await?;
                }
                warn!(sandbox = %id, "a new disk that it was not to get any more is removed");
                std::fs::remove_file(&next)?;
            }
            None => {}
        }
        match inode(&disk)? {
            Some(found) if found == note.disk => Ok(()),
            _ => Err(DiskError::Another),
        }
    }

    /// What a machine that was found has for its jail. The error is a sentence.
    pub(super) fn jail_of(&self, note: &Note) -> Result<Held, String> {
        let user = match (&self.users, note.user) {
            (Some(users), Some(uid)) => {
                let user = users.take_over(uid);
                Some(user.ok_or("its user is none of those that sandboxes have now")?)
            }
            _ => None,
        };
        let cgroup = note.cgroup.clone().map(|path| Cgroup { path });
        Ok(Held { user, cgroup })
    }

    /// Takes a machine over, with its network card.
    pub(super) async fn connect_and_take_over(
        &self,
        entry: &Entry,
        request: PrepareRequest,
        chain: Chain,
        found: Found,
        orders: mpsc::Receiver<Order>,
        begin: &mut Option<Begin>,
    ) -> Outcome {
        let network = self.config.networks.as_deref();
        let (id, tap) = (&request.id, found.note.tap.clone());
        let nic = match Nic::take_over(network, id, request.nic.as_ref(), tap).await {
            Ok(nic) => nic,
            Err(reason) => {
                found.end(id).await;
                return Outcome::NotStarted(HostError::Start { reason });
            }
        };
        let outcome = self
            .take_over(entry, request, chain, found, nic.as_ref(), orders, begin)
            .await;
        close(nic, entry).await;
        outcome
    }

    #[expect(
        clippy::too_many_arguments,
        reason = "the parts of one sandbox, each with a life of its own"
    )]
    async fn take_over(
        &self,
        entry: &Entry,
        request: PrepareRequest,
        chain: Chain,
        Found { note, process }: Found,
        nic: Option<&Nic<'_>>,
        orders: mpsc::Receiver<Order>,
        begin: &mut Option<Begin>,
    ) -> Outcome {
        let (id, paths) = (&request.id, &self.config.paths);
        let mut machine = match Machine::take_over(paths, id, process, note.is_jailed) {
            Ok(machine) => machine,
            Err(failed) => {
                let (process, error) = *failed;
                Found { note, process }.end(id).await;
                return Outcome::NotStarted(HostError::Start {
                    reason: format!("its pipes cannot be opened: {error}"),
                });
            }
        };
        let settled = async {
            self.settle(entry, &mut machine, &note, (id, &chain))
                .await?;
            match nic {
                Some(nic) => nic.attach().await.map_err(NotReady::Network),
                None => Ok(()),
            }
        };
        if let Err(why) = settled.await {
            return not_started(&mut machine, why).await;
        }
        info!(sandbox = %id, pid = note.process.pid(), "a running sandbox is taken over");
        let _ = entry.process.set(note.process);
        entry.set_running(true);
        if let Some(Begin::Found(reply)) = begin.take() {
            let layers = request.layers.clone();
            let _ = reply.send(Ok(Adopted { layers }));
        }
        let outcome = self.follow(entry, &mut machine, chain, orders).await;
        entry.set_running(false);
        outcome
    }
}

/// Why a machine does not have the disk that it is to have.
#[derive(Debug, thiserror::Error)]
enum DiskError {
    #[error("its disk cannot be looked at or put in place")]
    Files(#[from] io::Error),
    #[error(transparent)]
    HandOver(#[from] super::save::HandOverError),
    #[error("its disk is not the file that is written down")]
    Another,
}

/// The number of the file of this name; `None` if there is none.
fn inode(path: &Path) -> io::Result<Option<u64>> {
    match note::inode(path) {
        Ok(inode) => Ok(Some(inode)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}
