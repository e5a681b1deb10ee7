//! QEMU's side of a save, by its control socket.

use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;

use super::session::Session;
use crate::cli::report::Report;
use crate::error::PagerError;
use crate::qmp::Qmp;
use crate::qmp::migration::{Capabilities, Migration};
use crate::run::Run;
use crate::socket::Address;

/// Between two looks at the migration.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// For each of the last words with QEMU.
const PATIENCE: Duration = Duration::from_secs(5);

/// With a return path QEMU learns whether the guest is saved, and lets it run on if it is not. The others
/// are for files, or leave memory out.
const CAPABILITIES: [(&str, bool); 4] = [
    ("return-path", true),
    ("mapped-ram", false),
    ("x-ignore-shared", false),
    ("background-snapshot", false),
];

/// A QEMU that is to be saved.
pub(super) struct Drive {
    qmp: Qmp,
    capabilities: Capabilities,
    recovers: bool,
}

impl Drive {
    /// Sets QEMU up; for a recovery it is as it was.
    pub fn prepare(
        path: &Path,
        run: &Arc<Run>,
        report: &Report,
        recovers: bool,
    ) -> Result<Self, PagerError> {
        let mut qmp = Qmp::connect(path, run, report)?;
        let capabilities = match recovers {
            true => Capabilities::default(),
            false => Capabilities::set(&mut qmp, &CAPABILITIES)?,
        };
        Ok(Self { qmp, capabilities, recovers })
    }

    /// Has QEMU migrate to `address`.
    pub fn start(&mut self, address: &Address) -> Result<(), PagerError> {
        let address = match address {
            // QEMU's folder is another.
            Address::Unix(path) => {
                let path = std::path::absolute(path);
                Address::Unix(path.map_err(PagerError::system("find the current folder"))?)
            }
            Address::Tcp(_) => address.clone(),
        };
        let mut arguments = json!({ "uri": address.to_string() });
        if self.recovers {
            arguments["resume"] = true.into();
        }
        self.qmp.execute("migrate", &arguments).map(drop)
    }

    /// Looks at QEMU's migration while it lasts; tells the session if it fails there, and has one that was told to
    /// pause before the end continue.
    pub fn watch(&mut self, session: &Session, is_over: &dyn Fn() -> bool) {
        while !is_over() {
            match Migration::query(&mut self.qmp) {
                Ok(migration) if migration.has_failed() => {
                    return session.fail(migration.failure());
                }
                Ok(migration) if migration.status == "pre-switchover" => {
                    let state = json!({ "state": "pre-switchover" });
                    let _ = self.qmp.execute("migrate-continue", &state);
                }
                // QEMU may be too busy to answer; the stream tells whether it is there.
                _ => {}
            }
            thread::sleep(LOOK_EVERY);
        }
    }

    /// Waits until QEMU, too, says that all is done.
    pub fn wait_completed(mut self, run: &Run) -> Result<(), PagerError> {
        let begun = Instant::now();
        loop {
            let migration = Migration::query(&mut self.qmp)?;
            match migration.status.as_str() {
                "completed" => break,
                _ if migration.has_failed() => return Err(migration.failure()),
                status => {
                    if begun.elapsed() >= run.silence() {
                        let status = vmstate::printable(status);
                        let what =
                            format!("the guest is saved, and QEMU's migration is still {status}");
                        return Err(PagerError::TimedOut { what, after: run.silence() });
                    }
                    thread::sleep(LOOK_EVERY);
                }
            }
        }
        self.capabilities.put_back(&mut self.qmp, PATIENCE);
        Ok(())
    }

    /// Ends QEMU's migration, if it has not ended; the error with what QEMU says of it.
    pub fn give_up(mut self, error: PagerError) -> PagerError {
        // It fails where there is none.
        let _ = self.qmp.execute_at_end("migrate_cancel", &json!({}), PATIENCE);
        let begun = Instant::now();
        let migration = loop {
            let migration = Migration::query_at_end(&mut self.qmp, PATIENCE).unwrap_or_default();
            let has_ended = matches!(
                migration.status.as_str(),
                "none" | "failed" | "cancelled" | "completed" | "postcopy-paused"
            );
            if has_ended || begun.elapsed() >= PATIENCE {
                break migration;
            }
            thread::sleep(LOOK_EVERY);
        };
        self.capabilities.put_back(&mut self.qmp, PATIENCE);
        match (&error, &migration.error) {
            // What QEMU says is already told.
            (PagerError::Qmp { .. }, _) | (_, None) => error,
            (PagerError::Peer(what), Some(desc)) if !what.contains(desc.as_str()) => {
                let desc = vmstate::printable(desc);
                PagerError::Peer(format!("{what} (QEMU says: {desc})"))
            }
            _ => error,
        }
    }
}
