//! Forms with files in them, as streams.

use std::io;
use std::task::Poll;

use axum::body::{Body, Bytes};
use axum::extract::multipart::{Multipart, MultipartRejection};
use axum::extract::{FromRequest, Request};
use axum::http::header;
use futures_util::stream::{self, BoxStream, Stream, StreamExt};

use crate::domain::Spooled;
use crate::http::Pace;

/// What a form has around its file, at most, in bytes.
pub const FORM_OVERHEAD: u64 = 64 * 1024;
/// Pieces of a file that wait for the guest to take them.
pub const PIECES_IN_FLIGHT: usize = 2;
/// How much of an upload stays in memory if its `path` comes last, in bytes.
pub const SPOOL_MEMORY: usize = 256 * 1024;

/// The length that a request says that its body has, in bytes.
pub fn announced(request: &Request) -> Option<u64> {
    let length = request.headers().get(header::CONTENT_LENGTH)?;
    length.to_str().ok()?.parse().ok()
}

/// The form that a request has as its body, which may take as long as it likes if it goes on coming.
///
/// # Errors
/// It has none.
pub async fn form(request: Request) -> Result<Multipart, MultipartRejection> {
    Pace::upload(&request);
    let request = request.map(|body| Body::from_stream(one_at_a_time(body.into_data_stream())));
    Multipart::from_request(request, &()).await
}

/// The same pieces, of which only one is ready each time that it is polled. The parser of forms
/// takes, and keeps in memory, all that is ready, which from a fast sender may be everything.
fn one_at_a_time<S: Stream + Unpin>(mut pieces: S) -> impl Stream<Item = S::Item> {
    let mut pause = false;
    stream::poll_fn(move |context| {
        pause = !pause;
        if pause {
            return pieces.poll_next_unpin(context);
        }
        context.waker().wake_by_ref();
        Poll::Pending
    })
}

/// The pieces up to the `None` that ends them. If they end without it, their sender was dropped
/// half way through, and the content must not pass for complete.
pub fn ends_with_none(
    pieces: BoxStream<'static, Option<Bytes>>,
) -> BoxStream<'static, io::Result<Bytes>> {
    stream::try_unfold(pieces, |mut pieces| async move {
        match pieces.next().await {
            Some(Some(piece)) => Ok(Some((piece, pieces))),
            Some(None) => Ok(None),
            None => Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "its sender went away or sent too much",
            )),
        }
    })
    .boxed()
}

/// What was spooled, in pieces.
pub fn content(file: Spooled) -> BoxStream<'static, io::Result<Bytes>> {
    stream::try_unfold(file, |mut file| async move {
        Ok(file
            .next_chunk(SPOOL_MEMORY)
            .await?
            .map(|piece| (piece, file)))
    })
    .boxed()
}
