//! The discard mask: takes the pages that are discarded by contract out of a bitmap.
//!
//! Precopy masks its dirty bitmap at the start and after every sync, and again what a destination
//! lacks on recovery; a snapshot and a lazy restore mask what they save and what is outstanding.

use std::ops::Range;

use ram_discard::ByteRange;

use super::{PageBitmap, pages_touched};

/// Runs of discarded target pages of one block, ascending and disjoint.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct DiscardMask {
    runs: Vec<Range<u64>>,
}

impl DiscardMask {
    /// The mask of discarded `ranges`: bytes from the start of the block, maximal and ascending.
    pub fn new(ranges: impl IntoIterator<Item = ByteRange>) -> Self {
        Self { runs: ranges.into_iter().map(pages_touched).collect() }
    }

    /// Adds `pages`, of which some may be discarded already.
    pub fn add(&mut self, pages: Range<u64>) {
        if pages.is_empty() {
            return;
        }
        // Runs that it touches become one with it.
        let first = self.runs.partition_point(|run| run.end < pages.start);
        let touched = self.runs[first..].partition_point(|run| run.start <= pages.end);
        let joined = self.runs[first..first + touched]
            .iter()
            .fold(pages, |joined, run| joined.start.min(run.start)..joined.end.max(run.end));
        self.runs.splice(first..first + touched, [joined]);
    }

    /// Removes `pages`, of which some may not be discarded.
    pub fn remove(&mut self, pages: Range<u64>) {
        if pages.is_empty() {
            return;
        }
        let first = self.runs.partition_point(|run| run.end <= pages.start);
        let touched = self.runs[first..].partition_point(|run| run.start < pages.end);
        let rest: Vec<_> = self.runs[first..first + touched]
            .iter()
            .flat_map(|run| [run.start..pages.start, pages.end..run.end])
            .filter(|part| !part.is_empty())
            .collect();
        self.runs.splice(first..first + touched, rest);
    }

    /// The parts of `pages` that are not discarded, ascending.
    pub fn populated(&self, pages: Range<u64>) -> Vec<Range<u64>> {
        let first = self.runs.partition_point(|run| run.end <= pages.start);
        let (mut at, mut parts) = (pages.start, Vec::new());
        for run in self.runs[first..].iter().take_while(|run| run.start < pages.end) {
            if at < run.start {
                parts.push(at..run.start);
            }
            at = run.end;
        }
        if at < pages.end {
            parts.push(at..pages.end);
        }
        parts
    }

    /// The runs of pages.
    pub fn runs(&self) -> &[Range<u64>] {
        &self.runs
    }

    /// Target pages that are discarded.
    pub fn nr_pages(&self) -> u64 {
        self.runs.iter().map(|run| run.end - run.start).sum()
    }

    /// Clears what is discarded in `bitmap`; how many of these pages were set.
    pub fn apply(&self, bitmap: &mut PageBitmap) -> u64 {
        self.runs.iter().map(|run| bitmap.clear_range(run.clone())).sum()
    }

    /// As [`apply`](Self::apply), with a call for each run in which pages were set.
    ///
    /// # Errors
    ///
    /// The first of `found`; later runs are not looked at.
    pub fn try_apply<E>(
        &self,
        bitmap: &mut PageBitmap,
        mut found: impl FnMut(Range<u64>) -> Result<(), E>,
    ) -> Result<u64, E> {
        let mut cleared = 0;
        for run in &self.runs {
            let pages = bitmap.clear_range(run.clone());
            if pages != 0 {
                cleared += pages;
                found(run.clone())?;
            }
        }
        Ok(cleared)
    }

    /// The first page of `bitmap` that is set and discarded.
    pub fn first_set(&self, bitmap: &PageBitmap) -> Option<u64> {
        self.runs.iter().find_map(|run| bitmap.next_set(run.start, run.end))
    }
}
