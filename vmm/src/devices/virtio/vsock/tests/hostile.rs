//! A guest that means harm.

use std::os::unix::net::UnixListener;

use proptest::prelude::*;

use super::super::testing::{CID, Guest, Socket};
use crate::devices::virtio::vsock::device::{RX_QUEUE, TX_QUEUE};
use crate::devices::virtio::vsock::muxer::MAX_CONNECTIONS;
use crate::devices::virtio::vsock::packet::{Header, MAX_DATA, Op, TYPE_STREAM};
use crate::devices::virtio::{DeviceError, VirtioDevice};

#[test]
fn overrun_rings_stop_the_device_and_a_reset_revives_it() {
    for index in [RX_QUEUE, TX_QUEUE] {
        let mut guest = Guest::new();
        // Something to receive, so that the receive queue is looked at.
        guest.refill = false;
        for port in 0..64 {
            guest.transmit(&Socket::new(port, 9).header(Op::Request), &[], false);
        }
        if index == RX_QUEUE {
            guest.rx.overrun(&guest.memory);
        } else {
            guest.tx.overrun(&guest.memory);
        }
        let error = guest.device.process_queue(TX_QUEUE).unwrap_err();
        assert!(
            matches!(error, DeviceError::Queue { index: found, .. } if found == index),
            "{error:?}"
        );
        guest.device.reset();
        guest.refill = true;
        guest.activate();
        guest.send(&Socket::new(1, 9).header(Op::Request), &[]);
        guest.expect(Op::Reset);
    }
}

#[test]
fn unusable_buffers_are_given_back() {
    let mut guest = Guest::new();
    guest.refill = false;
    guest.handle_interrupt();
    // Outside of memory, too short, of the wrong direction.
    let free = guest.tx.free.len();
    for (addr, len, flags) in [
        (u64::MAX - 8, 100, 0),
        (0x20_0000, 43, 0),
        (0x20_0000, 44, 2),
    ] {
        let id = guest.tx.free.pop().unwrap();
        if guest.tx.add(&guest.memory, id, addr, len, flags) {
            guest.device.process_queue(TX_QUEUE).unwrap();
        }
    }
    guest.handle_interrupt();
    assert_eq!(guest.tx.free.len(), free);
    assert!(guest.inbox.is_empty());
}

#[test]
fn connections_opened_and_dropped_without_end_leave_nothing() {
    let mut guest = Guest::new();
    let service = UnixListener::bind(guest.socket_path("_5")).unwrap();
    service.set_nonblocking(true).unwrap();
    // No receive buffers: every response stays due.
    guest.refill = false;
    for port in 0..5000 {
        let socket = Socket::new(port, 5);
        guest.send(&socket.header(Op::Request), &[]);
        guest.send(&socket.header(Op::Reset), &[]);
        while service.accept().is_ok() {}
        assert_eq!(guest.device.muxer().peer_count(), 0);
    }
    assert!(guest.device.muxer().queued() <= 2 * MAX_CONNECTIONS);
    // Nor do answers pile up.
    for port in 0..5000 {
        guest.send(&Socket::new(port, 9).header(Op::Request), &[]);
    }
    assert!(guest.device.muxer().queued() <= 2 * MAX_CONNECTIONS);
}

/// A header that is often nearly right.
fn headers() -> impl Strategy<Value = (Header, usize)> {
    let header = (
        prop_oneof![9 => Just(CID), 1 => any::<u64>()],
        prop_oneof![9 => Just(2), 1 => any::<u64>()],
        0u32..4,
        prop_oneof![9 => 5u32..7, 1 => any::<u32>()],
        prop_oneof![9 => Just(TYPE_STREAM), 1 => any::<u16>()],
        prop_oneof![9 => 1u16..8, 1 => any::<u16>()],
        (
            prop_oneof![9 => 0u32..4, 1 => any::<u32>()],
            prop_oneof![9 => Just(0x1_0000u32), 1 => any::<u32>()],
            prop_oneof![9 => Just(0u32), 1 => any::<u32>()],
        ),
    );
    let len = prop_oneof![
        8 => (0usize..3000).prop_map(|len| (len as u32, len)),
        1 => Just((MAX_DATA as u32, MAX_DATA)),
        1 => (any::<u32>(), 0usize..100),
    ];
    (header, len).prop_map(|(header, (claimed, len))| {
        let (src_cid, dst_cid, src_port, dst_port, kind, op, (flags, buf_alloc, fwd_cnt)) = header;
        let header = Header {
            src_cid,
            dst_cid,
            src_port,
            dst_port,
            len: claimed,
            kind,
            op,
            flags,
            buf_alloc,
            fwd_cnt,
        };
        (header, len)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// No sequence of packets breaks the device, spins it, or makes it hold more than the
    /// buffers of its connections.
    #[test]
    fn any_packets(packets in prop::collection::vec(headers(), 1..200), reads in any::<bool>()) {
        let mut guest = Guest::new();
        let service = UnixListener::bind(guest.socket_path("_5")).unwrap();
        service.set_nonblocking(true).unwrap();
        let mut programs = Vec::new();
        for (header, len) in packets {
            // RST goes to whoever the packet claims to come from.
            let forged = header.src_cid != CID;
            guest.send(&header, &vec![0x5a; len]);
            guest.idle();
            if forged {
                prop_assert!(guest.inbox.is_empty());
            }
            guest.inbox.clear();
            while let Ok((program, _)) = service.accept() {
                program.set_nonblocking(true).unwrap();
                programs.push(program);
            }
            if reads {
                for program in &mut programs {
                    let _ = std::io::Read::read(program, &mut [0; 4096]);
                }
            }
            prop_assert!(guest.device.muxer().peer_count() <= programs.len());
            guest.check_bounds();
        }
        drop(programs);
        guest.idle();
        guest.device.reset();
        prop_assert_eq!(guest.device.muxer().peer_count(), 0);
    }
}
