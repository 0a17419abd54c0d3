//! The addresses of one bridge.

use std::collections::BTreeSet;
use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Addresses of sandboxes, as `192.168.200.0/24`. The first is the gateway's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Subnet {
    network: Ipv4Addr,
    prefix: u8,
}

/// Not a subnet for sandboxes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no subnet for sandboxes: expected the first address of a private IPv4 network and a \
     prefix length of 16 to 29, as in 192.168.200.0/24"
)]
pub struct SubnetError(String);

/// Why a sandbox does not get an address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    /// Not an address for a sandbox.
    #[error("{address} is no address for a sandbox: expected one of {subnet}, {first} to {last}")]
    OutOfRange {
        /// What was asked for.
        address: Ipv4Addr,
        /// Where it should be in.
        subnet: Subnet,
        /// The lowest that there is.
        first: Ipv4Addr,
        /// The highest that there is.
        last: Ipv4Addr,
    },
    /// Another sandbox has it.
    #[error("the address {0} is in use; ask for another, or for none in particular")]
    Taken(Ipv4Addr),
    /// None is free.
    #[error("all {1} addresses of {0} are taken; delete sandboxes, or configure a larger subnet")]
    Exhausted(Subnet, usize),
    /// The host has no network.
    #[error("this host has no network for sandboxes; its log says why")]
    NoNetwork,
    /// It has others.
    #[error("there is no network {name:?} for sandboxes; there are {known}")]
    UnknownNetwork {
        /// What was asked for.
        name: String,
        /// Those that there are.
        known: String,
    },
}

impl Subnet {
    /// Where sandboxes are if nothing else is said: 192.168.200.0/24.
    pub const DEFAULT: Self = Self {
        network: Ipv4Addr::new(192, 168, 200, 0),
        prefix: 24,
    };

    /// The gateway's address, the host's on the bridge.
    pub fn gateway(self) -> Ipv4Addr {
        self.nth(1)
    }

    /// Its first address.
    pub fn network(self) -> Ipv4Addr {
        self.network
    }

    /// Its last address.
    pub fn broadcast(self) -> Ipv4Addr {
        self.nth(self.size() - 1)
    }

    /// Bits of an address that all of it have in common.
    pub fn prefix(self) -> u8 {
        self.prefix
    }

    /// The same as a mask.
    pub fn mask(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(!(self.size() - 1))
    }

    /// Whether the address is one of it.
    pub fn contains(self, address: Ipv4Addr) -> bool {
        address.to_bits() & self.mask().to_bits() == self.network.to_bits()
    }

    fn size(self) -> u32 {
        1 << (32 - u32::from(self.prefix))
    }

    fn nth(self, index: u32) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.network.to_bits() | index)
    }

    /// Checks that this may be a sandbox's address, and nobody has it.
    ///
    /// # Errors
    /// It may not, or somebody has.
    pub fn claim(
        self,
        address: Ipv4Addr,
        taken: &BTreeSet<Ipv4Addr>,
    ) -> Result<Ipv4Addr, AddressError> {
        let (first, last) = (self.nth(2), self.nth(self.size() - 2));
        if !(first..=last).contains(&address) {
            Err(AddressError::OutOfRange {
                address,
                subnet: self,
                first,
                last,
            })
        } else if taken.contains(&address) {
            Err(AddressError::Taken(address))
        } else {
            Ok(address)
        }
    }

    /// Whether they have an address in common.
    pub fn overlaps(self, other: Self) -> bool {
        self.contains(other.network) || other.contains(self.network)
    }

    /// The first free address after `last`, and after the end those from the start: so an address
    /// stays unused for as long as possible when its sandbox is gone.
    ///
    /// # Errors
    /// None is free.
    pub fn next_free(
        self,
        last: Option<Ipv4Addr>,
        taken: &BTreeSet<Ipv4Addr>,
    ) -> Result<Ipv4Addr, AddressError> {
        let count = self.size() - 3;
        let start = match last {
            Some(last) if self.contains(last) => last.to_bits() - self.network.to_bits(),
            _ => 1,
        };
        // `start` is the index of the last one, so its successor is `start - 1` from the first
        // that there is, which has index 2.
        (0..count)
            .map(|step| self.nth(2 + (start.saturating_sub(1) + step) % count))
            .find(|address| !taken.contains(address))
            .ok_or(AddressError::Exhausted(
                self,
                usize::try_from(count).unwrap_or(usize::MAX),
            ))
    }
}

impl FromStr for Subnet {
    type Err = SubnetError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parsed = text.split_once('/').and_then(|(network, prefix)| {
            let subnet = Self {
                network: network.parse().ok()?,
                prefix: prefix.parse().ok()?,
            };
            let is_usable = (16..=29).contains(&subnet.prefix)
                && subnet.network.is_private()
                && subnet.network.to_bits() & (subnet.size() - 1) == 0;
            is_usable.then_some(subnet)
        });
        parsed.ok_or_else(|| SubnetError(text.to_owned()))
    }
}

impl TryFrom<String> for Subnet {
    type Error = SubnetError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Subnet> for String {
    fn from(subnet: Subnet) -> Self {
        subnet.to_string()
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subnet(text: &str) -> Subnet {
        text.parse().unwrap()
    }

    fn address(last: u8) -> Ipv4Addr {
        Ipv4Addr::new(192, 168, 200, last)
    }

    #[test]
    fn only_private_networks_of_a_useful_size_are_subnets() {
        for good in ["192.168.200.0/24", "10.0.0.0/16", "172.16.8.8/29"] {
            assert_eq!(subnet(good).to_string(), good);
        }
        for bad in [
            "192.168.200.1/24",
            "192.168.200.0",
            "8.8.8.0/24",
            "10.0.0.0/8",
            "192.168.200.0/30",
            "192.168.200.0/33",
            "fd00::/64",
            "",
        ] {
            assert!(bad.parse::<Subnet>().is_err(), "{bad}");
        }
        let subnet = subnet("172.16.8.8/29");
        assert_eq!(subnet.gateway(), Ipv4Addr::new(172, 16, 8, 9));
        assert_eq!(subnet.broadcast(), Ipv4Addr::new(172, 16, 8, 15));
        assert_eq!(subnet.mask(), Ipv4Addr::new(255, 255, 255, 248));
    }

    #[test]
    fn addresses_are_used_in_turn_until_none_is_left() {
        let subnet = subnet("192.168.200.0/29");
        let mut taken = BTreeSet::new();
        let mut last = None;
        let mut given = Vec::new();
        while let Ok(next) = subnet.next_free(last, &taken) {
            given.push(next.octets()[3]);
            taken.insert(next);
            last = Some(next);
        }
        assert_eq!(given, [2, 3, 4, 5, 6]);
        assert_eq!(
            subnet.next_free(last, &taken),
            Err(AddressError::Exhausted(subnet, 5))
        );
        // What has become free first is used last.
        taken.remove(&address(3));
        taken.remove(&address(5));
        assert_eq!(subnet.next_free(Some(address(3)), &taken), Ok(address(5)));
        assert_eq!(subnet.next_free(Some(address(5)), &taken), Ok(address(3)));
        // One of another subnet, as before a change of the configuration.
        let other = Some(Ipv4Addr::new(10, 0, 0, 9));
        assert_eq!(subnet.next_free(other, &taken), Ok(address(3)));
    }

    #[test]
    fn an_address_is_claimed_once_and_within_the_subnet() {
        let subnet = subnet("192.168.200.0/24");
        let taken = BTreeSet::from([address(9)]);
        for good in [2, 8, 254] {
            assert_eq!(subnet.claim(address(good), &taken), Ok(address(good)));
        }
        assert_eq!(
            subnet.claim(address(9), &taken),
            Err(AddressError::Taken(address(9)))
        );
        for bad in [
            address(0),
            address(1),
            address(255),
            Ipv4Addr::new(192, 168, 201, 2),
        ] {
            assert!(matches!(
                subnet.claim(bad, &taken),
                Err(AddressError::OutOfRange { .. })
            ));
        }
    }
}
