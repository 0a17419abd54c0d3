//! Networks, and how a virtual machine is connected.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::ops::RangeInclusive;

use axum::Json;
use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::http::StatusCode;
use serde::Serialize;
use utoipa::ToSchema;

use super::at_vm::AtVm;
use super::error::{ApiError, ErrorBody};
use super::extract::{Path, Query};
use super::fields::Fields;
use super::vms::{find, name_of};
use crate::domain::{
    ForwardSpec, KeptForward, MAX_DESCRIPTION, MacAddress, Sandbox, Status, Transport,
};
use crate::http::Caller;

/// The networks of the host.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = NetworkList)]
pub struct NetworksBody {
    /// None if the host has no network for its machines. The first is for those that ask for none.
    pub networks: Vec<HostNetworkBody>,
}

/// A network of the host.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = HostNetwork)]
pub struct HostNetworkBody {
    /// Name of its bridge.
    pub name: String,
    /// `bridge`.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// Its addresses.
    pub subnet: String,
    /// The host's address in it.
    #[schema(format = Ipv4)]
    pub gateway: String,
    /// Whether guests that ask by DHCP get their address.
    pub dhcp_enabled: bool,
    /// How many machines that run have a card in it.
    pub vms_connected: usize,
}

/// How a machine is connected.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = VmNetwork)]
pub struct VmNetworkBody {
    /// Which.
    pub vm_name: String,
    /// Its address, if it has a network card.
    #[schema(format = Ipv4)]
    pub ip_address: Option<String>,
    /// Address of its card.
    pub mac_address: Option<String>,
    /// The bridge that it is in, if the host has a network now.
    pub bridge_name: Option<String>,
    /// The host's end of its card, if it runs.
    pub network_interface: Option<String>,
    /// `connected` if it runs and its card is in the bridge, else `disconnected`.
    pub connectivity_status: &'static str,
    /// Ports of the host that lead into it.
    pub port_forwards: Vec<PortForwardBody>,
}

/// A port of the host that leads into a machine.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = VmPortForward)]
pub struct PortForwardBody {
    /// Port of the host.
    pub host_port: u16,
    /// Port of the machine.
    pub guest_port: u16,
    /// `tcp` or `udp`.
    #[schema(value_type = String)]
    pub protocol: Transport,
    /// Address of the host.
    #[schema(value_type = String)]
    pub host_address: IpAddr,
    /// What was said of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub description: Option<String>,
}

impl From<KeptForward> for PortForwardBody {
    fn from(kept: KeptForward) -> Self {
        let KeptForward {
            forward,
            description,
        } = kept;
        Self {
            description,
            host_port: forward.host.port(),
            guest_port: forward.guest_port,
            protocol: forward.transport,
            host_address: forward.host.ip(),
        }
    }
}

/// The port that shall lead into a machine.
#[derive(ToSchema)]
#[schema(as = VmPortForwardRequest)]
#[allow(
    dead_code,
    reason = "only described by it: the fields are read one by one"
)]
pub struct PortForwardRequest {
    /// Port of the host; one that is free, from 10000 to 20000, if not given.
    #[schema(nullable = false, minimum = 1, maximum = 65535)]
    pub host_port: Option<i64>,
    /// Port of the machine.
    #[schema(required, nullable = false, minimum = 1, maximum = 65535)]
    pub guest_port: Option<i64>,
    /// `tcp` or `udp`.
    #[schema(default = "tcp", nullable = false)]
    pub protocol: Option<String>,
    /// What it is for: 256 characters at most, on one line.
    #[schema(nullable = false)]
    pub description: Option<String>,
    /// Address of the host; loopback if not given.
    #[schema(default = "127.0.0.1", nullable = false)]
    pub host_address: Option<String>,
}

/// A port leads into a machine.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = VmPortForwardOpened)]
pub struct ForwardedBody {
    /// A sentence.
    pub message: &'static str,
    /// Into which.
    pub vm_name: String,
    /// The port.
    #[serde(flatten)]
    pub forward: PortForwardBody,
}

/// List the networks of the host
#[utoipa::path(
    get, path = "/api/v1/networks", operation_id = "listNetworks", tag = "networks",
    responses((status = 200, description = "All of them", body = NetworksBody)),
)]
pub async fn networks(caller: Caller) -> Result<Json<NetworksBody>, ApiError> {
    let networks = caller.manager.host_networks().await;
    let networks = networks.map_err(|error| ApiError::internal(&error))?;
    let live = caller.manager.list().await?;
    let first = networks.first().map(|network| network.name.clone());
    let networks = networks.into_iter().map(|network| {
        let is_in = |vm: &&Sandbox| match &vm.spec.network {
            Some(connection) if vm.status == Status::Running => {
                connection.network.as_ref().or(first.as_ref()) == Some(&network.name)
            }
            _ => false,
        };
        HostNetworkBody {
            kind: "bridge",
            subnet: network.subnet.to_string(),
            gateway: network.subnet.gateway().to_string(),
            // The network does not come up without.
            dhcp_enabled: true,
            vms_connected: live.iter().filter(is_in).count(),
            name: network.name,
        }
    });
    Ok(Json(NetworksBody {
        networks: networks.collect(),
    }))
}

/// Get how a machine is connected
#[utoipa::path(
    get, path = "/api/v1/vms/{vm_name}/network", operation_id = "getVmNetwork", tag = "networks",
    params(("vm_name" = String, Path, description = "Its name or id")),
    responses(
        (status = 200, description = "How it is connected", body = VmNetworkBody),
        (status = 404, description = "No such machine", body = ErrorBody),
    ),
)]
pub async fn get(
    caller: Caller,
    Path(name): Path<String>,
) -> Result<Json<VmNetworkBody>, ApiError> {
    find(&caller.manager, &name).await?;
    let network = caller.manager.network(&name).await;
    let network = network.map_err(|error| error.at_vm(&name))?;
    let (vm, address) = (&network.sandbox, network.sandbox.address);
    let forwards = vm.forwards.iter().cloned();
    Ok(Json(VmNetworkBody {
        vm_name: name_of(vm),
        ip_address: address.map(|address| address.to_string()),
        mac_address: address.map(|address| MacAddress::of(address).to_string()),
        bridge_name: network
            .host
            .filter(|_| address.is_some())
            .map(|host| host.name),
        connectivity_status: match network.activity {
            Some(_) => "connected",
            None => "disconnected",
        },
        network_interface: network.activity.map(|activity| activity.interface),
        port_forwards: forwards.map(Into::into).collect(),
    }))
}

/// Let a port of the host lead into a machine
///
/// Until it is taken away or the machine is deleted, over stops and restarts, of the daemon too.
#[utoipa::path(
    post, path = "/api/v1/vms/{vm_name}/network/port-forward", operation_id = "forwardVmPort",
    tag = "networks",
    params(("vm_name" = String, Path, description = "Its name or id")),
    request_body = PortForwardRequest,
    responses(
        (status = 201, description = "It leads there", body = ForwardedBody),
        (status = 404, description = "No such machine", body = ErrorBody),
        (status = 409, description = "The port is in use, or the machine has no network card",
            body = ErrorBody),
        (status = 422, description = "Fields are wrong; all of them are named", body = ErrorBody),
    ),
)]
pub async fn open_forward(
    caller: Caller,
    Path(name): Path<String>,
    body: Result<Bytes, BytesRejection>,
) -> Result<(StatusCode, Json<ForwardedBody>), ApiError> {
    let (spec, description) = forward_spec(body)?;
    let vm = find(&caller.manager, &name).await?;
    let opened = caller.manager.open_forward(&name, spec, description).await;
    let forward = opened.map_err(|error| error.at_vm(&name))?;
    let body = ForwardedBody {
        message: "Port forward configured",
        vm_name: name_of(&vm),
        forward: forward.into(),
    };
    Ok((StatusCode::CREATED, Json(body)))
}

/// What is asked for, or all that is wrong with it.
fn forward_spec(
    body: Result<Bytes, BytesRejection>,
) -> Result<(ForwardSpec, Option<String>), ApiError> {
    const PORTS: RangeInclusive<i64> = 1..=65_535;
    let mut fields = Fields::parse(body)?;
    let port = |port: Option<i64>| port.and_then(|port| u16::try_from(port).ok());
    let host_port = port(fields.integer("host_port", PORTS));
    let guest_port = fields.required("guest_port", |fields, name| fields.integer(name, PORTS));
    let transport = match fields.string("protocol").as_deref() {
        None | Some("tcp") => Transport::Tcp,
        Some("udp") => Transport::Udp,
        Some(_) => {
            fields.wrong("protocol", "must be tcp or udp");
            Transport::Tcp
        }
    };
    let description = fields.string("description");
    let is_too_long = |text: &String| text.chars().count() > MAX_DESCRIPTION;
    if description.as_ref().is_some_and(is_too_long) {
        let problem = format!("must be {MAX_DESCRIPTION} characters at most");
        fields.wrong("description", problem);
    }
    let has_control = |text: &String| text.chars().any(char::is_control);
    if description.as_ref().is_some_and(has_control) {
        fields.wrong("description", "must have no control characters");
    }
    let host_address = fields.string("host_address");
    let host_address = match host_address.as_deref().map(str::parse::<IpAddr>) {
        Some(Ok(address)) => address,
        None => Ipv4Addr::LOCALHOST.into(),
        Some(Err(_)) => {
            fields.wrong("host_address", "must be an address of the host");
            Ipv4Addr::LOCALHOST.into()
        }
    };
    let spec = port(guest_port).map(|guest_port| ForwardSpec {
        transport,
        host_address,
        host_port,
        guest_port,
    });
    Ok((fields.finish(spec)?, description))
}

/// Take a port of the host away from a machine
///
/// Connections through it end.
#[utoipa::path(
    delete, path = "/api/v1/vms/{vm_name}/network/port-forward/{host_port}",
    operation_id = "removeVmPortForward", tag = "networks",
    params(
        ("vm_name" = String, Path, description = "Its name or id"),
        ("host_port" = u16, Path),
        ("protocol" = Option<String>, Query, description = "`tcp`, if not given, or `udp`"),
        ("host_address" = Option<String>, Query, description = "`127.0.0.1`, if not given"),
    ),
    responses(
        (status = 204, description = "It leads there no longer"),
        (status = 404, description = "No such machine or forward", body = ErrorBody),
    ),
)]
pub async fn close_forward(
    caller: Caller,
    Path((name, port)): Path<(String, String)>,
    Query(query): Query<HashMap<String, String>>,
) -> Result<StatusCode, ApiError> {
    let port: u16 = port
        .parse()
        .map_err(|_| ApiError::bad_parameter("host_port", "must be between 1 and 65535"))?;
    let transport = match query.get("protocol").map(String::as_str) {
        None | Some("tcp") => Transport::Tcp,
        Some("udp") => Transport::Udp,
        Some(_) => return Err(ApiError::bad_parameter("protocol", "must be tcp or udp")),
    };
    let address = match query.get("host_address") {
        None => Ipv4Addr::LOCALHOST.into(),
        Some(text) => text
            .parse()
            .map_err(|_| ApiError::bad_parameter("host_address", "must be an address"))?,
    };
    find(&caller.manager, &name).await?;
    let host = SocketAddr::new(address, port);
    let closed = caller.manager.close_forward(&name, transport, host).await;
    closed.map_err(|error| error.at_vm(&name))?;
    Ok(StatusCode::NO_CONTENT)
}
