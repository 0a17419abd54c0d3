//! A driver that keeps to the rules of virtio-mmio (virtio 1.2, 4.2) as far as it needs to get at
//! a device's rings, and then breaks them.

use crate::chance::Chance;
use crate::cpu::{self, read32, write32};
use crate::memory::{ARENA, ARENA_SIZE, high, put};
use crate::payload;

/// Slots of virtio-mmio devices, and the size of each.
pub const DEVICES: u64 = 18;
/// Bytes of address space of a slot.
pub const WINDOW: u64 = 0x1000;
const FIRST_WINDOW: u64 = 0xd000_0000;

const MAGIC: u64 = 0x00;
const DEVICE_ID: u64 = 0x08;
const DEVICE_FEATURES: u64 = 0x10;
const DEVICE_FEATURES_SELECT: u64 = 0x14;
const DRIVER_FEATURES: u64 = 0x20;
const DRIVER_FEATURES_SELECT: u64 = 0x24;
const QUEUE_SELECT: u64 = 0x30;
const QUEUE_SIZE_MAX: u64 = 0x34;
const QUEUE_SIZE: u64 = 0x38;
const QUEUE_READY: u64 = 0x44;
const QUEUE_NOTIFY: u64 = 0x50;
const INTERRUPT_STATUS: u64 = 0x60;
const INTERRUPT_ACK: u64 = 0x64;
const STATUS: u64 = 0x70;
const QUEUE_DESCRIPTORS: u64 = 0x80;
const QUEUE_AVAILABLE: u64 = 0x90;
const QUEUE_USED: u64 = 0xa0;
const CONFIG: u64 = 0x100;

const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
const VERSION_1: u64 = 1 << 32;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Queues that are tried, more than any device has but a disk or card with many.
const QUEUES: u64 = 8;
/// Room in the arena for the rings of one queue.
const RINGS_SIZE: u64 = 0x4_0000;
/// Largest queue that has room.
const RING_SIZE_MAX: u64 = 1024;
const AVAILABLE_OFFSET: u64 = 0x1_0000;
const USED_OFFSET: u64 = 0x2_0000;
/// Where in the arena the buffers are.
const BUFFERS: u64 = ARENA_SIZE / 2;

/// Where the registers of a slot are.
pub fn window(slot: u64) -> u64 {
    FIRST_WINDOW + slot * WINDOW
}

/// The type of the device in a slot, if there is one.
pub fn kind(slot: u64) -> Option<u32> {
    let there = read32(window(slot) + MAGIC) == u32::from_le_bytes(*b"virt");
    let kind = read32(window(slot) + DEVICE_ID);
    (there && kind != 0).then_some(kind)
}

/// Takes the device in a slot away from whatever drives it.
pub fn reset(slot: u64) {
    write32(window(slot) + STATUS, 0);
}

/// Brings a device up, rightly or nearly so, and makes it work on hostile rings.
pub fn attack(chance: &mut Chance) {
    let slot = chance.below(DEVICES);
    let Some(kind) = kind(slot) else { return };
    let registers = window(slot);
    // Now and then the last round's rings are left to the device.
    if !chance.one_in(16) {
        reset(slot);
    }
    negotiate(chance, registers);
    let mut sizes = [0; QUEUES as usize];
    for (queue, size) in (0..QUEUES).zip(&mut sizes) {
        *size = set_up_queue(chance, registers, queue);
    }
    if !chance.one_in(32) {
        set_status(registers, DRIVER_OK);
    }
    for _ in 0..1 + chance.below(12) {
        let queue = chance.below(QUEUES);
        let size = sizes[queue as usize];
        if size == 0 {
            continue;
        }
        offer_buffers(chance, kind, queue, size);
        let notified = if chance.one_in(16) {
            chance.number()
        } else {
            queue
        };
        write32(registers + QUEUE_NOTIFY, notified as u32);
        match chance.below(8) {
            0 => write32(
                registers + INTERRUPT_ACK,
                read32(registers + INTERRUPT_STATUS),
            ),
            1 => cpu::mmio(
                registers + CONFIG + chance.below(64),
                chance.any() as u32,
                true,
            ),
            // The rings change while the device reads them.
            2 => scribble(chance, queue),
            3 => reset(slot),
            _ => {}
        }
    }
}

fn set_status(registers: u64, bit: u32) {
    write32(registers + STATUS, read32(registers + STATUS) | bit);
}

fn negotiate(chance: &mut Chance, registers: u64) {
    set_status(registers, ACKNOWLEDGE);
    set_status(registers, DRIVER);
    let mut offered = 0;
    for half in 0..2 {
        write32(registers + DEVICE_FEATURES_SELECT, half);
        offered |= u64::from(read32(registers + DEVICE_FEATURES)) << (32 * half);
    }
    let accepted = match chance.below(8) {
        0 => chance.any(),
        1 => VERSION_1,
        2..=4 => offered & chance.any() | VERSION_1,
        _ => offered,
    };
    for half in 0..2 {
        write32(registers + DRIVER_FEATURES_SELECT, half);
        write32(
            registers + DRIVER_FEATURES,
            (accepted >> (32 * half)) as u32,
        );
    }
    set_status(registers, FEATURES_OK);
}

/// Sets up a queue and returns its size, 0 if the device has no such queue.
fn set_up_queue(chance: &mut Chance, registers: u64, queue: u64) -> u64 {
    write32(registers + QUEUE_SELECT, queue as u32);
    let max = u64::from(read32(registers + QUEUE_SIZE_MAX)).min(RING_SIZE_MAX);
    if max == 0 {
        return 0;
    }
    let size = match chance.below(8) {
        0 => chance.number() & 0xffff,
        1..=3 => 1 << chance.below(10),
        _ => max,
    };
    write32(registers + QUEUE_SIZE, size as u32);
    let rings = ARENA + queue * RINGS_SIZE;
    for (register, offset) in [
        (QUEUE_DESCRIPTORS, 0),
        (QUEUE_AVAILABLE, AVAILABLE_OFFSET),
        (QUEUE_USED, USED_OFFSET),
    ] {
        let address = if chance.one_in(24) {
            address(chance)
        } else {
            rings + offset
        };
        write32(registers + register, address as u32);
        write32(registers + register + 4, (address >> 32) as u32);
    }
    // The rings start empty: whatever stands there is from another round.
    put(queue * RINGS_SIZE + AVAILABLE_OFFSET, 0_u32);
    put(queue * RINGS_SIZE + USED_OFFSET, 0_u32);
    write32(registers + QUEUE_READY, u32::from(!chance.one_in(16)));
    size.clamp(1, RING_SIZE_MAX)
}

/// An address that a device should not be pointed to, or only just. It is never below the arena:
/// there are this program and its page tables, and a guest that has a device overwrite them only
/// ends itself.
fn address(chance: &mut Chance) -> u64 {
    match chance.below(4) {
        0 => high(chance.number()),
        1 => 0xd000_0000 + chance.below(0x1_0000),
        // The end of the smallest machine's memory.
        2 => (64 << 20) - chance.below(0x2000),
        _ => ARENA + chance.below(ARENA_SIZE),
    }
}

/// Fills descriptors of a queue and makes some available.
fn offer_buffers(chance: &mut Chance, kind: u32, queue: u64, size: u64) {
    let rings = queue * RINGS_SIZE;
    let heads = 1 + chance.below(8);
    for slot in 0..heads {
        // A balloon would take pages of this program, if it read anything as their numbers.
        let head = if kind != payload::BALLOON && chance.one_in(3) {
            random_chain(chance, rings, size)
        } else {
            request(chance, kind, rings, size, slot)
        };
        let entry = chance.below(size);
        // Every entry of the ring names a head, so that whatever the index says is a chain.
        put(rings + AVAILABLE_OFFSET + 4 + 2 * entry, head);
        put(rings + AVAILABLE_OFFSET + 4 + 2 * slot, head);
    }
    put(rings + AVAILABLE_OFFSET, chance.below(2) as u16);
    let index = if chance.one_in(8) {
        chance.any()
    } else {
        heads
    };
    put(rings + AVAILABLE_OFFSET + 2, index as u16);
    // used_event, which says when the device has to interrupt.
    put(rings + AVAILABLE_OFFSET + 4 + 2 * size, chance.any() as u16);
}

fn descriptor(table: u64, index: u64, address: u64, len: u32, flags: u16, next: u16) {
    let at = table + index * 16;
    put(at, address);
    put(at + 8, len);
    put(at + 12, flags);
    put(at + 14, next);
}

fn random_chain(chance: &mut Chance, rings: u64, size: u64) -> u16 {
    let count = 1 + chance.below(16);
    let first = chance.below(size);
    for link in 0..count {
        let address = if chance.one_in(3) {
            address(chance)
        } else {
            ARENA + BUFFERS + chance.below(BUFFERS)
        };
        let len = if chance.one_in(3) {
            chance.number()
        } else {
            chance.below(0x2000)
        };
        let flags = match chance.below(8) {
            0 => chance.any() as u16,
            1 => INDIRECT,
            2 => WRITE,
            3 => 0,
            4 => NEXT,
            _ => NEXT | WRITE,
        };
        let next = if chance.one_in(8) {
            chance.any()
        } else {
            (first + link + 1) % size
        };
        descriptor(
            rings,
            (first + link) % size,
            address,
            len as u32,
            flags,
            next as u16,
        );
    }
    first as u16
}

/// A chain as the device type expects it, with hostile content: the request, data, and room for
/// an answer. Half of them are tables of indirect descriptors.
fn request(chance: &mut Chance, kind: u32, rings: u64, size: u64, slot: u64) -> u16 {
    let buffer = BUFFERS + slot * 0x4_0000;
    let header = payload::write(chance, kind, buffer);
    let data = match chance.below(8) {
        0 => chance.number(),
        1..=3 => chance.below(0x3000),
        _ => 512 * chance.below(24),
    };
    let data_flags = if chance.one_in(2) { WRITE } else { 0 };
    let parts = [
        (ARENA + buffer, header, 0),
        (ARENA + buffer + 0x1000, data as u32, data_flags),
        (
            ARENA + buffer + 0x3_0000,
            1 + chance.below(16) as u32,
            WRITE,
        ),
    ];
    let count = parts.len() as u64;
    let (table, first) = if chance.one_in(2) {
        (rings, chance.below(size))
    } else {
        (buffer + 0x3_8000, 0)
    };
    for (link, (address, len, flags)) in (0..).zip(parts) {
        let last = link == count - 1;
        let flags = if last { flags } else { flags | NEXT };
        let wrap = if table == rings { size } else { count };
        let index = (first + link) % wrap;
        descriptor(
            table,
            index,
            address,
            len,
            flags,
            ((first + link + 1) % wrap) as u16,
        );
    }
    if table == rings {
        return first as u16;
    }
    let head = chance.below(size);
    let len = if chance.one_in(16) {
        chance.number()
    } else {
        count * 16
    };
    descriptor(rings, head, ARENA + table, len as u32, INDIRECT, 0);
    head as u16
}

fn scribble(chance: &mut Chance, queue: u64) {
    for _ in 0..64 {
        let offset = match chance.below(3) {
            // Of a descriptor, all but the address.
            0 => chance.below(0x400) * 16 + 8 + chance.below(4) * 2,
            1 => AVAILABLE_OFFSET + chance.below(0x800),
            _ => USED_OFFSET + chance.below(0x2000),
        };
        put(queue * RINGS_SIZE + offset, chance.any() as u16);
    }
}
