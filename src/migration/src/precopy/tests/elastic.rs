//! Guests that plug and unplug while they migrate.

use std::fs::File;
use std::sync::atomic::AtomicU64;

use super::*;

const PAGES: u64 = BLOCK / PAGE;

/// Has a page dirty for as long as the guest has something to do, so that precopy does not end before.
#[derive(Clone, Default)]
struct OnePage {
    rests: Arc<AtomicBool>,
    syncs: Arc<AtomicU64>,
}

impl DirtyTracker for OnePage {
    fn start(&mut self, _populated: &[ByteRange]) -> io::Result<()> {
        Ok(())
    }

    fn sync(&mut self, dirty: &mut PageBitmap) -> io::Result<()> {
        self.syncs.fetch_add(1, Ordering::SeqCst);
        if !self.rests.load(Ordering::SeqCst) {
            dirty.set(0);
        }
        Ok(())
    }

    fn clear(&mut self, _range: ByteRange) -> io::Result<()> {
        Ok(())
    }

    fn stop(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What the guest does with its device while it migrates.
struct Acting {
    device: Arc<TestManager>,
    region: File,
    script: Script,
    log: Log,
    one_page: OnePage,
    /// Set when the source's migration has ended.
    ended: Arc<AtomicBool>,
}

impl Drop for Acting {
    /// Also where an assertion of the guest's has failed: a migration without end would not tell it.
    fn drop(&mut self) {
        self.one_page.rests.store(true, Ordering::SeqCst);
    }
}

impl Acting {
    fn wait_for(&self, what: &str) {
        while !self.log.lock().unwrap().contains(&what) {
            self.migrates();
        }
    }

    fn wait_syncs(&self) {
        let before = self.one_page.syncs.load(Ordering::SeqCst);
        while self.one_page.syncs.load(Ordering::SeqCst) < before + 3 {
            self.migrates();
        }
    }

    /// Lets others run. What is waited for never comes once the migration has ended.
    fn migrates(&self) {
        assert!(!self.ended.load(Ordering::SeqCst), "the migration has ended");
        thread::yield_now();
    }

    fn fill(&self, block: usize, byte: u8) {
        for page in 0..PAGES {
            self.script.write(&self.region, block as u64 * PAGES + page, byte);
        }
    }

    fn unplug(&self, block: usize) {
        self.device.unplug(block, &self.region).unwrap();
    }
}

/// Migrates while the guest acts; it has rest then.
fn migrate_while(
    from: &Side,
    to: &Side,
    parameters: Parameters,
    channels: (OwnedFd, OwnedFd),
    act: impl FnOnce(&Acting) + Send + 'static,
) -> Run {
    let (source, destination) = (Arc::<Witness>::default(), Arc::<Witness>::default());
    from.device().watch(&source.log);
    let (script, one_page) = (Script::default(), OnePage::default());
    let acting = Acting {
        device: Arc::clone(from.device()),
        region: from.region.try_clone().unwrap(),
        script: script.clone(),
        log: Arc::clone(&source.log),
        one_page: one_page.clone(),
        ended: Arc::default(),
    };
    let ended = Arc::clone(&acting.ended);
    let guest = thread::spawn(move || act(&acting));
    let there = receive(to, &destination, channels.1);
    let tracker = |block: &MigrationBlock| -> Box<dyn DirtyTracker> {
        if block.id() == "vmem0" { Box::new(script.clone()) } else { Box::new(one_page.clone()) }
    };
    let progress = Arc::new(Progress::new());
    let ram = RamSave::new(&from.blocks, ListOptions::default(), Arc::clone(&progress), tracker);
    let outgoing = Outgoing {
        parameters,
        guest: &*source,
        handlers: vec![Box::new(ram.unwrap())],
        devices: &mut NoDevices,
        postcopy: None,
        progress: Arc::clone(&progress),
    };
    let sent = outgoing.run(Channel::new(channels.0, Arc::clone(&progress)).unwrap());
    ended.store(true, Ordering::SeqCst);
    let failed = sent.as_ref().err().map(|failed| failed.guest);
    guest.join().unwrap();
    let incoming = there.join().unwrap();
    let outgoing = sent.map_err(|failed| failed.error);
    Run { outgoing, guest: failed, incoming, source, destination, sent: progress.snapshot() }
}

fn one_page() -> Parameters {
    let mut parameters = parameters();
    // Nothing dirty fits, and rounds are not counted.
    (parameters.downtime_limit, parameters.max_rounds) = (Duration::ZERO, u64::MAX);
    parameters.block_state_timeout = Some(Duration::from_secs(60));
    parameters
}

fn pair() -> (OwnedFd, OwnedFd) {
    let (near, far) = UnixStream::pair().unwrap();
    (near.into(), far.into())
}

fn assert_same(from: &Side, to: &Side) {
    for block in 0..16 {
        let plugged = from.device().is_plugged(block);
        assert_eq!(to.device().is_plugged(block), plugged, "block {block}");
        for page in (block as u64 * PAGES..).take(PAGES as usize).filter(|_| plugged) {
            assert_eq!(from.page(page), to.page(page), "page {page}");
        }
    }
    assert_eq!((from.leaked(), to.leaked()), (vec![], vec![]));
}

#[test]
fn a_guest_plugs_and_unplugs_while_it_migrates_and_only_the_switchover_is_frozen() {
    let (from, to) = (Side::elastic(&[0, 1, 2]), Side::elastic(&[0, 1, 2]));
    fill(&from.region, 0..3 * PAGES, 1);
    let run = migrate_while(&from, &to, one_page(), pair(), |guest| {
        guest.wait_for("follow");
        guest.device.plug(7).unwrap();
        guest.fill(7, 7);
        guest.wait_syncs();
        guest.unplug(1);
        guest.device.plug(8).unwrap();
        guest.fill(8, 8);
        guest.wait_syncs();
        guest.unplug(8);
        guest.unplug(0);
        guest.device.plug(0).unwrap();
        guest.fill(0, 9);
    });
    run.outgoing.unwrap();
    run.incoming.unwrap();
    assert_eq!(run.source.log(), ["freeze", "follow", "freeze", "stop", "thaw"]);
    assert_eq!(run.destination.log(), ["run"]);
    let plugged = |block: &usize| to.device().is_plugged(*block);
    assert_eq!((0..16).filter(plugged).collect::<Vec<_>>(), [0, 2, 7]);
    assert_eq!(to.page(0), [9; 4096]);
    assert_eq!(to.page(7 * PAGES), [7; 4096]);
    assert_same(&from, &to);
    assert!(run.sent.busy_time.unwrap() <= run.sent.total_time);
    assert_eq!(run.sent.discarded, 13 * PAGES);
}

#[test]
fn with_an_end_that_cannot_follow_block_state_is_frozen_from_the_beginning_to_the_end() {
    for (from_follows, to_follows, timeout) in [
        (true, false, Some(Duration::from_secs(60))),
        (false, true, Some(Duration::from_secs(60))),
        (true, true, None),
    ] {
        let side = |follows| if follows { Side::elastic(&[0, 1]) } else { Side::new(&[0, 1]) };
        let (from, to) = (side(from_follows), side(to_follows));
        fill(&from.region, 0..PAGES, 1);
        let mut parameters = one_page();
        parameters.block_state_timeout = timeout;
        let run = migrate_while(&from, &to, parameters, pair(), |guest| {
            guest.wait_for("freeze");
            guest.wait_syncs();
            assert_eq!(guest.device.plug(7).unwrap_err(), "block state is frozen");
            assert_eq!(guest.device.unplug(1, &guest.region).unwrap_err(), "block state is frozen");
        });
        run.outgoing.unwrap();
        run.incoming.unwrap();
        assert_eq!(run.source.log(), ["freeze", "stop", "thaw"]);
        assert_same(&from, &to);
    }
}

#[test]
fn a_guest_that_plugs_and_unplugs_as_fast_as_it_can_migrates_with_what_it_has_then() {
    let (from, to) = (Side::elastic(&[0, 1]), Side::elastic(&[0, 1]));
    fill(&from.region, 0..PAGES, 1);
    let refused = Arc::new(AtomicBool::new(false));
    let ends = Arc::clone(&refused);
    let run = migrate_while(&from, &to, one_page(), pair(), move |guest| {
        guest.wait_for("follow");
        for turn in 0.. {
            if turn == 200 {
                // From here on it is moved as soon as that can be.
                guest.one_page.rests.store(true, Ordering::SeqCst);
            }
            if guest.device.plug(5).is_err() {
                break;
            }
            guest.fill(5, turn as u8);
            if guest.device.unplug(5, &guest.region).is_err() {
                break;
            }
        }
        ends.store(true, Ordering::SeqCst);
    });
    run.outgoing.unwrap();
    run.incoming.unwrap();
    assert!(refused.load(Ordering::SeqCst));
    assert_same(&from, &to);
}

#[test]
fn a_request_is_answered_while_the_bandwidth_is_used_up() {
    let (from, to) = (Side::elastic(&[0, 1]), Side::elastic(&[0, 1]));
    fill(&from.region, 0..2 * PAGES, 1);
    let mut parameters = one_page();
    parameters.max_bandwidth = Some(2 << 20);
    let run = migrate_while(&from, &to, parameters, pair(), |guest| {
        guest.wait_for("follow");
        for block in 4..12 {
            guest.device.plug(block).unwrap();
        }
        guest.unplug(5);
    });
    run.outgoing.unwrap();
    run.incoming.unwrap();
    assert_same(&from, &to);
}

#[test]
fn a_destination_that_answers_too_late_makes_that_one_request_busy() {
    let (from, to) = (Side::elastic(&[0, 1]), Side::elastic(&[0, 1]));
    let mut parameters = one_page();
    parameters.block_state_timeout = Some(Duration::from_millis(20));
    let there = Arc::clone(to.device());
    let run = migrate_while(&from, &to, parameters, pair(), move |guest| {
        guest.wait_for("follow");
        let stands_still = there.busy.lock().unwrap();
        let late = guest.device.plug(4).unwrap_err();
        assert!(late.contains("did not answer"), "{late}");
        drop(stands_still);
        // Once that was taken back; a machine may be slow.
        while guest.device.plug(4).is_err() {
            guest.migrates();
        }
    });
    run.outgoing.unwrap();
    run.incoming.unwrap();
    assert!(to.device().is_plugged(4));
    assert_same(&from, &to);
}

#[test]
fn a_guest_that_waits_for_a_destination_that_leaves_is_served_here() {
    let (from, to) = (Side::elastic(&[0, 1]), Side::elastic(&[0, 1]));
    fill(&from.region, 0..PAGES, 1);
    let (near, far) = UnixStream::pair().unwrap();
    let breaks = far.try_clone().unwrap();
    let there = Arc::clone(to.device());
    let run = migrate_while(&from, &to, one_page(), (near.into(), far.into()), move |guest| {
        guest.wait_for("follow");
        let stands_still = there.busy.lock().unwrap();
        let device = Arc::clone(&guest.device);
        let waits = thread::spawn(move || device.plug(4));
        guest.wait_syncs();
        breaks.shutdown(std::net::Shutdown::Both).unwrap();
        waits.join().unwrap().unwrap();
        drop(stands_still);
    });
    assert!(run.outgoing.is_err() && run.incoming.is_err());
    assert_eq!(run.guest, Some(GuestAfter::RunsHere));
    assert!(from.device().is_plugged(4));
    from.device().unplug(4, &from.region).unwrap();
    from.device().plug(9).unwrap();
    assert_eq!(from.leaked(), Vec::<usize>::new());
}

#[test]
fn a_device_that_is_lost_while_it_is_followed_keeps_the_guest_here() {
    let (from, to) = (Side::elastic(&[0, 1]), Side::elastic(&[0, 1]));
    let run = migrate_while(&from, &to, one_page(), pair(), |guest| {
        guest.wait_for("follow");
        guest.device.lose_freezes();
    });
    let error = run.outgoing.unwrap_err();
    assert!(matches!(error, MigrationError::FreezeLost(_)), "{error}");
    assert_eq!(run.guest, Some(GuestAfter::RunsHere));
    assert!(run.incoming.is_err());
    assert_eq!(run.source.log(), ["freeze", "follow"], "the guest was not stopped");
}
