//! Streams of any content, and good streams with edits: loaded from a channel, restored from a
//! file, inspected, and answered by a hostile destination.
//!
//! What is promised: no panic and no end without an end; the guest runs only where the migration
//! succeeded, and on the source again where it did not; nothing gets where memory is discarded.

use std::fs::File;
use std::io::{Cursor, Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Duration;

use virtio_mem::ByteRange;
use virtio_mem::device::BlockBitmap;
use virtio_mem::memory::RamBlock;
use virtio_mem::migration::MigrationError;
use virtio_mem::migration::channel::Channel;
use virtio_mem::migration::devices::NoDevices;
use virtio_mem::migration::dirty::{DirtyTracker, NeverWritten};
use virtio_mem::migration::inspect::inspect;
use virtio_mem::migration::precopy::{Guest, Incoming, Outgoing, Parameters};
use virtio_mem::migration::progress::Progress;
use virtio_mem::migration::ram::{
    BlockOptions, ListOptions, MigrationBlock, RamBlocks, RamLoad, RamSave,
};
use virtio_mem::migration::snapshot::{Restore, Snapshot, restore, save};
use virtio_mem::migration::stream::Configuration;
use virtio_mem::ram_discard::{LocalRamDiscardManager, RamDiscardSource};

use crate::input::Input;

const PAGE: u64 = 4096;
const BLOCK: u64 = 16 * PAGE;
const BLOCKS: usize = 8;

/// Bounds the time of one input.
const EDITS: usize = 64;

/// How long a destination may take for a stream that may or may not have come to its end.
const PATIENCE: Duration = Duration::from_millis(10);

/// Counts what is asked of it.
#[derive(Default)]
struct Witness {
    runs: AtomicUsize,
    stops: AtomicUsize,
}

impl Guest for Witness {
    fn stop(&self) -> Result<(), String> {
        self.stops.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn run(&self) -> Result<(), String> {
        self.runs.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

/// Every other block is plugged.
struct Plugged(BlockBitmap);

impl RamDiscardSource for Plugged {
    fn region_size(&self) -> u64 {
        BLOCKS as u64 * BLOCK
    }

    fn granularity(&self) -> u64 {
        BLOCK
    }

    fn next_range(&self, section: ByteRange, populated: bool) -> Option<ByteRange> {
        let blocks = (section.start() / BLOCK) as usize..section.end().div_ceil(BLOCK) as usize;
        let run = self.0.next_run(blocks, populated)?;
        ByteRange::from_bounds(run.start as u64 * BLOCK, run.end as u64 * BLOCK)?
            .intersection(section)
    }
}

fn side() -> (Arc<RamBlocks>, Arc<MigrationBlock>) {
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let file = File::from(rustix::fs::memfd_create("fuzz", flags).unwrap());
    file.set_len(BLOCKS as u64 * BLOCK).unwrap();
    let ram = RamBlock::new("vmem0".into(), 0, BLOCKS as u64 * BLOCK, file, 0).unwrap();
    let block = MigrationBlock::map(Arc::new(ram), BlockOptions::migratable()).unwrap();
    let mut plugged = BlockBitmap::new(BLOCKS);
    (0..BLOCKS).step_by(2).for_each(|block| plugged.set(block..block + 1, true));
    let manager = LocalRamDiscardManager::new(BLOCKS as u64 * BLOCK);
    manager.add_source(Arc::new(Plugged(plugged))).unwrap();
    block.set_discard_manager(0, Arc::new(manager)).unwrap();
    let block = Arc::new(block);
    let mut blocks = RamBlocks::new();
    blocks.register(Arc::clone(&block)).unwrap();
    (Arc::new(blocks), block)
}

fn filled() -> (Arc<RamBlocks>, Arc<MigrationBlock>) {
    let (blocks, block) = side();
    for page in [0, 1, 2, 5, 33, 34, 64] {
        block.mapping().write(page * PAGE, &[page as u8 + 1; 64]);
    }
    block.mapping().write(3 * PAGE, &[0; 8]);
    (blocks, block)
}

fn assert_nothing_leaked(block: &MigrationBlock) {
    for range in block.discarded().unwrap() {
        block.for_each_data(range, |data| panic!("data in discarded {data}")).unwrap();
    }
}

fn outgoing(blocks: &RamBlocks, guest: &Witness, stream: UnixStream) -> Result<(), MigrationError> {
    let progress = Arc::new(Progress::new());
    let tracker = |_: &MigrationBlock| -> Box<dyn DirtyTracker> { Box::new(NeverWritten) };
    let ram = RamSave::new(blocks, ListOptions::default(), Arc::clone(&progress), tracker)?;
    let mut parameters = Parameters::new(Configuration::new("fuzz"));
    parameters.verdict_timeout = Duration::from_millis(30);
    let outgoing = Outgoing {
        parameters,
        guest,
        handlers: vec![Box::new(ram)],
        devices: &mut NoDevices,
        postcopy: None,
        progress: Arc::clone(&progress),
    };
    outgoing.run(Channel::new(stream, progress).unwrap())
}

fn incoming(
    blocks: Arc<RamBlocks>,
    guest: &Witness,
    stream: UnixStream,
) -> Result<(), MigrationError> {
    let progress = Arc::new(Progress::new());
    let ram = RamLoad::new(blocks, ListOptions::default(), Arc::clone(&progress));
    let incoming = Incoming {
        configuration: Configuration::new("fuzz"),
        guest,
        handlers: vec![Box::new(ram)],
        devices: &mut NoDevices,
        postcopy: None,
        progress: Arc::clone(&progress),
    };
    incoming.run(Channel::new(stream, progress).unwrap())
}

/// A good stream, as it went from a source to a destination.
fn good_stream() -> &'static [u8] {
    static STREAM: OnceLock<Vec<u8>> = OnceLock::new();
    STREAM.get_or_init(|| {
        let (near, relay_near) = UnixStream::pair().unwrap();
        let (relay_far, far) = UnixStream::pair().unwrap();
        let there = thread::spawn(move || incoming(side().0, &Witness::default(), far));
        let (mut back_from, mut back_to) =
            (relay_far.try_clone().unwrap(), relay_near.try_clone().unwrap());
        let back = thread::spawn(move || std::io::copy(&mut back_from, &mut back_to));
        let recorder = thread::spawn(move || {
            let (mut from, mut to, mut all) = (relay_near, relay_far, Vec::new());
            let mut buffer = [0; 4096];
            while let Ok(read @ 1..) = from.read(&mut buffer) {
                all.extend_from_slice(&buffer[..read]);
                if to.write_all(&buffer[..read]).is_err() {
                    break;
                }
            }
            let _ = to.shutdown(std::net::Shutdown::Both);
            all
        });
        outgoing(&filled().0, &Witness::default(), near).unwrap();
        there.join().unwrap().unwrap();
        let all = recorder.join().unwrap();
        let _ = back.join().unwrap();
        all
    })
}

/// A good file, and how much of it is not pages.
fn good_file() -> &'static [u8] {
    static FILE: OnceLock<Vec<u8>> = OnceLock::new();
    FILE.get_or_init(|| {
        let mut file = tempfile::tempfile().unwrap();
        let snapshot = Snapshot {
            configuration: Configuration::new("fuzz"),
            blocks: &filled().0,
            devices: &mut NoDevices,
            progress: Arc::new(Progress::new()),
        };
        save(snapshot, &file).unwrap();
        let mut bytes = Vec::new();
        std::io::Seek::rewind(&mut file).unwrap();
        file.read_to_end(&mut bytes).unwrap();
        bytes
    })
}

/// Changes bytes, mostly those that are not pages, and cuts.
fn edited(good: &[u8], input: &mut Input<'_>) -> Vec<u8> {
    let mut bytes = good.to_vec();
    for _ in 0..EDITS {
        if input.is_empty() {
            break;
        }
        let (how, at, value) = (input.u8(), usize::from(input.u16()), input.u8());
        let len = bytes.len().max(1);
        match how % 8 {
            // Where headers are.
            0..=4 => {
                if let Some(byte) = bytes.get_mut(at % 300.min(len)) {
                    *byte = value;
                }
            }
            5 | 6 => {
                if let Some(byte) = bytes.get_mut(at * 37 % len) {
                    *byte ^= value;
                }
            }
            _ => bytes.truncate(at * 37 % len),
        }
    }
    bytes
}

/// Feeds `bytes` to a destination.
fn load(bytes: Vec<u8>) {
    let (mut near, far) = UnixStream::pair().unwrap();
    let writing = thread::spawn(move || {
        let _ = near.write_all(&bytes);
        // A source that ended its direction at once would not be told that the guest is taken.
        let mut rest = Vec::new();
        near.set_read_timeout(Some(PATIENCE)).unwrap();
        let _ = near.read_to_end(&mut rest);
        let _ = near.shutdown(std::net::Shutdown::Write);
        near.set_read_timeout(None).unwrap();
        let _ = near.read_to_end(&mut rest);
    });
    let ((blocks, block), guest) = (side(), Witness::default());
    let loaded = incoming(blocks, &guest, far);
    writing.join().unwrap();
    assert_eq!(guest.runs.load(Ordering::Relaxed), usize::from(loaded.is_ok()), "{loaded:?}");
    assert_nothing_leaked(&block);
}

/// Restores `bytes` as a file.
fn restored(bytes: &[u8]) {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(bytes, 0).unwrap();
    let (blocks, block) = side();
    let what = Restore {
        configuration: Configuration::new("fuzz"),
        blocks,
        devices: &mut NoDevices,
        threads: 1,
        progress: Arc::new(Progress::new()),
    };
    let _ = restore(what, &file);
    assert_nothing_leaked(&block);
}

/// A source that hears `bytes`, whatever it sends.
fn answered(bytes: Vec<u8>) {
    let (near, mut far) = UnixStream::pair().unwrap();
    let there = thread::spawn(move || {
        let _ = far.write_all(&bytes);
        let mut rest = Vec::new();
        let _ = far.read_to_end(&mut rest);
    });
    let ((blocks, _block), guest) = (filled(), Witness::default());
    let sent = outgoing(&blocks, &guest, near);
    there.join().unwrap();
    let (runs, stops) = (guest.runs.load(Ordering::Relaxed), guest.stops.load(Ordering::Relaxed));
    assert_eq!(runs + usize::from(sent.is_ok()), stops, "{sent:?}");
}

/// The body of the target.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    match input.u8() % 6 {
        0 => load(edited(good_stream(), &mut input)),
        1 => load(input.rest().to_vec()),
        2 => restored(&edited(good_file(), &mut input)),
        3 => {
            inspect(Cursor::new(edited(good_file(), &mut input)));
        }
        4 => {
            inspect(Cursor::new(edited(good_stream(), &mut input)));
        }
        _ => answered(input.rest().to_vec()),
    }
}
