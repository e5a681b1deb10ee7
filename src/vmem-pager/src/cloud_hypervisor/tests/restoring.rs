use std::fs;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use proptest::prelude::*;

use super::guest::{self, Guest, MIB, PAGE};
use super::receiver::{self, Outcome, Trap, receive};
use super::saving::saved;
use super::source;
use crate::cli::report::Report;
use crate::cloud_hypervisor::edit;
use crate::cloud_hypervisor::image::SavedGuest;
use crate::cloud_hypervisor::metrics::RestoreMetrics;
use crate::cloud_hypervisor::protocol::Command;
use crate::cloud_hypervisor::restore::{Plan, restore};
use crate::error::PagerError;
use crate::run::Run;
use crate::socket::Address;

/// Saves `guest`, and restores it to a Cloud Hypervisor with `trap`.
fn restored(
    guest: &Guest,
    eager: bool,
    trap: Trap,
    run: &Arc<Run>,
) -> (Result<(), PagerError>, Outcome, RestoreMetrics) {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    saved(guest, source::Trap::None, &image, false, &Run::new(None)).0.unwrap();
    let saved = SavedGuest::open(&image).unwrap();
    let config = saved.config().to_vec();
    give(&saved, &config, eager, trap, run, dir.path())
}

fn give(
    saved: &SavedGuest,
    config: &[u8],
    eager: bool,
    trap: Trap,
    run: &Arc<Run>,
    dir: &Path,
) -> (Result<(), PagerError>, Outcome, RestoreMetrics) {
    let path = dir.join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let metrics = RestoreMetrics::new();
    thread::scope(|scope| {
        let receiver = scope.spawn(move || receive(&listener, !eager, trap));
        let address = Address::Unix(path);
        let plan = Plan { guest: saved, config, eager, address: &address };
        let restored = restore(plan, run, &Report::silent(), &metrics);
        (restored, receiver.join().unwrap(), metrics)
    })
}

fn quick() -> Arc<Run> {
    Run::with_silence(None, Duration::from_millis(200))
}

#[test]
fn an_eager_restore_gives_all_memory_and_keeps_holes() {
    for paused in [false, true] {
        let mut guest = Guest::new();
        guest.paused = paused;
        let (done, outcome, _) = restored(&guest, true, Trap::None, &Run::new(None));
        done.unwrap();
        let Outcome::Has(found) = outcome else { panic!("{outcome:?}") };
        assert_eq!(found.paused, paused);
        assert!(found.memory == guest.memory());
        assert_eq!(found.config, guest.config().to_string().as_bytes());
        assert_eq!(found.state, guest.state().to_string().as_bytes());
        assert_eq!(found.resident, 9 * PAGE);
    }
}

#[test]
fn a_lazy_restore_gives_plugged_blocks_too_which_are_never_asked_for() {
    let guest = Guest::new();
    let (done, outcome, metrics) = restored(&guest, false, Trap::None, &Run::new(None));
    done.unwrap();
    let Outcome::Has(found) = outcome else { panic!("{outcome:?}") };
    assert!(found.memory == guest.memory());
    // The sweep has asked for all of boot memory.
    let boot_pages = 6 * MIB / PAGE;
    assert_eq!(found.resident, (boot_pages + 4) * PAGE);
    // Five pages of boot memory have something in them.
    assert_eq!(metrics.inflated(), boot_pages - 5);
}

#[test]
fn a_guest_that_stays_paused_is_sparse_after_the_sweep() {
    let mut guest = Guest::new();
    guest.paused = true;
    let (done, outcome, metrics) = restored(&guest, false, Trap::None, &Run::new(None));
    done.unwrap();
    let Outcome::Has(found) = outcome else { panic!("{outcome:?}") };
    assert!(found.paused && found.memory == guest.memory());
    assert_eq!((found.resident, metrics.inflated()), (9 * PAGE, 0));
}

#[test]
fn a_page_that_the_guest_discarded_is_made_present_again_as_zeros() {
    let guest = Guest::new();
    let (done, outcome, _) = restored(&guest, false, Trap::Balloon, &Run::new(None));
    done.unwrap();
    let Outcome::Has(found) = outcome else { panic!("{outcome:?}") };
    // The first page of the mapping that is first in the Config that is not of virtio-mem.
    let mut expected = guest.memory();
    expected[0].1[..PAGE as usize].fill(0);
    assert!(found.memory == expected);
}

#[test]
fn a_receiver_that_is_not_in_postcopy_is_abandoned_before_it_runs_on_zeros() {
    let (done, outcome, _) = restored(&Guest::new(), false, Trap::NotPostcopy, &Run::new(None));
    let error = done.unwrap_err().to_string();
    assert!(error.contains("memory_mode=postcopy"), "{error}");
    assert_eq!(outcome, Outcome::Dropped);
}

const COMMANDS: [Command; 5] =
    [Command::Start, Command::MemoryFd, Command::Config, Command::State, Command::Complete];

#[test]
fn a_receiver_that_fails_anywhere_has_no_second_copy() {
    let guest = Guest::new();
    for eager in [true, false] {
        for command in COMMANDS {
            let (done, outcome, _) = restored(&guest, eager, Trap::ErrorAt(command), &quick());
            assert!(done.unwrap_err().to_string().contains("with Error"), "{command:?}");
            assert_eq!(outcome, Outcome::Dropped, "{command:?}");
            let (done, ..) = restored(&guest, eager, Trap::CloseAt(command), &quick());
            assert!(done.unwrap_err().to_string().contains("closed"), "{command:?}");
        }
        for command in &COMMANDS[..4] {
            for trap in [Trap::SilentAt(*command), Trap::OddAnswerAt(*command)] {
                let (done, outcome, _) = restored(&guest, eager, trap, &quick());
                assert!(done.is_err());
                assert_eq!(outcome, Outcome::Dropped, "{trap:?}");
            }
        }
        // It may run there: that is said.
        let (done, ..) = restored(&guest, eager, Trap::SilentAt(Command::Complete), &quick());
        assert!(done.unwrap_err().to_string().contains("is not known"));
    }
}

#[test]
fn a_signal_abandons_the_guest() {
    let run = Run::new(None);
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    saved(&Guest::new(), source::Trap::None, &image, false, &Run::new(None)).0.unwrap();
    let saved = SavedGuest::open(&image).unwrap();
    let interrupt = Arc::clone(&run);
    thread::scope(|scope| {
        scope.spawn(move || {
            thread::sleep(Duration::from_millis(300));
            interrupt.interrupt();
        });
        let trap = Trap::SilentAt(Command::State);
        let (done, outcome, _) = give(&saved, saved.config(), true, trap, &run, dir.path());
        assert!(matches!(done, Err(PagerError::Interrupted)), "{done:?}");
        assert_eq!(outcome, Outcome::Dropped);
    });
}

#[test]
fn a_request_that_is_none_is_never_answered_ok() {
    for trap in [Trap::OutsideRequest, Trap::UnalignedRequest, Trap::OtherRequest, Trap::CutRequest]
    {
        let (done, outcome, _) = restored(&Guest::new(), false, trap, &quick());
        assert!(
            done.unwrap_err().to_string().contains("has not got all of its memory"),
            "{trap:?}"
        );
        assert_eq!(outcome, Outcome::Broken);
    }
}

#[test]
fn a_sweep_that_stops_early_is_not_taken_for_its_end() {
    let (done, outcome, _) = restored(&Guest::new(), false, Trap::SweepStops, &quick());
    let error = done.unwrap_err().to_string();
    assert!(error.contains("has not asked for 1535 pages"), "{error}");
    assert_eq!(outcome, Outcome::Broken);
}

#[test]
fn a_page_that_cannot_be_read_is_never_zeros() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    let guest = Guest::new();
    saved(&guest, source::Trap::None, &image, false, &Run::new(None)).0.unwrap();
    let open = SavedGuest::open(&image).unwrap();
    // The image becomes shorter than its boot memory's pages, which come first.
    let place = open.image().blocks()[0].used_length();
    fs::File::options().write(true).open(&image).unwrap().set_len(place / 2).unwrap();
    let (done, outcome, _) = give(&open, open.config(), true, Trap::None, &quick(), dir.path());
    assert!(done.unwrap_err().to_string().contains("cannot read a page"));
    assert_eq!(outcome, Outcome::Dropped);
}

#[test]
fn edits_reach_the_receiver_and_nothing_else_changes() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    let guest = Guest::new();
    saved(&guest, source::Trap::None, &image, false, &Run::new(None)).0.unwrap();
    let open = SavedGuest::open(&image).unwrap();
    let edits = ["disks[0].path=/new/disk".parse().unwrap(), "serial.file=/new".parse().unwrap()];
    let config = edit::apply(open.config(), &edits).unwrap();
    let (done, outcome, _) = give(&open, &config, true, Trap::None, &Run::new(None), dir.path());
    done.unwrap();
    let Outcome::Has(receiver::Guest { config, .. }) = outcome else { panic!("{outcome:?}") };
    let mut expected = guest.config();
    expected["vm_config"]["disks"][0]["path"] = "/new/disk".into();
    expected["vm_config"]["serial"]["file"] = "/new".into();
    assert_eq!(String::from_utf8(config).unwrap(), expected.to_string());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    /// Whatever is in memory and wherever a receiver fails: the guest is there whole, or not at all.
    #[test]
    fn a_restored_guest_is_whole_or_dropped(
        pages in proptest::collection::vec((0..3usize, 0..512u64, 1..1000u64), 0..20),
        blocks in proptest::collection::vec(any::<bool>(), 8),
        eager: bool,
        paused: bool,
        fails_at in 0..10usize,
    ) {
        let mut guest = Guest::new();
        for (mapping, page, seed) in pages {
            guest.write(mapping, page, &guest::content(seed));
        }
        (guest.plugged, guest.paused) = (blocks, paused);
        let trap = COMMANDS.get(fails_at).map_or(Trap::None, |command| Trap::ErrorAt(*command));
        let (done, outcome, _) = restored(&guest, eager, trap, &Run::new(None));
        match outcome {
            Outcome::Has(found) => {
                done.unwrap();
                prop_assert!(found.memory == guest.memory());
                prop_assert_eq!(found.paused, paused);
            }
            other => {
                prop_assert!(done.is_err());
                prop_assert_eq!(other, Outcome::Dropped);
                // A paused guest ends with a command that this does not refuse.
                prop_assert!(trap != Trap::None);
            }
        }
    }
}
