//! The network card of one sandbox, on this host's side.

use std::os::fd::AsRawFd;
use std::os::fd::OwnedFd;

use agent_protocol::GuestNetwork;
use tracing::error;

use super::note::TapNote;
use crate::chain;
use crate::domain::{
    Egress, HostError, MacAddress, NetworkInfo, Nic as Request, RateLimits, SandboxId,
};
use crate::network::{Counters, Forwards, Network};

/// The networks of a host, and what its sandboxes are told of them.
pub struct HostNetworks {
    /// The first is for those that ask for none in particular.
    first: HostNetwork,
    further: Vec<HostNetwork>,
    /// Ports of the host that lead into sandboxes.
    pub forwards: Forwards,
}

/// One of them.
pub struct HostNetwork {
    /// The network.
    pub network: Network,
    /// For sandboxes that ask for no policy.
    pub default_egress: Egress,
}

impl HostNetwork {
    /// What the domain may know of it.
    fn describe(&self) -> NetworkInfo {
        NetworkInfo {
            name: self.network.name().to_owned(),
            subnet: self.network.subnet(),
            default_egress: self.default_egress.clone(),
        }
    }
}

impl HostNetworks {
    /// They are in one namespace, and take packets of one size.
    pub fn new(first: HostNetwork, further: Vec<HostNetwork>) -> Self {
        Self {
            forwards: first.network.forwards(),
            first,
            further,
        }
    }

    fn all(&self) -> impl DoubleEndedIterator<Item = &HostNetwork> {
        std::iter::once(&self.first).chain(&self.further)
    }

    /// What the domain may know of them.
    pub fn describe(&self) -> Vec<NetworkInfo> {
        self.all().map(HostNetwork::describe).collect()
    }

    /// The network of this name, or the first.
    fn named(&self, name: Option<&str>) -> Option<&Network> {
        let Some(name) = name else {
            return Some(&self.first.network);
        };
        let mut all = self.all().map(|one| &one.network);
        all.find(|network| network.name() == name)
    }

    /// The network that a sandbox is connected to; the first, if it is to none.
    pub fn of(&self, id: &SandboxId) -> &Network {
        let mut all = self.all().map(|one| &one.network);
        let found = all.find(|network| network.has(id));
        found.unwrap_or(&self.first.network)
    }

    /// What a snapshot of a machine depends on.
    pub fn key(&self) -> String {
        format!("network card, MTU {}", self.first.network.mtu())
    }

    /// The sandboxes that are attached, or on the way there.
    pub fn attached(&self) -> impl Iterator<Item = SandboxId> {
        self.all().flat_map(|one| one.network.attached())
    }

    /// Whether all of them are as they were set up. The error is a sentence.
    pub async fn check(&self) -> Result<(), String> {
        for one in self.all() {
            one.network.check().await?;
        }
        Ok(())
    }

    /// Makes all of them as they were set up again. Returns the sandboxes that were cut off. The error is
    /// a sentence, and of one of them; what could be done in the others was done.
    pub async fn repair(&self) -> (Vec<SandboxId>, Result<(), String>) {
        let (mut repaired, mut outcome) = (Vec::new(), Ok(()));
        for one in self.all() {
            match one.network.repair().await {
                Ok(ids) => repaired.extend(ids),
                Err(error) => outcome = Err(format!("{}: {}", one.network.name(), chain(&error))),
            }
        }
        (repaired, outcome)
    }

    /// Removes all of them.
    pub async fn stop(&self) {
        // The first has found the host as it was before.
        for one in self.all().rev() {
            one.network.stop().await;
        }
    }
}

/// A sandbox's card, whose tap is still to be handed to its VMM.
pub struct Nic<'a> {
    network: &'a Network,
    forwards: &'a Forwards,
    id: SandboxId,
    tap: Option<OwnedFd>,
    name: String,
    index: u32,
    /// What it has counted under an earlier daemon.
    counters: Counters,
    request: Request,
}

impl<'a> Nic<'a> {
    /// A tap for a sandbox; `None` if it is to have none. The error is a sentence.
    pub async fn open(
        host: Option<&'a HostNetworks>,
        id: &SandboxId,
        request: Option<&Request>,
    ) -> Result<Option<Self>, String> {
        let Some(request) = request else {
            return Ok(None);
        };
        let (host, network) = network_for(host, request)?;
        let tap = network.tap().await.map_err(|error| chain(&error))?;
        Ok(Some(Self {
            network,
            forwards: &host.forwards,
            id: id.clone(),
            tap: Some(tap.file),
            name: tap.name,
            index: tap.index,
            counters: Counters::default(),
            request: request.clone(),
        }))
    }

    /// The card of a sandbox whose VMM was started by an earlier daemon. The error is a sentence.
    pub async fn take_over(
        host: Option<&'a HostNetworks>,
        id: &SandboxId,
        request: Option<&Request>,
        tap: Option<TapNote>,
    ) -> Result<Option<Self>, String> {
        let (request, tap) = match (request, tap) {
            (None, None) => return Ok(None),
            (Some(request), Some(tap)) => (request, tap),
            _ => return Err("its card is not as it is written down".to_owned()),
        };
        let (host, network) = network_for(host, request)?;
        let TapNote { name, index } = tap;
        let taken = network.take_over_tap(id, &name, index, request.address);
        let counters = taken.await.map_err(|error| chain(&error))?;
        Ok(Some(Self {
            network,
            forwards: &host.forwards,
            id: id.clone(),
            tap: None,
            name,
            index,
            counters,
            request: request.clone(),
        }))
    }

    /// What a later daemon has to know of it.
    pub fn note(&self) -> TapNote {
        TapNote {
            name: self.name.clone(),
            index: self.index,
        }
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
        let subnet = self.network.subnet();
        Some(GuestNetwork {
            mac: self.mac().0,
            address,
            prefix: subnet.prefix(),
            gateway: subnet.gateway(),
            resolvers: vec![subnet.gateway()],
            mtu: self.network.mtu(),
        })
    }

    /// Lets the sandbox's packets, and nobody else's, pass its tap.
    pub async fn attach(&self) -> Result<(), HostError> {
        let Some(address) = self.request.address else {
            return Ok(());
        };
        let egress = self.request.connection.egress.clone();
        let port = (self.name.as_str(), self.index);
        let counters = self.counters;
        let attached = (self.network).attach(&self.id, port, address, egress, counters);
        attached.await.map_err(|error| HostError::Internal {
            reason: format!("the sandbox cannot be connected: {}", chain(&error)),
        })?;
        self.forwards.reachable(&self.id, address);
        Ok(())
    }

    /// Takes away what the sandbox has of the network, once its VMM has ended. The error is a
    /// sentence.
    pub async fn close(mut self) -> Result<(), String> {
        self.forwards.unreachable(&self.id);
        if let Some(tap) = self.tap.take() {
            // That waits for the tap to be gone.
            let _ = tokio::task::spawn_blocking(move || drop(tap)).await;
        }
        self.network.detach(&self.id).await.map_err(|source| {
            error!(sandbox = %self.id, error = %chain(&source), "rules of the sandbox are left");
            format!("rules of the packet filter are left: {}", chain(&source))
        })
    }
}

/// The network that a sandbox is to be in. The error is a sentence.
fn network_for<'a>(
    host: Option<&'a HostNetworks>,
    request: &Request,
) -> Result<(&'a HostNetworks, &'a Network), String> {
    let host = host.ok_or(
        "it has a network card, and this host has no network now; the daemon's log says why",
    )?;
    let name = request.connection.network.as_deref();
    let network = host.named(name).ok_or_else(|| {
        let name = name.unwrap_or_default();
        format!(
            "it is in the network {name:?}, and this host has none of that name now; configure \
                 it again as one of network.further"
        )
    })?;
    Ok((host, network))
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
