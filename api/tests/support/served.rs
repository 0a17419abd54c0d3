//! The whole daemon but for its command line, on a TCP port: the real host side with a stand-in for
//! the VMM, and the real guest agent in its sandboxes.

#![allow(dead_code, reason = "each test binary uses a part of it")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on may panic"
)]

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use api::audit::{self, AuditLog};
use api::domain::{ExecLimits, Host, Limits, Manager, PoolLimits, Quotas, SpoolSpace, WhenIdle};
use api::http::{Access, AppState, Patience, RateLimiter, Rates, Sockets, Stop, router, serve};
use api::hypervisor::{HostConfig, LocalHost, Paths};
use api::identity::{Identity, Registration, Tokens};
use api::images::Images;
use api::metrics::Metrics;
use api::scan::Scans;
use api::store::SqliteStore;
use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use http_body_util::{BodyExt, Full};
use hyper::{Request, Response, body::Incoming};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{Error, Message};
use tokio_tungstenite::{WebSocketStream, client_async_with_config};

/// Clients that may take as long as they like.
pub const PATIENT: Patience = Patience {
    head: Duration::from_secs(3600),
    body: Duration::from_secs(3600),
    upload: Duration::from_secs(3600),
};

pub struct Served {
    pub address: SocketAddr,
    pub host: Arc<LocalHost>,
    pub manager: Manager,
    pub dir: tempfile::TempDir,
}

impl Served {
    /// The test `as_a_vmm` of the program is the stand-in's.
    pub async fn new() -> Self {
        Self::with_patience(PATIENT).await
    }

    /// The same with this patience for those who send.
    pub async fn with_patience(patience: Patience) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path();
        let template = path.join("minimal.ext4");
        let file = std::fs::File::create(&template).unwrap();
        file.set_len(1 << 20).unwrap();
        let host = LocalHost::start(HostConfig {
            vmm: super::vmm::install(path, "as_a_vmm", super::agent::binary()),
            images: Images {
                kernel: "/the/kernel".into(),
                initramfs: "/the/initramfs".into(),
                templates: BTreeMap::from([("minimal".to_owned(), template)]),
            },
            paths: Paths::new(&path.join("run"), &path.join("data")).unwrap(),
            boot_timeout: Duration::from_secs(60),
            cmdline_extra: String::new(),
            prefetch: false,
            jail: None,
            networks: None,
        });
        let host = Arc::new(host.await.unwrap());
        let store = Arc::new(SqliteStore::open(&path.join("db")).unwrap());
        let limits = Limits {
            exec: ExecLimits {
                max_output: 1 << 20,
                memory_threshold: 64 * 1024,
                spool: SpoolSpace::new(path.to_owned(), 1 << 30),
            },
            quotas: Quotas::default(),
            warm_bytes: 0,
            merge_from: usize::MAX,
            when_idle: WhenIdle::Pause,
            pool: PoolLimits {
                per_shape: 0,
                total: 0,
                memory_mb: 4096,
                idle: Duration::from_secs(600),
            },
        };
        let manager = Manager::new(host.clone(), store.clone(), limits);
        let events = host.events().await;
        let follower = manager.clone();
        tokio::spawn(async move { follower.follow(events).await });
        let reaper = manager.clone();
        tokio::spawn(async move { reaper.set_aside_idle().await });
        let tokens = Tokens::open(&path.join("token.key")).unwrap();
        let identity = Identity::new(store.clone(), tokens, Registration::Open).unwrap();
        let metrics = Metrics::new();
        manager.observe(Arc::new(metrics.clone()));
        let audit = AuditLog::open(&path.join(audit::FILE)).unwrap();
        let scans = Scans::open(store.clone(), audit.clone(), None);
        let scans = scans.await.unwrap();
        let state = AppState {
            metrics,
            manager: manager.clone().into(),
            rates: RateLimiter::new(Rates {
                per_minute: 0,
                per_hour: 0,
            }),
            scans,
            audit,
            sockets: Sockets::default(),
            identity,
            access: Access::Local,
            patience,
            max_upload: 1 << 20,
            max_archive: 1 << 20,
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let router = router(state).unwrap();
        let room = Arc::new(Semaphore::new(1000));
        tokio::spawn(serve(
            listener,
            router,
            patience.head,
            room,
            Stop::default(),
        ));
        Self {
            address,
            host,
            manager,
            dir,
        }
    }

    /// The answer to a request.
    pub async fn send(&self, request: Request<Full<Bytes>>) -> Response<Incoming> {
        let stream = TcpStream::connect(self.address).await.unwrap();
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .unwrap();
        tokio::spawn(connection.with_upgrades());
        sender.send_request(request).await.unwrap()
    }

    /// The status and JSON of the answer to a request; null if it has no body.
    pub async fn call(&self, method: &str, path: &str, body: &Value) -> (u16, Value) {
        let body = if body.is_null() {
            Bytes::new()
        } else {
            body.to_string().into()
        };
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "localhost")
            .body(Full::new(body))
            .unwrap();
        let response = self.send(request).await;
        let status = response.status().as_u16();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, serde_json::from_slice(&body).unwrap_or(Value::Null))
    }

    /// The path of a new sandbox.
    pub async fn create(&self) -> String {
        let spec = json!({"timeout_sec": 0});
        let (status, sandbox) = self.call("POST", "/v1/sandboxes", &spec).await;
        assert_eq!(status, 201, "{sandbox}");
        format!("/v1/sandboxes/{}", sandbox["id"].as_str().unwrap())
    }

    pub async fn try_socket(&self, path: &str) -> Result<Socket, Error> {
        let stream = TcpStream::connect(self.address).await.unwrap();
        let config = WebSocketConfig::default().read_buffer_size(4096);
        let uri = format!("ws://localhost{path}");
        let opened = client_async_with_config(uri, stream, Some(config)).await;
        opened.map(|(socket, _)| Socket(socket))
    }

    pub async fn socket(&self, path: &str) -> Socket {
        self.try_socket(path).await.unwrap()
    }
}

/// A WebSocket of JSON messages.
pub struct Socket(pub WebSocketStream<TcpStream>);

impl Socket {
    pub async fn say(&mut self, message: &Value) {
        self.0
            .send(Message::text(message.to_string()))
            .await
            .unwrap();
    }

    /// The next message; `None` at the close.
    pub async fn next(&mut self) -> Option<Value> {
        match self.0.next().await?.unwrap() {
            Message::Text(text) => Some(serde_json::from_str(&text).unwrap()),
            Message::Close(_) => None,
            other => panic!("{other:?}"),
        }
    }

    /// All messages to the close.
    pub async fn rest(&mut self) -> Vec<Value> {
        let mut all = Vec::new();
        while let Some(message) = self.next().await {
            all.push(message);
        }
        all
    }
}
