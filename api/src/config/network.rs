//! The networks of sandboxes.

use std::net::SocketAddr;
use std::path::Path;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::domain::{Egress, Subnet};
use crate::network::MAX_BRIDGE_NAME;

/// The network of sandboxes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NetworkConfig {
    /// Whether sandboxes have one.
    pub mode: NetworkMode,
    /// Name of the bridge.
    pub bridge: String,
    /// Addresses of the sandboxes and, as the first of them, of the gateway.
    pub subnet: Subnet,
    /// The largest packet, in bytes.
    pub mtu: u16,
    /// Name in `/run/netns`, or absolute path, of the network namespace that all of it is in; the
    /// daemon's own, if not given.
    pub namespace: Option<String>,
    /// Resolvers that names are looked up at, instead of those of `/etc/resolv.conf`.
    pub resolvers: Vec<SocketAddr>,
    /// What new sandboxes may reach unless they ask for something else.
    pub egress: Egress,
    /// Further networks, for sandboxes that ask for them.
    pub further: Vec<FurtherNetwork>,
}

/// A network beside the first, in the same namespace and with packets of the same size.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FurtherNetwork {
    /// Name of the bridge, and of the network.
    pub bridge: String,
    /// Addresses of the sandboxes and, as the first of them, of the gateway.
    pub subnet: Subnet,
    /// What new sandboxes in it may reach unless they ask for something else.
    #[serde(default = "anything")]
    pub egress: Egress,
}

fn anything() -> Egress {
    Egress::All
}

/// Whether sandboxes have a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum NetworkMode {
    /// If it can be set up.
    Auto,
    /// Yes; if it cannot be set up, the daemon does not start.
    On,
    /// No: they have no network card.
    Off,
}

impl Default for NetworkConfig {
    fn default() -> Self {
        Self {
            mode: NetworkMode::Auto,
            bridge: "chbr0".to_owned(),
            subnet: Subnet::DEFAULT,
            mtu: 1500,
            namespace: None,
            resolvers: Vec::new(),
            egress: Egress::All,
            further: Vec::new(),
        }
    }
}

impl NetworkConfig {
    /// The same as the host side takes it, for the daemon that owns `data_dir`, each with what new
    /// sandboxes may reach. The first is for those that ask for none in particular.
    pub fn for_host(&self, data_dir: &Path) -> Vec<(crate::network::NetworkConfig, Egress)> {
        if self.mode == NetworkMode::Off {
            return Vec::new();
        }
        let all = self.all();
        let others = |bridge: &str| {
            let others = all.iter().filter(|(other, ..)| *other != bridge);
            others.map(|(other, ..)| (*other).to_owned()).collect()
        };
        let host_side = |(bridge, subnet, egress): &(&str, Subnet, &Egress)| {
            let config = crate::network::NetworkConfig {
                bridge: (*bridge).to_owned(),
                subnet: *subnet,
                mtu: self.mtu,
                namespace: self.namespace.clone(),
                resolvers: self.resolvers.clone(),
                owner: data_dir.to_owned(),
                siblings: others(bridge),
            };
            (config, (*egress).clone())
        };
        all.iter().map(host_side).collect()
    }

    /// Bridge, addresses and policy of each network.
    fn all(&self) -> Vec<(&str, Subnet, &Egress)> {
        let further = self.further.iter();
        std::iter::once((self.bridge.as_str(), self.subnet, &self.egress))
            .chain(further.map(|one| (one.bridge.as_str(), one.subnet, &one.egress)))
            .collect()
    }

    /// What is wrong with it, as a sentence.
    pub(super) fn check(&self) -> Result<(), String> {
        let all = self.all();
        for (place, (bridge, subnet, egress)) in all.iter().enumerate() {
            check_bridge(bridge)?;
            for (other, other_subnet, _) in &all[..place] {
                // Taps are known by the name of their bridge and a `-`.
                let is_prefix = |one: &str, other: &str| {
                    other
                        .strip_prefix(one)
                        .is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
                };
                if is_prefix(bridge, other) || is_prefix(other, bridge) {
                    return Err(format!(
                        "the networks {other:?} and {bridge:?} need names of which none is the \
                         other, or the other with `-` and more"
                    ));
                }
                if subnet.overlaps(*other_subnet) {
                    return Err(format!(
                        "the subnets {other_subnet} of {other:?} and {subnet} of {bridge:?} overlap"
                    ));
                }
            }
            let egress = (*egress).clone().check();
            egress.map_err(|error| format!("egress of the network {bridge:?}: {error}"))?;
        }
        // RFC 791 and the largest that Ethernet interfaces take.
        if !(576..=65_521).contains(&self.mtu) {
            return Err(format!(
                "network.mtu must be 576 to 65521, not {}",
                self.mtu
            ));
        }
        Ok(())
    }
}

fn check_bridge(name: &str) -> Result<(), String> {
    let is_name = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
    let bytes = name.as_bytes();
    if (1..=MAX_BRIDGE_NAME).contains(&bytes.len())
        && bytes.iter().copied().all(is_name)
        && bytes[0].is_ascii_alphabetic()
    {
        return Ok(());
    }
    Err(format!(
        "a network's bridge must be 1 to {MAX_BRIDGE_NAME} letters, digits, `-` or `_`, and begin with a \
         letter, not {name:?}"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_have_names_and_addresses_of_their_own() {
        let check = |further: &[(&str, &str)]| {
            let further = further.iter().map(|(bridge, subnet)| FurtherNetwork {
                bridge: (*bridge).to_owned(),
                subnet: subnet.parse().unwrap(),
                egress: Egress::None,
            });
            let config = NetworkConfig {
                further: further.collect(),
                ..NetworkConfig::default()
            };
            config.check().map(|()| config.for_host(Path::new("/data")))
        };
        let networks = check(&[("chbr1", "192.168.201.0/24"), ("chbr10", "10.0.0.0/16")]);
        let networks = networks.unwrap();
        assert_eq!(networks.len(), 3);
        assert_eq!(networks[0].0.siblings, ["chbr1", "chbr10"]);
        assert_eq!(networks[1].0.siblings, ["chbr0", "chbr10"]);
        assert_eq!(networks[2].1, Egress::None);
        for (bridge, subnet, what) in [
            ("chbr0", "10.0.0.0/16", "names"),
            ("chbr0-a", "10.0.0.0/16", "names"),
            ("chbr1", "192.168.0.0/16", "overlap"),
            ("chbr1", "192.168.200.128/25", "overlap"),
            ("1", "10.0.0.0/16", "letter"),
        ] {
            let error = check(&[(bridge, subnet)]).unwrap_err();
            assert!(error.contains(what), "{error}");
        }
    }
}
