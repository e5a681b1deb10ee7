//! Pages that come by channels of their own.

use std::sync::Arc;

use parking_lot::{Mutex, RwLock, RwLockWriteGuard};
use ram_discard::ByteRange;
use std::os::unix::fs::FileExt;

use super::{RamLoad, bad_page, zero_received};
use crate::error::MigrationError;
use crate::page_bitmap::{PageBitmap, pages_touched};
use crate::ram::channels::Stage;
use crate::ram::channels::receivers::Receivers;
use crate::ram::{ListOptions, MigrationBlock};
use crate::stream::{PageBlocks, TARGET_PAGE_SIZE};

/// The channels of a destination.
pub(super) type Channels = Stage<Receivers>;

impl RamLoad {
    pub(super) fn start_channels(&mut self) -> Result<(), MigrationError> {
        let progress = &self.progress;
        self.channels.start_by(|channels, agreed| Receivers::start(channels, agreed, progress))
    }

    /// Waits for the pages of all channels up to here.
    pub(super) fn barrier(&self) -> Result<(), MigrationError> {
        match &self.channels {
            Channels::Started(channels) => channels.barrier(),
            _ => Ok(()),
        }
    }

    /// Everything has come; `flushed` when the last thing was a barrier.
    pub(super) fn last_section_ended(
        &mut self,
        flushed: bool,
        at: u64,
    ) -> Result<(), MigrationError> {
        if !flushed && matches!(self.channels, Channels::Started(_)) {
            let what = "the last pages of RAM are not waited for: the section ends without a flush";
            return Err(bad_page(at, what));
        }
        self.end_channels()
    }

    pub(super) fn end_channels(&mut self) -> Result<(), MigrationError> {
        match &mut self.channels {
            Channels::Started(channels) => {
                channels.finish()?;
                self.channels = Channels::Ended;
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
impl RamLoad {
    /// Has other threads write the same blocks.
    pub(in crate::ram) fn written_by(&mut self, blocks: Arc<ChannelBlocks>) {
        self.by_channels = Some(blocks);
    }
}

/// The blocks as several threads write them.
pub(in crate::ram) struct ChannelBlocks {
    blocks: Vec<ChannelBlock>,
    options: ListOptions,
}

struct ChannelBlock {
    block: Arc<MigrationBlock>,
    /// Where the block starts in its file.
    base: u64,
    received: Mutex<PageBitmap>,
    /// Held from the look at what is discarded until a page is written; by a discard alone.
    writing: RwLock<()>,
}

impl ChannelBlocks {
    pub(super) fn new(
        blocks: impl Iterator<Item = Arc<MigrationBlock>>,
        options: ListOptions,
    ) -> Self {
        let blocks = blocks.map(|block| {
            let received = PageBitmap::new(block.used_length() / TARGET_PAGE_SIZE);
            let (received, writing) = (Mutex::new(received), RwLock::default());
            ChannelBlock { base: block.file_base(), received, writing, block }
        });
        Self { blocks: blocks.collect(), options }
    }

    /// Writes pages that follow each other, which came at byte `at` of their channel.
    pub(in crate::ram) fn write(
        &self,
        index: usize,
        range: ByteRange,
        bytes: &[u8],
        at: u64,
    ) -> Result<(), MigrationError> {
        let ChannelBlock { block, base, received, writing } = &self.blocks[index];
        let _writing = writing.read();
        refuse_discarded(block, range, at)?;
        let written = if block.tells_holes() {
            block.ram().backing().file().write_all_at(bytes, base + range.start())
        } else {
            // As on the main channel: a page that the pool does not have would raise SIGBUS.
            block.reserve(range).map(|()| block.mapping().write(range.start(), bytes))
        };
        written.map_err(MigrationError::memory(block.id(), "write a page"))?;
        received.lock().set_range(pages_touched(range));
        Ok(())
    }

    /// All of `blocks`.
    #[cfg(test)]
    pub(in crate::ram) fn of(blocks: impl Iterator<Item = Arc<MigrationBlock>>) -> Self {
        Self::new(blocks, ListOptions::default())
    }

    /// Nothing of a block is written until this is dropped, so that it can be discarded.
    pub(super) fn hold(&self, index: usize) -> RwLockWriteGuard<'_, ()> {
        self.blocks[index].writing.write()
    }

    /// What came of `range` was discarded.
    pub(super) fn forget(&self, index: usize, range: ByteRange) {
        self.blocks[index].received.lock().clear_range(pages_touched(range));
    }

    /// Makes pages that follow each other zero.
    pub(in crate::ram) fn zero(
        &self,
        index: usize,
        range: ByteRange,
        at: u64,
    ) -> Result<(), MigrationError> {
        let ChannelBlock { block, received, writing, .. } = &self.blocks[index];
        let _writing = writing.read();
        refuse_discarded(block, range, at)?;
        zero_received(block, &mut received.lock(), range)
    }
}

fn refuse_discarded(
    block: &MigrationBlock,
    range: ByteRange,
    at: u64,
) -> Result<(), MigrationError> {
    if block.is_populated(range)? {
        return Ok(());
    }
    let mut offset = range.start();
    for page in range.chunks(TARGET_PAGE_SIZE) {
        if !block.is_populated(page)? {
            offset = page.start();
            break;
        }
    }
    Err(MigrationError::Discarded { block: block.id().to_owned(), offset, at })
}

impl PageBlocks for ChannelBlocks {
    type Error = MigrationError;

    fn find(&self, id: &str, at: u64) -> Result<usize, MigrationError> {
        let found = self.blocks.iter().position(|block| block.block.id() == id);
        let index = found.ok_or_else(|| {
            bad_page(at, &format!("a page of block {id:?}, which is not in the list"))
        })?;
        if self.options.leaves_out(&self.blocks[index].block) {
            return Err(bad_page(at, &format!("a page of block {id:?}, which both sides share")));
        }
        Ok(index)
    }

    fn id(&self, block: usize) -> &str {
        self.blocks[block].block.id()
    }

    fn used_length(&self, block: usize) -> u64 {
        self.blocks[block].block.used_length()
    }
}
