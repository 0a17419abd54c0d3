//! HTTP: connections, operations, errors. The protocol is told in the crate `agent_protocol`.

use std::{
    cell::Cell,
    convert::Infallible,
    ffi::OsStr,
    io,
    os::unix::ffi::OsStrExt,
    path::PathBuf,
    rc::Rc,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use agent_protocol as protocol;
use agent_protocol::{
    AttachRequest, CONNECT_UPGRADE, ConnectRequest, EXEC_UPGRADE, ErrorBody, ErrorCode,
    ErrorDetail, ExecRequest, FREEZE_UPGRADE, FROZEN, FileQuery, FileQueryError, FreezeRequest,
    Health, MAX_JSON_BODY, NOT_FROZEN, PROCESS_UPGRADE, Resumed, ResumedRequest, ShutdownRequest,
    SignalRequest, StartProcess, WalkRequest,
};
use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt, Limited};
use hyper::{
    Method, Request, Response, StatusCode,
    body::Incoming,
    header::{CONNECTION, CONTENT_TYPE, HeaderName, HeaderValue, UPGRADE},
    server::conn::http1,
    service::service_fn,
    upgrade::OnUpgrade,
};
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};

use crate::{
    body::Body,
    connect::{self, ConnectError, Connections},
    exec::{self, Cgroups, Running},
    files::{self, FileError, Listing, Reading, walk::Walk, write::Writing},
    freeze::{FreezeError, Frozen},
    identity,
    log::{chain, warning},
    process::{self, ProcessError, Processes},
    reaper::Reaper,
    shutdown, system, usage,
};

/// The largest buffer of a connection, in bytes; also the largest chunk of an upload.
const CONNECTION_BUFFER: usize = 64 * 1024;
/// How long the host may go on with a file that is not taken.
const REST: Duration = Duration::from_secs(30);
/// What a JSON body and the lines of a listing are.
const JSON: HeaderValue = HeaderValue::from_static("application/json");
const JSON_LINES: HeaderValue = HeaderValue::from_static("application/x-ndjson");
const BYTES: HeaderValue = HeaderValue::from_static("application/octet-stream");

/// What the operations work with.
#[derive(Debug)]
pub struct Agent {
    /// Waits for all processes.
    pub reaper: Rc<Reaper>,
    /// Makes cgroups, where the guest has them.
    pub cgroups: Option<Rc<Cgroups>>,
    /// Whether this is the guest's init process.
    pub init: bool,
    /// How many execs run.
    pub execs: Cell<usize>,
    /// Processes that belong to no connection.
    pub processes: Rc<Processes>,
    /// Connections to ports of the guest.
    pub connections: Rc<Connections>,
    /// What the guest knows of itself. Held by one request after the other.
    pub itself: Arc<Mutex<identity::Itself>>,
}

/// A request that was not carried out.
#[derive(Debug, thiserror::Error)]
enum RequestError {
    #[error("there is no operation {0}")]
    UnknownOperation(String),
    #[error("{0} does not have this method")]
    Method(&'static str),
    #[error("the query is not usable")]
    Query(#[from] FileQueryError),
    #[error("the body is larger than {MAX_JSON_BODY} bytes")]
    BodyTooLarge,
    #[error("the body did not arrive completely")]
    Body(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("the body is not the JSON that this operation takes")]
    Json(#[source] serde_json::Error),
    #[error("{0}")]
    Identity(&'static str),
    #[error("exec needs the headers Connection: Upgrade and Upgrade: {EXEC_UPGRADE}")]
    NoUpgrade,
    #[error("freeze needs the headers Connection: Upgrade and Upgrade: {FREEZE_UPGRADE}")]
    NoFreezeUpgrade,
    #[error("{path} needs the headers Connection: Upgrade and Upgrade: {protocol}")]
    NotUpgraded {
        path: &'static str,
        protocol: &'static str,
    },
    #[error(transparent)]
    Process(#[from] ProcessError),
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error("{0}")]
    Walk(&'static str),
    #[error("{0}")]
    FreezeTime(&'static str),
    #[error(transparent)]
    Freeze(#[from] FreezeError),
    #[error("the program was not started")]
    Exec(#[from] exec::ExecError),
    #[error("the file operation failed")]
    File(#[from] FileError),
    #[error("the agent is not the init process of a guest, and cannot shut one down")]
    NotInit,
    #[error("the kernel does not tell what the guest takes")]
    Usage(#[source] io::Error),
    #[error("a thread of the agent failed")]
    Thread(#[from] tokio::task::JoinError),
    #[error("the answer cannot be written as JSON")]
    Answer(#[source] serde_json::Error),
}

impl RequestError {
    fn detail(&self) -> ErrorDetail {
        let code = match self {
            Self::UnknownOperation(_) => ErrorCode::UnknownOperation,
            Self::Method(_) => ErrorCode::MethodNotAllowed,
            Self::Query(FileQueryError::PathTooLong(_)) => ErrorCode::BadPath,
            Self::Query(_)
            | Self::Body(_)
            | Self::Json(_)
            | Self::Identity(_)
            | Self::FreezeTime(_)
            | Self::Walk(_)
            | Self::NoFreezeUpgrade
            | Self::NotUpgraded { .. }
            | Self::NoUpgrade => ErrorCode::BadRequest,
            Self::BodyTooLarge => ErrorCode::BodyTooLarge,
            Self::NotInit => ErrorCode::NotInit,
            Self::Thread(_) | Self::Answer(_) | Self::Freeze(_) | Self::Usage(_) => {
                ErrorCode::Internal
            }
            Self::Process(ProcessError::Exec(error)) => {
                return ErrorDetail::new(error.code(), chain(error));
            }
            Self::Process(error) => error.code(),
            Self::Connect(error) => error.code(),
            // The outer message adds nothing to what these say.
            Self::Exec(error) => return ErrorDetail::new(error.code(), chain(error)),
            Self::File(error) => return ErrorDetail::new(error.code(), chain(error)),
        };
        ErrorDetail::new(code, chain(self))
    }
}

type Answer = Result<Response<Body>, RequestError>;

impl Agent {
    /// Carries out the one request of a connection, or several that ask for the usage.
    pub async fn serve(self: Rc<Self>, connection: UnixStream) {
        let service = service_fn(|request| {
            let agent = self.clone();
            async move { Ok::<_, Infallible>(agent.answer(request).await) }
        });
        // An error is a host that went away or does not speak HTTP. It has had its answer, or
        // there is nobody left to tell.
        let _ = http1::Builder::new()
            .auto_date_header(false)
            .max_buf_size(CONNECTION_BUFFER)
            .serve_connection(TokioIo::new(connection), service)
            .with_upgrades()
            .await;
    }

    async fn answer(self: Rc<Self>, request: Request<Incoming>) -> Response<Body> {
        let is_last = request.uri().path() != protocol::PATH_USAGE;
        let mut response = match self.dispatch(request).await {
            Ok(response) => response,
            Err(error) => refusal(error.detail()),
        };
        if is_last && response.status() != StatusCode::SWITCHING_PROTOCOLS {
            let close = HeaderValue::from_static("close");
            response.headers_mut().insert(CONNECTION, close);
        }
        response
    }

    async fn dispatch(self: Rc<Self>, request: Request<Incoming>) -> Answer {
        let path = request.uri().path().to_owned();
        let method = request.method().clone();
        match (path.as_str(), method) {
            (protocol::PATH_HEALTH, Method::GET) => self.health(),
            (protocol::PATH_USAGE, Method::GET) => usage(),
            (protocol::PATH_EXEC, Method::POST) => self.exec(request).await,
            (protocol::PATH_PROCESSES, Method::POST) => self.start_process(request).await,
            (protocol::PATH_PROCESSES, Method::GET) => json(StatusCode::OK, &self.processes.list()),
            (protocol::PATH_SIGNAL, Method::POST) => self.signal(request).await,
            (protocol::PATH_ATTACH, Method::POST) => self.attach(request).await,
            (protocol::PATH_CONNECT, Method::POST) => self.connect(request).await,
            (protocol::PATH_FILES, Method::PUT) => put(request).await,
            (protocol::PATH_FILES, Method::GET) => get(&query(&request)?).await,
            (protocol::PATH_FILES, Method::DELETE) => remove(&query(&request)?).await,
            (protocol::PATH_DIR, Method::PUT) => make_dir(&query(&request)?).await,
            (protocol::PATH_STAT, Method::GET) => stat(&query(&request)?).await,
            (protocol::PATH_DIR, Method::GET) => list(&query(&request)?).await,
            (protocol::PATH_WALK, Method::POST) => walk(request).await,
            (protocol::PATH_RESUMED, Method::POST) => self.resumed(request).await,
            (protocol::PATH_FREEZE, Method::POST) => self.freeze(request).await,
            (protocol::PATH_SHUTDOWN, Method::POST) => self.shutdown(request).await,
            (protocol::PATH_HEALTH, _) => Err(RequestError::Method(protocol::PATH_HEALTH)),
            (protocol::PATH_USAGE, _) => Err(RequestError::Method(protocol::PATH_USAGE)),
            (protocol::PATH_EXEC, _) => Err(RequestError::Method(protocol::PATH_EXEC)),
            (protocol::PATH_PROCESSES, _) => Err(RequestError::Method(protocol::PATH_PROCESSES)),
            (protocol::PATH_SIGNAL, _) => Err(RequestError::Method(protocol::PATH_SIGNAL)),
            (protocol::PATH_ATTACH, _) => Err(RequestError::Method(protocol::PATH_ATTACH)),
            (protocol::PATH_CONNECT, _) => Err(RequestError::Method(protocol::PATH_CONNECT)),
            (protocol::PATH_FILES, _) => Err(RequestError::Method(protocol::PATH_FILES)),
            (protocol::PATH_STAT, _) => Err(RequestError::Method(protocol::PATH_STAT)),
            (protocol::PATH_DIR, _) => Err(RequestError::Method(protocol::PATH_DIR)),
            (protocol::PATH_WALK, _) => Err(RequestError::Method(protocol::PATH_WALK)),
            (protocol::PATH_RESUMED, _) => Err(RequestError::Method(protocol::PATH_RESUMED)),
            (protocol::PATH_FREEZE, _) => Err(RequestError::Method(protocol::PATH_FREEZE)),
            (protocol::PATH_SHUTDOWN, _) => Err(RequestError::Method(protocol::PATH_SHUTDOWN)),
            _ => Err(RequestError::UnknownOperation(path)),
        }
    }

    fn health(&self) -> Answer {
        json(
            StatusCode::OK,
            &Health {
                version: env!("CARGO_PKG_VERSION").to_owned(),
                kernel: system::kernel_release(),
                uptime_us: system::boottime_us(),
                init: self.init,
                execs: self.execs.get(),
            },
        )
    }

    async fn exec(self: Rc<Self>, mut request: Request<Incoming>) -> Answer {
        if !asks_for(&request, EXEC_UPGRADE) {
            return Err(RequestError::NoUpgrade);
        }
        let upgrade = hyper::upgrade::on(&mut request);
        let order: ExecRequest = read_json(request.into_body()).await?;
        let running = exec::start(order, &self.reaper, self.cgroups.as_ref()).await?;
        tokio::task::spawn_local(self.carry(upgrade, running));
        Ok(switching_to(EXEC_UPGRADE))
    }

    /// Takes the connection from HTTP. If the host is gone by then, dropping `running` kills
    /// the program.
    async fn carry(self: Rc<Self>, upgrade: OnUpgrade, running: Running) {
        self.execs.set(self.execs.get() + 1);
        if let Some((connection, early)) = taken(upgrade).await {
            exec::run(connection, early, running).await;
        }
        self.execs.set(self.execs.get() - 1);
    }

    async fn start_process(&self, request: Request<Incoming>) -> Answer {
        let order: StartProcess = read_json(request.into_body()).await?;
        let started = self
            .processes
            .start(order, &self.reaper, self.cgroups.as_ref())
            .await?;
        json(StatusCode::CREATED, &started)
    }

    async fn signal(&self, request: Request<Incoming>) -> Answer {
        let order: SignalRequest = read_json(request.into_body()).await?;
        self.processes.signal(&order.process, order.signal)?;
        let mut response = Response::new(Body::full(Bytes::new()));
        *response.status_mut() = StatusCode::NO_CONTENT;
        Ok(response)
    }

    async fn attach(&self, mut request: Request<Incoming>) -> Answer {
        let (path, protocol) = (protocol::PATH_ATTACH, PROCESS_UPGRADE);
        if !asks_for(&request, protocol) {
            return Err(RequestError::NotUpgraded { path, protocol });
        }
        let upgrade = hyper::upgrade::on(&mut request);
        let order: AttachRequest = read_json(request.into_body()).await?;
        let attachment = self.processes.attach(&order.process)?;
        tokio::task::spawn_local(async move {
            if let Some((connection, early)) = taken(upgrade).await {
                process::attach(connection, early, attachment).await;
            }
        });
        Ok(switching_to(protocol))
    }

    async fn connect(&self, mut request: Request<Incoming>) -> Answer {
        let (path, protocol) = (protocol::PATH_CONNECT, CONNECT_UPGRADE);
        if !asks_for(&request, protocol) {
            return Err(RequestError::NotUpgraded { path, protocol });
        }
        let upgrade = hyper::upgrade::on(&mut request);
        let order: ConnectRequest = read_json(request.into_body()).await?;
        let connection = self.connections.connect(order.port).await?;
        tokio::task::spawn_local(async move {
            if let Ok(upgraded) = upgrade.await {
                connect::carry(TokioIo::new(upgraded), connection).await;
            }
        });
        Ok(switching_to(protocol))
    }

    async fn resumed(&self, request: Request<Incoming>) -> Answer {
        let order: ResumedRequest = read_json(request.into_body()).await?;
        order.check().map_err(RequestError::Identity)?;
        let done = if self.init {
            let itself = Arc::clone(&self.itself);
            let assume = move || {
                let mut itself = itself.lock().unwrap_or_else(PoisonError::into_inner);
                identity::assume(&order, &mut itself)
            };
            tokio::task::spawn_blocking(assume).await?
        } else {
            Resumed {
                realtime_ns: identity::realtime_ns(),
                problems: vec!["the agent is not process 1, and left all as it was".to_owned()],
                ..Resumed::default()
            }
        };
        json(StatusCode::OK, &done)
    }

    async fn freeze(&self, mut request: Request<Incoming>) -> Answer {
        if !asks_for(&request, FREEZE_UPGRADE) {
            return Err(RequestError::NoFreezeUpgrade);
        }
        let upgrade = hyper::upgrade::on(&mut request);
        let order: FreezeRequest = read_json(request.into_body()).await?;
        order.check().map_err(RequestError::FreezeTime)?;
        let time = Duration::from_millis(order.timeout_ms);
        let frozen = Frozen::freeze(time, self.init).await?;
        tokio::task::spawn_local(hold(upgrade, frozen));
        Ok(switching_to(FREEZE_UPGRADE))
    }

    async fn shutdown(self: Rc<Self>, request: Request<Incoming>) -> Answer {
        let order: ShutdownRequest = read_json(request.into_body()).await?;
        if !self.init {
            return Err(RequestError::NotInit);
        }
        tokio::task::spawn_local(async move {
            let grace = Duration::from_millis(order.grace_ms);
            shutdown::run(order.action, grace, &self.reaper).await;
        });
        let mut response = Response::new(Body::full(Bytes::new()));
        *response.status_mut() = StatusCode::ACCEPTED;
        Ok(response)
    }
}

/// On this very thread: the kernel has all of it at hand, also of a file system that is frozen.
fn usage() -> Answer {
    json(
        StatusCode::OK,
        &usage::measure().map_err(RequestError::Usage)?,
    )
}

/// The connection, taken from HTTP, and what the host has sent on it already; `None` if the host is
/// gone.
async fn taken(upgrade: OnUpgrade) -> Option<(UnixStream, BytesMut)> {
    match upgrade.await.ok()?.downcast::<TokioIo<UnixStream>>() {
        Ok(parts) => Some((parts.io.into_inner(), BytesMut::from(parts.read_buf))),
        Err(_) => {
            warning!("a connection is of an unknown type");
            None
        }
    }
}

fn asks_for(request: &Request<Incoming>, protocol: &str) -> bool {
    let asked = request.headers().get(UPGRADE).map(HeaderValue::as_bytes);
    asked.is_some_and(|name| name.eq_ignore_ascii_case(protocol.as_bytes()))
}

fn switching_to(protocol: &'static str) -> Response<Body> {
    let mut response = Response::new(Body::full(Bytes::new()));
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static(protocol));
    response
}

/// Keeps the file system frozen until the host says otherwise or is gone, or the time is over.
async fn hold(upgrade: OnUpgrade, mut frozen: Frozen) {
    let Ok(upgraded) = upgrade.await else { return };
    let mut host = TokioIo::new(upgraded);
    let asked = tokio::select! {
        asked = host.read_u8() => asked,
        () = frozen.time_is_over() => {
            // The host may find this when it asks.
            let _ = host.write_u8(NOT_FROZEN).await;
            return;
        }
    };
    if asked.is_ok() {
        let answer = if frozen.thaw().await {
            FROZEN
        } else {
            NOT_FROZEN
        };
        // A host that is gone does not want to know.
        let _ = host.write_u8(answer).await;
        let _ = host.shutdown().await;
    }
}

/// The answer to something that is refused.
fn refusal(error: ErrorDetail) -> Response<Body> {
    let status =
        StatusCode::from_u16(error.code.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    json(status, &ErrorBody { error }).unwrap_or_else(|_| {
        let mut response = Response::new(Body::full(Bytes::new()));
        *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
        response
    })
}

fn json(status: StatusCode, value: &impl Serialize) -> Answer {
    let bytes = serde_json::to_vec(value).map_err(RequestError::Answer)?;
    Ok(respond(status, JSON, Body::full(bytes)))
}

fn respond(status: StatusCode, content_type: HeaderValue, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, content_type);
    response
}

async fn read_json<T: DeserializeOwned>(body: Incoming) -> Result<T, RequestError> {
    let bytes = match Limited::new(body, MAX_JSON_BODY).collect().await {
        Ok(collected) => collected.to_bytes(),
        Err(e) if e.is::<http_body_util::LengthLimitError>() => {
            return Err(RequestError::BodyTooLarge);
        }
        Err(e) => return Err(RequestError::Body(e)),
    };
    serde_json::from_slice(&bytes).map_err(RequestError::Json)
}

fn query(request: &Request<Incoming>) -> Result<FileQuery, RequestError> {
    Ok(FileQuery::parse(request.uri().query().unwrap_or(""))?)
}

fn path(query: &FileQuery) -> PathBuf {
    PathBuf::from(OsStr::from_bytes(&query.path))
}

/// Runs a file operation on a thread for blocking work.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, FileError> + Send + 'static,
) -> Result<T, RequestError> {
    Ok(tokio::task::spawn_blocking(work).await??)
}

async fn put(request: Request<Incoming>) -> Answer {
    let query = query(&request)?;
    let mut body = request.into_body();
    let writing = match write(query, &mut body).await {
        Ok(writing) => writing,
        Err(error) => {
            drop_rest(body);
            return Err(error);
        }
    };
    let status = if writing.creates {
        StatusCode::CREATED
    } else {
        StatusCode::OK
    };
    json(status, &blocking(move || writing.finish()).await?)
}

async fn write(query: FileQuery, body: &mut Incoming) -> Result<Writing, RequestError> {
    let mut writing = blocking(move || Writing::begin(&query)).await?;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|e| RequestError::Body(e.into()))?;
        if let Ok(bytes) = frame.into_data() {
            writing = blocking(move || {
                writing.write(&bytes)?;
                Ok(writing)
            })
            .await?;
        }
    }
    Ok(writing)
}

/// Reads what the host still sends while it is answered: one that writes to a closed connection may hear of
/// that in place of the answer.
fn drop_rest(mut body: Incoming) {
    tokio::spawn(tokio::time::timeout(REST, async move {
        while let Some(Ok(_)) = body.frame().await {}
    }));
}

async fn get(query: &FileQuery) -> Answer {
    let path = path(query);
    let mut reading = blocking(move || Reading::open(&path)).await?;
    let headers = file_headers(&reading);
    let body = Body::stream(reading.len(), move || reading.next_chunk());
    let mut response = respond(StatusCode::OK, BYTES, body);
    for (name, value) in headers {
        if let Ok(value) = HeaderValue::from_str(&value) {
            response
                .headers_mut()
                .insert(HeaderName::from_static(name), value);
        }
    }
    Ok(response)
}

fn file_headers(reading: &Reading) -> [(&'static str, String); 5] {
    use std::os::unix::fs::MetadataExt;
    let metadata = &reading.metadata;
    [
        (
            protocol::HEADER_MODE,
            format!("{:04o}", metadata.mode() & 0o7777),
        ),
        (protocol::HEADER_UID, metadata.uid().to_string()),
        (protocol::HEADER_GID, metadata.gid().to_string()),
        (protocol::HEADER_SIZE, metadata.len().to_string()),
        (
            protocol::HEADER_MTIME_US,
            files::mtime_us(metadata).to_string(),
        ),
    ]
}

async fn stat(query: &FileQuery) -> Answer {
    let path = path(query);
    json(StatusCode::OK, &blocking(move || files::stat(&path)).await?)
}

async fn list(query: &FileQuery) -> Answer {
    let path = path(query);
    let mut listing = blocking(move || Listing::open(&path)).await?;
    let body = Body::stream(None, move || listing.next_lines());
    Ok(respond(StatusCode::OK, JSON_LINES, body))
}

async fn walk(request: Request<Incoming>) -> Answer {
    let order: WalkRequest = read_json(request.into_body()).await?;
    order.check().map_err(RequestError::Walk)?;
    let mut walk = blocking(move || Walk::open(&order)).await?;
    let body = Body::stream(None, move || walk.next_lines());
    Ok(respond(StatusCode::OK, JSON_LINES, body))
}

async fn make_dir(query: &FileQuery) -> Answer {
    let path = path(query);
    let (is_new, entry) = blocking(move || files::make_dir(&path)).await?;
    let status = if is_new {
        StatusCode::CREATED
    } else {
        StatusCode::OK
    };
    json(status, &entry)
}

async fn remove(query: &FileQuery) -> Answer {
    let path = path(query);
    blocking(move || files::remove(&path)).await?;
    let mut response = Response::new(Body::full(Bytes::new()));
    *response.status_mut() = StatusCode::NO_CONTENT;
    Ok(response)
}

/// Waits a moment where accepting fails for want of resources, which come back as operations
/// end; anything else that accept reports belongs to the one connection.
pub async fn after_failed_accept(error: &io::Error) {
    if matches!(
        error.raw_os_error(),
        Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::ENOBUFS)
    ) {
        warning!("cannot accept a connection: {error}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
