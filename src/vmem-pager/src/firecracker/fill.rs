//! Pages are placed in the VMM: by faults, and in the background.
//!
//! Pages are placed by several threads at once, and never while messages are read: the VMM discards as soon as its
//! removal was read, and a copy that was under way would land after that, with what the file has. It could not be
//! undone from here. So a page is looked up, copied and marked in one shared turn, and messages are read in a turn
//! alone (`Filling::placing`); files are read outside of both.

use std::collections::{HashSet, VecDeque};
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use migration::lazy::vmm_faults::{Event, Filled, Stop, VmmFaults};
use parking_lot::{Mutex, MutexGuard, RwLock};
use ram_discard::memory::HostMapping;
use rustix::io::Errno;

use super::figures::{Figures, Source};
use super::guest::{Guest, MESSAGES, State};
use super::memory_files::MemoryFiles;
use super::message::Region;
use super::order::{Order, Piece};
use crate::error::PagerError;
use crate::working_set::WorkingSet;

/// Bytes of a page by which working sets count.
pub const TARGET_PAGE: u64 = 4096;
/// Reads of messages before faults are served: a VMM that discards without end does not keep vCPUs waiting.
const READS_AT_ONCE: usize = 8;
/// Bytes that an eager restore places at once.
pub const CHUNK: u64 = 128 << 10;
/// Bytes that the background places at once beside a guest that runs: a fault waits for no more.
pub const SMALL_CHUNK: u64 = 32 << 10;
/// Holes of at least so many bytes are left to the kernel, in which a transparent huge page fits.
const LARGE_HOLE: u64 = 2 << 20;
/// As many of them, at most: each is a mapping more in the VMM, which has some ten thousand.
const LARGE_HOLES: usize = 1024;

/// What is asked of a userfaultfd.
pub trait Uffd: Send + Sync {
    /// As [`VmmFaults::read`].
    ///
    /// # Errors
    ///
    /// As there.
    fn read(&self, to: &HostMapping, offset: u64, room: usize) -> io::Result<usize>;
    /// As [`VmmFaults::copy`].
    ///
    /// # Errors
    ///
    /// As there.
    fn copy(&self, address: u64, bytes: &[u8]) -> io::Result<Filled>;
    /// As [`VmmFaults::zero`].
    ///
    /// # Errors
    ///
    /// As there.
    fn zero(&self, address: u64, len: u64) -> io::Result<Filled>;
    /// As [`VmmFaults::wake`].
    ///
    /// # Errors
    ///
    /// As there.
    fn wake(&self, address: u64, len: u64) -> io::Result<()>;
    /// As [`VmmFaults::unregister`].
    ///
    /// # Errors
    ///
    /// As there.
    fn unregister(&self, address: u64, len: u64) -> io::Result<()>;
}

impl<U> AsFd for Filling<U>
where
    U: AsFd,
{
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.uffd.as_fd()
    }
}

impl Uffd for VmmFaults {
    fn read(&self, to: &HostMapping, offset: u64, room: usize) -> io::Result<usize> {
        self.read(to, offset, room)
    }

    fn copy(&self, address: u64, bytes: &[u8]) -> io::Result<Filled> {
        self.copy(address, bytes)
    }

    fn zero(&self, address: u64, len: u64) -> io::Result<Filled> {
        self.zero(address, len)
    }

    fn wake(&self, address: u64, len: u64) -> io::Result<()> {
        self.wake(address, len)
    }

    fn unregister(&self, address: u64, len: u64) -> io::Result<()> {
        self.unregister(address, len)
    }
}

/// Why a page was not placed.
#[derive(Debug)]
pub enum Unplaced {
    /// The VMM has ended.
    Ended,
    /// It cannot be had, or not be placed.
    Failed(PagerError),
}

impl From<PagerError> for Unplaced {
    fn from(error: PagerError) -> Self {
        Self::Failed(error)
    }
}

/// Pages that vCPUs wait for, in the order in which they were asked for.
#[derive(Debug, Default)]
pub struct Waiting {
    queue: VecDeque<(usize, u64, Instant)>,
    /// The same, so that a page that many vCPUs wait for is in it once.
    known: HashSet<(usize, u64)>,
}

impl Waiting {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    fn push(&mut self, region: usize, page: u64) {
        if self.known.insert((region, page)) {
            self.queue.push_back((region, page, Instant::now()));
        }
    }
}

/// The guest and what is needed to fill it.
pub struct Filling<U> {
    /// The userfaultfd.
    pub uffd: U,
    files: MemoryFiles,
    /// Shared by those who place pages, from the look at their state to its change; alone who reads messages. Taken
    /// before the lock of the guest.
    placing: RwLock<()>,
    /// Held for no system call but the reading of messages, and unregistering.
    guest: Mutex<Guest>,
    figures: Arc<Figures>,
    /// Whether vCPUs wait, to whom the background gives way.
    urgent: AtomicBool,
    touched: Option<Mutex<WorkingSet>>,
    unregistered: Mutex<Vec<bool>>,
}

/// What came of placing a run of pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Run {
    Done,
    /// All before this page was.
    Busy(u64),
}

impl<U: Uffd> Filling<U> {
    /// Fills a guest; `touched` when the order of faults is to be kept.
    pub fn new(
        uffd: U,
        files: MemoryFiles,
        guest: Guest,
        figures: Arc<Figures>,
        touched: Option<WorkingSet>,
    ) -> Self {
        let unregistered = Mutex::new(vec![false; guest.regions().count()]);
        let (guest, touched) = (Mutex::new(guest), touched.map(Mutex::new));
        let (placing, urgent) = (RwLock::new(()), AtomicBool::new(false));
        Self { uffd, files, placing, guest, figures, urgent, touched, unregistered }
    }

    /// The files.
    pub fn files(&self) -> &MemoryFiles {
        &self.files
    }

    /// The guest.
    pub fn guest(&self) -> MutexGuard<'_, Guest> {
        self.guest.lock()
    }

    /// What was touched, in its order.
    pub fn touched(&self) -> Option<WorkingSet> {
        self.touched.as_ref().map(|touched| touched.lock().clone())
    }

    /// Whether vCPUs wait.
    pub fn is_urgent(&self) -> bool {
        self.urgent.load(Ordering::Relaxed)
    }

    /// Leaves large holes to the kernel, and has vCPUs fault again whose faults a process before has read.
    ///
    /// # Errors
    ///
    /// See [`Unplaced`].
    pub fn begin(&self) -> Result<(), Unplaced> {
        let mut guest = self.guest();
        let mut large = Vec::new();
        for (index, region) in guest.regions().enumerate() {
            self.uffd.wake(region.base, region.size).or_else(ended)?;
            for hole in guest.holes(index, &self.files) {
                // Whole transparent huge pages, and whole pages of the region.
                let start = (region.base + hole.start * region.page_size)
                    .next_multiple_of(LARGE_HOLE.max(region.page_size));
                let end = region.base + hole.end * region.page_size;
                let end = end - end % LARGE_HOLE.max(region.page_size);
                if start < end {
                    large.push((end - start, start));
                }
            }
        }
        large.sort_unstable_by(|a, b| b.cmp(a));
        for (len, start) in large.into_iter().take(LARGE_HOLES) {
            // Served like any other where the VMM has no room for another mapping.
            self.unregister(start, len)?;
        }
        self.unregister_complete(&mut guest)
    }

    /// Leaves a range to the kernel; whether it is.
    fn unregister(&self, address: u64, len: u64) -> Result<bool, Unplaced> {
        match self.uffd.unregister(address, len) {
            Ok(()) => Ok(true),
            Err(error) => match Errno::from_io_error(&error) {
                // No room in the VMM, or it has ended, which is noticed elsewhere.
                Some(Errno::NOMEM) => Ok(false),
                // Nothing is mapped there.
                Some(Errno::INVAL) => Ok(true),
                _ => ended(error).map(|()| true),
            },
        }
    }

    /// Reads what the VMM tells, as much as there is. Removals are done, and faults added to `waiting`.
    ///
    /// # Errors
    ///
    /// See [`Unplaced`].
    pub fn take_events(&self, waiting: &mut Waiting) -> Result<(), Unplaced> {
        let alone = self.placing.write();
        let mut guest = self.guest();
        for _ in 0..READS_AT_ONCE {
            let (map, at) = guest.messages();
            let count = self.uffd.read(map, at, MESSAGES).map_err(|error| {
                Unplaced::Failed(PagerError::Protocol(format!(
                    "the userfaultfd of the VMM cannot be read: {error}"
                )))
            })?;
            let (events, discarded) = guest.take_messages();
            self.figures.discarded.inc_by(discarded);
            for event in events {
                match event {
                    Event::Missing { address } => {
                        self.figures.faults.inc();
                        let place = guest.find(address).ok_or_else(|| {
                            PagerError::Protocol(format!(
                                "a fault at {address:#x}, which is in no region of the VMM's message"
                            ))
                        })?;
                        waiting.push(place.0, place.1);
                    }
                    Event::Other(what) => {
                        return Err(Unplaced::Failed(PagerError::Protocol(format!(
                            "the VMM asks for {what} on its userfaultfd, where only missing pages were expected"
                        ))));
                    }
                    Event::Remove { .. } => unreachable!("removals are done by the guest"),
                }
            }
            if count < MESSAGES {
                break;
            }
        }
        drop(alone);
        self.urgent.store(!waiting.is_empty(), Ordering::Relaxed);
        self.unregister_complete(&mut guest)
    }

    /// Serves those who wait. Whether nothing can be placed now: messages are to be read first.
    ///
    /// # Errors
    ///
    /// See [`Unplaced`].
    pub fn serve(&self, waiting: &mut Waiting, buffer: &mut Vec<u8>) -> Result<bool, Unplaced> {
        while let Some(&(region, page, since)) = waiting.queue.front() {
            if self.serve_page(region, page, buffer)? == Run::Done {
                waiting.known.remove(&(region, page));
                waiting.queue.pop_front();
                self.figures.served(since.elapsed());
            } else {
                self.figures.busy.inc();
                return Ok(true);
            }
        }
        self.urgent.store(false, Ordering::Relaxed);
        Ok(false)
    }

    fn serve_page(&self, index: usize, page: u64, buffer: &mut Vec<u8>) -> Result<Run, Unplaced> {
        let (region, state) = {
            let guest = self.guest();
            (guest.region(index), guest.state(index, page))
        };
        buffer.resize(region.page_size as usize, 0);
        if state == State::Missing {
            let offset = region.offset + page * region.page_size;
            self.files.read(offset, buffer)?;
        }
        let placing = self.placing.read();
        // What was removed meanwhile is no longer the file's.
        if state == State::Missing && self.guest().state(index, page) == State::Missing {
            if let Some(touched) = &self.touched {
                let first = (region.offset + page * region.page_size) / TARGET_PAGE;
                touched.lock().push(0, first..first + region.page_size / TARGET_PAGE);
            }
            let run = self.place(index, region, page..page + 1, buffer, Source::Fault)?;
            drop(placing);
            self.unregister_complete(&mut self.guest())?;
            return Ok(run);
        }
        // What had been there and is missed was discarded, and is zeros.
        let address = region.base + page * region.page_size;
        let filled = match region.page_size {
            TARGET_PAGE => self.uffd.zero(address, region.page_size),
            // Not possible on hugetlb.
            _ => {
                buffer.fill(0);
                self.uffd.copy(address, buffer)
            }
        };
        let filled = filled.or_else(|error| not_registered(error, region.page_size))?;
        match filled.stop {
            Stop::Busy => return Ok(Run::Busy(page)),
            Stop::Exists => self.wake(address, region.page_size)?,
            Stop::Complete => {
                self.guest().mark(index, page..page + 1, State::Zeros);
                self.figures.placed(Source::Zeros, region.page_size);
            }
        }
        Ok(Run::Done)
    }

    /// Copies what was read of missing pages, in a turn that the caller has.
    fn place(
        &self,
        index: usize,
        region: Region,
        pages: Range<u64>,
        bytes: &[u8],
        source: Source,
    ) -> Result<Run, Unplaced> {
        let Region { base, page_size, .. } = region;
        let mut page = pages.start;
        while page < pages.end {
            let address = base + page * page_size;
            let rest = &bytes[((page - pages.start) * page_size) as usize..];
            let rest = &rest[..((pages.end - page) * page_size) as usize];
            let filled = self.uffd.copy(address, rest);
            let filled = filled.or_else(|error| not_registered(error, rest.len() as u64))?;
            let done = page + filled.bytes / page_size;
            // One that is there was placed by another thread, or by a pager before this one.
            let there = u64::from(filled.stop == Stop::Exists);
            self.guest().mark(index, page..done + there, State::Present);
            self.figures.placed(source, (done - page) * page_size);
            page = done + there;
            match filled.stop {
                Stop::Complete => {}
                Stop::Busy => return Ok(Run::Busy(page)),
                Stop::Exists => self.wake(base + done * page_size, page_size)?,
            }
        }
        Ok(Run::Done)
    }

    fn wake(&self, address: u64, len: u64) -> Result<(), Unplaced> {
        self.uffd.wake(address, len).or_else(ended)
    }

    /// Regions without a missing page are the kernel's from now on.
    fn unregister_complete(&self, guest: &mut Guest) -> Result<(), Unplaced> {
        let mut unregistered = self.unregistered.lock();
        for (index, done) in unregistered.iter_mut().enumerate() {
            if !*done && guest.outstanding(index) == 0 {
                let Region { base, size, .. } = guest.region(index);
                *done = self.unregister(base, size)?;
            }
        }
        Ok(())
    }

    /// Whether all memory is with the VMM or the kernel, and no event outstanding, which would keep a thread of
    /// the VMM waiting.
    ///
    /// # Errors
    ///
    /// See [`Unplaced`].
    pub fn is_complete(&self) -> Result<bool, Unplaced> {
        self.unregister_complete(&mut self.guest())?;
        if self.unregistered.lock().contains(&false) {
            return Ok(false);
        }
        let Region { base, page_size, .. } = self.guest().region(0);
        // Refused either way; with events outstanding that is said first.
        match self.uffd.zero(base, page_size) {
            Ok(filled) => Ok(filled.stop != Stop::Busy),
            Err(error) if Errno::from_io_error(&error) == Some(Errno::SRCH) => Err(Unplaced::Ended),
            Err(_) => Ok(true),
        }
    }

    /// Places the next pages of `order`, at most so many bytes, but a page.
    ///
    /// # Errors
    ///
    /// See [`Unplaced`].
    pub fn step(
        &self,
        order: &Mutex<Order>,
        buffer: &mut Vec<u8>,
        most: u64,
    ) -> Result<Step, Unplaced> {
        let next = {
            let guest = self.guest();
            order.lock().next(&guest, most).map(|piece| (guest.region(piece.index), piece))
        };
        let Some((region, Piece { index, pages, source })) = next else {
            return Ok(Step::Nothing);
        };
        let len = (pages.end - pages.start) * region.page_size;
        buffer.resize(len as usize, 0);
        self.files.read(region.offset + pages.start * region.page_size, buffer)?;
        let mut at = pages.start;
        loop {
            // A turn for each run: messages are read in between, also of what is still to be placed.
            let placing = self.placing.read();
            let missing = self.guest().missing(index, at..pages.end);
            let Some(run) = missing else { break };
            let bytes = ((run.start - pages.start) * region.page_size) as usize
                ..((run.end - pages.start) * region.page_size) as usize;
            match self.place(index, region, run.clone(), &buffer[bytes], source)? {
                Run::Done => at = run.end,
                Run::Busy(page) => {
                    self.figures.busy.inc();
                    order.lock().put_back(Piece { index, pages: page..pages.end, source });
                    return Ok(Step::Busy);
                }
            }
            drop(placing);
        }
        self.unregister_complete(&mut self.guest())?;
        Ok(Step::Placed)
    }
}

/// What the background did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Pages were placed.
    Placed,
    /// Not before messages were read.
    Busy,
    /// Nothing is left to be begun.
    Nothing,
}

/// What a range that is not registered means: the VMM has taken it from us, and waits for nothing there.
fn not_registered(error: io::Error, len: u64) -> Result<Filled, Unplaced> {
    match Errno::from_io_error(&error) {
        Some(Errno::NOENT) => Ok(Filled { bytes: len, stop: Stop::Complete }),
        _ => Err(ended(error).err().unwrap_or(Unplaced::Ended)),
    }
}

/// What an error of the userfaultfd means.
fn ended(error: io::Error) -> Result<(), Unplaced> {
    match Errno::from_io_error(&error) {
        // Its memory is gone.
        Some(Errno::SRCH) => Err(Unplaced::Ended),
        // Nothing is mapped there, or nothing that waits.
        Some(Errno::NOENT) => Ok(()),
        _ => Err(Unplaced::Failed(PagerError::System {
            action: "place a page in the VMM",
            source: error,
        })),
    }
}
