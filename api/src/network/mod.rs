//! The network of the sandboxes on this host.
//!
//! ```text
//!            host                          bridge            taps, isolated     vmm ─► guest
//!  uplink ◄──routes, NAT──► gateway's address ── chbr0 ─┬── chbr0-0 ────────── fd ──► eth0
//!  forwards (sockets) ────►  DNS, DHCP                  └── chbr0-1 ────────── fd ──► eth0
//! ```
//!
//! Taps are made ahead of need, without anybody behind them; they live as long as a descriptor of
//! them. A sandbox that starts takes one and gives the descriptor to its VMM, and its addresses are
//! written to the packet filter ([`rules`]) and the bridge ([`links`]) while that boots. All of this
//! is in the network namespace that the configuration names, or in the daemon's own.
//!
//! Of all this, bridge and tables alone outlive a daemon that is killed. They are found by their
//! names, the bridge by its alias too, and replaced by the next daemon of the same directories.

mod denied;
mod dhcp;
mod dns;
mod forward;
mod links;
mod namespace;
mod nft;
mod rules;
mod sysctl;
mod tap;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use jiff::Timestamp;
use sha2::{Digest, Sha256};
use tokio::sync::{Notify, Semaphore};
use tokio::task::JoinSet;
use tracing::{debug, info, warn};

use crate::chain;
use crate::domain::{
    Counter, Denied, DeniedWhat, Egress, MacAddress, NetworkActivity, SandboxId, Subnet, Traffic,
};
use denied::DeniedPackets;
use dns::{Names, QUESTIONS_AT_A_TIME, Upstreams, Verdict};
pub use forward::{ForwardError, Forwards};
pub use links::LinkError;
use links::{Bridge, Links};
use namespace::Namespace;
pub use namespace::NamespaceError;
use nft::Nft;
pub use nft::NftError;
pub use rules::Counters;
use rules::{COUNTERS, Mark, Member, Tables};
pub use tap::Tap;

/// How many taps are kept ready.
const READY_TAPS: usize = 4;
/// How much is remembered of what each sandbox was not allowed to do.
const DENIED_KEPT: usize = 100;
/// `CAP_NET_ADMIN` of capabilities(7).
const CAP_NET_ADMIN: u32 = 12;

/// How the network is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkConfig {
    /// Name of the bridge, at most [`MAX_BRIDGE_NAME`] bytes.
    pub bridge: String,
    /// Addresses.
    pub subnet: Subnet,
    /// The largest packet, in bytes.
    pub mtu: u16,
    /// The network namespace that all of it is in; the daemon's own, if there is none.
    pub namespace: Option<String>,
    /// Resolvers instead of the host's.
    pub resolvers: Vec<SocketAddr>,
    /// What marks the bridge as this daemon's.
    pub owner: PathBuf,
    /// The bridges of this daemon's other networks.
    pub siblings: Vec<String>,
}

/// The longest name of a bridge, in bytes: that of a tap is it, a `-` and four digits, and an
/// interface's name has 15 at most.
pub const MAX_BRIDGE_NAME: usize = 10;

/// Why there is no network, or it did not do something.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The daemon may not.
    #[error("this user may not set up networks: start sandboxd as root, or give it CAP_NET_ADMIN")]
    NotAllowed,
    /// The namespace cannot be used.
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    /// Bridge or taps are not as they should be.
    #[error(transparent)]
    Links(#[from] LinkError),
    /// The packet filter is not as it should be.
    #[error("the packet filter cannot be set up")]
    Filter(#[from] NftError),
    /// Something else cannot be set up.
    #[error("cannot {action}")]
    Setup {
        /// What.
        action: &'static str,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// No tap can be made.
    #[error("no tap can be made for a sandbox")]
    Tap(#[source] io::Error),
    /// There is no such sandbox.
    #[error("the sandbox is not connected")]
    NotConnected,
    /// A tap is gone.
    #[error("the tap of the sandbox is gone")]
    NoTap,
    /// An address is not one of this network.
    #[error("the address of the sandbox is not one of {subnet}, which network.subnet is now")]
    OtherSubnet {
        /// The addresses of this network.
        subnet: Subnet,
    },
}

/// The network; clones share it.
#[derive(Clone)]
pub struct Network {
    inner: Arc<Inner>,
}

struct Inner {
    config: NetworkConfig,
    /// For what is quick.
    namespace: Namespace,
    links: Links,
    bridge: Bridge,
    nft: Nft,
    tables: Tables,
    /// Held while the packet filter changes, so that it and `members` agree.
    changes: tokio::sync::Mutex<()>,
    members: Mutex<Members>,
    taps: Mutex<VecDeque<Tap>>,
    /// What an earlier daemon's packet filter had counted.
    counted_before: HashMap<String, Counter>,
    tap_taken: Arc<Notify>,
    tasks: Mutex<JoinSet<()>>,
}

#[derive(Default)]
struct Members {
    by_id: HashMap<SandboxId, Connected>,
    by_address: HashMap<Ipv4Addr, SandboxId>,
}

struct Connected {
    member: Member,
    /// Whether the packet filter has it.
    is_applied: bool,
    /// Until when the packet filter has an address in the set of a rule.
    resolved: HashMap<(usize, Ipv4Addr), Instant>,
    questions: Arc<Semaphore>,
    denied_names: u64,
    denied: VecDeque<Denied>,
}

impl Connected {
    fn note(&mut self, denied: Denied) {
        if self.denied.len() >= DENIED_KEPT {
            self.denied.pop_front();
        }
        self.denied.push_back(denied);
    }
}

fn setup(action: &'static str) -> impl FnOnce(io::Error) -> NetworkError {
    move |source| NetworkError::Setup { action, source }
}

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
                        changes: tokio::sync::Mutex::default(),
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

    /// Its name, that of its bridge.
    pub fn name(&self) -> &str {
        &self.inner.config.bridge
    }

    /// Whether a sandbox is connected to it.
    pub fn has(&self, id: &SandboxId) -> bool {
        self.inner.members().by_id.contains_key(id)
    }

    /// Addresses of the sandboxes.
    pub fn subnet(&self) -> Subnet {
        self.inner.config.subnet
    }

    /// The largest packet, in bytes.
    pub fn mtu(&self) -> u16 {
        self.inner.config.mtu
    }

    /// Forwards into this network.
    pub fn forwards(&self) -> Forwards {
        let elsewhere = self.inner.config.namespace.is_some();
        Forwards::new(elsewhere.then(|| self.inner.namespace.clone()))
    }

    /// A tap that nobody is behind, and whose frames are dropped.
    ///
    /// # Errors
    /// None can be made.
    pub async fn tap(&self) -> Result<Tap, NetworkError> {
        let ready = self.inner.taps().pop_front();
        self.inner.tap_taken.notify_one();
        match ready {
            Some(tap) => Ok(tap),
            None => self.inner.make_tap().await,
        }
    }

    /// Makes a tap that a sandbox has from an earlier daemon a port of this network. Its frames are dropped
    /// until it is attached. Returns what was counted of it.
    ///
    /// # Errors
    /// There is no such tap, or the address is not one of this network.
    pub async fn take_over_tap(
        &self,
        id: &SandboxId,
        name: &str,
        index: u32,
        address: Option<Ipv4Addr>,
    ) -> Result<Counters, NetworkError> {
        let inner = &self.inner;
        let subnet = inner.config.subnet;
        if address.is_some_and(|address| !subnet.contains(address)) {
            return Err(NetworkError::OtherSubnet { subnet });
        }
        if inner.links.index_of(name).await? != Some(index) {
            return Err(NetworkError::NoTap);
        }
        inner
            .links
            .add_port(inner.bridge.index, index, inner.config.mtu)
            .await?;
        let prefix = rules::prefix(id);
        let counted = COUNTERS.map(|what| {
            let name = format!("{prefix}_{what}");
            inner.counted_before.get(&name).copied().unwrap_or_default()
        });
        Ok(Counters(counted))
    }

    /// Lets a sandbox behind a tap use this address, and nothing else.
    ///
    /// # Errors
    /// It is not connected.
    pub async fn attach(
        &self,
        id: &SandboxId,
        (tap, index): (&str, u32),
        address: Ipv4Addr,
        egress: Egress,
        counters: Counters,
    ) -> Result<(), NetworkError> {
        let inner = &self.inner;
        let member = Member {
            id: id.clone(),
            tap: tap.to_owned(),
            address,
            egress,
            mark: Mark::new(number_of(id), rand::random()),
        };
        let connected = Connected {
            member: member.clone(),
            is_applied: false,
            resolved: HashMap::new(),
            questions: Arc::new(Semaphore::new(QUESTIONS_AT_A_TIME)),
            denied_names: 0,
            denied: VecDeque::new(),
        };
        {
            let mut members = inner.members();
            members.by_address.insert(address, id.clone());
            members.by_id.insert(id.clone(), connected);
        }
        // To its end, whoever waits: what is half done, nobody could undo.
        let inner = Arc::clone(inner);
        let applied = tokio::spawn(async move { inner.apply(member, index, counters).await });
        applied.await.unwrap_or(Err(NetworkError::NotConnected))
    }

    /// Takes a sandbox's address away. One that has none is fine.
    ///
    /// # Errors
    /// The packet filter still has it.
    pub async fn detach(&self, id: &SandboxId) -> Result<(), NetworkError> {
        let inner = &self.inner;
        let _changes = inner.changes.lock().await;
        let connected = {
            let mut members = inner.members();
            let Some(connected) = members.by_id.remove(id) else {
                return Ok(());
            };
            members.by_address.remove(&connected.member.address);
            connected
        };
        if connected.is_applied {
            let script = inner.tables.detach(&connected.member);
            inner.nft.apply(script).await?;
        }
        Ok(())
    }

    /// Changes what a sandbox may reach, for connections that it has as well. What it has resolved
    /// stays known where the new policy allows it.
    ///
    /// # Errors
    /// It is as before.
    pub async fn set_egress(&self, id: &SandboxId, egress: Egress) -> Result<(), NetworkError> {
        let inner = &self.inner;
        let _changes = inner.changes.lock().await;
        let (before, names) = {
            let members = inner.members();
            let connected = members
                .by_id
                .get(id)
                .filter(|connected| connected.is_applied);
            let connected = connected.ok_or(NetworkError::NotConnected)?;
            (connected.member.clone(), connected.resolved.clone())
        };
        let after = Member {
            mark: before.mark.next(),
            egress,
            ..before.clone()
        };
        // The address of a name stays, if a rule of the new policy is about the same names.
        let mut kept: BTreeMap<usize, Vec<(Ipv4Addr, Instant)>> = BTreeMap::new();
        for ((rule, address), until) in names {
            for new in same_rules(&before.egress, rule, &after.egress) {
                kept.entry(new).or_default().push((address, until));
            }
        }
        let now = Instant::now();
        let mut script = inner.tables.change(&before, &after);
        let mut resolved = HashMap::new();
        for (rule, addresses) in kept {
            let left: Vec<_> = addresses
                .iter()
                .filter_map(|(address, until)| {
                    let seconds = until.checked_duration_since(now)?.as_secs();
                    let seconds = u32::try_from(seconds).ok().filter(|left| *left > 0)?;
                    Some((*address, seconds))
                })
                .collect();
            script.push_str(&inner.tables.resolved(&after, &[rule], &left));
            resolved.extend(
                addresses
                    .into_iter()
                    .map(|(address, until)| ((rule, address), until)),
            );
        }
        inner.nft.apply(script).await?;
        if let Some(connected) = inner.members().by_id.get_mut(id) {
            connected.member = after;
            connected.resolved = resolved;
        }
        Ok(())
    }

    /// The sandboxes that are attached, or on the way there.
    pub fn attached(&self) -> Vec<SandboxId> {
        self.inner.members().by_id.keys().cloned().collect()
    }

    /// What a sandbox does in the network.
    ///
    /// # Errors
    /// It is not connected, or the counters cannot be read.
    pub async fn activity(&self, id: &SandboxId) -> Result<NetworkActivity, NetworkError> {
        let inner = &self.inner;
        let counters = inner.nft.counters(&inner.tables.name()).await?;
        let members = inner.members();
        let connected = members.by_id.get(id).ok_or(NetworkError::NotConnected)?;
        let prefix = connected.member.prefix();
        let counter = |what: &str| {
            let name = format!("{prefix}_{what}");
            counters.get(&name).copied().unwrap_or_default()
        };
        Ok(NetworkActivity {
            interface: connected.member.tap.clone(),
            traffic: Traffic {
                sent: counter("sent"),
                received: counter("received"),
                denied: counter("denied"),
                denied_names: connected.denied_names,
            },
            denied: connected.denied.iter().cloned().collect(),
        })
    }

    /// Ends what this process does for the network, and leaves what is in the kernel, as if it were
    /// killed; for tests. Ready taps stay as long as the value that is returned.
    #[doc(hidden)]
    pub async fn abandon(self) -> impl Sized {
        let mut tasks = std::mem::take(&mut *self.inner.tasks());
        tasks.shutdown().await;
        std::mem::take(&mut *self.inner.taps())
    }

    /// Removes all of it. Sandboxes have none from then on.
    pub async fn stop(&self) {
        let inner = &self.inner;
        let mut tasks = std::mem::take(&mut *inner.tasks());
        tasks.shutdown().await;
        let taps = std::mem::take(&mut *inner.taps());
        // Closing the last descriptor of a tap waits for it to be gone.
        let _ = tokio::task::spawn_blocking(move || drop(taps)).await;
        let _changes = inner.changes.lock().await;
        let config = &inner.config;
        let removed = inner
            .links
            .remove_bridge(&config.bridge, config.subnet, &config.owner);
        if let Err(error) = removed.await {
            warn!(error = %chain(&error), "the bridge is left");
        }
        if inner.bridge.was_not_forwarding
            && let Err(error) = inner.namespace.run(|| sysctl::set_forwarding(false)).await
        {
            warn!(%error, "net.ipv4.ip_forward is left set");
        }
        if let Err(error) = inner.nft.apply(inner.tables.remove()).await {
            warn!(error = %chain(&error), "tables of the packet filter are left");
        }
    }
}

impl Inner {
    fn members(&self) -> MutexGuard<'_, Members> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn taps(&self) -> MutexGuard<'_, VecDeque<Tap>> {
        self.taps.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tasks(&self) -> MutexGuard<'_, JoinSet<()>> {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn make_tap(&self) -> Result<Tap, NetworkError> {
        make_tap(
            &self.namespace,
            &self.links,
            self.bridge.index,
            &self.config,
        )
        .await
    }

    /// Puts a sandbox into the packet filter, if it is still to be there.
    async fn apply(
        &self,
        member: Member,
        index: u32,
        counters: Counters,
    ) -> Result<(), NetworkError> {
        let _changes = self.changes.lock().await;
        let is_current = |connected: &Connected| connected.member.mark == member.mark;
        if !self.members().by_id.get(&member.id).is_some_and(is_current) {
            return Err(NetworkError::NotConnected);
        }
        let (address, mac) = (member.address, MacAddress::of(member.address));
        self.links
            .bind(self.bridge.index, index, address, mac)
            .await?;
        self.nft
            .apply(self.tables.attach(&member, counters))
            .await?;
        if let Some(connected) = self.members().by_id.get_mut(&member.id) {
            connected.is_applied = true;
        }
        Ok(())
    }

    /// Writes down that a name has these addresses, as far as that matters to a policy.
    async fn learn(&self, client: Ipv4Addr, name: &str, addresses: &[(Ipv4Addr, u32)]) {
        let _changes = self.changes.lock().await;
        let now = Instant::now();
        let (id, member, rules, news) = {
            let members = self.members();
            let Some(id) = members.by_address.get(&client) else {
                return;
            };
            let connected = members
                .by_id
                .get(id)
                .filter(|connected| connected.is_applied);
            let Some(connected) = connected else {
                return;
            };
            let member = connected.member.clone();
            let rules: Vec<_> = member.egress.rules_for(name).collect();
            // A name that is allowed is no way to private addresses: whoever owns it says what
            // addresses it has.
            let public = addresses
                .iter()
                .filter(|(address, _)| !rules::is_private(*address));
            let news: Vec<_> = public
                .filter(|(address, seconds)| {
                    let until = now + Duration::from_secs(u64::from(*seconds));
                    let has = |rule: &usize| connected.resolved.get(&(*rule, *address));
                    rules
                        .iter()
                        .any(|rule| has(rule).is_none_or(|has| *has < until))
                })
                .copied()
                .collect();
            (id.clone(), member, rules, news)
        };
        if rules.is_empty() || news.is_empty() {
            return;
        }
        let script = self.tables.resolved(&member, &rules, &news);
        if let Err(error) = self.nft.apply(script).await {
            warn!(sandbox = %id, error = %chain(&error), "addresses of a name are not let through");
            return;
        }
        if let Some(connected) = self.members().by_id.get_mut(&id) {
            connected.resolved.retain(|_, until| *until > now);
            for (address, seconds) in news {
                let until = now + Duration::from_secs(u64::from(seconds));
                let entries = rules.iter().map(|rule| ((*rule, address), until));
                connected.resolved.extend(entries);
            }
        }
    }
}

/// What sandboxes may look up, as long as there is the network.
struct WeakNames(std::sync::Weak<Inner>);

#[async_trait]
impl Names for WeakNames {
    fn verdict(&self, client: Ipv4Addr, name: &str) -> Verdict {
        let Some(inner) = self.0.upgrade() else {
            return Verdict::Unknown;
        };
        let mut members = inner.members();
        let Members { by_id, by_address } = &mut *members;
        let Some(connected) = by_address.get(&client).and_then(|id| by_id.get_mut(id)) else {
            return Verdict::Unknown;
        };
        if connected.member.egress.allows_name(name) {
            return Verdict::Allowed;
        }
        debug!(sandbox = %connected.member.id, name, "a name was denied");
        connected.denied_names = connected.denied_names.saturating_add(1);
        connected.note(Denied {
            at: Timestamp::now(),
            what: DeniedWhat::Name {
                name: name.to_owned(),
            },
        });
        Verdict::Denied
    }

    fn turns(&self, client: Ipv4Addr) -> Option<Arc<Semaphore>> {
        let inner = self.0.upgrade()?;
        let members = inner.members();
        let connected = members.by_id.get(members.by_address.get(&client)?)?;
        Some(Arc::clone(&connected.questions))
    }

    async fn learned(&self, client: Ipv4Addr, name: &str, addresses: &[(Ipv4Addr, u32)]) {
        if let Some(inner) = self.0.upgrade() {
            inner.learn(client, name, addresses).await;
        }
    }
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

/// The rules of a new policy that are about the same names as this rule of the old one.
fn same_rules(before: &Egress, rule: usize, after: &Egress) -> Vec<usize> {
    let (Egress::Allow(before), Egress::Allow(after)) = (before, after) else {
        return Vec::new();
    };
    let Some(old) = before.get(rule) else {
        return Vec::new();
    };
    let same = after.iter().enumerate().filter(|(_, new)| new.to == old.to);
    same.map(|(index, _)| index).collect()
}

/// A number for a sandbox in marks: one address is not had by two with the same number, but for
/// once in 65536 times.
fn number_of(id: &SandboxId) -> u16 {
    let digest = Sha256::digest(id.as_str());
    u16::from_be_bytes([digest[0], digest[1]])
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
