//! A guest that runs at once while its memory is read from a file.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::Mutex;
use ram_discard::ByteRange;

use super::huge_pages;
use super::load::freeze;
use super::stream::{Placed, load};
use super::{PIECE, Restore};
use crate::error::MigrationError;
use crate::lazy::{
    ArrivalFollower, FaultHandler, FaultStatistics, HandlerFailed, LazyRam, PageSource,
};
use crate::page_bitmap::bytes_of;
use crate::progress::{Counters, Progress, Status};
use crate::ram::{FrozenBlocks, InMigration, ListOptions};
use crate::stream::TARGET_PAGE_SIZE;

/// A guest whose memory is still being read. It may run.
///
/// Two things read: faults their own page, for as long as this value lives, and a thread the rest,
/// which [`wait`](Self::wait) waits for. [`Progress::cancel`] ends that thread, and no more: the guest
/// runs on, and reads what it touches.
///
/// Dropped before all has arrived, it leaves accesses to what is missing waiting until the process
/// ends, and tells [`HandlerFailed`]: a missing page never becomes zeros.
pub struct LazyRestore {
    // Dropped first, so that nothing is read any more when it is looked what has arrived.
    prefetch: Mutex<Prefetch>,
    _handler: FaultHandler,
    lazy: Arc<LazyRam>,
    source: Arc<Pages>,
    progress: Arc<Progress>,
}

/// The thread that reads what is not touched.
struct Prefetch {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<(), MigrationError>>>,
    /// Until all has arrived, block state is frozen or followed, and the blocks keep their lengths.
    held: Option<(FrozenBlocks, Vec<InMigration>)>,
}

/// Between two attempts of that thread when there is no memory, or the file cannot be read.
const RETRY: Duration = Duration::from_millis(50);

/// How often it tries what the file is wanting before [`LazyRestore::wait`] says why.
const TRIES_MAX: u32 = 20;

/// As [`restore`](super::restore), but returns as soon as the devices are there: pages are read when they are
/// touched, and in the background. What the file has no page for is the kernel's to fill with
/// zeros, without a fault that this side sees. Block state is frozen until it is
/// [followed](LazyRestore::follow), else until all has arrived. A virtio-mem device
/// of this process on hugetlb takes no pages then, if it is told so
/// (`FreezeHolder::Incoming` of its controller).
///
/// # Errors
///
/// Why it could not be read, or what kernel or memory lack for it; the guest must not run then.
pub fn restore_lazily(
    restore: Restore<'_>,
    file: Arc<File>,
    failed: Arc<dyn HandlerFailed>,
) -> Result<LazyRestore, MigrationError> {
    let Restore { configuration, blocks, devices, io: _, progress } = restore;
    progress.set_status(Status::Setup);
    let mut lazy = None;
    let checked = freeze(&blocks).and_then(|frozen| {
        huge_pages::check(&blocks, ListOptions::of(&configuration), &file)?;
        Ok(frozen)
    });
    let frozen = checked.inspect_err(|error| progress.fail(error))?;
    let loaded = load(&configuration, blocks, devices, &progress, &file, &mut |placed| {
        let offsets = placed.iter().map(|placed| placed.pages_offset).collect();
        let (blocks, in_migration) = placed
            .into_iter()
            .map(|Placed { block, pages, in_migration, .. }| ((block, pages), in_migration))
            .unzip();
        let memory = Arc::new(LazyRam::new(blocks)?);
        let file = Arc::clone(&file);
        let source = Arc::new(Pages { file, offsets });
        progress.watch_faults(memory.shared_statistics());
        memory.set_source(Some(Arc::clone(&source) as Arc<dyn PageSource>));
        // Loading devices may touch memory.
        let handler = FaultHandler::start(Arc::clone(&memory), Arc::clone(&failed))?;
        lazy = Some((memory, handler, source, in_migration));
        Ok(())
    });
    let abandoned = lazy.as_ref().map(|(memory, ..)| Arc::clone(memory));
    let started = loaded.and_then(|()| {
        let (lazy, handler, source, in_migration) = lazy.ok_or(MigrationError::NoRam)?;
        // A device of another process may have reserved huge pages for what is plugged.
        lazy.refuse_present()?;
        let stop = Arc::new(AtomicBool::new(false));
        let prefetch = Prefetch { stop, thread: None, held: Some((frozen, in_migration)) };
        let (prefetch, progress) = (Mutex::new(prefetch), Arc::clone(&progress));
        let restore = LazyRestore { prefetch, _handler: handler, lazy, source, progress };
        restore.read_ahead(&mut restore.prefetch.lock())?;
        Ok(restore)
    });
    if let Err(error) = &started {
        if let Some(memory) = abandoned {
            // The guest must not run.
            memory.abandon();
        }
        progress.fail(error);
    }
    started
}

impl LazyRestore {
    /// The memory, for other processes that share it and take part by
    /// [`SharedFaults`](crate::lazy::SharedFaults).
    pub fn memory(&self) -> &Arc<LazyRam> {
        &self.lazy
    }

    /// The guest is about to run: from here on its block state may change while memory arrives, where its manager
    /// can be followed; it stays frozen where it cannot. What is plugged is zeros at once, and the file is not read for
    /// it; what is unplugged is not waited for any more. To be called before [`wait`](Self::wait), and then a device of
    /// this process may serve its guest (`MemController::serve_while_incoming`).
    ///
    /// # Errors
    ///
    /// When the freeze was lost before, or the manager's process is gone: the guest must not run.
    pub fn follow(&self) -> Result<(), MigrationError> {
        match &mut self.prefetch.lock().held {
            Some((frozen, _)) => ArrivalFollower::follow(frozen, &self.lazy),
            // All has arrived.
            None => Ok(()),
        }
    }

    /// Pages that have not arrived.
    pub fn outstanding(&self) -> u64 {
        self.lazy.outstanding()
    }

    /// How faults were resolved so far.
    pub fn statistics(&self) -> FaultStatistics {
        self.lazy.statistics()
    }

    /// Waits until all has arrived. The file is not needed any more then. Where there is no memory,
    /// that is waited for.
    ///
    /// # Errors
    ///
    /// Why the rest is not read in the background: the file cannot be read, or it was cancelled.
    /// The guest may run on in either case, and its faults are answered. Called again, it reads on
    /// unless it was cancelled.
    pub fn wait(&self) -> Result<(), MigrationError> {
        let mut prefetch = self.prefetch.lock();
        if prefetch.held.is_none() {
            return Ok(());
        }
        if prefetch.thread.is_none() && self.lazy.outstanding() != 0 {
            self.read_ahead(&mut prefetch)?;
        }
        let read = prefetch.thread.take().map_or(Ok(()), |thread| {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        });
        if self.lazy.outstanding() != 0
            && let Err(error) = read
        {
            self.progress.fail(&error);
            return Err(error);
        }
        self.lazy.finish()?;
        prefetch.held = None;
        self.progress.set_status(Status::Completed);
        Ok(())
    }

    fn read_ahead(&self, prefetch: &mut Prefetch) -> Result<(), MigrationError> {
        let (source, memory) = (Arc::clone(&self.source), Arc::clone(&self.lazy));
        let (stop, progress) = (Arc::clone(&prefetch.stop), Arc::clone(&self.progress));
        let thread = std::thread::Builder::new().name("prefetch".to_owned());
        let thread = thread.spawn(move || source.prefetch(&memory, &stop, &progress));
        prefetch.thread = Some(thread.map_err(MigrationError::io("start a thread"))?);
        Ok(())
    }
}

impl Drop for Prefetch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The pages of the file.
struct Pages {
    file: Arc<File>,
    /// Of each block the first page, bytes from the start of the file.
    offsets: Vec<u64>,
}

impl Pages {
    fn read(&self, block: usize, range: ByteRange, bytes: &mut Vec<u8>) -> io::Result<()> {
        bytes.resize(usize::try_from(range.len()).map_err(|_| io::ErrorKind::OutOfMemory)?, 0);
        self.file.read_exact_at(bytes, self.offsets[block] + range.start())
    }

    /// Reads pages and places them.
    fn bring(
        &self,
        lazy: &LazyRam,
        block: usize,
        range: ByteRange,
        bytes: &mut Vec<u8>,
    ) -> Result<(), MigrationError> {
        self.read(block, range, bytes).map_err(MigrationError::io("read pages"))?;
        lazy.place(block, range.start(), bytes)
    }

    /// Places all pages, one after the other.
    fn prefetch(
        &self,
        lazy: &LazyRam,
        stop: &AtomicBool,
        progress: &Progress,
    ) -> Result<(), MigrationError> {
        let mut bytes = Vec::new();
        let mut tries = 0;
        for block in 0..lazy.nr_blocks() {
            let page_size = lazy.block(block).page_size();
            let max = PIECE.max(page_size) / TARGET_PAGE_SIZE;
            let mut page = 0;
            while let Some(run) = lazy.next_outstanding(block, page, max) {
                if stop.load(Ordering::Relaxed) || progress.is_cancelled() {
                    return Err(MigrationError::Cancelled);
                }
                let range = bytes_of(run.clone());
                match self.bring(lazy, block, range, &mut bytes) {
                    Ok(()) => {
                        (page, tries) = (run.end, 0);
                        Counters::add(&progress.counters.normal, run.end - run.start);
                        Counters::add(&progress.counters.transferred, range.len());
                    }
                    Err(error) if error.is_no_memory() || tries < TRIES_MAX => {
                        if tries == 0 {
                            tracing::warn!(%error, "memory is not read on for now");
                        }
                        tries += 1;
                        std::thread::sleep(RETRY);
                    }
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(())
    }
}

impl PageSource for Pages {
    /// Reads and places the page at once, on the thread that answers faults.
    fn request(&self, lazy: &LazyRam, block: usize, range: ByteRange) -> io::Result<()> {
        self.bring(lazy, block, range, &mut Vec::new()).map_err(MigrationError::into_io)
    }

    fn is_retried(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page_bitmap::PageBitmap;
    use crate::test_support::{OnEvent, PAGE, Side, memfd};

    #[test]
    fn the_background_tries_a_file_again_that_cannot_be_read_for_now() {
        let side = Side::new(&[0]);
        let block = Arc::clone(side.blocks.get("vmem0").unwrap());
        let mut outstanding = PageBitmap::new(block.used_length() / PAGE);
        outstanding.set_range(0..4);
        let lazy = LazyRam::new(vec![(block, outstanding)]).unwrap();
        let file = Arc::new(memfd(PAGE));
        let pages = Pages { file: Arc::clone(&file), offsets: vec![0] };
        let (stop, progress) = (AtomicBool::new(false), Progress::new());
        let prefetch = || pages.prefetch(&lazy, &stop, &progress);
        // Only so often, where it stays so.
        assert!(prefetch().unwrap_err().to_string().contains("cannot read pages"));
        assert_eq!(lazy.outstanding(), 4);
        // Its pages come when it is logged that they cannot be read.
        let brings = OnEvent(move || file.write_all_at(&[7; 4 * PAGE as usize], 0).unwrap());
        tracing::subscriber::with_default(brings, prefetch).unwrap();
        lazy.finish().unwrap();
        assert_eq!([0, 3].map(|page| side.page(page)[0]), [7, 7]);
    }
}
