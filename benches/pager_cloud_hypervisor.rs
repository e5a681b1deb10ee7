//! Guests of Cloud Hypervisor: saving and restoring against bare loops over the same bytes, what a page that is asked
//! for costs, and many restores of one image at once. The Cloud Hypervisors are the small VMM's. With `--quick`, a
//! quarter of the memory.

#[expect(dead_code, reason = "each bench uses its part")]
mod common;

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use clap::Parser;
use common::{compare, head, memfd, report};
use migration::sys::page_faults::{FaultKind, PageFaults};
use ram_discard::ByteRange;
use ram_discard::memory::HostMapping;
use small_vmm::cloud_hypervisor::faults::{Asking, Faults, Range};
use small_vmm::cloud_hypervisor::receiver::{Outcome, Receive};
use small_vmm::cloud_hypervisor::{Guest, source};
use tempfile::TempDir;
use vmem_pager::cli::{self, args::Args, report::Report};
use vmem_pager::run::Run;

const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;
const RUNS: usize = 5;
/// Pages that are asked for, far from each other.
const FAULTS: u64 = 4096;
const STRIDE: u64 = 13;
/// Restores at once.
const MANY: usize = 25;

/// A guest whose first part is in an image.
struct Bench {
    dir: TempDir,
    guest: Guest,
    size: u64,
    touched: u64,
}

impl Bench {
    fn new(touched: u64) -> Self {
        let size = 4 * touched;
        let guest = Guest::with_boot_memory(size, None);
        fill(&guest.mappings[0].file, touched);
        let dir = tempfile::tempdir().expect("a directory");
        let bench = Self { dir, guest, size, touched };
        bench.save(&bench.path("guest.img"));
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Touches and frees as much memory as a run takes, so that the host has it at hand.
    fn warm(&self) {
        fill(&memfd(self.touched), self.touched);
    }

    fn save(&self, image: &Path) -> Duration {
        let socket = self.path("save.sock");
        let words = format!(
            "vmem-pager save --vmm cloud-hypervisor --socket {} --image {}",
            socket.display(),
            image.display()
        );
        thread::scope(|scope| {
            let saving = scope.spawn(move || pager(&words));
            let stream = loop {
                match UnixStream::connect(&socket) {
                    Ok(stream) => break stream,
                    Err(_) => thread::sleep(Duration::from_millis(1)),
                }
            };
            let begun = Instant::now();
            let outcome = source::send(stream, &self.guest, source::Trap::None);
            let took = begun.elapsed();
            assert_eq!(outcome, source::Outcome::Ended);
            saving.join().expect("a save");
            took
        })
    }

    /// What a save does at least: all bytes to a file, on the disk.
    fn bare_copy(&self) -> Duration {
        let memory = &self.guest.mappings[0].file;
        let file = File::create(self.path("bare")).expect("a file");
        let begun = Instant::now();
        in_pieces(self.touched, |at, bytes| {
            memory.read_exact_at(bytes, at).expect("memory");
            file.write_all_at(bytes, at).expect("a disk");
        });
        file.sync_all().expect("a disk");
        begun.elapsed()
    }

    /// Restores to a receiver; from its first byte to the last, and what the receiver saw.
    fn restore(&self, name: &str, more: &str, how: &Receive) -> (Duration, Outcome) {
        let socket = self.path(&format!("{name}.sock"));
        let _ = std::fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket).expect("a socket");
        let words = format!(
            "vmem-pager restore --vmm cloud-hypervisor --socket {} --image {} {more}",
            socket.display(),
            self.path("guest.img").display()
        );
        thread::scope(|scope| {
            let begun = Instant::now();
            let restoring = scope.spawn(move || pager(&words));
            let outcome = how.take(&listener);
            let took = begun.elapsed();
            restoring.join().expect("a restore");
            (took, outcome)
        })
    }

    fn restore_eagerly(&self) -> Duration {
        self.warm();
        let how = Receive { look: false, ..Receive::new(false) };
        let (took, outcome) = self.restore("eager", "--eager", &how);
        assert!(matches!(outcome, Outcome::Has(_)));
        took
    }

    /// What an eager restore does at least: all bytes of the file into a memfd.
    fn bare_fill(&self) -> Duration {
        self.warm();
        let begun = Instant::now();
        let file = File::open(self.path("guest.img")).expect("an image");
        let memory = memfd(self.size);
        let first = self.first_page();
        in_pieces(self.touched, |at, bytes| {
            file.read_exact_at(bytes, first + at).expect("an image");
            memory.write_all_at(bytes, at).expect("memory");
        });
        begun.elapsed()
    }

    /// Where the guest's first page is in the image: pages are aligned in it, and the first is known.
    fn first_page(&self) -> u64 {
        let file = File::open(self.path("guest.img")).expect("an image");
        let (mut page, expected) = (vec![0; PAGE as usize], bytes_of_page(0));
        let mut places = (0..).step_by(PAGE as usize);
        places
            .find(|at| {
                file.read_exact_at(&mut page, *at).expect("the page is in the image");
                page == expected
            })
            .expect("the page is in the image")
    }

    /// Addresses that are touched.
    fn touches(&self) -> Vec<u64> {
        (0..FAULTS).map(|n| n * STRIDE % (self.touched / PAGE) * PAGE).collect()
    }

    fn asked(&self) -> Vec<Duration> {
        self.warm();
        let asking = Asking { touches: self.touches(), ..Asking::default() };
        let how = Receive { look: false, ..Receive::new(true) }.asking(asking);
        match self.restore("lazy", "--bandwidth 1", &how).1 {
            Outcome::Has(taken) => taken.waited,
            other => panic!("{other:?}"),
        }
    }

    /// The smallest handler: a page is read off the image and written to the memory, for each request.
    fn smallest_handler(&self) -> Vec<Duration> {
        self.warm();
        let image = File::open(self.path("guest.img")).expect("an image");
        let (memory, first) = (memfd(self.size), self.first_page());
        let shared = memory.try_clone().expect("a descriptor");
        let (mut near, mut far) = UnixStream::pair().expect("sockets");
        far.write_all(&[2, 0]).expect("a socket");
        thread::scope(|scope| {
            scope.spawn(move || {
                let (mut request, mut page) = ([0; 32], [0; PAGE as usize]);
                while far.read_exact(&mut request).is_ok() {
                    let gpa = u64::from_le_bytes(request[16..24].try_into().expect("8 bytes"));
                    image.read_exact_at(&mut page, first + gpa).expect("an image");
                    memory.write_all_at(&page, gpa).expect("memory");
                    let mut answer = [0; 16];
                    answer[0] = 1;
                    far.write_all(&answer).expect("a socket");
                }
            });
            let range = Range { gpa: 0, size: self.size, page: PAGE, offset: 0, file: shared };
            let asking = Asking { touches: self.touches(), no_sweep: true, ..Asking::default() };
            near.set_nonblocking(false).expect("a socket");
            let stream = near.try_clone().expect("a socket");
            let mut faults = Faults::new(stream, vec![range], asking).expect("its role");
            assert!(faults.sweep());
            let _ = near.flush();
            near.shutdown(std::net::Shutdown::Both).expect("a socket");
            faults.end().1
        })
    }

    /// A bare loop that answers the faults of a thread with UFFDIO_COPY.
    fn bare_uffdio_copy(&self) -> Vec<Duration> {
        self.warm();
        let image = File::open(self.path("guest.img")).expect("an image");
        let first = self.first_page();
        let memory = Arc::new(HostMapping::map(&memfd(self.size), 0, self.size).expect("memory"));
        let mut faults = PageFaults::open(FaultKind::Missing).expect("a userfaultfd");
        let mapping = faults.add(Arc::clone(&memory));
        faults.register(mapping, ByteRange::new(0, self.size).expect("memory")).expect("memory");
        let touches = self.touches();
        thread::scope(|scope| {
            scope.spawn(|| {
                let (mut found, mut page, mut served) = (Vec::new(), [0; PAGE as usize], 0);
                while served < FAULTS {
                    let mut fds =
                        [rustix::event::PollFd::new(&faults, rustix::event::PollFlags::IN)];
                    rustix::event::poll(&mut fds, None).expect("a userfaultfd");
                    faults.read(&mut found).expect("a userfaultfd");
                    for fault in found.drain(..) {
                        let at = fault.offset / PAGE * PAGE;
                        image.read_exact_at(&mut page, first + at).expect("an image");
                        let _ = faults.place(mapping, at, &page).expect("memory");
                        served += 1;
                    }
                }
            });
            let mut byte = [0];
            let touch = |at: &u64| {
                let begun = Instant::now();
                memory.read(*at, &mut byte);
                begun.elapsed()
            };
            touches.iter().map(touch).collect()
        })
    }
}

fn pager(words: &str) {
    let args = Args::try_parse_from(words.split_whitespace()).expect("a command line");
    let done = cli::execute(&args.command, &Run::new(None), &Report::silent());
    done.unwrap_or_else(|error| panic!("{words}: {error}"));
}

fn bytes_of_page(page: u64) -> Vec<u8> {
    (0..PAGE).map(|at| ((page + at) % 251) as u8 | 1).collect()
}

fn fill(file: &File, len: u64) {
    let bytes: Vec<u8> = (0..251).flat_map(bytes_of_page).collect();
    let mut at = 0;
    while at < len {
        let count = (len - at).min(bytes.len() as u64);
        file.write_all_at(&bytes[..count as usize], at).expect("memory");
        at += count;
    }
}

/// Calls `work` with the place and the bytes of each MiB, by as many threads as the pager takes.
fn in_pieces(len: u64, work: impl Fn(u64, &mut [u8]) + Sync) {
    let next = AtomicU64::new(0);
    let run = || {
        let mut bytes = vec![0; MIB as usize];
        loop {
            let at = next.fetch_add(MIB, Ordering::Relaxed);
            if at >= len {
                return;
            }
            work(at, &mut bytes);
        }
    };
    thread::scope(|scope| {
        let threads = thread::available_parallelism().map_or(1, usize::from).min(8);
        (1..threads).for_each(|_| drop(scope.spawn(run)));
        run();
    });
}

fn quantile(times: &[Duration], share: f64) -> Duration {
    let mut times = times.to_vec();
    times.sort_unstable();
    times[(times.len() as f64 * share) as usize]
}

/// Compares quantiles of what pages took that were asked for.
fn compare_faults(peer: &str, ours: &[Vec<Duration>], theirs: &[Vec<Duration>]) {
    for (name, share) in [("p50", 0.5), ("p99", 0.99)] {
        let rounds = ours.iter().zip(theirs).skip(1);
        let rounds: Vec<_> =
            rounds.map(|(ours, peer)| (quantile(ours, share), quantile(peer, share))).collect();
        report(&format!("a page that is asked for, {name}, {peer}"), &rounds);
    }
}

/// Many guests of one image at once, as so many processes would be.
fn many(bench: &Bench, mode: &str) {
    let how = Receive { look: false, ..Receive::new(mode == "lazy") };
    let how = how.asking(Asking { touches: bench.touches()[..64].to_vec(), ..Asking::default() });
    let more = if mode == "lazy" { "" } else { "--eager" };
    let before = available();
    let lowest = AtomicU64::new(before);
    let over = AtomicBool::new(false);
    let times: Vec<Duration> = thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                lowest.fetch_min(available(), Ordering::Relaxed);
                thread::sleep(Duration::from_millis(2));
            }
        });
        let guests: Vec<_> = (0..MANY)
            .map(|index| {
                let how = &how;
                scope.spawn(move || {
                    let (_, outcome) = bench.restore(&format!("{mode}{index}"), more, how);
                    match outcome {
                        Outcome::Has(taken) => taken.begun_after,
                        other => panic!("{other:?}"),
                    }
                })
            })
            .collect();
        let times = guests.into_iter().map(|guest| guest.join().expect("a restore")).collect();
        over.store(true, Ordering::Relaxed);
        times
    });
    println!(
        "{:<58} {:>7.2} s {:>7.2} s   {:>6} MiB",
        format!("{MANY} guests at once, {mode}"),
        quantile(&times, 0.5).as_secs_f64(),
        quantile(&times, 0.95).as_secs_f64(),
        before.saturating_sub(lowest.load(Ordering::Relaxed)) >> 20
    );
}

/// Memory that can be had, bytes.
fn available() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").expect("/proc");
    let line = text.lines().find(|line| line.starts_with("MemAvailable:")).expect("a line of it");
    line.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok()).expect("KiB") << 10
}

fn main() {
    let quick = std::env::args().any(|word| word == "--quick");
    let touched = if quick { 128 * MIB } else { 512 * MIB };
    let bench = Bench::new(touched);
    let image = std::fs::metadata(bench.path("guest.img")).expect("an image").blocks() * 512;
    println!(
        "a guest of {} MiB, of which {} MiB were touched; image {} MiB",
        bench.size / MIB,
        touched / MIB,
        image / MIB
    );

    head("All memory at once", "bare loop");
    compare("restore --eager", RUNS, || bench.restore_eagerly(), || bench.bare_fill());
    compare("save", RUNS, || bench.save(&bench.path("saved")), || bench.bare_copy());

    head("Pages that are asked for one by one", "peer");
    let (mut ours, mut smallest, mut bare) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..=RUNS {
        ours.push(bench.asked());
        smallest.push(bench.smallest_handler());
        bare.push(bench.bare_uffdio_copy());
    }
    compare_faults("the smallest handler", &ours, &smallest);
    compare_faults("a bare UFFDIO_COPY loop", &ours, &bare);
    compare_faults("the smallest handler and such a loop", &smallest, &bare);

    let small = Bench::new(touched / 16);
    println!("\n{:<58} {:>9} {:>9}   {:>10}", "To the first access", "p50", "p95", "memory");
    many(&small, "lazy");
    many(&small, "eager");
}
