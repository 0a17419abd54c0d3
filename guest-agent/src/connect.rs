//! Connections from the host to TCP ports of the guest.

use std::{
    cell::Cell,
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    rc::Rc,
    time::Duration,
};

use agent_protocol::{CONNECT_LINGER, ErrorCode, MAX_CONNECTIONS};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpStream,
    sync::Notify,
    time::timeout,
};

/// How much of a connection is held in each direction, in bytes.
const BUFFER: usize = 16 * 1024;
/// How long a port may take to accept: one whose queue is full does not answer.
const ACCEPT_TIMEOUT: Duration = Duration::from_secs(10);

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Nothing has port 0.
    #[error("port must be 1 to 65535")]
    Port,
    /// There are too many.
    #[error("{MAX_CONNECTIONS} connections to ports of the guest exist, and no more can")]
    TooMany,
    /// Nothing listens there.
    #[error("nothing in the sandbox listens on TCP port {0} of its loopback interface")]
    Closed(u16),
    /// Something listens there, and does not accept.
    #[error("what listens on TCP port {0} of the sandbox did not accept within {ACCEPT_TIMEOUT:?}")]
    NotAccepted(u16),
    /// The guest's kernel refuses.
    #[error("the guest cannot connect to its port {port}")]
    System {
        /// The port.
        port: u16,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl ConnectError {
    /// The code that the host gets.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Port => ErrorCode::BadRequest,
            Self::TooMany => ErrorCode::OutOfResources,
            Self::Closed(_) | Self::NotAccepted(_) => ErrorCode::PortClosed,
            Self::System { .. } => ErrorCode::Internal,
        }
    }
}

/// Counts connections.
#[derive(Debug, Default)]
pub struct Connections(Cell<usize>);

/// A connection to a port.
#[derive(Debug)]
pub struct Connection {
    owner: Rc<Connections>,
    port: Option<TcpStream>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.owner.0.set(self.owner.0.get() - 1);
    }
}

impl Connections {
    /// Connects to a port.
    ///
    /// # Errors
    /// [`ConnectError`]
    pub async fn connect(self: &Rc<Self>, port: u16) -> Result<Connection, ConnectError> {
        if port == 0 {
            return Err(ConnectError::Port);
        }
        if self.0.get() >= MAX_CONNECTIONS {
            return Err(ConnectError::TooMany);
        }
        self.0.set(self.0.get() + 1);
        let mut connection = Connection {
            owner: self.clone(),
            port: None,
        };
        let stream = timeout(ACCEPT_TIMEOUT, to_loopback(port))
            .await
            .map_err(|_| ConnectError::NotAccepted(port))?
            .map_err(|source| match source.kind() {
                io::ErrorKind::ConnectionRefused => ConnectError::Closed(port),
                _ => ConnectError::System { port, source },
            })?;
        // What is typed is not to wait for more.
        let _ = stream.set_nodelay(true);
        connection.port = Some(stream);
        Ok(connection)
    }
}

/// Some programs listen on one of the two addresses only.
async fn to_loopback(port: u16) -> io::Result<TcpStream> {
    match TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await {
        Err(refused) if refused.kind() == io::ErrorKind::ConnectionRefused => {
            let other = SocketAddr::from((Ipv6Addr::LOCALHOST, port));
            // A guest without IPv6 cannot tell anything new.
            TcpStream::connect(other).await.map_err(|_| refused)
        }
        result => result,
    }
}

/// Carries bytes both ways until both ends have ended.
pub async fn carry(host: impl AsyncRead + AsyncWrite, mut connection: Connection) {
    let Some(mut port) = connection.port.take() else {
        return;
    };
    let (port_read, port_write) = port.split();
    let (host_read, host_write) = tokio::io::split(host);
    let ended = Ended::default();
    // Whichever fails first ends both: the other has nobody to speak with.
    let _ = tokio::try_join!(
        copy(host_read, port_write, &ended),
        copy(port_read, host_write, &ended)
    );
}

/// One of two directions has ended.
#[derive(Default)]
struct Ended {
    is_so: Cell<bool>,
    told: Notify,
}

async fn copy(from: impl AsyncRead, to: impl AsyncWrite, ended: &Ended) -> io::Result<()> {
    let (mut from, mut to) = (std::pin::pin!(from), std::pin::pin!(to));
    let mut buffer = vec![0; BUFFER];
    loop {
        let told = ended.told.notified();
        // Reading is cancel safe: whoever gives it up has read nothing.
        let rested = async {
            if !ended.is_so.get() {
                told.await;
            }
            tokio::time::sleep(CONNECT_LINGER).await;
        };
        let len = tokio::select! {
            biased;
            len = from.read(&mut buffer) => len?,
            () = rested => return Err(io::ErrorKind::TimedOut.into()),
        };
        if len == 0 {
            to.shutdown().await?;
            ended.is_so.set(true);
            ended.told.notify_waiters();
            return Ok(());
        }
        to.write_all(&buffer[..len]).await?;
    }
}
