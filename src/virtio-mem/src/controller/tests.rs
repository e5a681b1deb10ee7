mod follow_source;
mod reset;
mod state;
mod stray;
mod used_memory;

use super::*;
use crate::device::{BlockSpan, Response};
use proptest::prelude::*;
use ram_discard::GpaRange;
use rustix::fs::MemfdFlags;
use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

const BLOCK: u64 = 1 << 20;
const ADDR: u64 = 1 << 32;
const NR: u64 = 64;

/// A store that fails on demand and remembers what it was told.
struct Store {
    fails: AtomicBool,
    /// So many commits are made, and the next one fails; those after it, which take back, do not.
    fails_after: AtomicUsize,
    commits: AtomicUsize,
    answered: AtomicUsize,
    reset_pending: AtomicBool,
}

impl Default for Store {
    fn default() -> Self {
        Self {
            fails: AtomicBool::default(),
            fails_after: AtomicUsize::new(usize::MAX),
            commits: AtomicUsize::default(),
            answered: AtomicUsize::default(),
            reset_pending: AtomicBool::default(),
        }
    }
}

struct SharedStore(Arc<Store>);

impl StateStore for SharedStore {
    fn commit(&mut self, record: &StateRecord<'_>) -> io::Result<()> {
        if self.0.fails.load(Ordering::Relaxed) {
            return Err(io::Error::other("the disk is gone"));
        }
        let last = self.0.fails_after.load(Ordering::Relaxed);
        if self.0.commits.fetch_add(1, Ordering::Relaxed) == last {
            return Err(io::Error::other("the disk was full"));
        }
        self.0.reset_pending.store(record.reset_pending, Ordering::Relaxed);
        Ok(())
    }

    fn mark_answered(&mut self) -> io::Result<()> {
        self.0.answered.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

struct Rig {
    controller: MemController,
    store: Arc<Store>,
    file: File,
}

fn memfd() -> File {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = File::from(rustix::fs::memfd_create("controller-test", flags).unwrap());
    file.set_len(NR * BLOCK).unwrap();
    file
}

fn ram(file: &File) -> Vec<Arc<RamBlock>> {
    let file = file.try_clone().unwrap();
    vec![Arc::new(RamBlock::new("mem".to_owned(), ADDR, NR * BLOCK, file, 0).unwrap())]
}

fn device(requested: u64) -> VirtioMem {
    VirtioMem::new(Geometry::new(ADDR, NR * BLOCK, BLOCK, None).unwrap(), requested).unwrap()
}

fn rig() -> Rig {
    let store = Arc::new(Store::default());
    let mut start = InitialState::volatile(device(NR * BLOCK));
    start.store = Box::new(SharedStore(Arc::clone(&store)));
    let controller = MemController::new(start);
    let file = memfd();
    controller.set_memory(ram(&file)).unwrap();
    Rig { controller, store, file }
}

fn span(first: u64, nb_blocks: u16) -> BlockSpan {
    BlockSpan { addr: ADDR + first * BLOCK, nb_blocks }
}

fn plug(first: u64, nb_blocks: u16) -> Request {
    Request::Plug(span(first, nb_blocks))
}

fn unplug(first: u64, nb_blocks: u16) -> Request {
    Request::Unplug(span(first, nb_blocks))
}

fn section(first: u64, end: u64) -> Section {
    Section::from_bounds(first * BLOCK, end * BLOCK).unwrap()
}

impl Rig {
    fn execute(&self, request: Request) -> Response {
        let response = self.controller.execute(request);
        self.controller.answered();
        response
    }

    fn fill(&self, first: u64, end: u64) {
        let bytes = vec![0x5a; usize::try_from((end - first) * BLOCK).unwrap()];
        self.file.write_all_at(&bytes, first * BLOCK).unwrap();
    }

    fn resident(&self) -> u64 {
        self.file.metadata().unwrap().blocks() * 512 / BLOCK
    }
}

struct Refuser(Section);

impl RamDiscardListener for Refuser {
    fn name(&self) -> &str {
        "refuser"
    }

    fn notify_populate(&mut self, section: Section) -> Result<(), String> {
        if self.0.overlaps(section) { Err("pinned elsewhere".to_owned()) } else { Ok(()) }
    }

    fn notify_discard(&mut self, _section: Section) {}
}

#[test]
fn unplug_gives_the_memory_back_and_leaves_the_neighbours() {
    let rig = rig();
    assert_eq!(rig.execute(plug(0, 8)), Response::Ack);
    rig.fill(0, 8);
    assert_eq!(rig.execute(unplug(2, 3)), Response::Ack);
    assert_eq!(rig.resident(), 5);
    assert_eq!(rig.controller.resident_size(), Some(5 * BLOCK));
    assert_eq!(rig.controller.plugged_ranges(), [section(0, 2), section(5, 8)]);
    assert_eq!(rig.controller.unplugged_ranges(), [section(2, 5), section(8, NR)]);
}

#[test]
fn without_memory_requests_are_busy_and_change_nothing() {
    let rig = rig();
    rig.execute(plug(0, 1));
    rig.controller.set_memory(Vec::new()).unwrap();
    let before = rig.controller.config();
    for request in [plug(1, 1), unplug(0, 1), Request::UnplugAll] {
        assert_eq!(rig.execute(request), Response::Busy, "{request:?}");
    }
    assert_eq!(rig.controller.config(), before);
    assert_eq!(rig.controller.resident_size(), None);
}

#[test]
fn unplug_all_of_nothing_is_acked_whatever_the_state() {
    let rig = rig();
    rig.controller.set_memory(Vec::new()).unwrap();
    rig.controller.freeze(FreezeHolder::Api).unwrap();
    rig.controller.resize(0).unwrap();
    assert_eq!(rig.execute(Request::UnplugAll), Response::Ack);
    assert_eq!(rig.controller.config().usable_region_size, 0);
}

#[test]
fn while_frozen_block_state_is_busy_and_state_is_answered() {
    let rig = rig();
    rig.execute(plug(0, 1));
    rig.controller.freeze(FreezeHolder::Log).unwrap();
    rig.controller.freeze(FreezeHolder::Api).unwrap();
    for request in [plug(1, 1), unplug(0, 1), Request::UnplugAll] {
        assert_eq!(rig.execute(request), Response::Busy, "{request:?}");
    }
    assert_eq!(rig.execute(plug(0, 1)), Response::Error, "wrong is wrong, frozen or not");
    assert!(matches!(rig.execute(Request::State(span(0, 1))), Response::AckState(_)));
    rig.controller.thaw(FreezeHolder::Log).unwrap();
    assert_eq!(rig.execute(plug(1, 1)), Response::Busy);
    rig.controller.thaw(FreezeHolder::Api).unwrap();
    assert_eq!(rig.execute(plug(1, 1)), Response::Ack);
}

#[test]
fn a_listener_that_refuses_makes_the_guest_busy_and_nothing_is_changed() {
    let rig = rig();
    rig.controller.listen(Box::new(Refuser(section(3, 4)))).unwrap();
    assert_eq!(rig.execute(plug(2, 3)), Response::Busy);
    assert_eq!(rig.controller.config().plugged_size, 0);
    assert_eq!(rig.execute(plug(0, 3)), Response::Ack);
}

#[test]
fn a_state_that_cannot_be_saved_makes_the_guest_busy_and_nothing_is_changed() {
    let rig = rig();
    rig.execute(plug(0, 4));
    rig.fill(0, 4);
    let before = rig.controller.config();
    rig.store.fails.store(true, Ordering::Relaxed);
    for request in [plug(4, 1), unplug(0, 1), Request::UnplugAll] {
        assert_eq!(rig.execute(request), Response::Busy, "{request:?}");
    }
    assert!(rig.controller.resize(0).is_err());
    assert!(rig.controller.system_reset().is_err());
    assert!(rig.controller.freeze(FreezeHolder::Api).is_err());
    assert!(!rig.controller.migration_active());
    assert_eq!(rig.controller.config(), before);
    assert_eq!(rig.resident(), 4, "no byte is discarded before the state is saved");
}

#[test]
fn memory_that_cannot_be_given_back_makes_the_guest_busy() {
    let rig = rig();
    rig.execute(plug(0, 4));
    rig.fill(0, 4);
    rustix::fs::fcntl_add_seals(&rig.file, rustix::fs::SealFlags::FUTURE_WRITE).unwrap();
    for request in [plug(4, 1), unplug(0, 1), Request::UnplugAll] {
        assert_eq!(rig.execute(request), Response::Busy, "{request:?}");
    }
    assert_eq!(rig.controller.config().plugged_size, 4 * BLOCK);
    assert_eq!(rig.resident(), 4);
}

#[test]
fn a_request_executed_but_not_answered_is_acked_when_it_comes_again() {
    let rig = rig();
    assert_eq!(rig.controller.execute(plug(0, 4)), Response::Ack);
    assert_eq!(rig.controller.execute(plug(0, 4)), Response::Ack);
    rig.controller.answered();
    assert_eq!(rig.store.answered.load(Ordering::Relaxed), 1);
    assert_eq!(rig.controller.execute(plug(0, 4)), Response::Error);
    assert_eq!(rig.controller.execute(unplug(0, 4)), Response::Ack);
    assert_eq!(rig.controller.execute(plug(8, 1)), Response::Ack);
    assert_eq!(rig.controller.execute(unplug(0, 4)), Response::Error, "only the last is known");
}

/// Why requests were answered with BUSY.
#[derive(Default)]
struct Reasons(Mutex<Vec<String>>);

impl DeviceObserver for Reasons {
    fn busy(&self, request: Request, reason: &Busy) {
        self.0.lock().push(format!("{}: {reason}", request.name()));
    }
}

#[test]
fn a_killed_unplug_is_finished_when_the_guest_runs_again() {
    let file = memfd();
    file.write_all_at(&vec![1; 8 << 20], 0).unwrap();
    let mut before = device(NR * BLOCK);
    before.apply(&Change::Plug(0..4));
    // The process was killed after it had committed UNPLUG of blocks 4..8.
    let mut start = InitialState::volatile(before);
    start.sweep = true;
    start.journal = Some(unplug(4, 4));
    let controller = MemController::new(start);
    let reasons = Arc::new(Reasons::default());
    controller.observe(Arc::clone(&reasons) as Arc<dyn DeviceObserver>);
    assert_eq!(controller.execute(unplug(4, 4)), Response::Busy, "memory is not mapped");
    assert!(reasons.0.lock().pop().unwrap().contains("no memory is mapped"));
    controller.set_memory(ram(&file)).unwrap();
    assert_eq!(file.metadata().unwrap().blocks() * 512, 8 * BLOCK, "a state may still come");
    controller.running();
    assert_eq!(file.metadata().unwrap().blocks() * 512, 4 * BLOCK);
    assert_eq!(controller.execute(unplug(4, 4)), Response::Ack);
}

#[test]
fn resident_ranges_are_whole_units_with_anything_in_them() {
    let rig = rig();
    let ranges = |granularity| rig.controller.resident_ranges(granularity).unwrap();
    assert_eq!(ranges(1), []);
    // Populated counts, plugged or not, down to a byte.
    rig.execute(plug(0, 8));
    rig.fill(1, 3);
    rig.file.write_all_at(&[1], 3 * BLOCK).unwrap();
    rig.file.write_all_at(&[1], 6 * BLOCK - 1).unwrap();
    rig.fill(NR - 1, NR);
    let last = section(NR - 1, NR);
    for granularity in [0, 1, BLOCK] {
        assert_eq!(ranges(granularity), [section(1, 4), section(5, 6), last], "{granularity}");
    }
    assert_eq!(ranges(BLOCK + 1), [section(0, 6), section(NR - 2, NR)]);
    assert_eq!(ranges(4 * BLOCK), [section(0, 8), section(NR - 4, NR)]);
    assert_eq!(ranges(3 * BLOCK), [section(0, 6), last], "cut off at the end of the region");
    assert_eq!(ranges(u64::MAX), [section(0, NR)]);
    assert_eq!(rig.controller.resident_size(), Some(3 * BLOCK + 2 * 4096));
}

#[test]
fn resident_ranges_of_memory_in_pieces() {
    let controller = MemController::new(InitialState::volatile(device(NR * BLOCK)));
    assert_eq!(controller.resident_ranges(BLOCK), None);
    let (low, high) = (memfd(), memfd());
    let piece = |first: u64, end: u64, file: &File, fd_offset| {
        let (gpa, size) = (ADDR + first * BLOCK, (end - first) * BLOCK);
        let file = file.try_clone().unwrap();
        Arc::new(RamBlock::new(format!("mem@{gpa:#x}"), gpa, size, file, fd_offset).unwrap())
    };
    // The second of two neighbours starts at another place of its file; a gap lies before a third.
    let blocks =
        vec![piece(0, 5, &low, 0), piece(5, 10, &high, 7 * BLOCK), piece(20, 24, &low, 9 * BLOCK)];
    controller.set_memory(blocks).unwrap();
    let write = |file: &File, block: u64| file.write_all_at(&[1], block * BLOCK).unwrap();
    (3..9).for_each(|block| write(&low, block));
    [6, 7, 9, 12].into_iter().for_each(|block| write(&high, block));
    write(&low, 12);
    let ranges = |granularity| controller.resident_ranges(granularity).unwrap();
    assert_eq!(ranges(BLOCK), [section(3, 6), section(7, 8), section(23, 24)]);
    assert_eq!(ranges(2 * BLOCK), [section(2, 8), section(22, 24)]);
    assert_eq!(ranges(4 * BLOCK), [section(0, 8), section(20, 24)]);
}

proptest! {
    #[test]
    fn resident_ranges_agree_with_each_page(
        pages in prop::collection::btree_set(0u64..256, 0..60),
        blocks_per_unit in 1u64..9,
    ) {
        const PAGE: u64 = 4096;
        let block = 4 * PAGE;
        let geometry = Geometry::new(ADDR, 256 * PAGE, block, None).unwrap();
        let device = VirtioMem::new(geometry, 0).unwrap();
        let controller = MemController::new(InitialState::volatile(device));
        let file = memfd();
        pages.iter().for_each(|page| file.write_all_at(&[1], page * PAGE).unwrap());
        let ram_block = RamBlock::new("mem".to_owned(), ADDR, 256 * PAGE, file, 0).unwrap();
        controller.set_memory(vec![Arc::new(ram_block)]).unwrap();
        let unit = blocks_per_unit * block;
        let units: BTreeSet<u64> = pages.iter().map(|page| page * PAGE / unit).collect();
        let mut expected: Vec<(u64, u64)> = Vec::new();
        for unit_index in units {
            let end = ((unit_index + 1) * unit).min(256 * PAGE);
            match expected.last_mut() {
                Some(last) if last.1 == unit_index * unit => last.1 = end,
                _ => expected.push((unit_index * unit, end)),
            }
        }
        let found: Vec<_> = controller
            .resident_ranges(unit)
            .unwrap()
            .into_iter()
            .map(|range| (range.start(), range.end()))
            .collect();
        prop_assert_eq!(found, expected);
    }
}

#[test]
fn a_thaw_that_was_not_saved_is_saved_by_the_next() {
    let rig = rig();
    rig.controller.freeze(FreezeHolder::Api).unwrap();
    rig.store.fails.store(true, Ordering::Relaxed);
    for _ in 0..2 {
        rig.controller.thaw(FreezeHolder::Api).unwrap_err();
        assert!(!rig.controller.migration_active());
    }
    rig.store.fails.store(false, Ordering::Relaxed);
    let before = rig.store.commits.load(Ordering::Relaxed);
    for _ in 0..2 {
        rig.controller.thaw(FreezeHolder::Api).unwrap();
        assert_eq!(rig.store.commits.load(Ordering::Relaxed), before + 1);
    }
}

#[derive(Default)]
struct Changes(Mutex<Vec<&'static str>>);

impl DeviceObserver for Changes {
    fn migration(&self, active: bool) {
        self.0.lock().push(if active { "active" } else { "over" });
    }

    fn config_changed(&self) {
        self.0.lock().push("config");
    }

    fn memory_arrived(&self) {
        self.0.lock().push("arrived");
    }
}

#[test]
fn a_freeze_at_the_manager_is_one_of_the_controller() {
    let rig = rig();
    let changes = Arc::new(Changes::default());
    rig.controller.observe(Arc::clone(&changes) as Arc<dyn DeviceObserver>);
    rig.execute(plug(0, 1));
    let frozen = rig.controller.manager().freeze(FreezeFor::Source);
    rig.controller.freeze(FreezeHolder::Api).unwrap();
    assert!(rig.controller.migration_active());
    for request in [plug(1, 1), unplug(0, 1), Request::UnplugAll] {
        assert_eq!(rig.execute(request), Response::Busy);
    }
    let state = rig.controller.save_state();
    assert!(matches!(rig.controller.load_state(state.clone()), Err(LoadStateError::Frozen)));
    assert_eq!(rig.controller.system_reset().unwrap(), Reset::Deferred);
    frozen.check().unwrap();
    rig.controller.thaw(FreezeHolder::Api).unwrap();
    assert_eq!(rig.execute(plug(1, 1)), Response::Busy, "the engine holds it still");
    frozen.thaw().unwrap();
    // With the last freeze: the guest is told, and what was put off is done.
    assert!(!rig.controller.migration_active());
    assert_eq!(rig.controller.config().plugged_size, 0);
    assert_eq!(rig.execute(plug(1, 1)), Response::Ack);
    let told = changes.0.lock().clone();
    assert_eq!((told.first(), told.last()), (Some(&"active"), Some(&"config")), "{told:?}");
    assert_eq!(told.iter().filter(|&&change| change == "active").count(), 1);
    assert_eq!(told.iter().filter(|&&change| change == "over").count(), 1);

    let frozen = rig.controller.manager().freeze(FreezeFor::Destination);
    assert_eq!(rig.execute(plug(2, 1)), Response::Busy);
    rig.controller.load_state(state).unwrap();
    frozen.thaw().unwrap();
}

#[test]
fn while_a_listener_follows_requests_are_served_and_one_that_it_refuses_is_busy() {
    let rig = rig();
    let changes = Arc::new(Changes::default());
    rig.controller.observe(Arc::clone(&changes) as Arc<dyn DeviceObserver>);
    rig.execute(plug(0, 2));
    let frozen = rig.controller.manager().freeze(FreezeFor::Source);
    let followed = frozen.follow(Box::new(Refuser(section(5, 6)))).unwrap();
    assert!(!rig.controller.migration_active());
    assert_eq!(
        *changes.0.lock(),
        ["active", "over", "config"],
        "the guest tries again what was BUSY"
    );
    assert_eq!(rig.execute(plug(2, 1)), Response::Ack);
    assert_eq!(rig.execute(plug(4, 3)), Response::Busy);
    assert_eq!(rig.execute(plug(6, 1)), Response::Ack, "only that one request");
    assert_eq!(rig.execute(unplug(0, 1)), Response::Ack);
    // A state that cannot be saved is discarded again at the listener, too.
    rig.store.fails.store(true, Ordering::Relaxed);
    assert_eq!(rig.execute(plug(8, 1)), Response::Busy);
    rig.store.fails.store(false, Ordering::Relaxed);
    let frozen = followed.freeze().unwrap();
    assert_eq!(rig.execute(plug(5, 1)), Response::Busy);
    let all = section(0, NR);
    let discarded: Vec<_> = frozen.discarded(all).collect();
    assert_eq!(discarded, [section(0, 1), section(3, 6), section(7, NR)]);
    frozen.thaw().unwrap();
    assert_eq!(changes.0.lock().last(), Some(&"config"));
    assert_eq!(rig.execute(plug(5, 1)), Response::Ack);
}

#[test]
fn a_freeze_outlives_its_controller() {
    let rig = rig();
    let frozen = rig.controller.manager().freeze(FreezeFor::Source);
    drop(rig);
    frozen.thaw().unwrap();
}

#[test]
fn buffers_in_unplugged_memory_are_not_usable() {
    let rig = rig();
    rig.execute(plug(1, 1));
    let gpa = |at, len| GpaRange::new(at, len).unwrap();
    assert!(rig.controller.is_usable(gpa(0, 4096)));
    assert!(rig.controller.is_usable(gpa(ADDR + BLOCK, BLOCK)));
    assert!(!rig.controller.is_usable(gpa(ADDR, 1)));
    assert!(!rig.controller.is_usable(gpa(ADDR - 1, 2)), "its end is not plugged");
    assert!(!rig.controller.is_usable(gpa(ADDR + BLOCK, BLOCK + 1)));
    let taken = rig.controller.unplugged_by(unplug(1, 1)).unwrap();
    assert_eq!(taken, gpa(ADDR + BLOCK, BLOCK));
    assert_eq!(rig.controller.unplugged_by(unplug(0, 1)), None);
}

#[test]
fn replays_of_many_runs_are_whole() {
    let rig = rig();
    for block in (0..NR).step_by(2) {
        rig.execute(plug(block, 1));
    }
    let expected: Vec<_> = (0..NR).step_by(2).map(|block| section(block, block + 1)).collect();
    assert_eq!(rig.controller.plugged_ranges(), expected);
}
