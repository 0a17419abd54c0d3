//! Client of the daemon's API. One connection for each request.

use std::fs::File;
use std::io;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use futures_util::stream::{self, StreamExt};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, Limited, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::client::conn::http1;
use hyper::header::{CONTENT_TYPE, HOST, HeaderName, HeaderValue};
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;

use super::archive::ArchiveFile;
use super::host::{self, HostArgs, HostError};
use super::{encode, say};

/// The largest answer that is read at once, in bytes.
const MAX_ANSWER: usize = 64 << 20;
/// The longest line of progress, in bytes.
const MAX_LINE: usize = 1 << 20;
/// How much of an archive is read and sent at a time, in bytes.
const CHUNK: usize = 256 * 1024;
/// How often it is told how much of an archive was sent.
const TELL: Duration = Duration::from_secs(1);

/// The header of the API key.
const API_KEY: HeaderName = HeaderName::from_static("x-api-key");

type Body = UnsyncBoxBody<Bytes, io::Error>;

/// A WebSocket of the daemon.
pub type Socket = WebSocketStream<TcpStream>;

/// Why a request was not answered as it should be.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody serves.
    #[error(
        "no daemon answers at {host}; start one with `sandboxd serve`, or name another with --host \
         or MVS_HOST"
    )]
    Connect {
        /// Where.
        host: String,
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
    #[error("{message}")]
    Refused {
        /// The status of the answer.
        status: u16,
        /// The sentence in it.
        message: String,
    },
    /// The answer cannot be written where it is to go.
    #[error("what the daemon sent cannot be written")]
    Write(#[source] io::Error),
    /// A stream of a command ended before the command.
    #[error("the daemon broke off; the command was killed, or will be")]
    Stream,
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
    /// `HOST:PORT`.
    host: String,
    key: Option<HeaderValue>,
}

/// The path of a template.
pub fn template_path(name: &str) -> String {
    format!("/v1/templates/{}", encode(name))
}

impl Client {
    /// A client of this daemon.
    ///
    /// # Errors
    /// Its address or the API key is of no use.
    pub fn new(args: &HostArgs) -> Result<Self, HostError> {
        Ok(Self {
            host: host::authority(&args.host)?,
            key: host::api_key()?,
        })
    }

    /// The answer to a request without a body; null if it has none.
    pub async fn call(&self, method: &str, path: &str) -> Result<Value, ClientError> {
        json(
            self.send(self.request(method, path).body(content(None))?)
                .await?,
        )
        .await
    }

    /// The answer to a request with this body; null if it has none.
    pub async fn call_with(
        &self,
        method: &str,
        path: &str,
        body: &Value,
    ) -> Result<Value, ClientError> {
        let request = self.request(method, path).body(content(Some(body)))?;
        json(self.send(request).await?).await
    }

    /// Writes the answer to a request, whatever it is, and returns its size.
    pub async fn download(
        &self,
        method: &str,
        path: &str,
        body: Option<&Value>,
        mut to: impl io::Write,
    ) -> Result<u64, ClientError> {
        let request = self.request(method, path).body(content(body))?;
        let response = self.send(request).await?;
        if !response.status().is_success() {
            return Err(json(response).await.err().unwrap_or(ClientError::Stream));
        }
        let mut body = response.into_body();
        let mut size = 0;
        while let Some(frame) = body.frame().await.transpose()? {
            if let Some(data) = frame.data_ref() {
                to.write_all(data).map_err(ClientError::Write)?;
                size += data.len() as u64;
            }
        }
        to.flush().map_err(ClientError::Write)?;
        Ok(size)
    }

    /// Uploads a file, of which `size` bytes are sent, to a path of a sandbox.
    pub async fn upload(
        &self,
        path: &str,
        to: &str,
        file: File,
        size: u64,
    ) -> Result<(), ClientError> {
        let fields = [("path", to)];
        let archive = ArchiveFile { file, size };
        self.form(path, &fields, Some(("file", archive))).await
    }

    /// A WebSocket of a sandbox: `exec/stream` or `pty`.
    pub async fn socket(&self, id: &str, of: &str) -> Result<Socket, ClientError> {
        let uri = format!("ws://{}/v1/sandboxes/{}/{of}", self.host, encode(id));
        let socket = |source| ClientError::Body(Box::new(source));
        let mut request = uri.into_client_request().map_err(socket)?;
        if let Some(key) = &self.key {
            request.headers_mut().insert(API_KEY, key.clone());
        }
        let stream = self.connect().await?;
        match tokio_tungstenite::client_async(request, stream).await {
            Ok((socket, _)) => Ok(socket),
            Err(tungstenite::Error::Http(response)) => {
                let status = response.status();
                Err(refused(
                    status,
                    response.into_body().as_deref().unwrap_or_default(),
                ))
            }
            Err(source) => Err(socket(source)),
        }
    }

    /// Begins to build a template.
    pub async fn build(
        &self,
        request: &Value,
        archive: Option<ArchiveFile>,
    ) -> Result<(), ClientError> {
        let request = request.to_string();
        let fields = [("request", request.as_str())];
        let archive = archive.map(|archive| ("archive", archive));
        self.form("/v1/templates", &fields, archive).await
    }

    /// Posts a form of these fields and then a file, whose sending is told if it takes long.
    async fn form(
        &self,
        path: &str,
        fields: &[(&str, &str)],
        file: Option<(&str, ArchiveFile)>,
    ) -> Result<(), ClientError> {
        let boundary = format!("{:032x}", rand::random::<u128>());
        let disposition = "Content-Disposition: form-data; name=";
        let mut head = String::new();
        for (name, value) in fields {
            head.push_str(&format!(
                "--{boundary}\r\n{disposition}\"{name}\"\r\n\r\n{value}\r\n"
            ));
        }
        let (content, tail) = match file {
            Some((name, file)) => {
                head.push_str(&format!(
                    "--{boundary}\r\n{disposition}\"{name}\"; filename=\"{name}\"\r\n\
                     Content-Type: application/octet-stream\r\n\r\n"
                ));
                let tail = format!("\r\n--{boundary}--\r\n");
                (told(file).left_stream(), tail)
            }
            None => (
                stream::empty().right_stream(),
                format!("--{boundary}--\r\n"),
            ),
        };
        let body = stream::iter([Ok(Bytes::from(head))])
            .chain(content)
            .chain(stream::iter([Ok(Bytes::from(tail))]))
            .map(|piece| piece.map(Frame::data));
        let kind = format!("multipart/form-data; boundary={boundary}");
        let request = self
            .request("POST", path)
            .header(CONTENT_TYPE, kind)
            .body(StreamBody::new(body).boxed_unsync())?;
        json(self.send(request).await?).await.map(drop)
    }

    /// The progress of a build.
    pub async fn follow(&self, name: &str) -> Result<Lines, ClientError> {
        let path = format!("{}/progress", template_path(name));
        let request = self.request("GET", &path).body(content(None))?;
        let response = self.send(request).await?;
        if !response.status().is_success() {
            return Err(json(response).await.err().unwrap_or(ClientError::BrokeOff));
        }
        Ok(Lines {
            body: response.into_body(),
            buffer: BytesMut::new(),
        })
    }

    fn request(&self, method: &str, path: &str) -> hyper::http::request::Builder {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(HOST, &self.host);
        match &self.key {
            Some(key) => request.header(API_KEY, key),
            None => request,
        }
    }

    async fn connect(&self) -> Result<TcpStream, ClientError> {
        let stream = TcpStream::connect(&self.host).await;
        stream.map_err(|source| ClientError::Connect {
            host: self.host.clone(),
            source,
        })
    }

    async fn send(&self, request: Request<Body>) -> Result<Response<Incoming>, ClientError> {
        let stream = self.connect().await?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        // Its errors are those of the request and of the body.
        tokio::spawn(async move { drop(connection.await) });
        Ok(sender.send_request(request).await?)
    }
}

fn content(json: Option<&Value>) -> Body {
    let bytes = json.map(|json| Bytes::from(json.to_string()));
    Full::new(bytes.unwrap_or_default())
        .map_err(|never| match never {})
        .boxed_unsync()
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
    Err(refused(status, &body))
}

fn refused(status: StatusCode, body: &[u8]) -> ClientError {
    let error: Value = serde_json::from_slice(body).unwrap_or_default();
    let message = error["error"]["message"].as_str().map(str::to_owned);
    ClientError::Refused {
        status: status.as_u16(),
        message: message.unwrap_or_else(|| format!("the daemon answers with status {status}")),
    }
}

/// The content of a file, as it is sent. What takes long is told.
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
                "sending …, {} of {} MiB",
                sent >> 20,
                archive.size >> 20
            ));
        }
        Ok((count > 0).then(|| (chunk.freeze(), (file, sent, last))))
    })
}
