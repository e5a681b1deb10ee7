//! A device whose state cannot be saved: the client is told, and told what has become of it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::json;
use virtio_mem::controller::{MemController, Start, StateRecord, StateStore};
use virtio_mem::device::{Geometry, VirtioMem};

use super::http::{get, put, send};
use crate::front_door::Notifier;
use crate::management::Server;
use crate::service::Service;

/// A disk that fails on demand.
struct Disk(Arc<AtomicBool>);

impl StateStore for Disk {
    fn commit(&mut self, _record: &StateRecord<'_>) -> io::Result<()> {
        if self.0.load(Ordering::Relaxed) {
            Err(io::Error::other("the disk is gone"))
        } else {
            Ok(())
        }
    }

    fn mark_answered(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_change_that_cannot_be_saved_is_a_failure_with_its_cause() {
    let gone = Arc::new(AtomicBool::new(false));
    let geometry = Geometry::new(1 << 32, 1 << 30, 2 << 20, None).unwrap();
    let mut start = Start::volatile(VirtioMem::new(geometry, 0).unwrap());
    start.store = Box::new(Disk(Arc::clone(&gone)));
    let notifier = Arc::new(Notifier::new().unwrap());
    let service = Service::new(Arc::new(MemController::new(start)), notifier).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let server = Server::bind(dir.path().join("api"), service).unwrap();
    server.start().unwrap();
    let active = || get(dir.path(), "/v1/device").json()["migration_active"].clone();
    let set = |active| put(dir.path(), "/v1/migration", &json!({ "active": active }).to_string());

    gone.store(true, Ordering::Relaxed);
    let detail = set(true).problem(500);
    assert!(detail.contains("the disk is gone; nothing was changed"), "{detail}");
    assert_eq!(active(), false);
    assert_eq!(set(false).status, 200, "there is nothing to save");
    let resize = put(dir.path(), "/v1/device/requested-size", r#"{"requested_size": 2097152}"#);
    assert!(resize.problem(500).contains("the disk is gone"));
    let reset = send(dir.path(), "POST", "/v1/device/system-reset", "", b"");
    assert!(reset.problem(500).contains("the disk is gone"));

    gone.store(false, Ordering::Relaxed);
    assert_eq!(set(true).json()["migration_active"], true);
    gone.store(true, Ordering::Relaxed);
    for _ in 0..2 {
        // It has ended with the first, but neither is saved.
        let detail = set(false).problem(500);
        assert!(detail.contains("the disk is gone; block state is no longer frozen"), "{detail}");
        assert_eq!(active(), false);
    }
    gone.store(false, Ordering::Relaxed);
    assert_eq!(set(false).json()["migration_active"], false);
}
