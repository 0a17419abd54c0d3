//! Virtio devices in a snapshot: their registers, their queues, and what else a kind of device
//! remembers. What they stand on, such as images, taps and sockets, comes with the configuration of
//! the machine that is restored.
//!
//! All of it may come from somebody hostile. It is checked against the device that it is given to,
//! and can then do what a driver could have done.

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueState};

use super::DeviceError;

/// Why a device cannot take over the state of another one.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The machine had something else in this place.
    #[error("the snapshot has a device of type {saved} here, the machine one of type {here}")]
    Kind {
        /// Virtio device type in the snapshot.
        saved: u32,
        /// Virtio device type of the machine.
        here: u32,
    },
    /// The state is that of another kind of device.
    #[error("the state of the device is that of another kind")]
    OwnState,
    /// Another number of queues.
    #[error("the device had {saved} queues in the snapshot, and has {here}")]
    Queues {
        /// In the snapshot.
        saved: usize,
        /// Of the machine.
        here: usize,
    },
    /// A queue that the device cannot have.
    #[error("queue {index} cannot be restored")]
    Queue {
        /// Index of the queue.
        index: usize,
        /// What is wrong with it.
        #[source]
        source: virtio_queue::Error,
    },
    /// The driver uses what the device has no longer.
    #[error("the guest uses the features {features:#x}, which the device does not have here")]
    Features {
        /// Those that are missing.
        features: u64,
    },
    /// A disk of another size.
    #[error("the disk had {saved} sectors of 512 bytes in the snapshot, and has {here}")]
    DiskSize {
        /// In the snapshot.
        saved: u64,
        /// Of the machine.
        here: u64,
    },
    /// Plugged memory that the machine does not have.
    #[error("the snapshot has memory plugged that the machine has no room for")]
    PluggedMemory,
    /// The device cannot serve its driver here.
    #[error("the device cannot go on here")]
    Activate(#[source] DeviceError),
}

/// A queue, by its registers and by how far the device has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedQueue {
    size: u16,
    ready: bool,
    desc_table: u64,
    avail_ring: u64,
    used_ring: u64,
    event_idx: bool,
    next_avail: u16,
    next_used: u16,
}

impl SavedQueue {
    /// The queue as it is.
    pub fn of(queue: &Queue) -> Self {
        let state = queue.state();
        Self {
            size: state.size,
            ready: state.ready,
            desc_table: state.desc_table,
            avail_ring: state.avail_ring,
            used_ring: state.used_ring,
            event_idx: state.event_idx_enabled,
            next_avail: state.next_avail,
            next_used: state.next_used,
        }
    }

    fn restore(&self, max_size: u16) -> Result<Queue, virtio_queue::Error> {
        Queue::try_from(QueueState {
            max_size,
            next_avail: self.next_avail,
            next_used: self.next_used,
            event_idx_enabled: self.event_idx,
            size: self.size,
            ready: self.ready,
            desc_table: self.desc_table,
            avail_ring: self.avail_ring,
            used_ring: self.used_ring,
        })
    }
}

/// The queues of a device in the state that others had.
///
/// # Errors
/// The device has others.
pub fn restore_queues(saved: &[SavedQueue], max_sizes: &[u16]) -> Result<Vec<Queue>, RestoreError> {
    if saved.len() != max_sizes.len() {
        return Err(RestoreError::Queues {
            saved: saved.len(),
            here: max_sizes.len(),
        });
    }
    let pairs = saved.iter().zip(max_sizes).enumerate();
    pairs
        .map(|(index, (queue, max_size))| {
            queue
                .restore(*max_size)
                .map_err(|source| RestoreError::Queue { index, source })
        })
        .collect()
}

/// The registers of a device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TransportState {
    /// Virtio device type.
    pub device_id: u32,
    /// The status register.
    pub status: u32,
    /// Whether the device has given up on its driver.
    pub needs_reset: bool,
    /// What the driver accepted.
    pub driver_features: u64,
    /// Which half of the offered features is read.
    pub device_features_select: u32,
    /// Which half of the accepted features is written.
    pub driver_features_select: u32,
    /// Which queue is set up.
    pub queue_select: u32,
    /// Reasons for an interrupt that the driver has not acknowledged.
    pub interrupt_status: u32,
    /// How often the configuration has changed.
    pub generation: u32,
    /// The queues as the driver has set them up.
    pub queues: Vec<SavedQueue>,
}

/// What a device remembers besides its queues, by its kind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum OwnState {
    /// A disk.
    Block {
        /// Its size in sectors of 512 bytes.
        sectors: u64,
        /// Whether writes may be completed before they are durable.
        writeback: bool,
    },
    /// A network card.
    Net {
        /// The pairs of queues on which the driver receives.
        used_pairs: usize,
    },
    /// The socket device. Its connections do not outlive a snapshot.
    Vsock {
        /// The port that the next connection from the host comes from: the guest may not have
        /// forgotten those before.
        next_port: u32,
    },
    /// The entropy device.
    Rng {},
    /// The balloon.
    Balloon {
        /// Pages that it is to hold.
        target: u32,
        /// Pages that it holds by the word of the driver.
        actual: u32,
    },
    /// The memory device.
    Mem {
        /// What the host aims at, in bytes.
        requested: u64,
        /// Runs of plugged blocks: the first, and how many.
        plugged: Vec<(usize, usize)>,
    },
}

/// The behaviour of a device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceState {
    /// How far it has come with each queue; `None` if it has no driver at the moment.
    pub queues: Option<Vec<SavedQueue>>,
    /// What else it remembers.
    pub own: OwnState,
}

/// A device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VirtioState {
    /// Its registers.
    pub transport: TransportState,
    /// Its behaviour.
    pub device: DeviceState,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_queue_is_restored_as_it_was_or_refused(
            (size, ready, event_idx) in (0_u16..300, any::<bool>(), any::<bool>()),
            (desc_table, avail_ring, used_ring) in (any::<u64>(), any::<u64>(), any::<u64>()),
            (next_avail, next_used) in (any::<u16>(), any::<u16>()),
        ) {
            let saved = SavedQueue {
                size,
                ready,
                // The driver cannot write other addresses (virtio 1.2, 2.7).
                desc_table: desc_table & !15,
                avail_ring: avail_ring & !1,
                used_ring: used_ring & !3,
                event_idx,
                next_avail,
                next_used,
            };
            let fits = size.is_power_of_two() && size <= 256;
            match restore_queues(&[saved], &[256]) {
                Ok(queues) => prop_assert_eq!(SavedQueue::of(&queues[0]), saved),
                Err(_) => prop_assert!(!fits),
            }
            prop_assert!(restore_queues(&[saved, saved], &[256]).is_err());
        }
    }
}
