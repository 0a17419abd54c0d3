//! What all dialects share: the router, request ids and logs, the check of who may call, errors
//! of requests that no dialect answers, and the service's own description.

mod auth;
mod docs;
mod error;
mod guard;
mod headers;
mod metrics;
mod openapi;
mod rate;
mod record;
mod serve;
mod slow;
mod sockets;
mod trace;
mod unread;

use axum::extract::DefaultBodyLimit;
use axum::http::{StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router, middleware};
use serde::Serialize;
use utoipa::ToSchema;

pub use auth::{API_KEY, Access, Caller, Identified, OPEN, identify, refused_at_port};
pub use error::{ErrorBody, ErrorDetail, error_response};
pub use openapi::{OpenApiError, document, json, yaml};

pub use rate::{RateLimiter, Rates};
pub use record::LoggedIn;
pub use serve::{Stop, serve};
pub use slow::{Pace, Patience};
pub use sockets::{BEARER, MAX_SOCKETS, SocketPermit, Sockets};
pub use trace::RequestId;

use crate::audit::AuditLog;
use crate::dialects::{microvm, wrenn};
use crate::domain::{Manager, Principal};
use crate::identity::Identity;
use crate::metrics::Metrics;
use crate::scan::Scans;

/// The largest JSON request body in bytes.
const MAX_JSON_BODY: usize = 1 << 20;

/// What the HTTP side needs.
#[derive(Clone)]
pub struct AppState {
    /// The owner of all sandboxes, which handlers have by way of [`Caller`].
    pub manager: Unscoped,
    /// Users and API keys.
    pub identity: Identity,
    /// Who may come in without credentials.
    pub access: Access,
    /// How many requests each may make.
    pub rates: RateLimiter,
    /// What was done.
    pub audit: AuditLog,
    /// Security scans.
    pub scans: Scans,
    /// WebSockets that are open.
    pub sockets: Sockets,
    /// What was counted.
    pub metrics: Metrics,
    /// How long bodies of requests may take to come.
    pub patience: Patience,
    /// The largest file that may be uploaded, in bytes.
    pub max_upload: u64,
    /// The largest archive that a template may be built from, in bytes.
    pub max_archive: u64,
}

/// A manager that acts for nobody yet, and so is of no use to a handler.
#[derive(Clone)]
pub struct Unscoped(Manager);

impl Unscoped {
    /// The manager, acting for this principal.
    pub fn acting_for(&self, principal: Principal) -> Manager {
        self.0.acting_for(principal)
    }
}

impl From<Manager> for Unscoped {
    fn from(manager: Manager) -> Self {
        Self(manager)
    }
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
        .route("/metrics", get(metrics::metrics))
        .route(
            "/openapi.yaml",
            get(move || async move { ([("content-type", "application/yaml")], yaml) }),
        )
        .route(
            "/openapi.json",
            get(move || async move { ([("content-type", "application/json")], json) }),
        )
        .merge(docs::router())
        // Not to what follows: answers of programs in sandboxes are among that.
        .layer(middleware::from_fn(headers::for_browsers))
        .merge(wrenn::router())
        .merge(microvm::router())
        .fallback(not_found)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(DefaultBodyLimit::max(MAX_JSON_BODY))
        // Within the check of who calls, for the audit log tells of it, and not to requests that go to the
        // ports of sandboxes.
        .layer(middleware::from_fn_with_state(state.patience, slow::bound))
        .layer(middleware::from_fn_with_state(
            state.clone(),
            auth::authenticate,
        ))
        .layer(middleware::from_fn_with_state(
            state.clone(),
            wrenn::by_header,
        ))
        .layer(middleware::from_fn_with_state(
            state.access,
            guard::loopback_only,
        ))
        // Outside of the guard: it admits whom the guard does not, to the ports of sandboxes alone.
        .layer(middleware::from_fn_with_state(
            state.clone(),
            wrenn::by_host,
        ))
        // Outside of the check of who calls, and of the audit log, which may fail too.
        .layer(middleware::from_fn(microvm::name_failures))
        .layer(middleware::from_fn(trace::trace))
        .layer(middleware::from_fn(unread::drain))
        .with_state(state))
}

/// The answer to a request that no handler sees, in the shape of the dialect of its path.
pub fn refuse(path: &str, status: StatusCode, code: &'static str, message: &str) -> Response {
    if auth::is_microvm(path) {
        microvm::ApiError::new(status, code, message).into_response()
    } else {
        error_response(status, code, message.to_owned())
    }
}

async fn not_found(uri: Uri) -> Response {
    refuse(
        uri.path(),
        StatusCode::NOT_FOUND,
        "not_found",
        "nothing is served at this path; /openapi.yaml lists what is",
    )
}

async fn method_not_allowed() -> impl IntoResponse {
    error_response(
        StatusCode::METHOD_NOT_ALLOWED,
        "method_not_allowed",
        "this path does not take this method; /openapi.yaml lists what it takes".to_owned(),
    )
}
