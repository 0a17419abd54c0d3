//! `/v1/sandboxes`, and beside it `/v1/snapshots` and `/v1/templates`.

mod error;
mod exec;
mod files;
mod sandboxes;
mod snapshots;
mod templates;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::routing::{get, post};
use utoipa::OpenApi;

pub use error::ApiError;

use crate::http::{AppState, ErrorBody};

/// The description of this dialect.
#[derive(OpenApi)]
#[openapi(
    paths(
        sandboxes::create,
        sandboxes::list,
        sandboxes::get,
        sandboxes::destroy,
        sandboxes::pause,
        sandboxes::resume,
        exec::exec,
        files::write,
        files::read,
        snapshots::fork_sandbox,
        snapshots::create,
        snapshots::list,
        snapshots::get,
        snapshots::delete,
        snapshots::fork,
        templates::build,
        templates::list,
        templates::get,
        templates::progress,
        templates::delete,
    ),
    components(schemas(
        ErrorBody,
        sandboxes::CreateSandboxRequest,
        sandboxes::SandboxBody,
        sandboxes::TimingsBody,
        exec::ExecRequestBody,
        exec::ExecResponseBody,
        files::ReadFileRequestBody,
        snapshots::CreateSnapshotRequest,
        snapshots::SnapshotBody,
        snapshots::ForkRequest,
        snapshots::ForkBody,
        snapshots::ForkFailure,
        templates::BuildTemplateRequest,
        templates::RecipeBody,
        templates::StepBody,
        templates::OciBody,
        templates::ReadinessBody,
        templates::TemplateBody,
        templates::ProgressLine,
    ))
)]
pub struct Document;

/// The routes of this dialect.
pub fn router() -> Router<AppState> {
    let upload = post(files::write).layer(DefaultBodyLimit::disable());
    let archive = post(templates::build).layer(DefaultBodyLimit::disable());
    Router::new()
        .route(
            "/v1/sandboxes",
            post(sandboxes::create).get(sandboxes::list),
        )
        .route(
            "/v1/sandboxes/{id}",
            get(sandboxes::get).delete(sandboxes::destroy),
        )
        .route("/v1/sandboxes/{id}/exec", post(exec::exec))
        .route("/v1/sandboxes/{id}/pause", post(sandboxes::pause))
        .route("/v1/sandboxes/{id}/resume", post(sandboxes::resume))
        .route("/v1/sandboxes/{id}/fork", post(snapshots::fork_sandbox))
        .route(
            "/v1/snapshots",
            post(snapshots::create).get(snapshots::list),
        )
        .route(
            "/v1/snapshots/{id}",
            get(snapshots::get).delete(snapshots::delete),
        )
        .route("/v1/snapshots/{id}/fork", post(snapshots::fork))
        .route("/v1/templates", archive.get(templates::list))
        .route(
            "/v1/templates/{name}",
            get(templates::get).delete(templates::delete),
        )
        .route("/v1/templates/{name}/progress", get(templates::progress))
        .route("/v1/sandboxes/{id}/files/write", upload)
        .route("/v1/sandboxes/{id}/files/read", post(files::read))
}
