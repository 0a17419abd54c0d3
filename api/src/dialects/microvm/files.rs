//! Files: upload, download, list.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::multipart::{Field, Multipart};
use axum::extract::{FromRequest, Path, Query, Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures_util::stream::{self, BoxStream, StreamExt};
use jiff::Timestamp;
use serde::Serialize;
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;
use utoipa::ToSchema;

use super::at_vm::{AtVm, too_large, wrong};
use super::error::{ApiError, ErrorBody};
use super::rfc3339;
use super::vms::{find, name_of};
use crate::dialects::forms::{
    FORM_OVERHEAD, PIECES_IN_FLIGHT, SPOOL_MEMORY, announced, content, drain, ends_with_none,
    one_at_a_time,
};
use crate::domain::{FileContent, FileInfo, FileKind, InUse, MAX_DEPTH, Manager, Spool, Spooled};
use crate::http::{AppState, Caller};

/// The longest text field of a form that is read, in bytes.
const MAX_TEXT: usize = 8 * 1024;
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
    let uploaded = take_upload(&caller.manager, state.max_upload, &name, request, "path").await?;
    Ok(Json(UploadedBody {
        message: "File uploaded successfully",
        vm_name: uploaded.vm_name,
        remote_path: uploaded.path,
        size_bytes: uploaded.size_bytes,
        uploaded_at: rfc3339(Timestamp::now()),
    }))
}

/// A file that was uploaded.
pub struct Uploaded {
    /// Into which machine.
    pub vm_name: String,
    /// Where it is.
    pub path: String,
    /// Its size.
    pub size_bytes: u64,
    /// SHA-256, as hexadecimal digits.
    pub digest: String,
}

/// Takes a form with a file, whose path is in this field.
pub async fn take_upload(
    manager: &Manager,
    limit: u64,
    name: &str,
    request: Request,
    path_field: &'static str,
) -> Result<Uploaded, ApiError> {
    let vm = find(manager, name).await?;
    let in_use = manager.running(name).await;
    let in_use = in_use.map_err(|error| error.at_vm(name))?;
    if announced(&request).is_some_and(|length| length > limit.saturating_add(FORM_OVERHEAD)) {
        // A sender that asked first, and is now told no, sends nothing.
        if !request.headers().contains_key(header::EXPECT) {
            drain(request.into_body().into_data_stream(), limit).await;
        }
        return Err(over_limit(limit));
    }
    let request = with_boundary(request).await?;
    let request = request.map(|body| Body::from_stream(one_at_a_time(body.into_data_stream())));
    let form = Multipart::from_request(request, &()).await;
    let form = form.map_err(|rejection| {
        ApiError::bad_request(format!("expected multipart/form-data: {rejection}"))
    })?;
    let upload = Upload {
        manager,
        in_use: &in_use,
        vm: name,
        limit,
        path_field,
        digest: Arc::default(),
    };
    let (path, size_bytes) = upload.run(form).await?;
    let digest = upload.digest.lock().unwrap_or_else(PoisonError::into_inner);
    Ok(Uploaded {
        vm_name: name_of(&vm),
        path,
        size_bytes,
        digest: crate::hex(&digest.clone().finalize()),
    })
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

fn over_limit(limit: u64) -> ApiError {
    too_large(format!("the file exceeds the limit of {limit} bytes"))
}

/// An upload on its way into a machine.
struct Upload<'a> {
    manager: &'a Manager,
    in_use: &'a InUse,
    vm: &'a str,
    limit: u64,
    path_field: &'static str,
    digest: Arc<Mutex<Sha256>>,
}

impl Upload<'_> {
    /// Where the file is, and its size.
    async fn run(&self, mut form: Multipart) -> Result<(String, u64), ApiError> {
        let (mut path, mut mode, mut waiting) = (None, None, None);
        while let Some(mut field) = form.next_field().await.map_err(|error| bad_form(&error))? {
            match field.name() {
                Some(name) if name == self.path_field && path.is_none() => {
                    path = Some(read_text(&mut field).await?);
                }
                Some("permissions") if mode.is_none() => {
                    mode = Some(permissions(&read_text(&mut field).await?)?);
                }
                Some("file") if waiting.is_none() => {
                    let result = match (path.clone(), mode) {
                        (Some(path), Some(mode)) => {
                            let size = self.pass_on(path.clone(), mode, &mut field).await;
                            size.map(|size| Err((path, size)))
                        }
                        _ => self.spool(&mut field).await.map(Ok),
                    };
                    match result {
                        Ok(Err(done)) => return Ok(done),
                        Ok(Ok(spooled)) => waiting = Some(spooled),
                        Err(error) => {
                            drain(field, self.limit).await;
                            return Err(error);
                        }
                    }
                }
                _ => {}
            }
        }
        let path = path.ok_or_else(|| wrong(self.path_field, "is required"))?;
        let file: Spooled = waiting.ok_or_else(|| wrong("file", "is required"))?;
        let size = file.len();
        let mode = mode.unwrap_or(DEFAULT_MODE);
        self.write(path.clone(), mode, content(file)).await?;
        Ok((path, size))
    }

    async fn write(
        &self,
        path: String,
        mode: u32,
        content: BoxStream<'static, std::io::Result<Bytes>>,
    ) -> Result<(), ApiError> {
        let digest = Arc::clone(&self.digest);
        let content = content.inspect(move |piece| {
            if let Ok(piece) = piece {
                let mut digest = digest.lock().unwrap_or_else(PoisonError::into_inner);
                digest.update(piece);
            }
        });
        let (manager, in_use) = (self.manager, self.in_use);
        let written = manager.write_file(in_use, path, Some(mode), content.boxed());
        written.await.map_err(|error| error.at_vm(self.vm))
    }

    /// Passes the file on as it comes, and no faster than the guest takes it. Returns its size.
    async fn pass_on(
        &self,
        path: String,
        mode: u32,
        field: &mut Field<'_>,
    ) -> Result<u64, ApiError> {
        let (sender, mut pieces) = mpsc::channel(PIECES_IN_FLIGHT);
        let content = stream::poll_fn(move |context| pieces.poll_recv(context));
        let content = ends_with_none(content.boxed());
        let pump = async move {
            let mut total = 0;
            loop {
                let piece = field.chunk().await.map_err(|error| bad_form(&error))?;
                let is_last = piece.is_none();
                total += piece.as_ref().map_or(0, |bytes| bytes.len() as u64);
                if total > self.limit {
                    return Err(over_limit(self.limit));
                }
                // Nobody takes pieces any more once the write has failed.
                if sender.send(piece).await.is_err() || is_last {
                    return Ok(total);
                }
            }
        };
        let (pumped, written) = tokio::join!(pump, self.write(path, mode, content));
        let size = pumped?;
        written?;
        Ok(size)
    }

    async fn spool(&self, field: &mut Field<'_>) -> Result<Spooled, ApiError> {
        let failed = |error: std::io::Error| ApiError::internal(&error);
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

fn bad_form(error: &axum::extract::multipart::MultipartError) -> ApiError {
    ApiError::bad_request(format!("the form cannot be read: {}", crate::chain(error)))
}

async fn read_text(field: &mut Field<'_>) -> Result<String, ApiError> {
    let name = field.name().unwrap_or_default().to_owned();
    let mut text = Vec::new();
    while let Some(piece) = field.chunk().await.map_err(|error| bad_form(&error))? {
        if text.len() + piece.len() > MAX_TEXT {
            return Err(wrong(&name, format!("is longer than {MAX_TEXT} bytes")));
        }
        text.extend_from_slice(&piece);
    }
    String::from_utf8(text).map_err(|_| wrong(&name, "is not UTF-8"))
}

fn permissions(text: &str) -> Result<u32, ApiError> {
    let is_octal = (3..=4).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit());
    let mode = u32::from_str_radix(text, 8).ok().filter(|_| is_octal);
    mode.ok_or_else(|| wrong("permissions", "must be 3 or 4 octal digits, as 644"))
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
    find(manager, name).await?;
    let in_use = manager.running(name).await;
    let in_use = in_use.map_err(|error| error.at_vm(name))?;
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

/// One range of a request, RFC 9110, section 14.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Range {
    From(u64, Option<u64>),
    Last(u64),
}

impl Range {
    /// `None` for what may be ignored: another unit, several ranges, or nonsense.
    fn parse(text: &str) -> Option<Self> {
        let (first, last) = text.strip_prefix("bytes=")?.split_once('-')?;
        let number = |digits: &str| {
            let is_number = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
            digits.parse().ok().filter(|_| is_number)
        };
        match (first, last) {
            ("", last) => Some(Self::Last(number(last)?)),
            (first, "") => Some(Self::From(number(first)?, None)),
            (first, last) => {
                let (first, last) = (number(first)?, number(last)?);
                (first <= last).then_some(Self::From(first, Some(last)))
            }
        }
    }

    /// The first and last byte of it that a file of `size` bytes has, if it has any.
    fn within(self, size: u64) -> Option<(u64, u64)> {
        let end = size.checked_sub(1)?;
        match self {
            Self::From(first, last) if first <= end => {
                Some((first, last.map_or(end, |last| last.min(end))))
            }
            Self::Last(count) if count > 0 => Some((size.saturating_sub(count), end)),
            Self::From(..) | Self::Last(_) => None,
        }
    }
}

/// The bytes from `start` on, `length` of them.
fn part_of(
    content: BoxStream<'static, std::io::Result<Bytes>>,
    start: u64,
    length: u64,
) -> BoxStream<'static, std::io::Result<Bytes>> {
    let state = (content, start, length);
    stream::try_unfold(state, |(mut content, mut skip, mut left)| async move {
        while left > 0 {
            let Some(piece) = content.next().await else {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            };
            let mut piece = piece?;
            let before = usize::try_from(skip).unwrap_or(usize::MAX).min(piece.len());
            skip -= before as u64;
            let _ = piece.split_to(before);
            piece.truncate(usize::try_from(left).unwrap_or(usize::MAX));
            left -= piece.len() as u64;
            if !piece.is_empty() {
                return Ok(Some((piece, (content, skip, left))));
            }
        }
        Ok(None)
    })
    .boxed()
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
    ),
)]
pub async fn list(
    caller: Caller,
    Path(name): Path<String>,
    Query(query): Query<HashMap<String, String>>,
) -> Result<Json<FileListBody>, ApiError> {
    let path = query.get("path").map_or("/", String::as_str);
    let depth = match query.get("recursive").map(String::as_str) {
        None | Some("false" | "0") => 1,
        Some("true" | "1") => MAX_DEPTH,
        Some(_) => {
            return Err(ApiError::bad_parameter(
                "recursive",
                "must be true or false",
            ));
        }
    };
    find(&caller.manager, &name).await?;
    let in_use = caller.manager.running(&name).await;
    let in_use = in_use.map_err(|error| error.at_vm(&name))?;
    let files = caller.manager.list_dir(&in_use, path, depth).await;
    let files = files.map_err(|error| error.at_vm(&name))?;
    Ok(Json(FileListBody {
        files: files.into_iter().map(Into::into).collect(),
        directory: path.to_owned(),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read_as_rfc_9110_says() {
        for (text, size, expected) in [
            ("bytes=0-0", 10, Some((0, 0))),
            ("bytes=2-", 10, Some((2, 9))),
            ("bytes=2-99", 10, Some((2, 9))),
            ("bytes=-3", 10, Some((7, 9))),
            ("bytes=-99", 10, Some((0, 9))),
            ("bytes=10-", 10, None),
            ("bytes=-0", 10, None),
            ("bytes=0-", 0, None),
        ] {
            assert_eq!(Range::parse(text).unwrap().within(size), expected, "{text}");
        }
        for ignored in [
            "",
            "bytes",
            "bytes=",
            "bytes=-",
            "bytes=3-2",
            "items=0-1",
            "bytes=0-1,3-4",
            "bytes=+1-2",
            "bytes=99999999999999999999-",
        ] {
            assert_eq!(Range::parse(ignored), None, "{ignored}");
        }
    }

    #[test]
    fn names_of_downloads_are_safe_in_a_header() {
        assert_eq!(disposition("/a/b.txt"), "attachment; filename=\"b.txt\"");
        assert_eq!(
            disposition("/a/x\"\r\n ä"),
            "attachment; filename=\"x_____\"; filename*=UTF-8''x%22%0D%0A%20%C3%A4"
        );
    }

    #[test]
    fn permissions_are_octal_digits() {
        assert_eq!(permissions("644").unwrap(), 0o644);
        assert_eq!(permissions("4755").unwrap(), 0o4755);
        for bad in ["", "64", "888", "+64", "0o644", "77777"] {
            assert!(permissions(bad).is_err(), "{bad}");
        }
    }

    #[tokio::test]
    async fn a_part_is_cut_out_of_pieces() {
        for (start, length, expected) in [(0, 6, "abcdef"), (1, 1, "b"), (2, 3, "cde"), (3, 0, "")]
        {
            let pieces = ["ab", "", "cd", "ef"].map(|piece| Ok(Bytes::from(piece)));
            let part = part_of(stream::iter(pieces).boxed(), start, length);
            let part: Vec<Bytes> = part.map(Result::unwrap).collect().await;
            assert_eq!(part.concat(), expected.as_bytes());
        }
    }
}
