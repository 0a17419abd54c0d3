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

mod check;
mod denied;
mod dhcp;
mod dns;
mod forward;
mod links;
mod members;
mod namespace;
mod nft;
mod rules;
mod start;
mod sysctl;
mod tap;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use sha2::{Digest, Sha256};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tracing::warn;

use crate::chain;
use crate::domain::{Counter, Egress, NetworkActivity, SandboxId, Subnet, Traffic};
pub use forward::{ForwardError, Forwards};
pub use links::LinkError;
use links::{Bridge, Links};
use members::Members;
use namespace::Namespace;
pub use namespace::NamespaceError;
use nft::Nft;
pub use nft::NftError;
pub use rules::Counters;
use rules::{COUNTERS, Mark, Member, Tables};
pub use tap::Tap;

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
    /// The bridge is gone, or another has its name.
    #[error(
        "the bridge {name} is gone, which sandboxd has made; restart sandboxd, which makes it anew and \
         connects the sandboxes that run"
    )]
    NoBridge {
        /// Its name.
        name: String,
    },
    /// Tables of the packet filter are gone.
    #[error(
        "rules of the packet filter are gone, which sandboxd has made; it makes them anew soon"
    )]
    NoTables,
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
    /// Shared by who changes what the packet filter has of a sandbox; alone has it who removes all.
    changes: tokio::sync::RwLock<()>,
    members: Mutex<Members>,
    taps: Mutex<VecDeque<Tap>>,
    /// What an earlier daemon's packet filter had counted.
    counted_before: HashMap<String, Counter>,
    tap_taken: Arc<Notify>,
    tasks: Mutex<JoinSet<()>>,
}

impl Network {
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
        inner.members().insert(member.clone());
        let inner = Arc::clone(inner);
        to_its_end(async move { inner.apply(member, index, counters).await }).await
    }

    /// Takes a sandbox's address away. One that has none is fine.
    ///
    /// # Errors
    /// The packet filter still has it.
    pub async fn detach(&self, id: &SandboxId) -> Result<(), NetworkError> {
        let (inner, id) = (Arc::clone(&self.inner), id.clone());
        to_its_end(async move { inner.detach(&id).await }).await
    }

    /// Changes what a sandbox may reach, for connections that it has as well. What it has resolved
    /// stays known where the new policy allows it.
    ///
    /// # Errors
    /// It is as before.
    pub async fn set_egress(&self, id: &SandboxId, egress: Egress) -> Result<(), NetworkError> {
        let (inner, id) = (Arc::clone(&self.inner), id.clone());
        to_its_end(async move { inner.set_egress(&id, egress).await }).await
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
        let _changes = inner.changes.write().await;
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
}

/// Does it to its end, whoever waits: what is half done, nobody could undo.
async fn to_its_end(
    work: impl Future<Output = Result<(), NetworkError>> + Send + 'static,
) -> Result<(), NetworkError> {
    let done = tokio::spawn(work).await;
    done.unwrap_or(Err(NetworkError::NotConnected))
}

/// A number for a sandbox in marks: one address is not had by two with the same number, but for
/// once in 65536 times.
fn number_of(id: &SandboxId) -> u16 {
    let digest = Sha256::digest(id.as_str());
    u16::from_be_bytes([digest[0], digest[1]])
}
