//! Precopy of an idle guest between two sides on this machine, against a bare loop that moves the
//! same resident bytes into such a memory; and its cost as the region grows.

#[expect(dead_code, reason = "each bench uses its part")]
mod common;

use std::fs::File;
use std::io::{IoSlice, Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use migration::dirty::{DirtyTracker, NeverWritten, WriteProtect};
use migration::ram::{BlockOptions, ListOptions, MigrationBlock, RamBlocks, RamLoad, RamSave};
use migration::stream::Configuration;
use migration::{Channel, Incoming, MigrationInfo, NoDevices, Outgoing, Parameters, Progress};
use ram_discard::memory::RamBlock;
use ram_discard::{ByteRange, RamDiscardManager};
use virtio_mem::controller::{InitialState, MemController};
use virtio_mem::device::{BlockSpan, Geometry, Request, Response, VirtioMem};

use common::{Idle, Kind, compare, head, memfd, pair, report};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const BLOCK: u64 = 2 * MIB;
const ADDR: u64 = 1 << 40;
const PLUGGED: u64 = GIB;
const TOUCHED: u64 = 512 * MIB;
const RUNS: usize = 7;

struct Side {
    file: File,
    blocks: Arc<RamBlocks>,
    mapping: Arc<MigrationBlock>,
}

/// A region with its first `PLUGGED` bytes plugged.
fn side(region: u64) -> Side {
    let file = memfd(region);
    let geometry = Geometry::new(ADDR, region, BLOCK, None).unwrap();
    let controller =
        MemController::new(InitialState::volatile(VirtioMem::new(geometry, PLUGGED).unwrap()));
    let ram = Arc::new(
        RamBlock::new("vmem0".into(), ADDR, region, file.try_clone().unwrap(), 0).unwrap(),
    );
    controller.set_memory(vec![Arc::clone(&ram)]).unwrap();
    let nb_blocks = u16::try_from(PLUGGED / BLOCK).unwrap();
    let plug = Request::Plug(BlockSpan { addr: ADDR, nb_blocks });
    assert_eq!(controller.execute(plug), Response::Ack);
    let block = MigrationBlock::map(ram, BlockOptions::migratable()).unwrap();
    block
        .set_discard_manager(0, Arc::clone(controller.manager()) as Arc<dyn RamDiscardManager>)
        .unwrap();
    let mapping = Arc::new(block);
    let mut blocks = RamBlocks::new();
    blocks.register(Arc::clone(&mapping)).unwrap();
    Side { file, blocks: Arc::new(blocks), mapping }
}

/// Fills the touched part with what is not zero.
fn fill(file: &File) {
    let bytes: Vec<u8> = (0..MIB).map(|i| (i % 251) as u8 | 1).collect();
    for at in (0..TOUCHED).step_by(MIB as usize) {
        file.write_all_at(&bytes, at).unwrap();
    }
}

fn empty(file: &File) {
    let range = ByteRange::new(0, file.metadata().unwrap().len()).unwrap();
    let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(file, flags, range.start(), range.len()).unwrap();
}

/// Touches and frees as much memory as a run takes, so that the host has it at hand.
fn warm() {
    let file = memfd(TOUCHED);
    fill(&file);
}

fn migrate(from: &Side, to: &Side, kind: Kind, tracked: bool) -> (Duration, MigrationInfo) {
    let (near, far) = pair(kind);
    let blocks = Arc::clone(&to.blocks);
    let there = thread::spawn(move || {
        let progress = Arc::new(Progress::new());
        let ram = RamLoad::new(blocks, ListOptions::default(), Arc::clone(&progress));
        Incoming {
            configuration: Configuration::new("bench"),
            guest: &Idle,
            handlers: vec![Box::new(ram)],
            devices: &mut NoDevices,
            postcopy: None,
            progress: Arc::clone(&progress),
        }
        .run(Channel::new(far, progress).unwrap())
        .unwrap();
    });
    let start = Instant::now();
    let progress = Arc::new(Progress::new());
    let tracker = |block: &MigrationBlock| -> Box<dyn DirtyTracker> {
        if tracked {
            let (mapping, ram) = (Arc::clone(block.mapping()), Arc::clone(block.ram()));
            Box::new(WriteProtect::new(mapping, Some(ram)).unwrap())
        } else {
            Box::new(NeverWritten)
        }
    };
    let ram =
        RamSave::new(&from.blocks, ListOptions::default(), Arc::clone(&progress), tracker).unwrap();
    Outgoing {
        parameters: Parameters::new(Configuration::new("bench")),
        guest: &Idle,
        handlers: vec![Box::new(ram)],
        devices: &mut NoDevices,
        postcopy: None,
        progress: Arc::clone(&progress),
    }
    .run(Channel::new(near, Arc::clone(&progress)).unwrap())
    .unwrap();
    let elapsed = start.elapsed();
    there.join().unwrap();
    (elapsed, progress.snapshot())
}

/// Writes the touched bytes to a socket, and at the other end into a file.
fn bare(from: &Side, to: &File, kind: Kind) -> Duration {
    let (near, far) = pair(kind);
    let (mut near, mut far) = (File::from(near), File::from(far));
    let to = to.try_clone().unwrap();
    let there = thread::spawn(move || {
        let mut buffer = vec![0; MIB as usize];
        let mut at = 0;
        loop {
            let read = far.read(&mut buffer).unwrap();
            if read == 0 {
                return;
            }
            to.write_all_at(&buffer[..read], at).unwrap();
            at += read as u64;
        }
    });
    let start = Instant::now();
    let mut buffer = vec![0; MIB as usize];
    for at in (0..TOUCHED).step_by(MIB as usize) {
        from.mapping.mapping().read(at, &mut buffer);
        let mut rest = &buffer[..];
        while !rest.is_empty() {
            let written = near.write_vectored(&[IoSlice::new(rest)]).unwrap();
            rest = &rest[written..];
        }
    }
    drop(near);
    there.join().unwrap();
    start.elapsed()
}

fn speed() {
    let (from, to) = (side(8 * GIB), side(8 * GIB));
    fill(&from.file);
    head("1 GiB plugged, 512 MiB touched, region of 8 GiB", "bare loop");
    for (name, kind) in [("Unix socket", Kind::Unix), ("TCP loopback", Kind::Tcp)] {
        for (guest, tracked) in [("guest stopped", false), ("writes tracked", true)] {
            compare(
                &format!("{name}, {guest}"),
                RUNS,
                || {
                    empty(&to.file);
                    warm();
                    migrate(&from, &to, kind, tracked).0
                },
                || {
                    empty(&to.file);
                    warm();
                    bare(&from, &to.file, kind)
                },
            );
        }
    }
}

fn region_size() {
    head("The same 512 MiB in larger regions, against the region of 8 GiB", "8 GiB");
    let small = (side(8 * GIB), side(8 * GIB));
    fill(&small.0.file);
    for (name, region) in [("64 GiB", 64 * GIB), ("512 GiB", 512 * GIB), ("1 TiB", 1024 * GIB)] {
        let large = (side(region), side(region));
        fill(&large.0.file);
        let mut bytes = (0, 0);
        let rounds: Vec<_> = (0..=RUNS)
            .map(|_| {
                empty(&large.1.file);
                warm();
                let ours = migrate(&large.0, &large.1, Kind::Unix, true);
                empty(&small.1.file);
                warm();
                let peer = migrate(&small.0, &small.1, Kind::Unix, true);
                bytes = (ours.1.transferred, peer.1.transferred);
                (ours.0, peer.0)
            })
            .skip(1)
            .collect();
        report(&format!("region of {name}"), &rounds);
        println!(
            "    bytes sent {} against {}; resident at the end {} MiB and {} MiB",
            bytes.0,
            bytes.1,
            large.0.file.metadata().unwrap().blocks() / 2048,
            large.1.file.metadata().unwrap().blocks() / 2048,
        );
    }
}

fn main() {
    speed();
    region_size();
}
