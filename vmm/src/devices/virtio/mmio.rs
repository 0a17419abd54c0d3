//! The registers of a virtio device over MMIO, version 2 (virtio 1.2, 4.2).
//!
//! A driver leads the device through these states by setting bits of the status register
//! (virtio 1.2, 3.1.1), each step only from the one before:
//!
//! ```text
//!  reset ──ACKNOWLEDGE, DRIVER──► found ──FEATURES_OK──► negotiated ──DRIVER_OK──► active
//!    ▲                                                   (queues are set up here)     │
//!    │                                                                                │
//!    └──── 0, from any state ◄──── NEEDS_RESET ◄──── malformed rings, host failure ───┘
//! ```
//!
//! FEATURES_OK stays clear if the driver accepted a feature that was not offered. Activation
//! and reset happen on the event loop ([`super::worker`]) while the vCPU waits for the outcome,
//! so the driver never sees a state that has not been reached.

mod describe;

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_CONFIG_GENERATION, VIRTIO_MMIO_DEVICE_FEATURES,
    VIRTIO_MMIO_DEVICE_FEATURES_SEL, VIRTIO_MMIO_DEVICE_ID, VIRTIO_MMIO_DRIVER_FEATURES,
    VIRTIO_MMIO_DRIVER_FEATURES_SEL, VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INTERRUPT_STATUS,
    VIRTIO_MMIO_MAGIC_VALUE, VIRTIO_MMIO_QUEUE_AVAIL_HIGH, VIRTIO_MMIO_QUEUE_AVAIL_LOW,
    VIRTIO_MMIO_QUEUE_DESC_HIGH, VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_NOTIFY,
    VIRTIO_MMIO_QUEUE_NUM, VIRTIO_MMIO_QUEUE_NUM_MAX, VIRTIO_MMIO_QUEUE_READY,
    VIRTIO_MMIO_QUEUE_SEL, VIRTIO_MMIO_QUEUE_USED_HIGH, VIRTIO_MMIO_QUEUE_USED_LOW,
    VIRTIO_MMIO_SHM_BASE_HIGH, VIRTIO_MMIO_SHM_LEN_LOW, VIRTIO_MMIO_STATUS, VIRTIO_MMIO_VENDOR_ID,
    VIRTIO_MMIO_VERSION,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueT};

use super::state::{RestoreError, SavedQueue, TransportState, restore_queues};
use super::worker::{Link, Notifier};
use super::{Interrupt, VirtioDevice};
use crate::devices::bus::BusDevice;
use crate::memory::GuestMemory;

/// "virt", little-endian.
const MAGIC: u32 = 0x7472_6976;
/// Version of the register layout: 2 is everything but legacy.
const LAYOUT_VERSION: u32 = 2;
/// "MVSB": the specification leaves the vendor to us.
const VENDOR_ID: u32 = 0x4253_564d;

/// What the transport offers for every device.
const TRANSPORT_FEATURES: u64 =
    (1 << VIRTIO_F_VERSION_1) | (1 << VIRTIO_RING_F_EVENT_IDX) | (1 << VIRTIO_RING_F_INDIRECT_DESC);

const STATUS_NEGOTIATED: u32 =
    VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER | VIRTIO_CONFIG_S_FEATURES_OK;

/// The registers of one device.
pub struct MmioTransport {
    device: Arc<Mutex<dyn VirtioDevice>>,
    device_id: u32,
    offered: u64,
    queues: Vec<Queue>,
    notifiers: Vec<Notifier>,
    interrupt: Interrupt,
    /// Set by the event loop when the device had to give up on its driver.
    needs_reset: Arc<AtomicBool>,
    /// Counts the changes of the device's configuration.
    generation: Arc<AtomicU32>,
    link: Link,

    status: u32,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
}

impl MmioTransport {
    pub(super) fn new(
        device: Arc<Mutex<dyn VirtioDevice>>,
        queues: Vec<Queue>,
        notifiers: Vec<Notifier>,
        interrupt: Interrupt,
        needs_reset: Arc<AtomicBool>,
        generation: Arc<AtomicU32>,
        link: Link,
    ) -> Self {
        let (device_id, offered) = {
            let device = device.lock().unwrap_or_else(PoisonError::into_inner);
            (device.kind() as u32, device.features() | TRANSPORT_FEATURES)
        };
        Self {
            device,
            device_id,
            offered,
            queues,
            notifiers,
            interrupt,
            needs_reset,
            generation,
            link,
            status: 0,
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            queue_select: 0,
        }
    }

    /// The registers as they are.
    pub(super) fn save(&self) -> TransportState {
        TransportState {
            device_id: self.device_id,
            status: self.status,
            needs_reset: self.needs_reset.load(Ordering::SeqCst),
            driver_features: self.driver_features,
            device_features_select: self.device_features_select,
            driver_features_select: self.driver_features_select,
            queue_select: self.queue_select,
            interrupt_status: self.interrupt.status(),
            generation: self.generation.load(Ordering::SeqCst),
            queues: self.queues.iter().map(SavedQueue::of).collect(),
        }
    }

    /// Takes over the registers of another device.
    ///
    /// # Errors
    /// This one is of another kind, or lacks what the driver uses.
    pub(super) fn restore(&mut self, state: &TransportState) -> Result<(), RestoreError> {
        if state.device_id != self.device_id {
            return Err(RestoreError::Kind {
                saved: state.device_id,
                here: self.device_id,
            });
        }
        let missing = state.driver_features & !self.offered;
        if missing != 0 {
            return Err(RestoreError::Features { features: missing });
        }
        let max_sizes: Vec<u16> = self.queues.iter().map(QueueT::max_size).collect();
        self.queues = restore_queues(&state.queues, &max_sizes)?;
        self.status = state.status;
        self.needs_reset.store(state.needs_reset, Ordering::SeqCst);
        self.driver_features = state.driver_features;
        self.device_features_select = state.device_features_select;
        self.driver_features_select = state.driver_features_select;
        self.queue_select = state.queue_select;
        self.interrupt.restore(state.interrupt_status);
        self.generation.store(state.generation, Ordering::SeqCst);
        Ok(())
    }

    fn status(&self) -> u32 {
        if self.needs_reset.load(Ordering::SeqCst) {
            self.status | VIRTIO_CONFIG_S_NEEDS_RESET
        } else {
            self.status
        }
    }

    fn selected_queue(&self) -> Option<&Queue> {
        self.queues.get(self.queue_select as usize)
    }

    /// The selected queue, if the driver may set it up now.
    fn queue_in_setup(&mut self) -> Option<&mut Queue> {
        (self.status == STATUS_NEGOTIATED)
            .then(|| self.queues.get_mut(self.queue_select as usize))
            .flatten()
    }

    fn read_register(&self, offset: u32) -> u32 {
        match offset {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => LAYOUT_VERSION,
            VIRTIO_MMIO_DEVICE_ID => self.device_id,
            VIRTIO_MMIO_VENDOR_ID => VENDOR_ID,
            VIRTIO_MMIO_DEVICE_FEATURES => match self.device_features_select {
                0 => self.offered as u32,
                1 => (self.offered >> 32) as u32,
                _ => 0,
            },
            VIRTIO_MMIO_QUEUE_NUM_MAX => self
                .selected_queue()
                .map_or(0, |queue| u32::from(queue.max_size())),
            VIRTIO_MMIO_QUEUE_READY => self
                .selected_queue()
                .map_or(0, |queue| u32::from(queue.ready())),
            VIRTIO_MMIO_INTERRUPT_STATUS => self.interrupt.status(),
            VIRTIO_MMIO_STATUS => self.status(),
            // No device has shared memory, which a length of all ones says (4.2.2).
            VIRTIO_MMIO_SHM_LEN_LOW..=VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            // No device changes more than one field of its configuration at a time.
            VIRTIO_MMIO_CONFIG_GENERATION => self.generation.load(Ordering::SeqCst),
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u32, value: u32) {
        match offset {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.device_features_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_features_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES if self.status & VIRTIO_CONFIG_S_FEATURES_OK == 0 => {
                let (kept, new) = match self.driver_features_select {
                    0 => (self.driver_features & !0xffff_ffff, u64::from(value)),
                    1 => (self.driver_features & 0xffff_ffff, u64::from(value) << 32),
                    _ => return,
                };
                self.driver_features = kept | new;
            }
            VIRTIO_MMIO_QUEUE_SEL => self.queue_select = value,
            VIRTIO_MMIO_QUEUE_NOTIFY => {
                // The ioeventfds catch these; what comes here was written in an odd width.
                if let Some(notifier) = self.notifiers.get(value as usize) {
                    notifier.notify();
                }
            }
            VIRTIO_MMIO_INTERRUPT_ACK => self.interrupt.acknowledge(value),
            VIRTIO_MMIO_STATUS => self.write_status(value),
            _ => self.write_queue_register(offset, value),
        }
    }

    fn write_queue_register(&mut self, offset: u32, value: u32) {
        let Some(queue) = self.queue_in_setup() else {
            return;
        };
        match offset {
            VIRTIO_MMIO_QUEUE_NUM => {
                // Too large a number is left as it was, and so is one that is no u16.
                if let Ok(size) = u16::try_from(value) {
                    queue.set_size(size);
                }
            }
            VIRTIO_MMIO_QUEUE_READY => queue.set_ready(value == 1),
            VIRTIO_MMIO_QUEUE_DESC_LOW => queue.set_desc_table_address(Some(value), None),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => queue.set_desc_table_address(None, Some(value)),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => queue.set_avail_ring_address(Some(value), None),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => queue.set_avail_ring_address(None, Some(value)),
            VIRTIO_MMIO_QUEUE_USED_LOW => queue.set_used_ring_address(Some(value), None),
            VIRTIO_MMIO_QUEUE_USED_HIGH => queue.set_used_ring_address(None, Some(value)),
            _ => {}
        }
    }

    fn write_status(&mut self, value: u32) {
        if value == 0 {
            self.reset();
            return;
        }
        // Bits are only ever added, and a device that needs a reset takes nothing else.
        let added = value & !self.status;
        if value & self.status != self.status || self.needs_reset.load(Ordering::SeqCst) {
            return;
        }
        let early = added & (VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER);
        self.status |= early | (added & VIRTIO_CONFIG_S_FAILED);
        if added & VIRTIO_CONFIG_S_FEATURES_OK != 0 && self.features_are_acceptable() {
            self.status |= VIRTIO_CONFIG_S_FEATURES_OK;
        }
        if added & VIRTIO_CONFIG_S_DRIVER_OK != 0 && self.status == STATUS_NEGOTIATED {
            self.activate();
        }
    }

    fn features_are_acceptable(&self) -> bool {
        self.driver_features & !self.offered == 0
            && self.driver_features & (1 << VIRTIO_F_VERSION_1) != 0
    }

    fn activate(&mut self) {
        let event_idx = self.driver_features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        for queue in &mut self.queues {
            queue.set_event_idx(event_idx);
        }
        let queues = self.queues.iter().map(copy_of).collect();
        self.link.activate(self.driver_features, queues);
        self.status |= VIRTIO_CONFIG_S_DRIVER_OK;
    }

    fn reset(&mut self) {
        if self.status & VIRTIO_CONFIG_S_DRIVER_OK != 0 {
            self.link.reset();
        }
        self.needs_reset.store(false, Ordering::SeqCst);
        self.interrupt.acknowledge(u32::MAX);
        self.status = 0;
        self.device_features_select = 0;
        self.driver_features_select = 0;
        self.driver_features = 0;
        self.queue_select = 0;
        for queue in &mut self.queues {
            queue.reset();
        }
    }
}

/// The same queue for the device's side. The registers keep their own, for QueueReady and for
/// the next activation.
fn copy_of(queue: &Queue) -> Queue {
    let state = queue.state();
    // Fails only on a state that no queue can be in.
    Queue::try_from(state).unwrap_or_default()
}

impl BusDevice for MmioTransport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        // Lossless: a device has 4 KiB of registers.
        let offset = offset as u32;
        if offset >= VIRTIO_MMIO_CONFIG {
            data.fill(0);
            let device = self.device.lock().unwrap_or_else(PoisonError::into_inner);
            device.read_config(u64::from(offset - VIRTIO_MMIO_CONFIG), data);
        } else if let Ok(register) = <&mut [u8; 4]>::try_from(data) {
            *register = self.read_register(offset).to_le_bytes();
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let offset = offset as u32;
        if offset >= VIRTIO_MMIO_CONFIG {
            if self.status & VIRTIO_CONFIG_S_DRIVER != 0 {
                let mut device = self.device.lock().unwrap_or_else(PoisonError::into_inner);
                device.write_config(u64::from(offset - VIRTIO_MMIO_CONFIG), data);
            }
        } else if let Ok(register) = <[u8; 4]>::try_from(data) {
            self.write_register(offset, u32::from_le_bytes(register));
        }
    }

    fn describe(&self, memory: &GuestMemory) -> Vec<String> {
        self.lines(memory)
    }
}
