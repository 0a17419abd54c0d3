//! Bodies that come too slowly.
//!
//! The body of a request has to come whole within some time, so that nobody holds a request by sending a byte
//! now and then. One that may be of any size, an upload, may take as long as it likes, if it goes on coming.
//! Only time in which the daemon waits for the client counts: a guest that takes an upload slowly is not its
//! sender's fault.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::Response;
use hyper::body::{Body as _, Frame, SizeHint};
use tokio::time::{Instant, Sleep, sleep_until};

use super::refuse;
use super::unread::Rest;

/// How long clients may take to send.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// The head of a request: from the opening of the connection, or from the answer before.
    pub head: Duration,
    /// A body that is no upload, after its head.
    pub body: Duration,
    /// The next piece of an upload.
    pub upload: Duration,
}

/// The pace of a body, as an extension of its request; clones share it.
#[derive(Debug, Clone, Default)]
pub struct Pace(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    is_upload: AtomicBool,
    was_cut: AtomicBool,
}

impl Pace {
    /// The body of this request is an upload.
    pub fn upload(request: &Request) {
        if let Some(pace) = request.extensions().get::<Self>() {
            pace.0.is_upload.store(true, Ordering::Relaxed);
        }
    }

    fn is_upload(&self) -> bool {
        self.0.is_upload.load(Ordering::Relaxed)
    }

    fn was_cut(&self) -> bool {
        self.0.was_cut.load(Ordering::Relaxed)
    }
}

/// The body did not come in time.
#[derive(Debug, thiserror::Error)]
#[error("the body came too slowly")]
struct TooSlow;

/// Answers with 408 to those whose body does not come in time, and closes their connection.
pub async fn bound(State(patience): State<Patience>, mut request: Request, next: Next) -> Response {
    if request.body().is_end_stream() {
        return next.run(request).await;
    }
    let pace = Pace::default();
    let rest = request.extensions().get::<Rest>().cloned();
    request.extensions_mut().insert(pace.clone());
    let path = request.uri().path().to_owned();
    let request = request.map(|body| Body::new(Paced::new(body, pace.clone(), patience, rest)));
    let response = next.run(request).await;
    let failed = response.status().is_client_error() || response.status().is_server_error();
    if !(failed && pace.was_cut()) {
        return response;
    }
    let message = match pace.is_upload() {
        true => format!(
            "nothing of the upload came for {:?}; send it without such breaks",
            patience.upload
        ),
        false => format!(
            "the body did not come within {:?}; send it at once",
            patience.body
        ),
    };
    let status = StatusCode::REQUEST_TIMEOUT;
    let mut response = refuse(&path, status, "request_timeout", &message);
    let close = HeaderValue::from_static("close");
    response.headers_mut().insert(header::CONNECTION, close);
    response
}

/// A body that has to come in time.
struct Paced {
    /// An empty one once it was cut off.
    body: Body,
    pace: Pace,
    patience: Patience,
    rest: Option<Rest>,
    began: Instant,
    /// Since when the next piece is waited for.
    waiting: Option<Instant>,
    time: Pin<Box<Sleep>>,
}

impl Paced {
    fn new(body: Body, pace: Pace, patience: Patience, rest: Option<Rest>) -> Self {
        let began = Instant::now();
        Self {
            body,
            pace,
            patience,
            rest,
            began,
            waiting: None,
            time: Box::pin(sleep_until(began + patience.body)),
        }
    }
}

impl hyper::body::Body for Paced {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let this = &mut *self;
        if let Poll::Ready(frame) = Pin::new(&mut this.body).poll_frame(context) {
            this.waiting = None;
            return Poll::Ready(frame);
        }
        let waiting = *this.waiting.get_or_insert_with(Instant::now);
        let deadline = match this.pace.is_upload() {
            true => waiting + this.patience.upload,
            false => this.began + this.patience.body,
        };
        if this.time.deadline() != deadline {
            this.time.as_mut().reset(deadline);
        }
        ready!(this.time.as_mut().poll(context));
        this.pace.0.was_cut.store(true, Ordering::Relaxed);
        if let Some(rest) = &this.rest {
            rest.leave();
        }
        this.body = Body::empty();
        Poll::Ready(Some(Err(axum::Error::new(TooSlow))))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use futures_util::stream::{self, StreamExt};
    use http_body_util::BodyExt;
    use tokio::time::sleep;

    use super::*;

    const PATIENCE: Patience = Patience {
        head: Duration::from_secs(1),
        body: Duration::from_secs(30),
        upload: Duration::from_secs(60),
    };

    /// A body of so many pieces, each of which comes this long after the one before was taken.
    fn pieces(count: usize, every: Duration) -> Body {
        let pieces = stream::repeat(Bytes::from_static(b"a")).take(count);
        Body::from_stream(pieces.then(move |piece| async move {
            sleep(every).await;
            Ok::<_, Infallible>(piece)
        }))
    }

    fn paced(body: Body) -> (Paced, Pace) {
        let pace = Pace::default();
        (Paced::new(body, pace.clone(), PATIENCE, None), pace)
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_has_to_come_whole_in_time() {
        let (body, pace) = paced(pieces(29, Duration::from_secs(1)));
        assert_eq!(body.collect().await.unwrap().to_bytes().len(), 29);
        assert!(!pace.was_cut());

        let began = Instant::now();
        let (body, pace) = paced(pieces(31, Duration::from_secs(1)));
        assert!(body.collect().await.is_err());
        assert!(pace.was_cut());
        assert_eq!(began.elapsed().as_secs(), 30);
    }

    #[tokio::test(start_paused = true)]
    async fn an_upload_has_to_go_on_coming() {
        let (body, pace) = paced(pieces(100, Duration::from_secs(59)));
        pace.0.is_upload.store(true, Ordering::Relaxed);
        assert_eq!(body.collect().await.unwrap().to_bytes().len(), 100);
        assert!(!pace.was_cut());

        let (body, pace) = paced(pieces(100, Duration::from_secs(61)));
        pace.0.is_upload.store(true, Ordering::Relaxed);
        assert!(body.collect().await.is_err());
        assert!(pace.was_cut());
    }

    #[tokio::test(start_paused = true)]
    async fn the_time_in_which_nobody_reads_does_not_count() {
        // All is there at once.
        let (mut body, pace) = paced(pieces(10, Duration::ZERO));
        pace.0.is_upload.store(true, Ordering::Relaxed);
        while let Some(piece) = body.frame().await {
            piece.unwrap();
            sleep(Duration::from_secs(600)).await;
        }
        assert!(!pace.was_cut());
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_follows_what_was_cut_off() {
        let (mut body, _) = paced(pieces(1, Duration::from_secs(600)));
        assert!(body.frame().await.unwrap().is_err());
        assert!(body.frame().await.is_none());
        assert!(body.is_end_stream());
    }
}
