//! QEMU's side, driven by its control socket.

use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde_json::{Value, json};

use super::lazy::Guest;
use crate::cli::report::Report;
use crate::error::PagerError;
use crate::qmp::Qmp;
use crate::qmp::migration::{Capabilities, Migration};
use crate::run::{POLL, Run};
use crate::socket::Address;

/// For QEMU to say why it failed, after the connection has ended.
const LAST_WORDS: Duration = Duration::from_secs(5);
/// For QEMU to see that a pager has died.
const PAUSE: Duration = Duration::from_secs(10);
/// Between two settings of a size that QEMU answered with BUSY, and how long the guest is looked at: it
/// may also have no memory that it can spare.
const RESIZE_AGAIN: Duration = Duration::from_millis(500);
const RESIZE: Duration = Duration::from_secs(5);

/// A QEMU that a guest is restored to.
pub(super) struct Destination {
    qmp: Mutex<Qmp>,
    run: Arc<Run>,
}

/// A virtio-mem device.
#[derive(Debug)]
struct Device {
    path: String,
    requested: u64,
    size: u64,
}

impl Destination {
    /// Connects to the control socket.
    ///
    /// # Errors
    ///
    /// When it is not QEMU's.
    pub fn connect(path: &Path, run: &Arc<Run>, report: &Report) -> Result<Self, PagerError> {
        Ok(Self { qmp: Mutex::new(Qmp::connect(path, run, report)?), run: Arc::clone(run) })
    }

    /// Has QEMU, which was started with `-incoming defer`, wait for the guest at `address`; whether for two
    /// connections (postcopy-preempt).
    ///
    /// # Errors
    ///
    /// What QEMU refuses.
    pub fn prepare(&self, address: &Address, lazy: bool, paused: bool) -> Result<bool, PagerError> {
        let mut qmp = self.qmp.lock();
        let off = ["mapped-ram", "multifd", "x-ignore-shared", "xbzrle", "dirty-bitmaps"];
        let mut wanted: Vec<(&str, bool)> = off.map(|name| (name, false)).into();
        wanted.push(("postcopy-ram", lazy));
        if !lazy {
            wanted.push(("postcopy-preempt", false));
        }
        Capabilities::set(&mut qmp, &wanted)?;
        let mut preempt = lazy;
        if lazy {
            // One that does not have it is served by one channel.
            match Capabilities::set(&mut qmp, &[("postcopy-preempt", true)]) {
                Ok(_) => {}
                Err(PagerError::Qmp { .. }) => preempt = false,
                Err(error) => return Err(error),
            }
        }
        if paused && lazy {
            // Postcopy starts the guest whatever it was; before it arrives, this keeps QEMU from it.
            qmp.execute("stop", &json!({}))?;
        }
        let arguments = json!({ "uri": absolute(address).to_string(), "exit-on-error": false });
        qmp.execute("migrate-incoming", &arguments).map(|_| preempt)
    }

    /// Has a QEMU whose pager died wait for another at `address`.
    ///
    /// # Errors
    ///
    /// What QEMU refuses, as when it is not in postcopy-paused.
    pub fn recover(&self, address: &Address) -> Result<(), PagerError> {
        let mut qmp = self.qmp.lock();
        let arguments = json!({ "uri": absolute(address).to_string() });
        let begun = Instant::now();
        loop {
            // Its main thread may wait for a page of the guest's.
            match qmp.execute_out_of_band("migrate-recover", &arguments) {
                Ok(_) => return Ok(()),
                // It listens already.
                Err(PagerError::Qmp { desc, .. }) if desc.contains("triggered already") => {
                    return Ok(());
                }
                // It may not have seen yet that the other pager is gone.
                Err(PagerError::Qmp { .. }) if begun.elapsed() < PAUSE => thread::sleep(POLL),
                Err(error) => return Err(error),
            }
        }
    }

    /// Waits until QEMU says that it has the guest.
    ///
    /// # Errors
    ///
    /// When it says that it failed, or nothing in time.
    pub fn wait_completed(&self) -> Result<(), PagerError> {
        let mut qmp = self.qmp.lock();
        let begun = Instant::now();
        loop {
            let migration = Migration::query(&mut qmp)?;
            if migration.status == "completed" {
                return Ok(());
            }
            if migration.has_failed() {
                return Err(migration.failure());
            }
            self.run.check("QEMU has not said that it has the guest")?;
            if begun.elapsed() >= self.run.silence() {
                let what =
                    format!("QEMU's migration is still {}", vmstate::printable(&migration.status));
                return Err(PagerError::TimedOut { what, after: self.run.silence() });
            }
            thread::sleep(POLL / 10);
        }
    }

    /// The error with what QEMU says of it.
    pub fn explain(&self, error: PagerError) -> PagerError {
        if !matches!(error, PagerError::Peer(_) | PagerError::Protocol(_)) {
            return error;
        }
        // It may hang: what is known without it is told.
        match Migration::query_at_end(&mut self.qmp.lock(), LAST_WORDS) {
            Ok(Migration { error: Some(reason), .. }) => {
                // It says so before it has taken anything.
                let remedy = match reason.contains("matching RAM page sizes") {
                    true => ": its memory has huge pages; restore to it with --eager",
                    false => "",
                };
                let reason = vmstate::printable(&reason);
                PagerError::Peer(format!("{error}; QEMU says: {reason}{remedy}"))
            }
            _ => error,
        }
    }

    /// Sets what is requested of each virtio-mem device once more: QEMU answers plugs with BUSY while
    /// memory arrives, and a Linux guest tries again by itself only after most of a minute.
    ///
    /// # Errors
    ///
    /// When QEMU refuses, or the run ends.
    pub fn resize_again(&self, report: &Report) -> Result<(), PagerError> {
        let mut qmp = self.qmp.lock();
        let (begun, mut set) = (Instant::now(), None::<Instant>);
        loop {
            let mut behind = devices(&mut qmp)?;
            behind.retain(|device| device.size != device.requested);
            if behind.is_empty() {
                return Ok(());
            }
            self.run.check("a virtio-mem device has not the size that is requested")?;
            let running = qmp.execute("query-status", &json!({}))?["running"] == true;
            if !running && set.is_some() {
                // It will see it when it continues.
                return Ok(());
            }
            if begun.elapsed() >= RESIZE {
                for Device { path, requested, size } in behind {
                    let path = vmstate::printable(&path);
                    report.warn(&format!(
                        "{path} has {size:#x} bytes where {requested:#x} are requested, and the guest does \
                         not change that; set requested-size again later"
                    ));
                }
                return Ok(());
            }
            if set.is_none_or(|at| at.elapsed() >= RESIZE_AGAIN) {
                for Device { path, requested, .. } in &behind {
                    let property =
                        json!({ "path": path, "property": "requested-size", "value": requested });
                    qmp.execute("qom-set", &property)?;
                }
                set = Some(Instant::now());
            }
            thread::sleep(POLL / 2);
        }
    }
}

impl Guest for Destination {
    fn stop(&self) -> Result<bool, PagerError> {
        let mut qmp = self.qmp.lock();
        let ran = qmp.execute("query-status", &json!({}))?["running"] == true;
        qmp.execute("stop", &json!({}))?;
        Ok(ran)
    }

    fn cont(&self, is_complete: bool) -> Result<(), PagerError> {
        if is_complete {
            self.wait_completed()?;
        }
        self.qmp.lock().execute("cont", &json!({})).map(drop)
    }
}

/// The virtio-mem devices.
fn devices(qmp: &mut Qmp) -> Result<Vec<Device>, PagerError> {
    let answer = qmp.execute("query-memory-devices", &json!({}))?;
    let mut found = Vec::new();
    for data in answer.as_array().into_iter().flatten() {
        let data = match data["type"] == "virtio-mem" {
            true => &data["data"],
            false => continue,
        };
        let sizes = data["requested-size"].as_u64().zip(data["size"].as_u64());
        let Some((requested, size)) = sizes else { continue };
        let path = match data["id"].as_str().filter(|id| !id.is_empty()) {
            Some(id) => Some(format!("/machine/peripheral/{id}")),
            // Only one that is to be changed is worth looking for.
            None if requested == size => continue,
            None => without_id(qmp, &data["memaddr"])?,
        };
        found.extend(path.map(|path| Device { path, requested, size }));
    }
    Ok(found)
}

/// The path of a virtio-mem device without an id, which its address tells from others.
fn without_id(qmp: &mut Qmp, address: &Value) -> Result<Option<String>, PagerError> {
    let anonymous = "/machine/peripheral-anon";
    let list = qmp.execute("qom-list", &json!({ "path": anonymous }))?;
    for device in list.as_array().into_iter().flatten() {
        let is_it =
            device["type"].as_str().is_some_and(|kind| kind.starts_with("child<virtio-mem"));
        let Some(name) = device["name"].as_str().filter(|_| is_it) else { continue };
        let path = format!("{anonymous}/{name}");
        let property = json!({ "path": path, "property": "memaddr" });
        if qmp.execute("qom-get", &property)? == *address {
            return Ok(Some(path));
        }
    }
    Ok(None)
}

/// As QEMU finds it from wherever it was started.
fn absolute(address: &Address) -> Address {
    match address {
        Address::Unix(path) => match std::path::absolute(path) {
            Ok(path) => Address::Unix(path),
            Err(_) => address.clone(),
        },
        Address::Tcp(_) => address.clone(),
    }
}
