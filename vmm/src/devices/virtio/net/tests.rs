use std::io::IoSlice;
use std::os::fd::OwnedFd;

use proptest::prelude::*;
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType};

use super::*;
use crate::devices::virtio::testing::{BUFFERS, Driver, Piece, is_ready, readable, writable};

mod host;
mod pairs;

const QUEUE_SIZE: u16 = 256;
const RECEIVE_QUEUE: usize = 0;
const TRANSMIT_QUEUE: usize = 1;

const MRG_RXBUF: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;
const FRAME: [u8; 60] = [0x5a; 60];

/// A machine with one network card, and the other end of its tap.
struct Machine {
    driver: Driver,
    net: Net,
    wire: OwnedFd,
}

/// A socket in place of a tap, and its other end.
fn fake_tap() -> (Tap, OwnedFd) {
    let (tap, wire) = rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )
    .unwrap();
    (Tap::fake(tap), wire)
}

impl Machine {
    fn new(features: u64) -> Self {
        Self::with_config(features, &NetConfig::default())
    }

    fn with_config(features: u64, config: &NetConfig) -> Self {
        let (tap, wire) = fake_tap();
        let mut driver = Driver::new(false);
        let mut net = Net::with_taps(vec![tap], config).unwrap();
        driver.activate(&mut net, features);
        Self { driver, net, wire }
    }

    /// Puts a frame on the wire, with the ten bytes of header that a tap writes.
    fn send(&self, frame: &[u8]) {
        let header = [0; HEADER_SIZE];
        rustix::io::writev(&self.wire, &[IoSlice::new(&header), IoSlice::new(frame)]).unwrap();
    }

    /// What the guest put on the wire, with its header.
    fn sent(&self) -> Option<Vec<u8>> {
        let mut bytes = vec![0; 1 << 17];
        let (_, len) = rustix::net::recv(&self.wire, &mut bytes[..], RecvFlags::empty()).ok()?;
        bytes.truncate(len);
        Some(bytes)
    }

    fn offer(&mut self, pieces: &[Piece]) -> u16 {
        self.driver.add(RECEIVE_QUEUE, pieces)
    }

    fn tap_event(&mut self) {
        self.net
            .process_source(TOKEN_FIRST_TAP, EventSet::IN)
            .unwrap();
    }

    fn received(&mut self) -> Vec<(u16, u32)> {
        self.driver.used(RECEIVE_QUEUE)
    }
}

#[test]
fn a_frame_lands_in_the_first_buffer_and_raises_one_interrupt() {
    let mut machine = Machine::new(0);
    machine.driver.write(BUFFERS, &[0xff; 2048]);
    let head = machine.offer(&[writable(BUFFERS, 1526)]);
    machine.net.process_queue(RECEIVE_QUEUE).unwrap();
    assert_eq!(machine.received(), []);

    machine.send(&FRAME);
    machine.tap_event();
    assert_eq!(machine.received(), [(head, 72)]);
    assert_eq!(machine.driver.interrupts(), 1);
    assert_eq!(machine.driver.read(BUFFERS + 10, 2), [1, 0]);
    assert_eq!(machine.driver.read(BUFFERS + 12, 60), FRAME);
    assert_eq!(machine.driver.read(BUFFERS + 72, 100), [0xff; 100]);
}

#[test]
fn a_large_frame_is_spread_over_buffers() {
    let mut machine = Machine::new(MRG_RXBUF);
    // Each is less than what it takes, and the first cuts the header in two.
    machine.offer(&[writable(BUFFERS, 11), writable(BUFFERS + 0x800, 489)]);
    for index in 1..6 {
        machine.offer(&[writable(BUFFERS + index * 0x1000, 500)]);
    }
    let frame: Vec<u8> = (0..1300_u32).map(|n| n as u8).collect();
    machine.send(&frame);
    machine.send(&FRAME);
    machine.tap_event();

    assert_eq!(machine.received(), [(0, 500), (2, 500), (3, 312)]);
    assert_eq!(machine.driver.interrupts(), 1);
    assert_eq!(machine.driver.read(BUFFERS + 10, 1), [3]);
    assert_eq!(machine.driver.read(BUFFERS + 0x800, 1), [0]);
    let mut got = machine.driver.read(BUFFERS + 0x801, 488);
    got.extend(machine.driver.read(BUFFERS + 0x1000, 500));
    got.extend(machine.driver.read(BUFFERS + 0x2000, 312));
    assert_eq!(got, frame);

    // What is left holds no frame of the largest size, so the second frame waits for more room.
    machine.offer(&[writable(BUFFERS + 0x6000, 1000)]);
    machine.net.process_queue(RECEIVE_QUEUE).unwrap();
    assert_eq!(machine.received(), [(4, 72)]);
    assert_eq!(machine.driver.read(BUFFERS + 0x3000 + 10, 2), [1, 0]);
}

#[test]
fn frames_wait_for_buffers_without_another_event_of_the_tap() {
    let mut machine = Machine::new(0);
    for _ in 0..3 {
        machine.send(&FRAME);
    }
    machine.tap_event();
    machine.offer(&[writable(BUFFERS, 1526)]);
    machine.net.process_queue(RECEIVE_QUEUE).unwrap();
    assert_eq!(machine.received().len(), 1);
    machine.offer(&[writable(BUFFERS, 1526)]);
    machine.offer(&[writable(BUFFERS, 1526)]);
    machine.net.process_queue(RECEIVE_QUEUE).unwrap();
    assert_eq!(machine.received().len(), 2);
}

#[test]
fn a_frame_that_does_not_fit_is_dropped_and_the_next_one_comes() {
    let mut machine = Machine::new(0);
    machine.driver.write(BUFFERS + 100, &[0xee; 8]);
    let head = machine.offer(&[writable(BUFFERS, 100)]);
    machine.send(&[1; 200]);
    machine.send(&FRAME);
    machine.tap_event();
    assert_eq!(machine.received(), [(head, 72)]);
    assert_eq!(machine.driver.read(BUFFERS + 12, 60), FRAME);
    assert_eq!(machine.driver.read(BUFFERS + 100, 8), [0xee; 8]);
}

#[test]
fn a_driver_with_few_small_buffers_still_receives() {
    let mut machine = Machine::new(MRG_RXBUF);
    // The whole queue holds less than the largest frame.
    for _ in 0..QUEUE_SIZE {
        machine.offer(&[writable(BUFFERS, 12)]);
    }
    machine.net.process_queue(RECEIVE_QUEUE).unwrap();
    machine.send(&FRAME);
    machine.tap_event();
    let used: Vec<_> = machine.received();
    assert_eq!(used.len(), 6);
    assert!(used.iter().all(|(_, len)| *len == 12));
}

#[test]
fn malformed_receive_buffers_come_back_empty() {
    let mut machine = Machine::new(0);
    machine.offer(&[readable(BUFFERS, 1526)]);
    machine.offer(&[writable(2 << 20, 1526)]);
    machine.offer(&[writable(BUFFERS, 11)]);
    machine.offer(&[writable(BUFFERS, 0)]);
    let good = machine.offer(&[writable(BUFFERS, 1526)]);
    machine.send(&FRAME);
    machine.tap_event();
    assert_eq!(
        machine.received(),
        [(0, 0), (1, 0), (2, 0), (3, 0), (good, 72)]
    );
}

#[test]
fn what_the_guest_sends_goes_out_in_one_piece() {
    let mut machine = Machine::new(0);
    machine.driver.write(BUFFERS, &[0; 12]);
    machine.driver.write(BUFFERS + 12, &[1; 14]);
    // Over the seam of two regions.
    machine.driver.write((1 << 20) - 20, &[2; 40]);
    let pieces = [
        readable(BUFFERS, 5),
        readable(BUFFERS + 5, 21),
        readable((1 << 20) - 20, 40),
    ];
    machine.driver.add(TRANSMIT_QUEUE, &pieces);
    machine
        .driver
        .add_indirect(TRANSMIT_QUEUE, BUFFERS + 0x1000, &pieces);
    machine.net.process_queue(TRANSMIT_QUEUE).unwrap();
    assert_eq!(machine.driver.used(TRANSMIT_QUEUE), [(0, 0), (3, 0)]);
    assert_eq!(machine.driver.interrupts(), 1);
    let expected = [&[0; 12][..], &[1; 14], &[2; 40]].concat();
    assert_eq!(machine.sent(), Some(expected.clone()));
    assert_eq!(machine.sent(), Some(expected));
    assert_eq!(machine.sent(), None);
}

#[test]
fn malformed_and_oversized_frames_are_dropped() {
    let mut machine = Machine::new(0);
    let frames: [&[Piece]; 4] = [
        &[readable(2 << 20, 64)],
        &[writable(BUFFERS, 64), readable(BUFFERS, 64)],
        &[readable(BUFFERS, LARGEST_UNSEGMENTED as u32 + 1)],
        &[readable(u64::MAX - 10, 64)],
    ];
    for frame in frames {
        machine.driver.add(TRANSMIT_QUEUE, frame);
    }
    machine.net.process_queue(TRANSMIT_QUEUE).unwrap();
    assert_eq!(machine.driver.used(TRANSMIT_QUEUE).len(), frames.len());
    assert_eq!(machine.sent(), None);
}

#[test]
fn a_full_wire_loses_frames_and_no_buffers() {
    let mut machine = Machine::new(0);
    for _ in 0..64 {
        machine
            .driver
            .add(TRANSMIT_QUEUE, &[readable(BUFFERS, 0x1_0000)]);
    }
    machine.net.process_queue(TRANSMIT_QUEUE).unwrap();
    assert_eq!(machine.driver.used(TRANSMIT_QUEUE).len(), 64);
    let sent = std::iter::from_fn(|| machine.sent()).count();
    assert!((1..64).contains(&sent), "{sent}");
}

#[test]
fn a_visit_ends_while_frames_still_come() {
    let mut machine = Machine::new(0);
    for _ in 0..200 {
        machine.offer(&[writable(BUFFERS, 1526)]);
        machine.send(&FRAME);
    }
    machine.tap_event();
    let first = machine.received().len();
    assert!((1..200).contains(&first), "{first}");
    let source = machine.net.sources()[0];
    assert!(is_ready(&source));
    machine
        .net
        .process_source(source.token, EventSet::IN)
        .unwrap();
    assert_eq!(first + machine.received().len(), 200);
    assert!(!is_ready(&source));
}

#[test]
fn a_lost_tap_leaves_the_device_running() {
    let mut machine = Machine::new(0);
    machine.offer(&[writable(BUFFERS, 1526)]);
    machine.driver.add(TRANSMIT_QUEUE, &[readable(BUFFERS, 64)]);
    rustix::net::shutdown(&machine.wire, rustix::net::Shutdown::Both).unwrap();
    machine.tap_event();
    machine.net.process_queue(TRANSMIT_QUEUE).unwrap();
    assert_eq!(machine.received(), []);
    assert_eq!(machine.driver.used(TRANSMIT_QUEUE), [(0, 0)]);
    // Nothing is tried again.
    assert!(!is_ready(&machine.net.sources()[0]));
}

#[test]
fn nothing_is_received_after_a_reset_until_the_next_activation() {
    let mut machine = Machine::new(MRG_RXBUF);
    machine.offer(&[writable(BUFFERS, 0x1000)]);
    machine.net.process_queue(RECEIVE_QUEUE).unwrap();
    machine.net.reset();
    assert!(machine.net.sources().is_empty());
    machine.send(&FRAME);
    machine.tap_event();
    assert_eq!(machine.received(), []);

    machine.driver.activate(&mut machine.net, 0);
    let head = machine.offer(&[writable(BUFFERS, 1526)]);
    machine.net.process_queue(RECEIVE_QUEUE).unwrap();
    assert_eq!(machine.received(), [(head, 72)]);
}

#[test]
fn the_configuration_space_holds_the_address() {
    let config = NetConfig {
        mac: Some("52:54:00:12:34:56".parse().unwrap()),
        ..NetConfig::default()
    };
    let net = Net::with_taps(vec![fake_tap().0], &config).unwrap();
    let mut space = [0; 8];
    net.read_config(0, &mut space);
    assert_eq!(space, [0x52, 0x54, 0x00, 0x12, 0x34, 0x56, 1, 0]);
}

#[test]
fn a_random_address_is_local_and_of_one_station() {
    for _ in 0..100 {
        let address = random_address().unwrap();
        assert_eq!(address[0] & 0b11, 0b10);
    }
    assert_ne!(random_address().unwrap(), random_address().unwrap());
}

#[test]
fn names_that_no_tap_can_have_are_refused() {
    for name in ["", "sixteen-letters!", "a/b", "tap%d", "a\0b"] {
        assert!(matches!(Tap::open(name, false), Err(TapError::Name { .. })));
    }
    assert!(matches!(
        Tap::open("no-such-tap", true),
        Err(TapError::Missing { .. })
    ));
    let file = std::fs::File::open("/dev/null").unwrap();
    assert!(matches!(
        Tap::duplicate(file.as_raw_fd()),
        Err(TapError::Flags)
    ));
    assert!(matches!(
        Tap::duplicate(1 << 20),
        Err(TapError::Descriptor { fd, .. }) if fd == 1 << 20
    ));
}

fn piece() -> impl Strategy<Value = Piece> {
    let addr = prop_oneof![
        6 => BUFFERS..BUFFERS + 0x4000,
        1 => (1_u64 << 20) - 600..(1 << 20) + 600,
        1 => any::<u64>(),
    ];
    let len = prop_oneof![8 => 0_u32..2000, 1 => any::<u32>()];
    (addr, len, any::<bool>()).prop_map(|(addr, len, writable)| Piece {
        addr,
        len,
        writable,
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Whatever the buffers: none comes back twice, none with more bytes than it has room for, and
    /// a frame that was delivered is whole.
    #[test]
    fn any_receive_buffers_are_survived(
        mergeable in any::<bool>(),
        chains in proptest::collection::vec(
            proptest::collection::vec(piece(), 1..5).prop_map(|mut pieces| {
                // Mostly as it should be.
                if pieces.len() < 4 {
                    pieces.iter_mut().for_each(|piece| piece.writable = true);
                }
                pieces
            }),
            0..20,
        ),
        frames in proptest::collection::vec(0_usize..1600, 0..6),
    ) {
        let mut machine = Machine::new(if mergeable { MRG_RXBUF } else { 0 });
        let mut room = std::collections::HashMap::new();
        for pieces in &chains {
            let head = machine.offer(pieces);
            room.insert(head, pieces.iter().map(|piece| u64::from(piece.len)).sum::<u64>());
        }
        for len in &frames {
            machine.send(&vec![0x5a; *len]);
        }
        machine.tap_event();
        let used = machine.received();
        let mut total = 0;
        for (head, len) in used {
            let room = room.remove(&head);
            prop_assert!(room.is_some_and(|room| u64::from(len) <= room));
            total += len as usize;
        }
        prop_assert!(total <= frames.iter().map(|len| len + HEADER_SIZE).sum());
    }

    /// Whatever the chain: it comes back, and at most one frame goes out.
    #[test]
    fn any_frame_is_survived(pieces in proptest::collection::vec(piece(), 1..8)) {
        let mut machine = Machine::new(0);
        let head = machine.driver.add(TRANSMIT_QUEUE, &pieces);
        machine.net.process_queue(TRANSMIT_QUEUE).unwrap();
        prop_assert_eq!(machine.driver.used(TRANSMIT_QUEUE), [(head, 0)]);
        let len: usize = pieces
            .iter()
            .filter(|piece| !piece.writable)
            .map(|piece| piece.len as usize)
            .sum();
        if let Some(sent) = machine.sent() {
            prop_assert_eq!(sent.len(), len);
            prop_assert!(machine.sent().is_none());
        }
    }
}
