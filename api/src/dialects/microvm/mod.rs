//! `/api/v1`.

mod accounts;
mod at_vm;
mod audit;
mod body;
mod error;
mod events;
mod exec;
mod extract;
mod fields;
mod files;
mod guest;
mod health;
mod metrics;
mod network;
mod ranges;
mod resources;
mod scans;
mod snapshots;
mod status;
mod vm_requests;
mod vms;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::http::StatusCode;
use axum::routing::{delete, get, post, put};
use jiff::Timestamp;
use utoipa::OpenApi;

pub use error::{ApiError, ErrorBody, FieldError, name_failures};
pub use fields::Fields;

use crate::http::AppState;

/// Where this dialect is served.
pub const BASE: &str = "/api/v1";

#[derive(OpenApi)]
#[openapi(
    paths(
        accounts::register,
        accounts::login,
        health::health,
        status::status,
        audit::logs,
        vms::list,
        vms::create,
        vms::get,
        vms::start,
        vms::stop,
        vms::restart,
        vms::delete,
        exec::execute,
        files::upload,
        files::download,
        files::list,
        guest::command,
        guest::upload,
        guest::download,
        snapshots::list,
        snapshots::create,
        snapshots::restore,
        snapshots::delete,
        metrics::get,
        metrics::system,
        resources::set,
        network::networks,
        network::get,
        network::open_forward,
        network::close_forward,
        scans::start,
        scans::get,
        events::of_vm,
        events::of_system,
    ),
    components(schemas(
        ErrorBody,
        accounts::RegisterRequest,
        accounts::UserBody,
        accounts::LoginRequest,
        accounts::TokenBody,
        health::HealthBody,
        status::StatusBody,
        audit::AuditLogsBody,
        audit::AuditLogBody,
    ))
)]
struct Microvm;

/// The description of this dialect.
pub fn document() -> utoipa::openapi::OpenApi {
    Microvm::openapi()
}

/// The routes of this dialect.
pub fn router() -> Router<AppState> {
    let routes = Router::new()
        .route("/auth/register", post(accounts::register))
        .route("/auth/login", post(accounts::login))
        .route("/health", health::route())
        .route("/status", get(status::status))
        .route("/vms", get(vms::list).post(vms::create))
        .route("/vms/{vm_name}", get(vms::get).delete(vms::delete))
        .nest("/vms/{vm_name}", of_one())
        .route("/system/metrics", get(metrics::system))
        .route("/networks", get(network::networks))
        .route("/system/events", get(events::of_system))
        .route("/security/audit-logs", get(audit::logs))
        .route("/security/scan", post(scans::start))
        .route("/security/scans/{scan_id}", get(scans::get))
        .fallback(not_found)
        .method_not_allowed_fallback(method_not_allowed);
    Router::new().nest(BASE, routes)
}

/// The routes of one virtual machine.
fn of_one() -> Router<AppState> {
    let upload = post(files::upload).layer(DefaultBodyLimit::disable());
    let guest_upload = post(guest::upload).layer(DefaultBodyLimit::disable());
    Router::new()
        .route("/start", post(vms::start))
        .route("/stop", post(vms::stop))
        .route("/restart", post(vms::restart))
        .route("/metrics", get(metrics::get))
        .route("/resources", put(resources::set))
        .route("/execute", post(exec::execute))
        .route("/files", get(files::list))
        .route("/files/upload", upload)
        .route("/files/download", get(files::download))
        .route("/guest/command", post(guest::command))
        .route("/guest/upload", guest_upload)
        .route("/guest/download", post(guest::download))
        .route("/snapshots", get(snapshots::list).post(snapshots::create))
        .route("/snapshots/{snapshot_name}", delete(snapshots::delete))
        .route(
            "/snapshots/{snapshot_name}/restore",
            post(snapshots::restore),
        )
        .route("/events", get(events::of_vm))
        .route("/network", get(network::get))
        .route("/network/port-forward", post(network::open_forward))
        .route(
            "/network/port-forward/{host_port}",
            delete(network::close_forward),
        )
}

/// RFC 3339 in UTC, to the second.
pub fn rfc3339(time: Timestamp) -> String {
    time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

async fn not_found() -> ApiError {
    ApiError::not_found("nothing is served at this path; /openapi.yaml lists what is")
}

async fn method_not_allowed() -> ApiError {
    ApiError::new(
        StatusCode::METHOD_NOT_ALLOWED,
        "method_not_allowed",
        "this path does not take this method; /openapi.yaml lists what it takes",
    )
}
