//! Sets of pages, as sorted runs of offsets.
//!
//! An offset counts the bytes of a guest's memory from its first region on, without the gaps
//! between regions: it is the place in a file that holds all of the memory.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::PAGE_SIZE;

/// A set of pages: sorted, not empty runs that do not touch.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Extents(Vec<(u64, u64)>);

/// A list of runs is not one of sorted pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the list of pages is not sorted, overlaps, or is not of whole pages")]
pub struct MalformedError;

impl Extents {
    /// The set of the pages in `runs`, which may overlap and be in any order. They consist of whole
    /// pages.
    pub fn of(mut runs: Vec<Range<u64>>) -> Self {
        runs.sort_by_key(|run| run.start);
        let mut set = Self::default();
        for run in runs {
            set.append(run);
        }
        set
    }

    /// Adds pages that lie behind all others, or overlap the last ones.
    pub fn append(&mut self, run: Range<u64>) {
        if run.is_empty() {
            return;
        }
        match self.0.last_mut() {
            Some((_, end)) if run.start <= *end => *end = run.end.max(*end),
            _ => self.0.push((run.start, run.end)),
        }
    }

    /// The runs, in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Range<u64>> + Clone + '_ {
        self.0.iter().map(|(start, end)| *start..*end)
    }

    /// The end of the last page.
    pub fn end(&self) -> u64 {
        self.0.last().map_or(0, |(_, end)| *end)
    }

    /// The number of bytes in the set.
    pub fn bytes(&self) -> u64 {
        self.iter().map(|run| run.end - run.start).sum()
    }

    /// Whether the page at `offset` is in the set.
    pub fn contains(&self, offset: u64) -> bool {
        let after = self.0.partition_point(|(start, _)| *start <= offset);
        after > 0 && self.0.get(after - 1).is_some_and(|(_, end)| offset < *end)
    }

    /// The pages of either set.
    pub fn union(&self, other: &Self) -> Self {
        Self::of(self.iter().chain(other.iter()).collect())
    }

    /// The pages of this set that are not in `other`.
    pub fn without(&self, other: &Self) -> Self {
        let mut rest = Self::default();
        let mut holes = other.iter().peekable();
        for run in self.iter() {
            let mut at = run.start;
            while let Some(hole) = holes.peek().cloned() {
                if hole.start >= run.end {
                    break;
                }
                rest.append(at..hole.start.max(at));
                at = at.max(hole.end);
                if hole.end > run.end {
                    break;
                }
                holes.next();
            }
            rest.append(at..run.end.max(at));
        }
        rest
    }

    /// The gaps that separate runs, the shortest of which would have to be filled for no more than
    /// `limit` runs to be left.
    pub fn gaps_to_fill(&self, limit: usize) -> Self {
        let pairs = self.0.iter().zip(self.0.iter().skip(1));
        let mut gaps: Vec<_> = pairs.map(|((_, end), (next, _))| *end..*next).collect();
        gaps.sort_by_key(|gap| gap.end - gap.start);
        gaps.truncate(self.0.len().saturating_sub(limit.max(1)));
        Self::of(gaps)
    }
}

impl<'de> Deserialize<'de> for Extents {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let runs = Vec::<(u64, u64)>::deserialize(deserializer)?;
        let is_whole = |at: &u64| at.is_multiple_of(PAGE_SIZE);
        let mut last = None;
        for (start, end) in &runs {
            let follows = last.is_none_or(|last| *start > last);
            if !follows || start >= end || !is_whole(start) || !is_whole(end) {
                return Err(serde::de::Error::custom(MalformedError));
            }
            last = Some(*end);
        }
        Ok(Self(runs))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn pages(set: &Extents) -> BTreeSet<u64> {
        let run =
            |run: Range<u64>| (run.start / PAGE_SIZE..run.end / PAGE_SIZE).collect::<Vec<_>>();
        set.iter().flat_map(run).collect()
    }

    fn set() -> impl Strategy<Value = Extents> {
        prop::collection::vec((0_u64..60, 0_u64..8), 0..12).prop_map(|runs| {
            let bytes = |(start, len)| start * PAGE_SIZE..(start + len) * PAGE_SIZE;
            Extents::of(runs.into_iter().map(bytes).collect())
        })
    }

    proptest! {
        #[test]
        fn sets_of_pages_are_sets(a in set(), b in set(), limit in 0_usize..8) {
            let (left, right) = (pages(&a), pages(&b));
            let union: BTreeSet<_> = left.union(&right).copied().collect();
            prop_assert_eq!(pages(&a.union(&b)), union);
            let rest: BTreeSet<_> = left.difference(&right).copied().collect();
            prop_assert_eq!(pages(&a.without(&b)), rest);
            for page in 0..70 {
                prop_assert_eq!(a.contains(page * PAGE_SIZE + 1), left.contains(&page));
            }
            prop_assert_eq!(a.bytes(), left.len() as u64 * PAGE_SIZE);
            let filled = a.union(&a.gaps_to_fill(limit));
            prop_assert!(filled.iter().len() <= limit.max(1));
            prop_assert_eq!(filled.end(), a.end());

            let text = serde_json::to_string(&a).unwrap();
            prop_assert_eq!(serde_json::from_str::<Extents>(&text).unwrap(), a);
        }

        #[test]
        fn what_is_read_is_sorted_and_whole(
            runs in prop::collection::vec((0_u64..6, 0_u64..6), 0..4),
            shift in 0_u64..2,
        ) {
            let bytes = |(start, end)| (start * PAGE_SIZE + shift, end * PAGE_SIZE);
            let runs: Vec<_> = runs.into_iter().map(bytes).collect();
            let text = serde_json::to_string(&runs).unwrap();
            if let Ok(set) = serde_json::from_str::<Extents>(&text) {
                let ranges = runs.iter().map(|(start, end)| *start..*end);
                prop_assert_eq!(Extents::of(ranges.collect()), set.clone());
                prop_assert_eq!(set.iter().len(), runs.len());
                prop_assert!(runs.is_empty() || shift == 0);
            }
        }
    }
}
