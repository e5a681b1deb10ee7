//! The memory behind the device's region, and the listener that takes and discards it.

mod recent;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use ram_discard::memory::{BackingError, BackingKind, RamBlock, RamBlockError};
use ram_discard::{FileRange, GpaRange, RamDiscardListener, Section, try_all};
use smallvec::SmallVec;
use thiserror::Error;

use crate::device::Geometry;
use recent::Recent;

/// Why memory cannot be populated or discarded now; the guest is told BUSY.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum NotReady {
    /// No memory is mapped at part of the range.
    #[error("no memory is mapped at guest-physical {0}")]
    NotMapped(GpaRange),
    /// Memory that is mapped there cannot be discarded (any more).
    #[error("RAM block {id}: {source}")]
    Backing {
        /// Id of the block.
        id: String,
        /// The reason.
        source: BackingError,
    },
}

/// The memory behind a device's region: zero or more RAM blocks, as the VMM's memory table has
/// them now. Looked up anew for every range, never remembered.
#[derive(Debug)]
pub struct RegionMemory {
    geometry: Geometry,
    table: Mutex<Table>,
    /// Memory of plugged blocks is still to come.
    incoming: AtomicBool,
    /// A state is being loaded, whose memory may be there already.
    loading: AtomicBool,
    /// Resident bytes of a section, where that takes long to count.
    resident: Recent<Section>,
}

/// What the host holds for parts of a file is counted anew each time up to this many bytes, which takes about
/// a millisecond.
const COUNTED_AT_ONCE: u64 = 64 << 20;

#[derive(Debug, Default)]
struct Table {
    /// Ascending and apart.
    blocks: Vec<Arc<RamBlock>>,
    /// Sections that should have been discarded and could not be. They are tried again with
    /// every discard and every new table, until they are plugged.
    undiscarded: Vec<Section>,
    failures: u64,
}

/// A load of the device's state that is under way.
pub(crate) struct Loading<'a>(&'a AtomicBool);

impl Drop for Loading<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

/// Part of a section: a RAM block and the bytes of its file.
type Piece = (Arc<RamBlock>, FileRange);
/// What lies behind a section: of a request's, nearly always one.
type Pieces = SmallVec<[Piece; 1]>;

impl RegionMemory {
    /// No memory yet.
    pub fn new(geometry: Geometry) -> Arc<Self> {
        Arc::new(Self {
            geometry,
            table: Mutex::default(),
            incoming: AtomicBool::new(false),
            loading: AtomicBool::new(false),
            resident: Recent::new(Duration::from_secs(1)),
        })
    }

    /// Checks that a RAM block can serve this region.
    ///
    /// # Errors
    ///
    /// When its pages are larger than the device's blocks or lie across them.
    pub fn check(&self, block: &RamBlock) -> Result<(), RamBlockError> {
        block.check_block_size(self.geometry.addr(), self.geometry.block_size())
    }

    /// Memory of plugged blocks is outstanding from now on (postcopy). Until it has
    /// [arrived](Self::end_incoming), no huge page is taken for them: an access to one that is there would not
    /// wait for what arrives. Blocks that are plugged meanwhile have nothing to arrive, and get theirs.
    pub(crate) fn begin_incoming(&self) {
        self.incoming.store(true, Ordering::Release);
    }

    /// Memory of plugged blocks has arrived, or is given up.
    pub(crate) fn end_incoming(&self) {
        self.incoming.store(false, Ordering::Release);
    }

    /// Whether memory of plugged blocks is outstanding.
    pub(crate) fn is_incoming(&self) -> bool {
        self.incoming.load(Ordering::Acquire)
    }

    /// A state is loaded for as long as the guard lives. Until then the listener takes no memory, since that
    /// was done before, and discards none: the memory of blocks that become plugged may have arrived
    /// before, and must stay if they do not.
    pub(crate) fn begin_load(&self) -> Loading<'_> {
        self.loading.store(true, Ordering::Release);
        Loading(&self.loading)
    }

    fn is_loading(&self) -> bool {
        self.loading.load(Ordering::Acquire)
    }

    /// Takes huge pages for the plugged sections that `block` backs, as a PLUG does. Where there is
    /// data already, it stays. Other memory is taken when it is touched.
    ///
    /// # Errors
    ///
    /// When the pool has none. Those that were taken stay.
    pub(crate) fn reserve(
        &self,
        block: &RamBlock,
        plugged: &[Section],
    ) -> Result<(), RamBlockError> {
        if block.backing().kind() != BackingKind::Hugetlb {
            return Ok(());
        }
        let sections = plugged.iter().filter_map(|section| section.gpa(self.geometry.addr()));
        for range in sections.filter_map(|section| block.file_range(section)) {
            let no_memory = |source| RamBlockError::NoMemory { id: block.id().to_owned(), source };
            block.backing().reserve(range).map_err(no_memory)?;
        }
        Ok(())
    }

    /// The blocks of memory, ascending.
    pub(crate) fn blocks(&self) -> Vec<Arc<RamBlock>> {
        self.table.lock().blocks.clone()
    }

    /// Replaces the memory; blocks that lie outside the region are dropped. Returns the blocks
    /// that were there before.
    pub fn replace(&self, mut blocks: Vec<Arc<RamBlock>>) -> Vec<Arc<RamBlock>> {
        let region = self.geometry.region();
        blocks.retain(|block| region.is_some_and(|region| region.overlaps(block.range())));
        blocks.sort_by_key(|block| block.range());
        let previous = std::mem::replace(&mut self.table.lock().blocks, blocks);
        self.resident.forget();
        self.retry_discards();
        previous
    }

    /// Whether any memory is mapped.
    pub fn is_mapped(&self) -> bool {
        !self.table.lock().blocks.is_empty()
    }

    /// Whether the whole of the region is mapped.
    pub fn is_complete(&self) -> bool {
        self.geometry.section().is_none_or(|section| self.pieces(section).1.is_none())
    }

    /// Whether the host may hold something of the region. One search a RAM block, of files that tell.
    pub(crate) fn may_be_resident(&self) -> bool {
        let Some(region) = self.geometry.region() else { return false };
        self.blocks().iter().any(|block| {
            let Some(range) = block.file_range(region) else { return false };
            let backing = block.backing();
            backing.kind() == BackingKind::Hugetlb
                || !matches!(backing.next_data(range.start()), Ok(None))
        })
    }

    /// The first guest-physical range of the region at which no memory is mapped.
    pub fn first_unmapped(&self) -> Option<GpaRange> {
        self.geometry.section().and_then(|section| self.pieces(section).1)
    }

    /// How often memory could not be discarded.
    pub fn discard_failures(&self) -> u64 {
        self.table.lock().failures
    }

    /// Checks that all of `section` is mapped and can be discarded.
    ///
    /// # Errors
    ///
    /// What is in the way.
    pub fn ready(&self, section: Section) -> Result<(), NotReady> {
        let (pieces, missing) = self.pieces(section);
        if let Some(missing) = missing {
            return Err(NotReady::NotMapped(missing));
        }
        for (block, _) in pieces {
            block
                .backing()
                .probe()
                .map_err(|source| NotReady::Backing { id: block.id().to_owned(), source })?;
        }
        Ok(())
    }

    /// Bytes the host holds for `section`; `None` when nothing is mapped or the backing does not
    /// tell. Of memory that is only a part of a file, much is counted once a second at most.
    pub fn resident(&self, section: Section) -> Option<u64> {
        let (pieces, _) = self.pieces(section);
        if pieces.is_empty() {
            return None;
        }
        let count = || {
            pieces.iter().try_fold(0u64, |sum, (block, file_range)| {
                let resident = block.backing().resident(*file_range).ok()?;
                // Blocks of hugetlb memory are reserved as a whole when plugged.
                Some(sum + resident.unwrap_or(0))
            })
        };
        if pieces.iter().all(|(block, range)| block.backing().is_counted_by_the_kernel(*range)) {
            return count();
        }
        self.resident.get(section, COUNTED_AT_ONCE, count)
    }

    /// Where the host holds something of `section`: maximal ascending ranges of whole units of
    /// `unit` bytes, counted from the start of the region. Of hugetlb memory, that is where
    /// `plugged` (ascending) is. `None` when nothing is mapped or the backing does not tell.
    ///
    /// Each unit that the host holds something of costs one short search, however finely or
    /// densely it is populated: what else lies within it is not looked at. Where the data ends is
    /// not searched, since that keeps discards waiting, for seconds in a large
    /// region that is full.
    ///
    /// # Panics
    ///
    /// When `unit` is 0.
    pub(crate) fn resident_units(
        &self,
        section: Section,
        unit: u64,
        plugged: &[Section],
    ) -> Option<Vec<Section>> {
        let (pieces, _) = self.pieces(section);
        if pieces.is_empty() {
            return None;
        }
        let mut found = Units { unit, region_size: self.geometry.region_size(), ranges: vec![] };
        for (block, file_range) in pieces {
            let part = block.range().intersection(section.gpa(self.geometry.addr())?)?;
            let part = part.section(self.geometry.addr())?;
            if block.backing().kind() == BackingKind::Hugetlb {
                plugged.iter().filter_map(|range| range.intersection(part)).for_each(|range| {
                    found.add(range);
                });
                continue;
            }
            let mut at = file_range.start();
            while at < file_range.end()
                && let Some(data) = block.backing().next_data(at).ok()?
                && data < file_range.end()
            {
                let offset = data - file_range.start();
                let end = found.add(Section::new(part.start() + offset, 1)?);
                at = file_range.start().saturating_add(end - part.start());
            }
        }
        Some(found.ranges)
    }

    /// Whether any of the memory is hugetlb, which does not tell its holes.
    pub fn has_hugetlb(&self) -> bool {
        let table = self.table.lock();
        table.blocks.iter().any(|block| block.backing().kind() == BackingKind::Hugetlb)
    }

    /// Discards what `sections` (ascending and apart) hold, where they are mapped. Cheap where they hold
    /// nothing: what no data lies in costs no search.
    ///
    /// # Errors
    ///
    /// The first failure of one RAM block; the rest of the sections was still tried.
    pub fn sweep(&self, sections: &[Section]) -> io::Result<()> {
        let mut swept = Ok(());
        for block in self.blocks() {
            let sections = sections.iter();
            let ranges = sections
                .filter_map(|section| section.gpa(self.geometry.addr()))
                .filter_map(|section| block.file_range(section));
            swept = swept.and(block.backing().sweep_all(ranges));
        }
        swept
    }

    /// As [`sweep`](Self::sweep), and counts the bytes that were resident. Costs one short search where
    /// there were none.
    ///
    /// # Errors
    ///
    /// As [`sweep`](Self::sweep).
    pub(crate) fn sweep_counted(&self, section: Section) -> io::Result<u64> {
        let mut swept = 0;
        for (block, range) in self.pieces(section).0 {
            let backing = block.backing();
            if backing.kind() == BackingKind::Hugetlb {
                // It does not tell its holes, but what it holds in all. To punch a range without pages costs no more than
                // to ask.
                let before = backing.resident_size()?;
                backing.sweep(range)?;
                swept += before.saturating_sub(backing.resident_size()?);
            } else if backing.next_data(range.start())?.is_some_and(|data| data < range.end()) {
                backing.for_each_resident(range, |data| swept += data.len())?;
                backing.sweep(range)?;
            }
        }
        Ok(swept)
    }

    /// Discards `section`; what cannot be discarded is noted, and tried again later.
    fn discard(&self, section: Section) {
        let (pieces, _) = self.pieces(section);
        for (block, file_range) in pieces {
            if let Err(error) = block.backing().discard(file_range) {
                tracing::error!(block = block.id(), %file_range, %error, "cannot discard memory");
                let mut table = self.table.lock();
                table.failures += 1;
                table.undiscarded.push(section);
                return;
            }
        }
    }

    /// Tries again to discard what could not be discarded.
    fn retry_discards(&self) {
        let undiscarded = std::mem::take(&mut self.table.lock().undiscarded);
        undiscarded.into_iter().for_each(|section| self.discard(section));
    }

    /// Sections that are plugged again need not be discarded any more.
    fn forget_undiscarded(&self, plugged: &[Section]) {
        let mut table = self.table.lock();
        for &section in plugged {
            if table.undiscarded.is_empty() {
                return;
            }
            let rest = |undiscarded: Section| undiscarded.subtract(section).into_iter().flatten();
            table.undiscarded =
                std::mem::take(&mut table.undiscarded).into_iter().flat_map(rest).collect();
        }
    }

    /// What lies behind `section`, and the first part of it with nothing behind, if any.
    /// Guest-physical; both in ascending order.
    fn pieces(&self, section: Section) -> (Pieces, Option<GpaRange>) {
        let mut pieces = Pieces::new();
        let mut missing = None;
        let Some(wanted) = section.gpa(self.geometry.addr()) else {
            return (pieces, self.geometry.region());
        };
        let mut at = wanted.start();
        for block in &self.table.lock().blocks {
            let Some(part) = block.range().intersection(wanted) else { continue };
            let Some(file_range) = block.file_range(wanted) else { continue };
            missing = missing.or(GpaRange::from_bounds(at, part.start()));
            at = part.end();
            pieces.push((Arc::clone(block), file_range));
        }
        let missing = missing.or(GpaRange::from_bounds(at, wanted.end()));
        (pieces, missing)
    }
}

/// Ranges of the region, collected as whole units.
struct Units {
    unit: u64,
    region_size: u64,
    /// Ascending and apart.
    ranges: Vec<Section>,
}

impl Units {
    /// Adds the units that `range` touches, which starts no lower than those before. Returns the
    /// end of the last one.
    fn add(&mut self, range: Section) -> u64 {
        let start = range.start() / self.unit * self.unit;
        // The region may end within a unit.
        let end = range.end().checked_next_multiple_of(self.unit);
        let end = end.map_or(self.region_size, |end| end.min(self.region_size));
        // Two pieces of memory may meet within a unit.
        let joined = self.ranges.pop_if(|last| last.end() >= start);
        let start = joined.map_or(start, |last| last.start());
        self.ranges.extend(Section::from_bounds(start, end));
        end
    }
}

/// The region's memory as the first listener of its [`RamDiscardManager`]: it is there before
/// other listeners map it, and goes after they have let go.
///
/// [`RamDiscardManager`]: ram_discard::RamDiscardManager
pub(crate) struct MemoryListener(pub(crate) Arc<RegionMemory>);

impl MemoryListener {
    /// Whether memory is taken when it becomes populated, not when it is touched.
    fn takes_memory(&self) -> bool {
        !self.0.is_loading() && self.0.has_hugetlb()
    }
}

impl RamDiscardListener for MemoryListener {
    fn name(&self) -> &str {
        "guest memory"
    }

    /// hugetlb pages are taken now, since a guest that touches a page which the pool does not
    /// have dies of SIGBUS. Other memory is taken when it is touched: cost follows use.
    fn notify_populate(&mut self, section: Section) -> Result<(), String> {
        if !self.takes_memory() {
            self.0.forget_undiscarded(&[section]);
            return Ok(());
        }
        let pieces = self.0.pieces(section).0;
        // Memory that cannot be discarded again only costs.
        let discard = |(block, range): &Piece| drop(block.backing().discard(*range));
        try_all(
            &mut self.0,
            &pieces,
            |memory, piece| {
                // What was had before it failed is not wanted.
                memory.reserve(&piece.0, &[section]).inspect_err(|_| discard(piece))
            },
            |_, piece| discard(piece),
        )
        .map_err(|error| error.to_string())?;
        self.0.forget_undiscarded(&[section]);
        Ok(())
    }

    /// Of memory that is taken when it is touched, nothing is done for each of many sections.
    fn notify_populate_all(&mut self, sections: &[Section]) -> Result<(), (Section, String)> {
        if !self.takes_memory() {
            self.0.forget_undiscarded(sections);
            return Ok(());
        }
        try_all(
            self,
            sections,
            |listener, &section| {
                listener.notify_populate(section).map_err(|reason| (section, reason))
            },
            |listener, &section| listener.notify_discard(section),
        )
    }

    fn notify_discard(&mut self, section: Section) {
        if self.0.is_loading() {
            return;
        }
        self.0.retry_discards();
        self.0.discard(section);
    }
}

#[cfg(test)]
mod tests;
