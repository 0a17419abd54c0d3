//! Sandboxes that are made from a snapshot, which their creator names where others name a template.
//!
//! A template goes first, if both have the name. With memory, a sandbox goes on where the snapshot was
//! taken, as a fork does, so that its shape is the snapshot's; without, it boots from the snapshot's
//! disk. It is connected as the one was that the snapshot was taken of, but for what is asked for.

use jiff::Timestamp;
use tracing::info;

use super::super::error::{CreateError, SnapshotError};
use super::super::host::HostInfo;
use super::super::id::{SandboxId, SnapshotId};
use super::super::network::{Connection, Egress, NetworkSpec, RateLimits};
use super::super::request::{self, CreateSpec, Problem};
use super::super::sandbox::{Sandbox, Spec};
use super::super::snapshot::Snapshot;
use super::super::store::StoreError;
use super::super::template::Settings;
use super::super::timings::Start;
use super::Manager;
use super::create::Wishes;

/// A snapshot that a sandbox is to be made from, and the sandbox.
#[derive(Debug)]
pub struct FromSnapshot {
    snapshot: SnapshotId,
    spec: Spec,
}

impl Manager {
    /// The snapshot that is meant by the name or id of a template; `None` if there is a template of
    /// that name, or no such snapshot either.
    pub(super) async fn snapshot_as_template(
        &self,
        name: &str,
        host: &HostInfo,
    ) -> Result<Option<Snapshot>, StoreError> {
        if self.is_template(name, host).await? {
            return Ok(None);
        }
        match self.get_snapshot(name).await {
            Ok(snapshot) => Ok(Some(snapshot)),
            Err(SnapshotError::Lookup(super::LookupError::Store(source))) => Err(source),
            Err(_) => Ok(None),
        }
    }

    /// Whether the principal can make sandboxes of a template of this name, or could if it were ready.
    pub(super) async fn is_template(
        &self,
        name: &str,
        host: &HostInfo,
    ) -> Result<bool, StoreError> {
        let is_image = host.templates.iter().any(|known| known == name);
        Ok(is_image || self.usable_template(name).await?.is_some())
    }

    /// The sandbox that is asked for, if it is to be made from a snapshot.
    pub(super) async fn asked_of_snapshot(
        &self,
        spec: &CreateSpec,
    ) -> Result<Option<FromSnapshot>, CreateError> {
        let host = self.inner.host.describe().await;
        let host = host.map_err(CreateError::Describe)?;
        let Some(snapshot) = self.snapshot_as_template(&spec.template, &host).await? else {
            return Ok(None);
        };
        if self.is_closing() {
            return Err(CreateError::ShuttingDown);
        }
        let problems = self.problems_on(spec, &snapshot, &host).await?;
        if let Some(problem) = problems.into_iter().next() {
            return Err(CreateError::Invalid(problem.sentence));
        }
        let spec = on_snapshot(spec, &snapshot, &host).map_err(CreateError::Invalid)?;
        Ok(Some(FromSnapshot {
            snapshot: snapshot.id,
            spec,
        }))
    }

    /// All that is wrong with a sandbox that is asked for on a snapshot.
    pub(super) async fn problems_on(
        &self,
        spec: &CreateSpec,
        snapshot: &Snapshot,
        host: &HostInfo,
    ) -> Result<Vec<Problem>, CreateError> {
        let mut asked = spec.clone();
        let network = inherit(&mut asked, snapshot);
        let mut problems = request::problems(&asked, &settings_of(snapshot), host);
        if let Err(sentence) = network {
            problems.push(Problem {
                field: "network",
                sentence,
            });
        }
        if let Some(sentence) = self.disk_problem_on(spec.disk_mb, snapshot).await? {
            problems.push(Problem {
                field: "disk_mb",
                sentence,
            });
        }
        Ok(problems)
    }

    /// What is wrong with the size of the disk that is asked for, if anything is.
    async fn disk_problem_on(
        &self,
        asked: Option<i64>,
        snapshot: &Snapshot,
    ) -> Result<Option<String>, CreateError> {
        let Some(size) = asked.and_then(|size| u32::try_from(size).ok()) else {
            return Ok(None);
        };
        let least = snapshot.spec.disk_mb;
        if has_memory(snapshot) && least != Some(size) {
            let text = "the disk of a snapshot that has memory cannot have another size; \
                        do not set it";
            return Ok(Some(text.to_owned()));
        }
        match least {
            Some(least) if size < least => Ok(Some(format!(
                "the disk must be at least {least} MiB, as that of the snapshot is"
            ))),
            Some(_) => Ok(None),
            None => self.disk_problem(&snapshot.spec.template, Some(size)).await,
        }
    }

    /// Makes a sandbox from a snapshot and waits until it can be used.
    pub(super) async fn create_from_snapshot(
        &self,
        FromSnapshot { snapshot, spec }: FromSnapshot,
        wishes: Wishes,
    ) -> Result<Sandbox, CreateError> {
        let _starting = self.inner.pool.starting();
        let (sandbox, turn) = {
            let _records = self.inner.records.lock().await;
            let snapshot = self.still_there(&snapshot).await?;
            self.insert(&spec, &snapshot.layers, &wishes).await?
        };
        info!(sandbox = %sandbox.id, %snapshot, "creating sandbox from a snapshot");
        let start = match sandbox.layers.memory.is_empty() {
            true => Start::Cold,
            false => Start::Fork,
        };
        let started = self.start(sandbox, start).await;
        drop(turn);
        started
    }

    /// Writes down a sandbox on a snapshot that is off, and whose disk is kept.
    pub(super) async fn create_off_from_snapshot(
        &self,
        FromSnapshot { snapshot, spec }: FromSnapshot,
        wishes: Wishes,
    ) -> Result<Sandbox, CreateError> {
        let _records = self.inner.records.lock().await;
        let snapshot = self.still_there(&snapshot).await?;
        let address = self.claim_for(&spec, &wishes).await?;
        loop {
            let (spec, layers) = (spec.clone(), snapshot.layers.clone());
            let new = Sandbox::new_off(SandboxId::random(), spec, layers, Timestamp::now());
            if let Some((sandbox, _)) = self.insert_as(new, &wishes, address).await? {
                info!(sandbox = %sandbox.id, snapshot = %snapshot.id,
                    "sandbox created from a snapshot, and off");
                return Ok(sandbox);
            }
        }
    }

    /// The snapshot, unless it was deleted. The caller holds the lock of the records, so that it stays
    /// until the sandbox holds its layers too.
    async fn still_there(&self, id: &SnapshotId) -> Result<Snapshot, CreateError> {
        match self.get_snapshot(id.as_str()).await {
            Ok(snapshot) => Ok(snapshot),
            Err(SnapshotError::Lookup(super::LookupError::Store(source))) => Err(source.into()),
            Err(_) => {
                let text = format!("snapshot {id} was deleted in the meantime");
                Err(CreateError::Invalid(text))
            }
        }
    }
}

fn has_memory(snapshot: &Snapshot) -> bool {
    !snapshot.layers.memory.is_empty()
}

/// What sandboxes of a snapshot have if nobody says otherwise.
fn settings_of(snapshot: &Snapshot) -> Settings {
    Settings {
        vcpus: Some(snapshot.spec.vcpus),
        memory_mb: Some(snapshot.spec.memory_mb),
        ..Settings::default()
    }
}

/// The sandbox that is asked for, which was found to have no problems.
fn on_snapshot(spec: &CreateSpec, snapshot: &Snapshot, host: &HostInfo) -> Result<Spec, String> {
    let mut asked = spec.clone();
    let has_card = inherit(&mut asked, snapshot)?;
    let mut made = request::check_spec(asked, &settings_of(snapshot), host)?;
    made.template.clone_from(&snapshot.spec.template);
    made.disk_mb = made.disk_mb.or(snapshot.spec.disk_mb);
    if has_memory(snapshot) {
        made.vcpus = snapshot.spec.vcpus;
        made.memory_mb = snapshot.spec.memory_mb;
    }
    if !has_card {
        made.network = None;
    }
    Ok(made)
}

/// Fills in how the sandbox is connected from what the snapshot was taken of. Returns whether it can
/// have a network card: a machine that goes on has one if it had.
fn inherit(asked: &mut CreateSpec, snapshot: &Snapshot) -> Result<bool, String> {
    let network = &mut asked.network;
    match &snapshot.spec.network {
        Some(own) => {
            *network = on_connection(network.clone(), own);
            Ok(true)
        }
        None if !has_memory(snapshot) => Ok(true),
        None if asks_for_nothing(network) => {
            *network = NetworkSpec::default();
            Ok(false)
        }
        None => Err(
            "the snapshot has the memory of a sandbox without a network card, and so will what is \
             made from it; do not ask for a network"
                .to_owned(),
        ),
    }
}

fn asks_for_nothing(network: &NetworkSpec) -> bool {
    let mut rest = network.clone();
    if rest.egress == Some(Egress::None) {
        rest.egress = None;
    }
    rest == NetworkSpec::default()
}

/// What is asked for, and otherwise what the connection is.
fn on_connection(asked: NetworkSpec, own: &Connection) -> NetworkSpec {
    NetworkSpec {
        name: asked.name.or_else(|| own.network.clone()),
        address: asked.address,
        egress: asked.egress.or_else(|| Some(own.egress.clone())),
        rate_limits: match asked.rate_limits == RateLimits::default() {
            true => own.rate_limits,
            false => asked.rate_limits,
        },
    }
}
