//! Processes that are killed while a guest's blocks change and its memory still arrives: it sees no wrong page, and each
//! process that is left recovers, or says why it cannot.

mod common;

use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Duration;

use ram_discard::{RamDiscardListener, RamDiscardManager, Section};
use small_vmm::guest::Command;
use small_vmm::relay::Relay;
use virtio_mem::discard_channel::RemoteRamDiscardManager;

use common::postcopy::{assert_completed, assert_moved, relay, wait_on_the_way};
use common::{BLOCK, Host, PATIENCE, PLUGGED, REGION, TOUCHED, wait_until};

/// A guest that runs over there, and part of whose memory is held back.
fn on_the_way() -> (Host, Host, Relay) {
    let (mut from, mut to) = (Host::with_guest(), Host::waiting_with_pagefault());
    let address = to.listen_in_postcopy();
    let relay = relay(&to, &address);
    relay.hold_after(TOUCHED / 2);
    from.go_first(relay.address(), None);
    wait_on_the_way(&mut from, &relay);
    (from, to, relay)
}

/// Sizes that a guest is asked for.
const GROWS: fn(u64) -> u64 = |step| (PLUGGED + step * BLOCK).min(REGION);
const GROWS_AND_SHRINKS: fn(u64) -> u64 =
    |step| [PLUGGED + 4 * BLOCK, PLUGGED - TOUCHED / 4, PLUGGED + BLOCK][(step % 3) as usize];

struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Memory comes a little at a time, so that no vCPU is kept for long from leaving what is unplugged.
fn drip(relay: &Relay, lasts: impl Fn() -> bool) {
    while lasts() {
        relay.hold_after(TOUCHED / 1024);
        thread::sleep(Duration::from_millis(10));
    }
}

/// Has the guest over there change its blocks again and again, and does something in the midst of that, when it was
/// served so often.
fn while_blocks_change(
    to: &mut Host,
    relay: &Relay,
    (sizes, served): (fn(u64) -> u64, u64),
    act: impl FnOnce(&mut Host),
) {
    let (ends, api) = (AtomicBool::new(false), to.daemon.api());
    thread::scope(|scope| {
        let _ends = Ends(&ends);
        let lasts = || !ends.load(Ordering::Relaxed);
        scope.spawn(move || {
            for step in (1..).take_while(|_| lasts()) {
                // Also of a daemon that is gone.
                let _ = api.resize(sizes(step));
                thread::sleep(Duration::from_millis(3));
            }
        });
        scope.spawn(move || drip(relay, lasts));
        let before = to.vmm.report().unwrap().served;
        wait_until("the guest is not served", || {
            to.vmm.report().unwrap().served >= before + served
        });
        assert_eq!(to.vmm.migration().unwrap().status, "postcopy-active");
        act(to);
    });
}

#[test]
fn a_source_that_is_killed_leaves_a_guest_that_waits_and_is_stopped_when_that_is_given_up() {
    let (mut from, mut to, relay) = on_the_way();
    // It only grows, since it could not leave memory while a vCPU waits for a page.
    while_blocks_change(&mut to, &relay, (GROWS, 3), |_| from.vmm.kill());
    drop(relay);
    to.wait_status("postcopy-paused");
    // What was missing is waited for, and blocks are plugged meanwhile.
    let requested = to.daemon.api().device().unwrap()["requested_size"].as_u64().unwrap();
    to.vmm.tell(Command::Settle { requested }).unwrap();
    let report = to.vmm.report().unwrap();
    assert!(report.healthy && report.running, "{report:?}");
    assert_eq!(report.lost, None);
    to.vmm.tell(Command::Cancel).unwrap();
    let outcome = to.outcome();
    assert!(matches!(&*outcome.status, "failed" | "cancelled"), "{outcome:?}");
    assert!(outcome.error_desc.is_some_and(|error| !error.is_empty()));
    let report = to.vmm.report().unwrap();
    assert!(!report.healthy, "its memory is lost: {report:?}");
    assert_eq!(to.vmm.report().unwrap().written, report.written);
    let Host { vmm, mut daemon } = to;
    assert!(vmm.quit().is_err());
    let status = daemon.terminate(PATIENCE).unwrap();
    assert!(status.success(), "{status}: {}", daemon.stderr());
}

#[test]
fn a_destination_that_is_killed_takes_its_guest_with_it_and_leaves_a_daemon_for_another() {
    let (mut from, mut to, relay) = on_the_way();
    while_blocks_change(&mut to, &relay, (GROWS_AND_SHRINKS, 4), |to| to.vmm.kill());
    let outcome = from.outcome();
    assert_eq!(outcome.status, "failed", "{outcome:?}");
    assert!(outcome.error_desc.is_some_and(|error| !error.is_empty()));
    // It ran over there, and must not run a second time.
    let error = from.vmm.tell(Command::Cont).unwrap_err().to_string();
    assert_eq!(error, "the guest has left, and must not run here again");
    from.assert_no_guest();
    // Its daemon starts itself anew, with the blocks of a guest that is gone, and takes another.
    to.restart_vmm();
    let mut third = Host::with_guest();
    let address = to.listen_in_postcopy();
    third.go_first(&address, None);
    assert_completed(&mut third);
    assert_completed(&mut to);
    to.assert_guest_works();
    to.vmm.quit().unwrap();
}

#[test]
fn a_daemon_that_is_killed_where_the_guest_was_does_not_matter_any_more() {
    let (mut from, mut to, relay) = on_the_way();
    while_blocks_change(&mut to, &relay, (GROWS_AND_SHRINKS, 4), |_| from.daemon.kill().unwrap());
    relay.hold_after(u64::from(u32::MAX));
    assert_moved(&mut from, &mut to);
    to.assert_guest_works();
    to.vmm.quit().unwrap();
}

#[test]
fn a_daemon_that_is_killed_and_not_started_again_is_lost_and_the_guest_is_not() {
    let (mut from, mut to, relay) = on_the_way();
    while_blocks_change(&mut to, &relay, (GROWS_AND_SHRINKS, 4), |to| to.daemon.kill().unwrap());
    relay.hold_after(u64::from(u32::MAX));
    assert_moved(&mut from, &mut to);
    to.assert_guest_runs();
    let report = to.vmm.report().unwrap();
    assert!(report.lost.is_some(), "{report:?}");
    to.vmm.quit().unwrap();
}

#[test]
fn a_daemon_that_is_killed_and_started_again_has_the_blocks_of_its_guest_whenever_that_is() {
    for served in 1..6 {
        let (mut from, mut to, relay) = on_the_way();
        while_blocks_change(&mut to, &relay, (GROWS_AND_SHRINKS, served), |to| {
            to.vmm.tell(Command::Detach).unwrap();
            to.daemon.kill().unwrap();
            to.daemon.restart().unwrap();
            let report = to.vmm.tell(Command::Reconnect).unwrap();
            // It may have died when one of the two knew of a change, and then says so.
            if let Some(reason) = report.blocks_stay {
                assert!(reason.starts_with("the daemon has other blocks"), "{reason}");
            }
        });
        relay.hold_after(u64::from(u32::MAX));
        assert_moved(&mut from, &mut to);
        to.assert_guest_works();
        let report = to.vmm.report().unwrap();
        assert!(report.resident <= TOUCHED, "{report:?}");
        to.vmm.quit().unwrap();
    }
}

/// A request of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asked {
    Plug,
    Unplug,
}

/// A listener in another process that says when it is told, and does not answer until it is let go.
struct Stuck {
    at: Asked,
    told: Sender<()>,
    let_go: Receiver<()>,
}

impl Stuck {
    fn hear(&self, asked: Asked) {
        if asked == self.at {
            let _ = self.told.send(());
            let _ = self.let_go.recv();
        }
    }
}

impl RamDiscardListener for Stuck {
    fn name(&self) -> &str {
        "stuck"
    }

    fn notify_populate(&mut self, _: Section) -> Result<(), String> {
        self.hear(Asked::Plug);
        Ok(())
    }

    fn notify_discard(&mut self, _: Section) {
        self.hear(Asked::Unplug);
    }
}

/// Has the daemon over there die in the midst of what the guest asks for, and starts it again.
fn kill_in_the_midst(to: &mut Host, relay: &Relay, asked: Asked) {
    let block = Section::new(PLUGGED, BLOCK).unwrap();
    let stream = UnixStream::connect(to.daemon.discard_socket()).unwrap();
    let client = RemoteRamDiscardManager::attach(stream, PATIENCE).unwrap();
    let ((told, is_told), (lets_go, let_go)) = (channel(), channel());
    client.register(block, Box::new(Stuck { at: asked, told, let_go })).unwrap();
    let requested = if asked == Asked::Plug { PLUGGED + BLOCK } else { PLUGGED };
    assert!(to.daemon.api().resize(requested).unwrap().is_success());
    let ends = AtomicBool::new(false);
    thread::scope(|scope| {
        let _ends = Ends(&ends);
        let ends = &ends;
        scope.spawn(move || drip(relay, || !ends.load(Ordering::Relaxed)));
        is_told.recv_timeout(PATIENCE).unwrap();
        to.daemon.kill().unwrap();
        to.daemon.restart().unwrap();
        // The driver waits for the answer to its request.
        let report = to.vmm.tell(Command::Reconnect).unwrap();
        assert_eq!(report.lost, None);
        if let Some(reason) = report.blocks_stay {
            assert!(reason.starts_with("the daemon has other blocks"), "{asked:?}: {reason}");
        }
    });
    drop(lets_go);
}

#[test]
fn a_daemon_that_dies_in_the_midst_of_a_request_does_it_in_the_end() {
    for asked in [Asked::Plug, Asked::Unplug] {
        let (mut from, mut to, relay) = on_the_way();
        if asked == Asked::Unplug {
            assert!(to.daemon.api().resize(PLUGGED + BLOCK).unwrap().is_success());
            to.vmm.tell(Command::Settle { requested: PLUGGED + BLOCK }).unwrap();
        }
        kill_in_the_midst(&mut to, &relay, asked);
        relay.hold_after(u64::from(u32::MAX));
        assert_moved(&mut from, &mut to);
        let requested = if asked == Asked::Plug { PLUGGED + BLOCK } else { PLUGGED };
        to.vmm.tell(Command::Settle { requested }).unwrap();
        to.assert_guest_works();
        assert_eq!(to.vmm.report().unwrap().resident, TOUCHED);
        to.vmm.quit().unwrap();
    }
}
