//! A [`FakeHost`] as a [`Host`].

use std::collections::BTreeSet;
use std::io;
use std::sync::atomic::Ordering;

use api::domain::{
    AdoptRequest, Adopted, ClaimRequest, Counter, CreateRequest, Created, Denied, DeniedWhat,
    Egress, ExecEvent, ExecRequest, FileContent, FileInfo, Forward, ForwardSpec, Host, HostError,
    HostEvent, HostInfo, ImageDigest, ImageInfo, KeepDiskRequest, KeptDisk, LayerId, Layers,
    LayersInfo, MergeRequest, Model, NetworkActivity, Posture, PowerOffRequest, PrepareRequest,
    Presence, ReadFileRequest, ResizeRequest, SandboxId, SaveRequest, Saved, Start, Timings,
    Traffic, WalkSpec, WalkSteps, WriteFileRequest, port_in_use,
};
use async_trait::async_trait;
use axum::body::Bytes;
use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream};
use tokio::sync::mpsc;

use super::guest::file_info;
use super::{FakeHost, Fault, MergeFault};

#[async_trait]
impl Host for FakeHost {
    async fn describe(&self) -> Result<HostInfo, HostError> {
        let templates = vec!["broken".to_owned(), "minimal".to_owned()];
        Ok(HostInfo {
            templates,
            memory_mb: 4096,
            limits_cpu: self.meter.limits_cpu.load(Ordering::Relaxed),
            networks: self.networks.lock().unwrap().clone(),
        })
    }

    async fn adopt(
        &self,
        requests: Vec<AdoptRequest>,
    ) -> Result<Vec<(SandboxId, Result<Adopted, HostError>)>, HostError> {
        let mut sandboxes = self.sandboxes.lock().unwrap();
        sandboxes.retain(|id| requests.iter().any(|request| request.id == *id));
        self.ready.lock().unwrap().clear();
        let adopted = requests.into_iter().map(|request| {
            let id = request.id;
            if !sandboxes.contains(&id) {
                return (id.clone(), Err(HostError::NotRunning { id }));
            }
            let noted = self.noted.lock().unwrap().get(&id).cloned();
            let layers = match noted {
                Some(noted) if noted.is_one_save_after(&request.layers) => noted,
                _ => request.layers,
            };
            (id, Ok(Adopted { layers }))
        });
        Ok(adopted.collect())
    }

    async fn present(&self) -> Result<Vec<(SandboxId, Presence)>, HostError> {
        let of = |ids: Vec<SandboxId>, presence| ids.into_iter().map(move |id| (id, presence));
        let runs = self.sandboxes.lock().unwrap().clone();
        let ready = self.ready.lock().unwrap().keys().cloned().collect();
        let left = self.left.lock().unwrap().iter().cloned().collect();
        Ok(of(runs, Presence::Runs)
            .chain(of(ready, Presence::OnTheWay))
            .chain(of(left, Presence::Left))
            .collect())
    }

    async fn sweep(&self, id: &SandboxId) -> Result<(), HostError> {
        self.left.lock().unwrap().remove(id);
        self.destroy(id).await
    }

    async fn create(&self, request: CreateRequest) -> Result<Created, HostError> {
        self.may_crash(Fault::CrashBeforeStart).await;
        self.starts.lock().unwrap().push(request.clone());
        let failed = |reason: &str| {
            Err(HostError::Start {
                reason: reason.to_owned(),
            })
        };
        if request.shape.template == "broken" {
            return failed("it is broken");
        }
        if !self.has(&request.layers.memory) || !self.has(&request.layers.disk) {
            return failed("layers are missing");
        }
        if !request.layers.memory.is_empty() && self.fails(Fault::NotRestored) {
            return failed("the snapshot is of another processor");
        }
        {
            let mut sandboxes = self.sandboxes.lock().unwrap();
            assert!(!sandboxes.contains(&request.id), "it runs already");
            sandboxes.push(request.id);
        }
        self.may_crash(Fault::CrashAfterStart).await;
        let timings = Timings {
            start: request.start,
            prepare_us: 1,
            vmm_us: 20,
            boot_us: 3000,
            identity_us: 400,
            readiness_us: 0,
            total_us: 3421,
        };
        Ok(Created { timings })
    }

    async fn prepare(&self, request: PrepareRequest) -> Result<(), HostError> {
        assert!(self.has(&request.layers.memory) && !request.layers.memory.is_empty());
        if self.fails(Fault::NotPrepared) {
            let reason = "no user is free".to_owned();
            return Err(HostError::Start { reason });
        }
        assert!(!self.sandboxes.lock().unwrap().contains(&request.id));
        let mut ready = self.ready.lock().unwrap();
        assert!(ready.insert(request.id.clone(), request).is_none());
        Ok(())
    }

    async fn claim(&self, request: ClaimRequest) -> Result<Created, HostError> {
        let id = request.id.clone();
        let ready = self.ready.lock().unwrap().remove(&id);
        if ready.is_none() {
            return Err(HostError::NotRunning { id });
        }
        if self.fails(Fault::NotClaimed) {
            let reason = "the vmm was killed".to_owned();
            return Err(HostError::Start { reason });
        }
        self.claims.lock().unwrap().push(request);
        self.sandboxes.lock().unwrap().push(id);
        let timings = Timings {
            start: Start::Pool,
            ..Timings::default()
        };
        Ok(Created { timings })
    }

    async fn note_working_set(&self, id: &SandboxId, layers: &Layers) -> Result<(), HostError> {
        assert!(self.sandboxes.lock().unwrap().contains(id) && self.has(&layers.memory));
        self.working_sets.lock().unwrap().push(layers.clone());
        Ok(())
    }

    async fn pause(&self, request: SaveRequest) -> Result<Saved, HostError> {
        let id = request.id.clone();
        let saved = self.save(request).await?;
        self.sandboxes.lock().unwrap().retain(|other| *other != id);
        Ok(saved)
    }

    async fn snapshot(&self, request: SaveRequest) -> Result<Saved, HostError> {
        self.goes_on.lock().unwrap().insert(request.id.clone());
        let saved = self.save(request.clone()).await;
        self.goes_on.lock().unwrap().remove(&request.id);
        saved
    }

    async fn merge_disk(&self, request: MergeRequest) -> Result<(), HostError> {
        let fault = self.merge_fault.lock().unwrap().take();
        let failed = |reason: &str| {
            Err(HostError::NotMerged {
                reason: reason.to_owned(),
            })
        };
        if fault == Some(MergeFault::CrashBefore) {
            self.is_stuck.store(true, Ordering::SeqCst);
            std::future::pending::<()>().await;
        }
        // As when they are read; others may come and go meanwhile.
        tokio::task::yield_now().await;
        if !self.has(&request.layers) {
            return failed("the layers cannot be read");
        }
        if fault == Some(MergeFault::NotMerged) {
            return failed("layer 1 from the top is damaged");
        }
        assert!(self.layers.lock().unwrap().insert(request.into.clone()));
        if fault == Some(MergeFault::CrashAfter) {
            self.is_stuck.store(true, Ordering::SeqCst);
            std::future::pending::<()>().await;
        }
        self.merges.lock().unwrap().push(request);
        Ok(())
    }

    async fn holds(&self, layers: &Layers) -> Result<bool, HostError> {
        Ok(self.has(&layers.memory) && self.has(&layers.disk))
    }

    async fn inspect(&self, layers: &Layers) -> Result<Option<LayersInfo>, HostError> {
        let is_there = self.has(&layers.memory) && self.has(&layers.disk);
        Ok(is_there.then(|| LayersInfo {
            size_bytes: 50 * layers.all().count() as u64,
            checksum: "c0ffee".to_owned(),
        }))
    }

    async fn discard(&self, layers: &[LayerId]) -> Result<(), HostError> {
        let mut there = self.layers.lock().unwrap();
        there.retain(|layer| !layers.contains(layer));
        Ok(())
    }

    async fn retain(&self, layers: &BTreeSet<LayerId>) -> Result<(), HostError> {
        let mut there = self.layers.lock().unwrap();
        there.retain(|layer| layers.contains(layer));
        Ok(())
    }

    async fn warm_key(&self, model: &Model, disk: &[LayerId]) -> Result<String, HostError> {
        Ok(format!("{model:?} {disk:?}"))
    }

    async fn image(&self, name: &str, digest: ImageDigest) -> Result<ImageInfo, HostError> {
        let info = self.describe().await?;
        if !info.templates.iter().any(|known| known == name) {
            return Err(HostError::UnknownTemplate { name: name.into() });
        }
        Ok(ImageInfo {
            digest: (digest == ImageDigest::Computed).then(|| format!("digest of {name}")),
            size_bytes: 1000,
            disk_bytes: 2 << 30,
            modified_us: 5_000_000,
        })
    }

    async fn keep_disk(&self, request: KeepDiskRequest) -> Result<KeptDisk, HostError> {
        self.may_crash(Fault::CrashBeforeSave).await;
        let id = &request.created.id;
        assert!(
            self.sandboxes.lock().unwrap().contains(id),
            "it does not run"
        );
        assert!(self.has(&request.others), "a layer is gone");
        if self.fails(Fault::NotSaved) {
            return Err(HostError::Internal {
                reason: "no space left on device".to_owned(),
            });
        }
        assert!(self.layers.lock().unwrap().insert(request.layer.clone()));
        self.may_crash(Fault::CrashAfterSave).await;
        self.destroy(id).await?;
        let layers = request.others.iter().chain([&request.layer]);
        let kept = KeptDisk {
            digests: layers.map(|layer| format!("digest of {layer}")).collect(),
            size_bytes: 300,
            disk_bytes: match request.created.scratch_mb {
                Some(size) if request.scratch => u64::from(size) << 20,
                _ => 2 << 30,
            },
        };
        self.kept.lock().unwrap().push(request);
        Ok(kept)
    }

    async fn keep(&self, id: &SandboxId, layer: &LayerId) -> Result<(), HostError> {
        if !self.sandboxes.lock().unwrap().contains(id) {
            return Err(HostError::NotRunning { id: id.clone() });
        }
        if self.fails(Fault::NotKept) {
            let reason = "no space left on device".to_owned();
            return Err(HostError::Internal { reason });
        }
        assert!(self.layers.lock().unwrap().insert(layer.clone()));
        Ok(())
    }

    async fn power_off(&self, request: PowerOffRequest) -> Result<bool, HostError> {
        if !self.sandboxes.lock().unwrap().contains(&request.id) {
            return Err(HostError::NotRunning { id: request.id });
        }
        self.may_crash(Fault::CrashBeforeSave).await;
        let hangs = request.timeout_ms > 0 && self.fails(Fault::NotShutDown);
        while hangs && self.sandboxes.lock().unwrap().contains(&request.id) {
            self.destroyed.notified().await;
        }
        self.destroy(&request.id).await?;
        self.may_crash(Fault::CrashAfterSave).await;
        let in_order = request.timeout_ms > 0 && !hangs;
        self.power_offs.lock().unwrap().push(request);
        Ok(in_order)
    }

    async fn destroy(&self, id: &SandboxId) -> Result<(), HostError> {
        self.sandboxes.lock().unwrap().retain(|other| other != id);
        self.ready.lock().unwrap().remove(id);
        self.destroyed.notify_one();
        Ok(())
    }

    async fn exec_with_input(
        &self,
        id: &SandboxId,
        request: ExecRequest,
        mut input: BoxStream<'static, io::Result<Bytes>>,
    ) -> Result<BoxStream<'static, Result<ExecEvent, HostError>>, HostError> {
        let mut read = Vec::new();
        while let Some(piece) = input.next().await {
            read.extend(piece.map_err(|error| HostError::Upload {
                reason: error.to_string(),
            })?);
        }
        let events = self.exec(id, request).await;
        self.commands.lock().unwrap().last_mut().unwrap().1 = read;
        events
    }

    async fn console(&self, id: &SandboxId) -> Result<String, HostError> {
        if !self.sandboxes.lock().unwrap().contains(id) {
            return Err(HostError::NotRunning { id: id.clone() });
        }
        Ok(format!("[    0.000000] Linux of {id}"))
    }

    async fn make_dir(&self, _id: &SandboxId, path: &str) -> Result<FileInfo, HostError> {
        Ok(file_info(path.to_owned(), true))
    }

    async fn remove_file(&self, _id: &SandboxId, path: &str) -> Result<(), HostError> {
        let removed = self.files.lock().unwrap().remove(path);
        removed.map(drop).ok_or(HostError::FileNotFound {
            path: path.to_owned(),
        })
    }

    async fn resize(&self, request: ResizeRequest) -> Result<(), HostError> {
        self.meter.resize(request)
    }

    async fn set_egress(&self, id: &SandboxId, egress: Egress) -> Result<(), HostError> {
        if !self.sandboxes.lock().unwrap().contains(id) {
            return Err(HostError::NotRunning { id: id.clone() });
        }
        self.egress.lock().unwrap().push((id.clone(), egress));
        Ok(())
    }

    async fn repair_networks(&self) -> (Vec<SandboxId>, Result<(), HostError>) {
        let cut_off = std::mem::take(&mut *self.cut_off.lock().unwrap());
        let reason = "the bridge is gone".to_owned();
        let outcome = match self.has_no_bridge.load(Ordering::Relaxed) {
            true => Err(HostError::Internal { reason }),
            false => Ok(()),
        };
        (cut_off, outcome)
    }

    async fn network_activity(&self, id: &SandboxId) -> Result<NetworkActivity, HostError> {
        if !self.sandboxes.lock().unwrap().contains(id) {
            return Err(HostError::NotRunning { id: id.clone() });
        }
        let at = "2026-01-02T03:04:05Z".parse().unwrap();
        let packet = DeniedWhat::Packet {
            protocol: "tcp".into(),
            address: [203, 0, 113, 9].into(),
            port: Some(443),
        };
        let name = DeniedWhat::Name {
            name: "example.org".into(),
        };
        Ok(NetworkActivity {
            interface: "chbr0-0001".into(),
            traffic: Traffic {
                denied: Counter {
                    packets: 3,
                    bytes: 180,
                },
                denied_names: 1,
                ..Traffic::default()
            },
            denied: vec![Denied { at, what: packet }, Denied { at, what: name }],
        })
    }

    async fn open_forward(&self, id: &SandboxId, spec: ForwardSpec) -> Result<Forward, HostError> {
        let port = spec.host_port.unwrap_or(10_000);
        if self.taken_ports.lock().unwrap().contains(&port) {
            let reason = port_in_use(spec.transport, (spec.host_address, port).into());
            return Err(HostError::PortInUse { reason });
        }
        let forward = Forward {
            transport: spec.transport,
            host: (spec.host_address, port).into(),
            guest_port: spec.guest_port,
        };
        let mut forwards = self.forwards.lock().unwrap();
        if !forwards.contains(&(id.clone(), forward)) {
            forwards.push((id.clone(), forward));
        }
        Ok(forward)
    }

    async fn close_forwards(&self, id: &SandboxId, closed: &[Forward]) {
        let mut forwards = self.forwards.lock().unwrap();
        forwards.retain(|(owner, forward)| owner != id || !closed.contains(forward));
    }

    async fn events(&self) -> BoxStream<'static, HostEvent> {
        let (sender, receiver) = mpsc::unbounded_channel();
        self.listeners.lock().unwrap().push(sender);
        stream::unfold(receiver, |mut receiver| async move {
            receiver.recv().await.map(|event| (event, receiver))
        })
        .boxed()
    }

    async fn posture(&self, id: &SandboxId, _layers: &[LayerId]) -> Result<Posture, HostError> {
        let mut posture = self.posture.lock().unwrap().clone();
        if !self.sandboxes.lock().unwrap().contains(id) {
            posture.vmm = None;
        }
        Ok(posture)
    }

    async fn shutdown(&self, staying: &BTreeSet<SandboxId>) {
        let mut sandboxes = self.sandboxes.lock().unwrap();
        sandboxes.retain(|id| staying.contains(id));
        self.ready.lock().unwrap().clear();
    }

    async fn exec(
        &self,
        id: &SandboxId,
        request: ExecRequest,
    ) -> Result<BoxStream<'static, Result<ExecEvent, HostError>>, HostError> {
        self.run(id, request)
    }

    async fn write_file(
        &self,
        _id: &SandboxId,
        request: WriteFileRequest,
        content: BoxStream<'static, io::Result<Bytes>>,
    ) -> Result<(), HostError> {
        self.take_file(request, content).await
    }

    async fn read_file(
        &self,
        _id: &SandboxId,
        request: ReadFileRequest,
    ) -> Result<FileContent, HostError> {
        self.give_file(request).await
    }

    async fn list_dir(
        &self,
        _id: &SandboxId,
        path: &str,
        limit: usize,
    ) -> Result<Vec<FileInfo>, HostError> {
        self.list(path, limit)
    }

    async fn walk(&self, _id: &SandboxId, spec: &WalkSpec) -> Result<Option<WalkSteps>, HostError> {
        let walks = self.walks.load(Ordering::Relaxed);
        Ok(walks.then(|| self.walk_files(spec)))
    }
}
