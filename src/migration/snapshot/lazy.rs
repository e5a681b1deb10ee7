//! A guest that runs at once while its memory is read from a file.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use super::load::freeze;
use super::stream::{Placed, load};
use super::{PIECE, Restore};
use crate::ByteRange;
use crate::migration::error::MigrationError;
use crate::migration::lazy::{FaultHandler, FaultStatistics, HandlerFailed, LazyRam, PageSource};
use crate::migration::page_bitmap::bytes_of;
use crate::migration::progress::{Counters, Progress, Status};
use crate::migration::ram::{FrozenBlocks, InMigration};
use crate::migration::stream::TARGET_PAGE_SIZE;

/// A guest whose memory is still being read. It may run.
///
/// Dropped before all has arrived, it leaves those who wait for a page waiting until the process
/// ends: a missing page never becomes zeros.
pub struct LazyRestore {
    lazy: Arc<LazyRam>,
    handler: Option<FaultHandler>,
    prefetch: Option<JoinHandle<Result<(), MigrationError>>>,
    stop: Arc<AtomicBool>,
    progress: Arc<Progress>,
    /// Until all has arrived.
    _frozen: FrozenBlocks,
}

/// As [`restore`](super::restore), but returns as soon as the devices are there: pages are read when they are
/// touched, and in the background. What the file has no page for is the kernel's to fill with
/// zeros, without a fault that anybody here sees. Block state is frozen meanwhile. A virtio-mem device
/// of this process on hugetlb takes no pages then, if it is told so
/// ([`FreezeHolder::Incoming`](crate::controller::FreezeHolder::Incoming)).
///
/// # Errors
///
/// Why it could not be read, or what kernel or memory lack for it; the guest must not run then.
pub fn restore_lazily(
    restore: Restore<'_>,
    file: Arc<File>,
    failed: Arc<dyn HandlerFailed>,
) -> Result<LazyRestore, MigrationError> {
    let Restore { configuration, blocks, devices, threads: _, progress } = restore;
    progress.set_status(Status::Setup);
    let mut lazy = None;
    let frozen = freeze(&blocks).inspect_err(|error| progress.fail(error))?;
    let loaded = load(&configuration, blocks, devices, &progress, &file, &mut |placed| {
        let offsets = placed.iter().map(|placed| placed.pages_offset).collect();
        let (blocks, in_migration) = placed
            .into_iter()
            .map(|Placed { block, pages, in_migration, .. }| ((block, pages), in_migration))
            .unzip();
        let memory = Arc::new(LazyRam::new(blocks)?);
        let (file, failed) = (Arc::clone(&file), Arc::clone(&failed));
        let source = Arc::new(Pages {
            file,
            offsets,
            failed: Arc::clone(&failed),
            _in_migration: in_migration,
        });
        progress.watch_faults(memory.shared_statistics());
        memory.set_source(Some(Arc::clone(&source) as Arc<dyn PageSource>));
        // Loading devices may touch memory.
        let handler = FaultHandler::start(Arc::clone(&memory), failed)?;
        lazy = Some((memory, handler, source));
        Ok(())
    });
    let started = loaded.and_then(|()| {
        let (lazy, handler, source) = lazy.ok_or_else(|| MigrationError::Page {
            at: 0,
            what: "the file has no RAM".to_owned(),
        })?;
        // A device of another process may have reserved huge pages for what is plugged.
        lazy.refuse_present()?;
        let stop = Arc::new(AtomicBool::new(false));
        let (memory, stopped) = (Arc::clone(&lazy), Arc::clone(&stop));
        let counted = Arc::clone(&progress);
        let prefetch = std::thread::Builder::new()
            .name("prefetch".to_owned())
            .spawn(move || source.prefetch(&memory, &stopped, &counted))
            .map_err(MigrationError::io("start a thread"))?;
        let (handler, prefetch) = (Some(handler), Some(prefetch));
        let progress = Arc::clone(&progress);
        Ok(LazyRestore { lazy, handler, prefetch, stop, progress, _frozen: frozen })
    });
    if let Err(error) = &started {
        progress.fail(error);
    }
    started
}

impl LazyRestore {
    /// Pages that have not arrived.
    pub fn outstanding(&self) -> u64 {
        self.lazy.outstanding()
    }

    /// How faults were resolved so far.
    pub fn statistics(&self) -> FaultStatistics {
        self.lazy.statistics()
    }

    /// Waits until all has arrived. The file is not needed any more then.
    ///
    /// # Errors
    ///
    /// Why a page cannot be read; those who wait for it keep waiting.
    pub fn wait(mut self) -> Result<(), MigrationError> {
        let prefetched = self.prefetch.take().map_or(Ok(()), |prefetch| {
            prefetch.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        });
        let result = prefetched.and_then(|()| self.lazy.finish());
        match &result {
            Ok(()) => self.progress.set_status(Status::Completed),
            Err(error) => self.progress.fail(error),
        }
        result
    }
}

impl Drop for LazyRestore {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(prefetch) = self.prefetch.take() {
            let _ = prefetch.join();
        }
        if self.lazy.outstanding() != 0 {
            // Closing the descriptor would turn what is missing into zeros.
            std::mem::forget(Arc::clone(&self.lazy));
        }
        drop(self.handler.take());
    }
}

/// The pages of the file.
struct Pages {
    file: Arc<File>,
    /// Of each block the first page, bytes from the start of the file.
    offsets: Vec<u64>,
    failed: Arc<dyn HandlerFailed>,
    /// The blocks, which keep their lengths meanwhile.
    _in_migration: Vec<InMigration>,
}

impl Pages {
    fn read(&self, block: usize, range: ByteRange, bytes: &mut Vec<u8>) -> io::Result<()> {
        bytes.resize(usize::try_from(range.len()).map_err(|_| io::ErrorKind::OutOfMemory)?, 0);
        self.file.read_exact_at(bytes, self.offsets[block] + range.start())
    }

    /// Places all pages, one after the other.
    fn prefetch(
        &self,
        lazy: &LazyRam,
        stop: &AtomicBool,
        progress: &Progress,
    ) -> Result<(), MigrationError> {
        let mut bytes = Vec::new();
        for block in 0..lazy.nr_blocks() {
            let page_size = lazy.block(block).page_size();
            let max = PIECE.max(page_size) / TARGET_PAGE_SIZE;
            let mut page = 0;
            while let Some(run) = lazy.next_outstanding(block, page, max) {
                if stop.load(Ordering::Relaxed) || progress.is_cancelled() {
                    return Err(MigrationError::Cancelled);
                }
                page = run.end;
                let range = bytes_of(run.clone());
                self.read(block, range, &mut bytes).map_err(MigrationError::io("read pages"))?;
                lazy.place(block, range.start(), &bytes)?;
                Counters::add(&progress.counters.normal, run.end - run.start);
                Counters::add(&progress.counters.transferred, range.len());
            }
        }
        Ok(())
    }
}

impl PageSource for Pages {
    /// Reads and places the page at once, on the thread that answers faults.
    fn request(&self, lazy: &LazyRam, block: usize, range: ByteRange) -> io::Result<()> {
        let mut bytes = Vec::new();
        let placed = self
            .read(block, range, &mut bytes)
            .map_err(MigrationError::io("read a page that is waited for"))
            .and_then(|()| lazy.place(block, range.start(), &bytes));
        placed.map_err(|error| {
            // Nobody will ask again.
            self.failed.handler_failed(&error);
            io::Error::other(error.to_string())
        })
    }
}
