//! Snapshots and forks.

use axum::Json;
use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::error::{ApiError, parse};
use super::extract::{Path, Query};
use super::sandboxes::{SandboxBody, rfc3339};
use crate::domain::{
    DEFAULT_MEMORY_MB, DEFAULT_VCPUS, Forked, Snapshot, SnapshotSpec, Source, TemplateInfo,
    TemplateStatus,
};
use crate::http::{Caller, ErrorBody};

/// What to take a snapshot of.
#[derive(Debug, Deserialize, ToSchema)]
pub struct CreateSnapshotRequest {
    /// The sandbox, running or paused.
    #[serde(default)]
    #[schema(required)]
    pub sandbox_id: String,
    /// A name for the snapshot, which no other has: 1 to 64 letters, digits, `.`, `_` or `-`.
    #[serde(default)]
    #[schema(nullable = false)]
    pub name: Option<String>,
    /// A description, of 4096 bytes at most.
    #[serde(default)]
    #[schema(nullable = false)]
    pub description: Option<String>,
    /// Whether the snapshot has the memory, and so the processes, of the sandbox. Without, sandboxes
    /// that are made from it boot from its disk.
    #[serde(default)]
    #[schema(default = true, nullable = false)]
    pub include_memory: Option<bool>,
}

/// A sandbox as it was at one moment: memory, processes and disk, or the disk alone.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Snapshot)]
pub struct SnapshotBody {
    /// Its id.
    #[schema(example = "sn-0a1b2c3d")]
    pub id: String,
    /// Its name; of one that was not given any, its id.
    pub name: String,
    /// What it is.
    #[serde(rename = "type")]
    #[schema(inline)]
    pub kind: KindBody,
    /// Its description.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub description: Option<String>,
    /// The sandbox that it was taken of.
    pub sandbox_id: String,
    /// Template of the root disk.
    pub template: String,
    /// Virtual CPUs.
    pub vcpus: u8,
    /// RAM in MiB.
    pub memory_mb: u32,
    /// Size on the disk in bytes, what it shares with other snapshots and sandboxes included.
    pub size_bytes: u64,
    /// Whether it has the memory of the sandbox.
    pub include_memory: bool,
    /// SHA-256 of the manifest of memory and state, which holds those of the files; without memory, of
    /// the image of the topmost layer of the disk.
    pub checksum: String,
    /// When it was taken.
    #[schema(value_type = String, format = DateTime)]
    pub created_at: String,
}

/// What sandboxes are made from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum KindBody {
    /// A template.
    Base,
    /// A snapshot.
    Snapshot,
}

/// Which ones to list.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct ListParams {
    #[serde(rename = "type")]
    kind: Option<KindBody>,
}

/// What becomes of the one that has the name.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct CreateParams {
    overwrite: bool,
}

/// A snapshot, or a template in the shape of one.
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
#[schema(as = SnapshotOrTemplate)]
pub enum ListedBody {
    /// A snapshot.
    Snapshot(SnapshotBody),
    /// A template.
    Base(BaseBody),
}

/// A template, in the shape of a snapshot.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = BaseTemplate)]
pub struct BaseBody {
    /// Its name.
    pub name: String,
    /// What it is.
    #[serde(rename = "type")]
    #[schema(inline)]
    pub kind: KindBody,
    /// Virtual CPUs of its sandboxes, if nobody says otherwise.
    pub vcpus: u8,
    /// RAM of its sandboxes in MiB, if nobody says otherwise.
    pub memory_mb: u32,
    /// Size on the disk in bytes.
    pub size_bytes: u64,
    /// When it was asked for; of an image, when it was made.
    #[schema(value_type = String, format = DateTime)]
    pub created_at: String,
    /// Whether it is an image on the host, and so cannot be deleted.
    pub protected: bool,
}

impl From<TemplateInfo> for BaseBody {
    fn from(template: TemplateInfo) -> Self {
        let content = template.content;
        Self {
            name: template.name,
            kind: KindBody::Base,
            vcpus: template.settings.vcpus.unwrap_or(DEFAULT_VCPUS),
            memory_mb: template.settings.memory_mb.unwrap_or(DEFAULT_MEMORY_MB),
            size_bytes: content.map_or(0, |content| content.size_bytes),
            created_at: rfc3339(template.created_at),
            protected: template.source == Source::Image,
        }
    }
}

/// How many sandboxes to make.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(default)]
pub struct ForkRequest {
    /// 1 to 100.
    #[schema(default = 1, nullable = false)]
    pub count: Option<i64>,
}

/// What came of a fork.
#[derive(Debug, Serialize, ToSchema)]
pub struct ForkBody {
    /// The new sandboxes; their agents have answered.
    pub sandboxes: Vec<SandboxBody>,
    /// Those that did not start. Their records stay, as `error`.
    pub failed: Vec<ForkFailure>,
    /// Milliseconds for which the sandbox that was forked stood still, if it was running.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub stall_ms: Option<f64>,
}

/// A sandbox that did not start.
#[derive(Debug, Serialize, ToSchema)]
pub struct ForkFailure {
    /// Its id.
    pub id: String,
    /// Why.
    pub reason: String,
}

impl From<Snapshot> for SnapshotBody {
    fn from(snapshot: Snapshot) -> Self {
        let (size_bytes, checksum) = snapshot
            .content
            .map(|content| (content.size_bytes, content.checksum))
            .unwrap_or_default();
        Self {
            name: snapshot.name.unwrap_or_else(|| snapshot.id.to_string()),
            kind: KindBody::Snapshot,
            id: snapshot.id.into(),
            description: snapshot.description,
            sandbox_id: snapshot.sandbox.into(),
            template: snapshot.spec.template,
            vcpus: snapshot.spec.vcpus,
            memory_mb: snapshot.spec.memory_mb,
            size_bytes,
            include_memory: !snapshot.layers.memory.is_empty(),
            checksum,
            created_at: rfc3339(snapshot.created_at),
        }
    }
}

impl From<Forked> for ForkBody {
    #[expect(
        clippy::cast_precision_loss,
        reason = "exact up to 2^53 µs, which is 285 years"
    )]
    fn from(forked: Forked) -> Self {
        let failed = forked.failed.into_iter().map(|(id, reason)| ForkFailure {
            id: id.into(),
            reason,
        });
        Self {
            sandboxes: forked.sandboxes.into_iter().map(Into::into).collect(),
            failed: failed.collect(),
            stall_ms: forked.stall.map(|stall| stall.stall_us as f64 / 1000.0),
        }
    }
}

/// Take a snapshot
///
/// A sandbox that runs stands still while its memory is saved, and goes on. Sandboxes are made from the
/// snapshot by its name or id, as `template` of a create.
#[utoipa::path(
    post, path = "/v1/snapshots", operation_id = "createSnapshot", tag = "snapshots",
    params(("overwrite" = Option<bool>, Query, description = "Whether it replaces the snapshot that \
        has its name, once it is taken; otherwise it is refused")),
    request_body = CreateSnapshotRequest,
    responses(
        (status = 201, description = "Snapshot taken", body = SnapshotBody),
        (status = 400, description = "The request makes no sense", body = ErrorBody),
        (status = 404, description = "Sandbox not found", body = ErrorBody),
        (status = 409, description = "Sandbox neither running nor paused, or a snapshot or template \
            has the name", body = ErrorBody),
        (status = 502, description = "It was not saved; if it still runs, the message says so",
            body = ErrorBody),
        (status = 429, description = "It would be more than the quota", body = ErrorBody),
    ),
)]
pub async fn create(
    caller: Caller,
    Query(params): Query<CreateParams>,
    body: Result<Bytes, BytesRejection>,
) -> Result<(StatusCode, Json<SnapshotBody>), ApiError> {
    let request: CreateSnapshotRequest = parse(body)?;
    if request.sandbox_id.is_empty() {
        return Err(ApiError::invalid("sandbox_id is required"));
    }
    let spec = SnapshotSpec {
        name: request.name,
        description: request.description,
        include_memory: request.include_memory.unwrap_or(true),
        is_own: false,
        overwrite: params.overwrite,
    };
    let snapshot = caller.manager.snapshot(&request.sandbox_id, spec).await?;
    Ok((StatusCode::CREATED, Json(snapshot.into())))
}

/// List all snapshots
///
/// Newest first; or the templates that sandboxes can be made from, by name.
#[utoipa::path(
    get, path = "/v1/snapshots", operation_id = "listSnapshots", tag = "snapshots",
    params(("type" = Option<String>, Query, description = "`snapshot`, which is also what is listed \
        without it, or `base` for templates")),
    responses(
        (status = 200, description = "List of snapshots", body = Vec<ListedBody>),
        (status = 400, description = "The query makes no sense", body = ErrorBody),
        (status = 502, description = "The host cannot say what it has", body = ErrorBody),
    ),
)]
pub async fn list(
    caller: Caller,
    Query(params): Query<ListParams>,
) -> Result<Json<Vec<ListedBody>>, ApiError> {
    if params.kind == Some(KindBody::Base) {
        let templates = caller.manager.list_templates().await?;
        let ready = templates
            .into_iter()
            .filter(|template| template.status == TemplateStatus::Ready);
        let listed = ready.map(|template| ListedBody::Base(template.into()));
        return Ok(Json(listed.collect()));
    }
    let snapshots = caller.manager.list_snapshots().await?;
    let listed = snapshots
        .into_iter()
        .map(|snapshot| ListedBody::Snapshot(snapshot.into()));
    Ok(Json(listed.collect()))
}

/// Get snapshot details
#[utoipa::path(
    get, path = "/v1/snapshots/{id}", operation_id = "getSnapshot", tag = "snapshots",
    params(("id" = String, Path, description = "Id or name")),
    responses(
        (status = 200, description = "Snapshot details", body = SnapshotBody),
        (status = 404, description = "Snapshot not found", body = ErrorBody),
    ),
)]
pub async fn get(caller: Caller, Path(id): Path<String>) -> Result<Json<SnapshotBody>, ApiError> {
    Ok(Json(caller.manager.get_snapshot(&id).await?.into()))
}

/// Delete a snapshot
///
/// Sandboxes that were made from it are not affected.
#[utoipa::path(
    delete, path = "/v1/snapshots/{id}", operation_id = "deleteSnapshot", tag = "snapshots",
    params(("id" = String, Path, description = "Id or name")),
    responses(
        (status = 204, description = "Snapshot deleted"),
        (status = 404, description = "Snapshot not found", body = ErrorBody),
    ),
)]
pub async fn delete(caller: Caller, Path(id): Path<String>) -> Result<StatusCode, ApiError> {
    caller.manager.delete_snapshot(&id).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Make sandboxes from a snapshot
///
/// Each goes on where the snapshot was taken, as a machine of its own.
#[utoipa::path(
    post, path = "/v1/snapshots/{id}/fork", operation_id = "forkSnapshot", tag = "snapshots",
    params(("id" = String, Path, description = "Id or name")),
    request_body = ForkRequest,
    responses(
        (status = 201, description = "Sandboxes made; some may have failed", body = ForkBody),
        (status = 400, description = "The request makes no sense", body = ErrorBody),
        (status = 404, description = "Snapshot not found", body = ErrorBody),
        (status = 502, description = "None of them started", body = ErrorBody),
        (status = 503, description = "The daemon is shutting down", body = ErrorBody),
        (status = 429, description = "It would be more than the quota", body = ErrorBody),
    ),
)]
pub async fn fork(
    caller: Caller,
    Path(id): Path<String>,
    body: Result<Bytes, BytesRejection>,
) -> Result<(StatusCode, Json<ForkBody>), ApiError> {
    let request: ForkRequest = parse(body)?;
    let count = request.count.unwrap_or(1);
    answer(caller.manager.fork_snapshot(&id, count).await?)
}

/// Make sandboxes from another
///
/// Each goes on where that one is, as a machine of its own. One that runs stands still while its
/// memory is saved, and goes on.
#[utoipa::path(
    post, path = "/v1/sandboxes/{id}/fork", operation_id = "forkSandbox", tag = "sandboxes",
    params(("id" = String, Path)),
    request_body = ForkRequest,
    responses(
        (status = 201, description = "Sandboxes made; some may have failed", body = ForkBody),
        (status = 400, description = "The request makes no sense", body = ErrorBody),
        (status = 404, description = "Sandbox not found", body = ErrorBody),
        (status = 409, description = "Sandbox neither running nor paused", body = ErrorBody),
        (status = 502, description = "It was not saved, or none of them started",
            body = ErrorBody),
        (status = 503, description = "The daemon is shutting down", body = ErrorBody),
        (status = 429, description = "It would be more than the quota", body = ErrorBody),
    ),
)]
pub async fn fork_sandbox(
    caller: Caller,
    Path(id): Path<String>,
    body: Result<Bytes, BytesRejection>,
) -> Result<(StatusCode, Json<ForkBody>), ApiError> {
    let request: ForkRequest = parse(body)?;
    let count = request.count.unwrap_or(1);
    answer(caller.manager.fork(&id, count).await?)
}

fn answer(forked: Forked) -> Result<(StatusCode, Json<ForkBody>), ApiError> {
    match (forked.sandboxes.first(), forked.failed.first()) {
        (None, Some((_, reason))) => Err(ApiError::agent(format!(
            "none of {} sandboxes started; the first: {reason}",
            forked.failed.len()
        ))),
        _ => Ok((StatusCode::CREATED, Json(forked.into()))),
    }
}
