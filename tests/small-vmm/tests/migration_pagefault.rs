//! A daemon that takes part in postcopy: it serves the guest before all memory has arrived.

mod common;

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use ram_discard::{MemoryState, RamDiscardManager, Section};

use small_vmm::guest::{Command, State};
use small_vmm::memory::data_ranges;
use small_vmm::migration::{MigrateOptions, PostcopyOptions, When};
use small_vmm::relay::Relay;
use virtio_mem::discard_channel::RemoteRamDiscardManager;

use common::postcopy::{assert_completed, assert_moved, relay, wait_on_the_way};
use common::{BLOCK, Host, MIB, PATIENCE, PLUGGED, REGION, TOUCHED, to_address, wait_until};

/// What a daemon logs that waits for pages.
const ADVISED: &str = "gets the page faults of this process (postcopy)";

/// The guest grows by a block while its memory arrives.
fn grow(to: &mut Host) {
    assert!(to.daemon.api().resize(PLUGGED + BLOCK).unwrap().is_success());
    let report = to.vmm.tell(Command::Settle { requested: PLUGGED + BLOCK }).unwrap();
    assert_eq!(report.lost, None);
    assert_eq!(to.vmm.migration().unwrap().status, "postcopy-active");
}

/// Has the guest ask for another block, and waits until the daemon is busy.
fn wait_busy(to: &mut Host) {
    let before = to.vmm.report().unwrap();
    assert!(to.daemon.api().resize(PLUGGED + 2 * BLOCK).unwrap().is_success());
    let start = Instant::now();
    loop {
        let report = to.vmm.report().unwrap();
        assert_eq!((&report.lost, report.plugged), (&None, PLUGGED + BLOCK));
        if report.busy > before.busy {
            return;
        }
        assert!(start.elapsed() < PATIENCE, "no request is answered: {report:?}");
        thread::sleep(Duration::from_millis(2));
    }
}

fn assert_plugs(to: &mut Host) {
    assert!(to.daemon.api().resize(PLUGGED + 2 * BLOCK).unwrap().is_success());
    to.vmm.tell(Command::Settle { requested: PLUGGED + 2 * BLOCK }).unwrap();
    to.assert_guest_works();
}

/// Source and destination of a guest that runs there, part of whose memory is held back. The source
/// may look for the destination itself afterwards, if `recovers`.
fn on_the_way(recovers: bool) -> (Host, Host, Relay) {
    let (mut from, mut to) = (Host::with_guest(), Host::waiting_with_pagefault());
    let relay = send_over(&mut from, &mut to, recovers);
    (from, to, relay)
}

/// Sends the guest to a destination that waits, until part of its memory is held back.
fn send_over(from: &mut Host, to: &mut Host, recovers: bool) -> Relay {
    let address = to.listen_in_postcopy();
    let relay = relay(to, &address);
    relay.hold_after(TOUCHED / 2);
    from.go_first(relay.address(), recovers.then_some(address));
    wait_on_the_way(from, &relay);
    relay
}

#[test]
fn a_guest_grows_before_all_memory_has_arrived() {
    let (mut from, mut to, relay) = on_the_way(false);
    grow(&mut to);
    // What is plugged does not hang on memory.
    for (offset, size, expected) in [
        (0, PLUGGED + BLOCK, State::Plugged),
        (PLUGGED + BLOCK, REGION - PLUGGED - BLOCK, State::Unplugged),
        (PLUGGED, 2 * BLOCK, State::Mixed),
    ] {
        let answered = to.vmm.tell(Command::AskState { offset, size }).unwrap();
        assert_eq!(answered.state, Some(expected), "{offset:#x}");
    }
    // It is zeros at once: no page is waited for.
    let page = to.vmm.tell(Command::Look { offset: PLUGGED, size: BLOCK }).unwrap();
    assert_eq!(page.lost, None);
    assert!(relay.is_holding());
    let report = to.vmm.migration().unwrap();
    assert_eq!(report.status, "postcopy-active", "{report:?}");
    relay.hold_after(u64::from(u32::MAX));
    assert_moved(&mut from, &mut to);
    assert_plugs(&mut to);
    to.vmm.quit().unwrap();
}

#[test]
fn a_guest_shrinks_and_grows_while_its_memory_arrives_and_nothing_unplugged_holds_memory() {
    let (mut from, mut to, relay) = on_the_way(false);
    // Memory comes a little at a time, so that no vCPU is kept from leaving what is unplugged.
    thread::scope(|scope| {
        let drips = scope.spawn(|| {
            for _ in 0..128 {
                relay.hold_after(TOUCHED / 256);
                thread::sleep(Duration::from_millis(10));
            }
            relay.hold_after(u64::from(u32::MAX));
        });
        for requested in [PLUGGED - TOUCHED / 4, PLUGGED + BLOCK, PLUGGED / 2] {
            assert!(to.daemon.api().resize(requested).unwrap().is_success());
            let report = to.vmm.tell(Command::Settle { requested }).unwrap();
            assert_eq!(report.lost, None);
        }
        drips.join().unwrap();
    });
    assert_moved(&mut from, &mut to);
    let report = to.vmm.report().unwrap();
    assert_eq!((report.plugged, report.resident), (PLUGGED / 2, TOUCHED / 2), "{report:?}");
    assert!(report.healthy, "{report:?}");
    to.vmm.quit().unwrap();
}

#[test]
fn a_device_that_serves_before_all_memory_has_arrived_outlives_a_broken_channel() {
    let (mut from, mut to, relay) = on_the_way(true);
    grow(&mut to);
    drop(relay);
    assert_completed(&mut from);
    assert_eq!(assert_completed(&mut to).recoveries, 1);
    from.assert_no_guest();
    assert_plugs(&mut to);
    to.vmm.quit().unwrap();
}

#[test]
fn a_daemon_whose_memory_never_arrives_ends_when_it_is_told() {
    let (mut from, mut to, relay) = on_the_way(false);
    from.vmm.kill();
    drop(relay);
    let status = to.daemon.terminate(PATIENCE).unwrap();
    assert!(status.success(), "{status}: {}", to.daemon.stderr());
}

/// The destination's daemon was killed while memory is held back; before it is started again.
fn killed_on_the_way() -> (Host, Host, Relay) {
    let (from, mut to, relay) = on_the_way(false);
    grow(&mut to);
    to.vmm.tell(Command::Detach).unwrap();
    to.daemon.kill().unwrap();
    (from, to, relay)
}

#[test]
fn a_daemon_that_is_started_again_in_postcopy_waits_for_pages_as_the_one_before() {
    let (mut from, mut to, relay) = killed_on_the_way();
    to.daemon.restart().unwrap();
    to.vmm.tell(Command::Reconnect).unwrap();
    assert!(to.daemon.wait_logged(ADVISED, PATIENCE), "{}", to.daemon.stderr());
    // It has what was plugged, and is followed again: more is plugged before all has arrived.
    let answered = to.vmm.tell(Command::AskState { offset: 0, size: PLUGGED + BLOCK }).unwrap();
    assert_eq!((answered.state, &answered.lost), (Some(State::Plugged), &None));
    assert!(to.daemon.api().resize(PLUGGED + 2 * BLOCK).unwrap().is_success());
    let report = to.vmm.tell(Command::Settle { requested: PLUGGED + 2 * BLOCK }).unwrap();
    assert_eq!((report.lost, report.blocks_stay), (None, None));
    // It is zeros at once.
    to.vmm.tell(Command::Look { offset: PLUGGED, size: 2 * BLOCK }).unwrap();
    assert!(relay.is_holding());
    assert_eq!(to.vmm.migration().unwrap().status, "postcopy-active");
    relay.hold_after(u64::from(u32::MAX));
    assert_moved(&mut from, &mut to);
    assert_plugs(&mut to);
    // What it has looked at is there, too.
    assert_eq!(to.vmm.report().unwrap().resident, TOUCHED + 2 * BLOCK);
    to.vmm.quit().unwrap();
}

#[test]
fn a_daemon_that_has_other_blocks_when_it_is_started_again_is_busy_until_all_has_arrived() {
    let (mut from, mut to, relay) = killed_on_the_way();
    let reason = to.vmm.report().unwrap().blocks_stay;
    assert!(reason.is_some(), "nothing is followed while there is no daemon");
    to.daemon.restart().unwrap();
    // As many blocks, of which the guest knows one, and the device another.
    let stream = UnixStream::connect(to.daemon.discard_socket()).unwrap();
    let client = RemoteRamDiscardManager::attach(stream, PATIENCE).unwrap();
    for (offset, state) in
        [(PLUGGED, MemoryState::Discarded), (REGION - BLOCK, MemoryState::Populated)]
    {
        client.follow_source(Section::new(offset, BLOCK).unwrap(), state).unwrap();
    }
    let report = to.vmm.tell(Command::Reconnect).unwrap();
    let reason = report.blocks_stay.unwrap();
    assert!(reason.starts_with("the daemon has other blocks than its guest"), "{reason}");
    wait_busy(&mut to);
    assert!(relay.is_holding());
    relay.hold_after(u64::from(u32::MAX));
    assert_moved(&mut from, &mut to);
    assert_plugs(&mut to);
    let report = to.vmm.report().unwrap();
    assert_eq!((report.resident, report.blocks_stay), (TOUCHED, None));
    to.vmm.quit().unwrap();
}

#[test]
fn a_daemon_that_cannot_wait_for_pages_gets_no_memory_before_all_has_arrived() {
    let (mut from, mut to, relay) = killed_on_the_way();
    to.daemon.options_mut().more.retain(|arg| arg != "--postcopy");
    to.daemon.restart().unwrap();
    let error = to.vmm.tell(Command::Reconnect).unwrap_err().to_string();
    assert!(error.starts_with("memory is outstanding"), "{error}");
    relay.hold_after(u64::from(u32::MAX));
    assert_moved(&mut from, &mut to);
    // The guest has run on without it, and lost nothing.
    to.assert_guest_runs();
    to.vmm.tell(Command::Reconnect).unwrap();
    assert_plugs(&mut to);
    to.vmm.quit().unwrap();
}

#[test]
fn a_daemon_that_is_gone_when_all_memory_has_arrived_is_no_reason_to_fail() {
    let (mut from, mut to, relay) = killed_on_the_way();
    relay.hold_after(u64::from(u32::MAX));
    assert_completed(&mut from);
    assert_completed(&mut to);
    to.assert_guest_runs();
    to.daemon.restart().unwrap();
    to.vmm.tell(Command::Reconnect).unwrap();
    assert_plugs(&mut to);
    to.vmm.quit().unwrap();
}

/// An attempt that fails when the daemon over there has memory that was to arrive: it is reset after its blocks came.
fn fail_after_listen(from: &mut Host, to: &mut Host) {
    let address = to.listen_in_postcopy();
    let postcopy = Some(PostcopyOptions { when: When::Told, recover: None });
    let max_bandwidth = Some(TOUCHED / 8);
    from.begin(MigrateOptions { max_bandwidth, postcopy, ..to_address(&address) });
    let plugged = |to: &Host| to.daemon.api().device().unwrap()["plugged_size"].clone();
    wait_until("its blocks do not come", || plugged(to) == PLUGGED);
    assert!(to.daemon.api().system_reset().unwrap().is_success());
    from.vmm.tell(Command::StartPostcopy).unwrap();
    assert_eq!(from.outcome().status, "failed");
    let error = to.outcome().error_desc.unwrap();
    assert!(error.contains("blocks were changed while memory came"), "{error}");
    assert!(to.daemon.wait_logged(ADVISED, PATIENCE), "{}", to.daemon.stderr());
}

#[test]
fn a_daemon_that_starts_itself_anew_for_another_attempt_is_followed_from_its_beginning() {
    let (mut from, mut to) = (Host::with_guest(), Host::waiting_with_pagefault());
    fail_after_listen(&mut from, &mut to);
    from.assert_guest_works();
    let relay = send_over(&mut from, &mut to, false);
    assert!(to.daemon.wait_logged("starting anew", PATIENCE), "{}", to.daemon.stderr());
    grow(&mut to);
    relay.hold_after(u64::from(u32::MAX));
    assert_moved(&mut from, &mut to);
    assert_plugs(&mut to);
    to.vmm.quit().unwrap();
}

#[test]
fn a_guest_restored_lazily_shares_its_memory_with_a_daemon_that_waits_for_it() {
    let (mut from, mut to) = (Host::with_guest(), Host::waiting_with_pagefault());
    let file = from.daemon.socket().with_file_name("snapshot");
    from.vmm.tell(Command::Snapshot { file: file.clone(), background: true }).unwrap();
    assert_completed(&mut from);
    to.vmm.tell(Command::Restore { file, lazy: true }).unwrap();
    assert!(to.daemon.wait_logged(ADVISED, PATIENCE), "{}", to.daemon.stderr());
    assert!(assert_completed(&mut to).faults.is_some());
    to.assert_guest_works();
    let resident = to.vmm.report().unwrap().resident;
    assert!((TOUCHED..TOUCHED + MIB).contains(&resident), "{resident:#x}");
    to.vmm.quit().unwrap();
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

/// A guest that is to wait, whose ring is on the way when the channel breaks. Where the destination
/// waits, and where the source looks for it.
fn paused_without_its_ring(from: &mut Host, to: &mut Host) -> (String, String) {
    let address = to.listen_in_postcopy();
    let relay = relay(to, &address);
    let later = to.daemon.socket().with_file_name("later.sock");
    let later = format!("unix:{}", later.display());
    relay.hold_after(512);
    from.go_first(relay.address(), Some(later.clone()));
    // The devices go first; less than a page at a time, so that none comes with them.
    let start = Instant::now();
    while to.vmm.migration().unwrap().status != "postcopy-active" {
        assert!(start.elapsed() < PATIENCE, "the devices do not arrive");
        if relay.is_holding() {
            relay.hold_after(512);
        }
        thread::sleep(Duration::from_millis(4));
    }
    from.wait_status("postcopy-active");
    drop(relay);
    for host in [from, &mut *to] {
        host.wait_status("postcopy-paused");
    }
    assert!(!has_ring(to), "the ring has arrived already");
    (address, later)
}

/// Whether the page of boot memory with the ring has arrived.
fn has_ring(host: &mut Host) -> bool {
    let report = host.vmm.report().unwrap();
    let path = format!("/proc/{}/fd/{}", host.vmm.pid(), report.memory.unwrap()[0]);
    let boot = File::open(path).unwrap();
    !data_ranges(&boot, 0x1000..0x2000).unwrap().is_empty()
}

#[test]
fn a_daemon_that_waits_for_a_page_gets_it_over_a_channel_that_is_recovered() {
    let (mut from, mut to) = (Host::with_guest(), Host::paused_with_pagefault());
    let (address, later) = paused_without_its_ring(&mut from, &mut to);
    let recovering = thread::spawn(move || {
        thread::sleep(Duration::from_millis(50));
        Relay::start(&later, &address).unwrap()
    });
    // Which sets the ring up: the daemon reads it for that.
    to.vmm.tell(Command::Cont).unwrap();
    assert!(has_ring(&mut to), "the daemon did not wait for the ring");
    let _relay = recovering.join().unwrap();
    assert_completed(&mut from);
    assert_eq!(assert_completed(&mut to).recoveries, 1);
    from.assert_no_guest();
    to.assert_guest_works();
    to.vmm.quit().unwrap();
}

#[test]
fn a_daemon_that_is_started_again_before_the_guest_runs_waits_for_the_ring() {
    let (mut from, mut to) = (Host::with_guest(), Host::paused_with_pagefault());
    let (address, later) = paused_without_its_ring(&mut from, &mut to);
    to.vmm.tell(Command::Detach).unwrap();
    to.daemon.restart().unwrap();
    to.vmm.tell(Command::Reconnect).unwrap();
    let recovering = thread::spawn(move || {
        thread::sleep(Duration::from_millis(50));
        Relay::start(&later, &address).unwrap()
    });
    let continued = to.vmm.tell(Command::Cont).unwrap();
    assert_eq!(continued.lost, None);
    assert!(has_ring(&mut to), "the daemon did not wait for the ring");
    let _relay = recovering.join().unwrap();
    assert_moved(&mut from, &mut to);
    to.assert_guest_works();
    to.vmm.quit().unwrap();
}

#[test]
fn a_daemon_that_waits_for_a_page_of_a_dead_source_ends_when_it_is_told() {
    let (mut from, mut to) = (Host::with_guest(), Host::paused_with_pagefault());
    paused_without_its_ring(&mut from, &mut to);
    from.vmm.kill();
    let Host { vmm, daemon } = &mut to;
    thread::scope(|scope| {
        let continued = scope.spawn(|| vmm.tell(Command::Cont));
        thread::sleep(Duration::from_millis(50));
        let status = daemon.terminate(PATIENCE).unwrap();
        assert!(status.success(), "{status}: {}", daemon.stderr());
        // The guest has waited for its ring, which the daemon did not set up.
        let report = continued.join().unwrap().unwrap();
        assert!(report.lost.is_some(), "{report:?}");
    });
}
