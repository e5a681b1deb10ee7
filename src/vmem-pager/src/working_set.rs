//! The order in which a guest touches its memory.

use std::ops::Range;

/// Pages of RAM blocks, in the order of their first touch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WorkingSet {
    runs: Vec<(usize, Range<u64>)>,
}

impl WorkingSet {
    /// Appends pages of a block, by its place in the image.
    pub fn push(&mut self, block: usize, pages: Range<u64>) {
        match self.runs.last_mut() {
            Some((last, run)) if *last == block && run.end == pages.start => run.end = pages.end,
            _ if pages.is_empty() => {}
            _ => self.runs.push((block, pages)),
        }
    }

    /// Runs of pages of blocks, in their order.
    pub fn runs(&self) -> impl Iterator<Item = (usize, Range<u64>)> {
        self.runs.iter().cloned()
    }
}
