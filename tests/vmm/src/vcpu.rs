//! vCPU threads: they keep writing and verifying the memory that they were given.
//!
//! Memory is given to them page range by page range ([`Vcpus::give`]) once it is plugged, and has
//! to be taken away ([`Vcpus::take`]) before it is unplugged: after `take` returns no thread
//! touches it any more. Each thread owns every n-th page, knows what it wrote there last and stops
//! with an error when it finds something else.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::memory::{GuestRam, PAGE_SIZE, stamp};

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

#[derive(Debug)]
struct Shared {
    ram: Arc<GuestRam>,
    given: RwLock<BTreeMap<u64, Given>>,
    stop: AtomicBool,
    next_id: AtomicU64,
    written: AtomicU64,
    verified: AtomicU64,
}

/// The vCPU threads of a guest.
#[derive(Debug)]
pub struct Vcpus {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<Result<(), Mismatch>>>,
}

impl Vcpus {
    /// Starts `count` threads, which have nothing to do yet.
    pub fn start(ram: Arc<GuestRam>, count: u64) -> Self {
        let shared = Arc::new(Shared {
            ram,
            given: RwLock::default(),
            stop: AtomicBool::new(false),
            next_id: AtomicU64::new(0),
            written: AtomicU64::new(0),
            verified: AtomicU64::new(0),
        });
        let threads = (0..count)
            .map(|index| {
                let shared = shared.clone();
                thread::spawn(move || Vcpu { shared, index, count, written: HashMap::new() }.run())
            })
            .collect();
        Self { shared, threads }
    }

    /// Lets the threads use a range that is plugged.
    pub fn give(&self, range: Range<u64>) {
        let id = self.shared.next_id.fetch_add(1, Ordering::Relaxed);
        let given = Given { end: range.end, id, first_writes: Arc::default() };
        self.shared
            .given
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(range.start, given);
    }

    /// Takes a range away, all or parts of what was given; no thread touches it after this returns.
    pub fn take(&self, range: Range<u64>) {
        let mut given = self.shared.given.write().unwrap_or_else(PoisonError::into_inner);
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
        let given = self.shared.given.read().unwrap_or_else(PoisonError::into_inner);
        given.iter().map(|(start, entry)| *start..entry.end).collect()
    }

    /// Waits until every page of the range given at `start` was written at least once.
    pub fn wait_written(&self, start: u64, timeout: Duration) -> bool {
        let begin = Instant::now();
        loop {
            let pages = {
                let given = self.shared.given.read().unwrap_or_else(PoisonError::into_inner);
                given.get(&start).map(|entry| {
                    ((entry.end - start) / PAGE_SIZE, entry.first_writes.load(Ordering::Relaxed))
                })
            };
            match pages {
                Some((all, written)) if written >= all => return true,
                Some(_) if begin.elapsed() < timeout && self.is_healthy() => {
                    thread::sleep(Duration::from_millis(1));
                }
                _ => return false,
            }
        }
    }

    /// Whether every thread still runs, that is, no page was wrong so far.
    pub fn is_healthy(&self) -> bool {
        self.threads.iter().all(|thread| !thread.is_finished())
    }

    /// What was done so far.
    pub fn work(&self) -> Work {
        Work {
            written: self.shared.written.load(Ordering::Relaxed),
            verified: self.shared.verified.load(Ordering::Relaxed),
        }
    }

    /// Ends the threads; the first page that was wrong is the error.
    pub fn stop(mut self) -> Result<Work, Mismatch> {
        self.shared.stop.store(true, Ordering::Relaxed);
        let mut result = Ok(());
        for thread in self.threads.drain(..) {
            match thread.join() {
                Ok(outcome) => result = result.and(outcome),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        result.map(|()| self.work())
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
    }
}

struct Vcpu {
    shared: Arc<Shared>,
    index: u64,
    count: u64,
    /// For each page: the id of the range at that time and the generation that was written.
    written: HashMap<u64, (u64, u64)>,
}

impl Vcpu {
    fn run(mut self) -> Result<(), Mismatch> {
        let mut at = 0;
        while !self.shared.stop.load(Ordering::Relaxed) {
            match self.work_from(at)? {
                Some(next) => at = next,
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

    /// Works on some pages at or after `at`, and returns where to go on; nothing when the end is
    /// reached.
    fn work_from(&mut self, at: u64) -> Result<Option<u64>, Mismatch> {
        let shared = self.shared.clone();
        // Held while the pages are touched: this is what `take` waits for.
        let given = shared.given.read().unwrap_or_else(PoisonError::into_inner);
        let before = given.range(..=at).next_back().filter(|(_, entry)| at < entry.end);
        let Some((start, entry)) = before.or_else(|| given.range(at..).next()) else {
            return Ok(None);
        };
        let from = at.max(*start);
        let to = entry.end.min(from + BATCH * PAGE_SIZE);
        for page in (from..to).step_by(PAGE_SIZE as usize) {
            if (page / PAGE_SIZE) % self.count == self.index {
                self.visit(page, entry)?;
            }
        }
        Ok(Some(to))
    }

    fn visit(&mut self, page: u64, entry: &Given) -> Result<(), Mismatch> {
        let ram = &self.shared.ram;
        let previous = self.written.get(&page).filter(|(id, _)| *id == entry.id).copied();
        let generation = match previous {
            Some((_, generation)) => {
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
        let value = stamp(page, generation).to_le();
        for addr in [page, page + PAGE_SIZE - 8] {
            if ram.store(addr, value).is_err() {
                return Err(Mismatch { page, expected: value, found: 0 });
            }
        }
        self.written.insert(page, (entry.id, generation));
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
        let populated = ram.populated_ranges(0..16 * MIB).unwrap();
        assert_eq!(populated, vec![2 * MIB..6 * MIB; 1]);

        vcpus.take(3 * MIB..4 * MIB);
        assert_eq!(vcpus.given(), [2 * MIB..3 * MIB, 4 * MIB..6 * MIB]);
        ram.punch(3 * MIB..4 * MIB).unwrap();
        let verified = vcpus.work().verified;
        while vcpus.work().verified < verified + 2048 {
            thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(ram.populated_bytes(0..16 * MIB).unwrap(), 3 * MIB);

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
}
