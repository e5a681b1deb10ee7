//! RAM after the guest has left: what is asked for, and the rest.

use ram_discard::ByteRange;

use super::{HostPages, REQUEST_MAX, RamSave, room_in};
use crate::channel::Sink;
use crate::error::MigrationError;
use crate::handler::{PostcopySave, SaveHandler};
use crate::page_bitmap::{PageBitmap, bytes_of, pages_touched};
use crate::progress::Counters;
use crate::stream::TARGET_PAGE_SIZE;
use crate::sys::GatherWrite;

impl RamSave {
    /// Index of the block in which `range` is whole host pages.
    fn find_pages(&self, block: &str, range: ByteRange) -> Option<usize> {
        let index = self.blocks.iter().position(|other| other.block.id() == block)?;
        let block = &self.blocks[index].block;
        let whole = |bytes: u64| bytes.is_multiple_of(block.page_size());
        let fits = range.end() <= block.used_length() && whole(range.start()) && whole(range.len());
        fits.then_some(index)
    }
}

impl PostcopySave for RamSave {
    fn has_channels(&self) -> bool {
        self.channels.is_started()
    }

    fn end_channels(&mut self, out: &mut dyn Sink) -> Result<(), MigrationError> {
        self.finish_channels(out)
    }

    fn page_sizes(&self) -> u64 {
        self.blocks.iter().fold(0, |all, block| all | block.block.page_size())
    }

    fn outstanding(&mut self) -> Result<Vec<(String, Vec<ByteRange>)>, MigrationError> {
        self.sync()?;
        self.check_frozen()?;
        let outstanding = self.blocks.iter_mut().map(|block| {
            block.make_whole();
            let runs = block.dirty.runs(0..block.dirty.nr_pages());
            (block.block.id().to_owned(), runs.map(bytes_of).collect())
        });
        let outstanding = outstanding.collect();
        // Precopy may have ended within a host page.
        self.cursor = (0, 0);
        self.note_remaining();
        Ok(outstanding)
    }

    fn next(&mut self, bytes: u64, out: &mut GatherWrite) -> Result<bool, MigrationError> {
        self.continued = None;
        let mut spent = 0;
        while spent < bytes {
            let affordable = (bytes - spent).div_ceil(TARGET_PAGE_SIZE);
            let room = room_in(out).min(affordable);
            let Some((index, pages)) = self.next_run(room, HostPages::Whole) else { break };
            spent += self.gather_stopped(out, index, pages);
        }
        self.note_remaining();
        Ok(spent != 0)
    }

    fn requested(
        &mut self,
        block: &str,
        range: ByteRange,
        out: &mut GatherWrite,
    ) -> Result<bool, MigrationError> {
        let found = self.find_pages(block, range);
        let fits =
            |index: &usize| range.len() <= self.blocks[*index].block.page_size().max(REQUEST_MAX);
        let Some(index) = found.filter(fits) else {
            let what = format!("a request for {range} of block {block:?}");
            return Err(MigrationError::Unexpected(what));
        };
        Counters::add(&self.progress.counters.postcopy_requests, 1);
        self.continued = None;
        let runs: Vec<_> = self.blocks[index].dirty.runs(pages_touched(range)).collect();
        for pages in &runs {
            self.gather_stopped(out, index, pages.clone());
            // What is near is wanted next.
            self.cursor = (index, pages.end);
        }
        self.continued = None;
        Ok(!runs.is_empty())
    }

    fn discarded(&mut self, block: &str, range: ByteRange) -> Result<(), MigrationError> {
        let Some(index) = self.find_pages(block, range) else {
            let what = format!("{range} of block {block:?}, which was discarded");
            return Err(MigrationError::Unexpected(what));
        };
        self.blocks[index].dirty.clear_range(pages_touched(range));
        self.note_remaining();
        Ok(())
    }

    fn left(&self) -> u64 {
        self.dirty_pages() * TARGET_PAGE_SIZE
    }

    fn blocks(&self) -> Vec<(String, u64)> {
        let blocks = self.blocks.iter();
        blocks.map(|block| (block.block.id().to_owned(), block.dirty.nr_pages())).collect()
    }

    fn not_received(&mut self, block: &str, pages: PageBitmap) -> Result<(), MigrationError> {
        let found = self.blocks.iter_mut().find(|other| other.block.id() == block);
        let Some(found) = found.filter(|found| found.dirty.nr_pages() == pages.nr_pages()) else {
            return Err(MigrationError::Unexpected(format!("a bitmap of block {block:?}")));
        };
        found.dirty = pages;
        found.discarded.apply(&mut found.dirty);
        self.cursor = (0, 0);
        self.note_remaining();
        Ok(())
    }
}
