//! What the buffers hold: requests of each device type, with content that is nearly right.

use crate::chance::Chance;
use crate::memory::{high, put};

/// Device types (virtio 1.2, section 5).
const NET: u32 = 1;
const BLOCK: u32 = 2;
/// Memory balloon.
pub const BALLOON: u32 = 5;
const VSOCK: u32 = 19;
const MEMORY: u32 = 24;

/// Writes a request at an offset of the arena and returns its length.
pub fn write(chance: &mut Chance, kind: u32, at: u64) -> u32 {
    // Data of every kind behind it, for whatever reads on, be it as a table of descriptors.
    for word in 0..64 {
        let data = high(chance.number());
        // A balloon takes the pages that it reads the numbers of: none below 32 MiB.
        let data = if kind == BALLOON {
            data | 0x2000_0000_2000
        } else {
            data
        };
        put(at + 0x1000 + word * 8, data);
    }
    match kind {
        NET => net(chance, at),
        BLOCK => block(chance, at),
        BALLOON => page_frames(chance, at),
        VSOCK => vsock(chance, at),
        MEMORY => memory(chance, at),
        _ => chance.below(0x1000) as u32,
    }
}

/// `struct virtio_net_hdr` (5.1.6) and the start of a frame, or a command of the control queue
/// (5.1.6.5).
fn net(chance: &mut Chance, at: u64) -> u32 {
    if chance.one_in(3) {
        put(at, chance.below(8) as u8);
        put(at + 1, chance.below(4) as u8);
        put(at + 2, chance.number() as u16);
        return chance.choice(&[2, 4, 8]);
    }
    put(at, chance.choice(&[0_u8, 1, 2, 4, 0xff]));
    put(at + 1, chance.choice(&[0_u8, 1, 3, 4, 5, 0x80, 0x81, 0xff]));
    for field in 1..6 {
        put(at + 2 * field, chance.number() as u16);
    }
    for byte in 12..64 {
        put(at + byte, chance.any() as u8);
    }
    chance.choice(&[0, 1, 10, 11, 12, 13, 26, 64])
}

/// `struct virtio_blk_req` (5.2.6).
fn block(chance: &mut Chance, at: u64) -> u32 {
    let kind = match chance.below(8) {
        0 => chance.number() as u32,
        _ => chance.choice(&[0, 1, 4, 8, 11, 13, 14]),
    };
    put(at, kind);
    put(at + 4, chance.any() as u32);
    let sector = if chance.one_in(2) {
        chance.below(0x1_0000)
    } else {
        chance.number()
    };
    put(at + 8, sector);
    // A segment of discard or write zeroes, in the data that follows.
    put(at + 0x1000, chance.number());
    put(at + 0x1008, chance.number() as u32);
    put(at + 0x100c, chance.below(4) as u32);
    if chance.one_in(8) {
        chance.below(32) as u32
    } else {
        16
    }
}

/// An array of page frame numbers (5.5.6).
fn page_frames(chance: &mut Chance, at: u64) -> u32 {
    let count = 1 + chance.below(256);
    for entry in 0..count {
        // Never those of this program and its rings.
        let frame = match chance.below(3) {
            0 => 0x2000 + chance.below(0x2000),
            _ => 0x2000 | chance.number() as u32 as u64,
        };
        put(at + 4 * entry, frame as u32);
    }
    if chance.one_in(8) {
        chance.below(4096) as u32
    } else {
        (4 * count) as u32
    }
}

/// `struct virtio_vsock_hdr` (5.10.6).
fn vsock(chance: &mut Chance, at: u64) -> u32 {
    let cids = [3, 3, 3, 2, 0, u64::MAX];
    put(at, chance.choice(&cids));
    put(at + 8, if chance.one_in(8) { chance.number() } else { 2 });
    put(at + 16, chance.below(64) as u32);
    put(
        at + 20,
        chance.choice(&[1024_u32, 1025, 1025, 1026, 0, u32::MAX]),
    );
    let len = if chance.one_in(2) {
        chance.below(0x3000)
    } else {
        chance.number()
    };
    put(at + 24, len as u32);
    put(
        at + 28,
        if chance.one_in(16) {
            chance.any() as u16
        } else {
            1
        },
    );
    put(at + 30, chance.below(10) as u16);
    put(at + 32, chance.choice(&[0_u32, 1, 2, 3, u32::MAX]));
    put(at + 36, chance.number() as u32);
    put(at + 40, chance.number() as u32);
    if chance.one_in(8) {
        chance.below(64) as u32
    } else {
        44
    }
}

/// `struct virtio_mem_req` (5.15.6).
fn memory(chance: &mut Chance, at: u64) -> u32 {
    put(at, chance.below(6) as u16);
    let address = match chance.below(3) {
        0 => chance.number(),
        // From the end of a small machine's memory on, and from 4 GiB on.
        1 => (chance.below(64) << 21) + (64 << 20),
        _ => (chance.below(64) << 21) + (4 << 30),
    };
    put(at + 8, address);
    put(at + 16, chance.choice(&[0_u16, 1, 2, 16, 0x7fff, 0xffff]));
    if chance.one_in(8) {
        chance.below(32) as u32
    } else {
        24
    }
}
