//! Sockets of a guest that wait for others, by the tables of its `/proc/net`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The state of a TCP socket that listens, and of a UDP socket that has no peer.
const LISTENS: [&str; 2] = ["0A", "07"];

/// A socket that waits for others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Listener {
    /// `tcp` or `udp`.
    pub transport: &'static str,
    /// Its port.
    pub port: u16,
    /// Its address, or the one that stands for all.
    pub address: IpAddr,
}

/// Sockets of a table of `/proc/net` that wait for others. What makes no sense is left out.
pub fn listeners(name: &'static str, table: &str) -> Vec<Listener> {
    let transport = name.trim_end_matches('6');
    let listens = if transport == "tcp" {
        LISTENS[0]
    } else {
        LISTENS[1]
    };
    let lines = table.lines().skip(1).filter_map(|line| {
        let mut fields = line.split_whitespace().skip(1);
        let (local, state) = (fields.next()?, fields.nth(1)?);
        if state != listens {
            return None;
        }
        let (address, port) = local.split_once(':')?;
        Some(Listener {
            transport,
            port: u16::from_str_radix(port, 16).ok()?,
            address: address_of(address)?,
        })
    });
    lines.collect()
}

/// Words of 32 bits, each in the order of the guest's processor, which is x86-64.
fn address_of(digits: &str) -> Option<IpAddr> {
    let word = |at: usize| {
        let word = u32::from_str_radix(digits.get(at * 8..at * 8 + 8)?, 16).ok()?;
        Some(word.swap_bytes())
    };
    match digits.len() {
        8 => Some(Ipv4Addr::from(word(0)?).into()),
        32 => {
            let words = [word(0)?, word(1)?, word(2)?, word(3)?];
            let bits = words
                .into_iter()
                .fold(0, |all, word| all << 32 | u128::from(word));
            Some(IpAddr::from(Ipv6Addr::from(bits)).to_canonical())
        }
        _ => None,
    }
}
