//! One block whose pages arrive on demand.

use std::collections::BTreeMap;
use std::io;
use std::ops::{ControlFlow, Range};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use ram_discard::ByteRange;

use crate::error::MigrationError;
use crate::page_bitmap::{DiscardMask, GAP_MIN, PageBitmap, bytes_of, pages_touched};
use crate::ram::MigrationBlock;
use crate::stream::TARGET_PAGE_SIZE;
use crate::sys::huge_pages::NoHugePages;
use crate::sys::page_faults::{NotPlaced, PageFaults, Placed};

/// The most ranges that are registered for one block: each splits the process's mapping of it,
/// of which the kernel allows some ten thousands. The largest gaps are left out.
const RANGES_MAX: usize = 1024;

/// A block, and which of its pages have not arrived.
pub(super) struct LazyBlock {
    block: Arc<MigrationBlock>,
    /// Its number among the mappings that are registered.
    pub(super) mapping: usize,
    /// Bytes of a page on the host: the unit in which pages are placed.
    page_size: u64,
    registered: Vec<ByteRange>,
    state: Mutex<State>,
}

struct State {
    outstanding: PageBitmap,
    /// First target page of each host page that was asked for, since when, and which thread
    /// waited first.
    requested: BTreeMap<u64, (Instant, u32)>,
    /// Whether faults are the kernel's again.
    ended: bool,
    /// Until then: a huge page for a hole would fill outstanding pages beside it with zeros.
    no_huge_pages: Option<NoHugePages>,
}

/// What arrived with a call.
#[derive(Default)]
pub(super) struct Arrived {
    /// How long each page that was asked for was waited for, and by whom first.
    pub(super) waited: Vec<(Duration, u32)>,
}

/// What is to be done about a fault.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Resolution {
    /// Nothing comes from elsewhere for it: it was filled with zeros here.
    Zero,
    /// It has arrived meanwhile, and the threads that wait for it were woken.
    Arrived,
    /// It must be asked for: this range, whole host pages.
    Request(ByteRange),
    /// It was asked for already.
    Requested,
    /// Nothing comes from elsewhere for it, and there is no memory to fill it with zeros.
    NoMemory,
}

impl LazyBlock {
    pub(super) fn new(
        block: Arc<MigrationBlock>,
        mapping: usize,
        mut outstanding: PageBitmap,
    ) -> Result<Self, MigrationError> {
        // Host pages arrive whole.
        let page_size = block.page_size().max(TARGET_PAGE_SIZE);
        outstanding.widen_to(page_size / TARGET_PAGE_SIZE);
        DiscardMask::new(block.discarded()?).apply(&mut outstanding);
        // Pages of hugetlb are outstanding as a whole.
        let forbid = || NoHugePages::of(Arc::clone(block.mapping()));
        let forbidden = block.tells_holes().then(forbid).transpose();
        let no_huge_pages =
            forbidden.map_err(MigrationError::memory(block.id(), "forbid huge pages"))?;
        let registered = ranges_to_register(&outstanding, page_size);
        let requested = BTreeMap::new();
        let state = State { outstanding, requested, ended: false, no_huge_pages };
        let state = Mutex::new(state);
        Ok(Self { block, mapping, page_size, registered, state })
    }

    pub(super) fn id(&self) -> &str {
        self.block.id()
    }

    pub(super) fn block(&self) -> &Arc<MigrationBlock> {
        &self.block
    }

    pub(super) fn outstanding(&self) -> u64 {
        self.state.lock().outstanding.count()
    }

    /// Whether accesses to it wait for pages that are outstanding.
    pub(super) fn is_awaited(&self) -> bool {
        let state = self.state.lock();
        !state.ended && state.outstanding.count() != 0
    }

    /// Whether any page of `range` is outstanding.
    pub(super) fn is_outstanding(&self, range: ByteRange) -> bool {
        let pages = pages_touched(range);
        self.state.lock().outstanding.next_set(pages.start, pages.end).is_some()
    }

    pub(super) fn outstanding_bitmap(&self) -> PageBitmap {
        self.state.lock().outstanding.clone()
    }

    pub(super) fn next_outstanding(&self, page: u64, max: u64) -> Option<Range<u64>> {
        let state = self.state.lock();
        state.outstanding.next_run(page, state.outstanding.nr_pages(), max)
    }

    pub(super) fn register(&self, faults: &PageFaults) -> Result<(), MigrationError> {
        for &range in &self.registered {
            let registered = faults.register(self.mapping, range);
            registered.map_err(self.failed("register it for faults"))?;
        }
        Ok(())
    }

    /// Lets faults be the kernel's again, in all ranges that it can.
    ///
    /// # Errors
    ///
    /// The first range that the kernel refuses.
    pub(super) fn unregister(&self, faults: &PageFaults) -> Result<(), MigrationError> {
        // Held meanwhile: a fault that was read before is looked at before or after, not between.
        let mut state = self.state.lock();
        if std::mem::replace(&mut state.ended, true) {
            return Ok(());
        }
        let mut result = Ok(());
        for &range in &self.registered {
            result = result.and(faults.unregister(self.mapping, range));
        }
        state.no_huge_pages = None;
        result.map_err(self.failed("end waiting for its pages"))
    }

    /// Makes sure that no page that is outstanding is there, since no fault would be seen: one with
    /// data is refused. hugetlb does not tell what is there, and pages that were only reserved are:
    /// it is discarded.
    pub(super) fn refuse_present(&self) -> Result<(), MigrationError> {
        let state = self.state.lock();
        if !self.block.tells_holes() {
            let pages = 0..state.outstanding.nr_pages();
            let mut runs = state.outstanding.runs(pages).map(bytes_of);
            let given = runs.try_for_each(|range| self.block.discard(range));
            return given.map_err(self.failed("discard outstanding pages"));
        }
        let mut present = None;
        for &range in &self.registered {
            let looked = self.block.for_each_data(range, |data| {
                let pages = pages_touched(data);
                present = present.or(state.outstanding.next_set(pages.start, pages.end));
            });
            looked.map_err(self.failed("look for holes"))?;
        }
        match present {
            None => Ok(()),
            Some(page) => {
                let (block, offset) = (self.id().to_owned(), page * TARGET_PAGE_SIZE);
                Err(MigrationError::Present { block, offset })
            }
        }
    }

    /// Discards what discarded ranges hold by now, also while others are populated and written; how many of them could
    /// not be.
    pub(super) fn sweep_discarded(&self) -> u64 {
        let not_swept = |error: &dyn std::fmt::Display| {
            tracing::warn!(block = self.id(), %error, "cannot sweep discarded memory");
            1
        };
        match self.block.discarded() {
            Ok(discarded) => {
                let swept = discarded.into_iter().map(|range| self.sweep(range));
                swept.map(|swept| swept.map_or_else(|error| not_swept(&error), |()| 0)).sum()
            }
            Err(error) => not_swept(&error),
        }
    }

    /// Discards what `range` holds, which was discarded, as far as it still is. Nothing is populated meanwhile: by a
    /// device of this process no memory is taken for what is about to be, either.
    fn sweep(&self, range: ByteRange) -> io::Result<()> {
        let Some((start, manager)) = self.block.discard_region() else { return Ok(()) };
        let Some(section) = range.section(start) else { return Ok(()) };
        let mut swept = Ok(());
        // The manager is locked meanwhile.
        let _ = manager
            .replay_discarded(section, &mut |section| {
                if let (Ok(()), Some(range)) = (&swept, section.in_block(start)) {
                    swept = self.block.sweep(range);
                }
                ControlFlow::Continue(())
            })
            .map_err(io::Error::other)?;
        swept
    }

    /// Places what is outstanding. What was placed before an error has `arrived`.
    pub(super) fn place(
        &self,
        faults: &PageFaults,
        offset: u64,
        bytes: &[u8],
        arrived: &mut Arrived,
    ) -> Result<(), MigrationError> {
        let Some(range) = ByteRange::new(offset, bytes.len() as u64) else {
            return Ok(());
        };
        self.check(range)?;
        let mut state = self.state.lock();
        if state.ended {
            let given_up = io::Error::from_raw_os_error(libc::ECANCELED);
            return Err(self.failed("place a page of memory that was given up")(given_up));
        }
        let runs: Vec<_> = state.outstanding.runs(pages_touched(range)).collect();
        for run in runs {
            let part = bytes_of(run.clone());
            let first = (part.start() - offset) as usize;
            let bytes = &bytes[first..first + part.len() as usize];
            let (done, result) = match faults.place(self.mapping, part.start(), bytes) {
                Ok(Placed::Done) => (part.len(), Ok(())),
                Ok(Placed::Exists(done)) if self.lacks(part.start() + done) => {
                    (done, Err(self.failed("place a page")(no_memory())))
                }
                Ok(Placed::Exists(done)) => {
                    let at = io::Error::other(format!("at {:#x}", part.start() + done));
                    (done, Err(self.failed("place a page where there is one")(at)))
                }
                Err(NotPlaced { done, error }) => (done, Err(self.failed("place a page")(error))),
            };
            state.arrive(run.start..run.start + done / TARGET_PAGE_SIZE, arrived);
            result?;
        }
        Ok(())
    }

    pub(super) fn place_zeros(
        &self,
        faults: &PageFaults,
        range: ByteRange,
    ) -> Result<Arrived, MigrationError> {
        self.check(range)?;
        let mut arrived = Arrived::default();
        let mut state = self.state.lock();
        let runs: Vec<_> = state.outstanding.runs(pages_touched(range)).collect();
        for run in runs {
            state.arrive(run.clone(), &mut arrived);
            if !arrived.waited.is_empty() {
                // They fault again, and then nothing is outstanding there.
                let woken = faults.wake(self.mapping, bytes_of(run));
                woken.map_err(self.failed("wake the threads that wait for a page"))?;
            }
        }
        Ok(arrived)
    }

    /// What is to be done about a fault at `offset`.
    pub(super) fn fault(
        &self,
        faults: &PageFaults,
        offset: u64,
        thread: u32,
    ) -> Result<Resolution, MigrationError> {
        let Some(page) = self.page_of(offset) else {
            return Ok(Resolution::Arrived);
        };
        let mut state = self.state.lock();
        if let Some(asked) = state.ask(page, thread) {
            return Ok(asked);
        }
        if state.ended {
            // The threads that waited were woken with the end.
            return Ok(Resolution::Arrived);
        }
        // The lock is held meanwhile, so that nothing arrives in between; and nothing will.
        let placed = if self.block.tells_holes() {
            faults.place_zeros(self.mapping, page)
        } else {
            faults.place(self.mapping, page.start(), &vec![0; page.len() as usize])
        };
        match placed {
            Ok(Placed::Done) => Ok(Resolution::Zero),
            Ok(Placed::Exists(_)) if self.lacks(offset) => Ok(Resolution::NoMemory),
            Ok(Placed::Exists(_)) => {
                let woken = faults.wake(self.mapping, page);
                woken.map_err(self.failed("wake the threads that wait for a page"))?;
                Ok(Resolution::Arrived)
            }
            Err(NotPlaced { error, .. }) if is_no_memory(&error) => Ok(Resolution::NoMemory),
            Err(NotPlaced { error, .. }) => Err(self.failed("fill a page with zeros")(error)),
        }
    }

    /// The host page at `offset`; `None` past the end of the block.
    pub(super) fn page_of(&self, offset: u64) -> Option<ByteRange> {
        let start = offset / self.page_size * self.page_size;
        ByteRange::from_bounds(start, (start + self.page_size).min(self.block.mapping().len()))
    }

    /// What is to be asked about a [page](Self::page_of) that a thread waits for; `None` when
    /// nothing comes for it any more.
    pub(super) fn ask(&self, page: ByteRange, thread: u32) -> Option<Resolution> {
        self.state.lock().ask(page, thread)
    }

    /// What was asked for and has not arrived.
    pub(super) fn requested(&self) -> Vec<ByteRange> {
        let per_page = self.page_size / TARGET_PAGE_SIZE;
        let state = self.state.lock();
        state.requested.keys().map(|&page| bytes_of(page..page + per_page)).collect()
    }

    /// Whether there is no page at `offset`, though the kernel says that there is one, since the pool
    /// of huge pages is empty. The kernel's word holds where this cannot be found out.
    pub(super) fn lacks(&self, offset: u64) -> bool {
        let page = self.page_of(offset).filter(|_| !self.block.tells_holes());
        page.is_some_and(|page| matches!(self.block.has_huge_page(page), Ok(false)))
    }

    fn check(&self, range: ByteRange) -> Result<(), MigrationError> {
        let whole = range.start().is_multiple_of(self.page_size)
            && range.len().is_multiple_of(self.page_size)
            && range.end() <= self.block.used_length();
        if whole {
            return Ok(());
        }
        Err(MigrationError::NotWholePages {
            block: self.id().to_owned(),
            start: range.start(),
            len: range.len(),
            page_size: self.page_size,
            used_length: self.block.used_length(),
        })
    }

    fn failed(&self, what: &'static str) -> impl FnOnce(io::Error) -> MigrationError {
        MigrationError::memory(self.id(), what)
    }
}

impl State {
    fn ask(&mut self, page: ByteRange, thread: u32) -> Option<Resolution> {
        let pages = pages_touched(page);
        if self.ended {
            return None;
        }
        self.outstanding.next_set(pages.start, pages.end)?;
        if self.requested.contains_key(&pages.start) {
            return Some(Resolution::Requested);
        }
        self.requested.insert(pages.start, (Instant::now(), thread));
        Some(Resolution::Request(page))
    }

    fn arrive(&mut self, run: Range<u64>, arrived: &mut Arrived) {
        self.outstanding.clear_range(run.clone());
        let waited: Vec<u64> = self.requested.range(run).map(|(&page, _)| page).collect();
        for page in waited {
            if let Some((since, thread)) = self.requested.remove(&page) {
                arrived.waited.push((since.elapsed(), thread));
            }
        }
    }
}

/// Whether a page could be placed later.
pub(super) fn is_no_memory(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOMEM | libc::ENOSPC))
}

/// What the kernel should say of an empty pool of huge pages.
pub(super) fn no_memory() -> io::Error {
    io::Error::from_raw_os_error(libc::ENOMEM)
}

/// The ranges to register so that every outstanding page is in one: as few as the largest gaps
/// allow.
fn ranges_to_register(outstanding: &PageBitmap, page_size: u64) -> Vec<ByteRange> {
    let mut gap_min = GAP_MIN.max(page_size);
    loop {
        let ranges = outstanding.host_ranges(page_size, gap_min);
        if ranges.len() <= RANGES_MAX {
            return ranges;
        }
        gap_min *= 4;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_gaps_are_not_registered_and_ranges_stay_few() {
        let mut outstanding = PageBitmap::new(1 << 24);
        outstanding.set_range(10..20);
        outstanding.set_range(30..40);
        outstanding.set_range(100_000..100_001);
        let ranges = ranges_to_register(&outstanding, 4096);
        assert_eq!(ranges, [bytes_of(10..40), bytes_of(100_000..100_001)]);
        let ranges = ranges_to_register(&outstanding, 2 << 20);
        assert_eq!(ranges, [bytes_of(0..512), bytes_of(99_840..100_352)]);
        for page in (0..1 << 24).step_by(1024) {
            outstanding.set(page);
        }
        let ranges = ranges_to_register(&outstanding, 4096);
        assert!(ranges.len() <= RANGES_MAX);
        let covered = |page| ranges.iter().any(|range| range.contains(bytes_of(page..page + 1)));
        assert!((0..1 << 24).step_by(1024).all(covered));
    }
}
