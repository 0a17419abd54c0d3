//! Several pairs of queues, the control queue, limits, rest and counters.

use std::time::Instant;

use virtio_bindings::virtio_net::{VIRTIO_NET_ERR, VIRTIO_NET_OK};

use super::*;
use crate::devices::virtio::testing::wait_readable;
use crate::rate_limiter::{RateLimiterConfig, TokenBucketConfig};

const MQ: u64 = 1 << VIRTIO_NET_F_MQ | 1 << VIRTIO_NET_F_CTRL_VQ;
const COMMAND: u64 = BUFFERS + 0x3_0000;

/// A machine with a card of three pairs.
struct Several {
    driver: Driver,
    net: Net,
    wires: Vec<OwnedFd>,
}

impl Several {
    fn new(features: u64) -> Self {
        let (taps, wires) = (0..3).map(|_| fake_tap()).unzip();
        let mut driver = Driver::new(false);
        let config = NetConfig {
            num_queues: 6,
            queue_size: 64,
            ..NetConfig::default()
        };
        let mut net = Net::with_taps(taps, &config).unwrap();
        driver.activate(&mut net, features);
        Self { driver, net, wires }
    }

    /// Gives a command on queue `queue` and returns the answer and the used length.
    fn command(&mut self, queue: usize, bytes: &[u8]) -> (u32, u32) {
        self.driver.write(COMMAND, bytes);
        self.driver.write(COMMAND + 64, &[0xff]);
        let chain = [
            readable(COMMAND, bytes.len() as u32),
            writable(COMMAND + 64, 1),
        ];
        self.driver.add(queue, &chain);
        self.net.process_queue(queue).unwrap();
        let used = self.driver.used(queue);
        assert_eq!(used.len(), 1);
        (self.driver.read(COMMAND + 64, 1)[0].into(), used[0].1)
    }

    fn use_pairs(&mut self, pairs: u16) -> u32 {
        let [low, high] = pairs.to_le_bytes();
        self.command(6, &[4, 0, low, high]).0
    }

    fn offer(&mut self, pair: usize) {
        let addr = BUFFERS + 0x1000 * pair as u64;
        self.driver.add(2 * pair, &[writable(addr, 1526)]);
        self.net.process_queue(2 * pair).unwrap();
    }

    /// A frame comes in on queue `queue` of the tap.
    fn arrive(&mut self, queue: usize) {
        let wire = &self.wires[queue];
        rustix::io::write(wire, &[[0; HEADER_SIZE].as_slice(), &FRAME].concat()).unwrap();
        let token = TOKEN_FIRST_TAP + queue as u32;
        self.net.process_source(token, EventSet::IN).unwrap();
    }

    /// How many frames each receive queue has got since the last call.
    fn received(&mut self) -> [usize; 3] {
        [0, 1, 2].map(|pair| self.driver.used(2 * pair).len())
    }
}

#[test]
fn frames_for_pairs_that_are_not_used_go_to_those_that_are() {
    let mut machine = Several::new(MQ);
    assert_eq!(machine.net.queue_max_sizes(), [64; 7]);
    assert_eq!(machine.net.features() & MQ, MQ);
    let mut pairs = [0; 2];
    machine.net.read_config(8, &mut pairs);
    assert_eq!(pairs, [3, 0]);
    for _ in 0..20 {
        (0..3).for_each(|pair| machine.offer(pair));
    }
    let arrivals = |machine: &mut Several| {
        (0..3).for_each(|queue| machine.arrive(queue));
        machine.received()
    };
    assert_eq!(arrivals(&mut machine), [3, 0, 0]);
    assert_eq!(machine.use_pairs(2), VIRTIO_NET_OK);
    assert_eq!(arrivals(&mut machine), [2, 1, 0]);
    assert_eq!(machine.use_pairs(3), VIRTIO_NET_OK);
    assert_eq!(arrivals(&mut machine), [1, 1, 1]);
    assert_eq!(machine.use_pairs(1), VIRTIO_NET_OK);
    assert_eq!(arrivals(&mut machine), [3, 0, 0]);
    assert_eq!(machine.net.counters()["rx_frames"], 12);

    machine.net.reset();
    machine.driver.activate(&mut machine.net, MQ);
    machine.offer(0);
    machine.offer(1);
    machine.arrive(1);
    assert_eq!(machine.received(), [1, 0, 0]);
}

#[test]
fn a_frame_that_waits_finds_its_way_when_another_pair_is_used() {
    let mut machine = Several::new(MQ);
    machine.offer(1);
    machine.arrive(1);
    assert_eq!(machine.received(), [0, 0, 0]);
    assert_eq!(machine.use_pairs(2), VIRTIO_NET_OK);
    assert_eq!(machine.received(), [0, 1, 0]);
}

#[test]
fn what_each_pair_sends_goes_out_on_its_own_queue_of_the_tap() {
    let mut machine = Several::new(MQ);
    machine.driver.write(BUFFERS, &[0; 100]);
    for pair in 0..3 {
        machine.driver.write(BUFFERS + 12, &[pair as u8; 20]);
        machine.driver.add(2 * pair + 1, &[readable(BUFFERS, 32)]);
        machine.net.process_queue(2 * pair + 1).unwrap();
        let mut bytes = [0; 100];
        let len = rustix::io::read(&machine.wires[pair], &mut bytes).unwrap();
        assert_eq!(bytes[12..len], [pair as u8; 20]);
    }
    let counters = machine.net.counters();
    assert_eq!((counters["tx_frames"], counters["tx_bytes"]), (3, 60));
}

#[test]
fn a_driver_that_knows_of_one_pair_finds_the_control_queue_behind_it() {
    let mut machine = Several::new(1 << VIRTIO_NET_F_CTRL_VQ);
    let command = |machine: &mut Several, pairs| machine.command(2, &[4, 0, pairs, 0]);
    assert_eq!(command(&mut machine, 1), (VIRTIO_NET_OK, 1));
    assert_eq!(command(&mut machine, 2), (VIRTIO_NET_ERR, 1));
    machine.offer(0);
    machine.arrive(2);
    assert_eq!(machine.driver.used(0).len(), 1);

    // Without a control queue there are two queues, and the others are dead.
    let mut machine = Several::new(0);
    machine.driver.write(COMMAND, &[4, 0, 2, 0]);
    let chain = [readable(COMMAND, 4), writable(COMMAND + 64, 1)];
    for queue in 2..7 {
        machine.driver.add(queue, &chain);
        machine.net.process_queue(queue).unwrap();
        assert_eq!(machine.driver.used(queue), []);
    }
}

#[test]
fn commands_that_cannot_be_are_answered_with_an_error() {
    let mut machine = Several::new(MQ);
    for pairs in [0, 4, u16::MAX] {
        assert_eq!(machine.use_pairs(pairs), VIRTIO_NET_ERR);
    }
    // Incomplete, unknown command, unknown class, nothing.
    for bytes in [&[4, 0, 1][..], &[4, 1, 1, 0], &[0, 0, 1], &[4], &[]] {
        assert_eq!(machine.command(6, bytes), (VIRTIO_NET_ERR, 1), "{bytes:?}");
    }
    // No room for an answer.
    machine.driver.add(6, &[readable(COMMAND, 4)]);
    machine.net.process_queue(6).unwrap();
    assert_eq!(machine.driver.used(6).len(), 1);
    assert_eq!(machine.use_pairs(2), VIRTIO_NET_OK);
}

#[test]
fn offloads_are_offered_as_configured() {
    let offered = |config: NetConfig| {
        let (tap, _wire) = fake_tap();
        let features = features(&[tap], &config);
        [
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_HOST_TSO6,
            VIRTIO_NET_F_HOST_UFO,
        ]
        .map(|feature| features & 1 << feature != 0)
    };
    let all = NetConfig::default;
    assert_eq!(offered(all()), [true; 4]);
    let no_tso = NetConfig {
        offload_tso: false,
        ..all()
    };
    assert_eq!(offered(no_tso), [true, false, false, true]);
    let no_ufo = NetConfig {
        offload_ufo: false,
        ..all()
    };
    assert_eq!(offered(no_ufo), [true, true, true, false]);
    let no_csum = NetConfig {
        offload_csum: false,
        ..all()
    };
    assert_eq!(offered(no_csum), [false; 4]);
}

/// 5 frames at once, then one in 5 ms.
fn limited() -> NetConfig {
    NetConfig {
        rate_limiter_config: Some(RateLimiterConfig {
            bandwidth: None,
            ops: Some(TokenBucketConfig {
                size: 5,
                one_time_burst: None,
                refill_time: 25,
            }),
        }),
        ..NetConfig::default()
    }
}

#[test]
fn frames_wait_for_the_rate_limit_in_both_directions() {
    let start = Instant::now();
    let mut machine = Machine::with_config(0, &limited());
    for _ in 0..13 {
        machine.offer(&[writable(BUFFERS, 1526)]);
        machine.send(&FRAME);
        machine.driver.add(TRANSMIT_QUEUE, &[readable(BUFFERS, 72)]);
    }
    machine.tap_event();
    machine.net.process_queue(TRANSMIT_QUEUE).unwrap();
    let (mut received, mut sent) = (0, 0);
    while received < 13 || sent < 13 {
        received += machine.received().len();
        sent += machine.driver.used(TRANSMIT_QUEUE).len();
        let timers = [
            (
                received,
                TOKEN_RECEIVE_TIMER,
                machine.net.receive_limiter.timer(),
            ),
            (
                sent,
                TOKEN_TRANSMIT_TIMER,
                machine.net.transmit_limiter.timer(),
            ),
        ];
        for (done, token, timer) in timers {
            if done < 13 {
                assert!(wait_readable(timer.unwrap(), -1));
                machine.net.process_source(token, EventSet::IN).unwrap();
            }
        }
    }
    assert!(start.elapsed().as_millis() >= 8 * 5);
    assert_eq!(std::iter::from_fn(|| machine.sent()).count(), 13);
}

#[test]
fn a_card_at_rest_holds_no_buffers() {
    let mut machine = Machine::new(MRG_RXBUF);
    let heads: Vec<_> = (0..4)
        .map(|n| machine.offer(&[writable(BUFFERS + n * 0x1000, 500)]))
        .collect();
    machine.tap_event();
    machine.net.process_queue(RECEIVE_QUEUE).unwrap();
    machine.net.pause().unwrap();
    assert_eq!(machine.received(), []);
    // As another device would, that knows the rings alone.
    machine.send(&[1; 600]);
    machine.net.process_queue(RECEIVE_QUEUE).unwrap();
    let expected = [(heads[0], 500), (heads[1], 112)];
    assert_eq!(machine.received(), expected);

    // With a malformed buffer among them they go back empty, but each goes back once.
    machine.offer(&[readable(BUFFERS, 500)]);
    let last = machine.offer(&[writable(BUFFERS, 500)]);
    machine.send(&FRAME);
    machine.tap_event();
    machine.net.pause().unwrap();
    let mut used = machine.received();
    used.sort_unstable();
    assert_eq!(used.len(), 4);
    used.dedup_by_key(|(head, _)| *head);
    assert_eq!(used.len(), 4);
    assert!(used.iter().any(|(head, _)| *head == last));
}

#[test]
fn what_is_lost_is_counted() {
    let mut machine = Machine::new(0);
    machine.offer(&[writable(BUFFERS, 100)]);
    machine.send(&[1; 200]);
    machine.tap_event();
    machine.driver.add(TRANSMIT_QUEUE, &[readable(2 << 20, 64)]);
    machine.net.process_queue(TRANSMIT_QUEUE).unwrap();
    let counters = machine.net.counters();
    let expected = [("rx_drops", 1), ("tx_drops", 1), ("rx_frames", 0)];
    for (name, count) in expected {
        assert_eq!(counters[name], count, "{name}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Whatever the command: it is answered if there is room, and the card goes on.
    #[test]
    fn any_command_is_survived(
        bytes in proptest::collection::vec(any::<u8>(), 0..10),
        pieces in proptest::collection::vec(piece(), 0..6),
    ) {
        let mut machine = Several::new(MQ);
        machine.driver.write(COMMAND, &bytes);
        let mut chain = vec![readable(COMMAND, bytes.len() as u32)];
        chain.extend(pieces);
        let head = machine.driver.add(6, &chain);
        machine.net.process_queue(6).unwrap();
        let used = machine.driver.used(6);
        prop_assert_eq!(used.len(), 1);
        prop_assert!(used[0].0 == head && used[0].1 <= 1);
        prop_assert!((1..=3).contains(&machine.net.active.as_ref().unwrap().used_pairs));
        prop_assert_eq!(machine.use_pairs(3), VIRTIO_NET_OK);
    }
}
