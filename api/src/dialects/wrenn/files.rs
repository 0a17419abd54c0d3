//! Upload and download a file.

use axum::body::{Body, Bytes};
use axum::extract::rejection::BytesRejection;
use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use utoipa::ToSchema;

use super::error::{ApiError, parse};
use super::extract::Path;
use crate::chain;
use crate::dialects::upload::{self, Rules, UploadError};
use crate::http::{AppState, Caller, ErrorBody};

/// A file to upload.
#[derive(ToSchema)]
#[allow(
    dead_code,
    reason = "only described by it: the form is read as a stream"
)]
pub(super) struct UploadForm {
    /// Absolute destination path inside the sandbox. Comes best before `file`: after it, the file
    /// waits on the daemon's disk until the path is known.
    path: String,
    /// File content
    #[schema(format = Binary, content_media_type = "application/octet-stream")]
    file: String,
}

/// A file to download.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = ReadFileRequest)]
pub struct ReadFileRequestBody {
    /// Absolute file path inside the sandbox
    #[serde(default)]
    #[schema(required)]
    pub path: String,
}

/// Upload a file
///
/// The file appears under its name only when all of it has arrived. Missing directories are made.
#[utoipa::path(
    post, path = "/v1/sandboxes/{id}/files/write", operation_id = "uploadFile", tag = "sandboxes",
    params(("id" = String, Path)),
    request_body(content = inline(UploadForm), content_type = "multipart/form-data"),
    responses(
        (status = 204, description = "File uploaded"),
        (status = 400, description = "The request makes no sense", body = ErrorBody),
        (status = 404, description = "Sandbox not found", body = ErrorBody),
        (status = 409, description = "Sandbox not running", body = ErrorBody),
        (status = 413, description = "File too large", body = ErrorBody),
        (status = 502, description = "The agent failed, such as on a full disk", body = ErrorBody),
    ),
)]
pub async fn write(
    State(state): State<AppState>,
    caller: Caller,
    Path(id): Path<String>,
    request: Request,
) -> Result<StatusCode, ApiError> {
    let in_use = caller.manager.running(&id).await?;
    let rules = Rules {
        path: "path",
        mode: None,
        with_digest: false,
        limit: state.max_upload,
    };
    upload::take(&caller.manager, &in_use, request, rules).await?;
    Ok(StatusCode::NO_CONTENT)
}

impl From<UploadError> for ApiError {
    fn from(source: UploadError) -> Self {
        match source {
            UploadError::TooLarge(limit) => over_limit(limit),
            UploadError::Form(_) | UploadError::Field { .. } => Self::invalid(source.to_string()),
            UploadError::File(source) => source.into(),
            UploadError::TooManyWait(why) => {
                Self::new(StatusCode::TOO_MANY_REQUESTS, "quota_exceeded", why)
            }
            UploadError::Spool(_) => Self::internal(chain(&source)),
        }
    }
}

fn over_limit(limit: u64) -> ApiError {
    const MIB: u64 = 1 << 20;
    if limit.is_multiple_of(MIB) {
        ApiError::too_large(format!("file exceeds {} MB limit", limit / MIB))
    } else {
        ApiError::too_large(format!("file exceeds the limit of {limit} bytes"))
    }
}

/// Download a file
#[utoipa::path(
    post, path = "/v1/sandboxes/{id}/files/read", operation_id = "downloadFile", tag = "sandboxes",
    params(("id" = String, Path)),
    request_body = ReadFileRequestBody,
    responses(
        (status = 200, description = "File content", content_type = "application/octet-stream",
            body = inline(BinaryBody)),
        (status = 400, description = "The request makes no sense", body = ErrorBody),
        (status = 404, description = "Sandbox or file not found", body = ErrorBody),
        (status = 409, description = "Sandbox not running", body = ErrorBody),
        (status = 502, description = "The agent failed", body = ErrorBody),
    ),
)]
pub async fn read(
    caller: Caller,
    Path(id): Path<String>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let in_use = caller.manager.running(&id).await?;
    let request: ReadFileRequestBody = parse(body)?;
    let file = caller.manager.read_file(in_use, request.path).await?;
    let body = Body::from_stream(file.content);
    let mut response = ([(header::CONTENT_TYPE, "application/octet-stream")], body).into_response();
    if let Some(size) = file.size {
        response
            .headers_mut()
            .insert(header::CONTENT_LENGTH, size.into());
    }
    Ok(response)
}

/// Bytes.
#[derive(ToSchema)]
#[schema(value_type = String, format = Binary)]
#[allow(
    dead_code,
    reason = "only described by it: the content is written as a stream"
)]
pub(super) struct BinaryBody(Vec<u8>);
