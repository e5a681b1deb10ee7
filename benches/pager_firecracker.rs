//! Guests of Firecracker: what a fault costs, also while all memory is being placed; 25 restores of one image at once, a
//! working set that was recorded against ascending order, and all memory at once against a bare loop. The VMM is the small
//! VMM's, in the pager's process. With `--quick`, a quarter of the memory.

#[expect(dead_code, reason = "each bench uses its part")]
mod common;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use clap::Parser;
use migration::lazy::vmm_faults::{Event, MESSAGE_LEN, Stop, VmmFaults};
use ram_discard::ByteRange;
use ram_discard::memory::HostMapping;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Advice, fadvise};
use small_vmm::firecracker::{PAGE, Vm};
use vmem_pager::cli::args::{Args, Command};
use vmem_pager::cli::report::Report;
use vmem_pager::firecracker::{RestoreMetrics, run};
use vmem_pager::run::Run;

const MIB: u64 = 1 << 20;
const FAULTS: u64 = 4096;
/// Pages between those that are touched while all memory is being placed.
const FARTHER: u64 = 16;
const RUNS: usize = 5;
/// Guests of one image.
const GUESTS: usize = 25;
/// Pages of a working set.
const SET: u64 = 2048;

/// A snapshot in a folder.
struct Snapshot {
    dir: tempfile::TempDir,
    file: File,
    len: u64,
}

impl Snapshot {
    fn new(len: u64) -> Self {
        // Beside the sources, which are on a disk: what is in memory is never cold.
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let file = File::create_new(dir.path().join("memory")).unwrap();
        for at in (0..len).step_by(MIB as usize) {
            file.write_all_at(&[7; MIB as usize], at).unwrap();
        }
        file.sync_all().unwrap();
        std::fs::write(dir.path().join("state"), [1; 64]).unwrap();
        let file = File::open(dir.path().join("memory")).unwrap();
        Self { dir, file, len }
    }

    fn pages(&self) -> u64 {
        self.len / PAGE
    }

    /// A VMM with as much memory.
    fn vm(&self) -> Vm {
        Vm::new(&[(self.pages(), PAGE)])
    }

    /// Discards what the host has of the memory file.
    fn cool(&self) {
        fadvise(&self.file, 0, None, Advice::DontNeed).unwrap();
    }

    /// Starts a pager, which listens on the socket when this returns.
    fn restore(&self, name: &str, more: &str) -> (PathBuf, JoinHandle<()>) {
        let dir = self.dir.path().display();
        let socket = self.dir.path().join(name);
        let words = format!(
            "vmem-pager restore --vmm firecracker --socket {dir}/{name} --image {dir}/state --memory-file \
             {dir}/memory {more}"
        );
        let args = Args::try_parse_from(words.split_whitespace()).unwrap();
        let Command::Restore(args) = args.command else { unreachable!() };
        let restore = move || {
            run(&args, &Run::new(None), &Report::silent(), &RestoreMetrics::new()).unwrap();
        };
        let thread = thread::spawn(restore);
        while !socket.exists() {
            thread::sleep(Duration::from_millis(1));
        }
        (socket, thread)
    }
}

/// Touches and frees as much memory as a run takes, so that the host has it at hand.
fn warm(len: u64) {
    let file = common::memfd(len);
    for at in (0..len).step_by(MIB as usize) {
        file.write_all_at(&[1; MIB as usize], at).unwrap();
    }
}

/// Reads pages far from each other; how long each took.
fn touch(vm: &Vm, pages: u64) -> Vec<Duration> {
    touch_all(vm, (0..FAULTS).map(|n| n * 13 % pages))
}

/// Reads pages of the last half, from the end on: those that what is placed ascending comes to last.
fn touch_beside(vm: &Vm, pages: u64) -> Vec<Duration> {
    touch_all(vm, (1..=pages / FARTHER / 2).map(|n| pages - n * FARTHER))
}

fn touch_all(vm: &Vm, pages: impl Iterator<Item = u64>) -> Vec<Duration> {
    let touch = |page| {
        let start = Instant::now();
        vm.read(page);
        start.elapsed()
    };
    let mut times: Vec<_> = pages.map(touch).collect();
    times.sort();
    times
}

fn quantile(times: &[Duration], share: f64) -> Duration {
    times[(times.len() as f64 * share) as usize]
}

/// Faults of a guest whose pager places nothing else meanwhile.
fn pager(snapshot: &Snapshot) -> Vec<Duration> {
    warm(snapshot.len);
    let (socket, restore) = snapshot.restore("s", "--bandwidth 4K");
    let vm = snapshot.vm();
    vm.load(&socket);
    let times = touch(&vm, snapshot.pages());
    // By these it ends; the rest is not asked for.
    vm.discard(ByteRange::new(0, snapshot.len).unwrap());
    restore.join().unwrap();
    times
}

/// A handler in a thread that answers faults, each with what `page` puts into the buffer, and nothing else.
fn handler(snapshot: &Snapshot, page: impl Fn(u64, &mut [u8]) + Sync) -> Vec<Duration> {
    handler_with(snapshot, page, |vm, _| touch(vm, snapshot.pages()))
}

/// As that, with other work of the guest.
fn handler_with(
    snapshot: &Snapshot,
    page: impl Fn(u64, &mut [u8]) + Sync,
    work: impl Fn(&Vm, &VmmFaults) -> Vec<Duration>,
) -> Vec<Duration> {
    warm(snapshot.len);
    let vm = snapshot.vm();
    let over = AtomicBool::new(false);
    let base = vm.base();
    let uffd = VmmFaults::new(vm.uffd().try_clone().unwrap()).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            let messages = HostMapping::map(&common::memfd(PAGE), 0, PAGE).unwrap();
            let mut buffer = vec![0; PAGE as usize];
            let mut message = [0; MESSAGE_LEN];
            while !over.load(Ordering::Relaxed) {
                let wait = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
                let _ = poll(&mut [PollFd::new(&uffd, PollFlags::IN)], Some(&wait));
                for index in 0..uffd.read(&messages, 0, 32).unwrap() {
                    messages.read((index * MESSAGE_LEN) as u64, &mut message);
                    if let Some(Event::Missing { address }) = Event::decode(&message) {
                        let address = address / PAGE * PAGE;
                        page(address - base, &mut buffer);
                        let filled = uffd.copy(address, &buffer).unwrap();
                        if filled.stop == Stop::Exists {
                            uffd.wake(address, PAGE).unwrap();
                        }
                    }
                }
            }
        });
        let times = work(&vm, &uffd);
        over.store(true, Ordering::Relaxed);
        times
    })
}

/// Faults of a guest whose pager places all else meanwhile, as fast as it can.
fn pager_beside(snapshot: &Snapshot) -> Vec<Duration> {
    warm(snapshot.len);
    let (socket, restore) = snapshot.restore("s", "");
    let vm = snapshot.vm();
    vm.load(&socket);
    let times = touch_beside(&vm, snapshot.pages());
    restore.join().unwrap();
    times
}

/// Faults of a guest with the smallest handler, and a bare loop beside it that places all memory.
fn handler_beside(snapshot: &Snapshot) -> Vec<Duration> {
    let read = |at, buffer: &mut [u8]| snapshot.file.read_exact_at(buffer, at).unwrap();
    let work = |vm: &Vm, uffd: &VmmFaults| {
        thread::scope(|scope| {
            scope.spawn(|| fill(snapshot, vm, uffd, 0, 1));
            touch_beside(vm, snapshot.pages())
        })
    };
    handler_with(snapshot, read, work)
}

/// Places each of `of` pieces of memory, from the piece `first` on.
fn fill(snapshot: &Snapshot, vm: &Vm, uffd: &VmmFaults, first: u64, of: u64) {
    const PIECE: u64 = 128 << 10;
    let mut buffer = vec![0; PIECE as usize];
    for at in (first * PIECE..snapshot.len).step_by((of * PIECE) as usize) {
        snapshot.file.read_exact_at(&mut buffer, at).unwrap();
        let mut done = 0;
        while done < PIECE {
            let filled = uffd.copy(vm.base() + at + done, &buffer[done as usize..]).unwrap();
            // One that is there is skipped.
            done += filled.bytes + if filled.stop == Stop::Exists { PAGE } else { 0 };
        }
    }
}

fn faults_beside(snapshot: &Snapshot) {
    let title =
        "A fault while all memory is being placed, against the smallest handler and a bare loop";
    common::head(title, "loop");
    let rounds: Vec<_> =
        (0..=RUNS).map(|_| (pager_beside(snapshot), handler_beside(snapshot))).skip(1).collect();
    for (name, share) in [("p50", 0.5), ("p99", 0.99)] {
        let of = |(ours, peer): &(Vec<_>, Vec<_>)| (quantile(ours, share), quantile(peer, share));
        common::report(name, &rounds.iter().map(of).collect::<Vec<_>>());
    }
}

fn faults(snapshot: &Snapshot) {
    let bare = || handler(snapshot, |_, _| {});
    let smallest =
        || handler(snapshot, |at, buffer| snapshot.file.read_exact_at(buffer, at).unwrap());
    for (title, peer) in [
        ("A fault, against a bare UFFDIO_COPY loop", &bare as &dyn Fn() -> Vec<Duration>),
        ("A fault, against the smallest handler, which reads the file", &smallest),
    ] {
        common::head(title, "loop");
        let rounds: Vec<_> = (0..=RUNS).map(|_| (pager(snapshot), peer())).skip(1).collect();
        for (name, share) in [("p50", 0.5), ("p99", 0.99)] {
            let of =
                |(ours, peer): &(Vec<_>, Vec<_>)| (quantile(ours, share), quantile(peer, share));
            common::report(name, &rounds.iter().map(of).collect::<Vec<_>>());
        }
    }
}

/// Bytes of this process that are resident and its own, without files.
fn anonymous() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches(" kB").trim().parse::<u64>().unwrap() << 10
}

/// Many guests of one image that begin at once: how long until each has its first page, and what is held.
fn many(guest: u64) {
    let snapshot = Snapshot::new(guest);
    warm(GUESTS as u64 * guest);
    let before = anonymous();
    let first = |count: usize| {
        let guests: Vec<_> =
            (0..count).map(|n| snapshot.restore(&format!("s{n}"), "--bandwidth 1M")).collect();
        let start = Instant::now();
        let loaded: Vec<_> = guests
            .into_iter()
            .map(|(socket, restore)| {
                thread::spawn(move || {
                    let vm = Vm::new(&[(guest / PAGE, PAGE)]);
                    vm.load(&socket);
                    vm.read(guest / PAGE / 2);
                    (start.elapsed(), vm, restore)
                })
            })
            .collect();
        let loaded: Vec<_> = loaded.into_iter().map(|guest| guest.join().unwrap()).collect();
        let held = anonymous().saturating_sub(before) / count as u64;
        let mut times: Vec<_> = loaded.iter().map(|(time, ..)| *time).collect();
        times.sort();
        for (_, vm, restore) in loaded {
            vm.discard(ByteRange::new(0, guest).unwrap());
            restore.join().unwrap();
        }
        (quantile(&times, 0.95), held)
    };
    common::head(&format!("{GUESTS} restores of one image at once"), "one alone");
    let rounds: Vec<_> = (0..=RUNS).map(|_| (first(GUESTS), first(1))).skip(1).collect();
    let times: Vec<_> = rounds.iter().map(|(ours, one)| (ours.0, one.0)).collect();
    common::report("p95 until the first page is there", &times);
    let held = rounds.iter().map(|(ours, _)| ours.1).max().unwrap_or(0);
    let what = format!("held for each, of {} KiB, pager included", guest >> 10);
    println!("{what:<58} {:>7} KiB", held >> 10);
}

/// Reads the pages of a working set, in its order; how long that takes, from the load on.
fn set(snapshot: &Snapshot, more: &str) -> Duration {
    snapshot.cool();
    warm(snapshot.len);
    let (socket, restore) = snapshot.restore("s", more);
    let vm = snapshot.vm();
    let start = Instant::now();
    vm.load(&socket);
    let (pages, mut state) = (snapshot.pages(), 0x9e37_79b9);
    for _ in 0..SET {
        vm.read(pages / 2 + common::random(&mut state) % (pages / 2));
        // What a guest does with a page.
        let until = Instant::now() + Duration::from_micros(20);
        while Instant::now() < until {}
    }
    let took = start.elapsed();
    vm.discard(ByteRange::new(0, snapshot.len).unwrap());
    restore.join().unwrap();
    took
}

fn replay(snapshot: &Snapshot) {
    let file = snapshot.dir.path().join("set");
    set(snapshot, &format!("--record {}", file.display()));
    common::head("A working set on a cold page cache", "ascending");
    let replay = format!("--replay {}", file.display());
    common::compare("the recorded order", RUNS, || set(snapshot, &replay), || set(snapshot, ""));
}

fn eager(snapshot: &Snapshot) {
    let threads = thread::available_parallelism().map_or(1, usize::from).min(8) as u64;
    let ours = || {
        warm(snapshot.len);
        let (socket, restore) = snapshot.restore("s", "--eager");
        let vm = snapshot.vm();
        let start = Instant::now();
        vm.load(&socket);
        restore.join().unwrap();
        start.elapsed()
    };
    let bare = || {
        warm(snapshot.len);
        let vm = snapshot.vm();
        let uffd = VmmFaults::new(vm.uffd().try_clone().unwrap()).unwrap();
        let start = Instant::now();
        thread::scope(|scope| {
            for thread in 0..threads {
                let (uffd, vm) = (&uffd, &vm);
                scope.spawn(move || fill(snapshot, vm, uffd, thread, threads));
            }
        });
        start.elapsed()
    };
    common::head("All memory before it is needed", "bare loop");
    common::compare(&format!("{} MiB by {threads} threads", snapshot.len / MIB), RUNS, ours, bare);
}

fn main() {
    let quick = std::env::args().any(|word| word == "--quick");
    let size = if quick { 64 * MIB } else { 256 * MIB };
    let snapshot = Snapshot::new(size);
    faults(&snapshot);
    faults_beside(&snapshot);
    many(size / 8);
    replay(&snapshot);
    eager(&snapshot);
}
