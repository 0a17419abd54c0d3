//! One build of a template, from its plan to its disk.

use std::collections::BTreeMap;

use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use jiff::Timestamp;
use sha2::{Digest, Sha256};
use tracing::{error, info, warn};

use super::Build;
use crate::archive::{ArchiveError, files};
use crate::chain;
use crate::domain::build::{OutputLines, Progress, Recipe};
use crate::domain::error::{CreateError, SnapshotError};
use crate::domain::host::{
    CreateRequest, ExecEvent, ExecRequest, HostError, ImageDigest, KeepDiskRequest, KeptDisk,
    Shape, WriteFileRequest,
};
use crate::domain::id::{LayerId, SandboxId};
use crate::domain::layer::Layers;
use crate::domain::manager::Manager;
use crate::domain::manager::create::{identity_of, shape_of};
use crate::domain::manager::oci::OciBuild;
use crate::domain::manager::templates::Ground;
use crate::domain::request::{self, SnapshotSpec};
use crate::domain::resources::Resources;
use crate::domain::snapshot::Snapshot;
use crate::domain::store::StoreError;
use crate::domain::template::{
    DEFAULT_MEMORY_MB, DEFAULT_VCPUS, Template, TemplateContent, TemplateStatus,
};
use crate::domain::timings::Start;
use crate::oci::OciError;

/// How long the working directory of a template may take to be made, in seconds.
const DIRECTORY_SEC: u32 = 30;

/// Why a template was not built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The host failed.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// What its sandbox is started from is not there.
    #[error(transparent)]
    Create(#[from] CreateError),
    /// The sandbox was not saved.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// The archive of files makes no sense.
    #[error("the archive of the recipe's files is refused")]
    Archive(#[from] ArchiveError),
    /// The image makes no sense.
    #[error(transparent)]
    Oci(#[from] OciError),
    /// A command failed.
    #[error("{what} ended with status {code}")]
    Status {
        /// Which.
        what: String,
        /// Its exit status.
        code: i32,
    },
    /// A command took too long.
    #[error("{what} was not done within {seconds} s")]
    TimedOut {
        /// Which.
        what: String,
        /// What it had.
        seconds: u32,
    },
    /// It is not wanted any more.
    #[error("it was cancelled")]
    Cancelled,
}

/// What is built, after all that can be checked at once was checked.
pub enum Plan {
    /// What this sandbox is; its state is still to be saved.
    Sandbox(SandboxId),
    /// All that it takes is there.
    Work(Work),
}

/// What is to be done in a machine.
pub enum Work {
    /// Nothing but to be a copy of this, whose layers the template holds.
    Copy(Box<Snapshot>),
    /// A recipe, on what its base is.
    Recipe(Recipe, Box<Ground>),
    /// Unpacking an image, in a machine of the builder's template.
    Oci(Box<OciBuild>, Box<Ground>),
}

/// A machine that a template is built in, and what is known of its disk.
struct Machine {
    /// How it was started.
    created: CreateRequest,
    /// Whether its second disk is what is built.
    scratch: bool,
    /// Frozen layers of the disk, whose digests are part of the template's.
    others: Vec<LayerId>,
    /// What the disk is based on, for the digest.
    ground: String,
}

impl Manager {
    /// Builds a template, and records and tells how that went.
    pub(super) async fn build(&self, mut template: Template, plan: Plan, build: Build) {
        let name = template.name.clone();
        let result = self.build_to_end(&mut template, plan, &build).await;
        let last = match &result {
            Ok(()) => {
                info!(template = name, "template is ready");
                format!("template {name} is ready")
            }
            Err(error) => {
                let reason = chain(error);
                warn!(template = name, reason, "template not built");
                if let Err(source) = self.record_failure(&mut template, &reason).await {
                    error!(template = name, error = %chain(&source), "failure of a build not recorded");
                }
                format!("template {name} was not built: {reason}")
            }
        };
        build.progress.end(&last);
        build.gone.cancel();
    }

    async fn record_failure(
        &self,
        template: &mut Template,
        reason: &str,
    ) -> Result<(), StoreError> {
        let layers: Vec<_> = template.layers.disk.last().cloned().into_iter().collect();
        template.status = TemplateStatus::Failed {
            reason: reason.to_owned(),
        };
        template.layers = Layers::default();
        let released = {
            let _records = self.inner.records.lock().await;
            self.inner.store.update_template(template).await?
        };
        self.discard(&released.unwrap_or(layers)).await;
        Ok(())
    }

    async fn build_to_end(
        &self,
        template: &mut Template,
        plan: Plan,
        build: &Build,
    ) -> Result<(), BuildError> {
        let builder = SandboxId::random();
        let _unrecorded = self.inner.reconciler.hold(&builder);
        // Whoever has begun to save a sandbox does so to the end.
        let work = match plan {
            Plan::Sandbox(id) => {
                Work::Copy(Box::new(self.hold_sandbox(template, &id, build).await?))
            }
            Plan::Work(work) => work,
        };
        let machine = tokio::select! {
            biased;
            () = build.cancel.cancelled() => Err(BuildError::Cancelled),
            machine = self.work(template, work, &builder, &build.progress) => machine,
        };
        let kept = match machine {
            Ok(machine) => self.keep(template, machine, &build.progress).await,
            Err(error) => Err(error),
        };
        let destroyed = self.inner.host.destroy(&builder).await;
        let content = kept?;
        destroyed?;
        if build.cancel.is_cancelled() {
            return Err(BuildError::Cancelled);
        }
        template.status = TemplateStatus::Ready;
        template.content = Some(content);
        // What its sandbox was started from is not needed any more.
        template.layers.memory.clear();
        let released = {
            let _records = self.inner.records.lock().await;
            self.inner.store.update_template(template).await?
        };
        match released {
            Some(released) => self.discard(&released).await,
            None => return Err(BuildError::Cancelled),
        }
        Ok(())
    }

    /// Does all that is to be done in the machine.
    async fn work(
        &self,
        template: &Template,
        work: Work,
        builder: &SandboxId,
        progress: &Progress,
    ) -> Result<Machine, BuildError> {
        match work {
            Work::Copy(held) => self.start_copy(*held, builder, progress).await,
            Work::Recipe(recipe, ground) => {
                let base = recipe.base.clone();
                progress.say(&format!("booting a sandbox of template {base}"));
                let machine = self.boot(template, &base, &ground, builder, None).await?;
                self.run_recipe(template, recipe, builder, progress).await?;
                Ok(machine)
            }
            Work::Oci(build, ground) => {
                let base = OciBuild::BUILDER;
                progress.say(&format!(
                    "booting a sandbox of template {base} to unpack in"
                ));
                let disk_mb = Some(build.disk_mb());
                let machine = self.boot(template, base, &ground, builder, disk_mb).await?;
                self.unpack(*build, builder, progress).await?;
                Ok(machine)
            }
        }
    }

    /// Boots the machine that a template is built in.
    async fn boot(
        &self,
        template: &Template,
        base: &str,
        ground: &Ground,
        builder: &SandboxId,
        scratch_mb: Option<u32>,
    ) -> Result<Machine, BuildError> {
        let created = CreateRequest {
            id: builder.clone(),
            shape: Shape {
                template: base.to_owned(),
                vcpus: template.settings.vcpus.unwrap_or(DEFAULT_VCPUS),
                memory_mb: template.settings.memory_mb.unwrap_or(DEFAULT_MEMORY_MB),
            },
            identity: identity_of(builder, Timestamp::now()),
            layers: ground.layers.clone(),
            start: Start::Cold,
            nic: None,
            scratch_mb,
            disk_mb: None,
            resources: Resources::default(),
        };
        self.inner.host.create(created.clone()).await?;
        let digest = match scratch_mb {
            Some(size) => format!("empty {size}"),
            None => self.digest_of(base).await?,
        };
        Ok(Machine {
            created,
            scratch: scratch_mb.is_some(),
            others: Vec::new(),
            ground: digest,
        })
    }

    /// Makes the template hold the state of a sandbox, which is held up while its memory is saved if
    /// it runs.
    async fn hold_sandbox(
        &self,
        template: &mut Template,
        id: &SandboxId,
        build: &Build,
    ) -> Result<Snapshot, BuildError> {
        build
            .progress
            .say(&format!("saving the state of sandbox {id}"));
        let turn = self.inner.turns.take(id).await;
        let taken = self.take_snapshot(id, SnapshotSpec::default(), &turn).await;
        drop(turn);
        let (snapshot, _) = taken?;
        let own: Vec<_> = template.layers.disk.drain(..).collect();
        template.layers = snapshot.layers.clone();
        template.layers.disk.extend(own);
        let held = {
            let _records = self.inner.records.lock().await;
            self.inner.store.update_template(template).await
        };
        // From here on the template holds what the snapshot does.
        if let Err(source) = self.remove_snapshot(snapshot.id.as_str()).await {
            error!(snapshot = %snapshot.id, error = %chain(&source), "snapshot is left");
        }
        held?;
        Ok(snapshot)
    }

    /// Starts a copy of a sandbox whose state is held.
    async fn start_copy(
        &self,
        held: Snapshot,
        builder: &SandboxId,
        progress: &Progress,
    ) -> Result<Machine, BuildError> {
        let base = &held.spec.template;
        let ground = self.ground(base).await?;
        // Layers that the sandbox has on those of its template.
        let others = held.layers.disk.iter();
        let others = others.filter(|layer| !ground.layers.disk.contains(layer));
        let others = others.cloned().collect();
        progress.say("starting a copy of it");
        // It has a card because its memory knows one, and nothing passes that.
        let nic = match held.spec.network {
            Some(_) => self.unconnected_nic().await?,
            None => None,
        };
        let created = CreateRequest {
            id: builder.clone(),
            shape: shape_of(&held.spec),
            identity: identity_of(builder, Timestamp::now()),
            layers: held.layers.clone(),
            start: Start::Fork,
            nic,
            scratch_mb: None,
            disk_mb: None,
            resources: Resources::default(),
        };
        self.inner.host.create(created.clone()).await?;
        Ok(Machine {
            created,
            scratch: false,
            others,
            ground: self.digest_of(base).await?,
        })
    }

    /// The digest of a template that there is.
    async fn digest_of(&self, name: &str) -> Result<String, BuildError> {
        let content = match self.inner.store.find_template(name).await? {
            Some(template) => template.content.and_then(|content| content.digest),
            None => {
                self.inner
                    .host
                    .image(name, ImageDigest::Computed)
                    .await?
                    .digest
            }
        };
        Ok(content.unwrap_or_default())
    }

    async fn run_recipe(
        &self,
        template: &Template,
        recipe: Recipe,
        builder: &SandboxId,
        progress: &Progress,
    ) -> Result<(), BuildError> {
        if let Some(archive) = recipe.files {
            let mut files = files(archive);
            let mut count = 0_usize;
            while let Some(file) = files.next().await.transpose()? {
                progress.say(&format!("adding {}", file.path));
                let request = WriteFileRequest {
                    path: file.path,
                    mode: Some(file.mode),
                };
                let written = self.inner.host.write_file(builder, request, file.content);
                written.await?;
                count += 1;
            }
            progress.say(&format!("{count} files added"));
        }
        if let Some(cwd) = &template.settings.cwd {
            let argv = ["mkdir", "-p", "--", cwd].map(str::to_owned).to_vec();
            let request = ExecRequest {
                argv,
                env: BTreeMap::new(),
                cwd: None,
                timeout_sec: DIRECTORY_SEC,
            };
            let events = self.inner.host.exec(builder, request).await?;
            run_to_end(
                events,
                "making the working directory",
                DIRECTORY_SEC,
                progress,
            )
            .await?;
        }
        let steps = recipe.steps.len();
        for (index, step) in recipe.steps.into_iter().enumerate() {
            progress.say(&format!("step {} of {steps}: {}", index + 1, step.run));
            let request = ExecRequest {
                argv: vec!["/bin/sh".to_owned(), "-c".to_owned(), step.run],
                env: template.settings.env.clone(),
                cwd: template.settings.cwd.clone(),
                timeout_sec: request::step_timeout(step.timeout_sec)
                    .map_err(CreateError::Invalid)?,
            };
            let seconds = request.timeout_sec;
            let events = self.inner.host.exec(builder, request).await?;
            let what = format!("step {}", index + 1);
            run_to_end(events, &what, seconds, progress).await?;
        }
        Ok(())
    }

    /// Shuts the machine down and keeps its disk.
    async fn keep(
        &self,
        template: &Template,
        machine: Machine,
        progress: &Progress,
    ) -> Result<TemplateContent, BuildError> {
        progress.say("shutting it down, and keeping its disk");
        let Some(layer) = template.layers.disk.last().cloned() else {
            return Err(BuildError::Cancelled);
        };
        let request = KeepDiskRequest {
            created: machine.created,
            scratch: machine.scratch,
            layer,
            others: machine.others,
        };
        let KeptDisk {
            digests,
            size_bytes,
            disk_bytes,
        } = self.inner.host.keep_disk(request).await?;
        let mut digest = Sha256::new();
        for part in [&machine.ground].into_iter().chain(&digests) {
            digest.update(part);
            digest.update("\n");
        }
        Ok(TemplateContent {
            digest: Some(crate::hex(&digest.finalize())),
            size_bytes,
            disk_bytes,
        })
    }
}

/// Follows a command to its end. One that does not succeed is an error.
pub async fn run_to_end(
    mut events: BoxStream<'static, Result<ExecEvent, HostError>>,
    what: &str,
    seconds: u32,
    progress: &Progress,
) -> Result<(), BuildError> {
    let (mut stdout, mut stderr) = (OutputLines::new(progress), OutputLines::new(progress));
    while let Some(event) = events.next().await.transpose()? {
        match event {
            ExecEvent::Started { .. } => {}
            ExecEvent::Stdout(bytes) => stdout.push(&bytes),
            ExecEvent::Stderr(bytes) => stderr.push(&bytes),
            ExecEvent::Exited(exit) => {
                stdout.flush();
                stderr.flush();
                let what = what.to_owned();
                return match exit.code {
                    _ if exit.timed_out => Err(BuildError::TimedOut { what, seconds }),
                    0 => Ok(()),
                    code => Err(BuildError::Status { what, code }),
                };
            }
        }
    }
    Err(HostError::AgentUnreachable {
        reason: format!("the end of {what} was not told"),
    }
    .into())
}
