//! Connections of clients.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
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
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::ServiceExt;
use tracing::{debug, warn};

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
/// when it was so for `head_time`. Who connects when `room` has no permit left waits until another has gone.
pub async fn serve(
    mut listener: TcpListener,
    router: Router,
    head_time: Duration,
    room: Arc<Semaphore>,
    stop: Stop,
) {
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(head_time);
    let connections = TaskTracker::new();
    let mut was_full = false;
    loop {
        let is_full = room.available_permits() == 0;
        if is_full && !was_full {
            warn!("there are as many connections as there may be; others wait");
        }
        was_full = is_full;
        let accepted = async {
            let permit = Arc::clone(&room).acquire_owned().await;
            (permit, Listener::accept(&mut listener).await)
        };
        let (permit, (stream, address)) = tokio::select! {
            accepted = accepted => accepted,
            () = stop.closing.cancelled() => break,
        };
        let connection = carry(http.clone(), stream, address, router.clone(), stop.clone());
        connections.spawn(async move {
            connection.await;
            drop(permit);
        });
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

#[cfg(test)]
mod tests {
    use axum::routing::get;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    /// Asks on a connection that stays open.
    async fn ask(stream: &mut TcpStream) {
        let request = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n";
        stream.write_all(request).await.unwrap();
    }

    async fn answered(stream: &mut TcpStream) {
        let mut answer = Vec::new();
        while !answer.ends_with(b"\r\n\r\nserved") {
            answer.push(stream.read_u8().await.unwrap());
        }
    }

    #[tokio::test]
    async fn who_finds_no_room_waits_until_another_has_gone() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let router = Router::new().route("/", get(async || "served"));
        let (room, stop) = (Arc::new(Semaphore::new(2)), Stop::default());
        let serving = serve(
            listener,
            router,
            Duration::from_secs(300),
            room,
            stop.clone(),
        );
        let serving = tokio::spawn(serving);
        let mut served = Vec::new();
        for _ in 0..2 {
            let mut stream = TcpStream::connect(address).await.unwrap();
            ask(&mut stream).await;
            answered(&mut stream).await;
            served.push(stream);
        }
        let mut waiting = TcpStream::connect(address).await.unwrap();
        ask(&mut waiting).await;
        // Many times as long as an answer takes.
        for _ in 0..50 {
            for stream in &mut served {
                ask(stream).await;
                answered(stream).await;
            }
        }
        let early = waiting.try_read(&mut [0]);
        assert_eq!(early.unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
        served.pop();
        answered(&mut waiting).await;
        // Also those who wait do not hold up the end.
        let _last = TcpStream::connect(address).await.unwrap();
        stop.closing.cancel();
        serving.await.unwrap();
    }
}
