//! Sandboxes whose disk is kept: made without being started, started, stopped, restarted, and rolled
//! back to a snapshot.
//!
//! The disk that such a sandbox writes to is a layer from the moment that its agent has answered. So
//! whatever ends it, the guest, its VMM, this daemon or the machine, the layer holds what it has
//! written, and the sandbox is `off` with its disk. Whoever snapshots it gives it another disk to write
//! to, which is a layer again.

use std::time::Duration;

use jiff::Timestamp;
use tracing::{Instrument, info, warn};

use super::super::error::{CreateError, LookupError, PowerError};
use super::super::events::Change;
use super::super::haste::Hurry;
use super::super::host::{HostError, PowerOffRequest};
use super::super::id::{LayerId, SandboxId};
use super::super::layer::{Layers, MAX_DISK};
use super::super::request::CreateSpec;
use super::super::sandbox::{Sandbox, Status, Transition};
use super::super::snapshot::Model;
use super::super::timings::Start;
use super::Manager;
use super::create::Wishes;
use super::resize::take_back;
use super::templates::Ground;
use super::warm::model_of;
use crate::chain;

/// The longest time that a guest has to shut down.
const MAX_STOP: Duration = Duration::from_secs(3600);

/// How a sandbox is to be stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StopSpec {
    /// Whether its power is cut at once.
    pub force: bool,
    /// How long it has to shut down before that is done.
    pub timeout: Duration,
}

impl Manager {
    /// Writes down a sandbox that is off, and whose disk is kept.
    ///
    /// # Errors
    /// There is none.
    pub async fn create_off(&self, spec: CreateSpec) -> Result<Sandbox, CreateError> {
        let wishes = Wishes::of(&spec);
        if let Some(from) = self.asked_of_snapshot(&spec).await? {
            let wishes = wishes.of_snapshot(spec.template);
            return self.create_off_from_snapshot(from, wishes).await;
        }
        let spec = self.check(spec).await?;
        let ground = self.ground(&spec.template).await?;
        let _records = self.inner.records.lock().await;
        self.check_unchanged(&spec.template, &ground).await?;
        let address = self.claim_for(&spec, &wishes).await?;
        loop {
            let (spec, layers) = (spec.clone(), ground.layers.clone());
            let new = Sandbox::new_off(SandboxId::random(), spec, layers, Timestamp::now());
            if let Some((sandbox, _)) = self.insert_as(new, &wishes, address).await? {
                info!(sandbox = %sandbox.id, name = sandbox.name, "sandbox created, and off");
                return Ok(sandbox);
            }
        }
    }

    /// Starts a sandbox that is off, and waits until its agent has answered. It goes on if the caller
    /// goes away.
    ///
    /// # Errors
    /// It is in another state, or off as before.
    pub async fn power_on(&self, id: &str) -> Result<Sandbox, PowerError> {
        self.with_turn(id, false, async |manager, id, _| manager.turn_on(&id).await)
            .await
    }

    /// Stops a sandbox that runs, and keeps its disk. With force, a stop that is under way is not waited
    /// for but made to end at once. It goes on if the caller goes away.
    ///
    /// # Errors
    /// It is in another state, or something of it is left.
    pub async fn power_off(&self, id: &str, stop: StopSpec) -> Result<Sandbox, PowerError> {
        self.with_turn(id, stop.force, async move |manager, id, hurry| {
            manager.turn_off_in(hurry, &id, stop, "stopped").await
        })
        .await
    }

    /// Stops a sandbox that runs, as [`Manager::power_off`] does, and starts it again. It goes on if the
    /// caller goes away.
    ///
    /// # Errors
    /// As of [`Manager::power_off`] and [`Manager::power_on`].
    pub async fn restart(&self, id: &str, stop: StopSpec) -> Result<Sandbox, PowerError> {
        if self.is_closing() {
            return Err(PowerError::ShuttingDown);
        }
        self.with_turn(id, stop.force, async move |manager, id, hurry| {
            let sandbox = manager.get(id.as_str()).await?;
            if sandbox.status == Status::Running {
                let disk = sandbox.kept.as_ref().unwrap_or(&sandbox.layers).clone();
                manager.may_run(&sandbox, &disk).await?;
            }
            manager.turn_off_in(hurry, &id, stop, "restarted").await?;
            manager.turn_on(&id).await
        })
        .await
    }

    /// Takes a sandbox back to what it was when one of its snapshots was taken, by id or name. It keeps
    /// its id, name and address. One that runs, and one whose memory the snapshot has, runs then; it
    /// goes on if the caller goes away.
    ///
    /// # Errors
    /// It is in another state, or there is no such snapshot of it; otherwise it may be off.
    pub async fn roll_back(&self, id: &str, snapshot: &str) -> Result<Sandbox, PowerError> {
        let snapshot = snapshot.to_owned();
        self.with_turn(id, false, async move |manager, id, _| {
            manager.roll_back_known(&id, &snapshot).await
        })
        .await
    }

    /// Waits for the turn at a sandbox and does `work` at it, in a task of its own. With force, whoever stops it
    /// before is urged.
    async fn with_turn<F>(
        &self,
        id: &str,
        force: bool,
        work: impl FnOnce(Self, SandboxId, Option<Hurry>) -> F + Send + 'static,
    ) -> Result<Sandbox, PowerError>
    where
        F: Future<Output = Result<Sandbox, PowerError>> + Send + 'static,
    {
        let id = self.get(id).await?.id;
        let manager = self.clone();
        let hurry = force.then(|| self.inner.haste.of(&id));
        if let Some(hurry) = &hurry {
            hurry.urge();
        }
        let task = async move {
            let _turn = manager.inner.turns.take(&id).await;
            work(manager.clone(), id, hurry).await
        };
        tokio::spawn(task.in_current_span())
            .await
            .unwrap_or(Err(PowerError::Interrupted))
    }

    /// The caller has the turn.
    async fn turn_on(&self, id: &SandboxId) -> Result<Sandbox, PowerError> {
        let _starting = self.inner.pool.starting();
        let sandbox = self.get(id.as_str()).await?;
        let wrong = |sandbox: &Sandbox| PowerError::WrongState {
            verb: "started",
            standing: sandbox.standing(),
            needed: "off",
        };
        if sandbox.status != Status::Off {
            return Err(wrong(&sandbox));
        }
        if self.is_closing() {
            return Err(PowerError::ShuttingDown);
        }
        if sandbox.layers.disk.len() >= MAX_DISK {
            self.merge_in_background(&sandbox.layers);
            return Err(PowerError::TooManyLayers(sandbox.layers.disk.len()));
        }
        let (sandbox, start) = match sandbox.layers.memory.is_empty() {
            true => (self.equip(sandbox).await?, Start::Cold),
            false => (sandbox, Start::Resume),
        };
        let first = self.first_start(&sandbox).await;
        let recorded = match &first {
            Some((model, ground)) => self.record_first_start(&sandbox, model, ground).await,
            None => {
                let transition = Transition::PoweringOn(sandbox.layers);
                let recorded = self.record_start(id, transition).await;
                recorded.map(|recorded| (recorded, None))
            }
        };
        let (sandbox, warm) = match recorded.map_err(CreateError::from)? {
            (Some(sandbox), warm) if sandbox.status == Status::Pending => (sandbox, warm),
            (Some(sandbox), _) => return Err(wrong(&sandbox)),
            (None, _) => return Err(LookupError::NotFound.into()),
        };
        self.open_forwards(&sandbox).await;
        let sandbox = match warm {
            Some(warm) => self.start_warm(sandbox, warm).await?,
            None => self.start(sandbox, start).await?,
        };
        if let Some((model, _)) = first {
            self.warm_up(model);
        }
        Ok(sandbox)
    }

    /// Whether a sandbox that is about to be stopped may run again after that as `sandbox` says, based on
    /// `layers`: what is refused afterwards has been stopped already. It is asked again when it starts.
    async fn may_run(&self, sandbox: &Sandbox, layers: &Layers) -> Result<(), PowerError> {
        if self.is_closing() {
            return Err(PowerError::ShuttingDown);
        }
        if layers.disk.len() >= MAX_DISK {
            self.merge_in_background(layers);
            return Err(PowerError::TooManyLayers(layers.disk.len()));
        }
        let _records = self.inner.records.lock().await;
        let allowed = self.check_quota_of_resized(sandbox, &sandbox.spec).await;
        Ok(allowed.map_err(CreateError::from)?)
    }

    /// The model of a sandbox that is off and has nothing of its own yet, and what it is based on: its
    /// template as it is now.
    async fn first_start(&self, sandbox: &Sandbox) -> Option<(Model, Ground)> {
        let model = model_of(&sandbox.spec)?;
        let ground = self.ground(&model.shape.template).await.ok()?;
        (sandbox.layers == ground.layers).then_some((model, ground))
    }

    /// Stops a sandbox that runs, or finds it stopped by another whom the caller has urged. The caller has
    /// the turn.
    async fn turn_off_in(
        &self,
        hurry: Option<Hurry>,
        id: &SandboxId,
        stop: StopSpec,
        verb: &'static str,
    ) -> Result<Sandbox, PowerError> {
        if hurry.is_some_and(|hurry| hurry.was_heeded()) {
            let sandbox = self.get(id.as_str()).await?;
            if sandbox.status == Status::Off {
                return Ok(sandbox);
            }
        }
        self.turn_off(id, stop, verb).await
    }

    /// The caller has the turn.
    async fn turn_off(
        &self,
        id: &SandboxId,
        stop: StopSpec,
        verb: &'static str,
    ) -> Result<Sandbox, PowerError> {
        let sandbox = self.get(id.as_str()).await?;
        let failed = |source| PowerError::Host { verb, source };
        let wrong = |sandbox: &Sandbox| PowerError::WrongState {
            verb,
            standing: sandbox.standing(),
            needed: "running",
        };
        if sandbox.status != Status::Running {
            return Err(wrong(&sandbox));
        }
        if !sandbox.keeps_its_disk() {
            self.keep_root(id).await.map_err(failed)?;
        }
        let sandbox = match self.record(id, Transition::PoweringOff).await? {
            Some(sandbox) if sandbox.status == Status::Stopping => sandbox,
            // It ended in the meantime.
            Some(sandbox) => return Err(wrong(&sandbox)),
            None => return Err(LookupError::NotFound.into()),
        };
        let timeout = match stop.force {
            true => Duration::ZERO,
            false => stop.timeout.min(MAX_STOP),
        };
        let kept = sandbox.kept.as_ref();
        let request = PowerOffRequest {
            id: id.clone(),
            timeout_ms: u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX),
            layer: kept.and_then(|kept| kept.disk.last().cloned()),
        };
        match self.power_off_in_haste(request).await {
            Ok(in_order) => info!(sandbox = %id, in_order, "sandbox powered off"),
            // It ended by itself.
            Err(HostError::NotRunning { .. }) => {}
            Err(source) => return Err(failed(source)),
        }
        let stopped = Transition::Stopped { reason: None };
        match self.record(id, stopped).await? {
            Some(sandbox) if sandbox.status == Status::Off => {
                self.merge_in_background(&sandbox.layers);
                Ok(sandbox)
            }
            Some(sandbox) => Err(wrong(&sandbox)),
            None => Err(LookupError::NotFound.into()),
        }
    }

    /// Powers a sandbox off as the host does it, or cuts its power when somebody urges. The caller has the
    /// turn.
    async fn power_off_in_haste(&self, request: PowerOffRequest) -> Result<bool, HostError> {
        let (host, id) = (&self.inner.host, request.id.clone());
        let hurry = self.inner.haste.of(&id);
        let mut powered_off = host.power_off(request);
        tokio::select! {
            // It has begun, so that it keeps the disk when the power is cut.
            biased;
            powered_off = &mut powered_off => return powered_off,
            () = hurry.urged() => hurry.heed(),
        }
        host.destroy(&id).await?;
        powered_off.await
    }

    /// The caller has the turn.
    async fn roll_back_known(&self, id: &SandboxId, name: &str) -> Result<Sandbox, PowerError> {
        let find = async || match self.get_snapshot(name).await {
            Ok(snapshot) if snapshot.sandbox == *id => Ok(snapshot),
            _ => Err(PowerError::NoSnapshot),
        };
        let snapshot = find().await?;
        let mut sandbox = self.get(id.as_str()).await?;
        let before = sandbox.standing();
        let wrong = |standing| PowerError::WrongState {
            verb: "rolled back",
            standing,
            needed: "running, paused or off",
        };
        let has_memory = !snapshot.layers.memory.is_empty();
        let runs = before.status == Status::Running || has_memory;
        if !matches!(
            before.status,
            Status::Running | Status::Off | Status::Paused
        ) {
            return Err(wrong(before));
        }
        if runs {
            if has_memory {
                take_back(&mut sandbox, &snapshot.spec);
            }
            self.may_run(&sandbox, &snapshot.layers).await?;
        }
        if before.status == Status::Running {
            let cut = StopSpec {
                force: true,
                timeout: Duration::ZERO,
            };
            self.turn_off(id, cut, "rolled back").await?;
        }
        {
            // Nobody can delete it before its layers are the sandbox's.
            let _records = self.inner.records.lock().await;
            let snapshot = find().await?;
            let mut sandbox = self.get(id.as_str()).await?;
            let earlier = sandbox.clone();
            let name = snapshot.own_name().map(str::to_owned);
            let rolled = Transition::RolledBack(snapshot.layers);
            if sandbox.apply(rolled, Timestamp::now()).is_err() {
                return Err(wrong(earlier.standing()));
            }
            if has_memory {
                take_back(&mut sandbox, &snapshot.spec);
            }
            let released = self.inner.store.update(&sandbox).await?;
            self.tell_changes(&earlier, &sandbox);
            self.tell(
                &sandbox,
                Change::RolledBack {
                    id: snapshot.id,
                    name,
                },
            );
            self.discard(&released).await;
        }
        info!(sandbox = %id, snapshot = %snapshot.id, "sandbox rolled back");
        match runs {
            true => self.turn_on(id).await,
            false => Ok(self.get(id.as_str()).await?),
        }
    }

    /// Makes the disk that a sandbox that has just started writes to a layer, if it is one whose disk is
    /// kept.
    pub(super) async fn keep_if_kept(&self, id: &SandboxId) -> Result<(), CreateError> {
        match self.inner.store.get(id).await? {
            Some(sandbox) if sandbox.is_kept => {
                let kept = self.keep_root(id).await;
                kept.map_err(|source| CreateError::Host {
                    id: id.clone(),
                    source,
                })
            }
            _ => Ok(()),
        }
    }

    /// Makes the disk that a running sandbox writes to a layer, which it is based on once it is off.
    pub(super) async fn keep_root(&self, id: &SandboxId) -> Result<(), HostError> {
        let internal = |error: &dyn std::error::Error| HostError::Internal {
            reason: chain(error),
        };
        let found = self.inner.store.get(id).await;
        let found = found.map_err(|error| internal(&error))?;
        let gone = || HostError::NotRunning { id: id.clone() };
        let sandbox = found.ok_or_else(gone)?;
        let layer = LayerId::random();
        self.inner.host.keep(id, &layer).await?;
        let kept = sandbox.layers.without_memory().saved_disk(layer.clone());
        let recorded = self.record(id, Transition::Kept(kept)).await;
        let is_held = |sandbox: &Sandbox| {
            let kept = sandbox.kept.as_ref();
            kept.is_some_and(|kept| kept.disk.contains(&layer))
        };
        match recorded {
            Ok(Some(sandbox)) if is_held(&sandbox) => Ok(()),
            other => {
                warn!(sandbox = %id, "a sandbox has ended before its disk was kept");
                self.discard(&[layer]).await;
                match other {
                    Ok(_) => Err(gone()),
                    Err(error) => Err(internal(&error)),
                }
            }
        }
    }
}
