//! A guest grows and shrinks while it migrates, and whatever breaks then: it is on exactly one side with all of its
//! memory, and both devices have the blocks that it has.

mod common;

use std::thread;
use std::time::{Duration, Instant};

use small_vmm::guest::Command;

use common::{BLOCK, Host, PATIENCE, PLUGGED, TOUCHED};

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
        self.vmm.tell(Command::Settle { requested }).unwrap();
    }

    fn blocks(&self) -> serde_json::Value {
        self.daemon.api().get("/v1/device/blocks").unwrap().json()
    }
}

#[test]
fn a_guest_grows_and_shrinks_while_it_migrates() {
    let (mut from, mut to) = (Host::with_guest(), Host::waiting());
    let address = to.listen();
    let before = from.vmm.report().unwrap();
    from.migrate_at(&address, SLOW);
    from.wait_followed();
    from.resize(PLUGGED + 8 * BLOCK);
    from.vmm.tell(Command::Touch { offset: PLUGGED, size: 2 * BLOCK }).unwrap();
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
