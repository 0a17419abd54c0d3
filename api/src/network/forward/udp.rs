//! Forwarded datagrams of UDP. Each client has a socket of its own to the guest, by which answers
//! find back to it.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::UdpSocket;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::Guests;
use crate::domain::SandboxId;

/// How long a client is remembered that is neither sent to nor heard of; as long as the kernel's
/// connection tracking has it for streams.
const IDLE: Duration = Duration::from_secs(120);
/// How many clients of one forward are remembered at a time; others are not served meanwhile.
const MAX_CLIENTS: usize = 1024;
/// How many datagrams of one client wait for the guest; more are lost, as on any full line.
const QUEUE: usize = 64;
/// The largest datagram.
const MAX_DATAGRAM: usize = 65_535;

/// Carries datagrams to a port of the sandbox, and answers back, until `end`.
pub(super) async fn serve(
    socket: UdpSocket,
    guests: Arc<Guests>,
    id: SandboxId,
    port: u16,
    end: CancellationToken,
) {
    let socket = Arc::new(socket);
    let (done, mut ended) = mpsc::unbounded_channel();
    let mut clients: HashMap<SocketAddr, mpsc::Sender<Vec<u8>>> = HashMap::new();
    let mut buffer = vec![0; MAX_DATAGRAM];
    loop {
        let received = tokio::select! {
            biased;
            () = end.cancelled() => return,
            Some(client) = ended.recv() => {
                clients.remove(&client);
                continue;
            }
            received = socket.recv_from(&mut buffer) => received,
        };
        let (length, client) = match received {
            Ok(received) => received,
            Err(error) => {
                // What an earlier answer has caused, such as that its client is gone.
                debug!(sandbox = %id, %error, "forwarded port");
                continue;
            }
        };
        let datagram = buffer[..length].to_vec();
        let count = clients.len();
        let queue = match clients.entry(client) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(_) if count >= MAX_CLIENTS => {
                debug!(sandbox = %id, %client, "too many clients of a forwarded port");
                continue;
            }
            Entry::Vacant(entry) => {
                let Some((target, gone)) = guests.target(&id, port) else {
                    continue;
                };
                let (queue, datagrams) = mpsc::channel(QUEUE);
                let link = Link {
                    socket: Arc::clone(&socket),
                    client,
                    target,
                };
                let (guests, done, id) = (Arc::clone(&guests), done.clone(), id.clone());
                let end = end.clone();
                tokio::spawn(async move {
                    let carried = tokio::select! {
                        biased;
                        () = end.cancelled() => Ok(()),
                        () = gone.cancelled() => Ok(()),
                        carried = link.carry(&guests, datagrams) => carried,
                    };
                    if let Err(error) = carried {
                        warn!(sandbox = %id, %target, %error, "datagrams are not forwarded");
                    }
                    let _ = done.send(client);
                });
                entry.insert(queue)
            }
        };
        let _ = queue.try_send(datagram);
    }
}

/// One client and its guest.
struct Link {
    socket: Arc<UdpSocket>,
    client: SocketAddr,
    target: SocketAddrV4,
}

impl Link {
    async fn carry(
        &self,
        guests: &Guests,
        mut datagrams: mpsc::Receiver<Vec<u8>>,
    ) -> std::io::Result<()> {
        let target = self.target;
        let guest = guests
            .socket(move || {
                let socket = std::net::UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
                socket.connect(target)?;
                socket.set_nonblocking(true)?;
                Ok(socket)
            })
            .await?;
        let guest = UdpSocket::from_std(guest)?;
        let mut buffer = vec![0; MAX_DATAGRAM];
        let mut idle_at = Instant::now() + IDLE;
        loop {
            tokio::select! {
                datagram = datagrams.recv() => match datagram {
                    // That nobody listens in the guest is told by an error of a later call.
                    Some(datagram) => drop(guest.send(&datagram).await),
                    None => return Ok(()),
                },
                received = guest.recv(&mut buffer) => if let Ok(length) = received {
                    let _ = self.socket.send_to(&buffer[..length], self.client).await;
                },
                () = tokio::time::sleep_until(idle_at) => return Ok(()),
            }
            idle_at = Instant::now() + IDLE;
        }
    }
}
