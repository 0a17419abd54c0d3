//! What sandboxes write to their consoles.

use axum::http::header;
use axum::response::IntoResponse;

use super::error::ApiError;
use super::extract::Path;
use crate::http::{Caller, ErrorBody};

/// Get the console of a sandbox
///
/// What it has written since it was started, resumed or made: the kernel's messages, and what programs
/// write to `/dev/console`. Text without control characters; the last 4 MiB at most.
#[utoipa::path(
    get, path = "/v1/sandboxes/{id}/logs", operation_id = "getSandboxLogs", tag = "sandboxes",
    params(("id" = String, Path)),
    responses(
        (status = 200, description = "The console", body = String, content_type = "text/plain"),
        (status = 404, description = "Sandbox not found", body = ErrorBody),
        (status = 409, description = "Sandbox not running", body = ErrorBody),
        (status = 502, description = "It cannot be read", body = ErrorBody),
    ),
)]
pub async fn get(caller: Caller, Path(id): Path<String>) -> Result<impl IntoResponse, ApiError> {
    let mut text = caller.manager.console(&id).await?;
    if !text.is_empty() {
        text.push('\n');
    }
    Ok(([(header::CONTENT_TYPE, "text/plain; charset=utf-8")], text))
}
