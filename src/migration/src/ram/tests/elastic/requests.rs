//! What each request of a guest gets, and what it costs.

use super::*;
use crate::channel::Sink;

#[test]
fn a_block_that_is_plugged_filled_and_unplugged_before_it_was_due_costs_no_page() {
    let mut pair = patient(&[1]);
    pair.step(Op::Request { block: 4, plug: true });
    assert!(pair.to.device().is_plugged(4));
    (0..PAGES).for_each(|page| pair.step(Op::Write { block: 4, page, byte: 7 }));
    pair.step(Op::Request { block: 4, plug: false });
    let mut sent = CountedStream::default();
    pair.save.pending_exact().unwrap();
    pair.save.iterate(&mut sent, u64::MAX).unwrap();
    assert_eq!(sent.written(), 8, "the end of a section");
    // Also when it was collected, and is not sent yet.
    pair.step(Op::Request { block: 4, plug: true });
    pair.step(Op::Write { block: 4, page: 3, byte: 7 });
    pair.save.pending_exact().unwrap();
    assert_eq!(pair.save.pending_estimate(), PAGE);
    pair.step(Op::Request { block: 4, plug: false });
    pair.save.iterate(&mut sent, u64::MAX).unwrap();
    assert_eq!(sent.written(), 16);
    pair.switch().unwrap();
}

#[test]
fn what_a_block_holds_when_it_is_plugged_is_sent() {
    let mut pair = patient(&[1]);
    // As memory does that the guest has written without having it plugged.
    fill(&pair.from.region, 4 * PAGES + 3..4 * PAGES + 4, 9);
    pair.step(Op::Request { block: 4, plug: true });
    pair.model[4].as_mut().unwrap()[3] = 9;
    pair.switch().unwrap();
}

#[test]
fn what_is_written_after_a_block_came_back_is_sent_though_it_was_reported_before() {
    let mut pair = patient(&[1, 4]);
    // Both are reported, and not cleared before they are read.
    pair.step(Op::Write { block: 1, page: 0, byte: 1 });
    pair.step(Op::Write { block: 4, page: 3, byte: 7 });
    pair.step(Op::Sync);
    pair.step(Op::Request { block: 4, plug: false });
    pair.step(Op::Request { block: 4, plug: true });
    pair.step(Op::Write { block: 4, page: 3, byte: 9 });
    // Reading the first clears what is around it.
    pair.step(Op::Iterate(1));
    pair.switch().unwrap();
}

#[test]
fn a_refusal_of_the_destination_is_one_of_the_request_and_says_why() {
    let mut pair = patient(&[1]);
    *pair.to.device().refuses.lock().unwrap() = Some(4);
    pair.plug(4);
    pair.send_changes();
    pair.deliver().unwrap();
    pair.hear();
    let refused = pair.refused();
    assert!(refused.contains("migration") && refused.contains("no huge page is left"), "{refused}");
    pair.step(Op::Request { block: 5, plug: true });
    assert!(pair.to.device().is_plugged(5));
    pair.switch().unwrap();
}

#[test]
fn what_is_accepted_too_late_is_discarded_again_and_refused_until_then() {
    // A request whose patience is over before the engine looks is not sent, as happens on a busy machine.
    let sent = (0..14).map(|doubled| Duration::from_millis(1 << doubled)).find_map(|patience| {
        let mut pair = Pair::new(&[1], patience);
        pair.plug(4);
        pair.send_changes();
        let late = pair.refused();
        assert!(late.contains(&format!("did not answer within {patience:?}")), "{late}");
        if pair.save.has_unanswered() {
            return Some(pair);
        }
        pair.cancel().unwrap();
        None
    });
    let mut pair = sent.expect("the engine sends a request within its patience");
    pair.deliver().unwrap();
    assert!(pair.to.device().is_plugged(4));
    let again = pair.from.device().plug(4).unwrap_err();
    assert!(again.contains("has not answered what was asked for before"), "{again}");
    pair.hear();
    pair.send_changes();
    pair.deliver().unwrap();
    assert!(!pair.to.device().is_plugged(4));
    pair.switch().unwrap();
}

#[test]
fn a_request_that_waits_when_the_guest_is_to_be_stopped_is_refused_at_once() {
    let mut pair = patient(&[1]);
    pair.plug(4);
    pair.send_changes();
    pair.freeze();
    let refused = pair.refused();
    assert!(refused.contains("about to be stopped"), "{refused}");
    pair.switch().unwrap();
}

#[test]
fn a_request_that_waits_when_the_migration_fails_is_done() {
    let mut pair = patient(&[1]);
    pair.plug(4);
    pair.send_changes();
    pair.save.cleanup();
    pair.answered();
    assert!(pair.model[4].is_some());
    pair.cancel().unwrap();
}

/// A tracker that cannot track what is populated.
struct Fails;

impl DirtyTracker for Fails {
    fn start(&mut self, _populated: &[ByteRange]) -> io::Result<()> {
        Ok(())
    }

    fn sync(&mut self, _dirty: &mut PageBitmap) -> io::Result<()> {
        Ok(())
    }

    fn clear(&mut self, _range: ByteRange) -> io::Result<()> {
        Ok(())
    }

    fn populate(&mut self, _range: ByteRange) -> io::Result<()> {
        Err(io::Error::other("no page tables"))
    }

    fn stop(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn what_cannot_be_tracked_is_refused_and_taken_back() {
    let mut pair = patient(&[1]);
    let progress = Arc::new(Progress::new());
    let tracker = |_: &MigrationBlock| Box::new(Fails) as Box<dyn DirtyTracker>;
    pair.save.cleanup();
    pair.save.thaw();
    pair.save = RamSave::new(&pair.from.blocks, ListOptions::default(), progress, tracker).unwrap();
    pair.save.setup(&mut CountedStream::default()).unwrap();
    pair.save.follow(Duration::from_secs(60)).unwrap();
    pair.plug(4);
    pair.send_changes();
    pair.deliver().unwrap();
    pair.hear();
    let refused = pair.refused();
    assert!(refused.contains("no page tables"), "{refused}");
    pair.switch().unwrap();
}

/// How many bytes were written at once.
#[derive(Default)]
struct AtOnce(Vec<u64>);

impl Sink for AtOnce {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.push(bytes.len() as u64);
        Ok(())
    }

    fn write_gathered(&mut self, gathered: &mut GatherWrite) -> io::Result<()> {
        self.0.push(gathered.len_bytes());
        gathered.clear();
        Ok(())
    }

    fn written(&self) -> u64 {
        self.0.iter().sum()
    }
}

#[test]
fn no_more_is_written_at_once_than_a_plug_may_wait_behind() {
    let plugged: Vec<usize> = (0..BLOCKS).collect();
    let mut pair = patient(&plugged);
    let all = BLOCKS as u64 * PAGES;
    fill(&pair.from.region, 0..all, 7);
    pair.dirty.0.lock().unwrap().extend(0..all);
    pair.save.pending_exact().unwrap();
    let mut out = AtOnce::default();
    pair.save.iterate(&mut out, u64::MAX).unwrap();
    assert!(out.written() > all * PAGE, "all of it was sent");
    let most = out.0.iter().max().unwrap();
    assert!(*most < save::SHORT_PAGES * (PAGE + 64), "{most} bytes");
}

/// A peer that takes nothing until it is told to, once.
struct Stuck {
    inner: KeptStream,
    tell: mpsc::Sender<()>,
    go_on: mpsc::Receiver<()>,
}

impl Sink for Stuck {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.inner.write(bytes)
    }

    fn write_gathered(&mut self, gathered: &mut GatherWrite) -> io::Result<()> {
        if self.tell.send(()).is_ok() {
            self.go_on.recv().unwrap();
        }
        self.inner.write_gathered(gathered)
    }

    fn written(&self) -> u64 {
        self.inner.written()
    }
}

#[test]
fn pages_on_their_way_into_a_channel_that_is_stuck_bring_no_memory_back() {
    let mut pair = patient(&[1, 4]);
    fill(&pair.from.region, 4 * PAGES..5 * PAGES, 7);
    pair.dirty.0.lock().unwrap().extend(4 * PAGES..5 * PAGES);
    pair.save.pending_exact().unwrap();
    let ((tell, told), (go_on, goes_on)) = (mpsc::channel(), mpsc::channel());
    let device = Arc::clone(pair.from.device());
    let region = pair.from.region.try_clone().unwrap();
    let guest = thread::spawn(move || {
        told.recv().unwrap();
        drop(told);
        // Not held up by a channel that does not move.
        device.unplug(4, &region).unwrap();
        let refused = device.plug(4).unwrap_err();
        assert!(refused.contains("are still being read"), "{refused}");
        go_on.send(()).unwrap();
    });
    let mut out = Stuck { inner: KeptStream::new().unwrap(), tell, go_on: goes_on };
    pair.save.iterate(&mut out, u64::MAX).unwrap();
    guest.join().unwrap();
    assert_eq!(pair.from.resident_of(4), 0, "read after it was discarded, and discarded again");
    pair.model[4] = None;
    let mut section = Vec::new();
    put_continued(&mut section, SectionKind::Part, 0);
    section.extend(out.inner.bytes().unwrap());
    put_footer(&mut section, 0);
    pair.stream.push_back(section);
    pair.send_changes();
    pair.step(Op::Request { block: 4, plug: true });
    pair.switch().unwrap();
}

#[test]
fn a_device_that_changes_without_a_word_fails_the_migration() {
    let mut pair = patient(&[1]);
    pair.from.device().set(5, true);
    let lost = pair.save.freeze().unwrap_err();
    assert!(matches!(lost, MigrationError::FreezeLost(_)), "{lost}");
    assert!(pair.save.check_frozen().is_err());
}
