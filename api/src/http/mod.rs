//! What all dialects share: the router, request ids and logs, the check of who may call, errors
//! of requests that no dialect answers, and the service's own description.

mod error;
mod guard;
mod openapi;
mod trace;

use axum::extract::DefaultBodyLimit;
use axum::response::IntoResponse;
use axum::routing::get;
use axum::{Json, Router, middleware};
use serde::Serialize;
use utoipa::ToSchema;

pub use error::{ErrorBody, ErrorDetail, error_response};
pub use openapi::{OpenApiError, document, json, yaml};

use crate::dialects::wrenn;
use crate::domain::Manager;

/// The largest JSON request body in bytes.
const MAX_JSON_BODY: usize = 1 << 20;

/// What the HTTP side needs.
#[derive(Clone)]
pub struct AppState {
    /// The owner of all sandboxes.
    pub manager: Manager,
    /// The largest file that may be uploaded, in bytes.
    pub max_upload: u64,
    /// The largest archive that a template may be built from, in bytes.
    pub max_archive: u64,
}

/// The health of the daemon.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Health)]
pub struct HealthBody {
    /// Always `healthy`: a daemon that is not does not answer.
    #[schema(example = "healthy")]
    pub status: &'static str,
    /// Name of the service.
    #[schema(example = "microvm-sandbox")]
    pub service: &'static str,
    /// Version of the service.
    #[schema(example = "0.1.0")]
    pub version: &'static str,
}

/// Tell that the daemon serves
#[utoipa::path(
    get, path = "/health", operation_id = "health", tag = "service",
    responses((status = 200, description = "The daemon serves", body = HealthBody)),
)]
pub(crate) async fn health() -> Json<HealthBody> {
    Json(HealthBody {
        status: "healthy",
        service: "microvm-sandbox",
        version: env!("CARGO_PKG_VERSION"),
    })
}

/// Everything that is served, on every listener.
///
/// # Errors
/// The description of the API cannot be written, which a test rules out.
pub fn router(state: AppState) -> Result<Router, OpenApiError> {
    let yaml = yaml()?;
    let json = json()?;
    Ok(Router::new()
        .route("/health", get(health))
        .route(
            "/openapi.yaml",
            get(move || async move { ([("content-type", "application/yaml")], yaml) }),
        )
        .route(
            "/openapi.json",
            get(move || async move { ([("content-type", "application/json")], json) }),
        )
        .merge(wrenn::router())
        .fallback(not_found)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(DefaultBodyLimit::max(MAX_JSON_BODY))
        .layer(middleware::from_fn(guard::loopback_only))
        .layer(middleware::from_fn(trace::trace))
        .with_state(state))
}

async fn not_found() -> impl IntoResponse {
    error_response(
        axum::http::StatusCode::NOT_FOUND,
        "not_found",
        "nothing is served at this path; /openapi.yaml lists what is".to_owned(),
    )
}

async fn method_not_allowed() -> impl IntoResponse {
    error_response(
        axum::http::StatusCode::METHOD_NOT_ALLOWED,
        "method_not_allowed",
        "this path does not take this method; /openapi.yaml lists what it takes".to_owned(),
    )
}
