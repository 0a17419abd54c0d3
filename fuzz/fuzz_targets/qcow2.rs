//! A disk whose qcow2 image is the input: it is opened, and if it can be, used as a guest does.
//!
//! The first bytes of an input are the requests, eight bytes each; the image follows.
#![no_main]

use std::time::Instant;

use libfuzzer_sys::fuzz_target;
use vmm::config::{DiskConfig, ImageType};
use vmm::devices::virtio::VirtioDevice;
use vmm::devices::virtio::block::{Block, SECTOR_SIZE};
use vmm::devices::virtio::testing::{BUFFERS, Driver, readable, writable};
use vmm::events::EventStream;
use vmm_fuzz::file::MemoryFile;

const REQUESTS: usize = 8;

/// Types of requests (virtio 1.2, 5.2.6).
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const HEADER: u64 = BUFFERS;
const STATUS: u64 = BUFFERS + 0x100;
const SEGMENT: u64 = BUFFERS + 0x200;
const DATA: u64 = BUFFERS + 0x1000;

fuzz_target!(|input: &[u8]| {
    let Some((requests, image)) = input.split_first_chunk::<{ 8 * REQUESTS }>() else {
        return;
    };
    for readonly in [true, false] {
        let file = MemoryFile::new(image);
        let config = DiskConfig {
            image_type: ImageType::Qcow2,
            readonly,
            ..DiskConfig::new(file.path())
        };
        let events = EventStream::new(Instant::now(), None);
        // What is no proper image, or builds on another, is refused.
        let Ok(files) = Block::open(&config) else {
            return;
        };
        let Ok(mut block) = Block::with_files("disk".to_owned(), &config, files, events) else {
            return;
        };
        let mut driver = Driver::new(false);
        let features = block.features();
        driver.activate(&mut block, features);
        for request in requests.chunks_exact(8) {
            serve(&mut driver, &mut block, request.try_into().unwrap());
        }
        block.reset();
    }
});

/// One request: a byte for what it is, one for how much, and six for the sector, which counts from
/// the end of the disk if it is odd.
fn serve(driver: &mut Driver, block: &mut Block, request: [u8; 8]) {
    let [kind, length, sector @ ..] = request;
    let mut bytes = [0; 8];
    bytes[..6].copy_from_slice(&sector);
    let mut sector = u64::from_le_bytes(bytes);
    if sector % 2 == 1 {
        let mut capacity = [0; 8];
        block.read_config(0, &mut capacity);
        sector = u64::from_le_bytes(capacity).wrapping_sub(sector >> 1);
    }
    let kind = [IN, OUT, FLUSH, DISCARD, WRITE_ZEROES][usize::from(kind) % 5];
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    let mut segment = [0; 16];
    match kind {
        IN | OUT => header[8..].copy_from_slice(&sector.to_le_bytes()),
        _ => {
            segment[..8].copy_from_slice(&sector.to_le_bytes());
            segment[8] = length;
            // Zeroes that may be given back, every second time.
            segment[12] = u8::from(kind == WRITE_ZEROES) & length;
        }
    }
    driver.write(HEADER, &header);
    driver.write(SEGMENT, &segment);
    let data = u32::from(length) * SECTOR_SIZE as u32;
    let (header, status) = (readable(HEADER, 16), writable(STATUS, 1));
    match kind {
        IN => driver.add(0, &[header, writable(DATA, data), status]),
        OUT => driver.add(0, &[header, readable(DATA, data), status]),
        FLUSH => driver.add(0, &[header, status]),
        _ => driver.add(0, &[header, readable(SEGMENT, 16), status]),
    };
    block.process_queue(0).unwrap();
    // Waits for the request, and gives it back.
    block.pause().unwrap();
    assert_eq!(driver.used(0).len(), 1);
}
