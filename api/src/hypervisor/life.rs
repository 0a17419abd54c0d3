//! The life of one sandbox, from its first file to its last.
//!
//! Each has one task that owns it, so its life is a straight line, and a caller that goes away
//! leaves nothing half done:
//!
//! ```text
//!   prepare ──► spawn ──► wait for the agent ──► running ──► release ──► gone
//!      │          │               │               │   ▲          ▲
//!      │          │               │          save │   │ goes on  │
//!      │          │               │               ▼   │          │
//!      │          │               │              saving ─────────┤ paused
//!      └──────────┴───────────────┴─────────────────┴────────────┘
//!         an error; the vmm's exit; the boot timeout; destroy
//! ```
//!
//! `release` ends the process if it still lives and removes directories, sockets and the disk.
//! Only then is the end told: to the creator, to who asked for the pause, to the destroyer, or as an
//! event.

use std::future::Future;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error};

use super::Inner;
use super::cgroup::Cgroup;
use super::command::Jail;
use super::jail::User;
use super::machine::{Launch, Machine, NotReady};
use super::save::{SaveError, Saving};
use crate::agent::AgentClient;
use crate::domain::{CreateRequest, Created, End, HostError, HostEvent, SaveRequest, Saved};
use crate::images::Chain;

/// A sandbox that this host holds something for.
pub struct Entry {
    /// Its agent.
    pub agent: AgentClient,
    /// Asks its task to save it. One at a time; who asks waits.
    pub orders: mpsc::Sender<Order>,
    /// Its agent has answered, and it has not ended.
    running: AtomicBool,
    /// It was paused.
    paused: CancellationToken,
    /// Asks its task to end it.
    end: CancellationToken,
    /// Its task is done.
    gone: CancellationToken,
    /// What could not be removed, once it is gone.
    leftover: OnceLock<String>,
}

/// Save this sandbox.
pub struct Order {
    /// How.
    pub request: SaveRequest,
    /// What becomes of it.
    pub then: Then,
    /// Where to tell how it went.
    pub reply: oneshot::Sender<Result<Saved, HostError>>,
}

/// What becomes of a sandbox that was saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Then {
    /// It ends.
    End,
    /// It goes on.
    GoOn,
}

impl Entry {
    /// A sandbox whose vsock is there, and where its task gets its orders.
    pub fn new(vsock: PathBuf) -> (Arc<Self>, mpsc::Receiver<Order>) {
        let (orders, received) = mpsc::channel(1);
        let entry = Self {
            agent: AgentClient::new(vsock),
            orders,
            running: AtomicBool::new(false),
            paused: CancellationToken::new(),
            end: CancellationToken::new(),
            gone: CancellationToken::new(),
            leftover: OnceLock::new(),
        };
        (Arc::new(entry), received)
    }

    /// Whether its agent has answered, and it has not ended.
    pub fn is_running(&self) -> bool {
        self.running.load(Ordering::Acquire)
    }

    fn set_running(&self, is_running: bool) {
        self.running.store(is_running, Ordering::Release);
    }

    /// Ends it, and waits until nothing of it is left.
    pub async fn destroy(&self) -> Result<(), HostError> {
        self.end.cancel();
        self.gone.cancelled().await;
        match self.leftover.get() {
            Some(reason) => Err(HostError::Internal {
                reason: reason.clone(),
            }),
            None => Ok(()),
        }
    }

    /// What `work` in it comes to, if it is not paused before.
    pub async fn unless_paused<T>(
        &self,
        work: impl Future<Output = Result<T, HostError>>,
    ) -> Result<T, HostError> {
        tokio::select! {
            biased;
            () = self.paused.cancelled() => Err(HostError::Paused),
            result = work => result,
        }
    }

    /// The same stream, which ends with `error` when it is paused.
    pub fn until_paused<T: Send + 'static, E: Send + 'static>(
        &self,
        stream: BoxStream<'static, Result<T, E>>,
        error: E,
    ) -> BoxStream<'static, Result<T, E>> {
        let state = Some((stream, self.paused.clone(), error));
        stream::unfold(state, async |state| {
            let (mut stream, paused, error) = state?;
            tokio::select! {
                biased;
                () = paused.cancelled() => Some((Err(error), None)),
                item = stream.next() => Some((item?, Some((stream, paused, error)))),
            }
        })
        .boxed()
    }

    fn left(&self, reason: String) {
        let _ = self.leftover.set(reason);
    }
}

/// What a sandbox has of the host for its jail.
struct Held {
    user: Option<User>,
    cgroup: Option<Cgroup>,
}

/// Removes a sandbox's cgroup, whose processes have been ended. The error is a sentence.
async fn remove_cgroup(cgroup: Option<Cgroup>) -> Result<(), String> {
    let Some(cgroup) = cgroup else { return Ok(()) };
    let path = cgroup.path.clone();
    let removed = tokio::task::spawn_blocking(move || cgroup.remove()).await;
    removed
        .unwrap_or_else(|error| Err(std::io::Error::other(error)))
        .map_err(|error| format!("{} cannot be removed: {error}", path.display()))
}

/// How the task of a sandbox came to its end.
enum Outcome {
    NotStarted(HostError),
    Ended(End),
    Paused(Saved, oneshot::Sender<Result<Saved, HostError>>),
    Destroyed,
}

impl Inner {
    /// The life of one sandbox.
    pub async fn live(
        &self,
        entry: &Entry,
        request: CreateRequest,
        chain: Chain,
        orders: mpsc::Receiver<Order>,
        started: oneshot::Sender<Result<Created, HostError>>,
    ) {
        let id = request.id.clone();
        let mut started = Some(started);
        // The user stays this sandbox's until its last file is gone.
        let mut user = None;
        let outcome = match self.prepare_jail(&request) {
            Ok(jail) => {
                let outcome = self
                    .start_and_follow(entry, request, chain, jail.as_ref(), orders, &mut started)
                    .await;
                let (held, cgroup) = jail.map(|jail| (jail.user, jail.cgroup)).unzip();
                user = held.flatten();
                let cgroup = cgroup.flatten();
                if let Err(reason) = remove_cgroup(cgroup).await {
                    error!(sandbox = %id, reason, "the cgroup of the sandbox is left");
                    entry.left(reason);
                }
                outcome
            }
            Err(reason) => Outcome::NotStarted(HostError::Start { reason }),
        };
        if let Err(reason) = self.config.paths.remove(&id).await {
            error!(sandbox = %id, reason, "files of the sandbox are left");
            entry.left(reason);
        }
        drop(user);
        let listeners = {
            let mut state = self.state();
            state.sandboxes.remove(&id);
            state.listeners.retain(|listener| !listener.is_closed());
            state.listeners.clone()
        };
        entry.gone.cancel();
        match (outcome, started) {
            (Outcome::NotStarted(error), Some(started)) => drop(started.send(Err(error))),
            (Outcome::Ended(end), _) => {
                for listener in listeners {
                    // A listener that went away in the meantime misses nothing.
                    let _ = listener.send(HostEvent::Ended {
                        id: id.clone(),
                        end: end.clone(),
                    });
                }
            }
            (Outcome::Paused(saved, reply), _) => drop(reply.send(Ok(saved))),
            (Outcome::Destroyed, Some(started)) => drop(started.send(Err(HostError::Destroyed))),
            (Outcome::NotStarted(_) | Outcome::Destroyed, None) => {}
        }
    }

    /// What the jail of a sandbox needs. The error is a sentence.
    fn prepare_jail(&self, request: &CreateRequest) -> Result<Option<Held>, String> {
        if self.config.jail.is_none() {
            return Ok(None);
        }
        let user = match &self.users {
            Some(users) => Some(users.take().ok_or("no user is free for another sandbox")?),
            None => None,
        };
        let cgroup = match &self.cgroups {
            Some(cgroups) => Some(
                cgroups
                    .create(&request.id, request.shape.vcpus, request.shape.memory_mb)
                    .map_err(|error| format!("the sandbox's cgroup cannot be made: {error}"))?,
            ),
            None => None,
        };
        Ok(Some(Held { user, cgroup }))
    }

    async fn start_and_follow(
        &self,
        entry: &Entry,
        request: CreateRequest,
        chain: Chain,
        jail: Option<&Held>,
        orders: mpsc::Receiver<Order>,
        started: &mut Option<oneshot::Sender<Result<Created, HostError>>>,
    ) -> Outcome {
        let launch = Launch {
            config: &self.config,
            request: &request,
            chain: &chain,
            jail: jail.map(|held| Jail {
                user: held.user.as_ref().map(User::id),
                cgroup: held.cgroup.as_ref().map(|cgroup| cgroup.path.as_path()),
            }),
        };
        let mut machine = match Machine::spawn(launch).await {
            Ok(machine) => machine,
            Err(error) => {
                return Outcome::NotStarted(HostError::Start {
                    reason: crate::chain(&error),
                });
            }
        };
        let ready = tokio::select! {
            biased;
            () = entry.end.cancelled() => Err(NotReady::Destroyed),
            ready = machine.ready(&entry.agent, self.config.boot_timeout) => ready,
        };
        let created = match ready {
            Ok(created) => created,
            Err(NotReady::Destroyed) => {
                machine.kill().await;
                return Outcome::Destroyed;
            }
            Err(why) => {
                machine.kill().await;
                return Outcome::NotStarted(HostError::Start {
                    reason: machine.explain_start(why).await,
                });
            }
        };
        entry.set_running(true);
        if let Some(started) = started.take()
            && started.send(Ok(created)).is_err()
        {
            debug!(sandbox = %request.id, "nobody waits for this sandbox any more");
        }
        let outcome = self.follow(entry, &mut machine, chain, orders).await;
        entry.set_running(false);
        outcome
    }

    /// Does what it is told to until the end of the sandbox.
    async fn follow(
        &self,
        entry: &Entry,
        machine: &mut Machine,
        mut chain: Chain,
        mut orders: mpsc::Receiver<Order>,
    ) -> Outcome {
        loop {
            let order = tokio::select! {
                biased;
                () = entry.end.cancelled() => break,
                () = machine.exited() => return Outcome::Ended(machine.explain_end().await),
                // The entry has the other end, and is there as long as this.
                Some(order) = orders.recv() => order,
            };
            let Order {
                request,
                then,
                reply,
            } = order;
            let control = machine.control().clone();
            let saving = Saving {
                control: &control,
                paths: &self.config.paths,
                request: &request,
                chain: &chain,
                agent: &entry.agent,
            };
            let save = async {
                match then {
                    Then::End => saving.and_stop().await.map(|saved| (saved, None)),
                    Then::GoOn => {
                        let (saved, chain) = saving.and_go_on().await?;
                        Ok((saved, Some(chain)))
                    }
                }
            };
            let saved = tokio::select! {
                biased;
                () = entry.end.cancelled() => {
                    let _ = reply.send(Err(HostError::Destroyed));
                    break;
                }
                () = machine.exited() => return Outcome::Ended(machine.explain_end().await),
                saved = save => saved,
            };
            match saved {
                Ok((saved, Some(stacked))) => {
                    chain = stacked;
                    let _ = reply.send(Ok(saved));
                }
                Ok((saved, None)) => {
                    entry.set_running(false);
                    entry.paused.cancel();
                    machine.kill().await;
                    return Outcome::Paused(saved, reply);
                }
                Err(SaveError::NotSaved(error)) => drop(reply.send(Err(error))),
                Err(SaveError::Broken(reason)) => {
                    machine.kill().await;
                    return Outcome::Ended(End::Failed { reason });
                }
            }
        }
        machine.kill().await;
        Outcome::Destroyed
    }
}
