use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use imago::qcow2::Qcow2;
use imago::{FormatCreateBuilder, Storage, StorageCreateOptions};
use proptest::prelude::*;
use tempfile::TempDir;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_SECURE_ERASE, VIRTIO_BLK_T_WRITE_ZEROES,
};
use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::desc::split::Descriptor;

use super::*;
use crate::config::ImageType;
use crate::devices::virtio::testing::{
    BUFFERS, Driver, Piece, is_ready, readable, wait_readable, writable,
};

/// What [`DiskConfig::new`] gives a disk.
const QUEUE_SIZE: u16 = 128;

const HEADER: u64 = BUFFERS;
const DATA: u64 = BUFFERS + 0x1000;
const STATUS: u64 = BUFFERS + 0xff0;
const FLUSH: u64 = 1 << VIRTIO_BLK_F_FLUSH;

const OK: u8 = VIRTIO_BLK_S_OK as u8;
const IOERR: u8 = VIRTIO_BLK_S_IOERR as u8;
const UNSUPP: u8 = VIRTIO_BLK_S_UNSUPP as u8;

mod device;
mod images;
mod merging;
mod zeros;

/// A machine with one disk.
struct Machine {
    driver: Driver,
    block: Block,
}

fn config(path: &Path) -> DiskConfig {
    DiskConfig::new(path)
}

fn build(config: &DiskConfig) -> Result<Block, BlockError> {
    let events = EventStream::new(std::time::Instant::now(), None);
    Block::with_files("disk0".to_owned(), config, Block::open(config)?, events)
}

/// Opens a disk that no other test uses. A lock of this process outlives its file for as long as
/// a child that another test has just forked has not executed its program: that is waited for.
fn open(config: &DiskConfig) -> Block {
    loop {
        match build(config) {
            Err(BlockError::Image(ImageError::Locked { path })) => wait_for_lock(&path),
            other => return other.unwrap(),
        }
    }
}

fn wait_for_lock(path: &Path) {
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let whole = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    // SAFETY: the descriptor is open, and F_OFD_SETLKW only reads the structure.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLKW, &whole) };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
}

impl Machine {
    fn new(config: &DiskConfig) -> Self {
        let mut driver = Driver::new(false);
        let mut block = open(config);
        driver.activate(&mut block, FLUSH);
        Self { driver, block }
    }

    fn header(&self, kind: u32, sector: u64) {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.driver.write(HEADER, &header);
        self.driver.write(STATUS, &[0xff]);
    }

    /// Notifies the device of a queue, and lets it finish all that is there.
    fn serve(&mut self, queue: usize) {
        self.block.process_queue(queue).unwrap();
        self.settle();
    }

    /// Plays the event loop until the device has nothing more to do.
    fn settle(&mut self) {
        loop {
            self.block.pool.drain();
            let ready: Vec<_> = self.block.sources().into_iter().filter(is_ready).collect();
            if ready.is_empty() {
                return;
            }
            for source in ready {
                self.block
                    .process_source(source.token, EventSet::IN)
                    .unwrap();
            }
        }
    }

    /// Offers one chain and returns its status byte and used length.
    fn run(&mut self, pieces: &[Piece]) -> (u8, u32) {
        let head = self.driver.add(0, pieces);
        self.serve(0);
        let used = self.driver.used(0);
        assert_eq!(used.len(), 1);
        assert_eq!(used[0].0, head);
        (self.driver.read(STATUS, 1)[0], used[0].1)
    }

    fn write(&mut self, sector: u64, data: &[u8]) -> (u8, u32) {
        self.header(VIRTIO_BLK_T_OUT, sector);
        self.driver.write(DATA, data);
        self.run(&[
            readable(HEADER, 16),
            readable(DATA, data.len() as u32),
            writable(STATUS, 1),
        ])
    }

    fn read(&mut self, sector: u64, len: u32) -> (u8, u32) {
        self.header(VIRTIO_BLK_T_IN, sector);
        self.run(&[
            readable(HEADER, 16),
            writable(DATA, len),
            writable(STATUS, 1),
        ])
    }

    fn sectors(&mut self, sector: u64, len: u32) -> Vec<u8> {
        assert_eq!(self.read(sector, len), (OK, len + 1));
        self.driver.read(DATA, len as usize)
    }

    /// A request of segments: sector, number of sectors and flags.
    fn segments(&mut self, kind: u32, segments: &[(u64, u32, u32)]) -> (u8, u32) {
        self.header(kind, 0);
        let mut data = Vec::new();
        for (sector, count, flags) in segments {
            data.extend(sector.to_le_bytes());
            data.extend(count.to_le_bytes());
            data.extend(flags.to_le_bytes());
        }
        self.driver.write(DATA, &data);
        self.run(&[
            readable(HEADER, 16),
            readable(DATA, data.len() as u32),
            writable(STATUS, 1),
        ])
    }

    fn config_field<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.block.read_config(offset, &mut bytes);
        bytes
    }

    fn capacity(&self) -> u64 {
        u64::from_le_bytes(self.config_field(0))
    }

    fn flush(&mut self) -> (u8, u32) {
        self.header(VIRTIO_BLK_T_FLUSH, 0);
        self.run(&[readable(HEADER, 16), writable(STATUS, 1)])
    }
}

/// A raw image whose sector n is full of the byte n.
fn raw_image(dir: &TempDir, sectors: u8) -> PathBuf {
    let path = dir.path().join("base.raw");
    let bytes: Vec<u8> = (0..sectors).flat_map(|sector| [sector; 512]).collect();
    std::fs::write(&path, bytes).unwrap();
    path
}

fn overlay(dir: &TempDir, name: &str, size: u64, backing: Option<(&str, &str)>) -> PathBuf {
    let path = dir.path().join(name);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    runtime.block_on(async {
        let file = imago::file::File::create_open(StorageCreateOptions::new().filename(&path))
            .await
            .unwrap();
        let mut builder = Qcow2::<imago::file::File>::create_builder(file).size(size);
        if let Some((backing, format)) = backing {
            builder = builder.backing(backing.to_owned(), format.to_owned());
        }
        builder.create().await.unwrap();
    });
    path
}

fn qcow2(path: &Path) -> DiskConfig {
    DiskConfig {
        image_type: ImageType::Qcow2,
        backing_files: true,
        ..config(path)
    }
}

#[test]
fn what_is_written_is_read_back_and_is_there_after_a_restart() {
    let dir = TempDir::new().unwrap();
    let path = raw_image(&dir, 8);
    let mut machine = Machine::new(&config(&path));
    assert_eq!(machine.sectors(3, 1024), [[3; 512], [4; 512]].concat());
    assert_eq!(machine.write(3, &[0xaa; 512]), (OK, 1));
    assert_eq!(machine.flush(), (OK, 1));
    assert_eq!(machine.sectors(3, 1024), [[0xaa; 512], [4; 512]].concat());
    assert_eq!(machine.driver.interrupts(), 4);

    drop(machine);
    let mut machine = Machine::new(&config(&path));
    assert_eq!(machine.sectors(3, 512), [0xaa; 512]);
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 8 * 512);
}

#[test]
fn one_interrupt_tells_of_all_requests_of_a_visit() {
    let dir = TempDir::new().unwrap();
    let mut machine = Machine::new(&config(&raw_image(&dir, 8)));
    machine.header(VIRTIO_BLK_T_IN, 1);
    for _ in 0..10 {
        machine.driver.add(
            0,
            &[
                readable(HEADER, 16),
                writable(DATA, 512),
                writable(STATUS, 1),
            ],
        );
    }
    machine.serve(0);
    assert_eq!(machine.driver.used(0).len(), 10);
    assert_eq!(machine.driver.interrupts(), 1);
}

#[test]
fn requests_beyond_the_end_fail() {
    let dir = TempDir::new().unwrap();
    let path = raw_image(&dir, 8);
    let mut machine = Machine::new(&config(&path));
    for (sector, len) in [(8, 512), (7, 1024), (u64::MAX, 512), (1 << 55, 512)] {
        assert_eq!(machine.read(sector, len), (IOERR, 0), "sector {sector}");
        let data = vec![1; len as usize];
        assert_eq!(machine.write(sector, &data), (IOERR, 1), "sector {sector}");
    }
    assert_eq!(machine.sectors(7, 512), [7; 512]);
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 8 * 512);
}

#[test]
fn a_partial_last_sector_is_out_of_reach() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("odd.raw");
    std::fs::write(&path, [5; 1000]).unwrap();
    let mut machine = Machine::new(&config(&path));
    let mut capacity = [0; 8];
    machine.block.read_config(0, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), 1);
    assert_eq!(machine.read(1, 512), (IOERR, 0));
}

#[test]
fn partial_sectors_and_data_on_the_wrong_side_fail() {
    let dir = TempDir::new().unwrap();
    let mut machine = Machine::new(&config(&raw_image(&dir, 8)));
    assert_eq!(machine.read(0, 511), (IOERR, 0));
    assert_eq!(machine.write(0, &[1; 513]), (IOERR, 1));

    machine.header(VIRTIO_BLK_T_OUT, 0);
    let wrong_side = [
        readable(HEADER, 16),
        writable(DATA, 512),
        writable(STATUS, 1),
    ];
    assert_eq!(machine.run(&wrong_side), (IOERR, 0));
    assert_eq!(machine.sectors(0, 1024), [[0; 512], [1; 512]].concat());
}

#[test]
fn a_read_only_disk_says_so_and_is_not_written() {
    let dir = TempDir::new().unwrap();
    let path = raw_image(&dir, 8);
    let mut machine = Machine::new(&DiskConfig {
        readonly: true,
        ..config(&path)
    });
    assert_ne!(machine.block.features() & 1 << VIRTIO_BLK_F_RO, 0);
    assert_eq!(machine.write(2, &[0xaa; 512]), (IOERR, 1));
    assert_eq!(machine.flush(), (OK, 1));
    assert_eq!(machine.sectors(2, 512), [2; 512]);
}

#[test]
fn unknown_requests_are_unsupported() {
    let dir = TempDir::new().unwrap();
    let mut machine = Machine::new(&config(&raw_image(&dir, 8)));
    for kind in [VIRTIO_BLK_T_SECURE_ERASE, 2, 3, u32::MAX] {
        machine.header(kind, 0);
        let result = machine.run(&[readable(HEADER, 16), writable(STATUS, 1)]);
        assert_eq!(result, (UNSUPP, 1));
    }
}

#[test]
fn the_serial_number_is_padded_with_zeros() {
    let dir = TempDir::new().unwrap();
    let mut machine = Machine::new(&DiskConfig {
        serial: Some("root-0".to_owned()),
        ..config(&raw_image(&dir, 8))
    });
    machine.header(VIRTIO_BLK_T_GET_ID, 0);
    machine.driver.write(DATA, &[0xff; 24]);
    let chain = |len| {
        [
            readable(HEADER, 16),
            writable(DATA, len),
            writable(STATUS, 1),
        ]
    };
    assert_eq!(machine.run(&chain(20)), (OK, 21));
    assert_eq!(&machine.driver.read(DATA, 6), b"root-0");
    assert_eq!(machine.driver.read(DATA + 6, 14), [0; 14]);
    assert_eq!(machine.driver.read(DATA + 20, 4), [0xff; 4]);
    // The status lies beyond what was filled, so it does not count.
    assert_eq!(machine.run(&chain(24)), (OK, 20));
}

#[test]
fn the_split_into_descriptors_is_free() {
    let dir = TempDir::new().unwrap();
    let mut machine = Machine::new(&config(&raw_image(&dir, 8)));
    machine.header(VIRTIO_BLK_T_IN, 5);
    // Header in three pieces, and data and status in one buffer over the seam of two regions.
    let end = (1 << 20) + 100;
    let start = end - 513;
    machine.driver.add(
        0,
        &[
            readable(HEADER, 3),
            readable(HEADER + 3, 0),
            readable(HEADER + 3, 12),
            readable(HEADER + 15, 1),
            writable(start, 513),
        ],
    );
    machine.serve(0);
    assert_eq!(machine.driver.used(0), [(0, 513)]);
    assert_eq!(machine.driver.read(start, 512), [5; 512]);
    assert_eq!(machine.driver.read(end - 1, 1), [OK]);

    // Header and data in one buffer, through an indirect table.
    machine.header(VIRTIO_BLK_T_OUT, 6);
    machine.driver.write(HEADER + 16, &[0xbb; 512]);
    machine.driver.add_indirect(
        0,
        BUFFERS + 0x8000,
        &[readable(HEADER, 16 + 512), writable(STATUS, 1)],
    );
    machine.serve(0);
    assert_eq!(machine.driver.used(0), [(5, 1)]);
    assert_eq!(machine.driver.read(STATUS, 1), [OK]);
    assert_eq!(machine.sectors(6, 512), [0xbb; 512]);
}

#[test]
fn malformed_chains_are_completed_and_hurt_nobody() {
    let dir = TempDir::new().unwrap();
    let mut machine = Machine::new(&config(&raw_image(&dir, 8)));
    machine.header(VIRTIO_BLK_T_IN, 0);
    let bad: [&[Piece]; 6] = [
        // No status.
        &[readable(HEADER, 16)],
        // A status alone.
        &[writable(STATUS, 1)],
        // Half a header.
        &[readable(HEADER, 15), writable(STATUS, 1)],
        // In the hole between the regions.
        &[
            readable(HEADER, 16),
            writable(2 << 20, 512),
            writable(STATUS, 1),
        ],
        // Over the end of the address space.
        &[
            readable(HEADER, 16),
            writable(u64::MAX - 100, 512),
            writable(STATUS, 1),
        ],
        // Out of order.
        &[
            writable(DATA, 512),
            readable(HEADER, 16),
            writable(STATUS, 1),
        ],
    ];
    for pieces in bad {
        let (status, used) = machine.run(pieces);
        assert!(status != OK && used <= 1, "{pieces:?}: {status} {used}");
    }

    // A chain that leads back to its start.
    let flags = (VRING_DESC_F_NEXT | VRING_DESC_F_WRITE) as u16;
    machine
        .driver
        .write_descriptor(0, 100, Descriptor::new(DATA, 512, flags, 100));
    machine.driver.offer(0, 100);
    // A link out of the table.
    machine
        .driver
        .write_descriptor(0, 101, Descriptor::new(DATA, 512, flags, QUEUE_SIZE));
    machine.driver.offer(0, 101);
    machine.serve(0);
    assert_eq!(machine.driver.used(0), [(100, 0), (101, 0)]);

    assert_eq!(machine.sectors(1, 512), [1; 512]);
}

#[test]
fn a_head_outside_of_the_table_stops_the_device() {
    let dir = TempDir::new().unwrap();
    let mut machine = Machine::new(&config(&raw_image(&dir, 8)));
    machine.driver.offer(0, QUEUE_SIZE);
    assert!(matches!(
        machine.block.process_queue(0),
        Err(DeviceError::Queue { index: 0, .. })
    ));
}

#[test]
fn a_host_failure_is_an_error_status() {
    let dir = TempDir::new().unwrap();
    let path = raw_image(&dir, 8);
    let base = overlay(&dir, "top.qcow2", 8 * 512, None);
    let mut machine = Machine::new(&qcow2(&base));
    assert_eq!(machine.write(0, &[1; 512]), (OK, 1));
    assert_eq!(machine.flush(), (OK, 1));
    drop(machine);
    // The table of the first cluster now leads beyond what a file can hold.
    let mut bytes = std::fs::read(&base).unwrap();
    let l1 = u64::from_be_bytes(bytes[40..48].try_into().unwrap()) as usize;
    let l2 = u64::from_be_bytes(bytes[l1..l1 + 8].try_into().unwrap()) & 0x00ff_ffff_ffff_fe00;
    bytes[l2 as usize..][..8].copy_from_slice(&0x8000_0000_0000_0200_u64.to_be_bytes());
    std::fs::write(&path, bytes).unwrap();
    let mut machine = Machine::new(&qcow2(&path));
    assert_eq!(machine.read(0, 512), (IOERR, 0));
}

#[test]
fn without_flush_every_write_is_durable() {
    let dir = TempDir::new().unwrap();
    let path = overlay(&dir, "top.qcow2", 1 << 20, None);
    let mut machine = Machine::new(&qcow2(&path));
    machine.block.reset();
    machine.driver.activate(&mut machine.block, 0);
    assert_eq!(machine.write(100, &[0xaa; 512]), (OK, 1));
    let copy = dir.path().join("copy.qcow2");
    std::fs::copy(&path, &copy).unwrap();
    let mut survivor = Machine::new(&qcow2(&copy));
    assert_eq!(survivor.sectors(100, 512), [0xaa; 512]);
}

fn piece() -> impl Strategy<Value = Piece> {
    let addr = prop_oneof![
        4 => BUFFERS..BUFFERS + 0x4000,
        1 => (1_u64 << 20) - 600..(1 << 20) + 600,
        1 => (2_u64 << 20) - 600..(2 << 20) + 600,
        1 => any::<u64>(),
    ];
    let len = prop_oneof![
        2 => 0_u32..40,
        2 => (0_u32..5).prop_map(|sectors| sectors * 512),
        1 => (0_u32..5).prop_map(|sectors| sectors * 512 + 1),
        1 => any::<u32>(),
    ];
    (addr, len, any::<bool>()).prop_map(|(addr, len, writable)| Piece {
        addr,
        len,
        writable,
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Whatever the chain and the header: the chain comes back, used for no more than it has room
    /// for, and the disk keeps its size.
    #[test]
    fn any_chain_is_completed(
        header in any::<[u8; 16]>(),
        kind in 0_u32..12,
        sector in 0_u64..10,
        raw_header in any::<bool>(),
        pieces in proptest::collection::vec(piece(), 1..12),
        indirect in any::<bool>(),
    ) {
        let dir = TempDir::new().unwrap();
        let path = raw_image(&dir, 8);
        let mut machine = Machine::new(&config(&path));
        machine.header(kind, sector);
        if raw_header {
            machine.driver.write(HEADER, &header);
        }
        let mut chain = vec![readable(HEADER, 16)];
        chain.extend(pieces);
        let head = if indirect {
            machine.driver.add_indirect(0, BUFFERS + 0x10000, &chain)
        } else {
            machine.driver.add(0, &chain)
        };
        machine.serve(0);
        let used = machine.driver.used(0);
        prop_assert_eq!(used.len(), 1);
        prop_assert_eq!(used[0].0, head);
        let room: u64 = chain.iter().filter(|piece| piece.writable).map(|piece| u64::from(piece.len)).sum();
        prop_assert!(u64::from(used[0].1) <= room);
        prop_assert_eq!(std::fs::metadata(&path).unwrap().len(), 8 * 512);
    }

    /// Whatever the descriptor table holds: every head that lies in it comes back.
    #[test]
    fn any_descriptor_table_is_survived(
        table in proptest::collection::vec((piece(), 0_u16..16, 0_u16..300), 16),
        heads in proptest::collection::vec(0_u16..16, 1..8),
    ) {
        let dir = TempDir::new().unwrap();
        let mut machine = Machine::new(&config(&raw_image(&dir, 8)));
        machine.header(0, 0);
        for (index, (piece, flags, next)) in table.into_iter().enumerate() {
            let next = if next < 200 { next % 16 } else { next };
            let descriptor = Descriptor::new(piece.addr, piece.len, flags, next);
            machine.driver.write_descriptor(0, index as u16, descriptor);
        }
        for head in &heads {
            machine.driver.offer(0, *head);
        }
        machine.serve(0);
        let mut used: Vec<_> = machine.driver.used(0).into_iter().map(|(head, _)| head).collect();
        let mut heads = heads;
        used.sort_unstable();
        heads.sort_unstable();
        prop_assert_eq!(used, heads);
    }
}
