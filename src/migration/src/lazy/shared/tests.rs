//! A client with a mapping of its own, elsewhere than the VMM's.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use ram_discard::memory::HostMapping;

use super::*;
use crate::page_bitmap::PageBitmap;
use crate::ram::MigrationBlock;
use crate::sys::shared_faults::{OfferedFaults, removals};
use crate::test_support::{BLOCK, OnEvent, PAGE, Side, wait_until};

/// Counts what it is asked for, and answers later or never.
#[derive(Default)]
struct Asked(Mutex<Vec<(usize, u64)>>);

impl super::super::PageSource for Asked {
    fn request(&self, _lazy: &LazyRam, block: usize, range: ByteRange) -> io::Result<()> {
        self.0.lock().push((block, range.start() / PAGE));
        Ok(())
    }
}

#[derive(Default)]
struct Failures(AtomicUsize);

impl HandlerFailed for Failures {
    fn handler_failed(&self, _error: &MigrationError) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

struct Rig {
    side: Side,
    lazy: Arc<LazyRam>,
    asked: Arc<Asked>,
    shared: SharedFaults,
    client: Arc<HostMapping>,
    _offered: OfferedFaults,
}

/// A VMM in which pages 0 to 8 of block 1 of the region are outstanding; blocks 1 and 2 are plugged.
/// The client has mapped the region from block 1 on.
fn rig() -> Rig {
    let side = Side::new(&[1, 2]);
    let block: Arc<MigrationBlock> = Arc::clone(side.blocks.get("vmem0").unwrap());
    let mut outstanding = PageBitmap::new(16 * BLOCK / PAGE);
    outstanding.set_range(64..72);
    let lazy = Arc::new(LazyRam::new(vec![(block, outstanding)]).unwrap());
    let asked = Arc::new(Asked::default());
    lazy.set_source(Some(Arc::clone(&asked) as Arc<dyn super::super::PageSource>));
    let client = Arc::new(HostMapping::map(&side.region, BLOCK, 15 * BLOCK).unwrap());
    let offered = OfferedFaults::open().unwrap();
    offered.register(client.addr() as u64, 15 * BLOCK).unwrap();
    let copy = offered.copy().unwrap();
    let shared = SharedFaults::start(Arc::clone(&lazy), copy, Arc::new(Failures::default()));
    let shared = shared.unwrap();
    let address = client.addr() as u64;
    let range = SharedRange { address, len: 15 * BLOCK, block: 0, offset: BLOCK };
    shared.set_ranges(vec![range]).unwrap();
    Rig { side, lazy, asked, shared, client, _offered: offered }
}

fn read(client: &Arc<HostMapping>, page: u64) -> JoinHandle<u8> {
    let client = Arc::clone(client);
    thread::spawn(move || {
        let mut byte = [0];
        client.read(page * PAGE, &mut byte);
        byte[0]
    })
}

#[test]
fn a_page_that_a_client_misses_is_asked_for_by_block_and_offset() {
    let rig = rig();
    let readers = [read(&rig.client, 3), read(&rig.client, 3)];
    wait_until(|| !rig.asked.0.lock().is_empty());
    assert!(!readers[0].is_finished() && !readers[1].is_finished());
    rig.lazy.place(0, (64 + 3) * PAGE, &[7; PAGE as usize]).unwrap();
    assert_eq!(readers.map(|reader| reader.join().unwrap()), [7, 7]);
    assert_eq!(*rig.asked.0.lock(), [(0, 64 + 3)], "once");
    assert_eq!(rig.side.page(64 + 3)[0], 7);
    // What arrived before is there without a request.
    rig.lazy.place(0, (64 + 4) * PAGE, &[8; PAGE as usize]).unwrap();
    assert_eq!(read(&rig.client, 4).join().unwrap(), 8);
    assert_eq!(rig.asked.0.lock().len(), 1);
}

#[test]
fn what_never_comes_is_zeros_on_the_spot() {
    let rig = rig();
    // Plugged and never touched; discarded; and beyond what the VMM itself has registered.
    for page in [10, 64 + 1, 5 * 64, 15 * 64 - 1] {
        assert_eq!(read(&rig.client, page).join().unwrap(), 0);
    }
    // Zeros that arrive while the client waits.
    let reader = read(&rig.client, 5);
    wait_until(|| !rig.asked.0.lock().is_empty());
    rig.lazy.place_zeros(0, ByteRange::new((64 + 5) * PAGE, PAGE).unwrap()).unwrap();
    assert_eq!(reader.join().unwrap(), 0);
    assert_eq!(*rig.asked.0.lock(), [(0, 64 + 5)]);
    let before = rig.side.resident().0;
    let rest = ByteRange::new(64 * PAGE, 8 * PAGE).unwrap();
    rig.lazy.place_zeros(0, rest).unwrap();
    rig.lazy.finish().unwrap();
    assert_eq!(
        rig.side.resident().0,
        before - 2,
        "what a client left in discarded memory is discarded again"
    );
}

#[test]
fn a_page_that_vmm_and_client_wait_for_is_asked_for_once() {
    let rig = rig();
    let failed = Arc::new(Failures::default());
    let handler = super::super::FaultHandler::start(Arc::clone(&rig.lazy), failed).unwrap();
    let own = Arc::clone(rig.lazy.block(0).mapping());
    let readers = [read(&own, 64 + 1), read(&rig.client, 1)];
    wait_until(|| !rig.asked.0.lock().is_empty());
    thread::sleep(Duration::from_millis(20));
    rig.lazy.place(0, (64 + 1) * PAGE, &[9; PAGE as usize]).unwrap();
    assert_eq!(readers.map(|reader| reader.join().unwrap()), [9, 9]);
    assert_eq!(rig.asked.0.lock().len(), 1);
    drop(handler);
}

#[test]
fn ranges_outside_their_block_are_refused() {
    let rig = rig();
    let good = SharedRange { address: 1 << 40, len: BLOCK, block: 0, offset: 0 };
    for bad in [
        SharedRange { block: 1, ..good },
        SharedRange { offset: 16 * BLOCK, ..good },
        SharedRange { offset: u64::MAX, ..good },
        SharedRange { address: u64::MAX, ..good },
    ] {
        assert!(rig.shared.set_ranges(vec![good, bad]).is_err());
    }
    assert_eq!(read(&rig.client, 20).join().unwrap(), 0, "the ranges before stay");
    rig.shared.set_ranges(vec![good]).unwrap();
}

#[test]
fn a_client_whose_descriptor_is_no_userfaultfd_is_refused_alone() {
    let rig = rig();
    let (pipe, _other) = io::pipe().unwrap();
    let failed = Arc::new(Failures::default());
    let told = Arc::clone(&failed);
    let Err(error) = SharedFaults::start(Arc::clone(&rig.lazy), pipe.into(), told) else {
        panic!("a pipe was taken for a userfaultfd");
    };
    assert!(error.to_string().contains("where a userfaultfd was expected"), "{error}");
    let reader = read(&rig.client, 2);
    wait_until(|| !rig.asked.0.lock().is_empty());
    rig.lazy.place(0, (64 + 2) * PAGE, &[5; PAGE as usize]).unwrap();
    assert_eq!(reader.join().unwrap(), 5);
    assert_eq!(failed.0.load(Ordering::Relaxed), 0);
}

#[test]
fn a_client_whose_address_space_changes_all_the_time_is_answered_between() {
    let side = Side::new(&[1, 2]);
    let block: Arc<MigrationBlock> = Arc::clone(side.blocks.get("vmem0").unwrap());
    let outstanding = PageBitmap::new(16 * BLOCK / PAGE);
    let lazy = Arc::new(LazyRam::new(vec![(block, outstanding)]).unwrap());
    let client = Arc::new(HostMapping::map(&side.region, BLOCK, 15 * BLOCK).unwrap());
    let offered = OfferedFaults::open_with_removals().unwrap();
    let address = client.addr() as u64;
    offered.register(address, 15 * BLOCK).unwrap();
    // The event of each is to be read before the client goes on, and a page is not taken before.
    let changing = Arc::clone(&client);
    let changer = thread::spawn(move || (0..100).for_each(|_| removals::forget(&changing, PAGE)));
    let readers: Vec<_> = (10..30).map(|page| read(&client, page)).collect();
    let failed = Arc::new(Failures::default());
    let told = Arc::clone(&failed);
    let shared = SharedFaults::start(Arc::clone(&lazy), offered.copy().unwrap(), told).unwrap();
    let range = SharedRange { address, len: 15 * BLOCK, block: 0, offset: BLOCK };
    shared.set_ranges(vec![range]).unwrap();
    // Faults that came before the ranges were known are made again.
    offered.wake(address, 15 * BLOCK).unwrap();
    changer.join().unwrap();
    assert!(readers.into_iter().all(|reader| reader.join().unwrap() == 0));
    assert_eq!(failed.0.load(Ordering::Relaxed), 0);
    drop(shared);
}

/// Never comes back from the first request, until it is let go.
struct Stuck {
    asked: AtomicUsize,
    wait: Mutex<std::sync::mpsc::Receiver<()>>,
}

impl super::super::PageSource for Stuck {
    fn request(&self, _lazy: &LazyRam, _block: usize, _range: ByteRange) -> io::Result<()> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        let _ = self.wait.lock().recv();
        Ok(())
    }
}

#[test]
fn a_thread_of_a_client_that_is_held_up_is_left_at_the_end() {
    let rig = rig();
    let (let_go, wait) = std::sync::mpsc::channel();
    let stuck = Arc::new(Stuck { asked: AtomicUsize::new(0), wait: Mutex::new(wait) });
    rig.lazy.set_source(Some(Arc::clone(&stuck) as Arc<dyn super::super::PageSource>));
    let reader = read(&rig.client, 3);
    wait_until(|| stuck.asked.load(Ordering::Relaxed) != 0);
    let Rig { side: _side, lazy, shared, client, _offered: offered, .. } = rig;
    let ending = thread::spawn(move || drop(shared));
    wait_until(|| ending.is_finished());
    assert!(!reader.is_finished());
    assert!(lazy.clients.read().is_empty());
    drop(let_go);
    lazy.place(0, (64 + 3) * PAGE, &[7; PAGE as usize]).unwrap();
    offered.wake(client.addr() as u64, 15 * BLOCK).unwrap();
    assert_eq!(reader.join().unwrap(), 7);
}

#[test]
fn a_client_finds_zeros_in_memory_that_was_given_up() {
    let rig = rig();
    let reader = read(&rig.client, 3);
    wait_until(|| !rig.asked.0.lock().is_empty());
    rig.lazy.abandon();
    assert_eq!(reader.join().unwrap(), 0);
    assert_eq!(read(&rig.client, 4).join().unwrap(), 0);
}

#[test]
fn faults_where_a_client_has_mapped_nothing_are_logged_once_and_counted() {
    let rig = rig();
    let client = &rig.shared.client;
    let logged = Arc::new(AtomicUsize::new(0));
    let counts = Arc::clone(&logged);
    let counts = OnEvent(move || _ = counts.fetch_add(1, Ordering::Relaxed));
    tracing::subscriber::with_default(counts, || {
        let fault = |address| ClientFault { address, thread: 0 };
        client.log_repeated();
        assert_eq!(logged.load(Ordering::Relaxed), 0);
        for address in [0, PAGE, u64::MAX].into_iter().cycle().take(1000) {
            client.answer(&rig.lazy, fault(address)).unwrap();
        }
        assert_eq!(logged.load(Ordering::Relaxed), 1);
        assert_eq!(client.state.lock().unnamed.unlogged(), Some(1000));
        client.log_repeated();
        assert_eq!(logged.load(Ordering::Relaxed), 2, "how many there were");
    });
}
