//! Guest requests, resizes, migration, resets and faults in any order, against a naive model.
//!
//! What is promised: no panic; every answer is the model's; whatever is answered with ERROR, NACK
//! or BUSY changed nothing, neither in the device nor in what is saved or what listeners were
//! told; the configuration space agrees with the blocks; the next good request works.

use std::fs::File;
use std::io;
use std::sync::Arc;

use parking_lot::Mutex;
use ram_discard::memory::RamBlock;
use ram_discard::{MemoryState, RamDiscardListener, Section};
use rustix::fs::{MemfdFlags, memfd_create};
use virtio_mem::controller::{
    BlockUpdate, FreezeHolder, InitialState, JournalUpdate, MemController, Reset, StateRecord,
    StateStore,
};
use virtio_mem::device::{BlockSpan, Change, Geometry, REQUEST_LEN, Request, Response, VirtioMem};

use crate::input::Input;
use model::Model;

mod model;

const BLOCK: u64 = 2 << 20;
const NR: usize = 512;
const ADDR: u64 = 0x1_4000_0000;
const REGION: u64 = NR as u64 * BLOCK;
/// Bounds the time of one input.
const STEPS: usize = 64;

/// What goes wrong while one request is executed.
#[derive(Clone, Copy, Debug, Default)]
struct Faults {
    store: bool,
    listener: bool,
}

/// What was saved, and what a listener was told.
#[derive(Default)]
struct Seen {
    faults: Faults,
    requested: u64,
    usable: u64,
    saved: Vec<bool>,
    journal: Option<Request>,
    populated: Vec<bool>,
}

#[derive(Clone)]
struct Watch(Arc<Mutex<Seen>>);

impl StateStore for Watch {
    fn commit(&mut self, record: &StateRecord<'_>) -> io::Result<()> {
        let mut seen = self.0.lock();
        if seen.faults.store {
            return Err(io::Error::other("a fault"));
        }
        seen.requested = record.requested_size;
        seen.usable = record.usable_region_size;
        match record.blocks {
            BlockUpdate::Keep => {}
            BlockUpdate::Change(Change::Plug(blocks)) => seen.saved[blocks.clone()].fill(true),
            BlockUpdate::Change(Change::Unplug(blocks)) => seen.saved[blocks.clone()].fill(false),
            BlockUpdate::Change(Change::UnplugAll) => seen.saved.fill(false),
            BlockUpdate::Replace(words) => {
                let plugged = |(block, saved): (usize, &mut bool)| {
                    *saved = words[block / 64] >> (block % 64) & 1 == 1;
                };
                seen.saved.iter_mut().enumerate().for_each(plugged);
            }
        }
        match record.journal {
            JournalUpdate::Keep => {}
            JournalUpdate::Forget => seen.journal = None,
            JournalUpdate::Record(request) => seen.journal = Some(request),
        }
        Ok(())
    }

    fn mark_answered(&mut self) -> io::Result<()> {
        self.0.lock().journal = None;
        Ok(())
    }
}

impl Watch {
    fn mark(&self, section: Section, state: MemoryState) {
        let index = |at: u64| usize::try_from(at / BLOCK).unwrap();
        let blocks = index(section.start())..index(section.end());
        self.0.lock().populated[blocks].fill(state.is_populated());
    }
}

impl RamDiscardListener for Watch {
    fn name(&self) -> &str {
        "watch"
    }

    fn notify_populate(&mut self, section: Section) -> Result<(), String> {
        if self.0.lock().faults.listener {
            return Err("a fault".to_owned());
        }
        self.mark(section, MemoryState::Populated);
        Ok(())
    }

    fn notify_discard(&mut self, section: Section) {
        self.mark(section, MemoryState::Discarded);
    }
}

/// Device and model side by side.
struct Pair {
    controller: MemController,
    seen: Arc<Mutex<Seen>>,
    model: Model,
    file: File,
}

impl Pair {
    fn new(requested_blocks: u16) -> Self {
        let requested = u64::from(requested_blocks) % (NR as u64 + 1) * BLOCK;
        let geometry = Geometry::new(ADDR, REGION, BLOCK, None).unwrap();
        let device = VirtioMem::new(geometry, requested).unwrap();
        let model = Model::new(requested);
        let seen = Arc::new(Mutex::new(Seen {
            requested,
            usable: model.usable,
            saved: vec![false; NR],
            populated: vec![false; NR],
            ..Seen::default()
        }));
        let store = Box::new(Watch(Arc::clone(&seen)));
        let controller =
            MemController::new(InitialState { store, ..InitialState::volatile(device) });
        controller.listen(Box::new(Watch(Arc::clone(&seen)))).unwrap();
        let file = File::from(memfd_create("fuzz", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(REGION).unwrap();
        let mut pair = Self { controller, seen, model, file };
        pair.map(true);
        pair
    }

    fn map(&mut self, mapped: bool) {
        let block = || {
            let file = self.file.try_clone().unwrap();
            Arc::new(RamBlock::new("fuzz".to_owned(), ADDR, REGION, file, 0).unwrap())
        };
        let blocks = if mapped { vec![block()] } else { Vec::new() };
        self.controller.set_memory(blocks).unwrap();
        self.model.mapped = mapped;
    }

    fn execute(&mut self, request: Request, faults: Faults) -> Response {
        self.seen.lock().faults = faults;
        let expected = self.model.execute(request, faults.store, faults.listener);
        let response = self.controller.execute(request);
        self.seen.lock().faults = Faults::default();
        assert_eq!(response, expected, "{request:?} with {faults:?}");
        response
    }

    fn answered(&mut self) {
        self.controller.answered();
        self.model.journal = None;
    }

    fn resize(&mut self, size: u64) {
        assert_eq!(self.controller.resize(size).is_ok(), self.model.resize(size), "{size}");
    }

    fn freeze(&mut self, holder: FreezeHolder, active: bool) {
        if active {
            self.controller.freeze(holder).unwrap();
        } else {
            self.controller.thaw(holder).unwrap();
        }
        self.model.freeze(holder, active);
    }

    fn reset(&mut self) {
        let reset = self.controller.system_reset().unwrap();
        assert_eq!(reset == Reset::Done, self.model.system_reset());
    }

    /// Everything that can be seen of the device is the model's.
    fn check(&self) {
        let Model { plugged, requested, usable, journal, .. } = &self.model;
        let size = plugged.iter().filter(|&&plugged| plugged).count() as u64 * BLOCK;
        let config = self.controller.config().to_bytes();
        let field = |at: usize| u64::from_le_bytes(config[at..at + 8].try_into().unwrap());
        let fields = [0, 8, 16, 24, 32, 40, 48].map(field);
        assert_eq!(fields, [BLOCK, 0, ADDR, REGION, *usable, size, *requested]);
        let ranges = [self.controller.plugged_ranges(), self.controller.unplugged_ranges()];
        for (state, ranges) in [true, false].into_iter().zip(ranges) {
            let mut runs = vec![!state; NR];
            let mut end = None;
            for range in ranges {
                assert!(end.is_none_or(|end| end < range.start()), "{range} is not maximal");
                end = Some(range.end());
                let index = |at: u64| usize::try_from(at / BLOCK).unwrap();
                runs[index(range.start())..index(range.end())].fill(state);
            }
            assert!(runs == *plugged, "replayed ranges differ from the blocks");
        }
        assert_eq!(self.controller.migration_active(), self.model.is_frozen());
        let seen = self.seen.lock();
        assert!(seen.saved == *plugged, "saved blocks differ");
        assert!(seen.populated == *plugged, "a listener was told of other blocks");
        assert_eq!((seen.requested, seen.usable), (*requested, *usable));
        assert_eq!(seen.journal, *journal);
    }

    fn step(&mut self, input: &mut Input<'_>) {
        match input.u8() % 16 {
            0 => {
                let request = Request::from_bytes(&input.array::<REQUEST_LEN>());
                self.execute(request, Faults::default());
                self.answered();
            }
            1 => self.resize(input.u64()),
            2 => self.resize(u64::from(input.u16()) % (NR as u64 + 8) * BLOCK),
            3 => {
                let choice = input.u8();
                let holders = [FreezeHolder::Log, FreezeHolder::Api, FreezeHolder::Client(7)];
                self.freeze(holders[usize::from(choice >> 1) % 3], choice & 1 == 1);
            }
            4 => self.map(input.u8() & 1 == 1),
            5 => self.reset(),
            _ => {
                let (kind, how) = (input.u8() % 4, input.u8());
                let addr = ADDR + u64::from(input.u16()) % (NR as u64 + 8) * BLOCK;
                let span = BlockSpan { addr, nb_blocks: u16::from(input.u8()) };
                let request = match kind {
                    0 => Request::Plug(span),
                    1 => Request::Unplug(span),
                    2 if how & 0xf0 == 0 => Request::UnplugAll,
                    _ => Request::State(span),
                };
                let faults = Faults { store: how & 3 == 3, listener: how & 12 == 12 };
                self.execute(request, faults);
                // A request that was not answered may come again.
                if how & 16 != 0 {
                    self.check();
                    self.execute(request, Faults::default());
                }
                if how & 32 == 0 {
                    self.answered();
                }
            }
        }
    }
}

/// Runs one input.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let mut pair = Pair::new(input.u16());
    for _ in 0..STEPS {
        if input.is_empty() {
            break;
        }
        pair.step(&mut input);
        pair.check();
    }
    // Whatever went on before, a device that is left alone does what a good guest asks.
    for holder in [FreezeHolder::Log, FreezeHolder::Api, FreezeHolder::Client(7)] {
        pair.freeze(holder, false);
    }
    pair.map(true);
    pair.answered();
    pair.resize(REGION);
    let first = BlockSpan { addr: ADDR, nb_blocks: 1 };
    for request in [Request::UnplugAll, Request::Plug(first), Request::Unplug(first)] {
        assert_eq!(pair.execute(request, Faults::default()), Response::Ack);
        pair.answered();
        pair.check();
    }
}
