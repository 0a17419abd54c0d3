//! From what a caller asks for to a sandbox that can be used.

use std::net::Ipv4Addr;

use jiff::Timestamp;
use sha2::{Digest, Sha256};
use tracing::{Instrument, error, info};

use super::super::error::{CreateError, InsertError};
use super::super::events::Change;
use super::super::host::{CreateRequest, HostError, Identity, Nic, Shape};
use super::super::id::SandboxId;
use super::super::layer::Layers;
use super::super::network::Connection;
use super::super::request::{self, CreateSpec, Problem};
use super::super::sandbox::{Sandbox, Spec, Status, Transition};
use super::super::store::StoreError;
use super::super::template::Settings;
use super::super::timings::Start;
use super::super::turns::Turn;
use super::Manager;
use super::warm::model_of;
use crate::chain;

/// What is wished for a new sandbox beside what it is made of.
#[derive(Debug, Default)]
pub(super) struct Wishes {
    pub(super) address: Option<Ipv4Addr>,
    pub(super) name: Option<String>,
    pub(super) is_kept: bool,
    /// The snapshot that it is made from, as it is called.
    pub(super) snapshot: Option<String>,
}

impl Wishes {
    pub(super) fn of_snapshot(self, snapshot: String) -> Self {
        Self {
            snapshot: Some(snapshot),
            ..self
        }
    }

    pub(super) fn of(spec: &CreateSpec) -> Self {
        Self {
            address: spec.network.address,
            name: spec.name.clone(),
            is_kept: spec.is_kept,
            snapshot: None,
        }
    }
}

impl Manager {
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
        let (shape, model) = (shape_of(&spec), model_of(&spec));
        let (sandbox, turn, warm) = self.insert_warm(spec, &wishes).await?;
        info!(sandbox = %sandbox.id, template = shape.template, vcpus = shape.vcpus,
            memory_mb = shape.memory_mb, is_warm = warm.is_some(), "creating sandbox");
        let started = match warm {
            Some(warm) => self.start_warm(sandbox, warm).await,
            None => self.start(sandbox, Start::Cold).await,
        };
        drop(turn);
        if started.is_ok()
            && let Some(model) = model
        {
            self.warm_up(model);
        }
        started
    }

    /// Starts a sandbox that is written down as `pending`, and writes down how that went. The
    /// caller has the turn.
    pub(super) async fn start(
        &self,
        sandbox: Sandbox,
        start: Start,
    ) -> Result<Sandbox, CreateError> {
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
    pub(super) async fn started(
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
    pub(super) async fn insert(
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
    pub(super) async fn insert_as(
        &self,
        mut sandbox: Sandbox,
        wishes: &Wishes,
        address: Option<Ipv4Addr>,
    ) -> Result<Option<(Sandbox, Turn)>, StoreError> {
        sandbox.address = address;
        sandbox.name = wishes.name.clone();
        sandbox.snapshot = wishes.snapshot.clone();
        sandbox.is_kept |= wishes.is_kept;
        if sandbox.is_kept && sandbox.snapshot.is_none() && !sandbox.layers.memory.is_empty() {
            // Until it has a disk of its own, it comes back to its template, and not to a warm snapshot of it.
            sandbox.kept = Some(sandbox.layers.before_first_save());
        }
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
    pub(super) async fn claim_for(
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

    pub(super) async fn check(&self, spec: CreateSpec) -> Result<Spec, CreateError> {
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
}

pub(super) fn shape_of(spec: &Spec) -> Shape {
    Shape {
        template: spec.template.clone(),
        vcpus: spec.vcpus,
        memory_mb: spec.memory_mb,
    }
}

pub(super) fn request_for(sandbox: &Sandbox, start: Start) -> CreateRequest {
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
pub(super) fn identity_of(id: &SandboxId, created_at: Timestamp) -> Identity {
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
pub(super) fn reason_of(source: &HostError) -> String {
    match source {
        HostError::Start { reason } => reason.clone(),
        other => other.to_string(),
    }
}
