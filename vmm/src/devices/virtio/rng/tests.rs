use std::io::Write;

use super::*;
use crate::devices::virtio::queue::VISIT_CHAINS;
use crate::devices::virtio::testing::{BUFFERS, Driver, is_ready, readable, writable};

fn urandom() -> Rng {
    Rng::new(&RngConfig::default()).unwrap()
}

fn distinct(bytes: &[u8]) -> usize {
    bytes.iter().collect::<std::collections::HashSet<_>>().len()
}

#[test]
fn fills_every_writable_buffer_and_says_how_much() {
    let mut driver = Driver::new(false);
    let mut rng = urandom();
    driver.activate(&mut rng, 0);
    // The second buffer reaches over the seam of two memory regions.
    let seam = (1 << 20) - 100;
    let head = driver.add(0, &[writable(BUFFERS, 64), writable(seam, 200)]);
    rng.process_queue(0).unwrap();

    assert_eq!(driver.used(0), [(head, 264)]);
    assert_eq!(driver.interrupts(), 1);
    assert!(distinct(&driver.read(BUFFERS, 64)) > 8);
    assert!(distinct(&driver.read(seam, 100)) > 8);
    assert!(distinct(&driver.read(1 << 20, 100)) > 8);
    assert_eq!(driver.read(BUFFERS + 64, 64), [0; 64]);
    assert_eq!(driver.read((1 << 20) + 100, 64), [0; 64]);
}

#[test]
fn a_large_request_gets_part_of_what_it_asked_for() {
    let mut driver = Driver::new(false);
    let mut rng = urandom();
    driver.activate(&mut rng, 0);
    driver.add(0, &[writable(BUFFERS, 0x1_8000)]);
    rng.process_queue(0).unwrap();
    assert_eq!(driver.used(0), [(0, MAX_REQUEST as u32)]);
    let end = BUFFERS + MAX_REQUEST as u64;
    assert_eq!(driver.read(end, 0x8000), [0; 0x8000]);
}

#[test]
fn malformed_requests_come_back_empty() {
    let mut driver = Driver::new(false);
    let mut rng = urandom();
    driver.activate(&mut rng, 0);
    driver.write(BUFFERS, &[7; 16]);
    driver.add(0, &[readable(BUFFERS, 16)]);
    driver.add(0, &[writable(BUFFERS, 16), readable(BUFFERS, 16)]);
    driver.add(0, &[writable(BUFFERS, 16), writable(5 << 20, 16)]);
    driver.add(0, &[writable(BUFFERS, 0)]);
    rng.process_queue(0).unwrap();
    assert_eq!(driver.used(0).iter().map(|(_, len)| len).sum::<u32>(), 0);
    assert_eq!(driver.read(BUFFERS, 16), [7; 16]);
}

#[test]
fn a_source_that_runs_dry_stops_the_device() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&[1; 10]).unwrap();
    let mut rng = Rng::new(&RngConfig {
        src: file.path().to_owned(),
    })
    .unwrap();
    let mut driver = Driver::new(false);
    driver.activate(&mut rng, 0);
    driver.add(0, &[writable(BUFFERS, 11)]);
    assert!(matches!(
        rng.process_queue(0),
        Err(DeviceError::Host { .. })
    ));
}

#[test]
fn a_missing_source_is_named() {
    let error = Rng::new(&RngConfig {
        src: "/nonexistent/random".into(),
    })
    .unwrap_err();
    assert!(error.to_string().contains("/nonexistent/random"));
}

#[test]
fn leftover_chains_wait_for_the_next_turn() {
    let mut driver = Driver::new(true);
    let mut rng = urandom();
    // The queue is as long as a visit: it takes two lots to leave something over.
    driver.activate(&mut rng, 0);
    for _ in 0..VISIT_CHAINS {
        driver.add(0, &[writable(BUFFERS, 8)]);
    }
    rng.process_queue(0).unwrap();
    assert_eq!(driver.used(0).len(), VISIT_CHAINS);
    // The visit ended at its limit, without looking whether more has come.
    let [source] = rng.sources()[..] else {
        panic!("one source");
    };
    assert!(is_ready(&source));

    driver.add(0, &[writable(BUFFERS, 8)]);
    rng.process_source(source.token, EventSet::IN).unwrap();
    assert_eq!(driver.used(0).len(), 1);
    assert!(!is_ready(&source));
}

#[test]
fn the_interrupt_waits_for_the_used_event() {
    let mut driver = Driver::new(true);
    let mut rng = urandom();
    driver.activate(&mut rng, 0);
    driver.set_used_event(0, 2);
    driver.add(0, &[writable(BUFFERS, 8)]);
    driver.add(0, &[writable(BUFFERS, 8)]);
    rng.process_queue(0).unwrap();
    assert_eq!(driver.interrupts(), 0);
    driver.add(0, &[writable(BUFFERS, 8)]);
    rng.process_queue(0).unwrap();
    assert_eq!(driver.interrupts(), 1);
}

#[test]
fn an_impossible_available_index_is_the_drivers_fault() {
    let mut driver = Driver::new(false);
    let mut rng = urandom();
    driver.activate(&mut rng, 0);
    driver.set_avail_index(0, QUEUE_SIZE + 1);
    assert!(matches!(
        rng.process_queue(0),
        Err(DeviceError::Queue { index: 0, .. })
    ));
}

#[test]
fn nothing_is_touched_after_a_reset() {
    let mut driver = Driver::new(false);
    let mut rng = urandom();
    driver.activate(&mut rng, 0);
    driver.add(0, &[writable(BUFFERS, 8)]);
    rng.reset();
    rng.process_queue(0).unwrap();
    assert_eq!(driver.used(0), []);
    assert!(rng.sources().is_empty());
}
