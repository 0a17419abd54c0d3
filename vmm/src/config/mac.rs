//! The Ethernet address of a network card.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// An Ethernet address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddress([u8; 6]);

impl MacAddress {
    /// The address with these octets.
    ///
    /// # Errors
    /// It is a group address, which no card can have.
    pub fn new(octets: [u8; 6]) -> Result<Self, ParseMacError> {
        if octets[0] & 1 != 0 {
            Err(ParseMacError::Group)
        } else {
            Ok(Self(octets))
        }
    }

    /// The octets in the order in which they go over the wire.
    pub fn octets(self) -> [u8; 6] {
        self.0
    }
}

/// Why a string is no card's Ethernet address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ParseMacError {
    /// Not six octets.
    #[error("expected six octets in hexadecimal, separated by colons, as in 52:54:00:12:34:56")]
    Syntax,
    /// A multicast or broadcast address.
    #[error("a group address cannot belong to a card: the first octet must be even")]
    Group,
}

impl FromStr for MacAddress {
    type Err = ParseMacError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut octets = [0; 6];
        let mut parts = text.split(':');
        for octet in &mut octets {
            let part = parts.next().ok_or(ParseMacError::Syntax)?;
            if part.len() != 2 || !part.bytes().all(|byte| byte.is_ascii_hexdigit()) {
                return Err(ParseMacError::Syntax);
            }
            *octet = u8::from_str_radix(part, 16).map_err(|_| ParseMacError::Syntax)?;
        }
        if parts.next().is_some() {
            return Err(ParseMacError::Syntax);
        }
        Self::new(octets)
    }
}

impl TryFrom<String> for MacAddress {
    type Error = ParseMacError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<MacAddress> for String {
    fn from(mac: MacAddress) -> Self {
        mac.to_string()
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}
