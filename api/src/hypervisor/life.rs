//! The life of one sandbox, from its first file to its last.
//!
//! Each has one task that owns it, so its life is a straight line, and a caller that goes away
//! leaves nothing half done:
//!
//! ```text
//!   make files ──► spawn ─────────► wait for the agent ──► running ──► release ──► gone
//!        │           │                  ▲     │             │   ▲          ▲
//!        │           └─► held, in the   │     │        save │   │ goes on  │
//!        │           │   pool ── claim ─┘     │             ▼   │          │
//!        │           │      │                 │            saving ─────────┤ paused
//!        └───────────┴──────┴─────────────────┴──────────────┴─────────────┘
//!         an error; the vmm's exit; the boot timeout; destroy
//! ```
//!
//! A machine for the pool is restored and then held: its guest does not run until it is claimed.
//!
//! `release` ends the process if it still lives and removes directories, sockets and the disk.
//! Only then is the end told: to the creator, to who asked for the pause, to the destroyer, or as an
//! event.

use tokio::sync::{mpsc, oneshot};
use tracing::{debug, error};

use super::Inner;
use super::adopt::Found;
use super::cgroup::Cgroup;
use super::command::{Goes, Jail};
use super::entry::{Claim, Entry, Order, Started, Then};
use super::jail::User;
use super::layers::LayerFiles;
use super::machine::{Greeting, Launch, Machine, NotReady};
use super::nic::Nic;
use super::save::{SaveError, Saving};
use crate::domain::{Adopted, End, HostError, HostEvent, PrepareRequest, Saved, Start};
use crate::images::Chain;

/// How a sandbox begins.
pub enum Begin {
    /// It starts at once.
    Now(Greeting, Started),
    /// It is held until it is claimed. That it can be is told here.
    Held(oneshot::Sender<Result<(), HostError>>),
    /// An earlier daemon has started it. That it was taken over is told here.
    Found(oneshot::Sender<Result<Adopted, HostError>>),
}

/// What a sandbox has of the host for its jail.
pub(super) struct Held {
    pub user: Option<User>,
    pub cgroup: Option<Cgroup>,
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

/// Takes the card of a sandbox that has ended away.
pub(super) async fn close(nic: Option<Nic<'_>>, entry: &Entry) {
    if let Some(nic) = nic
        && let Err(reason) = nic.close().await
    {
        entry.left(reason);
    }
}

/// Ends a machine that did not become ready.
pub(super) async fn not_started(machine: &mut Machine, why: NotReady) -> Outcome {
    machine.kill().await;
    match why {
        NotReady::Destroyed => Outcome::Destroyed,
        why => Outcome::NotStarted(HostError::Start {
            reason: machine.explain_start(why).await,
        }),
    }
}

/// How the task of a sandbox came to its end.
pub(super) enum Outcome {
    NotStarted(HostError),
    /// While it was held.
    Lost,
    Ended(End),
    Paused(Saved, oneshot::Sender<Result<Saved, HostError>>),
    Destroyed,
}

impl Inner {
    /// The life of one sandbox.
    pub async fn live(
        &self,
        entry: &Entry,
        request: PrepareRequest,
        chain: Chain,
        orders: mpsc::Receiver<Order>,
        begin: Begin,
        found: Option<Found>,
    ) {
        let id = request.id.clone();
        let mut begin = Some(begin);
        // The user stays this sandbox's until its last file is gone.
        let mut user = None;
        let jail = match &found {
            Some(found) => self.jail_of(&found.note).map(Some),
            None => self.prepare_jail(&request),
        };
        let outcome = match jail {
            Ok(jail) => {
                let started = async {
                    match found {
                        Some(found) => {
                            self.connect_and_take_over(
                                entry, request, chain, found, orders, &mut begin,
                            )
                            .await
                        }
                        None => {
                            let jail = jail.as_ref();
                            self.connect_and_start(entry, request, chain, jail, orders, &mut begin)
                                .await
                        }
                    }
                };
                let outcome = started.await;
                let (held, cgroup) = jail.map(|jail| (jail.user, jail.cgroup)).unzip();
                user = held.flatten();
                let cgroup = cgroup.flatten();
                if let Err(reason) = remove_cgroup(cgroup).await {
                    error!(sandbox = %id, reason, "the cgroup of the sandbox is left");
                    entry.left(reason);
                }
                outcome
            }
            Err(reason) => {
                if let Some(found) = found {
                    found.end(&id).await;
                }
                Outcome::NotStarted(HostError::Start { reason })
            }
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
        entry.set_gone(match &outcome {
            Outcome::Ended(end) => Some(end.clone()),
            _ => None,
        });
        let tell = |event: HostEvent| {
            for listener in listeners {
                // A listener that went away in the meantime misses nothing.
                let _ = listener.send(event.clone());
            }
        };
        let failure = match outcome {
            Outcome::NotStarted(error) => error,
            Outcome::Destroyed => HostError::Destroyed,
            Outcome::Ended(_) if entry.is_powering_off() => return,
            Outcome::Ended(end) => return tell(HostEvent::Ended { id, end }),
            Outcome::Lost => return tell(HostEvent::Lost { id }),
            Outcome::Paused(saved, reply) => return drop(reply.send(Ok(saved))),
        };
        match begin {
            Some(Begin::Now(_, started)) => drop(started.send(Err(failure))),
            Some(Begin::Held(ready)) => drop(ready.send(Err(failure))),
            Some(Begin::Found(reply)) => drop(reply.send(Err(failure))),
            None => {}
        }
    }

    /// What the jail of a sandbox needs. The error is a sentence.
    fn prepare_jail(&self, request: &PrepareRequest) -> Result<Option<Held>, String> {
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
                    .create_for(request)
                    .map_err(|error| format!("the sandbox's cgroup cannot be made: {error}"))?,
            ),
            None => None,
        };
        Ok(Some(Held { user, cgroup }))
    }

    /// Gives the sandbox its network card, and takes it away when the sandbox has ended.
    async fn connect_and_start(
        &self,
        entry: &Entry,
        request: PrepareRequest,
        chain: Chain,
        jail: Option<&Held>,
        orders: mpsc::Receiver<Order>,
        begin: &mut Option<Begin>,
    ) -> Outcome {
        let networks = self.config.networks.as_deref();
        let mut nic = match Nic::open(networks, &request.id, request.nic.as_ref()).await {
            Ok(nic) => nic,
            Err(reason) => return Outcome::NotStarted(HostError::Start { reason }),
        };
        let outcome = self
            .start_and_follow(entry, request, chain, jail, nic.as_mut(), orders, begin)
            .await;
        close(nic, entry).await;
        outcome
    }

    #[expect(
        clippy::too_many_arguments,
        reason = "the parts of one sandbox, each with a life of its own"
    )]
    async fn start_and_follow(
        &self,
        entry: &Entry,
        request: PrepareRequest,
        chain: Chain,
        jail: Option<&Held>,
        mut nic: Option<&mut Nic<'_>>,
        orders: mpsc::Receiver<Order>,
        begin: &mut Option<Begin>,
    ) -> Outcome {
        // Many clones of one parent cost memory first of all: each has pages of its own only where it
        // has come to write. So they are given beforehand what another one of just these has written.
        let is_clone =
            matches!(begin, Some(Begin::Now(greeting, _)) if greeting.start == Start::Fork);
        let files = LayerFiles(self.config.paths.layers());
        let top = request.layers.memory.last();
        let prefetches = !is_clone || top.is_some_and(|top| files.has_working_set(top));
        let launch = Launch {
            config: &self.config,
            request: &request,
            goes: match begin {
                Some(Begin::Held(_)) => Goes::WhenTold,
                _ => Goes::On,
            },
            prefetches,
            chain: &chain,
            jail: jail.map(|held| Jail {
                user: held.user.as_ref().map(User::id),
                cgroup: held.cgroup.as_ref().map(|cgroup| cgroup.path.as_path()),
            }),
        };
        let mut machine = match Machine::spawn(launch, nic.as_deref_mut()).await {
            Ok(machine) => machine,
            Err(error) => {
                return Outcome::NotStarted(HostError::Start {
                    reason: crate::chain(&error),
                });
            }
        };
        if let Some(process) = machine.process_id() {
            let _ = entry.process.set(process.clone());
        }
        if let Some(Begin::Held(_)) = begin {
            match self.hold(entry, &mut machine, begin).await {
                Ok(claim) => {
                    if let (Some(nic), Some(request)) = (nic.as_deref_mut(), claim.nic) {
                        nic.become_that_of(request);
                    }
                    let greeting = Greeting {
                        identity: claim.identity,
                        start: Start::Pool,
                    };
                    *begin = Some(Begin::Now(greeting, claim.reply));
                }
                Err(outcome) => return outcome,
            }
        }
        // One that is held has become one that starts.
        let Some(Begin::Now(greeting, _)) = begin else {
            return Outcome::Lost;
        };
        let ready = tokio::select! {
            biased;
            () = entry.end_asked() => Err(NotReady::Destroyed),
            ready = async {
                let network = nic.as_deref().and_then(Nic::guest);
                // While the guest is on its way. What it sends before, the filter drops.
                let attached = async {
                    match nic.as_deref() {
                        Some(nic) => nic.attach().await,
                        None => Ok(()),
                    }
                };
                let ready =
                    machine.ready(&entry.agent, greeting, network, self.config.boot_timeout);
                let (ready, attached) = tokio::join!(ready, attached);
                ready.and_then(|created| {
                    attached.map_err(NotReady::Network)?;
                    Ok(created)
                })
            } => ready,
        };
        let created = match ready {
            Ok(created) => created,
            Err(why) => return not_started(&mut machine, why).await,
        };
        entry.set_running(true);
        if let Some(Begin::Now(_, started)) = begin.take()
            && started.send(Ok(created)).is_err()
        {
            debug!(sandbox = %request.id, "nobody waits for this sandbox any more");
        }
        let outcome = self.follow(entry, &mut machine, chain, orders).await;
        entry.set_running(false);
        outcome
    }

    /// Waits until a machine is restored, tells so, and holds it until it is claimed.
    async fn hold(
        &self,
        entry: &Entry,
        machine: &mut Machine,
        begin: &mut Option<Begin>,
    ) -> Result<Claim, Outcome> {
        let restored = tokio::select! {
            biased;
            () = entry.end_asked() => Err(NotReady::Destroyed),
            restored = machine.restored(self.config.boot_timeout) => restored,
        };
        if let Err(why) = restored {
            return Err(not_started(machine, why).await);
        }
        let claim = entry.hold();
        if let Some(Begin::Held(ready)) = begin.take() {
            // If nobody waits any more, whoever asked knows its name, and destroys it.
            let _ = ready.send(Ok(()));
        }
        tokio::select! {
            biased;
            () = entry.end_asked() => {
                machine.kill().await;
                Err(Outcome::Destroyed)
            }
            // Whoever claims it at this moment hears that it is gone, as its sender is dropped.
            () = machine.exited() => Err(Outcome::Lost),
            // The entry has the other end, and is there as long as this.
            Ok(claim) = claim => Ok(claim),
        }
    }

    /// Does what it is told to until the end of the sandbox.
    pub(super) async fn follow(
        &self,
        entry: &Entry,
        machine: &mut Machine,
        mut chain: Chain,
        mut orders: mpsc::Receiver<Order>,
    ) -> Outcome {
        loop {
            let order = tokio::select! {
                biased;
                () = entry.end_asked() => break,
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
                () = entry.end_asked() => {
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
                    entry.set_paused();
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
