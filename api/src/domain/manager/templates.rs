//! Templates: which there are, and what sandboxes of them start from.

use std::time::Duration;

use futures_util::StreamExt;
use jiff::Timestamp;
use tokio::time::Instant;
use tracing::{info, warn};

use super::super::error::{CreateError, LookupError, TemplateError};
use super::super::host::{Created, ExecEvent, ExecRequest, HostError, HostInfo, ImageDigest};
use super::super::id::{SandboxId, TemplateId};
use super::super::layer::Layers;
use super::super::request::{self, SettingsSpec};
use super::super::sandbox::Sandbox;
use super::super::store::StoreError;
use super::super::template::{
    Readiness, Settings, Source, Template, TemplateContent, TemplateInfo, TemplateStatus,
};
use super::super::timings::Start;
use super::Manager;
use super::recover::RecoverError;
use crate::chain;

/// How long a readiness command that has failed is left alone before it is run again.
const READINESS_PAUSE: Duration = Duration::from_millis(200);
/// How much of what a readiness command says goes into an error message, in bytes.
const MAX_WORDS: usize = 1024;

/// What sandboxes of a template start from.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Ground {
    /// The template's own; `None` of an image on the host.
    pub id: Option<TemplateId>,
    /// Its disk; none of an image on the host.
    pub layers: Layers,
    /// What its sandboxes have.
    pub settings: Settings,
}

impl Manager {
    /// What sandboxes of a template start from. One that was not built here is an image on the host,
    /// or is not there, which the host tells.
    pub(super) async fn ground(&self, name: &str) -> Result<Ground, StoreError> {
        let found = self.inner.store.find_template(name).await?;
        Ok(found.map_or_else(Ground::default, |template| Ground {
            id: Some(template.id),
            layers: template.layers,
            settings: template.settings,
        }))
    }

    /// The same of one that sandboxes can be made of.
    pub(super) async fn checked_ground(
        &self,
        name: &str,
        host: &HostInfo,
    ) -> Result<Ground, CreateError> {
        request::check_template_name(name).map_err(CreateError::Invalid)?;
        match self.usable_template(name).await? {
            Some(template) if template.status == TemplateStatus::Ready => Ok(Ground {
                id: Some(template.id),
                layers: template.layers,
                settings: template.settings,
            }),
            Some(template) => Err(CreateError::TemplateNotReady {
                name: name.to_owned(),
                status: template.status.as_str(),
                what: match template.status {
                    TemplateStatus::Building => "wait until it is",
                    _ => "build it again",
                },
            }),
            None if host.templates.iter().any(|known| known == name) => Ok(Ground::default()),
            None => {
                let mut known = host.templates.clone();
                let built = self.inner.store.list_templates().await?;
                let ready = built
                    .into_iter()
                    .filter(|template| template.status == TemplateStatus::Ready)
                    .filter(|template| self.may_use(template));
                known.extend(ready.map(|template| template.name));
                known.sort();
                known.dedup();
                let text = request::unknown_template(name, &known);
                Err(CreateError::Invalid(text))
            }
        }
    }

    /// What is wrong with a disk of this size for a sandbox of a template, if anything is: a disk can
    /// be larger than its template's, and not smaller.
    pub(super) async fn disk_problem(
        &self,
        template: &str,
        disk_mb: Option<u32>,
    ) -> Result<Option<String>, CreateError> {
        let Some(disk_mb) = disk_mb else {
            return Ok(None);
        };
        let found = self.inner.store.find_template(template).await?;
        let least = match found.and_then(|template| template.content) {
            Some(content) => content.disk_bytes,
            None => {
                let image = self.inner.host.image(template, ImageDigest::Unasked).await;
                image.map_err(CreateError::Describe)?.disk_bytes
            }
        };
        let is_enough = u64::from(disk_mb) << 20 >= least;
        Ok((!is_enough).then(|| {
            let least_mb = least.div_ceil(1 << 20);
            format!("the disk must be at least {least_mb} MiB, as that of template {template:?} is")
        }))
    }

    /// Checks that the template of this name is still the same. The caller holds the lock of the
    /// records.
    pub(super) async fn check_unchanged(
        &self,
        name: &str,
        ground: &Ground,
    ) -> Result<(), CreateError> {
        let found = self.inner.store.find_template(name).await?;
        if found.map(|template| template.id) == ground.id {
            Ok(())
        } else {
            let text = format!("template {name:?} was deleted or built anew in the meantime");
            Err(CreateError::Invalid(text))
        }
    }

    /// What commands of a sandbox have by its template.
    pub(super) async fn settings_of(&self, id: &SandboxId) -> Result<Settings, StoreError> {
        match self.inner.store.get(id).await? {
            Some(sandbox) => Ok(self.ground(&sandbox.spec.template).await?.settings),
            None => Ok(Settings::default()),
        }
    }

    /// After a sandbox was started: waits until the readiness command of its template has succeeded.
    /// One that goes on where another was needs none. If it does not succeed, the sandbox is ended.
    pub(super) async fn until_usable(
        &self,
        sandbox: &Sandbox,
        start: Start,
        created: Result<Created, HostError>,
    ) -> Result<Created, HostError> {
        let mut created = created?;
        if matches!(start, Start::Fork | Start::Resume) {
            return Ok(created);
        }
        let begun = Instant::now();
        let usable = async {
            let ground = self.ground(&sandbox.spec.template).await;
            let ground = ground.map_err(|error| HostError::Internal {
                reason: chain(&error),
            })?;
            self.wait_until_usable(&sandbox.id, &ground.settings)
                .await?;
            Ok(ground.settings.readiness.is_some())
        };
        match usable.await {
            Ok(was_asked) => {
                if was_asked {
                    let us = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
                    created.timings.readiness_us = us;
                    created.timings.total_us = created.timings.total_us.saturating_add(us);
                }
                Ok(created)
            }
            Err(error) => {
                self.inner.host.destroy(&sandbox.id).await?;
                Err(error)
            }
        }
    }

    /// Runs the readiness command until it succeeds.
    pub(super) async fn wait_until_usable(
        &self,
        id: &SandboxId,
        settings: &Settings,
    ) -> Result<(), HostError> {
        let Some(readiness) = &settings.readiness else {
            return Ok(());
        };
        let mut last = String::new();
        let succeeded = async {
            loop {
                match self.try_readiness(id, readiness, settings).await? {
                    Ok(()) => return Ok(()),
                    Err(words) => last = words,
                }
                tokio::time::sleep(READINESS_PAUSE).await;
            }
        };
        let timeout = Duration::from_secs(readiness.timeout_sec.into());
        match tokio::time::timeout(timeout, succeeded).await {
            Ok(result) => result,
            Err(_) => Err(HostError::Start {
                reason: format!(
                    "the readiness command of its template did not succeed within {} s{last}",
                    readiness.timeout_sec
                ),
            }),
        }
    }

    /// Runs the readiness command once. The inner error is what there is to say of its failure.
    async fn try_readiness(
        &self,
        id: &SandboxId,
        readiness: &Readiness,
        settings: &Settings,
    ) -> Result<Result<(), String>, HostError> {
        let request = ExecRequest {
            argv: readiness.argv.clone(),
            env: settings.env.clone(),
            cwd: settings.cwd.clone(),
            timeout_sec: readiness.timeout_sec,
        };
        let mut events = self.inner.host.exec(id, request).await?;
        let mut words = Vec::new();
        while let Some(event) = events.next().await.transpose()? {
            match event {
                ExecEvent::Started { .. } => {}
                ExecEvent::Stdout(bytes) | ExecEvent::Stderr(bytes) => {
                    words.extend_from_slice(&bytes);
                    let surplus = words.len().saturating_sub(MAX_WORDS);
                    words.drain(..surplus);
                }
                ExecEvent::Exited(exit) if exit.code == 0 && !exit.timed_out => return Ok(Ok(())),
                ExecEvent::Exited(exit) => {
                    let text: String = String::from_utf8_lossy(&words)
                        .chars()
                        .filter(|c| !c.is_control() || *c == '\n')
                        .collect();
                    return Ok(Err(format!(
                        "; it last ended with status {}: {}",
                        exit.code,
                        text.trim()
                    )));
                }
            }
        }
        Err(HostError::AgentUnreachable {
            reason: "the readiness command was lost".to_owned(),
        })
    }

    /// What sandboxes of a template are to have, if this host can give it.
    ///
    /// # Errors
    /// It cannot, or the host cannot say what it has.
    pub async fn check_settings(&self, spec: SettingsSpec) -> Result<Settings, TemplateError> {
        let host = self.inner.host.describe().await;
        let host = host.map_err(TemplateError::Host)?;
        request::check_settings(spec, &host).map_err(TemplateError::Invalid)
    }

    /// All templates, by name: those that were built here, and images on the host. Digests of images
    /// are told where they are known.
    ///
    /// # Errors
    /// The store or the host failed.
    pub async fn list_templates(&self) -> Result<Vec<TemplateInfo>, TemplateError> {
        let built = self.inner.store.list_templates().await?;
        let built = built.into_iter().filter(|template| self.may_use(template));
        let mut all: Vec<TemplateInfo> = built.map(Into::into).collect();
        let host = self.inner.host.describe().await;
        for name in host.map_err(TemplateError::Host)?.templates {
            if all.iter().all(|template| template.name != name) {
                all.push(self.image(name, ImageDigest::IfKnown).await?);
            }
        }
        all.sort_by(|one, other| one.name.cmp(&other.name));
        Ok(all)
    }

    /// One template. The digest of an image may take seconds to be computed.
    ///
    /// # Errors
    /// There is none of that name, or the store or the host failed.
    pub async fn get_template(&self, name: &str) -> Result<TemplateInfo, TemplateError> {
        if let Some(template) = self.usable_template(name).await? {
            return Ok(template.into());
        }
        self.image(name.to_owned(), ImageDigest::Computed).await
    }

    /// The template of this name, if it was built here and may be used.
    pub(super) async fn usable_template(&self, name: &str) -> Result<Option<Template>, StoreError> {
        let found = self.inner.store.find_template(name).await?;
        Ok(found.filter(|template| self.may_use(template)))
    }

    async fn image(
        &self,
        name: String,
        digest: ImageDigest,
    ) -> Result<TemplateInfo, TemplateError> {
        let image = match self.inner.host.image(&name, digest).await {
            Ok(image) => image,
            Err(HostError::UnknownTemplate { .. }) => return Err(TemplateError::NotFound),
            Err(source) => return Err(TemplateError::Host(source)),
        };
        Ok(TemplateInfo {
            name,
            source: Source::Image,
            status: TemplateStatus::Ready,
            settings: Settings::default(),
            content: Some(TemplateContent {
                digest: image.digest,
                size_bytes: image.size_bytes,
                disk_bytes: image.disk_bytes,
            }),
            created_at: Timestamp::from_microsecond(image.modified_us).unwrap_or_default(),
        })
    }

    /// Deletes a template that nothing needs. One that is being built is not built any further. It
    /// goes on if the caller goes away.
    ///
    /// # Errors
    /// It is as it was.
    pub async fn delete_template(&self, name: &str) -> Result<(), TemplateError> {
        let (manager, name) = (self.clone(), name.to_owned());
        tokio::spawn(async move { manager.delete_template_now(&name).await })
            .await
            .unwrap_or(Err(TemplateError::Interrupted))
    }

    async fn delete_template_now(&self, name: &str) -> Result<(), TemplateError> {
        let Some(template) = self.usable_template(name).await? else {
            // What the host has is not the daemon's.
            return match self.image(name.to_owned(), ImageDigest::Unasked).await {
                Ok(_) => Err(TemplateError::Image(name.to_owned())),
                Err(error) => Err(error),
            };
        };
        if !self.sees(&template) {
            return Err(TemplateError::NotYours(name.to_owned()));
        }
        self.inner.builds.cancel(&template.id).await;
        let released = {
            let _records = self.inner.records.lock().await;
            let users = self.users_of(name).await?;
            if !users.is_empty() {
                return Err(TemplateError::InUse {
                    name: name.to_owned(),
                    users,
                });
            }
            self.inner.store.remove_template(&template.id).await?
        };
        self.inner.builds.forget(&template.id);
        self.discard(&released).await;
        for (warm, _) in self.inner.store.list_warm().await? {
            if warm.model.shape.template == name {
                self.drop_warm(&warm.key).await?;
            }
        }
        info!(template = name, "template deleted");
        Ok(())
    }

    /// What needs a template, for people; empty if nothing does. The caller holds the lock of the
    /// records.
    async fn users_of(&self, name: &str) -> Result<String, LookupError> {
        let sandboxes = self.inner.store.list_live().await?;
        let sandboxes = sandboxes
            .into_iter()
            .filter(|sandbox| sandbox.spec.template == name)
            .map(|sandbox| format!("sandbox {}", sandbox.id));
        let snapshots = self.inner.store.list_snapshots().await?;
        let snapshots = snapshots
            .into_iter()
            .filter(|snapshot| snapshot.spec.template == name)
            .map(|snapshot| format!("snapshot {}", snapshot.id));
        let users: Vec<_> = sandboxes.chain(snapshots).collect();
        Ok(match users.as_slice() {
            [] => String::new(),
            [one] => one.clone(),
            [one, others @ ..] => format!("{one} and {} more", others.len()),
        })
    }

    /// Settles templates that an earlier daemon was building, and looks at those that are ready.
    pub(super) async fn recover_templates(&self) -> Result<(), RecoverError> {
        for mut template in self.inner.store.list_templates().await? {
            match template.status {
                TemplateStatus::Building => {
                    let reason = "the daemon ended while it was being built".to_owned();
                    template.status = TemplateStatus::Failed { reason };
                    // What there is of it is removed with all that nobody holds.
                    template.layers = Layers::default();
                    self.inner.store.update_template(&template).await?;
                }
                TemplateStatus::Ready if !self.has(&template.layers).await? => {
                    warn!(template = template.name, "layers of a template are missing");
                }
                _ => {}
            }
        }
        Ok(())
    }
}
