//! The host side: runs sandboxes on this machine, one `vmm` process each.
//!
//! Each sandbox has one task that owns it from its start to the removal of its last file
//! ([`life`]); what was saved of sandboxes are [`layers`], which nobody owns.

mod adopt;
mod cgroup;
mod command;
mod control;
mod disk_limits;
mod end;
mod entry;
mod guests;
mod health;
mod host;
mod jail;
mod keep;
mod kept;
mod layers;
mod leftovers;
mod life;
mod machine;
mod merge;
mod monitor;
mod nic;
mod note;
mod paths;
mod posture;
mod process;
mod resize;
mod save;
mod sweep;
mod usage;
mod warm_key;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::warn;

#[cfg(doc)]
use crate::domain::Host;
use crate::domain::{HostError, HostEvent, Layers, PrepareRequest, SandboxId, Shape};
use crate::images::{Base, Chain, Images};
use crate::network::NetworkError;
use adopt::Found;
use cgroup::Cgroups;
pub use disk_limits::DiskLimits;
use entry::Entry;
use jail::Users;
pub use jail::{CgroupParent, JailConfig};
use layers::LayerFiles;
pub use leftovers::LeftoverError;
use life::Begin;
pub use nic::{HostNetwork, HostNetworks};
pub use paths::{Paths, PathsError};

/// What this host runs sandboxes with.
#[derive(Clone)]
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
    /// Whether restored guests have the memory that they touch first before they touch it.
    pub prefetch: bool,
    /// How VMMs are jailed, if they are.
    pub jail: Option<JailConfig>,
    /// The networks of sandboxes, if they have any.
    pub networks: Option<Arc<HostNetworks>>,
}

/// This machine as a [`Host`]; clones share it.
#[derive(Clone)]
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
    /// One merge at a time; its end is the host's.
    merging: tokio::sync::Mutex<()>,
    probed: health::Probed,
    end: CancellationToken,
}

#[derive(Default)]
struct State {
    closing: bool,
    sandboxes: HashMap<SandboxId, Arc<Entry>>,
    listeners: Vec<mpsc::UnboundedSender<HostEvent>>,
}

impl LocalHost {
    /// Makes this machine a host. What an earlier daemon left behind in the same directories is there
    /// until [`Host::adopt`]; the caller holds the locks that prove that daemon to be gone.
    ///
    /// # Errors
    /// The place for cgroups cannot be used.
    pub async fn start(config: HostConfig) -> Result<Self, LeftoverError> {
        let paths = &config.paths;
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
            merging: tokio::sync::Mutex::default(),
            probed: health::Probed::default(),
            end: CancellationToken::new(),
        });
        Ok(Self { inner })
    }

    fn running(&self, id: &SandboxId) -> Result<Arc<Entry>, HostError> {
        let entry = self.inner.state().sandboxes.get(id).cloned();
        entry
            .filter(|entry| entry.is_running())
            .ok_or_else(|| HostError::NotRunning { id: id.clone() })
    }
}

fn ended_early() -> HostError {
    HostError::Internal {
        reason: "the sandbox's task ended early".into(),
    }
}

fn network_failed(error: NetworkError) -> HostError {
    HostError::Internal {
        reason: crate::chain(&error),
    }
}

impl Inner {
    /// No holder of this lock can panic half way through a change.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives a sandbox its task.
    fn enter(
        self: &Arc<Self>,
        request: PrepareRequest,
        chain: Chain,
        begin: Begin,
        found: Option<Found>,
    ) -> Result<(), HostError> {
        let vsock = self.config.paths.vsock(&request.id);
        let (entry, orders) = Entry::new(vsock, chain.base.clone());
        {
            let mut state = self.state();
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
        let inner = Arc::clone(self);
        tokio::spawn(async move {
            inner
                .live(&entry, request, chain, orders, begin, found)
                .await;
        });
        Ok(())
    }

    /// What the disk of a sandbox is made on. The error is a sentence.
    fn chain(
        &self,
        shape: &Shape,
        layers: &Layers,
        scratch_mb: Option<u32>,
    ) -> Result<Chain, HostError> {
        let mut chain = self.chain_of(shape, layers)?;
        if let Some(size_mb) = scratch_mb {
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

    /// The same, without a second disk.
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
}
