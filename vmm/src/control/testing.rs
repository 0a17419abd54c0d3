//! Fake machines, which check that they are told only what fits their state.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use super::guest::{Guest, GuestError, LaunchError, Launcher};
use crate::config::{
    ConsoleConfig, CpusConfig, MemoryConfig, PayloadConfig, RngConfig, SerialConfig, VmConfig,
};
use crate::devices::virtio::Counters;
use crate::devices::virtio::block::ImageFiles;
use crate::exit::ExitReason;
use crate::kvm::vcpu::StoppedError;
use crate::snapshot::{Destination, RestoreConfig, WorkingSetFile};

/// What the fake machines were told, across all of them.
pub type Journal = Arc<Mutex<Vec<String>>>;

pub struct FakeLauncher {
    pub journal: Journal,
    /// How the guests can end their machines: an end for each machine that was launched.
    endings: Sender<Ending>,
    pub fails: Arc<Mutex<bool>>,
    /// Shared with every machine that exists.
    alive: Arc<()>,
}

/// The guest's way to end its machine.
pub struct Ending {
    reason: Arc<Mutex<Option<ExitReason>>>,
    ended: Box<dyn FnOnce() + Send>,
}

impl Ending {
    pub fn end(self, reason: ExitReason) {
        *self.reason.lock().unwrap() = Some(reason);
        (self.ended)();
    }
}

impl FakeLauncher {
    /// A launcher, and the endings of the machines that it will launch.
    pub fn new() -> (Self, Receiver<Ending>) {
        let (endings, receiver) = channel();
        let launcher = Self {
            journal: Journal::default(),
            endings,
            fails: Arc::default(),
            alive: Arc::default(),
        };
        (launcher, receiver)
    }
}

impl Launcher for FakeLauncher {
    fn check(&self) -> Result<(), LaunchError> {
        match *self.fails.lock().unwrap() {
            true => Err(LaunchError::Thread(io::Error::other("no more"))),
            false => Ok(()),
        }
    }

    fn launch(
        &mut self,
        _config: &VmConfig,
        _snapshot: Option<&RestoreConfig>,
        ended: Box<dyn FnOnce() + Send>,
    ) -> Result<Box<dyn Guest>, LaunchError> {
        self.check()?;
        assert_eq!(Arc::strong_count(&self.alive), 1, "two machines at once");
        let reason = Arc::new(Mutex::new(None));
        let ending = Ending {
            reason: reason.clone(),
            ended,
        };
        // Nobody may be interested.
        let _ = self.endings.send(ending);
        Ok(Box::new(FakeGuest {
            journal: self.journal.clone(),
            reason,
            runs: false,
            _alive: self.alive.clone(),
        }))
    }
}

struct FakeGuest {
    journal: Journal,
    reason: Arc<Mutex<Option<ExitReason>>>,
    runs: bool,
    _alive: Arc<()>,
}

impl FakeGuest {
    fn note(&self, what: &str) {
        self.journal.lock().unwrap().push(what.to_owned());
    }
}

impl Guest for FakeGuest {
    fn pause(&mut self) -> Result<(), GuestError> {
        if self.reason.lock().unwrap().is_some() {
            return Err(StoppedError.into());
        }
        assert!(self.runs, "paused twice");
        self.runs = false;
        self.note("pause");
        Ok(())
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        assert!(!self.runs, "resumed twice");
        self.runs = true;
        self.note("resume");
        Ok(())
    }

    fn nmi(&mut self) -> Result<(), GuestError> {
        self.note("nmi");
        Ok(())
    }

    fn power_button(&mut self) -> Result<(), GuestError> {
        Err(GuestError::Unsupported("no button"))
    }

    fn resize_vcpus(&mut self, count: u8) -> Result<(), GuestError> {
        self.note(&format!("vcpus {count}"));
        Ok(())
    }

    fn resize_memory(&mut self, size: u64) -> Result<(), GuestError> {
        self.note(&format!("memory {size}"));
        Ok(())
    }

    fn resize_balloon(&mut self, size: u64) -> Result<(), GuestError> {
        self.note(&format!("balloon {size}"));
        Ok(())
    }

    fn resize_disk(&mut self, id: &str, _size: u64) -> Result<(), GuestError> {
        Err(GuestError::NoDevice { id: id.to_owned() })
    }

    fn snapshot(&mut self, _files: &Destination, keep: usize) -> Result<(), GuestError> {
        assert!(!self.runs, "saved while it runs");
        self.note(&format!("snapshot {keep}"));
        Ok(())
    }

    fn prefetch(&mut self) {
        self.note("prefetch");
    }

    fn save_working_set(&mut self, _file: &WorkingSetFile) -> Result<(), GuestError> {
        self.note("working set");
        Ok(())
    }

    fn replace_disk(&mut self, id: &str, _image: ImageFiles) -> Result<(), GuestError> {
        assert!(!self.runs, "disk replaced while it runs");
        self.note(&format!("replace {id}"));
        Ok(())
    }

    fn core_dump(&mut self, _path: &Path) -> Result<(), GuestError> {
        assert!(!self.runs, "dumped while it runs");
        self.note("core");
        Ok(())
    }

    fn counters(&self) -> BTreeMap<String, Counters> {
        BTreeMap::new()
    }

    fn devices(&self) -> Vec<String> {
        vec!["_disk0".to_owned()]
    }

    fn memory_size(&self) -> u64 {
        1 << 30
    }

    fn describe(&self) -> Vec<String> {
        vec![format!("runs: {}", self.runs)]
    }

    fn stop(self: Box<Self>) -> ExitReason {
        self.note("stop");
        let reason = self.reason.lock().unwrap().clone();
        reason.unwrap_or(ExitReason::Requested)
    }
}

pub fn config() -> Box<VmConfig> {
    Box::new(VmConfig {
        cpus: CpusConfig::default(),
        memory: MemoryConfig::default(),
        payload: Some(PayloadConfig {
            kernel: "/proc/self/exe".into(),
            cmdline: None,
            initramfs: None,
        }),
        disks: Vec::new(),
        net: Vec::new(),
        rng: RngConfig::default(),
        serial: SerialConfig::default(),
        console: ConsoleConfig::default(),
        vsock: None,
        balloon: None,
    })
}
