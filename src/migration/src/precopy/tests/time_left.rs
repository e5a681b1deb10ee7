//! The time that is told to be left, of a guest that writes steadily while it is migrated.

use super::*;
use crate::test_support::wait_until;

/// All of the guest's memory: more than it writes between two looks at that.
const SIZE: u64 = 8 << 20;

const PAGES: u64 = SIZE / PAGE;

/// Bytes a second that are sent. What is sent is the clock of the guest, and of what is compared, so that a machine
/// that is busy with something else changes neither.
const BANDWIDTH: u64 = 8 << 20;

/// A guest that writes one page after the other, and around.
struct Steady {
    file: File,
    progress: Arc<Progress>,
    /// For each 100 bytes that are sent.
    percent: u64,
    /// Pages written, all together.
    pages: u64,
    /// What of that was not reported yet.
    dirty: PageBitmap,
    stopped: bool,
}

impl Steady {
    /// Writes what it would have written by now.
    fn write(&mut self) {
        let due = self.progress.snapshot().transferred * self.percent / 100 / PAGE;
        while self.pages < due && !self.stopped {
            let page = self.pages % PAGES;
            fill(&self.file, page..page + 1, 2 + (self.pages / PAGES % 250) as u8);
            self.dirty.set(page);
            self.pages += 1;
        }
    }
}

type Shared = Arc<Mutex<Steady>>;

struct Vm(Shared);

impl Guest for Vm {
    fn stop(&self) -> Result<(), String> {
        self.0.lock().unwrap().stopped = true;
        Ok(())
    }

    fn run(&self) -> Result<(), String> {
        panic!("it was not stopped in vain")
    }
}

struct Tracker(Shared);

impl DirtyTracker for Tracker {
    fn start(&mut self, _populated: &[ByteRange]) -> io::Result<()> {
        Ok(())
    }

    fn sync(&mut self, dirty: &mut PageBitmap) -> io::Result<()> {
        let mut guest = self.0.lock().unwrap();
        guest.write();
        (0..PAGES).filter(|&page| guest.dirty.clear(page)).for_each(|page| {
            dirty.set(page);
        });
        Ok(())
    }

    fn clear(&mut self, _range: ByteRange) -> io::Result<()> {
        Ok(())
    }

    fn stop(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Bytes that were sent by then, and the time that was said to be left.
type Told = Vec<(u64, Option<Duration>)>;

/// Migrates a guest that writes `percent` of what is sent; what was told once it was known how it writes.
fn send(percent: u64, max_rounds: u64) -> (Result<(), OutgoingError>, Told, MigrationInfo) {
    let (from, to) = (Side::of_region(SIZE), Side::of_region(SIZE));
    fill(&from.region, 0..PAGES, 1);
    let progress = Arc::new(Progress::new());
    let guest = Arc::new(Mutex::new(Steady {
        file: from.region.try_clone().unwrap(),
        progress: Arc::clone(&progress),
        percent,
        pages: 0,
        dirty: PageBitmap::new(PAGES),
        stopped: false,
    }));
    let tracker =
        |_: &MigrationBlock| -> Box<dyn DirtyTracker> { Box::new(Tracker(Arc::clone(&guest))) };
    let ram = RamSave::new(&from.blocks, ListOptions::default(), Arc::clone(&progress), tracker);
    let (near, far) = UnixStream::pair().unwrap();
    let there = receive(&to, &Arc::default(), far);
    let (writes, seen) = (Arc::clone(&guest), Arc::clone(&progress));
    let vcpu = thread::spawn(move || {
        let mut told = Told::new();
        wait_until(|| {
            writes.lock().unwrap().write();
            let info = seen.snapshot();
            // The first time they are collected is at the beginning.
            let is_known = info.status == Status::Active && info.dirty_sync_count > 1;
            if is_known && told.last().is_none_or(|(sent, _)| *sent != info.transferred) {
                told.push((info.transferred, info.expected_time_left));
            }
            matches!(info.status, Status::Completed | Status::Failed)
        });
        told
    });
    let vm = Vm(guest);
    let outgoing = Outgoing {
        parameters: Parameters { max_bandwidth: Some(BANDWIDTH), max_rounds, ..parameters() },
        guest: &vm,
        handlers: vec![Box::new(ram.unwrap())],
        devices: &mut NoDevices,
        postcopy: None,
        progress: Arc::clone(&progress),
    };
    let result = outgoing.run(Channel::new(near, Arc::clone(&progress)).unwrap());
    assert_eq!(there.join().unwrap().is_ok(), result.is_ok());
    let same = (0..PAGES).all(|page| from.page(page) == to.page(page));
    assert!(same || result.is_err());
    (result, vcpu.join().unwrap(), progress.snapshot())
}

#[test]
fn the_time_that_is_told_is_right_within_a_factor_of_two_of_a_guest_that_writes_steadily() {
    for percent in [30, 65] {
        let (result, told, info) = send(percent, 20);
        result.unwrap();
        // What was sent after that, of what was said to be.
        let ratio = |(sent, expected): (u64, Option<Duration>)| {
            let expected = expected.map_or(0.0, |time| time.as_secs_f64() * BANDWIDTH as f64);
            (info.transferred - sent) as f64 / expected
        };
        let mut ratios: Vec<_> = told.into_iter().map(ratio).collect();
        ratios.sort_unstable_by(f64::total_cmp);
        let median = ratios[ratios.len() / 2];
        assert!(0.5 < median && median < 2.0, "{percent} %: {median} of {ratios:?}");
    }
}

#[test]
fn of_a_guest_that_writes_faster_than_is_sent_no_time_is_told() {
    let (result, told, _) = send(150, 6);
    let failed = result.unwrap_err();
    assert!(matches!(failed.error, MigrationError::NotConverging { .. }), "{failed}");
    let none = told.iter().filter(|(_, expected)| expected.is_none());
    assert!(none.count() * 2 > told.len(), "{told:?}");
}
