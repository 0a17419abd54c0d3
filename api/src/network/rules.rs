//! The packet filter's rules, as text for nft(8).
//!
//! There are two tables, both named after the bridge, since a table filters on one layer only. The
//! one of the bridge lets frames of a tap pass only with the MAC and IP addresses of its sandbox.
//! What the other one sees of a sandbox's address is therefore the sandbox's:
//!
//! ```text
//! from a sandbox ─► to this host ─► input:   DNS, DHCP, ping, answers; else refused
//!                └► elsewhere ────► forward: to the bridge: dropped
//!                                   mark is current: passes
//!                                   else the sandbox's chain `…_out`: sets the mark, or refuses
//! to a sandbox ──► answers only:    mark is current: passes; else its chain `…_in`
//! ```
//!
//! The connection's mark names the sandbox in its upper half and the version of its egress policy in
//! its lower half. So a connection is looked at once; and when the policy changes, each is looked at
//! again, by its next packet in either direction. `…_in` is `…_out` mirrored, for an answer that
//! comes first. It takes no connection of an earlier sandbox with the same address.
//!
//! Everything in here is made of checked values: addresses, numbers, ids and names of interfaces.

use std::fmt::{self, Write as _};
use std::net::Ipv4Addr;

use crate::domain::{
    AllowRule, Counter, Destination, Egress, MacAddress, PortRange, SandboxId, Subnet, Transport,
};

/// Addresses that are not the Internet's, or not one host's (IANA's registry of special addresses);
/// without those for documentation, which lead nowhere.
pub const PRIVATE: [&str; 11] = [
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.88.99.0/24",
    "192.168.0.0/16",
    "198.18.0.0/15",
    "224.0.0.0/3",
];

/// Whether an address is one of [`PRIVATE`].
pub fn is_private(address: Ipv4Addr) -> bool {
    PRIVATE.iter().any(|text| {
        let (network, prefix) = text.split_once('/').unwrap_or((text, "32"));
        let (Ok(network), Ok(prefix)) = (network.parse::<Ipv4Addr>(), prefix.parse::<u32>()) else {
            return true;
        };
        let shift = 32 - prefix;
        address.to_bits() >> shift == network.to_bits() >> shift
    })
}

/// The tables of a bridge.
#[derive(Debug, Clone)]
pub struct Tables {
    /// The bridge's name.
    pub bridge: String,
    /// Its addresses.
    pub subnet: Subnet,
    /// The bridges of other networks of this daemon, whose tables say what passes them.
    pub siblings: Vec<String>,
    /// Whether the host forwarded no packets before, and so shall forward no others.
    pub only_ours: bool,
    /// The group of nflog that denied packets are told to.
    pub log_group: u16,
}

/// What the tables have of one sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// The sandbox.
    pub id: SandboxId,
    /// Its tap's name.
    pub tap: String,
    /// Its address.
    pub address: Ipv4Addr,
    /// What it may reach.
    pub egress: Egress,
    /// Names it and the version of its policy.
    pub mark: Mark,
}

/// What is counted of each sandbox.
pub const COUNTERS: [&str; 3] = ["sent", "received", "denied"];

/// What was counted of a sandbox before it is added, in the order of [`COUNTERS`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters(pub [Counter; COUNTERS.len()]);

/// The mark of connections that a sandbox has opened under one version of its policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mark(u32);

const OWNER: u32 = 0xffff_0000;

impl Mark {
    /// For the sandbox that this number stands for, and a policy with any number.
    pub fn new(owner: u16, version: u16) -> Self {
        // A mark of 0 is that of connections without one.
        Self(u32::from(owner.max(1)) << 16 | u32::from(version))
    }

    /// For the next version of the policy.
    pub fn next(self) -> Self {
        Self(self.0 & OWNER | self.0.wrapping_add(1) & !OWNER)
    }

    fn owner(self) -> u32 {
        self.0 & OWNER
    }
}

impl fmt::Display for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#010x}", self.0)
    }
}

/// Which way packets go.
#[derive(Clone, Copy)]
enum Way {
    Out,
    In,
}

impl Tables {
    /// The name of both tables.
    pub fn name(&self) -> String {
        format!("sandboxd_{}", self.bridge.replace('-', "_"))
    }

    /// What names of taps look like to nft.
    fn taps(&self) -> String {
        format!("\"{}-*\"", self.bridge)
    }

    /// Removes both tables, if they are there.
    pub fn remove(&self) -> String {
        let name = self.name();
        // That they are made first is how they can be removed in any case.
        format!(
            "add table bridge {name}\ndelete table bridge {name}\n\
             add table inet {name}\ndelete table inet {name}\n"
        )
    }

    /// Replaces both tables with ones that have no sandbox.
    pub fn replace(&self) -> String {
        let (name, bridge, taps) = (self.name(), &self.bridge, self.taps());
        let (gateway, subnet) = (self.subnet.gateway(), self.subnet);
        let private = PRIVATE.join(", ");
        let others = if self.only_ours { "drop" } else { "accept" };
        let siblings: String = self
            .siblings
            .iter()
            .map(|sibling| {
                format!(
                    "iifname \"{sibling}\" accept\n        oifname \"{sibling}\" accept\n        "
                )
            })
            .collect();
        format!(
            r#"{remove}table bridge {name} {{
    set sources {{ type ifname . ether_addr . ipv4_addr; }}
    set cards {{ type ifname . ether_addr; }}
    counter spoofed {{ }}
    chain prerouting {{
        type filter hook prerouting priority -300; policy accept;
        iifname != {taps} accept
        ether type ip6 drop
        ether type ip iifname . ether saddr . ip saddr @sources accept
        ether type arp arp htype 1 arp ptype ip arp hlen 6 arp plen 4 iifname . ether saddr @cards iifname . arp saddr ether . arp saddr ip @sources accept
        ether type ip ip saddr 0.0.0.0 ip daddr 255.255.255.255 udp sport 68 udp dport 67 iifname . ether saddr @cards accept
        counter name spoofed drop
    }}
}}
table inet {name} {{
    set private {{ type ipv4_addr; flags interval; elements = {{ {private} }} }}
    set current {{ type ipv4_addr . mark; }}
    map out {{ type ipv4_addr : verdict; }}
    map in {{ type ipv4_addr : verdict; }}
    map sent {{ type ipv4_addr : counter; }}
    map received {{ type ipv4_addr : counter; }}
    chain refuse {{
        meta l4proto tcp reject with tcp reset
        reject with icmpx admin-prohibited
    }}
    chain input {{
        type filter hook input priority 0; policy accept;
        iifname != "{bridge}" accept
        ct state established,related ct direction reply accept
        ip daddr {gateway} meta l4proto {{ tcp, udp }} th dport 53 accept
        ip daddr {{ {gateway}, 255.255.255.255 }} udp sport 68 udp dport 67 accept
        ip daddr {gateway} icmp type echo-request accept
        goto refuse
    }}
    chain forward {{
        type filter hook forward priority 0; policy accept;
        iifname "{bridge}" oifname "{bridge}" drop
        iifname "{bridge}" goto from_sandbox
        oifname "{bridge}" goto to_sandbox
        {siblings}{others}
    }}
    chain from_sandbox {{
        ct state invalid drop
        ct direction reply drop
        ct state established,related ip saddr . ct mark @current counter name ip saddr map @sent accept
        ip saddr vmap @out
        drop
    }}
    chain to_sandbox {{
        ct direction original drop
        ct state established,related ip daddr . ct mark @current counter name ip daddr map @received accept
        ct state established,related ip daddr vmap @in
        drop
    }}
    chain postrouting {{
        type nat hook postrouting priority 100; policy accept;
        ip saddr {subnet} oifname != "{bridge}" masquerade
    }}
}}
"#,
            remove = self.remove(),
        )
    }

    /// Adds a sandbox.
    pub fn attach(&self, member: &Member, counters: Counters) -> String {
        let (table, own) = (self.name(), member.prefix());
        let Member { tap, address, .. } = member;
        let mac = MacAddress::of(*address);
        let mut script = String::new();
        for (name, Counter { packets, bytes }) in COUNTERS.into_iter().zip(counters.0) {
            line(
                &mut script,
                format_args!(
                    "add counter inet {table} {own}_{name} {{ packets {packets} bytes {bytes} ; }}"
                ),
            );
        }
        for chain in ["denied", "out", "in"] {
            line(
                &mut script,
                format_args!("add chain inet {table} {own}_{chain}"),
            );
        }
        let (id, group) = (&member.id, self.log_group);
        for rule in [
            format!("counter name {own}_denied"),
            format!(
                "limit rate 10/second burst 20 packets log prefix \"{id}\" group {group} snaplen 64"
            ),
            "goto refuse".to_owned(),
        ] {
            line(
                &mut script,
                format_args!("add rule inet {table} {own}_denied {rule}"),
            );
        }
        for map in ["sent", "received"] {
            line(
                &mut script,
                format_args!("add element inet {table} {map} {{ {address} : \"{own}_{map}\" }}"),
            );
        }
        self.fill(&mut script, member);
        for map in ["out", "in"] {
            line(
                &mut script,
                format_args!("add element inet {table} {map} {{ {address} : goto {own}_{map} }}"),
            );
        }
        line(
            &mut script,
            format_args!("add element bridge {table} sources {{ \"{tap}\" . {mac} . {address} }}"),
        );
        line(
            &mut script,
            format_args!("add element bridge {table} cards {{ \"{tap}\" . {mac} }}"),
        );
        script
    }

    /// Removes a sandbox.
    pub fn detach(&self, member: &Member) -> String {
        let (table, own) = (self.name(), member.prefix());
        let Member { tap, address, .. } = member;
        let mac = MacAddress::of(*address);
        let mut script = String::new();
        line(
            &mut script,
            format_args!(
                "delete element bridge {table} sources {{ \"{tap}\" . {mac} . {address} }}"
            ),
        );
        line(
            &mut script,
            format_args!("delete element bridge {table} cards {{ \"{tap}\" . {mac} }}"),
        );
        for map in ["out", "in", "sent", "received"] {
            line(
                &mut script,
                format_args!("delete element inet {table} {map} {{ {address} }}"),
            );
        }
        self.empty(&mut script, member);
        for chain in ["out", "in", "denied"] {
            line(
                &mut script,
                format_args!("flush chain inet {table} {own}_{chain}"),
            );
        }
        for chain in ["out", "in", "denied"] {
            line(
                &mut script,
                format_args!("delete chain inet {table} {own}_{chain}"),
            );
        }
        for counter in COUNTERS {
            line(
                &mut script,
                format_args!("delete counter inet {table} {own}_{counter}"),
            );
        }
        script
    }

    /// Replaces the policy of a sandbox.
    pub fn change(&self, before: &Member, after: &Member) -> String {
        let mut script = String::new();
        self.empty(&mut script, before);
        self.fill(&mut script, after);
        script
    }

    /// The name of the set that has the addresses of the domain of a rule.
    fn set(member: &Member, rule: usize) -> String {
        format!("{}_{:04x}_{rule}", member.prefix(), member.mark.0 & !OWNER)
    }

    /// Adds addresses, with how many seconds they stay, that a domain's name was found to have; or
    /// lets them stay for longer.
    pub fn resolved(
        &self,
        member: &Member,
        rules: &[usize],
        addresses: &[(Ipv4Addr, u32)],
    ) -> String {
        let table = self.name();
        let mut script = String::new();
        for rule in rules {
            let set = Self::set(member, *rule);
            for (address, seconds) in addresses {
                // An element that is there keeps its time, so it has to go first; and to be there to
                // go.
                for action in ["add", "delete", "add"] {
                    line(
                        &mut script,
                        format_args!(
                            "{action} element inet {table} {set} {{ {address} timeout {seconds}s }}"
                        ),
                    );
                }
            }
        }
        script
    }

    /// The policy of a sandbox whose chains are empty.
    fn fill(&self, script: &mut String, member: &Member) {
        let (table, own) = (self.name(), member.prefix());
        let Member { address, mark, .. } = member;
        let owner = mark.owner();
        line(
            script,
            format_args!(
                "add rule inet {table} {own}_in ct mark and {OWNER:#010x} != {owner:#010x} drop"
            ),
        );
        let anywhere = [AllowRule {
            to: Destination::Anywhere,
            transport: None,
            ports: Vec::new(),
        }];
        let rules = match &member.egress {
            Egress::None => &[],
            Egress::All => &anywhere[..],
            Egress::Allow(rules) => rules,
        };
        for (index, rule) in rules.iter().enumerate() {
            let set = Self::set(member, index);
            if matches!(rule.to, Destination::Domain(_)) {
                line(
                    script,
                    format_args!("add set inet {table} {set} {{ type ipv4_addr; flags timeout; }}"),
                );
            }
            for (chain, way, map, end) in [
                ("out", Way::Out, "sent", "saddr"),
                ("in", Way::In, "received", "daddr"),
            ] {
                let matches = matcher(rule, &set, way);
                line(
                    script,
                    format_args!(
                        "add rule inet {table} {own}_{chain} {matches} ct mark set {mark} \
                         counter name ip {end} map @{map} accept"
                    ),
                );
            }
        }
        line(
            script,
            format_args!("add rule inet {table} {own}_out goto {own}_denied"),
        );
        line(
            script,
            format_args!("add element inet {table} current {{ {address} . {mark} }}"),
        );
    }

    /// Takes the policy of a sandbox away.
    fn empty(&self, script: &mut String, member: &Member) {
        let (table, own) = (self.name(), member.prefix());
        let Member { address, mark, .. } = member;
        for chain in ["out", "in"] {
            line(
                script,
                format_args!("flush chain inet {table} {own}_{chain}"),
            );
        }
        line(
            script,
            format_args!("delete element inet {table} current {{ {address} . {mark} }}"),
        );
        if let Egress::Allow(rules) = &member.egress {
            for (index, rule) in rules.iter().enumerate() {
                if matches!(rule.to, Destination::Domain(_)) {
                    let set = Self::set(member, index);
                    line(script, format_args!("delete set inet {table} {set}"));
                }
            }
        }
    }
}

impl Member {
    /// What the names of its chains, sets and counters begin with.
    pub fn prefix(&self) -> String {
        prefix(&self.id)
    }
}

/// What the names of the chains, sets and counters of a sandbox begin with.
pub fn prefix(id: &SandboxId) -> String {
    id.as_str().replace('-', "_")
}

/// Adds a line.
fn line(script: &mut String, text: fmt::Arguments<'_>) {
    let _ = writeln!(script, "{text}");
}

/// What a rule matches, of packets that go this way.
fn matcher(rule: &AllowRule, set: &str, way: Way) -> String {
    let (address, port) = match way {
        Way::Out => ("ip daddr", "dport"),
        Way::In => ("ip saddr", "sport"),
    };
    let mut text = match &rule.to {
        Destination::Anywhere => format!("{address} != @private"),
        Destination::Cidr(cidr) if cidr.prefix() == 0 => "meta nfproto ipv4".to_owned(),
        Destination::Cidr(cidr) => format!("{address} {cidr}"),
        Destination::Domain(_) => format!("{address} @{set}"),
    };
    if rule.ports.is_empty() {
        if let Some(transport) = rule.transport {
            let _ = write!(text, " meta l4proto {transport}");
        }
        return text;
    }
    let ports: Vec<_> = PortRange::merge(&rule.ports)
        .iter()
        .map(ToString::to_string)
        .collect();
    let protocols = match rule.transport {
        Some(transport) => transport.as_str().to_owned(),
        None => format!("{{ {}, {} }}", Transport::Tcp, Transport::Udp),
    };
    let _ = write!(
        text,
        " meta l4proto {protocols} th {port} {{ {} }}",
        ports.join(", ")
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_keep_their_owner() {
        let mark = Mark::new(0x12, 0xfffe);
        assert_eq!(mark.to_string(), "0x0012fffe");
        assert_eq!(mark.next().to_string(), "0x0012ffff");
        assert_eq!(mark.next().next().to_string(), "0x00120000");
        assert_ne!(Mark::new(0, 0), Mark(0));
    }

    #[test]
    fn private_addresses_are_told_from_others() {
        for (address, private) in [
            ("10.1.2.3", true),
            ("169.254.169.254", true),
            ("172.31.255.255", true),
            ("172.32.0.0", false),
            ("192.168.200.1", true),
            ("100.127.0.1", true),
            ("100.128.0.1", false),
            ("0.0.0.0", true),
            ("224.0.0.1", true),
            ("255.255.255.255", true),
            ("203.0.113.9", false),
            ("8.8.8.8", false),
        ] {
            assert_eq!(is_private(address.parse().unwrap()), private, "{address}");
        }
    }

    #[test]
    fn rules_match_both_ways() {
        let rule = |to, transport, ports: &[&str]| AllowRule {
            to,
            transport,
            ports: ports.iter().map(|port| port.parse().unwrap()).collect(),
        };
        let cidr = |text: &str| Destination::Cidr(text.parse().unwrap());
        let domain = || Destination::Domain("a.b".parse().unwrap());
        for (rule, out, back) in [
            (
                rule(Destination::Anywhere, None, &[]),
                "ip daddr != @private",
                "ip saddr != @private",
            ),
            (
                rule(cidr("10.0.0.0/8"), Some(Transport::Udp), &[]),
                "ip daddr 10.0.0.0/8 meta l4proto udp",
                "ip saddr 10.0.0.0/8 meta l4proto udp",
            ),
            (
                rule(
                    cidr("0.0.0.0/0"),
                    Some(Transport::Tcp),
                    &["443", "80-90", "85-99"],
                ),
                "meta nfproto ipv4 meta l4proto tcp th dport { 80-99, 443 }",
                "meta nfproto ipv4 meta l4proto tcp th sport { 80-99, 443 }",
            ),
            (
                rule(domain(), None, &["53"]),
                "ip daddr @s meta l4proto { tcp, udp } th dport { 53 }",
                "ip saddr @s meta l4proto { tcp, udp } th sport { 53 }",
            ),
        ] {
            assert_eq!(matcher(&rule, "s", Way::Out), out);
            assert_eq!(matcher(&rule, "s", Way::In), back);
        }
    }
}
