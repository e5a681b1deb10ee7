//! Reading a guest back from a file, by several threads.

use std::collections::VecDeque;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::thread;

use parking_lot::Mutex;
use ram_discard::{ByteRange, FreezeFor};

use super::PIECE;
use super::stream::{Placed, load};
use crate::devices::Devices;
use crate::error::MigrationError;
use crate::page_bitmap::bytes_of;
use crate::progress::{Counters, Progress, Status};
use crate::ram::{FrozenBlocks, RamBlocks};
use crate::stream::{Configuration, TARGET_PAGE_SIZE};

/// A guest that is to be read from a file. It does not run yet.
pub struct Restore<'a> {
    /// Machine type and capabilities.
    pub configuration: Configuration,
    /// Its RAM.
    pub blocks: Arc<RamBlocks>,
    /// Everything else.
    pub devices: &'a mut dyn Devices,
    /// How many threads read pages; at least one does.
    pub threads: usize,
    /// What can be seen of it, and how it is cancelled.
    pub progress: Arc<Progress>,
}

/// Reads a guest from `file`, memory and devices. What the file has no page for is a hole.
///
/// # Errors
///
/// Why it could not be read; the guest must not run then.
pub fn restore(restore: Restore<'_>, file: &File) -> Result<(), MigrationError> {
    let Restore { configuration, blocks, devices, threads, progress } = restore;
    progress.set_status(Status::Setup);
    let result = freeze(&blocks).and_then(|frozen| {
        load(&configuration, blocks, devices, &progress, file, &mut |placed| {
            load_pages(&placed, file, threads, &progress)
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

/// A run of pages that a thread reads at once.
struct Piece {
    placed: usize,
    pages: Range<u64>,
}

/// Reads all pages, by several threads.
fn load_pages(
    placed: &[Placed],
    file: &File,
    threads: usize,
    progress: &Progress,
) -> Result<(), MigrationError> {
    placed.iter().try_for_each(Placed::reserve)?;
    let mut pieces = VecDeque::new();
    for (index, block) in placed.iter().enumerate() {
        let (mut from, nr_pages) = (0, block.pages.nr_pages());
        while let Some(pages) = block.pages.next_run(from, nr_pages, PIECE / TARGET_PAGE_SIZE) {
            from = pages.end;
            pieces.push_back(Piece { placed: index, pages });
        }
    }
    let pieces = Mutex::new(pieces);
    let work = || -> Result<(), MigrationError> {
        let mut buffer = vec![0; PIECE as usize];
        loop {
            if progress.is_cancelled() {
                return Err(MigrationError::Cancelled);
            }
            let Some(piece) = pieces.lock().pop_front() else { return Ok(()) };
            let nr_pages = piece.pages.end - piece.pages.start;
            let loaded = placed[piece.placed].load(piece.pages, file, &mut buffer);
            // The others have nothing more to do.
            loaded.inspect_err(|_| pieces.lock().clear())?;
            Counters::add(&progress.counters.normal, nr_pages);
            let bytes = nr_pages * TARGET_PAGE_SIZE;
            Counters::add(&progress.counters.transferred, bytes);
        }
    };
    thread::scope(|scope| {
        let others: Vec<_> = (1..threads.max(1)).map(|_| scope.spawn(work)).collect();
        let mut result = work();
        for other in others {
            result =
                result.and(other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        }
        result
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
        file: &File,
        buffer: &mut [u8],
    ) -> Result<(), MigrationError> {
        let range = bytes_of(pages);
        let bytes = &mut buffer[..range.len() as usize];
        file.read_exact_at(bytes, self.pages_offset + range.start())
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
