//! The order in which the background places pages.

use std::collections::VecDeque;
use std::ops::Range;

use super::figures::Source;
use super::fill::{CHUNK, TARGET_PAGE};
use super::guest::Guest;
use crate::working_set::WorkingSet;

/// Pages of a region that come next.
#[derive(Clone, Debug)]
pub(super) struct Piece {
    pub index: usize,
    pub pages: Range<u64>,
    pub source: Source,
}

/// The order in which the background places pages: what was touched first last time, then ascending.
#[derive(Debug)]
pub struct Order {
    runs: VecDeque<Piece>,
}

impl Order {
    /// Of a guest, with its working set, if there is one.
    pub fn new(guest: &Guest, replay: Option<&WorkingSet>) -> Self {
        let mut runs = VecDeque::new();
        for (_, pages) in replay.into_iter().flat_map(WorkingSet::runs) {
            let bytes = pages.start * TARGET_PAGE..pages.end * TARGET_PAGE;
            for (index, region) in guest.regions().enumerate() {
                let start = bytes.start.max(region.offset);
                let end = bytes.end.min(region.offset + region.size);
                if start < end {
                    let first = (start - region.offset) / region.page_size;
                    let pages = first..(end - region.offset).div_ceil(region.page_size);
                    runs.push_back(Piece { index, pages, source: Source::Replay });
                }
            }
        }
        for (index, region) in guest.regions().enumerate() {
            let pages = 0..region.size / region.page_size;
            runs.push_back(Piece { index, pages, source: Source::Background });
        }
        Self { runs }
    }

    /// Puts back what could not be placed yet, as the first.
    pub(super) fn put_back(&mut self, piece: Piece) {
        self.runs.push_front(piece);
    }

    /// What comes next and is missing, at most so many bytes, but a page.
    pub(super) fn next(&mut self, guest: &Guest, most: u64) -> Option<Piece> {
        while let Some(Piece { index, pages, source }) = self.runs.front().cloned() {
            let Some(missing) = guest.missing(index, pages.clone()) else {
                self.runs.pop_front();
                continue;
            };
            let most = (most.min(CHUNK) / guest.region(index).page_size).max(1);
            let chunk = missing.start..missing.end.min(missing.start + most);
            self.runs[0].pages.start = chunk.end;
            return Some(Piece { index, pages: chunk, source });
        }
        None
    }
}
