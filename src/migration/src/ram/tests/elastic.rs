//! Block state that changes while memory is sent, and while it arrives: both handlers, with all that is on the way
//! between them in the hands of the test.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};

use proptest::prelude::*;
use ram_discard::MemoryState;
use vmstate::wire::WireReader;

use super::*;
use crate::MigrationError;
use crate::channel::delayed::Delayed;
use crate::handler::LoadHandler;
use crate::ram::changes::Changes;
use crate::stream::{
    BlockStateChange, Command, Record, SectionKind, put_continued, put_footer, read_footer,
    read_record,
};
use crate::test_support::PAGE;
use crate::test_utils::KeptStream;

mod arriving;
mod channels;
mod model;
mod records;
mod requests;

const BLOCKS: usize = 16;
const PAGES: u64 = BLOCK / PAGE;

/// What is done next.
#[derive(Clone, Debug)]
enum Op {
    /// The guest plugs, or unplugs, whatever the block is.
    Request {
        block: usize,
        plug: bool,
    },
    /// As [`Op::Request`] that plugs; the engine does nothing before it was answered, one way or another.
    PlugInTime(usize),
    /// Writes a page of a block, if it is plugged.
    Write {
        block: usize,
        page: u64,
        byte: u8,
    },
    Sync,
    /// Sends about so many pages.
    Iterate(u64),
    /// The destination takes so many records.
    Deliver(usize),
    /// The source hears so many answers.
    Hear(usize),
    /// The destination refuses to populate this block from now on.
    Refuse(Option<u64>),
    /// So many bytes of what was sent over one of the channels for pages arrive.
    Arrive(prop::sample::Index, usize),
}

/// A section of RAM with this payload.
fn section(kind: SectionKind, payload: impl FnOnce(&mut KeptStream)) -> Vec<u8> {
    let mut out = KeptStream::new().unwrap();
    payload(&mut out);
    let mut section = Vec::new();
    put_continued(&mut section, kind, 0);
    section.extend(out.bytes().unwrap());
    put_footer(&mut section, 0);
    section
}

/// A side has these blocks plugged, with these pages.
fn assert_holds(side: &Side, model: &[Option<Vec<u8>>]) -> Result<(), TestCaseError> {
    let mut held = vec![0; BLOCK as usize];
    for (block, pages) in model.iter().enumerate() {
        prop_assert_eq!(side.device().is_plugged(block), pages.is_some(), "block {}", block);
        let Some(pages) = pages else { continue };
        side.region.read_exact_at(&mut held, block as u64 * BLOCK).unwrap();
        for (page, (&byte, held)) in pages.iter().zip(held.chunks(PAGE as usize)).enumerate() {
            prop_assert!(held == [byte; PAGE as usize], "page {} of block {}", page, block);
        }
    }
    Ok(())
}

/// A guest's driver: a thread that asks its device to plug, one block at a time.
struct Driver {
    requests: mpsc::Sender<(usize, Option<Arc<Changes>>)>,
    answers: mpsc::Receiver<Result<(), String>>,
    /// Whether the last request is answered.
    answered: Arc<AtomicBool>,
}

impl Driver {
    fn start(device: &Arc<TestManager>) -> Self {
        let (requests, asked) = mpsc::channel::<(_, Option<Arc<Changes>>)>();
        let (answer, answers) = mpsc::channel();
        let answered = Arc::new(AtomicBool::new(false));
        let (device, done) = (Arc::clone(device), Arc::clone(&answered));
        thread::spawn(move || {
            for (block, changes) in asked {
                let answered = device.plug(block);
                // Before the answer, after which there may be another request.
                done.store(true, Ordering::SeqCst);
                if let Some(changes) = changes {
                    changes.tell_ended();
                }
                // Fails when the test is over.
                let _ = answer.send(answered);
            }
        });
        Self { requests, answers, answered }
    }

    /// Asks, and returns when the engine is waited for, or there is an answer.
    fn ask(&self, block: usize, save: &RamSave) {
        self.answered.store(false, Ordering::SeqCst);
        self.requests.send((block, save.shared().cloned())).unwrap();
        if let Some(changes) = save.shared() {
            changes.wait_for_request(|| self.is_answered());
        }
    }

    fn is_answered(&self) -> bool {
        self.answered.load(Ordering::SeqCst)
    }
}

/// Both ends, with all that is on the way between them.
struct Pair {
    from: Side,
    to: Side,
    save: RamSave,
    load: RamLoad,
    dirty: Told,
    stream: VecDeque<Vec<u8>>,
    answers: VecDeque<(u32, Option<String>)>,
    /// Of each plugged block what its pages are filled with.
    model: Vec<Option<Vec<u8>>>,
    progress: Arc<Progress>,
    driver: Driver,
    /// The block that it is asking to plug.
    plugs: Option<usize>,
    /// How long it waits for the destination.
    patience: Duration,
    /// For pages, beside the main one: what decides when they arrive.
    ways: Vec<Arc<Delayed>>,
}

impl Pair {
    fn new(plugged: &[usize], patience: Duration) -> Self {
        let mut model = vec![None; BLOCKS];
        plugged.iter().for_each(|&block| model[block] = Some(vec![0; PAGES as usize]));
        Self::from(Side::elastic(plugged), model, patience, 0)
    }

    /// Begins to move the guest of `from`, which has this, to a side that is new, with so many channels for pages.
    fn from(from: Side, model: Vec<Option<Vec<u8>>>, patience: Duration, channels: usize) -> Self {
        let plugged: Vec<_> = (0..BLOCKS).filter(|&block| model[block].is_some()).collect();
        let to = Side::elastic(&plugged);
        let (dirty, progress) = (Told::default(), Arc::new(Progress::new()));
        let (reports, sending) = (dirty.clone(), Arc::clone(&progress));
        let mut save = RamSave::new(&from.blocks, ListOptions::default(), sending, move |block| {
            match block.id() {
                "vmem0" => Box::new(reports.clone()) as Box<dyn DirtyTracker>,
                _ => Box::<Told>::default(),
            }
        })
        .unwrap();
        let loading = Arc::new(Progress::new());
        let mut load = RamLoad::new(Arc::clone(&to.blocks), ListOptions::default(), loading);
        let mut ways = Vec::new();
        if channels != 0 {
            let (near, far, between) = channels::pairs(channels, &progress);
            ways = between;
            save = save.with_channels(near);
            load = load.with_channels(far);
            let configuration = channels::configuration();
            save.configure(&configuration).unwrap();
            load.configure(&configuration).unwrap();
        }
        load.load_setup().unwrap();
        save.freeze().unwrap();
        let mut first = KeptStream::new().unwrap();
        save.setup(&mut first).unwrap();
        let first = first.bytes().unwrap();
        load.load(SectionKind::Start, 4, &mut WireReader::new(&first[..])).unwrap();
        assert!(SaveHandler::can_follow(&save) && LoadHandler::can_follow(&load));
        save.follow(patience).unwrap();
        let (stream, answers, plugs) = Default::default();
        let driver = Driver::start(from.device());
        Self {
            from,
            to,
            save,
            load,
            dirty,
            stream,
            answers,
            model,
            progress,
            driver,
            plugs,
            patience,
            ways,
        }
    }

    /// Sends a section, and the changes after it.
    fn send(&mut self, kind: SectionKind, bytes: u64) {
        let section = section(kind, |out| match kind {
            SectionKind::End => self.save.complete(out).unwrap(),
            _ => self.save.iterate(out, bytes).unwrap(),
        });
        self.stream.push_back(section);
    }

    fn send_changes(&mut self) {
        let changes = self.save.changes().unwrap();
        if !changes.is_empty() {
            if self.save.needs_barrier() {
                let section = section(SectionKind::Part, |out| self.save.barrier(out).unwrap());
                self.stream.push_back(section);
            }
            self.stream.push_back(changes);
        }
    }

    /// The destination takes what was sent longest ago.
    fn deliver(&mut self) -> Result<(), MigrationError> {
        let Some(bytes) = self.stream.pop_front() else { return Ok(()) };
        let mut reader = WireReader::new(&bytes[..]);
        while !reader.is_at_end().unwrap() {
            match read_record(&mut reader)? {
                Record::Continued { kind, section_id } => {
                    // A section has nothing but barriers then, at which the pages before them are waited for.
                    self.ways.iter().for_each(|way| way.set_open(true));
                    let loaded = self.load.load(kind, 4, &mut reader);
                    self.ways.iter().for_each(|way| way.set_open(false));
                    loaded?;
                    read_footer(&mut reader, section_id)?;
                }
                Record::Command(Command::BlockState(change)) => {
                    let refused = self.load.block_state(&change, 0)?;
                    if change.state == MemoryState::Populated {
                        self.answers.push_back((change.number, refused));
                    }
                }
                other => panic!("{other:?}"),
            }
        }
        Ok(())
    }

    fn hear(&mut self) {
        if let Some((number, refused)) = self.answers.pop_front() {
            assert!(self.save.answered(number, refused).unwrap());
        }
    }

    /// What the guest's request is answered, which waits no longer than the request does.
    fn answer(&mut self) -> Option<(usize, Result<(), String>)> {
        Some((self.plugs.take()?, self.driver.answers.recv().unwrap()))
    }

    /// Why the guest's request was refused, once it is.
    fn refused(&mut self) -> String {
        self.answer().unwrap().1.unwrap_err()
    }

    /// What became of a guest's request, once it is answered.
    fn answered(&mut self) {
        if let Some((block, Ok(()))) = self.answer() {
            self.model[block] = Some(vec![0; PAGES as usize]);
        }
    }

    /// The guest asks to plug a block, and the engine is to see to it.
    fn plug(&mut self, block: usize) {
        self.driver.ask(block, &self.save);
        self.plugs = Some(block);
    }

    fn step(&mut self, op: Op) {
        match op {
            Op::Request { block, plug: true } if self.model[block].is_none() => {
                self.plug(block);
                while !self.driver.is_answered() {
                    self.send_changes();
                    self.deliver().unwrap();
                    self.hear();
                    if self.stream.is_empty() && self.answers.is_empty() {
                        break;
                    }
                }
                self.answered();
            }
            Op::PlugInTime(block) if self.model[block].is_none() => {
                self.plug(block);
                // Sent or not, nothing comes back in time.
                if block % 2 == 0 {
                    self.send_changes();
                }
                self.answered();
            }
            Op::Request { block, plug: false } if self.model[block].is_some() => {
                self.from.device().unplug(block, &self.from.region).unwrap();
                self.model[block] = None;
            }
            Op::Request { .. } | Op::PlugInTime(_) => {}
            Op::Write { block, page, byte } => {
                if let Some(pages) = &mut self.model[block] {
                    let at = block as u64 * PAGES + page;
                    fill(&self.from.region, at..at + 1, byte);
                    self.dirty.0.lock().unwrap().push(at);
                    pages[page as usize] = byte;
                }
            }
            Op::Sync => drop(self.save.pending_exact().unwrap()),
            Op::Iterate(pages) => {
                self.send(SectionKind::Part, pages * PAGE);
                self.send_changes();
            }
            Op::Deliver(records) => (0..records).for_each(|_| self.deliver().unwrap()),
            Op::Hear(answers) => (0..answers).for_each(|_| self.hear()),
            Op::Arrive(channel, bytes) => channel.get(&self.ways).let_through(bytes),
            Op::Refuse(block) => *self.to.device().refuses.lock().unwrap() = block,
        }
    }

    /// As before the guest is stopped.
    fn freeze(&mut self) {
        self.save.freeze().unwrap();
        loop {
            self.send_changes();
            if !self.save.has_unanswered() {
                break;
            }
            assert!(!self.stream.is_empty() || !self.answers.is_empty(), "no answer is on its way");
            self.deliver().unwrap();
            self.hear();
        }
    }

    /// The guest is handed over: both ends have what it has, and nothing else.
    fn switch(mut self) -> Result<(), TestCaseError> {
        self.freeze();
        prop_assert!(self.from.device().plug(0).is_err(), "block state is frozen");
        self.send(SectionKind::End, 0);
        while !self.stream.is_empty() {
            self.deliver().unwrap();
        }
        self.load.complete().unwrap();
        self.save.check_frozen().unwrap();
        assert_holds(&self.from, &self.model)?;
        assert_holds(&self.to, &self.model)?;
        let discarded = self.model.iter().filter(|block| block.is_none()).count() as u64 * PAGES;
        let seen = self.progress.snapshot();
        prop_assert_eq!((seen.discarded, seen.dirty_while_discarded), (discarded, 0));
        self.save.cleanup();
        self.save.thaw();
        self.load.cleanup();
        prop_assert_eq!((self.from.leaked(), self.to.leaked()), (vec![], vec![]));
        Ok(())
    }

    /// The channel breaks wherever it is: both ends are left with what they have.
    fn end(&mut self) -> Result<(), TestCaseError> {
        self.save.cleanup();
        self.save.thaw();
        self.load.cleanup();
        assert_holds(&self.from, &self.model)?;
        prop_assert_eq!((self.from.leaked(), self.to.leaked()), (vec![], vec![]));
        Ok(())
    }

    /// The channel breaks, and the guest is moved to another.
    fn retry(mut self) -> Result<Self, TestCaseError> {
        self.end()?;
        Ok(Self::from(self.from, self.model, self.patience, self.ways.len()))
    }

    /// It ends wherever it is: the device serves its guest as before.
    fn cancel(mut self) -> Result<(), TestCaseError> {
        self.end()?;
        let device = self.from.device();
        for (block, pages) in self.model.iter().enumerate() {
            match pages {
                Some(_) => device.unplug(block, &self.from.region).unwrap(),
                None => device.plug(block).unwrap(),
            }
        }
        prop_assert_eq!(self.from.leaked(), Vec::<usize>::new());
        Ok(())
    }
}

/// A pair of which a request of the guest waits for as long as it takes.
fn patient(plugged: &[usize]) -> Pair {
    Pair::new(plugged, Duration::from_secs(60))
}
