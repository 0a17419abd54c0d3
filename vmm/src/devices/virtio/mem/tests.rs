use proptest::prelude::*;
use vm_memory::Bytes;

use super::*;
use crate::devices::virtio::testing::{BUFFERS, Driver, readable, writable};
use crate::memory::testing::resident;

const START: u64 = 1 << 30;
const TOTAL: u64 = 8;
const SIZE: u64 = TOTAL * BLOCK_SIZE;
const ANSWER: u64 = BUFFERS + 0x1000;

const ACK: u16 = 0;
const NACK: u16 = 1;
const ERROR: u16 = 3;

/// A device with `requested` blocks asked for, and its driver. The first region of the driver's
/// memory holds rings and buffers.
fn active(requested: u64) -> (Driver, Mem) {
    let mut driver = Driver::new(false);
    let regions = [(0, 1 << 20), (START, SIZE)];
    let regions = regions.map(|(start, size)| (GuestAddress(start), size as usize));
    driver.memory = GuestMemory::from_ranges(&regions).unwrap();
    let mut mem = Mem::new(GuestAddress(START), SIZE, requested * BLOCK_SIZE);
    driver.activate(&mut mem, F_UNPLUGGED_INACCESSIBLE);
    (driver, mem)
}

/// Sends a request and returns the type and the state of the answer.
fn request(driver: &mut Driver, mem: &mut Mem, kind: u16, address: u64, count: u16) -> (u16, u16) {
    let mut bytes = [0; REQUEST_SIZE];
    bytes[..2].copy_from_slice(&kind.to_le_bytes());
    bytes[8..16].copy_from_slice(&address.to_le_bytes());
    bytes[16..18].copy_from_slice(&count.to_le_bytes());
    driver.write(BUFFERS, &bytes);
    driver.write(ANSWER, &[0xff; RESPONSE_SIZE]);
    let pieces = [
        readable(BUFFERS, REQUEST_SIZE as u32),
        writable(ANSWER, RESPONSE_SIZE as u32),
    ];
    let head = driver.add(0, &pieces);
    mem.process_queue(0).unwrap();
    assert_eq!(driver.used(0), [(head, RESPONSE_SIZE as u32)]);
    let answer = driver.read(ANSWER, RESPONSE_SIZE);
    let half = |at| u16::from_le_bytes([answer[at], answer[at + 1]]);
    (half(0), half(8))
}

fn block(index: u64) -> u64 {
    START + index * BLOCK_SIZE
}

fn config(mem: &Mem, offset: u64) -> u64 {
    let mut data = [0; 8];
    mem.read_config(offset, &mut data);
    u64::from_le_bytes(data)
}

#[test]
fn the_configuration_tells_the_region_and_what_is_asked_for() {
    let (mut driver, mut mem) = active(3);
    let (answer, _) = request(&mut driver, &mut mem, REQUEST_PLUG, block(1), 2);
    assert_eq!(answer, ACK);
    let fields = [0, 8, 16, 24, 32, 40, 48, 56].map(|offset| config(&mem, offset));
    let (plugged, requested) = (2 * BLOCK_SIZE, 3 * BLOCK_SIZE);
    assert_eq!(
        fields,
        [BLOCK_SIZE, 0, START, SIZE, SIZE, plugged, requested, 0]
    );
    assert_eq!(mem.counters()["region_bytes"], SIZE);
    assert_eq!(mem.counters()["plugged_bytes"], plugged);
    assert_eq!(mem.counters()["requested_bytes"], requested);
}

#[test]
fn the_requested_size_bounds_what_is_plugged() {
    let (mut driver, mut mem) = active(2);
    let mut plug = |mem: &mut Mem, index, count| {
        request(&mut driver, mem, REQUEST_PLUG, block(index), count).0
    };
    assert_eq!(plug(&mut mem, 0, 3), NACK);
    assert_eq!(plug(&mut mem, 0, 2), ACK);
    assert_eq!(plug(&mut mem, 4, 1), NACK);
    mem.control(Control::ResizeMemory { size: SIZE }).unwrap();
    assert_eq!(plug(&mut mem, 1, 2), ERROR, "one of them is plugged");
    assert_eq!(plug(&mut mem, 2, 6), ACK);
    assert_eq!(mem.counters()["plugged_bytes"], SIZE);

    for size in [BLOCK_SIZE + 1, SIZE + BLOCK_SIZE, u64::MAX] {
        let refused = mem.control(Control::ResizeMemory { size });
        assert!(matches!(refused, Err(ControlError::Refused(_))), "{size}");
    }
    let other = mem.control(Control::ResizeBalloon { size: 0 });
    assert!(matches!(other, Err(ControlError::NotSupported)));
    assert_eq!(config(&mem, 48), SIZE);
}

#[test]
fn unplugged_memory_goes_back_to_the_host() {
    let (mut driver, mut mem) = active(TOTAL);
    request(&mut driver, &mut mem, REQUEST_PLUG, START, TOTAL as u16);
    let fill = vec![7; SIZE as usize];
    let start = GuestAddress(START);
    driver.memory.write_slice(&fill, start).unwrap();
    assert_eq!(resident(&driver.memory, START, SIZE), SIZE);

    let (answer, _) = request(&mut driver, &mut mem, REQUEST_UNPLUG, block(2), 3);
    assert_eq!(answer, ACK);
    assert_eq!(resident(&driver.memory, START, SIZE), SIZE - 3 * BLOCK_SIZE);
    assert_eq!(resident(&driver.memory, block(2), 3 * BLOCK_SIZE), 0);
    let mut state =
        |mem: &mut Mem, index, count| request(&mut driver, mem, REQUEST_STATE, block(index), count);
    assert_eq!(state(&mut mem, 0, 2), (ACK, 0));
    assert_eq!(state(&mut mem, 2, 3), (ACK, 1));
    assert_eq!(state(&mut mem, 1, 2), (ACK, 2));
    assert_eq!(state(&mut mem, 7, 2).0, ERROR);
    let (answer, _) = request(&mut driver, &mut mem, REQUEST_UNPLUG, block(1), 2);
    assert_eq!(answer, ERROR, "one of them is not plugged");

    // A driver that starts anew finds its memory as it left it.
    mem.reset();
    driver.activate(&mut mem, F_UNPLUGGED_INACCESSIBLE);
    assert_eq!(config(&mem, 40), 5 * BLOCK_SIZE);
    let (answer, _) = request(&mut driver, &mut mem, REQUEST_UNPLUG_ALL, 0, 0);
    assert_eq!(answer, ACK);
    assert_eq!(resident(&driver.memory, START, SIZE), 0);
    assert_eq!(config(&mem, 40), 0);
}

#[test]
fn requests_that_mean_nothing_are_errors() {
    let (mut driver, mut mem) = active(TOTAL);
    for kind in [REQUEST_PLUG, REQUEST_UNPLUG, REQUEST_STATE, 4, u16::MAX] {
        for (address, count) in [
            (START, 0),
            (START + 4096, 1),
            (START - BLOCK_SIZE, 1),
            (block(7), 2),
            (block(8), 1),
            (START, u16::MAX),
            (0, 1),
            (!(BLOCK_SIZE - 1), u16::MAX),
        ] {
            let (answer, _) = request(&mut driver, &mut mem, kind, address, count);
            assert_eq!(answer, ERROR, "{kind} {address:#x} {count}");
        }
    }
    assert_eq!(mem.counters()["plugged_bytes"], 0);
}

#[test]
fn requests_without_room_come_back_unanswered() {
    let (mut driver, mut mem) = active(TOTAL);
    driver.write(BUFFERS, &[0; REQUEST_SIZE]);
    let whole = readable(BUFFERS, REQUEST_SIZE as u32);
    driver.add(0, &[whole]);
    driver.add(0, &[whole, writable(ANSWER, RESPONSE_SIZE as u32 - 1)]);
    driver.add(0, &[readable(BUFFERS, 23), writable(ANSWER, 16)]);
    driver.add(0, &[writable(ANSWER, 16)]);
    driver.add(0, &[whole, writable(1 << 20, 16)]);
    mem.process_queue(0).unwrap();
    let lengths: Vec<_> = driver.used(0).iter().map(|(_, length)| *length).collect();
    assert_eq!(lengths, [0; 5]);
    mem.reset();
    assert!(mem.sources().is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Against a list of blocks that follows the answers.
    #[test]
    fn any_requests_keep_to_the_requested_size_and_the_region(
        requests in prop::collection::vec(
            (0_u16..5, prop_oneof![(0_u64..10).prop_map(block), any::<u64>()], 0_u16..10),
            1..40),
        requested in 0..=TOTAL,
    ) {
        let (mut driver, mut mem) = active(requested);
        let mut plugged = [false; TOTAL as usize];
        for (kind, address, count) in requests {
            let (answer, _) = request(&mut driver, &mut mem, kind, address, count);
            if answer == ACK && kind == REQUEST_UNPLUG_ALL {
                plugged = [false; TOTAL as usize];
            } else if answer == ACK && kind != REQUEST_STATE {
                let first = ((address - START) / BLOCK_SIZE) as usize;
                plugged[first..first + usize::from(count)].fill(kind == REQUEST_PLUG);
            }
            let count = plugged.iter().filter(|plugged| **plugged).count() as u64;
            prop_assert_eq!(mem.counters()["plugged_bytes"], count * BLOCK_SIZE);
            prop_assert!(count <= requested);
        }
    }
}
