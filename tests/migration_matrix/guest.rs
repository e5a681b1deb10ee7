//! A guest whose vCPUs write stamps and look at every stamp before they replace it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::thread::JoinHandle;

use migration::lazy::HandlerFailed;
use migration::{Guest, MigrationError};
use ram_discard::ByteRange;
use ram_discard::memory::HostMapping;

use crate::memory::{Side, say};

const PAGE: u64 = 4096;
const VCPUS: usize = 2;

/// What the guest wrote last, page by page: moves with it, as its registers would.
pub type Work = Arc<Vec<AtomicU64>>;

/// A guest on one side.
pub struct Vm {
    mapping: Arc<HostMapping>,
    /// Pages that it may use: the others are never touched.
    pages: Vec<u64>,
    work: Work,
    /// Held for reading while a vCPU touches memory.
    running: RwLock<bool>,
    end: AtomicBool,
    wrong: AtomicU64,
    rounds: AtomicU64,
    visited: AtomicU64,
    vcpus: Mutex<Vec<JoinHandle<()>>>,
    /// What was written by the time that it was stopped.
    at_stop: Mutex<Vec<u64>>,
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
        // Few of very large pages, so that a round stays short.
        let gigantic = side.block.page_size() >= 1 << 30;
        let pages = |range: &ByteRange| {
            (range.start() / PAGE..range.end() / PAGE)
                .filter(move |page| page % 3 != 2 && (!gigantic || page / 64 % 64 == 0))
        };
        Arc::new(Self {
            mapping: Arc::clone(side.block.mapping()),
            pages: side.populated().iter().flat_map(pages).collect(),
            work: Arc::clone(work),
            running: RwLock::new(false),
            end: AtomicBool::new(false),
            wrong: AtomicU64::new(0),
            rounds: AtomicU64::new(0),
            visited: AtomicU64::new(0),
            vcpus: Mutex::default(),
            at_stop: Mutex::default(),
        })
    }

    /// Starts the vCPUs, which wait for [`Guest::run`].
    pub fn start(self: &Arc<Self>) {
        let mut vcpus = self.vcpus.lock().unwrap();
        for index in 0..VCPUS {
            let vm = Arc::clone(self);
            vcpus.push(std::thread::spawn(move || vm.run_vcpu(index)));
        }
    }

    /// Waits until the vCPUs went over their memory so often.
    pub fn wait_rounds(&self, rounds: u64) {
        let before = self.rounds.load(Ordering::Relaxed);
        while self.rounds.load(Ordering::Relaxed) < before + rounds {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }

    /// How many pages were looked at.
    pub fn visited(&self) -> u64 {
        self.visited.load(Ordering::Relaxed)
    }

    /// Ends the vCPUs; how many pages were not as they had been written.
    pub fn end(&self) -> u64 {
        self.end.store(true, Ordering::Relaxed);
        for vcpu in self.vcpus.lock().unwrap().drain(..) {
            vcpu.join().unwrap();
        }
        self.wrong.load(Ordering::Relaxed)
    }

    /// Pages of `side` that do not hold what the guest had written when it was stopped last.
    pub fn differ_at_stop(&self, side: &Side) -> u64 {
        let at_stop = self.at_stop.lock().unwrap();
        let differs = |page: &&u64| {
            let expected = stamp(**page, at_stop[**page as usize]);
            read_stamps(side.block.mapping(), **page) != [expected; 2]
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
                    std::thread::sleep(std::time::Duration::from_micros(200));
                    break;
                }
                chunk.iter().for_each(|&page| self.visit(page));
            }
            self.rounds.fetch_add(1, Ordering::Relaxed);
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
        *self.at_stop.lock().unwrap() =
            self.work.iter().map(|generation| generation.load(Ordering::Relaxed)).collect();
        Ok(())
    }

    fn run(&self) -> Result<(), String> {
        *self.running.write().unwrap_or_else(PoisonError::into_inner) = true;
        Ok(())
    }
}

impl HandlerFailed for Vm {
    fn handler_failed(&self, error: &MigrationError) {
        panic!("{error}");
    }
}
