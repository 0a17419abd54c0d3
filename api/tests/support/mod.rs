//! A host that runs nothing, and the API on top of it.

#![allow(dead_code, reason = "each test binary uses a part of it")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on may panic")]

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex};

use api::domain::{
    CreateRequest, Created, End, ExecEvent, ExecLimits, ExecRequest, ExitInfo, FileContent, Host,
    HostError, HostEvent, HostInfo, Limits, Manager, ReadFileRequest, SandboxId, Timings,
    WriteFileRequest,
};
use api::http::{AppState, router};
use api::store::SqliteStore;
use async_trait::async_trait;
use axum::Router;
use axum::body::{Body, Bytes};
use axum::http::{Request, Response, StatusCode};
use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream};
use http_body_util::BodyExt;
use serde_json::Value;
use tokio::sync::mpsc;
use tower::ServiceExt;

/// Pieces of long output and files.
pub const PIECE: usize = 64 * 1024;

/// A host that runs nothing. What a command does is in its name.
#[derive(Default)]
pub struct FakeHost {
    pub files: Mutex<HashMap<String, Vec<u8>>>,
    pub sandboxes: Mutex<Vec<SandboxId>>,
    pub last_upload: Mutex<Option<u64>>,
    listeners: Mutex<Vec<mpsc::UnboundedSender<HostEvent>>>,
}

impl FakeHost {
    /// A sandbox ends by itself.
    pub fn end(&self, id: &str, end: End) {
        let id: SandboxId = id.parse().unwrap();
        self.sandboxes.lock().unwrap().retain(|other| *other != id);
        for listener in self.listeners.lock().unwrap().iter() {
            listener
                .send(HostEvent::Ended {
                    id: id.clone(),
                    end: end.clone(),
                })
                .unwrap();
        }
    }
}

fn out(bytes: impl Into<Bytes>) -> Result<ExecEvent, HostError> {
    Ok(ExecEvent::Stdout(bytes.into()))
}

fn err(bytes: impl Into<Bytes>) -> Result<ExecEvent, HostError> {
    Ok(ExecEvent::Stderr(bytes.into()))
}

fn exited(code: i32, timed_out: bool) -> Result<ExecEvent, HostError> {
    Ok(ExecEvent::Exited(ExitInfo { code, timed_out }))
}

#[async_trait]
impl Host for FakeHost {
    async fn describe(&self) -> Result<HostInfo, HostError> {
        let templates = vec!["broken".to_owned(), "minimal".to_owned()];
        Ok(HostInfo {
            templates,
            memory_mb: 4096,
        })
    }

    async fn create(&self, request: CreateRequest) -> Result<Created, HostError> {
        if request.template == "broken" {
            return Err(HostError::Start {
                reason: "it is broken".into(),
            });
        }
        self.sandboxes.lock().unwrap().push(request.id);
        let timings = Timings {
            prepare_us: 1,
            vmm_us: 20,
            boot_us: 3000,
            total_us: 3021,
        };
        Ok(Created { timings })
    }

    async fn destroy(&self, id: &SandboxId) -> Result<(), HostError> {
        self.sandboxes.lock().unwrap().retain(|other| other != id);
        Ok(())
    }

    async fn exec(
        &self,
        _id: &SandboxId,
        request: ExecRequest,
    ) -> Result<BoxStream<'static, Result<ExecEvent, HostError>>, HostError> {
        let argument = request.argv.get(1).cloned().unwrap_or_default();
        let events = match request.argv[0].as_str() {
            "echo" => vec![
                out(request.argv[1..].join(" ")),
                err("warning\n"),
                exited(0, false),
            ],
            "false" => vec![exited(1, false)],
            "binary" => vec![out(&b"\xff\xfe"[..]), err("text"), exited(0, false)],
            "sleep" => vec![out("so far"), exited(137, true)],
            "lost" => vec![
                out("so far"),
                Err(HostError::AgentUnreachable { reason: "x".into() }),
            ],
            "flood" => {
                let pieces = argument.parse::<usize>().unwrap() / PIECE;
                let piece = Bytes::from("y\n".repeat(PIECE / 2));
                let flood = stream::iter((0..pieces).map(move |_| out(piece.clone())));
                return Ok(flood.chain(stream::iter([exited(0, false)])).boxed());
            }
            other => {
                return Err(HostError::Agent {
                    reason: format!("no {other}"),
                });
            }
        };
        Ok(stream::iter(events).boxed())
    }

    async fn write_file(
        &self,
        _id: &SandboxId,
        request: WriteFileRequest,
        mut content: BoxStream<'static, io::Result<Bytes>>,
    ) -> Result<(), HostError> {
        if request.path == "/directory" {
            return Err(HostError::Invalid {
                reason: "it is a directory".into(),
            });
        }
        let mut file = Vec::new();
        let mut len = 0;
        while let Some(piece) = content.next().await {
            let piece = piece.map_err(|error| HostError::Upload {
                reason: error.to_string(),
            })?;
            len += piece.len() as u64;
            if request.path != "/dev/null" {
                file.extend_from_slice(&piece);
            }
        }
        *self.last_upload.lock().unwrap() = Some(len);
        self.files.lock().unwrap().insert(request.path, file);
        Ok(())
    }

    async fn read_file(
        &self,
        _id: &SandboxId,
        request: ReadFileRequest,
    ) -> Result<FileContent, HostError> {
        if let Some(size) = request.path.strip_prefix("/zeros/") {
            let size: usize = size.parse().unwrap();
            let piece = Bytes::from(vec![0; PIECE]);
            let content = stream::iter((0..size / PIECE).map(move |_| Ok(piece.clone()))).boxed();
            return Ok(FileContent {
                size: Some(size as u64),
                content,
            });
        }
        let file = self.files.lock().unwrap().get(&request.path).cloned();
        let file = file.ok_or(HostError::FileNotFound { path: request.path })?;
        let size = Some(file.len() as u64);
        Ok(FileContent {
            size,
            content: stream::iter([Ok(file.into())]).boxed(),
        })
    }

    async fn events(&self) -> BoxStream<'static, HostEvent> {
        let (sender, receiver) = mpsc::unbounded_channel();
        self.listeners.lock().unwrap().push(sender);
        stream::unfold(receiver, |mut receiver| async move {
            receiver.recv().await.map(|event| (event, receiver))
        })
        .boxed()
    }

    async fn shutdown(&self) {
        self.sandboxes.lock().unwrap().clear();
    }
}

/// The API on a fake host.
pub struct Api {
    pub host: Arc<FakeHost>,
    pub manager: Manager,
    pub router: Router,
    pub dir: tempfile::TempDir,
}

impl Api {
    /// An API that takes uploads of `max_upload` bytes and `max_output` bytes of output.
    pub async fn new(max_upload: u64, max_output: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(&dir.path().join("db")).unwrap();
        let host = Arc::new(FakeHost::default());
        let limits = Limits {
            exec: ExecLimits {
                max_output,
                memory_threshold: 64 * 1024,
                spool_dir: dir.path().to_owned(),
            },
        };
        let manager = Manager::new(host.clone(), Arc::new(store), limits);
        let events = host.events().await;
        let follower = manager.clone();
        tokio::spawn(async move { follower.follow(events).await });
        let state = AppState {
            manager: manager.clone(),
            max_upload,
        };
        Self {
            host,
            manager,
            router: router(state).unwrap(),
            dir,
        }
    }

    /// The answer to a request.
    pub async fn send(&self, method: &str, path: &str, body: impl Into<Body>) -> Response<Body> {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "localhost:8000")
            .body(body.into())
            .unwrap();
        self.router.clone().oneshot(request).await.unwrap()
    }

    /// The status and JSON of the answer to a request; null if it has no body.
    pub async fn call(&self, method: &str, path: &str, body: &str) -> (StatusCode, Value) {
        read_json(self.send(method, path, body.to_owned()).await).await
    }

    /// The answer to an upload of this form, whose boundary is `X`.
    pub async fn upload(&self, id: &str, form: impl Into<Body>) -> (StatusCode, Value) {
        let request = Request::post(format!("/v1/sandboxes/{id}/files/write"))
            .header("host", "localhost")
            .header("content-type", "multipart/form-data; boundary=X")
            .body(form.into())
            .unwrap();
        read_json(self.router.clone().oneshot(request).await.unwrap()).await
    }

    /// The id of a new sandbox.
    pub async fn create(&self) -> String {
        let (status, sandbox) = self.call("POST", "/v1/sandboxes", "{}").await;
        assert_eq!(status, StatusCode::CREATED, "{sandbox}");
        sandbox["id"].as_str().unwrap().to_owned()
    }
}

async fn read_json(response: Response<Body>) -> (StatusCode, Value) {
    let status = response.status();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    let json = if body.is_empty() {
        Value::Null
    } else {
        serde_json::from_slice(&body)
            .unwrap_or_else(|error| Value::String(format!("{error}: {body:?}")))
    };
    (status, json)
}

/// A form with boundary `X` of these fields.
pub fn form(fields: &[(&str, &[u8])]) -> Vec<u8> {
    let mut form = Vec::new();
    for (name, value) in fields {
        let file = if *name == "file" {
            "; filename=\"f\""
        } else {
            ""
        };
        let head = format!("--X\r\nContent-Disposition: form-data; name=\"{name}\"{file}\r\n\r\n");
        form.extend_from_slice(head.as_bytes());
        form.extend_from_slice(value);
        form.extend_from_slice(b"\r\n");
    }
    form.extend_from_slice(b"--X--\r\n");
    form
}
