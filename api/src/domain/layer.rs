//! What a machine that was saved is made of: layers of memory and of disk.
//!
//! A layer is written once and never changed, but for one: the disk that a running machine writes to
//! is a layer already if it is to be kept, and nobody else is based on that before the machine ends. A memory layer holds what differs from the layers
//! beneath it; the bottom one holds all of a machine's memory that is not zero, and its top one the
//! state of the processors and devices. A disk layer is an overlay on the one beneath it, or on the
//! template's image.
//!
//! Machines and snapshots share layers. Who holds which is in the store, written in one transaction
//! with the holder's own record: a layer goes when its last holder does.

use serde::{Deserialize, Serialize};

use super::id::LayerId;

/// The most memory layers of one machine. Each is a mapping and an open file of its VMM, and a page
/// is looked for in one after the other when it is saved again.
const MAX_MEMORY: usize = 4;
/// The most disk layers of one machine: a few less than the VMM opens.
pub const MAX_DISK: usize = 56;

/// The layers of one machine.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Layers {
    /// Of its memory, bottom first. Empty for a machine that was booted and never saved.
    pub memory: Vec<LayerId>,
    /// Of its disk, bottom first, without the overlay that it writes to.
    pub disk: Vec<LayerId>,
}

impl Layers {
    /// Whether there are none, as for a machine that was booted and never saved.
    pub fn is_empty(&self) -> bool {
        self.memory.is_empty() && self.disk.is_empty()
    }

    /// All of them.
    pub fn all(&self) -> impl Iterator<Item = &LayerId> {
        self.memory.iter().chain(&self.disk)
    }

    /// How many of the memory layers stay the base when the machine is saved again: all, or, where
    /// that would make too many, the bottom one alone, and the new layer takes in what is in the
    /// others. The bottom one is the largest, and often shared.
    pub fn kept_memory(&self) -> usize {
        match self.memory.len() {
            len if len < MAX_MEMORY => len,
            _ => 1,
        }
    }

    /// The disk layers that are to become one, bottom first, if there are `from` of them or more: all
    /// but the bottom one, which is often shared with many.
    pub fn to_merge(&self, from: usize) -> Option<&[LayerId]> {
        match self.disk.split_first() {
            Some((_, above)) if self.disk.len() >= from && above.len() > 1 => Some(above),
            _ => None,
        }
    }

    /// Where the disk layers `merged` lie, one on top of the other, if they do.
    fn place_of(&self, merged: &[LayerId]) -> Option<usize> {
        let mut places = self.disk.windows(merged.len().max(1));
        places.position(|window| window == merged)
    }

    /// Whether the disk layers `merged` lie in these, one on top of the other.
    pub fn has(&self, merged: &[LayerId]) -> bool {
        self.place_of(merged).is_some()
    }

    /// The layers with `into` in place of the disk layers `merged`, if those lie in these.
    pub fn merged(&self, merged: &[LayerId], into: &LayerId) -> Option<Self> {
        let place = self.place_of(merged)?;
        let mut next = self.clone();
        next.disk
            .splice(place..place + merged.len(), [into.clone()]);
        Some(next)
    }

    /// The layers after the disk alone is saved to `disk`.
    pub fn saved_disk(&self, disk: LayerId) -> Self {
        let mut next = self.clone();
        next.disk.push(disk);
        next
    }

    /// Whether a machine that was based on `before` is based on these after it was saved once, of its
    /// memory and disk or of its disk alone.
    pub fn is_one_save_after(&self, before: &Self) -> bool {
        let Some((disk, below)) = self.disk.split_last() else {
            return false;
        };
        let memory = self.memory.last();
        below == before.disk
            && (*self == before.saved_disk(disk.clone())
                || memory.is_some_and(|memory| *self == before.saved(memory.clone(), disk.clone())))
    }

    /// Those of its disk alone, which a machine boots from.
    pub fn without_memory(&self) -> Self {
        Self {
            memory: Vec::new(),
            disk: self.disk.clone(),
        }
    }

    /// The layers before a machine that was booted from its disk was saved for the first time.
    pub fn before_first_save(&self) -> Self {
        let mut before = self.without_memory();
        before.disk.pop();
        before
    }

    /// The layers after the machine is saved again to the layers `memory` and `disk`.
    pub fn saved(&self, memory: LayerId, disk: LayerId) -> Self {
        let mut next = self.clone();
        next.memory.truncate(self.kept_memory());
        next.memory.push(memory);
        next.disk.push(disk);
        next
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disk_layers_become_one_where_they_lie_one_on_the_other() {
        let ids: Vec<_> = (0..5).map(|_| LayerId::random()).collect();
        let into = LayerId::random();
        let of = |disk: &[LayerId]| Layers {
            memory: vec![ids[0].clone()],
            disk: disk.to_vec(),
        };
        let all = of(&ids);
        assert_eq!(all.to_merge(6), None);
        assert_eq!(all.to_merge(5), Some(&ids[1..]));
        assert_eq!(of(&ids[..2]).to_merge(1), None, "one alone");
        assert_eq!(Layers::default().to_merge(0), None);
        let merged = all.merged(&ids[1..4], &into).unwrap();
        assert_eq!(merged, of(&[ids[0].clone(), into.clone(), ids[4].clone()]));
        assert!(all.has(&ids[3..]) && !all.has(&[ids[1].clone(), ids[3].clone()]));
        assert_eq!(of(&ids[..3]).merged(&ids[1..4], &into), None);
        assert_eq!(of(&[]).merged(&[], &into), None);
    }

    #[test]
    fn one_save_is_told_from_others_and_from_a_merge() {
        let ids: Vec<_> = (0..4).map(|_| LayerId::random()).collect();
        let mut before = Layers::default();
        for generation in 0..6 {
            let saved = before.saved(LayerId::random(), LayerId::random());
            assert!(saved.is_one_save_after(&before), "{generation}");
            assert!(before.saved_disk(ids[0].clone()).is_one_save_after(&before));
            assert!(!before.is_one_save_after(&before));
            assert!(!before.is_one_save_after(&saved));
            let twice = saved.saved(LayerId::random(), LayerId::random());
            assert!(!twice.is_one_save_after(&before));
            if generation > 1 {
                let merged = before.merged(&before.disk[1..], &ids[1]).unwrap();
                assert!(!before.is_one_save_after(&merged) && !merged.is_one_save_after(&before));
                let mut other = saved.clone();
                other.memory[0] = ids[2].clone();
                assert!(!other.is_one_save_after(&before));
            }
            before = saved;
        }
    }

    #[test]
    fn memory_chains_are_bounded_and_keep_their_bottom() {
        let mut layers = Layers::default();
        let mut bottom = None;
        for generation in 1..=50 {
            let (memory, disk) = (LayerId::random(), LayerId::random());
            let next = layers.saved(memory.clone(), disk.clone());
            assert!(next.memory.len() <= MAX_MEMORY);
            assert_eq!(next.memory.last(), Some(&memory));
            assert_eq!(next.disk.last(), Some(&disk));
            assert_eq!(next.disk.len(), generation);
            let kept = layers.kept_memory();
            assert_eq!(next.memory[..kept], layers.memory[..kept]);
            let bottom = bottom.get_or_insert_with(|| memory.clone());
            assert_eq!(&next.memory[0], bottom);
            layers = next;
        }
    }
}
