//! Streams of any content, and good streams with edits: loaded from a channel, restored from a
//! file, inspected, and answered by a hostile destination.
//!
//! What is promised: no panic and no end without an end; the guest runs only where the migration
//! succeeded, and on the source again where it did not; nothing gets where memory is discarded.

use std::cell::RefCell;
use std::fs::File;
use std::io::{Cursor, Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, mpsc};
use std::thread;
use std::time::Duration;

use ram_discard::{ByteRange, LocalRamDiscardManager, RamDiscardSource};
use virtio_mem::device::BlockBitmap;
use ram_discard::memory::RamBlock;
use migration::MigrationError;
use migration::channel::Channel;
use migration::devices::NoDevices;
use migration::dirty::{DirtyTracker, NeverWritten};
use migration::inspect::inspect;
use migration::precopy::{Guest, Incoming, Outgoing, Parameters};
use migration::progress::Progress;
use migration::ram::{BlockOptions, ListOptions, MigrationBlock, RamBlocks, RamLoad, RamSave};
use migration::snapshot::{Restore, Snapshot, restore, save};
use migration::stream::Configuration;

use crate::input::Input;

pub(crate) const PAGE: u64 = 4096;
pub(crate) const BLOCK: u64 = 16 * PAGE;
pub(crate) const BLOCKS: usize = 8;

/// Bounds the time of one input.
const EDITS: usize = 64;

/// How long the other side may take for bytes that may or may not be all that it waits for.
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
pub(crate) struct Plugged(BlockBitmap);

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

pub(crate) fn plugged() -> Plugged {
    let mut plugged = BlockBitmap::new(BLOCKS);
    (0..BLOCKS).step_by(2).for_each(|block| plugged.set(block..block + 1, true));
    Plugged(plugged)
}

fn side() -> (Arc<RamBlocks>, Arc<MigrationBlock>) {
    let file = memfd("fuzz");
    file.set_len(BLOCKS as u64 * BLOCK).unwrap();
    let ram = RamBlock::new("vmem0".into(), 0, BLOCKS as u64 * BLOCK, file, 0).unwrap();
    let block = MigrationBlock::map(Arc::new(ram), BlockOptions::migratable()).unwrap();
    let manager = LocalRamDiscardManager::new(BLOCKS as u64 * BLOCK);
    manager.add_source(Arc::new(plugged())).unwrap();
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
    parameters.switchover_timeout = Duration::from_millis(30);
    let outgoing = Outgoing {
        parameters,
        guest,
        handlers: vec![Box::new(ram)],
        devices: &mut NoDevices,
        postcopy: None,
        progress: Arc::clone(&progress),
    };
    outgoing.run(Channel::new(stream, progress).unwrap()).map_err(|failed| failed.error)
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

/// What follows the bytes of a peer.
///
/// A direction that stays open costs time where more is waited for, so only some inputs have it.
#[derive(Clone, Copy, PartialEq)]
enum Ending {
    /// The direction stays open: bytes that mean nothing follow, then silence.
    Open,
    /// Such bytes follow, and then the end.
    Garbage,
    /// The end.
    Closed,
}

impl Ending {
    fn choose(input: &mut Input<'_>) -> Self {
        match input.u8() % 4 {
            0 => Ending::Open,
            1 => Ending::Garbage,
            _ => Ending::Closed,
        }
    }
}

/// More than a page and the longest string: what waits for less fails by it, and not by silence.
const GARBAGE: [u8; 8 << 10] = [0xff; 8 << 10];

/// Has the other end of `stream` send `bytes` and read what comes, until `stream` is closed.
///
/// One thread serves all inputs: to start one takes longer than most inputs do.
fn converse(stream: UnixStream, bytes: Vec<u8>, ending: Ending) {
    type Job = (UnixStream, Vec<u8>, Ending);
    thread_local! {
        static PEER: mpsc::Sender<Job> = {
            let (jobs, next) = mpsc::channel::<Job>();
            thread::spawn(move || next.iter().for_each(|(stream, bytes, ending)| peer(stream, &bytes, ending)));
            jobs
        };
    }
    PEER.with(|peer| peer.send((stream, bytes, ending)).unwrap());
}

fn peer(mut stream: UnixStream, bytes: &[u8], ending: Ending) {
    // Each fails when the other side has seen enough.
    let _ = stream.write_all(bytes);
    if ending != Ending::Closed {
        let _ = stream.write_all(&GARBAGE);
    }
    let mut rest = Vec::new();
    if ending == Ending::Open {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let _ = stream.read_to_end(&mut rest);
        stream.set_read_timeout(None).unwrap();
    }
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let _ = stream.read_to_end(&mut rest);
}

/// Changes bytes, mostly those that are not pages, and cuts. Returns what was there before, and
/// how long the rest is; [`undo`] takes it.
fn edit(bytes: &mut [u8], input: &mut Input<'_>) -> (Vec<(usize, u8)>, usize) {
    let (mut before, mut rest) = (Vec::new(), bytes.len());
    for _ in 0..EDITS {
        if input.is_empty() {
            break;
        }
        let (how, at, value) = (input.u8(), usize::from(input.u16()), input.u8());
        let len = rest.max(1);
        let (at, value) = match how % 8 {
            // Where headers are.
            0..=4 => (at % 300.min(len), value),
            5 | 6 => (at * 37 % len, value ^ bytes[at * 37 % len]),
            _ => {
                rest = at * 37 % len;
                continue;
            }
        };
        if at < rest {
            before.push((at, bytes[at]));
            bytes[at] = value;
        }
    }
    (before, rest)
}

fn undo(bytes: &mut [u8], before: &[(usize, u8)]) {
    before.iter().rev().for_each(|&(at, value)| bytes[at] = value);
}

fn edited(good: &[u8], input: &mut Input<'_>) -> Vec<u8> {
    let mut bytes = good.to_vec();
    let (_, rest) = edit(&mut bytes, input);
    bytes.truncate(rest);
    bytes
}

/// The good file with edits, in memory and as a file. What is edited is undone afterwards, since
/// most of it is holes, which would cost more than the rest of an input does.
struct Edited {
    bytes: Vec<u8>,
    /// Where its pages are that are not holes.
    data: Vec<usize>,
    file: File,
}

impl Edited {
    fn new() -> Self {
        let bytes = good_file().to_vec();
        let page = PAGE as usize;
        let holds_data = |at: &usize| bytes[*at..].iter().take(page).any(|byte| *byte != 0);
        let data = (0..bytes.len()).step_by(page).filter(holds_data).collect();
        let edited = Self { bytes, data, file: memfd("file") };
        edited.write_from(0);
        edited
    }

    /// Makes the file what the bytes are, from a place on.
    fn write_from(&self, from: usize) {
        self.file.set_len(self.bytes.len() as u64).unwrap();
        for &at in &self.data {
            let end = (at + PAGE as usize).min(self.bytes.len());
            if end > from {
                self.file.write_all_at(&self.bytes[at..end], at as u64).unwrap();
            }
        }
    }

    fn write_byte(&self, at: usize) {
        self.file.write_all_at(&self.bytes[at..=at], at as u64).unwrap();
    }

    fn with<T>(&mut self, input: &mut Input<'_>, action: impl FnOnce(&[u8], &File) -> T) -> T {
        let (before, rest) = edit(&mut self.bytes, input);
        before.iter().for_each(|&(at, _)| self.write_byte(at));
        self.file.set_len(rest as u64).unwrap();
        let done = action(&self.bytes[..rest], &self.file);
        undo(&mut self.bytes, &before);
        self.write_from(rest);
        before.iter().for_each(|&(at, _)| self.write_byte(at));
        done
    }
}

pub(crate) fn memfd(name: &str) -> File {
    File::from(rustix::fs::memfd_create(name, rustix::fs::MemfdFlags::CLOEXEC).unwrap())
}

fn with_edited_file<T>(input: &mut Input<'_>, action: impl FnOnce(&[u8], &File) -> T) -> T {
    thread_local!(static EDITED: RefCell<Edited> = RefCell::new(Edited::new()));
    EDITED.with(|edited| edited.borrow_mut().with(input, action))
}

/// Feeds `bytes` to a destination.
fn load(bytes: Vec<u8>, ending: Ending) {
    let (near, far) = UnixStream::pair().unwrap();
    converse(near, bytes, ending);
    let ((blocks, block), guest) = (side(), Witness::default());
    let loaded = incoming(blocks, &guest, far);
    assert_eq!(guest.runs.load(Ordering::Relaxed), usize::from(loaded.is_ok()), "{loaded:?}");
    assert_nothing_leaked(&block);
}

/// Restores a guest from `file`.
fn restored(file: &File) {
    let (blocks, block) = side();
    let what = Restore {
        configuration: Configuration::new("fuzz"),
        blocks,
        devices: &mut NoDevices,
        threads: 1,
        progress: Arc::new(Progress::new()),
    };
    let _ = restore(what, file);
    assert_nothing_leaked(&block);
}

/// A source that hears `bytes`, whatever it sends.
fn answered(bytes: Vec<u8>, ending: Ending) {
    let (near, far) = UnixStream::pair().unwrap();
    converse(far, bytes, ending);
    let ((blocks, _block), guest) = (filled(), Witness::default());
    let sent = outgoing(&blocks, &guest, near);
    let (runs, stops) = (guest.runs.load(Ordering::Relaxed), guest.stops.load(Ordering::Relaxed));
    assert_eq!(runs + usize::from(sent.is_ok()), stops, "{sent:?}");
}

/// The body of the target.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    match input.u8() % 6 {
        kind @ (0 | 1 | 5) => {
            let ending = Ending::choose(&mut input);
            match kind {
                0 => load(edited(good_stream(), &mut input), ending),
                1 => load(input.rest().to_vec(), ending),
                _ => answered(input.rest().to_vec(), ending),
            }
        }
        2 => with_edited_file(&mut input, |_, file| restored(file)),
        3 => {
            with_edited_file(&mut input, |bytes, _| inspect(Cursor::new(bytes)));
        }
        _ => {
            inspect(Cursor::new(edited(good_stream(), &mut input)));
        }
    }
}
