mod follow;
mod follow_source;
mod freezes;
mod lost;

use super::*;
use crate::discard_channel::bitmap::{BitmapWriter, HEADER_WORDS, file_size};
use crate::discard_channel::send_with_fd;
use crate::discard_channel::wire::{Sections, Welcome};
use crate::sys::SharedWords;
use lost::{assert_unavailable, wait_lost};
use ram_discard::MemoryState::{Discarded, Populated};
use ram_discard::test_utils::{Calls, Exact, Recorder};
use ram_discard::{FreezeLost, LocalRamDiscardManager};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;

const BLOCK: u64 = 1 << 21;
const NR: u64 = 200;
const PATIENCE: Duration = Duration::from_secs(10);

fn geometry() -> Geometry {
    Geometry::new(1 << 32, NR * BLOCK, BLOCK, Some(1)).unwrap()
}

fn section(first: u64, end: u64) -> Section {
    Section::from_bounds(first * BLOCK, end * BLOCK).unwrap()
}

/// The server's end, played by the test.
struct Server {
    stream: UnixStream,
    frames: FrameReader,
    bitmap: BitmapWriter,
    event: u64,
}

/// A server that welcomes with `file` as its bitmap.
fn welcome(stream: &UnixStream, file: BorrowedFd<'_>) -> FrameReader {
    welcome_in(VERSION, stream, file)
}

fn welcome_in(version: u16, stream: &UnixStream, file: BorrowedFd<'_>) -> FrameReader {
    let mut frames = FrameReader::default();
    let hello: ClientMessage = frames.next(stream).unwrap();
    assert_eq!(hello, ClientMessage::Hello { min_version: MIN_VERSION, max_version: VERSION });
    let welcome = Welcome {
        version,
        generation: 7,
        geometry: geometry(),
        bitmap_size: file_size(NR as usize),
        event: 0,
        patience_ms: 1000,
    };
    send_with_fd(stream, &ServerMessage::Welcome(welcome), file).unwrap();
    frames
}

fn pair() -> (Server, RemoteRamDiscardManager) {
    pair_with(PATIENCE)
}

fn pair_with(timeout: Duration) -> (Server, RemoteRamDiscardManager) {
    pair_in(VERSION, timeout)
}

fn pair_in(version: u16, timeout: Duration) -> (Server, RemoteRamDiscardManager) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = thread::spawn(move || {
        let bitmap = BitmapWriter::new(&geometry()).unwrap();
        let frames = welcome_in(version, &ours, bitmap.file());
        Server { stream: ours, frames, bitmap, event: 0 }
    });
    let manager = RemoteRamDiscardManager::attach(theirs, timeout).unwrap();
    (server.join().unwrap(), manager)
}

impl Server {
    fn send(&self, message: &ServerMessage) {
        send(&self.stream, message).unwrap();
    }

    fn receive(&mut self) -> ClientMessage {
        self.frames.next(&self.stream).unwrap()
    }

    /// Sends an event and returns the answer.
    fn event(&mut self, section: Section, state: MemoryState) -> ClientMessage {
        self.event_of(&[section], state)
    }

    fn event_of(&mut self, sections: &[Section], state: MemoryState) -> ClientMessage {
        self.event += 1;
        let (event, sections) = (self.event, Sections::from_slice(sections));
        self.send(&match state {
            Populated => ServerMessage::Populate { event, sections },
            Discarded => ServerMessage::Discard { event, sections },
        });
        self.receive()
    }

    fn acked(&mut self, section: Section, state: MemoryState) {
        let answer = self.event(section, state);
        assert_eq!(answer, ClientMessage::Ack { event: self.event });
    }

    /// The answer to a request for a freeze.
    fn frozen(&self, id: u64, expiry_ms: u32) -> ServerMessage {
        ServerMessage::Frozen { id, freeze: 1, event: self.bitmap.event(), expiry_ms }
    }

    /// Has the bitmap show the last event.
    fn settle(&mut self, section: Section, state: MemoryState) {
        let index = |at: u64| usize::try_from(at / BLOCK).unwrap();
        let blocks = index(section.start())..index(section.end());
        self.bitmap.update(self.event, &[(blocks, state.is_populated())]);
    }
}

fn replay(manager: &RemoteRamDiscardManager, section: Section, state: MemoryState) -> Vec<Section> {
    let mut ranges = Vec::new();
    let mut collect = |range| {
        ranges.push(range);
        ControlFlow::Continue(())
    };
    let flow = match state {
        Populated => manager.replay_populated(section, &mut collect),
        Discarded => manager.replay_discarded(section, &mut collect),
    };
    assert!(flow.unwrap().is_continue());
    ranges
}

#[test]
fn a_client_knows_the_geometry_and_what_is_populated() {
    let (mut server, manager) = pair();
    assert_eq!(*manager.geometry(), geometry());
    assert_eq!((manager.region_size(), manager.granularity()), (NR * BLOCK, BLOCK));
    assert_eq!(manager.patience(), Duration::from_secs(1));
    server.bitmap.update(0, &[(3..5, true), (60..130, true)]);
    let all = section(0, NR);
    assert_eq!(replay(&manager, all, Populated), [section(3, 5), section(60, 130)]);
    let discarded = [section(0, 3), section(5, 60), section(130, NR)];
    assert_eq!(replay(&manager, all, Discarded), discarded);
    let window = Section::new(100 * BLOCK + 1, 3 * BLOCK).unwrap();
    assert_eq!(replay(&manager, window, Populated), [window]);
    assert_eq!(replay(&manager, section(140, 150), Populated), []);
    assert!(manager.is_populated(window).unwrap());
    assert!(!manager.is_populated(section(129, 131)).unwrap());
    let words = manager.words().unwrap();
    assert_eq!(words, [3 << 3 | 0xf << 60, u64::MAX, 3, 0]);
    let beyond = Section::new(NR * BLOCK, BLOCK).unwrap();
    assert!(!manager.is_populated(beyond).unwrap());
    assert_eq!(replay(&manager, beyond, Discarded), []);
}

#[test]
fn what_was_acknowledged_counts_before_the_bitmap_shows_it() {
    let (mut server, manager) = pair();
    let calls = Calls::default();
    server.acked(section(0, 4), Populated);
    manager.register(section(1, NR), Recorder::boxed("late", &calls)).unwrap();
    assert_eq!(*calls.lock(), [("late", true, section(1, 4))], "told though not in the bitmap");
    server.settle(section(0, 4), Populated);
    assert_eq!(replay(&manager, section(0, NR), Populated), [section(0, 4)]);
    server.acked(section(2, 3), Discarded);
    assert_eq!(replay(&manager, section(0, NR), Populated), [section(0, 2), section(3, 4)]);
    server.settle(section(2, 3), Discarded);
    assert_eq!(replay(&manager, section(0, NR), Populated), [section(0, 2), section(3, 4)]);
    assert_eq!(calls.lock()[1..], [("late", false, section(2, 3))]);
}

#[test]
fn a_populate_that_is_rolled_back_never_shows_again() {
    let (mut server, manager) = pair();
    server.acked(section(0, 4), Populated);
    server.acked(section(0, 4), Discarded);
    assert_eq!(replay(&manager, section(0, NR), Populated), []);
    server.settle(section(0, 4), Discarded);
    assert_eq!(replay(&manager, section(0, NR), Populated), []);
}

#[test]
fn a_listener_that_refuses_has_the_others_rolled_back_in_reverse() {
    let (mut server, manager) = pair();
    let calls = Calls::default();
    for name in ["first", "second"] {
        manager.register(section(0, NR), Recorder::boxed(name, &calls)).unwrap();
    }
    let refuser = Recorder::refusing("third", &calls, section(0, NR), "no room");
    manager.register(section(0, 10), refuser).unwrap();
    let range = section(9, 11);
    let answer = server.event(range, Populated);
    let ClientMessage::Refuse { event: 1, reason } = answer else { panic!("{answer:?}") };
    assert!(reason.contains("third") && reason.contains("no room"), "{reason}");
    let rolled_back = [
        ("first", true, range),
        ("second", true, range),
        ("second", false, range),
        ("first", false, range),
    ];
    assert_eq!(*calls.lock(), rolled_back);
    assert_eq!(replay(&manager, section(0, NR), Populated), []);
    calls.lock().clear();
    server.acked(section(20, 21), Populated);
    server.acked(section(20, 21), Discarded);
    let names: Vec<_> = calls.lock().iter().map(|call| (call.0, call.1)).collect();
    let order = [("first", true), ("second", true), ("second", false), ("first", false)];
    assert_eq!(names, order, "discard goes in reverse");
}

/// A listener that refuses the second of three sections is told to discard the first one again.
#[test]
fn an_event_of_several_sections_is_accepted_or_refused_as_a_whole() {
    let (mut server, manager) = pair();
    let calls = Calls::default();
    manager.register(section(0, NR), Recorder::boxed("dma", &calls)).unwrap();
    let refuser = Recorder::refusing("no", &calls, section(0, NR), "no room");
    let id = manager.register(section(10, 20), refuser).unwrap();
    let sections = [section(0, 2), section(12, 13), section(30, 31)];
    let answer = server.event_of(&sections, Populated);
    assert!(matches!(answer, ClientMessage::Refuse { event: 1, .. }), "{answer:?}");
    let told = [(true, 0), (true, 1), (true, 2), (false, 2), (false, 1), (false, 0)];
    let told: Vec<_> = told.iter().map(|&(told, at)| ("dma", told, sections[at])).collect();
    assert_eq!(*calls.lock(), told);
    assert_eq!(replay(&manager, section(0, NR), Populated), []);
    manager.unregister(id).unwrap();
    assert_eq!(server.event_of(&sections, Populated), ClientMessage::Ack { event: 2 });
    assert_eq!(replay(&manager, section(0, NR), Populated), sections);
    server.bitmap.update(2, &[(0..2, true), (12..13, true), (30..31, true)]);
    assert_eq!(replay(&manager, section(0, NR), Populated), sections);
    let reversed = [sections[2], sections[1]];
    assert_eq!(server.event_of(&reversed, Discarded), ClientMessage::Ack { event: 3 });
    assert_eq!(replay(&manager, section(0, NR), Populated), [sections[0]]);
}

#[test]
fn a_listener_that_is_removed_is_told_each_populated_run_once() {
    let (mut server, manager) = pair();
    let calls = Calls::default();
    server.bitmap.update(0, &[(1..3, true), (100..101, true)]);
    let id = manager.register(section(0, 100), Recorder::boxed("dma", &calls)).unwrap();
    calls.lock().clear();
    manager.unregister(id).unwrap();
    assert_eq!(*calls.lock(), [("dma", false, section(1, 3))]);
    assert!(matches!(manager.unregister(id), Err(RegisterError::NotRegistered)));
    let refuser = Recorder::refusing("no", &calls, section(0, NR), "no room");
    let refused = manager.register(section(0, NR), refuser);
    assert!(matches!(refused, Err(RegisterError::Refused(_))));
    let outside = Section::new(0, NR * BLOCK + 1).unwrap();
    let refused = manager.register(outside, Recorder::boxed("far", &calls));
    assert!(matches!(refused, Err(RegisterError::OutsideRegion { .. })));
}

/// The bitmap's event number goes on without its bits: by the bitmap nothing is populated.
#[test]
fn a_listener_that_is_removed_discards_what_it_was_told_whatever_the_bitmap_shows() {
    let (mut server, manager) = pair();
    let calls = Calls::default();
    server.bitmap.update(0, &[(40..42, true)]);
    let id = manager.register(section(1, 100), Recorder::boxed("dma", &calls)).unwrap();
    server.acked(section(0, 4), Populated);
    server.acked(section(120, 121), Populated);
    server.acked(section(2, 3), Discarded);
    server.bitmap.update(3, &[(0..NR as usize, false)]);
    assert_eq!(replay(&manager, section(0, NR), Populated), [], "the bitmap lies");
    calls.lock().clear();
    manager.unregister(id).unwrap();
    let told = [section(1, 2), section(3, 4), section(40, 42)];
    assert_eq!(*calls.lock(), told.map(|section| ("dma", false, section)));
    assert_eq!(manager.lost(), None);
}

#[test]
fn an_event_that_contradicts_what_was_told_or_the_bitmap_ends_the_connection() {
    let wrong: [(&[Section], bool, &str); 5] = [
        (&[section(20, 24), section(3, 4)], true, "a listener has populated something"),
        (&[section(0, 1), section(2, 6)], false, "a listener has not populated everything"),
        (&[section(20, 22), section(30, 31), section(21, 23)], true, "twice"),
        (&[section(2, 3), section(0, 4)], false, "twice"),
        (&[section(150, 151), section(165, 175)], true, "the bitmap shows something populated"),
    ];
    for (sections, populated, expected) in wrong {
        let (mut server, manager) = pair();
        let calls = Calls::default();
        manager.register(section(0, 100), Recorder::boxed("dma", &calls)).unwrap();
        server.acked(section(0, 4), Populated);
        server.bitmap.update(1, &[(0..4, true), (170..171, true)]);
        let (event, sections) = (2, Sections::from_slice(sections));
        server.send(&if populated {
            ServerMessage::Populate { event, sections }
        } else {
            ServerMessage::Discard { event, sections }
        });
        let reason = wait_lost(&manager);
        assert!(reason.starts_with("event 2") && reason.contains(expected), "{reason}");
        assert_eq!(*calls.lock(), [("dma", true, section(0, 4))], "{reason}");
        assert_unavailable(&manager);
    }
}

#[test]
fn a_listener_that_registers_against_events_sees_each_block_once() {
    let (mut server, manager) = pair();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            // Each block in turn, from both ends, sometimes rolled back.
            for round in 0..600u64 {
                let first = round * 7 % (NR - 8);
                let range = section(first, first + 1 + round % 8);
                server.acked(range, Populated);
                if round % 5 != 0 {
                    server.settle(range, Populated);
                }
                server.acked(range, Discarded);
                server.settle(range, Discarded);
            }
            done.store(true, Ordering::Release);
        });
        while !done.load(Ordering::Acquire) {
            let exact = Exact::new(NR as usize, BLOCK);
            let id = manager.register(section(0, NR), Box::new(exact.clone())).unwrap();
            manager.unregister(id).unwrap();
            assert_eq!(exact.told_twice(), 0);
            assert_eq!(exact.populated(), [], "all was discarded");
        }
    });
    assert_eq!(manager.lost(), None);
}

#[test]
fn requests_are_answered_out_of_order_and_may_fail() {
    let (mut server, manager) = pair();
    thread::scope(|scope| {
        let freeze = scope.spawn(|| manager.freeze(FreezeFor::Source));
        let ClientMessage::Freeze { id: freeze_id } = server.receive() else { panic!() };
        let sizes = scope.spawn(|| manager.sizes());
        let ClientMessage::GetSizes { id: sizes_id } = server.receive() else { panic!() };
        server.send(&ServerMessage::Sizes {
            id: sizes_id,
            usable_region_size: 3,
            plugged_size: 1,
            requested_size: 2,
        });
        let expected = DeviceSizes { usable_region_size: 3, plugged_size: 1, requested_size: 2 };
        assert_eq!(sizes.join().unwrap().unwrap(), expected);
        server.send(&server.frozen(freeze_id, 60_000));
        let frozen = freeze.join().unwrap().unwrap();
        let thaw = scope.spawn(|| frozen.thaw());
        let ClientMessage::Thaw { id, freeze: 1 } = server.receive() else { panic!() };
        server.send(&ServerMessage::Failed { id, reason: "disk full".to_owned() });
        assert_eq!(thaw.join().unwrap(), Err(FreezeLost("disk full".to_owned())));
    });
    assert_eq!(manager.lost(), None);
}

/// Asks for a freeze from within a call.
struct CallsBack(std::sync::Weak<RemoteRamDiscardManager>, Arc<Mutex<Option<FreezeError>>>);

impl RamDiscardListener for CallsBack {
    fn name(&self) -> &str {
        "calls back"
    }

    fn notify_populate(&mut self, _section: Section) -> Result<(), String> {
        let manager = self.0.upgrade();
        *self.1.lock() = manager.and_then(|manager| manager.freeze(FreezeFor::Source).err());
        Ok(())
    }

    fn notify_discard(&mut self, _section: Section) {}
}

#[test]
fn a_freeze_from_within_a_listener_fails_instead_of_waiting_for_itself() {
    let (mut server, manager) = pair();
    let manager = Arc::new(manager);
    let error = Arc::new(Mutex::new(None));
    let listener = CallsBack(Arc::downgrade(&manager), Arc::clone(&error));
    manager.register(section(0, NR), Box::new(listener)).unwrap();
    server.acked(section(0, 1), Populated);
    assert!(error.lock().is_some());
}

#[test]
fn a_server_that_refuses_says_why() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let goodbye = ServerMessage::Goodbye {
        cause: Farewell::Version,
        min_version: 2,
        max_version: 3,
        reason: "too old".to_owned(),
    };
    send(&ours, &goodbye).unwrap();
    let error = RemoteRamDiscardManager::attach(theirs, PATIENCE).err().unwrap();
    let AttachError::Refused { cause: Farewell::Version, min_version: 2, .. } = error else {
        panic!("{error}")
    };
}

#[test]
fn text_of_the_server_is_made_printable() {
    let (server, manager) = pair();
    server.send(&ServerMessage::Goodbye {
        cause: Farewell::Ending,
        min_version: 2,
        max_version: 2,
        reason: "over\n\u{1b}[31m".to_owned(),
    });
    assert_eq!(wait_lost(&manager), r"the server said: over\n\u{1b}[31m");
}
