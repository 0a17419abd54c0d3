//! Directories, and the end of files.

use std::time::Duration;

use agent_protocol::{Entry, EntryKind, FileQuery, PATH_DIR, PATH_FILES};
use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Incoming;
use hyper::header::HOST;
use hyper::{Method, Request, Response};

use super::{AgentClient, MAX_JSON_ANSWER, failure, host_error, unreachable};
use crate::domain::{FileInfo, FileKind, HostError};

/// How long an agent may take for an answer, or for its next piece: a large tree takes a while to be
/// removed.
const PATIENCE: Duration = Duration::from_secs(60);

/// The longest line of a listing, in bytes: names and targets are bounded by the guest's kernel, and
/// what their escapes make of them by 6 times as much.
pub(super) const MAX_LINE: usize = 64 << 10;

impl AgentClient {
    /// What is in a directory; see [`Host::list_dir`](crate::domain::Host::list_dir).
    ///
    /// # Errors
    /// There is no such directory, or it has more than `limit` entries.
    pub async fn list_dir(&self, path: &str, limit: usize) -> Result<Vec<FileInfo>, HostError> {
        let mut body = self.about(Method::GET, PATH_DIR, path).await?.into_body();
        let mut entries = Vec::new();
        let mut waiting = BytesMut::new();
        while let Some(frame) = timely(body.frame()).await? {
            let frame = frame.map_err(|error| unreachable("the listing broke off", &error))?;
            let Ok(bytes) = frame.into_data() else {
                continue;
            };
            waiting.extend_from_slice(&bytes);
            while let Some(end) = waiting.iter().position(|&byte| byte == b'\n') {
                let line = waiting.split_to(end + 1);
                let entry = serde_json::from_slice(&line)
                    .map_err(|error| unreachable("its listing makes no sense", &error))?;
                if entries.len() == limit {
                    return Err(HostError::Invalid {
                        reason: "too many files are there to be listed; list a part of them"
                            .to_owned(),
                    });
                }
                entries.push(info_in(path, entry));
            }
            if waiting.len() > MAX_LINE {
                return Err(HostError::AgentUnreachable {
                    reason: "its listing has a line without an end".to_owned(),
                });
            }
        }
        Ok(entries)
    }

    /// Makes a directory; see [`Host::make_dir`](crate::domain::Host::make_dir).
    ///
    /// # Errors
    /// It is not there.
    pub async fn make_dir(&self, path: &str) -> Result<FileInfo, HostError> {
        let response = self.about(Method::PUT, PATH_DIR, path).await?;
        let body = timely(Limited::new(response.into_body(), MAX_JSON_ANSWER).collect())
            .await?
            .map_err(|error| unreachable("its answer broke off", &*error))?;
        let entry: Entry = serde_json::from_slice(&body.to_bytes())
            .map_err(|error| unreachable("its answer makes no sense", &error))?;
        Ok(info(path.to_owned(), entry))
    }

    /// Removes a file; see [`Host::remove_file`](crate::domain::Host::remove_file).
    ///
    /// # Errors
    /// There is none, or something is left.
    pub async fn remove_file(&self, path: &str) -> Result<(), HostError> {
        self.about(Method::DELETE, PATH_FILES, path).await.map(drop)
    }

    /// The answer to a request about the file `path`, if it is one of success.
    async fn about(
        &self,
        method: Method,
        operation: &str,
        path: &str,
    ) -> Result<Response<Incoming>, HostError> {
        let query = FileQuery::new(path.as_bytes());
        let body = Empty::<Bytes>::new().map_err(|never| match never {});
        let request = Request::builder()
            .method(method)
            .uri(format!("{operation}?{}", query.encode()))
            .header(HOST, "agent")
            .body(body.boxed_unsync())
            .map_err(|error| HostError::Internal {
                reason: error.to_string(),
            })?;
        let mut sender = self.connect().await?;
        let response = timely(sender.send_request(request))
            .await?
            .map_err(|error| unreachable("it did not answer", &error))?;
        if response.status().is_success() {
            Ok(response)
        } else {
            Err(host_error(failure(response).await, path))
        }
    }
}

pub(super) async fn timely<T>(work: impl Future<Output = T>) -> Result<T, HostError> {
    let done = tokio::time::timeout(PATIENCE, work).await;
    done.map_err(|_| HostError::AgentUnreachable {
        reason: format!("it did not answer within {} s", PATIENCE.as_secs()),
    })
}

pub(super) fn info_in(directory: &str, entry: Entry) -> FileInfo {
    let directory = directory.trim_end_matches('/');
    info(format!("{directory}/{}", entry.name), entry)
}

fn info(path: String, entry: Entry) -> FileInfo {
    FileInfo {
        path,
        kind: match entry.kind {
            EntryKind::File => FileKind::File,
            EntryKind::Directory => FileKind::Directory,
            EntryKind::Symlink => FileKind::Symlink,
            EntryKind::Fifo => FileKind::Fifo,
            EntryKind::Socket => FileKind::Socket,
            EntryKind::CharDevice => FileKind::CharDevice,
            EntryKind::BlockDevice => FileKind::BlockDevice,
            EntryKind::Other => FileKind::Other,
        },
        mode: entry.mode,
        uid: entry.uid,
        gid: entry.gid,
        size: entry.size,
        mtime_us: entry.mtime_us,
        target: entry.target,
    }
}
