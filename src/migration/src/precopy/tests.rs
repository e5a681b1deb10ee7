//! Whole migrations between two sides in one process, over a socket pair, of real memory.

mod auto_converge;
mod broken_channel;
mod channels;
mod elastic;
mod freeze;
mod handlers;
mod handover;
mod hostile;
mod one_way;
mod patience;
mod resizable;
mod rounds;
mod shared;
mod steering;
mod time_left;
mod transports;

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use ram_discard::ByteRange;

use super::*;
use crate::MigrationError;
use crate::channel::Channel;
use crate::devices::NoDevices;
use crate::dirty::DirtyTracker;
use crate::handler::{PostcopySave, SaveHandler};
use crate::page_bitmap::PageBitmap;
use crate::progress::{MigrationInfo, Progress, Status};
use crate::ram::{
    BlockError, BlockOptions, ListOptions, MigrationBlock, Participation, RamBlocks, RamLoad,
    RamSave, ZeroPageDetection,
};
use crate::stream::Configuration;
use crate::test_support::{BLOCK, Log, PAGE, Side, TestManager, fill, memfd, migration_block};
use crate::test_utils::CountedStream;

/// Reports 64 pages that are written anew whenever it is asked, of which `at_sync` is told: how often by now.
struct Restless<F> {
    file: File,
    syncs: u32,
    at_sync: F,
}

impl<F: FnMut(u32)> Restless<F> {
    fn new(side: &Side, at_sync: F) -> Self {
        Self { file: side.region.try_clone().unwrap(), syncs: 0, at_sync }
    }
}

impl<F: FnMut(u32) + Send> DirtyTracker for Restless<F> {
    fn start(&mut self, _populated: &[ByteRange]) -> io::Result<()> {
        Ok(())
    }

    fn sync(&mut self, dirty: &mut PageBitmap) -> io::Result<()> {
        self.syncs += 1;
        (self.at_sync)(self.syncs);
        fill(&self.file, 0..64, 3);
        dirty.set_range(0..64);
        Ok(())
    }

    fn clear(&mut self, _range: ByteRange) -> io::Result<()> {
        Ok(())
    }

    fn stop(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A guest that notes what is asked of it.
#[derive(Default)]
struct Witness {
    log: Log,
    /// Done when the guest is stopped.
    last_words: Mutex<Option<Box<dyn FnOnce() + Send>>>,
    refuses_to_stop: bool,
    refuses_to_run: bool,
}

impl Witness {
    fn log(&self) -> Vec<&'static str> {
        self.log.lock().unwrap().clone()
    }
}

impl Guest for Witness {
    fn stop(&self) -> Result<(), String> {
        if self.refuses_to_stop {
            return Err("it will not".to_owned());
        }
        self.log.lock().unwrap().push("stop");
        if let Some(last_words) = self.last_words.lock().unwrap().take() {
            last_words();
        }
        Ok(())
    }

    fn run(&self) -> Result<(), String> {
        if self.refuses_to_run {
            return Err("it will not".to_owned());
        }
        self.log.lock().unwrap().push("run");
        Ok(())
    }
}

/// What a tracker is told, and pages that it is to report.
#[derive(Clone, Default)]
struct Script {
    dirty: Arc<Mutex<Vec<u64>>>,
    calls: Arc<Mutex<Vec<String>>>,
}

impl Script {
    fn write(&self, file: &File, page: u64, byte: u8) {
        file.write_all_at(&[byte; PAGE as usize], page * PAGE).unwrap();
        self.dirty.lock().unwrap().push(page);
    }

    fn note(&self, call: String) {
        self.calls.lock().unwrap().push(call);
    }
}

impl DirtyTracker for Script {
    fn start(&mut self, populated: &[ByteRange]) -> io::Result<()> {
        self.note(format!("start {populated:?}"));
        Ok(())
    }

    fn sync(&mut self, dirty: &mut PageBitmap) -> io::Result<()> {
        self.note("sync".to_owned());
        for page in self.dirty.lock().unwrap().drain(..) {
            dirty.set(page);
        }
        Ok(())
    }

    fn clear(&mut self, range: ByteRange) -> io::Result<()> {
        self.note(format!("clear {range:?}"));
        Ok(())
    }

    fn stop(&mut self) -> io::Result<()> {
        self.note("stop".to_owned());
        Ok(())
    }
}

fn parameters() -> Parameters {
    Parameters::new(Configuration::new("test"))
}

type Outcome = Result<(), MigrationError>;

struct Run {
    outgoing: Outcome,
    /// Where the guest is after a failure.
    guest: Option<GuestAfter>,
    incoming: Outcome,
    source: Arc<Witness>,
    destination: Arc<Witness>,
    sent: MigrationInfo,
}

/// Takes a guest from the other end of `channel`.
fn receive(
    to: &Side,
    guest: &Arc<Witness>,
    channel: impl Into<OwnedFd>,
) -> thread::JoinHandle<Outcome> {
    receive_with(Configuration::new("test"), ListOptions::default(), to, guest, channel)
}

fn receive_with(
    configuration: Configuration,
    options: ListOptions,
    to: &Side,
    guest: &Arc<Witness>,
    channel: impl Into<OwnedFd>,
) -> thread::JoinHandle<Outcome> {
    let (blocks, guest, channel) = (Arc::clone(&to.blocks), Arc::clone(guest), channel.into());
    thread::spawn(move || {
        let progress = Arc::new(Progress::new());
        let ram = RamLoad::new(blocks, options, Arc::clone(&progress));
        let incoming = Incoming {
            configuration,
            guest: &*guest,
            handlers: vec![Box::new(ram)],
            devices: &mut NoDevices,
            postcopy: None,
            progress: Arc::clone(&progress),
        };
        incoming.run(Channel::new(channel, progress).unwrap())
    })
}

fn migrate_over(
    from: &Side,
    to: &Side,
    script: &Script,
    source: Witness,
    progress: Arc<Progress>,
    channels: (UnixStream, UnixStream),
) -> Run {
    let channels = (channels.0.into(), channels.1.into());
    migrate_by(parameters(), from, to, script, source, progress, channels)
}

fn migrate_by(
    parameters: Parameters,
    from: &Side,
    to: &Side,
    script: &Script,
    source: Witness,
    progress: Arc<Progress>,
    channels: (OwnedFd, OwnedFd),
) -> Run {
    let (source, destination) = (Arc::new(source), Arc::new(Witness::default()));
    if let Some(manager) = &from.manager {
        manager.watch(&source.log);
    }
    let there = receive(to, &destination, channels.1);
    let tracker = |block: &MigrationBlock| -> Box<dyn DirtyTracker> {
        if block.id() == "vmem0" { Box::new(script.clone()) } else { Box::<Script>::default() }
    };
    let mut guest = None;
    let outgoing =
        RamSave::new(&from.blocks, ListOptions::default(), Arc::clone(&progress), tracker)
            .and_then(|ram| {
                let outgoing = Outgoing {
                    parameters,
                    guest: &*source,
                    handlers: vec![Box::new(ram)],
                    devices: &mut NoDevices,
                    postcopy: None,
                    progress: Arc::clone(&progress),
                };
                let channel = Channel::new(channels.0, Arc::clone(&progress)).unwrap();
                outgoing.run(channel).map_err(|failed| {
                    guest = Some(failed.guest);
                    failed.error
                })
            });
    let incoming = there.join().unwrap();
    Run { outgoing, guest, incoming, source, destination, sent: progress.snapshot() }
}

fn migrate(from: &Side, to: &Side, script: &Script, source: Witness) -> Run {
    let channels = UnixStream::pair().unwrap();
    migrate_over(from, to, script, source, Arc::new(Progress::new()), channels)
}

#[test]
fn only_pages_that_exist_are_sent_and_nothing_is_allocated_for_the_rest() {
    let (from, to) = (Side::new(&[1, 4, 5]), Side::new(&[1, 4, 5]));
    fill(&from.region, 64..96, 7);
    fill(&from.region, 300..310, 8);
    // Zeros that exist, a page that was written although discarded, and boot memory.
    fill(&from.region, 310..314, 0);
    fill(&from.region, 640..643, 9);
    fill(&from.boot, 3..5, 5);
    // What the destination held before goes.
    fill(&to.region, 64..200, 0xee);
    let script = Script::default();
    let writing = (script.clone(), from.region.try_clone().unwrap());
    let last_words: Box<dyn FnOnce() + Send> = Box::new(move || {
        writing.0.write(&writing.1, 70, 0x70);
        writing.0.write(&writing.1, 311, 0x31);
        writing.0.write(&writing.1, 80, 0);
        // Discarded: to be masked and counted.
        writing.0.write(&writing.1, 700, 0xdd);
    });
    let source = Witness { last_words: Mutex::new(Some(last_words)), ..Witness::default() };
    let before = from.resident();
    let run = migrate(&from, &to, &script, source);
    run.outgoing.unwrap();
    run.incoming.unwrap();
    assert_eq!(run.source.log(), ["freeze", "stop", "thaw"]);
    assert_eq!(run.destination.log(), ["run"]);

    assert_eq!(to.page(64), [7; 4096]);
    assert_eq!(to.page(70), [0x70; 4096]);
    assert_eq!(to.page(80), [0; 4096]);
    assert_eq!(to.page(300), [8; 4096]);
    assert_eq!(to.page(311), [0x31; 4096]);
    assert_eq!(to.page(640), [0; 4096]);
    // Sent, but zero at the end: page 80. Sent as zeros first: 311.
    assert_eq!(to.resident(), (32 + 10 - 1 + 1, 2));
    assert_eq!(from.resident(), (before.0 + 1, before.1));

    assert_eq!(run.sent.status, Status::Completed);
    assert_eq!(run.sent.normal, 32 + 10 + 2 + 2);
    assert_eq!(run.sent.duplicate, 4 + 1);
    assert_eq!(run.sent.discarded, 13 * 64);
    assert_eq!(run.sent.holes, 3 * 64 - 46 + 64 - 2);
    assert_eq!(run.sent.total, (46 + 2) * PAGE);
    assert_eq!(run.sent.dirty_while_discarded, 1);
    assert_eq!(run.sent.remaining, 0);
    assert!(run.sent.transferred < (46 + 2 + 3) * (PAGE + 16) + 1000);
}

#[test]
fn a_vmm_that_does_not_look_for_holes_reads_allocates_and_sends_the_whole_region() {
    let pages = 16 * BLOCK / PAGE;
    let normal = [(ZeroPageDetection::Legacy, 32), (ZeroPageDetection::None, pages)];
    for (zero_page_detection, normal) in normal {
        let (mut from, mut to) = (Side::new(&[]), Side::new(&[]));
        for side in [&mut from, &mut to] {
            let mut options = BlockOptions { send_holes: true, ..BlockOptions::migratable() };
            options.zero_page_detection = zero_page_detection;
            let mut blocks = RamBlocks::new();
            let region = migration_block("vmem0", &side.region, 16 * BLOCK, options);
            blocks.register(Arc::new(region)).unwrap();
            side.blocks = Arc::new(blocks);
        }
        fill(&from.region, 64..96, 7);
        let run = migrate(&from, &to, &Script::default(), Witness::default());
        assert_eq!((run.sent.normal, run.sent.duplicate), (normal, pages - normal));
        assert_eq!((run.sent.discarded, run.sent.holes), (0, 0));
        assert_eq!((from.resident().0, to.resident().0), (pages, normal));
    }
}

#[test]
fn a_section_of_zeros_ends_though_it_has_hardly_any_bytes() {
    let size = 128 << 20;
    let options = BlockOptions { send_holes: true, ..BlockOptions::migratable() };
    let mut blocks = RamBlocks::new();
    blocks.register(Arc::new(migration_block("vmem0", &memfd(size), size, options))).unwrap();
    let tracker = |_: &MigrationBlock| -> Box<dyn DirtyTracker> { Box::<Script>::default() };
    let progress = Arc::new(Progress::new());
    let mut ram =
        RamSave::new(&blocks, ListOptions::default(), Arc::clone(&progress), tracker).unwrap();
    let mut sink = CountedStream::default();
    ram.setup(&mut sink).unwrap();
    assert_eq!(ram.pending_estimate(), size);
    ram.iterate(&mut sink, 64 << 20).unwrap();
    let left = ram.pending_estimate();
    assert!(0 < left && left < size, "{left:#x}");
    assert_eq!(progress.snapshot().remaining, left);
    ram.complete(&mut sink).unwrap();
    assert_eq!(ram.pending_estimate(), 0);
}

#[test]
fn a_destination_that_has_the_range_discarded_refuses_the_page() {
    let (from, to) = (Side::new(&[0, 1]), Side::new(&[0]));
    fill(&from.region, 60..70, 3);
    let run = migrate(&from, &to, &Script::default(), Witness::default());
    let error = run.incoming.unwrap_err().to_string();
    assert!(error.contains("\"vmem0\": a page at 0x40000"), "{error}");
    assert!(error.contains("discarded range"), "{error}");
    let error = run.outgoing.unwrap_err();
    assert!(matches!(error, MigrationError::Refused { .. } | MigrationError::Io { .. }), "{error}");
    assert_eq!(run.source.log().last(), Some(&"thaw"));
    // Either it was never stopped, or it goes on.
    let stops = run.source.log().iter().filter(|&&call| call == "stop").count();
    let runs = run.source.log().iter().filter(|&&call| call == "run").count();
    assert_eq!(stops, runs);
    assert!(run.destination.log().is_empty());
    assert_eq!(run.sent.status, Status::Failed);
    assert!(run.sent.error_desc.is_some());
}

#[test]
fn blocks_that_differ_are_refused_by_name_with_both_values() {
    let (from, mut to) = (Side::new(&[0]), Side::new(&[0]));
    let mut blocks = RamBlocks::new();
    let options = BlockOptions::migratable();
    blocks.register(Arc::new(migration_block("vmem0", &to.region, 8 * BLOCK, options))).unwrap();
    blocks.register(Arc::new(migration_block("ram", &to.boot, BLOCK, options))).unwrap();
    to.blocks = Arc::new(blocks);
    let run = migrate(&from, &to, &Script::default(), Witness::default());
    let error = run.incoming.unwrap_err().to_string();
    assert_eq!(error, "RAM block \"vmem0\": length 0x400000 in the stream, 0x200000 here");

    let mut blocks = RamBlocks::new();
    let left_out =
        BlockOptions { participation: Participation::LeftOut, ..BlockOptions::default() };
    blocks.register(Arc::new(migration_block("vmem0", &to.region, 16 * BLOCK, left_out))).unwrap();
    to.blocks = Arc::new(blocks);
    let run = migrate(&from, &to, &Script::default(), Witness::default());
    let error = run.incoming.unwrap_err().to_string();
    assert_eq!(error, "RAM block \"vmem0\" of the stream is not migratable here");
}

#[test]
fn undeclared_blocks_are_refused_before_anything_is_sent() {
    let file = memfd(BLOCK);
    let mut blocks = RamBlocks::new();
    let block = Arc::new(migration_block("fw", &file, BLOCK, BlockOptions::default()));
    blocks.register(Arc::clone(&block)).unwrap();
    let twice = blocks.register(block).unwrap_err();
    assert_eq!(twice, BlockError::Duplicate { id: "fw".to_owned() });
    let tracker = |_: &MigrationBlock| -> Box<dyn DirtyTracker> { Box::<Script>::default() };
    let error = RamSave::new(&blocks, ListOptions::default(), Arc::new(Progress::new()), tracker);
    assert!(matches!(error, Err(MigrationError::Block(BlockError::Undeclared { .. }))));
}

#[test]
fn a_resizable_block_follows_the_source() {
    let (file, other) = (memfd(BLOCK), memfd(2 * BLOCK));
    let side = |file: &File, size, used| {
        let options = BlockOptions { resizable: Some(used), ..BlockOptions::migratable() };
        let mut blocks = RamBlocks::new();
        blocks.register(Arc::new(migration_block("fw", file, size, options))).unwrap();
        let region = file.try_clone().unwrap();
        Side { region, boot: memfd(PAGE), blocks: Arc::new(blocks), manager: None }
    };
    let (from, to) = (side(&file, BLOCK, 16 * PAGE), side(&other, 2 * BLOCK, 4 * PAGE));
    fill(&file, 15..16, 0xaa);
    migrate(&from, &to, &Script::default(), Witness::default()).incoming.unwrap();
    assert_eq!(to.blocks.get("fw").unwrap().used_length(), 16 * PAGE);
    assert_eq!(to.page(15), [0xaa; 4096]);
    let (from, to) = (side(&other, 2 * BLOCK, 2 * BLOCK), side(&file, BLOCK, PAGE));
    let error = migrate(&from, &to, &Script::default(), Witness::default()).incoming;
    let error = error.unwrap_err().to_string();
    assert_eq!(error, "RAM block \"fw\": length 0x80000 in the stream, 0x1000 here");
}

#[test]
fn a_guest_that_cannot_be_stopped_stays() {
    let (from, to) = (Side::new(&[0]), Side::new(&[0]));
    let stubborn = Witness { refuses_to_stop: true, ..Witness::default() };
    let run = migrate(&from, &to, &Script::default(), stubborn);
    assert!(matches!(run.outgoing, Err(MigrationError::Vmm { .. })));
    assert_eq!(run.guest, Some(GuestAfter::RunsHere));
    assert!(run.incoming.is_err());
    assert_eq!(run.source.log(), ["freeze", "thaw"]);
    assert!(run.destination.log().is_empty());
}

#[test]
fn a_guest_that_cannot_be_let_run_again_is_told_to_be_stopped_here_and_not_cancelled() {
    let (from, to) = (Side::new(&[0]), Side::new(&[0]));
    fill(&from.region, 0..10, 1);
    let progress = Arc::new(Progress::new());
    let cancelling = Arc::clone(&progress);
    let last_words: Box<dyn FnOnce() + Send> = Box::new(move || cancelling.cancel());
    let last_words = Mutex::new(Some(last_words));
    let stubborn = Witness { last_words, refuses_to_run: true, ..Witness::default() };
    let channels = UnixStream::pair().unwrap();
    let run = migrate_over(&from, &to, &Script::default(), stubborn, progress, channels);
    assert!(matches!(run.outgoing, Err(MigrationError::Vmm { .. })), "{:?}", run.outgoing);
    assert_eq!(run.guest, Some(GuestAfter::StoppedHere));
    assert_eq!(run.sent.status, Status::Failed);
    assert_eq!(run.source.log(), ["freeze", "stop", "thaw"]);
}
