//! Block state that changes at the destination while memory arrives there.

use super::*;
use crate::lazy::{HandlerFailed, LazyRam, PageSource};
use crate::page_bitmap::pages_touched;
use crate::postcopy::page_placer::PagePlacer;
use crate::postcopy::{GiveUp, IncomingPages, PostcopyIncoming, put_received, read_received};
use crate::stream::{AdvisedSizes, ReturnMessage, put_end_of_section};

const ID: &str = "vmem0";

/// What is done next.
#[derive(Clone, Debug)]
pub(super) enum Op {
    /// The guest plugs, or unplugs, whatever the block is.
    Request { block: usize, plug: bool },
    /// Looks at a page of a block, if it is plugged.
    Look { block: usize, page: u64 },
    /// Writes it, if it is there.
    Write { block: usize, page: u64, byte: u8 },
    /// A fault is answered that was read long ago.
    LateFault(prop::sample::Index),
    /// The source sends about so many pages.
    Send(u64),
    /// It answers so many requests, on a channel of their own or not.
    Serve(usize, bool),
    /// It hears so much of what is discarded.
    Hear(usize),
    /// The destination takes what was sent first.
    Deliver { urgent: bool },
    /// What it took last comes a second time.
    Again,
    /// The channels break when this much of what was sent first has come, and there are others.
    Break(prop::sample::Index),
}

pub(super) fn op() -> impl Strategy<Value = Op> {
    let (block, page) = (|| 0..BLOCKS, || 0..PAGES);
    prop_oneof![
        6 => (block(), any::<bool>()).prop_map(|(block, plug)| Op::Request { block, plug }),
        6 => (block(), page()).prop_map(|(block, page)| Op::Look { block, page }),
        6 => (block(), page(), any::<u8>())
            .prop_map(|(block, page, byte)| Op::Write { block, page, byte }),
        2 => any::<prop::sample::Index>().prop_map(Op::LateFault),
        4 => (1u64..40).prop_map(Op::Send),
        4 => (1usize..4, any::<bool>()).prop_map(|(requests, urgent)| Op::Serve(requests, urgent)),
        2 => (1usize..3).prop_map(Op::Hear),
        6 => any::<bool>().prop_map(|urgent| Op::Deliver { urgent }),
        2 => Just(Op::Again),
        1 => any::<prop::sample::Index>().prop_map(Op::Break),
    ]
}

/// What the source is told, and has not heard.
#[derive(Default)]
struct Told {
    requests: Mutex<VecDeque<(String, ByteRange)>>,
    discards: Mutex<VecDeque<(String, ByteRange)>>,
}

impl PageSource for Told {
    fn request(&self, lazy: &LazyRam, block: usize, range: ByteRange) -> io::Result<()> {
        let id = lazy.block(block).id().to_owned();
        self.requests.lock().unwrap().push_back((id, range));
        Ok(())
    }

    fn discarded(&self, lazy: &LazyRam, block: usize, range: ByteRange) {
        let id = lazy.block(block).id().to_owned();
        self.discards.lock().unwrap().push_back((id, range));
    }
}

struct Lost;

impl HandlerFailed for Lost {
    fn handler_failed(&self, error: &MigrationError) {
        panic!("{error}");
    }
}

/// The guest has left the source, and is not taken yet.
pub(super) struct Listening {
    pair: Pair,
    lazy: Arc<LazyRam>,
    told: Arc<Told>,
}

impl Listening {
    /// The source stops its guest, and tells what is outstanding.
    pub(super) fn begin(mut pair: Pair) -> Self {
        pair.freeze();
        while !pair.stream.is_empty() {
            pair.deliver().unwrap();
        }
        let incoming = PostcopyIncoming {
            blocks: Arc::clone(&pair.to.blocks),
            urgent: None,
            reconnect: Box::new(GiveUp),
            failed: Arc::new(Lost),
            listening: None,
        };
        let mut incoming = IncomingPages::new(incoming, Arc::new(Progress::new()));
        let sizes = AdvisedSizes { page_sizes: pair.save.page_sizes(), target_page_size: PAGE };
        incoming.command(Command::PostcopyAdvise(Some(sizes)), 0, true).unwrap();
        for (block, ranges) in pair.save.outstanding().unwrap() {
            let ranges = ranges.iter().map(|range| (range.start(), range.len())).collect();
            incoming.command(Command::PostcopyRamDiscard { block, ranges }, 0, true).unwrap();
        }
        incoming.command(Command::PostcopyListen, 0, true).unwrap();
        pair.load.before_postcopy().unwrap();
        let lazy = Arc::new(incoming.memory().unwrap());
        let told = Arc::new(Told::default());
        lazy.set_source(Some(Arc::clone(&told) as Arc<dyn PageSource>));
        pair.load.complete().unwrap();
        Self { pair, lazy, told }
    }

    /// The guest runs at the destination.
    pub(super) fn run(mut self) -> Arriving {
        self.pair.load.arrives(&self.lazy).unwrap();
        let Self { pair, lazy, told } = self;
        let index = lazy.find(ID).unwrap();
        let expected = lazy.outstanding_of(index);
        let expected = expected.runs(0..expected.nr_pages()).flatten().collect();
        let (main, urgent, last) = Default::default();
        Arriving { pair, lazy, told, index, expected, main, urgent, last }
    }

    /// It was never taken: it continues where it was.
    pub(super) fn cancel(self) -> Result<(), TestCaseError> {
        self.lazy.abandon();
        drop(self.lazy);
        self.pair.cancel()
    }
}

/// The guest runs at the destination, and its memory arrives.
pub(super) struct Arriving {
    /// Both sides; its model is what the guest has.
    pub(super) pair: Pair,
    pub(super) lazy: Arc<LazyRam>,
    told: Arc<Told>,
    /// Number of the region among the blocks that arrive.
    index: usize,
    /// Pages that were outstanding when the guest came.
    expected: Vec<u64>,
    /// What is on the way, on the main channel and on that of pages which were asked for.
    main: VecDeque<Vec<u8>>,
    urgent: VecDeque<Vec<u8>>,
    last: Option<Vec<u8>>,
}

impl Arriving {
    fn is_outstanding(&self, page: u64) -> bool {
        self.lazy.outstanding_of(self.index).test(page)
    }

    fn send(&mut self, mut gathered: GatherWrite, urgent: bool) {
        let mut end = Vec::new();
        put_end_of_section(&mut end);
        gathered.push_bytes(&end);
        let mut out = KeptStream::new().unwrap();
        crate::channel::Sink::write_gathered(&mut out, &mut gathered).unwrap();
        let to = if urgent { &mut self.urgent } else { &mut self.main };
        to.push_back(out.bytes().unwrap());
    }

    fn place(&self, section: &[u8]) -> Result<(), MigrationError> {
        let waits = || false;
        PagePlacer::new(&waits).place_section(&self.lazy, &mut WireReader::new(section))
    }

    fn take(&mut self, urgent: bool) {
        let from = if urgent { &mut self.urgent } else { &mut self.main };
        if let Some(section) = from.pop_front() {
            self.place(&section).unwrap();
            self.last = Some(section);
        }
    }

    /// The source answers the oldest request.
    fn serve(&mut self, urgent: bool) {
        let asked = self.told.requests.lock().unwrap().pop_front();
        if let Some((block, range)) = asked {
            let mut gathered = GatherWrite::new();
            self.pair.save.requested(&block, range, &mut gathered).unwrap();
            self.send(gathered, urgent);
        }
    }

    /// The source hears of what was discarded first.
    fn hear(&mut self) {
        let discarded = self.told.discards.lock().unwrap().pop_front();
        if let Some((block, range)) = discarded {
            self.pair.save.discarded(&block, range).unwrap();
            let mut gathered = GatherWrite::new();
            for page in range.chunks(PAGE) {
                assert!(!self.pair.save.requested(&block, page, &mut gathered).unwrap());
            }
        }
    }

    /// The source continues over new channels.
    fn recover(&mut self) {
        self.main.clear();
        self.urgent.clear();
        self.told.requests.lock().unwrap().clear();
        self.told.discards.lock().unwrap().clear();
        for (id, nr_pages) in PostcopySave::blocks(&self.pair.save) {
            let outstanding = self.lazy.outstanding_of(self.lazy.find(&id).unwrap());
            let mut bytes = Vec::new();
            put_received(&mut bytes, &id, &outstanding);
            let mut reader = WireReader::new(&bytes[..]);
            ReturnMessage::read(&mut reader).unwrap();
            let pages = read_received(&mut reader, &id, nr_pages).unwrap();
            self.pair.save.not_received(&id, pages).unwrap();
        }
        self.lazy.request_again().unwrap();
    }

    pub(super) fn step(&mut self, op: Op) -> Result<(), TestCaseError> {
        match op {
            Op::Request { block, plug: true } if self.pair.model[block].is_none() => {
                self.pair.to.device().plug(block).unwrap();
                self.pair.model[block] = Some(vec![0; PAGES as usize]);
            }
            Op::Request { block, plug: false } if self.pair.model[block].is_some() => {
                let to = &self.pair.to;
                to.device().unplug(block, &to.region).unwrap();
                self.pair.model[block] = None;
                let range = ByteRange::new(block as u64 * BLOCK, BLOCK).unwrap();
                prop_assert!(pages_touched(range).all(|page| !self.is_outstanding(page)));
                prop_assert_eq!(to.resident_of(block), 0);
            }
            Op::Request { .. } => {}
            Op::Look { block, page } => {
                let Some(pages) = &self.pair.model[block] else { return Ok(()) };
                let at = block as u64 * PAGES + page;
                if self.is_outstanding(at) {
                    self.lazy.answer_fault(self.index, at * PAGE).unwrap();
                } else {
                    let seen = vec![pages[page as usize]; PAGE as usize];
                    prop_assert_eq!(self.pair.to.page(at), seen, "page {}", at);
                }
            }
            Op::Write { block, page, byte } => {
                let at = block as u64 * PAGES + page;
                if !self.is_outstanding(at)
                    && let Some(pages) = &mut self.pair.model[block]
                {
                    fill(&self.pair.to.region, at..at + 1, byte);
                    pages[page as usize] = byte;
                }
            }
            Op::LateFault(index) => {
                if !self.expected.is_empty() {
                    let page = *index.get(&self.expected);
                    self.lazy.answer_fault(self.index, page * PAGE).unwrap();
                }
            }
            Op::Send(pages) => {
                let mut gathered = GatherWrite::new();
                self.pair.save.next(pages * PAGE, &mut gathered).unwrap();
                self.send(gathered, false);
            }
            Op::Serve(requests, urgent) => (0..requests).for_each(|_| self.serve(urgent)),
            Op::Hear(discards) => (0..discards).for_each(|_| self.hear()),
            Op::Deliver { urgent } => self.take(urgent),
            Op::Again => {
                if let Some(section) = self.last.take() {
                    self.place(&section).unwrap();
                }
            }
            Op::Break(cut) => {
                if let Some(section) = self.main.pop_front() {
                    let cut = cut.index(section.len());
                    prop_assert!(self.place(&section[..cut]).is_err(), "cut at {}", cut);
                }
                self.recover();
            }
        }
        Ok(())
    }

    /// All arrives: the guest has what it had, and what it made of it, and nothing else.
    pub(super) fn finish(mut self) -> Result<(), TestCaseError> {
        while PostcopySave::left(&self.pair.save) != 0 {
            self.step(Op::Send(64))?;
        }
        while !self.urgent.is_empty() || !self.main.is_empty() {
            self.take(true);
            self.take(false);
        }
        // Also what it hears of too late.
        while !self.told.discards.lock().unwrap().is_empty() {
            self.hear();
        }
        prop_assert_eq!(self.lazy.outstanding(), 0);
        self.lazy.finish().unwrap();
        prop_assert_eq!(self.lazy.statistics().unswept, 0);
        let Pair { from, to, save, load, model, .. } = &mut self.pair;
        assert_holds(to, model)?;
        save.cleanup();
        save.thaw();
        load.cleanup();
        prop_assert_eq!((from.leaked(), to.leaked()), (vec![], vec![]));
        Ok(())
    }
}
