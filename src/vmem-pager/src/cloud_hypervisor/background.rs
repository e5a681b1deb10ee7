//! Filling memory that was not asked for, and in which order.

use std::collections::VecDeque;
use std::ops::Range;

use parking_lot::Mutex;

use super::filling::Filling;
use super::metrics::Source;
use super::pace::Pace;
use crate::error::PagerError;
use crate::image::PageReader;
use crate::working_set::WorkingSet;

/// Pages filled at a time.
const PIECE: u64 = 64;
/// Places behind which is read ahead, at a time: older ones are of no use any more.
const AHEAD_MAX: usize = 64;

/// Pages of a mapping.
type Part = (usize, Range<u64>);

/// Fills what was not asked for: what follows a page that the guest has just touched, then what was touched first
/// last time, then everything, ascending.
pub(super) struct Background<'a> {
    filling: &'a Filling<'a>,
    ahead: Mutex<VecDeque<Part>>,
}

impl<'a> Background<'a> {
    pub fn new(filling: &'a Filling<'a>) -> Self {
        Self { filling, ahead: Mutex::default() }
    }

    /// Has pages filled next, unless there are newer ones.
    pub fn read_ahead(&self, mapping: usize, pages: Range<u64>) {
        let mut ahead = self.ahead.lock();
        if ahead.len() == AHEAD_MAX {
            ahead.pop_front();
        }
        ahead.push_back((mapping, pages));
    }

    /// Fills all memory that no virtio-mem device has. `keep_on` says why to end before.
    ///
    /// # Errors
    ///
    /// When the image cannot be read, or there is no memory left. What was not filled is filled when it is asked
    /// for, or fails again then.
    pub fn fill(
        &self,
        replay: &WorkingSet,
        pace: &Pace,
        keep_on: &dyn Fn() -> Result<(), PagerError>,
    ) -> Result<(), PagerError> {
        let guest = self.filling.guest();
        let mut reader = PageReader::new(guest.image());
        let replayed = replay
            .runs()
            .filter_map(|(block, pages)| Some((Source::Replay, (guest.mapping_of(block)?, pages))));
        let mappings = guest.layout().mappings.iter().enumerate();
        let boot = mappings
            .filter(|(_, mapping)| !mapping.virtio_mem)
            .map(|(index, _)| (Source::Background, (index, 0..guest.block(index).nr_pages())));
        for (source, (mapping, mut pages)) in replayed.chain(boot) {
            loop {
                pace.wait(keep_on)?;
                // What was asked for last is what the guest is at.
                let newest = self.ahead.lock().pop_back();
                let (source, part) = match newest {
                    Some((mapping, pages)) => (Source::ReadAhead, (mapping, pages)),
                    None => (source, (mapping, pages.clone())),
                };
                let most = pace.pages(PIECE);
                let filled =
                    self.filling.fill_next(&mut reader, part.0, part.1.clone(), most, source)?;
                pace.filled(filled.as_ref().map_or(0, |run| run.end - run.start));
                match (source, filled) {
                    (Source::ReadAhead, Some(run)) if run.end < part.1.end => {
                        self.ahead.lock().push_back((part.0, run.end..part.1.end));
                    }
                    (Source::ReadAhead, _) => {}
                    (_, Some(run)) => pages.start = run.end,
                    (_, None) => break,
                }
            }
        }
        Ok(())
    }
}
