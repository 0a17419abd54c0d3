//! Building templates, in the background.
//!
//! ```text
//! from a sandbox: hold its state, start a copy of it ─┐
//! from a recipe:  boot the base, files, steps ────────┼─► shut it down, keep its disk ─► ready
//! from an image:  boot, unpack to a second disk ──────┘
//! ```
//!
//! All of it happens in a virtual machine that is made for it and is gone afterwards: what is built is
//! as strange as what runs in a sandbox. The record is there before, and holds the layer that the disk
//! will be; what a crash leaves is removed with all that nobody holds.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, PoisonError};

use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use jiff::Timestamp;
use sha2::{Digest, Sha256};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, error, info, warn};

use super::super::build::{BuildFrom, BuildSpec, OutputLines, Progress, Recipe};
use super::super::error::{CreateError, SnapshotError, TemplateError};
use super::super::host::{
    CreateRequest, ExecEvent, ExecRequest, HostError, KeepDiskRequest, KeptDisk, Shape,
    WriteFileRequest,
};
use super::super::id::{LayerId, SandboxId, TemplateId};
use super::super::layer::{Layers, MAX_DISK};
use super::super::request::{self, SnapshotSpec};
use super::super::resources::Resources;
use super::super::sandbox::Status;
use super::super::snapshot::Snapshot;
use super::super::store::StoreError;
use super::super::template::{
    DEFAULT_MEMORY_MB, DEFAULT_VCPUS, Settings, Source, Template, TemplateContent, TemplateInfo,
    TemplateStatus,
};
use super::super::timings::Start;
use super::Manager;
use super::create::{identity_of, shape_of};
use super::oci::OciBuild;
use super::templates::Ground;
use crate::archive::{ArchiveError, files};
use crate::chain;
use crate::oci::OciError;

/// How long the working directory of a template may take to be made, in seconds.
const DIRECTORY_SEC: u32 = 30;

/// The builds of this daemon.
#[derive(Debug, Default)]
pub struct Builds {
    known: Mutex<HashMap<TemplateId, Build>>,
}

#[derive(Debug, Clone, Default)]
struct Build {
    progress: Progress,
    cancel: CancellationToken,
    gone: CancellationToken,
}

impl Builds {
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<TemplateId, Build>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn get(&self, id: &TemplateId) -> Option<Build> {
        self.lock().get(id).cloned()
    }

    /// Ends a build, if it is under way, and waits until nothing of it is left.
    pub async fn cancel(&self, id: &TemplateId) {
        if let Some(build) = self.get(id) {
            build.cancel.cancel();
            build.gone.cancelled().await;
        }
    }

    /// Forgets a build that has ended.
    pub fn forget(&self, id: &TemplateId) {
        self.lock().remove(id);
    }
}

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
enum Plan {
    Sandbox(SandboxId),
    /// That sandbox, whose state the template holds.
    Copy(Box<Snapshot>),
    Recipe(Recipe, Box<Ground>),
    Oci(Box<OciBuild>, Box<Ground>),
}

/// A machine that a template is built in, and what is known of its disk.
pub struct Machine {
    /// How it was started.
    pub created: CreateRequest,
    /// Whether its second disk is what is built.
    pub scratch: bool,
    /// Frozen layers of the disk, whose digests are part of the template's.
    pub others: Vec<LayerId>,
    /// What the disk is based on, for the digest.
    pub ground: String,
}

impl Manager {
    /// Begins to build a template, and returns it as it is then. A failed one of the same name is
    /// replaced.
    ///
    /// # Errors
    /// Nothing is built.
    pub async fn build_template(&self, spec: BuildSpec) -> Result<TemplateInfo, TemplateError> {
        if self.is_closing() {
            return Err(TemplateError::ShuttingDown);
        }
        request::check_build(&spec).map_err(TemplateError::Invalid)?;
        let host = self.inner.host.describe().await;
        let host = host.map_err(TemplateError::Host)?;
        if host.templates.contains(&spec.name) {
            return Err(TemplateError::NameTaken(spec.name));
        }
        let ground_of = async |name: &str| match self.checked_ground(name, &host).await {
            Ok(ground) if ground.layers.disk.len() >= MAX_DISK => {
                Err(TemplateError::TooManyLayers(ground.layers.disk.len()))
            }
            Ok(ground) => Ok(ground),
            Err(CreateError::Store(source)) => Err(source.into()),
            Err(other) => Err(TemplateError::Invalid(other.to_string())),
        };
        let mut settings = spec.settings;
        let (plan, source, layers) = match spec.from {
            BuildFrom::Sandbox(id) => {
                let sandbox = self.get(&id).await?;
                match sandbox.status {
                    Status::Running | Status::Paused => {}
                    status => return Err(TemplateError::NotSaveable(status)),
                }
                // Two more: one to hold it, and the template's own.
                if sandbox.layers.disk.len() + 2 > MAX_DISK {
                    return Err(TemplateError::TooManyLayers(sandbox.layers.disk.len()));
                }
                let base = sandbox.spec.template;
                inherit(&mut settings, &self.ground(&base).await?.settings);
                settings.vcpus.get_or_insert(sandbox.spec.vcpus);
                settings.memory_mb.get_or_insert(sandbox.spec.memory_mb);
                let source = Source::Sandbox {
                    sandbox: sandbox.id.clone(),
                    base,
                };
                (Plan::Sandbox(sandbox.id), source, Layers::default())
            }
            BuildFrom::Recipe(recipe) => {
                let ground = ground_of(&recipe.base).await?;
                inherit(&mut settings, &ground.settings);
                let source = Source::Recipe {
                    base: recipe.base.clone(),
                };
                let layers = ground.layers.clone();
                (Plan::Recipe(recipe, Box::new(ground)), source, layers)
            }
            BuildFrom::Oci { archive, disk_mb } => {
                let disk_mb = request::check_disk(disk_mb).map_err(TemplateError::Invalid)?;
                let build = OciBuild::new(archive, disk_mb, &mut settings).await?;
                let ground = ground_of(OciBuild::BUILDER).await.map_err(|error| {
                    let name = OciBuild::BUILDER;
                    TemplateError::Invalid(format!(
                        "images are unpacked in a sandbox of template {name:?}: {error}"
                    ))
                })?;
                let source = build.source();
                (
                    Plan::Oci(Box::new(build), Box::new(ground)),
                    source,
                    Layers::default(),
                )
            }
        };
        let layer = LayerId::random();
        let mut template = Template {
            id: TemplateId::random(),
            owner: self.principal.owner().cloned(),
            name: spec.name,
            source,
            status: TemplateStatus::Building,
            settings,
            layers,
            content: None,
            created_at: Timestamp::now(),
        };
        template.layers.disk.push(layer);
        self.insert_template(&mut template).await?;
        info!(template = template.name, "building a template");
        let info = template.clone().into();
        let build = Build::default();
        let known = build.clone();
        self.inner.builds.lock().insert(template.id.clone(), known);
        let manager = self.clone();
        let task = async move { manager.build(template, plan, build).await };
        tokio::spawn(task.in_current_span());
        Ok(info)
    }

    async fn insert_template(&self, template: &mut Template) -> Result<(), TemplateError> {
        let _records = self.inner.records.lock().await;
        if let Some(old) = self.inner.store.find_template(&template.name).await? {
            if !matches!(old.status, TemplateStatus::Failed { .. }) || !self.sees(&old) {
                return Err(TemplateError::NameTaken(template.name.clone()));
            }
            // It holds nothing.
            self.inner.store.remove_template(&old.id).await?;
            self.inner.builds.forget(&old.id);
        }
        while !self.inner.store.insert_template(template).await? {
            template.id = TemplateId::random();
        }
        Ok(())
    }

    /// The progress of the build of a template, from its start to its end; nothing of one that this
    /// daemon has not built.
    ///
    /// # Errors
    /// There is none of that name, or the store failed.
    pub async fn follow_build(
        &self,
        name: &str,
    ) -> Result<BoxStream<'static, String>, TemplateError> {
        let id = match self.usable_template(name).await? {
            Some(template) => template.id,
            None => return self.get_template(name).await.map(|_| no_lines()),
        };
        let build = self.inner.builds.get(&id);
        Ok(build.map_or_else(no_lines, |build| build.progress.follow()))
    }

    async fn build(&self, mut template: Template, plan: Plan, build: Build) {
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
        let plan = match plan {
            Plan::Sandbox(id) => {
                Plan::Copy(Box::new(self.hold_sandbox(template, &id, build).await?))
            }
            other => other,
        };
        let prepared = tokio::select! {
            biased;
            () = build.cancel.cancelled() => Err(BuildError::Cancelled),
            prepared = self.prepare(template, plan, &builder, &build.progress) => prepared,
        };
        let kept = match prepared {
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
    async fn prepare(
        &self,
        template: &mut Template,
        plan: Plan,
        builder: &SandboxId,
        progress: &Progress,
    ) -> Result<Machine, BuildError> {
        match plan {
            Plan::Sandbox(_) => Err(BuildError::Cancelled),
            Plan::Copy(held) => self.start_copy(*held, builder, progress).await,
            Plan::Recipe(recipe, ground) => {
                let base = recipe.base.clone();
                progress.say(&format!("booting a sandbox of template {base}"));
                let machine = self.boot(template, &base, &ground, builder, None).await?;
                self.run_recipe(template, recipe, builder, progress).await?;
                Ok(machine)
            }
            Plan::Oci(build, ground) => {
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
            None => self.inner.host.image(name, true).await?.digest,
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

fn no_lines() -> BoxStream<'static, String> {
    futures_util::stream::empty().boxed()
}

/// Takes from `base` what `settings` do not say.
fn inherit(settings: &mut Settings, base: &Settings) {
    settings.vcpus = settings.vcpus.or(base.vcpus);
    settings.memory_mb = settings.memory_mb.or(base.memory_mb);
    if settings.readiness.is_none() {
        settings.readiness.clone_from(&base.readiness);
    }
    for (name, value) in &base.env {
        if !settings.env.contains_key(name) {
            settings.env.insert(name.clone(), value.clone());
        }
    }
    if settings.cwd.is_none() {
        settings.cwd.clone_from(&base.cwd);
    }
    settings.user.clone_from(&base.user);
    settings.entrypoint.clone_from(&base.entrypoint);
    settings.cmd.clone_from(&base.cmd);
}
