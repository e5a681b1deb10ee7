//! Who knows which memory is populated.

use std::ops::ControlFlow;

use crate::{MemoryState, Section};

/// A party that knows which parts of a region are populated, as virtio-mem does of its region.
///
/// All ranges are sections: bytes from the start of the region. The state may change between two
/// calls; the [`RamDiscardManager`](super::RamDiscardManager) sees to it that it does not while
/// listeners are told.
pub trait RamDiscardSource: Send + Sync {
    /// Size of the region, bytes.
    fn region_size(&self) -> u64;

    /// The unit in which memory is populated and discarded, bytes; a power of two.
    fn granularity(&self) -> u64;

    /// The first maximal range of `section` in the asked state, clipped to `section`; `None` when
    /// there is none.
    fn next_range(&self, section: Section, state: MemoryState) -> Option<Section>;

    /// Calls `visit` with each maximal range of `section` in the asked state, ascending, until it
    /// breaks. A source behind a lock should not hold it across `visit`.
    fn replay(
        &self,
        section: Section,
        state: MemoryState,
        visit: &mut dyn FnMut(Section) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        let mut rest = Some(section);
        while let Some(range) = rest.and_then(|rest| self.next_range(rest, state)) {
            visit(range)?;
            rest = Section::from_bounds(range.end(), section.end());
        }
        ControlFlow::Continue(())
    }

    /// Whether every byte of `section` is populated.
    fn is_populated(&self, section: Section) -> bool {
        self.next_range(section, MemoryState::Populated) == Some(section)
    }
}

/// Several sources as one: populated only where all say so; with none, all is populated.
///
/// Runs are merged, so that the cost follows their number, never the number of granules.
pub(super) struct Combined<'a> {
    pub(super) sources: Vec<&'a dyn RamDiscardSource>,
    pub(super) region_size: u64,
}

impl Combined<'_> {
    fn next_populated(&self, section: Section) -> Option<Section> {
        let mut start = section.start();
        'from_start: loop {
            let rest = Section::from_bounds(start, section.end())?;
            let mut end = section.end();
            for source in &self.sources {
                let run = source.next_range(rest, MemoryState::Populated)?;
                if run.start() > start {
                    start = run.start();
                    continue 'from_start;
                }
                end = end.min(run.end());
            }
            return Section::from_bounds(start, end);
        }
    }

    fn next_discarded(&self, section: Section) -> Option<Section> {
        let sources = self.sources.iter();
        let found = sources.filter_map(|source| source.next_range(section, MemoryState::Discarded));
        let rest = Section::from_bounds(found.min()?.start(), section.end())?;
        let end = self.next_populated(rest).map_or(section.end(), Section::start);
        Section::from_bounds(rest.start(), end)
    }
}

impl RamDiscardSource for Combined<'_> {
    fn region_size(&self) -> u64 {
        self.region_size
    }

    fn granularity(&self) -> u64 {
        self.sources.iter().map(|source| source.granularity()).min().unwrap_or(1)
    }

    fn next_range(&self, section: Section, state: MemoryState) -> Option<Section> {
        match state {
            MemoryState::Populated => self.next_populated(section),
            MemoryState::Discarded => self.next_discarded(section),
        }
    }

    fn replay(
        &self,
        section: Section,
        state: MemoryState,
        visit: &mut dyn FnMut(Section) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        // One source, the usual case, may have a faster way than range by range.
        if let [only] = self.sources[..] {
            return only.replay(section, state, visit);
        }
        let mut rest = Some(section);
        while let Some(range) = rest.and_then(|rest| self.next_range(rest, state)) {
            visit(range)?;
            rest = Section::from_bounds(range.end(), section.end());
        }
        ControlFlow::Continue(())
    }
}
