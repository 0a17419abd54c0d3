//! What a host is told of a sandbox that starts, and what it tells.

use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

use super::super::id::SandboxId;
use super::super::layer::Layers;
use super::super::network::{AddressError, Connection, NetworkInfo};
use super::super::resources::Resources;
use super::super::timings::{Start, Timings};

/// What a host has to offer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostInfo {
    /// Names of the templates, sorted.
    pub templates: Vec<String>,
    /// RAM of the machine in MiB.
    pub memory_mb: u64,
    /// Whether the processor time of sandboxes can be limited.
    pub limits_cpu: bool,
    /// The networks of its sandboxes, of which the first is for those that ask for none in
    /// particular. Without any, they have no network card.
    pub networks: Vec<NetworkInfo>,
}

impl HostInfo {
    /// The network of this name, or the first.
    ///
    /// # Errors
    /// There is none.
    pub fn network(&self, name: Option<&str>) -> Result<&NetworkInfo, AddressError> {
        let first = self.networks.first().ok_or(AddressError::NoNetwork)?;
        let Some(name) = name else { return Ok(first) };
        let found = self.networks.iter().find(|network| network.name == name);
        found.ok_or_else(|| {
            let known = self.networks.iter().map(|network| network.name.as_str());
            AddressError::UnknownNetwork {
                name: name.to_owned(),
                known: known.collect::<Vec<_>>().join(", "),
            }
        })
    }
}

/// What a machine is made of.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Shape {
    /// Template of its root disk.
    pub template: String,
    /// Virtual CPUs.
    pub vcpus: u8,
    /// RAM in MiB.
    pub memory_mb: u32,
}

/// Who a guest is, and keeps being whenever it is resumed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Its host name.
    pub hostname: String,
    /// Its machine id, as in machine-id(5).
    pub machine_id: String,
}

/// Start this sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CreateRequest {
    /// Its name.
    pub id: SandboxId,
    /// What it is made of.
    pub shape: Shape,
    /// Who its guest is.
    pub identity: Identity,
    /// What it is started from; booted, if there are none.
    pub layers: Layers,
    /// What kind of start this is, for the timings.
    pub start: Start,
    /// Its network card; it has none, if there is none.
    pub nic: Option<Nic>,
    /// Size of a second disk, an empty ext4 file system, in MiB; `None` for no such disk.
    pub scratch_mb: Option<u32>,
    /// Size of its disk in MiB; `None` for that of the layers or the template.
    pub disk_mb: Option<u32>,
    /// How much of its machine it may use, and what that can become.
    pub resources: Resources,
}

/// Take this sandbox over, which an earlier daemon has started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AdoptRequest {
    /// Its name.
    pub id: SandboxId,
    /// What it is made of.
    pub shape: Shape,
    /// What it is based on, as far as is known.
    pub layers: Layers,
    /// Its network card, if it has one.
    pub nic: Option<Nic>,
    /// Size of its disk in MiB; `None` for that of its template.
    pub disk_mb: Option<u32>,
}

/// A sandbox was taken over, and runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Adopted {
    /// What it is based on: as in the request, or, if the earlier daemon ended after it had saved it
    /// and before that was told, after that.
    pub layers: Layers,
}

/// What a host has of a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Presence {
    /// It runs, and its agent has answered.
    Runs,
    /// It is starting, is ready but nobody's, or is ending.
    OnTheWay,
    /// Processes, files or rules are left of it, which nobody looks after.
    Left,
}

/// The network card of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nic {
    /// Its address; if there is none, nothing passes the card.
    pub address: Option<Ipv4Addr>,
    /// What it may reach and how much.
    pub connection: Connection,
}

/// Make a machine ready.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrepareRequest {
    /// Its name.
    pub id: SandboxId,
    /// What it is made of.
    pub shape: Shape,
    /// What it is started from: there are memory layers among them.
    pub layers: Layers,
    /// Its network card, if it has one; that of nobody until it is claimed.
    pub nic: Option<Nic>,
    /// Size of a second disk, an empty ext4 file system, in MiB; `None` for no such disk.
    pub scratch_mb: Option<u32>,
    /// Size of its disk in MiB; `None` for that of the layers or the template.
    pub disk_mb: Option<u32>,
    /// How much of its machine it may use, and what that can become.
    pub resources: Resources,
}

/// Start the sandbox that was prepared under this name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClaimRequest {
    /// Its name.
    pub id: SandboxId,
    /// Who its guest is.
    pub identity: Identity,
    /// What its network card is, if it has one.
    pub nic: Option<Nic>,
}

/// What is to be said of an image's digest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImageDigest {
    /// Nothing.
    Unasked,
    /// What is written beside the image, if it is.
    IfKnown,
    /// If need be, it is computed, which may take seconds.
    Computed,
}

/// What there is to say of an image on the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageInfo {
    /// SHA-256 of the file, as hexadecimal digits.
    pub digest: Option<String>,
    /// Space that it takes on the host's disk, in bytes.
    pub size_bytes: u64,
    /// Its size, in bytes.
    pub disk_bytes: u64,
    /// Its last modification, in microseconds since the Unix epoch.
    pub modified_us: i64,
}

/// A sandbox was started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Created {
    /// How long it took.
    pub timings: Timings,
}
