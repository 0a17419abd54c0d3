//! Ends connections of an address that this machine does not have any more.
//!
//! The kernel lets them be: whoever reads from one would wait for ever, since what it sends leaves
//! with an address that is another machine's. sock_diag(7) lists sockets, and ends them.

use std::io;
use std::net::Ipv4Addr;

use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
use rustix::net::{netlink, recv, send, socket_with, sockopt};

/// Types and flags of messages, of `linux/netlink.h` and `linux/sock_diag.h`.
const ERROR: u16 = 2;
const DONE: u16 = 3;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const REQUEST: u16 = 0x1;
const ACK: u16 = 0x4;
const DUMP: u16 = 0x300;

/// Length of a `struct nlmsghdr`.
const HEADER: usize = 16;
/// Length of a `struct inet_diag_req_v2`, and where in it the socket is named.
const QUERY: usize = 56;
const QUERY_SOCKET: usize = 8;
/// Length of a `struct inet_diag_msg`, and where in it the socket is named.
const FOUND: usize = 72;
const FOUND_SOCKET: usize = 4;
/// Length of a `struct inet_diag_sockid`, which names a socket, and where in it its own address is.
const SOCKET: usize = 48;
const SOCKET_ADDRESS: usize = 4;

/// All states but TCP_LISTEN (10) and TCP_TIME_WAIT (6), of `net/tcp_states.h`: nobody waits for
/// anything on one of these.
const STATES: u32 = !(1 << 10 | 1 << 6);

/// How many bytes of sockets are read at a time: more than the kernel puts into one message.
const ROOM: usize = 64 * 1024;
/// How long the kernel may take for an answer.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(5);

/// What a socket is found and ended by.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Socket {
    family: u8,
    protocol: u8,
    id: [u8; SOCKET],
}

/// Ends all TCP connections and connected UDP sockets of `address`, and returns how many there were.
/// Whoever reads from one or writes to it is told that it was aborted.
///
/// # Errors
/// The kernel does not list or end sockets (`CONFIG_INET_DIAG_DESTROY`).
pub fn end_those_of(address: Ipv4Addr) -> io::Result<usize> {
    let netlink = socket_with(
        AddressFamily::NETLINK,
        SocketType::RAW,
        SocketFlags::CLOEXEC,
        Some(netlink::SOCK_DIAG),
    )?;
    sockopt::set_socket_timeout(&netlink, sockopt::Timeout::Recv, Some(PATIENCE))?;
    let mut sockets = Vec::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        for protocol in [libc::IPPROTO_TCP, libc::IPPROTO_UDP] {
            // Each fits: they are 2, 10, 6 and 17.
            let (family, protocol) = (family as u8, protocol as u8);
            send(&netlink, &list(family, protocol), SendFlags::empty())?;
            let mut buffer = vec![0; ROOM];
            let mut is_done = false;
            while !is_done {
                let (length, _) = recv(&netlink, buffer.as_mut_slice(), RecvFlags::empty())?;
                is_done = read_list(&buffer[..length.min(ROOM)], protocol, address, &mut sockets)?;
            }
        }
    }
    let mut count = 0;
    for socket in &sockets {
        send(&netlink, &end(socket), SendFlags::empty())?;
        let mut buffer = vec![0; ROOM];
        let (length, _) = recv(&netlink, buffer.as_mut_slice(), RecvFlags::empty())?;
        match read_answer(&buffer[..length.min(ROOM)]) {
            Ok(()) => count += 1,
            // It has ended by itself.
            Err(error) if error.raw_os_error() == Some(Errno::NOENT.raw_os_error()) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(count)
}

fn list(family: u8, protocol: u8) -> Vec<u8> {
    message(SOCK_DIAG_BY_FAMILY, DUMP, family, protocol, &[0; SOCKET])
}

fn end(socket: &Socket) -> Vec<u8> {
    message(
        SOCK_DESTROY,
        ACK,
        socket.family,
        socket.protocol,
        &socket.id,
    )
}

/// A `struct nlmsghdr` and a `struct inet_diag_req_v2`.
fn message(kind: u16, flags: u16, family: u8, protocol: u8, id: &[u8; SOCKET]) -> Vec<u8> {
    let length = HEADER + QUERY;
    let mut bytes = Vec::with_capacity(length);
    bytes.extend((length as u32).to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend((REQUEST | flags).to_ne_bytes());
    // Number, and sender, which the kernel fills in.
    bytes.extend([0; 8]);
    bytes.extend([family, protocol, 0, 0]);
    bytes.extend(STATES.to_ne_bytes());
    bytes.extend(id);
    debug_assert_eq!(HEADER + QUERY_SOCKET + SOCKET, length);
    bytes
}

/// Adds the sockets of `address` in these messages, and tells whether they are the last ones.
fn read_list(
    mut bytes: &[u8],
    protocol: u8,
    address: Ipv4Addr,
    sockets: &mut Vec<Socket>,
) -> io::Result<bool> {
    while !bytes.is_empty() {
        let (kind, body, rest) = split(bytes)?;
        bytes = rest;
        match kind {
            DONE => return Ok(true),
            ERROR => {
                error_of(body)?;
                return Ok(true);
            }
            SOCK_DIAG_BY_FAMILY => {
                let found = body.get(..FOUND).ok_or_else(garbled)?;
                let mut id = [0; SOCKET];
                id.copy_from_slice(&found[FOUND_SOCKET..FOUND_SOCKET + SOCKET]);
                let family = found[0];
                if is_of(family, &id, address) {
                    sockets.push(Socket {
                        family,
                        protocol,
                        id,
                    });
                }
            }
            _ => return Err(garbled()),
        }
    }
    Ok(false)
}

/// Whether a socket's own address is this one, also as IPv6 has it (RFC 4291, 2.5.5.2).
fn is_of(family: u8, id: &[u8; SOCKET], address: Ipv4Addr) -> bool {
    let own = &id[SOCKET_ADDRESS..SOCKET_ADDRESS + 16];
    match i32::from(family) {
        libc::AF_INET => own[..4] == address.octets(),
        libc::AF_INET6 => own == address.to_ipv6_mapped().octets(),
        _ => false,
    }
}

fn read_answer(bytes: &[u8]) -> io::Result<()> {
    match split(bytes)? {
        (ERROR, body, _) => error_of(body),
        _ => Err(garbled()),
    }
}

/// The type and the body of the first message, and what follows it.
fn split(bytes: &[u8]) -> io::Result<(u16, &[u8], &[u8])> {
    let [a, b, c, d, e, f, ..] = *bytes else {
        return Err(garbled());
    };
    let length = u32::from_ne_bytes([a, b, c, d]) as usize;
    let body = bytes.get(HEADER..length).ok_or_else(garbled)?;
    let next = length.next_multiple_of(4).min(bytes.len());
    Ok((u16::from_ne_bytes([e, f]), body, &bytes[next..]))
}

/// What an error message says; 0 is none.
fn error_of(body: &[u8]) -> io::Result<()> {
    let Some(&[a, b, c, d]) = body.get(..4) else {
        return Err(garbled());
    };
    match i32::from_ne_bytes([a, b, c, d]) {
        0 => Ok(()),
        number => Err(io::Error::from_raw_os_error(number.saturating_neg())),
    }
}

fn garbled() -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        "the kernel's list of sockets makes no sense",
    )
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream, UdpSocket};

    use proptest::prelude::*;

    use super::*;

    const OURS: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 7);

    fn found(family: i32, own: [u8; 16]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(((HEADER + FOUND) as u32).to_ne_bytes());
        bytes.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
        bytes.extend([0; HEADER - 6]);
        bytes.extend([family as u8, 1, 0, 0]);
        bytes.extend([0, 80, 0, 81]);
        bytes.extend(own);
        bytes.resize(HEADER + FOUND, 0);
        bytes
    }

    fn done() -> Vec<u8> {
        let mut bytes = vec![0; 20];
        bytes[..4].copy_from_slice(&20u32.to_ne_bytes());
        bytes[4..6].copy_from_slice(&DONE.to_ne_bytes());
        bytes
    }

    #[test]
    fn sockets_of_the_address_are_picked() {
        let mut four = [0; 16];
        four[..4].copy_from_slice(&OURS.octets());
        let mapped = OURS.to_ipv6_mapped().octets();
        let other = Ipv4Addr::new(192, 0, 2, 8).to_ipv6_mapped().octets();
        let list = [
            found(libc::AF_INET, four),
            found(libc::AF_INET, [0; 16]),
            found(libc::AF_INET6, mapped),
            found(libc::AF_INET6, other),
            done(),
        ]
        .concat();
        let mut sockets = Vec::new();
        assert!(read_list(&list, 6, OURS, &mut sockets).unwrap());
        let families: Vec<_> = sockets
            .iter()
            .map(|socket| i32::from(socket.family))
            .collect();
        assert_eq!(families, [libc::AF_INET, libc::AF_INET6]);
        assert_eq!(sockets[0].id[..4], [0, 80, 0, 81]);
        let request = end(&sockets[0]);
        assert_eq!(request[4..6], SOCK_DESTROY.to_ne_bytes());
        assert_eq!(request[HEADER + QUERY_SOCKET..], sockets[0].id);
    }

    /// Without the right to end sockets, what is listed shows in that ending it is refused.
    #[test]
    fn this_machine_s_sockets_are_listed() {
        let nobody = Ipv4Addr::new(127, 111, 222, 1);
        let listener = TcpListener::bind((nobody, 0)).unwrap();
        let udp = UdpSocket::bind((nobody, 0)).unwrap();
        assert_eq!(end_those_of(Ipv4Addr::new(127, 111, 222, 2)).unwrap(), 0);
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (served, _) = listener.accept().unwrap();
        match end_those_of(nobody) {
            // The server's end, and what was bound.
            Ok(count) => assert!(count >= 2),
            Err(error) => {
                let refusals = [libc::EPERM, libc::EACCES, libc::EOPNOTSUPP];
                assert!(refusals.contains(&error.raw_os_error().unwrap()), "{error}");
            }
        }
        drop((stream, served, udp));
    }

    proptest! {
        #[test]
        fn garbage_is_no_list(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut sockets = Vec::new();
            let _ = read_list(&bytes, 6, OURS, &mut sockets);
            let _ = read_answer(&bytes);
        }
    }
}
