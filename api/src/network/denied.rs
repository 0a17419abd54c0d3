//! Packets that the filter has refused, as the kernel's nflog tells of them.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::time::Duration;

use jiff::Timestamp;
use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use netlink_packet_netfilter::nflog::{
    ConfigCmd, ConfigMode, PacketNla, Timeout, ULogMessage, config_request,
};
use netlink_packet_netfilter::{NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily};
use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_NETFILTER;
use tokio::io::unix::AsyncFd;

use super::namespace::Namespace;
use crate::domain::{Denied, DeniedWhat, SandboxId};

/// The first group that is tried; another program may have taken it.
const FIRST_GROUP: u16 = 7300;
/// How many groups are tried.
const GROUPS: u16 = 16;
/// How much of a packet is told: headers of IP, without options in most cases, and ports.
const SNAP_LEN: u32 = 64;
/// How long the kernel may collect packets before it tells of them.
const DELAY: Duration = Duration::from_millis(100);
/// The largest message of the kernel's: a batch of packets that it has collected.
const MAX_MESSAGE: usize = 64 * 1024;

/// What the kernel tells of refused packets.
pub struct DeniedPackets {
    socket: AsyncFd<Netlink>,
    /// The group that it is told by.
    pub group: u16,
}

struct Netlink(Socket);

impl AsRawFd for Netlink {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl AsFd for Netlink {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl DeniedPackets {
    /// Listens in this namespace, in a group that nobody else listens in.
    ///
    /// # Errors
    /// The kernel does not tell, or all groups are taken.
    pub async fn listen(namespace: &Namespace) -> io::Result<Self> {
        let (socket, group) = namespace.run(bind).await?;
        // SAFETY: the descriptor is that of the socket, which is neither changed nor closed before
        // both are dropped.
        let socket = unsafe { AsyncFd::register(Netlink(socket)) }?;
        Ok(Self { socket, group })
    }

    /// The next refused packets, with their sandboxes.
    ///
    /// # Errors
    /// The kernel tells no more.
    pub async fn next(&self) -> io::Result<Vec<(SandboxId, Denied)>> {
        let mut buffer = Vec::with_capacity(MAX_MESSAGE);
        loop {
            let mut ready = self.socket.readable().await?;
            buffer.clear();
            match ready.try_io(|socket| socket.get_ref().0.recv(&mut buffer, 0)) {
                Err(_would_block) => {}
                // Some were lost; the counters have them.
                Ok(Err(error)) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
                Ok(Err(error)) => return Err(error),
                Ok(Ok(_)) => return Ok(parse(&buffer)),
            }
        }
    }
}

fn bind() -> io::Result<(Socket, u16)> {
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind_auto()?;
    let mut result = Err(io::ErrorKind::AddrInUse.into());
    for group in FIRST_GROUP..FIRST_GROUP + GROUPS {
        let timeout: Timeout = DELAY.into();
        let request = config_request(
            NetfilterProtoFamily::Unspec,
            group,
            vec![
                ConfigCmd::Bind.into(),
                ConfigMode::new_packet(SNAP_LEN).into(),
                timeout.into(),
            ],
        );
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        socket.send(&bytes, 0)?;
        result = acknowledged(&socket).map(|()| group);
        match &result {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {}
            _ => break,
        }
    }
    let group = result?;
    socket.set_non_blocking(true)?;
    Ok((socket, group))
}

fn acknowledged(socket: &Socket) -> io::Result<()> {
    let mut buffer = Vec::with_capacity(MAX_MESSAGE);
    socket.recv(&mut buffer, 0)?;
    let message = NetlinkMessage::<NetfilterMessage>::deserialize(&buffer);
    match message.map(|message| message.payload) {
        Ok(NetlinkPayload::Error(error)) if error.code.is_none() => Ok(()),
        Ok(NetlinkPayload::Error(error)) => Err(error.to_io()),
        Ok(_) => Err(io::ErrorKind::InvalidData.into()),
        Err(error) => Err(io::Error::other(error.to_string())),
    }
}

/// What a batch of messages tells. What makes no sense is passed over.
fn parse(mut bytes: &[u8]) -> Vec<(SandboxId, Denied)> {
    let mut found = Vec::new();
    while let Ok(message) = NetlinkMessage::<NetfilterMessage>::deserialize(bytes) {
        let length = usize::try_from(message.header.length).unwrap_or(usize::MAX);
        if let NetlinkPayload::InnerMessage(NetfilterMessage {
            inner: NetfilterMessageInner::ULog(ULogMessage::Packet(attributes)),
            ..
        }) = &message.payload
        {
            found.extend(denied(attributes));
        }
        // Messages are aligned to four bytes.
        let Some(rest) = length
            .checked_next_multiple_of(4)
            .filter(|length| *length > 0)
            .and_then(|length| bytes.get(length..))
        else {
            break;
        };
        bytes = rest;
    }
    found
}

fn denied(attributes: &[PacketNla]) -> Option<(SandboxId, Denied)> {
    let (mut id, mut what) = (None, None);
    for attribute in attributes {
        match attribute {
            PacketNla::Prefix(prefix) => id = prefix.to_str().ok()?.parse().ok(),
            PacketNla::Payload(packet) => what = describe(packet),
            _ => {}
        }
    }
    let at = Timestamp::now();
    Some((id?, Denied { at, what: what? }))
}

/// What there is to say of a packet, which a guest has made, cut off at [`SNAP_LEN`].
fn describe(packet: &[u8]) -> Option<DeniedWhat> {
    // RFC 791, 3.1: version and length of the header in words, protocol, and destination.
    let first = *packet.first()?;
    if first >> 4 != 4 {
        return None;
    }
    let header = usize::from(first & 0xf) * 4;
    let protocol = *packet.get(9)?;
    let address: [u8; 4] = packet.get(16..20)?.try_into().ok()?;
    let is_first_fragment = packet.get(6..8)? == [0, 0] || packet.get(6..8)? == [0x40, 0];
    let port = || {
        let port = packet.get(header + 2..header + 4)?;
        Some(u16::from_be_bytes([port[0], port[1]]))
    };
    let (protocol, has_ports) = match i32::from(protocol) {
        libc::IPPROTO_TCP => ("tcp".to_owned(), true),
        libc::IPPROTO_UDP => ("udp".to_owned(), true),
        libc::IPPROTO_ICMP => ("icmp".to_owned(), false),
        other => (other.to_string(), false),
    };
    Some(DeniedWhat::Packet {
        protocol,
        address: Ipv4Addr::from(address),
        port: if has_ports && is_first_fragment {
            port()
        } else {
            None
        },
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn packet(protocol: u8, options: usize) -> Vec<u8> {
        let mut packet = vec![0; 20 + options * 4];
        packet[0] = 0x45 + u8::try_from(options).unwrap();
        packet[6] = 0x40;
        packet[9] = protocol;
        packet[16..20].copy_from_slice(&[203, 0, 113, 9]);
        packet.extend([0x80, 0, 0x01, 0xbb]);
        packet
    }

    #[test]
    fn packets_are_told_by_protocol_address_and_port() {
        let told = |protocol: &str, port| {
            Some(DeniedWhat::Packet {
                protocol: protocol.to_owned(),
                address: Ipv4Addr::new(203, 0, 113, 9),
                port,
            })
        };
        assert_eq!(describe(&packet(6, 0)), told("tcp", Some(443)));
        assert_eq!(describe(&packet(17, 3)), told("udp", Some(443)));
        assert_eq!(describe(&packet(1, 0)), told("icmp", None));
        assert_eq!(describe(&packet(47, 0)), told("47", None));
        // What follows the first fragment has no ports, and an options field may lead past the end.
        let mut later = packet(6, 0);
        later[7] = 9;
        assert_eq!(describe(&later), told("tcp", None));
        let mut short = packet(6, 0);
        short[0] = 0x4f;
        assert_eq!(describe(&short), told("tcp", None));
    }

    proptest! {
        #[test]
        fn no_bytes_break_it(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = describe(&bytes);
            let _ = parse(&bytes);
        }
    }
}
