//! `/v1/sandboxes` and `/v1/snapshots`.

mod error;
mod exec;
mod files;
mod network;
mod sandboxes;
mod snapshots;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::routing::{delete, get, post, put};
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
        network::get,
        network::set_egress,
        network::open_forward,
        network::close_forward,
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
        network::NetworkRequest,
        network::NetworkBody,
        network::EgressBody,
        network::AllowRuleBody,
        network::RateLimitsBody,
        network::ForwardRequest,
        network::ForwardBody,
        network::TrafficBody,
        network::CounterBody,
        network::DeniedBody,
    ))
)]
pub struct Document;

/// The routes of this dialect.
pub fn router() -> Router<AppState> {
    let upload = post(files::write).layer(DefaultBodyLimit::disable());
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
        .route("/v1/sandboxes/{id}/network", get(network::get))
        .route(
            "/v1/sandboxes/{id}/network/egress",
            put(network::set_egress),
        )
        .route(
            "/v1/sandboxes/{id}/network/forwards",
            post(network::open_forward),
        )
        .route(
            "/v1/sandboxes/{id}/network/forwards/{transport}/{host}",
            delete(network::close_forward),
        )
        .route("/v1/sandboxes/{id}/files/write", upload)
        .route("/v1/sandboxes/{id}/files/read", post(files::read))
}
