//! A host that runs nothing, and the API on top of it.

#![allow(dead_code, reason = "each test binary uses a part of it")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on may panic")]

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use api::audit::{self, AuditLog};
use api::domain::{
    AdoptRequest, Adopted, ClaimRequest, Counter, CreateRequest, Created, Denied, DeniedWhat,
    Egress, End, ExecEvent, ExecLimits, ExecRequest, ExitInfo, FileContent, FileInfo, FileKind,
    Forward, ForwardSpec, GuestHost, Host, HostError, HostEvent, HostInfo, ImageInfo,
    KeepDiskRequest, KeptDisk, LayerId, Layers, LayersInfo, Limits, Manager, MergeRequest, Model,
    NetworkActivity, NetworkInfo, PoolLimits, PortStream, Posture, PowerOffRequest, PrepareRequest,
    Presence, Process, ProcessEvents, ProcessRef, Quotas, ReadFileRequest, ResizeRequest,
    SandboxId, SaveRequest, SaveTimings, Saved, Start, StartProcess, TerminalInputs, Timings,
    Traffic, WhenIdle, WriteFileRequest,
};
use api::http::{Access, AppState, Patience, RateLimiter, Rates, Sockets, router};
use api::identity::{Identity, Registration, Tokens};
use api::metrics::Metrics;
use api::scan::Scans;
use api::store::SqliteStore;
use async_trait::async_trait;
use axum::Router;
use axum::body::{Body, Bytes};
use axum::http::{Request, Response, StatusCode};
use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream};
use http_body_util::BodyExt;
use serde_json::Value;
use tokio::sync::{Notify, mpsc};
use tower::ServiceExt;

pub mod meter;
/// How many WebSockets one user has at most.
pub const MAX_SOCKETS: usize = 128;

/// Name of the file of known holes in the directory of an [`Api`].
pub const ADVISORIES: &str = "advisories.json";

/// Pieces of long output and files.
pub const PIECE: usize = 64 * 1024;

/// What goes wrong the next time that it can.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// A sandbox is not saved.
    NotSaved,
    /// A sandbox is not saved, and the layers that it is based on are fewer by one.
    NotSavedAndLess,
    /// A sandbox whose disk is saved alone writes to it meanwhile.
    NotAtRest,
    /// The disk that a sandbox writes to is not kept.
    NotKept,
    /// A sandbox does not start from layers.
    NotRestored,
    /// A ready machine does not start.
    NotClaimed,
    /// A machine does not become ready.
    NotPrepared,
    /// The daemon ends before a sandbox is saved.
    CrashBeforeSave,
    /// The daemon ends when one of the two layers is there.
    CrashBetweenLayers,
    /// The daemon ends after a sandbox was saved, before that is told.
    CrashAfterSave,
    /// The daemon ends before a sandbox starts.
    CrashBeforeStart,
    /// The daemon ends after a sandbox has started, before that is told.
    CrashAfterStart,
}

/// What goes wrong with a merge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MergeFault {
    /// It fails.
    NotMerged,
    /// The daemon ends before the new layer is there.
    CrashBefore,
    /// The daemon ends when it is there, before that is told.
    CrashAfter,
}

/// A host that runs nothing. What a command does is in its name. Layers are names.
#[derive(Default)]
pub struct FakeHost {
    pub files: Mutex<HashMap<String, Vec<u8>>>,
    pub sandboxes: Mutex<Vec<SandboxId>>,
    /// Machines that are ready, and what each was made from.
    pub ready: Mutex<HashMap<SandboxId, PrepareRequest>>,
    /// Those that were claimed, in order.
    pub claims: Mutex<Vec<ClaimRequest>>,
    pub layers: Mutex<BTreeSet<LayerId>>,
    /// What sandboxes were started from and how, in order.
    pub starts: Mutex<Vec<CreateRequest>>,
    /// How sandboxes were to be saved, in order.
    pub saves: Mutex<Vec<SaveRequest>>,
    /// Disks that were kept, in order.
    pub kept: Mutex<Vec<KeepDiskRequest>>,
    /// Commands that were run, in order, each with what it read.
    pub commands: Mutex<Vec<(ExecRequest, Vec<u8>)>>,
    /// How sandboxes were powered off, in order.
    pub power_offs: Mutex<Vec<PowerOffRequest>>,
    pub fault: Mutex<Option<Fault>>,
    /// Notified when a command that talks has ended.
    pub dropped: Arc<Notify>,
    /// How long it takes to save a sandbox.
    pub save_takes: Mutex<Duration>,
    /// Layers of which is known what machines touch first.
    pub working_sets: Mutex<Vec<Layers>>,
    /// What goes wrong with the next merge.
    pub merge_fault: Mutex<Option<MergeFault>>,
    /// How often layers were merged.
    pub merges: Mutex<Vec<MergeRequest>>,
    /// A merge has come to where the daemon is to end.
    pub is_stuck: AtomicBool,
    pub last_upload: Mutex<Option<u64>>,
    /// The permission bits of the last file that was written, if any were given.
    pub last_mode: Mutex<Option<u32>>,
    /// The networks of its sandboxes.
    pub networks: Mutex<Vec<NetworkInfo>>,
    /// What sandboxes were to reach, in order.
    pub egress: Mutex<Vec<(SandboxId, Egress)>>,
    /// Sandboxes that somebody else has cut off from their networks.
    pub cut_off: Mutex<Vec<SandboxId>>,
    /// Whether somebody else has removed a bridge.
    pub has_no_bridge: AtomicBool,
    /// Ports that lead into sandboxes.
    pub forwards: Mutex<Vec<(SandboxId, Forward)>>,
    /// Ports that somebody else has.
    pub taken_ports: Mutex<Vec<u16>>,
    /// What holds its sandboxes that run.
    pub posture: Mutex<Posture>,
    /// Sandboxes of which something is left.
    pub left: Mutex<BTreeSet<SandboxId>>,
    /// Sandboxes that are being saved, and then go on.
    goes_on: Mutex<BTreeSet<SandboxId>>,
    /// What sandboxes were saved to last, when they went on.
    noted: Mutex<HashMap<SandboxId, Layers>>,
    /// What is measured.
    pub meter: meter::FakeMeter,
    listeners: Mutex<Vec<mpsc::UnboundedSender<HostEvent>>>,
}

impl FakeHost {
    /// Whether this is to go wrong now.
    fn fails(&self, fault: Fault) -> bool {
        let mut next = self.fault.lock().unwrap();
        let is_it = *next == Some(fault);
        if is_it {
            *next = None;
        }
        is_it
    }

    /// Does not return if the daemon is to crash here; whoever waits is never told.
    async fn may_crash(&self, fault: Fault) {
        if self.fails(fault) {
            std::future::pending::<()>().await;
        }
    }

    fn has(&self, layers: &[LayerId]) -> bool {
        let there = self.layers.lock().unwrap();
        layers.iter().all(|layer| there.contains(layer))
    }

    async fn save(&self, request: SaveRequest) -> Result<Saved, HostError> {
        self.may_crash(Fault::CrashBeforeSave).await;
        let save_takes = *self.save_takes.lock().unwrap();
        tokio::time::sleep(save_takes).await;
        let keep = request.keep;
        self.saves.lock().unwrap().push(request.clone());
        let not_saved = |keep| {
            let reason = "no space left on device".to_owned();
            Err(HostError::NotSaved { reason, keep })
        };
        if self.fails(Fault::NotSaved) {
            return not_saved(usize::MAX);
        }
        if self.fails(Fault::NotSavedAndLess) {
            return not_saved(keep.saturating_sub(1));
        }
        let (disk, below) = request.layers.disk.split_last().unwrap();
        assert!(self.has(below), "a base is gone");
        if request.include_memory {
            let (memory, kept) = request.layers.memory.split_last().unwrap();
            assert_eq!(kept.len(), keep);
            assert!(self.has(kept), "a base is gone");
            assert!(self.layers.lock().unwrap().insert(memory.clone()));
        } else {
            assert!(self.has(&request.layers.memory), "a base is gone");
        }
        self.may_crash(Fault::CrashBetweenLayers).await;
        assert!(self.layers.lock().unwrap().insert(disk.clone()));
        if self.goes_on.lock().unwrap().contains(&request.id) {
            let mut noted = self.noted.lock().unwrap();
            noted.insert(request.id.clone(), request.layers.clone());
        }
        self.may_crash(Fault::CrashAfterSave).await;
        Ok(Saved {
            new_bytes: 100,
            is_at_rest: !request.include_memory && !self.fails(Fault::NotAtRest),
            timings: SaveTimings {
                stall_us: 1500,
                memory_us: 1000,
            },
        })
    }

    /// A machine that is ready ends.
    pub fn lose(&self, id: &SandboxId) {
        self.ready.lock().unwrap().remove(id).unwrap();
        for listener in self.listeners.lock().unwrap().iter() {
            let _ = listener.send(HostEvent::Lost { id: id.clone() });
        }
    }

    /// A sandbox ends by itself.
    pub fn end(&self, id: &str, end: End) {
        let id: SandboxId = id.parse().unwrap();
        self.sandboxes.lock().unwrap().retain(|other| *other != id);
        for listener in self.listeners.lock().unwrap().iter() {
            listener
                .send(HostEvent::Ended {
                    id: id.clone(),
                    end: end.clone(),
                })
                .unwrap();
        }
    }
}

/// Tells when it is dropped.
struct Said(Arc<Notify>);

impl Drop for Said {
    fn drop(&mut self) {
        self.0.notify_one();
    }
}

fn out(bytes: impl Into<Bytes>) -> Result<ExecEvent, HostError> {
    Ok(ExecEvent::Stdout(bytes.into()))
}

fn err(bytes: impl Into<Bytes>) -> Result<ExecEvent, HostError> {
    Ok(ExecEvent::Stderr(bytes.into()))
}

fn exited(code: i32, timed_out: bool) -> Result<ExecEvent, HostError> {
    Ok(ExecEvent::Exited(ExitInfo { code, timed_out }))
}

#[async_trait]
impl GuestHost for FakeHost {
    async fn start_process(
        &self,
        id: &SandboxId,
        _request: StartProcess,
    ) -> Result<Process, HostError> {
        Err(HostError::NotRunning { id: id.clone() })
    }

    async fn processes(&self, id: &SandboxId) -> Result<Vec<Process>, HostError> {
        Err(HostError::NotRunning { id: id.clone() })
    }

    async fn signal_process(
        &self,
        id: &SandboxId,
        _process: &ProcessRef,
        _signal: i32,
    ) -> Result<(), HostError> {
        Err(HostError::NotRunning { id: id.clone() })
    }

    async fn attach_process(
        &self,
        id: &SandboxId,
        _process: &ProcessRef,
        _input: TerminalInputs,
    ) -> Result<ProcessEvents, HostError> {
        Err(HostError::NotRunning { id: id.clone() })
    }

    async fn connect(&self, id: &SandboxId, _port: u16) -> Result<PortStream, HostError> {
        Err(HostError::NotRunning { id: id.clone() })
    }
}

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

    async fn image(&self, name: &str, with_digest: bool) -> Result<ImageInfo, HostError> {
        let info = self.describe().await?;
        if !info.templates.iter().any(|known| known == name) {
            return Err(HostError::UnknownTemplate { name: name.into() });
        }
        Ok(ImageInfo {
            digest: with_digest.then(|| format!("digest of {name}")),
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
        self.destroy(&request.id).await?;
        self.may_crash(Fault::CrashAfterSave).await;
        let in_order = request.timeout_ms > 0;
        self.power_offs.lock().unwrap().push(request);
        Ok(in_order)
    }

    async fn destroy(&self, id: &SandboxId) -> Result<(), HostError> {
        self.sandboxes.lock().unwrap().retain(|other| other != id);
        self.ready.lock().unwrap().remove(id);
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

    async fn exec(
        &self,
        id: &SandboxId,
        request: ExecRequest,
    ) -> Result<BoxStream<'static, Result<ExecEvent, HostError>>, HostError> {
        if !self.sandboxes.lock().unwrap().contains(id) {
            return Err(HostError::NotRunning { id: id.clone() });
        }
        self.commands
            .lock()
            .unwrap()
            .push((request.clone(), Vec::new()));
        let argument = request.argv.get(1).cloned().unwrap_or_default();
        let events = match request.argv[0].as_str() {
            "echo" => vec![
                out(request.argv[1..].join(" ")),
                err("warning\n"),
                exited(0, false),
            ],
            "env" => vec![
                out(format!("{:?} {:?}", request.env, request.cwd)),
                exited(0, false),
            ],
            "false" => vec![exited(1, false)],
            "mkdir" => vec![exited(0, false)],
            // A shell tells of its script; one that is to fail says so, and one that is to hang.
            "/bin/sh" => match request.argv[2].as_str() {
                "fail" => vec![err("it fails\n"), exited(3, false)],
                "hang" => return Ok(stream::pending().boxed()),
                "late" => vec![out("so far"), exited(137, true)],
                script => vec![out(format!("ran {script}\n")), exited(0, false)],
            },
            // Succeeds the second time.
            "second" => {
                let commands = self.commands.lock().unwrap();
                let count = commands
                    .iter()
                    .filter(|(command, _)| command.argv[0] == "second")
                    .count();
                vec![out("not yet"), exited(i32::from(count < 2), false)]
            }
            "binary" => vec![out(&b"\xff\xfe"[..]), err("text"), exited(0, false)],
            "talk" => {
                // Says each argument when the one before was taken; ends when it is dropped.
                let said = Said(self.dropped.clone());
                let words = request.argv[1..].to_vec();
                let start = stream::iter([Ok(ExecEvent::Started { pid: 7 })]);
                let talk = stream::iter(words).map(move |word| {
                    let _ = &said;
                    match word.strip_prefix("hex:") {
                        Some(digits) => out(vec![u8::from_str_radix(digits, 16).unwrap()]),
                        None => out(word),
                    }
                });
                let end: BoxStream<'_, _> = match argument.as_str() {
                    "forever" => stream::pending().boxed(),
                    _ => stream::iter([exited(3, false)]).boxed(),
                };
                return Ok(start.chain(talk.chain(end)).boxed());
            }
            "work" => {
                let seconds = argument.parse().unwrap();
                let work = async move {
                    tokio::time::sleep(Duration::from_secs(seconds)).await;
                    exited(0, false)
                };
                return Ok(stream::once(work).boxed());
            }
            "sleep" => vec![out("so far"), exited(137, true)],
            "lost" => vec![
                out("so far"),
                Err(HostError::AgentUnreachable { reason: "x".into() }),
            ],
            "flood" => {
                let pieces = argument.parse::<usize>().unwrap() / PIECE;
                let piece = Bytes::from("y\n".repeat(PIECE / 2));
                let flood = stream::iter((0..pieces).map(move |_| out(piece.clone())));
                return Ok(flood.chain(stream::iter([exited(0, false)])).boxed());
            }
            other => {
                return Err(HostError::Agent {
                    reason: format!("no {other}"),
                });
            }
        };
        Ok(stream::iter(events).boxed())
    }

    async fn console(&self, id: &SandboxId) -> Result<String, HostError> {
        if !self.sandboxes.lock().unwrap().contains(id) {
            return Err(HostError::NotRunning { id: id.clone() });
        }
        Ok(format!("[    0.000000] Linux of {id}"))
    }

    async fn write_file(
        &self,
        _id: &SandboxId,
        request: WriteFileRequest,
        mut content: BoxStream<'static, io::Result<Bytes>>,
    ) -> Result<(), HostError> {
        if request.path == "/directory" {
            return Err(HostError::Invalid {
                reason: "it is a directory".into(),
            });
        }
        let mut file = Vec::new();
        let mut len = 0;
        while let Some(piece) = content.next().await {
            let piece = piece.map_err(|error| HostError::Upload {
                reason: error.to_string(),
            })?;
            len += piece.len() as u64;
            if request.path != "/dev/null" {
                file.extend_from_slice(&piece);
            }
        }
        *self.last_upload.lock().unwrap() = Some(len);
        *self.last_mode.lock().unwrap() = request.mode;
        self.files.lock().unwrap().insert(request.path, file);
        Ok(())
    }

    async fn read_file(
        &self,
        _id: &SandboxId,
        request: ReadFileRequest,
    ) -> Result<FileContent, HostError> {
        if let Some(size) = request.path.strip_prefix("/zeros/") {
            let size: usize = size.parse().unwrap();
            let piece = Bytes::from(vec![0; PIECE]);
            let content = stream::iter((0..size / PIECE).map(move |_| Ok(piece.clone()))).boxed();
            return Ok(FileContent {
                size: Some(size as u64),
                content,
            });
        }
        let file = self.files.lock().unwrap().get(&request.path).cloned();
        let file = file.ok_or(HostError::FileNotFound { path: request.path })?;
        if file == b"hang" {
            std::future::pending::<()>().await;
        }
        let size = Some(file.len() as u64);
        Ok(FileContent {
            size,
            content: stream::iter([Ok(file.into())]).boxed(),
        })
    }

    async fn list_dir(
        &self,
        _id: &SandboxId,
        path: &str,
        limit: usize,
    ) -> Result<Vec<FileInfo>, HostError> {
        let (path, files) = (path.trim_end_matches('/'), self.files.lock().unwrap());
        let mut found = BTreeSet::new();
        for name in files.keys() {
            let below = name
                .strip_prefix(path)
                .and_then(|rest| rest.strip_prefix('/'));
            if let Some((directory, _)) = below.and_then(|below| below.split_once('/')) {
                found.insert((format!("{path}/{directory}"), true));
            } else if below.is_some() {
                found.insert((name.clone(), false));
            }
        }
        if found.is_empty() {
            let path = path.to_owned();
            return Err(HostError::FileNotFound { path });
        }
        assert!(found.len() <= limit);
        Ok(found
            .into_iter()
            .map(|(path, is_dir)| file_info(path, is_dir))
            .collect())
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
            let reason = format!("port {port} is in use");
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
}

fn file_info(path: String, is_dir: bool) -> FileInfo {
    FileInfo {
        path,
        kind: if is_dir {
            FileKind::Directory
        } else {
            FileKind::File
        },
        mode: 0o750,
        uid: 0,
        gid: 7,
        size: 5,
        mtime_us: 2_999_999,
        target: None,
    }
}

const NO_RATES: Rates = Rates {
    per_minute: 0,
    per_hour: 0,
};

/// Limits that no test reaches by chance.
fn limits() -> Limits {
    Limits {
        exec: ExecLimits {
            max_output: 1 << 20,
            memory_threshold: 64 * 1024,
            spool_dir: "/nonexistent".into(),
        },
        warm_bytes: 0,
        merge_from: usize::MAX,
        quotas: Quotas::default(),
        when_idle: WhenIdle::Pause,
        pool: PoolLimits {
            per_shape: 0,
            total: 8,
            memory_mb: 4096,
            idle: Duration::from_secs(600),
        },
    }
}

/// The API on a fake host.
pub struct Api {
    pub host: Arc<FakeHost>,
    pub store: Arc<SqliteStore>,
    pub manager: Manager,
    pub scans: Scans,
    pub audit: AuditLog,
    pub router: Router,
    pub dir: tempfile::TempDir,
}

impl Api {
    /// An API that takes uploads of `max_upload` bytes and `max_output` bytes of output.
    pub async fn new(max_upload: u64, max_output: u64) -> Self {
        let mut limits = limits();
        limits.exec.max_output = max_output;
        let dir = tempfile::tempdir().unwrap();
        Self::start(dir, Arc::default(), max_upload, limits).await
    }

    /// An API that keeps warm snapshots of so many bytes.
    pub async fn warm(warm_bytes: u64) -> Self {
        let limits = Limits {
            warm_bytes,
            ..limits()
        };
        let dir = tempfile::tempdir().unwrap();
        Self::start(dir, Arc::default(), 1 << 20, limits).await
    }

    /// An API that does this with idle sandboxes.
    pub async fn idle(when_idle: WhenIdle) -> Self {
        let limits = Limits {
            when_idle,
            ..limits()
        };
        let dir = tempfile::tempdir().unwrap();
        Self::start(dir, Arc::default(), 1 << 20, limits).await
    }

    /// An API that keeps warm snapshots, and so many machines ready for each shape.
    pub async fn pooled(per_shape: usize) -> Self {
        let mut limits = limits();
        limits.warm_bytes = 1 << 20;
        limits.pool.per_shape = per_shape;
        let dir = tempfile::tempdir().unwrap();
        Self::start(dir, Arc::default(), 1 << 20, limits).await
    }

    /// An API that merges disk layers when there are so many.
    pub async fn merging(merge_from: usize) -> Self {
        let limits = Limits {
            merge_from,
            ..limits()
        };
        let dir = tempfile::tempdir().unwrap();
        Self::start(dir, Arc::default(), 1 << 20, limits).await
    }

    /// An API that these may use.
    pub async fn open(access: Access) -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self::start_for(access, NO_RATES, dir, Arc::default(), 1 << 20, limits()).await
    }

    /// An API that takes so many requests of `/api/v1`.
    pub async fn with_rates(rates: Rates) -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self::start_for(Access::Local, rates, dir, Arc::default(), 1 << 20, limits()).await
    }

    /// An API with these quotas.
    pub async fn with_quotas(quotas: Quotas) -> Self {
        let limits = Limits { quotas, ..limits() };
        let dir = tempfile::tempdir().unwrap();
        Self::start(dir, Arc::default(), 1 << 20, limits).await
    }

    /// What the next daemon makes of what this one leaves.
    pub async fn restart(self) -> Self {
        let limits = self.manager.limits().clone();
        self.host.listeners.lock().unwrap().clear();
        *self.host.fault.lock().unwrap() = None;
        *self.host.merge_fault.lock().unwrap() = None;
        self.host.is_stuck.store(false, Ordering::SeqCst);
        let Self { host, dir, .. } = self;
        Self::start(dir, host, 1 << 20, limits).await
    }

    async fn start(
        dir: tempfile::TempDir,
        host: Arc<FakeHost>,
        max_upload: u64,
        limits: Limits,
    ) -> Self {
        Self::start_for(Access::Local, NO_RATES, dir, host, max_upload, limits).await
    }

    async fn start_for(
        access: Access,
        rates: Rates,
        dir: tempfile::TempDir,
        host: Arc<FakeHost>,
        max_upload: u64,
        mut limits: Limits,
    ) -> Self {
        let store = Arc::new(SqliteStore::open(&dir.path().join("db")).unwrap());
        limits.exec.spool_dir = dir.path().to_owned();
        let manager = Manager::new(host.clone(), store.clone(), limits);
        let events = host.events().await;
        manager.recover().await.unwrap();
        let follower = manager.clone();
        tokio::spawn(async move { follower.follow(events).await });
        let reaper = manager.clone();
        tokio::spawn(async move { reaper.set_aside_idle().await });
        let keeper = manager.clone();
        tokio::spawn(async move { keeper.keep_pool().await });
        let tokens = Tokens::open(&dir.path().join("token.key")).unwrap();
        let identity = Identity::new(store.clone(), tokens, Registration::Open).unwrap();
        let metrics = Metrics::new();
        manager.observe(Arc::new(metrics.clone()));
        let audit = AuditLog::open(&dir.path().join(audit::FILE)).unwrap();
        let scans = Scans::open(
            store.clone(),
            audit.clone(),
            Some(dir.path().join(ADVISORIES)),
        );
        let scans = scans.await.unwrap();
        let state = AppState {
            metrics,
            manager: manager.clone().into(),
            identity,
            access,
            rates: RateLimiter::new(rates),
            scans: scans.clone(),
            audit: audit.clone(),
            sockets: Sockets::new(MAX_SOCKETS),
            patience: Patience {
                head: Duration::from_secs(3600),
                body: Duration::from_secs(3600),
                upload: Duration::from_secs(3600),
            },
            max_upload,
            max_archive: 1 << 20,
        };
        Self {
            host,
            store,
            manager,
            scans,
            audit,
            router: router(state).unwrap(),
            dir,
        }
    }

    /// The answer to a request.
    pub async fn send(&self, method: &str, path: &str, body: impl Into<Body>) -> Response<Body> {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "localhost:8000")
            .body(body.into())
            .unwrap();
        self.router.clone().oneshot(request).await.unwrap()
    }

    /// The status and JSON of the answer to a request; null if it has no body.
    pub async fn call(&self, method: &str, path: &str, body: &str) -> (StatusCode, Value) {
        read_json(self.send(method, path, body.to_owned()).await).await
    }

    /// The same with these headers.
    pub async fn call_as(
        &self,
        method: &str,
        path: &str,
        body: &str,
        headers: &[(&str, &str)],
    ) -> (StatusCode, Value) {
        let mut request = Request::builder().method(method).uri(path);
        if headers.iter().all(|(name, _)| *name != "host") {
            request = request.header("host", "localhost:8000");
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Body::from(body.to_owned())).unwrap();
        read_json(self.router.clone().oneshot(request).await.unwrap()).await
    }

    /// The `Authorization` of a user, who logs in.
    pub async fn token(&self, name: &str, password: &str) -> String {
        let body = serde_json::json!({"username": name, "password": password}).to_string();
        let (status, token) = self.call("POST", "/api/v1/auth/login", &body).await;
        assert_eq!(status, StatusCode::OK, "{token}");
        format!("Bearer {}", token["access_token"].as_str().unwrap())
    }

    /// The answer to an upload of this form, whose boundary is `X`.
    pub async fn upload(&self, id: &str, form: impl Into<Body>) -> (StatusCode, Value) {
        let request = Request::post(format!("/v1/sandboxes/{id}/files/write"))
            .header("host", "localhost")
            .header("content-type", "multipart/form-data; boundary=X")
            .body(form.into())
            .unwrap();
        read_json(self.router.clone().oneshot(request).await.unwrap()).await
    }

    /// The answer to an upload by whoever has this `Authorization`.
    pub async fn upload_as(&self, token: &str, path: &str) -> (StatusCode, Value) {
        let form = form(&[("path", b"/f"), ("file", b"x")]);
        let request = Request::post(path)
            .header("host", "localhost")
            .header("authorization", token)
            .header("content-type", "multipart/form-data; boundary=X")
            .body(Body::from(form))
            .unwrap();
        read_json(self.router.clone().oneshot(request).await.unwrap()).await
    }

    /// The id of a new sandbox.
    pub async fn create(&self) -> String {
        let (status, sandbox) = self.call("POST", "/v1/sandboxes", "{}").await;
        assert_eq!(status, StatusCode::CREATED, "{sandbox}");
        sandbox["id"].as_str().unwrap().to_owned()
    }
}

pub async fn read_json(response: Response<Body>) -> (StatusCode, Value) {
    let status = response.status();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    let json = if body.is_empty() {
        Value::Null
    } else {
        serde_json::from_slice(&body)
            .unwrap_or_else(|error| Value::String(format!("{error}: {body:?}")))
    };
    (status, json)
}

/// A form with boundary `X` of these fields.
pub fn form(fields: &[(&str, &[u8])]) -> Vec<u8> {
    let mut form = Vec::new();
    for (name, value) in fields {
        let file = if *name == "file" {
            "; filename=\"f\""
        } else {
            ""
        };
        let head = format!("--X\r\nContent-Disposition: form-data; name=\"{name}\"{file}\r\n\r\n");
        form.extend_from_slice(head.as_bytes());
        form.extend_from_slice(value);
        form.extend_from_slice(b"\r\n");
    }
    form.extend_from_slice(b"--X--\r\n");
    form
}
