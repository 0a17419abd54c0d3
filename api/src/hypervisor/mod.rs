//! The host side: runs sandboxes on this machine, one `vmm` process each.
//!
//! Each sandbox has one task that owns it from its start to the removal of its last file, so its
//! life is a straight line, and a caller that goes away leaves nothing half done:
//!
//! ```text
//!   prepare ──► spawn ──► wait for the agent ──► running ──► release ──► gone
//!      │          │               │                 │            ▲
//!      └──────────┴───────────────┴─────────────────┴────────────┘
//!         an error; the vmm's exit; the boot timeout; destroy
//! ```
//!
//! `release` ends the process if it still lives and removes directories, sockets and the disk.
//! Only then is the end told: to the creator, to the destroyer, or as an event.

mod cgroup;
mod disk_limits;
mod jail;
mod leftovers;
mod machine;
mod monitor;
mod paths;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::future::join_all;
use futures_util::stream::{self, BoxStream};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, warn};

use crate::agent::AgentClient;
use crate::domain::{
    CreateRequest, Created, End, ExecEvent, ExecRequest, FileContent, Host, HostError, HostEvent,
    HostInfo, ReadFileRequest, SandboxId, WriteFileRequest,
};
use crate::images::Images;
use cgroup::{Cgroup, Cgroups};
pub use disk_limits::DiskLimits;
pub use jail::{CgroupParent, JailConfig};
use jail::{User, Users};
pub use leftovers::LeftoverError;
use machine::{Launch, Machine, NotReady};
pub use paths::{Paths, PathsError};

/// What this host runs sandboxes with.
#[derive(Debug, Clone)]
pub struct HostConfig {
    /// The VMM's binary, absolute.
    pub vmm: PathBuf,
    /// Kernel, initramfs and templates.
    pub images: Images,
    /// Where sandboxes have their sockets and disks.
    pub paths: Paths,
    /// How long a guest may take from the start of its VMM to its agent's first words.
    pub boot_timeout: Duration,
    /// Words to add to the guest kernel's command line.
    pub cmdline_extra: String,
    /// How VMMs are jailed, if they are.
    pub jail: Option<JailConfig>,
}

/// This machine as a [`Host`].
pub struct LocalHost {
    inner: Arc<Inner>,
}

struct Inner {
    config: HostConfig,
    cgroups: Option<Cgroups>,
    /// `None` if VMMs do not get users of their own.
    users: Option<Arc<Users>>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    closing: bool,
    sandboxes: HashMap<SandboxId, Arc<Entry>>,
    listeners: Vec<mpsc::UnboundedSender<HostEvent>>,
}

/// A sandbox that this host holds something for.
struct Entry {
    agent: AgentClient,
    /// Its agent has answered, and it has not ended.
    running: std::sync::atomic::AtomicBool,
    /// Asks its task to end it.
    end: CancellationToken,
    /// Its task is done.
    gone: CancellationToken,
    /// What could not be removed, once it is gone.
    leftover: OnceLock<String>,
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
    Destroyed,
}

impl LocalHost {
    /// Makes this machine a host. Ends and removes what an earlier daemon left behind in the same
    /// directories; the caller holds the locks that prove it is gone.
    ///
    /// # Errors
    /// Something cannot be ended or removed.
    pub async fn start(config: HostConfig) -> Result<Self, LeftoverError> {
        let paths = config.paths.clone();
        let cgroups = match &config.jail {
            Some(jail) => {
                Cgroups::prepare(jail, paths.parents()[1]).map_err(LeftoverError::Cgroups)?
            }
            None => {
                warn!(
                    "VMMs are not jailed: a guest that takes over its own is one of this \
                       daemon's user"
                );
                None
            }
        };
        let cgroups = tokio::task::spawn_blocking(move || {
            leftovers::remove(&paths, cgroups.as_ref()).map(|()| cgroups)
        })
        .await
        .map_err(|_| LeftoverError::Interrupted)??;
        let is_root = rustix::process::geteuid().is_root();
        let users = match &config.jail {
            Some(jail) if is_root => Some(Users::new(jail.first_uid)),
            Some(_) => {
                warn!(
                    "VMMs are jailed, but as this daemon's own user: only root can give each a \
                     user of its own"
                );
                None
            }
            None => None,
        };
        let inner = Arc::new(Inner {
            config,
            cgroups,
            users,
            state: Mutex::default(),
        });
        Ok(Self { inner })
    }

    fn running(&self, id: &SandboxId) -> Result<Arc<Entry>, HostError> {
        let entry = self.inner.state().sandboxes.get(id).cloned();
        entry
            .filter(|entry| entry.running.load(std::sync::atomic::Ordering::Acquire))
            .ok_or_else(|| HostError::NotRunning { id: id.clone() })
    }
}

impl Inner {
    /// No holder of this lock can panic half way through a change.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The life of one sandbox.
    async fn live(
        &self,
        entry: &Entry,
        request: CreateRequest,
        template: PathBuf,
        started: oneshot::Sender<Result<Created, HostError>>,
    ) {
        let id = request.id.clone();
        let mut started = Some(started);
        // The user stays this sandbox's until its last file is gone.
        let mut user = None;
        let outcome = match self.prepare_jail(&request) {
            Ok(jail) => {
                let outcome = self
                    .start_and_follow(entry, request, template, jail.as_ref(), &mut started)
                    .await;
                let (held, cgroup) = jail.map(|jail| (jail.user, jail.cgroup)).unzip();
                user = held.flatten();
                let cgroup = cgroup.flatten();
                if let Err(reason) = remove_cgroup(cgroup).await {
                    error!(sandbox = %id, reason, "the cgroup of the sandbox is left");
                    let _ = entry.leftover.set(reason);
                }
                outcome
            }
            Err(reason) => Outcome::NotStarted(HostError::Start { reason }),
        };
        if let Err(reason) = self.config.paths.remove(&id).await {
            error!(sandbox = %id, reason, "files of the sandbox are left");
            let _ = entry.leftover.set(reason);
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
                    .create(&request.id, request.vcpus, request.memory_mb)
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
        template: PathBuf,
        jail: Option<&Held>,
        started: &mut Option<oneshot::Sender<Result<Created, HostError>>>,
    ) -> Outcome {
        let launch = Launch {
            config: &self.config,
            request: &request,
            template: &template,
            jail: jail.map(|held| machine::Jail {
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
            ready = machine.ready(self.config.boot_timeout) => ready,
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
        entry
            .running
            .store(true, std::sync::atomic::Ordering::Release);
        if let Some(started) = started.take()
            && started.send(Ok(created)).is_err()
        {
            debug!(sandbox = %request.id, "nobody waits for this sandbox any more");
        }
        let ended = tokio::select! {
            biased;
            () = entry.end.cancelled() => false,
            () = machine.exited() => true,
        };
        entry
            .running
            .store(false, std::sync::atomic::Ordering::Release);
        if ended {
            Outcome::Ended(machine.explain_end().await)
        } else {
            machine.kill().await;
            Outcome::Destroyed
        }
    }
}

#[async_trait]
impl Host for LocalHost {
    async fn describe(&self) -> Result<HostInfo, HostError> {
        let info = rustix::system::sysinfo();
        let bytes = u64::from(info.mem_unit).saturating_mul(info.totalram);
        Ok(HostInfo {
            templates: self.inner.config.images.templates.keys().cloned().collect(),
            memory_mb: bytes >> 20,
        })
    }

    async fn create(&self, request: CreateRequest) -> Result<Created, HostError> {
        let template = self
            .inner
            .config
            .images
            .templates
            .get(&request.template)
            .cloned()
            .ok_or_else(|| HostError::UnknownTemplate {
                name: request.template.clone(),
            })?;
        let entry = Arc::new(Entry {
            agent: AgentClient::new(self.inner.config.paths.vsock(&request.id)),
            running: false.into(),
            end: CancellationToken::new(),
            gone: CancellationToken::new(),
            leftover: OnceLock::new(),
        });
        {
            let mut state = self.inner.state();
            if state.closing {
                return Err(HostError::Start {
                    reason: "the daemon is shutting down".into(),
                });
            }
            if state.sandboxes.contains_key(&request.id) {
                return Err(HostError::Internal {
                    reason: format!("sandbox {} is there already", request.id),
                });
            }
            state
                .sandboxes
                .insert(request.id.clone(), Arc::clone(&entry));
        }
        let (started, outcome) = oneshot::channel();
        let inner = Arc::clone(&self.inner);
        tokio::spawn(async move { inner.live(&entry, request, template, started).await });
        outcome.await.unwrap_or_else(|_| {
            Err(HostError::Internal {
                reason: "the sandbox's task ended early".into(),
            })
        })
    }

    async fn destroy(&self, id: &SandboxId) -> Result<(), HostError> {
        let entry = self.inner.state().sandboxes.get(id).cloned();
        let Some(entry) = entry else {
            return Ok(());
        };
        entry.end.cancel();
        entry.gone.cancelled().await;
        match entry.leftover.get() {
            Some(reason) => Err(HostError::Internal {
                reason: reason.clone(),
            }),
            None => Ok(()),
        }
    }

    async fn exec(
        &self,
        id: &SandboxId,
        request: ExecRequest,
    ) -> Result<BoxStream<'static, Result<ExecEvent, HostError>>, HostError> {
        self.running(id)?.agent.exec(request).await
    }

    async fn write_file(
        &self,
        id: &SandboxId,
        request: WriteFileRequest,
        content: BoxStream<'static, std::io::Result<Bytes>>,
    ) -> Result<(), HostError> {
        self.running(id)?.agent.write_file(request, content).await
    }

    async fn read_file(
        &self,
        id: &SandboxId,
        request: ReadFileRequest,
    ) -> Result<FileContent, HostError> {
        self.running(id)?.agent.read_file(request).await
    }

    async fn events(&self) -> BoxStream<'static, HostEvent> {
        // As long as the number of sandboxes: each sends one event, its last act.
        let (sender, receiver) = mpsc::unbounded_channel();
        self.inner.state().listeners.push(sender);
        stream::unfold(receiver, |mut receiver| async move {
            receiver.recv().await.map(|event| (event, receiver))
        })
        .boxed()
    }

    async fn shutdown(&self) {
        let entries: Vec<_> = {
            let mut state = self.inner.state();
            state.closing = true;
            state.sandboxes.values().cloned().collect()
        };
        for entry in &entries {
            entry.end.cancel();
        }
        join_all(entries.iter().map(|entry| entry.gone.cancelled())).await;
    }
}
