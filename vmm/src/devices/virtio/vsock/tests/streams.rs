//! What programs on both sides see.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;

use super::super::testing::{CID, Guest, LIMIT, Socket};
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::vsock::muxer::LARGE_BUFFER;
use crate::devices::virtio::vsock::packet::{
    Header, MAX_DATA, Op, SHUTDOWN_RECEIVE, SHUTDOWN_SEND,
};

pub const BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

pub fn read_line(stream: &mut UnixStream) -> String {
    let mut line = String::new();
    loop {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        if byte[0] == b'\n' {
            return line;
        }
        line.push(byte[0].into());
    }
}

/// A host program connected to port 1024 of the guest, and the guest's end.
pub fn open_from_host(guest: &mut Guest) -> (UnixStream, Socket) {
    let mut program = guest.connect();
    program.write_all(b"CONNECT 1024\n").unwrap();
    let socket = Socket::accept(guest);
    assert_eq!(read_line(&mut program), format!("OK {}", socket.host_port));
    (program, socket)
}

/// A host program that serves port 1025, and the guest's end of a connection to it.
pub fn open_from_guest(guest: &mut Guest) -> (UnixStream, Socket) {
    let service = UnixListener::bind(guest.socket_path("_1025")).unwrap();
    let socket = Socket::connect(guest, 40000, 1025);
    let (program, _) = service.accept().unwrap();
    program.set_read_timeout(Some(LIMIT)).unwrap();
    (program, socket)
}

fn pattern(len: usize) -> Vec<u8> {
    // The period is no power of two: a lost or repeated block shows.
    (0..len).map(|index| (index % 251) as u8).collect()
}

#[test]
fn registers_tell_the_cid() {
    let guest = Guest::new();
    let mut cid = [0; 8];
    guest.device.read_config(0, &mut cid);
    assert_eq!(u64::from_le_bytes(cid), CID);
    let mut high = [0xff; 4];
    guest.device.read_config(4, &mut high);
    assert_eq!(high, [0; 4]);
    let mut beyond = [0; 8];
    guest.device.read_config(u64::MAX, &mut beyond);
    guest.device.read_config(8, &mut beyond);
    assert_eq!(beyond, [0; 8]);
}

#[test]
fn host_program_reaches_the_guest() {
    let mut guest = Guest::new();
    let (mut program, mut socket) = open_from_host(&mut guest);
    assert_eq!((socket.port, socket.device_buf_alloc), (1024, LARGE_BUFFER));

    program.write_all(b"ping").unwrap();
    let (header, data) = guest.expect(Op::Data);
    assert_eq!((header.src_cid, header.src_port), (2, socket.host_port));
    assert_eq!(data, b"ping");

    socket.send(&mut guest, b"pong");
    let mut answer = [0; 4];
    program.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"pong");
}

#[test]
fn guest_reaches_a_host_program() {
    let mut guest = Guest::new();
    let (mut program, mut socket) = open_from_guest(&mut guest);
    socket.send(&mut guest, b"ready\n");
    assert_eq!(read_line(&mut program), "ready");
    program.write_all(b"fine").unwrap();
    assert_eq!(guest.expect(Op::Data).1, b"fine");
}

#[test]
fn data_right_behind_the_greeting_is_not_lost() {
    let mut guest = Guest::new();
    let mut program = guest.connect();
    program.write_all(b"CONNECT 80\nGET /").unwrap();
    program.shutdown(Shutdown::Write).unwrap();
    let socket = Socket::accept(&mut guest);
    assert_eq!(guest.expect(Op::Data).1, b"GET /");
    assert_eq!(guest.expect(Op::Shutdown).0.flags, SHUTDOWN_SEND);
    assert_eq!(read_line(&mut program), format!("OK {}", socket.host_port));
}

#[test]
fn program_that_leaves_after_writing_is_heard() {
    let mut guest = Guest::new();
    let mut program = guest.connect();
    program.write_all(b"CONNECT 80\nlast words").unwrap();
    drop(program);
    let socket = Socket::accept(&mut guest);
    let mut heard = Vec::new();
    let mut ended = 0;
    while ended != BOTH {
        let (header, data) = guest.receive();
        heard.extend(data);
        ended |= header.flags;
    }
    assert_eq!(heard, b"last words");
    guest.send(&socket.header(Op::Reset), &[]);
    assert_eq!(guest.device.muxer().peer_count(), 0);
}

#[test]
fn nobody_listens() {
    let mut guest = Guest::new();
    // In the guest.
    let mut program = guest.connect();
    program.write_all(b"CONNECT 9\n").unwrap();
    let (request, _) = guest.expect(Op::Request);
    guest.send(&request.reset_reply(), &[]);
    assert_eq!(program.read(&mut [0; 8]).unwrap(), 0);
    // On the host: no socket, and a socket that nobody serves.
    drop(UnixListener::bind(guest.socket_path("_8")).unwrap());
    for port in [7, 8] {
        guest.send(&Socket::new(5000, port).header(Op::Request), &[]);
        let (reset, _) = guest.expect(Op::Reset);
        assert_eq!((reset.src_port, reset.dst_port), (port, 5000));
    }
    assert_eq!(guest.device.muxer().peer_count(), 0);
}

#[test]
fn bad_greetings_end_the_connection() {
    let mut guest = Guest::new();
    for greeting in [
        "CONNECT\n",
        "CONNECT x\n",
        "GET / HTTP/1.1\r\n\r\n",
        "CONNECT 4294967295\n",
    ] {
        let mut program = guest.connect();
        program.write_all(greeting.as_bytes()).unwrap();
        guest.idle();
        // What it had still to say is dropped with the connection, which may show as a reset.
        assert_eq!(program.read(&mut [0; 8]).unwrap_or(0), 0, "{greeting:?}");
    }
    let mut program = guest.connect();
    program.write_all(b"CONN").unwrap();
    guest.idle();
    assert_eq!(guest.device.muxer().peer_count(), 1);
    program.shutdown(Shutdown::Write).unwrap();
    guest.idle();
    assert_eq!(guest.device.muxer().peer_count(), 0);
    assert!(guest.inbox.is_empty());
}

#[test]
fn megabytes_reach_the_host_intact() {
    for event_idx in [true, false] {
        let mut guest = Guest::powered_on(event_idx, LIMIT);
        guest.activate();
        let (mut program, mut socket) = open_from_guest(&mut guest);
        let sent = pattern(16 << 20);
        let reader = thread::spawn(move || {
            let mut got = Vec::new();
            program.read_to_end(&mut got).unwrap();
            got
        });
        let mut rest = &sent[..];
        while !rest.is_empty() {
            let len = rest.len().min(MAX_DATA).min(socket.credit() as usize);
            if len == 0 {
                let (update, _) = guest.expect(Op::CreditUpdate);
                socket.learn(&update);
            } else {
                socket.send(&mut guest, &rest[..len]);
                rest = &rest[len..];
            }
            while let Some((header, _)) = guest.inbox.pop_front() {
                socket.learn(&header);
            }
        }
        socket.shutdown(&mut guest, BOTH);
        while guest.receive().0.op != Op::Reset as u16 {}
        let got = guest.turn_until(|| reader.join().unwrap());
        assert!(got == sent);
        guest.idle();
        assert_eq!(guest.device.muxer().peer_count(), 0);
    }
}

#[test]
fn megabytes_reach_the_guest_intact_with_little_credit() {
    for event_idx in [true, false] {
        let mut guest = Guest::powered_on(event_idx, LIMIT);
        guest.activate();
        let (mut program, mut socket) = open_from_host(&mut guest);
        socket.buf_alloc = 10_000;
        let update = socket.header(Op::CreditUpdate);
        guest.send(&update, &[]);
        let sent = pattern(8 << 20);
        let bytes = sent.clone();
        let writer = thread::spawn(move || program.write_all(&bytes).unwrap());
        let mut got = Vec::new();
        loop {
            let (header, data) = guest.receive();
            match Op::from_number(header.op) {
                Some(Op::Data) => {
                    got.extend(data);
                    assert!((got.len() as u32).wrapping_sub(socket.fwd_cnt) <= socket.buf_alloc);
                    if got.len() as u32 - socket.fwd_cnt > socket.buf_alloc / 2 {
                        socket.fwd_cnt = got.len() as u32;
                        let update = socket.header(Op::CreditUpdate);
                        guest.send(&update, &[]);
                    }
                }
                Some(Op::CreditRequest) => {
                    socket.fwd_cnt = got.len() as u32;
                    let update = socket.header(Op::CreditUpdate);
                    guest.send(&update, &[]);
                }
                Some(Op::Shutdown) if header.flags & SHUTDOWN_SEND != 0 => break,
                Some(Op::Shutdown) => {}
                other => panic!("{other:?}"),
            }
        }
        writer.join().unwrap();
        assert!(got == sent);
    }
}

#[test]
fn each_direction_ends_by_itself() {
    let mut guest = Guest::new();
    let (mut program, mut socket) = open_from_host(&mut guest);

    socket.send(&mut guest, b"all I had");
    socket.shutdown(&mut guest, SHUTDOWN_SEND);
    let mut heard = Vec::new();
    program.read_to_end(&mut heard).unwrap();
    assert_eq!(heard, b"all I had");

    program.write_all(b"still here").unwrap();
    assert_eq!(guest.expect(Op::Data).1, b"still here");
    program.shutdown(Shutdown::Write).unwrap();
    guest.idle();
    // Both directions are over: the device says so, and the guest closes.
    while guest.expect(Op::Shutdown).0.flags != BOTH {}
    guest.send(&socket.header(Op::Reset), &[]);
    assert_eq!(guest.device.muxer().peer_count(), 0);
}

#[test]
fn guest_that_stops_receiving_stops_the_program() {
    let mut guest = Guest::new();
    let (mut program, socket) = open_from_host(&mut guest);
    socket.shutdown(&mut guest, SHUTDOWN_RECEIVE);
    let error = program.write_all(b"anybody?").unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::BrokenPipe);
    assert!(guest.inbox.is_empty());
}

#[test]
fn program_that_goes_away_ends_both_directions() {
    let mut guest = Guest::new();
    let (program, mut socket) = open_from_host(&mut guest);
    drop(program);
    let mut flags = 0;
    while flags != BOTH {
        flags |= guest.expect(Op::Shutdown).0.flags;
    }
    // Under way before the guest knew: dropped, not refused.
    socket.send(&mut guest, b"too late");
    guest.idle();
    assert!(guest.inbox.is_empty());
    guest.send(&socket.header(Op::Reset), &[]);
    assert_eq!(guest.device.muxer().peer_count(), 0);
}

#[test]
fn guest_that_resets_ends_the_program() {
    let mut guest = Guest::new();
    let (mut program, socket) = open_from_host(&mut guest);
    guest.send(&socket.header(Op::Reset), &[]);
    assert_eq!(program.read(&mut [0]).unwrap(), 0);
    guest.idle();
    assert!(guest.inbox.is_empty(), "a reset is not answered");
}

#[test]
fn early_programs_wait_for_the_driver() {
    let mut guest = Guest::powered_on(true, LIMIT);
    let mut program = guest.connect();
    program.write_all(b"CONNECT 1024\n").unwrap();
    assert!(!guest.wants_turn());
    guest.activate();
    let socket = Socket::accept(&mut guest);
    assert_eq!(read_line(&mut program), format!("OK {}", socket.host_port));
}

#[test]
fn reset_drops_all_connections_and_the_next_driver_starts_afresh() {
    let mut guest = Guest::new();
    let (mut program, mut socket) = open_from_host(&mut guest);
    socket.send(&mut guest, b"x");
    let mut silent = guest.connect();
    guest.idle();
    guest.device.reset();
    assert_eq!(program.read(&mut [0; 2]).unwrap(), 1);
    assert_eq!(program.read(&mut [0; 2]).unwrap(), 0);
    assert_eq!(silent.read(&mut [0]).unwrap(), 0);
    let mut early = guest.connect();
    early.write_all(b"CONNECT 3\n").unwrap();
    assert!(!guest.wants_turn());

    guest.activate();
    assert_eq!(Socket::accept(&mut guest).port, 3);
    guest.send(&socket.header(Op::CreditRequest), &[]);
    guest.expect(Op::Reset);
}

#[test]
fn stray_packets_are_refused() {
    let mut guest = Guest::new();
    let socket = Socket::new(1, 2);
    for op in [
        Op::Response,
        Op::Shutdown,
        Op::Data,
        Op::CreditUpdate,
        Op::CreditRequest,
    ] {
        guest.send(&socket.header(op), &[]);
        guest.expect(Op::Reset);
    }
    let elsewhere = Header {
        dst_cid: 7,
        ..socket.header(Op::Request)
    };
    guest.send(&elsewhere, &[]);
    assert_eq!(guest.expect(Op::Reset).0.src_cid, 7);
    let datagram = Header {
        kind: 3,
        ..socket.header(Op::Data)
    };
    guest.send(&datagram, &[]);
    assert_eq!(guest.expect(Op::Reset).0.kind, 3);
    let forged = Header {
        src_cid: CID + 1,
        ..socket.header(Op::Request)
    };
    guest.send(&forged, &[]);
    guest.send(&socket.header(Op::Reset), &[]);
    guest.idle();
    assert!(guest.inbox.is_empty());
}

#[test]
fn broken_packets_harm_only_their_connection() {
    let mut guest = Guest::new();
    let (mut victim, mut innocent) = open_from_host(&mut guest);
    let cases = [
        Header {
            op: 99,
            ..Header::default()
        },
        Header {
            op: Op::Data as u16,
            len: MAX_DATA as u32 + 1,
            ..Header::default()
        },
        Header {
            op: Op::Data as u16,
            len: 5,
            ..Header::default()
        },
        Header {
            op: Op::Request as u16,
            ..Header::default()
        },
    ];
    for case in cases {
        let (mut program, socket) = open_from_host(&mut guest);
        let header = Header {
            op: case.op,
            len: case.len,
            ..socket.header(Op::Data)
        };
        guest.send(&header, &[]);
        guest.expect(Op::Reset);
        assert_eq!(program.read(&mut [0]).unwrap(), 0);
    }
    innocent.send(&mut guest, b"unharmed");
    let mut got = [0; 8];
    victim.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"unharmed");
    assert_eq!(guest.device.muxer().peer_count(), 1);
}
