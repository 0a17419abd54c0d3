//! What a network card has carried. Bytes are those of frames, without the virtio header.

use std::cell::Cell;

use crate::devices::virtio::Counters;

/// The counters of one card, which only the event loop touches.
#[derive(Debug, Default)]
pub struct NetCounters {
    rx: Direction,
    tx: Direction,
}

#[derive(Debug, Default)]
struct Direction {
    bytes: Cell<u64>,
    frames: Cell<u64>,
    drops: Cell<u64>,
}

impl Direction {
    fn carried(&self, bytes: u64) {
        self.bytes.update(|count| count.wrapping_add(bytes));
        self.frames.update(|count| count.wrapping_add(1));
    }

    fn dropped(&self) {
        self.drops.update(|count| count.wrapping_add(1));
    }
}

impl NetCounters {
    /// The guest has received a frame.
    pub fn received(&self, bytes: u64) {
        self.rx.carried(bytes);
    }

    /// A frame for the guest was lost.
    pub fn receive_dropped(&self) {
        self.rx.dropped();
    }

    /// The host has taken a frame.
    pub fn sent(&self, bytes: u64) {
        self.tx.carried(bytes);
    }

    /// A frame of the guest was lost.
    pub fn send_dropped(&self) {
        self.tx.dropped();
    }

    /// The counters by name.
    pub fn by_name(&self) -> Counters {
        Counters::from([
            ("rx_bytes", self.rx.bytes.get()),
            ("rx_frames", self.rx.frames.get()),
            ("rx_drops", self.rx.drops.get()),
            ("tx_bytes", self.tx.bytes.get()),
            ("tx_frames", self.tx.frames.get()),
            ("tx_drops", self.tx.drops.get()),
        ])
    }
}
