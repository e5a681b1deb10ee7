//! A RAM block as migration sees it.

use std::io;
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::RwLock;
use ram_discard::memory::{Backing, BackingKind, HostMapping, RamBlock};
use ram_discard::{ByteRange, FileRange, RamDiscardManager, Section, Unavailable};

use super::{BlockError, BlockOptions, ZeroPageDetection};
use crate::stream::TARGET_PAGE_SIZE;
use crate::sys::huge_page_cache;

/// A RAM block, where it is mapped, and who knows which of it is populated.
pub struct MigrationBlock {
    ram: Arc<RamBlock>,
    mapping: Arc<HostMapping>,
    options: BlockOptions,
    used_length: AtomicU64,
    discard: RwLock<Option<Region>>,
    /// How many migrations it takes part in now.
    migrations: AtomicU64,
}

/// A block that takes part in a migration for as long as this is held.
pub(crate) struct InMigration(Arc<MigrationBlock>);

impl InMigration {
    pub(crate) fn new(block: &Arc<MigrationBlock>) -> Self {
        block.begin_migration();
        Self(Arc::clone(block))
    }
}

impl Drop for InMigration {
    fn drop(&mut self) {
        self.0.end_migration();
    }
}

/// The part of a block that a RamDiscardManager answers for; the rest is always populated.
struct Region {
    /// Bytes from the start of the block.
    start: u64,
    manager: Arc<dyn RamDiscardManager>,
}

impl MigrationBlock {
    /// A block whose first byte is the first byte of `mapping`.
    ///
    /// # Errors
    ///
    /// `EINVAL` when the mapping is shorter than the block, or the used length is longer or no
    /// multiple of the page size.
    pub fn new(
        ram: Arc<RamBlock>,
        mapping: Arc<HostMapping>,
        options: BlockOptions,
    ) -> io::Result<Self> {
        let max_length = ram.range().len();
        let used_length = options.resizable.unwrap_or(max_length);
        if mapping.len() < max_length
            || used_length > max_length
            || !used_length.is_multiple_of(ram.page_size())
        {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(Self {
            ram,
            mapping,
            options,
            used_length: AtomicU64::new(used_length),
            discard: RwLock::default(),
            migrations: AtomicU64::new(0),
        })
    }

    /// Maps the block's file for migration.
    ///
    /// # Errors
    ///
    /// When it cannot be mapped; see [`new`](Self::new) as well.
    pub fn map(ram: Arc<RamBlock>, options: BlockOptions) -> io::Result<Self> {
        let range = ram.file_range(ram.range()).ok_or(io::ErrorKind::InvalidInput)?;
        let mapping = HostMapping::map(ram.backing().file(), range.start(), range.len())?;
        Self::new(ram, Arc::new(mapping), options)
    }

    /// Has a manager answer for the bytes from `start` on, as far as its region goes.
    ///
    /// # Errors
    ///
    /// When there is one already, or the block migrates.
    pub fn set_discard_manager(
        &self,
        start: u64,
        manager: Arc<dyn RamDiscardManager>,
    ) -> Result<(), BlockError> {
        let mut discard = self.discard.write();
        if discard.is_some() {
            return Err(BlockError::ManagerTwice { id: self.id().to_owned() });
        }
        self.check_unused()?;
        *discard = Some(Region { start, manager });
        Ok(())
    }

    /// Takes the manager away: all of the block is populated from now on.
    ///
    /// # Errors
    ///
    /// When the block migrates.
    pub fn unset_discard_manager(&self) -> Result<(), BlockError> {
        let mut discard = self.discard.write();
        self.check_unused()?;
        *discard = None;
        Ok(())
    }

    /// The manager, and where in the block its region starts.
    pub(crate) fn discard_region(&self) -> Option<(u64, Arc<dyn RamDiscardManager>)> {
        let discard = self.discard.read();
        discard.as_ref().map(|region| (region.start, Arc::clone(&region.manager)))
    }

    /// The block takes part in a migration: it keeps its manager, and stays registered.
    pub(super) fn begin_migration(&self) {
        let _not_while_it_changes = self.discard.read();
        self.migrations.fetch_add(1, Ordering::AcqRel);
    }

    pub(super) fn end_migration(&self) {
        self.migrations.fetch_sub(1, Ordering::AcqRel);
    }

    /// Fails while the block takes part in a migration.
    pub(super) fn check_unused(&self) -> Result<(), BlockError> {
        match self.migrations.load(Ordering::Acquire) {
            0 => Ok(()),
            _ => Err(BlockError::Migrating { id: self.id().to_owned() }),
        }
    }

    /// The id, unique among the blocks of a VM.
    pub fn id(&self) -> &str {
        self.ram.id()
    }

    /// The block's memory.
    pub fn ram(&self) -> &Arc<RamBlock> {
        &self.ram
    }

    /// Where it is mapped in this process.
    pub fn mapping(&self) -> &Arc<HostMapping> {
        &self.mapping
    }

    /// What the VMM said of it.
    pub fn options(&self) -> BlockOptions {
        self.options
    }

    /// Size of its pages on the host, bytes.
    pub fn page_size(&self) -> u64 {
        self.ram.page_size()
    }

    /// Bytes of it that are in use.
    pub fn used_length(&self) -> u64 {
        self.used_length.load(Ordering::Relaxed)
    }

    /// The bytes in use, counted from the start of the block.
    pub fn used(&self) -> Option<ByteRange> {
        ByteRange::new(0, self.used_length())
    }

    /// Changes the used length, as firmware does that makes its tables longer. What was past the end is
    /// as it was when the block grows over it again.
    ///
    /// # Errors
    ///
    /// When the block is not resizable or not that long, or takes part in a migration, which would
    /// lose what is added.
    pub fn resize(&self, used_length: u64) -> Result<(), BlockError> {
        let (id, limit) = (self.id().to_owned(), self.ram.range().len());
        if self.options.resizable.is_none() {
            return Err(BlockError::NotResizable { id });
        }
        let page_size = self.page_size();
        if used_length > limit || !used_length.is_multiple_of(page_size) {
            return Err(BlockError::Resize { id, used_length, limit, page_size });
        }
        let _no_migration_begins = self.discard.write();
        self.check_unused()?;
        self.set_used_length(used_length);
        Ok(())
    }

    /// Follows the source's used length; the caller has checked that it may.
    pub(super) fn set_used_length(&self, used_length: u64) {
        self.used_length.store(used_length, Ordering::Relaxed);
    }

    /// Whether the target page at `offset` goes out as zeros instead of its bytes.
    pub(crate) fn is_sent_as_zeros(&self, offset: u64) -> bool {
        self.options.zero_page_detection == ZeroPageDetection::Legacy
            && self.mapping.page_is_zero(offset, TARGET_PAGE_SIZE)
    }

    /// Whether files of its kind tell their holes.
    pub fn tells_holes(&self) -> bool {
        self.backing().kind() != BackingKind::Hugetlb
    }

    /// The used bytes that are discarded: maximal ranges, ascending.
    ///
    /// # Errors
    ///
    /// When the manager's process is gone.
    pub fn discarded(&self) -> Result<Vec<ByteRange>, Unavailable> {
        let mut ranges = Vec::new();
        let discard = self.discard.read();
        let (Some(region), Some(used)) = (&*discard, self.used()) else { return Ok(ranges) };
        if let Some(section) = region.section(used) {
            let _ = region.manager.replay_discarded(section, &mut |range| {
                ranges.extend(range.in_block(region.start));
                ControlFlow::Continue(())
            })?;
        }
        Ok(ranges)
    }

    /// The used bytes that are not discarded: maximal ranges, ascending.
    ///
    /// # Errors
    ///
    /// When the manager's process is gone.
    pub fn populated(&self) -> Result<Vec<ByteRange>, Unavailable> {
        Ok(self.all_but(&self.discarded()?))
    }

    /// The used bytes that are not in `discarded`, which is as [`discarded`](Self::discarded) tells.
    pub(super) fn all_but(&self, discarded: &[ByteRange]) -> Vec<ByteRange> {
        let mut ranges = Vec::with_capacity(discarded.len() + 1);
        let mut at = 0;
        for hole in discarded {
            ranges.extend(ByteRange::from_bounds(at, hole.start()));
            at = hole.end();
        }
        ranges.extend(ByteRange::from_bounds(at, self.used_length()));
        ranges
    }

    /// Whether every byte of `range` (from the start of the block) is populated.
    ///
    /// # Errors
    ///
    /// When the manager's process is gone.
    pub fn is_populated(&self, range: ByteRange) -> Result<bool, Unavailable> {
        match &*self.discard.read() {
            Some(region) => region
                .section(range)
                .map_or(Ok(true), |section| region.manager.is_populated(section)),
            None => Ok(true),
        }
    }

    /// The populated bytes that begin with `range`, as far as they are looked at: `ahead` bytes.
    /// `None` when part of `range` is discarded.
    ///
    /// # Errors
    ///
    /// When the manager's process is gone.
    pub(super) fn populated_ahead(
        &self,
        range: ByteRange,
        ahead: u64,
    ) -> Result<Option<ByteRange>, Unavailable> {
        let end = self.used_length().min(range.start().saturating_add(ahead)).max(range.end());
        let Some(mut populated) = ByteRange::from_bounds(range.start(), end) else {
            return Ok(None);
        };
        let discard = self.discard.read();
        if let Some(region) = &*discard
            && let Some(section) = region.section(populated)
        {
            let mut first = None;
            let _ = region.manager.replay_discarded(section, &mut |range| {
                first = range.in_block(region.start);
                ControlFlow::Break(())
            })?;
            if let Some(discarded) = first {
                let before = ByteRange::from_bounds(range.start(), discarded.start());
                let Some(before) = before.filter(|before| before.end() >= range.end()) else {
                    return Ok(None);
                };
                populated = before;
            }
        }
        Ok(Some(populated))
    }

    /// Calls `visit` with each maximal part of `range` that the host holds data for, ascending;
    /// all of it where the backing does not tell its holes. Nothing is touched.
    ///
    /// # Errors
    ///
    /// When the file cannot be searched.
    pub fn for_each_data(
        &self,
        range: ByteRange,
        mut visit: impl FnMut(ByteRange),
    ) -> io::Result<()> {
        if !self.tells_holes() {
            visit(range);
            return Ok(());
        }
        let base = self.file_base();
        let in_file = range.in_file(base).ok_or(io::ErrorKind::InvalidInput)?;
        self.backing().for_each_data(in_file, |data| {
            data.in_block(base).into_iter().for_each(&mut visit);
            Ok(())
        })
    }

    /// As [`for_each_data`](Self::for_each_data), but with holes where they are to be sent.
    ///
    /// # Errors
    ///
    /// When the file cannot be searched.
    pub fn for_each_sent(
        &self,
        range: ByteRange,
        mut visit: impl FnMut(ByteRange),
    ) -> io::Result<()> {
        if self.options.send_holes {
            visit(range);
            return Ok(());
        }
        self.for_each_data(range, visit)
    }

    /// Discards `range`: it reads as zeros, and the host holds nothing for it.
    ///
    /// # Errors
    ///
    /// `Unsupported` when the block [keeps its resident pages](BlockOptions::keep_resident), or why the
    /// kernel refuses.
    pub fn discard(&self, range: ByteRange) -> io::Result<()> {
        if self.options.keep_resident {
            return Err(Self::refusal_to_discard());
        }
        self.backing().discard(self.in_file(range)?)
    }

    /// Why a block that [keeps its resident pages](BlockOptions::keep_resident) is not discarded.
    pub(super) fn refusal_to_discard() -> io::Error {
        let what = "the VMM said that its resident pages must stay (keep_resident), and pages would have to \
                    be discarded";
        io::Error::new(io::ErrorKind::Unsupported, what)
    }

    /// Discards what `range` holds, which is discarded by contract or not in use. Cheap where it holds
    /// nothing.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn sweep(&self, range: ByteRange) -> io::Result<()> {
        self.backing().sweep(self.in_file(range)?)
    }

    /// Discards what the block holds, also past its used length.
    pub(super) fn sweep_all(&self) -> io::Result<()> {
        self.sweep(ByteRange::new(0, self.ram.range().len()).ok_or(io::ErrorKind::InvalidInput)?)
    }

    /// Takes host memory for `range`.
    pub(crate) fn reserve(&self, range: ByteRange) -> io::Result<()> {
        self.backing().reserve(self.in_file(range)?)
    }

    /// Writes zeros to `range`, of which the host pages stay.
    pub(super) fn write_zeros(&self, range: ByteRange) -> io::Result<()> {
        static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
        if !self.tells_holes() {
            // hugetlb files cannot be written, but mapped.
            self.mapping.fill_zero(range.start(), range.len());
            return Ok(());
        }
        self.in_file(range)?.chunks(ZEROS.len() as u64).try_for_each(|chunk| {
            self.backing().file().write_all_at(&ZEROS[..chunk.len() as usize], chunk.start())
        })
    }

    /// Where in the file the block starts, bytes.
    pub fn file_base(&self) -> u64 {
        self.ram.file_range(self.ram.range()).map_or(0, FileRange::start)
    }

    /// Whether the file has the page of `range`, of a block on hugetlbfs.
    ///
    /// # Errors
    ///
    /// When it cannot be found out.
    pub(crate) fn has_huge_page(&self, range: ByteRange) -> io::Result<bool> {
        huge_page_cache::has_page(self.backing().file(), self.in_file(range)?)
    }

    fn in_file(&self, range: ByteRange) -> io::Result<FileRange> {
        Ok(range.in_file(self.file_base()).ok_or(io::ErrorKind::InvalidInput)?)
    }

    fn backing(&self) -> &Backing {
        self.ram.backing()
    }
}

impl Region {
    /// The part of the manager's region that `range` (from the start of the block) covers.
    fn section(&self, range: ByteRange) -> Option<Section> {
        let region = ByteRange::new(self.start, self.manager.region_size())?;
        region.intersection(range)?.section(self.start)
    }
}
