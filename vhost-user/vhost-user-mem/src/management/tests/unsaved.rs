//! A device whose state cannot be saved, or not soon: the client is told, and told what has become of
//! it, and others need not wait.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use parking_lot::Mutex;
use serde_json::json;
use tempfile::TempDir;
use virtio_mem::controller::{InitialState, MemController, StateRecord, StateStore};
use virtio_mem::device::{Geometry, VirtioMem};

use super::http::{get, put, send};
use crate::front_door::Notifier;
use crate::management::Server;
use crate::metrics::{CountedStore, Metrics};
use crate::service::Service;

/// A disk that fails on demand, and takes as long as a lock is held.
#[derive(Clone, Default)]
struct Disk {
    gone: Arc<AtomicBool>,
    hangs: Arc<Mutex<()>>,
    /// Writes that were begun.
    begun: Arc<AtomicUsize>,
}

impl StateStore for Disk {
    fn commit(&mut self, _record: &StateRecord<'_>) -> io::Result<()> {
        self.begun.fetch_add(1, Ordering::Relaxed);
        drop(self.hangs.lock());
        if self.gone.load(Ordering::Relaxed) {
            Err(io::Error::other("the disk is gone"))
        } else {
            Ok(())
        }
    }

    fn mark_answered(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn serve(disk: &Disk) -> (Server, TempDir) {
    let geometry = Geometry::new(1 << 32, 1 << 30, 2 << 20, None).unwrap();
    let mut start = InitialState::volatile(VirtioMem::new(geometry, 0).unwrap());
    start.store = Box::new(disk.clone());
    let notifier = Arc::new(Notifier::new().unwrap());
    let metrics = Arc::new(Metrics::new());
    start.store = Box::new(CountedStore::new(start.store, Arc::clone(&metrics)));
    let controller = Arc::new(MemController::new(start));
    let service = Service::with_metrics(controller, notifier, metrics).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let server = Server::bind(dir.path().join("api"), service).unwrap();
    server.start().unwrap();
    (server, dir)
}

#[test]
fn a_disk_that_hangs_keeps_only_changes_waiting() {
    let disk = Disk::default();
    let (_server, dir) = serve(&disk);
    let hangs = disk.hangs.lock();
    thread::scope(|scope| {
        let resize = scope.spawn(|| {
            put(dir.path(), "/v1/device/requested-size", r#"{"requested_size": 2097152}"#)
        });
        while disk.begun.load(Ordering::Relaxed) == 0 {
            thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(get(dir.path(), "/v1/device").json()["requested_size"], 0, "not yet");
        let metrics = get(dir.path(), "/metrics").body;
        assert!(metrics.contains("virtio_mem_requested_size_bytes 0\n"), "{metrics}");
        drop(hangs);
        assert_eq!(resize.join().unwrap().json()["requested_size"], 2 << 20);
    });
    assert_eq!(get(dir.path(), "/v1/device").json()["requested_size"], 2 << 20);
}

#[test]
fn a_change_that_cannot_be_saved_is_a_failure_with_its_cause() {
    let disk = Disk::default();
    let gone = &disk.gone;
    let (_server, dir) = serve(&disk);
    let active = || get(dir.path(), "/v1/device").json()["migration_active"].clone();
    let set = |active| put(dir.path(), "/v1/migration", &json!({ "active": active }).to_string());

    let is_counted = |errors: u32| {
        let text = get(dir.path(), "/metrics").body;
        text.contains(&format!("virtio_mem_state_file_errors_total {errors}\n"))
    };
    assert!(is_counted(0));

    gone.store(true, Ordering::Relaxed);
    let detail = set(true).problem(500);
    assert!(detail.contains("the disk is gone; nothing was changed"), "{detail}");
    assert_eq!(active(), false);
    assert_eq!(set(false).status, 200, "there is nothing to save");
    let resize = put(dir.path(), "/v1/device/requested-size", r#"{"requested_size": 2097152}"#);
    assert!(resize.problem(500).contains("the disk is gone"));
    let reset = send(dir.path(), "POST", "/v1/device/system-reset", "", b"");
    assert!(reset.problem(500).contains("the disk is gone"));
    assert!(is_counted(3));

    gone.store(false, Ordering::Relaxed);
    assert_eq!(set(true).json()["migration_active"], true);
    gone.store(true, Ordering::Relaxed);
    for _ in 0..2 {
        // It has ended with the first, but neither is saved.
        let detail = set(false).problem(500);
        assert!(detail.contains("the disk is gone; block state is no longer frozen"), "{detail}");
        assert_eq!(active(), false);
    }
    assert!(is_counted(5));
    gone.store(false, Ordering::Relaxed);
    assert_eq!(set(false).json()["migration_active"], false);
}
