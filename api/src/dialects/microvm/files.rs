//! Files: upload, download, list.

use std::collections::HashMap;

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures_util::stream::{self, StreamExt};
use jiff::Timestamp;
use serde::Serialize;
use utoipa::ToSchema;

use super::at_vm::{AtVm, too_large, wrong};
use super::error::{ApiError, ErrorBody};
use super::extract::{Path, Query};
use super::ranges::{Range, part_of};
use super::rfc3339;
use super::vms::{name_of, running};
use crate::dialects::upload::{self, Rules, UploadError, Uploaded};
use crate::domain::{FileContent, FileInfo, FileKind, MAX_DEPTH, Manager};
use crate::http::{AppState, Caller};

/// Permission bits of a file for which none are given.
const DEFAULT_MODE: u32 = 0o644;
/// The longest first line of a form that is looked at for its boundary, in bytes: RFC 2046 has 70 and
/// two dashes.
const MAX_BOUNDARY: usize = 72;

/// A file to upload.
#[derive(ToSchema)]
#[schema(as = VmUploadForm)]
#[allow(
    dead_code,
    reason = "only described by it: the form is read as a stream"
)]
pub(super) struct UploadForm {
    /// Absolute path in the machine.
    path: String,
    /// Permission bits as octal digits; 644 if not given.
    permissions: Option<String>,
    /// The file. If it comes last, it is passed on as it arrives; otherwise it waits on the daemon's
    /// disk for the other fields.
    #[schema(format = Binary, content_media_type = "application/octet-stream")]
    file: String,
}

/// A file was uploaded.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = VmUploaded)]
pub struct UploadedBody {
    /// A sentence.
    pub message: &'static str,
    /// The machine.
    pub vm_name: String,
    /// Where it is.
    pub remote_path: String,
    /// Its size.
    pub size_bytes: u64,
    /// When it was there.
    #[schema(format = DateTime)]
    pub uploaded_at: String,
}

/// What is in a directory.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = VmFileList)]
pub struct FileListBody {
    /// By path.
    pub files: Vec<FileBody>,
    /// The directory.
    pub directory: String,
}

/// A file.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = VmFile)]
pub struct FileBody {
    /// Its name.
    pub name: String,
    /// Its absolute path.
    pub path: String,
    /// Its size.
    pub size_bytes: u64,
    /// Whether it is a directory.
    pub is_directory: bool,
    /// Permission bits as octal digits.
    pub permissions: String,
    /// When it was last changed.
    #[schema(format = DateTime)]
    pub modified_at: String,
}

impl From<FileInfo> for FileBody {
    fn from(file: FileInfo) -> Self {
        let name = file.path.rsplit('/').next().unwrap_or_default();
        let time = Timestamp::from_microsecond(file.mtime_us).unwrap_or_default();
        Self {
            name: name.to_owned(),
            size_bytes: file.size,
            is_directory: file.kind == FileKind::Directory,
            permissions: format!("{:03o}", file.mode),
            modified_at: rfc3339(time),
            path: file.path,
        }
    }
}

/// Upload a file
///
/// It appears under its name only when all of it has arrived. Missing directories are made.
#[utoipa::path(
    post, path = "/api/v1/vms/{vm_name}/files/upload", operation_id = "uploadToVm", tag = "guest",
    params(("vm_name" = String, Path, description = "Its name or id")),
    request_body(content = inline(UploadForm), content_type = "multipart/form-data"),
    responses(
        (status = 200, description = "It is there", body = UploadedBody),
        (status = 400, description = "The form cannot be read", body = ErrorBody),
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
) -> Result<Json<UploadedBody>, ApiError> {
    let taken = take_upload(&caller.manager, state.max_upload, &name, request, "path").await;
    let (vm_name, uploaded) = taken?;
    Ok(Json(UploadedBody {
        message: "File uploaded successfully",
        vm_name,
        remote_path: uploaded.path,
        size_bytes: uploaded.size,
        uploaded_at: rfc3339(Timestamp::now()),
    }))
}

/// Takes a form with a file, whose path is in this field. Returns the name of the machine, too.
pub async fn take_upload(
    manager: &Manager,
    limit: u64,
    name: &str,
    request: Request,
    path: &'static str,
) -> Result<(String, Uploaded), ApiError> {
    let in_use = running(manager, name).await?;
    let rules = Rules {
        path,
        mode: Some(DEFAULT_MODE),
        with_digest: true,
        limit,
    };
    let request = with_boundary(request).await?;
    let uploaded = upload::take(manager, &in_use, request, rules).await;
    Ok((
        name_of(&in_use.sandbox),
        uploaded.map_err(|error| error.at_vm(name))?,
    ))
}

impl AtVm for UploadError {
    fn at_vm(self, name: &str) -> ApiError {
        match self {
            Self::TooLarge(_) => too_large(self.to_string()),
            Self::Form(problem) => ApiError::bad_request(problem),
            Self::Field { field, problem } => wrong(field, problem),
            Self::File(source) => source.at_vm(name),
            Self::TooManyWait(why) => ApiError::too_many(why, None),
            Self::Spool(_) => ApiError::internal(&self),
        }
    }
}

/// A request whose header says that it is a form. Some clients send one with another content type: its
/// first line is the boundary then.
async fn with_boundary(mut request: Request) -> Result<Request, ApiError> {
    let kind = request.headers().get(header::CONTENT_TYPE);
    let kind = kind.and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    if kind
        .trim_start()
        .to_ascii_lowercase()
        .starts_with("multipart/")
    {
        return Ok(request);
    }
    let not_a_form = || ApiError::bad_request("expected multipart/form-data");
    let body = std::mem::take(request.body_mut());
    let mut pieces = body.into_data_stream();
    let mut begin: Vec<u8> = Vec::new();
    let boundary = loop {
        if let Some(end) = begin.windows(2).position(|pair| pair == b"\r\n") {
            break begin[..end].to_vec();
        }
        match pieces.next().await {
            Some(Ok(piece)) if begin.len() <= MAX_BOUNDARY => begin.extend_from_slice(&piece),
            _ => return Err(not_a_form()),
        }
    };
    let boundary = boundary
        .strip_prefix(b"--")
        .filter(|rest| !rest.is_empty() && rest.len() <= MAX_BOUNDARY - 2)
        .and_then(|rest| std::str::from_utf8(rest).ok())
        .filter(|rest| !rest.contains(['"', '\\']))
        .ok_or_else(not_a_form)?;
    let kind = HeaderValue::from_str(&format!("multipart/form-data; boundary=\"{boundary}\""));
    let headers = request.headers_mut();
    headers.insert(header::CONTENT_TYPE, kind.map_err(|_| not_a_form())?);
    let begin = stream::iter([Ok(Bytes::from(begin))]);
    *request.body_mut() = Body::from_stream(begin.chain(pieces));
    Ok(request)
}

/// Download a file
///
/// Takes `Range` with one range.
#[utoipa::path(
    get, path = "/api/v1/vms/{vm_name}/files/download", operation_id = "downloadFromVm",
    tag = "guest",
    params(
        ("vm_name" = String, Path, description = "Its name or id"),
        ("path" = String, Query, description = "Absolute path in the machine"),
    ),
    responses(
        (status = 200, description = "All of it", content_type = "application/octet-stream"),
        (status = 206, description = "The range", content_type = "application/octet-stream"),
        (status = 404, description = "No such machine or file", body = ErrorBody),
        (status = 409, description = "It does not run", body = ErrorBody),
        (status = 416, description = "It has no such range", body = ErrorBody),
        (status = 502, description = "The agent failed", body = ErrorBody),
    ),
)]
pub async fn download(
    caller: Caller,
    Path(name): Path<String>,
    Query(query): Query<HashMap<String, String>>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let path = query
        .get("path")
        .ok_or_else(|| ApiError::bad_parameter("path", "is required"))?;
    let file = open(&caller.manager, &name, path).await?;
    let range = headers.get(header::RANGE).filter(|_| file.size.is_some());
    let range = range
        .and_then(|range| range.to_str().ok())
        .and_then(Range::parse);
    let size = file.size.unwrap_or(0);
    let (status, part) = match range.map(|range| range.within(size)) {
        None => (StatusCode::OK, None),
        Some(Some(part)) => (StatusCode::PARTIAL_CONTENT, Some(part)),
        Some(None) => {
            let error = ApiError::new(
                StatusCode::RANGE_NOT_SATISFIABLE,
                "range_not_satisfiable",
                format!("the file has {size} bytes, and not that range"),
            );
            let range = [(header::CONTENT_RANGE, format!("bytes */{size}"))];
            return Ok((range, error).into_response());
        }
    };
    let body = match part {
        Some((start, end)) => Body::from_stream(part_of(file.content, start, end - start + 1)),
        None => Body::from_stream(file.content),
    };
    let mut response = (status, body).into_response();
    let headers = response.headers_mut();
    let binary = HeaderValue::from_static("application/octet-stream");
    headers.insert(header::CONTENT_TYPE, binary);
    headers.insert(header::ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    if let Ok(disposition) = HeaderValue::from_str(&disposition(path)) {
        headers.insert(header::CONTENT_DISPOSITION, disposition);
    }
    match (part, file.size) {
        (Some((start, end)), _) => {
            headers.insert(header::CONTENT_LENGTH, (end - start + 1).into());
            let range = format!("bytes {start}-{end}/{size}");
            if let Ok(range) = HeaderValue::from_str(&range) {
                headers.insert(header::CONTENT_RANGE, range);
            }
        }
        (None, Some(size)) => {
            headers.insert(header::CONTENT_LENGTH, size.into());
        }
        (None, None) => {}
    }
    Ok(response)
}

/// A file of a machine that runs.
pub async fn open(manager: &Manager, name: &str, path: &str) -> Result<FileContent, ApiError> {
    let in_use = running(manager, name).await?;
    let file = manager.read_file(in_use, path.to_owned()).await;
    file.map_err(|error| error.at_vm(name))
}

/// How a browser is to keep a file: under its name, RFC 6266.
fn disposition(path: &str) -> String {
    let name = path.rsplit('/').next().unwrap_or_default();
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$&+-.^_`|~".contains(&byte);
    let plain: String = name
        .chars()
        .map(|char| match u8::try_from(char) {
            Ok(byte) if is_plain(byte) => char,
            _ => '_',
        })
        .collect();
    if plain == name {
        return format!("attachment; filename=\"{name}\"");
    }
    let mut encoded = String::new();
    for byte in name.bytes() {
        match is_plain(byte) {
            true => encoded.push(byte.into()),
            false => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    format!("attachment; filename=\"{plain}\"; filename*=UTF-8''{encoded}")
}

/// List files
#[utoipa::path(
    get, path = "/api/v1/vms/{vm_name}/files", operation_id = "listVmFiles", tag = "guest",
    params(
        ("vm_name" = String, Path, description = "Its name or id"),
        ("path" = Option<String>, Query, description = "The directory, absolute; `/` if not given"),
        ("recursive" = Option<bool>, Query, description = "Whether those below it are listed too, at \
            most 64 levels and 50000 files; symbolic links are not followed"),
    ),
    responses(
        (status = 200, description = "What is in it", body = FileListBody),
        (status = 400, description = "It is no directory, or has too much in it", body = ErrorBody),
        (status = 404, description = "No such machine or directory", body = ErrorBody),
        (status = 409, description = "It does not run", body = ErrorBody),
        (status = 502, description = "The agent failed", body = ErrorBody),
    ),
)]
pub async fn list(
    caller: Caller,
    Path(name): Path<String>,
    Query(query): Query<HashMap<String, String>>,
) -> Result<Json<FileListBody>, ApiError> {
    let path = query.get("path").map_or("/", String::as_str);
    let depth = match query.get("recursive").map(|word| is_true(word)) {
        None | Some(Some(false)) => 1,
        Some(Some(true)) => MAX_DEPTH,
        Some(None) => {
            return Err(ApiError::bad_parameter(
                "recursive",
                "must be true or false",
            ));
        }
    };
    let in_use = running(&caller.manager, &name).await?;
    let files = caller.manager.list_dir(&in_use, path, depth).await;
    let files = files.map_err(|error| error.at_vm(&name))?;
    Ok(Json(FileListBody {
        files: files.into_iter().map(Into::into).collect(),
        directory: path.to_owned(),
    }))
}

/// What a parameter of a query says, in any case: Python's words begin with a capital.
fn is_true(word: &str) -> Option<bool> {
    let is = |words: [&str; 2]| words.iter().any(|one| word.eq_ignore_ascii_case(one));
    if is(["true", "1"]) {
        Some(true)
    } else {
        is(["false", "0"]).then_some(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_downloads_are_safe_in_a_header() {
        assert_eq!(disposition("/a/b.txt"), "attachment; filename=\"b.txt\"");
        assert_eq!(
            disposition("/a/x\"\r\n ä"),
            "attachment; filename=\"x_____\"; filename*=UTF-8''x%22%0D%0A%20%C3%A4"
        );
    }
}
