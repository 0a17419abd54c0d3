//! Connections to ports in sandboxes.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::super::error::ExecError;
use super::super::idle::Using;
use super::super::process::PortStream;
use super::{InUse, Manager};

/// A connection to a port in a sandbox, which is in use as long as it exists.
pub struct PortConnection {
    stream: PortStream,
    _using: Using,
}

impl Manager {
    /// Connects to a TCP port of a sandbox's loopback interface. It needs no network card.
    ///
    /// # Errors
    /// Nothing listens there, or the sandbox cannot be reached.
    pub async fn connect(&self, in_use: InUse, port: u16) -> Result<PortConnection, ExecError> {
        if port == 0 {
            let problem = "port must be 1 to 65535, not 0".to_owned();
            return Err(ExecError::Invalid(problem));
        }
        let InUse { sandbox, using } = in_use;
        let connected = self.inner.host.connect(&sandbox.id, port).await;
        self.used(&sandbox.id).await;
        Ok(PortConnection {
            stream: connected.map_err(ExecError::Host)?,
            _using: using,
        })
    }
}

impl AsyncRead for PortConnection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for PortConnection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
