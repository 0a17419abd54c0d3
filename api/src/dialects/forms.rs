//! Forms with files in them, as streams.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Poll, ready};

use axum::BoxError;
use axum::body::{Body, Bytes};
use axum::extract::multipart::{Field, Multipart, MultipartError, MultipartRejection};
use axum::extract::{FromRequest, Request};
use axum::http::header;
use futures_util::stream::{self, BoxStream, Stream, StreamExt};

use crate::domain::Spooled;
use crate::http::Pace;

/// What a form has around its file, at most, in bytes; and what it has before, between and after fields, which
/// the parser keeps in memory as long as it makes neither a field nor content of it.
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
pub async fn form(request: Request) -> Result<Form, MultipartRejection> {
    Pace::upload(&request);
    let taken = Arc::<AtomicU64>::default();
    let request = request.map(|body| {
        let pieces = one_at_a_time(body.into_data_stream());
        Body::from_stream(bounded(pieces, Arc::clone(&taken)))
    });
    let parser = Multipart::from_request(request, &()).await?;
    Ok(Form { parser, taken })
}

/// A form that is read field by field.
pub struct Form {
    parser: Multipart,
    /// What the parser has taken since it last made something of it, in bytes.
    taken: Arc<AtomicU64>,
}

impl Form {
    /// The next field, if there is one. What is left of the one before is skipped, and may not be more than
    /// [`FORM_OVERHEAD`]; see [`FormField::skip`].
    ///
    /// # Errors
    /// The form cannot be read.
    pub async fn next_field(&mut self) -> Result<Option<FormField<'_>>, MultipartError> {
        let field = self.parser.next_field().await?;
        self.taken.store(0, Ordering::Relaxed);
        let taken = &self.taken;
        Ok(field.map(|field| FormField { field, taken }))
    }
}

/// A field of a form.
pub struct FormField<'a> {
    field: Field<'a>,
    taken: &'a AtomicU64,
}

impl FormField<'_> {
    /// Its name, if it has one.
    pub fn name(&self) -> Option<&str> {
        self.field.name()
    }

    /// The next piece of its content; `None` at its end.
    ///
    /// # Errors
    /// The form cannot be read.
    pub async fn chunk(&mut self) -> Result<Option<Bytes>, MultipartError> {
        let piece = self.field.chunk().await?;
        self.taken.store(0, Ordering::Relaxed);
        Ok(piece)
    }

    /// Leaves its content, however much that is.
    ///
    /// # Errors
    /// The form cannot be read.
    pub async fn skip(mut self) -> Result<(), MultipartError> {
        while self.chunk().await?.is_some() {}
        Ok(())
    }
}

/// The same pieces, as long as the parser makes something of them.
fn bounded<E: Into<BoxError>>(
    mut pieces: impl Stream<Item = Result<Bytes, E>> + Unpin,
    taken: Arc<AtomicU64>,
) -> impl Stream<Item = Result<Bytes, BoxError>> {
    stream::poll_fn(move |context| {
        let piece = ready!(pieces.poll_next_unpin(context));
        if let Some(Ok(piece)) = &piece {
            let before = taken.fetch_add(piece.len() as u64, Ordering::Relaxed);
            if before > FORM_OVERHEAD {
                let text = format!("more than {FORM_OVERHEAD} bytes of it are no field's content");
                return Poll::Ready(Some(Err(text.into())));
            }
        }
        Poll::Ready(piece.map(|piece| piece.map_err(Into::into)))
    })
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
