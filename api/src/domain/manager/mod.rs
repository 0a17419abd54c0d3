//! The owner of all sandboxes.
//!
//! Every change is written before and after the act: a create writes `pending`, starts the
//! sandbox, and writes `running` or `error`; a pause writes `pausing` and where it saves to, saves,
//! and writes `paused`; a delete writes the wish, ends the sandbox, and writes `stopped`. What ends
//! by itself is told by the host's events. One lock is held while a record is read, changed and
//! written back, never while the host works. Who takes a sandbox from one state to another has its
//! [turn](super::turns) for all of that.

mod builds;
mod console;
mod directories;
mod events;
mod from_snapshot;
mod idle;
mod inspect;
mod merge;
mod meter;
mod network;
mod oci;
mod pause;
mod pool;
mod ports;
mod power;
mod processes;
mod quota;
mod reconcile;
mod recover;
mod resize;
mod scope;
mod shutdown;
mod snapshots;
mod templates;
mod warm;

use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use jiff::Timestamp;
use sha2::{Digest, Sha256};
use tokio::sync::{Mutex, MutexGuard};
use tracing::{Instrument, debug, error, info, warn};

use super::error::{
    CreateError, DestroyError, ExecError, FileError, InsertError, LookupError, StartRefused,
};
use super::events::{Change, Events};
use super::exec::{self, ExecLimits, ExecOutput};
use super::host::{
    CreateRequest, End, ExecEvent, FileContent, Host, HostError, HostEvent, Identity, Nic,
    ReadFileRequest, Shape, WriteFileRequest,
};
use super::id::{LayerId, SandboxId};
use super::idle::Idle;
use super::layer::Layers;
use super::network::Connection;
use super::observe::Observer;
use super::principal::Principal;
use super::quota::Quotas;
use super::request::{self, Command, CreateSpec, Problem};
use super::sandbox::{Sandbox, Spec, Status, Transition};
use super::store::{Page, Store, StoreError};
use super::template::Settings;
use super::timings::Start;
use super::turns::{Turn, Turns};
use crate::chain;
use builds::Builds;
pub use directories::MAX_DEPTH;
pub use idle::{InUse, WhenIdle};
pub use inspect::Inspected;
use merge::Merges;
use meter::Meter;
pub use network::SandboxNetwork;
use pool::Pool;
pub use pool::PoolLimits;
pub use ports::PortConnection;
pub use power::StopSpec;
pub use processes::{ProcessSpec, check_size};
pub use reconcile::Divergence;
use reconcile::Reconciler;
pub use recover::RecoverError;
pub use shutdown::OnStop;
pub use snapshots::Forked;
use warm::Warm;

/// What the manager allows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Output of commands.
    pub exec: ExecLimits,
    /// Size on the disk of all warm snapshots, in bytes; with 0 there are none.
    pub warm_bytes: u64,
    /// What becomes of a sandbox that was idle for as long as its timeout.
    pub when_idle: WhenIdle,
    /// Machines that are ready before they are asked for.
    pub pool: PoolLimits,
    /// From how many disk layers on those of a sandbox are merged in the background.
    pub merge_from: usize,
    /// How much the sandboxes of one owner may have together.
    pub quotas: Quotas,
}

/// The owner of all sandboxes, acting for one principal; clones share it.
#[derive(Clone)]
pub struct Manager {
    inner: Arc<Inner>,
    /// For whom it acts.
    principal: Arc<Principal>,
}

struct Inner {
    host: Arc<dyn Host>,
    store: Arc<dyn Store>,
    limits: Limits,
    /// Held while a record is read, changed and written back.
    records: Mutex<()>,
    turns: Turns,
    warm: Warm,
    idle: Arc<Idle>,
    pool: Pool,
    merges: Merges,
    builds: Builds,
    reconciler: Reconciler,
    events: Events,
    meter: Meter,
    observer: OnceLock<Arc<dyn Observer>>,
    closing: AtomicBool,
}

impl Manager {
    /// A manager of what is in `store`, on `host`, which acts for the local principal.
    pub fn new(host: Arc<dyn Host>, store: Arc<dyn Store>, limits: Limits) -> Self {
        Self {
            inner: Arc::new(Inner {
                host,
                store,
                limits,
                records: Mutex::new(()),
                turns: Turns::default(),
                warm: Warm::default(),
                idle: Arc::default(),
                pool: Pool::default(),
                merges: Merges::default(),
                builds: Builds::default(),
                reconciler: Reconciler::default(),
                events: Events::default(),
                meter: Meter::default(),
                observer: OnceLock::new(),
                closing: AtomicBool::new(false),
            }),
            principal: Arc::new(Principal::Local),
        }
    }

    /// The same, acting for `principal`: what that makes is its own, and what it may not see is not
    /// there.
    pub fn acting_for(&self, principal: Principal) -> Self {
        Self {
            inner: Arc::clone(&self.inner),
            principal: Arc::new(principal),
        }
    }

    /// Has this told of all changes from now on. The first one is; there is no second.
    pub fn observe(&self, observer: Arc<dyn Observer>) {
        let _ = self.inner.observer.set(observer);
    }

    /// Writes down what happens on the host, until it tells no more.
    pub async fn follow(&self, mut events: BoxStream<'static, HostEvent>) {
        while let Some(event) = events.next().await {
            let (id, end) = match event {
                HostEvent::Ended { id, end } => (id, end),
                HostEvent::Lost { id } => {
                    warn!(sandbox = %id, "a ready machine has ended");
                    self.inner.pool.lost(&id);
                    continue;
                }
            };
            let transition = match end {
                End::Orderly { reason } => Transition::Stopped {
                    reason: Some(reason),
                },
                End::Failed { reason } => Transition::Failed { reason },
            };
            if let Err(source) = self.record(&id, transition).await {
                error!(sandbox = %id, error = %chain(&source), "end of sandbox not recorded");
            }
        }
    }

    /// Creates a sandbox and waits until it can be used. It goes on if the caller goes away.
    ///
    /// # Errors
    /// Nothing of it is left but, if it was tried, a record with the reason.
    pub async fn create(&self, spec: CreateSpec) -> Result<Sandbox, CreateError> {
        let wishes = Wishes::of(&spec);
        let manager = self.clone();
        let created = match self.asked_of_snapshot(&spec).await? {
            Some(from) => {
                let wishes = wishes.of_snapshot(spec.template);
                let task = async move { manager.create_from_snapshot(from, wishes).await };
                tokio::spawn(task.in_current_span()).await
            }
            None => {
                let spec = self.check(spec).await?;
                let task = async move { manager.create_checked(spec, wishes).await };
                tokio::spawn(task.in_current_span()).await
            }
        };
        created.unwrap_or(Err(CreateError::Interrupted))
    }

    async fn create_checked(&self, spec: Spec, wishes: Wishes) -> Result<Sandbox, CreateError> {
        let _starting = self.inner.pool.starting();
        let shape = shape_of(&spec);
        let (sandbox, turn, warm) = self.insert_warm(spec, &wishes).await?;
        info!(sandbox = %sandbox.id, template = shape.template, vcpus = shape.vcpus,
            memory_mb = shape.memory_mb, is_warm = warm.is_some(), "creating sandbox");
        let started = match warm {
            Some(warm) => self.start_warm(sandbox, warm).await,
            None => self.start(sandbox, Start::Cold).await,
        };
        drop(turn);
        if started.is_ok() {
            self.warm_up(shape);
        }
        started
    }

    /// Starts a sandbox that is written down as `pending`, and writes down how that went. The
    /// caller has the turn.
    async fn start(&self, sandbox: Sandbox, start: Start) -> Result<Sandbox, CreateError> {
        let id = sandbox.id.clone();
        let created = self.inner.host.create(request_for(&sandbox, start)).await;
        match self.until_usable(&sandbox, start, created).await {
            Ok(created) => {
                self.started(&id, Transition::Started(created.timings))
                    .await
            }
            Err(source) => {
                let reason = reason_of(&source);
                self.record(&id, Transition::Failed { reason }).await?;
                Err(CreateError::Host { id, source })
            }
        }
    }

    /// Writes down that a sandbox runs.
    async fn started(
        &self,
        id: &SandboxId,
        transition: Transition,
    ) -> Result<Sandbox, CreateError> {
        if let Err(source) = self.keep_if_kept(id).await {
            error!(sandbox = %id, error = %chain(&source), "the disk of the sandbox is not kept");
            if let Err(source) = self.inner.host.destroy(id).await {
                error!(sandbox = %id, error = chain(&source), "sandbox is left");
            }
            let reason = chain(&source);
            self.record(id, Transition::Failed { reason }).await?;
            return Err(source);
        }
        let recorded = self.record(id, transition).await;
        let gone = match recorded {
            Ok(Some(sandbox)) if sandbox.status == Status::Running => {
                let total_us = sandbox.timings.map(|timings| timings.total_us);
                info!(sandbox = %id, total_us, "sandbox is running");
                return Ok(sandbox);
            }
            Ok(Some(sandbox)) => CreateError::EndedAtOnce {
                id: id.clone(),
                reason: sandbox
                    .status_reason
                    .unwrap_or_else(|| "it was deleted".into()),
            },
            Ok(None) => CreateError::Interrupted,
            Err(source) => source.into(),
        };
        // What is not recorded as running must not run.
        if let Err(source) = self.inner.host.destroy(id).await {
            error!(sandbox = %id, error = chain(&source), "sandbox is left");
        }
        Err(gone)
    }

    /// Writes down a new sandbox, with the address that is wished for or one that is free, and takes
    /// the turn at it. The caller holds the lock of the records.
    async fn insert(
        &self,
        spec: &Spec,
        layers: &Layers,
        wishes: &Wishes,
    ) -> Result<(Sandbox, Turn), InsertError> {
        let address = self.claim_for(spec, wishes).await?;
        loop {
            let new = Sandbox::new(
                SandboxId::random(),
                spec.clone(),
                layers.clone(),
                Timestamp::now(),
            );
            let inserted = self.insert_as(new, wishes, address);
            if let Some(inserted) = inserted.await? {
                return Ok(inserted);
            }
        }
    }

    /// Writes this one down; `None` if another had its id before.
    async fn insert_as(
        &self,
        mut sandbox: Sandbox,
        wishes: &Wishes,
        address: Option<Ipv4Addr>,
    ) -> Result<Option<(Sandbox, Turn)>, StoreError> {
        sandbox.address = address;
        sandbox.name = wishes.name.clone();
        sandbox.is_kept |= wishes.is_kept;
        sandbox.snapshot = wishes.snapshot.clone();
        sandbox.owner = self.principal.owner().cloned();
        sandbox.key = self.principal.key().cloned();
        let turn = self.inner.turns.take(&sandbox.id).await;
        let is_new = self.inner.store.insert(&sandbox).await?;
        if is_new {
            self.tell(&sandbox, Change::Created);
        }
        Ok(is_new.then_some((sandbox, turn)))
    }

    /// The address of a new sandbox, if it has a network card; whether its name is free, and whether
    /// the quota allows it.
    async fn claim_for(
        &self,
        spec: &Spec,
        wishes: &Wishes,
    ) -> Result<Option<Ipv4Addr>, InsertError> {
        if let Some(name) = &wishes.name {
            let others = self.inner.store.find(name).await?;
            let mut others = others.iter();
            if others.any(|other| self.principal.owns(other.owner.as_ref())) {
                return Err(InsertError::NameTaken(name.clone()));
            }
        }
        self.check_quota_of_new(spec).await?;
        Ok(match &spec.network {
            Some(connection) => Some(self.allocate(connection, wishes.address).await?),
            None => None,
        })
    }

    /// An address for a new sandbox that is connected like this: this one, or one that is free. The caller holds the lock of
    /// the records until the sandbox is written down.
    async fn allocate(
        &self,
        connection: &Connection,
        wanted: Option<Ipv4Addr>,
    ) -> Result<Ipv4Addr, InsertError> {
        let host = self.inner.host.describe().await;
        let host = host.map_err(InsertError::Describe)?;
        let subnet = host.network(connection.network.as_deref())?.subnet;
        let taken = self.inner.store.taken_addresses(subnet).await?;
        Ok(match wanted {
            Some(address) => subnet.claim(address, &taken.all)?,
            None => subnet.next_free(taken.last, &taken.all)?,
        })
    }

    async fn check(&self, spec: CreateSpec) -> Result<Spec, CreateError> {
        if self.is_closing() {
            return Err(CreateError::ShuttingDown);
        }
        if let Some(name) = &spec.name {
            request::check_name(name).map_err(CreateError::Invalid)?;
        }
        let host = self
            .inner
            .host
            .describe()
            .await
            .map_err(CreateError::Describe)?;
        let ground = self.checked_ground(&spec.template, &host).await?;
        let spec = request::check_spec(spec, &ground.settings, &host);
        let spec = spec.map_err(CreateError::Invalid)?;
        match self.disk_problem(&spec.template, spec.disk_mb).await? {
            Some(sentence) => Err(CreateError::Invalid(sentence)),
            None => Ok(spec),
        }
    }

    /// All that is wrong with a sandbox as it is asked for, but for what only its creation shows.
    ///
    /// # Errors
    /// The host or the store cannot tell.
    pub async fn problems(&self, spec: &CreateSpec) -> Result<Vec<Problem>, CreateError> {
        let host = self.inner.host.describe().await;
        let host = host.map_err(CreateError::Describe)?;
        if let Some(snapshot) = self.snapshot_as_template(&spec.template, &host).await? {
            return self.problems_on(spec, &snapshot, &host).await;
        }
        let (settings, problem) = match self.checked_ground(&spec.template, &host).await {
            Ok(ground) => (ground.settings, None),
            Err(CreateError::Invalid(sentence)) => (Settings::default(), Some(sentence)),
            Err(other) => return Err(other),
        };
        let template = problem.map(|sentence| Problem {
            field: "template",
            sentence,
        });
        let mut others = request::problems(spec, &settings, &host);
        if template.is_none()
            && let Some(disk_mb) = spec.disk_mb.and_then(|size| u32::try_from(size).ok())
            && let Some(sentence) = self.disk_problem(&spec.template, Some(disk_mb)).await?
        {
            others.push(Problem {
                field: "disk_mb",
                sentence,
            });
        }
        Ok(template.into_iter().chain(others).collect())
    }

    fn is_closing(&self) -> bool {
        self.inner.closing.load(Ordering::Acquire)
    }

    /// The sandboxes that run, are on the way there, are paused, or are off; newest first.
    ///
    /// # Errors
    /// The store failed.
    pub async fn list(&self) -> Result<Vec<Sandbox>, StoreError> {
        let mut sandboxes = self.inner.store.list_live().await?;
        sandboxes.retain(|sandbox| self.sees(sandbox));
        Ok(sandboxes)
    }

    /// The sandboxes of a page of the list of those that are not deleted, and how many there are on all
    /// pages of it.
    ///
    /// # Errors
    /// The store failed.
    pub async fn page(&self, page: &Page) -> Result<(Vec<Sandbox>, u64), StoreError> {
        let owner = self.only_of().or_else(|| page.owner.clone());
        let page = Page {
            owner,
            ..page.clone()
        };
        self.inner.store.page(&page).await
    }

    /// One sandbox, by its id, gone ones included, or by its name, if it is not deleted. One of somebody
    /// else is not there, unless the principal sees all.
    ///
    /// # Errors
    /// There is none, or the store failed.
    pub async fn get(&self, id: &str) -> Result<Sandbox, LookupError> {
        let found = match id.parse() {
            Ok(id) => {
                let found = self.inner.store.get(&id).await?;
                found.filter(|sandbox| self.sees(sandbox))
            }
            Err(_) => self.choose(self.inner.store.find(id).await?),
        };
        found
            .filter(|sandbox| self.principal.may_see(sandbox.owner.as_ref()))
            .ok_or(LookupError::NotFound)
    }

    /// Ends a sandbox. Its record stays. It goes on if the caller goes away.
    ///
    /// # Errors
    /// There is none of that id, or something of it is left.
    pub async fn destroy(&self, id: &str) -> Result<(), DestroyError> {
        let id = self.get(id).await?.id;
        let manager = self.clone();
        tokio::spawn(async move { manager.destroy_known(&id).await }.in_current_span())
            .await
            .unwrap_or(Err(DestroyError::Interrupted))
    }

    async fn destroy_known(&self, id: &SandboxId) -> Result<(), DestroyError> {
        let store = |source: StoreError| DestroyError::Lookup(source.into());
        self.record(id, Transition::Unwanted).await.map_err(store)?;
        let destroy = || async {
            let destroyed = self.inner.host.destroy(id).await;
            destroyed.map_err(DestroyError::Host)
        };
        // This ends whatever somebody is doing with it; the second makes sure that it has not begun
        // anew in between.
        destroy().await?;
        let _turn = self.inner.turns.take(id).await;
        destroy().await?;
        self.record(id, Transition::Stopped { reason: None })
            .await
            .map_err(store)?;
        info!(sandbox = %id, "sandbox deleted");
        Ok(())
    }

    /// Keeps a sandbox from being idle.
    pub async fn keep_awake(&self, in_use: InUse) {
        self.used(&in_use.sandbox.id).await;
    }

    /// Runs a command in a sandbox and collects its output.
    ///
    /// # Errors
    /// There is no result.
    pub async fn exec(&self, in_use: &InUse, command: Command) -> Result<ExecOutput, ExecError> {
        let (id, start) = (&in_use.sandbox.id, Instant::now());
        let settings = self.settings_of(id).await.map_err(LookupError::from)?;
        let request = request::check_command(command, &settings).map_err(ExecError::Invalid)?;
        let events = self
            .inner
            .host
            .exec(id, request)
            .await
            .map_err(ExecError::Host)?;
        let events = self.telling(in_use, events);
        let output = exec::collect(events, &self.inner.limits.exec, start).await;
        self.used(id).await;
        Ok(output?)
    }

    /// Runs a command in a sandbox, whose output comes as it is written, and which reads this, or
    /// nothing. Dropping the stream kills the command.
    ///
    /// # Errors
    /// It was not started; later errors are in the stream.
    pub async fn exec_events(
        &self,
        in_use: &InUse,
        command: Command,
        input: Option<BoxStream<'static, std::io::Result<Bytes>>>,
    ) -> Result<BoxStream<'static, Result<ExecEvent, HostError>>, ExecError> {
        let id = &in_use.sandbox.id;
        let settings = self.settings_of(id).await.map_err(LookupError::from)?;
        let request = request::check_command(command, &settings).map_err(ExecError::Invalid)?;
        let host = &self.inner.host;
        let events = match input {
            Some(input) => host.exec_with_input(id, request, input).await,
            None => host.exec(id, request).await,
        };
        self.used(id).await;
        let events = events.map_err(ExecError::Host)?;
        Ok(self.telling(in_use, events))
    }

    /// Writes a file in a sandbox, with these permission bits, or those of the file that is replaced,
    /// or 0644.
    ///
    /// # Errors
    /// The file is as it was.
    pub async fn write_file(
        &self,
        in_use: &InUse,
        path: String,
        mode: Option<u32>,
        content: BoxStream<'static, std::io::Result<Bytes>>,
    ) -> Result<(), FileError> {
        request::check_path(&path).map_err(FileError::Invalid)?;
        let id = &in_use.sandbox.id;
        let written = Change::FileWritten { path: path.clone() };
        let request = WriteFileRequest { path, mode };
        let result = self.inner.host.write_file(id, request, content).await;
        self.used(id).await;
        result.map_err(FileError::Host)?;
        self.tell(&in_use.sandbox, written);
        Ok(())
    }

    /// Reads a file in a sandbox, which is in use until its content was read.
    ///
    /// # Errors
    /// It cannot be read from its start; later errors are in the stream.
    pub async fn read_file(&self, in_use: InUse, path: String) -> Result<FileContent, FileError> {
        request::check_path(&path).map_err(FileError::Invalid)?;
        let InUse { sandbox, using } = in_use;
        let request = ReadFileRequest { path };
        let result = self.inner.host.read_file(&sandbox.id, request).await;
        self.used(&sandbox.id).await;
        let FileContent { size, content } = result.map_err(FileError::Host)?;
        let content = content.inspect(move |_| {
            let _ = &using;
        });
        Ok(FileContent {
            size,
            content: content.boxed(),
        })
    }

    /// Where output and uploads are spooled.
    pub fn limits(&self) -> &Limits {
        &self.inner.limits
    }

    async fn used(&self, id: &SandboxId) {
        if let Err(source) = self.record(id, Transition::Used).await {
            warn!(sandbox = %id, error = %chain(&source), "use of sandbox not recorded");
        }
    }

    /// Makes a transition and writes it down. One that is no longer possible, for something else
    /// came first, leaves the record as it is. Returns the record, if there is one.
    async fn record(
        &self,
        id: &SandboxId,
        transition: Transition,
    ) -> Result<Option<Sandbox>, StoreError> {
        let records = self.inner.records.lock().await;
        self.record_locked(id, transition, records).await
    }

    /// The same of one that is to start again, if the quota allows it.
    async fn record_start(
        &self,
        id: &SandboxId,
        transition: Transition,
    ) -> Result<Option<Sandbox>, StartRefused> {
        let records = self.inner.records.lock().await;
        if let Some(sandbox) = self.inner.store.get(id).await? {
            self.check_quota_of(&sandbox).await?;
        }
        Ok(self.record_locked(id, transition, records).await?)
    }

    async fn record_locked(
        &self,
        id: &SandboxId,
        transition: Transition,
        records: MutexGuard<'_, ()>,
    ) -> Result<Option<Sandbox>, StoreError> {
        let Some(mut sandbox) = self.inner.store.get(id).await? else {
            return Ok(None);
        };
        let earlier = sandbox.clone();
        let released = match sandbox.apply(transition, Timestamp::now()) {
            Ok(()) => {
                let released = self.inner.store.update(&sandbox).await?;
                self.tell_changes(&earlier, &sandbox);
                released
            }
            Err(late) => {
                debug!(sandbox = %id, "{late}");
                Vec::new()
            }
        };
        drop(records);
        let before = earlier.status;
        if sandbox.status != before {
            self.watch(&sandbox);
            if let Some(observer) = self.inner.observer.get() {
                observer.changed(before, &sandbox);
            }
            match (sandbox.status, &sandbox.status_reason) {
                (Status::Error, reason) => warn!(sandbox = %id, from = %before,
                    reason = reason.as_deref(), "sandbox is in error"),
                (status, reason) => info!(sandbox = %id, from = %before, to = %status,
                    reason = reason.as_deref(), "sandbox changed state"),
            }
        }
        if sandbox.forwards.is_empty() && !earlier.forwards.is_empty() {
            let forwards: Vec<_> = earlier.forwards.iter().map(|kept| kept.forward).collect();
            self.inner.host.close_forwards(id, &forwards).await;
        }
        self.discard(&released).await;
        Ok(Some(sandbox))
    }

    /// Removes layers that nobody holds any more. One that stays is removed at the next start.
    async fn discard(&self, layers: &[LayerId]) {
        if layers.is_empty() {
            return;
        }
        if let Err(source) = self.inner.host.discard(layers).await {
            error!(error = %chain(&source), "layers are left");
        }
    }
}

/// What is wished for a new sandbox beside what it is made of.
#[derive(Debug, Default)]
struct Wishes {
    address: Option<Ipv4Addr>,
    name: Option<String>,
    is_kept: bool,
    /// The snapshot that it is made from, as it is called.
    snapshot: Option<String>,
}

impl Wishes {
    fn of_snapshot(self, snapshot: String) -> Self {
        Self {
            snapshot: Some(snapshot),
            ..self
        }
    }

    fn of(spec: &CreateSpec) -> Self {
        Self {
            address: spec.network.address,
            name: spec.name.clone(),
            is_kept: spec.is_kept,
            snapshot: None,
        }
    }
}

fn shape_of(spec: &Spec) -> Shape {
    Shape {
        template: spec.template.clone(),
        vcpus: spec.vcpus,
        memory_mb: spec.memory_mb,
    }
}

fn request_for(sandbox: &Sandbox, start: Start) -> CreateRequest {
    CreateRequest {
        id: sandbox.id.clone(),
        shape: shape_of(&sandbox.spec),
        identity: identity_of(&sandbox.id, sandbox.created_at),
        layers: sandbox.layers.clone(),
        start,
        nic: sandbox.spec.network.clone().map(|connection| Nic {
            address: sandbox.address,
            connection,
        }),
        scratch_mb: None,
        disk_mb: sandbox.spec.disk_mb,
        resources: sandbox.spec.resources,
    }
}

/// Who the guest of a sandbox is: the same at each of its starts, and nobody else. The id alone
/// would do for those of this daemon; the time sets them apart from those of others.
fn identity_of(id: &SandboxId, created_at: Timestamp) -> Identity {
    let mut digest = Sha256::new();
    digest.update("machine-id of a sandbox\0");
    digest.update(id.as_str());
    digest.update(created_at.as_microsecond().to_be_bytes());
    let machine_id = digest.finalize()[..16]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    Identity {
        hostname: id.to_string(),
        machine_id,
    }
}

/// Why the host did not start a sandbox, for its record.
fn reason_of(source: &HostError) -> String {
    match source {
        HostError::Start { reason } => reason.clone(),
        other => other.to_string(),
    }
}
