//! Which thread writes which page to the image: each page is claimed by one of three, and written once.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::{Condvar, Mutex};

use super::image::Image;
use crate::page_bitmap::PageBitmap;
use crate::ram::MigrationBlock;
use crate::stream::{MappedRamHeader, TARGET_PAGE_SIZE};

/// What is written between two looks at which vCPUs wait, bytes.
const STEP: u64 = 256 << 10;

/// Who writes pages to the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Writer {
    /// The thread that writes all pages, one after the other.
    Background,
    /// The thread that answers the vCPUs that wait for a page.
    Faults,
    /// The thread of the device, which discards memory next.
    Discards,
}

const WRITERS: usize = 3;

/// A block while it is saved.
pub(super) struct Saved {
    pub(super) block: Arc<MigrationBlock>,
    pub(super) header: MappedRamHeader,
    /// Its number among the mappings.
    pub(super) mapping: usize,
    pub(super) state: Mutex<State>,
    /// A writer has finished with what it had claimed.
    pub(super) settled: Condvar,
}

pub(super) struct State {
    /// Pages that are not in the file yet, and that no writer has claimed.
    pub(super) todo: PageBitmap,
    /// Pages that are in it, and not zero.
    pub(super) written: PageBitmap,
    /// What each writer writes now: whole host pages.
    pub(super) claimed: [Option<Range<u64>>; WRITERS],
}

impl State {
    /// Whether a writer, unless it is `except`, has claimed one of `pages`.
    fn is_claimed(&self, pages: &Range<u64>, except: Option<Writer>) -> bool {
        let overlaps =
            |claimed: &Range<u64>| claimed.start < pages.end && pages.start < claimed.end;
        let except = except.map(|writer| writer as usize);
        let others = self.claimed.iter().enumerate().filter(|(writer, _)| Some(*writer) != except);
        others.flat_map(|(_, claimed)| claimed).any(overlaps)
    }
}

/// What a vCPU waits for.
pub(super) enum Wanted<'a> {
    /// It is in the file, or is not part of the image.
    Nothing,
    /// Another thread writes it now, and lets the vCPU continue.
    ClaimedBefore,
    /// It is to be written.
    Pages(Claim<'a>),
}

impl Saved {
    /// A block of which the pages `todo` are to be saved while the guest runs, and `written` have been.
    pub(super) fn new(
        block: Arc<MigrationBlock>,
        header: MappedRamHeader,
        mapping: usize,
        todo: PageBitmap,
        written: PageBitmap,
    ) -> Self {
        let state = Mutex::new(State { todo, written, claimed: [const { None }; WRITERS] });
        Self { block, header, mapping, state, settled: Condvar::new() }
    }

    /// The block.
    pub(super) fn block(&self) -> &Arc<MigrationBlock> {
        &self.block
    }

    /// Target pages in a host page.
    fn per_page(&self) -> u64 {
        (self.block.page_size() / TARGET_PAGE_SIZE).max(1)
    }

    /// The host pages that `pages` touch.
    pub(super) fn host_pages(&self, pages: Range<u64>) -> Range<u64> {
        let (per_page, nr_pages) = (self.per_page(), self.block.used_length() / TARGET_PAGE_SIZE);
        let end = pages.end.next_multiple_of(per_page).min(nr_pages);
        pages.start / per_page * per_page..end
    }

    /// What is written at once, pages.
    fn step(&self) -> u64 {
        (STEP / TARGET_PAGE_SIZE).max(self.per_page())
    }

    /// Claims the first outstanding pages of `within`, no more than a step, for a writer that has
    /// claimed none. Host pages are claimed as a whole: the protection of all of it is lifted at once.
    pub(super) fn claim<'a>(
        &'a self,
        image: &'a Image,
        writer: Writer,
        within: Range<u64>,
    ) -> Option<Claim<'a>> {
        let mut state = self.state.lock();
        let run = state.todo.next_run(within.start, within.end, self.step())?;
        Some(self.take(image, &mut state, writer, run))
    }

    /// As [`claim`](Self::claim), of one host page that a vCPU waits for.
    pub(super) fn claim_wanted<'a>(&'a self, image: &'a Image, page: Range<u64>) -> Wanted<'a> {
        let mut state = self.state.lock();
        if state.is_claimed(&page, None) {
            return Wanted::ClaimedBefore;
        }
        match state.todo.next_set(page.start, page.end) {
            Some(first) => {
                Wanted::Pages(self.take(image, &mut state, Writer::Faults, first..first + 1))
            }
            None => Wanted::Nothing,
        }
    }

    fn take<'a>(
        &'a self,
        image: &'a Image,
        state: &mut State,
        writer: Writer,
        pages: Range<u64>,
    ) -> Claim<'a> {
        let pages = self.host_pages(pages);
        let runs = state.todo.runs(pages.clone()).collect();
        state.todo.clear_range(pages.clone());
        state.claimed[writer as usize] = Some(pages.clone());
        Claim { image, saved: self, writer, pages, runs, is_written: false }
    }

    /// Waits until no other writer than the one that discards has claimed any of `pages`; false when
    /// that is not so at the `deadline`.
    pub(super) fn wait_unclaimed(&self, pages: &Range<u64>, deadline: Option<Instant>) -> bool {
        let mut state = self.state.lock();
        while state.is_claimed(pages, Some(Writer::Discards)) {
            match deadline {
                None => self.settled.wait(&mut state),
                Some(deadline) => {
                    if self.settled.wait_until(&mut state, deadline).timed_out() {
                        return !state.is_claimed(pages, Some(Writer::Discards));
                    }
                }
            }
        }
        true
    }
}

/// Pages that one writer writes, and no other: whole host pages. Dropped before they are written,
/// it ends the image.
pub(super) struct Claim<'a> {
    image: &'a Image,
    pub(super) saved: &'a Saved,
    writer: Writer,
    pub(super) pages: Range<u64>,
    /// What of them is not in the file.
    pub(super) runs: Vec<Range<u64>>,
    pub(super) is_written: bool,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        if !self.is_written {
            self.image.stop();
        }
        self.saved.state.lock().claimed[self.writer as usize] = None;
        self.saved.settled.notify_all();
    }
}
