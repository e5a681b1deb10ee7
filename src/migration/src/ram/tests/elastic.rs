//! Block state that changes while memory is sent: both handlers against a naive model, and each record that must be
//! refused.

use std::collections::VecDeque;
use std::thread::JoinHandle;

use proptest::prelude::*;
use vmstate::wire::WireReader;

use super::*;
use crate::MigrationError;
use crate::channel::Sink;
use crate::handler::LoadHandler;
use crate::stream::{
    BlockStateChange, Command, Record, SectionKind, put_continued, put_footer, read_footer,
    read_record,
};
use crate::test_support::PAGE;
use crate::test_utils::KeptStream;

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
}

fn op() -> impl Strategy<Value = Op> {
    let block = || 0..BLOCKS;
    prop_oneof![
        6 => (block(), any::<bool>()).prop_map(|(block, plug)| Op::Request { block, plug }),
        1 => block().prop_map(Op::PlugInTime),
        8 => (block(), 0..PAGES, any::<u8>())
            .prop_map(|(block, page, byte)| Op::Write { block, page, byte }),
        3 => Just(Op::Sync),
        4 => (1u64..40).prop_map(Op::Iterate),
        4 => (1usize..6).prop_map(Op::Deliver),
        3 => (1usize..3).prop_map(Op::Hear),
        1 => proptest::option::of(0u64..BLOCKS as u64).prop_map(Op::Refuse),
    ]
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
    /// The request of a guest that is under way.
    plugs: Option<(usize, JoinHandle<Result<(), String>>)>,
}

impl Pair {
    fn new(plugged: &[usize], patience: Duration) -> Self {
        let (from, to) = (Side::elastic(plugged), Side::elastic(plugged));
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
        load.load_setup().unwrap();
        let mut model = vec![None; BLOCKS];
        plugged.iter().for_each(|&block| model[block] = Some(vec![0; PAGES as usize]));
        save.freeze().unwrap();
        let mut first = KeptStream::new().unwrap();
        save.setup(&mut first).unwrap();
        let first = first.bytes().unwrap();
        load.load(SectionKind::Start, 4, &mut WireReader::new(&first[..])).unwrap();
        assert!(SaveHandler::can_follow(&save) && LoadHandler::can_follow(&load));
        save.follow(patience).unwrap();
        let (stream, answers, plugs) = Default::default();
        Self { from, to, save, load, dirty, stream, answers, model, progress, plugs }
    }

    /// Sends a section, and the changes after it.
    fn send(&mut self, kind: SectionKind, bytes: u64) {
        let mut out = KeptStream::new().unwrap();
        if kind == SectionKind::End {
            self.save.complete(&mut out).unwrap();
        } else {
            self.save.iterate(&mut out, bytes).unwrap();
        }
        let mut section = Vec::new();
        put_continued(&mut section, kind, 0);
        section.extend(out.bytes().unwrap());
        put_footer(&mut section, 0);
        self.stream.push_back(section);
    }

    fn send_changes(&mut self) {
        let changes = self.save.changes().unwrap();
        if !changes.is_empty() {
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
                    self.load.load(kind, 4, &mut reader)?;
                    read_footer(&mut reader, section_id)?;
                }
                Record::Command(Command::BlockState(change)) => {
                    let refused = self.load.block_state(&change, 0)?;
                    if change.populated {
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

    /// Why the guest's request was refused, once it is.
    fn refused(&mut self) -> String {
        let (_, thread) = self.plugs.take().unwrap();
        thread.join().unwrap().unwrap_err()
    }

    /// What became of a guest's request, once it is answered.
    fn answered(&mut self, wait: bool) {
        let ended = |(_, thread): &mut (usize, JoinHandle<_>)| wait || thread.is_finished();
        if let Some((block, thread)) = self.plugs.take_if(ended)
            && thread.join().unwrap().is_ok()
        {
            self.model[block] = Some(vec![0; PAGES as usize]);
        }
    }

    /// The guest asks to plug a block, and the engine sees to it until that is answered.
    fn plug(&mut self, block: usize) {
        let device = Arc::clone(self.from.device());
        let thread = thread::spawn(move || device.plug(block));
        while !self.save.is_waited_for() && !thread.is_finished() {
            thread::yield_now();
        }
        self.plugs = Some((block, thread));
    }

    fn step(&mut self, op: Op) {
        match op {
            Op::Request { block, plug: true } if self.model[block].is_none() => {
                self.plug(block);
                while let Some((_, thread)) = &self.plugs
                    && !thread.is_finished()
                {
                    self.send_changes();
                    self.deliver().unwrap();
                    self.hear();
                }
                self.answered(true);
            }
            Op::PlugInTime(block) if self.model[block].is_none() => {
                self.plug(block);
                // Sent or not, nothing comes back in time.
                if block % 2 == 0 {
                    self.send_changes();
                }
                self.answered(true);
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
        for (block, pages) in self.model.iter().enumerate() {
            for side in [&self.from, &self.to] {
                prop_assert_eq!(side.device().is_plugged(block), pages.is_some());
            }
            for (page, &byte) in (block as u64 * PAGES..).zip(pages.iter().flatten()) {
                prop_assert_eq!(self.to.page(page), vec![byte; PAGE as usize], "page {}", page);
            }
        }
        let discarded = self.model.iter().filter(|block| block.is_none()).count() as u64 * PAGES;
        let seen = self.progress.snapshot();
        prop_assert_eq!((seen.discarded, seen.dirty_while_discarded), (discarded, 0));
        self.save.cleanup();
        self.save.thaw();
        self.load.cleanup();
        prop_assert_eq!((self.from.leaked(), self.to.leaked()), (vec![], vec![]));
        Ok(())
    }

    /// It ends wherever it is: the device serves its guest as before.
    fn cancel(mut self) -> Result<(), TestCaseError> {
        self.save.cleanup();
        self.save.thaw();
        self.load.cleanup();
        let device = self.from.device();
        for (block, pages) in self.model.iter().enumerate() {
            prop_assert_eq!(device.is_plugged(block), pages.is_some());
            match pages {
                Some(_) => device.unplug(block, &self.from.region).unwrap(),
                None => device.plug(block).unwrap(),
            }
        }
        prop_assert_eq!(self.from.leaked(), Vec::<usize>::new());
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn both_ends_have_the_same_blocks_and_pages_whatever_is_plugged_and_written_meanwhile(
        plugged in proptest::collection::btree_set(0..BLOCKS, 0..BLOCKS),
        ops in proptest::collection::vec(op(), 0..60),
        cancels in prop::bool::weighted(0.1),
    ) {
        let plugged: Vec<_> = plugged.into_iter().collect();
        // Mostly long enough for what is answered, and short enough for what is not.
        let mut pair = Pair::new(&plugged, Duration::from_millis(3));
        for op in ops {
            pair.step(op);
        }
        if cancels { pair.cancel()? } else { pair.switch()? }
    }
}

/// A pair of which a request of the guest waits for as long as it takes.
fn patient(plugged: &[usize]) -> Pair {
    Pair::new(plugged, Duration::from_secs(60))
}

#[test]
fn a_block_that_is_plugged_filled_and_unplugged_before_it_was_due_costs_no_page() {
    let mut pair = patient(&[1]);
    pair.step(Op::Request { block: 4, plug: true });
    assert!(pair.to.device().is_plugged(4));
    (0..PAGES).for_each(|page| pair.step(Op::Write { block: 4, page, byte: 7 }));
    pair.step(Op::Request { block: 4, plug: false });
    let mut sent = CountedStream::default();
    pair.save.pending_exact().unwrap();
    pair.save.iterate(&mut sent, u64::MAX).unwrap();
    assert_eq!(sent.written(), 8, "the end of a section");
    // Also when it was collected, and is not sent yet.
    pair.step(Op::Request { block: 4, plug: true });
    pair.step(Op::Write { block: 4, page: 3, byte: 7 });
    pair.save.pending_exact().unwrap();
    assert_eq!(pair.save.pending_estimate(), PAGE);
    pair.step(Op::Request { block: 4, plug: false });
    pair.save.iterate(&mut sent, u64::MAX).unwrap();
    assert_eq!(sent.written(), 16);
    pair.switch().unwrap();
}

#[test]
fn what_a_block_holds_when_it_is_plugged_is_sent() {
    let mut pair = patient(&[1]);
    // As memory does that the guest has written without having it plugged.
    fill(&pair.from.region, 4 * PAGES + 3..4 * PAGES + 4, 9);
    pair.step(Op::Request { block: 4, plug: true });
    pair.model[4].as_mut().unwrap()[3] = 9;
    pair.switch().unwrap();
}

#[test]
fn a_refusal_of_the_destination_is_one_of_the_request_and_says_why() {
    let mut pair = patient(&[1]);
    *pair.to.device().refuses.lock().unwrap() = Some(4);
    pair.plug(4);
    pair.send_changes();
    pair.deliver().unwrap();
    pair.hear();
    let refused = pair.refused();
    assert!(refused.contains("migration") && refused.contains("no huge page is left"), "{refused}");
    pair.step(Op::Request { block: 5, plug: true });
    assert!(pair.to.device().is_plugged(5));
    pair.switch().unwrap();
}

#[test]
fn what_is_accepted_too_late_is_discarded_again_and_refused_until_then() {
    // A request whose patience is over before the engine looks is not sent, as happens on a busy machine.
    let sent = (0..14).map(|doubled| Duration::from_millis(1 << doubled)).find_map(|patience| {
        let mut pair = Pair::new(&[1], patience);
        pair.plug(4);
        pair.send_changes();
        let late = pair.refused();
        assert!(late.contains(&format!("did not answer within {patience:?}")), "{late}");
        if pair.save.has_unanswered() {
            return Some(pair);
        }
        pair.cancel().unwrap();
        None
    });
    let mut pair = sent.expect("the engine sends a request within its patience");
    pair.deliver().unwrap();
    assert!(pair.to.device().is_plugged(4));
    let again = pair.from.device().plug(4).unwrap_err();
    assert!(again.contains("has not answered what was asked for before"), "{again}");
    pair.hear();
    pair.send_changes();
    pair.deliver().unwrap();
    assert!(!pair.to.device().is_plugged(4));
    pair.switch().unwrap();
}

#[test]
fn a_request_that_waits_when_the_guest_is_to_be_stopped_is_refused_at_once() {
    let mut pair = patient(&[1]);
    pair.plug(4);
    pair.send_changes();
    pair.freeze();
    let refused = pair.refused();
    assert!(refused.contains("about to be stopped"), "{refused}");
    pair.switch().unwrap();
}

#[test]
fn a_request_that_waits_when_the_migration_fails_is_done() {
    let mut pair = patient(&[1]);
    pair.plug(4);
    pair.send_changes();
    pair.save.cleanup();
    pair.answered(true);
    assert!(pair.model[4].is_some());
    pair.cancel().unwrap();
}

/// A tracker that cannot track what is populated.
struct Fails;

impl DirtyTracker for Fails {
    fn start(&mut self, _populated: &[ByteRange]) -> io::Result<()> {
        Ok(())
    }

    fn sync(&mut self, _dirty: &mut PageBitmap) -> io::Result<()> {
        Ok(())
    }

    fn clear(&mut self, _range: ByteRange) -> io::Result<()> {
        Ok(())
    }

    fn populate(&mut self, _range: ByteRange) -> io::Result<()> {
        Err(io::Error::other("no page tables"))
    }

    fn stop(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn what_cannot_be_tracked_is_refused_and_taken_back() {
    let mut pair = patient(&[1]);
    let progress = Arc::new(Progress::new());
    let tracker = |_: &MigrationBlock| Box::new(Fails) as Box<dyn DirtyTracker>;
    pair.save.cleanup();
    pair.save.thaw();
    pair.save = RamSave::new(&pair.from.blocks, ListOptions::default(), progress, tracker).unwrap();
    pair.save.setup(&mut CountedStream::default()).unwrap();
    pair.save.follow(Duration::from_secs(60)).unwrap();
    pair.plug(4);
    pair.send_changes();
    pair.deliver().unwrap();
    pair.hear();
    let refused = pair.refused();
    assert!(refused.contains("no page tables"), "{refused}");
    pair.switch().unwrap();
}

/// How many bytes were written at once.
#[derive(Default)]
struct AtOnce(Vec<u64>);

impl Sink for AtOnce {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.push(bytes.len() as u64);
        Ok(())
    }

    fn write_gathered(&mut self, gathered: &mut GatherWrite) -> io::Result<()> {
        self.0.push(gathered.len_bytes());
        gathered.clear();
        Ok(())
    }

    fn written(&self) -> u64 {
        self.0.iter().sum()
    }
}

#[test]
fn no_more_is_written_at_once_than_a_plug_may_wait_behind() {
    let plugged: Vec<usize> = (0..BLOCKS).collect();
    let mut pair = patient(&plugged);
    let all = BLOCKS as u64 * PAGES;
    fill(&pair.from.region, 0..all, 7);
    pair.dirty.0.lock().unwrap().extend(0..all);
    pair.save.pending_exact().unwrap();
    let mut out = AtOnce::default();
    pair.save.iterate(&mut out, u64::MAX).unwrap();
    assert!(out.written() > all * PAGE, "all of it was sent");
    let most = out.0.iter().max().unwrap();
    assert!(*most < save::SHORT_PAGES * (PAGE + 64), "{most} bytes");
}

/// A peer that takes nothing until it is told to, once.
struct Stuck {
    inner: KeptStream,
    tell: mpsc::Sender<()>,
    go_on: mpsc::Receiver<()>,
}

impl Sink for Stuck {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.inner.write(bytes)
    }

    fn write_gathered(&mut self, gathered: &mut GatherWrite) -> io::Result<()> {
        if self.tell.send(()).is_ok() {
            self.go_on.recv().unwrap();
        }
        self.inner.write_gathered(gathered)
    }

    fn written(&self) -> u64 {
        self.inner.written()
    }
}

#[test]
fn pages_on_their_way_into_a_channel_that_is_stuck_bring_no_memory_back() {
    let mut pair = patient(&[1, 4]);
    fill(&pair.from.region, 4 * PAGES..5 * PAGES, 7);
    pair.dirty.0.lock().unwrap().extend(4 * PAGES..5 * PAGES);
    pair.save.pending_exact().unwrap();
    let ((tell, told), (go_on, goes_on)) = (mpsc::channel(), mpsc::channel());
    let device = Arc::clone(pair.from.device());
    let region = pair.from.region.try_clone().unwrap();
    let guest = thread::spawn(move || {
        told.recv().unwrap();
        drop(told);
        // Not held up by a channel that does not move.
        device.unplug(4, &region).unwrap();
        let refused = device.plug(4).unwrap_err();
        assert!(refused.contains("are still being read"), "{refused}");
        go_on.send(()).unwrap();
    });
    let mut out = Stuck { inner: KeptStream::new().unwrap(), tell, go_on: goes_on };
    pair.save.iterate(&mut out, u64::MAX).unwrap();
    guest.join().unwrap();
    assert_eq!(pair.from.held_of(4), 0, "read after it was discarded, and discarded again");
    pair.model[4] = None;
    let mut section = Vec::new();
    put_continued(&mut section, SectionKind::Part, 0);
    section.extend(out.inner.bytes().unwrap());
    put_footer(&mut section, 0);
    pair.stream.push_back(section);
    pair.send_changes();
    pair.step(Op::Request { block: 4, plug: true });
    pair.switch().unwrap();
}

#[test]
fn a_device_that_changes_without_a_word_fails_the_migration() {
    let mut pair = patient(&[1]);
    pair.from.device().set(5, true);
    let lost = pair.save.freeze().unwrap_err();
    assert!(matches!(lost, MigrationError::FreezeLost(_)), "{lost}");
    assert!(pair.save.check_frozen().is_err());
}

fn change(number: u32, populated: bool, block: &str, ranges: &[(u64, u64)]) -> BlockStateChange {
    let range = |&(start, end)| ByteRange::from_bounds(start * PAGE, end * PAGE).unwrap();
    let ranges = ranges.iter().map(range).collect();
    BlockStateChange { number, populated, block: block.to_owned(), ranges }
}

#[test]
fn changes_of_block_state_that_are_not_possible_are_refused_by_name() {
    let end = BLOCKS as u64 * PAGES;
    for (change, reason) in [
        (change(2, true, "vmem0", &[(0, PAGES)]), "change 2 of block state, where 1 is due"),
        (change(1, true, "vmem1", &[(0, PAGES)]), "\"vmem1\": it is not in the list"),
        (change(1, true, "ram", &[(0, PAGES)]), "\"ram\": nothing of it is ever discarded"),
        (change(1, true, "vmem0", &[(0, end + PAGES)]), "is past its end"),
        (change(1, true, "vmem0", &[(0, PAGES + 1)]), "not made of units of 0x40000 bytes"),
        (change(1, false, "vmem0", &[(PAGES + 1, 2 * PAGES)]), "not made of units"),
        (
            change(1, true, "vmem0", &[(0, 2 * PAGES)]),
            "to be populated, and a part of it is already",
        ),
        (
            change(1, false, "vmem0", &[(PAGES, 3 * PAGES)]),
            "was discarded, and a part of it was before",
        ),
        // Also the last of several.
        (change(1, true, "vmem0", &[(0, PAGES), (PAGES, 2 * PAGES)]), "a part of it is already"),
    ] {
        let mut pair = patient(&[1]);
        let refused = pair.load.block_state(&change, 0x77).unwrap_err().to_string();
        assert!(refused.contains(reason) && refused.contains("0x77"), "{refused}");
        assert!((0..BLOCKS).all(|block| pair.to.device().is_plugged(block) == (block == 1)));
    }
}

#[test]
fn of_several_ranges_that_cannot_all_be_populated_none_is() {
    let mut pair = patient(&[1]);
    *pair.to.device().refuses.lock().unwrap() = Some(5);
    let ranges = [(3 * PAGES, 4 * PAGES), (5 * PAGES, 6 * PAGES)];
    let refused = pair.load.block_state(&change(1, true, "vmem0", &ranges), 0).unwrap();
    assert_eq!(refused.as_deref(), Some("no huge page is left"));
    assert!(!pair.to.device().is_plugged(3));
}

#[test]
fn an_answer_to_what_was_not_sent_is_none() {
    let mut pair = patient(&[1]);
    assert!(!pair.save.answered(1, None).unwrap());
    pair.step(Op::Request { block: 4, plug: true });
    assert!(!pair.save.answered(1, None).unwrap(), "it was answered");
    pair.switch().unwrap();
}
