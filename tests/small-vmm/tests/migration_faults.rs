//! Whatever breaks during a migration: the guest runs on exactly one side with all of its memory,
//! block state is not frozen, the reason is told, and the next attempt works.

mod common;

use std::thread;
use std::time::Duration;

use small_vmm::guest::Command;
use small_vmm::migration::{MigrateOptions, MigrationReport};

use common::relay::Relay;
use common::{BLOCK, Host, PATIENCE, PLUGGED, TOUCHED, to_address};

/// Slow enough that something can happen in the middle: several seconds for what there is.
const SLOW: Option<u64> = Some(TOUCHED / 8);

impl Host {
    /// Waits until memory is being sent.
    fn wait_active(&mut self) {
        let start = std::time::Instant::now();
        loop {
            let report = self.vmm.migration().unwrap();
            assert!(!report.over && start.elapsed() < PATIENCE, "{report:?}");
            if report.status == "active" && report.ram.transferred > TOUCHED / 16 {
                return;
            }
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// The guest is still here, unharmed, and its device is not frozen.
    fn assert_failed_and_works(&mut self, wanted: &str) {
        let report = self.outcome();
        assert_eq!(report.status, wanted, "{report:?}");
        assert!(report.error_desc.is_some_and(|error| !error.is_empty()));
        self.assert_guest_works();
        assert_eq!(self.daemon.api().device().unwrap()["migration_active"], false);
    }
}

/// Moves the guest, which must work.
fn migrate(from: &mut Host, to: &mut Host) -> MigrationReport {
    let address = to.listen();
    from.migrate(&address);
    let report = from.outcome();
    assert_eq!(report.status, "completed", "{report:?}");
    assert_eq!(to.outcome().status, "completed");
    from.assert_no_guest();
    to.assert_guest_works();
    report
}

#[test]
fn a_channel_that_breaks_leaves_the_guest_here_and_the_same_two_try_again() {
    let (mut from, mut to) = (Host::with_guest(), Host::waiting());
    // With a minute to stand still, the guest is stopped as soon as it is known how fast memory is
    // sent: after the first tenth of a second, so with most of it still to come.
    const MINUTE: Option<u64> = Some(60_000);
    for (limit, downtime_limit) in [
        // In the header, the early section, the list of blocks, and the pages.
        (1, None),
        (100, None),
        (400, None),
        (TOUCHED / 4, None),
        // While the guest stands still: in the pages and in what follows them.
        (TOUCHED * 3 / 4, MINUTE),
        (TOUCHED + 0x1_0000, MINUTE),
    ] {
        let address = to.listen();
        let relay = Relay::start(&address, limit);
        let max_bandwidth = Some(2 * TOUCHED);
        from.begin(MigrateOptions {
            max_bandwidth,
            downtime_limit,
            ..to_address(&relay.address())
        });
        from.assert_failed_and_works("failed");
        assert_eq!(relay.join(), limit);
        let there = to.outcome();
        assert_eq!(there.status, "failed", "{there:?}");
        to.assert_no_guest();
    }
    migrate(&mut from, &mut to);
}

#[test]
fn a_source_that_is_killed_takes_its_guest_with_it_and_another_may_come() {
    let (mut from, mut to) = (Host::with_guest(), Host::waiting());
    let address = to.listen();
    from.migrate_at(&address, SLOW);
    from.wait_active();
    from.vmm.kill();
    let report = to.outcome();
    assert_eq!(report.status, "failed", "{report:?}");
    to.assert_no_guest();
    // Its daemon is not frozen by a client that is dead.
    wait_thawed(&from);
    migrate(&mut Host::with_guest(), &mut to);
}

fn wait_thawed(host: &Host) {
    let start = std::time::Instant::now();
    while host.daemon.api().device().unwrap()["migration_active"] == true {
        assert!(start.elapsed() < PATIENCE);
        thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_destination_that_is_killed_leaves_the_guest_here() {
    let (mut from, mut to) = (Host::with_guest(), Host::waiting());
    let address = to.listen();
    from.migrate_at(&address, SLOW);
    from.wait_active();
    to.vmm.kill();
    from.assert_failed_and_works("failed");
    migrate(&mut from, &mut Host::waiting());
}

#[test]
fn a_daemon_that_is_killed_at_the_destination_leaves_the_guest_here() {
    let (mut from, mut to) = (Host::with_guest(), Host::waiting());
    let address = to.listen();
    from.migrate_at(&address, SLOW);
    from.wait_active();
    to.daemon.kill().unwrap();
    // As fast as it goes from here on: what is wrong shows at the end.
    from.assert_failed_and_works("failed");
    let report = to.outcome();
    let error = report.error_desc.unwrap();
    assert!(error.contains("the daemon is lost") && error.contains("closed"), "{error}");
    to.assert_no_guest();
    migrate(&mut from, &mut Host::waiting());
}

#[test]
fn a_daemon_that_is_killed_at_the_source_takes_the_device_and_not_the_guest() {
    let (mut from, mut to) = (Host::with_guest(), Host::waiting());
    let address = to.listen();
    from.migrate_at(&address, SLOW);
    from.wait_active();
    from.daemon.kill().unwrap();
    let report = from.outcome();
    assert_eq!(report.status, "failed", "{report:?}");
    from.assert_guest_runs();
    assert_eq!(to.outcome().status, "failed");
    to.assert_no_guest();
    assert!(from.vmm.report().unwrap().lost.is_some());
}

#[test]
fn cancelled_the_guest_runs_on_and_another_attempt_works() {
    let (mut from, mut to) = (Host::with_guest(), Host::waiting());
    let address = to.listen();
    from.migrate_at(&address, SLOW);
    from.wait_active();
    from.vmm.tell(Command::Cancel).unwrap();
    from.assert_failed_and_works("cancelled");
    assert_eq!(to.outcome().status, "failed");
    to.assert_no_guest();
    migrate(&mut from, &mut to);
}

#[test]
fn nobody_to_connect_to_is_told_at_once() {
    let mut from = Host::with_guest();
    let nowhere = from.daemon.socket().with_file_name("nowhere");
    from.migrate(&format!("unix:{}", nowhere.display()));
    let report = from.outcome();
    assert_eq!(report.status, "failed");
    let error = report.error_desc.unwrap();
    assert!(error.contains("cannot connect to unix:") && error.contains("nowhere"), "{error}");
    from.assert_guest_works();
}

#[test]
fn what_is_asked_of_the_guest_while_block_state_is_frozen_waits_and_is_done_by_whoever_has_it_then()
{
    let (mut from, mut to) = (Host::with_guest(), Host::waiting());
    let more = PLUGGED + 4 * BLOCK;
    // Cancelled: here.
    let address = to.listen();
    from.begin(frozen_and_slow(&address));
    from.wait_active();
    assert!(from.daemon.api().resize(more).unwrap().is_success());
    wait_busy(&mut from, 1);
    assert_eq!(from.vmm.report().unwrap().plugged, PLUGGED);
    from.vmm.tell(Command::Cancel).unwrap();
    from.vmm.tell(Command::Settle { requested: more }).unwrap();
    to.outcome();

    // Completed: there, where the driver goes on by itself.
    let busy = from.vmm.report().unwrap().busy;
    let address = to.listen();
    from.begin(frozen_and_slow(&address));
    from.wait_active();
    assert!(from.daemon.api().resize(PLUGGED).unwrap().is_success());
    wait_busy(&mut from, busy + 1);
    assert_eq!(from.vmm.report().unwrap().plugged, more);
    assert_eq!(from.outcome().status, "completed");
    to.vmm.tell(Command::Settle { requested: PLUGGED }).unwrap();
    to.assert_guest_works();
}

/// A migration with block state frozen from its beginning.
fn frozen_and_slow(to: &str) -> MigrateOptions {
    let downtime_limit = Some(60_000);
    MigrateOptions { max_bandwidth: SLOW, downtime_limit, elastic: false, ..to_address(to) }
}

/// Waits until the device has said so often that it is busy.
fn wait_busy(host: &mut Host, times: u64) {
    let start = std::time::Instant::now();
    while host.vmm.report().unwrap().busy < times {
        assert!(start.elapsed() < PATIENCE);
        thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_client_that_freezes_block_state_and_dies_freezes_nothing_any_more() {
    use ram_discard::{FreezeFor, RamDiscardManager};
    use std::os::unix::net::UnixStream;
    use virtio_mem::discard_channel::RemoteRamDiscardManager;

    let mut host = Host::with_guest();
    let stream = UnixStream::connect(host.daemon.discard_socket()).unwrap();
    let client = RemoteRamDiscardManager::attach(stream, PATIENCE).unwrap();
    let frozen = client.freeze(FreezeFor::Source).unwrap();
    let more = PLUGGED + BLOCK;
    assert!(host.daemon.api().resize(more).unwrap().is_success());
    wait_busy(&mut host, 1);
    assert_eq!(host.vmm.report().unwrap().plugged, PLUGGED);
    drop(client);
    host.vmm.tell(Command::Settle { requested: more }).unwrap();
    assert!(frozen.check().is_err());
    migrate(&mut host, &mut Host::waiting());
}
