//! The thread that serves the API's connections.
//!
//! One runtime of one thread: nothing here waits for the machine but the request that asked it
//! something, so `vmm.ping` is answered whatever else goes on.

use std::convert::Infallible;
use std::io;
use std::os::fd::OwnedFd;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::Serialize;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;

use super::answer::{self, ApiResponse};
use super::routes::{self, Handler, Route};
use super::socket::Listener;
use super::stream::ClientStream;
use super::{API_VERSION, BASE_PATH};
use crate::control::request::{Action, Mailbox};
use crate::machine::STACK_SIZE;
use crate::sandboxing::ThreadKind;
use crate::sandboxing::seccomp;

/// The largest body that is read, in bytes.
const MAX_BODY: usize = 4 << 20;
/// The most connections at a time. Further clients wait until one is closed.
const MAX_CONNECTIONS: usize = 64;
/// How long a client may take to send the head of a request.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
/// How long the end of the process waits for answers that are under way.
const LAST_ANSWERS: Duration = Duration::from_secs(1);

/// What is served.
#[derive(Clone)]
struct Vmm {
    mailbox: Mailbox,
    /// In a jail, the process has another id than the one by which it was started.
    pid: u32,
}

/// A running server. Dropping it ends it: answers that are under way are still sent.
pub struct ApiServer {
    stop: watch::Sender<()>,
    thread: Option<JoinHandle<()>>,
}

impl ApiServer {
    /// Starts the server's thread. `pid` is the id by which clients know this process.
    ///
    /// # Errors
    /// The host gives no thread or descriptor.
    pub fn start(listener: Listener, mailbox: Mailbox, pid: u32) -> io::Result<Self> {
        let vmm = Vmm { mailbox, pid };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let socket = listener.socket().try_clone()?;
        let socket = {
            let _entered = runtime.enter();
            UnixListener::from_std(socket)?
        };
        let (stop, stopped) = watch::channel(());
        let thread = thread::Builder::new()
            .name("api".to_owned())
            .stack_size(STACK_SIZE)
            .spawn(move || {
                if let Err(error) = seccomp::apply(ThreadKind::Api) {
                    tracing::error!(error = crate::error_chain(&error), "the API is not served");
                    return;
                }
                runtime.block_on(serve(&socket, vmm, stopped));
                // Only now, so that its files stay as long as it is served.
                drop(listener);
            })?;
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        // Nobody listens only if the thread has ended.
        let _ = self.stop.send(());
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been reported by the panic hook already.
            let _ = thread.join();
        }
    }
}

async fn serve(socket: &UnixListener, vmm: Vmm, mut stopped: watch::Receiver<()>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            _ = stopped.changed() => break,
            Some(_) = connections.join_next() => {}
            accepted = socket.accept(), if connections.len() < MAX_CONNECTIONS => {
                match accepted {
                    Ok((stream, _)) => {
                        connections.spawn(converse(stream, vmm.clone(), stopped.clone()));
                    }
                    Err(error) => {
                        tracing::warn!(%error, "a client of the API was not accepted");
                        // Out of descriptors, most likely: it would fail again at once.
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                }
            }
        }
    }
    let all = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(LAST_ANSWERS, all).await.is_err() {
        tracing::debug!("clients of the API are cut off");
    }
}

async fn converse(stream: UnixStream, vmm: Vmm, mut stopped: watch::Receiver<()>) {
    let stream = ClientStream::new(stream);
    let descriptors = stream.descriptors();
    let service = service_fn(move |request| {
        let vmm = vmm.clone();
        // Whatever happens to the request, those that it does not use are closed with it.
        let descriptors = descriptors.take();
        async move { Ok::<_, Infallible>(handle(request, descriptors, &vmm).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        // Its clients look for `Content-Length: ` in just this case.
        .title_case_headers(true)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    let result = tokio::select! {
        result = connection.as_mut() => result,
        _ = stopped.changed() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = result {
        tracing::debug!(%error, "connection to the API");
    }
}

async fn handle(request: Request<Incoming>, descriptors: Vec<OwnedFd>, vmm: &Vmm) -> ApiResponse {
    let path = request.uri().path();
    let Some(route) = routes::find(path) else {
        let what =
            format!("there is no {path}; paths start with {BASE_PATH}, as in {BASE_PATH}vmm.ping");
        return answer::failure(StatusCode::NOT_FOUND, &[&what]);
    };
    if request.method() != route.method {
        let what = format!("expected {}, not {}", route.method, request.method());
        return bad_request(route, &what);
    }
    let body = match read_body(request.into_body()).await {
        Ok(body) => body,
        Err(what) => return bad_request(route, &what),
    };
    match (route.handler.takes_body(), body.is_empty()) {
        (true, true) => return bad_request(route, "a body is missing"),
        (false, false) => return bad_request(route, "there is a body, and none is taken"),
        (true, false) | (false, true) => {}
    }
    match route.handler {
        Handler::Ping => ping(vmm.pid),
        Handler::Bare(action) => ask(route, action(), &vmm.mailbox).await,
        Handler::Body(parse) => match parse(&body) {
            Ok(action) => ask(route, action, &vmm.mailbox).await,
            Err(error) => answer::bad_request(&answer::failed(route.name), &error),
        },
        Handler::BodyAndDescriptors(parse) => match parse(&body, descriptors) {
            Ok(action) => ask(route, action, &vmm.mailbox).await,
            Err(error) => answer::bad_request(&answer::failed(route.name), &error),
        },
        Handler::Lacking(why) => bad_request(route, why),
    }
}

async fn read_body(body: Incoming) -> Result<Bytes, String> {
    match Limited::new(body, MAX_BODY).collect().await {
        Ok(body) => Ok(body.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => {
            Err(format!("the body is larger than {MAX_BODY} bytes"))
        }
        Err(error) => Err(format!("the body broke off: {error}")),
    }
}

fn bad_request(route: &Route, what: &str) -> ApiResponse {
    answer::failure(
        StatusCode::BAD_REQUEST,
        &[&answer::failed(route.name), what],
    )
}

async fn ask(route: &Route, action: Action, mailbox: &Mailbox) -> ApiResponse {
    let (sender, answer) = oneshot::channel();
    let reply = Box::new(move |result| {
        // A client that has gone away does not hear of it.
        let _ = sender.send(result);
    });
    mailbox.ask(action, reply);
    match answer.await {
        Ok(result) => answer::from_control(route.name, result),
        Err(_) => answer::failure(
            StatusCode::INTERNAL_SERVER_ERROR,
            &[&answer::failed(route.name), "the VMM is ending"],
        ),
    }
}

fn ping(pid: u32) -> ApiResponse {
    #[derive(Serialize)]
    struct Ping {
        build_version: &'static str,
        version: &'static str,
        pid: u32,
        features: [&'static str; 1],
    }
    answer::json(&Ping {
        build_version: concat!("vmm ", env!("CARGO_PKG_VERSION")),
        version: API_VERSION,
        pid,
        features: ["kvm"],
    })
}
