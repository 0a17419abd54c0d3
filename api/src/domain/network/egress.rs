//! What a sandbox may reach.

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The most rules of one allow list.
pub const MAX_RULES: usize = 256;
/// The most port ranges of one rule.
const MAX_PORTS: usize = 64;
/// The longest name in DNS, in characters (RFC 1035, 2.3.4).
const MAX_NAME: usize = 253;
/// The longest label of a name in DNS.
const MAX_LABEL: usize = 63;

/// What a sandbox may reach beyond this host. Other sandboxes and this host's own services are out
/// of reach whatever it says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Egress {
    /// Nothing.
    None,
    /// Everything but private and link-local addresses.
    All,
    /// What one of these rules allows.
    Allow(Vec<AllowRule>),
}

/// One entry of an allow list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AllowRule {
    /// Where to.
    pub to: Destination,
    /// By which protocol; any, if there is none and there are no ports, and TCP and UDP if there
    /// are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transport: Option<Transport>,
    /// To which ports; all if there are none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<PortRange>,
}

/// Where a rule allows packets to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Destination {
    /// Everywhere but to private and link-local addresses.
    Anywhere,
    /// To these addresses, be they private or not.
    Cidr(Cidr),
    /// To the addresses that these names have, as long as DNS says that they have them; not to
    /// private ones.
    Domain(DomainPattern),
}

/// A protocol with ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl Transport {
    /// The word for it in the store, the APIs and nftables.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Why something is no part of an egress policy. A sentence.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct EgressError(pub String);

/// IPv4 addresses with the same first bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Cidr {
    network: Ipv4Addr,
    prefix: u8,
}

impl FromStr for Cidr {
    type Err = EgressError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (network, prefix) = text.split_once('/').unwrap_or((text, "32"));
        let parsed = network.parse::<Ipv4Addr>().ok().and_then(|network| {
            let prefix = prefix.parse::<u8>().ok().filter(|prefix| *prefix <= 32)?;
            let host_bits = u32::MAX.checked_shr(prefix.into()).unwrap_or(0);
            (network.to_bits() & host_bits == 0).then_some(Self { network, prefix })
        });
        parsed.ok_or_else(|| {
            EgressError(format!(
                "{text:?} is no IPv4 network: expected an address, or the first of a network and \
                 a prefix length, as in 203.0.113.0/24"
            ))
        })
    }
}

impl Cidr {
    /// How many bits of an address are given.
    pub fn prefix(self) -> u8 {
        self.prefix
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.prefix)
    }
}

impl TryFrom<String> for Cidr {
    type Error = EgressError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Cidr> for String {
    fn from(cidr: Cidr) -> Self {
        cidr.to_string()
    }
}

/// One name, as `example.com`, or all below one, as `*.example.com`. In lower case.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DomainPattern(String);

impl DomainPattern {
    /// Whether this name, without its last dot, is one of these.
    pub fn matches(&self, name: &str) -> bool {
        match self.0.strip_prefix("*.") {
            Some(parent) => name
                .len()
                .checked_sub(parent.len() + 1)
                .is_some_and(|start| {
                    // All characters of a pattern are ASCII, so a name that matches is too.
                    let bytes = name.as_bytes();
                    start > 0
                        && bytes[start] == b'.'
                        && bytes[start + 1..].eq_ignore_ascii_case(parent.as_bytes())
                }),
            None => name.eq_ignore_ascii_case(&self.0),
        }
    }
}

impl FromStr for DomainPattern {
    type Err = EgressError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let lower = text.trim_end_matches('.').to_ascii_lowercase();
        let name = lower.strip_prefix("*.").unwrap_or(&lower);
        let is_label = |label: &str| {
            (1..=MAX_LABEL).contains(&label.len())
                && label
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte))
        };
        let is_address = name.parse::<Ipv4Addr>().is_ok();
        if lower.len() <= MAX_NAME && name.split('.').all(is_label) && !is_address {
            Ok(Self(lower))
        } else {
            Err(EgressError(format!(
                "{text:?} is no domain name: expected letters, digits and `-` between dots, as in \
                 example.com, or *.example.com for all names below it (in ASCII, as on the wire)"
            )))
        }
    }
}

impl fmt::Display for DomainPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for DomainPattern {
    type Error = EgressError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<DomainPattern> for String {
    fn from(pattern: DomainPattern) -> Self {
        pattern.0
    }
}

/// Ports from the first to the last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PortRange {
    first: u16,
    last: u16,
}

impl FromStr for PortRange {
    type Err = EgressError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        match (first.parse(), last.parse()) {
            (Ok(first), Ok(last)) if 1 <= first && first <= last => Ok(Self { first, last }),
            _ => Err(EgressError(format!(
                "{text:?} is no port: expected 1 to 65535, or a range as in 8000-8100"
            ))),
        }
    }
}

impl PortRange {
    /// The same ports, in order, as ranges that neither overlap nor touch.
    pub fn merge(ranges: &[Self]) -> Vec<Self> {
        let mut sorted = ranges.to_vec();
        sorted.sort_by_key(|range| range.first);
        let mut merged: Vec<Self> = Vec::with_capacity(sorted.len());
        for range in sorted {
            match merged.last_mut() {
                Some(last) if range.first <= last.last.saturating_add(1) => {
                    last.last = last.last.max(range.last);
                }
                _ => merged.push(range),
            }
        }
        merged
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.first)?;
        if self.last > self.first {
            write!(f, "-{}", self.last)?;
        }
        Ok(())
    }
}

impl TryFrom<String> for PortRange {
    type Error = EgressError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<PortRange> for String {
    fn from(range: PortRange) -> Self {
        range.to_string()
    }
}

impl Egress {
    /// Checks a policy as it is asked for.
    ///
    /// # Errors
    /// It is too long.
    pub fn check(self) -> Result<Self, EgressError> {
        if let Self::Allow(rules) = &self {
            if rules.len() > MAX_RULES {
                return Err(EgressError(format!(
                    "the allow list has {} rules; at most {MAX_RULES} are possible",
                    rules.len()
                )));
            }
            if rules.iter().any(|rule| rule.ports.len() > MAX_PORTS) {
                return Err(EgressError(format!(
                    "a rule of the allow list has more than {MAX_PORTS} ports"
                )));
            }
        }
        Ok(self)
    }

    /// Whether a sandbox may look up this name, which has no last dot.
    pub fn allows_name(&self, name: &str) -> bool {
        match self {
            Self::None => false,
            Self::All => true,
            Self::Allow(rules) => rules.iter().any(|rule| match &rule.to {
                // Who may go anywhere may know where that is.
                Destination::Anywhere => true,
                Destination::Cidr(_) => false,
                Destination::Domain(pattern) => pattern.matches(name),
            }),
        }
    }

    /// The indices of the rules that allow what this name stands for.
    pub fn rules_for<'a>(&'a self, name: &'a str) -> impl Iterator<Item = usize> + 'a {
        let rules = match self {
            Self::Allow(rules) => rules.as_slice(),
            Self::None | Self::All => &[],
        };
        rules
            .iter()
            .enumerate()
            .filter(move |(_, rule)| match &rule.to {
                Destination::Domain(pattern) => pattern.matches(name),
                Destination::Anywhere | Destination::Cidr(_) => false,
            })
            .map(|(index, _)| index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn to_domain(pattern: &str) -> AllowRule {
        AllowRule {
            to: Destination::Domain(pattern.parse().unwrap()),
            transport: None,
            ports: Vec::new(),
        }
    }

    #[test]
    fn patterns_match_whole_labels() {
        let one: DomainPattern = "Example.COM.".parse().unwrap();
        let below: DomainPattern = "*.example.com".parse().unwrap();
        for (name, is_one, is_below) in [
            ("example.com", true, false),
            ("EXAMPLE.com", true, false),
            ("a.example.com", false, true),
            ("A.b.Example.com", false, true),
            ("badexample.com", false, false),
            (".example.com", false, false),
            ("example.com.evil.org", false, false),
            ("com", false, false),
            ("", false, false),
            ("ü.example.com", false, true),
            ("ü", false, false),
        ] {
            assert_eq!(one.matches(name), is_one, "{name}");
            assert_eq!(below.matches(name), is_below, "{name}");
        }
    }

    #[test]
    fn what_is_no_pattern_is_refused() {
        for bad in [
            "", "*", "*.", "a..b", "a b", "*.*.com", "foo*.com", "1.2.3.4", "ü.de", "a/b",
        ] {
            assert!(bad.parse::<DomainPattern>().is_err(), "{bad}");
        }
        assert!("a.".repeat(127).parse::<DomainPattern>().is_ok());
        assert!("a.".repeat(128).parse::<DomainPattern>().is_err());
    }

    #[test]
    fn networks_have_no_host_bits() {
        for (text, written) in [
            ("203.0.113.0/24", "203.0.113.0/24"),
            ("203.0.113.9", "203.0.113.9/32"),
            ("0.0.0.0/0", "0.0.0.0/0"),
        ] {
            assert_eq!(text.parse::<Cidr>().unwrap().to_string(), written);
        }
        for bad in [
            "203.0.113.9/24",
            "1.2.3.4/33",
            "1.2.3/8",
            "::/0",
            "1.0.0.0/0",
        ] {
            assert!(bad.parse::<Cidr>().is_err(), "{bad}");
        }
    }

    #[test]
    fn ports_are_in_order() {
        for good in ["1", "65535", "80-443", "80-80"] {
            assert!(good.parse::<PortRange>().is_ok(), "{good}");
        }
        for bad in ["0", "65536", "443-80", "", "-", "80-", "http"] {
            assert!(bad.parse::<PortRange>().is_err(), "{bad}");
        }
    }

    #[test]
    fn ranges_that_overlap_or_touch_become_one() {
        let merged = |texts: &[&str]| {
            let ranges: Vec<_> = texts.iter().map(|text| text.parse().unwrap()).collect();
            let merged = PortRange::merge(&ranges);
            merged.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert_eq!(
            merged(&["443", "1-80", "90-100", "50-89", "65535", "65000-65535"]),
            ["1-100", "443", "65000-65535"]
        );
        assert_eq!(merged(&["1-1000", "5", "5"]), ["1-1000"]);
    }

    #[test]
    fn names_may_be_looked_up_that_a_rule_allows() {
        let list = Egress::Allow(vec![
            to_domain("example.com"),
            AllowRule {
                to: Destination::Cidr("10.0.0.0/8".parse().unwrap()),
                transport: None,
                ports: Vec::new(),
            },
            to_domain("*.example.com"),
        ]);
        assert!(list.allows_name("example.com") && list.allows_name("www.example.com"));
        assert!(!list.allows_name("example.org"));
        assert_eq!(list.rules_for("a.example.com").collect::<Vec<_>>(), [2]);
        assert!(Egress::All.allows_name("anything") && !Egress::None.allows_name("anything"));
        assert_eq!(Egress::All.rules_for("a").count(), 0);
    }

    #[test]
    fn a_policy_is_kept_as_json() {
        let policy = Egress::Allow(vec![AllowRule {
            to: Destination::Domain("example.com".parse().unwrap()),
            transport: Some(Transport::Tcp),
            ports: vec!["443".parse().unwrap()],
        }]);
        let text = serde_json::to_string(&policy).unwrap();
        assert_eq!(
            text,
            r#"{"allow":[{"to":{"domain":"example.com"},"transport":"tcp","ports":["443"]}]}"#
        );
        assert_eq!(serde_json::from_str::<Egress>(&text).unwrap(), policy);
        assert_eq!(serde_json::to_string(&Egress::All).unwrap(), r#""all""#);
    }

    #[test]
    fn an_allow_list_has_an_end() {
        let rules = vec![to_domain("a"); MAX_RULES + 1];
        assert!(Egress::Allow(rules).check().is_err());
    }
}
