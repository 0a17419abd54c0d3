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

mod registry;
mod steps;

use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use jiff::Timestamp;
use tracing::{Instrument, info};

use super::super::build::{BuildFrom, BuildSpec};
use super::super::error::{CreateError, TemplateError};
use super::super::id::{LayerId, TemplateId};
use super::super::layer::{Layers, MAX_DISK};
use super::super::request;
use super::super::sandbox::Status;
use super::super::template::{Settings, Source, Template, TemplateInfo, TemplateStatus};
use super::Manager;
use super::oci::OciBuild;
use registry::Build;
pub use registry::Builds;
pub use steps::{BuildError, run_to_end};
use steps::{Plan, Work};

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
                let work = Work::Recipe(recipe, Box::new(ground));
                (Plan::Work(work), source, layers)
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
                let work = Work::Oci(Box::new(build), Box::new(ground));
                (Plan::Work(work), source, Layers::default())
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
        (self.inner.builds).insert(template.id.clone(), build.clone());
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
