//! Create, list, get, destroy; pause and resume.

use std::net::Ipv4Addr;

use axum::Json;
use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::http::StatusCode;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::error::{ApiError, parse};
use super::extract::{Path, Query};
use super::network::NetworkRequest;
use crate::domain::{CreateSpec, Sandbox, Start, Status, Timings};
use crate::http::{Caller, ErrorBody};

/// What the sandbox shall be made of. A field that is missing or null has its default.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(default)]
pub struct CreateSandboxRequest {
    /// Template of the root disk, or name or id of a snapshot. One with memory goes on where it was
    /// taken, with its vCPUs and RAM; from one without, the sandbox boots. It is connected as the
    /// sandbox was that the snapshot is of, but for what `network` says.
    #[schema(default = "minimal", nullable = false)]
    pub template: Option<String>,
    /// Virtual CPUs, 1 to 32. What the template says if not given, or 1.
    #[schema(nullable = false)]
    pub vcpus: Option<i64>,
    /// RAM in MiB, 128 to what the host has. What the template says if not given, or 512.
    #[schema(nullable = false)]
    pub memory_mb: Option<i64>,
    /// Idle time in seconds after which the sandbox is set aside: paused, unless the daemon is set
    /// up to delete it. 0 is never.
    #[schema(default = 300, nullable = false)]
    pub timeout_sec: Option<i64>,
    /// How it shall be connected. An extension.
    #[schema(nullable = false)]
    pub network: Option<NetworkRequest>,
}

/// Which sandboxes to list.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct ListParams {
    /// Also those that are stopped or in error.
    all: bool,
}

/// A sandbox.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Sandbox)]
pub struct SandboxBody {
    /// Its name.
    #[schema(example = "sb-0a1b2c3d")]
    pub id: String,
    /// The user's name for it, if it has one: it was made by `/api/v1`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub name: Option<String>,
    /// Where it stands.
    pub status: StatusBody,
    /// Why it is `stopped` or `error`, or why the last resume left it `paused`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub status_reason: Option<String>,
    /// Template of its root disk, or the snapshot that it was made from, as its creator called it.
    pub template: String,
    /// Virtual CPUs.
    pub vcpus: u8,
    /// RAM in MiB.
    pub memory_mb: u32,
    /// Idle time in seconds; 0 is never.
    pub timeout_sec: u32,
    /// Its address in the network of the sandboxes, if it has a network card.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false, value_type = Option<String>, format = Ipv4)]
    pub guest_ip: Option<Ipv4Addr>,
    /// Where this host reaches it. No address is translated on that way, so it is `guest_ip`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false, value_type = Option<String>, format = Ipv4)]
    pub host_ip: Option<Ipv4Addr>,
    /// When it was asked for.
    #[schema(value_type = String, format = DateTime)]
    pub created_at: String,
    /// When its agent first answered.
    #[schema(value_type = Option<String>, format = DateTime)]
    pub started_at: Option<String>,
    /// When it was last used.
    #[schema(value_type = Option<String>, format = DateTime)]
    pub last_active_at: Option<String>,
    /// When this record last changed.
    #[schema(value_type = String, format = DateTime)]
    pub last_updated: String,
    /// How long its last start took, once it has started.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub timings_ms: Option<TimingsBody>,
}

/// Where a sandbox stands.
#[derive(Debug, Clone, Copy, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
#[schema(as = SandboxStatus)]
pub enum StatusBody {
    /// It is being started; its agent has not answered yet.
    Pending,
    /// Its agent has answered.
    Running,
    /// It is saved to disk and has no processes; or it is on the way there or back.
    Paused,
    /// It ended as it was meant to, and will not run again; or, if it is listed, it is powered off
    /// and its disk is kept: `/api/v1` starts it.
    Stopped,
    /// It did not start, or ended as it was not meant to.
    Error,
}

impl From<Status> for StatusBody {
    fn from(status: Status) -> Self {
        match status {
            Status::Pending => Self::Pending,
            Status::Running => Self::Running,
            Status::Pausing | Status::Paused | Status::Resuming => Self::Paused,
            Status::Stopping | Status::Off | Status::Stopped => Self::Stopped,
            Status::Error => Self::Error,
        }
    }
}

/// How long each phase of a start took, in milliseconds.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Timings)]
pub struct TimingsBody {
    /// What kind of start it was.
    #[schema(inline)]
    pub start: StartBody,
    /// Directories, disk overlay and sockets were made.
    pub prepare: f64,
    /// Start of the VMM's process to just before the guest's first instruction, or to the moment
    /// that a restored guest ran again.
    pub vmm: f64,
    /// From there to the agent's first words after a boot; 0 after a restore.
    pub boot: f64,
    /// From there until the agent has answered, and the guest has its names and the time.
    pub identity: f64,
    /// From there until the readiness command of the template has succeeded, if it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub readiness: Option<f64>,
    /// All of it.
    pub total: f64,
}

/// What kind of start it was.
#[derive(Debug, Clone, Copy, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum StartBody {
    /// The kernel was booted.
    Cold,
    /// The kernel was booted, for the warm snapshot of the template did not start.
    ColdFallback,
    /// From the warm snapshot of the template.
    Warm,
    /// The same, by a VMM that was there already and had restored it.
    Pool,
    /// From a snapshot or another sandbox.
    Fork,
    /// From what was saved by a pause.
    Resume,
}

impl From<Start> for StartBody {
    fn from(start: Start) -> Self {
        match start {
            Start::Cold => Self::Cold,
            Start::ColdFallback => Self::ColdFallback,
            Start::Warm => Self::Warm,
            Start::Pool => Self::Pool,
            Start::Fork => Self::Fork,
            Start::Resume => Self::Resume,
        }
    }
}

impl From<Timings> for TimingsBody {
    #[expect(
        clippy::cast_precision_loss,
        reason = "exact up to 2^53 µs, which is 285 years"
    )]
    fn from(timings: Timings) -> Self {
        let ms = |us: u64| us as f64 / 1000.0;
        Self {
            start: timings.start.into(),
            prepare: ms(timings.prepare_us),
            vmm: ms(timings.vmm_us),
            boot: ms(timings.boot_us),
            identity: ms(timings.identity_us),
            readiness: (timings.readiness_us > 0).then(|| ms(timings.readiness_us)),
            total: ms(timings.total_us),
        }
    }
}

impl From<Sandbox> for SandboxBody {
    fn from(sandbox: Sandbox) -> Self {
        let template = sandbox.made_from().to_owned();
        Self {
            id: sandbox.id.into(),
            name: sandbox.name,
            status: sandbox.status.into(),
            status_reason: sandbox.status_reason,
            template,
            vcpus: sandbox.spec.vcpus,
            memory_mb: sandbox.spec.memory_mb,
            timeout_sec: sandbox.spec.timeout_sec,
            guest_ip: sandbox.address,
            host_ip: sandbox.address,
            created_at: rfc3339(sandbox.created_at),
            started_at: sandbox.started_at.map(rfc3339),
            last_active_at: sandbox.last_active_at.map(rfc3339),
            last_updated: rfc3339(sandbox.updated_at),
            timings_ms: sandbox.timings.map(Into::into),
        }
    }
}

/// RFC 3339 in UTC, to the second.
pub fn rfc3339(time: Timestamp) -> String {
    time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// Create a sandbox
#[utoipa::path(
    post, path = "/v1/sandboxes", operation_id = "createSandbox", tag = "sandboxes",
    request_body = CreateSandboxRequest,
    responses(
        (status = 201, description = "Sandbox created; its agent has answered", body = SandboxBody),
        (status = 400, description = "The request makes no sense", body = ErrorBody),
        (status = 409, description = "The template is not ready, the address is taken, or none is free",
            body = ErrorBody),
        (status = 502, description = "Host agent error: it did not start", body = ErrorBody),
        (status = 503, description = "The daemon is shutting down", body = ErrorBody),
        (status = 429, description = "It would be more than the quota", body = ErrorBody),
    ),
)]
pub async fn create(
    caller: Caller,
    body: Result<Bytes, BytesRejection>,
) -> Result<(StatusCode, Json<SandboxBody>), ApiError> {
    let request: CreateSandboxRequest = parse(body)?;
    let spec = CreateSpec {
        template: request.template.unwrap_or_else(|| "minimal".to_owned()),
        vcpus: request.vcpus,
        memory_mb: request.memory_mb,
        timeout_sec: request.timeout_sec.unwrap_or(300),
        network: request.network.unwrap_or_default().spec()?,
        name: None,
        disk_mb: None,
        is_kept: false,
    };
    let sandbox = caller.manager.create(spec).await?;
    Ok((StatusCode::CREATED, Json(sandbox.into())))
}

/// List all sandboxes
///
/// Newest first, without those that are stopped or in error.
#[utoipa::path(
    get, path = "/v1/sandboxes", operation_id = "listSandboxes", tag = "sandboxes",
    params(("all" = Option<bool>, Query,
        description = "Also those that are stopped or in error; the latest thousand in all. An extension.")),
    responses(
        (status = 200, description = "List of sandboxes", body = Vec<SandboxBody>),
        (status = 400, description = "The query makes no sense", body = ErrorBody),
    ),
)]
pub async fn list(
    caller: Caller,
    Query(params): Query<ListParams>,
) -> Result<Json<Vec<SandboxBody>>, ApiError> {
    let sandboxes = match params.all {
        true => caller.manager.list_latest().await?,
        false => caller.manager.list().await?,
    };
    Ok(Json(sandboxes.into_iter().map(Into::into).collect()))
}

/// Get sandbox details
///
/// Also of one that is stopped or in error.
#[utoipa::path(
    get, path = "/v1/sandboxes/{id}", operation_id = "getSandbox", tag = "sandboxes",
    params(("id" = String, Path)),
    responses(
        (status = 200, description = "Sandbox details", body = SandboxBody),
        (status = 404, description = "Sandbox not found", body = ErrorBody),
    ),
)]
pub async fn get(caller: Caller, Path(id): Path<String>) -> Result<Json<SandboxBody>, ApiError> {
    Ok(Json(caller.manager.get(&id).await?.into()))
}

/// Destroy a sandbox
///
/// Its record stays, as `stopped`.
#[utoipa::path(
    delete, path = "/v1/sandboxes/{id}", operation_id = "destroySandbox", tag = "sandboxes",
    params(("id" = String, Path)),
    responses(
        (status = 204, description = "Sandbox destroyed"),
        (status = 404, description = "Sandbox not found", body = ErrorBody),
        (status = 502, description = "Something of it is left on the host", body = ErrorBody),
    ),
)]
pub async fn destroy(caller: Caller, Path(id): Path<String>) -> Result<StatusCode, ApiError> {
    caller.manager.destroy(&id).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Keep a sandbox from being idle
///
/// As a command does: it counts as used now.
#[utoipa::path(
    post, path = "/v1/sandboxes/{id}/ping", operation_id = "pingSandbox", tag = "sandboxes",
    params(("id" = String, Path)),
    responses(
        (status = 204, description = "It is used"),
        (status = 404, description = "Sandbox not found", body = ErrorBody),
        (status = 409, description = "Sandbox not running", body = ErrorBody),
    ),
)]
pub async fn ping(caller: Caller, Path(id): Path<String>) -> Result<StatusCode, ApiError> {
    let in_use = caller.manager.running(&id).await?;
    caller.manager.keep_awake(in_use).await;
    Ok(StatusCode::NO_CONTENT)
}

/// Pause a running sandbox
///
/// Its memory is saved to disk and its processes end, so that it costs disk space only. Commands
/// and transfers that are under way end with 409. If it cannot be saved, it runs on.
#[utoipa::path(
    post, path = "/v1/sandboxes/{id}/pause", operation_id = "pauseSandbox", tag = "sandboxes",
    params(("id" = String, Path)),
    responses(
        (status = 200, description = "Sandbox paused", body = SandboxBody),
        (status = 404, description = "Sandbox not found", body = ErrorBody),
        (status = 409, description = "Sandbox not running", body = ErrorBody),
        (status = 502, description = "It was not saved; if it still runs, the message says so",
            body = ErrorBody),
    ),
)]
pub async fn pause(caller: Caller, Path(id): Path<String>) -> Result<Json<SandboxBody>, ApiError> {
    Ok(Json(caller.manager.pause(&id).await?.into()))
}

/// Resume a paused sandbox
///
/// It goes on where it was when it was paused. If it does not, it is paused as before, can be
/// resumed again, and `status_reason` says why.
#[utoipa::path(
    post, path = "/v1/sandboxes/{id}/resume", operation_id = "resumeSandbox", tag = "sandboxes",
    params(("id" = String, Path)),
    responses(
        (status = 200, description = "Sandbox resumed; its agent has answered", body = SandboxBody),
        (status = 404, description = "Sandbox not found", body = ErrorBody),
        (status = 409, description = "Sandbox not paused", body = ErrorBody),
        (status = 502, description = "It was not resumed, and is paused as before",
            body = ErrorBody),
        (status = 503, description = "The daemon is shutting down", body = ErrorBody),
        (status = 429, description = "It would be more than the quota", body = ErrorBody),
    ),
)]
pub async fn resume(caller: Caller, Path(id): Path<String>) -> Result<Json<SandboxBody>, ApiError> {
    Ok(Json(caller.manager.resume(&id).await?.into()))
}
