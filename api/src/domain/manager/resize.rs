//! Changing what a sandbox has: while it runs as far as its machine can, and otherwise while it is off.
//!
//! The record is written before the host acts, so that nobody else is given what is left of a quota, and put
//! back if it fails. A daemon that ends in between leaves a machine that has more or less than its record
//! says, until the same is asked for again, or it is started anew.

use jiff::Timestamp;
use tracing::{Instrument, info};

use super::super::error::{CreateError, LookupError, StartRefused};
use super::super::host::HostError;
use super::super::id::SandboxId;
use super::super::request;
use super::super::resources::{
    Booted, ResizeError, ResizeRequest, ResourceChange, Resources, check_limits,
};
use super::super::sandbox::{Sandbox, Spec, Status, Transition};
use super::Manager;

/// What to say where a limit of processor time cannot be kept.
const NO_CPU_LIMIT: &str = "cpu_limit_percent cannot be kept: sandboxes of this host have no cgroups with the \
                            controller `cpu`; run sandboxd as root, or as a systemd service with \
                            Delegate=yes";

impl Manager {
    /// Changes what a sandbox has, by its id or name. It goes on if the caller goes away.
    ///
    /// # Errors
    /// It has what it had.
    pub async fn set_resources(
        &self,
        id: &str,
        change: ResourceChange,
    ) -> Result<Sandbox, ResizeError> {
        let id = self.get(id).await?.id;
        let manager = self.clone();
        let task = async move {
            let _turn = manager.inner.turns.take(&id).await;
            manager.resize(&id, change).await
        };
        tokio::spawn(task.in_current_span())
            .await
            .unwrap_or(Err(ResizeError::Interrupted))
    }

    /// The caller has the turn.
    async fn resize(&self, id: &SandboxId, change: ResourceChange) -> Result<Sandbox, ResizeError> {
        let sandbox = self.get(id.as_str()).await?;
        if !matches!(sandbox.status, Status::Running | Status::Off) {
            return Err(ResizeError::WrongState(sandbox.standing()));
        }
        let spec = self.changed(&sandbox.spec, change).await?;
        match sandbox.status {
            Status::Running => can_while_running(&sandbox.spec, &spec)?,
            _ if !sandbox.layers.memory.is_empty() => return Err(ResizeError::HasMemory),
            _ => {}
        }
        let recorded = {
            let records = self.inner.records.lock().await;
            if sandbox.status == Status::Running {
                let quota = self.check_quota_of_resized(&sandbox, &spec).await;
                quota.map_err(|refused| match refused {
                    StartRefused::Quota(source) => ResizeError::Quota(source),
                    other => ResizeError::Count(other),
                })?;
            }
            self.record_locked(id, resized(&spec), records).await?
        };
        let recorded = match recorded {
            Some(recorded) if recorded.spec == spec => recorded,
            // It ended in the meantime.
            Some(ended) => return Err(ResizeError::WrongState(ended.standing())),
            None => return Err(LookupError::NotFound.into()),
        };
        if sandbox.status == Status::Running {
            let (old, new) = (&sandbox.spec, &spec);
            let request = ResizeRequest {
                id: id.clone(),
                vcpus: [old.vcpus, new.vcpus],
                memory_mb: [old.memory_mb, new.memory_mb],
                resources: [old.resources, new.resources],
            };
            if let Err(source) = self.inner.host.resize(request).await {
                self.record(id, resized(old)).await?;
                return Err(ResizeError::Host(source));
            }
        }
        info!(sandbox = %id, vcpus = spec.vcpus, memory_mb = spec.memory_mb,
            resources = ?spec.resources, "resources of a sandbox changed");
        Ok(recorded)
    }

    /// What a sandbox of `spec` is to be.
    async fn changed(&self, spec: &Spec, change: ResourceChange) -> Result<Spec, ResizeError> {
        let host = self
            .inner
            .host
            .describe()
            .await
            .map_err(ResizeError::Host)?;
        let invalid =
            |field| move |sentence| ResizeError::Invalid(request::Problem { field, sentence });
        let vcpus = change.vcpus.map(request::check_vcpus).transpose();
        let memory_mb = change
            .memory_mb
            .map(|size| request::check_memory(size, &host));
        let vcpus = vcpus.map_err(invalid("vcpus"))?.unwrap_or(spec.vcpus);
        let memory_mb = memory_mb.transpose().map_err(invalid("memory_mb"))?;
        let memory_mb = memory_mb.unwrap_or(spec.memory_mb);
        let or = |new: Option<u8>, old: Option<u8>| match new {
            // All of it is no limit.
            Some(100) => None,
            new => new.or(old),
        };
        let old = spec.resources;
        let resources = Resources {
            cpu_limit_percent: or(change.cpu_limit_percent, old.cpu_limit_percent),
            memory_limit_percent: or(change.memory_limit_percent, old.memory_limit_percent),
            booted: old.booted,
        };
        let limits = check_limits(
            memory_mb,
            resources.cpu_limit_percent,
            resources.memory_limit_percent,
        );
        limits.map_err(ResizeError::Invalid)?;
        let is_limited = change
            .cpu_limit_percent
            .is_some_and(|percent| percent < 100);
        if is_limited && !host.limits_cpu {
            return Err(ResizeError::Host(HostError::Conflict {
                reason: NO_CPU_LIMIT.to_owned(),
            }));
        }
        Ok(Spec {
            vcpus,
            memory_mb,
            resources,
            ..spec.clone()
        })
    }

    /// Has a machine that is to be booted be one that can change while it runs. The caller has the turn.
    ///
    /// # Errors
    /// It is as it was.
    pub(super) async fn equip(&self, sandbox: Sandbox) -> Result<Sandbox, CreateError> {
        let Spec {
            vcpus, memory_mb, ..
        } = sandbox.spec;
        let host = self.inner.host.describe().await;
        let host = host.map_err(CreateError::Describe)?;
        let spec = Spec {
            resources: Resources {
                booted: Some(Booted::with_room(vcpus, memory_mb, host.memory_mb)),
                ..sandbox.spec.resources
            },
            ..sandbox.spec.clone()
        };
        let recorded = self.record(&sandbox.id, resized(&spec)).await?;
        Ok(recorded.unwrap_or(sandbox))
    }
}

/// Whether the machine of a running sandbox can have what `new` says.
fn can_while_running(old: &Spec, new: &Spec) -> Result<(), ResizeError> {
    let of_machine = |spec: &Spec| {
        (
            spec.vcpus,
            spec.memory_mb,
            spec.resources.memory_limit_percent,
        )
    };
    match old.resources.booted {
        _ if of_machine(old) == of_machine(new) => Ok(()),
        Some(booted) => booted
            .check(new.vcpus, new.memory_mb)
            .map_err(ResizeError::NotWhileRunning),
        None => Err(ResizeError::NotWhileRunning(
            "the vCPUs and the memory of its machine cannot change while it runs".to_owned(),
        )),
    }
}

fn resized(spec: &Spec) -> Transition {
    Transition::Resized {
        vcpus: spec.vcpus,
        memory_mb: spec.memory_mb,
        resources: spec.resources,
    }
}

/// Has a sandbox have what it had when a snapshot of its memory was taken, which is of that machine.
pub(super) fn take_back(sandbox: &mut Sandbox, spec: &Spec) {
    sandbox.spec.vcpus = spec.vcpus;
    sandbox.spec.memory_mb = spec.memory_mb;
    sandbox.spec.resources = spec.resources;
    sandbox.updated_at = Timestamp::now();
}
