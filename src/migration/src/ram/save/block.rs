//! A block that is sent: its pages, and what keeps track of them.

use std::ops::Range;
use std::sync::Arc;

use ram_discard::ByteRange;
use vmstate::wire::WireWrite;

use super::super::{InMigration, MigrationBlock};
use crate::dirty::DirtyTracker;
use crate::error::MigrationError;
use crate::page_bitmap::{DiscardMask, PageBitmap, bytes_of, pages_touched};
use crate::progress::Counters;
use crate::stream::{PageHeader, PageKind, TARGET_PAGE_SIZE};
use crate::sys::GatherWrite;

/// The tracker forgets this many pages at once, when the first of them is about to be read
/// (QEMU's clear_bmap: 1 GiB).
const CLEAR_CHUNK_PAGES: u64 = 1 << 18;

/// A block that is sent, and what is known of its pages.
pub(super) struct SaveBlock {
    pub(super) block: Arc<MigrationBlock>,
    pub(super) tracker: Box<dyn DirtyTracker>,
    pub(super) dirty: PageBitmap,
    /// What is discarded, by the freeze and by the changes that were told since.
    pub(super) discarded: DiscardMask,
    /// What of it was discarded since the last sync: writes before that are no fault of the guest.
    pub(super) fresh: DiscardMask,
    /// Chunks of which the tracker still remembers what `dirty` has.
    pub(super) clear_bitmap: PageBitmap,
    /// Beside channels for pages, which were sent since the last barrier; empty without.
    pub(super) unsynced: PageBitmap,
    pub(super) started: bool,
    pub(super) in_migration: Option<InMigration>,
}

impl SaveBlock {
    pub(super) fn new(block: Arc<MigrationBlock>, tracker: Box<dyn DirtyTracker>) -> Self {
        let nr_pages = block.used_length() / TARGET_PAGE_SIZE;
        Self {
            block,
            tracker,
            dirty: PageBitmap::new(nr_pages),
            discarded: DiscardMask::default(),
            fresh: DiscardMask::default(),
            clear_bitmap: PageBitmap::new(nr_pages.div_ceil(CLEAR_CHUNK_PAGES)),
            unsynced: PageBitmap::new(0),
            started: false,
            in_migration: None,
        }
    }

    /// Starts tracking, and finds out which pages there are to send.
    pub(super) fn start(
        &mut self,
        discarded: &[ByteRange],
        counters: &Counters,
    ) -> Result<(), MigrationError> {
        let populated = self.block.all_but(discarded);
        self.discarded = DiscardMask::new(discarded.iter().copied());
        self.started = true;
        let id = self.block.id();
        self.tracker.start(&populated).map_err(MigrationError::memory(id, "track writes"))?;
        // The first sync: whatever is dirty by now has data, and is found below.
        let mut dirty = PageBitmap::new(self.dirty.nr_pages());
        self.tracker.sync(&mut dirty).map_err(MigrationError::memory(id, "collect dirty pages"))?;
        dirty.clear_all();
        // All ones, but for holes, which were never touched: a write from now on is tracked.
        if let Some(used) = self.block.used() {
            self.block
                .for_each_sent(used, |data| {
                    dirty.set_range(pages_touched(data));
                })
                .map_err(MigrationError::memory(id, "look for holes"))?;
        }
        self.discarded.apply(&mut dirty);
        let discarded_pages = self.discarded.nr_pages();
        self.dirty = dirty;
        self.forget_discarded()?;
        self.set_clear_bitmap();
        let sendable = self.dirty.count();
        Counters::add(&counters.discarded, discarded_pages);
        Counters::add(&counters.holes, self.dirty.nr_pages() - discarded_pages - sendable);
        Counters::add(&counters.total, sendable * TARGET_PAGE_SIZE);
        Ok(())
    }

    /// Has the tracker forget the chunks that discarded ranges touch, each once: it would report
    /// them again with the next sync. What else is in them is in the bitmap anyway.
    fn forget_discarded(&mut self) -> Result<(), MigrationError> {
        let mut next_chunk = 0;
        for pages in self.discarded.runs() {
            let first = (pages.start / CLEAR_CHUNK_PAGES).max(next_chunk);
            let end = pages.end.div_ceil(CLEAR_CHUNK_PAGES);
            for chunk in first..end {
                clear_chunk(&self.block, &mut *self.tracker, chunk)?;
            }
            next_chunk = next_chunk.max(end);
        }
        Ok(())
    }

    fn set_clear_bitmap(&mut self) {
        self.clear_bitmap.set_range(0..self.clear_bitmap.nr_pages());
    }

    /// Collects what was written, without what is discarded; how many pages were written there.
    pub(super) fn sync(&mut self) -> Result<u64, MigrationError> {
        let block = Arc::clone(&self.block);
        let id = block.id();
        self.tracker
            .sync(&mut self.dirty)
            .map_err(MigrationError::memory(id, "collect dirty pages"))?;
        self.set_clear_bitmap();
        let fresh = std::mem::take(&mut self.fresh);
        if self.dirty.count() == 0 {
            return Ok(0);
        }
        let mut forget = |pages| {
            let cleared = self.tracker.clear(bytes_of(pages));
            cleared.map_err(MigrationError::memory(id, "forget discarded pages"))
        };
        fresh.try_apply(&mut self.dirty, &mut forget)?;
        self.discarded.try_apply(&mut self.dirty, forget)
    }

    /// Makes every host page of which something is dirty dirty as a whole: it is placed at once.
    pub(super) fn make_whole(&mut self) {
        self.dirty.widen_to(self.block.page_size() / TARGET_PAGE_SIZE);
    }

    /// Makes sure that writes to `pages` from now on are found, before they are read.
    pub(super) fn clear_before_read(&mut self, pages: &Range<u64>) -> Result<(), MigrationError> {
        let chunks = pages.start / CLEAR_CHUNK_PAGES..pages.end.div_ceil(CLEAR_CHUNK_PAGES);
        for chunk in chunks {
            if self.clear_bitmap.clear(chunk) {
                clear_chunk(&self.block, &mut *self.tracker, chunk)?;
            }
        }
        Ok(())
    }

    /// Gathers dirty pages, which are not dirty any more; how many bytes that makes on the wire.
    /// With `named`, the page before them in the section was of this block.
    pub(super) fn gather(
        &mut self,
        out: &mut GatherWrite,
        pages: Range<u64>,
        mut named: bool,
        counters: &Counters,
    ) -> u64 {
        self.dirty.clear_range(pages.clone());
        let mapping = self.block.mapping();
        let before = out.len_bytes();
        let (mut normal, mut zero) = (0, 0);
        for page in pages {
            let offset = page * TARGET_PAGE_SIZE;
            let is_zero = self.block.is_sent_as_zeros(offset);
            let kind = if is_zero { PageKind::Zero } else { PageKind::Normal };
            let word = PageHeader::page_word(kind, offset, named);
            out.push_bytes(&word.to_be_bytes());
            if !named {
                let mut name = Vec::new();
                name.put_name(self.block.id());
                out.push_bytes(&name);
                named = true;
            }
            if is_zero {
                out.push_bytes(&[0]);
                zero += 1;
            } else {
                out.push_memory(mapping, offset, TARGET_PAGE_SIZE);
                normal += 1;
            }
        }
        Counters::add(&counters.normal, normal);
        Counters::add(&counters.duplicate, zero);
        out.len_bytes() - before
    }
}

fn clear_chunk(
    block: &MigrationBlock,
    tracker: &mut dyn DirtyTracker,
    chunk: u64,
) -> Result<(), MigrationError> {
    let whole = bytes_of(chunk * CLEAR_CHUNK_PAGES..(chunk + 1) * CLEAR_CHUNK_PAGES);
    let Some(range) = block.used().and_then(|used| used.intersection(whole)) else {
        return Ok(());
    };
    tracker.clear(range).map_err(MigrationError::memory(block.id(), "clear the dirty log"))
}
