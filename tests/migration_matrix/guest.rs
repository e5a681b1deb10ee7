//! A guest whose vCPUs write stamps and look at every stamp before they replace it, and whose driver may plug and
//! unplug blocks meanwhile.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use migration::lazy::HandlerFailed;
use migration::{Guest, MigrationError};
use ram_discard::memory::HostMapping;
use virtio_mem::device::BlockBitmap;

use crate::memory::{Device, Kind, Pattern, Side, say};

const PAGE: u64 = 4096;
const VCPUS: usize = 2;
/// Much longer than anything takes that is waited for, also in a soak.
const PATIENCE: Duration = Duration::from_secs(300);

/// What the guest wrote last, page by page: moves with it, as its registers would.
pub type Work = Arc<Vec<AtomicU64>>;

/// A guest on one side.
pub struct Vm {
    mapping: Arc<HostMapping>,
    /// Pages that it uses where they are usable: the others are never touched.
    pages: Vec<u64>,
    device: Arc<Device>,
    pages_per_block: u64,
    /// Blocks that vCPUs may touch: those that are plugged, without those that are about to be unplugged.
    /// They move with the guest.
    usable: Arc<RwLock<BlockBitmap>>,
    work: Work,
    /// Held for reading while a vCPU touches memory.
    running: RwLock<bool>,
    end: AtomicBool,
    wrong: AtomicU64,
    rounds: AtomicU64,
    visited: AtomicU64,
    /// Blocks that were plugged or unplugged.
    resizes: AtomicU64,
    /// How many there are before [`Guest::run`] returns the next time.
    resizes_first: AtomicU64,
    threads: Mutex<Vec<JoinHandle<()>>>,
    /// Why its faults are not answered any more.
    failed: Mutex<Option<String>>,
    at_stop: Mutex<Option<AtStop>>,
}

/// A guest as it was when it was stopped last.
struct AtStop {
    /// What was written.
    work: Vec<u64>,
    usable: BlockBitmap,
    plugged: BlockBitmap,
}

/// A stamp: differs between pages and between generations; 0 of a page never written.
fn stamp(page: u64, generation: u64) -> u64 {
    if generation == 0 { 0 } else { page << 32 | generation }
}

/// A guest's work that has not begun, for a region of `size` bytes.
pub fn no_work(size: u64) -> Work {
    Arc::new((0..size / PAGE).map(|_| AtomicU64::new(0)).collect())
}

impl Vm {
    pub fn new(side: &Side, work: &Work) -> Arc<Self> {
        Self::with_usable(side, work, Arc::new(RwLock::new(side.device.plugged())))
    }

    /// The same guest on another side, to which it moves.
    pub fn moved(&self, side: &Side) -> Arc<Self> {
        Self::with_usable(side, &self.work, Arc::clone(&self.usable))
    }

    fn with_usable(side: &Side, work: &Work, usable: Arc<RwLock<BlockBitmap>>) -> Arc<Self> {
        // Few of very large pages, so that a round stays short.
        let gigantic = side.block.page_size() >= 1 << 30;
        let is_used = |page: &u64| page % 3 != 2 && (!gigantic || (page / 64).is_multiple_of(64));
        let plugged = side.device.plugged();
        let nr_pages = side.block.used_length() / PAGE;
        Arc::new(Self {
            mapping: Arc::clone(side.block.mapping()),
            pages: (0..nr_pages).filter(is_used).collect(),
            device: Arc::clone(&side.device),
            pages_per_block: nr_pages / plugged.nr_blocks() as u64,
            usable,
            work: Arc::clone(work),
            running: RwLock::new(false),
            end: AtomicBool::new(false),
            wrong: AtomicU64::new(0),
            rounds: AtomicU64::new(0),
            visited: AtomicU64::new(0),
            resizes: AtomicU64::new(0),
            resizes_first: AtomicU64::new(0),
            threads: Mutex::default(),
            failed: Mutex::default(),
            at_stop: Mutex::default(),
        })
    }

    /// Starts the vCPUs, which wait for [`Guest::run`].
    pub fn start(self: &Arc<Self>) {
        let mut threads = self.threads.lock().unwrap();
        for index in 0..VCPUS {
            let vm = Arc::clone(self);
            threads.push(std::thread::spawn(move || vm.run_vcpu(index)));
        }
    }

    /// Starts a driver that plugs and unplugs the first `nr_blocks` blocks for ever, `first` times before
    /// [`Guest::run`] returns the next time.
    pub fn start_driver(self: &Arc<Self>, nr_blocks: u64, first: u64) {
        self.resizes_first.store(first, Ordering::Relaxed);
        let vm = Arc::clone(self);
        self.threads.lock().unwrap().push(std::thread::spawn(move || vm.run_driver(nr_blocks)));
    }

    /// Blocks that were plugged when it was stopped last.
    pub fn plugged_at_stop(&self) -> BlockBitmap {
        self.at_stop.lock().unwrap().as_ref().expect("it was stopped").plugged.clone()
    }

    /// Waits until the vCPUs went over their memory so often.
    pub fn wait_rounds(&self, rounds: u64) {
        let before = self.rounds.load(Ordering::Relaxed);
        self.wait_until(|| self.rounds.load(Ordering::Relaxed) >= before + rounds).unwrap();
    }

    /// Waits until its driver has plugged and unplugged so many blocks on this side.
    pub fn wait_resizes(&self, resizes: u64) {
        self.wait_until(|| self.resizes.load(Ordering::Relaxed) >= resizes).unwrap();
    }

    /// Waits for what its threads do; why that does not come.
    fn wait_until(&self, what: impl Fn() -> bool) -> Result<(), String> {
        let begun = Instant::now();
        while !what() {
            if let Some(why) = self.failed.lock().unwrap().as_ref() {
                return Err(why.clone());
            }
            let ends = self.end.load(Ordering::Relaxed);
            if !ends && self.threads.lock().unwrap().iter().any(JoinHandle::is_finished) {
                return Err("a thread of the guest has failed".to_owned());
            }
            if begun.elapsed() > PATIENCE {
                return Err("the guest does not do what is waited for".to_owned());
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        Ok(())
    }

    /// Has the guest end with the test, also with one that fails.
    pub fn ends_with_this(self: &Arc<Self>) -> EndsWithThis {
        EndsWithThis(Arc::clone(self))
    }

    /// How many pages were looked at.
    pub fn visited(&self) -> u64 {
        self.visited.load(Ordering::Relaxed)
    }

    /// Ends the vCPUs; how many pages were not as they had been written.
    pub fn end(&self) -> u64 {
        self.end.store(true, Ordering::Relaxed);
        let all_ended = || self.threads.lock().unwrap().iter().all(JoinHandle::is_finished);
        self.wait_until(all_ended).unwrap();
        let threads = std::mem::take(&mut *self.threads.lock().unwrap());
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        assert_eq!(*self.failed.lock().unwrap(), None);
        self.wrong.load(Ordering::Relaxed)
    }

    /// Pages of `side` that do not hold what the guest had written when it was stopped last.
    pub fn differ_at_stop(&self, side: &Side) -> u64 {
        let at_stop = self.at_stop.lock().unwrap();
        let AtStop { work, usable, .. } = at_stop.as_ref().expect("it was stopped");
        let differs = |page: &&u64| {
            let expected = stamp(**page, work[**page as usize]);
            self.is_in(usable, **page) && read_stamps(side.block.mapping(), **page) != [expected; 2]
        };
        self.pages.iter().filter(differs).count() as u64
    }

    fn run_vcpu(&self, index: usize) {
        while !self.end.load(Ordering::Relaxed) {
            let mine = self.pages.iter().skip(index).step_by(VCPUS);
            for chunk in mine.copied().collect::<Vec<_>>().chunks(16) {
                let running = self.running.read().unwrap_or_else(PoisonError::into_inner);
                if !*running {
                    drop(running);
                    std::thread::sleep(Duration::from_micros(200));
                    break;
                }
                let usable = self.usable.read().unwrap_or_else(PoisonError::into_inner);
                let pages = chunk.iter().filter(|&&page| self.is_in(&usable, page));
                pages.for_each(|&page| self.visit(page));
            }
            self.rounds.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn is_in(&self, blocks: &BlockBitmap, page: u64) -> bool {
        let block = (page / self.pages_per_block) as usize;
        blocks.all(block..block + 1, true)
    }

    fn run_driver(&self, nr_blocks: u64) {
        let mut random = 0x2545_f491_4f6c_dd1d_u64;
        while !self.end.load(Ordering::Relaxed) {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let block = (random % nr_blocks) as usize;
            // As a vCPU does, it stops with the guest.
            let running = self.running.read().unwrap_or_else(PoisonError::into_inner);
            if !*running {
                drop(running);
                std::thread::sleep(Duration::from_micros(200));
                continue;
            }
            let unplug = self.usable.read().unwrap().all(block..block + 1, true);
            // No vCPU touches it from now on.
            self.usable.write().unwrap().set(block..block + 1, false);
            let done = self.device.change(block, !unplug);
            if done && unplug {
                let first = block as u64 * self.pages_per_block;
                for page in first..first + self.pages_per_block {
                    self.work[page as usize].store(0, Ordering::Relaxed);
                }
            }
            if done != unplug {
                self.usable.write().unwrap().set(block..block + 1, true);
            }
            self.resizes.fetch_add(u64::from(done), Ordering::Relaxed);
            drop(running);
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    fn visit(&self, page: u64) {
        self.visited.fetch_add(1, Ordering::Relaxed);
        let generation = self.work[page as usize].load(Ordering::Relaxed);
        let found = read_stamps(&self.mapping, page);
        if found != [stamp(page, generation); 2] {
            if self.wrong.fetch_add(1, Ordering::Relaxed) == 0 {
                say(&format!("page {page:#x} holds {found:x?} in generation {generation}"));
            }
            return;
        }
        let next = stamp(page, generation + 1).to_le_bytes();
        self.mapping.write(page * PAGE, &next);
        self.mapping.write(page * PAGE + PAGE - 8, &next);
        self.work[page as usize].store(generation + 1, Ordering::Relaxed);
    }
}

fn read_stamps(mapping: &HostMapping, page: u64) -> [u64; 2] {
    [page * PAGE, page * PAGE + PAGE - 8].map(|at| {
        let mut bytes = [0; 8];
        mapping.read(at, &mut bytes);
        u64::from_le_bytes(bytes)
    })
}

impl Guest for Vm {
    fn stop(&self) -> Result<(), String> {
        *self.running.write().unwrap_or_else(PoisonError::into_inner) = false;
        let usable = self.usable.read().unwrap_or_else(PoisonError::into_inner).clone();
        let work = self.work.iter().map(|generation| generation.load(Ordering::Relaxed)).collect();
        let plugged = self.device.plugged();
        *self.at_stop.lock().unwrap() = Some(AtStop { work, usable, plugged });
        Ok(())
    }

    fn run(&self) -> Result<(), String> {
        let before = self.resizes.load(Ordering::Relaxed);
        *self.running.write().unwrap_or_else(PoisonError::into_inner) = true;
        let first = self.resizes_first.swap(0, Ordering::Relaxed);
        self.wait_until(|| self.resizes.load(Ordering::Relaxed) >= before + first)
    }
}

impl HandlerFailed for Vm {
    fn handler_failed(&self, error: &MigrationError) {
        // Those who wait hear of it: a vCPU that waits for its page does not end.
        self.failed.lock().unwrap().get_or_insert_with(|| error.to_string());
    }
}

/// Tells the threads of a guest to end when it is dropped, and does not wait for them.
pub struct EndsWithThis(Arc<Vm>);

impl Drop for EndsWithThis {
    fn drop(&mut self) {
        self.0.end.store(true, Ordering::Relaxed);
    }
}

/// A guest on a side of two blocks, and what ends it.
fn small_guest() -> (Arc<Vm>, EndsWithThis) {
    let side = Side::new(Kind::Memfd, &Pattern::None.plugged(2)).unwrap();
    let vm = Vm::new(&side, &no_work(side.block.used_length()));
    let ends = vm.ends_with_this();
    (vm, ends)
}

#[test]
fn a_guest_whose_driver_has_failed_is_not_waited_for() {
    let (vm, _ends) = small_guest();
    vm.start();
    // Of no blocks: it fails with the first one.
    vm.start_driver(0, 1);
    let failed = "a thread of the guest has failed";
    assert_eq!(vm.run().unwrap_err(), failed);
    assert_eq!(vm.wait_until(|| vm.resizes.load(Ordering::Relaxed) != 0).unwrap_err(), failed);
    let waits = std::panic::AssertUnwindSafe(|| vm.wait_rounds(u64::MAX / 2));
    assert!(std::panic::catch_unwind(waits).is_err());
}

#[test]
fn a_guest_whose_faults_are_not_answered_is_not_waited_for() {
    let (vm, _ends) = small_guest();
    // Stopped, as one whose vCPUs wait for pages that do not come.
    vm.start();
    vm.handler_failed(&MigrationError::Cancelled);
    let why = MigrationError::Cancelled.to_string();
    assert_eq!(vm.wait_until(|| false).unwrap_err(), why);
    let ends = std::panic::AssertUnwindSafe(|| vm.end());
    assert!(std::panic::catch_unwind(ends).is_err());
}
