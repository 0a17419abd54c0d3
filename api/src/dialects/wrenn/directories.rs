//! List and make directories, and remove files.

use axum::Json;
use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::error::{ApiError, parse};
use super::extract::Path;
use crate::domain::{FileInfo, FileKind};
use crate::http::{Caller, ErrorBody};

/// A directory to list.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = ListDirRequest)]
pub struct ListDirRequestBody {
    /// Its absolute path.
    #[serde(default)]
    #[schema(required)]
    pub path: String,
    /// How many levels of directories to list, up to 64; 0 is taken as 1.
    #[serde(default)]
    #[schema(default = 1, nullable = false)]
    pub depth: Option<u32>,
}

/// A path in a sandbox.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = PathRequest)]
pub struct PathRequestBody {
    /// Absolute.
    #[serde(default)]
    #[schema(required)]
    pub path: String,
}

/// A file in a sandbox.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = FileEntry)]
pub struct FileEntryBody {
    /// Its last path component.
    pub name: String,
    /// Its absolute path.
    pub path: String,
    /// What it is. FIFOs, sockets and devices are `file`; `permissions` tells them apart.
    #[serde(rename = "type")]
    pub kind: FileKindBody,
    /// Size in bytes.
    pub size: u64,
    /// Permission bits.
    pub mode: u32,
    /// Kind and permissions, as `ls -l` writes them.
    #[schema(example = "-rwxr-xr-x")]
    pub permissions: String,
    /// Numeric id of the user who owns it.
    pub owner: String,
    /// Numeric id of its group.
    pub group: String,
    /// Last modification, in seconds since the Unix epoch.
    pub modified_at: i64,
    /// Where a symbolic link points.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub symlink_target: Option<String>,
}

/// What a file is.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
#[schema(as = FileKind)]
pub enum FileKindBody {
    /// A file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
}

/// What is in a directory.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = ListDirResponse)]
pub struct ListDirBody {
    /// Sorted by path.
    pub entries: Vec<FileEntryBody>,
}

/// A directory that is there now.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = MakeDirResponse)]
pub struct MakeDirBody {
    /// The directory.
    pub entry: FileEntryBody,
}

impl From<FileInfo> for FileEntryBody {
    fn from(info: FileInfo) -> Self {
        let name = info.path.trim_end_matches('/').rsplit('/').next();
        Self {
            name: match name {
                Some(name) if !name.is_empty() => name.to_owned(),
                _ => "/".to_owned(),
            },
            kind: match info.kind {
                FileKind::Directory => FileKindBody::Directory,
                FileKind::Symlink => FileKindBody::Symlink,
                _ => FileKindBody::File,
            },
            size: info.size,
            mode: info.mode,
            permissions: permissions(info.kind, info.mode),
            owner: info.uid.to_string(),
            group: info.gid.to_string(),
            modified_at: info.mtime_us.div_euclid(1_000_000),
            symlink_target: info.target,
            path: info.path,
        }
    }
}

/// As `ls -l` writes them, but for ACLs.
fn permissions(kind: FileKind, mode: u32) -> String {
    let kind = match kind {
        FileKind::File => '-',
        FileKind::Directory => 'd',
        FileKind::Symlink => 'l',
        FileKind::Fifo => 'p',
        FileKind::Socket => 's',
        FileKind::CharDevice => 'c',
        FileKind::BlockDevice => 'b',
        FileKind::Other => '?',
    };
    let class = |shift: u32, special: u32, letter: char| {
        let bits = mode >> shift;
        let execute = match (bits & 1 != 0, mode & special != 0) {
            (true, true) => letter,
            (false, true) => letter.to_ascii_uppercase(),
            (true, false) => 'x',
            (false, false) => '-',
        };
        let read = if bits & 4 != 0 { 'r' } else { '-' };
        let write = if bits & 2 != 0 { 'w' } else { '-' };
        [read, write, execute]
    };
    let classes = [
        class(6, 0o4000, 's'),
        class(3, 0o2000, 's'),
        class(0, 0o1000, 't'),
    ];
    std::iter::once(kind)
        .chain(classes.into_iter().flatten())
        .collect()
}

/// List a directory
///
/// At most 50000 entries. Symbolic links are not followed.
#[utoipa::path(
    post, path = "/v1/sandboxes/{id}/files/list", operation_id = "listDir", tag = "sandboxes",
    params(("id" = String, Path)),
    request_body = ListDirRequestBody,
    responses(
        (status = 200, description = "What is in it", body = ListDirBody),
        (status = 400, description = "No directory, or too much is in it", body = ErrorBody),
        (status = 404, description = "Sandbox or directory not found", body = ErrorBody),
        (status = 409, description = "Sandbox not running", body = ErrorBody),
        (status = 502, description = "The agent failed", body = ErrorBody),
    ),
)]
pub async fn list(
    caller: Caller,
    Path(id): Path<String>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<ListDirBody>, ApiError> {
    let in_use = caller.manager.running(&id).await?;
    let request: ListDirRequestBody = parse(body)?;
    let depth = request.depth.unwrap_or(1).max(1);
    let files = caller
        .manager
        .list_dir(&in_use, &request.path, depth)
        .await?;
    Ok(Json(ListDirBody {
        entries: files.into_iter().map(Into::into).collect(),
    }))
}

/// Make a directory
///
/// With its parents. One that is there already is as good.
#[utoipa::path(
    post, path = "/v1/sandboxes/{id}/files/mkdir", operation_id = "makeDir", tag = "sandboxes",
    params(("id" = String, Path)),
    request_body = PathRequestBody,
    responses(
        (status = 200, description = "It is there", body = MakeDirBody),
        (status = 400, description = "Something else is there", body = ErrorBody),
        (status = 404, description = "Sandbox not found", body = ErrorBody),
        (status = 409, description = "Sandbox not running", body = ErrorBody),
        (status = 502, description = "The agent failed, such as on a full disk", body = ErrorBody),
    ),
)]
pub async fn make(
    caller: Caller,
    Path(id): Path<String>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<MakeDirBody>, ApiError> {
    let in_use = caller.manager.running(&id).await?;
    let request: PathRequestBody = parse(body)?;
    let entry = caller.manager.make_dir(&in_use, &request.path).await?;
    Ok(Json(MakeDirBody {
        entry: entry.into(),
    }))
}

/// Remove a file or a directory
///
/// A directory goes with all that is in it; a symbolic link goes alone.
#[utoipa::path(
    post, path = "/v1/sandboxes/{id}/files/remove", operation_id = "removePath", tag = "sandboxes",
    params(("id" = String, Path)),
    request_body = PathRequestBody,
    responses(
        (status = 204, description = "It is gone"),
        (status = 400, description = "It cannot be removed", body = ErrorBody),
        (status = 404, description = "Sandbox or file not found", body = ErrorBody),
        (status = 409, description = "Sandbox not running", body = ErrorBody),
        (status = 502, description = "The agent failed", body = ErrorBody),
    ),
)]
pub async fn remove(
    caller: Caller,
    Path(id): Path<String>,
    body: Result<Bytes, BytesRejection>,
) -> Result<StatusCode, ApiError> {
    let in_use = caller.manager.running(&id).await?;
    let request: PathRequestBody = parse(body)?;
    caller.manager.remove_file(&in_use, &request.path).await?;
    Ok(StatusCode::NO_CONTENT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permissions_are_those_of_ls() {
        for (kind, mode, expected) in [
            (FileKind::File, 0o644, "-rw-r--r--"),
            (FileKind::Directory, 0o1777, "drwxrwxrwt"),
            (FileKind::File, 0o4755, "-rwsr-xr-x"),
            (FileKind::File, 0o6644, "-rwSr-Sr--"),
            (FileKind::Symlink, 0o777, "lrwxrwxrwx"),
            (FileKind::Fifo, 0, "p---------"),
        ] {
            assert_eq!(permissions(kind, mode), expected);
        }
    }
}
