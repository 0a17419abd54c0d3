//! Connections on which the agent speaks another protocol than HTTP once they are opened, and the frames
//! that it sends there.

use std::io;

use agent_protocol::FrameError;
use bytes::BytesMut;
use http_body_util::{BodyExt, Full};
use hyper::Request;
use hyper::header::{CONNECTION, CONTENT_TYPE, HOST, UPGRADE};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use serde::Serialize;
use tokio::io::{AsyncReadExt, ReadHalf};

use super::request::internal;
use super::{Body, unreachable};
use crate::domain::HostError;

/// The request for a connection with this protocol.
///
/// # Errors
/// The agent would not take so long a body.
pub fn request(
    path: &str,
    protocol: &str,
    body: &impl Serialize,
) -> Result<Request<Body>, HostError> {
    Request::post(path)
        .header(HOST, "agent")
        .header(CONNECTION, "Upgrade")
        .header(UPGRADE, protocol)
        .header(CONTENT_TYPE, "application/json")
        .body(
            Full::from(to_json(body)?)
                .map_err(io::Error::other)
                .boxed_unsync(),
        )
        .map_err(internal)
}

/// The body of a request that starts a command.
///
/// # Errors
/// The agent would not take so long a one.
pub fn to_json(body: &impl Serialize) -> Result<Vec<u8>, HostError> {
    let body = serde_json::to_vec(body).map_err(internal)?;
    if body.len() > agent_protocol::MAX_JSON_BODY {
        return Err(HostError::Invalid {
            reason: format!(
                "cmd, args and envs have {} bytes; at most {} fit into a command",
                body.len(),
                agent_protocol::MAX_JSON_BODY
            ),
        });
    }
    Ok(body)
}

/// Takes a frame from the front of a buffer, if it holds a whole one.
type Decode<F> = fn(&mut BytesMut) -> Result<Option<F>, FrameError>;

/// The frames that an agent sends.
pub struct Frames<F> {
    io: ReadHalf<TokioIo<Upgraded>>,
    /// Holds one frame at most: the protocol bounds its length before it arrives.
    buffer: BytesMut,
    decode: Decode<F>,
    /// What it means if there are no more.
    ended: &'static str,
}

impl<F> Frames<F> {
    /// Those that come from `io`. `ended` says what it means if they end.
    pub fn new(io: ReadHalf<TokioIo<Upgraded>>, decode: Decode<F>, ended: &'static str) -> Self {
        Self {
            io,
            buffer: BytesMut::new(),
            decode,
            ended,
        }
    }

    /// The next one.
    ///
    /// # Errors
    /// There are no more, or it is none.
    pub async fn next(&mut self) -> Result<F, HostError> {
        loop {
            match (self.decode)(&mut self.buffer) {
                Ok(Some(frame)) => return Ok(frame),
                Ok(None) => {}
                Err(error) => return Err(unreachable("it broke the protocol", &error)),
            }
            match self.io.read_buf(&mut self.buffer).await {
                Ok(0) => {
                    return Err(HostError::AgentUnreachable {
                        reason: self.ended.to_owned(),
                    });
                }
                Ok(_) => {}
                Err(error) => return Err(unreachable("the connection broke off", &error)),
            }
        }
    }
}
