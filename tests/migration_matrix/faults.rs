//! What goes wrong besides channels: memory that is not there, pages that do not fit.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use migration::lazy::OfferedFaults;
use migration::lazy::{FaultHandler, HandlerFailed, LazyRam, SharedFaults, SharedRange};
use migration::page_bitmap::PageBitmap;
use migration::postcopy::SwitchWhen;
use migration::snapshot::{RunningGuest, save_in_background};
use migration::stream::Configuration;
use migration::{Guest, MigrationError, NoDevices, Progress};
use ram_discard::memory::HostMapping;

use crate::guest::{EndsWithThis, Vm, no_work};
use crate::huge_page_pool::Pool;
use crate::memory::{BLOCK, Kind, Pattern, Room, Side, file_with_room, say};
use crate::moving::run;
use crate::{ALONE, SMALL};

const PAGE: u64 = 4096;

fn alone() -> std::sync::MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// The two guests, of which the first one runs, and what ends them.
fn guests(from: &Side, to: &Side) -> (Arc<Vm>, Arc<Vm>, [EndsWithThis; 2]) {
    let work = no_work(from.block.used_length());
    let (here, there) = (Vm::new(from, &work), Vm::new(to, &work));
    let ends = [here.ends_with_this(), there.ends_with_this()];
    here.start();
    here.run().unwrap();
    here.wait_rounds(2);
    (here, there, ends)
}

/// The first guest goes on as if nothing had been, and the second never ran.
fn assert_stayed(here: &Arc<Vm>, there: &Arc<Vm>) {
    here.wait_rounds(2);
    assert_eq!((here.end(), there.end()), (0, 0));
    assert_eq!(there.visited(), 0);
}

/// Precopy is refused for want of memory, and the guest stays.
fn assert_no_room_for_precopy(from: &Side, to: &Side) {
    let (here, there, _ends) = guests(from, to);
    let links = vec![UnixStream::pair().unwrap()];
    let (sent, received) = run(from, to, &here, &there, None, links, || {});
    let error = received.unwrap_err().to_string();
    assert!(error.contains("\"vmem0\": cannot write a page"), "{error}");
    assert!(sent.is_err());
    assert_stayed(&here, &there);
}

#[test]
fn a_destination_without_room_refuses_and_the_guest_stays() {
    let _alone = alone();
    let plugged = Pattern::Alternating.plugged(SMALL);
    let from = Side::new(Kind::Memfd, &plugged).unwrap();
    let (to, _room) = match Side::with_room(1 << 20, &plugged) {
        Ok(to) => to,
        Err(error) => return say(&format!("skipped: a tmpfs of its own: {error}")),
    };
    assert_no_room_for_precopy(&from, &to);
}

#[test]
fn page_sizes_that_differ_are_named_and_the_guest_stays() {
    let _alone = alone();
    let plugged = Pattern::Alternating.plugged(SMALL);
    let from = Side::new(Kind::Memfd, &plugged).unwrap();
    let to = match Side::new(Kind::Hugetlb, &plugged) {
        Ok(to) => to,
        Err(error) => return say(&format!("skipped: hugetlb: {error}")),
    };
    let (here, there, _ends) = guests(&from, &to);
    let links = vec![UnixStream::pair().unwrap()];
    let when = Some(SwitchWhen::AtOnce);
    let (sent, received) = run(&from, &to, &here, &there, when, links, || {});
    let error = received.unwrap_err().to_string();
    assert!(error.contains("page sizes of RAM: \"0x1000"), "{error}");
    assert!(error.contains("\"0x200000"), "{error}");
    assert!(sent.is_err());
    assert_stayed(&here, &there);
}

#[test]
fn an_empty_pool_of_huge_pages_holds_up_postcopy_until_there_are_some() {
    let _alone = alone();
    let plugged = Pattern::None.plugged(SMALL);
    let nr_pages = SMALL as u64;
    let pool = match Pool::with_free(BLOCK, nr_pages + 2) {
        Ok(pool) => pool,
        Err(error) => return say(&format!("skipped: hugetlb: {error}")),
    };
    let from = Side::new(Kind::Hugetlb, &plugged).unwrap();
    let to = Side::new(Kind::Hugetlb, &plugged).unwrap();
    // No holes: with an empty pool, the kernel would end who touches one that is not registered.
    for page in 0..nr_pages {
        from.block.mapping().write(page * BLOCK + 16, &(page + 1).to_le_bytes());
    }
    assert_eq!(pool.free(), 2);
    let (here, there, _ends) = guests(&from, &to);
    // None to recover over.
    let links = vec![UnixStream::pair().unwrap()];
    let more = later(move || {
        pool.make_free(nr_pages).unwrap();
        pool
    });
    let (sent, received) = run(&from, &to, &here, &there, Some(SwitchWhen::AtOnce), links, || {});
    let _pool = more.join().unwrap();
    sent.unwrap();
    received.unwrap();
    there.wait_rounds(2);
    assert_eq!((here.end(), there.end()), (0, 0));
    let mut content = [0; 8];
    for page in 0..nr_pages {
        to.block.mapping().read(page * BLOCK + 16, &mut content);
        assert_eq!(u64::from_le_bytes(content), page + 1);
    }
}

#[test]
fn an_empty_pool_of_huge_pages_refuses_precopy_and_the_guest_stays() {
    let _alone = alone();
    let plugged = Pattern::None.plugged(SMALL);
    let _pool = match Pool::with_free(BLOCK, SMALL as u64 + 2) {
        Ok(pool) => pool,
        Err(error) => return say(&format!("skipped: hugetlb: {error}")),
    };
    let from = Side::new(Kind::Hugetlb, &plugged).unwrap();
    let to = Side::new(Kind::Hugetlb, &plugged).unwrap();
    assert_no_room_for_precopy(&from, &to);
}

/// Memory whose pages have their numbers from 1 at this offset, and a side with no room for most of
/// it; nothing where no tmpfs can be mounted.
fn with_little_room(offset: u64) -> Option<(Side, Side, Room)> {
    let plugged = Pattern::None.plugged(SMALL);
    // No whole number of the runs that are placed at once.
    let (to, room) = match Side::with_room((1 << 20) + 37 * PAGE, &plugged) {
        Ok(to) => to,
        Err(error) => {
            say(&format!("skipped: a tmpfs of its own: {error}"));
            return None;
        }
    };
    let from = Side::new(Kind::Memfd, &plugged).unwrap();
    for page in 0..from.block.used_length() / PAGE {
        from.block.mapping().write(page * PAGE + offset, &(page + 1).to_le_bytes());
    }
    Some((from, to, room))
}

#[test]
fn a_full_tmpfs_holds_up_postcopy_until_there_is_room() {
    let _alone = alone();
    // Between the guest's stamps, so that runs are long and there are no holes: with no room left,
    // the kernel would end who touches one that is not registered.
    let Some((from, to, room)) = with_little_room(16) else { return };
    let nr_pages = from.block.used_length() / PAGE;
    let (here, there, _ends) = guests(&from, &to);
    // None to recover over.
    let links = vec![UnixStream::pair().unwrap()];
    let more = later(move || room.set(SMALL as u64 * BLOCK).unwrap());
    let (sent, received) = run(&from, &to, &here, &there, Some(SwitchWhen::AtOnce), links, || {});
    more.join().unwrap();
    sent.unwrap();
    received.unwrap();
    there.wait_rounds(2);
    assert_eq!((here.end(), there.end()), (0, 0));
    let mut content = [0; 8];
    for page in 0..nr_pages {
        to.block.mapping().read(page * PAGE + 16, &mut content);
        assert_eq!(u64::from_le_bytes(content), page + 1);
    }
}

/// Makes room after a moment, in which what there is has long been used up.
fn later<T: Send + 'static>(
    make_room: impl FnOnce() -> T + Send + 'static,
) -> thread::JoinHandle<T> {
    thread::spawn(move || {
        thread::sleep(Duration::from_millis(500));
        make_room()
    })
}

#[test]
fn a_full_tmpfs_holds_up_a_lazy_restore_until_there_is_room() {
    let _alone = alone();
    let Some((from, to, room)) = with_little_room(0) else { return };
    let nr_pages = from.block.used_length() / PAGE;
    let file = Arc::new(tempfile::tempfile().unwrap());
    crate::save_stopped(&from, &file);
    let (tell, failed) = mpsc::channel();
    let restored = crate::restore_at_once(&to, &file, Arc::new(Tell(tell)));
    let mapping = Arc::clone(to.block.mapping());
    // From the end, where the background comes last.
    let guest = thread::spawn(move || {
        let mut content = [0; 8];
        let read = (0..nr_pages).rev().map(|page| {
            mapping.read(page * PAGE, &mut content);
            u64::from_le_bytes(content)
        });
        read.collect::<Vec<_>>()
    });
    // For longer than a file that cannot be read is tried again.
    assert_eq!(failed.recv_timeout(Duration::from_millis(1500)).ok(), None);
    assert!(!guest.is_finished());
    assert!(restored.outstanding() > nr_pages / 2);
    room.set(SMALL as u64 * BLOCK).unwrap();
    restored.wait().unwrap();
    assert_eq!(guest.join().unwrap(), (1..=nr_pages).rev().collect::<Vec<_>>());
    assert_eq!(restored.outstanding(), 0);
}

/// Passes on why faults are not answered any more.
struct Tell(mpsc::Sender<String>);

impl HandlerFailed for Tell {
    fn handler_failed(&self, error: &MigrationError) {
        self.0.send(error.to_string()).unwrap();
    }
}

#[test]
fn a_back_end_that_touches_a_hole_with_an_empty_pool_waits_until_there_are_huge_pages() {
    let _alone = alone();
    let pool = match Pool::with_free(BLOCK, 2) {
        Ok(pool) => pool,
        Err(error) => return say(&format!("skipped: hugetlb: {error}")),
    };
    let side = Side::new(Kind::Hugetlb, &Pattern::None.plugged(4)).unwrap();
    let mut outstanding = PageBitmap::new(4 * BLOCK / PAGE);
    outstanding.set_range(0..BLOCK / PAGE);
    let lazy = Arc::new(LazyRam::new(vec![(Arc::clone(&side.block), outstanding)]).unwrap());
    let (tell, failed) = mpsc::channel();
    let _handler = FaultHandler::start(Arc::clone(&lazy), Arc::new(Tell(tell.clone()))).unwrap();
    // The kernel may need a second one while it places a page.
    lazy.place(0, 0, &[7; BLOCK as usize]).unwrap();
    pool.make_free(0).unwrap();
    let file = side.block.ram().backing().file();
    let client = Arc::new(HostMapping::map(file, 0, 4 * BLOCK).unwrap());
    let offered = OfferedFaults::open().unwrap();
    let (address, len) = (client.addr() as u64, 4 * BLOCK);
    offered.register(address, len).unwrap();
    let copy = offered.copy().unwrap();
    let shared = SharedFaults::start(Arc::clone(&lazy), copy, Arc::new(Tell(tell))).unwrap();
    shared.set_ranges(vec![SharedRange { address, len, block: 0, offset: 0 }]).unwrap();
    let reader = thread::spawn(move || {
        let mut byte = [1];
        client.read(2 * BLOCK, &mut byte);
        byte[0]
    });
    assert_eq!(failed.recv_timeout(Duration::from_millis(200)).ok(), None);
    assert!(!reader.is_finished());
    // It was not woken for nothing again and again, as if there were a page.
    assert_eq!(lazy.statistics().arrived, 0);
    pool.make_free(2).unwrap();
    assert_eq!(reader.join().unwrap(), 0);
    lazy.finish().unwrap();
}

#[test]
fn who_touches_a_hole_with_no_room_left_waits_until_there_is_some() {
    let _alone = alone();
    let plugged = Pattern::None.plugged(1);
    let (side, room) = match Side::with_room(10 * PAGE, &plugged) {
        Ok(side) => side,
        Err(error) => return say(&format!("skipped: a tmpfs of its own: {error}")),
    };
    // A hole in a gap that is too small not to be registered.
    let mut outstanding = PageBitmap::new(BLOCK / PAGE);
    outstanding.set_range(0..10);
    outstanding.set(100);
    let lazy = Arc::new(LazyRam::new(vec![(Arc::clone(&side.block), outstanding)]).unwrap());
    let (tell, failed) = mpsc::channel();
    let _handler = FaultHandler::start(Arc::clone(&lazy), Arc::new(Tell(tell.clone()))).unwrap();
    lazy.place(0, 0, &[7; 10 * PAGE as usize]).unwrap();
    // A back-end that shares the memory, and has all of it registered.
    let file = side.block.ram().backing().file();
    let client = Arc::new(HostMapping::map(file, 0, BLOCK).unwrap());
    let offered = OfferedFaults::open().unwrap();
    let address = client.addr() as u64;
    offered.register(address, BLOCK).unwrap();
    let copy = offered.copy().unwrap();
    let shared = SharedFaults::start(Arc::clone(&lazy), copy, Arc::new(Tell(tell))).unwrap();
    shared.set_ranges(vec![SharedRange { address, len: BLOCK, block: 0, offset: 0 }]).unwrap();
    let readers = [(Arc::clone(side.block.mapping()), 50), (client, 60)].map(|(mapping, page)| {
        thread::spawn(move || {
            let mut byte = [1];
            mapping.read(page * PAGE, &mut byte);
            byte[0]
        })
    });
    assert_eq!(failed.recv_timeout(Duration::from_millis(200)).ok(), None);
    room.set(BLOCK).unwrap();
    assert_eq!(readers.map(|reader| reader.join().unwrap()), [0, 0]);
    lazy.place(0, 100 * PAGE, &[7; PAGE as usize]).unwrap();
    lazy.finish().unwrap();
}

/// A guest that unplugs a block when it runs again.
struct Unplugs<'a>(&'a Side);

impl Guest for Unplugs<'_> {
    fn stop(&self) -> Result<(), String> {
        Ok(())
    }

    fn run(&self) -> Result<(), String> {
        assert!(self.0.device.change(3, false), "it is not busy");
        Ok(())
    }
}

#[test]
fn a_full_disk_fails_the_image_and_not_the_unplug() {
    let _alone = alone();
    let side = Side::new(Kind::Memfd, &Pattern::None.plugged(SMALL)).unwrap();
    let image = match file_with_room(1 << 20) {
        Ok(image) => image,
        Err(error) => return say(&format!("skipped: a tmpfs of its own: {error}")),
    };
    let nr_pages = side.block.used_length() / PAGE;
    (0..nr_pages).for_each(|page| side.block.mapping().write(page * PAGE, &[7]));
    let progress = Arc::new(Progress::new());
    let running = RunningGuest {
        configuration: Configuration::new("matrix"),
        blocks: &side.blocks,
        devices: &mut NoDevices,
        guest: &Unplugs(&side),
        progress: Arc::clone(&progress),
    };
    let error = save_in_background(running, &image).unwrap_err();
    let MigrationError::Io { source, .. } = &error else { panic!("{error}") };
    assert_eq!(source.kind(), io::ErrorKind::StorageFull);
    // It was the unplug that found out.
    let seen = progress.snapshot();
    assert_eq!(
        (seen.normal, seen.saved_before_discard != 0),
        (seen.saved_before_discard - 64, true)
    );
    assert_eq!(side.leaked(), 0);
    let held = side.block.ram().backing().file().metadata().unwrap().blocks() * 512;
    assert_eq!(held, (SMALL as u64 - 1) * BLOCK);
}
