//! Connections of clients.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::ConnectInfo;
use axum::response::Response;
use axum::serve::Listener;
use hyper::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::ServiceExt;
use tracing::debug;

/// When to stop serving.
#[derive(Debug, Clone, Default)]
pub struct Stop {
    /// Nobody is let in any more, and what is being served is served to its end.
    pub closing: CancellationToken,
    /// What is still being served then is left.
    pub ending: CancellationToken,
}

/// Serves all who connect until it is told to close; then answers the requests that are being served, until
/// it is told to end, and returns. A connection on which no request has begun, or only the beginning of one has come, is closed
/// when it was so for `head_time`.
pub async fn serve(mut listener: TcpListener, router: Router, head_time: Duration, stop: Stop) {
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(head_time);
    let connections = TaskTracker::new();
    loop {
        let (stream, address) = tokio::select! {
            accepted = Listener::accept(&mut listener) => accepted,
            () = stop.closing.cancelled() => break,
        };
        let connection = carry(http.clone(), stream, address, router.clone(), stop.clone());
        connections.spawn(connection);
    }
    drop(listener);
    connections.close();
    connections.wait().await;
}

/// Serves one connection to its end.
async fn carry(
    http: http1::Builder,
    stream: TcpStream,
    address: SocketAddr,
    router: Router,
    stop: Stop,
) {
    let service = service_fn(|request| answer(router.clone(), request, address));
    let connection = http
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    let mut connection = std::pin::pin!(connection);
    let served = tokio::select! {
        served = connection.as_mut() => served,
        () = stop.closing.cancelled() => {
            connection.as_mut().graceful_shutdown();
            tokio::select! {
                served = connection => served,
                () = stop.ending.cancelled() => return,
            }
        }
    };
    if let Err(error) = served {
        debug!(%address, reason = crate::chain(&error), "a connection broke off");
    }
}

async fn answer(
    router: Router,
    mut request: Request<Incoming>,
    address: SocketAddr,
) -> Result<Response, Infallible> {
    request.extensions_mut().insert(ConnectInfo(address));
    router.oneshot(request.map(Body::new)).await
}
