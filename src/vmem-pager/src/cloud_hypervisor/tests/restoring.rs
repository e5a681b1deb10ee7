use std::fs::File;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use small_vmm::cloud_hypervisor::guest::{MIB, PAGE};
use small_vmm::cloud_hypervisor::receiver::{Fault, Outcome, Receive, Trap};
use small_vmm::cloud_hypervisor::{Command, Guest};

use super::ways::{COMMANDS, Options, Saved, quick, restored};
use crate::cli::report::Report;
use crate::cloud_hypervisor::channel::Peer;
use crate::cloud_hypervisor::edit;
use crate::cloud_hypervisor::giving::Giving;
use crate::error::PagerError;
use crate::run::Run;

#[test]
fn an_eager_restore_gives_all_memory_and_keeps_holes() {
    for (paused, bandwidth) in [(false, None), (true, None), (false, Some(MIB))] {
        let mut guest = Guest::new();
        guest.paused = paused;
        let options = Options { bandwidth, ..Options::new(true) };
        let restored = Saved::of(&guest).restored(&options, &Receive::new(false), &Run::new(None));
        let found = restored.taken();
        assert_eq!(found.paused, paused);
        assert!(found.memory == guest.memory());
        assert_eq!(found.config, guest.config().to_string().as_bytes());
        assert_eq!(found.state, guest.state().to_string().as_bytes());
        assert_eq!(found.resident, 9 * PAGE);
    }
}

/// What Cloud Hypervisor takes, it can be had of again, with other numbers.
#[test]
fn slots_are_of_one_process_only() {
    let guest = Guest::new();
    let first = Saved::of(&guest);
    let mut again = Guest::new();
    for (slot, mapping) in again.mappings.iter_mut().enumerate() {
        mapping.slot = slot as u32 + 20;
    }
    again.mappings.rotate_left(1);
    again.writes.clear();
    let second = Saved::of(&again);
    let ids = |saved: &Saved| {
        let blocks = saved.image.image().blocks().iter();
        blocks.map(|block| block.id().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(ids(&first), ids(&second));
    let restored =
        second.restored(&Options::new(true), &Receive::new(false), &Run::new(None)).taken();
    assert!(restored.memory == again.memory());
}

#[test]
fn a_receiver_that_fails_anywhere_has_no_second_copy() {
    let guest = Saved::of(&Guest::new());
    for eager in [true, false] {
        let options = Options::new(eager);
        for command in COMMANDS {
            let how = |fault| Receive::new(!eager).with(Trap::At(command, fault));
            let restored = guest.restored(&options, &how(Fault::Error), &quick());
            assert!(restored.error().contains("with Error"), "{command:?}");
            assert_eq!(restored.outcome, Outcome::Dropped, "{command:?}");
            let restored = guest.restored(&options, &how(Fault::Close), &quick());
            assert!(restored.error().contains("closed"), "{command:?}");
        }
        for command in &COMMANDS[..4] {
            for fault in [Fault::Silent, Fault::Odd, Fault::Status] {
                let how = Receive::new(!eager).with(Trap::At(*command, fault));
                let restored = guest.restored(&options, &how, &quick());
                assert!(restored.done.is_err(), "{command:?} {fault:?}");
                assert_eq!(restored.outcome, Outcome::Dropped, "{command:?} {fault:?}");
            }
        }
        // An answer that comes twice is taken for the next one; at the last it is seen.
        for command in &COMMANDS[..4] {
            let how = Receive::new(!eager).with(Trap::At(*command, Fault::Twice));
            let restored = guest.restored(&options, &how, &quick());
            let dropped = restored.outcome == Outcome::Dropped;
            assert!(dropped || restored.error().contains("is not known"), "{command:?}");
        }
        // It may run there: that is said.
        for fault in [Fault::Silent, Fault::Odd, Fault::Close, Fault::Half] {
            let how = Receive::new(!eager).with(Trap::At(Command::Complete, fault));
            let restored = guest.restored(&options, &how, &quick());
            assert!(restored.error().contains("is not known"), "{fault:?}");
        }
    }
}

#[test]
fn a_receiver_that_does_not_say_that_it_drops_the_guest_is_told_of() {
    let guest = Saved::of(&Guest::new());
    // Half of an answer cannot be followed by one to Abandon.
    for (command, warned) in [(Command::Config, false), (Command::State, true)] {
        let (err, options) = told(true);
        let how = Receive::new(false).with(Trap::At(command, Fault::Cut));
        assert!(guest.restored(&options, &how, &quick()).done.is_err());
        let text = String::from_utf8(err.lock().clone()).unwrap();
        assert_eq!(text.contains("it may keep a paused copy"), warned, "{command:?}: {text}");
    }
}

/// What is told on stderr.
fn told(eager: bool) -> (Arc<parking_lot::Mutex<Vec<u8>>>, Options<'static>) {
    struct Kept(Arc<parking_lot::Mutex<Vec<u8>>>);
    impl std::io::Write for Kept {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let err = Arc::default();
    let report = Report::to(Box::new(std::io::sink()), Box::new(Kept(Arc::clone(&err))), false);
    (err, Options { report, ..Options::new(eager) })
}

#[test]
fn a_signal_abandons_the_guest() {
    let saved = Saved::of(&Guest::new());
    let run = Run::new(None);
    let interrupt = Arc::clone(&run);
    thread::scope(|scope| {
        scope.spawn(move || {
            thread::sleep(Duration::from_millis(300));
            interrupt.interrupt();
        });
        let how = Receive::new(false).with(Trap::At(Command::State, Fault::Silent));
        let restored = saved.restored(&Options::new(true), &how, &run);
        assert!(matches!(restored.done, Err(PagerError::Interrupted)), "{:?}", restored.done);
        assert_eq!(restored.outcome, Outcome::Dropped);
    });
}

/// A receiver that reads nothing for a while, and a State that the socket does not hold.
#[test]
fn a_signal_amid_a_frame_is_followed_by_the_rest_of_it_and_abandon() {
    use small_vmm::cloud_hypervisor::frames;
    let (near, mut far) = std::os::unix::net::UnixStream::pair().unwrap();
    let peer = Peer::new(near.into()).unwrap();
    let run = Run::new(None);
    thread::scope(|scope| {
        let interrupt = Arc::clone(&run);
        let reading = scope.spawn(move || {
            for _ in 0..2 {
                let (_, length) = frames::read_request(&mut far).unwrap();
                frames::read_payload(&mut far, length).unwrap();
                frames::send_answer(&mut far, true);
            }
            thread::sleep(Duration::from_millis(200));
            interrupt.interrupt();
            thread::sleep(Duration::from_millis(200));
            let (number, length) = frames::read_request(&mut far).unwrap();
            assert_eq!((number, length), (3, 4 << 20));
            frames::read_payload(&mut far, length).unwrap();
            let next = frames::read_request(&mut far).unwrap();
            frames::send_answer(&mut far, true);
            next
        });
        let left_behind = || panic!("it has said that it drops the guest");
        let mut giving = Giving::start(&peer, &run, &left_behind).unwrap();
        giving.config(b"{}").unwrap();
        let state = vec![b' '; 4 << 20];
        assert!(matches!(giving.state(&state), Err(PagerError::Interrupted)));
        drop(giving);
        drop(peer);
        assert_eq!(reading.join().unwrap(), (Command::Abandon.number(), 0));
    });
}

#[test]
fn a_page_that_cannot_be_read_is_never_zeros() {
    for eager in [true, false] {
        let saved = Saved::of(&Guest::new());
        // The image becomes shorter than its boot memory's pages, which come first.
        let place = saved.image.image().blocks()[0].used_length();
        let file = File::options().write(true).open(saved.path("image")).unwrap();
        file.set_len(place / 2).unwrap();
        let restored = saved.restored(&Options::new(eager), &Receive::new(!eager), &quick());
        assert!(restored.error().contains("cannot read a page"), "{}", restored.error());
        assert_eq!(restored.outcome, Outcome::Dropped);
    }
}

#[test]
fn edits_reach_the_receiver_and_nothing_else_changes() {
    let guest = Guest::new();
    let saved = Saved::of(&guest);
    let edits = ["disks[0].path=/new/disk".parse().unwrap(), "serial.file=/new".parse().unwrap()];
    let config = edit::apply(saved.image.config(), &edits).unwrap();
    let options = Options { config: Some(&config), ..Options::new(true) };
    let found = saved.restored(&options, &Receive::new(false), &Run::new(None)).taken();
    let mut expected = guest.config();
    expected["vm_config"]["disks"][0]["path"] = "/new/disk".into();
    expected["vm_config"]["serial"]["file"] = "/new".into();
    assert_eq!(String::from_utf8(found.config).unwrap(), expected.to_string());
}

#[test]
fn a_guest_that_is_populated_when_it_is_made_is_restored_eagerly_only() {
    let mut guest = Guest::new();
    guest.prefault = true;
    let saved = Saved::of(&guest);
    assert!(saved.image.layout().prefault);
    // The receiver refuses the Config; the command refuses it before.
    let refused = saved.restored(&Options::new(false), &Receive::new(true), &quick());
    assert!(refused.error().contains("answered Config with Error"), "{}", refused.error());
    let restored = restored(&guest, true, &Receive::new(false), &Run::new(None));
    assert!(restored.taken().memory == guest.memory());
}

#[test]
fn a_receiver_that_never_listens_is_a_timeout() {
    let saved = Saved::of(&Guest::new());
    // A socket that was left behind refuses connections.
    drop(UnixListener::bind(saved.path("socket")).unwrap());
    let address = crate::socket::Address::Unix(saved.path("socket"));
    let options = Options::new(true);
    let plan = crate::cloud_hypervisor::restore::Plan {
        guest: &saved.image,
        config: saved.image.config(),
        eager: true,
        bandwidth: None,
        replay: &options.replay,
        record: None,
        address: &address,
    };
    let run = Run::new(Some(Duration::from_millis(200)));
    let metrics = crate::cloud_hypervisor::metrics::RestoreMetrics::new();
    let error = crate::cloud_hypervisor::restore::restore(plan, &run, &options.report, &metrics)
        .unwrap_err();
    assert_eq!(error.exit_status(), 3, "{error}");
}
