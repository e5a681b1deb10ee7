//! A set of bytes, as its maximal ranges.

use std::collections::BTreeMap;
use std::marker::PhantomData;

use crate::{Extent, Origin};

/// Bytes, as maximal ranges. What it costs to add or remove a range follows the logarithm of their number, and
/// how many of them it joins or covers. `O` is what the ranges count from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExtentSet<O> {
    /// The end of each range by its start.
    ends: BTreeMap<u64, u64>,
    origin: PhantomData<O>,
}

impl<O> Default for ExtentSet<O> {
    fn default() -> Self {
        Self { ends: BTreeMap::new(), origin: PhantomData }
    }
}

impl<O: Origin> ExtentSet<O> {
    /// Adds `range`, of which parts may be in the set.
    pub fn insert(&mut self, range: Extent<O>) {
        let (mut start, mut end) = (range.start(), range.end());
        // Ranges that touch it, the last one first.
        while let Some((&other, &other_end)) = self.ends.range(..=end).next_back()
            && other_end >= start
        {
            self.ends.remove(&other);
            (start, end) = (start.min(other), end.max(other_end));
        }
        self.ends.insert(start, end);
    }

    /// Removes `range`, of which parts may not be in the set.
    pub fn remove(&mut self, range: Extent<O>) {
        let (start, end) = (range.start(), range.end());
        while let Some((&other, &other_end)) = self.ends.range(..end).next_back()
            && other_end > start
        {
            self.ends.remove(&other);
            if other_end > end {
                self.ends.insert(end, other_end);
            }
            if other < start {
                self.ends.insert(other, start);
            }
        }
    }

    /// The maximal ranges, ascending.
    pub fn iter(&self) -> impl Iterator<Item = Extent<O>> + '_ {
        self.ends.iter().filter_map(|(&start, &end)| Extent::from_bounds(start, end))
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }
}

impl<O: Origin> FromIterator<Extent<O>> for ExtentSet<O> {
    fn from_iter<I: IntoIterator<Item = Extent<O>>>(ranges: I) -> Self {
        let mut set = Self::default();
        ranges.into_iter().for_each(|range| set.insert(range));
        set
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::Section;

    proptest! {
        #[test]
        fn a_set_is_what_was_added_and_not_removed_since(
            changes in prop::collection::vec((0u64..64, 1u64..64, any::<bool>()), 0..40),
        ) {
            let (mut set, mut naive) = (ExtentSet::default(), [false; 128]);
            for (start, len, insert) in changes {
                let section = Section::new(start, len).unwrap();
                if insert { set.insert(section) } else { set.remove(section) }
                naive[start as usize..(start + len) as usize].fill(insert);
            }
            let mut expected = Vec::new();
            let mut at = 0;
            for run in naive.chunk_by(|a, b| a == b) {
                if run[0] {
                    expected.extend(Section::new(at, run.len() as u64));
                }
                at += run.len() as u64;
            }
            prop_assert_eq!(set.iter().collect::<Vec<_>>(), expected.clone());
            prop_assert_eq!(set.is_empty(), expected.is_empty());
            prop_assert_eq!(set, expected.into_iter().collect());
        }
    }
}
