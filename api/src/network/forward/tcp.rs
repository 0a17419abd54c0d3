//! Forwarded connections of TCP.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::copy_bidirectional_with_sizes;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::Guests;
use crate::domain::SandboxId;

/// How long a guest may take to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long to wait before the next connection when this process or host has no more descriptors.
const PAUSE: Duration = Duration::from_millis(100);
/// Bytes of each direction that are under way within this process.
const BUFFER: usize = 64 * 1024;

/// Accepts connections until `end`, and carries them to a port of the sandbox.
pub(super) async fn serve(
    listener: TcpListener,
    guests: Arc<Guests>,
    id: SandboxId,
    port: u16,
    end: CancellationToken,
) {
    loop {
        let accepted = tokio::select! {
            biased;
            () = end.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let client = match accepted {
            Ok((client, _)) => client,
            // The client was gone before it was accepted.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
            Err(error) => {
                warn!(sandbox = %id, %error, "a forwarded connection was not accepted");
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        let Some((target, gone)) = guests.target(&id, port) else {
            reset(client);
            continue;
        };
        let (guests, id, end) = (Arc::clone(&guests), id.clone(), end.clone());
        tokio::spawn(async move {
            let carry = async {
                let connect = async {
                    let socket = guests.socket(TcpSocket::new_v4).await?;
                    socket.connect(target.into()).await
                };
                let guest = tokio::time::timeout(CONNECT_TIMEOUT, connect).await;
                match guest.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
                    Ok(guest) => carry(client, guest).await,
                    Err(error) => {
                        reset(client);
                        Err(error)
                    }
                }
            };
            tokio::select! {
                biased;
                () = end.cancelled() => {}
                () = gone.cancelled() => {}
                carried = carry => if let Err(error) = carried {
                    debug!(sandbox = %id, %target, %error, "a forwarded connection ended early");
                },
            }
        });
    }
}

/// Carries bytes both ways until both sides have no more to say. One that has is told to the other
/// at once, which may go on.
async fn carry(mut client: TcpStream, mut guest: TcpStream) -> io::Result<()> {
    for stream in [&client, &guest] {
        stream.set_nodelay(true)?;
    }
    let carried = copy_bidirectional_with_sizes(&mut client, &mut guest, BUFFER, BUFFER).await;
    if carried.is_err() {
        // Who was cut off shall not take it for an end.
        reset(client);
        reset(guest);
    }
    carried.map(drop)
}

/// Ends a connection such that the other side sees an error.
fn reset(stream: TcpStream) {
    let _ = stream.set_zero_linger();
}
