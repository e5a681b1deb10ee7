//! A guest that writes its memory faster than it is sent, until its vCPUs are slowed down.

use std::sync::atomic::AtomicU8;

use super::*;

/// Pages that the guest writes at full speed while as many are sent: each of them again.
const WRITES: u64 = 90;

/// The slower its vCPUs run the less it writes, on no clock but the engine's rounds.
#[derive(Default)]
struct Busy {
    percent: AtomicU8,
    /// What it was told.
    told: Mutex<Vec<u8>>,
    writes: AtomicU8,
    stops: AtomicBool,
}

impl Guest for Busy {
    fn stop(&self) -> Result<(), String> {
        self.stops.store(true, Ordering::SeqCst);
        Ok(())
    }

    fn run(&self) -> Result<(), String> {
        panic!("it was not stopped in vain")
    }

    fn throttle(&self, percent: u8) {
        self.percent.store(percent, Ordering::SeqCst);
        self.told.lock().unwrap().push(percent);
    }
}

/// Writes pages of the guest in each round, and reports them.
struct Writes {
    guest: Arc<Busy>,
    region: File,
}

impl DirtyTracker for Writes {
    fn start(&mut self, _populated: &[ByteRange]) -> io::Result<()> {
        Ok(())
    }

    fn sync(&mut self, dirty: &mut PageBitmap) -> io::Result<()> {
        if self.guest.stops.load(Ordering::SeqCst) {
            return Ok(());
        }
        let runs = 100 - u64::from(self.guest.percent.load(Ordering::SeqCst));
        let pages = 0..WRITES * runs / 100;
        let byte = 1 + self.guest.writes.fetch_add(1, Ordering::SeqCst) % 250;
        fill(&self.region, pages.clone(), byte);
        dirty.set_range(pages);
        Ok(())
    }

    fn clear(&mut self, _range: ByteRange) -> io::Result<()> {
        Ok(())
    }

    fn stop(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Sent {
    result: Result<(), OutgoingError>,
    received: Outcome,
    /// The percentages that the guest was told.
    told: Vec<u8>,
    stopped: bool,
    info: MigrationInfo,
    /// Whether both sides hold the same.
    same: bool,
}

/// Only a guest that writes nothing in a round is stopped. There are at most 60 rounds.
fn send(throttle: ThrottleParameters) -> Sent {
    let (from, to) = (Side::new(&[0, 1]), Side::new(&[0, 1]));
    let (near, far) = UnixStream::pair().unwrap();
    let there = receive(&to, &Arc::default(), far);
    let progress = Arc::new(Progress::new());
    let guest = Arc::new(Busy::default());
    let tracker = |block: &MigrationBlock| -> Box<dyn DirtyTracker> {
        if block.id() != "vmem0" {
            return Box::<Script>::default();
        }
        let region = from.region.try_clone().unwrap();
        Box::new(Writes { guest: Arc::clone(&guest), region })
    };
    let ram = RamSave::new(&from.blocks, ListOptions::default(), Arc::clone(&progress), tracker);
    let outgoing = Outgoing {
        parameters: Parameters {
            downtime_limit: Duration::ZERO,
            max_rounds: 60,
            throttle,
            ..parameters()
        },
        guest: &*guest,
        handlers: vec![Box::new(ram.unwrap())],
        devices: &mut NoDevices,
        postcopy: None,
        progress: Arc::clone(&progress),
    };
    let result = outgoing.run(Channel::new(near, Arc::clone(&progress)).unwrap());
    let received = there.join().unwrap();
    let same = (0..2 * BLOCK / PAGE).all(|page| from.page(page) == to.page(page));
    let (told, stopped) = (guest.told.lock().unwrap().clone(), guest.stops.load(Ordering::SeqCst));
    Sent { result, received, told, stopped, info: progress.snapshot(), same }
}

/// Of which each round is a period.
fn auto_converge() -> ThrottleParameters {
    let period = Duration::ZERO;
    ThrottleParameters { auto_converge: true, period, ..ThrottleParameters::default() }
}

fn assert_fails(sent: &Sent) {
    let failed = sent.result.as_ref().unwrap_err();
    assert!(matches!(failed.error, MigrationError::NotConverging { rounds: 60, .. }), "{failed}");
    assert_eq!((failed.guest, sent.stopped), (GuestAfter::RunsHere, false));
    assert!(sent.received.is_err());
}

#[test]
fn a_guest_that_writes_faster_than_is_sent_migrates_when_it_is_slowed_down_and_not_otherwise() {
    let off = ThrottleParameters { auto_converge: false, ..auto_converge() };
    let sent = send(off);
    assert_fails(&sent);
    // That none keeps it from running is told in any case.
    assert_eq!((sent.told, sent.info.cpu_throttle_percentage), (vec![0], 0));

    let sent = send(auto_converge());
    sent.result.unwrap();
    sent.received.unwrap();
    assert!(sent.stopped && sent.same);
    assert_eq!(sent.told, [20, 30, 40, 50, 60, 70, 80, 90, 99, 0]);
    assert_eq!(sent.info.cpu_throttle_percentage, 99);
    assert_eq!(sent.info.status, Status::Completed);
}

#[test]
fn vcpus_are_slowed_down_no_more_than_is_asked_for() {
    let throttle = ThrottleParameters { initial: 15, increment: 25, max: 50, ..auto_converge() };
    let sent = send(throttle);
    assert_fails(&sent);
    assert_eq!((sent.told, sent.info.cpu_throttle_percentage), (vec![15, 40, 50, 0], 50));
}

#[test]
fn vcpus_are_not_slowed_down_before_a_period_is_over() {
    let throttle = ThrottleParameters { period: Duration::from_secs(3600), ..auto_converge() };
    let sent = send(throttle);
    assert_fails(&sent);
    assert_eq!(sent.told, [0]);
}
