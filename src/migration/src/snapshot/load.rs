//! Reading a guest back from a file, by several threads.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use ram_discard::{ByteRange, FreezeFor};

use super::PIECE;
use super::file_io::{AlignedBuffer, FileIo, PagesFile, Pieces, Turns};
use super::huge_pages;
use super::stream::{Placed, load};
use crate::devices::Devices;
use crate::error::MigrationError;
use crate::page_bitmap::bytes_of;
use crate::progress::{Counters, Progress, Status};
use crate::ram::{FrozenBlocks, ListOptions, RamBlocks};
use crate::stream::{Configuration, TARGET_PAGE_SIZE};

/// A guest that is to be read from a file. It does not run yet.
pub struct Restore<'a> {
    /// Machine type and capabilities.
    pub configuration: Configuration,
    /// Its RAM.
    pub blocks: Arc<RamBlocks>,
    /// Everything else.
    pub devices: &'a mut dyn Devices,
    /// How its pages are read.
    pub io: FileIo,
    /// What can be seen of it, and how it is cancelled.
    pub progress: Arc<Progress>,
}

/// Reads a guest from `file`, memory and devices. What the file has no page for is a hole. Where the system
/// does not have the huge pages that the guest needs, that is found out before anything changes.
///
/// # Errors
///
/// Why it could not be read; the guest must not run then.
pub fn restore(restore: Restore<'_>, file: &File) -> Result<(), MigrationError> {
    let Restore { configuration, blocks, devices, io, progress } = restore;
    progress.set_status(Status::Setup);
    let result = freeze(&blocks).and_then(|frozen| {
        huge_pages::check(&blocks, ListOptions::of(&configuration), file)?;
        load(&configuration, blocks, devices, &progress, file, &mut |placed| {
            load_pages(&placed, file, io, &progress)
        })?;
        frozen.thaw()
    });
    match &result {
        Ok(()) => progress.set_status(Status::Completed),
        Err(error) => progress.fail(error),
    }
    result
}

/// Freezes block state for as long as memory arrives.
pub(super) fn freeze(blocks: &RamBlocks) -> Result<FrozenBlocks, MigrationError> {
    FrozenBlocks::new(blocks.migratable()?, FreezeFor::Destination)
}

/// Reads all pages, by several threads.
fn load_pages(
    placed: &[Placed],
    file: &File,
    io: FileIo,
    progress: &Progress,
) -> Result<(), MigrationError> {
    placed.iter().try_for_each(Placed::reserve)?;
    let pieces = Pieces::new(placed.iter().map(|block| &block.pages).collect());
    let file = PagesFile::to_read(file, io);
    io.run_in_turns(|turns| {
        let mut buffer = AlignedBuffer::new(PIECE as usize);
        while let Some((index, pages)) = pieces.next() {
            let nr_pages = pages.end - pages.start;
            let loaded = match progress.is_cancelled() {
                true => Err(MigrationError::Cancelled),
                false => placed[index].load(pages, &file, turns, &mut buffer),
            };
            // The others have nothing more to do.
            loaded.inspect_err(|_| pieces.end())?;
            Counters::add(&progress.counters.normal, nr_pages);
            let bytes = nr_pages * TARGET_PAGE_SIZE;
            Counters::add(&progress.counters.transferred, bytes);
        }
        Ok(())
    })
}

impl Placed {
    /// Takes huge pages for all pages that there are, before any is written: through a mapping, one that
    /// the pool does not have would raise SIGBUS.
    fn reserve(&self) -> Result<(), MigrationError> {
        if self.block.tells_holes() {
            return Ok(());
        }
        let (page_size, used) = (self.block.page_size(), self.block.used_length());
        let mut from = 0;
        while let Some(run) = self.pages.next_run(from, self.pages.nr_pages(), u64::MAX) {
            let run = bytes_of(run);
            let start = run.start() / page_size * page_size;
            let end = run.end().next_multiple_of(page_size).min(used);
            from = end / TARGET_PAGE_SIZE;
            if let Some(range) = ByteRange::from_bounds(start, end) {
                let taken = self.block.reserve(range);
                taken.map_err(MigrationError::memory(self.block.id(), "take huge pages"))?;
            }
        }
        Ok(())
    }

    fn load(
        &self,
        pages: Range<u64>,
        file: &PagesFile<'_>,
        turns: &Turns,
        buffer: &mut AlignedBuffer,
    ) -> Result<(), MigrationError> {
        let range = bytes_of(pages);
        let bytes = buffer.first(range.len() as usize);
        turns
            .take(|| file.read(bytes, self.pages_offset + range.start()))
            .map_err(MigrationError::io("read pages"))?;
        if self.block.tells_holes() {
            let at = self.block.file_base() + range.start();
            let written = self.block.ram().backing().file().write_all_at(bytes, at);
            written.map_err(MigrationError::memory(self.block.id(), "write pages"))
        } else {
            self.block.mapping().write(range.start(), bytes);
            Ok(())
        }
    }
}
