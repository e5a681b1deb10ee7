//! Random resizes and writes while an image is written, against a copy of the instant.

use std::sync::RwLock;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread;

use super::*;

/// Numbers that follow from a seed.
#[derive(Clone)]
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: u64) -> u64 {
        (self.next() >> 16) % end
    }

    fn blocks(&mut self) -> Range<usize> {
        let start = self.below(16);
        start as usize..(start + 1 + self.below(4)).min(16) as usize
    }
}

/// A guest whose driver resizes and whose vCPUs write what is plugged.
struct Busy {
    device: Arc<Device>,
    mapping: Arc<HostMapping>,
    region: File,
    /// Whether vCPUs run; they and the driver look at it, and at what is usable, before each step.
    running: RwLock<bool>,
    /// Blocks that vCPUs may write; a subset of those that are plugged.
    usable: RwLock<BlockBitmap>,
    end: AtomicBool,
    /// The driver or a vCPU has failed, and what is waited for may never come.
    failed: AtomicBool,
    changes: AtomicUsize,
    writes: AtomicU64,
    /// Changes before the background begins to write the image.
    ahead: usize,
    /// The memory of the instant, and what was plugged.
    instant: Mutex<Option<(Vec<u8>, Vec<usize>)>>,
}

/// Ends a guest when it is dropped, also by an assertion that fails.
struct Ends<'a>(&'a Busy);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.failed.fetch_or(thread::panicking(), Ordering::Relaxed);
        self.0.end.store(true, Ordering::Relaxed);
    }
}

impl Busy {
    /// Lets the driver and the vCPUs run, which do not end by themselves unless they fail.
    fn wait(&self) {
        assert!(!self.failed.load(Ordering::Relaxed), "the driver or a vCPU has failed");
        thread::yield_now();
    }

    fn drive(&self, mut random: Random) {
        let _ends = Ends(self);
        while !self.end.load(Ordering::Relaxed) {
            let blocks = random.blocks();
            if random.below(2) == 0 {
                if self.device.plug(blocks.clone()) == Answer::Ack {
                    self.usable.write().unwrap().set(blocks, true);
                    self.changes.fetch_add(1, Ordering::Relaxed);
                }
            } else {
                let mut usable = self.usable.write().unwrap();
                if !usable.all(blocks.clone(), true) {
                    continue;
                }
                usable.set(blocks.clone(), false);
                drop(usable);
                match self.device.unplug(blocks.clone()) {
                    Answer::Ack => {
                        self.changes.fetch_add(1, Ordering::Relaxed);
                    }
                    Answer::Busy => self.usable.write().unwrap().set(blocks, true),
                    Answer::Error => panic!("what is usable is plugged"),
                }
            }
        }
    }

    fn run_vcpu(&self, mut random: Random) {
        let _ends = Ends(self);
        while !self.end.load(Ordering::Relaxed) {
            let page = random.below(1024);
            let block = (page * PAGE / BLOCK) as usize;
            let running = self.running.read().unwrap();
            let usable = self.usable.read().unwrap();
            if *running && usable.all(block..block + 1, true) {
                let byte = random.next() as u8;
                let at = page * PAGE + random.below(PAGE / 8) * 8;
                self.mapping.write(at, &[byte; 8]);
                self.writes.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

impl Guest for Busy {
    fn stop(&self) -> Result<(), String> {
        *self.running.write().unwrap() = false;
        let mut memory = vec![0; 16 * BLOCK as usize];
        self.region.read_exact_at(&mut memory, 0).unwrap();
        *self.instant.lock().unwrap() = Some((memory, self.device.plugged()));
        Ok(())
    }

    fn run(&self) -> Result<(), String> {
        let before = self.changes.load(Ordering::Relaxed);
        *self.running.write().unwrap() = true;
        while self.changes.load(Ordering::Relaxed) < before + self.ahead {
            self.wait();
        }
        Ok(())
    }
}

/// Saves a guest with this seed; how many pages were saved before they were discarded.
fn one(seed: u64) -> u64 {
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let plugged: Vec<_> = (0..16).filter(|_| random.below(3) != 0).collect();
    let region = memfd(16 * BLOCK);
    let device = Device::new(&region, &plugged, None);
    let side = side_of(region, &device);
    let region = &side.region;
    for &block in &plugged {
        let pages = block as u64 * 64..(block as u64 + 1) * 64;
        pages.filter(|_| random.below(4) != 0).for_each(|page| {
            fill(region, page..page + 1, (page % 255) as u8);
        });
    }
    let mut usable = BlockBitmap::new(16);
    plugged.iter().for_each(|&block| usable.set(block..block + 1, true));
    let guest = Busy {
        device: Arc::clone(&device),
        mapping: Arc::clone(side.blocks.get("vmem0").unwrap().mapping()),
        region: region.try_clone().unwrap(),
        running: RwLock::new(true),
        usable: RwLock::new(usable),
        end: AtomicBool::new(false),
        failed: AtomicBool::new(false),
        changes: AtomicUsize::new(0),
        writes: AtomicU64::new(0),
        ahead: random.below(12) as usize,
        instant: Mutex::default(),
    };
    let file = tempfile::tempfile().unwrap();
    let (saved, seen) = thread::scope(|scope| {
        let ends = Ends(&guest);
        let driver = Random(random.next());
        scope.spawn(|| guest.drive(driver));
        for _ in 0..2 {
            let vcpu = Random(random.next());
            scope.spawn(|| guest.run_vcpu(vcpu));
        }
        let saved = save_while(&side, &file, &guest);
        // vCPUs and driver continue, without anything left that they could wait for.
        let (writes, changes) = (&guest.writes, &guest.changes);
        let before = (writes.load(Ordering::Relaxed), changes.load(Ordering::Relaxed));
        while writes.load(Ordering::Relaxed) < before.0 + 20
            || changes.load(Ordering::Relaxed) < before.1 + 4
        {
            guest.wait();
        }
        drop(ends);
        saved
    });
    saved.unwrap();
    let (memory, plugged) = guest.instant.into_inner().unwrap().unwrap();
    let to = Side::new(&plugged);
    restore_from(&to, &file).unwrap();
    for (page, expected) in (0..1024).zip(memory.chunks_exact(PAGE as usize)) {
        assert!(to.page(page) == expected, "seed {seed}: page {page} is not of the instant");
    }
    assert_eq!((leaked(&side), leaked(&to)), (0, 0), "seed {seed}: discarded memory is held");
    assert_eq!(seen.remaining, 0, "seed {seed}");
    seen.saved_before_discard
}

#[test]
fn an_image_is_the_instant_whatever_is_plugged_unplugged_and_written_meanwhile() {
    let early: u64 = (0..100).map(one).sum();
    assert!(early > 500, "hardly a page was discarded while it was outstanding: {early}");
}
