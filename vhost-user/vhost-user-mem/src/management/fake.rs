//! A device that does what tests tell it to.

#![allow(missing_docs, reason = "for tests")]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use management_api::{Blocks, DeviceInfo, Event, Range, Resident, Swept};
use parking_lot::Mutex;
use tempfile::TempDir;
use tokio::sync::broadcast;

use super::{BlockRanges, Management, RangeList, Refusal, Server};

/// Events that a reader may lag behind.
const BACKLOG: usize = 64;

/// A device of 1 GiB at 4 GiB with blocks of 2 MiB.
pub fn device() -> DeviceInfo {
    DeviceInfo {
        addr: 4 << 30,
        region_size: 1 << 30,
        block_size: 2 << 20,
        node_id: None,
        usable_region_size: 256 << 20,
        plugged_size: 0,
        requested_size: 0,
        connected: false,
        migration_active: false,
        resident_size: None,
        resize: None,
    }
}

pub struct Fake {
    pub device: Mutex<DeviceInfo>,
    pub events: broadcast::Sender<Event>,
    pub calls: AtomicUsize,
    pub reset_takes: Mutex<Duration>,
    /// Resets wait while it is locked.
    pub reset_waits: Mutex<()>,
    /// Resets that were begun.
    pub resets: AtomicUsize,
    pub resident: Mutex<Resident>,
}

impl Fake {
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            device: Mutex::new(device()),
            events: broadcast::channel(BACKLOG).0,
            calls: AtomicUsize::new(0),
            reset_takes: Mutex::default(),
            reset_waits: Mutex::default(),
            resets: AtomicUsize::new(0),
            resident: Mutex::default(),
        })
    }

    /// Serves it at a socket in a directory of its own.
    pub fn serve(self: &Arc<Self>) -> (Server, TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let server = Server::bind(dir.path().join("api"), Arc::clone(self) as Arc<_>).unwrap();
        server.start().unwrap();
        (server, dir)
    }

    /// What is plugged, from the start, and what is not.
    pub fn blocks_now(&self) -> Blocks {
        let DeviceInfo { region_size, plugged_size, .. } = *self.device.lock();
        let range = |offset, size| (size != 0).then_some(Range { offset, size });
        Blocks {
            plugged: range(0, plugged_size).into_iter().collect(),
            discarded: range(plugged_size, region_size - plugged_size).into_iter().collect(),
        }
    }

    /// The guest plugs or unplugs.
    pub fn plug(&self, plugged_size: u64) {
        self.device.lock().plugged_size = plugged_size;
        let _ = self.events.send(Event::PluggedSize(plugged_size));
    }
}

impl Management for Fake {
    fn device(&self) -> DeviceInfo {
        self.device.lock().clone()
    }

    fn resize(&self, requested_size: u64) -> Result<DeviceInfo, Refusal> {
        let mut device = self.device.lock();
        if !requested_size.is_multiple_of(device.block_size) || requested_size > device.region_size
        {
            return Err(Refusal {
                status: 422,
                title: "Requested size refused".to_owned(),
                detail: format!("{requested_size} breaks a rule"),
            });
        }
        self.calls.fetch_add(1, Ordering::Relaxed);
        device.requested_size = requested_size;
        let _ = self.events.send(Event::RequestedSize(requested_size));
        Ok(device.clone())
    }

    fn blocks(&self) -> BlockRanges {
        let Blocks { plugged, discarded } = self.blocks_now();
        BlockRanges {
            plugged: RangeList::new(move || Box::new(plugged.clone().into_iter())),
            discarded: RangeList::new(move || Box::new(discarded.clone().into_iter())),
        }
    }

    fn resident(&self) -> Option<RangeList> {
        let ranges = self.resident.lock().resident.clone()?;
        Some(RangeList::new(move || Box::new(ranges.clone().into_iter())))
    }

    fn system_reset(&self) -> Result<DeviceInfo, Refusal> {
        self.resets.fetch_add(1, Ordering::Relaxed);
        drop(self.reset_waits.lock());
        let takes = *self.reset_takes.lock();
        std::thread::sleep(takes);
        self.calls.fetch_add(1, Ordering::Relaxed);
        self.plug(0);
        Ok(self.device())
    }

    fn sweep(&self) -> Result<Swept, Refusal> {
        if self.device.lock().migration_active {
            let (title, detail) = ("Sweep refused".to_owned(), "migration is active".to_owned());
            return Err(Refusal { status: 409, title, detail });
        }
        self.calls.fetch_add(1, Ordering::Relaxed);
        let _ = self.events.send(Event::Stray(4096));
        Ok(Swept { swept_size: 4096 })
    }

    fn set_migration(&self, active: bool) -> Result<DeviceInfo, Refusal> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        self.device.lock().migration_active = active;
        let _ = self.events.send(Event::Migration(active));
        Ok(self.device())
    }

    fn set_log_level(&self, level: &str) -> Result<(), Refusal> {
        if level != "debug" {
            let (title, detail) = ("Log level refused".to_owned(), format!("{level:?} is not"));
            return Err(Refusal { status: 422, title, detail });
        }
        self.calls.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn metrics(&self) -> String {
        "# EOF\n".to_owned()
    }

    fn subscribe(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }
}
