use proptest::prelude::*;

use super::*;
use crate::devices::virtio::state::{DeviceState, OwnState, RestoreError};
use crate::devices::virtio::testing::{BUFFERS, Driver, is_ready, readable};
use crate::devices::virtio::{ControlError, DeviceKind, VirtioDevice};

/// A device that gives every chain back, and notes which.
struct Mirror {
    size: [u16; 1],
    queue: Option<ActiveQueue>,
    served: Vec<u16>,
}

impl Mirror {
    fn queue(&mut self) -> &mut ActiveQueue {
        self.queue.as_mut().unwrap()
    }

    fn is_unfinished(&self) -> bool {
        let queue = self.queue.as_ref().unwrap();
        is_ready(&queue.source(0))
    }
}

impl VirtioDevice for Mirror {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Rng
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.size
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn save(&mut self) -> Result<DeviceState, ControlError> {
        Err(ControlError::NotSupported)
    }

    fn restore(&mut self, _own: &OwnState) -> Result<(), RestoreError> {
        Err(RestoreError::OwnState)
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let [queue] = ActiveQueue::from_activation(activation)?;
        self.queue = Some(queue);
        Ok(())
    }

    fn process_queue(&mut self, _index: usize) -> Result<(), DeviceError> {
        let served = &mut self.served;
        let queue = self.queue.as_mut().unwrap();
        queue.serve(|_, chain| {
            served.push(chain.head_index());
            Ok(u32::from(chain.head_index()))
        })
    }

    fn reset(&mut self) {
        self.queue = None;
    }
}

/// A driver and its device, which have used `start` chains already.
fn machine(size: u16, event_idx: bool, start: u16) -> (Driver, Mirror) {
    let mut driver = Driver::new(event_idx);
    let mut mirror = Mirror {
        size: [size],
        queue: None,
        served: Vec::new(),
    };
    driver.activate(&mut mirror, 0);
    driver.start_at(0, start);
    mirror.queue().queue.set_next_avail(start);
    mirror.queue().queue.set_next_used(start);
    (driver, mirror)
}

fn offer(driver: &mut Driver, count: u16) -> Vec<u16> {
    (0..count)
        .map(|_| driver.add(0, &[readable(BUFFERS, 8)]))
        .collect()
}

/// A start that is often close to where the indices begin anew.
fn starts() -> impl Strategy<Value = u16> {
    prop_oneof![any::<u16>(), u16::MAX - 40..=u16::MAX]
}

#[test]
fn a_chain_that_was_put_back_comes_again() {
    let (mut driver, mut mirror) = machine(16, false, u16::MAX);
    let heads = offer(&mut driver, 2);
    let queue = mirror.queue();
    assert_eq!(queue.pop().unwrap().unwrap().head_index(), heads[0]);
    assert_eq!(queue.pop().unwrap().unwrap().head_index(), heads[1]);
    queue.undo_pop();
    assert_eq!(queue.pop().unwrap().unwrap().head_index(), heads[1]);
    assert!(queue.pop().unwrap().is_none());
}

#[test]
fn more_chains_than_the_queue_holds_are_the_drivers_fault() {
    for start in [0, u16::MAX - 3] {
        let (driver, mut mirror) = machine(16, false, start);
        driver.set_avail_index(0, start.wrapping_add(17));
        let error = mirror.process_queue(0).unwrap_err();
        assert!(matches!(error, DeviceError::Queue { index: 0, .. }));
        assert!(mirror.served.is_empty());
    }
}

proptest! {
    /// Chains come out in order, each once, wherever the indices stand, and are given back in the
    /// same order with what was written. The driver is told exactly if it asked for it (virtio 1.2,
    /// 2.7.7.2 and 2.7.10).
    #[test]
    fn chains_are_served_once_and_in_order(
        event_idx in any::<bool>(),
        start in starts(),
        batches in prop::collection::vec((0_u16..=16, any::<u16>(), any::<bool>()), 1..20),
    ) {
        let (mut driver, mut mirror) = machine(16, event_idx, start);
        let mut used = start;
        for (count, far, near) in batches {
            // Asks for an interrupt when this many more than the batch before were used.
            let event = used.wrapping_add(if near { far % 20 } else { far });
            driver.set_used_event(0, event);
            let heads = offer(&mut driver, count);
            mirror.process_queue(0).unwrap();
            prop_assert_eq!(&mirror.served, &heads);
            mirror.served.clear();
            let expected: Vec<_> = heads.iter().map(|head| (*head, u32::from(*head))).collect();
            prop_assert_eq!(driver.used(0), expected);

            let wanted = if event_idx {
                (0..count).any(|index| used.wrapping_add(index) == event)
            } else {
                count > 0
            };
            prop_assert_eq!(driver.interrupts(), u64::from(wanted));
            used = used.wrapping_add(count);
            prop_assert!(!mirror.is_unfinished());
        }
    }

    /// A visit is bounded, and what it leaves has its turn later without another notification.
    #[test]
    fn visits_are_bounded_and_forget_nothing(
        event_idx in any::<bool>(),
        start in starts(),
        count in 0_u16..=256,
    ) {
        let (mut driver, mut mirror) = machine(256, event_idx, start);
        let heads = offer(&mut driver, count);
        mirror.process_queue(0).unwrap();
        let mut before = 0;
        loop {
            prop_assert!(mirror.served.len() - before <= VISIT_CHAINS);
            before = mirror.served.len();
            if !mirror.is_unfinished() {
                break;
            }
            mirror.process_queue(0).unwrap();
        }
        prop_assert_eq!(&mirror.served, &heads);
    }

    /// Whatever the rings hold, a visit ends within its bound.
    #[test]
    fn any_rings_end_a_visit(
        event_idx in any::<bool>(),
        start in any::<u16>(),
        available in any::<u16>(),
        rings in prop::collection::vec(any::<u8>(), 0x100),
    ) {
        let (driver, mut mirror) = machine(16, event_idx, start);
        // Descriptors, and both rings.
        for part in 0..3 {
            driver.write(part * 0x4000, &rings);
        }
        driver.set_avail_index(0, available);
        let outcome = mirror.process_queue(0);
        prop_assert!(mirror.served.len() <= VISIT_CHAINS);
        let waiting = available.wrapping_sub(start);
        if waiting > 16 {
            prop_assert!(outcome.is_err());
        }
        prop_assert!(mirror.served.len() <= usize::from(waiting));
    }
}
