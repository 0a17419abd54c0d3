//! Bodies of requests that no handler reads to their end.
//!
//! Most clients read no answer before they have sent all, and whoever still sends when a connection is
//! closed gets a reset in place of the answer. So what a handler leaves of a body is read and dropped here,
//! within bounds; a client that goes beyond them is cut off.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::Request;
use axum::http::header;
use axum::middleware::Next;
use axum::response::Response;
use http_body_util::BodyExt;
use hyper::body::{Body as _, Frame, SizeHint};
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::time::sleep;

/// How long a client may go on sending once it was answered: enough for the largest file that an upload takes
/// unless configured otherwise, over a network of 30 Mbit/s. It costs a connection and a task.
const MAX_TIME: Duration = Duration::from_secs(30);
/// How much of a body is dropped, in bytes: twice and a half the largest file that an upload takes unless
/// configured otherwise, so that one that is too large is told so.
const MAX_BYTES: u64 = 256 << 20;

/// What a handler leaves of a body, as an extension of the request; clones are of the same.
#[derive(Debug, Clone, Default)]
pub struct Rest(Arc<AtomicBool>);

impl Rest {
    /// Has it not read: the connection is closed with the answer.
    pub fn leave(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    fn is_left(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// Drops what the handler leaves of the body.
pub async fn drain(mut request: Request, next: Next) -> Response {
    if request.body().is_end_stream() {
        return next.run(request).await;
    }
    // The first read tells such a client to go on. One that is answered before that sends nothing.
    let waits = request.headers().contains_key(header::EXPECT);
    let (answering, answered) = oneshot::channel();
    let left = Rest::default();
    request.extensions_mut().insert(left.clone());
    let request = request.map(|body| {
        Body::new(Received {
            rest: Some((body, answered)),
            waits,
            left,
        })
    });
    let response = next.run(request).await;
    drop(answering);
    response
}

/// Ends when its other end is dropped.
type Answered = oneshot::Receiver<Infallible>;

/// A body whose rest is read when this is dropped.
struct Received {
    /// `None` once it was read to its end.
    rest: Option<(Body, Answered)>,
    /// Its sender waits to be told to send it.
    waits: bool,
    left: Rest,
}

impl hyper::body::Body for Received {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        self.waits = false;
        let Some((body, _)) = &mut self.rest else {
            return Poll::Ready(None);
        };
        let polled = Pin::new(body).poll_frame(context);
        if matches!(polled, Poll::Ready(None | Some(Err(_)))) {
            self.rest = None;
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.rest
            .as_ref()
            .is_none_or(|(body, _)| body.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        let rest = self.rest.as_ref();
        rest.map_or(SizeHint::with_exact(0), |(body, _)| body.size_hint())
    }
}

impl Drop for Received {
    fn drop(&mut self) {
        if self.waits || self.left.is_left() || self.is_end_stream() {
            return;
        }
        if let (Some((body, answered)), Ok(runtime)) = (self.rest.take(), Handle::try_current()) {
            runtime.spawn(read_and_drop(body, answered));
        }
    }
}

async fn read_and_drop(mut body: Body, answered: Answered) {
    let read = async {
        let mut total = 0;
        while let Some(Ok(frame)) = body.frame().await {
            total += frame.data_ref().map_or(0, |data| data.len() as u64);
            if total > MAX_BYTES {
                break;
            }
        }
    };
    let time_is_up = async {
        let _ = answered.await;
        sleep(MAX_TIME).await;
    };
    tokio::select! {
        () = read => {}
        () = time_is_up => {}
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use futures_util::stream::{self, StreamExt};
    use tokio::time::Instant;

    use super::*;

    /// A body without an end, of pieces that come this often, and what was read of it, in bytes.
    fn endless(every: Duration) -> (Body, Arc<AtomicU64>) {
        let read = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&read);
        let piece = Bytes::from(vec![0; 1 << 20]);
        let pieces = stream::repeat(piece).then(move |piece| {
            count.fetch_add(piece.len() as u64, Ordering::Relaxed);
            async move {
                sleep(every).await;
                Ok::<_, Infallible>(piece)
            }
        });
        (Body::from_stream(pieces), read)
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_sends_for_ever_is_not_read_for_ever() {
        let (answering, answered) = oneshot::channel();
        let (fast, read) = endless(Duration::ZERO);
        read_and_drop(fast, answered).await;
        assert_eq!(read.load(Ordering::Relaxed), MAX_BYTES + (1 << 20));
        drop(answering);

        let (answering, answered) = oneshot::channel();
        let (slow, _) = endless(Duration::from_secs(1));
        let began = Instant::now();
        let reading = tokio::spawn(read_and_drop(slow, answered));
        // Its time begins with the answer.
        sleep(Duration::from_secs(60)).await;
        assert!(!reading.is_finished());
        drop(answering);
        reading.await.unwrap();
        assert_eq!(began.elapsed().as_secs(), 60 + MAX_TIME.as_secs());
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_not_asked_for_is_not_read() {
        for (waits, polled) in [(true, false), (true, true), (false, false)] {
            let (body, read) = endless(Duration::from_millis(1));
            let (answering, answered) = oneshot::channel();
            let rest = Some((body, answered));
            let left = Rest::default();
            let mut received = Box::pin(Received { rest, waits, left });
            if polled {
                received.frame().await.unwrap().unwrap();
            }
            let before = read.load(Ordering::Relaxed);
            drop(received);
            drop(answering);
            sleep(Duration::from_secs(60)).await;
            let went_on = read.load(Ordering::Relaxed) > before;
            assert_eq!(went_on, !waits || polled);
        }
    }
}
