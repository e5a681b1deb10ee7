//! Block state that changes while memory is sent.

use std::sync::Arc;
use std::time::Duration;

use ram_discard::{ByteRange, MemoryState, RamDiscardListener};

use super::{RamSave, SaveBlock};
use crate::error::MigrationError;
use crate::page_bitmap::{bytes_of, pages_touched};
use crate::progress::Counters;
use crate::ram::changes::{Changes, Follower, Piece, State};
use crate::stream::{BLOCK_STATE_RANGES_MAX, BlockStateChange, Command, put_command};

impl SaveBlock {
    /// Takes `range` out of what is sent and tracked; the parts of it that were populated.
    fn discard(&mut self, range: ByteRange) -> Result<Vec<ByteRange>, MigrationError> {
        let populated = self.discarded.populated(pages_touched(range));
        for pages in &populated {
            self.dirty.clear_range(pages.clone());
            self.discarded.add(pages.clone());
            self.fresh.add(pages.clone());
            let forgotten = self.tracker.discard(bytes_of(pages.clone()));
            forgotten.map_err(MigrationError::memory(self.block.id(), "stop tracking writes"))?;
        }
        Ok(populated.into_iter().map(bytes_of).collect())
    }

    /// Tracks `range` from now on; what it has data for is sent.
    fn populate(&mut self, range: ByteRange) -> Result<(), MigrationError> {
        // Pages that were reported before it was discarded are not dirty any more: a write to them would not be
        // reported again, and be forgotten with what is cleared for others.
        self.clear_before_read(&pages_touched(range))?;
        let tracked = self.tracker.populate(range);
        tracked.map_err(MigrationError::memory(self.block.id(), "track writes"))?;
        self.discarded.remove(pages_touched(range));
        self.fresh.remove(pages_touched(range));
        let dirty = &mut self.dirty;
        let looked = self.block.for_each_data(range, |data| {
            dirty.set_range(pages_touched(data));
        });
        looked.map_err(MigrationError::memory(self.block.id(), "look for holes"))
    }
}

impl RamSave {
    /// What the device and this share, while block state may change.
    #[cfg(test)]
    pub(in crate::ram) fn shared(&self) -> Option<&Arc<Changes>> {
        self.changes.as_ref()
    }

    /// Has the managers tell of changes, where they can, instead of holding block state frozen.
    pub(super) fn follow_managers(&mut self, patience: Duration) -> Result<(), MigrationError> {
        let Self { blocks, listed, frozen: Some(frozen), changes, .. } = self else {
            return Ok(());
        };
        if changes.is_some() {
            return Ok(());
        }
        let shared = Arc::new(Changes::new(blocks.len(), patience));
        *changes = Some(Arc::clone(&shared));
        frozen.follow(|manager| {
            let mut regions = listed.iter().filter_map(|block| {
                let (start, other) = block.discard_region()?;
                Arc::ptr_eq(&other, manager).then_some((block, start))
            });
            // What one region is in several blocks is rare enough to be frozen.
            let (Some((block, start)), None) = (regions.next(), regions.next()) else {
                return None;
            };
            let index = blocks.iter().position(|sent| Arc::ptr_eq(&sent.block, block))?;
            let follower = Follower::new(&shared, index, start, block);
            Some(Box::new(follower) as Box<dyn RamDiscardListener>)
        })?;
        self.progress.busy(frozen.any_frozen());
        Ok(())
    }

    /// Freezes block state again: nothing is populated any more, and then the freeze finds what is discarded.
    pub(super) fn freeze_again(&mut self) -> Result<(), MigrationError> {
        if let (Some(changes), Some(frozen)) = (&self.changes, &mut self.frozen) {
            self.progress.busy(true);
            // First: what waits for this thread holds the manager.
            changes.close();
            frozen.freeze_again()?;
        }
        Ok(())
    }

    /// Takes what was discarded since the last look out of what is sent.
    pub(super) fn take_discards(&mut self, state: &mut State) -> Result<(), MigrationError> {
        for Piece { block, range } in state.take_discards() {
            let touched = pages_touched(range);
            let sent = self.blocks[block].unsynced.next_set(touched.start, touched.end);
            self.barrier_due |= sent.is_some();
            let ranges = self.blocks[block].discard(range)?;
            let pages: u64 = ranges.iter().map(|range| nr_pages(*range)).sum();
            Counters::add(&self.progress.counters.discarded, pages);
            self.put_change(block, MemoryState::Discarded, &ranges);
        }
        Ok(())
    }

    /// The changes that are to be sent now.
    pub(super) fn take_changes(&mut self) -> Result<Vec<u8>, MigrationError> {
        if let Some(changes) = self.changes.clone() {
            let mut state = changes.lock();
            self.take_discards(&mut state)?;
            for populate in &mut state.populates {
                if populate.number.is_none() && populate.result.is_none() {
                    let Piece { block, range } = populate.piece;
                    populate.number = self.put_change(block, MemoryState::Populated, &[range]);
                }
            }
        }
        Ok(std::mem::take(&mut self.records))
    }

    /// The destination has answered a change; false when it is none that was sent.
    pub(super) fn take_answer(
        &mut self,
        number: u32,
        refused: Option<String>,
    ) -> Result<bool, MigrationError> {
        let Some(changes) = self.changes.clone() else { return Ok(false) };
        let mut state = changes.lock();
        let sent = state.populates.iter().position(|populate| populate.number == Some(number));
        let Some(index) = sent.filter(|&index| state.populates[index].result.is_none()) else {
            return Ok(false);
        };
        let Piece { block, range } = state.populates[index].piece;
        let abandoned = state.populates[index].abandoned;
        let result = match refused {
            Some(reason) => Err(format!("the destination cannot populate it: {reason}")),
            None if abandoned => {
                // It was refused here, and so it is there.
                self.put_change(block, MemoryState::Discarded, &[range]);
                Ok(())
            }
            None => self.blocks[block].populate(range).map_err(|error| {
                let _ = self.blocks[block].tracker.discard(range);
                self.blocks[block].discarded.add(pages_touched(range));
                self.put_change(block, MemoryState::Discarded, &[range]);
                error.to_string()
            }),
        };
        if abandoned {
            state.populates.remove(index);
        } else {
            if result.is_ok() {
                Counters::subtract(&self.progress.counters.discarded, nr_pages(range));
            }
            state.populates[index].result = Some(result);
            // Only its waiter is left to look at it.
            state.populates[index].number = None;
        }
        drop(state);
        changes.tell();
        Ok(true)
    }

    /// Appends a change to what is sent after this section; its number.
    fn put_change(
        &mut self,
        block: usize,
        state: MemoryState,
        ranges: &[ByteRange],
    ) -> Option<u32> {
        let id = self.blocks[block].block.id();
        for ranges in ranges.chunks(BLOCK_STATE_RANGES_MAX) {
            self.last_change = self.last_change.wrapping_add(1);
            let (number, block, ranges) = (self.last_change, id.to_owned(), ranges.to_vec());
            let change = BlockStateChange { number, state, block, ranges };
            put_command(&mut self.records, &Command::BlockState(change));
        }
        (!ranges.is_empty()).then_some(self.last_change)
    }
}

fn nr_pages(range: ByteRange) -> u64 {
    let pages = pages_touched(range);
    pages.end - pages.start
}
