//! What finding written pages costs the guest and the source: 1 GiB of data, strewn over a sparse
//! block. Write-protection is held against bare calls of the same mechanism (UFFDIO_WRITEPROTECT and
//! PAGEMAP_SCAN) on just the memory that has data, which they are told, and against protecting all of
//! the block, which is what a tracker has to do that is not told; the guest's first write against a
//! write that is not tracked; the log of vhost-user back-ends against a word-wise OR of the same bytes.
//!
//! Times are the CPU's: nothing here waits. Clearing is no row of its own: these trackers protect, or
//! take out, what they report as they report it. KVM's log is not here, since a slot can only be
//! named in `unsafe` code.

#[expect(dead_code, reason = "each bench uses its part")]
mod common;

use std::hint::black_box;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use migration::dirty::{DirtyTracker, LoggedRange, Merged, VhostLog, WriteProtect};
use migration::page_bitmap::PageBitmap;
use migration::sys::pagemap::{Pagemap, Written};
use migration::sys::userfaultfd::AsyncWriteProtect;
use ram_discard::ByteRange;
use ram_discard::memory::{HostMapping, RamBlock};

use common::{busy, compare, head, memfd, random, report};

const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const DATA: u64 = GIB;
/// Data comes in runs of this many bytes, as far from each other as the block allows.
const RUN: u64 = 16 * MIB;
/// Memory that the guest touches for the first time while writes are tracked: one piece in each
/// gap.
const FRESH: u64 = 2 * MIB;
const SHARES: [(&str, u64); 4] = [("none", 0), ("1 %", 1), ("10 %", 10), ("all", 100)];
const RUNS: usize = 7;

struct Block {
    ram: Arc<RamBlock>,
    mapping: Arc<HostMapping>,
    whole: ByteRange,
    data: Vec<ByteRange>,
    gaps: Vec<ByteRange>,
}

impl Block {
    /// All its data is there and mapped, so that what is measured is not the first touch.
    fn new(size: u64) -> Self {
        let file = memfd(size);
        let mapping = Arc::new(HostMapping::map(&file, 0, size).unwrap());
        let ram = Arc::new(RamBlock::new("ram".into(), 0, size, file, 0).unwrap());
        let stride = size / (DATA / RUN);
        let starts = || (0..size).step_by(stride as usize);
        let data: Vec<_> = starts().map(|at| ByteRange::new(at, RUN).unwrap()).collect();
        let gaps = starts().map(|at| ByteRange::new(at + RUN + 2 * MIB, FRESH).unwrap()).collect();
        let block = Self { ram, mapping, whole: ByteRange::new(0, size).unwrap(), data, gaps };
        block.write(&block.pages(&block.data, 100));
        block
    }

    /// The first bytes of so many percent of the pages of `ranges`, at random, ascending.
    fn pages(&self, ranges: &[ByteRange], percent: u64) -> Vec<u64> {
        let mut seed = 0x9e37_79b9_7f4a_7c15;
        let pages = ranges.iter().flat_map(|range| range.chunks(PAGE)).map(ByteRange::start);
        pages.filter(|_| random(&mut seed) % 100 < percent).collect()
    }

    /// What the guest does.
    fn write(&self, pages: &[u64]) {
        pages.iter().for_each(|at| self.mapping.write(*at, &at.to_le_bytes()));
    }

    fn tracker(&self) -> WriteProtect {
        WriteProtect::new(Arc::clone(&self.mapping), Some(Arc::clone(&self.ram))).unwrap()
    }

    fn bitmap(&self) -> PageBitmap {
        PageBitmap::new(self.whole.len() / PAGE)
    }

    fn bare(&self, ranges: &[ByteRange]) -> AsyncWriteProtect {
        let bare = AsyncWriteProtect::open().unwrap();
        bare.register(&self.mapping, 0, self.whole.len()).unwrap();
        ranges.iter().for_each(|range| bare.protect(&self.mapping, *range).unwrap());
        bare
    }

    /// Discards what the guest has touched for the first time.
    fn forget_fresh(&self) {
        let backing = self.ram.backing();
        self.gaps.iter().for_each(|gap| backing.discard(gap.in_file(0).unwrap()).unwrap());
    }
}

/// What a round of tracking takes.
struct Round {
    start: Duration,
    write: Duration,
    /// The same write with no protection.
    plain_write: Duration,
    sync: Duration,
}

fn ours(block: &Block, pages: &[u64]) -> Round {
    let (mut tracker, mut dirty) = (block.tracker(), block.bitmap());
    let start = busy(|| tracker.start(&[block.whole]).unwrap());
    let write = busy(|| block.write(pages));
    let sync = busy(|| tracker.sync(&mut dirty).unwrap());
    assert_eq!(dirty.count(), pages.len() as u64);
    tracker.stop().unwrap();
    Round { start, write, plain_write: write, sync }
}

/// The same by bare calls.
fn bare(block: &Block, pages: &[u64]) -> Round {
    let mut pagemap = Pagemap::open().unwrap();
    let mut protection = None;
    let start = busy(|| protection = Some(block.bare(&block.data)));
    let write = busy(|| block.write(pages));
    let mut found = 0;
    let sync = busy(|| {
        for range in &block.data {
            let visit = |run: ByteRange| found += run.len() / PAGE;
            pagemap.take_written(&block.mapping, *range, Written::Unprotected, visit).unwrap();
        }
    });
    assert_eq!(found, pages.len() as u64);
    drop(protection);
    // Once more with the protection gone, so that no fault is left.
    block.write(pages);
    let plain_write = busy(|| block.write(pages));
    Round { start, write, plain_write, sync }
}

fn write_protection(block: &Block) {
    let mut starts = Vec::new();
    let (mut writes, mut plain_writes) = (Vec::new(), Vec::new());
    let mut syncs = Vec::new();
    for (name, percent) in SHARES {
        let pages = block.pages(&block.data, percent);
        let rounds: Vec<_> =
            (0..=RUNS).map(|_| (ours(block, &pages), bare(block, &pages))).skip(1).collect();
        let of = |what: fn(&Round) -> Duration, parts: u32| -> Vec<_> {
            rounds.iter().map(|(a, b)| (what(a) / parts, what(b) / parts)).collect()
        };
        starts.extend(of(|round| round.start, 1));
        syncs.push((name, of(|round| round.sync, 1)));
        if percent != 0 {
            let pages = u32::try_from(pages.len()).unwrap();
            writes.push((name, of(|round| round.write, pages)));
            plain_writes.push((name, of(|round| round.plain_write, pages)));
        }
    }
    let size = block.whole.len() / GIB;
    head(&format!("Write-protection, 1 GiB of data in a block of {size} GiB"), "bare calls");
    report("start", &starts);
    for (name, rounds) in &syncs {
        report(&format!("sync, written pages: {name}"), rounds);
    }
    compare(
        "sync, 128 MiB touched for the first time",
        RUNS,
        || {
            let (mut tracker, mut dirty) = (block.tracker(), block.bitmap());
            tracker.start(&[block.whole]).unwrap();
            block.write(&block.pages(&block.gaps, 100));
            let sync = busy(|| tracker.sync(&mut dirty).unwrap());
            assert_eq!(dirty.count() * PAGE, FRESH * block.gaps.len() as u64);
            block.forget_fresh();
            sync
        },
        || {
            let bare = block.bare(&block.data);
            block.write(&block.pages(&block.gaps, 100));
            let sync = busy(|| {
                block.gaps.iter().for_each(|gap| bare.protect(&block.mapping, *gap).unwrap());
            });
            block.forget_fresh();
            sync
        },
    );
    for (peer, writes) in [("bare calls", &writes), ("no tracker", &plain_writes)] {
        head("    the guest's first write to a page", peer);
        for (name, rounds) in writes {
            report(&format!("each write, written pages: {name}"), rounds);
        }
    }
    head("    and if it is not told where the data is", "all of it");
    let start = || ours(block, &[]).start;
    compare("start", 3, start, || busy(|| drop(block.bare(&[block.whole]))));
}

/// A log of `pages` pages with so many percent of the bits set, as words.
fn log_words(pages: u64, percent: u64) -> Vec<u64> {
    let mut seed = 0x2545_f491_4f6c_dd1d;
    let mut bit = |at: u64| u64::from(random(&mut seed) % 100 < percent) << at;
    (0..pages / 64).map(|_| (0..64).fold(0, |word, at| word | bit(at))).collect()
}

fn log_of(block: ByteRange) -> (Arc<HostMapping>, VhostLog) {
    let bytes = block.len() / PAGE / 8;
    let log = Arc::new(HostMapping::map(&memfd(bytes), 0, bytes).unwrap());
    let tracker =
        VhostLog::new(Arc::clone(&log), vec![LoggedRange { guest_addr: 0, range: block }]);
    (log, tracker.unwrap())
}

/// A log that others write at the same time can only be taken out atomically, word by word; the other
/// peer is what memory allows.
fn vhost_log() {
    let block = ByteRange::new(0, 64 * GIB).unwrap();
    let pages = block.len() / PAGE;
    let (log, mut tracker) = log_of(block);
    let (mut dirty, mut plain) = (PageBitmap::new(pages), vec![0; (pages / 64) as usize]);
    for atomically in [true, false] {
        let peer = if atomically { "swap, OR" } else { "plain OR" };
        head("Sync of a back-end's log, block of 64 GiB", peer);
        for (name, percent) in SHARES {
            let words = log_words(pages, percent);
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            let ours = || {
                log.write(0, &bytes);
                dirty.clear_all();
                busy(|| tracker.sync(&mut dirty).unwrap())
            };
            compare(&format!("written pages: {name}"), RUNS, ours, || {
                plain.fill(0);
                if atomically { swap_or(&words, &mut plain) } else { plain_or(&words, &mut plain) }
            });
            assert_eq!(dirty.words(), plain);
        }
    }
}

fn swap_or(log: &[u64], dirty: &mut [u64]) -> Duration {
    let log: Vec<_> = log.iter().copied().map(AtomicU64::new).collect();
    busy(|| {
        for (dirty, log) in black_box(dirty).iter_mut().zip(&log) {
            if log.load(Ordering::Relaxed) != 0 {
                *dirty |= log.swap(0, Ordering::AcqRel);
            }
        }
    })
}

fn plain_or(log: &[u64], dirty: &mut [u64]) -> Duration {
    let mut log = log.to_vec();
    busy(|| {
        for (dirty, log) in black_box(dirty).iter_mut().zip(black_box(&mut log)) {
            *dirty |= std::mem::take(log);
        }
    })
}

/// Two trackers of one block: writes of vCPUs, and of a back-end that logs.
fn merged(block: &Block) {
    head("Sync of write-protection and a log as one, 8 GiB", "by hand");
    let pages = block.pages(&block.data, 10);
    let log_bytes = block.whole.len() / PAGE / 8;
    let bytes: Vec<u8> =
        log_words(log_bytes * 8, 1).iter().flat_map(|word| word.to_le_bytes()).collect();
    let round = |trackers: fn(WriteProtect, VhostLog) -> Vec<Box<dyn DirtyTracker>>| {
        let (log, vhost) = log_of(block.whole);
        let mut trackers = trackers(block.tracker(), vhost);
        trackers.iter_mut().for_each(|tracker| tracker.start(&[block.whole]).unwrap());
        block.write(&pages);
        log.write(0, &bytes);
        let mut dirty = block.bitmap();
        busy(|| trackers.iter_mut().for_each(|tracker| tracker.sync(&mut dirty).unwrap()))
    };
    compare(
        "10 % written by the guest, 1 % by a back-end",
        RUNS,
        || {
            round(|guest, vhost| {
                vec![Box::new(Merged::new(vec![Box::new(guest), Box::new(vhost)]))]
            })
        },
        || round(|guest, vhost| vec![Box::new(guest), Box::new(vhost)]),
    );
}

/// An idle sync of a region of which every other block of 2 MiB is plugged, and holds a page.
fn tatters() {
    const REGION: u64 = 1024 * GIB;
    let file = memfd(REGION);
    let mapping = Arc::new(HostMapping::map(&file, 0, REGION).unwrap());
    let ram = Arc::new(RamBlock::new("vmem0".into(), 0, REGION, file, 0).unwrap());
    let plugged: Vec<_> = (0..REGION)
        .step_by((4 * MIB) as usize)
        .map(|at| ByteRange::new(at, 2 * MIB).unwrap())
        .collect();
    plugged.iter().for_each(|range| mapping.write(range.start(), &[1]));
    let mut dirty = PageBitmap::new(REGION / PAGE);
    head("A sync of 1 TiB in tatters, nothing written", "bare calls");
    compare(
        "every other block plugged",
        RUNS,
        || {
            let mut tracker =
                WriteProtect::new(Arc::clone(&mapping), Some(Arc::clone(&ram))).unwrap();
            tracker.start(&plugged).unwrap();
            let sync = busy(|| tracker.sync(&mut dirty).unwrap());
            assert_eq!(dirty.count(), 0);
            sync
        },
        || {
            let bare = AsyncWriteProtect::open().unwrap();
            bare.register(&mapping, 0, REGION).unwrap();
            plugged.iter().for_each(|range| bare.protect(&mapping, *range).unwrap());
            let mut pagemap = Pagemap::open().unwrap();
            let visit = |run: ByteRange| panic!("nothing wrote {run}");
            busy(|| {
                for range in &plugged {
                    pagemap.take_written(&mapping, *range, Written::Unprotected, visit).unwrap();
                }
            })
        },
    );
}

fn main() -> io::Result<()> {
    // What cannot be had here is told once, before anything is measured.
    AsyncWriteProtect::open()?;
    tatters();
    for size in [8 * GIB, 64 * GIB] {
        let block = Block::new(size);
        write_protection(&block);
        if size == 8 * GIB {
            merged(&block);
        }
    }
    vhost_log();
    Ok(())
}
