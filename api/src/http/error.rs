//! The shape of errors.

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

/// An error.
#[derive(Debug, Clone, Serialize, ToSchema)]
#[schema(as = Error)]
pub struct ErrorBody {
    /// What went wrong.
    pub error: ErrorDetail,
}

/// What went wrong.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct ErrorDetail {
    /// For programs.
    #[schema(example = "not_found")]
    pub code: String,
    /// For people: what was wrong, what was expected, what to do.
    #[schema(example = "sandbox not found")]
    pub message: String,
}

/// The answer that tells of an error.
pub fn error_response(status: StatusCode, code: &str, message: String) -> Response {
    let error = ErrorDetail {
        code: code.to_owned(),
        message,
    };
    (status, Json(ErrorBody { error })).into_response()
}
