//! From a UNIX socket to an HTTP connection with the agent.

use std::time::Duration;

use agent_protocol::AGENT_PORT;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tracing::debug;

use super::{AgentClient, Body, unreachable};
use crate::domain::HostError;

/// How long a guest may take to accept a connection. The kernel of a healthy guest takes
/// microseconds; the rest is for a host under load.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// The longest answer to `CONNECT`, in bytes: `OK 4294967295\n`.
const MAX_GREETING: usize = 14;

impl AgentClient {
    /// A connection for one operation.
    pub(super) async fn connect(&self) -> Result<SendRequest<Body>, HostError> {
        let stream = tokio::time::timeout(CONNECT_TIMEOUT, self.open())
            .await
            .map_err(|_| HostError::AgentUnreachable {
                reason: format!(
                    "it did not accept a connection within {} s",
                    CONNECT_TIMEOUT.as_secs()
                ),
            })??;
        let (sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| unreachable("no HTTP connection", &error))?;
        tokio::spawn(async move {
            if let Err(error) = connection.with_upgrades().await {
                debug!(
                    error = crate::chain(&error),
                    "connection with the agent broke off"
                );
            }
        });
        Ok(sender)
    }

    async fn open(&self) -> Result<UnixStream, HostError> {
        let mut stream = UnixStream::connect(&self.socket)
            .await
            .map_err(|error| unreachable("its socket cannot be reached", &error))?;
        stream
            .write_all(format!("CONNECT {AGENT_PORT}\n").as_bytes())
            .await
            .map_err(|error| unreachable("the connection broke off", &error))?;
        // Byte by byte: what follows the line belongs to HTTP.
        let mut line = Vec::with_capacity(MAX_GREETING);
        loop {
            let byte = stream
                .read_u8()
                .await
                .map_err(|error| unreachable("nothing in the guest accepts connections", &error))?;
            line.push(byte);
            if byte == b'\n' || line.len() == MAX_GREETING {
                break;
            }
        }
        if line.starts_with(b"OK ") && line.ends_with(b"\n") {
            Ok(stream)
        } else {
            Err(HostError::AgentUnreachable {
                reason: format!(
                    "expected `OK` and a port, but read {:?}",
                    String::from_utf8_lossy(&line)
                ),
            })
        }
    }
}
