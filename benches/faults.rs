//! What a fault costs whose page is somewhere else, or nowhere.

#[expect(dead_code, reason = "each bench uses its part")]
mod common;

use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use migration::dirty::{DirtyTracker, NeverWritten};
use migration::lazy::{FaultHandler, HandlerFailed, LazyRam};
use migration::page_bitmap::PageBitmap;
use migration::postcopy::{GiveUp, PostcopyIncoming, PostcopyOutgoing, SwitchWhen};
use migration::ram::{BlockOptions, ListOptions, MigrationBlock, RamBlocks, RamLoad, RamSave};
use migration::stream::Configuration;
use migration::sys::page_faults::{FaultKind, PageFaults};
use migration::{
    Channel, Guest, Incoming, MigrationError, NoDevices, Outgoing, Parameters, Progress,
};
use ram_discard::ByteRange;
use ram_discard::memory::{HostMapping, RamBlock};

use common::memfd;

const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;
const SIZE: u64 = 256 * MIB;
const FAULTS: u64 = 4096;
const RUNS: usize = 5;

struct Stop;

impl HandlerFailed for Stop {
    fn handler_failed(&self, error: &MigrationError) {
        panic!("{error}");
    }
}

fn block(size: u64) -> Arc<MigrationBlock> {
    let ram = RamBlock::new("ram".into(), 0, size, memfd(size), 0).unwrap();
    Arc::new(MigrationBlock::map(Arc::new(ram), BlockOptions::migratable()).unwrap())
}

/// Touches and frees as much memory as a run takes, so that the host has it at hand.
fn warm() {
    let file = memfd(SIZE);
    for at in (0..SIZE).step_by(MIB as usize) {
        file.write_all_at(&[1; MIB as usize], at).unwrap();
    }
}

/// Reads a byte of pages far from each other; how long each took.
fn touch(mapping: &HostMapping, stride: u64) -> Vec<Duration> {
    let mut byte = [0];
    let pages = (0..FAULTS).map(|n| n * stride % (SIZE / PAGE));
    let mut times: Vec<_> = pages
        .map(|page| {
            let start = Instant::now();
            mapping.read(page * PAGE, &mut byte);
            start.elapsed()
        })
        .collect();
    times.sort();
    times
}

fn quantiles(times: &[Duration]) -> (f64, f64) {
    let at = |share: f64| times[(times.len() as f64 * share) as usize].as_secs_f64() * 1e6;
    (at(0.5), at(0.99))
}

/// Prints medians of p50 and p99 over the runs, and of the ratio of each run's p50 to the peer's.
fn table(title: &str, peer: &str, rows: &[(&str, Vec<(f64, f64)>)]) {
    println!("\n{title}\n{:<58} {:>9} {:>9} {:>18}", "", "p50 us", "p99 us", format!("p50/{peer}"));
    let middle = |mut values: Vec<f64>| {
        values.sort_by(f64::total_cmp);
        (values[values.len() / 2], values[0], values[values.len() - 1])
    };
    for (name, runs) in rows {
        let p50 = middle(runs.iter().map(|run| run.0).collect()).0;
        let p99 = middle(runs.iter().map(|run| run.1).collect()).0;
        let ratio = middle(runs.iter().zip(&rows[0].1).map(|(run, peer)| run.0 / peer.0).collect());
        println!(
            "{name:<58} {p50:>9.2} {p99:>9.2} {:>5.2} ({:.2}-{:.2})",
            ratio.0, ratio.1, ratio.2
        );
    }
}

/// A fault that the kernel handles by itself.
fn plain() -> (f64, f64) {
    warm();
    quantiles(&touch(block(SIZE).mapping(), 13))
}

/// A bare loop that answers each fault with UFFDIO_ZEROPAGE.
fn bare_zeropage() -> (f64, f64) {
    warm();
    let block = block(SIZE);
    let mut faults = PageFaults::open(FaultKind::Missing).unwrap();
    let mapping = faults.add(Arc::clone(block.mapping()));
    faults.register(mapping, ByteRange::new(0, SIZE).unwrap()).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            let (mut found, mut served) = (Vec::new(), 0);
            while served < FAULTS {
                let mut fds = [rustix::event::PollFd::new(&faults, rustix::event::PollFlags::IN)];
                rustix::event::poll(&mut fds, None).unwrap();
                faults.read(&mut found).unwrap();
                for fault in found.drain(..) {
                    let page = ByteRange::new(fault.offset / PAGE * PAGE, PAGE).unwrap();
                    faults.place_zeros(mapping, page).unwrap();
                    served += 1;
                }
            }
        });
        quantiles(&touch(block.mapping(), 13))
    })
}

/// Discarded memory in a large gap: not even registered. With `scattered` outstanding pages
/// everywhere, the gaps are too small for that, and the handler answers.
fn discarded(scattered: bool) -> (f64, f64) {
    warm();
    let block = block(SIZE);
    let mut outstanding = PageBitmap::new(SIZE / PAGE);
    if scattered {
        (0..SIZE / PAGE).filter(|page| page % 13 == 7).for_each(|page| {
            outstanding.set(page);
        });
    } else {
        outstanding.set(SIZE / PAGE - 1);
    }
    let lazy = Arc::new(LazyRam::new(vec![(Arc::clone(&block), outstanding)]).unwrap());
    let _handler = FaultHandler::start(Arc::clone(&lazy), Arc::new(Stop)).unwrap();
    quantiles(&touch(block.mapping(), 13))
}

/// Asks for 4 KiB over a socket and gets them.
fn request_response() -> (f64, f64) {
    let (mut near, mut far) = UnixStream::pair().unwrap();
    let there = thread::spawn(move || {
        let (mut request, page) = ([0; 16], vec![1; PAGE as usize + 16]);
        while far.read_exact(&mut request).is_ok() {
            far.write_all(&page).unwrap();
        }
    });
    let mut page = vec![0; PAGE as usize + 16];
    let mut times: Vec<_> = (0..FAULTS)
        .map(|_| {
            let start = Instant::now();
            near.write_all(&[0; 16]).unwrap();
            near.read_exact(&mut page).unwrap();
            start.elapsed()
        })
        .collect();
    drop(near);
    there.join().unwrap();
    times.sort();
    quantiles(&times)
}

/// A guest that faults on the destination; the source sends nothing by itself for a while.
struct Faulting {
    mapping: Arc<HostMapping>,
    times: std::sync::Mutex<Option<thread::JoinHandle<Vec<Duration>>>>,
}

impl Guest for Faulting {
    fn stop(&self) -> Result<(), String> {
        Ok(())
    }

    fn run(&self) -> Result<(), String> {
        let mapping = Arc::clone(&self.mapping);
        let touching = thread::spawn(move || touch(&mapping, 30011));
        *self.times.lock().unwrap() = Some(touching);
        Ok(())
    }
}

/// Faults of a guest in postcopy, while the rest of memory is sent in the background at
/// `max_bandwidth` bytes a second.
fn remote(max_bandwidth: Option<u64>) -> (f64, f64) {
    warm();
    warm();
    let side = || {
        let block = block(SIZE);
        let mut blocks = RamBlocks::new();
        blocks.register(Arc::clone(&block)).unwrap();
        (block, Arc::new(blocks))
    };
    let ((from, from_blocks), (to, to_blocks)) = (side(), side());
    let bytes = vec![7; MIB as usize];
    (0..SIZE).step_by(MIB as usize).for_each(|at| from.mapping().write(at, &bytes));
    let options = ListOptions { postcopy: true, ..ListOptions::default() };
    let (near, far) = UnixStream::pair().unwrap();
    let (near_urgent, far_urgent) = UnixStream::pair().unwrap();
    let guest = Arc::new(Faulting { mapping: Arc::clone(to.mapping()), times: Default::default() });
    let runs = Arc::clone(&guest);
    let there = thread::spawn(move || -> Result<(), MigrationError> {
        let progress = Arc::new(Progress::new());
        let channel = |stream| Channel::new(stream, Arc::clone(&progress)).unwrap();
        let ram = RamLoad::new(Arc::clone(&to_blocks), options, Arc::clone(&progress));
        Incoming {
            configuration: Configuration::new("bench"),
            guest: &*runs,
            handlers: vec![Box::new(ram)],
            devices: &mut NoDevices,
            postcopy: Some(PostcopyIncoming {
                blocks: to_blocks,
                urgent: Some(channel(far_urgent)),
                reconnect: Box::new(GiveUp),
                failed: Arc::new(Stop),
                listening: None,
            }),
            progress: Arc::clone(&progress),
        }
        .run(channel(far))
    });
    let progress = Arc::new(Progress::new());
    let channel = |stream| Channel::new(stream, Arc::clone(&progress)).unwrap();
    let tracker = |_: &MigrationBlock| -> Box<dyn DirtyTracker> { Box::new(NeverWritten) };
    let ram = RamSave::new(&from_blocks, options, Arc::clone(&progress), tracker).unwrap();
    let idle = Faulting { mapping: Arc::clone(from.mapping()), times: Default::default() };
    let mut parameters = Parameters::new(Configuration::new("bench"));
    parameters.max_postcopy_bandwidth = max_bandwidth;
    Outgoing {
        parameters,
        guest: &idle,
        handlers: vec![Box::new(ram)],
        devices: &mut NoDevices,
        postcopy: Some(PostcopyOutgoing {
            when: SwitchWhen::AtOnce,
            urgent: Some(channel(near_urgent)),
            reconnect: Box::new(GiveUp),
        }),
        progress: Arc::clone(&progress),
    }
    .run(channel(near))
    .unwrap();
    there.join().unwrap().unwrap();
    let touching = guest.times.lock().unwrap().take().unwrap();
    let times = touching.join().unwrap();
    // Those that had to be asked for: the others had arrived already.
    let asked: Vec<_> = times.into_iter().filter(|time| *time > Duration::from_micros(4)).collect();
    quantiles(&asked)
}

fn main() -> io::Result<()> {
    let mut rows: Vec<(&str, Vec<(f64, f64)>)> = vec![
        ("plain fault of a hole", Vec::new()),
        ("discarded, not registered", Vec::new()),
        ("discarded, between pages to come: zeros on the spot", Vec::new()),
        ("bare UFFDIO_ZEROPAGE loop", Vec::new()),
    ];
    for _ in 0..RUNS {
        rows[0].1.push(plain());
        rows[1].1.push(discarded(false));
        rows[2].1.push(discarded(true));
        rows[3].1.push(bare_zeropage());
    }
    table("A fault on a page that nothing comes for", "plain", &rows);
    let mut rows: Vec<(&str, Vec<(f64, f64)>)> = vec![
        ("request and response of 4 KiB over a socket", Vec::new()),
        ("fault in postcopy, 100 MiB/s sent meanwhile", Vec::new()),
        ("fault in postcopy, as much sent as the channel takes", Vec::new()),
    ];
    for _ in 0..RUNS {
        rows[0].1.push(request_response());
        rows[1].1.push(remote(Some(100 * MIB)));
        rows[2].1.push(remote(None));
    }
    table("A fault on a page that the source has", "bare", &rows);
    Ok(())
}
