//! Guests that run before their memory is there, between processes: postcopy over a channel that
//! breaks or to a destination that dies, and a file that is read while the guest runs.

mod common;

use std::thread;
use std::time::{Duration, Instant};

use small_vmm::guest::Command;
use small_vmm::migration::{MigrateOptions, PostcopyOptions, When};

use common::postcopy::{assert_completed, assert_moved, relay, wait_on_the_way};
use common::{Host, MIB, PAGE, PATIENCE, PLUGGED, REGION, TOUCHED, to_address};

#[test]
fn a_channel_that_breaks_in_postcopy_is_recovered_and_the_device_works_afterwards() {
    let (mut from, mut to) = (Host::with_guest(), Host::waiting());
    let address = to.listen_in_postcopy();
    let relay = relay(&to, &address);
    // More than the devices, and less than there is.
    relay.hold_after(TOUCHED / 2);
    from.go_first(relay.address(), Some(address));
    wait_on_the_way(&mut from, &relay);
    drop(relay);
    let sent = assert_completed(&mut from);
    let loaded = assert_completed(&mut to);
    assert_eq!((sent.recoveries, loaded.recoveries), (1, 1));
    assert_eq!(sent.ram.discarded, (REGION - PLUGGED) / PAGE);
    from.assert_no_guest();
    to.assert_guest_works();
    assert_eq!(to.vmm.report().unwrap().resident, TOUCHED);
    from.vmm.quit().unwrap();
    to.vmm.quit().unwrap();
}

#[test]
fn a_break_after_precopy_is_recovered_though_nothing_is_to_come_of_some_memory() {
    let (mut from, mut to) = (Host::with_guest(), Host::waiting());
    let address = to.listen_in_postcopy();
    let relay = relay(&to, &address);
    let postcopy = PostcopyOptions { when: When::Told, recover: Some(address) };
    from.begin(MigrateOptions {
        max_bandwidth: Some(TOUCHED / 2),
        postcopy: Some(postcopy),
        ..to_address(relay.address())
    });
    // Boot memory goes first, and is not written any more.
    let start = Instant::now();
    while from.vmm.migration().unwrap().ram.transferred < TOUCHED / 8 {
        assert!(start.elapsed() < PATIENCE, "boot memory is not sent");
        thread::sleep(Duration::from_millis(1));
    }
    relay.hold_after(TOUCHED / 2);
    from.vmm.tell(Command::StartPostcopy).unwrap();
    wait_on_the_way(&mut from, &relay);
    drop(relay);
    assert_completed(&mut from);
    assert_eq!(assert_completed(&mut to).recoveries, 1);
    from.assert_no_guest();
    to.assert_guest_works();
}

#[test]
fn a_daemon_that_is_started_again_and_cannot_wait_for_pages_gets_the_ring_when_all_are_there() {
    let (mut from, mut to) = (Host::with_guest(), Host::waiting());
    let address = to.listen_in_postcopy();
    let relay = relay(&to, &address);
    relay.hold_after(512);
    from.go_first(relay.address(), None);
    // The devices go first, less than a page at a time.
    let start = Instant::now();
    while to.vmm.migration().unwrap().status != "postcopy-active" {
        assert!(start.elapsed() < PATIENCE, "the devices do not arrive");
        if relay.is_holding() {
            relay.hold_after(512);
        }
        thread::sleep(Duration::from_millis(4));
    }
    to.vmm.tell(Command::Detach).unwrap();
    to.daemon.restart().unwrap();
    to.vmm.tell(Command::Reconnect).unwrap();
    relay.hold_after(u64::from(u32::MAX));
    assert_moved(&mut from, &mut to);
    to.assert_guest_works();
    assert_eq!(to.vmm.report().unwrap().resident, TOUCHED);
    to.vmm.quit().unwrap();
}

#[test]
fn a_destination_that_is_killed_in_postcopy_takes_the_guest_with_it() {
    let (mut from, mut to) = (Host::with_guest(), Host::waiting());
    let address = to.listen_in_postcopy();
    let relay = relay(&to, &address);
    relay.hold_after(TOUCHED / 2);
    from.go_first(relay.address(), None);
    wait_on_the_way(&mut from, &relay);
    // It runs over there.
    let error = from.vmm.tell(Command::Cont).unwrap_err().to_string();
    assert!(error.starts_with("the guest is stopped for a migration"), "{error}");
    to.vmm.kill();
    let report = from.outcome();
    assert_eq!(report.status, "failed", "{report:?}");
    assert!(report.error_desc.is_some_and(|error| !error.is_empty()));
    // It ran over there, and what it did is lost: it must not run a second time.
    let error = from.vmm.tell(Command::Cont).unwrap_err().to_string();
    assert_eq!(error, "the guest has left, and must not run here again");
    from.assert_no_guest();
    assert_eq!(from.daemon.api().device().unwrap()["migration_active"], false);
}

#[test]
fn a_source_that_nobody_answers_waits_in_postcopy_until_it_is_cancelled() {
    let (mut from, mut to) = (Host::with_guest(), Host::waiting());
    let address = to.listen_in_postcopy();
    let relay = relay(&to, &address);
    relay.hold_after(TOUCHED / 2);
    let nowhere = format!("{address}.nowhere");
    from.go_first(relay.address(), Some(nowhere));
    wait_on_the_way(&mut from, &relay);
    drop(relay);
    for host in [&mut from, &mut to] {
        host.wait_status("postcopy-paused");
        host.vmm.tell(Command::Cancel).unwrap();
        let report = host.outcome();
        assert!(matches!(&*report.status, "failed" | "cancelled"), "{report:?}");
    }
    from.assert_no_guest();
    // Half of its memory is nowhere: the guest must not find zeros there.
    let report = to.vmm.report().unwrap();
    assert!(!report.healthy, "{report:?}");
    assert_eq!(to.vmm.report().unwrap().written, report.written);
    assert!(to.vmm.quit().is_err());
}

#[test]
fn precopy_may_end_before_postcopy_is_wanted() {
    let (mut from, mut to) = (Host::with_guest(), Host::waiting());
    let address = to.listen_in_postcopy();
    let postcopy = Some(PostcopyOptions::default());
    from.begin(MigrateOptions { postcopy, ..to_address(&address) });
    assert_completed(&mut from);
    assert_eq!(assert_completed(&mut to).faults, None);
    from.assert_no_guest();
    to.assert_guest_works();
}

#[test]
fn a_running_guest_is_saved_and_goes_on_elsewhere_while_the_file_is_read() {
    let (mut from, mut to) = (Host::with_guest(), Host::waiting());
    let file = from.daemon.socket().with_file_name("snapshot");
    from.vmm.tell(Command::Snapshot { file: file.clone(), background: true }).unwrap();
    let saved = assert_completed(&mut from);
    assert_eq!(saved.ram.discarded, (REGION - PLUGGED) / PAGE);
    assert!(saved.ram.normal >= TOUCHED / PAGE, "{saved:?}");
    // What happens here from now on is not in the file.
    from.assert_guest_works();

    to.vmm.tell(Command::Restore { file, lazy: true }).unwrap();
    assert!(assert_completed(&mut to).faults.is_some());
    to.assert_guest_works();
    let resident = to.vmm.report().unwrap().resident;
    assert!((TOUCHED..TOUCHED + MIB).contains(&resident), "{resident:#x}");
    from.assert_guest_works();
    to.vmm.quit().unwrap();
}
