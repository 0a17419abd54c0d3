//! The network as sandboxes see it: addresses, what they may reach, and how they are reached.

mod egress;
mod forward;
mod subnet;

use std::fmt;
use std::net::Ipv4Addr;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

pub use egress::{
    AllowRule, Cidr, Destination, DomainPattern, Egress, EgressError, MAX_RULES, PortRange,
    Transport,
};
pub use forward::{
    FIRST_AUTO_PORT, Forward, ForwardSpec, KeptForward, LAST_AUTO_PORT, MAX_DESCRIPTION,
    MAX_FORWARDS, port_in_use,
};
pub use subnet::{AddressError, Subnet, SubnetError};

/// What a host offers to sandboxes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkInfo {
    /// Its name, that of its bridge.
    pub name: String,
    /// Addresses of the sandboxes and, as the first of them, of the gateway.
    pub subnet: Subnet,
    /// What new sandboxes may reach unless they ask for something else.
    pub default_egress: Egress,
}

/// The network of a sandbox as it is asked for. What is `None` has its default.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NetworkSpec {
    /// The name of the network that it is in.
    pub name: Option<String>,
    /// Its address.
    pub address: Option<Ipv4Addr>,
    /// What it may reach.
    pub egress: Option<Egress>,
    /// How much it may send and receive.
    pub rate_limits: RateLimits,
}

/// How a sandbox is connected, apart from its address; a clone inherits it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connection {
    /// The name of the network that it is in; `None` is the host's first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<String>,
    /// What it may reach.
    pub egress: Egress,
    /// How much it may send and receive.
    #[serde(default)]
    pub rate_limits: RateLimits,
}

/// What a sandbox may send in a second, and as much again what it may receive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct RateLimits {
    /// Bytes; `None` is no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_per_sec: Option<u64>,
    /// Frames; `None` is no limit. Before it is cut up, a frame may have up to 64 KiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub packets_per_sec: Option<u64>,
}

/// The least bytes a second: two frames of the largest size that a guest leaves to the host to cut
/// up, so that each of them gets through.
const MIN_BYTES_PER_SEC: u64 = 128 << 10;
/// The most of either in a second: what nobody reaches, and no arithmetic overflows with.
const MAX_PER_SEC: u64 = 1 << 40;

impl RateLimits {
    /// Checks limits as they are asked for. The error is a sentence.
    ///
    /// # Errors
    /// One of them is out of range.
    pub fn check(self) -> Result<Self, String> {
        let in_range = |what, value: Option<u64>, min: u64| match value {
            Some(value) if !(min..=MAX_PER_SEC).contains(&value) => Err(format!(
                "{what} must be {min} to {MAX_PER_SEC}, or be left away for no limit, not {value}"
            )),
            _ => Ok(()),
        };
        in_range("bytes_per_sec", self.bytes_per_sec, MIN_BYTES_PER_SEC)?;
        in_range("packets_per_sec", self.packets_per_sec, 1)?;
        Ok(self)
    }
}

/// Address of a network card.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct MacAddress(pub [u8; 6]);

impl MacAddress {
    /// That of the sandbox with this address: QEMU's and KVM's `52:54:00`, and the address's last
    /// three bytes. As it follows from the address, no table that maps one to the other is ever
    /// out of date.
    pub fn of(address: Ipv4Addr) -> Self {
        let [_, second, third, fourth] = address.octets();
        Self([0x52, 0x54, 0x00, second, third, fourth])
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What a sandbox has sent and received since it was last started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Traffic {
    /// Packets from it to hosts beyond this one.
    pub sent: Counter,
    /// Packets from there to it.
    pub received: Counter,
    /// Packets that it was not allowed to send.
    pub denied: Counter,
    /// Names that it was not allowed to look up.
    pub denied_names: u64,
}

/// Packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Counter {
    /// How many.
    pub packets: u64,
    /// How large they were, all together.
    pub bytes: u64,
}

/// Something that a sandbox was not allowed to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Denied {
    /// When.
    pub at: Timestamp,
    /// What.
    pub what: DeniedWhat,
}

/// What a sandbox was not allowed to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeniedWhat {
    /// Send a packet.
    Packet {
        /// `tcp`, `udp`, `icmp`, or the number of another protocol.
        protocol: String,
        /// Where to.
        address: Ipv4Addr,
        /// To which port, if the protocol has ports.
        port: Option<u16>,
    },
    /// Look up a name.
    Name {
        /// The name, without its last dot.
        name: String,
    },
}

/// What a running sandbox does in the network.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct NetworkActivity {
    /// Name of the host's end of its card.
    pub interface: String,
    /// How much.
    pub traffic: Traffic,
    /// The last things that it was not allowed to do, oldest first. Of many at once, only some
    /// are here; [`Traffic`] counts all.
    pub denied: Vec<Denied>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mac_address_follows_from_the_address() {
        let mac = MacAddress::of(Ipv4Addr::new(192, 168, 200, 17));
        assert_eq!(mac.to_string(), "52:54:00:a8:c8:11");
    }

    #[test]
    fn limits_that_stop_everything_are_refused() {
        let bytes = |value| RateLimits {
            bytes_per_sec: Some(value),
            packets_per_sec: None,
        };
        let packets = |value| RateLimits {
            bytes_per_sec: None,
            packets_per_sec: Some(value),
        };
        for good in [RateLimits::default(), bytes(128 << 10), packets(1)] {
            assert_eq!(good.check(), Ok(good));
        }
        for bad in [
            bytes(0),
            bytes((128 << 10) - 1),
            bytes(u64::MAX),
            packets(0),
        ] {
            assert!(bad.check().is_err(), "{bad:?}");
        }
    }
}
