use proptest::prelude::*;

use super::*;
use crate::devices::virtio::testing::{BUFFERS, Driver, is_ready, readable, writable};
use crate::memory::discard::PAGE_SIZE;
use crate::memory::testing::resident;

/// A region of guest memory without rings or buffers.
const REGION: u64 = 3 << 20;
const REGION_SIZE: u64 = 1 << 20;
const DEFLATE: usize = 1;

fn balloon() -> Balloon {
    let config = BalloonConfig {
        size: 8 << 20,
        deflate_on_oom: true,
        free_page_reporting: true,
    };
    Balloon::new(&config, 64 << 20)
}

fn active(features: u64) -> (Driver, Balloon) {
    let mut driver = Driver::new(false);
    let mut balloon = balloon();
    driver.activate(&mut balloon, features);
    driver.write(REGION, &[7; REGION_SIZE as usize]);
    (driver, balloon)
}

/// Puts page frame numbers into a buffer.
fn write_frames(driver: &Driver, frames: &[u32]) -> u32 {
    let bytes: Vec<u8> = frames
        .iter()
        .flat_map(|frame| frame.to_le_bytes())
        .collect();
    driver.write(BUFFERS, &bytes);
    bytes.len() as u32
}

fn config(balloon: &Balloon) -> [u32; 2] {
    let mut data = [0; 8];
    balloon.read_config(0, &mut data);
    [0, 4].map(|at| u32::from_le_bytes(data[at..at + 4].try_into().unwrap()))
}

#[test]
fn inflation_gives_exactly_the_named_pages_to_the_host() {
    let (mut driver, mut balloon) = active(0);
    let first = (REGION >> FRAME_SHIFT) as u32;
    // In no order, once twice, and with a run in between.
    let frames = [first + 9, first + 3, first + 4, first + 5, first, first + 4];
    let length = write_frames(&driver, &frames);
    let head = driver.add(
        INFLATE,
        &[readable(BUFFERS, 8), readable(BUFFERS + 8, length - 8)],
    );
    balloon.process_queue(INFLATE).unwrap();

    assert_eq!(driver.used(INFLATE), [(head, 0)]);
    assert_eq!(driver.interrupts(), 1);
    assert_eq!(balloon.counters()["inflated_bytes"], 5 * PAGE_SIZE);
    let left = resident(&driver.memory, REGION, REGION_SIZE);
    assert_eq!(left, REGION_SIZE - 5 * PAGE_SIZE);
    for page in 0..12 {
        let content = driver.read(REGION + page * PAGE_SIZE, 1)[0];
        let given = [0, 3, 4, 5, 9].contains(&page);
        assert_eq!(content == 0, given, "page {page}");
    }

    // Deflation needs nothing but an answer.
    let head = driver.add(DEFLATE, &[readable(BUFFERS, length)]);
    balloon.process_queue(DEFLATE).unwrap();
    assert_eq!(driver.used(DEFLATE), [(head, 0)]);
}

#[test]
fn reported_memory_goes_back_to_the_host_if_reporting_was_agreed_on() {
    for (features, given) in [(F_REPORTING, REGION_SIZE / 2), (0, 0)] {
        let (mut driver, mut balloon) = active(features);
        let half = (REGION_SIZE / 4) as u32;
        let pieces = [
            writable(REGION, half),
            writable(REGION + REGION_SIZE / 2, half),
        ];
        let head = driver.add(REPORT, &pieces);
        balloon.process_queue(REPORT).unwrap();
        assert_eq!(driver.used(REPORT), [(head, 0)]);
        assert_eq!(balloon.counters()["reported_bytes"], given);
        let left = resident(&driver.memory, REGION, REGION_SIZE);
        assert_eq!(left, REGION_SIZE - given);
    }
}

#[test]
fn the_size_is_told_by_the_configuration_and_changed_within_the_memory() {
    let mut balloon = balloon();
    assert_eq!(balloon.features(), F_DEFLATE_ON_OOM | F_REPORTING);
    assert_eq!(config(&balloon), [2048, 0]);
    balloon
        .control(Control::ResizeBalloon { size: 64 << 20 })
        .unwrap();
    balloon.write_config(4, &100_u32.to_le_bytes());
    // The number of pages is the device's, and a part of a field is not written.
    balloon.write_config(0, &1_u32.to_le_bytes());
    balloon.write_config(4, &[1]);
    assert_eq!(config(&balloon), [16384, 100]);
    assert_eq!(balloon.counters()["target_bytes"], 64 << 20);
    assert_eq!(balloon.counters()["actual_bytes"], 100 << 12);

    let refused = balloon.control(Control::ResizeBalloon {
        size: (64 << 20) + 1,
    });
    assert!(matches!(refused, Err(ControlError::Refused(_))));
    let other = balloon.control(Control::ResizeDisk { size: 0 });
    assert!(matches!(other, Err(ControlError::NotSupported)));
    assert_eq!(config(&balloon), [16384, 100]);
    balloon.reset();
    assert_eq!(config(&balloon), [16384, 0]);
}

#[test]
fn malformed_requests_cost_nothing_and_come_back() {
    let (mut driver, mut balloon) = active(F_REPORTING);
    let first = (REGION >> FRAME_SHIFT) as u32;
    let length = write_frames(&driver, &[first]);
    // Numbers where the device writes, outside of memory, cut off; memory that is to be read.
    driver.add(INFLATE, &[writable(BUFFERS, length)]);
    driver.add(INFLATE, &[readable(5 << 20, length)]);
    driver.add(INFLATE, &[readable(BUFFERS, length - 1)]);
    balloon.process_queue(INFLATE).unwrap();
    driver.add(REPORT, &[readable(REGION, 4096)]);
    driver.add(REPORT, &[writable(REGION + 1, 4096)]);
    driver.add(REPORT, &[writable(REGION, !0xfff)]);
    balloon.process_queue(REPORT).unwrap();
    assert_eq!(driver.used(INFLATE).len(), 3);
    assert_eq!(driver.used(REPORT).len(), 3);
    assert_eq!(balloon.counters()["inflated_bytes"], 0);
    assert_eq!(balloon.counters()["reported_bytes"], 0);
}

#[test]
fn one_request_takes_so_many_pages_and_no_more() {
    let (mut driver, mut balloon) = active(0);
    let first = (REGION >> FRAME_SHIFT) as u32;
    let mut frames = vec![first; MAX_PAGES];
    frames.push(first + 1);
    let length = write_frames(&driver, &frames);
    driver.add(INFLATE, &[readable(BUFFERS, length)]);
    balloon.process_queue(INFLATE).unwrap();
    assert_eq!(balloon.counters()["inflated_bytes"], PAGE_SIZE);
    assert_eq!(driver.read(REGION + PAGE_SIZE, 1), [7]);
}

#[test]
fn nothing_is_touched_after_a_reset() {
    let (mut driver, mut balloon) = active(0);
    assert_eq!(balloon.sources().len(), 3);
    assert!(!is_ready(&balloon.sources()[0]));
    let length = write_frames(&driver, &[(REGION >> FRAME_SHIFT) as u32]);
    driver.add(INFLATE, &[readable(BUFFERS, length)]);
    balloon.reset();
    balloon.process_queue(INFLATE).unwrap();
    assert_eq!(driver.used(INFLATE), []);
    assert!(balloon.sources().is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_page_numbers_are_answered_and_only_guest_memory_is_given_back(
        frames in prop::collection::vec(
            prop_oneof![Just(u32::MAX), 0x300_u32..0x420, any::<u32>()], 0..600),
        cut in 0_u32..4,
    ) {
        let (mut driver, mut balloon) = active(0);
        let length = write_frames(&driver, &frames).saturating_sub(cut);
        driver.add(INFLATE, &[readable(BUFFERS, length)]);
        balloon.process_queue(INFLATE).unwrap();
        prop_assert_eq!(driver.used(INFLATE).len(), 1);
        let given = balloon.counters()["inflated_bytes"];
        prop_assert!(given <= (MAX_PAGES as u64) * PAGE_SIZE);
        // Where numbers of the region were named, no more than its pages have gone.
        let left = resident(&driver.memory, REGION, REGION_SIZE);
        prop_assert!(REGION_SIZE - left <= given);
    }

    #[test]
    fn any_reported_ranges_are_answered(
        ranges in prop::collection::vec((0_u64..8 << 20, any::<u32>()), 1..64),
    ) {
        let (mut driver, mut balloon) = active(F_REPORTING);
        // Above the rings, which the test reads afterwards.
        let pieces: Vec<_> = ranges
            .iter()
            .map(|(start, length)| writable((1 << 20) + start, *length))
            .collect();
        driver.add(REPORT, &pieces);
        balloon.process_queue(REPORT).unwrap();
        prop_assert_eq!(driver.used(REPORT).len(), 1);
    }

    #[test]
    fn runs_cover_just_the_named_pages(mut frames in prop::collection::vec(0_u32..64, 0..64)) {
        frames.sort_unstable();
        let mut covered: Vec<u32> = runs(&frames)
            .flat_map(|run| (run.start >> FRAME_SHIFT) as u32..(run.end >> FRAME_SHIFT) as u32)
            .collect();
        frames.dedup();
        prop_assert_eq!(&covered, &frames);
        covered.dedup();
        prop_assert_eq!(covered.len(), frames.len());
    }
}
