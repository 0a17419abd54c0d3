//! Ports of the host that lead into a sandbox.

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use super::Transport;

/// The most forwards of one sandbox.
pub const MAX_FORWARDS: usize = 64;
/// The longest description of a forward, in characters.
pub const MAX_DESCRIPTION: usize = 256;
/// The first port that is taken for a forward that asks for none.
pub const FIRST_AUTO_PORT: u16 = 10_000;
/// The last of those.
pub const LAST_AUTO_PORT: u16 = 20_000;

/// A port of the host that leads into a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Forward {
    /// Protocol.
    pub transport: Transport,
    /// Address and port on the host.
    pub host: SocketAddr,
    /// Port in the sandbox.
    pub guest_port: u16,
}

/// A forward of a sandbox as it is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptForward {
    /// The forward.
    #[serde(flatten)]
    pub forward: Forward,
    /// What it is for, in the user's words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
}

/// A forward as it is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ForwardSpec {
    /// Protocol.
    pub transport: Transport,
    /// Address on the host.
    pub host_address: IpAddr,
    /// Port on the host; `None` for any that is free.
    pub host_port: Option<u16>,
    /// Port in the sandbox.
    pub guest_port: u16,
}

impl Forward {
    /// Whether both cannot be there at once: they have the protocol and port in common, and an
    /// address, or one of them has all addresses.
    pub fn conflicts_with(&self, other: &Self) -> bool {
        let (ours, theirs) = (self.host.ip(), other.host.ip());
        // A socket on all IPv6 addresses takes those of IPv4 only if it is told to, and ours are
        // not.
        let same_family = ours.is_ipv4() == theirs.is_ipv4();
        self.transport == other.transport
            && self.host.port() == other.host.port()
            && same_family
            && (ours == theirs || ours.is_unspecified() || theirs.is_unspecified())
    }
}

/// What whoever wants this port is told if somebody else has it: the same whoever that is.
pub fn port_in_use(transport: Transport, host: SocketAddr) -> String {
    format!("{transport} port {host} is in use; choose another, or none to get one that is free")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forwards_conflict_if_they_share_an_address() {
        let forward = |transport, host: &str| Forward {
            transport,
            host: host.parse().unwrap(),
            guest_port: 80,
        };
        let tcp = |host| forward(Transport::Tcp, host);
        for (other, conflicts) in [
            (tcp("127.0.0.1:80"), true),
            (tcp("0.0.0.0:80"), true),
            (tcp("127.0.0.1:81"), false),
            (tcp("127.0.0.2:80"), false),
            (tcp("[::]:80"), false),
            (forward(Transport::Udp, "127.0.0.1:80"), false),
        ] {
            let ours = tcp("127.0.0.1:80");
            assert_eq!(ours.conflicts_with(&other), conflicts, "{other:?}");
            assert_eq!(other.conflicts_with(&ours), conflicts, "{other:?}");
        }
    }
}
