use std::time::Duration;

use small_vmm::cloud_hypervisor::faults::{Asking, Trap};
use small_vmm::cloud_hypervisor::guest::{MIB, PAGE};
use small_vmm::cloud_hypervisor::receiver::{self, Outcome, Receive};
use small_vmm::cloud_hypervisor::{Guest, guest};

use super::ways::{Options, Restored, Saved, quick, restored};
use crate::error::PagerError;
use crate::run::Run;

/// Pages of boot memory, and how many of them have something in them.
const BOOT_PAGES: u64 = 6 * MIB / PAGE;
const BOOT_FILLED: u64 = 5;

fn with(trap: Trap) -> Receive {
    Receive::new(true).asking(Asking { trap: Some(trap), ..Asking::default() })
}

fn asked(trap: Trap) -> Restored {
    restored(&Guest::new(), false, &with(trap), &quick())
}

#[test]
fn a_lazy_restore_gives_plugged_blocks_too_which_are_never_asked_for() {
    for first_range in [0, 1] {
        let guest = Guest::new();
        let how = Receive::new(true).asking(Asking { first_range, ..Asking::default() });
        let restored = restored(&guest, false, &how, &Run::new(None));
        assert_eq!(restored.metrics.inflated(), BOOT_PAGES - BOOT_FILLED);
        let found = restored.taken();
        assert!(found.memory == guest.memory());
        // The sweep has asked for all of boot memory, and for each page once.
        assert_eq!(found.asked, BOOT_PAGES);
        assert_eq!(found.resident, (BOOT_PAGES + 4) * PAGE);
    }
}

#[test]
fn a_guest_that_stays_paused_is_sparse_after_the_sweep() {
    let mut guest = Guest::new();
    guest.paused = true;
    let restored = restored(&guest, false, &Receive::new(true), &Run::new(None));
    assert_eq!(restored.metrics.inflated(), 0);
    let found = restored.taken();
    assert!(found.paused && found.memory == guest.memory());
    assert_eq!(found.resident, 9 * PAGE);
}

#[test]
fn a_page_that_the_guest_discarded_is_made_present_again_as_zeros() {
    let guest = Guest::new();
    let found = restored(&guest, false, &with(Trap::Balloon), &Run::new(None)).taken();
    // The first page of the mapping that is first in the Config and not of virtio-mem.
    let mut expected = guest.memory();
    expected[0].1[..PAGE as usize].fill(0);
    assert!(found.memory == expected);
}

#[test]
fn a_page_that_is_asked_for_twice_is_there_twice() {
    let guest = Guest::new();
    assert!(
        restored(&guest, false, &with(Trap::Again), &Run::new(None)).taken().memory
            == guest.memory()
    );
}

#[test]
fn a_receiver_that_is_not_in_postcopy_is_abandoned_before_it_runs_on_zeros() {
    for trap in [receiver::Trap::NotPostcopy, receiver::Trap::NotPostcopyCloses] {
        let how = Receive::new(true).with(trap);
        let restored = restored(&Guest::new(), false, &how, &quick());
        assert!(restored.error().contains("memory_mode=postcopy"), "{}", restored.error());
        assert_eq!(restored.outcome, Outcome::Dropped);
    }
}

#[test]
fn a_request_that_is_none_is_never_answered_ok() {
    for trap in [
        Trap::Outside,
        Trap::Unaligned,
        Trap::OddLength,
        Trap::Other,
        Trap::Unknown,
        Trap::Cut,
        Trap::Half,
        Trap::Unread,
    ] {
        let restored = asked(trap);
        let error = restored.error();
        assert!(error.contains("has not got all of its memory"), "{trap:?}: {error}");
        assert_eq!(restored.outcome, Outcome::Broken, "{trap:?}");
    }
}

#[test]
fn a_sweep_that_stops_early_is_not_taken_for_its_end() {
    let restored = asked(Trap::Stop);
    assert!(restored.error().contains("has not asked for 1535 pages"), "{}", restored.error());
    assert_eq!(restored.outcome, Outcome::Broken);
}

/// The guest may touch nothing for long: only the time of the run, or a signal, ends that.
#[test]
fn a_receiver_that_asks_for_nothing_more_is_waited_for_as_long_as_the_run_lasts() {
    let run = Run::with_silence(Some(Duration::from_millis(1500)), Duration::from_millis(100));
    let restored = restored(&Guest::new(), false, &with(Trap::Silent), &run);
    let error = restored.done.unwrap_err();
    assert!(matches!(error, PagerError::TimedOut { .. }), "{error}");
    assert!(error.to_string().contains("cannot be saved"), "{error}");
    assert_eq!(restored.outcome, Outcome::Broken);
}

/// With a rate that would take a day for what is not asked for.
#[test]
fn what_is_asked_for_does_not_wait_for_a_rate() {
    let guest = Guest::new();
    for page in 0..900 {
        guest.write(1, page, &guest::content(1000 + page));
    }
    let options = Options { bandwidth: Some(1), ..Options::new(false) };
    let saved = Saved::of(&guest);
    let found = saved.restored(&options, &Receive::new(true), &Run::new(None)).taken();
    assert!(found.memory == guest.memory());
}

#[test]
fn an_address_that_two_mappings_could_have_is_found_by_its_mapping() {
    // Boot memory is two mappings of one file: touched at the end of the one, and at the start of the other.
    let guest = Guest::new();
    let touches = vec![4 * MIB - PAGE, 3 << 30, (3 << 30) + 2 * MIB - PAGE];
    let how = Receive::new(true).asking(Asking { touches, ..Asking::default() });
    let found = restored(&guest, false, &how, &Run::new(None)).taken();
    assert!(found.memory == guest.memory());
    assert_eq!(found.asked, BOOT_PAGES);
}
