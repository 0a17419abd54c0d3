//! Templates: build, list, inspect, delete.

use std::collections::BTreeMap;
use std::io::{self, Seek, SeekFrom};
use std::path::Path as FilePath;

use axum::Json;
use axum::body::{Body, Bytes, to_bytes};
use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures_util::stream::{self, StreamExt};
use serde::{Deserialize, Serialize};
use tokio::io::AsyncWriteExt;
use utoipa::ToSchema;

use super::error::{ApiError, parse};
use super::extract::Path;
use super::sandboxes::rfc3339;
use crate::dialects::forms::{FormField, form};
use crate::dialects::upload::bad_form;
use crate::domain::{
    BuildFrom, BuildSpec, DEFAULT_MEMORY_MB, DEFAULT_VCPUS, Manager, Recipe, SettingsSpec, Source,
    Step, TemplateError, TemplateInfo, TemplateStatus,
};
use crate::http::{AppState, Caller, ErrorBody};

/// The largest description of what to build, in bytes.
const MAX_REQUEST: usize = 1 << 20;
/// How long a step of a recipe may take if it does not say, in seconds.
const STEP_TIMEOUT_SEC: i64 = 600;
/// How long a readiness command has if it does not say, in seconds.
const READINESS_TIMEOUT_SEC: i64 = 30;
/// The size of an image's disk, in MiB, if the request does not say.
const DISK_MB: i64 = 2048;

/// What to build. One of `recipe`, `oci` and `sandbox_id` says from what; the other fields are what
/// sandboxes of the template have if their creator does not say otherwise.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct BuildTemplateRequest {
    /// Its name, which no other template has: 1 to 64 letters, digits, `.`, `_` or `-`.
    #[schema(required)]
    pub name: String,
    /// Steps in a sandbox of another template.
    #[schema(nullable = false)]
    pub recipe: Option<RecipeBody>,
    /// An OCI image, which comes with the request.
    #[schema(nullable = false)]
    pub oci: Option<OciBody>,
    /// The disk of this sandbox, running or paused.
    #[schema(nullable = false)]
    pub sandbox_id: Option<String>,
    /// Virtual CPUs, 1 to 32.
    #[schema(nullable = false)]
    pub vcpus: Option<i64>,
    /// RAM in MiB, 128 to what the host has.
    #[schema(nullable = false)]
    pub memory_mb: Option<i64>,
    /// A command that must succeed in a sandbox before it counts as running.
    #[schema(nullable = false)]
    pub readiness: Option<ReadinessBody>,
    /// Environment of commands, beside what every command has.
    #[schema(nullable = false)]
    pub env: Option<BTreeMap<String, String>>,
    /// Working directory of commands, absolute. The user's home if not given.
    #[schema(nullable = false)]
    pub cwd: Option<String>,
}

/// How to make a template of another: its files are written, its steps are run, and the disk is kept.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = Recipe)]
pub struct RecipeBody {
    /// The other template.
    #[serde(default = "minimal")]
    #[schema(default = "minimal")]
    pub base: String,
    /// What is run, in this order. One that does not succeed ends the build.
    #[serde(default)]
    pub steps: Vec<StepBody>,
}

/// One command of a recipe.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = RecipeStep)]
pub struct StepBody {
    /// A command for `/bin/sh -c`, run as root.
    pub run: String,
    /// Seconds that it may take, 1 to 86400.
    #[serde(default)]
    #[schema(default = 600, nullable = false)]
    pub timeout_sec: Option<i64>,
}

/// How to make a template of an OCI image.
#[derive(Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
#[schema(as = OciSource)]
pub struct OciBody {
    /// Size of the disk in MiB. It takes space only as it is used.
    #[schema(default = 2048, nullable = false)]
    pub disk_mb: Option<i64>,
}

/// A command that tells whether a sandbox can be used.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = Readiness)]
pub struct ReadinessBody {
    /// Program and arguments; no shell is involved. It is run again until it succeeds.
    pub cmd: Vec<String>,
    /// Seconds in which it must have succeeded, 1 to 3600.
    #[serde(default)]
    #[schema(default = 30, nullable = false)]
    pub timeout_sec: Option<i64>,
}

/// A template.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Template)]
pub struct TemplateBody {
    /// Its name.
    #[schema(example = "minimal")]
    pub name: String,
    /// `building`, `ready` or `failed`.
    #[schema(example = "ready")]
    pub status: &'static str,
    /// Why it is `failed`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub status_reason: Option<String>,
    /// SHA-256 of its content, once it is ready; of an image on the host, where it is known, or asked
    /// for by name.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub digest: Option<String>,
    /// What it is made from.
    #[schema(inline)]
    pub source: SourceBody,
    /// Virtual CPUs of its sandboxes.
    pub vcpus: u8,
    /// RAM of its sandboxes, in MiB.
    pub memory_mb: u32,
    /// Size of their disk, in MiB.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub disk_mb: Option<u64>,
    /// Space that it takes on the host's disk, in bytes, without that of its base.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub size_bytes: Option<u64>,
    /// What must succeed in a sandbox before it counts as running.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub readiness: Option<ReadinessBody>,
    /// Environment of commands, beside what every command has.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Working directory of commands.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub cwd: Option<String>,
    /// User that the OCI image names. Commands are run as root all the same.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub user: Option<String>,
    /// Entrypoint of the OCI image. Nothing runs it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub entrypoint: Vec<String>,
    /// Command of the OCI image. Nothing runs it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub cmd: Vec<String>,
    /// When it was asked for; of an image on the host, when it was made.
    #[schema(value_type = String, format = DateTime)]
    pub created_at: String,
}

/// What a template is made from.
#[derive(Debug, Serialize, ToSchema)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum SourceBody {
    /// An image on the host.
    Image,
    /// The disk of a sandbox.
    Sandbox {
        /// Which one.
        sandbox_id: String,
        /// The template of that.
        base: String,
    },
    /// A recipe.
    Recipe {
        /// The template that its steps were run in.
        base: String,
    },
    /// An OCI image.
    Oci {
        /// The digest of its configuration.
        image: String,
        /// The name that the archive gives it.
        #[serde(skip_serializing_if = "Option::is_none")]
        #[schema(nullable = false)]
        reference: Option<String>,
    },
}

/// A line of the progress of a build: one of its fields is there.
#[derive(Debug, Default, Serialize, ToSchema)]
pub struct ProgressLine {
    /// What is being done, or what a program says.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub progress: Option<String>,
    /// In the last line: the template as it is now.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub template: Option<TemplateBody>,
    /// In the last line, if there is no such template any more: why.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub gone: Option<String>,
}

/// What to build, and an archive.
#[derive(ToSchema)]
#[allow(
    dead_code,
    reason = "only described by it: the form is read as a stream"
)]
pub(super) struct BuildForm {
    /// What to build. Comes before `archive`.
    request: BuildTemplateRequest,
    /// A tar file, not compressed. With `oci`, the image: what `docker save` writes, an OCI archive,
    /// or an OCI layout. With `recipe`, files that are written to the paths that they have in it.
    #[schema(format = Binary, content_media_type = "application/x-tar")]
    archive: String,
}

fn minimal() -> String {
    "minimal".to_owned()
}

impl From<Source> for SourceBody {
    fn from(source: Source) -> Self {
        match source {
            Source::Image => Self::Image,
            Source::Sandbox { sandbox, base } => Self::Sandbox {
                sandbox_id: sandbox.into(),
                base,
            },
            Source::Recipe { base } => Self::Recipe { base },
            Source::Oci { image, reference } => Self::Oci { image, reference },
        }
    }
}

impl From<TemplateInfo> for TemplateBody {
    fn from(template: TemplateInfo) -> Self {
        let status = template.status.as_str();
        let status_reason = match template.status {
            TemplateStatus::Failed { reason } => Some(reason),
            TemplateStatus::Building | TemplateStatus::Ready => None,
        };
        let settings = template.settings;
        let content = template.content;
        Self {
            name: template.name,
            status,
            status_reason,
            digest: content.as_ref().and_then(|content| content.digest.clone()),
            source: template.source.into(),
            vcpus: settings.vcpus.unwrap_or(DEFAULT_VCPUS),
            memory_mb: settings.memory_mb.unwrap_or(DEFAULT_MEMORY_MB),
            disk_mb: content.as_ref().map(|content| content.disk_bytes >> 20),
            size_bytes: content.map(|content| content.size_bytes),
            readiness: settings.readiness.map(|readiness| ReadinessBody {
                cmd: readiness.argv,
                timeout_sec: Some(readiness.timeout_sec.into()),
            }),
            env: settings.env,
            cwd: settings.cwd,
            user: settings.user,
            entrypoint: settings.entrypoint,
            cmd: settings.cmd,
            created_at: rfc3339(template.created_at),
        }
    }
}

/// Build a template
///
/// Answers when all that can be checked at once was checked; the template is `building` then. Its
/// progress tells how it goes on. A failed template of the same name is replaced.
#[utoipa::path(
    post, path = "/v1/templates", operation_id = "buildTemplate", tag = "templates",
    request_body(content(
        (BuildTemplateRequest = "application/json"),
        (inline(BuildForm) = "multipart/form-data"),
    )),
    responses(
        (status = 202, description = "It is being built", body = TemplateBody),
        (status = 400, description = "The request or the image makes no sense", body = ErrorBody),
        (status = 404, description = "Sandbox not found", body = ErrorBody),
        (status = 409, description = "Sandbox neither running nor paused, or the name is taken",
            body = ErrorBody),
        (status = 413, description = "Archive too large", body = ErrorBody),
        (status = 503, description = "The daemon is shutting down", body = ErrorBody),
    ),
)]
pub async fn build(
    State(state): State<AppState>,
    caller: Caller,
    request: Request,
) -> Result<(StatusCode, Json<TemplateBody>), ApiError> {
    let content_type = request.headers().get(header::CONTENT_TYPE);
    let is_form = content_type
        .and_then(|kind| kind.to_str().ok())
        .is_some_and(|kind| kind.starts_with("multipart/"));
    let (request, archive) = if is_form {
        read_form(&state, &caller, request).await?
    } else {
        let body = to_bytes(request.into_body(), MAX_REQUEST).await;
        (
            parse(body.map_err(|_| StatusCode::PAYLOAD_TOO_LARGE))?,
            None,
        )
    };
    let spec = spec_of(&caller.manager, request, archive).await?;
    let template = caller.manager.build_template(spec).await?;
    Ok((StatusCode::ACCEPTED, Json(template.into())))
}

async fn spec_of(
    manager: &Manager,
    request: BuildTemplateRequest,
    archive: Option<std::fs::File>,
) -> Result<BuildSpec, ApiError> {
    let settings = SettingsSpec {
        vcpus: request.vcpus,
        memory_mb: request.memory_mb,
        readiness: request.readiness.map(|readiness| {
            let timeout_sec = readiness.timeout_sec.unwrap_or(READINESS_TIMEOUT_SEC);
            (readiness.cmd, timeout_sec)
        }),
        env: request.env.unwrap_or_default(),
        cwd: request.cwd,
    };
    let settings = manager.check_settings(settings).await?;
    let from = match (request.recipe, request.oci, request.sandbox_id) {
        (Some(recipe), None, None) => BuildFrom::Recipe(Recipe {
            base: recipe.base,
            files: archive,
            steps: recipe
                .steps
                .into_iter()
                .map(|step| Step {
                    run: step.run,
                    timeout_sec: step.timeout_sec.unwrap_or(STEP_TIMEOUT_SEC),
                })
                .collect(),
        }),
        (None, Some(oci), None) => BuildFrom::Oci {
            archive: archive.ok_or_else(|| {
                ApiError::invalid("an image comes as field `archive` of a multipart form")
            })?,
            disk_mb: oci.disk_mb.unwrap_or(DISK_MB),
        },
        (None, None, Some(_)) if archive.is_some() => {
            return Err(ApiError::invalid(
                "a template of a sandbox takes no archive",
            ));
        }
        (None, None, Some(id)) => BuildFrom::Sandbox(id),
        _ => {
            return Err(ApiError::invalid(
                "expected one of recipe, oci and sandbox_id",
            ));
        }
    };
    Ok(BuildSpec {
        name: request.name,
        from,
        settings,
    })
}

async fn read_form(
    state: &AppState,
    caller: &Caller,
    request: Request,
) -> Result<(BuildTemplateRequest, Option<std::fs::File>), ApiError> {
    let mut form = form(request).await.map_err(|rejection| {
        ApiError::invalid(format!("expected multipart/form-data: {rejection}"))
    })?;
    let (mut what, mut archive) = (None, None);
    while let Some(mut field) = form.next_field().await.map_err(|error| bad_form(&error))? {
        match field.name() {
            Some("request") if what.is_none() => {
                let bytes = read_request(&mut field).await?;
                what = Some(parse(Ok::<_, StatusCode>(bytes))?);
            }
            Some("archive") if archive.is_none() => {
                let dir = caller.manager.limits().exec.spool.dir();
                archive = Some(spool(&mut field, dir, state.max_archive).await?);
            }
            name => {
                let text = format!("the form has a field {name:?} too many");
                return Err(ApiError::invalid(text));
            }
        }
    }
    let what = what.ok_or_else(|| ApiError::invalid("request is required"))?;
    Ok((what, archive))
}

async fn read_request(field: &mut FormField<'_>) -> Result<Bytes, ApiError> {
    let mut bytes = Vec::new();
    while let Some(piece) = field.chunk().await.map_err(|error| bad_form(&error))? {
        if bytes.len() + piece.len() > MAX_REQUEST {
            return Err(ApiError::too_large("request is larger than 1 MiB"));
        }
        bytes.extend_from_slice(&piece);
    }
    Ok(bytes.into())
}

/// The archive, in a file that has no name and is gone with the build.
async fn spool(
    field: &mut FormField<'_>,
    dir: &FilePath,
    limit: u64,
) -> Result<std::fs::File, ApiError> {
    let failed = |error: io::Error| {
        ApiError::internal(format!("the archive cannot be spooled to disk: {error}"))
    };
    let dir = dir.to_owned();
    let file = tokio::task::spawn_blocking(move || tempfile::tempfile_in(dir)).await;
    let file = file.unwrap_or_else(|error| Err(io::Error::other(error)));
    let mut file = tokio::fs::File::from_std(file.map_err(failed)?);
    let mut total = 0;
    while let Some(piece) = field.chunk().await.map_err(|error| bad_form(&error))? {
        total += piece.len() as u64;
        if total > limit {
            return Err(ApiError::too_large(format!(
                "archive exceeds the limit of {limit} bytes"
            )));
        }
        file.write_all(&piece).await.map_err(failed)?;
    }
    file.flush().await.map_err(failed)?;
    let mut file = file.into_std().await;
    file.seek(SeekFrom::Start(0)).map_err(failed)?;
    Ok(file)
}

/// List all templates
///
/// By name: those that were built, and images on the host.
#[utoipa::path(
    get, path = "/v1/templates", operation_id = "listTemplates", tag = "templates",
    responses((status = 200, description = "List of templates", body = Vec<TemplateBody>)),
)]
pub async fn list(caller: Caller) -> Result<Json<Vec<TemplateBody>>, ApiError> {
    let templates = caller.manager.list_templates().await?;
    Ok(Json(templates.into_iter().map(Into::into).collect()))
}

/// Get template details
#[utoipa::path(
    get, path = "/v1/templates/{name}", operation_id = "getTemplate", tag = "templates",
    params(("name" = String, Path)),
    responses(
        (status = 200, description = "Template details", body = TemplateBody),
        (status = 404, description = "Template not found", body = ErrorBody),
    ),
)]
pub async fn get(caller: Caller, Path(name): Path<String>) -> Result<Json<TemplateBody>, ApiError> {
    Ok(Json(caller.manager.get_template(&name).await?.into()))
}

/// Follow the build of a template
///
/// From its start to its end, one JSON object a line. The last line has the template as it then is.
#[utoipa::path(
    get, path = "/v1/templates/{name}/progress", operation_id = "followTemplate", tag = "templates",
    params(("name" = String, Path)),
    responses(
        (status = 200, description = "Progress", content_type = "application/x-ndjson",
            body = ProgressLine),
        (status = 404, description = "Template not found", body = ErrorBody),
    ),
)]
pub async fn progress(caller: Caller, Path(name): Path<String>) -> Result<Response, ApiError> {
    let lines = caller.manager.follow_build(&name).await?;
    let lines = lines.map(|line| ProgressLine {
        progress: Some(line),
        ..ProgressLine::default()
    });
    let manager = caller.manager.clone();
    let last = stream::once(async move {
        match manager.get_template(&name).await {
            Ok(template) => ProgressLine {
                template: Some(template.into()),
                ..ProgressLine::default()
            },
            Err(error) => ProgressLine {
                gone: Some(match error {
                    TemplateError::NotFound => "template not found".to_owned(),
                    other => other.to_string(),
                }),
                ..ProgressLine::default()
            },
        }
    });
    let body = lines.chain(last).map(|line| {
        let mut json = serde_json::to_vec(&line).map_err(io::Error::other)?;
        json.push(b'\n');
        Ok::<_, io::Error>(Bytes::from(json))
    });
    let body = Body::from_stream(body);
    Ok(([(header::CONTENT_TYPE, "application/x-ndjson")], body).into_response())
}

/// Delete a template
///
/// One that is being built is cancelled. One that a sandbox or a snapshot is of is not deleted.
#[utoipa::path(
    delete, path = "/v1/templates/{name}", operation_id = "deleteTemplate", tag = "templates",
    params(("name" = String, Path)),
    responses(
        (status = 204, description = "Template deleted"),
        (status = 404, description = "Template not found", body = ErrorBody),
        (status = 409, description = "It is in use, or an image on the host", body = ErrorBody),
    ),
)]
pub async fn delete(caller: Caller, Path(name): Path<String>) -> Result<StatusCode, ApiError> {
    caller.manager.delete_template(&name).await?;
    Ok(StatusCode::NO_CONTENT)
}
