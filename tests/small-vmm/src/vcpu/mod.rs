//! vCPU threads: they keep writing and verifying the memory that they were given.
//!
//! Memory is given to them page range by page range ([`Vcpus::give`]) once it is plugged, and has
//! to be taken away ([`Vcpus::take`]) before it is unplugged: after `take` returns no thread
//! touches it any more. Each thread owns every n-th page, knows what it wrote there last and stops
//! with an error when it finds something else.
//!
//! They can be paused, and what they know be moved to another VMM ([`VcpuState`]): there they go on
//! and find every page that did not come along, or came as it was too early.

mod pace;
mod state;

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::memory::{GuestRam, PAGE_SIZE, stamp};
use pace::Pace;
pub use state::{GivenState, PageState, VcpuState};

/// Pages that are looked at before another thread may change the ranges.
const BATCH: u64 = 256;

/// A page that did not hold what was written to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("page {page:#x} holds {found:#x}, {expected:#x} was written")]
pub struct Mismatch {
    /// Address of the page.
    pub page: u64,
    /// What was written.
    pub expected: u64,
    /// What was read.
    pub found: u64,
}

/// What the threads did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Pages written, each time counted.
    pub written: u64,
    /// Pages verified, each time counted.
    pub verified: u64,
}

#[derive(Clone, Debug)]
struct Given {
    end: u64,
    /// Differs whenever the same address is given again, since memory forgets when it is unplugged.
    id: u64,
    first_writes: Arc<AtomicU64>,
}

/// What was written to a page last.
#[derive(Clone, Copy, Debug)]
struct Written {
    /// The range that the page belonged to.
    id: u64,
    generation: u64,
}

/// Locked for reading while pages are touched: a thread that has it for writing knows that none is.
#[derive(Debug, Default)]
struct Usage {
    given: BTreeMap<u64, Given>,
    paused: bool,
}

#[derive(Debug)]
struct Shared {
    ram: Arc<GuestRam>,
    usage: RwLock<Usage>,
    /// What each thread wrote, by page.
    pages: Vec<Mutex<HashMap<u64, Written>>>,
    pace: Pace,
    stop: AtomicBool,
    /// Whether pages are only looked at.
    read_only: AtomicBool,
    /// Whether memory was lost: nothing is touched any more.
    halted: AtomicBool,
    next_id: AtomicU64,
    written: AtomicU64,
    verified: AtomicU64,
}

impl Shared {
    fn usage(&self) -> RwLockReadGuard<'_, Usage> {
        self.usage.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn usage_mut(&self) -> RwLockWriteGuard<'_, Usage> {
        self.usage.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn pages(&self, index: usize) -> MutexGuard<'_, HashMap<u64, Written>> {
        self.pages[index].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

type Thread = JoinHandle<Result<(), Mismatch>>;

/// Ends with its last owner.
#[derive(Debug)]
struct Threads {
    shared: Arc<Shared>,
    running: Mutex<Vec<Thread>>,
}

impl Threads {
    fn running(&self) -> MutexGuard<'_, Vec<Thread>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
    }
}

/// The vCPU threads of a guest; a clone is another handle of the same threads.
#[derive(Clone, Debug)]
pub struct Vcpus {
    shared: Arc<Shared>,
    threads: Arc<Threads>,
}

impl Vcpus {
    /// Starts `count` threads, which have nothing to do yet.
    pub fn start(ram: Arc<GuestRam>, count: u64) -> Self {
        let shared = Arc::new(Shared {
            ram,
            usage: RwLock::default(),
            pages: (0..count).map(|_| Mutex::default()).collect(),
            pace: Pace::default(),
            stop: AtomicBool::new(false),
            read_only: AtomicBool::new(false),
            halted: AtomicBool::new(false),
            next_id: AtomicU64::new(0),
            written: AtomicU64::new(0),
            verified: AtomicU64::new(0),
        });
        let running = (0..count)
            .map(|index| {
                let shared = shared.clone();
                thread::spawn(move || Vcpu { shared, index, count }.run())
            })
            .collect();
        let threads = Arc::new(Threads { shared: shared.clone(), running: Mutex::new(running) });
        Self { shared, threads }
    }

    /// Lets the threads use a range that is plugged.
    pub fn give(&self, range: Range<u64>) {
        let id = self.shared.next_id.fetch_add(1, Ordering::Relaxed);
        let given = Given { end: range.end, id, first_writes: Arc::default() };
        self.shared.usage_mut().given.insert(range.start, given);
    }

    /// Takes a range away, all or parts of what was given; no thread touches it after this returns.
    pub fn take(&self, range: Range<u64>) {
        let given = &mut self.shared.usage_mut().given;
        let cut: Vec<_> = given
            .iter()
            .filter(|(start, entry)| **start < range.end && range.start < entry.end)
            .map(|(start, entry)| (*start, entry.clone()))
            .collect();
        for (start, entry) in cut {
            given.remove(&start);
            if start < range.start {
                given.insert(start, Given { end: range.start, ..entry.clone() });
            }
            if range.end < entry.end {
                given.insert(range.end, entry);
            }
        }
    }

    /// The ranges that the threads use at the moment.
    pub fn given(&self) -> Vec<Range<u64>> {
        self.shared.usage().given.iter().map(|(start, entry)| *start..entry.end).collect()
    }

    /// Waits until every page of the range given at `start` was written at least once.
    pub fn wait_written(&self, start: u64, timeout: Duration) -> bool {
        let begin = Instant::now();
        loop {
            let pages = self.shared.usage().given.get(&start).map(|entry| {
                ((entry.end - start) / PAGE_SIZE, entry.first_writes.load(Ordering::Relaxed))
            });
            match pages {
                Some((all, written)) if written >= all => return true,
                Some(_) if begin.elapsed() < timeout && self.is_healthy() => {
                    thread::sleep(Duration::from_millis(1));
                }
                _ => return false,
            }
        }
    }

    /// Stops the threads where they are: after this returns none touches memory.
    pub fn pause(&self) {
        self.shared.usage_mut().paused = true;
    }

    /// Lets the threads go on.
    pub fn resume(&self) {
        self.shared.usage_mut().paused = false;
    }

    /// Has the threads look at what they wrote, and write nothing, or write again.
    pub fn read_only(&self, read_only: bool) {
        self.shared.read_only.store(read_only, Ordering::Relaxed);
    }

    /// Has them touch nothing any more, without waiting for a thread that is stuck at a page
    /// which will never come.
    pub fn halt(&self) {
        self.shared.halted.store(true, Ordering::Relaxed);
    }

    /// Whether they were [halted](Self::halt).
    pub fn is_halted(&self) -> bool {
        self.shared.halted.load(Ordering::Relaxed)
    }

    /// Keeps the threads from running for `percent` of the time, 0 to 99.
    pub fn throttle(&self, percent: u8) {
        self.shared.pace.throttle(percent);
    }

    /// Has all threads together touch about so many pages a second; `None` for as many as they can.
    pub fn limit(&self, pages_per_second: Option<u64>) {
        self.shared.pace.limit(pages_per_second);
    }

    /// Whether every thread still runs, that is, no page was wrong so far.
    pub fn is_healthy(&self) -> bool {
        self.threads.running().iter().all(|thread| !thread.is_finished())
    }

    /// What was done so far.
    pub fn work(&self) -> Work {
        Work {
            written: self.shared.written.load(Ordering::Relaxed),
            verified: self.shared.verified.load(Ordering::Relaxed),
        }
    }

    /// Ends the threads; the first page that was wrong is the error.
    pub fn stop(self) -> Result<Work, Mismatch> {
        self.shared.stop.store(true, Ordering::Relaxed);
        let mut result = Ok(());
        for thread in self.threads.running().drain(..) {
            match thread.join() {
                Ok(outcome) => result = result.and(outcome),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        result.map(|()| self.work())
    }
}

struct Vcpu {
    shared: Arc<Shared>,
    index: u64,
    count: u64,
}

impl Vcpu {
    fn run(self) -> Result<(), Mismatch> {
        let mut at = 0;
        while !self.shared.stop.load(Ordering::Relaxed) {
            let begin = Instant::now();
            match self.work_from(at)? {
                Some((next, pages)) => {
                    at = next;
                    let rest = self.shared.pace.rest(pages * self.count, begin.elapsed());
                    if !rest.is_zero() {
                        thread::sleep(rest);
                    }
                }
                None => {
                    at = 0;
                    // One pass over everything is enough for this moment; other threads want the
                    // CPU too.
                    thread::sleep(Duration::from_millis(1));
                }
            }
        }
        Ok(())
    }

    /// Works on some pages at or after `at`, and returns where to go on and how many they were;
    /// nothing when the end is reached, or while paused.
    fn work_from(&self, at: u64) -> Result<Option<(u64, u64)>, Mismatch> {
        // Held while the pages are touched: this is what `take` and `pause` wait for.
        let usage = self.shared.usage();
        if usage.paused || self.shared.halted.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let before = usage.given.range(..=at).next_back().filter(|(_, entry)| at < entry.end);
        let Some((start, entry)) = before.or_else(|| usage.given.range(at..).next()) else {
            return Ok(None);
        };
        let from = at.max(*start);
        let to = entry.end.min(from + BATCH * PAGE_SIZE);
        let mut pages = self.shared.pages(self.index as usize);
        let mut touched = 0;
        for page in (from..to).step_by(PAGE_SIZE as usize) {
            if (page / PAGE_SIZE) % self.count == self.index {
                self.visit(page, entry, &mut pages)?;
                touched += 1;
            }
        }
        Ok(Some((to, touched)))
    }

    fn visit(
        &self,
        page: u64,
        entry: &Given,
        pages: &mut HashMap<u64, Written>,
    ) -> Result<(), Mismatch> {
        let ram = &self.shared.ram;
        let previous = pages.get(&page).filter(|written| written.id == entry.id).copied();
        let generation = match previous {
            Some(Written { generation, .. }) => {
                let expected = stamp(page, generation);
                for addr in [page, page + PAGE_SIZE - 8] {
                    let found = u64::from_le(ram.load(addr).unwrap_or(0));
                    if found != expected {
                        return Err(Mismatch { page, expected, found });
                    }
                }
                self.shared.verified.fetch_add(1, Ordering::Relaxed);
                generation + 1
            }
            // The same page given a second time must not look right by what it held the first time.
            None => entry.id << 16,
        };
        if self.shared.read_only.load(Ordering::Relaxed) {
            return Ok(());
        }
        let value = stamp(page, generation).to_le();
        for addr in [page, page + PAGE_SIZE - 8] {
            if ram.store(addr, value).is_err() {
                return Err(Mismatch { page, expected: value, found: 0 });
            }
        }
        pages.insert(page, Written { id: entry.id, generation });
        self.shared.written.fetch_add(1, Ordering::Relaxed);
        if previous.is_none() {
            entry.first_writes.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Layout;

    const MIB: u64 = 1 << 20;

    fn ram() -> Arc<GuestRam> {
        Arc::new(GuestRam::new(Layout::new().memfd("ram", 0, 16 * MIB).unwrap()).unwrap())
    }

    #[test]
    fn only_given_pages_are_touched_and_none_after_take() {
        let ram = ram();
        let vcpus = Vcpus::start(ram.clone(), 3);
        vcpus.give(2 * MIB..6 * MIB);
        assert!(vcpus.wait_written(2 * MIB, Duration::from_secs(20)));
        let resident = ram.resident_ranges(0..16 * MIB).unwrap();
        assert_eq!(resident, vec![2 * MIB..6 * MIB; 1]);

        vcpus.take(3 * MIB..4 * MIB);
        assert_eq!(vcpus.given(), [2 * MIB..3 * MIB, 4 * MIB..6 * MIB]);
        ram.punch(3 * MIB..4 * MIB).unwrap();
        let verified = vcpus.work().verified;
        while vcpus.work().verified < verified + 2048 {
            assert!(vcpus.is_healthy());
            thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(ram.resident_bytes(0..16 * MIB).unwrap(), 3 * MIB);

        // What was forgotten in between is not held against the memory.
        vcpus.give(3 * MIB..4 * MIB);
        assert!(vcpus.wait_written(3 * MIB, Duration::from_secs(20)));
        vcpus.stop().unwrap();
    }

    #[test]
    fn lost_page_is_reported() {
        let ram = ram();
        let vcpus = Vcpus::start(ram.clone(), 2);
        vcpus.give(0..MIB);
        assert!(vcpus.wait_written(0, Duration::from_secs(20)));
        while vcpus.is_healthy() {
            ram.punch(0x8000..0x9000).unwrap();
        }
        assert_eq!(vcpus.stop().unwrap_err().page, 0x8000);
    }

    #[test]
    fn paused_threads_touch_nothing_and_go_on_elsewhere_with_what_they_know() {
        let (here, there) = (ram(), ram());
        let vcpus = Vcpus::start(here.clone(), 2);
        vcpus.give(0..MIB);
        vcpus.give(2 * MIB..3 * MIB);
        assert!(vcpus.wait_written(0, Duration::from_secs(20)));
        vcpus.pause();
        let state = vcpus.state();
        for range in vcpus.given() {
            let len = (range.end - range.start) as usize;
            there.write(range.start, &here.read_vec(range.start, len).unwrap()).unwrap();
        }
        let before = vcpus.work();
        thread::sleep(Duration::from_millis(20));
        assert_eq!(vcpus.work(), before);

        let other = Vcpus::start(there.clone(), 3);
        other.pause();
        other.take_over(state.clone()).unwrap();
        assert_eq!(other.state(), state);
        other.resume();
        while other.work().verified < 1024 {
            assert!(other.is_healthy());
            thread::sleep(Duration::from_millis(1));
        }
        other.stop().unwrap();

        // A page as it was before is found.
        let stale = Vcpus::start(here.clone(), 2);
        stale.pause();
        here.write_stamps(0x5000..0x6000, 0xffff).unwrap();
        stale.take_over(state).unwrap();
        stale.resume();
        while stale.is_healthy() {
            thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(stale.stop().unwrap_err().page, 0x5000);
    }

    #[test]
    fn state_that_makes_no_sense_is_refused() {
        let vcpus = Vcpus::start(ram(), 1);
        let range = GivenState { start: 0, end: MIB, id: 0, first_writes: 0 };
        let page = PageState { page: 0x1000, id: 0, generation: 1 };
        let right = VcpuState { next_id: 1, given: vec![range], pages: vec![page] };
        for wrong in [
            VcpuState { given: vec![GivenState { end: MIB + 1, ..range }], ..right.clone() },
            VcpuState { given: vec![GivenState { start: MIB, ..range }], ..right.clone() },
            VcpuState { given: vec![range, range], ..right.clone() },
            VcpuState { given: vec![GivenState { id: 1, ..range }], ..right.clone() },
            VcpuState { given: vec![GivenState { end: 64 * MIB, ..range }], ..right.clone() },
            VcpuState { pages: vec![PageState { page: 1, ..page }], ..right.clone() },
        ] {
            assert!(vcpus.take_over(wrong.clone()).is_err(), "{wrong:?}");
        }
        assert_eq!(vcpus.state(), VcpuState::default());
    }
}
