//! The device around the requests: several queues, limits, rest, reset, resize and failures.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek};
use std::os::fd::{FromRawFd, OwnedFd};
use std::time::Instant;

use super::*;
use crate::rate_limiter::{RateLimiterConfig, TokenBucketConfig};

/// The header of request `n` with its status behind it, and its data.
fn place(n: u64) -> (u64, u64, u64) {
    let header = BUFFERS + 0x2_0000 + n * 64;
    (header, header + 32, BUFFERS + 0x4_0000 + n * 512)
}

impl Machine {
    /// Offers request `n` for one sector, with buffers of its own.
    fn offer(&mut self, queue: usize, n: u64, kind: u32, sector: u64) -> u16 {
        let (header, status, data) = place(n);
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        bytes[8..].copy_from_slice(&sector.to_le_bytes());
        self.driver.write(header, &bytes);
        self.driver.write(status, &[0xff]);
        let data = if kind == VIRTIO_BLK_T_IN {
            writable(data, 512)
        } else {
            readable(data, 512)
        };
        let chain = [readable(header, 16), data, writable(status, 1)];
        self.driver.add(queue, &chain)
    }

    fn status(&self, n: u64) -> u8 {
        self.driver.read(place(n).1, 1)[0]
    }

    fn data(&self, n: u64) -> Vec<u8> {
        self.driver.read(place(n).2, 512)
    }
}

#[test]
fn queues_share_the_disk_and_each_gets_back_its_own_requests() {
    let dir = TempDir::new().unwrap();
    let mut machine = Machine::new(&DiskConfig {
        num_queues: 3,
        ..config(&raw_image(&dir, 200))
    });
    assert_ne!(machine.block.features() & 1 << VIRTIO_BLK_F_MQ, 0);
    assert_eq!(machine.config_field(34), [3, 0]);
    let mut offered = BTreeMap::<usize, Vec<u16>>::new();
    for n in 0..90 {
        let queue = n as usize % 3;
        let head = machine.offer(queue, n, VIRTIO_BLK_T_IN, n);
        offered.entry(queue).or_default().push(head);
    }
    for queue in 0..3 {
        machine.block.process_queue(queue).unwrap();
    }
    machine.settle();
    for (queue, heads) in offered {
        let mut used: Vec<_> = machine.driver.used(queue);
        used.sort_unstable();
        assert_eq!(
            used,
            heads.iter().map(|head| (*head, 513)).collect::<Vec<_>>()
        );
    }
    for n in 0..90 {
        assert_eq!(machine.status(n), OK);
        assert_eq!(machine.data(n), [n as u8; 512]);
    }
    assert_eq!(machine.block.counters()["read_bytes"], 90 * 512);
}

#[test]
fn what_many_threads_write_to_an_overlay_at_once_does_not_get_mixed_up() {
    const SECTORS: u64 = 4096;
    let dir = TempDir::new().unwrap();
    raw_image(&dir, 200);
    let path = overlay(&dir, "top.qcow2", SECTORS * 512, Some(("base.raw", "raw")));
    let disk = DiskConfig {
        num_queues: 4,
        ..qcow2(&path)
    };
    let mut model: Vec<u8> = (0..SECTORS).map(|sector| sector as u8).collect();
    model[200..].fill(0);
    let mut machine = Machine::new(&disk);
    let mut random = 1_u64;
    for round in 0..30 {
        // Writes of single sectors, many of them to clusters that are still those of the base,
        // with a flush and something that takes clusters away in between.
        let mut sectors = std::collections::BTreeSet::new();
        while sectors.len() < 100 {
            random = random.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            sectors.insert((random >> 33) % (128 * (round + 2)).min(SECTORS));
        }
        for (n, sector) in (0..).zip(&sectors) {
            let fill = (random >> 40) as u8 ^ n as u8;
            machine.driver.write(place(n).2, &[fill; 512]);
            machine.offer(n as usize % 4, n, VIRTIO_BLK_T_OUT, *sector);
            model[*sector as usize] = fill;
        }
        (0..4).for_each(|queue| machine.block.process_queue(queue).unwrap());
        if round % 3 == 0 {
            let last = SECTORS - 128 * (round % 8 + 1);
            let kind = VIRTIO_BLK_T_WRITE_ZEROES;
            machine.driver.used(0);
            machine.header(kind, 0);
            let mut segment = last.to_le_bytes().to_vec();
            segment.extend(128_u32.to_le_bytes());
            segment.extend(1_u32.to_le_bytes());
            machine.driver.write(DATA, &segment);
            let chain = [
                readable(HEADER, 16),
                readable(DATA, 16),
                writable(STATUS, 1),
            ];
            machine.driver.add(3, &chain);
            machine.settle();
            machine.block.process_queue(3).unwrap();
            machine.settle();
            assert_eq!(machine.driver.read(STATUS, 1), [OK]);
            model[last as usize..last as usize + 128].fill(0);
        }
        machine.settle();
        for n in 0..100 {
            assert_eq!(machine.status(n), OK, "request {n} of round {round}");
        }
        (0..4).for_each(|queue| drop(machine.driver.used(queue)));
        if round % 10 == 9 {
            drop(machine);
            machine = Machine::new(&disk);
        }
        for sector in (0..SECTORS).step_by(64) {
            let read = machine.sectors(sector, 64 * 512);
            for (at, sector_bytes) in read.chunks(512).enumerate() {
                let expected = model[sector as usize + at];
                let right = sector_bytes.iter().all(|byte| *byte == expected);
                assert!(right, "sector {} in round {round}", sector as usize + at);
            }
        }
    }
}

#[test]
fn a_chain_that_is_offered_over_and_over_is_under_way_no_more_than_fits() {
    let dir = TempDir::new().unwrap();
    let mut machine = Machine::new(&DiskConfig {
        queue_size: 16,
        ..config(&raw_image(&dir, 8))
    });
    let head = machine.offer(0, 0, VIRTIO_BLK_T_IN, 1);
    for _ in 1..16 {
        machine.driver.offer(0, head);
    }
    machine.block.process_queue(0).unwrap();
    for _ in 0..16 {
        machine.driver.offer(0, head);
    }
    // However fast the threads are: the rings learn of it only when the event loop is told.
    machine.block.process_queue(0).unwrap();
    let queue = &machine.block.active.as_ref().unwrap().queues[0];
    assert_eq!((queue.under_way, queue.full), (16, true));
    machine.settle();
    let queue = &machine.block.active.as_ref().unwrap().queues[0];
    assert_eq!((queue.under_way, queue.full), (0, false));
    assert_eq!(machine.block.counters()["read_ops"], 32);
}

#[test]
fn nothing_is_touched_after_a_reset() {
    let dir = TempDir::new().unwrap();
    let mut machine = Machine::new(&config(&raw_image(&dir, 200)));
    for n in 0..40 {
        machine.offer(0, n, VIRTIO_BLK_T_IN, n + 1);
    }
    machine.block.process_queue(0).unwrap();
    machine.block.reset();
    for n in 0..40 {
        machine.driver.write(place(n).1, &[0x77]);
        machine.driver.write(place(n).2, &[0x77; 512]);
    }
    assert!(machine.block.sources().is_empty());
    machine.block.pool.drain();
    machine
        .block
        .process_source(TOKEN_COMPLETED, EventSet::IN)
        .unwrap();
    for n in 0..40 {
        assert_eq!(machine.status(n), 0x77);
        assert_eq!(machine.data(n), [0x77; 512]);
    }
    assert_eq!(machine.driver.used(0), []);
    assert_eq!(machine.driver.interrupts(), 0);

    machine.driver.activate(&mut machine.block, FLUSH);
    assert_eq!(machine.sectors(3, 512), [3; 512]);
}

#[test]
fn a_device_at_rest_has_nothing_under_way() {
    let dir = TempDir::new().unwrap();
    let mut machine = Machine::new(&config(&raw_image(&dir, 200)));
    for n in 0..40 {
        machine.offer(0, n, VIRTIO_BLK_T_IN, n);
    }
    machine.block.process_queue(0).unwrap();
    machine.block.pause().unwrap();
    assert_eq!(machine.driver.used(0).len(), 40);
    assert_eq!(
        machine.block.active.as_ref().unwrap().queues[0].under_way,
        0
    );
    assert!(!machine.block.sources().iter().any(is_ready));
}

#[test]
fn the_capacity_follows_the_image() {
    let dir = TempDir::new().unwrap();
    let raw = raw_image(&dir, 8);
    // Its base is longer than it, and must not show when it grows.
    let top = overlay(&dir, "top.qcow2", 4 * 512, Some(("base.raw", "raw")));
    for (disk, old) in [(qcow2(&top), 4), (config(&raw), 8)] {
        let mut machine = Machine::new(&disk);
        let mut resize = |size| machine.block.control(Control::ResizeDisk { size });
        assert!(matches!(resize(0), Err(ControlError::Refused(_))));
        assert!(matches!(resize(1000), Err(ControlError::Refused(_))));
        resize(16 * 512).unwrap();
        assert_eq!(machine.capacity(), 16);
        assert_eq!(machine.sectors(old - 1, 512), [old as u8 - 1; 512]);
        assert_eq!(machine.sectors(old, 1024), [0; 1024]);
        assert_eq!(machine.write(15, &[0xaa; 512]), (OK, 1));

        machine
            .block
            .control(Control::ResizeDisk { size: 1024 })
            .unwrap();
        assert_eq!(machine.capacity(), 2);
        assert_eq!(machine.read(2, 512), (IOERR, 0));
        assert_eq!(machine.sectors(1, 512), [1; 512]);
        drop(machine);
        assert_eq!(Machine::new(&disk).capacity(), 2);
    }
    assert_eq!(std::fs::metadata(&raw).unwrap().len(), 1024);

    let mut machine = Machine::new(&DiskConfig {
        readonly: true,
        ..config(&raw)
    });
    for (control, supported) in [
        (Control::ResizeDisk { size: 512 }, true),
        (Control::ResizeBalloon { size: 512 }, false),
    ] {
        let refused = machine.block.control(control).unwrap_err();
        assert_eq!(matches!(refused, ControlError::Refused(_)), supported);
    }
}

#[test]
fn requests_wait_for_the_rate_limit_and_none_is_lost() {
    let dir = TempDir::new().unwrap();
    let bucket = |size, refill_time| {
        Some(TokenBucketConfig {
            size,
            one_time_burst: None,
            refill_time,
        })
    };
    let start = Instant::now();
    let mut machine = Machine::new(&DiskConfig {
        num_queues: 2,
        rate_limiter_config: Some(RateLimiterConfig {
            // 4 sectors at once, then one in 5 ms.
            bandwidth: bucket(4 * 512, 20),
            ops: bucket(1000, 1),
        }),
        ..config(&raw_image(&dir, 8))
    });
    for n in 0..12 {
        machine.offer(n as usize % 2, n, VIRTIO_BLK_T_IN, n % 8);
    }
    machine.block.process_queue(0).unwrap();
    machine.block.process_queue(1).unwrap();
    let mut used = 0;
    while used < 12 {
        machine.settle();
        used += machine.driver.used(0).len() + machine.driver.used(1).len();
        let timer = machine.block.limiter.timer().unwrap();
        if used < 12 {
            assert!(wait_readable(timer, -1));
        }
    }
    assert!(start.elapsed().as_millis() >= 8 * 5);
    for n in 0..12 {
        assert_eq!(machine.status(n), OK);
        assert_eq!(machine.data(n), [n as u8 % 8; 512]);
    }
}

#[test]
fn the_driver_chooses_whether_writes_are_cached() {
    const WCE: u64 = 1 << VIRTIO_BLK_F_CONFIG_WCE;
    let dir = TempDir::new().unwrap();
    let mut machine = Machine::new(&config(&raw_image(&dir, 8)));
    for (features, initial, after) in [
        (0, true, true),
        (FLUSH, false, false),
        (FLUSH | WCE, false, true),
        (WCE, false, true),
    ] {
        machine.block.reset();
        machine.driver.activate(&mut machine.block, features);
        assert_eq!(machine.block.disk.writethrough(), initial);
        assert_eq!(machine.config_field(32), [u8::from(!initial)]);
        // The other fields, and other widths, are read-only.
        let before: [u8; 64] = machine.config_field(0);
        machine.block.write_config(0, &[7]);
        machine.block.write_config(32, &[0; 4]);
        assert_eq!(machine.config_field(0), before);
        machine.block.write_config(32, &[0]);
        assert_eq!(machine.block.disk.writethrough(), after);
    }
}

#[test]
fn a_disk_past_the_page_cache_reads_and_writes_any_buffer() {
    // Not every file system can: that of the checkout can.
    let dir = TempDir::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let path = raw_image(&dir, 200);
    let mut machine = Machine::new(&DiskConfig {
        direct: true,
        ..config(&path)
    });
    machine.header(VIRTIO_BLK_T_IN, 5);
    // At an odd address.
    let chain = [
        readable(HEADER, 16),
        writable(DATA + 1, 512),
        writable(STATUS, 1),
    ];
    assert_eq!(machine.run(&chain), (OK, 513));
    assert_eq!(machine.driver.read(DATA + 1, 512), [5; 512]);
    assert_eq!(machine.write(7, &[0xaa; 1024]), (OK, 1));
    assert_eq!(machine.flush(), (OK, 1));
    let written = std::fs::read(&path).unwrap();
    assert_eq!(written[6 * 512..7 * 512], [6; 512]);
    assert_eq!(written[7 * 512..9 * 512], [0xaa; 1024]);
    assert_eq!(written[9 * 512..10 * 512], [9; 512]);
}

/// A file in memory that cannot grow: the host's disk is full.
fn full(content: &Path) -> OwnedFd {
    // SAFETY: the name ends in a zero, and the result is checked before it is owned.
    let file = unsafe {
        let fd = libc::memfd_create(c"full".as_ptr(), libc::MFD_ALLOW_SEALING);
        assert!(fd >= 0, "{}", io::Error::last_os_error());
        File::from_raw_fd(fd)
    };
    io::copy(&mut File::open(content).unwrap(), &mut &file).unwrap();
    // SAFETY: the descriptor is open, and the call takes no pointer.
    let sealed = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_GROW) };
    assert_eq!(sealed, 0, "{}", io::Error::last_os_error());
    file.into()
}

#[test]
fn a_full_host_fails_requests_tells_so_once_and_goes_on() {
    let dir = TempDir::new().unwrap();
    let path = overlay(&dir, "top.qcow2", 1 << 30, None);
    let mut machine = Machine::new(&qcow2(&path));
    assert_eq!(machine.write(0, &[0xaa; 512]), (OK, 1));
    drop(machine);
    let memory = full(&path);
    let disk = qcow2(Path::new(&format!("/proc/self/fd/{}", memory.as_raw_fd())));

    let mut log = tempfile::tempfile().unwrap();
    let events = EventStream::new(Instant::now(), Some(log.try_clone().unwrap()));
    let files = Block::open(&disk).unwrap();
    let block = Block::with_files("disk0".to_owned(), &disk, files, events).unwrap();
    let mut driver = Driver::new(false);
    let mut machine = {
        let mut block = block;
        driver.activate(&mut block, FLUSH);
        Machine { driver, block }
    };
    for sector in [1 << 20, 3 << 18] {
        assert_eq!(machine.write(sector, &[0xbb; 512]), (IOERR, 1));
    }
    assert_eq!(machine.sectors(0, 512), [0xaa; 512]);
    assert_eq!(machine.write(0, &[0xcc; 512]), (OK, 1));
    assert_eq!(machine.sectors(0, 512), [0xcc; 512]);
    assert!(machine.block.counters()["failed_ops"] >= 2);

    let mut text = String::new();
    log.rewind().unwrap();
    log.read_to_string(&mut text).unwrap();
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(
        text.contains("\"device_error\"") && text.contains("disk0"),
        "{text}"
    );
}
