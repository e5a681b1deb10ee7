//! A guest grows and shrinks while it migrates, and whatever breaks then: it is on exactly one side with all of its
//! memory, and both devices have the blocks that it has.

mod common;

use std::os::unix::net::UnixStream;
use std::process::{Command, Output};
use std::thread;
use std::time::{Duration, Instant};

use ram_discard::test_utils::{Calls, Recorder};
use ram_discard::{RamDiscardManager, Section};
use small_vmm::guest::Command as Tell;
use virtio_mem::discard_channel::RemoteRamDiscardManager;

use common::{BLOCK, Host, PATIENCE, PLUGGED, TOUCHED, daemon_binary, small_vmm};

/// Slow enough that something can happen in the middle: several seconds for what there is.
const SLOW: Option<u64> = Some(TOUCHED / 8);

impl Host {
    /// Waits until block state may change.
    fn wait_followed(&mut self) {
        let start = Instant::now();
        loop {
            let report = self.vmm.migration().unwrap();
            assert!(!report.over, "{report:?}");
            if report.status == "active" && !self.is_frozen() {
                return;
            }
            assert!(start.elapsed() < PATIENCE, "block state stays frozen: {report:?}");
            thread::sleep(Duration::from_millis(2));
        }
    }

    fn is_frozen(&self) -> bool {
        self.daemon.api().device().unwrap()["migration_active"] == true
    }

    /// Resizes the guest, which does it.
    fn resize(&mut self, requested: u64) {
        assert!(self.daemon.api().resize(requested).unwrap().is_success());
        self.vmm.tell(Tell::Settle { requested }).unwrap();
    }

    /// A client of its daemon that refuses what is populated at `offset`.
    fn refuse_at(&self, offset: u64) -> RemoteRamDiscardManager {
        let stream = UnixStream::connect(self.daemon.discard_socket()).unwrap();
        let client = RemoteRamDiscardManager::attach(stream, PATIENCE).unwrap();
        let section = Section::new(offset, BLOCK).unwrap();
        let refuser = Recorder::refusing("refuser", &Calls::default(), section, "pinned elsewhere");
        client.register(section, refuser).unwrap();
        client
    }

    fn blocks(&self) -> serde_json::Value {
        self.daemon.api().get("/v1/device/blocks").unwrap().json()
    }
}

/// A guest on its way, slowly, whose block state may change.
fn moving() -> (Host, Host) {
    let (mut from, mut to) = (Host::with_guest(), Host::waiting());
    let address = to.listen();
    from.migrate_at(&address, SLOW);
    from.wait_followed();
    (from, to)
}

#[test]
fn a_guest_grows_and_shrinks_while_it_migrates() {
    let (mut from, mut to) = (Host::with_guest(), Host::waiting());
    let address = to.listen();
    let before = from.vmm.report().unwrap();
    from.migrate_at(&address, SLOW);
    from.wait_followed();
    from.resize(PLUGGED + 8 * BLOCK);
    from.vmm.tell(Tell::Touch { offset: PLUGGED, size: 2 * BLOCK }).unwrap();
    assert_eq!(to.blocks(), from.blocks(), "the daemon over there follows");
    // Also what was written before, and what was plugged meanwhile.
    from.resize(PLUGGED - 2 * BLOCK);
    from.resize(PLUGGED + 4 * BLOCK);
    let report = from.vmm.report().unwrap();
    let migration = report.migration.unwrap();
    assert_eq!(migration.status, "active", "too late: {migration:?}");
    assert!(report.served >= before.served + 3, "{} before {}", report.served, before.served);
    assert_eq!(report.busy, before.busy);
    let outcome = from.outcome();
    assert_eq!(outcome.status, "completed", "{outcome:?}");
    let arrived = to.outcome();
    assert_eq!(arrived.status, "completed", "{arrived:?}");
    assert_eq!(to.blocks(), from.blocks());
    assert_eq!(to.vmm.report().unwrap().plugged, PLUGGED + 4 * BLOCK);
    from.assert_no_guest();
    to.assert_guest_works();
}

#[test]
fn what_the_daemon_over_there_refuses_is_busy_here_and_the_rest_is_done() {
    let (mut from, mut to) = moving();
    let before = from.vmm.report().unwrap();
    let client = to.refuse_at(PLUGGED + 4 * BLOCK);
    assert!(from.daemon.api().resize(PLUGGED + 8 * BLOCK).unwrap().is_success());
    let start = Instant::now();
    while from.vmm.report().unwrap().busy == before.busy {
        assert!(start.elapsed() < PATIENCE, "nothing is refused");
        thread::sleep(Duration::from_millis(2));
    }
    let report = from.vmm.report().unwrap();
    assert_eq!((report.plugged, report.served), (PLUGGED, before.served));
    assert_eq!(to.blocks(), from.blocks());
    from.resize(PLUGGED + 4 * BLOCK);
    assert_eq!(from.vmm.migration().unwrap().status, "active", "too late");
    assert_eq!(to.blocks(), from.blocks());
    assert_eq!(from.outcome().status, "completed");
    assert_eq!(to.outcome().status, "completed");
    assert_eq!(to.blocks(), from.blocks());
    assert_eq!(client.lost(), None);
    drop(client);
    to.assert_guest_works();
}

#[test]
fn a_daemon_that_is_killed_over_there_leaves_the_guest_here_with_what_it_has_by_then() {
    let (mut from, mut to) = moving();
    from.resize(PLUGGED + 2 * BLOCK);
    to.daemon.kill().unwrap();
    // What it would have to populate is refused from here on; what is discarded is found out at the end.
    from.resize(PLUGGED - 2 * BLOCK);
    let outcome = from.outcome();
    assert_eq!(outcome.status, "failed", "{outcome:?}");
    assert_eq!(to.outcome().status, "failed");
    to.assert_no_guest();
    from.assert_guest_works();
    assert!(!from.is_frozen());
    let mut third = Host::waiting();
    let address = third.listen();
    from.migrate(&address);
    assert_eq!(from.outcome().status, "completed");
    assert_eq!(third.outcome().status, "completed");
    assert_eq!(third.blocks(), from.blocks());
    third.assert_guest_works();
}

#[test]
fn a_vmm_that_is_killed_over_there_leaves_a_daemon_for_another() {
    let (mut from, mut to) = moving();
    from.resize(PLUGGED + 2 * BLOCK);
    to.vmm.kill();
    assert_eq!(from.outcome().status, "failed");
    from.assert_guest_works();
    from.resize(PLUGGED - 2 * BLOCK);
    // Its daemon has blocks of a guest that never came.
    to.restart_vmm();
    assert_ne!(to.blocks(), from.blocks());
    let address = to.listen();
    from.migrate(&address);
    assert_eq!(from.outcome().status, "completed");
    assert_eq!(to.outcome().status, "completed");
    assert_eq!(to.blocks(), from.blocks());
    to.assert_guest_works();
}

#[test]
fn a_channel_that_breaks_leaves_a_daemon_over_there_without_blocks() {
    let (mut from, mut to) = (Host::with_guest(), Host::waiting());
    let nothing = to.blocks();
    let address = to.listen();
    from.migrate_at(&address, SLOW);
    from.wait_followed();
    from.resize(PLUGGED + 2 * BLOCK);
    from.vmm.tell(Tell::Cancel).unwrap();
    assert_eq!(from.outcome().status, "cancelled");
    assert_eq!(to.outcome().status, "failed");
    assert_eq!(to.blocks(), nothing);
    from.assert_guest_works();
}

#[test]
fn a_daemon_that_is_killed_here_fails_the_migration_and_takes_the_device_and_not_the_guest() {
    let (mut from, mut to) = moving();
    from.resize(PLUGGED + 2 * BLOCK);
    from.daemon.kill().unwrap();
    let outcome = from.outcome();
    assert_eq!(outcome.status, "failed", "{outcome:?}");
    from.assert_guest_runs();
    assert_eq!(to.outcome().status, "failed");
    to.assert_no_guest();
}

#[test]
fn a_daemon_that_is_reset_over_there_keeps_the_guest_here() {
    let (mut from, mut to) = moving();
    from.resize(PLUGGED + 2 * BLOCK);
    let reset = to.daemon.api().system_reset().unwrap();
    assert!(reset.is_success(), "{}", reset.text);
    assert_eq!(from.outcome().status, "failed");
    let error = to.outcome().error_desc.unwrap();
    assert!(error.contains("blocks were changed while memory came"), "{error}");
    to.assert_no_guest();
    from.assert_guest_works();
}

fn demo(arguments: &[&str]) -> Output {
    let mut demo = Command::new(small_vmm());
    demo.args(["demo", "--resize", "--region-size", "128M", "--daemon"]).arg(daemon_binary());
    demo.args(arguments).output().unwrap()
}

/// The number in a row of the demonstration's table.
fn number(output: &Output, row: &str) -> u64 {
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().find(|line| line.starts_with(row));
    line.and_then(|line| line.split_whitespace().last()?.parse().ok())
        .unwrap_or_else(|| panic!("no {row:?} in {text}"))
}

#[test]
fn the_demonstration_resizes_a_guest_that_moves_and_finds_every_number_right() {
    let over_channels = &["--channels", "2", "--compress", "zstd"];
    for arguments in [&[] as &[&str], &["--tls"], over_channels, &["--tcp", "--postcopy"]] {
        let shown = demo(arguments);
        let wrong = String::from_utf8_lossy(&shown.stderr);
        assert!(shown.status.success(), "{arguments:?}: {wrong}");
        assert_eq!(number(&shown, "resizes while it moved"), 8);
        assert!(number(&shown, "guest requests served") >= 8);
        assert_eq!(number(&shown, "answered with BUSY"), 0);
    }
}

#[test]
fn the_demonstration_refuses_what_does_not_go_with_resizes() {
    for arguments in [&["--snapshot"], &["--break-channel"]] {
        let refused = demo(arguments);
        assert!(!refused.status.success());
        let why = String::from_utf8_lossy(&refused.stderr);
        assert!(why.contains("--resize goes with --tcp, --channels,"), "{why}");
    }
}

#[test]
fn a_guest_is_resized_while_it_is_saved_in_the_background_and_goes_on_from_the_file() {
    let mut from = Host::with_guest();
    let (less, more) = (PLUGGED, PLUGGED + 4 * BLOCK);
    // An image may be whole before the guest has heard of the resize.
    for attempt in 0.. {
        assert!(attempt < 50, "no image took as long as a resize");
        let file = from.daemon.socket().with_file_name(format!("image-{attempt}"));
        from.vmm.tell(Tell::Snapshot { file: file.clone(), background: true }).unwrap();
        assert!(from.daemon.api().resize(more).unwrap().is_success());
        let meanwhile = loop {
            let report = from.vmm.report().unwrap();
            let over = report.migration.unwrap().over;
            if over || report.plugged == more {
                break !over;
            }
        };
        let saved = from.outcome();
        assert_eq!(saved.status, "completed", "{saved:?}");
        from.vmm.tell(Tell::Settle { requested: more }).unwrap();
        if meanwhile {
            let mut to = Host::waiting();
            to.vmm.tell(Tell::Restore { file, lazy: false }).unwrap();
            assert_eq!(to.outcome().status, "completed");
            let plugged = to.vmm.report().unwrap().plugged;
            assert!(plugged == less || plugged == more, "{plugged:#x}");
            to.assert_guest_works();
            break;
        }
        std::fs::remove_file(file).unwrap();
        from.resize(less);
    }
    from.assert_guest_works();
}
