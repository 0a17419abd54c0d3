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

/// How much a listing may take, in bytes of lines and of the paths above them, however few entries it may
/// have.
const MIN_LISTING: usize = 1 << 20;
/// How much more for each entry that it may have: some times as much as one of a usual name takes.
const ENTRY: usize = 1 << 9;

impl AgentClient {
    /// What is in a directory; see [`Host::list_dir`](crate::domain::Host::list_dir).
    ///
    /// # Errors
    /// There is no such directory, it has more than `limit` entries, or their paths are too long to be
    /// held together.
    pub async fn list_dir(&self, path: &str, limit: usize) -> Result<Vec<FileInfo>, HostError> {
        let mut body = self.about(Method::GET, PATH_DIR, path).await?.into_body();
        let mut entries = Vec::new();
        let mut left = limit.saturating_mul(ENTRY).saturating_add(MIN_LISTING);
        let mut waiting = BytesMut::new();
        // How much of that has no end of a line.
        let mut seen = 0;
        while let Some(frame) = timely(body.frame()).await? {
            let frame = frame.map_err(|error| unreachable("the listing broke off", &error))?;
            let Ok(bytes) = frame.into_data() else {
                continue;
            };
            waiting.extend_from_slice(&bytes);
            while let Some(end) = waiting[seen..].iter().position(|&byte| byte == b'\n') {
                let line = waiting.split_to(seen + end + 1);
                seen = 0;
                let entry = serde_json::from_slice(&line)
                    .map_err(|error| unreachable("its listing makes no sense", &error))?;
                let takes = line.len() + path.len();
                let is_one_too_many = entries.len() == limit;
                left = match left.checked_sub(takes) {
                    Some(left) if !is_one_too_many => left,
                    _ => {
                        return Err(HostError::Invalid {
                            reason: "too many files are there to be listed; list a part of them"
                                .to_owned(),
                        });
                    }
                };
                entries.push(info_in(path, entry));
            }
            seen = waiting.len();
            if seen > MAX_LINE {
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

#[cfg(test)]
mod tests {
    use super::super::stand_in::answering;
    use super::*;

    /// What comes of a listing of this directory whose agent answers with these lines.
    async fn list(path: &str, limit: usize, lines: &str) -> Result<Vec<FileInfo>, HostError> {
        let agent = answering("200 OK", lines);
        let listed = AgentClient::new(agent.socket).list_dir(path, limit).await;
        agent.asked.await.unwrap();
        listed
    }

    fn line(name: &str) -> String {
        format!(
            "{{\"name\":\"{name}\",\"kind\":\"file\",\"mode\":420,\"uid\":1,\"gid\":2,\"size\":3,\
             \"mtime_us\":4}}\n"
        )
    }

    fn is_too_much(listed: Result<Vec<FileInfo>, HostError>) -> bool {
        match listed {
            Ok(_) => false,
            Err(HostError::Invalid { reason }) => reason.contains("too many files"),
            Err(other) => unreachable!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn a_listing_is_bounded_in_entries_and_in_what_their_paths_take() {
        let three = ["a", "b", "c"].map(line).concat();
        let listed = list("/d", 3, &three).await.unwrap();
        let paths: Vec<_> = listed.iter().map(|entry| entry.path.as_str()).collect();
        assert_eq!(paths, ["/d/a", "/d/b", "/d/c"]);
        assert!(is_too_much(list("/d", 2, &three).await));
        let long = line(&"x".repeat(MAX_LINE / 2));
        let some = MIN_LISTING / long.len();
        assert!(!is_too_much(list("/d", 100, &long.repeat(some)).await));
        assert!(is_too_much(
            list("/d", 100, &long.repeat(2 * some + 9)).await
        ));
        // Each path has that of its directory.
        let deep = format!("/{}", "d".repeat(4096));
        let entries = line("x").repeat(MIN_LISTING / deep.len() * 2);
        assert!(!is_too_much(list("/d", 1000, &entries).await));
        assert!(is_too_much(list(&deep, 1000, &entries).await));
    }

    #[tokio::test]
    async fn a_line_without_an_end_is_not_waited_for() {
        let error = list("/d", 9, &"x".repeat(MAX_LINE + 1)).await.unwrap_err();
        assert!(
            matches!(error, HostError::AgentUnreachable { .. }),
            "{error:?}"
        );
    }
}
