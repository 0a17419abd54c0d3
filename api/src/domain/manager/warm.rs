//! Warm snapshots: a machine of a template and shape, booted and saved once, from which sandboxes start
//! instead of booting. Those whose machine can change while it runs have one of their own.
//!
//! ```text
//! create ──► is there one of the key? ──yes──► a machine of it in the pool? ──yes──► take that
//!                     │                                        │ no                     │ fails
//!                     │                                        ▼                        │
//!                     │                                  start from it ◄────────────────┘
//!                     │                                        │ fails
//!                     │                                        ▼
//!                     │ no                               drop it, boot
//!                     └──► boot, answer; then, in the background: boot a machine of its own,
//!                          save it, start another from that and note which memory it touches, drop
//!                          least recently used ones until it fits in, write it down
//! ```
//!
//! The key changes with everything that the snapshot was made from. One that does not come about, or
//! does not start, is not tried again by this daemon, so that no machine is booted over and over.

use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};

use jiff::Timestamp;
use tokio::sync::Semaphore;
use tracing::{Instrument, debug, info, warn};

use super::super::error::{CreateError, InsertError, StartRefused};
use super::super::host::{ClaimRequest, CreateRequest, ExecRequest, HostError, Nic, SaveRequest};
use super::super::id::{LayerId, SandboxId};
use super::super::layer::Layers;
use super::super::network::{Connection, Egress, RateLimits};
use super::super::sandbox::{Sandbox, Spec, Transition};
use super::super::snapshot::{Model, WarmSnapshot};
use super::super::store::StoreError;
use super::super::timings::Start;
use super::super::turns::Turn;
use super::Manager;
use super::create::{Wishes, identity_of, request_for, shape_of};
use super::templates::Ground;
use crate::chain;

/// The first command in a machine that is made warm. With something to do after it, a shell does not become the
/// program, but starts it, as it would any other. That reads what most programs read when they begin: their
/// libraries, the locale, the time zone, the names of users.
const FIRST_COMMAND: &str = "ls -l / >/dev/null 2>&1; :";
/// How long the first command in a machine that is made warm may take, in seconds.
const FIRST_COMMAND_SEC: u32 = 60;

/// What is known of warm snapshots beyond the store.
#[derive(Debug)]
pub struct Warm {
    /// Keys that are being made, or did not work.
    given_up: Mutex<HashSet<String>>,
    /// One machine at a time is booted for this.
    boots: Semaphore,
}

impl Default for Warm {
    fn default() -> Self {
        Self {
            given_up: Mutex::default(),
            boots: Semaphore::new(1),
        }
    }
}

impl Warm {
    /// Whether nobody has begun to make this one.
    fn begin(&self, key: &str) -> bool {
        let mut given_up = self.given_up.lock().unwrap_or_else(PoisonError::into_inner);
        given_up.insert(key.to_owned())
    }

    fn done(&self, key: &str) {
        let mut given_up = self.given_up.lock().unwrap_or_else(PoisonError::into_inner);
        given_up.remove(key);
    }
}

/// The warm snapshot that a sandbox starts from.
#[derive(Debug)]
pub struct WarmStart {
    key: String,
    /// It has the name of a machine from the pool.
    is_ready: bool,
}

/// The model of a sandbox that has nothing of its own yet; `None` if its machine is like no warm one. The
/// disk of a warm snapshot has its template's size, and its guest all of its memory.
pub(super) fn model_of(spec: &Spec) -> Option<Model> {
    let is_special = spec.disk_mb.is_some() || spec.resources.memory_limit_percent.is_some();
    (!is_special).then(|| Model {
        shape: shape_of(spec),
        booted: spec.resources.booted,
    })
}

/// Why there is no warm snapshot.
#[derive(Debug, thiserror::Error)]
enum WarmError {
    #[error(transparent)]
    Host(#[from] HostError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("the new layers are not there")]
    Missing,
    #[error("its template was deleted in the meantime")]
    TemplateGone,
    #[error(
        "it has {0} bytes, and warm_disk_bytes has no room for it beside those in use; raise it"
    )]
    NoRoom(u64),
}

impl Manager {
    /// Writes down a new sandbox, which holds the layers of the warm snapshot of its shape, if there
    /// is one; and the name of a ready machine, if there is one.
    pub(super) async fn insert_warm(
        &self,
        spec: Spec,
        wishes: &Wishes,
    ) -> Result<(Sandbox, Turn, Option<WarmStart>), CreateError> {
        let ground = self.ground(&spec.template).await?;
        let key = match model_of(&spec) {
            Some(model) => self.warm_key(&model, &ground).await,
            None => None,
        };
        let _records = self.inner.records.lock().await;
        self.check_unchanged(&spec.template, &ground).await?;
        let found = match key {
            Some(key) => self.find_warm(&key).await?,
            None => None,
        };
        let Some(mut warm) = found else {
            let (sandbox, turn) = self.insert(&spec, &ground.layers, wishes).await?;
            return Ok((sandbox, turn, None));
        };
        let ready = match self.take_ready(&warm, &spec) {
            Some(id) => self.insert_ready(id, &spec, &warm.layers, wishes).await?,
            None => None,
        };
        let is_ready = ready.is_some();
        let (sandbox, turn) = match ready {
            Some(ready) => ready,
            None => self.insert(&spec, &warm.layers, wishes).await?,
        };
        warm.used_at = Timestamp::now();
        self.inner.store.put_warm(&warm).await?;
        let key = warm.key;
        Ok((sandbox, turn, Some(WarmStart { key, is_ready })))
    }

    /// Writes down that a sandbox that is off is to start, from the warm snapshot of its model if there is
    /// one. The caller has the turn, and there is nothing of the sandbox's own yet.
    ///
    /// # Errors
    /// The quota does not allow it, or the store failed.
    pub(super) async fn record_first_start(
        &self,
        sandbox: &Sandbox,
        model: &Model,
        ground: &Ground,
    ) -> Result<(Option<Sandbox>, Option<WarmStart>), StartRefused> {
        let key = self.warm_key(model, ground).await;
        let records = self.inner.records.lock().await;
        self.check_quota_of(sandbox).await?;
        let found = match key {
            Some(key) => self.find_warm(&key).await?,
            None => None,
        };
        let Some(mut warm) = found else {
            let transition = Transition::PoweringOn(sandbox.layers.clone());
            let recorded = self.record_locked(&sandbox.id, transition, records).await?;
            return Ok((recorded, None));
        };
        warm.used_at = Timestamp::now();
        self.inner.store.put_warm(&warm).await?;
        let transition = Transition::PoweringOn(warm.layers);
        let recorded = self.record_locked(&sandbox.id, transition, records).await?;
        let start = WarmStart {
            key: warm.key,
            is_ready: false,
        };
        Ok((recorded, Some(start)))
    }

    /// Writes down a new sandbox with the name of a ready machine. If it cannot have it, the machine
    /// is ended.
    async fn insert_ready(
        &self,
        id: SandboxId,
        spec: &Spec,
        layers: &Layers,
        wishes: &Wishes,
    ) -> Result<Option<(Sandbox, Turn)>, InsertError> {
        let inserted = async {
            let address = self.claim_for(spec, wishes).await?;
            let (spec, layers) = (spec.clone(), layers.clone());
            let new = Sandbox::new(id.clone(), spec, layers, Timestamp::now());
            Ok(self.insert_as(new, wishes, address).await?)
        };
        let inserted = inserted.await;
        if !matches!(inserted, Ok(Some(_))) {
            self.destroy_ready(&[id]).await;
        }
        inserted
    }

    /// The key of a model; `None` if there are no warm snapshots.
    async fn warm_key(&self, model: &Model, ground: &Ground) -> Option<String> {
        if self.inner.limits.warm_bytes == 0 {
            return None;
        }
        let key = self.inner.host.warm_key(model, &ground.layers.disk).await;
        key.inspect_err(|source| warn!(error = %chain(source), "no key for a warm snapshot"))
            .ok()
    }

    async fn find_warm(&self, key: &str) -> Result<Option<WarmSnapshot>, StoreError> {
        let all = self.inner.store.list_warm().await?;
        Ok(all
            .into_iter()
            .map(|(warm, _)| warm)
            .find(|warm| warm.key == key))
    }

    /// Starts a sandbox with its ready machine, or from a warm snapshot; boots it if that fails.
    pub(super) async fn start_warm(
        &self,
        sandbox: Sandbox,
        WarmStart { key, is_ready }: WarmStart,
    ) -> Result<Sandbox, CreateError> {
        let id = sandbox.id.clone();
        let request = request_for(&sandbox, Start::Warm);
        let claimed = if is_ready {
            let request = ClaimRequest {
                id: id.clone(),
                identity: request.identity.clone(),
                nic: request.nic.clone(),
            };
            Some(self.inner.host.claim(request).await)
        } else {
            None
        };
        let created = match claimed {
            Some(Err(source)) if source != HostError::Destroyed => {
                warn!(sandbox = %id, error = %chain(&source),
                    "a ready machine did not start; restoring another");
                self.inner.host.create(request).await
            }
            Some(claimed) => claimed,
            None => self.inner.host.create(request).await,
        };
        match self.until_usable(&sandbox, Start::Warm, created).await {
            Ok(created) => {
                self.started(&id, Transition::Started(created.timings))
                    .await
            }
            Err(HostError::Start { reason }) => {
                warn!(sandbox = %id, reason, "not started from a warm snapshot; booting it");
                self.inner.warm.begin(&key);
                self.drop_warm(&key).await?;
                let cold = Transition::Based(sandbox.layers.before_first_save());
                match self.record(&id, cold).await? {
                    Some(sandbox) => self.start(sandbox, Start::ColdFallback).await,
                    None => Err(CreateError::Interrupted),
                }
            }
            Err(source) => {
                let reason = source.to_string();
                self.record(&id, Transition::Failed { reason }).await?;
                Err(CreateError::Host { id, source })
            }
        }
    }

    pub(super) async fn drop_warm(&self, key: &str) -> Result<(), StoreError> {
        let released = {
            let _records = self.inner.records.lock().await;
            self.inner.store.remove_warm(key).await?
        };
        self.close_shelf(key).await;
        self.discard(&released).await;
        Ok(())
    }

    /// Makes the warm snapshot of a model, in the background, unless it is there or has failed.
    pub(super) fn warm_up(&self, model: Model) {
        if self.inner.limits.warm_bytes == 0 {
            return;
        }
        let manager = self.clone();
        let task = async move {
            let Ok(ground) = manager.ground(&model.shape.template).await else {
                return;
            };
            let Some(key) = manager.warm_key(&model, &ground).await else {
                return;
            };
            if matches!(manager.find_warm(&key).await, Ok(None)) && manager.inner.warm.begin(&key) {
                match manager.make_warm(&key, &model, &ground).await {
                    Ok(()) => manager.inner.warm.done(&key),
                    Err(_) if manager.is_closing() => {}
                    Err(source) => {
                        warn!(template = model.shape.template, vcpus = model.shape.vcpus,
                        memory_mb = model.shape.memory_mb, error = %chain(&source),
                        "no warm snapshot of this shape")
                    }
                }
            }
        };
        tokio::spawn(task.in_current_span());
    }

    async fn make_warm(&self, key: &str, model: &Model, ground: &Ground) -> Result<(), WarmError> {
        let Ok(_one) = self.inner.warm.boots.acquire().await else {
            return Ok(());
        };
        // Whoever has just got a sandbox will have something to do in it.
        self.inner.pool.until_quiet().await;
        if self.is_closing() {
            return Ok(());
        }
        let host = &self.inner.host;
        let shape = &model.shape;
        // Not in the store: what a crash leaves of it on the host, the next start removes.
        let id = SandboxId::random();
        let _unrecorded = self.inner.reconciler.hold(&id);
        debug!(sandbox = %id, template = shape.template, "booting a machine for a warm snapshot");
        let request = CreateRequest {
            id: id.clone(),
            shape: shape.clone(),
            identity: identity_of(&id, Timestamp::now()),
            layers: ground.layers.clone(),
            start: Start::Cold,
            nic: self.unconnected_nic().await?,
            scratch_mb: None,
            disk_mb: None,
            resources: model.resources(),
        };
        host.create(request).await?;
        let layers = ground.layers.saved(LayerId::random(), LayerId::random());
        // Those of the template are not its own.
        let own = Layers {
            memory: layers.memory.clone(),
            disk: layers.disk[ground.layers.disk.len()..].to_vec(),
        };
        let saved = async {
            self.wait_until_usable(&id, &ground.settings).await?;
            self.run_first_command(&id).await;
            let request = SaveRequest {
                id: id.clone(),
                keep: 0,
                layers: layers.clone(),
                include_memory: true,
            };
            host.pause(request).await?;
            host.inspect(&own).await?.ok_or(WarmError::Missing)
        };
        let saved = saved.await;
        host.destroy(&id).await?;
        let saved = saved?;
        self.note_working_set(model, &layers).await;
        let warm = WarmSnapshot {
            key: key.to_owned(),
            model: model.clone(),
            layers: layers.clone(),
            size_bytes: saved.size_bytes,
            used_at: Timestamp::now(),
        };
        if !self.make_room(warm.size_bytes).await? {
            let own: Vec<_> = own.all().cloned().collect();
            self.discard(&own).await;
            return Err(WarmError::NoRoom(warm.size_bytes));
        }
        let released = {
            let _records = self.inner.records.lock().await;
            if self.check_unchanged(&shape.template, ground).await.is_err() {
                let own: Vec<_> = own.all().cloned().collect();
                self.discard(&own).await;
                return Err(WarmError::TemplateGone);
            }
            self.inner.store.put_warm(&warm).await?
        };
        self.discard(&released).await;
        // The others have ids before they have machines.
        if model.booted.is_none() {
            self.open_shelf(&warm);
        }
        info!(
            template = shape.template,
            vcpus = shape.vcpus,
            memory_mb = shape.memory_mb,
            size_bytes = warm.size_bytes,
            "warm snapshot made"
        );
        Ok(())
    }

    /// Starts a machine from layers that were just made, as any sandbox will be, and notes what it
    /// touches until its first command has ended. If that fails, sandboxes start without.
    async fn note_working_set(&self, model: &Model, layers: &Layers) {
        let host = &self.inner.host;
        let id = SandboxId::random();
        let _unrecorded = self.inner.reconciler.hold(&id);
        let noted = async {
            let request = CreateRequest {
                id: id.clone(),
                shape: model.shape.clone(),
                identity: identity_of(&id, Timestamp::now()),
                layers: layers.clone(),
                start: Start::Warm,
                nic: self.unconnected_nic().await?,
                scratch_mb: None,
                disk_mb: None,
                resources: model.resources(),
            };
            host.create(request).await?;
            self.run_first_command(&id).await;
            host.note_working_set(&id, layers).await
        };
        if let Err(source) = noted.await
            && !self.is_closing()
        {
            warn!(template = model.shape.template, error = %chain(&source), "no working set is known");
        }
        if let Err(source) = host.destroy(&id).await {
            warn!(sandbox = %id, error = %chain(&source), "a machine is left");
        }
    }

    /// The card of a machine that no sandbox is in.
    pub(super) async fn unconnected_nic(&self) -> Result<Option<Nic>, HostError> {
        let host = self.inner.host.describe().await?;
        Ok(host.networks.first().map(|_| Nic {
            address: None,
            connection: Connection {
                network: None,
                egress: Egress::None,
                rate_limits: RateLimits::default(),
            },
        }))
    }

    /// Runs what nearly every command needs, a shell that starts a program, so that it is in the guest's
    /// memory. Not every template has a shell.
    async fn run_first_command(&self, id: &SandboxId) {
        let request = ExecRequest {
            argv: ["/bin/sh", "-c", FIRST_COMMAND].map(str::to_owned).to_vec(),
            timeout_sec: FIRST_COMMAND_SEC,
            ..ExecRequest::default()
        };
        match self.inner.host.exec(id, request).await {
            Ok(events) => {
                let _: Vec<_> = futures_util::StreamExt::collect(events).await;
            }
            Err(source) => debug!(error = %chain(&source), "no command in a warm machine"),
        }
    }

    /// Drops warm snapshots, least recently used first, until one of so many bytes fits in. One that
    /// sandboxes are based on would free nothing, and stays. Returns whether there is room.
    async fn make_room(&self, size_bytes: u64) -> Result<bool, StoreError> {
        let all = self.inner.store.list_warm().await?;
        let sizes = all.iter().map(|(warm, _)| warm.size_bytes);
        let mut total = sizes.fold(size_bytes, u64::saturating_add);
        for (warm, is_used) in all {
            if total <= self.inner.limits.warm_bytes {
                break;
            }
            if !is_used {
                info!(
                    template = warm.model.shape.template,
                    vcpus = warm.model.shape.vcpus,
                    memory_mb = warm.model.shape.memory_mb,
                    "warm snapshot dropped: the budget is used up"
                );
                self.drop_warm(&warm.key).await?;
                total = total.saturating_sub(warm.size_bytes);
            }
        }
        Ok(total <= self.inner.limits.warm_bytes)
    }
}
