//! An agent on a UNIX socket, and a client of it.

use std::{
    io::{self, BufRead, BufReader},
    path::{Path, PathBuf},
    pin::Pin,
    process::{Child, Command, Stdio},
    task::{Context, Poll},
};

use agent_protocol::{
    AgentFrame, EXEC_UPGRADE, ErrorBody, ErrorDetail, ExecRequest, Exit, HostFrame, PATH_EXEC,
    Ready,
};
use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt, Full};
use hyper::{
    Method, Request, Response,
    body::{Body, Frame, Incoming, SizeHint},
    client::conn::http1,
};
use hyper_util::rt::TokioIo;
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};

/// A running agent. Dropping it ends it.
pub struct Agent {
    process: Child,
    directory: TempDir,
}

impl Agent {
    pub fn start() -> Self {
        Self::start_with(&[])
    }

    pub fn start_with(arguments: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("agent.sock");
        // The variable names another build to test, such as the static one that guests get.
        let binary = std::env::var_os("GUEST_AGENT")
            .unwrap_or_else(|| env!("CARGO_BIN_EXE_guest-agent").into());
        let mut process = Command::new(binary)
            .arg("--listen")
            .arg(format!("unix:{}", socket.display()))
            .args(arguments)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(process.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        let ready: Ready = serde_json::from_str(&line).unwrap();
        assert!(ready.serving_us >= ready.entered_us && ready.entered_us > 0);
        Self { process, directory }
    }

    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// A directory that goes away with the agent.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("agent.sock")
    }

    pub async fn connect(&self) -> UnixStream {
        UnixStream::connect(self.socket()).await.unwrap()
    }

    /// The largest resident size that the agent has had, in KiB.
    pub fn peak_kib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find(|l| l.starts_with("VmHWM:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    pub async fn request<B>(&self, request: Request<B>) -> Response<Incoming>
    where
        B: Body<Data = Bytes, Error = io::Error> + Send + 'static,
    {
        let io = TokioIo::new(self.connect().await);
        let (mut sender, connection) = http1::handshake(io).await.unwrap();
        tokio::spawn(connection.with_upgrades());
        sender.send_request(request).await.unwrap()
    }

    pub async fn call(&self, method: Method, target: &str, body: &[u8]) -> Response<Incoming> {
        let body = Full::new(Bytes::copy_from_slice(body)).map_err(|never| match never {});
        self.request(builder(method, target).body(body).unwrap())
            .await
    }

    /// A request that is to fail; its status and error.
    pub async fn refused(&self, method: Method, target: &str, body: &[u8]) -> (u16, ErrorDetail) {
        error_of(self.call(method, target, body).await).await
    }

    /// Starts an exec, which is to succeed.
    pub async fn exec(&self, request: &ExecRequest) -> Exec {
        self.try_exec(request).await.unwrap()
    }

    pub async fn try_exec(&self, request: &ExecRequest) -> Result<Exec, (u16, ErrorDetail)> {
        let body = Full::new(Bytes::from(serde_json::to_vec(request).unwrap()))
            .map_err(|never| match never {});
        let request = builder(Method::POST, PATH_EXEC)
            .header("connection", "upgrade")
            .header("upgrade", EXEC_UPGRADE)
            .body(body)
            .unwrap();
        let response = self.request(request).await;
        if response.status() != 101 {
            return Err(error_of(response).await);
        }
        assert_eq!(response.headers()["upgrade"], EXEC_UPGRADE);
        let upgraded = hyper::upgrade::on(response).await.unwrap();
        let parts = upgraded.downcast::<TokioIo<UnixStream>>().unwrap();
        Ok(Exec {
            stream: parts.io.into_inner(),
            buffer: BytesMut::from(parts.read_buf),
        })
    }

    /// Runs a shell script to its end.
    pub async fn sh(&self, script: &str) -> Output {
        self.exec(&sh(script)).await.finish().await
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

pub fn builder(method: Method, target: &str) -> hyper::http::request::Builder {
    Request::builder()
        .method(method)
        .uri(target)
        .header("host", "agent")
}

pub async fn error_of(response: Response<Incoming>) -> (u16, ErrorDetail) {
    let status = response.status().as_u16();
    let bytes = response.into_body().collect().await.unwrap().to_bytes();
    let body: ErrorBody = serde_json::from_slice(&bytes).unwrap();
    assert_eq!(status, body.error.code.status(), "{}", body.error);
    (status, body.error)
}

pub fn argv(argv: &[&str]) -> ExecRequest {
    ExecRequest {
        argv: argv.iter().map(|&arg| arg.to_owned()).collect(),
        ..ExecRequest::default()
    }
}

pub fn sh(script: &str) -> ExecRequest {
    argv(&["sh", "-c", script])
}

/// A running exec.
pub struct Exec {
    pub stream: UnixStream,
    buffer: BytesMut,
}

/// What an exec gave.
#[derive(Debug)]
pub struct Output {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub exit: Exit,
}

impl Exec {
    pub async fn send(&mut self, frame: HostFrame) {
        let mut wire = BytesMut::new();
        frame.encode(&mut wire).unwrap();
        self.stream.write_all(&wire).await.unwrap();
    }

    /// The next frame; `None` at the end of the connection.
    pub async fn next(&mut self) -> Option<AgentFrame> {
        loop {
            if let Some(frame) = AgentFrame::decode(&mut self.buffer).unwrap() {
                return Some(frame);
            }
            if self.stream.read_buf(&mut self.buffer).await.unwrap() == 0 {
                assert!(self.buffer.is_empty(), "the connection ends within a frame");
                return None;
            }
        }
    }

    /// Reads on until stdout has `text` as a whole line.
    pub async fn wait_for_line(&mut self, text: &str) {
        let mut stdout = Vec::new();
        while !stdout.split(|&b| b == b'\n').any(|l| l == text.as_bytes()) {
            match self.next().await {
                Some(AgentFrame::Stdout(bytes)) => stdout.extend(bytes),
                Some(AgentFrame::Started(_)) => {}
                other => panic!("{other:?} came before {text:?}"),
            }
        }
    }

    /// Reads the end of the connection, after the exit. A reset is one too: a Unix socket that is closed
    /// with input in it that nobody has read resets its peer.
    async fn expect_end(&mut self) {
        assert!(self.buffer.is_empty(), "bytes after the exit");
        match self.stream.read(&mut [0]).await {
            Ok(0) => {}
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {}
            other => panic!("{other:?} in place of the end after the exit"),
        }
    }

    pub async fn finish(mut self) -> Output {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        loop {
            match self.next().await {
                Some(AgentFrame::Started(started)) => assert!(started.pid > 0),
                Some(AgentFrame::Stdout(bytes)) => stdout.extend(bytes),
                Some(AgentFrame::Stderr(bytes)) => stderr.extend(bytes),
                Some(AgentFrame::Exit(exit)) => {
                    self.expect_end().await;
                    return Output {
                        stdout,
                        stderr,
                        exit,
                    };
                }
                other => panic!("{other:?} came before the exit"),
            }
        }
    }
}

/// A body of `left` bytes of a fixed pattern.
pub struct Pattern {
    pub left: u64,
    pub chunk: Bytes,
    /// Fail at the end, as a host that goes away.
    pub broken: bool,
}

impl Body for Pattern {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        if self.left == 0 {
            let end = self.broken.then(|| Err(io::Error::other("gone")));
            return Poll::Ready(end);
        }
        let len = self.left.min(self.chunk.len() as u64);
        self.left -= len;
        let chunk = self.chunk.slice(..len as usize);
        Poll::Ready(Some(Ok(Frame::data(chunk))))
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}
