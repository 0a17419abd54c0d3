//! Which blocks of a memory device's region are plugged.

use std::ops::Range;

/// The state of a run of blocks, in the numbers of the protocol (virtio 1.2, 5.15.6.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum BlockState {
    /// All of them can be used.
    Plugged = 0,
    /// None of them can.
    Unplugged = 1,
    /// Some of them can.
    Mixed = 2,
}

/// The blocks of a region, all unplugged at first.
#[derive(Debug)]
pub struct Blocks {
    plugged: Vec<bool>,
    count: usize,
}

impl Blocks {
    /// A region of `total` blocks.
    pub fn new(total: usize) -> Self {
        Self {
            plugged: vec![false; total],
            count: 0,
        }
    }

    /// The number of plugged blocks.
    pub fn count(&self) -> usize {
        self.count
    }

    /// The state of these blocks, or `None` if there are none or some lie outside of the region.
    pub fn state(&self, range: Range<usize>) -> Option<BlockState> {
        let blocks = self.plugged.get(range)?;
        let first = *blocks.first()?;
        Some(if blocks.iter().any(|plugged| *plugged != first) {
            BlockState::Mixed
        } else if first {
            BlockState::Plugged
        } else {
            BlockState::Unplugged
        })
    }

    /// Plugs or unplugs the blocks, if all of them lie in the region.
    pub fn set(&mut self, range: Range<usize>, plugged: bool) {
        for block in self.plugged.get_mut(range).unwrap_or_default() {
            match (*block, plugged) {
                (false, true) => self.count += 1,
                (true, false) => self.count -= 1,
                _ => {}
            }
            *block = plugged;
        }
    }

    /// The runs of plugged blocks: the first of each, and how many they are.
    pub fn plugged_runs(&self) -> Vec<(usize, usize)> {
        let mut runs: Vec<(usize, usize)> = Vec::new();
        for (index, _) in self
            .plugged
            .iter()
            .enumerate()
            .filter(|(_, plugged)| **plugged)
        {
            match runs.last_mut() {
                Some((first, count)) if *first + *count == index => *count += 1,
                _ => runs.push((index, 1)),
            }
        }
        runs
    }

    /// Unplugs all blocks.
    pub fn clear(&mut self) {
        self.plugged.fill(false);
        self.count = 0;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_run_of_blocks_is_plugged_unplugged_or_mixed() {
        let mut blocks = Blocks::new(8);
        blocks.set(2..5, true);
        blocks.set(4..6, true);
        assert_eq!(blocks.count(), 4);
        assert_eq!(blocks.state(2..6), Some(BlockState::Plugged));
        assert_eq!(blocks.state(6..8), Some(BlockState::Unplugged));
        assert_eq!(blocks.state(1..3), Some(BlockState::Mixed));
        for outside in [3..3, 7..9, 9..10, 0..usize::MAX] {
            assert_eq!(blocks.state(outside), None);
        }
        blocks.set(0..4, false);
        assert_eq!(blocks.count(), 2);
        blocks.clear();
        let all = blocks.state(0..8);
        assert_eq!((blocks.count(), all), (0, Some(BlockState::Unplugged)));
    }

    proptest! {
        #[test]
        fn the_count_is_that_of_the_plugged_blocks(
            steps in prop::collection::vec((0_usize..40, 0_usize..40, any::<bool>()), 0..40),
        ) {
            let mut blocks = Blocks::new(32);
            for (start, end, plugged) in steps {
                blocks.set(start..end, plugged);
            }
            let single = |index| blocks.state(index..index + 1) == Some(BlockState::Plugged);
            prop_assert_eq!((0..32).filter(|index| single(*index)).count(), blocks.count());

            let mut again = Blocks::new(32);
            for (first, count) in blocks.plugged_runs() {
                again.set(first..first + count, true);
            }
            prop_assert_eq!(again.plugged, blocks.plugged);
        }
    }
}
