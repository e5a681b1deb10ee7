//! How often memory is looked at again, and when the guest is stopped.

use super::*;

#[test]
fn an_idle_guest_is_stopped_when_everything_is_sent() {
    // More than is sent before it is asked whether the rest fits the downtime.
    let (pages, size) = ((80 << 20) / PAGE, 128 << 20);
    let (from, to) = (Side::of_region(size), Side::of_region(size));
    fill(&from.region, 0..pages, 7);
    let progress = Arc::new(Progress::new());
    let (left, seen) = (Arc::new(Mutex::new(None)), Arc::clone(&progress));
    let note = Arc::clone(&left);
    let last_words: Box<dyn FnOnce() + Send> =
        Box::new(move || *note.lock().unwrap() = Some(seen.snapshot().remaining));
    let source = Witness { last_words: Mutex::new(Some(last_words)), ..Witness::default() };
    let channels = UnixStream::pair().unwrap();
    let run = migrate_over(&from, &to, &Script::default(), source, progress, channels);
    run.outgoing.unwrap();
    assert_eq!(*left.lock().unwrap(), Some(0));
    assert_eq!(run.sent.normal, pages);
}

#[test]
fn the_tracker_is_started_synced_and_then_cleared_of_discarded_ranges() {
    let (from, to) = (Side::new(&[0]), Side::new(&[0]));
    fill(&from.region, 0..1, 1);
    let script = Script::default();
    migrate(&from, &to, &script, Witness::default()).outgoing.unwrap();
    let calls = script.calls.lock().unwrap().clone();
    let whole = "clear [0x0, 0x400000)";
    let golden = ["start [[0x0, 0x40000)]", "sync", whole, whole, "sync", "sync", "stop"];
    // The second clear is that of the chunk with page 0, before it is read.
    assert_eq!(calls, golden);
}

#[test]
fn a_slow_look_at_dirty_pages_makes_the_channel_no_slower() {
    let (from, to) = (Side::new(&[0]), Side::new(&[0]));
    let (near, far) = UnixStream::pair().unwrap();
    let there = receive(&to, &Arc::default(), far);
    let progress = Arc::new(Progress::new());
    // Too long to be stopped for; what is dirty is sent in a moment, and later looks take none.
    let slow = Duration::from_millis(600);
    let tracker = |_: &MigrationBlock| -> Box<dyn DirtyTracker> {
        // The second is the first while memory is sent.
        Box::new(Restless::new(&from, move |sync| {
            if sync == 2 {
                thread::sleep(slow);
            }
        }))
    };
    let ram = RamSave::new(&from.blocks, ListOptions::default(), Arc::clone(&progress), tracker);
    let source = Witness::default();
    let outgoing = Outgoing {
        parameters: Parameters {
            downtime_limit: Duration::from_millis(300),
            max_rounds: 7,
            ..parameters()
        },
        guest: &source,
        handlers: vec![Box::new(ram.unwrap())],
        devices: &mut NoDevices,
        postcopy: None,
        progress: Arc::clone(&progress),
    };
    outgoing.run(Channel::new(near, progress).unwrap()).unwrap();
    there.join().unwrap().unwrap();
    assert_eq!(source.log(), ["stop"]);
}

#[test]
fn rounds_are_bounded_and_what_follows_is_as_asked_for() {
    for at_max_rounds in [AtMaxRounds::Fail, AtMaxRounds::StopAndCopy] {
        let (from, to) = (Side::new(&[0]), Side::new(&[0]));
        let (near, far) = UnixStream::pair().unwrap();
        let there = receive(&to, &Arc::default(), far);
        let progress = Arc::new(Progress::new());
        let tracker = |_: &MigrationBlock| -> Box<dyn DirtyTracker> {
            Box::new(Restless::new(&from, |_| ()))
        };
        let ram =
            RamSave::new(&from.blocks, ListOptions::default(), Arc::clone(&progress), tracker)
                .unwrap();
        let source = Witness::default();
        let outgoing = Outgoing {
            parameters: Parameters {
                downtime_limit: Duration::ZERO,
                max_rounds: 7,
                at_max_rounds,
                ..parameters()
            },
            guest: &source,
            handlers: vec![Box::new(ram)],
            devices: &mut NoDevices,
            postcopy: None,
            progress: Arc::clone(&progress),
        };
        let result = outgoing.run(Channel::new(near, Arc::clone(&progress)).unwrap());
        let received = there.join().unwrap();
        match at_max_rounds {
            AtMaxRounds::Fail => {
                let failed = result.unwrap_err();
                assert!(matches!(failed.error, MigrationError::NotConverging { rounds: 7, .. }));
                assert!(failed.to_string().contains("after 7 rounds"), "{failed}");
                assert_eq!(failed.guest, GuestAfter::RunsHere);
                assert!(source.log().is_empty());
            }
            AtMaxRounds::StopAndCopy => {
                result.unwrap();
                received.unwrap();
                assert_eq!(source.log(), ["stop"]);
                assert_eq!(to.page(63), [3; 4096]);
            }
        }
    }
}
