//! Client of the daemon's API. One connection for each request.

use std::io;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use futures_util::stream::{self, StreamExt};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Empty, Limited, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::client::conn::http1;
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;

use super::archive::ArchiveFile;
use super::say;

/// The largest answer that is read at once, in bytes.
const MAX_ANSWER: usize = 64 << 20;
/// The longest line of progress, in bytes.
const MAX_LINE: usize = 1 << 20;
/// How much of an archive is read and sent at a time, in bytes.
const CHUNK: usize = 256 * 1024;
/// How often it is told how much of an archive was sent.
const TELL: Duration = Duration::from_secs(1);

type Body = UnsyncBoxBody<Bytes, io::Error>;

/// Why a request was not answered as it should be.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody serves.
    #[error(
        "no daemon answers at {server}; start one with `sandboxd serve`, or name another with \
         --server"
    )]
    Connect {
        /// Where.
        server: String,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// The request or the answer broke off.
    #[error("the connection with the daemon broke off")]
    Http(#[from] hyper::Error),
    /// The request cannot be made.
    #[error("the request cannot be made")]
    Request(#[from] hyper::http::Error),
    /// The answer is too large, or broke off.
    #[error("the answer of the daemon is too large, or broke off")]
    Body(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The answer makes no sense.
    #[error("the answer of the daemon makes no sense")]
    Json(#[from] serde_json::Error),
    /// The daemon says no.
    #[error("{0}")]
    Refused(String),
    /// The progress ended before the build.
    #[error("the progress broke off; the build may go on: see `sandboxd template list`")]
    BrokeOff,
}

/// A line of the progress of a build.
#[derive(Debug)]
pub enum Line {
    /// What is done.
    Progress(String),
    /// The template, at the end.
    Template(Value),
    /// There is no template any more.
    Gone,
}

/// A client of one daemon.
#[derive(Debug)]
pub struct Client {
    server: String,
}

/// The path of a template.
pub fn template_path(name: &str) -> String {
    format!(
        "/v1/templates/{}",
        agent_protocol::percent_encode(name.as_bytes())
    )
}

impl Client {
    /// A client of the daemon at this address.
    pub fn new(server: String) -> Self {
        Self { server }
    }

    /// The answer to a request without a body; null if it has none.
    pub async fn call(&self, method: &str, path: &str) -> Result<Value, ClientError> {
        let body = Empty::new().map_err(|never| match never {}).boxed_unsync();
        let request = self.request(method, path).body(body)?;
        json(self.send(request).await?).await
    }

    /// Begins to build a template.
    pub async fn build(
        &self,
        request: &Value,
        archive: Option<ArchiveFile>,
    ) -> Result<(), ClientError> {
        let boundary = format!("{:032x}", rand::random::<u128>());
        let disposition = "Content-Disposition: form-data; name=";
        let mut head = format!("--{boundary}\r\n{disposition}\"request\"\r\n\r\n{request}\r\n");
        if archive.is_some() {
            head.push_str(&format!(
                "--{boundary}\r\n{disposition}\"archive\"; filename=\"archive.tar\"\r\n\
                 Content-Type: application/x-tar\r\n\r\n"
            ));
        }
        let tail = match archive {
            Some(_) => format!("\r\n--{boundary}--\r\n"),
            None => format!("--{boundary}--\r\n"),
        };
        let content = match archive {
            Some(archive) => told(archive).left_stream(),
            None => stream::empty().right_stream(),
        };
        let body = stream::iter([Ok(Bytes::from(head))])
            .chain(content)
            .chain(stream::iter([Ok(Bytes::from(tail))]))
            .map(|piece| piece.map(Frame::data));
        let kind = format!("multipart/form-data; boundary={boundary}");
        let request = self
            .request("POST", "/v1/templates")
            .header(CONTENT_TYPE, kind)
            .body(StreamBody::new(body).boxed_unsync())?;
        json(self.send(request).await?).await.map(drop)
    }

    /// The progress of a build.
    pub async fn follow(&self, name: &str) -> Result<Lines, ClientError> {
        let path = format!("{}/progress", template_path(name));
        let body = Empty::new().map_err(|never| match never {}).boxed_unsync();
        let response = self.send(self.request("GET", &path).body(body)?).await?;
        if !response.status().is_success() {
            return Err(json(response).await.err().unwrap_or(ClientError::BrokeOff));
        }
        Ok(Lines {
            body: response.into_body(),
            buffer: BytesMut::new(),
        })
    }

    fn request(&self, method: &str, path: &str) -> hyper::http::request::Builder {
        Request::builder()
            .method(method)
            .uri(path)
            .header(HOST, &self.server)
    }

    async fn send(&self, request: Request<Body>) -> Result<Response<Incoming>, ClientError> {
        let stream = TcpStream::connect(&self.server).await;
        let stream = stream.map_err(|source| ClientError::Connect {
            server: self.server.clone(),
            source,
        })?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        // Its errors are those of the request and of the body.
        tokio::spawn(async move { drop(connection.await) });
        Ok(sender.send_request(request).await?)
    }
}

/// The lines of a build's progress.
pub struct Lines {
    body: Incoming,
    buffer: BytesMut,
}

impl Lines {
    /// The next line; `None` at the end.
    pub async fn next(&mut self) -> Result<Option<Line>, ClientError> {
        loop {
            if let Some(end) = self.buffer.iter().position(|&byte| byte == b'\n') {
                let line = self.buffer.split_to(end + 1);
                let mut line: Value = serde_json::from_slice(&line)?;
                return Ok(Some(match &line["progress"] {
                    Value::String(text) => Line::Progress(text.clone()),
                    _ if line["template"].is_object() => Line::Template(line["template"].take()),
                    _ => Line::Gone,
                }));
            }
            if self.buffer.len() > MAX_LINE {
                return Err(ClientError::BrokeOff);
            }
            match self.body.frame().await.transpose()? {
                None => return Ok(None),
                Some(frame) => {
                    if let Some(data) = frame.data_ref() {
                        self.buffer.extend_from_slice(data);
                    }
                }
            }
        }
    }
}

async fn json(response: Response<Incoming>) -> Result<Value, ClientError> {
    let status = response.status();
    let body = Limited::new(response.into_body(), MAX_ANSWER)
        .collect()
        .await
        .map_err(ClientError::Body)?
        .to_bytes();
    if status.is_success() {
        return match status {
            StatusCode::NO_CONTENT => Ok(Value::Null),
            _ => Ok(serde_json::from_slice(&body)?),
        };
    }
    let error: Value = serde_json::from_slice(&body).unwrap_or_default();
    let message = error["error"]["message"].as_str().map(str::to_owned);
    Err(ClientError::Refused(message.unwrap_or_else(|| {
        format!("the daemon answers with status {status}")
    })))
}

/// The content of an archive, as it is sent. What takes long is told.
fn told(archive: ArchiveFile) -> impl stream::Stream<Item = io::Result<Bytes>> {
    let file = tokio::fs::File::from_std(archive.file);
    let state = (file, 0_u64, Instant::now());
    stream::try_unfold(state, move |(mut file, sent, last)| async move {
        let mut chunk = BytesMut::with_capacity(CHUNK);
        let count = file.read_buf(&mut chunk).await?;
        let sent = sent + count as u64;
        let mut last = last;
        if last.elapsed() >= TELL {
            last = Instant::now();
            say(&format!(
                "sent {} of {} MiB",
                sent >> 20,
                archive.size >> 20
            ));
        }
        Ok((count > 0).then(|| (chunk.freeze(), (file, sent, last))))
    })
}
