//! Memory balloon (virtio 1.2, 5.5): takes memory from a running guest and gives it back to the
//! host.
//!
//! Memory comes back in two ways:
//!
//! - Inflation: the host names a size, and the driver fills its balloon up to it with pages that
//!   the guest then does without. Deflation gives them back; they need nothing from the device,
//!   as the guest finds zeroes where it touches them again.
//! - Free page reporting: the driver names memory that the guest has free just now. It stays the
//!   guest's, which finds zeroes there.
//!
//! In a machine that was restored, the guest finds in either case what its snapshot held there.
//!
//! A driver may name any page, as often as it likes and whether it has it in its balloon or not:
//! what is discarded is the guest's own memory. Only ranges within guest memory are, and what one
//! visit to a queue costs is bounded by the sizes of the queues and by [`MAX_PAGES`].

use std::ops::Range;

use tracing::debug;
use vm_memory::GuestAddress;
use vmm_sys_util::epoll::EventSet;

use super::buffers::{ChainBuffers, ChainError, walk};
use super::queue::{ActiveQueue, Chain};
use super::state::{DeviceState, OwnState, RestoreError};
use super::{
    Activation, Control, ControlError, Counters, DeviceError, DeviceKind, Source, VirtioDevice,
    config_space,
};
use crate::config::BalloonConfig;
use crate::memory::GuestMemory;
use crate::memory::discard::discard;

/// The driver takes pages from its balloon by itself when the guest runs out of memory.
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
/// The driver reports free pages.
const F_REPORTING: u64 = 1 << 5;

const INFLATE: usize = 0;
/// Queues have the numbers that they get when those of features not offered (statistics, free
/// page hints) are left out: so Linux counts, which wrote the device's first driver.
const REPORT: usize = 2;
/// Linux reports 32 ranges at a time and needs a queue that takes as many.
const QUEUE_SIZES: [u16; 3] = [64; 3];

/// The unit of page frame numbers, whatever the size of a page.
const FRAME_SHIFT: u32 = 12;
/// The most pages that one inflation request takes. Linux names 256 at most; what a driver names
/// beyond is left to the guest.
const MAX_PAGES: usize = 512;

/// Where the driver writes the number of pages in its balloon.
const CONFIG_ACTUAL: u64 = 4;

/// The balloon device.
#[derive(Debug)]
pub struct Balloon {
    features: u64,
    /// RAM of the guest in bytes, the most that a balloon can hold.
    ram: u64,
    /// Pages that the balloon is to hold.
    target: u32,
    /// Pages that it holds by the word of the driver.
    actual: u32,
    inflated: u64,
    reported: u64,
    driver: Option<Driver>,
}

#[derive(Debug)]
struct Driver {
    queues: [ActiveQueue; 3],
    reports: bool,
}

impl Balloon {
    /// A balloon for a guest with `ram` bytes of memory.
    pub fn new(config: &BalloonConfig, ram: u64) -> Self {
        let mut features = 0;
        if config.deflate_on_oom {
            features |= F_DEFLATE_ON_OOM;
        }
        if config.free_page_reporting {
            features |= F_REPORTING;
        }
        Self {
            features,
            ram,
            target: pages(config.size.min(ram)),
            actual: 0,
            inflated: 0,
            reported: 0,
            driver: None,
        }
    }

    fn serve(&mut self, index: usize) -> Result<(), DeviceError> {
        let Some(driver) = &mut self.driver else {
            return Ok(());
        };
        let Some(queue) = driver.queues.get_mut(index) else {
            return Ok(());
        };
        let (inflated, reported) = (&mut self.inflated, &mut self.reported);
        queue.serve(|memory, chain| {
            let outcome = match index {
                INFLATE => inflate(memory, chain, inflated),
                REPORT if driver.reports => report(memory, chain, reported),
                _ => Ok(()),
            };
            if let Err(error) = outcome {
                debug!(%error, index, "balloon: malformed request");
            }
            Ok(0)
        })
    }
}

/// How many pages of the balloon `size` bytes are.
fn pages(size: u64) -> u32 {
    u32::try_from(size >> FRAME_SHIFT).unwrap_or(u32::MAX)
}

fn bytes(pages: u32) -> u64 {
    u64::from(pages) << FRAME_SHIFT
}

/// Discards the pages whose numbers a request holds.
fn inflate(memory: &GuestMemory, chain: Chain, total: &mut u64) -> Result<(), ChainError> {
    let limit = usize::from(QUEUE_SIZES[INFLATE]);
    let numbers = ChainBuffers::collect(memory, chain, limit)?.readable;
    let mut raw = [0; 4 * MAX_PAGES];
    let length = numbers.copy_to(&mut raw);
    let mut frames: Vec<u32> = raw[..length]
        .as_chunks()
        .0
        .iter()
        .map(|bytes| u32::from_le_bytes(*bytes))
        .collect();
    // The driver names pages in no order, though most of them are neighbours.
    frames.sort_unstable();
    for run in runs(&frames) {
        give_back(memory, run.start, run.end - run.start, total);
    }
    Ok(())
}

/// The ranges of memory that sorted page frame numbers form.
fn runs(frames: &[u32]) -> impl Iterator<Item = Range<u64>> {
    frames
        .chunk_by(|a, b| b - a <= 1)
        .filter_map(|run| Some((run.first()?, run.last()?)))
        .map(|(first, last)| bytes(*first)..bytes(*last) + (1 << FRAME_SHIFT))
}

/// Discards the memory that the buffers of a request are.
fn report(memory: &GuestMemory, chain: Chain, total: &mut u64) -> Result<(), ChainError> {
    walk(chain, QUEUE_SIZES[REPORT].into(), |descriptor| {
        if !descriptor.is_write_only() {
            return Err(ChainError::Direction);
        }
        let length = u64::from(descriptor.len());
        give_back(memory, descriptor.addr().0, length, total);
        Ok(())
    })
}

fn give_back(memory: &GuestMemory, start: u64, length: u64, total: &mut u64) {
    match discard(memory, GuestAddress(start), length) {
        Ok(given) => *total = total.saturating_add(given),
        Err(error) => {
            let error = crate::error_chain(&error);
            debug!(error, start, length, "balloon: memory cannot be given back");
        }
    }
}

impl VirtioDevice for Balloon {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Balloon
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut space = [0; 8];
        space[..4].copy_from_slice(&self.target.to_le_bytes());
        space[4..].copy_from_slice(&self.actual.to_le_bytes());
        config_space::read(&space, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (CONFIG_ACTUAL, Ok(actual)) = (offset, data.try_into()) {
            self.actual = u32::from_le_bytes(actual);
        }
    }

    /// `target_bytes` and `actual_bytes` are the balloon's size as the host and as the driver has
    /// it now; `inflated_bytes` and `reported_bytes` count what was ever given back.
    fn counters(&self) -> Counters {
        Counters::from([
            ("target_bytes", bytes(self.target)),
            ("actual_bytes", bytes(self.actual)),
            ("inflated_bytes", self.inflated),
            ("reported_bytes", self.reported),
        ])
    }

    fn control(&mut self, control: Control) -> Result<(), ControlError> {
        let Control::ResizeBalloon { size } = control else {
            return Err(ControlError::NotSupported);
        };
        if size > self.ram {
            return Err(ControlError::Refused(format!(
                "a balloon of {size} bytes does not fit into {} bytes of memory",
                self.ram
            )));
        }
        self.target = pages(size);
        Ok(())
    }

    fn save(&mut self) -> Result<DeviceState, ControlError> {
        let queues = self.driver.as_ref().map(|driver| &driver.queues);
        Ok(DeviceState {
            queues: queues.map(|queues| queues.iter().map(ActiveQueue::save).collect()),
            own: OwnState::Balloon {
                target: self.target,
                actual: self.actual,
            },
        })
    }

    fn restore(&mut self, own: &OwnState) -> Result<(), RestoreError> {
        let OwnState::Balloon { target, actual } = *own else {
            return Err(RestoreError::OwnState);
        };
        self.target = target.min(pages(self.ram));
        self.actual = actual;
        Ok(())
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let reports = activation.features & F_REPORTING != 0;
        let queues = ActiveQueue::from_activation(activation)?;
        self.driver = Some(Driver { queues, reports });
        Ok(())
    }

    fn sources(&self) -> Vec<Source> {
        let queues = self.driver.iter().flat_map(|driver| &driver.queues);
        (0..)
            .zip(queues)
            .map(|(token, queue)| queue.source(token))
            .collect()
    }

    fn process_queue(&mut self, index: usize) -> Result<(), DeviceError> {
        self.serve(index)
    }

    fn process_source(&mut self, token: u32, _ready: EventSet) -> Result<(), DeviceError> {
        self.serve(token as usize)
    }

    fn reset(&mut self) {
        self.driver = None;
        // The balloon of a driver that went away is empty: the guest has its pages again.
        self.actual = 0;
    }
}

#[cfg(test)]
mod tests;
