//! The network of a sandbox: an extension of this dialect.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use axum::Json;
use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::error::{ApiError, parse};
use super::extract::Path;
use super::sandboxes::rfc3339;
use crate::domain::{
    AllowRule, Connection, Counter, Denied, DeniedWhat, Destination, Egress, Forward, ForwardSpec,
    MacAddress, NetworkSpec, RateLimits, SandboxNetwork, Traffic, Transport,
};
use crate::http::{Caller, ErrorBody};

/// How a sandbox shall be connected. What is missing or null has its default.
#[derive(Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct NetworkRequest {
    /// The name of the network; the host's first, if it is not given.
    #[schema(nullable = false)]
    pub name: Option<String>,
    /// Its address; one that is free, if it is not given.
    #[schema(nullable = false, value_type = Option<String>, format = Ipv4)]
    pub address: Option<Ipv4Addr>,
    /// What it may reach; as the daemon's settings say, if it is not given.
    #[schema(nullable = false)]
    pub egress: Option<EgressBody>,
    /// How much it may send and receive; without limit, if it is not given.
    #[schema(nullable = false)]
    pub rate_limits: Option<RateLimitsBody>,
}

impl NetworkRequest {
    /// The same for the domain.
    pub fn spec(self) -> Result<NetworkSpec, ApiError> {
        Ok(NetworkSpec {
            name: self.name,
            address: self.address,
            egress: self.egress.map(EgressBody::egress).transpose()?,
            rate_limits: self.rate_limits.unwrap_or_default().limits(),
        })
    }
}

/// What a sandbox may reach beyond this host.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[schema(as = Egress)]
#[serde(deny_unknown_fields)]
pub struct EgressBody {
    /// Nothing, everything but private and link-local addresses, or what `allow` says.
    #[schema(inline)]
    pub policy: PolicyBody,
    /// With the policy `allow`: what is allowed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub allow: Option<Vec<AllowRuleBody>>,
}

/// A kind of policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum PolicyBody {
    /// Nothing.
    None,
    /// Everything but private and link-local addresses.
    All,
    /// What the list says.
    Allow,
}

/// One entry of an allow list: either `cidr` or `domain`, or neither for everything but private and
/// link-local addresses.
#[derive(Debug, Default, Serialize, Deserialize, ToSchema)]
#[schema(as = AllowRule)]
#[serde(default, deny_unknown_fields)]
pub struct AllowRuleBody {
    /// An IPv4 address or network, private ones included.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false, example = "203.0.113.0/24")]
    pub cidr: Option<String>,
    /// A name, or `*.` and a name for all names below it: its addresses, as long as DNS has said
    /// that they stay.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false, example = "*.example.com")]
    pub domain: Option<String>,
    /// `tcp` or `udp`; any, if it is not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false, value_type = Option<String>)]
    pub protocol: Option<Transport>,
    /// Ports, each a number or a range as `8000-8100`; all, if there are none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schema(value_type = Vec<String>)]
    pub ports: Vec<PortBody>,
}

/// A port or ports.
#[derive(Debug, Serialize, Deserialize)]
#[serde(untagged)]
pub enum PortBody {
    /// One.
    Number(u16),
    /// One, or a range.
    Text(String),
}

impl EgressBody {
    /// The same for the domain.
    pub fn egress(self) -> Result<Egress, ApiError> {
        match (self.policy, self.allow) {
            (PolicyBody::None, None) => Ok(Egress::None),
            (PolicyBody::All, None) => Ok(Egress::All),
            (PolicyBody::Allow, Some(rules)) => {
                let rules = rules.into_iter().map(AllowRuleBody::rule);
                Ok(Egress::Allow(rules.collect::<Result<_, _>>()?))
            }
            (PolicyBody::Allow, None) => Err(ApiError::invalid(
                "egress.allow is required with the policy allow; it may be empty",
            )),
            (PolicyBody::None | PolicyBody::All, Some(_)) => Err(ApiError::invalid(
                "egress.allow has a meaning with the policy allow only",
            )),
        }
    }
}

impl AllowRuleBody {
    fn rule(self) -> Result<AllowRule, ApiError> {
        let invalid = |error: crate::domain::EgressError| ApiError::invalid(error.to_string());
        let to = match (self.cidr, self.domain) {
            (Some(cidr), None) => Destination::Cidr(cidr.parse().map_err(invalid)?),
            (None, Some(domain)) => Destination::Domain(domain.parse().map_err(invalid)?),
            (None, None) => Destination::Anywhere,
            (Some(_), Some(_)) => {
                return Err(ApiError::invalid(
                    "a rule of egress.allow has both cidr and domain; make two of it",
                ));
            }
        };
        let ports = self.ports.into_iter().map(|port| {
            let text = match port {
                PortBody::Number(port) => port.to_string(),
                PortBody::Text(text) => text,
            };
            text.parse().map_err(invalid)
        });
        Ok(AllowRule {
            to,
            transport: self.protocol,
            ports: ports.collect::<Result<_, _>>()?,
        })
    }
}

impl From<Egress> for EgressBody {
    fn from(egress: Egress) -> Self {
        let (policy, allow) = match egress {
            Egress::None => (PolicyBody::None, None),
            Egress::All => (PolicyBody::All, None),
            Egress::Allow(rules) => (
                PolicyBody::Allow,
                Some(rules.into_iter().map(Into::into).collect()),
            ),
        };
        Self { policy, allow }
    }
}

impl From<AllowRule> for AllowRuleBody {
    fn from(rule: AllowRule) -> Self {
        let (cidr, domain) = match rule.to {
            Destination::Anywhere => (None, None),
            Destination::Cidr(cidr) => (Some(cidr.to_string()), None),
            Destination::Domain(domain) => (None, Some(domain.to_string())),
        };
        let ports = rule.ports.iter();
        Self {
            cidr,
            domain,
            protocol: rule.transport,
            ports: ports.map(|port| PortBody::Text(port.to_string())).collect(),
        }
    }
}

/// What a sandbox may send in a second, and as much again what it may receive. It counts from the
/// next start of the sandbox's machine, and a clone inherits it.
#[derive(Debug, Default, Serialize, Deserialize, ToSchema)]
#[schema(as = RateLimits)]
#[serde(default, deny_unknown_fields)]
pub struct RateLimitsBody {
    /// Bytes, at least 131072.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub bytes_per_sec: Option<u64>,
    /// Frames, which may have 64 KiB before the host cuts them up.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub packets_per_sec: Option<u64>,
}

impl RateLimitsBody {
    fn limits(self) -> RateLimits {
        RateLimits {
            bytes_per_sec: self.bytes_per_sec,
            packets_per_sec: self.packets_per_sec,
        }
    }
}

impl From<RateLimits> for RateLimitsBody {
    fn from(limits: RateLimits) -> Self {
        Self {
            bytes_per_sec: limits.bytes_per_sec,
            packets_per_sec: limits.packets_per_sec,
        }
    }
}

/// How a sandbox is connected.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Network)]
pub struct NetworkBody {
    /// Whether it has a network card. Nothing else is here if not.
    pub connected: bool,
    /// The name of the network that it is in, if that is there now.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub name: Option<String>,
    /// Its address.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false, value_type = Option<String>, format = Ipv4)]
    pub address: Option<Ipv4Addr>,
    /// Its card's address.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub mac: Option<String>,
    /// The addresses of that network, as `192.168.200.0/24`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub subnet: Option<String>,
    /// Its gateway and resolver.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false, value_type = Option<String>, format = Ipv4)]
    pub gateway: Option<Ipv4Addr>,
    /// What it may reach.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub egress: Option<EgressBody>,
    /// How much it may send and receive.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub rate_limits: Option<RateLimitsBody>,
    /// Ports of the host that lead into it.
    pub forwards: Vec<ForwardBody>,
    /// What it has sent and received since its machine was started, if that runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub traffic: Option<TrafficBody>,
    /// The last things that it was not allowed to do, oldest first; at most 100, and of many at once
    /// only some. `traffic` counts all.
    pub denied: Vec<DeniedBody>,
}

impl From<SandboxNetwork> for NetworkBody {
    fn from(network: SandboxNetwork) -> Self {
        let sandbox = network.sandbox;
        let Connection {
            network: _,
            egress,
            rate_limits,
        } = match sandbox.spec.network {
            Some(connection) => connection,
            None => {
                return Self {
                    connected: false,
                    name: None,
                    address: None,
                    mac: None,
                    subnet: None,
                    gateway: None,
                    egress: None,
                    rate_limits: None,
                    forwards: Vec::new(),
                    traffic: None,
                    denied: Vec::new(),
                };
            }
        };
        let (name, subnet) = network.host.map(|host| (host.name, host.subnet)).unzip();
        let forwards = sandbox.forwards.into_iter().map(|kept| kept.forward);
        let (traffic, denied) = network
            .activity
            .map(|activity| (activity.traffic, activity.denied))
            .unzip();
        Self {
            connected: true,
            name,
            address: sandbox.address,
            mac: sandbox
                .address
                .map(|address| MacAddress::of(address).to_string()),
            subnet: subnet.map(|subnet| subnet.to_string()),
            gateway: subnet.map(crate::domain::Subnet::gateway),
            egress: Some(egress.into()),
            rate_limits: Some(rate_limits.into()),
            forwards: forwards.map(Into::into).collect(),
            traffic: traffic.map(Into::into),
            denied: denied
                .unwrap_or_default()
                .into_iter()
                .map(Into::into)
                .collect(),
        }
    }
}

/// What a sandbox has sent and received.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Traffic)]
pub struct TrafficBody {
    /// Packets from it to hosts beyond this one.
    pub sent: CounterBody,
    /// Packets from there to it.
    pub received: CounterBody,
    /// Packets that it was not allowed to send.
    pub denied: CounterBody,
    /// Names that it was not allowed to look up.
    pub denied_names: u64,
}

impl From<Traffic> for TrafficBody {
    fn from(traffic: Traffic) -> Self {
        Self {
            sent: traffic.sent.into(),
            received: traffic.received.into(),
            denied: traffic.denied.into(),
            denied_names: traffic.denied_names,
        }
    }
}

/// Packets.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Counter)]
pub struct CounterBody {
    /// How many.
    pub packets: u64,
    /// How large they were, all together.
    pub bytes: u64,
}

impl From<Counter> for CounterBody {
    fn from(counter: Counter) -> Self {
        Self {
            packets: counter.packets,
            bytes: counter.bytes,
        }
    }
}

/// Something that a sandbox was not allowed to do: send a packet, or look up a name.
#[derive(Debug, Default, Serialize, ToSchema)]
#[schema(as = Denied)]
pub struct DeniedBody {
    /// When.
    #[schema(format = DateTime)]
    pub at: String,
    /// Of a packet: `tcp`, `udp`, `icmp`, or the number of another protocol.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub protocol: Option<String>,
    /// Of a packet: where to.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false, value_type = Option<String>, format = Ipv4)]
    pub address: Option<Ipv4Addr>,
    /// Of a packet: to which port, if the protocol has ports.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub port: Option<u16>,
    /// The name.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub name: Option<String>,
}

impl From<Denied> for DeniedBody {
    fn from(denied: Denied) -> Self {
        let at = rfc3339(denied.at);
        match denied.what {
            DeniedWhat::Packet {
                protocol,
                address,
                port,
            } => Self {
                at,
                protocol: Some(protocol),
                address: Some(address),
                port,
                name: None,
            },
            DeniedWhat::Name { name } => Self {
                at,
                name: Some(name),
                ..Self::default()
            },
        }
    }
}

/// A port of the host that shall lead into a sandbox.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ForwardRequest {
    /// `tcp` or `udp`.
    #[serde(default = "tcp")]
    #[schema(value_type = String, default = "tcp")]
    pub protocol: Transport,
    /// Address of the host, IPv4 or IPv6; loopback, if it is not given.
    #[serde(default = "loopback")]
    #[schema(value_type = String, default = "127.0.0.1")]
    pub host_address: IpAddr,
    /// Port of the host; one that is free, from 10000 to 20000, if it is not given.
    #[serde(default)]
    #[schema(nullable = false, minimum = 1)]
    pub host_port: Option<u16>,
    /// Port in the sandbox.
    #[schema(minimum = 1)]
    pub guest_port: u16,
}

fn tcp() -> Transport {
    Transport::Tcp
}

fn loopback() -> IpAddr {
    Ipv4Addr::LOCALHOST.into()
}

/// A port of the host that leads into a sandbox.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Forward)]
pub struct ForwardBody {
    /// `tcp` or `udp`.
    #[schema(value_type = String)]
    pub protocol: Transport,
    /// Address of the host.
    #[schema(value_type = String)]
    pub host_address: IpAddr,
    /// Port of the host.
    pub host_port: u16,
    /// Port in the sandbox.
    pub guest_port: u16,
}

impl From<Forward> for ForwardBody {
    fn from(forward: Forward) -> Self {
        Self {
            protocol: forward.transport,
            host_address: forward.host.ip(),
            host_port: forward.host.port(),
            guest_port: forward.guest_port,
        }
    }
}

/// Get the network of a sandbox
#[utoipa::path(
    get, path = "/v1/sandboxes/{id}/network", operation_id = "getSandboxNetwork", tag = "network",
    params(("id" = String, Path)),
    responses(
        (status = 200, description = "How it is connected, and what it does", body = NetworkBody),
        (status = 404, description = "Sandbox not found", body = ErrorBody),
    ),
)]
pub async fn get(caller: Caller, Path(id): Path<String>) -> Result<Json<NetworkBody>, ApiError> {
    Ok(Json(caller.manager.network(&id).await?.into()))
}

/// Change what a sandbox may reach
///
/// It counts at once, for connections that it has as well; for one that is paused, from its resume.
#[utoipa::path(
    put, path = "/v1/sandboxes/{id}/network/egress", operation_id = "setSandboxEgress",
    tag = "network",
    params(("id" = String, Path)),
    request_body = EgressBody,
    responses(
        (status = 200, description = "It counts", body = EgressBody),
        (status = 400, description = "The request makes no sense", body = ErrorBody),
        (status = 404, description = "Sandbox not found", body = ErrorBody),
        (status = 409, description = "Neither running nor paused, or without network card",
            body = ErrorBody),
    ),
)]
pub async fn set_egress(
    caller: Caller,
    Path(id): Path<String>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<EgressBody>, ApiError> {
    let egress = parse::<EgressBody>(body)?.egress()?;
    caller.manager.set_egress(&id, egress.clone()).await?;
    Ok(Json(egress.into()))
}

/// Let a port of the host lead into a sandbox
///
/// It does so until it is taken away or the sandbox ends; while the sandbox is paused, connections
/// are refused. It outlives the daemon as the sandbox does.
#[utoipa::path(
    post, path = "/v1/sandboxes/{id}/network/forwards", operation_id = "forwardPort",
    tag = "network",
    params(("id" = String, Path)),
    request_body = ForwardRequest,
    responses(
        (status = 201, description = "It leads there", body = ForwardBody),
        (status = 400, description = "The request makes no sense", body = ErrorBody),
        (status = 404, description = "Sandbox not found", body = ErrorBody),
        (status = 409, description = "The port is in use, or the sandbox is neither running nor \
            paused, or without network card", body = ErrorBody),
    ),
)]
pub async fn open_forward(
    caller: Caller,
    Path(id): Path<String>,
    body: Result<Bytes, BytesRejection>,
) -> Result<(StatusCode, Json<ForwardBody>), ApiError> {
    let request: ForwardRequest = parse(body)?;
    if request.host_port == Some(0) || request.guest_port == 0 {
        return Err(ApiError::invalid("a port must be 1 to 65535"));
    }
    let spec = ForwardSpec {
        transport: request.protocol,
        host_address: request.host_address,
        host_port: request.host_port,
        guest_port: request.guest_port,
    };
    let forward = caller.manager.open_forward(&id, spec, None).await?.forward;
    Ok((StatusCode::CREATED, Json(forward.into())))
}

/// Take a port of the host away from a sandbox
///
/// Connections through it end.
#[utoipa::path(
    delete, path = "/v1/sandboxes/{id}/network/forwards/{transport}/{host}",
    operation_id = "removePortForward", tag = "network",
    params(
        ("id" = String, Path),
        ("transport" = String, Path, description = "`tcp` or `udp`"),
        ("host" = String, Path, description = "Address and port, as `127.0.0.1:10080`"),
    ),
    responses(
        (status = 204, description = "It leads there no longer"),
        (status = 404, description = "No such sandbox or forward", body = ErrorBody),
    ),
)]
pub async fn close_forward(
    caller: Caller,
    Path((id, transport, host)): Path<(String, String, String)>,
) -> Result<StatusCode, ApiError> {
    let transport = match transport.as_str() {
        "tcp" => Transport::Tcp,
        "udp" => Transport::Udp,
        _ => return Err(ApiError::invalid("the protocol must be tcp or udp")),
    };
    let host: SocketAddr = host.parse().map_err(|_| {
        ApiError::invalid("expected an address and a port, as 127.0.0.1:10080 or [::1]:10080")
    })?;
    caller.manager.close_forward(&id, transport, host).await?;
    Ok(StatusCode::NO_CONTENT)
}
