//! A daemon that takes part in postcopy: it serves the guest before all memory has arrived.

mod common;

use std::thread;
use std::time::{Duration, Instant};

use common::postcopy::{assert_completed, relay, wait_on_the_way};
use common::{BLOCK, Host, PATIENCE, PLUGGED, TOUCHED};
use test_vmm::guest::Command;

/// Has the guest ask for more than it gets now, and waits until the daemon has said so.
fn wait_answered(to: &mut Host) {
    assert!(to.daemon.api().resize(PLUGGED + BLOCK).unwrap().is_success());
    let start = Instant::now();
    loop {
        let report = to.vmm.report().unwrap();
        assert_eq!(report.lost, None);
        // While memory arrives, no block changes.
        assert_eq!(report.plugged, PLUGGED);
        if report.busy > 0 {
            return;
        }
        assert!(start.elapsed() < PATIENCE, "no request is answered: {report:?}");
        thread::sleep(Duration::from_millis(2));
    }
}

fn assert_plugs(to: &mut Host) {
    to.vmm.tell(Command::Settle { requested: PLUGGED + BLOCK }).unwrap();
    to.assert_guest_works();
}

#[test]
fn a_guest_request_is_answered_before_all_memory_has_arrived() {
    let (mut from, mut to) = (Host::with_guest(), Host::waiting_with_pagefault());
    let address = to.listen_in_postcopy();
    let relay = relay(&to, &address);
    relay.hold_after(TOUCHED / 2);
    from.go_first(relay.address(), None);
    wait_on_the_way(&mut from, &relay);
    wait_answered(&mut to);
    assert!(relay.is_holding());
    let report = to.vmm.migration().unwrap();
    assert_eq!(report.status, "postcopy-active", "{report:?}");
    relay.hold_after(u64::from(u32::MAX));
    assert_completed(&mut from);
    assert_completed(&mut to);
    from.assert_no_guest();
    assert_plugs(&mut to);
    to.vmm.quit().unwrap();
}

#[test]
fn a_device_that_serves_before_all_memory_has_arrived_outlives_a_broken_channel() {
    let (mut from, mut to) = (Host::with_guest(), Host::waiting_with_pagefault());
    let address = to.listen_in_postcopy();
    let relay = relay(&to, &address);
    relay.hold_after(TOUCHED / 2);
    from.go_first(relay.address(), Some(address));
    wait_on_the_way(&mut from, &relay);
    wait_answered(&mut to);
    drop(relay);
    assert_completed(&mut from);
    assert_eq!(assert_completed(&mut to).recoveries, 1);
    from.assert_no_guest();
    assert_plugs(&mut to);
    to.vmm.quit().unwrap();
}

#[test]
fn a_daemon_whose_memory_never_arrives_ends_when_it_is_told() {
    let (mut from, mut to) = (Host::with_guest(), Host::waiting_with_pagefault());
    let address = to.listen_in_postcopy();
    let relay = relay(&to, &address);
    relay.hold_after(TOUCHED / 2);
    from.go_first(relay.address(), None);
    wait_on_the_way(&mut from, &relay);
    from.vmm.kill();
    drop(relay);
    let status = to.daemon.terminate(PATIENCE).unwrap();
    assert!(status.success(), "{status}: {}", to.daemon.stderr());
}

#[test]
fn a_daemon_that_can_wait_for_pages_serves_a_guest_that_needs_no_postcopy() {
    let (mut from, mut to) = (Host::with_guest(), Host::waiting_with_pagefault());
    let address = to.listen();
    from.migrate(&address);
    assert_completed(&mut from);
    assert_completed(&mut to);
    to.assert_guest_works();
    to.vmm.quit().unwrap();
}
