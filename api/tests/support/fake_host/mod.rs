//! A host that runs nothing, and does what it is told to do wrong.

mod guest;
mod host;

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use api::domain::{
    ClaimRequest, CreateRequest, Egress, End, ExecRequest, Forward, HostError, HostEvent,
    KeepDiskRequest, LayerId, Layers, MergeRequest, NetworkInfo, Posture, PowerOffRequest,
    PrepareRequest, SandboxId, SaveRequest, SaveTimings, Saved,
};
use tokio::sync::{Notify, mpsc};

use super::meter;
pub use guest::PIECE;

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
    /// A guest that is asked to shut down does not.
    NotShutDown,
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
    /// Notified when a sandbox was destroyed.
    destroyed: Notify,
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
    /// Whether agents know how to walk directories.
    pub walks: AtomicBool,
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

    /// As the next daemon finds it: nothing goes wrong, and nobody listens yet.
    pub fn restart(&self) {
        self.listeners.lock().unwrap().clear();
        *self.fault.lock().unwrap() = None;
        *self.merge_fault.lock().unwrap() = None;
        self.is_stuck.store(false, Ordering::SeqCst);
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
