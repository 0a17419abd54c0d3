//! A DHCP server for guests without our agent. It gives a card the address that the card's sandbox
//! has anyway; there is nothing to lease out.
//!
//! Messages are read and written here, and not by a library: the one that there is ends the process
//! on an option of a wrong length, which any guest can send.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};

use rustix::net::sockopt;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, socket_with};
use tokio::net::UdpSocket;
use tracing::{debug, warn};

use super::namespace::Namespace;
use crate::domain::{MacAddress, Subnet};

const SERVER_PORT: u16 = 67;
const CLIENT_PORT: u16 = 68;
/// How long an address is given for, in seconds. It is the card's for as long as that is there.
const LEASE: u32 = 24 * 3600;
/// The largest message that is read.
const MAX_MESSAGE: usize = 1500;

/// Fields of a message (RFC 2131, 2) by their offsets.
mod field {
    pub const OPERATION: usize = 0;
    pub const HARDWARE: usize = 1;
    pub const HARDWARE_LENGTH: usize = 2;
    pub const TRANSACTION: std::ops::Range<usize> = 4..8;
    pub const FLAGS: std::ops::Range<usize> = 10..12;
    pub const CLIENT_ADDRESS: std::ops::Range<usize> = 12..16;
    pub const YOUR_ADDRESS: std::ops::Range<usize> = 16..20;
    pub const RELAY_ADDRESS: std::ops::Range<usize> = 24..28;
    pub const CLIENT_CARD: std::ops::Range<usize> = 28..34;
    pub const COOKIE: std::ops::Range<usize> = 236..240;
    /// The options follow the cookie.
    pub const OPTIONS: usize = 240;
}

const REQUEST: u8 = 1;
const REPLY: u8 = 2;
const ETHERNET: u8 = 1;
const COOKIE: [u8; 4] = [99, 130, 83, 99];
/// The first of the flags: the guest can take no unicast yet.
const BROADCAST: u8 = 0x80;

/// Options (RFC 2132).
mod option {
    pub const PAD: u8 = 0;
    pub const SUBNET_MASK: u8 = 1;
    pub const ROUTER: u8 = 3;
    pub const RESOLVER: u8 = 6;
    pub const MTU: u8 = 26;
    pub const REQUESTED_ADDRESS: u8 = 50;
    pub const LEASE: u8 = 51;
    pub const KIND: u8 = 53;
    pub const SERVER: u8 = 54;
    pub const END: u8 = 255;
}

/// Kinds of messages (RFC 2132, 9.6).
mod kind {
    pub const DISCOVER: u8 = 1;
    pub const OFFER: u8 = 2;
    pub const REQUEST: u8 = 3;
    pub const ACK: u8 = 5;
    pub const NAK: u8 = 6;
    pub const INFORM: u8 = 8;
}

/// What a guest is told.
#[derive(Debug, Clone, Copy)]
pub struct Offer {
    /// Its network.
    pub subnet: Subnet,
    /// The largest packet of it.
    pub mtu: u16,
}

/// Serves on a bridge until the socket fails. `lookup` knows the address of a card.
pub async fn serve(
    socket: UdpSocket,
    offer: Offer,
    lookup: impl Fn(MacAddress) -> Option<Ipv4Addr>,
) {
    let mut buffer = vec![0; MAX_MESSAGE];
    loop {
        let length = match socket.recv_from(&mut buffer).await {
            Ok((length, _)) => length,
            Err(error) => {
                warn!(%error, "the DHCP server has ended");
                return;
            }
        };
        let Some((reply, to)) = answer(&buffer[..length], offer, &lookup) else {
            continue;
        };
        if let Err(error) = socket.send_to(&reply, SocketAddr::V4(to)).await {
            debug!(%error, %to, "DHCP answer not sent");
        }
    }
}

/// A socket for the server on this interface.
///
/// # Errors
/// Another server has the port.
pub async fn listen(namespace: &Namespace, interface: &str) -> io::Result<UdpSocket> {
    let interface = interface.to_owned();
    let socket = namespace
        .run(move || {
            let socket = socket_with(
                AddressFamily::INET,
                SocketType::DGRAM,
                SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
                None,
            )?;
            // Others may serve other interfaces.
            sockopt::set_socket_reuseaddr(&socket, true)?;
            sockopt::set_socket_broadcast(&socket, true)?;
            bind_to_device(&socket, &interface)?;
            bind(
                &socket,
                &SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, SERVER_PORT),
            )?;
            Ok(std::net::UdpSocket::from(socket))
        })
        .await?;
    UdpSocket::from_std(socket)
}

fn bind_to_device(socket: &impl std::os::fd::AsRawFd, interface: &str) -> io::Result<()> {
    let length = libc::socklen_t::try_from(interface.len()).unwrap_or(0);
    // SAFETY: the descriptor is open, and the call reads `length` bytes of the name.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_BINDTODEVICE,
            interface.as_ptr().cast(),
            length,
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// What matters of a message of a guest's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Request {
    kind: u8,
    transaction: [u8; 4],
    flags: [u8; 2],
    client: Ipv4Addr,
    card: MacAddress,
    wanted: Option<Ipv4Addr>,
    server: Option<Ipv4Addr>,
}

impl Request {
    /// `None` if it is no request of a card that is asked for itself.
    fn parse(bytes: &[u8]) -> Option<Self> {
        let address = |range: std::ops::Range<usize>| {
            let octets: [u8; 4] = bytes.get(range)?.try_into().ok()?;
            Some(Ipv4Addr::from(octets))
        };
        let is_ours = bytes.get(field::COOKIE)? == COOKIE
            && *bytes.get(field::OPERATION)? == REQUEST
            && *bytes.get(field::HARDWARE)? == ETHERNET
            && *bytes.get(field::HARDWARE_LENGTH)? == 6
            && address(field::RELAY_ADDRESS)?.is_unspecified();
        if !is_ours {
            return None;
        }
        let mut request = Self {
            kind: 0,
            transaction: bytes.get(field::TRANSACTION)?.try_into().ok()?,
            flags: bytes.get(field::FLAGS)?.try_into().ok()?,
            client: address(field::CLIENT_ADDRESS)?,
            card: MacAddress(bytes.get(field::CLIENT_CARD)?.try_into().ok()?),
            wanted: None,
            server: None,
        };
        let mut rest = bytes.get(field::OPTIONS..)?;
        while let Some((&code, after)) = rest.split_first() {
            match code {
                option::PAD => {
                    rest = after;
                    continue;
                }
                option::END => break,
                _ => {}
            }
            let (&length, after) = after.split_first()?;
            let (value, after) = after.split_at_checked(length.into())?;
            let address = <[u8; 4]>::try_from(value).map(Ipv4Addr::from);
            match (code, value) {
                (option::KIND, [kind]) => request.kind = *kind,
                (option::REQUESTED_ADDRESS, _) => request.wanted = Some(address.ok()?),
                (option::SERVER, _) => request.server = Some(address.ok()?),
                _ => {}
            }
            rest = after;
        }
        Some(request)
    }
}

/// The answer to a message of a guest's, and where it goes (RFC 2131, 4.3); `None` if there is
/// nothing to say.
fn answer(
    bytes: &[u8],
    offer: Offer,
    lookup: impl Fn(MacAddress) -> Option<Ipv4Addr>,
) -> Option<(Vec<u8>, SocketAddrV4)> {
    let request = Request::parse(bytes)?;
    let address = lookup(request.card)?;
    let gateway = offer.subnet.gateway();
    if request.server.is_some_and(|server| server != gateway) {
        return None;
    }
    let has_address = !request.client.is_unspecified();
    let wanted = request
        .wanted
        .unwrap_or(if has_address { request.client } else { address });
    let kind = match request.kind {
        kind::DISCOVER => kind::OFFER,
        kind::REQUEST if wanted == address => kind::ACK,
        // The guest has taken its address along from where it was before.
        kind::REQUEST => kind::NAK,
        kind::INFORM => kind::ACK,
        _ => return None,
    };
    let is_nak = kind == kind::NAK;
    let mut reply = vec![0; field::OPTIONS];
    reply[field::OPERATION] = REPLY;
    reply[field::HARDWARE] = ETHERNET;
    reply[field::HARDWARE_LENGTH] = 6;
    reply[field::TRANSACTION].copy_from_slice(&request.transaction);
    reply[field::FLAGS].copy_from_slice(&request.flags);
    reply[field::CLIENT_CARD].copy_from_slice(&request.card.0);
    reply[field::COOKIE].copy_from_slice(&COOKIE);
    let mut add = |code, value: &[u8]| {
        reply.extend([code, u8::try_from(value.len()).unwrap_or(0)]);
        reply.extend(value);
    };
    add(option::KIND, &[kind]);
    add(option::SERVER, &gateway.octets());
    if !is_nak {
        add(option::SUBNET_MASK, &offer.subnet.mask().octets());
        add(option::ROUTER, &gateway.octets());
        add(option::RESOLVER, &gateway.octets());
        add(option::MTU, &offer.mtu.to_be_bytes());
        if request.kind != kind::INFORM {
            add(option::LEASE, &LEASE.to_be_bytes());
            reply[field::YOUR_ADDRESS].copy_from_slice(&address.octets());
        }
        reply[field::CLIENT_ADDRESS].copy_from_slice(&request.client.octets());
    }
    reply.push(option::END);
    let asks_for_broadcast = request.flags[0] & BROADCAST != 0 && !has_address;
    let to = if is_nak || asks_for_broadcast {
        Ipv4Addr::BROADCAST
    } else {
        // The host knows its card without having to ask for it.
        address
    };
    Some((reply, SocketAddrV4::new(to, CLIENT_PORT)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 168, 200, 5);
    const OTHER: Ipv4Addr = Ipv4Addr::new(192, 168, 200, 6);
    const GATEWAY: Ipv4Addr = Ipv4Addr::new(192, 168, 200, 1);

    fn offer() -> Offer {
        Offer {
            subnet: "192.168.200.0/24".parse().unwrap(),
            mtu: 1400,
        }
    }

    fn lookup(mac: MacAddress) -> Option<Ipv4Addr> {
        (mac == MacAddress::of(ADDRESS)).then_some(ADDRESS)
    }

    fn request(kind: u8, options: &[(u8, &[u8])]) -> Vec<u8> {
        let mut message = vec![0; field::OPTIONS];
        message[..3].copy_from_slice(&[REQUEST, ETHERNET, 6]);
        message[field::TRANSACTION].copy_from_slice(&[1, 2, 3, 4]);
        message[field::CLIENT_CARD].copy_from_slice(&MacAddress::of(ADDRESS).0);
        message[field::COOKIE].copy_from_slice(&COOKIE);
        for (code, value) in [&[(option::KIND, &[kind][..])], options].concat() {
            message.extend([option::PAD, code, u8::try_from(value.len()).unwrap()]);
            message.extend(value);
        }
        message.push(option::END);
        message
    }

    /// Kind, given address, options after the kind, and where it goes.
    fn reply_to(message: &[u8]) -> Option<(u8, Ipv4Addr, Vec<u8>, Ipv4Addr)> {
        let (reply, to) = answer(message, offer(), lookup)?;
        assert_eq!(to.port(), 68);
        assert_eq!(reply[field::TRANSACTION], [1, 2, 3, 4]);
        assert_eq!(reply[field::CLIENT_CARD], MacAddress::of(ADDRESS).0);
        let given: [u8; 4] = reply[field::YOUR_ADDRESS].try_into().unwrap();
        let options = &reply[field::OPTIONS..];
        assert_eq!(options[..2], [53, 1]);
        Some((options[2], given.into(), options[3..].to_vec(), *to.ip()))
    }

    #[test]
    fn a_card_is_given_the_address_of_its_sandbox() {
        let told = [
            &[54, 4, 192, 168, 200, 1, 1, 4, 255, 255, 255, 0][..],
            &[3, 4, 192, 168, 200, 1, 6, 4, 192, 168, 200, 1],
            &[26, 2, 5, 120, 51, 4, 0, 1, 81, 128, 255],
        ]
        .concat();
        let expected = |kind| Some((kind, ADDRESS, told.clone(), ADDRESS));
        assert_eq!(
            reply_to(&request(kind::DISCOVER, &[])),
            expected(kind::OFFER)
        );
        let wanted = [
            (option::REQUESTED_ADDRESS, &ADDRESS.octets()[..]),
            (option::SERVER, &GATEWAY.octets()),
        ];
        assert_eq!(
            reply_to(&request(kind::REQUEST, &wanted)),
            expected(kind::ACK)
        );
    }

    #[test]
    fn another_address_is_refused_and_other_servers_and_cards_are_not_answered() {
        let wanted = [(option::REQUESTED_ADDRESS, &OTHER.octets()[..])];
        let (kind, given, _, to) = reply_to(&request(kind::REQUEST, &wanted)).unwrap();
        assert_eq!((kind, to), (kind::NAK, Ipv4Addr::BROADCAST));
        assert!(given.is_unspecified());

        let server = [(option::SERVER, &OTHER.octets()[..])];
        assert_eq!(reply_to(&request(kind::REQUEST, &server)), None);
        let mut unknown = request(kind::DISCOVER, &[]);
        unknown[field::CLIENT_CARD].copy_from_slice(&MacAddress::of(OTHER).0);
        assert_eq!(reply_to(&unknown), None);
        let mut relayed = request(kind::DISCOVER, &[]);
        relayed[field::RELAY_ADDRESS].copy_from_slice(&OTHER.octets());
        assert_eq!(reply_to(&relayed), None);
        assert_eq!(reply_to(&request(7, &[])), None, "a release");
    }

    #[test]
    fn who_asks_for_a_broadcast_gets_one() {
        let mut message = request(kind::DISCOVER, &[]);
        message[field::FLAGS].copy_from_slice(&[BROADCAST, 0]);
        assert_eq!(reply_to(&message).unwrap().3, Ipv4Addr::BROADCAST);
    }

    proptest! {
        #[test]
        fn no_options_break_it(options in prop::collection::vec(any::<u8>(), 0..80)) {
            let mut message = request(kind::DISCOVER, &[]);
            message.pop();
            message.extend(options);
            let _ = answer(&message, offer(), lookup);
        }

        #[test]
        fn no_bytes_break_it(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            let _ = answer(&bytes, offer(), |_| Some(ADDRESS));
        }
    }
}
