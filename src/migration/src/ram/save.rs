//! Sending RAM while the guest writes it.
//!
//! The order of events is QEMU's: the bitmap starts with everything, the tracker is started and
//! synced once, and then discarded ranges are cleared in bitmap and tracker. Beyond that, what the
//! backing file has no data for never gets into the bitmap, and the mask is applied after every
//! sync.

mod block;
mod channels;
mod elastic;
mod postcopy;

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ram_discard::{ByteRange, FreezeFor, FreezeLost};

use self::block::SaveBlock;
use self::channels::SaveChannels;
use super::changes::{Changes, Piece};
use super::registry::{BlockError, ListOptions, RamBlocks};
use super::{FrozenBlocks, InMigration, MigrationBlock, PageChannels};
use crate::channel::Sink;
use crate::dirty::DirtyTracker;
use crate::error::MigrationError;
use crate::handler::{PostcopySave, SaveHandler};
use crate::page_bitmap::{DiscardMask, PageBitmap, bytes_of};
use crate::progress::{Counters, Progress};
use crate::stream::{
    Configuration, RAM_SECTION, RAM_VERSION, TARGET_PAGE_SIZE, put_end_of_section, put_list,
};
use crate::sys::GatherWrite;

/// Pages are gathered up to this many pieces, which one system call can take.
const GATHER_PIECES: usize = 1024;

/// The most pages of a section while the guest runs: zeros cost hardly a byte, but time, in which
/// a cancelled migration would not be noticed.
const ITERATE_PAGES: u64 = (64 << 20) / TARGET_PAGE_SIZE;

/// The pages of a section behind which a PLUG waits, and that are written at once while one may come: some of
/// them always go before it, so that a guest which plugs all the time is still moved.
pub(super) const SHORT_PAGES: u64 = (256 << 10) / TARGET_PAGE_SIZE;

/// The most bytes of a request where host pages are smaller: a request is gathered as a whole. QEMU's
/// are one host page.
const REQUEST_MAX: u64 = 1 << 20;

/// Whether a run may end within a host page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum HostPages {
    /// It may: precopy's pages are placed one by one, and a page of 1 GiB would be far beyond a budget.
    Split,
    /// It may not: postcopy places host pages at once.
    Whole,
}

/// The "ram" handler of the source.
pub struct RamSave {
    blocks: Vec<SaveBlock>,
    options: ListOptions,
    /// All blocks of the list, those whose pages are not sent among them.
    listed: Vec<Arc<MigrationBlock>>,
    /// From before anything is saved until all has ended.
    frozen: Option<FrozenBlocks>,
    /// Once block state may change.
    changes: Option<Arc<Changes>>,
    /// Changes that are sent after this section.
    records: Vec<u8>,
    /// Whether a barrier is to stand before them.
    barrier_due: bool,
    /// Number of the last of them.
    last_change: u32,
    list: Vec<u8>,
    progress: Arc<Progress>,
    gathered: GatherWrite,
    /// Where to look for the next dirty page: block and page.
    cursor: (usize, u64),
    /// The block that the last page of this section was of.
    continued: Option<usize>,
    last_sync: Instant,
    /// Where pages go, while the guest is here, other than to the main channel.
    channels: SaveChannels,
}

/// How many pages can still be gathered: a page is two pieces, and there is always room for one.
fn room_in(gathered: &GatherWrite) -> u64 {
    (GATHER_PIECES.saturating_sub(gathered.segments()) / 2).max(1) as u64
}

fn bytes_of_run(pages: &Range<u64>) -> Option<ByteRange> {
    (!pages.is_empty()).then(|| bytes_of(pages.clone()))
}

impl RamSave {
    /// A handler that sends the migratable blocks, each with a tracker from `tracker_of`.
    ///
    /// # Errors
    ///
    /// When it is not declared of a block whether it is migratable; nothing has been sent then.
    pub fn new(
        blocks: &RamBlocks,
        options: ListOptions,
        progress: Arc<Progress>,
        mut tracker_of: impl FnMut(&MigrationBlock) -> Box<dyn DirtyTracker>,
    ) -> Result<Self, MigrationError> {
        let mut list = Vec::new();
        put_list(&mut list, &blocks.list(options)?);
        put_end_of_section(&mut list);
        let listed = blocks.migratable()?;
        let sent = listed.iter().map(Arc::clone);
        let blocks = sent.filter(|block| !options.leaves_out(block)).map(|block| {
            let tracker = tracker_of(&block);
            SaveBlock::new(block, tracker)
        });
        Ok(Self {
            blocks: blocks.collect(),
            options,
            listed,
            frozen: None,
            changes: None,
            records: Vec::new(),
            barrier_due: false,
            last_change: 0,
            list,
            progress,
            gathered: GatherWrite::new(),
            cursor: (0, 0),
            continued: None,
            last_sync: Instant::now(),
            channels: SaveChannels::None,
        })
    }

    /// Sends pages over channels of their own until the guest leaves, as the configuration's capability
    /// `multifd` says.
    #[must_use]
    pub fn with_channels(mut self, channels: PageChannels) -> Self {
        self.channels = SaveChannels::Waiting(channels, super::channels::Agreed::default());
        self
    }

    /// Pages left to send.
    pub fn dirty_pages(&self) -> u64 {
        self.blocks.iter().map(|block| block.dirty.count()).sum()
    }

    /// Collects what was written since the last time.
    fn sync(&mut self) -> Result<(), MigrationError> {
        let before = self.dirty_pages();
        let mut faults = 0;
        for block in &mut self.blocks {
            faults += block.sync()?;
        }
        self.channels.round_ended();
        let counters = &self.progress.counters;
        if faults != 0 {
            Counters::add(&counters.dirty_while_discarded, faults);
            tracing::warn!(pages = faults, "the guest writes memory that is discarded");
        }
        let seconds = self.last_sync.elapsed().as_secs_f64().max(1e-6);
        let dirtied = self.dirty_pages().saturating_sub(before);
        self.last_sync = Instant::now();
        Counters::set(&counters.dirty_pages_rate, (dirtied as f64 / seconds) as u64);
        Counters::add(&counters.dirtied, dirtied);
        Counters::add(&counters.dirty_sync_count, 1);
        self.note_remaining();
        Ok(())
    }

    fn note_remaining(&self) {
        let remaining = self.dirty_pages() * TARGET_PAGE_SIZE;
        Counters::set(&self.progress.counters.remaining, remaining);
    }

    /// Sends dirty pages until `budget` bytes are gathered and written, `most` pages were looked at,
    /// or none are left.
    fn send(&mut self, out: &mut dyn Sink, budget: u64, most: u64) -> Result<(), MigrationError> {
        self.continued = None;
        let (mut spent, mut seen, mut look) = (0, 0, SHORT_PAGES);
        while spent < budget && seen < most {
            let affordable = (budget - spent).div_ceil(TARGET_PAGE_SIZE);
            let mut room = room_in(&self.gathered).min(affordable).min(most - seen);
            if self.changes.is_some() {
                // What is gathered goes before a change.
                room = room.min(look - seen);
            }
            let Some((pages, bytes)) = self.gather_next(room)? else { break };
            seen += pages;
            spent += bytes;
            if self.gathered.segments() + 2 > GATHER_PIECES {
                self.flush(out)?;
            }
            if seen >= look {
                look = seen + SHORT_PAGES;
                if self.changes.is_some() {
                    self.flush(out)?;
                }
                if self.changes.as_ref().is_some_and(|changes| changes.is_waited_for()) {
                    break;
                }
            }
        }
        let mut end = Vec::new();
        put_end_of_section(&mut end);
        self.gathered.push_bytes(&end);
        self.flush(out)?;
        self.note_remaining();
        Ok(())
    }

    /// Gathers the next dirty pages, of which nothing is discarded then: how many, and the bytes that makes on
    /// the wire. `None` when there are none.
    fn gather_next(&mut self, room: u64) -> Result<Option<(u64, u64)>, MigrationError> {
        let changes = self.changes.clone();
        let mut state = changes.as_ref().map(|changes| changes.lock());
        if let Some(state) = &mut state {
            self.take_discards(state)?;
        }
        let Some((index, pages)) = self.next_run(room, HostPages::Split) else { return Ok(None) };
        if let (Some(state), Some(range)) = (&mut state, bytes_of_run(&pages)) {
            state.gathered(Piece { block: index, range });
        }
        let count = pages.end - pages.start;
        Ok(Some((count, self.gather(index, pages)?)))
    }

    /// The next dirty pages, in the order of the blocks and around: no more than `room`, or to the
    /// end of the host page with that.
    fn next_run(&mut self, room: u64, host_pages: HostPages) -> Option<(usize, Range<u64>)> {
        let (first, page) = self.cursor;
        let nr_blocks = self.blocks.len();
        for step in 0..=nr_blocks {
            let index = (first + step) % nr_blocks.max(1);
            let block = self.blocks.get(index)?;
            let from = if step == 0 { page } else { 0 };
            let room = match host_pages {
                HostPages::Whole => {
                    let per_page = block.block.page_size() / TARGET_PAGE_SIZE;
                    room.next_multiple_of(per_page.max(1))
                }
                HostPages::Split => room,
            };
            if let Some(pages) = block.dirty.next_run(from, block.dirty.nr_pages(), room) {
                self.cursor = (index, pages.end);
                return Some((index, pages));
            }
        }
        None
    }

    /// Gathers a run of dirty pages of a block; how many bytes that makes on the wire.
    fn gather(&mut self, index: usize, pages: Range<u64>) -> Result<u64, MigrationError> {
        let Self { blocks, gathered, continued, progress, .. } = self;
        let block = &mut blocks[index];
        block.clear_before_read(&pages)?;
        let named = continued.replace(index) == Some(index);
        Ok(block.gather(gathered, pages, named, &progress.counters))
    }

    /// As [`gather`](Self::gather), when the pages are not written any more.
    fn gather_stopped(&mut self, out: &mut GatherWrite, index: usize, pages: Range<u64>) -> u64 {
        let named = self.continued.replace(index) == Some(index);
        self.blocks[index].gather(out, pages, named, &self.progress.counters)
    }

    /// Nothing of what was gathered is read any more.
    fn flushed(&self) {
        if let Some(changes) = &self.changes {
            changes.flushed(|index| Arc::clone(&self.blocks[index].block));
        }
    }

    fn flush(&mut self, out: &mut dyn Sink) -> Result<(), MigrationError> {
        let written = out.write_gathered(&mut self.gathered);
        written.map_err(MigrationError::io("send pages"))?;
        self.flushed();
        Counters::set(&self.progress.counters.transferred, out.written());
        Ok(())
    }
}

impl SaveHandler for RamSave {
    fn idstr(&self) -> &str {
        RAM_SECTION
    }

    fn version_id(&self) -> u32 {
        RAM_VERSION
    }

    fn configure(&mut self, configuration: &Configuration) -> Result<(), MigrationError> {
        self.options.check(configuration)?;
        self.channels.check(configuration)?;
        for block in &mut self.blocks {
            block.in_migration = Some(InMigration::new(&block.block));
            let (stream, local) =
                (block.dirty.nr_pages() * TARGET_PAGE_SIZE, block.block.used_length());
            if stream != local {
                // It was resized since its length was put into the list.
                let id = block.block.id().to_owned();
                return Err(BlockError::Length { id, stream, local }.into());
            }
        }
        Ok(())
    }

    fn encrypted_channels(&self) -> Vec<bool> {
        self.channels.encrypted()
    }

    fn freeze(&mut self) -> Result<(), MigrationError> {
        if self.frozen.is_none() {
            let blocks = self.listed.iter().map(Arc::clone);
            self.frozen = Some(FrozenBlocks::new(blocks, FreezeFor::Source)?);
            self.progress.busy(true);
        }
        self.freeze_again()
    }

    fn check_frozen(&self) -> Result<(), MigrationError> {
        let Some(frozen) = &self.frozen else {
            return Err(FreezeLost("it has not begun, or has ended".to_owned()).into());
        };
        frozen.check()?;
        for block in self.blocks.iter().filter(|block| block.started) {
            if DiscardMask::new(frozen.discarded(&block.block)) != block.discarded {
                let what = "what was told of block state is not what it has become";
                return Err(FreezeLost(what.to_owned()).into());
            }
        }
        Ok(())
    }

    fn thaw(&mut self) {
        self.frozen = None;
        self.progress.busy(false);
    }

    fn can_follow(&self) -> bool {
        self.frozen.as_ref().is_some_and(FrozenBlocks::can_follow)
    }

    fn follow(&mut self, patience: Duration) -> Result<(), MigrationError> {
        self.follow_managers(patience)
    }

    fn changes(&mut self) -> Result<Vec<u8>, MigrationError> {
        self.take_changes()
    }

    fn needs_barrier(&self) -> bool {
        self.barrier_due
    }

    fn barrier(&mut self, out: &mut dyn Sink) -> Result<(), MigrationError> {
        self.channels_barrier(out)?;
        self.end_of_section(out)
    }

    fn answered(&mut self, number: u32, refused: Option<String>) -> Result<bool, MigrationError> {
        self.take_answer(number, refused)
    }

    fn is_waited_for(&self) -> bool {
        self.changes.as_ref().is_some_and(|changes| changes.is_waited_for())
    }

    fn has_unanswered(&self) -> bool {
        self.changes.as_ref().is_some_and(|changes| changes.has_unanswered())
    }

    fn setup(&mut self, out: &mut dyn Sink) -> Result<(), MigrationError> {
        self.freeze()?;
        let Some(frozen) = &self.frozen else { return Ok(()) };
        for block in &mut self.blocks {
            block.start(&frozen.discarded(&block.block), &self.progress.counters)?;
            if !self.channels.is_none() {
                block.unsynced = PageBitmap::new(block.dirty.nr_pages());
            }
        }
        Counters::add(&self.progress.counters.dirty_sync_count, 1);
        self.last_sync = Instant::now();
        self.note_remaining();
        self.channels.start(&self.progress)?;
        out.write(&self.list).map_err(MigrationError::io("send the list of RAM blocks"))
    }

    fn pending_estimate(&self) -> u64 {
        self.dirty_pages() * TARGET_PAGE_SIZE
    }

    fn pending_exact(&mut self) -> Result<u64, MigrationError> {
        self.sync()?;
        Ok(self.pending_estimate())
    }

    fn iterate(&mut self, out: &mut dyn Sink, budget: u64) -> Result<(), MigrationError> {
        match self.channels.is_none() {
            true => self.send(out, budget, ITERATE_PAGES),
            false => self.send_by_channels(out, budget, ITERATE_PAGES),
        }
    }

    fn complete(&mut self, out: &mut dyn Sink) -> Result<(), MigrationError> {
        self.sync()?;
        match self.channels.is_none() {
            true => self.send(out, u64::MAX, u64::MAX)?,
            false => self.send_last_by_channels(out)?,
        }
        self.check_frozen()
    }

    fn postcopy(&mut self) -> Option<&mut dyn PostcopySave> {
        Some(self)
    }

    fn cleanup(&mut self) {
        self.gathered.clear();
        // Its threads read pages until then.
        self.channels.end();
        self.flushed();
        if let Some(changes) = &self.changes {
            changes.end();
        }
        for block in &mut self.blocks {
            block.in_migration = None;
            if std::mem::take(&mut block.started)
                && let Err(error) = block.tracker.stop()
            {
                tracing::warn!(block = block.block.id(), %error, "cannot stop tracking writes");
            }
        }
    }
}

impl Drop for RamSave {
    fn drop(&mut self) {
        self.cleanup();
    }
}
