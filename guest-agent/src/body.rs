//! Response bodies: ready bytes, or a stream that blocking reads produce with back-pressure.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use hyper::body::{Body as HttpBody, Frame, SizeHint};
use tokio::sync::mpsc;

/// Bytes that are read at once for a stream.
pub const CHUNK: usize = 64 * 1024;

/// The body of a response.
#[derive(Debug)]
pub enum Body {
    /// All of it, or what is left: nothing.
    Full(Option<Bytes>),
    /// Chunks as they come, at most one waiting.
    Stream {
        /// Where they come from.
        chunks: mpsc::Receiver<io::Result<Bytes>>,
        /// How many bytes they add up to, if that is known.
        len: Option<u64>,
    },
}

impl Body {
    /// A body of `bytes`.
    pub fn full(bytes: impl Into<Bytes>) -> Self {
        Self::Full(Some(bytes.into()).filter(|bytes| !bytes.is_empty()))
    }

    /// A body of the chunks that `next` returns until it returns `None` or fails. It runs on a
    /// thread for blocking work, once per chunk, and only when the host has taken the last one.
    pub fn stream(
        len: Option<u64>,
        mut next: impl FnMut() -> io::Result<Option<Bytes>> + Send + 'static,
    ) -> Self {
        let (sender, chunks) = mpsc::channel(1);
        tokio::task::spawn_local(async move {
            loop {
                let Ok(permit) = sender.reserve().await else {
                    return;
                };
                let Ok((chunk, back)) = tokio::task::spawn_blocking(move || (next(), next)).await
                else {
                    return;
                };
                next = back;
                match chunk.transpose() {
                    Some(Ok(chunk)) => permit.send(Ok(chunk)),
                    Some(failed) => {
                        permit.send(failed);
                        return;
                    }
                    None => return,
                }
            }
        });
        Self::Stream { chunks, len }
    }
}

impl HttpBody for Body {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        match self.get_mut() {
            Self::Full(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Self::Stream { chunks, .. } => chunks
                .poll_recv(context)
                .map(|chunk| chunk.map(|chunk| chunk.map(Frame::data))),
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Self::Full(None))
    }

    fn size_hint(&self) -> SizeHint {
        let len = match self {
            Self::Full(bytes) => Some(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64)),
            Self::Stream { len, .. } => *len,
        };
        len.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}
