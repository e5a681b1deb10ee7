//! What the stream costs beyond the bytes in it: records of pages made against the same pages written
//! without records into the same sink, and taken against pwrite of the same pages; pages of zeros
//! against the look at them.
//!
//! Times are the CPU's, but for those over a socket.

#[expect(dead_code, reason = "each bench uses its part")]
mod common;

use std::hint::black_box;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use migration::dirty::{DirtyTracker, NeverWritten};
use migration::ram::{
    BlockOptions, ListOptions, MigrationBlock, RamBlocks, RamLoad, RamSave, ZeroPageDetection,
};
use migration::stream::{RAM_VERSION, SectionKind};
use migration::test_utils::CountedStream;
use migration::{Channel, GatherWrite, LoadHandler, Progress, SaveHandler, Sink};
use ram_discard::memory::{HostMapping, RamBlock};
use vmstate::wire::WireReader;

use common::{busy, compare, head, memfd};

const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;
const SIZE: u64 = 256 * MIB;
const PAGES: u32 = (SIZE / PAGE) as u32;
/// What the peers write at once.
const WRITE: u64 = MIB;
/// As an engine does.
const READ_AHEAD: usize = 4 << 20;
const RUNS: usize = 7;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Content {
    Data,
    EveryOther,
    Zeros,
}

impl Content {
    fn has_data(self, page: u64) -> bool {
        match self {
            Self::Data => true,
            Self::EveryOther => page.is_multiple_of(2),
            Self::Zeros => false,
        }
    }

    /// Bytes of memory that follow each other with data: what a bare write can take at once.
    fn data(self) -> impl Iterator<Item = (u64, u64)> {
        let (step, len) = match self {
            Self::Data => (WRITE, WRITE),
            Self::EveryOther => (2 * PAGE, PAGE),
            Self::Zeros => (SIZE, 0),
        };
        (0..SIZE).step_by(step as usize).map(move |at| (at, len))
    }
}

struct Side {
    block: Arc<MigrationBlock>,
    blocks: Arc<RamBlocks>,
}

fn side(zero_page_detection: ZeroPageDetection) -> Side {
    let ram = RamBlock::new("ram".into(), 0, SIZE, memfd(SIZE), 0).unwrap();
    let options = BlockOptions { zero_page_detection, ..BlockOptions::migratable() };
    let block = Arc::new(MigrationBlock::map(Arc::new(ram), options).unwrap());
    let mut blocks = RamBlocks::new();
    blocks.register(Arc::clone(&block)).unwrap();
    Side { block, blocks: Arc::new(blocks) }
}

/// All pages are there, those of zeros too.
fn fill(mapping: &HostMapping, content: Content) {
    for page in 0..SIZE / PAGE {
        let byte = if content.has_data(page) { page as u8 | 1 } else { 0 };
        mapping.write(page * PAGE, &[byte; PAGE as usize]);
    }
}

/// Touches and frees as much memory as a run takes, so that the host has it at hand.
fn warm() {
    fill(side(ZeroPageDetection::Legacy).block.mapping(), Content::Data);
}

/// A socket whose other end is read by a thread, which keeps what came if `keep`.
fn drained(keep: bool) -> (Channel, JoinHandle<Vec<u8>>) {
    let (near, mut far) = UnixStream::pair().unwrap();
    let there = thread::spawn(move || {
        let (mut kept, mut buffer) = (Vec::new(), vec![0; MIB as usize]);
        loop {
            match far.read(&mut buffer).unwrap() {
                0 => return kept,
                read if keep => kept.extend_from_slice(&buffer[..read]),
                _ => {}
            }
        }
    });
    (Channel::new(near, Arc::new(Progress::new())).unwrap(), there)
}

/// Ready to send: the list of blocks is written.
fn save_of(side: &Side, sink: &mut dyn Sink) -> RamSave {
    let tracker = |_: &MigrationBlock| -> Box<dyn DirtyTracker> { Box::new(NeverWritten) };
    let progress = Arc::new(Progress::new());
    let mut save = RamSave::new(&side.blocks, ListOptions::default(), progress, tracker).unwrap();
    save.setup(sink).unwrap();
    save
}

fn send(save: &mut RamSave, sink: &mut dyn Sink) {
    while save.pending_estimate() != 0 {
        save.iterate(sink, u64::MAX).unwrap();
    }
}

/// The pages with data as they lie in memory.
fn send_bare(side: &Side, content: Content, sink: &mut dyn Sink) {
    let mut gathered = GatherWrite::new();
    for (at, len) in content.data() {
        gathered.push_memory(side.block.mapping(), at, len);
        if gathered.len_bytes() >= WRITE {
            sink.write_gathered(&mut gathered).unwrap();
        }
    }
    sink.write_gathered(&mut gathered).unwrap();
}

/// Makes all records of a side, each page.
fn count(side: &Side) -> Duration {
    let mut sink = CountedStream::default();
    let mut save = save_of(side, &mut sink);
    busy(|| send(&mut save, &mut sink)) / PAGES
}

/// Looks for zeros, each page.
fn look(side: &Side) -> Duration {
    let look = |at| _ = black_box(side.block.mapping().page_is_zero(at, PAGE));
    busy(|| (0..SIZE).step_by(PAGE as usize).for_each(look)) / PAGES
}

/// Until all is out of a socket that is drained, each page.
fn over_socket(work: impl FnOnce(&mut Channel)) -> Duration {
    let (mut channel, there) = drained(false);
    let start = Instant::now();
    work(&mut channel);
    drop(channel);
    there.join().unwrap();
    start.elapsed() / PAGES
}

fn save_pages() {
    head("Records made, each page, into a sink that counts", "the look");
    let contents = [
        ("data", Content::Data),
        ("every other page zeros", Content::EveryOther),
        ("zeros", Content::Zeros),
    ];
    let from = side(ZeroPageDetection::Legacy);
    for (name, content) in contents {
        fill(from.block.mapping(), content);
        compare(name, RUNS, || count(&from), || look(&from));
    }
    fill(from.block.mapping(), Content::Data);
    let unlooked = side(ZeroPageDetection::None);
    fill(unlooked.block.mapping(), Content::Data);
    compare("data, zeros not looked for", RUNS, || count(&unlooked), || look(&from));

    head("Records made, each page, into a Unix socket that is drained", "no records");
    for (name, content) in &contents[..2] {
        fill(from.block.mapping(), *content);
        let ours = || {
            let mut save = save_of(&from, &mut CountedStream::default());
            over_socket(|channel| send(&mut save, channel))
        };
        let bare = || over_socket(|channel| send_bare(&from, *content, channel));
        compare(name, RUNS, ours, bare);
    }
}

/// All sections of RAM, as a destination gets them.
fn sections(side: &Side) -> Vec<u8> {
    let (mut channel, there) = drained(true);
    let mut save = save_of(side, &mut channel);
    send(&mut save, &mut channel);
    drop(channel);
    there.join().unwrap()
}

fn decode(to: &Side, bytes: &[u8]) -> Duration {
    let progress = Arc::new(Progress::new());
    let mut load = RamLoad::new(Arc::clone(&to.blocks), ListOptions::default(), progress);
    let mut reader = WireReader::with_capacity(bytes, READ_AHEAD);
    load.load_setup().unwrap();
    load.load(SectionKind::Start, RAM_VERSION, &mut reader).unwrap();
    let load = || {
        while !reader.is_at_end().unwrap() {
            load.load(SectionKind::Part, RAM_VERSION, &mut reader).unwrap();
        }
    };
    busy(load) / PAGES
}

fn load_pages() {
    let (from, to) = (side(ZeroPageDetection::Legacy), side(ZeroPageDetection::Legacy));
    let used = to.block.used().unwrap();
    head("Records taken, each page, into empty memory", "pwrite");
    for (name, content) in
        [("data", Content::Data), ("every other page zeros", Content::EveryOther)]
    {
        fill(from.block.mapping(), content);
        let bytes = sections(&from);
        let pages = vec![0xa5; WRITE as usize];
        let ours = || {
            to.block.discard(used).unwrap();
            warm();
            decode(&to, &bytes)
        };
        compare(name, RUNS, ours, || {
            to.block.discard(used).unwrap();
            warm();
            let file = to.block.ram().backing().file();
            let write = |(at, len)| file.write_all_at(&pages[..len as usize], at).unwrap();
            busy(|| content.data().for_each(write)) / PAGES
        });
    }
    head("Records of zeros taken, each page", "the look");
    fill(from.block.mapping(), Content::Zeros);
    let bytes = sections(&from);
    to.block.discard(used).unwrap();
    compare("into empty memory", RUNS, || decode(&to, &bytes), || look(&from));
}

fn main() {
    save_pages();
    load_pages();
}
