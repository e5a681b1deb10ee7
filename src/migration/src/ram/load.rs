//! Taking RAM: pages are written to the backing file, never through a mapping, so that a page
//! costs one copy and no fault; what is absent or zero stays a hole.

mod block_state;
mod channels;

use std::fs::File;
use std::io::{self, IoSlice};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use ram_discard::{ByteRange, FreezeFor};
use vmstate::wire::WireRead;

use super::channels::Agreed;
use super::prepare::prepare;
use super::registry::{ListOptions, RamBlocks};
use super::zero_runs::ZeroRun;
use super::{FrozenBlocks, InMigration, MigrationBlock, PageChannels};
use crate::channel::Interrupt;
use crate::error::MigrationError;
use crate::handler::LoadHandler;
use crate::lazy::LazyRam;
use crate::page_bitmap::{PageBitmap, bytes_of, pages_touched};
use crate::progress::{Counters, Progress};
use crate::stream::{
    BlockList, BlockStateChange, Configuration, ListLimits, PageBlocks, PageKind, PageRecord,
    PageRecords, RAM_SECTION, RAM_VERSION, SectionKind, TARGET_PAGE_SIZE,
};
pub(super) use channels::ChannelBlocks;
use channels::Channels;

const PAGE: usize = TARGET_PAGE_SIZE as usize;

/// The most pages of one write (`IOV_MAX`).
const BATCH_PAGES: usize = 1024;

/// How far it is looked ahead for what is populated, bytes.
const POPULATED_AHEAD: u64 = 4 << 20;

/// The "ram" handler of the destination.
///
/// When it begins, before any device loads its state, it discards what the blocks hold: nothing may have
/// pinned them by then, other than blocks that [keep what is resident], and what holds on to their
/// pages (vfio, vDPA, io_uring) attaches after the guest was told to run.
///
/// [keep what is resident]: super::BlockOptions::keep_resident
pub struct RamLoad {
    registry: Arc<RamBlocks>,
    /// From the first section until all has come.
    frozen: Option<FrozenBlocks>,
    options: ListOptions,
    progress: Arc<Progress>,
    /// In the order of the stream's list; empty until it came.
    blocks: Vec<LoadBlock>,
    /// The block that pages are collected of.
    current: usize,
    /// How many changes of block state came.
    changes: u32,
    /// Where pages come by, where the main channel has none.
    channels: Channels,
    /// The blocks as their threads write them, once the list came.
    by_channels: Option<Arc<ChannelBlocks>>,
}

/// A block that is loaded, and which of its pages came.
struct LoadBlock {
    block: Arc<MigrationBlock>,
    received: PageBitmap,
    /// What was last seen to be populated, in this buffer of the stream.
    populated: Option<ByteRange>,
    /// Where the block starts in its file.
    base: u64,
    _in_migration: InMigration,
}

/// Pages that follow each other in the block, and lie in the buffer with headers between them.
#[derive(Default)]
struct Batch {
    start: u64,
    /// Where their bytes begin in the buffer.
    at: Vec<usize>,
}

/// Why the scan of a buffer stopped.
enum Stop {
    /// The next record is not wholly in the buffer.
    Incomplete,
    EndOfSection,
    Flush,
    List {
        total: u64,
    },
}

impl RamLoad {
    /// A handler that loads into the blocks of `registry`.
    pub fn new(registry: Arc<RamBlocks>, options: ListOptions, progress: Arc<Progress>) -> Self {
        let (blocks, current, changes) = (Vec::new(), 0, 0);
        let channels = Channels::None;
        Self {
            registry,
            frozen: None,
            options,
            progress,
            blocks,
            current,
            changes,
            channels,
            by_channels: None,
        }
    }

    /// Has pages come by channels of their own, as the configuration's capability `multifd` says.
    #[must_use]
    pub fn with_channels(self, channels: PageChannels) -> Self {
        Self { channels: Channels::Waiting(channels, Agreed::default()), ..self }
    }

    /// Handles the records that are wholly in `buffer`, which starts at byte `at` of the stream;
    /// how many bytes they are, and why it went no further.
    fn scan(
        &mut self,
        records: &mut PageRecords,
        buffer: &[u8],
        at: u64,
    ) -> Result<(usize, Stop), MigrationError> {
        // Block state may have changed since the buffer before.
        self.blocks.iter_mut().for_each(|block| block.populated = None);
        let mut batch = Batch::default();
        let mut zeros = ZeroRun::default();
        let mut done = 0;
        let stop = loop {
            let here = at + done as u64;
            let Some((record, len)) = records.parse(&buffer[done..], here, &*self)? else {
                break Stop::Incomplete;
            };
            done += len;
            let (block, kind, page) = match record {
                PageRecord::Page { block, kind, page } => (block, kind, page),
                PageRecord::List { total } => break Stop::List { total },
                PageRecord::EndOfSection => break Stop::EndOfSection,
                PageRecord::Flush => break Stop::Flush,
            };
            if block != self.current {
                self.flush(&mut batch, &mut zeros, buffer, here)?;
                self.current = block;
            }
            match kind {
                PageKind::Zero => {
                    // A flush zeroes before it writes, so a page that came must be out by now.
                    let came = batch.range().is_some_and(|pages| pages.overlaps(page));
                    if came || !zeros.push(page) {
                        self.flush(&mut batch, &mut zeros, buffer, here)?;
                        zeros.push(page);
                    }
                }
                PageKind::Normal => {
                    if !batch.push(page.start(), done) {
                        self.flush(&mut batch, &mut zeros, buffer, here)?;
                        batch.push(page.start(), done);
                    }
                    done += PAGE;
                }
            }
        };
        self.flush(&mut batch, &mut zeros, buffer, at + done as u64)?;
        Ok((done, stop))
    }

    /// Zeroes and writes the pages that were collected, of the current block.
    fn flush(
        &mut self,
        batch: &mut Batch,
        zeros: &mut ZeroRun,
        buffer: &[u8],
        at: u64,
    ) -> Result<(), MigrationError> {
        let Some(block) = self.blocks.get_mut(self.current) else { return Ok(()) };
        if let Some(range) = zeros.take() {
            block.refuse_discarded(range, at)?;
            block.zero(range)?;
            let pages = range.len() / TARGET_PAGE_SIZE;
            Counters::add(&self.progress.counters.duplicate, pages);
        }
        if let Some(range) = batch.range() {
            block.refuse_discarded(range, at)?;
            block.write(range, &batch.at, buffer)?;
            Counters::add(&self.progress.counters.normal, batch.at.len() as u64);
            batch.at.clear();
        }
        Ok(())
    }

    fn take_list(&mut self, reader: &mut dyn WireRead, total: u64) -> Result<(), MigrationError> {
        let at = reader.offset();
        if !self.blocks.is_empty() {
            return Err(bad_page(at, "a second list of RAM blocks"));
        }
        let with_page_size: Vec<&str> = match self.options.postcopy {
            true => self
                .registry
                .iter()
                .filter(|block| block.page_size() != TARGET_PAGE_SIZE)
                .map(|block| block.id())
                .collect(),
            false => Vec::new(),
        };
        let limits = ListLimits {
            ignore_shared: self.options.ignore_shared,
            mapped_ram: false,
            with_page_size: &with_page_size,
            may_have_page_size: false,
        };
        let list = BlockList::read(reader, total, limits, &mut |_, _| Ok(()))?;
        let accepted = self.registry.accept(&list, self.options)?;
        for block in accepted {
            let _in_migration = InMigration::new(&block);
            let nr_pages = block.used_length() / TARGET_PAGE_SIZE;
            let base = block.file_base();
            let received = PageBitmap::new(nr_pages);
            self.blocks.push(LoadBlock { block, received, populated: None, base, _in_migration });
        }
        if let Channels::Started(channels) = &self.channels {
            let blocks = self.blocks.iter().map(|block| Arc::clone(&block.block));
            let blocks = Arc::new(ChannelBlocks::new(blocks, self.options));
            channels.blocks_known(Arc::clone(&blocks));
            self.by_channels = Some(blocks);
        }
        Ok(())
    }
}

impl Batch {
    /// Adds a page whose bytes begin at `at`; false when it does not follow the ones before.
    fn push(&mut self, offset: u64, at: usize) -> bool {
        if self.at.is_empty() {
            self.start = offset;
        } else if self.at.len() == BATCH_PAGES
            || offset != self.start + (self.at.len() * PAGE) as u64
        {
            return false;
        }
        self.at.push(at);
        true
    }

    fn range(&self) -> Option<ByteRange> {
        ByteRange::new(self.start, (self.at.len() * PAGE) as u64)
    }
}

impl LoadBlock {
    fn refuse_discarded(&mut self, range: ByteRange, at: u64) -> Result<(), MigrationError> {
        // Scattered pages are many, and mostly of one populated range.
        if self.populated.is_some_and(|populated| populated.contains(range)) {
            return Ok(());
        }
        self.populated = self.block.populated_ahead(range, POPULATED_AHEAD)?;
        if self.populated.is_some() {
            return Ok(());
        }
        let block = self.block.id().to_owned();
        let mut offset = range.start();
        for page in range.chunks(TARGET_PAGE_SIZE) {
            if !self.block.is_populated(page)? {
                offset = page.start();
                break;
            }
        }
        Err(MigrationError::Discarded { block, offset, at })
    }

    fn write(
        &mut self,
        range: ByteRange,
        pages: &[usize],
        buffer: &[u8],
    ) -> Result<(), MigrationError> {
        let written = if self.block.tells_holes() {
            write_pages(self.block.ram().backing().file(), self.base + range.start(), pages, buffer)
        } else {
            // hugetlb files cannot be written, but mapped: a page that the pool does not have would
            // raise SIGBUS there.
            let reserved = self.block.reserve(range);
            reserved.map_err(MigrationError::memory(self.block.id(), "write a page"))?;
            for (i, &at) in pages.iter().enumerate() {
                let offset = range.start() + (i * PAGE) as u64;
                self.block.mapping().write(offset, &buffer[at..at + PAGE]);
            }
            Ok(())
        };
        written.map_err(MigrationError::memory(self.block.id(), "write a page"))?;
        self.received.set_range(pages_touched(range));
        Ok(())
    }

    /// Makes `range` zero.
    fn zero(&mut self, range: ByteRange) -> Result<(), MigrationError> {
        zero_received(&self.block, &mut self.received, range)
    }
}

/// Makes `range` of a block zero: only where something came before, since the rest is empty.
fn zero_received(
    block: &MigrationBlock,
    received: &mut PageBitmap,
    range: ByteRange,
) -> Result<(), MigrationError> {
    let pages = pages_touched(range);
    let keep = block.options().keep_resident || !block.tells_holes();
    for came in received.runs(pages.clone()).map(bytes_of) {
        // What came is there: it need not be searched.
        let zeroed = if keep { block.write_zeros(came) } else { block.discard(came) };
        zeroed.map_err(MigrationError::memory(block.id(), "zero a page"))?;
    }
    // What is zero needs no zeroing again.
    received.clear_range(pages);
    Ok(())
}

/// Writes pages that follow each other in the file from places in a buffer.
fn write_pages(file: &File, mut offset: u64, pages: &[usize], buffer: &[u8]) -> io::Result<()> {
    if let [at] = *pages {
        return file.write_all_at(&buffer[at..at + PAGE], offset);
    }
    let slices: Vec<IoSlice<'_>> =
        pages.iter().map(|&at| IoSlice::new(&buffer[at..at + PAGE])).collect();
    let mut rest = &slices[..];
    while !rest.is_empty() {
        let written = rustix::io::retry_on_intr(|| rustix::io::pwritev(file, rest, offset))?;
        if written == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        offset += written as u64;
        rest = &rest[written / PAGE..];
        if !written.is_multiple_of(PAGE) {
            // Part of a page: the rest of it by itself, which is rare.
            let part = &rest[0][written % PAGE..];
            file.write_all_at(part, offset)?;
            offset += part.len() as u64;
            rest = &rest[1..];
        }
    }
    Ok(())
}

fn bad_page(at: u64, what: &str) -> MigrationError {
    MigrationError::Page { at, what: what.to_owned() }
}

impl PageBlocks for RamLoad {
    type Error = MigrationError;

    fn find(&self, id: &str, at: u64) -> Result<usize, MigrationError> {
        if !matches!(self.channels, Channels::None) {
            return Err(bad_page(at, "a page on the main channel, beside channels for pages"));
        }
        let found = self.blocks.iter().position(|block| block.block.id() == id);
        let Some(index) = found else {
            let what = format!("a page of block {id:?}, which is not in the list");
            return Err(MigrationError::Page { at, what });
        };
        if self.options.leaves_out(&self.blocks[index].block) {
            let what = format!("a page of block {id:?}, which both sides share");
            return Err(MigrationError::Page { at, what });
        }
        Ok(index)
    }

    #[inline]
    fn id(&self, block: usize) -> &str {
        self.blocks[block].block.id()
    }

    #[inline]
    fn used_length(&self, block: usize) -> u64 {
        self.blocks[block].block.used_length()
    }
}

impl LoadHandler for RamLoad {
    fn idstr(&self) -> &str {
        RAM_SECTION
    }

    fn version_id(&self) -> u32 {
        RAM_VERSION
    }

    fn configure(&mut self, configuration: &Configuration) -> Result<(), MigrationError> {
        self.options.check(configuration)?;
        self.channels.check(configuration)
    }

    fn encrypted_channels(&self) -> Vec<bool> {
        self.channels.encrypted()
    }

    fn load_setup(&mut self) -> Result<(), MigrationError> {
        // Blocks that nothing was said of are refused before anything comes.
        let blocks = self.registry.migratable()?;
        self.frozen = Some(FrozenBlocks::new(blocks, FreezeFor::Destination)?);
        // What never comes is zero, and costs nothing.
        prepare(&self.registry, self.options)?;
        self.start_channels()
    }

    fn load(
        &mut self,
        kind: SectionKind,
        _version_id: u32,
        reader: &mut dyn WireRead,
    ) -> Result<(), MigrationError> {
        if kind != SectionKind::Start && self.blocks.is_empty() {
            return Err(bad_page(reader.offset(), "pages before the list of RAM blocks"));
        }
        // A section may continue nothing that came before it.
        let mut records = PageRecords::new();
        let mut flushed = false;
        loop {
            let at = reader.offset();
            let (done, stop) = self.scan(&mut records, reader.buffered(), at)?;
            reader.take(done);
            match stop {
                Stop::EndOfSection if kind == SectionKind::End => {
                    return self.last_section_ended(flushed, at);
                }
                Stop::EndOfSection => return Ok(()),
                Stop::Flush => {
                    self.barrier()?;
                    flushed = true;
                }
                Stop::List { total } => self.take_list(reader, total)?,
                Stop::Incomplete => {
                    let more = reader.read_ahead();
                    if !more.map_err(MigrationError::io("read pages"))? {
                        let offset = reader.offset() + reader.buffered().len() as u64;
                        let what = "the next page";
                        return Err(vmstate::wire::WireError::Truncated { offset, what }.into());
                    }
                }
            }
        }
    }

    fn can_follow(&self) -> bool {
        self.can_follow_source()
    }

    fn block_state(
        &mut self,
        change: &BlockStateChange,
        at: u64,
    ) -> Result<Option<String>, MigrationError> {
        self.follow(change, at)
    }

    fn arrives(&mut self, memory: &Arc<LazyRam>) -> Result<(), MigrationError> {
        self.follow_arrival(memory)
    }

    fn complete(&mut self) -> Result<(), MigrationError> {
        if self.blocks.is_empty() && !self.registry.migratable()?.is_empty() {
            return Err(MigrationError::NoRam);
        }
        self.end_channels()?;
        self.frozen.as_ref().map_or(Ok(()), FrozenBlocks::check)
    }

    fn interrupt_on_failure(&mut self, main: &Interrupt) {
        if let Channels::Started(channels) = &self.channels {
            channels.interrupt_on_failure(main);
        }
    }

    fn failure(&mut self) -> Option<MigrationError> {
        match &self.channels {
            Channels::Started(channels) => channels.failure(),
            _ => None,
        }
    }

    fn before_postcopy(&mut self) -> Result<(), MigrationError> {
        self.end_channels()
    }

    fn cleanup(&mut self) {
        if !matches!(self.channels, Channels::None) {
            self.channels = Channels::Ended;
        }
        self.blocks.clear();
        self.by_channels = None;
        self.frozen = None;
    }
}

#[cfg(test)]
mod tests;
