//! What the guest waits for at the end of precopy: pages that became zero, against as many with content;
//! huge pages that its device has taken, against taking them.

#[expect(dead_code, reason = "each bench uses its part")]
mod common;
#[path = "../tests/common/huge_page_pool.rs"]
mod huge_page_pool;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use common::{compare, head, memfd};
use huge_page_pool::Pool;
use migration::dirty::{DirtyTracker, NeverWritten, WriteProtect};
use migration::ram::{BlockOptions, ListOptions, MigrationBlock, RamBlocks, RamLoad, RamSave};
use migration::stream::{Configuration, SectionKind};
use migration::test_utils::KeptStream;
use migration::{
    Channel, Guest, Incoming, LoadHandler, NoDevices, Outgoing, Parameters, Progress, SaveHandler,
};
use ram_discard::memory::{HostMapping, RamBlock};
use rustix::fs::MemfdFlags;
use vmstate::wire::WireReader;

const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;
/// A guest whose memory is full.
const SIZE: u64 = 1 << 30;
/// Pages that it writes last, as far apart as they can be.
const LAST: u64 = 1000;
const RUNS: usize = 5;

/// Writes a page here and there when it is stopped.
struct Writing {
    mapping: Arc<HostMapping>,
    byte: u8,
}

impl Guest for Writing {
    fn stop(&self) -> Result<(), String> {
        for page in 0..LAST {
            self.mapping.write(page * (SIZE / LAST / PAGE * PAGE), &[self.byte; PAGE as usize]);
        }
        Ok(())
    }

    fn run(&self) -> Result<(), String> {
        Ok(())
    }
}

fn blocks_of(file: File, size: u64) -> (Arc<RamBlocks>, Arc<MigrationBlock>) {
    let ram = RamBlock::new("ram".into(), 0, size, file, 0).unwrap();
    let block = MigrationBlock::map(Arc::new(ram), BlockOptions::migratable()).unwrap();
    let (block, mut blocks) = (Arc::new(block), RamBlocks::new());
    blocks.register(Arc::clone(&block)).unwrap();
    (Arc::new(blocks), block)
}

/// The downtime of a full guest that last of all fills pages with `byte`.
fn downtime(byte: u8) -> Duration {
    let file = memfd(SIZE);
    for at in (0..SIZE).step_by(MIB as usize) {
        file.write_all_at(&[0xa5; MIB as usize], at).unwrap();
    }
    let (blocks, block) = blocks_of(file, SIZE);
    let (near, far) = UnixStream::pair().unwrap();
    let there = thread::spawn(move || {
        let (blocks, block) = blocks_of(memfd(SIZE), SIZE);
        let progress = Arc::new(Progress::new());
        let ram = RamLoad::new(blocks, ListOptions::default(), Arc::clone(&progress));
        Incoming {
            configuration: Configuration::new("bench"),
            guest: &Writing { mapping: Arc::clone(block.mapping()), byte: 0 },
            handlers: vec![Box::new(ram)],
            devices: &mut NoDevices,
            postcopy: None,
            progress: Arc::clone(&progress),
        }
        .run(Channel::new(far, progress).unwrap())
        .unwrap();
    });
    let progress = Arc::new(Progress::new());
    let tracker = |block: &MigrationBlock| -> Box<dyn DirtyTracker> {
        let (mapping, ram) = (Arc::clone(block.mapping()), Arc::clone(block.ram()));
        Box::new(WriteProtect::new(mapping, Some(ram)).unwrap())
    };
    let ram =
        RamSave::new(&blocks, ListOptions::default(), Arc::clone(&progress), tracker).unwrap();
    Outgoing {
        parameters: Parameters::new(Configuration::new("bench")),
        guest: &Writing { mapping: Arc::clone(block.mapping()), byte },
        handlers: vec![Box::new(ram)],
        devices: &mut NoDevices,
        postcopy: None,
        progress: Arc::clone(&progress),
    }
    .run(Channel::new(near, Arc::clone(&progress)).unwrap())
    .unwrap();
    there.join().unwrap();
    progress.snapshot().downtime.expect("a guest that was handed over")
}

/// A load of huge pages that a device took when it loaded its state.
fn huge_pages(pool: &Pool) {
    let size = pool.free() * 2 * MIB;
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    let file = File::from(rustix::fs::memfd_create("bench", flags).unwrap());
    file.set_len(size).unwrap();
    let (blocks, block) = blocks_of(file, size);
    let (from, _) = blocks_of(memfd(size), size);
    let progress = Arc::new(Progress::new());
    let tracker = |_: &MigrationBlock| -> Box<dyn DirtyTracker> { Box::new(NeverWritten) };
    let mut ram =
        RamSave::new(&from, ListOptions::default(), Arc::clone(&progress), tracker).unwrap();
    let (mut list, mut end) = (KeptStream::new().unwrap(), KeptStream::new().unwrap());
    ram.setup(&mut list).unwrap();
    ram.complete(&mut end).unwrap();
    let (list, end) = (list.bytes().unwrap(), end.bytes().unwrap());
    let backing = block.ram().backing();
    let whole = block.used().unwrap().in_file(0).unwrap();
    head(&format!("A load of {} MiB of huge pages, all taken before", size / MIB), "to take them");
    compare(
        "list and end of RAM",
        RUNS,
        || {
            let progress = Arc::clone(&progress);
            let mut ram = RamLoad::new(Arc::clone(&blocks), ListOptions::default(), progress);
            ram.load_setup().unwrap();
            backing.reserve(whole).unwrap();
            let start = Instant::now();
            for (kind, bytes) in [(SectionKind::Start, &list), (SectionKind::End, &end)] {
                ram.load(kind, VERSION, &mut WireReader::new(&bytes[..])).unwrap();
            }
            start.elapsed()
        },
        || {
            backing.discard(whole).unwrap();
            let start = Instant::now();
            backing.reserve(whole).unwrap();
            start.elapsed()
        },
    );
}

/// Version of the sections of RAM.
const VERSION: u32 = 4;

fn main() {
    head("Downtime of a guest of 1 GiB that writes 1,000 pages last", "content");
    compare("pages that became zero", RUNS, || downtime(0), || downtime(0x5a));
    // 8 GiB, or what a smaller machine has.
    match Pool::with_free(2 * MIB, 4096).or_else(|_| Pool::with_free(2 * MIB, 512)) {
        Ok(pool) => huge_pages(&pool),
        Err(error) => println!("\nno huge pages: {error}"),
    }
}
