//! Upload and download a file.

use std::io;

use axum::body::{Body, Bytes};
use axum::extract::multipart::{Field, Multipart, MultipartError};
use axum::extract::rejection::BytesRejection;
use axum::extract::{FromRequest, Path, Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures_util::stream::{self, StreamExt};
use serde::Deserialize;
use tokio::sync::mpsc;
use utoipa::ToSchema;

use super::error::{ApiError, parse};
use crate::chain;
use crate::dialects::forms::{
    FORM_OVERHEAD, PIECES_IN_FLIGHT, SPOOL_MEMORY, announced, content, drain, ends_with_none,
    one_at_a_time,
};
use crate::domain::{InUse, Manager, Spool, Spooled};
use crate::http::{AppState, Caller, ErrorBody};

/// The longest `path` field that is read, in bytes; the domain allows less.
const MAX_PATH_FIELD: usize = 8 * 1024;
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
    if announced(&request)
        .is_some_and(|length| length > state.max_upload.saturating_add(FORM_OVERHEAD))
    {
        // A sender that asked first, and is now told no, sends nothing.
        if !request.headers().contains_key(header::EXPECT) {
            drain(request.into_body().into_data_stream(), state.max_upload).await;
        }
        return Err(over_limit(state.max_upload));
    }
    let request = request.map(|body| Body::from_stream(one_at_a_time(body.into_data_stream())));
    let form = Multipart::from_request(request, &())
        .await
        .map_err(|rejection| {
            ApiError::invalid(format!("expected multipart/form-data: {rejection}"))
        })?;
    let upload = Upload {
        manager: &caller.manager,
        in_use: &in_use,
        limit: state.max_upload,
    };
    upload.run(form).await?;
    Ok(StatusCode::NO_CONTENT)
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

/// An upload on its way into a sandbox.
struct Upload<'a> {
    manager: &'a Manager,
    in_use: &'a InUse,
    limit: u64,
}

impl Upload<'_> {
    async fn run(&self, mut form: Multipart) -> Result<(), ApiError> {
        let mut path = None;
        let mut waiting = None;
        while let Some(mut field) = form.next_field().await.map_err(|error| bad_form(&error))? {
            match field.name() {
                Some("path") if path.is_some() => {
                    return Err(ApiError::invalid("the form has more than one path"));
                }
                Some("path") => path = Some(read_text(&mut field).await?),
                Some("file") if waiting.is_none() => {
                    let result = match path.clone() {
                        Some(path) => self.pass_on(path, &mut field).await.map(|()| None),
                        None => self.spool(&mut field).await.map(Some),
                    };
                    match result {
                        Ok(None) => return Ok(()),
                        Ok(spooled) => waiting = spooled,
                        Err(error) => {
                            drain(field, self.limit).await;
                            return Err(error);
                        }
                    }
                }
                _ => {}
            }
        }
        let path = path.ok_or_else(|| ApiError::invalid("path is required"))?;
        let file = waiting.ok_or_else(|| ApiError::invalid("file is required"))?;
        Ok(self
            .manager
            .write_file(self.in_use, path, None, content(file))
            .await?)
    }

    /// Passes the file on as it comes, and no faster than the guest takes it.
    async fn pass_on(&self, path: String, field: &mut Field<'_>) -> Result<(), ApiError> {
        let (sender, mut pieces) = mpsc::channel(PIECES_IN_FLIGHT);
        let content = stream::poll_fn(move |context| pieces.poll_recv(context));
        let content = ends_with_none(content.boxed());
        let pump = async move {
            let mut total = 0;
            loop {
                let piece = match field.chunk().await {
                    Ok(piece) => piece,
                    Err(error) => return Err(bad_form(&error)),
                };
                let is_last = piece.is_none();
                total += piece.as_ref().map_or(0, |bytes| bytes.len() as u64);
                if total > self.limit {
                    return Err(over_limit(self.limit));
                }
                // Nobody takes pieces any more once the write has failed.
                if sender.send(piece).await.is_err() || is_last {
                    return Ok(());
                }
            }
        };
        let write = self.manager.write_file(self.in_use, path, None, content);
        let (pumped, written) = tokio::join!(pump, write);
        pumped?;
        Ok(written?)
    }

    async fn spool(&self, field: &mut Field<'_>) -> Result<Spooled, ApiError> {
        let failed = |error: io::Error| {
            ApiError::internal(format!("the file cannot be spooled to disk: {error}"))
        };
        let mut spool = Spool::new(&self.manager.limits().exec.spool_dir, SPOOL_MEMORY);
        while let Some(piece) = field.chunk().await.map_err(|error| bad_form(&error))? {
            if spool.len() + piece.len() as u64 > self.limit {
                return Err(over_limit(self.limit));
            }
            spool.push(&piece).await.map_err(failed)?;
        }
        spool.finish().await.map_err(failed)
    }
}

async fn read_text(field: &mut Field<'_>) -> Result<String, ApiError> {
    let mut text = Vec::new();
    while let Some(piece) = field.chunk().await.map_err(|error| bad_form(&error))? {
        if text.len() + piece.len() > MAX_PATH_FIELD {
            return Err(ApiError::invalid("path is longer than 4095 bytes"));
        }
        text.extend_from_slice(&piece);
    }
    String::from_utf8(text).map_err(|_| ApiError::invalid("path is not UTF-8"))
}

pub(super) fn bad_form(error: &MultipartError) -> ApiError {
    ApiError::invalid(format!("the form cannot be read: {}", chain(error)))
}
