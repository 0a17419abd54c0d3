//! The registers of a virtio device as text.

use std::num::Wrapping;
use std::sync::atomic::Ordering;

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
};
use virtio_queue::{Queue, QueueT};

use super::MmioTransport;
use crate::memory::GuestMemory;

const STATUS_BITS: [(u32, &str); 6] = [
    (VIRTIO_CONFIG_S_ACKNOWLEDGE, "ACKNOWLEDGE"),
    (VIRTIO_CONFIG_S_DRIVER, "DRIVER"),
    (VIRTIO_CONFIG_S_FEATURES_OK, "FEATURES_OK"),
    (VIRTIO_CONFIG_S_DRIVER_OK, "DRIVER_OK"),
    (VIRTIO_CONFIG_S_NEEDS_RESET, "NEEDS_RESET"),
    (VIRTIO_CONFIG_S_FAILED, "FAILED"),
];

impl MmioTransport {
    /// One line for the device and one for each queue.
    pub(super) fn lines(&self, memory: &GuestMemory) -> Vec<String> {
        let status = self.status();
        let mut names: Vec<&str> = STATUS_BITS
            .iter()
            .filter(|(bit, _)| status & bit != 0)
            .map(|(_, name)| *name)
            .collect();
        if names.is_empty() {
            names.push("reset");
        }
        let mut lines = vec![format!(
            "virtio device type {} status={status:#x} ({}) offered={:#x} accepted={:#x} interrupt={:#x}",
            self.device_id,
            names.join(" "),
            self.offered,
            self.driver_features,
            self.interrupt.status(),
        )];
        let queues = self.queues.iter().enumerate();
        lines
            .extend(queues.map(|(index, queue)| format!("queue {index}: {}", line(queue, memory))));
        lines
    }
}

/// What the registers say of a queue, and the indices as they are in the rings: `available` is
/// the driver's, `used` the device's, and what lies between is the device's to do.
fn line(queue: &Queue, memory: &GuestMemory) -> String {
    if !queue.ready() {
        return format!("not ready max_size={}", queue.max_size());
    }
    let index = |result: Result<Wrapping<u16>, virtio_queue::Error>| match result {
        Ok(index) => index.to_string(),
        Err(error) => format!("({error})"),
    };
    format!(
        "ready size={} max_size={} descriptors={:#x} available_ring={:#x} used_ring={:#x} available={} used={}",
        queue.size(),
        queue.max_size(),
        queue.desc_table(),
        queue.avail_ring(),
        queue.used_ring(),
        index(queue.avail_idx(memory, Ordering::Acquire)),
        index(queue.used_idx(memory, Ordering::Acquire)),
    )
}
