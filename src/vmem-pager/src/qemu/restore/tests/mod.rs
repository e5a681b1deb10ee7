mod destination;
mod fake;
mod recovery;
mod second_connection;
mod traps;

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use migration::stream::{ReturnMessage, TARGET_PAGE_SIZE, put_eof};
use tempfile::TempDir;
use vmstate::wire::WireRead;

use super::*;
use crate::image::reader::sample::{Record, Sample, SampleBlock};
use fake::Fake;

const PAGE: usize = TARGET_PAGE_SIZE as usize;
/// Nothing is silent for longer than this; some tests wait for it to be over.
const SILENCE: Duration = Duration::from_secs(20);
const SHORT_SILENCE: Duration = Duration::from_millis(300);

type Restored = JoinHandle<(Result<(), PagerError>, WorkingSet, serde_json::Value)>;

/// How an image is restored.
#[derive(Clone, Default)]
struct How {
    eager: bool,
    recover: bool,
    silence: Option<Duration>,
    bandwidth: Option<u64>,
    replay: Option<WorkingSet>,
    guest: Option<Arc<MockGuest>>,
    preempt: Option<bool>,
    /// Where it connects instead.
    tcp: Option<String>,
}

/// Counts what is asked of it.
#[derive(Default)]
struct MockGuest {
    stops: AtomicUsize,
    conts: AtomicUsize,
    was_paused: bool,
}

impl Guest for MockGuest {
    fn stop(&self) -> Result<bool, PagerError> {
        self.stops.fetch_add(1, Ordering::SeqCst);
        Ok(!self.was_paused)
    }

    fn cont(&self, _is_complete: bool) -> Result<(), PagerError> {
        self.conts.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

/// Restores a sample to where a fake listens.
fn restore(sample: &Sample, dir: &TempDir, how: How) -> Restored {
    let path = dir.path().join("guest.img");
    sample.write(&path);
    let socket = dir.path().join("vm.sock");
    thread::spawn(move || restore_file(&path, &socket, &how))
}

fn restore_file(
    path: &Path,
    socket: &Path,
    how: &How,
) -> (Result<(), PagerError>, WorkingSet, serde_json::Value) {
    let image = GuestImage::open(path).unwrap();
    let supply = Supply::new(&image);
    if let Some(set) = &how.replay {
        supply.replay(set);
    }
    let run = Run::with_silence(None, how.silence.unwrap_or(SILENCE));
    let (report, metrics) = (&Report::silent(), RestoreMetrics::new());
    let unix = || Address::Unix(socket.to_owned());
    let (run, address) = (&run, &how.tcp.clone().map_or_else(unix, Address::Tcp));
    let (figures, bandwidth) = (metrics.figures(), how.bandwidth);
    let guest = how.guest.as_deref().map(|guest| guest as &dyn Guest);
    let transfer = Transfer { run, report, address, supply: &supply, figures, bandwidth };
    let lazy = Lazy { transfer, guest, preempt: how.preempt };
    let done = match (how.eager, how.recover) {
        (true, _) => Eager(transfer).start(),
        (_, true) => lazy.recover(),
        (_, false) => lazy.start(),
    };
    (done, supply.touched(), figures.summary())
}

/// What has to be at the destination.
fn expected(sample: &Sample) -> HashMap<(String, u64), Vec<u8>> {
    let contents = sample.contents().into_iter();
    contents
        .map(|((block, page), bytes)| ((sample.blocks[block].id.clone(), page), bytes))
        .collect()
}

/// With a block of which much is left when something happens.
fn large() -> Sample {
    let mut sample = Sample::new(true);
    sample.blocks.push(SampleBlock { id: "big".to_owned(), pages: 600 });
    sample.records.extend((0..600).map(|page| Record { block: 2, page, seed: Some(page + 1) }));
    sample
}

#[test]
fn all_of_an_image_arrives_once_and_nothing_else() {
    for mapped in [false, true] {
        let (sample, dir) = (Sample::new(mapped), tempfile::tempdir().unwrap());
        let fake = Fake::listen(dir.path());
        let restored = restore(&sample, &dir, How::default());
        let (mut main, urgent) = fake.load(&sample);
        let placing = main.place();
        main.say(&ReturnMessage::Pong(0x42));
        fake.wait_ended();
        main.say(&ReturnMessage::Shut(0));
        restored.join().unwrap().0.unwrap();
        placing.join().unwrap();
        urgent.join().unwrap();
        assert_eq!(fake.pages_without_probe(&expected(&sample)), expected(&sample));
        assert_eq!(fake.placed.lock().twice, []);
    }
}

#[test]
fn pages_that_turn_out_to_be_zeros_are_sent_as_such_or_not_at_all() {
    use std::os::unix::fs::FileExt;
    for eager in [false, true] {
        let (sample, dir) = (large(), tempfile::tempdir().unwrap());
        let path = dir.path().join("guest.img");
        sample.write(&path);
        let bytes = sample.bytes();
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        let mut expected = expected(&sample);
        // The first of their block, some among others, and the last.
        for page in [0, 1, 70, 72, 73, 599] {
            let content = expected.remove(&("big".to_owned(), page)).unwrap();
            // The last block's: others have the like.
            let at = bytes.chunks_exact(PAGE).rposition(|bytes| *bytes == content).unwrap();
            file.write_all_at(&[0; PAGE], (at * PAGE) as u64).unwrap();
            if !eager {
                expected.insert(("big".to_owned(), page), vec![0; PAGE]);
            }
        }
        let fake = Fake::listen(dir.path());
        let socket = dir.path().join("vm.sock");
        let how = How { eager, preempt: Some(true), ..How::default() };
        let restored = thread::spawn(move || restore_file(&path, &socket, &how));
        if eager {
            let mut main = fake.accept_main();
            main.greet();
            main.blocks(&sample);
            let _rest = main.place_eager();
            main.say(&ReturnMessage::Shut(0));
            restored.join().unwrap().0.unwrap();
        } else {
            let (mut main, urgent) = fake.load_known(&sample);
            let placing = main.place();
            fake.wait_ended();
            main.say(&ReturnMessage::Shut(0));
            restored.join().unwrap().0.unwrap();
            placing.join().unwrap();
            urgent.join().unwrap();
        }
        assert!(fake.placed.lock().pages == expected, "eager: {eager}");
    }
}

#[test]
fn requests_are_answered_before_the_guest_runs_and_after_the_stream_has_ended() {
    let (sample, dir) = (large(), tempfile::tempdir().unwrap());
    let fake = Fake::listen(dir.path());
    let restored = restore(&sample, &dir, How { preempt: Some(true), ..How::default() });
    let (mut main, _urgent) = fake.load_known(&sample);
    // Nothing is read of the main channel yet, which holds less than up to there: loading its devices
    // needs these.
    main.ask(Some("ram"), 30);
    main.ask(Some("big"), 500);
    main.ask(None, 500);
    fake.wait_for("big", 500);
    fake.wait_for("ram", 30);
    let placing = main.place();
    main.say(&ReturnMessage::Pong(0x42));
    fake.wait_ended();
    main.ask(Some("vm0/vmem"), 9);
    fake.wait_for("vm0/vmem", 9);
    main.say(&ReturnMessage::Shut(0));
    restored.join().unwrap().0.unwrap();
    placing.join().unwrap();
    let placed = fake.placed.lock();
    let mut expected = expected(&sample);
    for hole in [("ram", 30), ("vm0/vmem", 9)] {
        assert!(!placed.order.contains(&(hole.0.to_owned(), hole.1)));
        expected.insert((hole.0.to_owned(), hole.1), vec![0; PAGE]);
    }
    assert_eq!(placed.pages, expected);
    assert_eq!(placed.twice, []);
}

#[test]
fn without_a_second_channel_holes_of_populated_memory_are_sent_so_that_no_fault_is_left() {
    let (sample, dir) = (Sample::new(false), tempfile::tempdir().unwrap());
    let fake = Fake::listen(dir.path());
    let restored = restore(&sample, &dir, How::default());
    let mut main = fake.accept_main();
    main.greet();
    main.setup(&sample);
    main.say(&ReturnMessage::Pong(4));
    let placing = main.place();
    fake.wait_ended();
    main.say(&ReturnMessage::Shut(0));
    restored.join().unwrap().0.unwrap();
    placing.join().unwrap();
    let placed = fake.placed.lock();
    let mut expected = expected(&sample);
    // Blocks 0, 1, 2 and 8 of the device are plugged; the others are never sent.
    let populated = (0..48).chain(128..144).map(|page| ("vm0/vmem".to_owned(), page));
    for page in populated.chain((0..64).map(|page| ("ram".to_owned(), page))) {
        expected.entry(page).or_insert_with(|| vec![0; PAGE]);
    }
    assert_eq!(placed.pages, expected);
    assert_eq!(placed.twice, []);
}

#[test]
fn without_a_second_channel_a_guest_that_can_be_stopped_is_stopped_for_the_end() {
    for was_paused in [false, true] {
        let (sample, dir) = (Sample::new(true), tempfile::tempdir().unwrap());
        let fake = Fake::listen(dir.path());
        let guest = Arc::new(MockGuest { was_paused, ..MockGuest::default() });
        let how = How { guest: Some(Arc::clone(&guest)), ..How::default() };
        let restored = restore(&sample, &dir, how);
        let mut main = fake.accept_main();
        main.greet();
        main.setup(&sample);
        main.say(&ReturnMessage::Pong(4));
        let placing = main.place();
        main.ask(Some("ram"), 20);
        fake.wait_ended();
        let counts = || (guest.stops.load(Ordering::SeqCst), guest.conts.load(Ordering::SeqCst));
        assert_eq!(counts(), (1, 0));
        main.say(&ReturnMessage::Shut(0));
        restored.join().unwrap().0.unwrap();
        placing.join().unwrap();
        assert_eq!(counts(), (1, usize::from(!was_paused)));
        let mut placed = fake.placed.lock();
        // The hole was asked for before the guest stopped, or the stream had ended by then.
        let hole = placed.pages.remove(&("ram".to_owned(), 20));
        assert!(hole.is_none_or(|bytes| bytes == vec![0; PAGE]));
        assert_eq!(placed.pages, expected(&sample));
    }
}

#[test]
fn what_is_known_of_the_channels_is_not_waited_for() {
    for preempt in [true, false] {
        let (sample, dir) = (Sample::new(true), tempfile::tempdir().unwrap());
        let fake = Fake::listen(dir.path());
        let restored = restore(&sample, &dir, How { preempt: Some(preempt), ..How::default() });
        let mut main = fake.accept_main();
        main.greet();
        // It connects before it sends anything that would have to be answered.
        let urgent = preempt.then(|| fake.accept_urgent());
        main.setup(&sample);
        let placing = main.place();
        fake.wait_ended();
        main.say(&ReturnMessage::Shut(0));
        restored.join().unwrap().0.unwrap();
        placing.join().unwrap();
        urgent.map(JoinHandle::join).transpose().unwrap();
        assert_eq!(fake.placed.lock().twice, []);
    }
}

#[test]
fn a_guest_that_was_stopped_for_an_end_that_failed_continues() {
    let (sample, dir) = (Sample::new(true), tempfile::tempdir().unwrap());
    let fake = Fake::listen(dir.path());
    let guest = Arc::new(MockGuest::default());
    let how = How { guest: Some(Arc::clone(&guest)), ..How::default() };
    let restored = restore(&sample, &dir, how);
    let mut main = fake.accept_main();
    main.greet();
    main.setup(&sample);
    main.say(&ReturnMessage::Pong(4));
    let placing = main.place();
    fake.wait_ended();
    main.say(&ReturnMessage::Shut(5));
    assert!(restored.join().unwrap().0.is_err());
    placing.join().unwrap();
    assert_eq!(guest.conts.load(Ordering::SeqCst), 1);
}

#[test]
fn an_eager_restore_is_a_plain_migration_without_holes() {
    for code in [0, 1] {
        let (sample, dir) = (Sample::new(true), tempfile::tempdir().unwrap());
        let fake = Fake::listen(dir.path());
        let restored = restore(&sample, &dir, How { eager: true, ..How::default() });
        let mut main = fake.accept_main();
        main.greet();
        main.blocks(&sample);
        let mut rest = main.place_eager();
        let mut expected_rest = sample.device_state();
        put_eof(&mut expected_rest);
        expected_rest.extend(b"\x06\0\0\0\x02{}");
        let mut found = vec![0; expected_rest.len()];
        rest.read_exact(&mut found, "the rest").unwrap();
        assert_eq!(found, expected_rest);
        main.say(&ReturnMessage::Shut(code));
        let done = restored.join().unwrap().0;
        assert_eq!(fake.placed.lock().pages, expected(&sample));
        match code {
            0 => done.unwrap(),
            _ => assert!(done.unwrap_err().to_string().contains("could not load the guest")),
        }
    }
}

#[test]
fn what_is_touched_is_recorded_and_comes_first_the_next_time() {
    let mut sample = Sample::new(true);
    sample.blocks.push(SampleBlock { id: "big".to_owned(), pages: 1000 });
    sample.records.extend((0..1000).map(|page| Record { block: 2, page, seed: Some(page + 1) }));
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::listen(dir.path());
    // So slow that all that is touched is asked for, and seen.
    let how = How { bandwidth: Some(1), preempt: Some(true), ..How::default() };
    let restored = restore(&sample, &dir, how);
    let (mut main, _urgent) = fake.load_known(&sample);
    for page in [700, 30, 500, 30] {
        main.ask(Some("big"), page);
        fake.wait_for("big", page);
    }
    main.ask(Some("ram"), 63);
    fake.wait_for("ram", 63);
    drop(main);
    let (done, touched, _) = restored.join().unwrap();
    assert!(done.is_err());
    let mut asked = touched.runs().filter(|(block, _)| *block == 2).map(|(_, run)| run.start);
    assert_eq!([asked.next(), asked.next(), asked.next()], [Some(700), Some(30), Some(500)]);
    assert!(touched.runs().all(|(block, run)| block == 2 || run != (63..64)), "a hole is recorded");

    let mut replay = WorkingSet::default();
    [700, 30, 500].iter().for_each(|page| replay.push(2, *page..page + 2));
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::listen(dir.path());
    let how = How { replay: Some(replay), preempt: Some(true), ..How::default() };
    let restored = restore(&sample, &dir, how);
    let (mut main, _urgent) = fake.load_known(&sample);
    let placing = main.place();
    fake.wait_ended();
    main.say(&ReturnMessage::Shut(0));
    let (done, touched, figures) = restored.join().unwrap();
    done.unwrap();
    assert_eq!(figures["pages"]["replay"], 6);
    placing.join().unwrap();
    let placed = fake.placed.lock();
    let first: Vec<u64> = placed.order[..7].iter().map(|(_, page)| *page).collect();
    assert_eq!(first, [700, 701, 30, 31, 500, 501, 0]);
    assert_eq!(placed.order[6].0, "ram", "then ascending, memory that can be discarded last");
    assert_eq!((placed.pages.len(), placed.twice.len()), (expected(&sample).len(), 0));
    // What was replayed stays recorded.
    assert_eq!(touched.runs().next(), Some((2, 700..702)));
}

#[test]
fn a_working_set_of_pages_that_do_not_exist_costs_nothing() {
    let (sample, dir) = (Sample::new(true), tempfile::tempdir().unwrap());
    let path = dir.path().join("guest.img");
    sample.write(&path);
    let image = GuestImage::open(&path).unwrap();
    let supply = Supply::new(&image);
    let mut set = WorkingSet::default();
    // Of RAM's pages 0 to 2 the last is zeros; 50 is discarded; the block 9 does not exist.
    set.push(1, 0..5);
    set.push(0, 47..60);
    set.push(1, 60..1000);
    set.push(9, 0..7);
    assert_eq!(supply.replay(&set), 3 + 12 + 940 + 7);
    assert_eq!(supply.left(), 7);
}

#[test]
fn the_figures_are_those_of_what_was_sent() {
    let (sample, dir) = (large(), tempfile::tempdir().unwrap());
    let fake = Fake::listen(dir.path());
    let restored = restore(&sample, &dir, How { preempt: Some(true), ..How::default() });
    let (mut main, urgent) = fake.load_known(&sample);
    // Nothing is read of the main channel: what is asked for has not been sent yet.
    for (block, page) in [("ram", 30), ("big", 500), ("big", 500), ("ram", 30)] {
        main.ask(Some(block), page);
        fake.wait_for(block, page);
    }
    let placing = main.place();
    main.say(&ReturnMessage::Pong(0x42));
    fake.wait_ended();
    main.say(&ReturnMessage::Shut(0));
    let (done, _, figures) = restored.join().unwrap();
    done.unwrap();
    placing.join().unwrap();
    urgent.join().unwrap();
    // 600 pages of one block, and what there is of the others.
    let present = expected(&sample).len() as u64;
    assert_eq!(figures["present_bytes"], present * TARGET_PAGE_SIZE);
    assert_eq!((&figures["requests"], &figures["requests_crossed"]), (&4.into(), &2.into()));
    let pages = |source: &str| figures["pages"][source].as_u64().unwrap();
    assert_eq!((pages("request"), pages("replay"), pages("hole")), (2, 0, 0));
    assert_eq!(pages("request") + pages("read-ahead") + pages("background"), present + 1);
    // The first record of each block has its name: a page of zeros, and one with content.
    let request = (8 + 4 + 1) + (8 + 4 + TARGET_PAGE_SIZE);
    assert_eq!(figures["sent_bytes"]["request"], request);
    for time in ["running_seconds", "complete_seconds"] {
        assert!(figures[time].as_f64().unwrap() > 0.0, "{time}");
    }
}
