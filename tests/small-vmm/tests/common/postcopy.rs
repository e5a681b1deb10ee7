//! Migrations in postcopy, part of whose memory is held back.

use std::thread;
use std::time::{Duration, Instant};

use small_vmm::migration::{MigrateOptions, MigrationReport, PostcopyOptions, When};
use small_vmm::relay::Relay;

use super::{Host, PATIENCE, to_address};

impl Host {
    /// Has it wait for a guest that comes before its memory.
    pub fn listen_in_postcopy(&mut self) -> String {
        let path = self.daemon.socket().with_file_name("migrate.sock");
        self.vmm.wait_for_guest_in_postcopy(&format!("unix:{}", path.display())).unwrap()
    }

    /// Sends the guest away before any of its memory.
    pub fn go_first(&mut self, to: &str, recover: Option<String>) {
        let postcopy = Some(PostcopyOptions { when: When::AtOnce, recover });
        self.begin(MigrateOptions { postcopy, ..to_address(to) });
    }

    /// Waits until the migration stands there.
    pub fn wait_status(&mut self, wanted: &str) {
        let start = Instant::now();
        loop {
            let report = self.vmm.migration().unwrap();
            if report.status == wanted {
                return;
            }
            assert!(!report.over && start.elapsed() < PATIENCE, "{wanted}: {report:?}");
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Stands between a source and where `to` waits.
pub fn relay(to: &Host, address: &str) -> Relay {
    let path = to.daemon.socket().with_file_name("relay.sock");
    Relay::start(&format!("unix:{}", path.display()), address).unwrap()
}

/// Waits until the guest runs over there, and part of its memory is held back.
pub fn wait_on_the_way(from: &mut Host, relay: &Relay) {
    from.wait_status("postcopy-active");
    let start = Instant::now();
    while !relay.is_holding() {
        assert!(start.elapsed() < PATIENCE);
        thread::sleep(Duration::from_millis(1));
    }
}

/// The migration has ended well.
pub fn assert_completed(host: &mut Host) -> MigrationReport {
    let report = host.outcome();
    assert_eq!(report.status, "completed", "{report:?}");
    report
}

/// Waits until both sides have completed, and checks that the guest is no longer at the first.
pub fn assert_moved(from: &mut Host, to: &mut Host) {
    assert_completed(from);
    assert_completed(to);
    from.assert_no_guest();
}
