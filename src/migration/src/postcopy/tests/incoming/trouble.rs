//! Panics, managers that go away, channels that break while the guest starts.

use super::*;
use ram_discard::Section;

#[test]
fn a_panic_while_the_guest_starts_stops_it_and_makes_no_zeros() {
    let (to, there, mut source) = raw_source(Vmm::running(|| panic!("in the VMM")));
    source.hand_over();
    wait_until(|| there.thread.is_finished());
    assert_eq!(there.seen(), (1, 1, 1));
    there.thread.join().unwrap_err();
    let begins = thread::spawn(page_of(&to, ANNOUNCED.start));
    thread::sleep(Duration::from_millis(100));
    assert!(!begins.is_finished(), "it reads zeros");
}

/// Says that it was asked, and gives up when told so.
struct Asked(Sender<()>, Receiver<()>);

impl Reconnect for Asked {
    fn reconnect(&mut self, _error: &MigrationError) -> Option<Channels> {
        self.0.send(()).unwrap();
        let _ = self.1.recv();
        None
    }
}

#[test]
fn a_channel_that_breaks_while_the_guest_starts_pauses_postcopy() {
    let to = Side::new(&[1, 4, 5, 9]);
    let (near, far) = UnixStream::pair().unwrap();
    // The other one stays open.
    let (_near_urgent, far_urgent) = UnixStream::pair().unwrap();
    let (open, wait) = gate();
    let vmm = Vmm::running(move || {
        wait();
        Ok(())
    });
    let (tell_asked, asked) = mpsc::channel();
    let (give_up, given_up) = mpsc::channel();
    let reconnect = Box::new(Asked(tell_asked, given_up));
    let there = receive_with(&to, vmm, far, Some(far_urgent), reconnect);
    let mut source = RawSource::begin(near, &to);
    source.hand_over();
    source.hear(&ReturnMessage::SwitchoverAck);
    drop(source);
    asked.recv_timeout(Duration::from_secs(20)).unwrap();
    assert_eq!(there.progress.status(), Status::PostcopyPaused);
    assert_eq!(there.seen().2, 0, "it may still be recovered");
    drop(give_up);
    // Though its start still hangs.
    wait_until(|| there.seen().2 == 1);
    drop(open);
    wait_until(|| there.thread.is_finished());
    assert_eq!(there.seen(), (1, 1, 1));
    there.thread.join().unwrap().unwrap_err();
}

/// Has a fault of its own.
struct Panics;

impl Reconnect for Panics {
    fn reconnect(&mut self, _error: &MigrationError) -> Option<Channels> {
        panic!("in the VMM")
    }
}

#[test]
fn a_panic_while_memory_is_taken_stops_the_guest_though_its_start_hangs() {
    let to = Side::new(&[1, 4, 5, 9]);
    let (near, far) = UnixStream::pair().unwrap();
    let (open, wait) = gate();
    let vmm = Vmm::running(move || {
        wait();
        Ok(())
    });
    let there = receive_with(&to, vmm, far, None, Box::new(Panics));
    let mut source = RawSource::begin(near, &to);
    source.hand_over();
    source.hear(&ReturnMessage::SwitchoverAck);
    drop(source);
    wait_until(|| there.seen().2 == 1);
    assert!(!there.thread.is_finished());
    drop(open);
    wait_until(|| there.thread.is_finished());
    assert_eq!(there.seen(), (1, 1, 1));
    there.thread.join().unwrap_err();
    let begins = thread::spawn(page_of(&to, ANNOUNCED.start));
    thread::sleep(Duration::from_millis(100));
    assert!(!begins.is_finished(), "it reads zeros");
}

/// A manager whose process goes away.
struct Going {
    manager: Arc<dyn RamDiscardManager>,
    gone: Arc<AtomicBool>,
    /// Waited for before it is said that it has gone.
    noticed: Box<dyn Fn() + Send + Sync>,
}

impl Going {
    fn get(&self) -> Result<&dyn RamDiscardManager, Unavailable> {
        match self.gone.load(Ordering::SeqCst) {
            true => {
                (self.noticed)();
                Err(Unavailable("it was restarted".to_owned()))
            }
            false => Ok(&*self.manager),
        }
    }
}

impl RamDiscardManager for Going {
    fn region_size(&self) -> u64 {
        self.manager.region_size()
    }

    fn granularity(&self) -> u64 {
        self.manager.granularity()
    }

    fn is_populated(&self, section: Section) -> Result<bool, Unavailable> {
        self.get()?.is_populated(section)
    }

    fn replay_populated(
        &self,
        section: Section,
        visit: &mut Visit<'_>,
    ) -> Result<ControlFlow<()>, Unavailable> {
        self.get()?.replay_populated(section, visit)
    }

    fn replay_discarded(
        &self,
        section: Section,
        visit: &mut Visit<'_>,
    ) -> Result<ControlFlow<()>, Unavailable> {
        self.get()?.replay_discarded(section, visit)
    }

    fn register(
        &self,
        section: Section,
        listener: Box<dyn RamDiscardListener>,
    ) -> Result<ListenerId, RegisterError> {
        self.get()?.register(section, listener)
    }

    fn unregister(&self, id: ListenerId) -> Result<Box<dyn RamDiscardListener>, RegisterError> {
        self.get()?.unregister(id)
    }

    fn freeze(&self, purpose: FreezeFor) -> Result<FrozenBlockState, FreezeError> {
        self.manager.freeze(purpose)
    }
}

#[test]
fn a_guest_with_all_its_memory_is_not_lost_to_a_manager_that_went_away() {
    let to = Side::of_region(16 * BLOCK);
    let gone = Arc::new(AtomicBool::new(false));
    // Asked for discarded ranges, it answers when the source has heard that all has arrived.
    let (open, wait) = gate();
    let manager = TestManager::new(&[1, 4, 5, 9], 16);
    let going = Going { manager, gone: Arc::clone(&gone), noticed: Box::new(wait) };
    to.blocks.get("vmem0").unwrap().set_discard_manager(0, Arc::new(going)).unwrap();
    let (near, far) = UnixStream::pair().unwrap();
    let vmm = Vmm::running(move || {
        gone.store(true, Ordering::SeqCst);
        Ok(())
    });
    let there = receive(&to, vmm, far, None);
    let mut source = RawSource::begin(near, &to);
    source.hand_over();
    wait_until(|| there.seen().0 == 1);
    thread::sleep(Duration::from_millis(20));
    source.finish();
    source.hear(&ReturnMessage::Shut(0));
    drop(open);
    wait_until(|| there.thread.is_finished());
    assert_eq!(there.seen(), (1, 1, 0));
    there.thread.join().unwrap().unwrap();
    assert_eq!(there.progress.status(), Status::Completed);
    assert_eq!(there.progress.faults().unwrap().unswept, 1);
    assert_eq!(to.page(ANNOUNCED.start)[0], 7);
}
