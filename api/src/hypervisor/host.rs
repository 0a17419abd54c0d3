//! This machine as a [`Host`]: what is asked of it, and who does it.
//!
//! What changes a sandbox is done by the sandbox's own task, or in one that ends whether or not
//! somebody still waits for it.

use std::collections::BTreeSet;
use std::os::fd::AsFd;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::future::join_all;
use futures_util::stream::{self, BoxStream};
use tokio::sync::{mpsc, oneshot};
use tracing::Instrument;

use super::cgroup::Cgroups;
use super::control::Control;
use super::entry::{Claim, Order, Then};
use super::layers::LayerFiles;
use super::life::Begin;
use super::machine::{self, Greeting};
use super::nic::HostNetworks;
use super::{Inner, LocalHost, ended_early, network_failed, posture, warm_key};
use crate::domain::{
    AddressError, AdoptRequest, Adopted, ClaimRequest, CreateRequest, Created, Egress, ExecEvent,
    ExecRequest, FileContent, FileInfo, Forward, ForwardSpec, Host, HostError, HostEvent, HostInfo,
    ImageDigest, ImageInfo, KeepDiskRequest, KeptDisk, LayerId, Layers, LayersInfo, MergeRequest,
    Model, NetworkActivity, Posture, PowerOffRequest, PrepareRequest, Presence, ReadFileRequest,
    ResizeRequest, SandboxId, SaveRequest, Saved, WalkSpec, WalkSteps, WriteFileRequest,
};
use crate::network::ForwardError;

/// How much of the end of a console is told, in bytes: as much as its log has.
const MAX_CONSOLE: u64 = 4 << 20;

#[async_trait]
impl Host for LocalHost {
    async fn describe(&self) -> Result<HostInfo, HostError> {
        let info = rustix::system::sysinfo();
        let bytes = u64::from(info.mem_unit).saturating_mul(info.totalram);
        Ok(HostInfo {
            templates: self.inner.config.images.templates.keys().cloned().collect(),
            memory_mb: bytes >> 20,
            limits_cpu: (self.inner.cgroups.as_ref()).is_some_and(Cgroups::limit_cpu),
            networks: (self.inner.config.networks.as_ref())
                .map(|networks| networks.describe())
                .unwrap_or_default(),
        })
    }

    async fn adopt(
        &self,
        requests: Vec<AdoptRequest>,
    ) -> Result<Vec<(SandboxId, Result<Adopted, HostError>)>, HostError> {
        let adopted = self.inner.adopt(requests).await;
        adopted.map_err(|error| HostError::Internal {
            reason: crate::chain(&error),
        })
    }

    async fn present(&self) -> Result<Vec<(SandboxId, Presence)>, HostError> {
        self.inner.present().await
    }

    async fn sweep(&self, id: &SandboxId) -> Result<(), HostError> {
        self.destroy(id).await?;
        self.inner.sweep(id).await
    }

    async fn create(&self, request: CreateRequest) -> Result<Created, HostError> {
        let CreateRequest {
            id,
            shape,
            identity,
            layers,
            start,
            nic,
            scratch_mb,
            disk_mb,
            resources,
        } = request;
        if let Some(size_mb) = scratch_mb {
            self.inner.make_empty(size_mb).await?;
        }
        let (started, outcome) = oneshot::channel();
        let greeting = Greeting { identity, start };
        let request = PrepareRequest {
            id,
            shape,
            layers,
            nic,
            scratch_mb,
            disk_mb,
            resources,
        };
        self.begin(request, Begin::Now(greeting, started))?;
        outcome.await.unwrap_or_else(|_| Err(ended_early()))
    }

    async fn prepare(&self, request: PrepareRequest) -> Result<(), HostError> {
        if request.layers.memory.is_empty() {
            return Err(HostError::Internal {
                reason: "a machine that boots cannot be held before its guest runs".to_owned(),
            });
        }
        let (ready, outcome) = oneshot::channel();
        self.begin(request, Begin::Held(ready))?;
        outcome.await.unwrap_or_else(|_| Err(ended_early()))
    }

    async fn claim(&self, request: ClaimRequest) -> Result<Created, HostError> {
        let ClaimRequest { id, identity, nic } = request;
        let entry = self.inner.state().sandboxes.get(&id).cloned();
        let gone = || HostError::NotRunning { id: id.clone() };
        let entry = entry.ok_or_else(gone)?;
        let (reply, outcome) = oneshot::channel();
        if !entry.claim(Claim {
            identity,
            nic,
            reply,
        }) {
            return Err(gone());
        }
        match outcome.await {
            Ok(started) => started,
            Err(_) => {
                // It ended before it heard of this.
                entry.destroy().await?;
                Err(gone())
            }
        }
    }

    async fn note_working_set(&self, id: &SandboxId, layers: &Layers) -> Result<(), HostError> {
        self.running(id)?;
        let internal = |what: &str, reason: String| HostError::Internal {
            reason: format!("the working set is not {what}: {reason}"),
        };
        let Some(top) = layers.memory.last() else {
            return Err(internal("made", "the machine was booted".to_owned()));
        };
        let files = LayerFiles(self.inner.config.paths.layers());
        let draft = files
            .begin_working_set(top)
            .map_err(|error| internal("made", error.to_string()))?;
        Control::new(self.inner.config.paths.api(id))
            .working_set(draft.file.as_fd())
            .await
            .map_err(|error| internal("written", crate::chain(&error)))?;
        draft
            .complete()
            .map_err(|error| internal("put in place", error.to_string()))
    }

    async fn pause(&self, request: SaveRequest) -> Result<Saved, HostError> {
        self.save(request, Then::End).await
    }

    async fn snapshot(&self, request: SaveRequest) -> Result<Saved, HostError> {
        self.save(request, Then::GoOn).await
    }

    async fn merge_disk(&self, request: MergeRequest) -> Result<(), HostError> {
        let inner = Arc::clone(&self.inner);
        let task = async move { inner.merge(&request).await };
        tokio::spawn(task.in_current_span())
            .await
            .unwrap_or_else(|error| {
                Err(HostError::NotMerged {
                    reason: error.to_string(),
                })
            })
    }

    async fn holds(&self, layers: &Layers) -> Result<bool, HostError> {
        let layers = layers.clone();
        self.inner
            .with_layers(move |files| files.size(&layers).map(|size| size.is_some()))
            .await
    }

    async fn inspect(&self, layers: &Layers) -> Result<Option<LayersInfo>, HostError> {
        let layers = layers.clone();
        self.inner
            .with_layers(move |files| files.inspect(&layers))
            .await
    }

    async fn posture(&self, id: &SandboxId, layers: &[LayerId]) -> Result<Posture, HostError> {
        let (inner, id, layers) = (Arc::clone(&self.inner), id.clone(), layers.to_vec());
        self.inner
            .with_layers(move |files| {
                let layers = layers.iter().map(|layer| files.path(layer)).collect();
                posture::look(&inner.config.paths, &id, layers)
            })
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

    async fn warm_key(&self, model: &Model, disk: &[LayerId]) -> Result<String, HostError> {
        let internal = |reason| HostError::Internal { reason };
        let machine = self.inner.machine.as_ref().map_err(|error| {
            internal(format!("the processor's features are not known: {error}"))
        })?;
        let layers = Layers {
            memory: Vec::new(),
            disk: disk.to_vec(),
        };
        let shape = &model.shape;
        let template = match disk {
            [] => self.inner.template(&shape.template)?.clone(),
            _ => self.inner.chain_of(shape, &layers)?.base.path,
        };
        warm_key::key(&self.inner.config, machine, &template, disk, model)
            .map_err(|error| internal(format!("a part of the machine is missing: {error}")))
    }

    async fn keep(&self, id: &SandboxId, layer: &LayerId) -> Result<(), HostError> {
        let entry = self.running(id)?;
        self.inner.keep(id, &entry, layer).await
    }

    async fn power_off(&self, request: PowerOffRequest) -> Result<bool, HostError> {
        // One that has just ended by itself has not told so yet, and does not then.
        let entry = self.inner.state().sandboxes.get(&request.id).cloned();
        let entry = entry.ok_or_else(|| HostError::NotRunning {
            id: request.id.clone(),
        })?;
        entry.set_powering_off();
        let inner = Arc::clone(&self.inner);
        tokio::spawn(async move { inner.power_off(&entry, &request).await })
            .await
            .unwrap_or_else(|_| Err(ended_early()))
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
        let events = entry.unless_interrupted(entry.agent.exec(request)).await?;
        Ok(entry.until_interrupted(events, |error| error))
    }

    async fn image(&self, name: &str, digest: ImageDigest) -> Result<ImageInfo, HostError> {
        self.inner.image(name, digest).await
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
        let events = entry.unless_interrupted(started).await?;
        Ok(entry.until_interrupted(events, |error| error))
    }

    async fn console(&self, id: &SandboxId) -> Result<String, HostError> {
        self.running(id)?;
        let console = machine::console_end(&self.inner.config.paths.console(id), MAX_CONSOLE).await;
        console.map_err(|error| HostError::Internal {
            reason: format!("its console cannot be read: {error}"),
        })
    }

    async fn write_file(
        &self,
        id: &SandboxId,
        request: WriteFileRequest,
        content: BoxStream<'static, std::io::Result<Bytes>>,
    ) -> Result<(), HostError> {
        let entry = self.running(id)?;
        entry
            .unless_interrupted(entry.agent.write_file(request, content))
            .await
    }

    async fn list_dir(
        &self,
        id: &SandboxId,
        path: &str,
        limit: usize,
    ) -> Result<Vec<FileInfo>, HostError> {
        let entry = self.running(id)?;
        entry
            .unless_interrupted(entry.agent.list_dir(path, limit))
            .await
    }

    async fn walk(&self, id: &SandboxId, spec: &WalkSpec) -> Result<Option<WalkSteps>, HostError> {
        let entry = self.running(id)?;
        let steps = entry.unless_interrupted(entry.agent.walk(spec)).await?;
        Ok(steps.map(|steps| entry.until_interrupted(steps, |error| error)))
    }

    async fn make_dir(&self, id: &SandboxId, path: &str) -> Result<FileInfo, HostError> {
        let entry = self.running(id)?;
        entry.unless_interrupted(entry.agent.make_dir(path)).await
    }

    async fn remove_file(&self, id: &SandboxId, path: &str) -> Result<(), HostError> {
        let entry = self.running(id)?;
        entry
            .unless_interrupted(entry.agent.remove_file(path))
            .await
    }

    async fn read_file(
        &self,
        id: &SandboxId,
        request: ReadFileRequest,
    ) -> Result<FileContent, HostError> {
        let entry = self.running(id)?;
        let file = entry
            .unless_interrupted(entry.agent.read_file(request))
            .await?;
        Ok(FileContent {
            size: file.size,
            content: entry.until_interrupted(file.content, std::io::Error::other),
        })
    }

    async fn resize(&self, request: ResizeRequest) -> Result<(), HostError> {
        let host = self.clone();
        let task = async move { host.change(&request).await };
        tokio::spawn(task.in_current_span())
            .await
            .unwrap_or_else(|_| Err(ended_early()))
    }

    async fn set_egress(&self, id: &SandboxId, egress: Egress) -> Result<(), HostError> {
        self.running(id)?;
        let changed = self.inner.networks()?.of(id).set_egress(id, egress).await;
        changed.map_err(network_failed)
    }

    async fn repair_networks(&self) -> (Vec<SandboxId>, Result<(), HostError>) {
        let Some(networks) = &self.inner.config.networks else {
            return (Vec::new(), Ok(()));
        };
        let (repaired, outcome) = networks.repair().await;
        (
            repaired,
            outcome.map_err(|reason| HostError::Internal { reason }),
        )
    }

    async fn network_activity(&self, id: &SandboxId) -> Result<NetworkActivity, HostError> {
        self.running(id)?;
        let activity = self.inner.networks()?.of(id).activity(id).await;
        activity.map_err(network_failed)
    }

    async fn open_forward(&self, id: &SandboxId, spec: ForwardSpec) -> Result<Forward, HostError> {
        let forwards = &self.inner.networks()?.forwards;
        if let Some(port) = spec.host_port {
            let forward = Forward {
                transport: spec.transport,
                host: std::net::SocketAddr::new(spec.host_address, port),
                guest_port: spec.guest_port,
            };
            if forwards.is_open(id, forward) {
                return Ok(forward);
            }
        }
        forwards.open(id, spec).map_err(|error| match error {
            ForwardError::InUse { .. } | ForwardError::NoneFree { .. } => HostError::PortInUse {
                reason: crate::chain(&error),
            },
            ForwardError::Unusable { .. } => HostError::Invalid {
                reason: crate::chain(&error),
            },
        })
    }

    async fn close_forwards(&self, id: &SandboxId, forwards: &[Forward]) {
        if let Some(networks) = &self.inner.config.networks {
            for forward in forwards {
                networks.forwards.close(id, *forward);
            }
        }
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

    async fn shutdown(&self, staying: &BTreeSet<SandboxId>) {
        let entries: Vec<_> = {
            let mut state = self.inner.state();
            state.closing = true;
            let all = state.sandboxes.iter();
            let others = all.filter(|(id, _)| !staying.contains(*id));
            others.map(|(_, entry)| Arc::clone(entry)).collect()
        };
        // Each says itself what it has left behind.
        let _ = join_all(entries.iter().map(|entry| entry.destroy())).await;
        self.inner.end.cancel();
        drop(self.inner.merging.lock().await);
        // What stays needs its network.
        if let Some(networks) = &self.inner.config.networks
            && staying.is_empty()
        {
            networks.stop().await;
        }
    }
}

impl LocalHost {
    /// Gives a new sandbox its task.
    fn begin(&self, request: PrepareRequest, begin: Begin) -> Result<(), HostError> {
        let mut chain = self
            .inner
            .chain(&request.shape, &request.layers, request.scratch_mb)?;
        if let Some(disk_mb) = request.disk_mb {
            chain.base.grow(disk_mb);
        }
        self.inner.enter(request, chain, begin, None)
    }

    /// Has the task of a sandbox save it.
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
    /// The networks of sandboxes, for what makes no sense without one.
    fn networks(&self) -> Result<&HostNetworks, HostError> {
        let networks = self.config.networks.as_deref();
        networks.ok_or_else(|| HostError::Invalid {
            reason: AddressError::NoNetwork.to_string(),
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
