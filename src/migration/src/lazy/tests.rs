use std::fs::File;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use ram_discard::{FreezeFor, RamDiscardListener, RamDiscardManager, Section};

use super::*;
use crate::ram::FrozenBlocks;
use crate::sys::huge_pages::testing::{ask_for_huge_pages, flags, has_huge_pages};
use crate::test_support::{BLOCK, PAGE, PATIENCE, Side, fill, wait_until};

struct NoFailure;

impl HandlerFailed for NoFailure {
    fn handler_failed(&self, error: &MigrationError) {
        panic!("{error}");
    }
}

/// Answers with pages of sevens, as soon as it may.
#[derive(Default)]
struct Sevens {
    asked: AtomicUsize,
}

impl PageSource for Sevens {
    fn request(&self, lazy: &LazyRam, block: usize, range: ByteRange) -> io::Result<()> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        lazy.place(block, range.start(), &vec![7; range.len() as usize]).map_err(io::Error::other)
    }
}

fn lazy(side: &Side, pages: std::ops::Range<u64>) -> (Arc<LazyRam>, FaultHandler) {
    let block = Arc::clone(side.blocks.get("vmem0").unwrap());
    let mut outstanding = PageBitmap::new(block.used_length() / PAGE);
    outstanding.set_range(pages);
    let lazy = Arc::new(LazyRam::new(vec![(block, outstanding)]).unwrap());
    let handler = FaultHandler::start(Arc::clone(&lazy), Arc::new(NoFailure)).unwrap();
    (lazy, handler)
}

fn read(side: &Side, page: u64) -> u8 {
    let mut byte = [0];
    side.blocks.get("vmem0").unwrap().mapping().read(page * PAGE + 5, &mut byte);
    byte[0]
}

#[test]
fn a_vcpu_that_waits_without_a_source_continues_with_the_recovery() {
    let side = Arc::new(Side::new(&[0, 1]));
    let (lazy, _handler) = lazy(&side, 0..100);
    let reading = Arc::clone(&side);
    let readers: Vec<_> = (0..4)
        .map(|n| {
            let reading = Arc::clone(&reading);
            // Two of them wait for the same page.
            thread::spawn(move || read(&reading, 10 + n / 2))
        })
        .collect();
    wait_until(|| lazy.blocks[0].requested().len() == 2);
    assert_eq!(lazy.outstanding(), 100);
    let sevens = Arc::new(Sevens::default());
    lazy.set_source(Some(Arc::clone(&sevens) as Arc<dyn PageSource>));
    lazy.request_again().unwrap();
    for reader in readers {
        assert_eq!(reader.join().unwrap(), 7);
    }
    assert_eq!((sevens.asked.load(Ordering::Relaxed), lazy.outstanding()), (2, 98));
    assert_eq!(lazy.statistics().remote.count, 2);
    assert!(lazy.finish().is_err(), "98 pages are outstanding");
    lazy.abandon();
}

#[test]
fn what_nothing_comes_for_is_zero_and_never_asked_for() {
    let side = Side::new(&[0, 1]);
    // Blocks 2 and up are discarded; page 50 is a hole between pages to come.
    let (lazy, _handler) = lazy(&side, 0..50);
    let sevens = Arc::new(Sevens::default());
    lazy.set_source(Some(Arc::clone(&sevens) as Arc<dyn PageSource>));
    assert_eq!(read(&side, 900), 0);
    assert_eq!(read(&side, 60), 0);
    assert_eq!(sevens.asked.load(Ordering::Relaxed), 0);
    assert_eq!(read(&side, 49), 7);
    // Zeros that arrive take no memory, and are there when touched.
    let before = side.resident().0;
    lazy.place_zeros(0, ByteRange::new(0, 40 * PAGE).unwrap()).unwrap();
    assert_eq!((side.resident().0, lazy.outstanding()), (before, 9));
    assert_eq!(read(&side, 3), 0);
    // A page that was written meanwhile is not replaced by one that comes late.
    side.blocks.get("vmem0").unwrap().mapping().write(3 * PAGE, &[9; 16]);
    lazy.place(0, 3 * PAGE, &[1; PAGE as usize]).unwrap();
    assert_eq!(read(&side, 3), 9);
    lazy.place(0, 40 * PAGE, &[7; 9 * PAGE as usize]).unwrap();
    lazy.finish().unwrap();
    // What was read of discarded memory has been discarded again.
    assert_eq!(side.resident().0, 10 + 1 + 1);
}

#[test]
fn memory_that_is_still_there_is_refused() {
    let side = Side::new(&[0, 1]);
    fill(&side.region, 20..21, 1);
    let block = Arc::clone(side.blocks.get("vmem0").unwrap());
    let mut outstanding = PageBitmap::new(block.used_length() / PAGE);
    outstanding.set_range(0..50);
    let Err(error) = LazyRam::new(vec![(block, outstanding)]) else { panic!("not refused") };
    assert!(matches!(error, MigrationError::Present { offset: 0x14000, .. }), "{error}");
    assert!(error.to_string().starts_with("the outstanding page at 0x14000 of block \"vmem0\""));
    // And no thread waits for anything.
    assert_eq!(read(&side, 5), 0);
}

#[test]
fn a_range_that_is_not_whole_pages_of_its_block_is_refused() {
    let side = Side::new(&[0, 1]);
    let block = Arc::clone(side.blocks.get("vmem0").unwrap());
    let (page_size, used_length) = (block.page_size(), block.used_length());
    let lazy = LazyRam::new(vec![(block, PageBitmap::new(used_length / PAGE))]).unwrap();
    for (start, len) in [(1, page_size), (0, page_size + 1), (used_length, page_size)] {
        let range = ByteRange::new(start, len).unwrap();
        let error = lazy.place_zeros(0, range).unwrap_err().to_string();
        let expected = format!("RAM block \"vmem0\": {len:#x} bytes at {start:#x} are not whole");
        assert!(error.starts_with(&expected), "{error}");
    }
}

#[test]
fn of_pages_that_do_not_all_fit_those_that_do_have_arrived() {
    let side = Side::new(&[0, 1]);
    let (lazy, _handler) = lazy(&side, 0..100);
    // Behind the end of the file there is no memory to be had.
    let len = side.region.metadata().unwrap().len();
    side.region.set_len(20 * PAGE).unwrap();
    lazy.place(0, 0, &[7; 64 * PAGE as usize]).unwrap_err();
    assert_eq!(lazy.outstanding_of(0).next_run(0, 100, 100), Some(20..100));
    side.region.set_len(len).unwrap();
    // A page that was written meanwhile stays, also when the source sends it again.
    side.blocks.get("vmem0").unwrap().mapping().write(3 * PAGE, &[9; 16]);
    lazy.place(0, 0, &[7; 100 * PAGE as usize]).unwrap();
    assert_eq!((read(&side, 3), read(&side, 19), read(&side, 20), read(&side, 99)), (9, 7, 7, 7));
    lazy.finish().unwrap();
}

#[test]
fn huge_pages_are_forbidden_while_pages_are_outstanding() {
    if !has_huge_pages() {
        return eprintln!("skipped: no transparent huge pages");
    }
    let side = Side::of_region(8 << 20);
    let block = Arc::clone(side.blocks.get("vmem0").unwrap());
    let mut outstanding = PageBitmap::new(block.used_length() / PAGE);
    // With gaps that are not registered.
    outstanding.set_range(0..100);
    outstanding.set_range(2000..2001);
    let lazy = LazyRam::new(vec![(Arc::clone(&block), outstanding)]).unwrap();
    let parts = flags(block.mapping());
    assert!(parts.len() > 2, "{parts:?}");
    assert!(parts.iter().all(|flags| flags.contains(" nh ")), "{parts:?}");
    lazy.place_zeros(0, block.used().unwrap()).unwrap();
    lazy.finish().unwrap();
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(64))]
    /// Offsets from inside the block, around its end and around the end of all numbers.
    #[test]
    fn page_records_at_any_offset_are_placed_or_refused(
        pages in proptest::collection::vec(
            proptest::prop_oneof![0..200u64, 1000..1100u64, (u64::MAX / PAGE - 3)..=u64::MAX / PAGE],
            1..30,
        ),
        zeros in proptest::bits::u32::ANY,
    ) {
        use crate::postcopy::page_placer::PagePlacer;
        use crate::stream::{PageHeader, PageKind, put_end_of_section};
        use vmstate::wire::{WireReader, WireWrite};
        let side = Side::new(&[0, 1]);
        let lazy = hundred(&side);
        let mut bytes = Vec::new();
        for (index, page) in pages.iter().enumerate() {
            let zero = zeros >> (index % 32) & 1 != 0;
            let kind = if zero { PageKind::Zero } else { PageKind::Normal };
            bytes.put_be64(PageHeader::page_word(kind, page * PAGE, false));
            bytes.put_name("vmem0");
            bytes.put(if zero { &[0][..] } else { &[7; PAGE as usize][..] });
        }
        put_end_of_section(&mut bytes);
        let placed = PagePlacer::new(&|| false).place_section(&lazy, &mut WireReader::new(&bytes[..]));
        let fit = pages.iter().take_while(|page| **page < 1024).copied();
        let arrived: std::collections::BTreeSet<u64> = fit.clone().filter(|page| *page < 100).collect();
        proptest::prop_assert_eq!(placed.is_ok(), fit.count() == pages.len(), "{:?}", placed);
        if let Some(page) = pages.iter().find(|page| **page >= 1024) {
            let refused = format!("a page at {:#x} of block \"vmem0\"", page * PAGE);
            proptest::prop_assert!(placed.unwrap_err().to_string().contains(&refused));
        } else {
            proptest::prop_assert_eq!(lazy.outstanding(), 100 - arrived.len() as u64);
        }
        lazy.abandon();
    }
}

/// Counts how often it is told.
#[derive(Default)]
struct Failures(AtomicUsize);

impl HandlerFailed for Failures {
    fn handler_failed(&self, error: &MigrationError) {
        assert!(matches!(error, MigrationError::Outstanding { pages: 100 }), "{error}");
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

fn hundred(side: &Side) -> Arc<LazyRam> {
    let block = Arc::clone(side.blocks.get("vmem0").unwrap());
    let mut outstanding = PageBitmap::new(block.used_length() / PAGE);
    outstanding.set_range(0..100);
    Arc::new(LazyRam::new(vec![(block, outstanding)]).unwrap())
}

#[test]
fn memory_that_is_dropped_before_it_has_arrived_never_becomes_zeros() {
    let side = Arc::new(Side::new(&[0, 1]));
    let mapping = Arc::clone(side.blocks.get("vmem0").unwrap().mapping());
    if has_huge_pages() {
        ask_for_huge_pages(&mapping);
    }
    let lazy = hundred(&side);
    let failed = Arc::new(Failures::default());
    let told = Arc::clone(&failed) as Arc<dyn HandlerFailed>;
    let handler = FaultHandler::start(Arc::clone(&lazy), told).unwrap();
    let reading = Arc::clone(&side);
    let waits = thread::spawn(move || read(&reading, 10));
    wait_until(|| !lazy.blocks[0].requested().is_empty());
    // However it comes about.
    let unwinding = thread::spawn(move || {
        let _dropped = (handler, lazy);
        panic!("while memory arrives");
    });
    unwinding.join().unwrap_err();
    assert_eq!(failed.0.load(Ordering::Relaxed), 1);
    let reading = Arc::clone(&side);
    let begins = thread::spawn(move || read(&reading, 20));
    thread::sleep(Duration::from_millis(100));
    assert!(!waits.is_finished() && !begins.is_finished(), "they read zeros");
    if has_huge_pages() {
        // One would fill outstanding pages with zeros.
        let parts = flags(&mapping);
        assert!(parts.iter().all(|flags| flags.contains(" nh ")), "{parts:?}");
    }
}

/// Has no page, for a reason that is its own or for want of memory.
#[derive(Default)]
struct Lacking {
    no_memory: AtomicBool,
    asked: AtomicUsize,
}

impl PageSource for Lacking {
    fn request(&self, _lazy: &LazyRam, _block: usize, _range: ByteRange) -> io::Result<()> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        let lacks = if self.no_memory.load(Ordering::Relaxed) { libc::ENOSPC } else { libc::EIO };
        Err(io::Error::from_raw_os_error(lacks))
    }

    fn is_retried(&self) -> bool {
        true
    }
}

/// Notes what it is told.
#[derive(Default)]
struct Reasons(Mutex<Vec<String>>);

impl HandlerFailed for Reasons {
    fn handler_failed(&self, error: &MigrationError) {
        self.0.lock().push(error.to_string());
    }
}

#[test]
fn a_request_that_fails_is_made_again_and_again_and_told_once_after_a_hundred_times() {
    let side = Side::new(&[0, 1]);
    let lazy = hundred(&side);
    let lacking = Arc::new(Lacking::default());
    lazy.set_source(Some(Arc::clone(&lacking) as Arc<dyn PageSource>));
    let reasons = Arc::new(Reasons::default());
    let told = Arc::clone(&reasons) as Arc<dyn HandlerFailed>;
    *lazy.failure.write() = Some(handler::Failure::new(told));
    lazy.request_or_note(0, ByteRange::new(0, PAGE).unwrap());
    let retry = |times: u32| (0..times).for_each(|_| lazy.retry_requests());
    // An attempt that fails for want of memory is not counted.
    lacking.no_memory.store(true, Ordering::Relaxed);
    retry(2 * TRIES_MAX);
    lacking.no_memory.store(false, Ordering::Relaxed);
    retry(TRIES_MAX - 1);
    assert!(reasons.0.lock().is_empty());
    retry(1);
    let reason = reasons.0.lock().clone();
    assert!(matches!(&reason[..], [one] if one.contains("bring a page")), "{reason:?}");
    retry(TRIES_MAX);
    assert_eq!(reasons.0.lock().len(), 1);
    assert_eq!(lacking.asked.load(Ordering::Relaxed), 1 + 4 * TRIES_MAX as usize);
    // Until it can be had.
    lazy.set_source(Some(Arc::new(Sevens::default())));
    retry(1);
    assert_eq!((lazy.outstanding(), lazy.has_failed_requests()), (99, false));
    lazy.abandon();
}

#[test]
fn memory_that_is_given_up_is_zeros_for_those_who_waited() {
    let side = Arc::new(Side::new(&[0, 1]));
    let lazy = hundred(&side);
    let handler = FaultHandler::start(Arc::clone(&lazy), Arc::new(NoFailure)).unwrap();
    let reading = Arc::clone(&side);
    let waits = thread::spawn(move || read(&reading, 10));
    wait_until(|| !lazy.blocks[0].requested().is_empty());
    lazy.abandon();
    assert_eq!(waits.join().unwrap(), 0);
    assert_eq!(read(&side, 20), 0);
    let late = lazy.place(0, 30 * PAGE, &[7; PAGE as usize]).unwrap_err().to_string();
    assert!(late.contains("memory that was given up"), "{late}");
    drop((handler, lazy));
}

#[test]
fn blocktime_is_of_the_threads_that_waited_first() {
    let side = Arc::new(Side::new(&[0, 1]));
    let (lazy, _handler) = lazy(&side, 0..100);
    let reading = Arc::clone(&side);
    let (tell, told) = std::sync::mpsc::channel();
    let reader = thread::spawn(move || {
        tell.send(rustix::thread::gettid().as_raw_nonzero().get() as u32).unwrap();
        (read(&reading, 10), read(&reading, 11))
    });
    let thread = told.recv_timeout(PATIENCE).unwrap();
    let waited = Duration::from_millis(30);
    for page in [10, 11] {
        wait_until(|| !lazy.blocks[0].requested().is_empty());
        thread::sleep(waited);
        lazy.place(0, page * PAGE, &[7; PAGE as usize]).unwrap();
    }
    assert_eq!(reader.join().unwrap(), (7, 7));
    // Pages that nothing was waited for, and pages of zeros, count for nothing.
    lazy.place(0, 0, &[7; 10 * PAGE as usize]).unwrap();
    assert_eq!(read(&side, 900), 0);
    let statistics = lazy.statistics();
    assert_eq!(statistics.blocktime.keys().copied().collect::<Vec<_>>(), [thread]);
    assert!(statistics.blocktime[&thread] >= 2 * waited, "{statistics:?}");
    assert_eq!(
        (statistics.remote.count, statistics.remote.total),
        (2, statistics.blocktime[&thread])
    );
    lazy.abandon();
}

/// Takes memory for what is about to be populated, as a device does of huge pages; and while the change is under way,
/// all has arrived.
struct TakesMemory {
    region: File,
    lazy: Arc<LazyRam>,
    finishing: Arc<Mutex<Option<thread::JoinHandle<()>>>>,
}

impl RamDiscardListener for TakesMemory {
    fn name(&self) -> &str {
        "guest memory"
    }

    fn notify_populate(&mut self, section: Section) -> Result<(), String> {
        fill(&self.region, section.start() / PAGE..section.end() / PAGE, 0);
        let lazy = Arc::clone(&self.lazy);
        let finishing = thread::spawn(move || lazy.finish().unwrap());
        // It may wait for the change.
        thread::sleep(Duration::from_millis(50));
        *self.finishing.lock() = Some(finishing);
        Ok(())
    }

    fn notify_discard(&mut self, _section: Section) {}
}

#[test]
fn memory_that_is_taken_for_what_is_plugged_when_all_has_arrived_stays() {
    let side = Side::elastic(&[0]);
    let (lazy, _handler) = lazy(&side, 0..0);
    let finishing = Arc::new(Mutex::new(None));
    let blocks = [Arc::clone(side.blocks.get("vmem0").unwrap())];
    let mut frozen = FrozenBlocks::new(blocks, FreezeFor::Destination).unwrap();
    let (device, region) = (side.device(), side.region.try_clone().unwrap());
    let (memory, finishes) = (Arc::clone(&lazy), Arc::clone(&finishing));
    let listener = TakesMemory { region, lazy: memory, finishing: finishes };
    let other = Section::new(4 * BLOCK, BLOCK).unwrap();
    device.register(other, Box::new(listener)).unwrap();
    ArrivalFollower::follow(&mut frozen, &lazy).unwrap();
    device.plug(4).unwrap();
    finishing.lock().take().unwrap().join().unwrap();
    assert_eq!(side.resident_of(4), BLOCK / PAGE);
}
