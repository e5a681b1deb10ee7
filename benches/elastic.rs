//! A guest that plugs and unplugs while it is moved: each request against the same of a guest that is not moved,
//! and for how long block state is frozen against the downtime. Without a ring: the device and what it asks.

#[expect(dead_code, reason = "each bench uses its part")]
mod common;

use std::io;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use migration::dirty::DirtyTracker;
use migration::page_bitmap::PageBitmap;
use migration::ram::{BlockOptions, ListOptions, MigrationBlock, RamBlocks, RamLoad, RamSave};
use migration::stream::Configuration;
use migration::{Channel, Incoming, MigrationInfo, NoDevices, Outgoing, Parameters, Progress};
use ram_discard::memory::RamBlock;
use ram_discard::{ByteRange, RamDiscardManager};
use virtio_mem::controller::{InitialState, MemController};
use virtio_mem::device::{BlockSpan, Geometry, Request, Response, VirtioMem};

use common::{Idle, head, memfd, report};

const MIB: u64 = 1 << 20;
const BLOCK: u64 = 2 * MIB;
const ADDR: u64 = 1 << 40;
const REGION: u64 = 1 << 30;
const TOUCHED: u64 = 256 * MIB;
const RUNS: usize = 7;
/// Requests of a run, each of them a block that is plugged and then unplugged.
const REQUESTS: u32 = 200;

struct Side {
    device: MemController,
    blocks: Arc<RamBlocks>,
}

/// A region with its first `TOUCHED` bytes plugged.
fn side(fills: bool) -> Side {
    let file = memfd(REGION);
    let geometry = Geometry::new(ADDR, REGION, BLOCK, None).unwrap();
    let device =
        MemController::new(InitialState::volatile(VirtioMem::new(geometry, REGION).unwrap()));
    let copy = file.try_clone().unwrap();
    let ram = Arc::new(RamBlock::new("vmem0".into(), ADDR, REGION, copy, 0).unwrap());
    device.set_memory(vec![Arc::clone(&ram)]).unwrap();
    let nb_blocks = u16::try_from(TOUCHED / BLOCK).unwrap();
    let plug = Request::Plug(BlockSpan { addr: ADDR, nb_blocks });
    assert_eq!(device.execute(plug), Response::Ack);
    if fills {
        let bytes: Vec<u8> = (0..MIB).map(|i| (i % 251) as u8 | 1).collect();
        (0..TOUCHED).step_by(MIB as usize).for_each(|at| file.write_all_at(&bytes, at).unwrap());
    }
    let block = MigrationBlock::map(ram, BlockOptions::migratable()).unwrap();
    let manager = Arc::clone(device.manager()) as Arc<dyn RamDiscardManager>;
    block.set_discard_manager(0, manager).unwrap();
    let mut blocks = RamBlocks::new();
    blocks.register(Arc::new(block)).unwrap();
    Side { device, blocks: Arc::new(blocks) }
}

/// All that is touched is written all the time, until the guest is at rest.
#[derive(Clone, Default)]
struct Busy {
    rests: Arc<AtomicBool>,
    syncs: Arc<AtomicU64>,
}

impl DirtyTracker for Busy {
    fn start(&mut self, _populated: &[ByteRange]) -> io::Result<()> {
        Ok(())
    }

    fn sync(&mut self, dirty: &mut PageBitmap) -> io::Result<()> {
        self.syncs.fetch_add(1, Ordering::Relaxed);
        if !self.rests.load(Ordering::Relaxed) {
            dirty.set_range(0..TOUCHED / 4096);
        }
        Ok(())
    }

    fn clear(&mut self, _range: ByteRange) -> io::Result<()> {
        Ok(())
    }

    fn stop(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// How long all PLUGs took, and all UNPLUGs.
fn requests(device: &MemController) -> (Duration, Duration) {
    let (mut plugs, mut unplugs) = (Duration::ZERO, Duration::ZERO);
    for request in 0..REQUESTS {
        let addr = ADDR + TOUCHED + u64::from(request % 64) * BLOCK;
        let span = BlockSpan { addr, nb_blocks: 1 };
        for (request, time) in
            [(Request::Plug(span), &mut plugs), (Request::Unplug(span), &mut unplugs)]
        {
            let begin = Instant::now();
            assert_eq!(device.execute(request), Response::Ack);
            *time += begin.elapsed();
            device.answered();
        }
    }
    (plugs, unplugs)
}

/// Moves a guest that makes its requests meanwhile.
fn migrate(from: &Side, to: &Side) -> ((Duration, Duration), MigrationInfo) {
    let (near, far) = UnixStream::pair().unwrap();
    let blocks = Arc::clone(&to.blocks);
    let there = thread::spawn(move || {
        let progress = Arc::new(Progress::new());
        let ram = RamLoad::new(blocks, ListOptions::default(), Arc::clone(&progress));
        let incoming = Incoming {
            configuration: Configuration::new("bench"),
            guest: &Idle,
            handlers: vec![Box::new(ram)],
            devices: &mut NoDevices,
            postcopy: None,
            progress: Arc::clone(&progress),
        };
        incoming.run(Channel::new(far, progress).unwrap()).unwrap();
    });
    let (busy, progress) = (Busy::default(), Arc::new(Progress::new()));
    let tracks = busy.clone();
    let tracker = move |_: &MigrationBlock| Box::new(tracks.clone()) as Box<dyn DirtyTracker>;
    let ram =
        RamSave::new(&from.blocks, ListOptions::default(), Arc::clone(&progress), tracker).unwrap();
    let mut parameters = Parameters::new(Configuration::new("bench"));
    (parameters.downtime_limit, parameters.max_rounds) = (Duration::ZERO, u64::MAX);
    let outgoing = Outgoing {
        parameters,
        guest: &Idle,
        handlers: vec![Box::new(ram)],
        devices: &mut NoDevices,
        postcopy: None,
        progress: Arc::clone(&progress),
    };
    let channel = Channel::new(near, Arc::clone(&progress)).unwrap();
    let times = thread::scope(|scope| {
        let guest = scope.spawn(|| {
            while busy.syncs.load(Ordering::Relaxed) < 3 || from.device.migration_active() {
                thread::yield_now();
            }
            let times = requests(&from.device);
            busy.rests.store(true, Ordering::Relaxed);
            times
        });
        outgoing.run(channel).unwrap();
        guest.join().unwrap()
    });
    there.join().unwrap();
    (times, progress.snapshot())
}

fn main() {
    let from = side(true);
    let mut rounds = Vec::new();
    let mut frozen = Vec::new();
    for _ in 0..=RUNS {
        let to = side(false);
        let idle = requests(&from.device);
        let (moved, info) = migrate(&from, &to);
        rounds.push((moved, idle));
        frozen.push((info.busy_time.unwrap(), info.downtime.unwrap()));
    }
    // The first round warms up.
    let part = |pick: fn(&(Duration, Duration)) -> Duration| -> Vec<_> {
        rounds.iter().skip(1).map(|(moved, idle)| (pick(moved), pick(idle))).collect()
    };
    head(&format!("{REQUESTS} requests while 256 MiB are sent again and again"), "not moved");
    report("PLUG", &part(|times| times.0));
    report("UNPLUG", &part(|times| times.1));
    report("both", &part(|times| times.0 + times.1));
    head("Block state is frozen", "downtime");
    report("the switchover", &frozen[1..]);
}
