//! Bridge, taps and neighbours, by rtnetlink.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;

use futures_util::{StreamExt, TryStreamExt};
use rtnetlink::packet_route::address::AddressAttribute;
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use rtnetlink::packet_route::neighbour::{NeighbourFlags, NeighbourState};
use rtnetlink::{Error, Handle, LinkBridge, LinkBridgePort, LinkUnspec};
use tokio::task::JoinHandle;

use super::namespace::Namespace;
use crate::domain::{MacAddress, Subnet};

/// What the aliases of our bridges begin with; what follows is the data directory of the daemon
/// that has made it.
const ALIAS: &str = "sandboxd ";
/// What the alias of a bridge ends with if the host did not forward packets before.
const WAS_NOT_FORWARDING: &str = " (was not forwarding)";

/// A connection to the kernel's rtnetlink.
pub struct Links {
    handle: Handle,
    connection: JoinHandle<()>,
}

/// A bridge of ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bridge {
    /// Its number.
    pub index: u32,
    /// Whether the host forwarded no packets before an earlier daemon, or this one, made it do so.
    pub was_not_forwarding: bool,
}

/// What could be a port of a bridge.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Port {
    /// Its number.
    pub index: u32,
    /// The number of the bridge, or of what else it is a part of.
    pub controller: Option<u32>,
    /// Whether it is set up.
    pub is_up: bool,
}

/// Why links are not as they should be.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// No connection to the kernel.
    #[error("there is no connection to the kernel's rtnetlink")]
    Connect(#[source] io::Error),
    /// The kernel refuses.
    #[error("cannot {action}")]
    Kernel {
        /// What was tried.
        action: String,
        /// What it says.
        #[source]
        source: Error,
    },
    /// The name is taken.
    #[error(
        "there is an interface {name} already, which this daemon has not made{}; choose another \
         name with network.bridge, or remove it with `ip link delete {name}`",
        owner.as_ref().map(|owner| format!(" (it belongs to the sandboxd of {owner})")).unwrap_or_default()
    )]
    NotOurs {
        /// The name.
        name: String,
        /// The data directory of the daemon that it belongs to, if it is one's.
        owner: Option<String>,
    },
    /// The addresses are taken.
    #[error(
        "the addresses {subnet} overlap with {address}, which an interface of this host has; \
         choose others with network.subnet"
    )]
    Overlap {
        /// Ours.
        subnet: Subnet,
        /// The host's.
        address: Ipv4Addr,
    },
}

fn kernel(action: impl Into<String>) -> impl FnOnce(Error) -> LinkError {
    let action = action.into();
    move |source| LinkError::Kernel { action, source }
}

impl Drop for Links {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

impl Links {
    /// Connects, in this namespace.
    ///
    /// # Errors
    /// There is no connection.
    pub async fn connect(namespace: &Namespace) -> Result<Self, LinkError> {
        let connected = namespace.run(rtnetlink::new_connection).await;
        let (connection, handle, _) = connected.map_err(LinkError::Connect)?;
        Ok(Self {
            handle,
            connection: tokio::spawn(connection),
        })
    }

    /// Makes the bridge with the gateway's address, for the daemon of this data directory. One that an
    /// earlier daemon has made is kept, with its taps, if it has that address and no other; or else it is
    /// made anew, without taps. `is_forwarding` tells whether the host forwards packets.
    ///
    /// # Errors
    /// The name or the addresses are taken, or the kernel refuses.
    pub async fn make_bridge(
        &self,
        name: &str,
        subnet: Subnet,
        mtu: u16,
        owner: &Path,
        is_forwarding: bool,
    ) -> Result<Bridge, LinkError> {
        let mac = MacAddress::of(subnet.gateway());
        let mut was_not_forwarding = !is_forwarding;
        let mut kept = None;
        if let Some(found) = self.find(name).await? {
            let alias = self.check_owner(name, &found, owner, mac)?;
            was_not_forwarding |= alias.is_some_and(|alias| alias.ends_with(WAS_NOT_FORWARDING));
            let index = found.header.index;
            let has_mac = found
                .attributes
                .iter()
                .any(|it| matches!(it, LinkAttribute::Address(found) if found[..] == mac.0));
            if has_mac && self.has_address_alone(index, subnet).await? {
                kept = Some(index);
            } else {
                self.delete(name, index).await?;
            }
        }
        self.check_overlap(subnet, kept).await?;
        let mut alias = format!("{ALIAS}{}", owner.display());
        if was_not_forwarding {
            alias.push_str(WAS_NOT_FORWARDING);
        }
        // The kernel takes an alias only of an interface that is there. The hardware address is what
        // tells ours before that.
        let index = match kept {
            Some(index) => index,
            None => {
                let message = LinkBridge::new(name).address(mac.0.to_vec()).build();
                let add = self.handle.link().add(message).execute().await;
                add.map_err(kernel(format!("make the bridge {name}")))?;
                self.find(name).await?.map_or(0, |link| link.header.index)
            }
        };
        let change = LinkUnspec::new_with_index(index)
            .alias(alias)
            .mtu(mtu.into())
            .up();
        let change = self.handle.link().change(change.build()).execute().await;
        change.map_err(kernel(format!("set up the bridge {name}")))?;
        if kept.is_some() {
            return Ok(Bridge {
                index,
                was_not_forwarding,
            });
        }
        let address = IpAddr::V4(subnet.gateway());
        let add = self.handle.address().add(index, address, subnet.prefix());
        let add = add.execute().await;
        add.map_err(kernel(format!("give {address} to the bridge {name}")))?;
        Ok(Bridge {
            index,
            was_not_forwarding,
        })
    }

    /// Removes the bridge, if it is there and this daemon's.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn remove_bridge(
        &self,
        name: &str,
        subnet: Subnet,
        owner: &Path,
    ) -> Result<(), LinkError> {
        let mac = MacAddress::of(subnet.gateway());
        match self.find(name).await? {
            Some(found) if self.check_owner(name, &found, owner, mac).is_ok() => {
                self.delete(name, found.header.index).await
            }
            _ => Ok(()),
        }
    }

    /// The number of the interface of this name, if there is one.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn index_of(&self, name: &str) -> Result<Option<u32>, LinkError> {
        let found = self.find(name).await?;
        Ok(found.map(|link| link.header.index))
    }

    /// All interfaces, by name.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn ports(&self) -> Result<HashMap<String, Port>, LinkError> {
        let links: Vec<_> = self
            .handle
            .link()
            .get()
            .execute()
            .try_collect()
            .await
            .map_err(kernel("list the interfaces"))?;
        let port = |link: LinkMessage| {
            let mut name = None;
            let mut port = Port {
                index: link.header.index,
                controller: None,
                is_up: link.header.flags.contains(LinkFlags::Up),
            };
            for attribute in link.attributes {
                match attribute {
                    LinkAttribute::IfName(found) => name = Some(found),
                    LinkAttribute::Controller(found) => port.controller = Some(found),
                    _ => {}
                }
            }
            Some((name?, port))
        };
        Ok(links.into_iter().filter_map(port).collect())
    }

    /// Whether a link has the gateway's address and no other one of version 4.
    async fn has_address_alone(&self, index: u32, subnet: Subnet) -> Result<bool, LinkError> {
        let get = self.handle.address().get();
        let found: Vec<_> = get
            .set_link_index_filter(index)
            .execute()
            .try_collect()
            .await
            .map_err(kernel("list the addresses of the bridge"))?;
        let addresses: Vec<_> = found
            .iter()
            .filter(|found| found.header.index == index)
            .flat_map(|found| {
                let prefix = found.header.prefix_len;
                found.attributes.iter().filter_map(move |it| match it {
                    AddressAttribute::Address(IpAddr::V4(address)) => Some((*address, prefix)),
                    _ => None,
                })
            })
            .collect();
        Ok(addresses == [(subnet.gateway(), subnet.prefix())])
    }

    async fn delete(&self, name: &str, index: u32) -> Result<(), LinkError> {
        let delete = self.handle.link().del(index).execute().await;
        delete.map_err(kernel(format!("remove the bridge {name}")))
    }

    async fn find(&self, name: &str) -> Result<Option<LinkMessage>, LinkError> {
        let get = self.handle.link().get().match_name(name.to_owned());
        match get.execute().try_next().await {
            Ok(found) => Ok(found),
            Err(Error::NetlinkError(message))
                if message.to_io().raw_os_error() == Some(libc::ENODEV) =>
            {
                Ok(None)
            }
            Err(source) => Err(kernel(format!("look for the interface {name}"))(source)),
        }
    }

    /// The alias of this link, if it is a bridge that the daemon of this data directory has made, or
    /// has not got to give one.
    fn check_owner(
        &self,
        name: &str,
        link: &LinkMessage,
        owner: &Path,
        mac: MacAddress,
    ) -> Result<Option<String>, LinkError> {
        let (mut alias, mut has_mac) = (None, false);
        for attribute in &link.attributes {
            match attribute {
                LinkAttribute::IfAlias(found) => alias = Some(found.clone()),
                LinkAttribute::Address(found) => has_mac = found[..] == mac.0,
                _ => {}
            }
        }
        let ours = alias.as_deref().and_then(|alias| alias.strip_prefix(ALIAS));
        let directory = ours.map(|ours| ours.trim_end_matches(WAS_NOT_FORWARDING));
        match (&alias, directory) {
            (None, _) if has_mac => Ok(None),
            (_, Some(directory)) if Path::new(directory) == owner => Ok(alias),
            _ => Err(LinkError::NotOurs {
                name: name.to_owned(),
                owner: directory.map(str::to_owned),
            }),
        }
    }

    /// `ours` is a bridge of ours, whose address is no other's.
    async fn check_overlap(&self, subnet: Subnet, ours: Option<u32>) -> Result<(), LinkError> {
        let mut addresses = self.handle.address().get().execute();
        while let Some(found) = addresses.next().await {
            let found = found.map_err(kernel("list the addresses of this host"))?;
            if Some(found.header.index) == ours {
                continue;
            }
            for attribute in &found.attributes {
                let AddressAttribute::Address(IpAddr::V4(address)) = attribute else {
                    continue;
                };
                let prefix = u32::from(found.header.prefix_len.min(subnet.prefix()));
                let mask = u32::MAX.checked_shl(32 - prefix).unwrap_or(0);
                if address.to_bits() & mask == subnet.network().to_bits() & mask {
                    return Err(LinkError::Overlap {
                        subnet,
                        address: *address,
                    });
                }
            }
        }
        Ok(())
    }

    /// Makes a tap a port of the bridge that reaches nobody but the host: not the other ports, and no
    /// frame that is for one of them is flooded to it.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn add_port(&self, bridge: u32, tap: u32, mtu: u16) -> Result<(), LinkError> {
        let change = LinkUnspec::new_with_index(tap)
            .controller(bridge)
            .mtu(mtu.into())
            .build();
        let change = self.handle.link().change(change).execute().await;
        change.map_err(kernel("make a tap a port of the bridge"))?;
        let port = LinkBridgePort::new(tap)
            .isolated(true)
            .flood(false)
            .mcast_flood(false)
            .learning(false)
            .build();
        let set = self.handle.link().set_port(port).execute().await;
        set.map_err(kernel("isolate a port of the bridge"))?;
        // Only now: nothing has passed it before it was isolated.
        let up = LinkUnspec::new_with_index(tap).up().build();
        let up = self.handle.link().change(up).execute().await;
        up.map_err(kernel("bring a tap up"))
    }

    /// Says who is behind a tap, so that nobody has to ask or learn.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn bind(
        &self,
        bridge: u32,
        tap: u32,
        address: Ipv4Addr,
        mac: MacAddress,
    ) -> Result<(), LinkError> {
        let entry = self.handle.neighbours().add_bridge(tap, &mac.0);
        let entry = entry
            .state(NeighbourState::Noarp)
            .flags(NeighbourFlags::Controller)
            .replace()
            .execute()
            .await;
        entry.map_err(kernel(format!("lead frames for {mac} to its tap")))?;
        let neighbour = self.handle.neighbours().add(bridge, IpAddr::V4(address));
        let neighbour = neighbour
            .link_layer_address(&mac.0)
            .replace()
            .execute()
            .await;
        neighbour.map_err(kernel(format!("name {mac} as the neighbour {address}")))
    }
}
