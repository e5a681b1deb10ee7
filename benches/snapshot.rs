//! Snapshots against bare loops that write and read as many bytes, through the page cache and past it;
//! what a running guest feels of one; and how soon a restored guest can go on.

#[expect(dead_code, reason = "each bench uses its part")]
mod common;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::{compare, head, memfd, report};
use migration::lazy::HandlerFailed;
use migration::ram::{BlockOptions, MigrationBlock, RamBlocks};
use migration::snapshot::{
    FileIo, Restore, RunningGuest, StoppedGuest, restore, restore_lazily, save, save_in_background,
};
use migration::stream::Configuration;
use migration::{Guest, MigrationError, NoDevices, Progress};
use ram_discard::memory::{HostMapping, RamBlock};
use rustix::fs::OFlags;

const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;
/// The guest has this much and touched the first part of it.
const SIZE: u64 = 8 << 30;
const TOUCHED: u64 = 512 * MIB;
const RUNS: usize = 5;

struct Stop;

impl HandlerFailed for Stop {
    fn handler_failed(&self, error: &MigrationError) {
        panic!("{error}");
    }
}

struct Side {
    block: Arc<MigrationBlock>,
    blocks: Arc<RamBlocks>,
}

fn side() -> Side {
    let file = memfd(SIZE);
    let ram = RamBlock::new("ram".into(), 0, SIZE, file, 0).unwrap();
    let block = MigrationBlock::map(Arc::new(ram), BlockOptions::migratable()).unwrap();
    let block = Arc::new(block);
    let mut blocks = RamBlocks::new();
    blocks.register(Arc::clone(&block)).unwrap();
    Side { block, blocks: Arc::new(blocks) }
}

fn fill(mapping: &HostMapping) {
    let bytes: Vec<u8> = (0..MIB).map(|i| (i % 251) as u8 | 1).collect();
    (0..TOUCHED).step_by(MIB as usize).for_each(|at| mapping.write(at, &bytes));
}

/// Touches and frees as much memory as a run takes, so that the host has it at hand.
fn warm() {
    fill(side().block.mapping());
}

fn save_stopped(side: &Side, file: &File, io: FileIo) -> Duration {
    let stopped = StoppedGuest {
        configuration: Configuration::new("bench"),
        blocks: &side.blocks,
        devices: &mut NoDevices,
        io,
        progress: Arc::new(Progress::new()),
    };
    let start = Instant::now();
    save(stopped, file).unwrap();
    start.elapsed()
}

/// What a bare loop does with the pieces of a file.
#[derive(Clone, Copy, PartialEq)]
enum Bare {
    /// Writes each. They are on the disk at the end.
    Write,
    /// Reads each to the same buffer of a thread: the disk alone.
    Read,
    /// Reads each, and writes it to fresh memory, as a restore has to.
    Load,
}

/// What the disk takes or gives of such pieces, by as many threads, with nothing to do but that: as fio would
/// measure it.
fn bare(file: &File, io: FileIo, what: Bare) -> Duration {
    let writes = what == Bare::Write;
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let flags = if io.direct { OFlags::DIRECT.bits().cast_signed() } else { 0 };
    let opened = File::options().read(true).write(writes).custom_flags(flags).open(path).unwrap();
    if writes {
        file.set_len(TOUCHED).unwrap();
    }
    let memory = memfd(TOUCHED);
    let next = AtomicU64::new(0);
    let start = Instant::now();
    thread::scope(|scope| {
        for _ in 0..io.threads {
            scope.spawn(|| {
                let mut bytes = vec![1; 2 * MIB as usize];
                let start = bytes.as_ptr().align_offset(PAGE as usize);
                let piece = &mut bytes[start..start + MIB as usize];
                loop {
                    let at = next.fetch_add(MIB, Ordering::Relaxed);
                    if at >= TOUCHED {
                        break;
                    }
                    if writes {
                        opened.write_all_at(piece, at).unwrap();
                        continue;
                    }
                    opened.read_exact_at(piece, at).unwrap();
                    if what == Bare::Load {
                        memory.write_all_at(piece, at).unwrap();
                    }
                }
            });
        }
    });
    if writes {
        file.sync_data().unwrap();
    }
    start.elapsed()
}

/// Takes a file out of the page cache.
fn cool(file: &File) {
    file.sync_all().unwrap();
    rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
}

fn restore_cold(to: &Side, file: &File, io: FileIo) -> Duration {
    cool(file);
    let (blocks, progress) = (Arc::clone(&to.blocks), Arc::new(Progress::new()));
    let configuration = Configuration::new("bench");
    let devices = &mut NoDevices;
    let start = Instant::now();
    restore(Restore { configuration, blocks, devices, io, progress }, file).unwrap();
    start.elapsed()
}

/// Ways of moving pages.
fn ways() -> impl Iterator<Item = (String, FileIo)> {
    [false, true].into_iter().flat_map(|direct| {
        [1, 2, 4].map(|threads| {
            let how = if direct { "past the page cache" } else { "through the page cache" };
            (format!("{how}, {threads} threads"), FileIo { threads, direct })
        })
    })
}

fn disk() {
    let guest = side();
    fill(guest.block.mapping());
    head("Saving 512 MiB of 8 GiB to the disk", "bare write");
    for (what, io) in ways() {
        let bare = || bare(&temporary(), io, Bare::Write);
        compare(&what, RUNS, || save_stopped(&guest, &temporary(), io), bare);
    }
    let file = temporary();
    save_stopped(&guest, &file, FileIo::default());
    let plain = temporary();
    bare(&plain, FileIo::default(), Bare::Write);
    drop(guest);
    for (peer, does) in [("disk alone", Bare::Read), ("bare load", Bare::Load)] {
        head("Loading it, from a cold cache", peer);
        for (what, io) in ways() {
            let ours = || {
                warm();
                restore_cold(&side(), &file, io)
            };
            let bare = || {
                warm();
                cool(&plain);
                bare(&plain, io, does)
            };
            compare(&what, RUNS, ours, bare);
        }
    }
}

/// A guest that writes all that it has, over and over, with stops.
struct Writing {
    mapping: Arc<HostMapping>,
    stopped: AtomicBool,
    idle: AtomicBool,
    end: AtomicBool,
    written: AtomicU64,
}

impl Writing {
    fn run_vcpu(&self) {
        let mut page = 0;
        while !self.end.load(Ordering::Relaxed) {
            if self.stopped.load(Ordering::Acquire) {
                self.idle.store(true, Ordering::Release);
                thread::sleep(Duration::from_micros(100));
                continue;
            }
            self.idle.store(false, Ordering::Release);
            for _ in 0..64 {
                self.mapping.write(page * PAGE, &page.to_le_bytes());
                page = (page + 7919) % (TOUCHED / PAGE);
            }
            self.written.fetch_add(64, Ordering::Relaxed);
        }
    }
}

impl Guest for Writing {
    fn stop(&self) -> Result<(), String> {
        self.stopped.store(true, Ordering::Release);
        while !self.idle.load(Ordering::Acquire) {
            thread::sleep(Duration::from_micros(50));
        }
        Ok(())
    }

    fn run(&self) -> Result<(), String> {
        self.idle.store(false, Ordering::Release);
        self.stopped.store(false, Ordering::Release);
        Ok(())
    }
}

/// Pages written by a guest while `during` happens, each second.
fn throughput(side: &Side, during: impl FnOnce(&Writing)) -> (f64, Duration) {
    let guest = Writing {
        mapping: Arc::clone(side.block.mapping()),
        stopped: AtomicBool::new(false),
        idle: AtomicBool::new(false),
        end: AtomicBool::new(false),
        written: AtomicU64::new(0),
    };
    thread::scope(|scope| {
        scope.spawn(|| guest.run_vcpu());
        thread::sleep(Duration::from_millis(20));
        let (before, start) = (guest.written.load(Ordering::Relaxed), Instant::now());
        during(&guest);
        let took = start.elapsed();
        let pages = guest.written.load(Ordering::Relaxed) - before;
        guest.end.store(true, Ordering::Relaxed);
        (pages as f64 / took.as_secs_f64(), took)
    })
}

fn temporary() -> File {
    tempfile::tempfile_in(std::env::temp_dir()).unwrap()
}

fn saving() {
    let guest = side();
    fill(guest.block.mapping());
    println!("\nA running guest that writes all its memory over and over: pages a second");
    let (mut none, mut background, mut stopped, mut downtime) = (vec![], vec![], vec![], vec![]);
    for _ in 0..RUNS {
        none.push(throughput(&guest, |_| thread::sleep(Duration::from_millis(500))).0);
        let progress = Arc::new(Progress::new());
        background.push(
            throughput(&guest, |running| {
                let running = RunningGuest {
                    configuration: Configuration::new("bench"),
                    blocks: &guest.blocks,
                    devices: &mut NoDevices,
                    guest: running,
                    progress: Arc::clone(&progress),
                };
                save_in_background(running, &temporary()).unwrap();
            })
            .0,
        );
        downtime.push(progress.snapshot().downtime.unwrap_or_default());
        stopped.push(throughput(&guest, |running| {
            running.stop().unwrap();
            save_stopped(&guest, &temporary(), FileIo::default());
            running.run().unwrap();
        }));
    }
    let middle = |values: &mut Vec<f64>| {
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    let whole = middle(&mut none);
    downtime.sort();
    let pause: &mut Vec<f64> = &mut stopped.iter().map(|run| run.1.as_secs_f64() * 1e3).collect();
    println!("{:<58} {whole:>12.0}", "no snapshot");
    println!(
        "{:<58} {:>12.0} {:>7.2}x   stopped for {:.1} ms",
        "background snapshot",
        middle(&mut background),
        middle(&mut background) / whole,
        downtime[downtime.len() / 2].as_secs_f64() * 1e3,
    );
    println!(
        "{:<58} {:>12.0} {:>7.2}x   stopped for {:.1} ms",
        "stopped and copied",
        0,
        0.0,
        middle(pause),
    );
}

fn restoring() {
    let guest = side();
    fill(guest.block.mapping());
    let file = Arc::new(temporary());
    save_stopped(&guest, &file, FileIo::default());
    drop(guest);
    let what = |to: &Side| -> (Arc<RamBlocks>, Arc<Progress>) {
        (Arc::clone(&to.blocks), Arc::new(Progress::new()))
    };
    head(
        "Restore of 512 MiB: until the guest reads its first byte, and until all is there",
        "eager",
    );
    let (mut first, mut all) = (Vec::new(), Vec::new());
    for _ in 0..=RUNS {
        warm();
        let to = side();
        let (blocks, progress) = what(&to);
        let start = Instant::now();
        let configuration = Configuration::new("bench");
        let devices = &mut NoDevices;
        let lazy = Restore { configuration, blocks, devices, io: FileIo::default(), progress };
        let lazy = restore_lazily(lazy, Arc::clone(&file), Arc::new(Stop)).unwrap();
        let mut byte = [0];
        to.block.mapping().read(TOUCHED / 2, &mut byte);
        let lazy_first = start.elapsed();
        lazy.wait().unwrap();
        let lazy_all = start.elapsed();
        assert_eq!(byte, [1]);
        drop(to);
        warm();
        let to = side();
        let (blocks, progress) = what(&to);
        let start = Instant::now();
        let configuration = Configuration::new("bench");
        let devices = &mut NoDevices;
        let io = FileIo { threads: 2, direct: false };
        restore(Restore { configuration, blocks, devices, io, progress }, &file).unwrap();
        let eager = start.elapsed();
        first.push((lazy_first, eager));
        all.push((lazy_all, eager));
        assert_eq!(to.block.ram().backing().file().metadata().unwrap().blocks() * 512, TOUCHED);
    }
    report("lazy: first access", &first[1..]);
    report("lazy: all", &all[1..]);
}

/// All, or what is named: `cargo bench --bench snapshot -- disk`.
fn main() {
    let named: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    let sections: [(&str, fn()); 3] =
        [("disk", disk), ("saving", saving), ("restoring", restoring)];
    for (name, section) in sections {
        if named.is_empty() || named.iter().any(|named| named == name) {
            section();
        }
    }
}
