//! `/api/v1`.

mod accounts;
mod error;
mod fields;
mod health;

use axum::Router;
use axum::http::StatusCode;
use axum::middleware;
use axum::routing::{get, post};
use jiff::Timestamp;
use utoipa::OpenApi;

pub use error::{ApiError, ErrorBody, FieldError};
pub use fields::Fields;

use crate::http::AppState;

/// Where this dialect is served.
pub const BASE: &str = "/api/v1";

#[derive(OpenApi)]
#[openapi(
    paths(accounts::register, accounts::login, health::health),
    components(schemas(
        ErrorBody,
        accounts::RegisterRequest,
        accounts::UserBody,
        accounts::LoginRequest,
        accounts::TokenBody,
        health::HealthBody,
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
        .route("/health", get(health::health))
        .fallback(not_found)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(middleware::from_fn(error::name_failures));
    Router::new().nest(BASE, routes)
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
