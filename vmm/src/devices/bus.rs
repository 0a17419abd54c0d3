//! Finds the device behind an address: one bus for I/O ports, one for memory-mapped registers.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use crate::memory::GuestMemory;

/// What answers at a range of addresses. Offsets are relative to the start of the range;
/// accesses are 1 to 8 bytes long and lie inside the range.
pub trait BusDevice: Send {
    /// The guest reads `data.len()` bytes. What the device leaves untouched reads as all ones,
    /// as on a real bus.
    fn read(&mut self, offset: u64, data: &mut [u8]);

    /// The guest writes `data`.
    fn write(&mut self, offset: u64, data: &[u8]);

    /// What state the device is in, as lines for people; nothing if it has none.
    fn describe(&self, _memory: &GuestMemory) -> Vec<String> {
        Vec::new()
    }
}

/// Two devices claim the same address, or one claims nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the range {start:#x}+{size:#x} is empty or overlaps another device")]
pub struct OverlapError {
    start: u64,
    size: u64,
}

/// An address space with devices in it.
#[derive(Clone, Default)]
pub struct Bus {
    devices: BTreeMap<u64, Entry>,
}

#[derive(Clone)]
struct Entry {
    size: u64,
    device: Arc<Mutex<dyn BusDevice>>,
}

impl Bus {
    /// An empty bus.
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts a device at `start .. start + size`.
    ///
    /// # Errors
    /// The range is empty, wraps, or overlaps that of another device.
    pub fn insert(
        &mut self,
        start: u64,
        size: u64,
        device: Arc<Mutex<dyn BusDevice>>,
    ) -> Result<(), OverlapError> {
        let overlap = OverlapError { start, size };
        let end = start
            .checked_add(size)
            .filter(|end| *end > start)
            .ok_or(overlap)?;
        let before = self.devices.range(..end).next_back();
        if before.is_some_and(|(other, entry)| other + entry.size > start) {
            return Err(overlap);
        }
        self.devices.insert(start, Entry { size, device });
        Ok(())
    }

    /// Reads from the device at `address`; without one, every bit is set.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((entry, offset)) = self.find(address, data.len()) {
            entry
                .device
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .read(offset, data);
        }
    }

    /// Writes to the device at `address`; without one, nothing happens.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((entry, offset)) = self.find(address, data.len()) {
            entry
                .device
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .write(offset, data);
        }
    }

    /// What state the devices are in, each with the address that it starts at.
    pub fn describe(&self, memory: &GuestMemory) -> Vec<(u64, Vec<String>)> {
        let describe = |(start, entry): (&u64, &Entry)| {
            let device = entry.device.lock().unwrap_or_else(PoisonError::into_inner);
            (*start, device.describe(memory))
        };
        self.devices.iter().map(describe).collect()
    }

    fn find(&self, address: u64, length: usize) -> Option<(&Entry, u64)> {
        let (start, entry) = self.devices.range(..=address).next_back()?;
        let offset = address - start;
        let end = offset.checked_add(length as u64)?;
        (end <= entry.size).then_some((entry, offset))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Register(Vec<u8>);

    impl BusDevice for Register {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data[0] = offset as u8;
        }

        fn write(&mut self, offset: u64, data: &[u8]) {
            self.0.push(offset as u8);
            self.0.extend(data);
        }
    }

    #[test]
    fn an_access_reaches_only_the_device_that_holds_all_of_it() {
        let mut bus = Bus::new();
        let register = Arc::new(Mutex::new(Register::default()));
        bus.insert(0x100, 4, register.clone()).unwrap();

        let mut data = [0; 2];
        bus.read(0x102, &mut data);
        assert_eq!(data, [2, 0xff]);
        for outside in [0xff, 0x103, 0x104, u64::MAX] {
            bus.read(outside, &mut data);
            assert_eq!(data, [0xff, 0xff], "{outside:#x}");
            bus.write(outside, &data);
        }
        bus.write(0x100, &[7]);
        assert_eq!(register.lock().unwrap().0, [0, 7]);
    }

    #[test]
    fn ranges_may_not_overlap() {
        let mut bus = Bus::new();
        let device = || Arc::new(Mutex::new(Register::default()));
        bus.insert(0x100, 0x10, device()).unwrap();
        for (start, size) in [
            (0xff, 2),
            (0x100, 1),
            (0x10f, 1),
            (0, 0x1000),
            (0, 0),
            (u64::MAX, 2),
        ] {
            assert!(
                bus.insert(start, size, device()).is_err(),
                "{start:#x}+{size:#x}"
            );
        }
        bus.insert(0xff, 1, device()).unwrap();
        bus.insert(0x110, 1, device()).unwrap();
    }
}
