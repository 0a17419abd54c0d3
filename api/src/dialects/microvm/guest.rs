//! Other names for commands and files, as `py-microvm` has them.

use std::collections::BTreeMap;

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::rejection::BytesRejection;
use axum::extract::{Request, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

use super::at_vm::too_large;
use super::body::{FromFields, parse};
use super::error::{ApiError, ErrorBody};
use super::exec::{self, DEFAULT_TIMEOUT_SEC, TIMEOUT_SEC};
use super::extract::Path;
use super::fields::Fields;
use super::files;
use crate::dialects::output::{self, Encoding};
use crate::domain::check_path;
use crate::http::{AppState, Caller};

/// A command to run.
#[derive(Debug, ToSchema)]
pub struct GuestCommandRequest {
    /// For `sh -c`.
    #[schema(required)]
    pub command: String,
    /// Seconds after which it is killed, 1 to 3600.
    #[schema(default = 30, nullable = false)]
    pub timeout: Option<i64>,
    /// Its working directory.
    #[schema(nullable = false)]
    pub working_dir: Option<String>,
    /// Variables to set.
    #[schema(nullable = false)]
    pub env: Option<BTreeMap<String, String>>,
}

impl FromFields for GuestCommandRequest {
    fn read(fields: &mut Fields) -> Self {
        let command = fields.required("command", Fields::string);
        Self {
            command: command.unwrap_or_default(),
            timeout: fields.integer("timeout", TIMEOUT_SEC),
            working_dir: fields.checked("working_dir", check_path),
            env: fields.variables("env"),
        }
    }
}

/// What a command left behind.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = GuestCommandResponse)]
pub struct GuestCommandBody {
    /// Whether its exit status is 0.
    pub success: bool,
    /// Its exit status.
    pub exit_code: i32,
    /// Milliseconds from the request to its end.
    pub execution_time_ms: u64,
    /// What went wrong with it.
    pub error: Option<&'static str>,
    /// The same as a sentence.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub message: Option<String>,
    /// `utf-8`, or, if one of the outputs is not text, `base64` for both.
    #[schema(inline)]
    pub encoding: Encoding,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

/// The fields of that which are short.
#[derive(Serialize)]
struct Head {
    success: bool,
    exit_code: i32,
    execution_time_ms: u64,
    error: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    message: Option<String>,
    encoding: Encoding,
}

/// A file to upload.
#[derive(ToSchema)]
#[expect(dead_code, reason = "says what the form has in it")]
struct GuestUploadForm {
    /// Its content.
    #[schema(format = Binary, content_media_type = "application/octet-stream")]
    file: String,
    /// Absolute path in the machine.
    remote_path: String,
    /// Its permission bits, in octal digits; 644 if not given.
    permissions: Option<String>,
}

/// A file was uploaded.
#[derive(Debug, Serialize, ToSchema)]
pub struct GuestUploadBody {
    /// True: the answer to what failed has another status.
    pub success: bool,
    /// Where it is.
    pub remote_path: String,
    /// Its size.
    pub size_bytes: u64,
    /// SHA-256, as hexadecimal digits.
    pub checksum: String,
}

/// A file to download.
#[derive(Debug, ToSchema)]
pub struct GuestDownloadRequest {
    /// Absolute path in the machine.
    #[schema(required)]
    pub remote_path: String,
    /// The largest file that is wanted, in bytes.
    #[schema(nullable = false)]
    pub max_size: Option<u64>,
}

impl FromFields for GuestDownloadRequest {
    fn read(fields: &mut Fields) -> Self {
        let path = fields.required("remote_path", |fields, name| {
            fields.checked(name, check_path)
        });
        let max_size = fields.integer("max_size", 0..=i64::MAX);
        Self {
            remote_path: path.unwrap_or_default(),
            max_size: max_size.map(i64::cast_unsigned),
        }
    }
}

/// Execute a command
///
/// As `/execute`; `stdout` and `stderr` follow the fields of the answer.
#[utoipa::path(
    post, path = "/api/v1/vms/{vm_name}/guest/command", operation_id = "guestCommand", tag = "guest",
    params(("vm_name" = String, Path, description = "Its name or id")),
    request_body = GuestCommandRequest,
    responses(
        (status = 200, description = "It has ended", body = GuestCommandBody),
        (status = 404, description = "No such machine", body = ErrorBody),
        (status = 409, description = "It does not run", body = ErrorBody),
        (status = 413, description = "It wrote too much and was killed", body = ErrorBody),
        (status = 502, description = "The agent failed", body = ErrorBody),
        (status = 504, description = "It outran its timeout and was killed", body = ErrorBody),
    ),
)]
pub async fn command(
    caller: Caller,
    Path(name): Path<String>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let request: GuestCommandRequest = parse(body)?;
    let timeout_sec = request.timeout.unwrap_or(DEFAULT_TIMEOUT_SEC);
    let env = request.env.unwrap_or_default();
    let output = exec::run(
        &caller.manager,
        &name,
        &request.command,
        timeout_sec,
        request.working_dir,
        env,
    )
    .await?;
    let (status, exit_code, error) = exec::end_of(&output, timeout_sec);
    let (error, message) = error.unzip();
    let head = Head {
        success: exit_code == 0,
        exit_code,
        execution_time_ms: u64::try_from(output.duration.as_millis()).unwrap_or(u64::MAX),
        error,
        message,
        encoding: output::encoding(&output.stdout, &output.stderr),
    };
    exec::answer(status, &head, output)
}

/// Upload a file
///
/// As `/files/upload`, with the path in `remote_path`. The body is a form whatever its type is called.
#[utoipa::path(
    post, path = "/api/v1/vms/{vm_name}/guest/upload", operation_id = "guestUpload", tag = "guest",
    params(("vm_name" = String, Path, description = "Its name or id")),
    request_body(content = inline(GuestUploadForm), content_type = "multipart/form-data"),
    responses(
        (status = 200, description = "It is there", body = GuestUploadBody),
        (status = 404, description = "No such machine", body = ErrorBody),
        (status = 409, description = "It does not run", body = ErrorBody),
        (status = 413, description = "The file is too large", body = ErrorBody),
        (status = 422, description = "Fields are missing or wrong", body = ErrorBody),
        (status = 502, description = "The agent failed, such as on a full disk", body = ErrorBody),
    ),
)]
pub async fn upload(
    State(state): State<AppState>,
    caller: Caller,
    Path(name): Path<String>,
    request: Request,
) -> Result<Json<GuestUploadBody>, ApiError> {
    let (_, uploaded) = files::take_upload(
        &caller.manager,
        state.max_upload,
        &name,
        request,
        "remote_path",
    )
    .await?;
    Ok(Json(GuestUploadBody {
        success: true,
        remote_path: uploaded.path,
        size_bytes: uploaded.size,
        checksum: uploaded.digest.unwrap_or_default(),
    }))
}

/// Download a file
#[utoipa::path(
    post, path = "/api/v1/vms/{vm_name}/guest/download", operation_id = "guestDownload",
    tag = "guest",
    params(("vm_name" = String, Path, description = "Its name or id")),
    request_body = GuestDownloadRequest,
    responses(
        (status = 200, description = "All of it", content_type = "application/octet-stream"),
        (status = 404, description = "No such machine or file", body = ErrorBody),
        (status = 409, description = "It does not run", body = ErrorBody),
        (status = 413, description = "It is larger than is wanted", body = ErrorBody),
        (status = 422, description = "Fields are missing or wrong", body = ErrorBody),
        (status = 502, description = "The agent failed", body = ErrorBody),
    ),
)]
pub async fn download(
    caller: Caller,
    Path(name): Path<String>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let request: GuestDownloadRequest = parse(body)?;
    let file = files::open(&caller.manager, &name, &request.remote_path).await?;
    let is_too_large = match (file.size, request.max_size) {
        (Some(size), Some(max)) => size > max,
        _ => false,
    };
    if is_too_large {
        return Err(too_large("the file is larger than max_size"));
    }
    let kind = [(header::CONTENT_TYPE, "application/octet-stream")];
    let mut response = (kind, Body::from_stream(file.content)).into_response();
    if let Some(size) = file.size {
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_LENGTH, size.into());
    }
    Ok(response)
}
