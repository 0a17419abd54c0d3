//! A driver for tests: puts chains of any shape into the rings and looks at what comes back.

use std::os::fd::RawFd;

use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::{Activation, Interrupt, Source, VirtioDevice};
use crate::memory::GuestMemory;

/// The guest has three regions of 1 MiB: two that touch and, after a hole, a third.
pub const REGIONS: [u64; 3] = [0, 1 << 20, 3 << 20];

/// Where buffers may lie without meeting the rings.
pub const BUFFERS: u64 = 0x8_0000;

/// Queue `i` starts at `i` times this; its parts follow in steps of a quarter.
const QUEUE_SPAN: u64 = 0x1_0000;

pub struct Driver {
    pub memory: GuestMemory,
    pub interrupt: Interrupt,
    queues: Vec<QueueMirror>,
    event_idx: bool,
}

struct QueueMirror {
    size: u16,
    next_descriptor: u16,
    avail: u16,
    used: u16,
}

/// A buffer of a chain.
#[derive(Debug, Clone, Copy)]
pub struct Piece {
    pub addr: u64,
    pub len: u32,
    pub writable: bool,
}

pub fn readable(addr: u64, len: u32) -> Piece {
    Piece {
        addr,
        len,
        writable: false,
    }
}

pub fn writable(addr: u64, len: u32) -> Piece {
    Piece {
        addr,
        len,
        writable: true,
    }
}

impl Driver {
    pub fn new(event_idx: bool) -> Self {
        let regions = REGIONS.map(|base| (GuestAddress(base), 1 << 20));
        Self {
            memory: GuestMemory::from_ranges(&regions).unwrap(),
            interrupt: Interrupt::new(EventFd::new(libc::EFD_NONBLOCK).unwrap()),
            queues: Vec::new(),
            event_idx,
        }
    }

    /// Sets up all queues of `device` and activates it.
    pub fn activate(&mut self, device: &mut dyn VirtioDevice, features: u64) {
        let mut queues = Vec::new();
        self.queues.clear();
        for (index, &size) in device.queue_max_sizes().iter().enumerate() {
            let start = index as u64 * QUEUE_SPAN;
            self.memory
                .write_slice(&[0; QUEUE_SPAN as usize], GuestAddress(start))
                .unwrap();
            let mut queue = Queue::new(size).unwrap();
            queue.set_size(size);
            let at = |part: u64| Some((start + part * QUEUE_SPAN / 4) as u32);
            queue.set_desc_table_address(at(0), Some(0));
            queue.set_avail_ring_address(at(1), Some(0));
            queue.set_used_ring_address(at(2), Some(0));
            queue.set_event_idx(self.event_idx);
            queue.set_ready(true);
            assert!(queue.is_valid(&self.memory));
            queues.push(queue);
            self.queues.push(QueueMirror {
                size,
                next_descriptor: 0,
                avail: 0,
                used: 0,
            });
        }
        device
            .activate(Activation {
                memory: self.memory.clone(),
                features,
                queues,
                interrupt: self.interrupt.clone(),
            })
            .unwrap();
    }

    fn part(index: usize, part: u64) -> u64 {
        index as u64 * QUEUE_SPAN + part * QUEUE_SPAN / 4
    }

    pub fn write_descriptor(&self, queue: usize, index: u16, descriptor: Descriptor) {
        let addr = Self::part(queue, 0) + u64::from(index) * 16;
        self.memory
            .write_obj(RawDescriptor::from(descriptor), GuestAddress(addr))
            .unwrap();
    }

    /// Makes the chain that starts at descriptor `head` available.
    pub fn offer(&mut self, queue: usize, head: u16) {
        let mirror = &mut self.queues[queue];
        let ring = Self::part(queue, 1);
        let slot = u64::from(mirror.avail % mirror.size);
        mirror.avail = mirror.avail.wrapping_add(1);
        self.memory
            .write_obj(head.to_le(), GuestAddress(ring + 4 + 2 * slot))
            .unwrap();
        self.set_avail_index(queue, self.queues[queue].avail);
    }

    pub fn set_avail_index(&self, queue: usize, index: u16) {
        self.memory
            .write_obj(index.to_le(), GuestAddress(Self::part(queue, 1) + 2))
            .unwrap();
    }

    /// Goes on as if `index` chains had been used already, whose indices are 16 bits wide.
    pub fn start_at(&mut self, queue: usize, index: u16) {
        let mirror = &mut self.queues[queue];
        (mirror.avail, mirror.used) = (index, index);
        self.set_avail_index(queue, index);
        let used = GuestAddress(Self::part(queue, 2) + 2);
        self.memory.write_obj(index.to_le(), used).unwrap();
    }

    /// With `EVENT_IDX`: asks for an interrupt once the used index passes `index`.
    pub fn set_used_event(&self, queue: usize, index: u16) {
        let size = u64::from(self.queues[queue].size);
        self.memory
            .write_obj(
                index.to_le(),
                GuestAddress(Self::part(queue, 1) + 4 + 2 * size),
            )
            .unwrap();
    }

    /// Offers a chain of these buffers and returns its head.
    pub fn add(&mut self, queue: usize, pieces: &[Piece]) -> u16 {
        let mirror = &mut self.queues[queue];
        let size = mirror.size;
        let head = mirror.next_descriptor;
        mirror.next_descriptor = (head + pieces.len() as u16) % size;
        for (offset, piece) in pieces.iter().enumerate() {
            let index = (head + offset as u16) % size;
            let last = offset + 1 == pieces.len();
            self.write_descriptor(queue, index, descriptor(*piece, last, (index + 1) % size));
        }
        self.offer(queue, head);
        head
    }

    /// Offers a chain of these buffers through an indirect table at `table`.
    pub fn add_indirect(&mut self, queue: usize, table: u64, pieces: &[Piece]) -> u16 {
        for (index, piece) in pieces.iter().enumerate() {
            let last = index + 1 == pieces.len();
            let raw = RawDescriptor::from(descriptor(*piece, last, index as u16 + 1));
            self.memory
                .write_obj(raw, GuestAddress(table + 16 * index as u64))
                .unwrap();
        }
        let mirror = &mut self.queues[queue];
        let head = mirror.next_descriptor;
        mirror.next_descriptor = (head + 1) % mirror.size;
        let flags = VRING_DESC_F_INDIRECT as u16;
        let len = 16 * pieces.len() as u32;
        self.write_descriptor(queue, head, Descriptor::new(table, len, flags, 0));
        self.offer(queue, head);
        head
    }

    /// What was used since the last call: heads and lengths.
    pub fn used(&mut self, queue: usize) -> Vec<(u16, u32)> {
        let mirror = &mut self.queues[queue];
        let ring = Self::part(queue, 2);
        let index: u16 = self.memory.read_obj(GuestAddress(ring + 2)).unwrap();
        let mut used = Vec::new();
        while mirror.used != u16::from_le(index) {
            let slot = u64::from(mirror.used % mirror.size);
            let [id, len]: [u32; 2] = self
                .memory
                .read_obj(GuestAddress(ring + 4 + 8 * slot))
                .unwrap();
            used.push((u32::from_le(id) as u16, u32::from_le(len)));
            mirror.used = mirror.used.wrapping_add(1);
        }
        used
    }

    /// How often the interrupt was raised since the last call.
    pub fn interrupts(&self) -> u64 {
        self.interrupt.irqfd().read().unwrap_or(0)
    }

    pub fn write(&self, addr: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(addr)).unwrap();
    }

    pub fn read(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory
            .read_slice(&mut bytes, GuestAddress(addr))
            .unwrap();
        bytes
    }
}

/// Whether the event loop would call the device about this source.
pub fn is_ready(source: &Source) -> bool {
    wait_readable(source.fd, 0)
}

/// Waits until `fd` is readable, `timeout` milliseconds at most, and returns whether it is.
pub fn wait_readable(fd: RawFd, timeout: i32) -> bool {
    let mut poll = libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: `poll` is one valid entry.
    unsafe { libc::poll(&mut poll, 1, timeout) == 1 }
}

fn descriptor(piece: Piece, last: bool, next: u16) -> Descriptor {
    let mut flags = 0;
    if piece.writable {
        flags |= VRING_DESC_F_WRITE as u16;
    }
    if !last {
        flags |= VRING_DESC_F_NEXT as u16;
    }
    Descriptor::new(piece.addr, piece.len, flags, next)
}
