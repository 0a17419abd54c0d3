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
        // Nothing follows the line: an agent says nothing before it is asked.
        let mut line = Vec::with_capacity(MAX_GREETING);
        let mut left = (&mut stream).take(MAX_GREETING as u64);
        while !line.contains(&b'\n') {
            match left.read_buf(&mut line).await {
                Ok(0) => break,
                Ok(_) => {}
                Err(error) => {
                    return Err(unreachable(
                        "nothing in the guest accepts connections",
                        &error,
                    ));
                }
            }
        }
        if line.is_empty() {
            return Err(HostError::AgentUnreachable {
                reason: "nothing in the guest accepts connections".to_owned(),
            });
        }
        let end = line.iter().position(|byte| *byte == b'\n');
        if line.starts_with(b"OK ") && end == line.len().checked_sub(1) {
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

#[cfg(test)]
mod tests {
    use tokio::net::UnixListener;

    use super::*;

    /// What comes of a guest that answers in these pieces, each of which is read before the next is there.
    async fn greeted(pieces: &'static [&'static str]) -> Result<(), String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vsock");
        let listener = UnixListener::bind(&path).unwrap();
        let guest = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut asked = vec![0; format!("CONNECT {AGENT_PORT}\n").len()];
            stream.read_exact(&mut asked).await.unwrap();
            for piece in pieces {
                stream.write_all(piece.as_bytes()).await.unwrap();
                tokio::task::yield_now().await;
            }
        };
        let client = AgentClient::new(path.clone());
        let (opened, ()) = tokio::join!(client.open(), guest);
        opened.map(drop).map_err(|error| error.to_string())
    }

    #[tokio::test]
    async fn a_greeting_is_one_line_and_all_that_comes() {
        for good in [
            &["OK 1\n"] as &[_],
            &["O", "K 107374", "1824\n"],
            &["OK 4294967295\n"],
        ] {
            assert_eq!(greeted(good).await, Ok(()), "{good:?}");
        }
        for bad in [
            &["OK 1\nHTTP/1.1"] as &[_],
            &["OK 1\n\n"],
            &["OK 1"],
            &["NO 1\n"],
            &["OK 42949672950\n"],
            &["OK ", "and so on, for as long as it likes to go"],
        ] {
            let said = greeted(bad).await.unwrap_err();
            assert!(said.contains("expected `OK` and a port"), "{bad:?}: {said}");
        }
        let said = greeted(&[]).await.unwrap_err();
        assert!(said.contains("nothing in the guest accepts"), "{said}");
    }
}
