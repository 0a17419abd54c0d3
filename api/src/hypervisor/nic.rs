//! The network card of one sandbox, on this host's side.

use std::os::fd::AsRawFd;
use std::os::fd::OwnedFd;

use agent_protocol::GuestNetwork;
use tracing::error;

use crate::chain;
use crate::domain::{
    Egress, HostError, MacAddress, NetworkInfo, Nic as Request, RateLimits, SandboxId,
};
use crate::network::{Forwards, Network};

/// The network of a host, and what its sandboxes are told of it.
pub struct HostNetwork {
    network: Network,
    /// Ports of the host that lead into sandboxes.
    pub forwards: Forwards,
    default_egress: Egress,
}

impl HostNetwork {
    /// `default_egress` is for sandboxes that ask for none.
    pub fn new(network: Network, default_egress: Egress) -> Self {
        Self {
            forwards: network.forwards(),
            network,
            default_egress,
        }
    }

    /// What the domain may know of it.
    pub fn describe(&self) -> NetworkInfo {
        NetworkInfo {
            subnet: self.network.subnet(),
            default_egress: self.default_egress.clone(),
        }
    }

    /// The network itself.
    pub fn network(&self) -> &Network {
        &self.network
    }

    /// What a snapshot of a machine depends on.
    pub fn key(&self) -> String {
        format!("network card, MTU {}", self.network.mtu())
    }
}

/// A sandbox's card, whose tap is still to be handed to its VMM.
pub struct Nic<'a> {
    host: &'a HostNetwork,
    id: SandboxId,
    tap: Option<OwnedFd>,
    name: String,
    index: u32,
    request: Request,
}

impl<'a> Nic<'a> {
    /// A tap for a sandbox; `None` if it is to have none. The error is a sentence.
    pub async fn open(
        host: Option<&'a HostNetwork>,
        id: &SandboxId,
        request: Option<&Request>,
    ) -> Result<Option<Self>, String> {
        let Some(request) = request else {
            return Ok(None);
        };
        let host = host.ok_or(
            "it has a network card, and this host has no network now; the daemon's log says why",
        )?;
        let tap = host.network.tap().await.map_err(|error| chain(&error))?;
        Ok(Some(Self {
            host,
            id: id.clone(),
            tap: Some(tap.file),
            name: tap.name,
            index: tap.index,
            request: request.clone(),
        }))
    }

    /// The descriptor that the VMM inherits, for as long as it was not handed over.
    pub fn descriptor(&self) -> Option<i32> {
        self.tap.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// The value of the VMM's flag for the card.
    pub fn options(&self) -> Option<String> {
        let limits = limit_options(self.request.connection.rate_limits);
        let options = format!("fd={},mac={}{limits}", self.descriptor()?, self.mac());
        Some(options)
    }

    fn mac(&self) -> MacAddress {
        MacAddress::of(
            self.request
                .address
                .unwrap_or(std::net::Ipv4Addr::UNSPECIFIED),
        )
    }

    /// The card of a machine that was held is that of a sandbox from now on.
    pub fn become_that_of(&mut self, request: Request) {
        self.request = request;
    }

    /// The VMM has the tap: it is gone when the VMM is.
    pub fn handed_over(&mut self) {
        self.tap = None;
    }

    /// What the guest is told; nothing, if it has no address.
    pub fn guest(&self) -> Option<GuestNetwork> {
        let address = self.request.address?;
        let subnet = self.host.network.subnet();
        Some(GuestNetwork {
            mac: self.mac().0,
            address,
            prefix: subnet.prefix(),
            gateway: subnet.gateway(),
            resolvers: vec![subnet.gateway()],
            mtu: self.host.network.mtu(),
        })
    }

    /// Lets the sandbox's packets, and nobody else's, pass its tap.
    pub async fn attach(&self) -> Result<(), HostError> {
        let Some(address) = self.request.address else {
            return Ok(());
        };
        let egress = self.request.connection.egress.clone();
        let port = (self.name.as_str(), self.index);
        let attached = self.host.network.attach(&self.id, port, address, egress);
        attached.await.map_err(|error| HostError::Internal {
            reason: format!("the sandbox cannot be connected: {}", chain(&error)),
        })?;
        self.host.forwards.reachable(&self.id, address);
        Ok(())
    }

    /// Takes away what the sandbox has of the network, once its VMM has ended. The error is a
    /// sentence.
    pub async fn close(mut self) -> Result<(), String> {
        self.host.forwards.unreachable(&self.id);
        if let Some(tap) = self.tap.take() {
            // That waits for the tap to be gone.
            let _ = tokio::task::spawn_blocking(move || drop(tap)).await;
        }
        self.host.network.detach(&self.id).await.map_err(|source| {
            error!(sandbox = %self.id, error = %chain(&source), "rules of the sandbox are left");
            format!("rules of the packet filter are left: {}", chain(&source))
        })
    }
}

/// The options of the VMM's flag that limit a card. As much can be sent at once as flows in within the
/// second that the limit is given by.
fn limit_options(limits: RateLimits) -> String {
    let RateLimits {
        bytes_per_sec,
        packets_per_sec,
    } = limits;
    [("bw", bytes_per_sec), ("ops", packets_per_sec)]
        .into_iter()
        .filter_map(|(bucket, limit)| {
            let limit = limit?;
            Some(format!(",{bucket}_size={limit},{bucket}_refill_time=1000"))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_token_buckets_of_a_second() {
        let options = |bytes_per_sec, packets_per_sec| {
            limit_options(RateLimits {
                bytes_per_sec,
                packets_per_sec,
            })
        };
        assert_eq!(options(None, None), "");
        assert_eq!(
            options(Some(200_000), Some(7)),
            ",bw_size=200000,bw_refill_time=1000,ops_size=7,ops_refill_time=1000"
        );
        assert_eq!(options(None, Some(7)), ",ops_size=7,ops_refill_time=1000");
    }
}
