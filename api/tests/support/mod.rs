//! The API on a host that runs nothing.

#![allow(
    dead_code,
    unused_imports,
    reason = "each test binary uses a part of it"
)]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on may panic")]

pub mod fake_host;
pub mod kept;
pub mod meter;
pub mod saved;

use std::sync::Arc;
use std::time::Duration;

use api::audit::{self, AuditLog};
use api::domain::{ExecLimits, Host, Limits, Manager, PoolLimits, Quotas, SpoolSpace, WhenIdle};
use api::http::{Access, AppState, Patience, RateLimiter, Rates, Sockets, router};
use api::identity::{Identity, Registration, Tokens};
use api::metrics::Metrics;
use api::scan::Scans;
use api::store::SqliteStore;
use axum::Router;
use axum::body::Body;
use axum::http::{Request, Response, StatusCode};
use http_body_util::BodyExt;
use serde_json::Value;
use tower::ServiceExt;

pub use fake_host::{FakeHost, Fault, MergeFault, PIECE};

/// How many WebSockets one user has at most.
pub const MAX_SOCKETS: usize = 128;

/// What users log in with.
pub const PASSWORD: &str = "Correct-horse-7";

/// Name of the file of known holes in the directory of an [`Api`].
pub const ADVISORIES: &str = "advisories.json";

const NO_RATES: Rates = Rates {
    per_minute: 0,
    per_hour: 0,
};

/// Limits that no test reaches by chance.
fn limits() -> Limits {
    Limits {
        exec: ExecLimits {
            max_output: 1 << 20,
            memory_threshold: 64 * 1024,
            spool: SpoolSpace::new("/nonexistent".into(), 1 << 30),
        },
        warm_bytes: 0,
        merge_from: usize::MAX,
        quotas: Quotas::default(),
        when_idle: WhenIdle::Pause,
        pool: PoolLimits {
            per_shape: 0,
            total: 8,
            memory_mb: 4096,
            idle: Duration::from_secs(600),
        },
    }
}

/// The API on a fake host.
pub struct Api {
    pub host: Arc<FakeHost>,
    pub store: Arc<SqliteStore>,
    pub manager: Manager,
    pub scans: Scans,
    pub audit: AuditLog,
    pub router: Router,
    pub dir: tempfile::TempDir,
}

impl Api {
    /// An API that takes uploads of `max_upload` bytes and `max_output` bytes of output.
    pub async fn new(max_upload: u64, max_output: u64) -> Self {
        let mut limits = limits();
        limits.exec.max_output = max_output;
        let dir = tempfile::tempdir().unwrap();
        Self::start(dir, Arc::default(), max_upload, limits).await
    }

    /// An API that keeps warm snapshots of so many bytes.
    pub async fn warm(warm_bytes: u64) -> Self {
        let limits = Limits {
            warm_bytes,
            ..limits()
        };
        let dir = tempfile::tempdir().unwrap();
        Self::start(dir, Arc::default(), 1 << 20, limits).await
    }

    /// An API that does this with idle sandboxes.
    pub async fn idle(when_idle: WhenIdle) -> Self {
        let limits = Limits {
            when_idle,
            ..limits()
        };
        let dir = tempfile::tempdir().unwrap();
        Self::start(dir, Arc::default(), 1 << 20, limits).await
    }

    /// An API that keeps warm snapshots, and so many machines ready for each shape.
    pub async fn pooled(per_shape: usize) -> Self {
        let mut limits = limits();
        limits.warm_bytes = 1 << 20;
        limits.pool.per_shape = per_shape;
        let dir = tempfile::tempdir().unwrap();
        Self::start(dir, Arc::default(), 1 << 20, limits).await
    }

    /// An API that merges disk layers when there are so many.
    pub async fn merging(merge_from: usize) -> Self {
        let limits = Limits {
            merge_from,
            ..limits()
        };
        let dir = tempfile::tempdir().unwrap();
        Self::start(dir, Arc::default(), 1 << 20, limits).await
    }

    /// An API that these may use.
    pub async fn open(access: Access) -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self::start_for(access, NO_RATES, dir, Arc::default(), 1 << 20, limits()).await
    }

    /// An API that takes so many requests of `/api/v1`.
    pub async fn with_rates(rates: Rates) -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self::start_for(Access::Local, rates, dir, Arc::default(), 1 << 20, limits()).await
    }

    /// An API with these quotas.
    pub async fn with_quotas(quotas: Quotas) -> Self {
        let limits = Limits { quotas, ..limits() };
        let dir = tempfile::tempdir().unwrap();
        Self::start(dir, Arc::default(), 1 << 20, limits).await
    }

    /// What the next daemon makes of what this one leaves.
    pub async fn restart(self) -> Self {
        let limits = self.manager.limits().clone();
        self.host.restart();
        let Self { host, dir, .. } = self;
        Self::start(dir, host, 1 << 20, limits).await
    }

    async fn start(
        dir: tempfile::TempDir,
        host: Arc<FakeHost>,
        max_upload: u64,
        limits: Limits,
    ) -> Self {
        Self::start_for(Access::Local, NO_RATES, dir, host, max_upload, limits).await
    }

    async fn start_for(
        access: Access,
        rates: Rates,
        dir: tempfile::TempDir,
        host: Arc<FakeHost>,
        max_upload: u64,
        mut limits: Limits,
    ) -> Self {
        let store = Arc::new(SqliteStore::open(&dir.path().join("db")).unwrap());
        limits.exec.spool = SpoolSpace::new(dir.path().to_owned(), 4 * limits.exec.max_output);
        let manager = Manager::new(host.clone(), store.clone(), limits);
        let events = host.events().await;
        manager.recover().await.unwrap();
        let follower = manager.clone();
        tokio::spawn(async move { follower.follow(events).await });
        let reaper = manager.clone();
        tokio::spawn(async move { reaper.set_aside_idle().await });
        let keeper = manager.clone();
        tokio::spawn(async move { keeper.keep_pool().await });
        let tokens = Tokens::open(&dir.path().join("token.key")).unwrap();
        let identity = Identity::new(store.clone(), tokens, Registration::Open).unwrap();
        let metrics = Metrics::new();
        manager.observe(Arc::new(metrics.clone()));
        let audit = AuditLog::open(&dir.path().join(audit::FILE)).unwrap();
        let scans = Scans::open(
            store.clone(),
            audit.clone(),
            Some(dir.path().join(ADVISORIES)),
        );
        let scans = scans.await.unwrap();
        let state = AppState {
            metrics,
            manager: manager.clone().into(),
            identity,
            access,
            rates: RateLimiter::new(rates),
            scans: scans.clone(),
            audit: audit.clone(),
            sockets: Sockets::new(MAX_SOCKETS),
            patience: Patience {
                head: Duration::from_secs(3600),
                body: Duration::from_secs(3600),
                upload: Duration::from_secs(3600),
            },
            max_upload,
            max_archive: 1 << 20,
        };
        Self {
            host,
            store,
            manager,
            scans,
            audit,
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

    /// The same with these headers.
    pub async fn call_as(
        &self,
        method: &str,
        path: &str,
        body: &str,
        headers: &[(&str, &str)],
    ) -> (StatusCode, Value) {
        let mut request = Request::builder().method(method).uri(path);
        if headers.iter().all(|(name, _)| *name != "host") {
            request = request.header("host", "localhost:8000");
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Body::from(body.to_owned())).unwrap();
        read_json(self.router.clone().oneshot(request).await.unwrap()).await
    }

    /// The `Authorization` of a new user with [`PASSWORD`].
    pub async fn user(&self, name: &str, role: &str) -> String {
        let user = serde_json::json!({"username": name, "password": PASSWORD, "role": role});
        let path = "/api/v1/auth/register";
        let (status, answer) = self.call("POST", path, &user.to_string()).await;
        assert_eq!(status, StatusCode::CREATED, "{answer}");
        self.token(name, PASSWORD).await
    }

    /// The `Authorization` of a user, who logs in.
    pub async fn token(&self, name: &str, password: &str) -> String {
        let body = serde_json::json!({"username": name, "password": password}).to_string();
        let (status, token) = self.call("POST", "/api/v1/auth/login", &body).await;
        assert_eq!(status, StatusCode::OK, "{token}");
        format!("Bearer {}", token["access_token"].as_str().unwrap())
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

    /// The answer to an upload by whoever has this `Authorization`.
    pub async fn upload_as(&self, token: &str, path: &str) -> (StatusCode, Value) {
        let form = form(&[("path", b"/f"), ("file", b"x")]);
        let request = Request::post(path)
            .header("host", "localhost")
            .header("authorization", token)
            .header("content-type", "multipart/form-data; boundary=X")
            .body(Body::from(form))
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

pub async fn read_json(response: Response<Body>) -> (StatusCode, Value) {
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
