//! How the network is set up, what it serves while it is, and how taps are made ahead of need.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex};

use tracing::{debug, info, warn};

use super::denied::DeniedPackets;
use super::dns::{self, Upstreams};
use super::links::{Bridge, Links};
use super::members::WeakNames;
use super::namespace::Namespace;
use super::nft::Nft;
use super::rules::Tables;
use super::{Inner, Network, NetworkConfig, NetworkError, Tap, dhcp, sysctl, tap};
use crate::chain;
use crate::domain::{Counter, MacAddress};

/// How many taps are kept ready.
const READY_TAPS: usize = 4;
/// `CAP_NET_ADMIN` of capabilities(7).
const CAP_NET_ADMIN: u32 = 12;

impl Network {
    /// Sets the network up, in place of what an earlier daemon has left of it. Nothing passes the taps of
    /// sandboxes that it has left until they are taken over, and attached.
    ///
    /// # Errors
    /// It cannot be set up; nothing of it is there.
    pub async fn start(config: NetworkConfig) -> Result<Self, NetworkError> {
        if !may_administer() {
            return Err(NetworkError::NotAllowed);
        }
        let namespace = Namespace::enter(config.namespace.as_deref()).await?;
        let nft = Nft::find(Namespace::enter(config.namespace.as_deref()).await?)?;
        let links = Links::connect(&namespace).await?;
        let forwarding = namespace.run(sysctl::is_forwarding).await;
        let forwarding = forwarding.map_err(setup("read net.ipv4.ip_forward"))?;
        let (subnet, mtu) = (config.subnet, config.mtu);
        let bridge = links
            .make_bridge(&config.bridge, subnet, mtu, &config.owner, forwarding)
            .await?;
        match Self::start_on(&config, &namespace, nft, &links, &bridge).await {
            Ok((tables, nft, packets, sockets, dhcp, counted_before)) => {
                let network = Self {
                    inner: Arc::new(Inner {
                        config,
                        namespace,
                        links,
                        bridge,
                        nft,
                        tables,
                        changes: tokio::sync::RwLock::default(),
                        members: Mutex::default(),
                        taps: Mutex::default(),
                        counted_before,
                        tap_taken: Arc::default(),
                        tasks: Mutex::default(),
                    }),
                };
                network.serve(packets, sockets, dhcp);
                info!(bridge = network.inner.config.bridge, %subnet, "the network is up");
                Ok(network)
            }
            Err(error) => {
                let removed = links.remove_bridge(&config.bridge, subnet, &config.owner);
                if let Err(error) = removed.await {
                    warn!(error = %chain(&error), "the bridge is left");
                }
                Err(error)
            }
        }
    }

    async fn start_on(
        config: &NetworkConfig,
        namespace: &Namespace,
        nft: Nft,
        links: &Links,
        bridge: &Bridge,
    ) -> Result<
        (
            Tables,
            Nft,
            Option<DeniedPackets>,
            dns::Sockets,
            tokio::net::UdpSocket,
            HashMap<String, Counter>,
        ),
        NetworkError,
    > {
        let name = config.bridge.clone();
        let strict = namespace.run(move || {
            sysctl::be_strict(&name)?;
            sysctl::disable_ipv6(&name)
        });
        strict.await.map_err(setup("set up the bridge"))?;
        let packets = DeniedPackets::listen(namespace).await;
        let packets = packets
            .inspect_err(|error| {
                warn!(%error, "the kernel does not tell of denied packets; they are counted only");
            })
            .ok();
        let tables = Tables {
            bridge: config.bridge.clone(),
            subnet: config.subnet,
            siblings: config.siblings.clone(),
            only_ours: bridge.was_not_forwarding,
            log_group: packets.as_ref().map_or(u16::MAX, |packets| packets.group),
        };
        // There may be none.
        let counted_before = nft.counters(&tables.name()).await.unwrap_or_default();
        nft.apply(tables.replace()).await?;
        // From here on, a failure leaves tables that do nothing; the bridge is gone.
        let started = async {
            // Only now that the filter is there.
            let forwarding = namespace.run(|| sysctl::set_forwarding(true)).await;
            forwarding.map_err(setup("set net.ipv4.ip_forward"))?;
            let gateway = config.subnet.gateway();
            let sockets = dns::listen(namespace, gateway).await;
            let sockets = sockets.map_err(setup("listen for DNS on the gateway's address"))?;
            let dhcp = dhcp::listen(namespace, &config.bridge).await;
            let dhcp = dhcp.map_err(setup("listen for DHCP on the bridge"))?;
            // The first shows whether taps can be made at all.
            let tap = make_tap(namespace, links, bridge.index, config).await?;
            drop(tap);
            Ok((sockets, dhcp))
        };
        match started.await {
            Ok((sockets, dhcp)) => Ok((tables, nft, packets, sockets, dhcp, counted_before)),
            Err(error) => {
                if let Err(error) = nft.apply(tables.remove()).await {
                    warn!(error = %chain(&error), "tables of the packet filter are left");
                }
                if bridge.was_not_forwarding {
                    let _ = namespace.run(|| sysctl::set_forwarding(false)).await;
                }
                Err(error)
            }
        }
    }

    fn serve(
        &self,
        packets: Option<DeniedPackets>,
        sockets: dns::Sockets,
        dhcp: tokio::net::UdpSocket,
    ) {
        let config = &self.inner.config;
        let upstreams = if config.resolvers.is_empty() {
            Upstreams::OfHost
        } else {
            Upstreams::fixed(config.resolvers.clone())
        };
        let offer = dhcp::Offer {
            subnet: config.subnet,
            mtu: config.mtu,
        };
        // The tasks hold the network weakly, or it would never be dropped.
        let names = Arc::new(WeakNames(Arc::downgrade(&self.inner)));
        let weak = Arc::downgrade(&self.inner);
        let mut tasks = self.inner.tasks();
        tasks.spawn(dns::serve(sockets, names, Arc::new(upstreams)));
        tasks.spawn(dhcp::serve(dhcp, offer, move |mac| {
            let inner = weak.upgrade()?;
            let members = inner.members();
            let mut addresses = members.by_address.keys().copied();
            addresses.find(|address| MacAddress::of(*address) == mac)
        }));
        let weak = Arc::downgrade(&self.inner);
        tasks.spawn(async move {
            let Some(packets) = packets else { return };
            loop {
                let told = match packets.next().await {
                    Ok(told) => told,
                    Err(error) => {
                        warn!(%error, "denied packets are counted only from now on");
                        return;
                    }
                };
                let Some(inner) = weak.upgrade() else { return };
                let mut members = inner.members();
                for (id, denied) in told {
                    debug!(sandbox = %id, what = ?denied.what, "a packet was denied");
                    if let Some(connected) = members.by_id.get_mut(&id) {
                        connected.note(denied);
                    }
                }
            }
        });
        let weak = Arc::downgrade(&self.inner);
        let taken = Arc::clone(&self.inner.tap_taken);
        tasks.spawn(async move {
            loop {
                let Some(inner) = weak.upgrade() else { return };
                if inner.taps().len() < READY_TAPS {
                    match inner.make_tap().await {
                        Ok(tap) => {
                            inner.taps().push_back(tap);
                            continue;
                        }
                        Err(error) => warn!(error = %chain(&error), "no tap made ahead of need"),
                    }
                }
                drop(inner);
                taken.notified().await;
            }
        });
    }
}

impl Inner {
    /// Makes a tap, a port of the bridge.
    ///
    /// # Errors
    /// None can be made.
    pub(super) async fn make_tap(&self) -> Result<Tap, NetworkError> {
        make_tap(
            &self.namespace,
            &self.links,
            self.bridge.index,
            &self.config,
        )
        .await
    }
}

fn setup(action: &'static str) -> impl FnOnce(io::Error) -> NetworkError {
    move |source| NetworkError::Setup { action, source }
}

async fn make_tap(
    namespace: &Namespace,
    links: &Links,
    bridge: u32,
    config: &NetworkConfig,
) -> Result<Tap, NetworkError> {
    let pattern = format!("{}-%d", config.bridge);
    let made = namespace.run(move || {
        let tap = tap::open(&pattern)?;
        sysctl::disable_ipv6(&tap.name)?;
        Ok(tap)
    });
    let tap = made.await.map_err(NetworkError::Tap)?;
    links.add_port(bridge, tap.index, config.mtu).await?;
    Ok(tap)
}

/// Whether this process may set up networks; proc_pid_status(5).
fn may_administer() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| {
        let digits = line.strip_prefix("CapEff:")?.trim();
        u64::from_str_radix(digits, 16).ok()
    });
    effective.unwrap_or(0) & (1 << CAP_NET_ADMIN) != 0
}
