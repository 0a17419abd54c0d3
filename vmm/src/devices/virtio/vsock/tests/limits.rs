//! What bounds the device: memory, connections, work at a time, patience.

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use super::super::testing::{Guest, LIMIT, RX_BUFFER_LEN, Socket};
use super::streams::{BOTH, open_from_guest, open_from_host, read_line};
use crate::devices::virtio::vsock::muxer::{LARGE_BUFFER, MAX_CONNECTIONS, MAX_GREETINGS};
use crate::devices::virtio::vsock::packet::{MAX_DATA, Op};

#[test]
fn program_that_does_not_read_stalls_the_guest() {
    let mut guest = Guest::new();
    let (mut program, mut socket) = open_from_guest(&mut guest);
    let mut sent = Vec::new();
    // The socket of the host takes its share, then the buffer of the device fills.
    loop {
        while let Some((header, _)) = guest.inbox.pop_front() {
            socket.learn(&header);
        }
        let len = socket.credit().min(MAX_DATA as u32) as usize;
        if len == 0 {
            guest.idle();
            if guest.inbox.is_empty() {
                break;
            }
            continue;
        }
        let chunk = vec![(sent.len() % 251) as u8; len];
        socket.send(&mut guest, &chunk);
        sent.extend(chunk);
        assert!(sent.len() < 16 << 20, "nothing stalls the guest");
    }
    let buffered = guest.device.muxer().buffered();
    assert!(buffered > 0 && buffered <= LARGE_BUFFER as usize);

    // The guest closes; what it sent is read to the end, as late as the program likes.
    socket.shutdown(&mut guest, BOTH);
    guest.expect(Op::Reset);
    assert_eq!(guest.device.muxer().peer_count(), 1);
    let got = guest.turn_until(|| {
        let mut got = Vec::new();
        program.read_to_end(&mut got).unwrap();
        got
    });
    assert!(got == sent);
    assert_eq!(guest.device.muxer().peer_count(), 0);
}

#[test]
fn program_that_never_reads_and_leaves_frees_everything() {
    let mut guest = Guest::new();
    let (program, mut socket) = open_from_guest(&mut guest);
    while socket.credit() > 0 {
        let len = socket.credit().min(MAX_DATA as u32) as usize;
        socket.send(&mut guest, &vec![0; len]);
        guest.idle();
        while let Some((header, _)) = guest.inbox.pop_front() {
            socket.learn(&header);
        }
    }
    socket.shutdown(&mut guest, BOTH);
    guest.expect(Op::Reset);
    assert_eq!(guest.device.muxer().peer_count(), 1);
    drop(program);
    guest.idle();
    assert_eq!(guest.device.muxer().peer_count(), 0);
}

#[test]
fn nothing_spins_while_the_guest_gives_no_credit_or_buffers() {
    let mut guest = Guest::new();
    let (mut program, mut socket) = open_from_host(&mut guest);
    socket.buf_alloc = 0;
    let none = socket.header(Op::CreditUpdate);
    guest.send(&none, &[]);
    program.write_all(b"wait").unwrap();
    guest.idle();
    guest.expect(Op::CreditRequest);
    guest.send(&none, &[]);
    guest.idle();
    assert!(guest.inbox.is_empty(), "credit is asked for once");
    assert!(!guest.wants_turn());

    guest.refill = false;
    guest.rx.free.clear();
    socket.buf_alloc = 1000;
    let some = socket.header(Op::CreditUpdate);
    // Takes all buffers that are there.
    for _ in 0..100 {
        guest.send(&socket.header(Op::CreditRequest), &[]);
    }
    guest.send(&some, &[]);
    guest.idle();
    assert!(!guest.wants_turn());
    let without_buffers = guest.inbox.len();
    guest.offer_buffers(64);
    guest.handle_interrupt();
    guest.idle();
    let mut got = Vec::new();
    for (_, data) in guest.inbox.drain(..) {
        got.extend(data);
    }
    assert_eq!(got, b"wait");
    assert!(without_buffers <= 64);
}

#[test]
fn more_packets_than_one_turn_handles() {
    let mut guest = Guest::new();
    let count = 64;
    // Far more work for both queues than the budget of a turn, behind a single notification.
    guest.refill = false;
    for round in 0..8 {
        for index in 0..count {
            let socket = Socket::new(round * count + index, 9);
            guest.transmit(&socket.header(Op::Request), &[], index + 1 == count);
        }
        guest.idle();
    }
    guest.refill = true;
    let mut resets = 0;
    while resets < 8 * count {
        guest.offer_buffers(64);
        guest.handle_interrupt();
        guest.idle();
        resets += guest.inbox.drain(..).len() as u32;
    }
    assert_eq!(resets, 8 * count);
}

#[test]
fn connections_take_turns() {
    let mut guest = Guest::new();
    guest.refill = false;
    let mut programs = Vec::new();
    for _ in 0..4 {
        programs.push(open_from_host(&mut guest));
    }
    for (program, _) in &mut programs {
        program
            .write_all(&vec![0; 20 * RX_BUFFER_LEN as usize])
            .unwrap();
    }
    guest.idle();
    guest.inbox.clear();
    guest.offer_buffers(40);
    guest.handle_interrupt();
    guest.idle();
    let mut shares = std::collections::HashMap::<u32, usize>::new();
    for (header, _) in &guest.inbox {
        *shares.entry(header.src_port).or_default() += 1;
    }
    assert_eq!(shares.len(), 4);
    let (least, most) = (shares.values().min(), shares.values().max());
    assert!(most.unwrap() - least.unwrap() <= 1, "{shares:?}");
}

#[test]
fn five_hundred_connections_at_once() {
    raise_descriptor_limit();
    let mut guest = Guest::new();
    let mut open = Vec::new();
    for index in 0..500u32 {
        let mut program = guest.connect();
        program
            .write_all(format!("CONNECT {index}\n").as_bytes())
            .unwrap();
        let socket = Socket::accept(&mut guest);
        assert_eq!(socket.port, index);
        read_line(&mut program);
        open.push((program, socket));
    }
    for (program, socket) in &mut open {
        program.write_all(&socket.port.to_le_bytes()).unwrap();
    }
    for _ in 0..500 {
        let (header, data) = guest.expect(Op::Data);
        assert_eq!(data, header.dst_port.to_le_bytes());
    }
    for (program, socket) in &mut open {
        let answer = socket.port.to_be_bytes();
        socket.send(&mut guest, &answer);
        let mut got = [0; 4];
        program.read_exact(&mut got).unwrap();
        assert_eq!(got, answer);
        socket.shutdown(&mut guest, BOTH);
        assert_eq!(program.read(&mut got).unwrap(), 0);
    }
    assert_eq!(guest.device.muxer().peer_count(), 0);
}

#[test]
fn too_many_connections_wait_or_are_refused() {
    raise_descriptor_limit();
    let mut guest = Guest::new();
    let silent: Vec<_> = (0..MAX_GREETINGS)
        .map(|_| {
            let program = guest.connect();
            guest.idle();
            program
        })
        .collect();
    let mut waiting = guest.connect();
    waiting.write_all(b"CONNECT 5\n").unwrap();
    guest.idle();
    assert_eq!(guest.device.muxer().peer_count(), MAX_GREETINGS);
    assert!(guest.inbox.is_empty());
    drop(silent);
    assert_eq!(Socket::accept(&mut guest).port, 5);

    let service = UnixListener::bind(guest.socket_path("_6")).unwrap();
    let mut programs = Vec::new();
    for port in 1..MAX_CONNECTIONS as u32 {
        Socket::connect(&mut guest, port, 6);
        programs.push(service.accept().unwrap());
    }
    guest.send(&Socket::new(70000, 6).header(Op::Request), &[]);
    assert_eq!(guest.expect(Op::Reset).0.dst_port, 70000);
    assert_eq!(guest.device.muxer().peer_count(), MAX_CONNECTIONS);
}

/// Both ends of a connection are in this process.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let current = limit.maximum.map_or(8192, |maximum| maximum.min(8192));
    if limit.current.is_some_and(|soft| soft < current) {
        setrlimit(
            Resource::Nofile,
            Rlimit {
                current: Some(current),
                ..limit
            },
        )
        .unwrap();
    }
}

#[test]
fn patience_ends() {
    let mut guest = Guest::powered_on(true, Duration::from_secs(1));
    guest.activate();
    let (left, _socket) = open_from_host(&mut guest);
    // A program that says nothing.
    let mut silent = guest.connect();
    // A guest that does not answer the request.
    let mut program = guest.connect();
    program.write_all(b"CONNECT 1\n").unwrap();
    guest.expect(Op::Request);
    // A guest that does not answer the end.
    drop(left);
    let start = Instant::now();
    let mut resets = 0;
    while resets < 2 {
        resets += usize::from(guest.receive().0.op == Op::Reset as u16);
    }
    guest.turn_until(|| {
        assert_eq!(silent.read(&mut [0]).unwrap(), 0);
        assert_eq!(program.read(&mut [0]).unwrap(), 0);
    });
    assert!(start.elapsed() < LIMIT);
    assert_eq!(guest.device.muxer().peer_count(), 0);
    assert!(!guest.wants_turn(), "no timer is left");
}
