//! Which pages are sent when, and each only once: QEMU places a page that comes twice over what the guest
//! wrote meanwhile, or takes the channel for broken.

use std::collections::VecDeque;
use std::ops::Range;
use std::time::{Duration, Instant};

use migration::page_bitmap::PageBitmap;
use parking_lot::{Condvar, Mutex};

use crate::error::PagerError;
use crate::image::GuestImage;
use crate::working_set::WorkingSet;

/// Pages that follow one that was asked for and are sent behind it.
pub(super) const READ_AHEAD: u64 = 16;
/// Places behind which is read ahead, at a time: older ones are of no use any more.
const AHEAD_MAX: usize = 64;
/// Requests that wait to be answered: more than the vCPUs and threads of any VMM have at once.
const ASKED_MAX: usize = 64 << 10;

/// Why a page is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// A thread of the VMM waits for it.
    Request,
    /// It follows one that was asked for.
    ReadAhead,
    /// It was touched early last time.
    Replay,
    /// Its turn has come.
    Background,
    /// It is a hole of populated memory, and the destination has to be told.
    Hole,
}

/// Pages to be sent now, which will not come again.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Work {
    pub source: Source,
    /// By its place in the image.
    pub block: usize,
    pub pages: Range<u64>,
    /// Whether the image has them; otherwise they are zeros.
    pub content: bool,
    /// When it was asked for.
    pub since: Option<Instant>,
}

/// A page that is taken, and not sent yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Page {
    /// By its place in the image.
    pub block: usize,
    pub page: u64,
    /// Whether the image has it; otherwise it is zeros.
    pub content: bool,
}

/// What there is to do.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// To send these.
    Send(Work),
    /// To wait: there is more, which may not be sent now.
    Later,
    /// Nothing: all was sent.
    Nothing,
}

/// What a request is answered with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// Nothing: the page is on its way. It was sent by reading ahead, or otherwise.
    OnItsWay {
        /// Whether it was sent by reading ahead.
        ahead: bool,
    },
    /// Its bytes.
    Content,
    /// Zeros: the image does not have it.
    Zeros,
}

/// The pages of an image that have not been sent.
pub(super) struct Supply<'a> {
    image: &'a GuestImage,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    blocks: Vec<Block>,
    /// Pages of the image that are left.
    left: u64,
    asked: VecDeque<(usize, u64, bool, Instant)>,
    ahead: VecDeque<(usize, Range<u64>)>,
    replay: VecDeque<(usize, Range<u64>)>,
    /// Blocks in the order in which they are sent; memory that can be discarded last.
    order: Vec<usize>,
    /// Place in `order`, and the next page.
    cursor: (usize, u64),
    /// Whether holes are sent, too.
    holes: bool,
    touched: WorkingSet,
    /// Nothing more is to be done.
    closed: bool,
    /// Something else than pages has changed.
    nudged: bool,
}

#[derive(Debug)]
struct Block {
    /// In the image, and not sent.
    outstanding: PageBitmap,
    /// Sent, or at the destination already.
    settled: PageBitmap,
    /// Sent by reading ahead.
    ahead: PageBitmap,
    /// Populated, and neither in the image nor sent; empty until holes are sent.
    holes: PageBitmap,
}

impl<'a> Supply<'a> {
    /// All pages of an image.
    pub fn new(image: &'a GuestImage) -> Self {
        let blocks = image.blocks().iter().map(|block| {
            let none = || PageBitmap::new(block.nr_pages());
            // Run by run: what is absent is not even touched in a bitmap.
            let mut outstanding = none();
            for run in block.present().runs(0..block.nr_pages()) {
                outstanding.set_range(run);
            }
            Block { outstanding, settled: none(), ahead: none(), holes: PageBitmap::new(0) }
        });
        let blocks: Vec<Block> = blocks.collect();
        let mut order: Vec<usize> = (0..blocks.len()).collect();
        order.sort_by_key(|index| image.blocks()[*index].discards().is_some());
        let state = State {
            left: blocks.iter().map(|block| block.outstanding.count()).sum(),
            blocks,
            asked: VecDeque::new(),
            ahead: VecDeque::new(),
            replay: VecDeque::new(),
            order,
            cursor: (0, 0),
            holes: false,
            touched: WorkingSet::default(),
            closed: false,
            nudged: false,
        };
        Self { image, state: Mutex::new(state), changed: Condvar::new() }
    }

    /// The image.
    pub fn image(&self) -> &'a GuestImage {
        self.image
    }

    /// Pages of the image that are left.
    pub fn left(&self) -> u64 {
        self.state.lock().left
    }

    /// Has these pages of blocks sent before all others that were not asked for, in this order. What is
    /// not in the image costs nothing; how many pages those are.
    pub fn replay(&self, set: &WorkingSet) -> u64 {
        let state = &mut *self.state.lock();
        let mut absent = 0;
        for (block, pages) in set.runs() {
            let Some(found) = state.blocks.get(block) else {
                absent += pages.end - pages.start;
                continue;
            };
            let end = pages.end.min(found.outstanding.nr_pages());
            let present: u64 = match pages.start < end {
                true => {
                    found.outstanding.runs(pages.start..end).map(|run| run.end - run.start).sum()
                }
                false => 0,
            };
            absent += pages.end - pages.start - present;
            if present != 0 {
                state.replay.push_back((block, pages.start..end));
            }
        }
        state.touched = set.clone();
        absent
    }

    /// Pages of a block that the destination has not received; all others it has.
    pub fn not_received(&self, block: usize, outstanding: &PageBitmap) {
        let state = &mut *self.state.lock();
        let Block { outstanding: left, settled, .. } = &mut state.blocks[block];
        let before = left.count();
        let mut received = outstanding.clone();
        received.invert();
        left.and_not(&received);
        *settled = received;
        state.left -= before - left.count();
    }

    /// Takes the page that is asked for, to be answered by the caller; what follows it is read ahead, once
    /// that is [nudged](Self::nudge).
    pub fn take(&self, block: usize, page: u64) -> Answer {
        self.state.lock().take(block, page)
    }

    /// Takes the page that is asked for, to be answered by [`next`](Self::next).
    ///
    /// # Errors
    ///
    /// When more wait than any VMM asks for at once.
    pub fn ask(&self, block: usize, page: u64, since: Instant) -> Result<Answer, PagerError> {
        let mut state = self.state.lock();
        if state.asked.len() == ASKED_MAX {
            return Err(PagerError::Protocol(format!(
                "QEMU sends more than {ASKED_MAX} page requests that are not answered yet; one that works does \
                 not, so it is not listened to any more"
            )));
        }
        let answer = state.take(block, page);
        if !matches!(answer, Answer::OnItsWay { .. }) {
            state.asked.push_back((block, page, answer == Answer::Content, since));
            drop(state);
            self.changed.notify_all();
        }
        Ok(answer)
    }

    /// Takes a page that nothing has asked for: of a small block, and one that the image does not have, if there is
    /// any, so that not even its loss would matter.
    pub fn take_any(&self) -> Option<Page> {
        let state = &mut *self.state.lock();
        let mut order: Vec<usize> = (0..state.blocks.len()).collect();
        order.sort_by_key(|index| state.blocks[*index].settled.nr_pages());
        // What is discarded is no hole.
        let holes = order.iter().filter(|index| self.image.blocks()[**index].discards().is_none());
        for &block in holes {
            let Block { outstanding, settled, .. } = &mut state.blocks[block];
            let nr_pages = settled.nr_pages();
            if let Some(page) =
                (0..nr_pages).find(|page| !settled.test(*page) && !outstanding.test(*page))
            {
                settled.set(page);
                return Some(Page { block, page, content: false });
            }
        }
        for block in order {
            let Block { outstanding, settled, .. } = &mut state.blocks[block];
            if let Some(page) = outstanding.next_set(0, settled.nr_pages()) {
                outstanding.clear(page);
                settled.set(page);
                state.left -= 1;
                return Some(Page { block, page, content: true });
            }
        }
        None
    }

    /// Has a page that was taken sent, as if it had been asked for.
    pub fn ask_again(&self, page: Page) {
        let Page { block, page, content } = page;
        self.state.lock().asked.push_back((block, page, content, Instant::now()));
        self.changed.notify_all();
    }

    /// What to send next, at most `max` pages at a time. Without `unasked` only what was asked for.
    pub fn next(&self, max: u64, unasked: bool) -> Next {
        self.state.lock().next(max, unasked)
    }

    /// Waits for a request, for reading ahead, a nudge, or the end, but for no longer than `patience`;
    /// false when nothing more is to be done.
    pub fn wait(&self, patience: Duration) -> bool {
        let mut state = self.state.lock();
        if state.asked.is_empty() && !state.closed && !state.nudged {
            self.changed.wait_for(&mut state, patience);
        }
        state.nudged = false;
        !state.closed
    }

    /// Has a wait end.
    pub fn nudge(&self) {
        self.state.lock().nudged = true;
        self.changed.notify_all();
    }

    /// Nothing more is to be done.
    pub fn close(&self) {
        self.state.lock().closed = true;
        self.changed.notify_all();
    }

    /// Whether nothing more is to be done.
    pub fn is_closed(&self) -> bool {
        self.state.lock().closed
    }

    /// From now on holes of populated memory are sent, too, after everything else.
    pub fn send_holes(&self) {
        let state = &mut *self.state.lock();
        for (block, of) in state.blocks.iter_mut().zip(self.image.blocks()) {
            block.holes = PageBitmap::new(of.nr_pages());
            match of.discards() {
                Some(discards) => discards.populated(|pages| {
                    block.holes.set_range(pages);
                }),
                None => {
                    block.holes.set_range(0..of.nr_pages());
                }
            }
            block.holes.and_not(&block.settled);
            block.holes.and_not(&block.outstanding);
        }
        state.holes = true;
        state.cursor = (0, 0);
    }

    /// What was touched, in this order.
    pub fn touched(&self) -> WorkingSet {
        self.state.lock().touched.clone()
    }
}

impl State {
    fn take(&mut self, block: usize, page: u64) -> Answer {
        let found = &mut self.blocks[block];
        if !found.settled.set(page) {
            return Answer::OnItsWay { ahead: found.ahead.test(page) };
        }
        if self.holes {
            found.holes.clear(page);
        }
        if !found.outstanding.clear(page) {
            return Answer::Zeros;
        }
        self.left -= 1;
        self.touched.push(block, page..page + 1);
        let end = found.outstanding.nr_pages().min(page + 1 + READ_AHEAD);
        if found.outstanding.next_set(page + 1, end).is_some() {
            if self.ahead.len() == AHEAD_MAX {
                self.ahead.pop_front();
            }
            self.ahead.push_back((block, page + 1..end));
        }
        Answer::Content
    }

    fn next(&mut self, max: u64, unasked: bool) -> Next {
        if let Some((block, page, content, since)) = self.asked.pop_front() {
            let (source, pages) = (Source::Request, page..page + 1);
            return Next::Send(Work { source, block, pages, content, since: Some(since) });
        }
        if !unasked {
            return if self.is_all_sent() { Next::Nothing } else { Next::Later };
        }
        // What was asked for last is what the guest is at.
        while let Some((block, within)) = self.ahead.pop_back() {
            if let Some(pages) = self.send(block, within.clone(), max) {
                self.ahead.push_back((block, pages.end..within.end));
                self.blocks[block].ahead.set_range(pages.clone());
                self.touched.push(block, pages.clone());
                return Next::Send(Work {
                    source: Source::ReadAhead,
                    block,
                    pages,
                    content: true,
                    since: None,
                });
            }
        }
        while let Some((block, within)) = self.replay.pop_front() {
            if let Some(pages) = self.send(block, within.clone(), max) {
                self.replay.push_front((block, pages.end..within.end));
                return Next::Send(Work {
                    source: Source::Replay,
                    block,
                    pages,
                    content: true,
                    since: None,
                });
            }
        }
        while let Some(&block) = self.order.get(self.cursor.0) {
            let end = self.blocks[block].settled.nr_pages();
            if let Some(pages) = self.send(block, self.cursor.1..end, max) {
                self.cursor.1 = pages.end;
                return Next::Send(Work {
                    source: Source::Background,
                    block,
                    pages,
                    content: true,
                    since: None,
                });
            }
            let holes = &mut self.blocks[block].holes;
            if self.holes
                && let Some(pages) = holes.next_run(0, end, max)
            {
                holes.clear_range(pages.clone());
                self.blocks[block].settled.set_range(pages.clone());
                return Next::Send(Work {
                    source: Source::Hole,
                    block,
                    pages,
                    content: false,
                    since: None,
                });
            }
            self.cursor = (self.cursor.0 + 1, 0);
        }
        Next::Nothing
    }

    fn is_all_sent(&self) -> bool {
        self.left == 0 && (!self.holes || self.blocks.iter().all(|block| block.holes.count() == 0))
    }

    /// Takes the first run that is outstanding within some pages of a block.
    fn send(&mut self, block: usize, within: Range<u64>, max: u64) -> Option<Range<u64>> {
        let found = &mut self.blocks[block];
        let pages = found.outstanding.next_run(within.start, within.end, max)?;
        self.left -= found.outstanding.clear_range(pages.clone());
        found.settled.set_range(pages.clone());
        Some(pages)
    }
}
