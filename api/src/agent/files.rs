//! Moving files.

use std::io;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use agent_protocol::{FileQuery, PATH_FILES};
use bytes::Bytes;
use futures_util::TryStreamExt;
use futures_util::stream::{self, BoxStream, StreamExt};
use http_body_util::{BodyExt, StreamBody};
use hyper::Request;
use hyper::body::{Body as _, Frame};
use hyper::header::HOST;

use super::{AgentClient, failure, host_error, request, unreachable};
use crate::domain::{FileContent, HostError, ReadFileRequest, WriteFileRequest};

/// How long an agent may take for the next piece of a file that is being read.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);

impl AgentClient {
    /// Writes a file; see [`Host::write_file`](crate::domain::Host::write_file). Content is taken
    /// only as fast as the guest takes it.
    ///
    /// # Errors
    /// The file is as it was.
    pub async fn write_file(
        &self,
        request: WriteFileRequest,
        content: BoxStream<'static, io::Result<Bytes>>,
    ) -> Result<(), HostError> {
        // hyper tells only that the body failed, not how; this keeps the how.
        let broken = Arc::new(OnceLock::new());
        let note = Arc::clone(&broken);
        let frames = content.map_ok(Frame::data).inspect_err(move |error| {
            // Only the first error counts, and there is only one: it ends the body.
            let _ = note.set(error.to_string());
        });
        let query = FileQuery {
            mode: request.mode,
            ..FileQuery::new(request.path.as_bytes())
        };
        let http = Request::put(format!("{PATH_FILES}?{}", query.encode()))
            .header(HOST, "agent")
            .body(StreamBody::new(frames).boxed_unsync())
            .map_err(|error| HostError::Internal {
                reason: error.to_string(),
            })?;
        let mut sender = self.connect().await?;
        let response = sender
            .send_request(http)
            .await
            .map_err(|error| match broken.get() {
                Some(reason) => HostError::Upload {
                    reason: reason.clone(),
                },
                None => unreachable("it did not take the file", &error),
            })?;
        if response.status().is_success() {
            Ok(())
        } else {
            Err(host_error(failure(response).await, &request.path))
        }
    }

    /// Reads a file; see [`Host::read_file`](crate::domain::Host::read_file).
    ///
    /// # Errors
    /// It cannot be read from its start.
    pub async fn read_file(&self, request: ReadFileRequest) -> Result<FileContent, HostError> {
        let query = FileQuery::new(request.path.as_bytes());
        let http = request::get(&format!("{PATH_FILES}?{}", query.encode()))?;
        let mut sender = self.connect().await?;
        let response = tokio::time::timeout(IDLE_TIMEOUT, sender.send_request(http))
            .await
            .map_err(|_| HostError::AgentUnreachable {
                reason: format!(
                    "it did not send the file within {} s",
                    IDLE_TIMEOUT.as_secs()
                ),
            })?
            .map_err(|error| unreachable("it did not send the file", &error))?;
        if !response.status().is_success() {
            return Err(host_error(failure(response).await, &request.path));
        }
        let body = response.into_body();
        let size = body.size_hint().exact();
        let content = stream::try_unfold(body.into_data_stream(), |mut body| async move {
            match tokio::time::timeout(IDLE_TIMEOUT, body.next()).await {
                Ok(None) => Ok(None),
                Ok(Some(Ok(bytes))) => Ok(Some((bytes, body))),
                Ok(Some(Err(error))) => Err(io::Error::other(error)),
                Err(_) => Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    "the guest stopped sending the file",
                )),
            }
        });
        Ok(FileContent {
            size,
            content: content.boxed(),
        })
    }
}
