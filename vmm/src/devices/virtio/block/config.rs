//! The configuration space of a block device (virtio 1.2, 5.2.4).

use super::disk::Disk;
use super::{MAX_SEGMENTS, SECTOR_SIZE, SEGMENT_SECTORS, SIZE_MAX};
use crate::devices::virtio::config_space;

/// The size up to and including the limits of write-zeroes requests.
const SIZE: usize = 60;

/// Where `writeback` lies.
const WRITEBACK: usize = 32;

pub struct ConfigSpace([u8; SIZE]);

impl ConfigSpace {
    pub fn new(disk: &Disk, seg_max: u32, queues: u16) -> Self {
        let mut space = Self([0; SIZE]);
        space.set_capacity(disk.sectors());
        space.put(8, SIZE_MAX);
        space.put(12, seg_max);
        // 16..20 is the geometry and 24..32 the topology, which are not offered.
        space.put(20, SECTOR_SIZE as u32);
        space.set_writeback(true);
        space.0[34..36].copy_from_slice(&queues.to_le_bytes());
        if disk.discards() {
            space.put(36, SEGMENT_SECTORS);
            space.put(40, MAX_SEGMENTS);
            let granularity = disk.image().discard_granularity() / SECTOR_SIZE;
            space.put(44, granularity.clamp(1, SEGMENT_SECTORS.into()) as u32);
        }
        if !disk.readonly() {
            space.put(48, SEGMENT_SECTORS);
            space.put(52, MAX_SEGMENTS);
            space.0[56] = disk.discards().into();
        }
        space
    }

    fn put(&mut self, offset: usize, value: u32) {
        self.0[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
    }

    pub fn set_capacity(&mut self, sectors: u64) {
        self.0[0..8].copy_from_slice(&sectors.to_le_bytes());
    }

    pub fn set_writeback(&mut self, writeback: bool) {
        self.0[WRITEBACK] = writeback.into();
    }

    pub fn read(&self, offset: u64, data: &mut [u8]) {
        config_space::read(&self.0, offset, data);
    }

    /// A write of the driver. Returns what it chose if it wrote the one field that is writable:
    /// whether a write may be completed before it is durable.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Option<bool> {
        let [value] = data else { return None };
        if offset != WRITEBACK as u64 {
            return None;
        }
        self.set_writeback(*value != 0);
        Some(*value != 0)
    }
}
