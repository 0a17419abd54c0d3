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
use tracing::{debug, error};

use crate::agent::AgentClient;
use crate::domain::{
    CreateRequest, Created, End, ExecEvent, ExecRequest, FileContent, Host, HostError, HostEvent,
    HostInfo, ReadFileRequest, SandboxId, WriteFileRequest,
};
use crate::images::Images;
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
}

/// This machine as a [`Host`].
pub struct LocalHost {
    inner: Arc<Inner>,
}

struct Inner {
    config: HostConfig,
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
        tokio::task::spawn_blocking(move || leftovers::remove(&paths))
            .await
            .map_err(|_| LeftoverError::Interrupted)??;
        let inner = Arc::new(Inner {
            config,
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
        let outcome = self
            .start_and_follow(entry, request, template, &mut started)
            .await;
        if let Err(reason) = self.config.paths.remove(&id).await {
            error!(sandbox = %id, reason, "files of the sandbox are left");
            let _ = entry.leftover.set(reason);
        }
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

    async fn start_and_follow(
        &self,
        entry: &Entry,
        request: CreateRequest,
        template: PathBuf,
        started: &mut Option<oneshot::Sender<Result<Created, HostError>>>,
    ) -> Outcome {
        let launch = Launch {
            config: &self.config,
            request: &request,
            template: &template,
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
