//! Ports of the host that lead into sandboxes.
//!
//! They are served by this process and not by the kernel's address translation: a forward from
//! loopback would else need `route_localnet`, which lets packets from elsewhere reach services that
//! listen on loopback only; a port that another program has is found out by binding it, and cannot be
//! taken by one afterwards; IPv6 leads to IPv4; and the addresses may be in another network namespace
//! than the sandboxes. What it costs is a copy through this process.
//!
//! A forward is there from the time that it is made to the end of its sandbox. While the sandbox is
//! paused, its port is kept, and whoever connects is hung up on.

mod tcp;
mod udp;

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::net::sockopt;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, listen, socket_with};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info};

use super::namespace::Namespace;
use crate::domain::{
    FIRST_AUTO_PORT, Forward, ForwardSpec, LAST_AUTO_PORT, SandboxId, Transport, port_in_use,
};

/// How many connections may wait to be accepted.
const BACKLOG: i32 = 1024;

/// Why a port does not lead into a sandbox.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    /// Somebody has the port.
    #[error("{}", port_in_use(*transport, *host))]
    InUse {
        /// Protocol.
        transport: Transport,
        /// Address and port.
        host: SocketAddr,
    },
    /// No port is free.
    #[error("no {transport} port of {address} from {FIRST_AUTO_PORT} to {LAST_AUTO_PORT} is free")]
    NoneFree {
        /// Protocol.
        transport: Transport,
        /// Address.
        address: IpAddr,
    },
    /// The address is not this host's, or may not be used.
    #[error("{transport} port {host} cannot be used on this host")]
    Unusable {
        /// Protocol.
        transport: Transport,
        /// Address and port.
        host: SocketAddr,
        /// What the system says.
        #[source]
        source: io::Error,
    },
}

/// All forwards of this host.
#[derive(Debug)]
pub struct Forwards {
    guests: Arc<Guests>,
    open: Mutex<HashMap<(SandboxId, Forward), CancellationToken>>,
}

/// How to reach guests.
#[derive(Debug)]
pub(super) struct Guests {
    /// Where their network is, if it is not where the daemon is.
    namespace: Option<Namespace>,
    /// Addresses of those that run, with what is cancelled when they do no longer.
    addresses: Mutex<HashMap<SandboxId, (Ipv4Addr, CancellationToken)>>,
}

impl Guests {
    fn addresses(&self) -> MutexGuard<'_, HashMap<SandboxId, (Ipv4Addr, CancellationToken)>> {
        self.addresses
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The address of a sandbox, if it runs.
    fn target(&self, id: &SandboxId, port: u16) -> Option<(SocketAddrV4, CancellationToken)> {
        let (address, end) = self.addresses().get(id).cloned()?;
        Some((SocketAddrV4::new(address, port), end))
    }

    /// Makes a socket in the network of the guests.
    async fn socket<T: Send + 'static>(
        &self,
        make: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        match &self.namespace {
            Some(namespace) => namespace.run(make).await,
            None => make(),
        }
    }
}

impl Forwards {
    /// None yet. `namespace` is where the guests are, if that is not where the daemon is.
    pub fn new(namespace: Option<Namespace>) -> Self {
        Self {
            guests: Arc::new(Guests {
                namespace,
                addresses: Mutex::default(),
            }),
            open: Mutex::default(),
        }
    }

    fn open_ones(&self) -> MutexGuard<'_, HashMap<(SandboxId, Forward), CancellationToken>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A sandbox runs, with this address.
    pub fn reachable(&self, id: &SandboxId, address: Ipv4Addr) {
        let target = (address, CancellationToken::new());
        if let Some((_, end)) = self.guests.addresses().insert(id.clone(), target) {
            end.cancel();
        }
    }

    /// A sandbox runs no more: connections to it end.
    pub fn unreachable(&self, id: &SandboxId) {
        if let Some((_, end)) = self.guests.addresses().remove(id) {
            end.cancel();
        }
    }

    /// Lets a port lead into a sandbox, whether it runs or not.
    ///
    /// # Errors
    /// The port cannot be had.
    pub fn open(&self, id: &SandboxId, spec: ForwardSpec) -> Result<Forward, ForwardError> {
        let ForwardSpec {
            transport,
            host_address,
            guest_port,
            ..
        } = spec;
        let try_port = |port| {
            let host = SocketAddr::new(host_address, port);
            socket_on(transport, host).map(|socket| (host, socket))
        };
        let (host, socket) = match spec.host_port {
            Some(port) => {
                let host = SocketAddr::new(host_address, port);
                try_port(port).map_err(|source| match source.kind() {
                    io::ErrorKind::AddrInUse => ForwardError::InUse { transport, host },
                    _ => ForwardError::Unusable {
                        transport,
                        host,
                        source,
                    },
                })?
            }
            None => {
                let count = LAST_AUTO_PORT - FIRST_AUTO_PORT + 1;
                let start = rand::random_range(0..count);
                let ports = (0..count).map(|step| FIRST_AUTO_PORT + (start + step) % count);
                let mut found = Err(ForwardError::NoneFree {
                    transport,
                    address: host_address,
                });
                for port in ports {
                    match try_port(port) {
                        Ok(socket) => {
                            found = Ok(socket);
                            break;
                        }
                        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
                        Err(source) => {
                            return Err(ForwardError::Unusable {
                                transport,
                                host: SocketAddr::new(host_address, port),
                                source,
                            });
                        }
                    }
                }
                found?
            }
        };
        let forward = Forward {
            transport,
            host,
            guest_port,
        };
        let unusable = |source| ForwardError::Unusable {
            transport,
            host,
            source,
        };
        let end = CancellationToken::new();
        let (guests, sandbox, until) = (Arc::clone(&self.guests), id.clone(), end.clone());
        match transport {
            Transport::Tcp => {
                let listener = TcpListener::from_std(socket.into()).map_err(unusable)?;
                tokio::spawn(async move {
                    tcp::serve(listener, guests, sandbox, guest_port, until).await;
                });
            }
            Transport::Udp => {
                let socket = tokio::net::UdpSocket::from_std(socket.into()).map_err(unusable)?;
                tokio::spawn(async move {
                    udp::serve(socket, guests, sandbox, guest_port, until).await;
                });
            }
        }
        info!(sandbox = %id, %transport, %host, guest_port, "port forwarded");
        if let Some(before) = self.open_ones().insert((id.clone(), forward), end) {
            before.cancel();
        }
        Ok(forward)
    }

    /// Whether this forward is open.
    pub fn is_open(&self, id: &SandboxId, forward: Forward) -> bool {
        self.open_ones().contains_key(&(id.clone(), forward))
    }

    /// Ends a forward and its connections.
    pub fn close(&self, id: &SandboxId, forward: Forward) {
        if let Some(end) = self.open_ones().remove(&(id.clone(), forward)) {
            debug!(sandbox = %id, host = %forward.host, "port no longer forwarded");
            end.cancel();
        }
    }

    /// Ends all forwards of a sandbox.
    pub fn close_all(&self, id: &SandboxId) {
        self.open_ones().retain(|(owner, _), end| {
            let stays = owner != id;
            if !stays {
                end.cancel();
            }
            stays
        });
    }
}

impl Drop for Forwards {
    fn drop(&mut self) {
        for end in self.open_ones().values() {
            end.cancel();
        }
    }
}

/// A socket that is bound, and listens if it is one of TCP.
fn socket_on(transport: Transport, host: SocketAddr) -> io::Result<OwnedFd> {
    let family = match host {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let kind = match transport {
        Transport::Tcp => SocketType::STREAM,
        Transport::Udp => SocketType::DGRAM,
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(family, kind, flags, None)?;
    if host.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, true)?;
    }
    if transport == Transport::Tcp {
        // Connections of an earlier forward that are on their last legs are no reason to wait.
        sockopt::set_socket_reuseaddr(&socket, true)?;
    }
    bind(&socket, &host)?;
    if transport == Transport::Tcp {
        listen(&socket, BACKLOG)?;
    }
    Ok(socket)
}
