//! A snapshot of a running guest, as it was at one instant.
//!
//! The guest is stopped for as long as it takes to save its devices and to protect the pages that
//! exist. Then it continues; a vCPU that writes a protected page waits until that page is in the file.
//! Holes and discarded ranges are zeros at that instant by definition, so they are neither
//! allocated nor saved, and writing them costs nothing.

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use ram_discard::{ByteRange, FreezeFor};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;

use super::file_io::PagesFile;
use super::save::{ended, find_pages, put_end, put_ram_start, write_bitmap, write_run};
use super::sink::FileSink;
use super::{PIECE, with_mapped_ram};
use crate::devices::{DevicePhase, DeviceSection, Devices};
use crate::error::MigrationError;
use crate::framing::Framing;
use crate::page_bitmap::{GAP_MIN, PageBitmap, bytes_of};
use crate::precopy::Guest;
use crate::progress::{Counters, Progress, Status};
use crate::ram::{FrozenBlocks, ListOptions, MigrationBlock, RamBlocks};
use crate::stream::{Configuration, MappedRamHeader, TARGET_PAGE_SIZE};
use crate::sys::GatherWrite;
use crate::sys::page_faults::{Fault, FaultKind, PageFaults};

/// What is written between two looks at which vCPUs wait, bytes.
const STEP: u64 = 256 << 10;

/// A running guest that is to be saved as it is now.
pub struct RunningGuest<'a> {
    /// Machine type and capabilities.
    pub configuration: Configuration,
    /// Its RAM, mapped where the guest uses it.
    pub blocks: &'a RamBlocks,
    /// Everything else.
    pub devices: &'a mut dyn Devices,
    /// The guest, which is stopped for a moment.
    pub guest: &'a dyn Guest,
    /// What can be seen of it, and how it is cancelled.
    pub progress: Arc<Progress>,
}

/// A block while it is saved.
struct Saved {
    block: Arc<MigrationBlock>,
    header: MappedRamHeader,
    /// Its number among the mappings.
    mapping: usize,
    state: Mutex<State>,
}

struct State {
    /// Pages that are not in the file yet.
    todo: PageBitmap,
    /// Pages that are in it, and not zero.
    written: PageBitmap,
    /// Pages on their way into the file.
    in_flight: Range<u64>,
}

/// Writes `guest` to `file`, which is empty, while the guest runs. Returns when all is written.
///
/// # Errors
///
/// Why it could not be written; the file is of no use then. The guest runs on in any case. What
/// kernel or memory lack is found out before anything changes.
pub fn save_in_background(guest: RunningGuest<'_>, file: &File) -> Result<(), MigrationError> {
    let progress = Arc::clone(&guest.progress);
    progress.set_status(Status::Setup);
    let result = save_protected(guest, file);
    ended(&progress, &result);
    result
}

fn save_protected(guest: RunningGuest<'_>, file: &File) -> Result<(), MigrationError> {
    let RunningGuest { configuration, blocks, devices, guest, progress } = guest;
    // All that can be refused comes first.
    let mut faults = PageFaults::open(FaultKind::WriteProtected)
        .map_err(MigrationError::io("use userfaultfd"))?;
    let options = ListOptions::of(&configuration);
    for block in blocks.migratable()?.into_iter().filter(|block| !options.leaves_out(block)) {
        let mapping = faults.add(Arc::clone(block.mapping()));
        if let Some(used) = block.used() {
            let registered = faults.register(mapping, used);
            registered.map_err(MigrationError::memory(block.id(), "protect its pages"))?;
        }
    }
    let mut out = FileSink::of_empty(file)?;
    let frozen = FrozenBlocks::new(blocks.migratable()?, FreezeFor::Source)?;

    progress.guest_stopped();
    guest.stop().map_err(|reason| MigrationError::Vmm { what: "stop the guest", reason })?;
    let mut runs = false;
    let stopped =
        protect_all(blocks, &frozen, devices, &faults, &configuration, &mut out, &progress);
    let result = stopped.and_then(|(saved, framing, rest)| {
        let serving = Serving::new(&faults, &saved, file, &progress)?;
        serving.while_running(guest, &mut runs)?;
        // Without its end the file is of no use.
        frozen.thaw()?;
        put_end(&mut out, framing, rest)
    });
    result.map_err(|error| {
        // The protection ends with the descriptor: no vCPU waits for it any longer.
        drop(faults);
        if runs {
            return error;
        }
        match guest.run() {
            Ok(()) => error,
            Err(reason) => {
                tracing::error!(%error, %reason, "no snapshot, and the guest cannot continue");
                MigrationError::Vmm { what: "let the guest continue", reason }
            }
        }
    })
}

/// What is done while the guest is stopped: devices are saved, and the pages that exist protected.
fn protect_all(
    blocks: &RamBlocks,
    frozen: &FrozenBlocks,
    devices: &mut dyn Devices,
    faults: &PageFaults,
    configuration: &Configuration,
    out: &mut FileSink<'_>,
    progress: &Progress,
) -> Result<(Vec<Saved>, Framing, Vec<DeviceSection>), MigrationError> {
    let mut framing = Framing::begin(out, &with_mapped_ram(configuration))?;
    for section in devices.save(DevicePhase::Early)? {
        framing.full(out, section)?;
    }
    let rest = devices.save(DevicePhase::Late)?;
    let mut saved = Vec::new();
    let placed = put_ram_start(out, blocks, ListOptions::of(configuration))?;
    for (mapping, (block, header)) in placed.into_iter().enumerate() {
        let mut todo = find_pages(&block, frozen, progress)?;
        let mut written = PageBitmap::new(todo.nr_pages());
        if block.options().written_elsewhere {
            // Others write it through mappings that are not protected here: now or never.
            let mut gathered = GatherWrite::new();
            let mut from = 0;
            while let Some(run) = todo.next_run(from, todo.nr_pages(), PIECE / TARGET_PAGE_SIZE) {
                if progress.is_cancelled() {
                    return Err(MigrationError::Cancelled);
                }
                from = run.end;
                let file = PagesFile::cached(out.file);
                for run in write_run(&block, run, header, &file, &mut gathered, progress)? {
                    written.set_range(run);
                }
            }
            todo.clear_all();
        }
        for range in todo.host_ranges(block.page_size(), GAP_MIN) {
            let protected = faults.protect(mapping, range, true);
            protected.map_err(MigrationError::memory(block.id(), "protect its pages"))?;
        }
        let state = Mutex::new(State { todo, written, in_flight: 0..0 });
        saved.push(Saved { block, header, mapping, state });
    }
    Ok((saved, framing, rest))
}

/// The two threads that write pages: one in the background, one for the vCPUs that wait.
struct Serving<'a> {
    faults: &'a PageFaults,
    saved: &'a [Saved],
    file: &'a File,
    progress: &'a Progress,
    stop: std::os::fd::OwnedFd,
    stopped: AtomicBool,
}

impl<'a> Serving<'a> {
    fn new(
        faults: &'a PageFaults,
        saved: &'a [Saved],
        file: &'a File,
        progress: &'a Progress,
    ) -> Result<Self, MigrationError> {
        let stop = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|errno| MigrationError::io("make an eventfd")(errno.into()))?;
        Ok(Self { faults, saved, file, progress, stop, stopped: AtomicBool::new(false) })
    }

    /// Lets the guest run, which `runs` tells from then on, and writes all pages.
    fn while_running(&self, guest: &dyn Guest, runs: &mut bool) -> Result<(), MigrationError> {
        let written = std::thread::scope(|scope| {
            let answering = scope.spawn(|| self.answer());
            let run = guest.run();
            let result = match run {
                Ok(()) => {
                    *runs = true;
                    self.progress.guest_runs_elsewhere();
                    self.progress.set_status(Status::Active);
                    self.write_all()
                }
                Err(reason) => Err(MigrationError::Vmm { what: "let the guest continue", reason }),
            };
            self.end();
            let answered = answering.join().unwrap_or_else(|panic| {
                std::panic::resume_unwind(panic);
            });
            answered.and(result)
        });
        written?;
        for saved in self.saved {
            let state = saved.state.lock();
            write_bitmap(&state.written, saved.header, self.file)
                .map_err(MigrationError::io("write a bitmap"))?;
            if let Some(used) = saved.block.used() {
                let ended = self.faults.unregister(saved.mapping, used);
                ended.map_err(MigrationError::memory(saved.block.id(), "end protection"))?;
            }
        }
        Ok(())
    }

    fn end(&self) {
        self.stopped.store(true, Ordering::Release);
        // Any number but 0 wakes.
        let _ = rustix::io::write(&self.stop, &1u64.to_le_bytes());
    }

    /// Writes all pages, one after the other, and lets them be written again.
    fn write_all(&self) -> Result<(), MigrationError> {
        let mut gathered = GatherWrite::new();
        for saved in self.saved {
            let step = (STEP / TARGET_PAGE_SIZE).max(saved.block.page_size() / TARGET_PAGE_SIZE);
            let mut from = 0;
            loop {
                if self.progress.is_cancelled() {
                    return Err(MigrationError::Cancelled);
                }
                if self.stopped.load(Ordering::Acquire) {
                    // The other thread has failed, and says why.
                    return Ok(());
                }
                let run = {
                    let mut state = saved.state.lock();
                    let Some(run) = state.todo.next_run(from, state.todo.nr_pages(), step) else {
                        break;
                    };
                    state.todo.clear_range(run.clone());
                    state.in_flight = run.clone();
                    run
                };
                from = run.end;
                self.save(saved, run, &mut gathered)?;
                saved.state.lock().in_flight = 0..0;
            }
        }
        Ok(())
    }

    /// Writes pages that the other thread does not write, and lifts their protection.
    fn save(
        &self,
        saved: &Saved,
        run: Range<u64>,
        gathered: &mut GatherWrite,
    ) -> Result<(), MigrationError> {
        let (header, progress) = (saved.header, self.progress);
        let file = PagesFile::cached(self.file);
        let kept = write_run(&saved.block, run.clone(), header, &file, gathered, progress)?;
        let mut state = saved.state.lock();
        for kept in kept {
            state.written.set_range(kept);
        }
        drop(state);
        self.unprotect(saved, run)
    }

    fn unprotect(&self, saved: &Saved, run: Range<u64>) -> Result<(), MigrationError> {
        let page_size = saved.block.page_size();
        let range = bytes_of(run);
        let start = range.start() / page_size * page_size;
        let end = range.end().next_multiple_of(page_size);
        let Some(range) = ByteRange::from_bounds(start, end) else { return Ok(()) };
        let lifted = self.faults.protect(saved.mapping, range, false);
        lifted.map_err(MigrationError::memory(saved.block.id(), "lift the protection"))
    }

    /// Answers the faults of vCPUs, until told to stop.
    fn answer(&self) -> Result<(), MigrationError> {
        let result = self.serve();
        if result.is_err() {
            self.stopped.store(true, Ordering::Release);
        }
        result
    }

    fn serve(&self) -> Result<(), MigrationError> {
        let mut found = Vec::new();
        let mut gathered = GatherWrite::new();
        while !self.stopped.load(Ordering::Acquire) {
            let mut fds =
                [PollFd::new(self.faults, PollFlags::IN), PollFd::new(&self.stop, PollFlags::IN)];
            match poll(&mut fds, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(MigrationError::io("wait for faults")(errno.into())),
            }
            self.faults.read(&mut found).map_err(MigrationError::io("read faults"))?;
            for fault in found.drain(..) {
                self.answer_fault(&fault, &mut gathered)?;
            }
        }
        Ok(())
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
        let per_page = (saved.block.page_size() / TARGET_PAGE_SIZE).max(1);
        let first = fault.offset / TARGET_PAGE_SIZE / per_page * per_page;
        let pages = first..first + per_page;
        let runs: Vec<Range<u64>> = {
            let mut state = saved.state.lock();
            let in_flight = &state.in_flight;
            if in_flight.start < pages.end && pages.start < in_flight.end {
                // The thread that writes it to the file lets the vCPU continue.
                return Ok(());
            }
            let runs: Vec<_> = state.todo.runs(pages.clone()).collect();
            for run in &runs {
                state.todo.clear_range(run.clone());
            }
            runs
        };
        Counters::add(&self.progress.counters.write_faults, 1);
        for run in runs {
            self.save(saved, run, gathered)?;
        }
        self.unprotect(saved, pages)
    }
}
