//! Client of the guest agent.
//!
//! One connection for each operation, but for what is asked regularly: connect to the UNIX socket
//! that the VMM serves for the guest's vsock, say `CONNECT <port>`, read `OK <port>`, then speak
//! HTTP/1.1. The agent is as untrusted as the rest of the guest: every length is bounded and every
//! wait has a deadline.

mod connect;
mod directories;
mod exec;
mod files;
mod freeze;
mod health;
mod identity;
mod ports;
mod processes;
mod request;
mod shutdown;
#[cfg(test)]
mod stand_in;
mod upgrade;
mod usage;
mod walk;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use agent_protocol::{ErrorBody, ErrorCode, ErrorDetail};
use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Limited};
use hyper::Response;
use hyper::body::Incoming;

use crate::domain::HostError;
pub use freeze::Freeze;
use usage::Kept;

/// The largest JSON answer that is read from an agent, in bytes.
const MAX_JSON_ANSWER: usize = 64 * 1024;
/// The most text of an agent's error that is passed on, in bytes.
const MAX_MESSAGE: usize = 4096;

/// A body that the host sends.
type Body = UnsyncBoxBody<Bytes, io::Error>;

/// Speaks with the agent of one guest.
#[derive(Debug, Clone)]
pub struct AgentClient {
    socket: PathBuf,
    /// The connection on which the usage is asked for.
    kept: Arc<Kept>,
}

impl AgentClient {
    /// A client of the agent behind `socket`, the host's side of the guest's vsock.
    pub fn new(socket: PathBuf) -> Self {
        Self {
            socket,
            kept: Arc::default(),
        }
    }
}

fn unreachable(what: &str, error: &dyn std::error::Error) -> HostError {
    HostError::AgentUnreachable {
        reason: format!("{what}: {}", crate::chain(error)),
    }
}

/// The failure that an answer with a status of 400 or above tells of.
async fn failure(response: Response<Incoming>) -> ErrorDetail {
    let status = response.status();
    let body = Limited::new(response.into_body(), MAX_JSON_ANSWER)
        .collect()
        .await;
    let parsed = body
        .ok()
        .and_then(|body| serde_json::from_slice::<ErrorBody>(&body.to_bytes()).ok());
    let mut detail = parsed.map_or_else(
        || ErrorDetail::new(ErrorCode::Internal, format!("it answered {status}")),
        |body| body.error,
    );
    if detail.message.len() > MAX_MESSAGE {
        let end = detail.message.floor_char_boundary(MAX_MESSAGE);
        detail.message.truncate(end);
    }
    detail
}

/// What an agent's failure means to the control side. `path` is the file in question.
fn host_error(detail: ErrorDetail, path: &str) -> HostError {
    let reason = detail.message;
    match detail.code {
        ErrorCode::NotFound => HostError::FileNotFound {
            path: path.to_owned(),
        },
        ErrorCode::BadRequest
        | ErrorCode::BadPath
        | ErrorCode::BadCwd
        | ErrorCode::UnknownUser
        | ErrorCode::IsADirectory
        | ErrorCode::NotADirectory
        | ErrorCode::NotARegularFile
        | ErrorCode::PermissionDenied => HostError::Invalid { reason },
        _ => HostError::Agent { reason },
    }
}
