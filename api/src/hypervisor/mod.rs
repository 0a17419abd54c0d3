//! The host side: runs sandboxes on this machine, one `vmm` process each.
//!
//! Each sandbox has one task that owns it from its start to the removal of its last file
//! ([`life`]); what was saved of sandboxes are [`layers`], which nobody owns.

mod cgroup;
mod command;
mod control;
mod disk_limits;
mod jail;
mod kept;
mod layers;
mod leftovers;
mod life;
mod machine;
mod monitor;
mod paths;
mod save;
mod warm_key;

use std::collections::{BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::future::join_all;
use futures_util::stream::{self, BoxStream};
use tokio::sync::{mpsc, oneshot};
use tracing::warn;

use crate::domain::{
    CreateRequest, Created, ExecEvent, ExecRequest, FileContent, Host, HostError, HostEvent,
    HostInfo, ImageInfo, KeepDiskRequest, KeptDisk, LayerId, Layers, LayersInfo, ReadFileRequest,
    SandboxId, SaveRequest, Saved, Shape, WriteFileRequest,
};
use crate::images::{Base, Chain, Images};
use cgroup::Cgroups;
pub use disk_limits::DiskLimits;
use jail::Users;
pub use jail::{CgroupParent, JailConfig};
use layers::LayerFiles;
pub use leftovers::LeftoverError;
use life::{Entry, Order, Then};
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
    /// See [`warm_key::machine`]; why it is not known, otherwise.
    machine: Result<String, String>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    closing: bool,
    sandboxes: HashMap<SandboxId, Arc<Entry>>,
    listeners: Vec<mpsc::UnboundedSender<HostEvent>>,
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
            machine: warm_key::machine().map_err(|error| error.to_string()),
            state: Mutex::default(),
        });
        Ok(Self { inner })
    }

    fn running(&self, id: &SandboxId) -> Result<Arc<Entry>, HostError> {
        let entry = self.inner.state().sandboxes.get(id).cloned();
        entry
            .filter(|entry| entry.is_running())
            .ok_or_else(|| HostError::NotRunning { id: id.clone() })
    }

    async fn save(&self, request: SaveRequest, then: Then) -> Result<Saved, HostError> {
        let entry = self.running(&request.id)?;
        let id = request.id.clone();
        let (reply, outcome) = oneshot::channel();
        let order = Order {
            request,
            then,
            reply,
        };
        let gone = || HostError::NotRunning { id: id.clone() };
        entry.orders.send(order).await.map_err(|_| gone())?;
        outcome.await.unwrap_or_else(|_| Err(gone()))
    }
}

impl Inner {
    /// No holder of this lock can panic half way through a change.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the disk of a sandbox is made on. The error is a sentence.
    fn chain(&self, request: &CreateRequest) -> Result<Chain, HostError> {
        let mut chain = self.chain_of(&request.shape, &request.layers)?;
        if let Some(size_mb) = request.scratch_mb {
            let base = Base::empty(self.config.paths.empty(), size_mb).map_err(|error| {
                HostError::Start {
                    reason: crate::chain(&error),
                }
            })?;
            chain.scratch = Some(Box::new(Chain {
                base,
                layers: Vec::new(),
                scratch: None,
            }));
        }
        Ok(chain)
    }

    fn chain_of(&self, shape: &Shape, layers: &Layers) -> Result<Chain, HostError> {
        let failed = |reason| HostError::Start { reason };
        let files = LayerFiles(self.config.paths.layers());
        let frozen = files
            .chain(&layers.disk)
            .map_err(|error| failed(format!("the layers of its disk cannot be read: {error}")))?;
        match frozen {
            Some(chain) => Ok(chain),
            None => Ok(Chain {
                base: Base::of(self.template(&shape.template)?)
                    .map_err(|error| failed(crate::chain(&error)))?,
                layers: Vec::new(),
                scratch: None,
            }),
        }
    }

    /// The image of this name.
    fn template(&self, name: &str) -> Result<&PathBuf, HostError> {
        let template = self.config.images.templates.get(name);
        template.ok_or_else(|| HostError::UnknownTemplate {
            name: name.to_owned(),
        })
    }

    /// Works on the layers on a thread that may block.
    async fn with_layers<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(LayerFiles<'_>) -> std::io::Result<T> + Send + 'static,
    ) -> Result<T, HostError> {
        let inner = Arc::clone(self);
        tokio::task::spawn_blocking(move || work(LayerFiles(inner.config.paths.layers())))
            .await
            .unwrap_or_else(|error| Err(std::io::Error::other(error)))
            .map_err(|error| HostError::Internal {
                reason: format!("layers cannot be read or removed: {error}"),
            })
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
        if let Some(size_mb) = request.scratch_mb {
            self.inner.make_empty(size_mb).await?;
        }
        let chain = self.inner.chain(&request)?;
        let (entry, orders) = Entry::new(self.inner.config.paths.vsock(&request.id));
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
        tokio::spawn(async move { inner.live(&entry, request, chain, orders, started).await });
        outcome.await.unwrap_or_else(|_| {
            Err(HostError::Internal {
                reason: "the sandbox's task ended early".into(),
            })
        })
    }

    async fn pause(&self, request: SaveRequest) -> Result<Saved, HostError> {
        self.save(request, Then::End).await
    }

    async fn snapshot(&self, request: SaveRequest) -> Result<Saved, HostError> {
        self.save(request, Then::GoOn).await
    }

    async fn inspect(&self, layers: &Layers) -> Result<Option<LayersInfo>, HostError> {
        let layers = layers.clone();
        self.inner
            .with_layers(move |files| files.inspect(&layers))
            .await
    }

    async fn discard(&self, layers: &[LayerId]) -> Result<(), HostError> {
        let layers = layers.to_vec();
        self.inner
            .with_layers(move |files| layers.iter().try_for_each(|id| files.remove(id)))
            .await
    }

    async fn retain(&self, layers: &BTreeSet<LayerId>) -> Result<(), HostError> {
        let layers = layers.clone();
        self.inner
            .with_layers(move |files| files.retain(&layers))
            .await
    }

    async fn warm_key(&self, shape: &Shape, disk: &[LayerId]) -> Result<String, HostError> {
        let internal = |reason| HostError::Internal { reason };
        let machine = self.inner.machine.as_ref().map_err(|error| {
            internal(format!("the processor's features are not known: {error}"))
        })?;
        let layers = Layers {
            memory: Vec::new(),
            disk: disk.to_vec(),
        };
        let template = match disk {
            [] => self.inner.template(&shape.template)?.clone(),
            _ => self.inner.chain_of(shape, &layers)?.base.path,
        };
        warm_key::key(&self.inner.config, machine, &template, disk, shape)
            .map_err(|error| internal(format!("a part of the machine is missing: {error}")))
    }

    async fn destroy(&self, id: &SandboxId) -> Result<(), HostError> {
        let entry = self.inner.state().sandboxes.get(id).cloned();
        match entry {
            Some(entry) => entry.destroy().await,
            None => Ok(()),
        }
    }

    async fn exec(
        &self,
        id: &SandboxId,
        request: ExecRequest,
    ) -> Result<BoxStream<'static, Result<ExecEvent, HostError>>, HostError> {
        let entry = self.running(id)?;
        let events = entry.unless_paused(entry.agent.exec(request)).await?;
        Ok(entry.until_paused(events, HostError::Paused))
    }

    async fn image(&self, name: &str, with_digest: bool) -> Result<ImageInfo, HostError> {
        self.inner.image(name, with_digest).await
    }

    async fn keep_disk(&self, request: KeepDiskRequest) -> Result<KeptDisk, HostError> {
        let entry = self.running(&request.created.id)?;
        let events = self.events().await;
        let inner = Arc::clone(&self.inner);
        tokio::spawn(async move { inner.keep_disk(&entry, events, request).await })
            .await
            .unwrap_or_else(|_| {
                Err(HostError::Internal {
                    reason: "the task that kept the disk ended early".into(),
                })
            })
    }

    async fn exec_with_input(
        &self,
        id: &SandboxId,
        request: ExecRequest,
        input: BoxStream<'static, std::io::Result<Bytes>>,
    ) -> Result<BoxStream<'static, Result<ExecEvent, HostError>>, HostError> {
        let entry = self.running(id)?;
        let started = entry.agent.exec_with_input(request, input);
        let events = entry.unless_paused(started).await?;
        Ok(entry.until_paused(events, HostError::Paused))
    }

    async fn write_file(
        &self,
        id: &SandboxId,
        request: WriteFileRequest,
        content: BoxStream<'static, std::io::Result<Bytes>>,
    ) -> Result<(), HostError> {
        let entry = self.running(id)?;
        entry
            .unless_paused(entry.agent.write_file(request, content))
            .await
    }

    async fn read_file(
        &self,
        id: &SandboxId,
        request: ReadFileRequest,
    ) -> Result<FileContent, HostError> {
        let entry = self.running(id)?;
        let file = entry.unless_paused(entry.agent.read_file(request)).await?;
        let paused = std::io::Error::other(HostError::Paused);
        Ok(FileContent {
            size: file.size,
            content: entry.until_paused(file.content, paused),
        })
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
        // Each says itself what it has left behind.
        let _ = join_all(entries.iter().map(|entry| entry.destroy())).await;
    }
}
