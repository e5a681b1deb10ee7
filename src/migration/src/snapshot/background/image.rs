//! The image while the guest runs: its pages are written in the background, and sooner where a vCPU or a discard waits.

use std::fs::File;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use parking_lot::{Condvar, Mutex};
use ram_discard::ByteRange;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;

use super::claims::{Claim, Saved, Wanted, Writer};
use crate::error::MigrationError;
use crate::page_bitmap::{bytes_of, pages_touched};
use crate::precopy::Guest;
use crate::progress::{Counters, Progress, Status};
use crate::ram::FrozenBlocks;
use crate::snapshot::file_io::PagesFile;
use crate::snapshot::save::{write_bitmap, write_run};
use crate::stream::TARGET_PAGE_SIZE;
use crate::sys::GatherWrite;
use crate::sys::page_faults::{Fault, PageFaults};

/// Stops the image when it is dropped.
struct StopsAtLast<'a>(&'a Image);

impl Drop for StopsAtLast<'_> {
    fn drop(&mut self) {
        self.0.stop();
    }
}

/// The pages of the image, and who waits for them.
pub(super) struct Image {
    faults: PageFaults,
    saved: Vec<Saved>,
    file: File,
    progress: Arc<Progress>,
    /// Wakes the thread that answers vCPUs.
    wake: OwnedFd,
    /// All is written, or it has failed.
    stopped: AtomicBool,
    /// Why it has failed first.
    failure: Mutex<Option<MigrationError>>,
    /// How many discards are saving pages: the rest is not written meanwhile.
    discarding: Mutex<usize>,
    /// One of them has ended.
    discarded: Condvar,
}

/// Keeps the background from writing until it is dropped. A file is written by one thread at a time, so that
/// a guest that unplugs would otherwise wait for as much again that it does not need.
struct BackgroundHeld<'a>(&'a Image);

impl Drop for BackgroundHeld<'_> {
    fn drop(&mut self) {
        *self.0.discarding.lock() -= 1;
        self.0.discarded.notify_all();
    }
}

impl Image {
    /// An image of which the pages of `saved` are to be written to `file`, each before it is changed.
    pub(super) fn new(
        faults: PageFaults,
        saved: Vec<Saved>,
        file: File,
        progress: Arc<Progress>,
    ) -> Result<Self, MigrationError> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|errno| MigrationError::io("make an eventfd")(errno.into()))?;
        let (stopped, failure) = (AtomicBool::new(false), Mutex::default());
        let (discarding, discarded) = (Mutex::default(), Condvar::new());
        Ok(Self { faults, saved, file, progress, wake, stopped, failure, discarding, discarded })
    }

    /// The blocks, as numbers for [`save_before_discard`](Self::save_before_discard).
    pub(super) fn blocks(&self) -> &[Saved] {
        &self.saved
    }

    /// Lets the guest run, which `runs` tells from then on, and writes all pages. Block state is followed (or
    /// frozen, where it cannot be) until they are written. No vCPU waits for a page when this returns.
    pub(super) fn write_while_running(
        &self,
        guest: &dyn Guest,
        block_state: FrozenBlocks,
        runs: &mut bool,
    ) -> Result<(), MigrationError> {
        std::thread::scope(|scope| {
            let answering = scope.spawn(|| self.answer());
            // The scope waits for that thread, also when the VMM panics.
            let _stops = StopsAtLast(self);
            match guest.run() {
                Ok(()) => {
                    *runs = true;
                    self.progress.guest_runs_elsewhere();
                    self.progress.set_status(Status::Active);
                    self.write_all();
                }
                Err(reason) => {
                    self.fail(MigrationError::Vmm { what: "let the guest continue", reason });
                }
            }
            // Asked when all is written: memory that goes without a word of it may have been
            // read afterwards.
            if !self.is_stopped()
                && let Err(error) = block_state.check()
            {
                self.fail(error);
            }
            let failed = self.is_stopped();
            if failed {
                // The thread that answers vCPUs may have ended. The device may wait for one of them
                // with its manager locked, and the next step waits for that.
                let _ = self.end_protection();
            }
            drop(block_state);
            self.stop();
            answering.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            if failed { Err(self.why_it_failed()) } else { self.end_protection() }
        })?;
        for saved in &self.saved {
            let state = saved.state.lock();
            write_bitmap(&state.written, saved.header, &self.file)
                .map_err(MigrationError::io("write a bitmap"))?;
        }
        Ok(())
    }

    /// The image is of no use, for this reason unless there was one before.
    pub(super) fn fail(&self, error: MigrationError) {
        self.failure.lock().get_or_insert(error);
        self.stop();
    }

    /// Writes what is outstanding of `range` (bytes of the block, about to be discarded), and waits until
    /// no other thread reads it: what is read after it was discarded would be allocated again. Its
    /// protection is lifted, since that outlives its memory. When that lasts until the `deadline`, the
    /// image fails; a guest is not held for it.
    pub(super) fn save_before_discard(
        &self,
        saved: &Saved,
        range: ByteRange,
        deadline: Option<Instant>,
    ) {
        let pages = saved.host_pages(pages_touched(range));
        let mut gathered = GatherWrite::new();
        let mut held = None;
        while !self.is_stopped()
            && let Some(claim) = saved.claim(self, Writer::Discards, pages.clone())
        {
            // For nothing outstanding the background is not held: it would not get on.
            held.get_or_insert_with(|| self.hold_background());
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                self.fail(too_slow(saved));
                break;
            }
            let nr_pages = claim.runs.iter().map(|run| run.end - run.start).sum();
            Counters::add(&self.progress.counters.saved_before_discard, nr_pages);
            if let Err(error) = self.save(claim, &mut gathered) {
                self.fail(error);
            }
        }
        // After a failure, too, none of it is to be read again.
        saved.state.lock().todo.clear_range(pages.clone());
        if !saved.wait_unclaimed(&pages, deadline) {
            return self.fail(too_slow(saved));
        }
        if !self.is_stopped()
            && let Err(error) = self.unprotect(saved, pages)
        {
            self.fail(error);
        }
    }

    fn hold_background(&self) -> BackgroundHeld<'_> {
        *self.discarding.lock() += 1;
        BackgroundHeld(self)
    }

    /// Waits until no discard saves pages.
    fn wait_for_discards(&self) {
        let mut discarding = self.discarding.lock();
        self.discarded.wait_while(&mut discarding, |discarding| *discarding != 0);
    }

    fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }

    pub(super) fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
        // Any number but 0 wakes.
        let _ = rustix::io::write(&self.wake, &1u64.to_le_bytes());
    }

    fn why_it_failed(&self) -> MigrationError {
        self.failure.lock().take().unwrap_or_else(|| MigrationError::Io {
            what: "write pages",
            source: std::io::Error::other("a thread that wrote them has ended"),
        })
    }

    /// Ends the protection of all blocks, also for vCPUs that wait.
    fn end_protection(&self) -> Result<(), MigrationError> {
        let mut result = Ok(());
        for saved in &self.saved {
            let Some(used) = saved.block.used() else { continue };
            let ended = self.faults.unregister(saved.mapping, used);
            let ended = ended.map_err(MigrationError::memory(saved.block.id(), "end protection"));
            result = result.and(ended);
        }
        result
    }

    /// Writes all pages, one after the other, and waits until those are written that other threads
    /// write.
    fn write_all(&self) {
        let mut gathered = GatherWrite::new();
        for saved in &self.saved {
            let nr_pages = saved.block.used_length() / TARGET_PAGE_SIZE;
            let mut from = 0;
            loop {
                self.wait_for_discards();
                if self.progress.is_cancelled() {
                    self.fail(MigrationError::Cancelled);
                }
                if self.is_stopped() {
                    return;
                }
                let Some(claim) = saved.claim(self, Writer::Background, from..nr_pages) else {
                    break;
                };
                from = claim.pages.end;
                if let Err(error) = self.save(claim, &mut gathered) {
                    return self.fail(error);
                }
            }
        }
        for saved in &self.saved {
            let mut state = saved.state.lock();
            while state.claimed.iter().any(Option::is_some) {
                saved.settled.wait(&mut state);
            }
        }
    }

    /// Writes pages that no other thread writes, and lifts their protection.
    fn save(&self, mut claim: Claim<'_>, gathered: &mut GatherWrite) -> Result<(), MigrationError> {
        let saved = claim.saved;
        for run in &claim.runs {
            let (header, progress) = (saved.header, &self.progress);
            let file = PagesFile::cached(&self.file);
            let kept = write_run(&saved.block, run.clone(), header, &file, gathered, progress)?;
            let mut state = saved.state.lock();
            for kept in kept {
                state.written.set_range(kept);
            }
        }
        claim.is_written = true;
        self.unprotect(saved, claim.pages.clone())
    }

    /// Lets whole host pages be written again, and vCPUs continue that wait for that.
    fn unprotect(&self, saved: &Saved, pages: Range<u64>) -> Result<(), MigrationError> {
        if pages.is_empty() {
            return Ok(());
        }
        let lifted = self.faults.protect(saved.mapping, bytes_of(pages), false);
        lifted.map_err(MigrationError::memory(saved.block.id(), "lift the protection"))
    }

    /// Answers the faults of vCPUs, until told to stop.
    fn answer(&self) {
        let mut found = Vec::new();
        let mut gathered = GatherWrite::new();
        while !self.is_stopped() {
            if let Err(error) = self.answer_some(&mut found, &mut gathered) {
                self.fail(error);
            }
        }
    }

    fn answer_some(
        &self,
        found: &mut Vec<Fault>,
        gathered: &mut GatherWrite,
    ) -> Result<(), MigrationError> {
        let mut fds =
            [PollFd::new(&self.faults, PollFlags::IN), PollFd::new(&self.wake, PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(MigrationError::io("wait for faults")(errno.into())),
        }
        self.faults.read(found).map_err(MigrationError::io("read faults"))?;
        found.drain(..).try_for_each(|fault| self.answer_fault(&fault, gathered))
    }

    /// Saves the page that a vCPU wants to write, before everything else.
    fn answer_fault(
        &self,
        fault: &Fault,
        gathered: &mut GatherWrite,
    ) -> Result<(), MigrationError> {
        let Some(saved) = self.saved.iter().find(|saved| saved.mapping == fault.mapping) else {
            return Ok(());
        };
        let page = fault.offset / TARGET_PAGE_SIZE;
        let pages = saved.host_pages(page..page + 1);
        match saved.claim_wanted(self, pages.clone()) {
            Wanted::ClaimedBefore => Ok(()),
            Wanted::Pages(claim) => {
                Counters::add(&self.progress.counters.write_faults, 1);
                self.save(claim, gathered)
            }
            Wanted::Nothing => {
                Counters::add(&self.progress.counters.write_faults, 1);
                self.unprotect(saved, pages)
            }
        }
    }
}

fn too_slow(saved: &Saved) -> MigrationError {
    MigrationError::DiscardedTooSoon { block: saved.block.id().to_owned() }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;
    use std::time::Duration;

    use super::*;
    use crate::page_bitmap::PageBitmap;
    use crate::ram::BlockOptions;
    use crate::stream::MappedRamHeader;
    use crate::sys::page_faults::FaultKind;
    use crate::test_support::{PAGE, fill, memfd, migration_block};

    /// An image of one block of 64 pages, all of them outstanding, and its file.
    fn image() -> (Image, File, ByteRange) {
        let memory = memfd(64 * PAGE);
        fill(&memory, 0..64, 7);
        let options = BlockOptions::migratable();
        let block = Arc::new(migration_block("ram", &memory, 64 * PAGE, options));
        let all = block.used().unwrap();
        let mut faults = PageFaults::open(FaultKind::WriteProtected).unwrap();
        let mapping = faults.add(Arc::clone(block.mapping()));
        faults.register(mapping, all).unwrap();
        let mut todo = PageBitmap::new(64);
        todo.set_range(0..64);
        let (page_size, bitmap_offset, pages_offset) = (TARGET_PAGE_SIZE, 0, PAGE);
        let header = MappedRamHeader { page_size, bitmap_offset, pages_offset };
        let saved = vec![Saved::new(block, header, mapping, todo, PageBitmap::new(64))];
        let file = memfd(0);
        let own = file.try_clone().unwrap();
        let image = Image::new(faults, saved, own, Arc::new(Progress::new())).unwrap();
        (image, file, all)
    }

    fn page_of(file: &File, page: u64) -> [u8; PAGE as usize] {
        let mut bytes = [0; PAGE as usize];
        file.read_exact_at(&mut bytes, (1 + page) * PAGE).unwrap();
        bytes
    }

    #[test]
    fn the_rest_waits_while_a_discard_saves_pages() {
        let (image, file, all) = image();
        let half = ByteRange::new(0, all.len() / 2).unwrap();
        let held = image.hold_background();
        std::thread::scope(|scope| {
            let background = scope.spawn(|| image.write_all());
            std::thread::sleep(Duration::from_millis(30));
            image.save_before_discard(&image.blocks()[0], half, None);
            assert!(!background.is_finished());
            let written = image.blocks()[0].state.lock().written.count();
            assert_eq!(written, 32, "what is discarded, and nothing else");
            drop(held);
        });
        assert!(!image.is_stopped());
        assert_eq!(image.blocks()[0].state.lock().written.count(), 64);
        assert_eq!([0, 31, 32, 63].map(|page| page_of(&file, page)), [[7; PAGE as usize]; 4]);
    }

    #[test]
    fn a_discard_waits_for_pages_that_another_thread_writes() {
        let (image, file, all) = image();
        let saved = &image.blocks()[0];
        let claim = saved.claim(&image, Writer::Background, 0..64).unwrap();
        std::thread::scope(|scope| {
            let discard = scope.spawn(|| image.save_before_discard(saved, all, None));
            std::thread::sleep(Duration::from_millis(30));
            assert!(!discard.is_finished(), "the pages are not in the image");
            image.save(claim, &mut GatherWrite::new()).unwrap();
        });
        assert!(!image.is_stopped());
        assert_eq!(page_of(&file, 63), [7; PAGE as usize]);
    }
}
