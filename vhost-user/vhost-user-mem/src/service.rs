//! What the management API sees of the device.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use management_api::{DeviceInfo, Event, Range, ResizeState, Swept};
use ram_discard::Section;
use tokio::sync::broadcast;
use virtio_mem::controller::{
    Busy, DeviceObserver, FreezeHolder, MemController, Reset, ResetError, ResizeError, SweepRefused,
};
use virtio_mem::device::{BlockBitmap, Geometry, Request};

use crate::front_door::Notifier;
use crate::gate::Gate;
use crate::log::{self, LevelError};
use crate::management::{BlockRanges, Management, RangeList, Refusal};
use crate::metrics::{Metrics, MetricsListener, Watched};
use crate::resize::{Device, ResizeWatch};
use crate::stray::NotSwept;

/// Events that a slow reader may lag behind before it is told that it missed some.
const EVENT_BACKLOG: usize = 256;

/// Parts of the region of which it is told whether they are resident, at most: finer than a map
/// on any screen, and few enough to be searched at each request.
const RESIDENT_PARTS: u64 = 1 << 16;

/// The device with everything that watches it.
pub struct Service {
    controller: Arc<MemController>,
    metrics: Arc<Metrics>,
    gate: Arc<Gate>,
    events: broadcast::Sender<Event>,
    connected: AtomicBool,
    resize: Arc<ResizeWatch>,
}

/// Turns changes of the device into events, and has the guest told.
struct Observer {
    events: broadcast::Sender<Event>,
    notifier: Arc<Notifier>,
    resize: Arc<ResizeWatch>,
}

impl DeviceObserver for Observer {
    fn requested_size(&self, size: u64) {
        self.resize.requested_size(size);
        send(&self.events, Event::RequestedSize(size));
    }

    fn plugged_size(&self, size: u64) {
        self.resize.plugged_size(size);
        send(&self.events, Event::PluggedSize(size));
    }

    fn migration(&self, active: bool) {
        self.resize.frozen(active);
        send(&self.events, Event::Migration(active));
    }

    fn config_changed(&self) {
        self.notifier.notify();
    }

    fn frozen_by(&self, holder: FreezeHolder, active: bool) {
        self.resize.frozen_by(holder, active);
    }

    fn busy(&self, _request: Request, reason: &Busy) {
        self.resize.busy(reason);
    }
}

fn send(events: &broadcast::Sender<Event>, event: Event) {
    // Without a reader there is nothing to tell.
    let _ = events.send(event);
}

impl Service {
    /// Puts the watchers on a device.
    ///
    /// # Errors
    ///
    /// When a listener refuses what is plugged already, or there is no thread to be had.
    pub fn new(
        controller: Arc<MemController>,
        notifier: Arc<Notifier>,
    ) -> anyhow::Result<Arc<Self>> {
        Self::with_metrics(controller, notifier, Arc::default())
    }

    /// The same with counters that are in use already.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn with_metrics(
        controller: Arc<MemController>,
        notifier: Arc<Notifier>,
        metrics: Arc<Metrics>,
    ) -> anyhow::Result<Arc<Self>> {
        if controller.geometry().region_size() != 0 {
            controller.listen(Box::new(MetricsListener(Arc::clone(&metrics))))?;
        }
        let (events, _) = broadcast::channel(EVENT_BACKLOG);
        let config = controller.config();
        let resize = ResizeWatch::new(config.plugged_size, config.requested_size);
        resize.frozen(controller.migration_active());
        let observer = Observer { events: events.clone(), notifier, resize: Arc::clone(&resize) };
        controller.observe(Arc::new(observer));
        resize.tell(&controller, events.clone())?;
        let connected = AtomicBool::new(false);
        Ok(Arc::new(Self { controller, metrics, gate: Arc::default(), events, connected, resize }))
    }

    /// What is seen of how the guest is doing with the requested size.
    pub fn resize(&self) -> &Arc<ResizeWatch> {
        &self.resize
    }

    /// Tells readers of events.
    pub(crate) fn tell(&self, event: Event) {
        send(&self.events, event);
    }

    /// The device.
    pub fn controller(&self) -> &Arc<MemController> {
        &self.controller
    }

    /// The counters.
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }

    /// The gate that guest requests pass.
    pub fn gate(&self) -> &Arc<Gate> {
        &self.gate
    }

    /// A front-end came or went.
    pub fn set_connected(&self, connected: bool) {
        self.connected.store(connected, Ordering::Release);
        self.resize.connected(connected);
        if connected {
            self.metrics.connection();
        }
        send(&self.events, if connected { Event::Connected } else { Event::Disconnected });
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.resize.end();
    }
}

fn to_api(range: Section) -> Range {
    Range { offset: range.start(), size: range.len() }
}

/// The maximal ranges of plugged blocks, or of discarded ones, ascending.
fn runs(blocks: Arc<BlockBitmap>, geometry: Geometry, plugged: bool) -> RangeList {
    RangeList::new(move || {
        let (blocks, mut from) = (Arc::clone(&blocks), 0);
        Box::new(std::iter::from_fn(move || {
            let run = blocks.next_run(from..blocks.nr_blocks(), plugged)?;
            from = run.end;
            geometry.section_of(&run).map(to_api)
        }))
    })
}

impl Management for Service {
    fn device(&self) -> DeviceInfo {
        let config = self.controller.config();
        DeviceInfo {
            addr: config.addr,
            region_size: config.region_size,
            block_size: config.block_size,
            node_id: self.controller.geometry().node_id(),
            usable_region_size: config.usable_region_size,
            plugged_size: config.plugged_size,
            requested_size: config.requested_size,
            connected: self.connected.load(Ordering::Acquire),
            migration_active: self.controller.migration_active(),
            resident_size: self.controller.resident_size(),
            resize: Some(self.resize.report(&Device::with(&self.controller, &config))),
        }
    }

    fn resize(&self, requested_size: u64) -> Result<DeviceInfo, Refusal> {
        match self.controller.resize(requested_size) {
            Ok(()) => Ok(self.device()),
            Err(error) => Err(Refusal {
                status: match error {
                    ResizeError::Size(_) => 422,
                    _ => 500,
                },
                title: "Requested size refused".to_owned(),
                detail: error.to_string(),
            }),
        }
    }

    fn blocks(&self) -> BlockRanges {
        let (blocks, geometry) = (Arc::new(self.controller.blocks()), *self.controller.geometry());
        BlockRanges {
            plugged: runs(Arc::clone(&blocks), geometry, true),
            discarded: runs(blocks, geometry, false),
        }
    }

    fn resident(&self) -> Option<RangeList> {
        let geometry = self.controller.geometry();
        let blocks = geometry.region_size() / geometry.block_size();
        // A power of two, so that whole parts make the characters of a map.
        let part = blocks.div_ceil(RESIDENT_PARTS).next_power_of_two() * geometry.block_size();
        let ranges: Arc<[Section]> = self.controller.resident_ranges(part)?.into();
        Some(RangeList::new(move || {
            let (ranges, mut next) = (Arc::clone(&ranges), 0..ranges.len());
            Box::new(std::iter::from_fn(move || Some(to_api(ranges[next.next()?]))))
        }))
    }

    fn system_reset(&self) -> Result<DeviceInfo, Refusal> {
        match self.controller.system_reset() {
            Ok(Reset::Done) => Ok(self.device()),
            Ok(Reset::Deferred) => {
                tracing::info!("migration is active; the system reset is done when it ends");
                Ok(self.device())
            }
            Err(error) => Err(Refusal {
                status: match error {
                    ResetError::Memory(_) => 409,
                    _ => 500,
                },
                title: "System reset refused".to_owned(),
                detail: error.to_string(),
            }),
        }
    }

    fn sweep(&self) -> Result<Swept, Refusal> {
        let swept = Self::sweep(self).map(|swept_size| Swept { swept_size });
        swept.map_err(|error| Refusal {
            status: match error {
                NotSwept::Refused(SweepRefused::Memory(_)) => 500,
                _ => 409,
            },
            title: "Sweep refused".to_owned(),
            detail: error.to_string(),
        })
    }

    fn set_migration(&self, active: bool) -> Result<DeviceInfo, Refusal> {
        let (done, title, outcome) = if active {
            let done = self.controller.freeze(FreezeHolder::Api);
            (done, "Migration not started", "nothing was changed")
        } else {
            let done = self.controller.thaw(FreezeHolder::Api);
            let outcome = "block state is no longer frozen by the API, but a daemon that is \
                           started again may take migration for active";
            (done, "Migration ended, but not saved", outcome)
        };
        match done {
            Ok(()) => Ok(self.device()),
            Err(error) => {
                tracing::error!(%error, active, "cannot save that migration changed");
                Err(Refusal {
                    status: 500,
                    title: title.to_owned(),
                    detail: format!("cannot save the device state: {error}; {outcome}"),
                })
            }
        }
    }

    fn set_log_level(&self, level: &str) -> Result<(), Refusal> {
        log::set_level(level).map_err(|error| Refusal {
            status: match error {
                LevelError::Wrong(_) => 422,
                LevelError::NoLog => 500,
            },
            title: "Log level refused".to_owned(),
            detail: error.to_string(),
        })
    }

    fn metrics(&self) -> String {
        let device = Device::of(&self.controller);
        let watched = Watched {
            connected: self.connected.load(Ordering::Acquire),
            resize_stalled: self.resize.report(&device).state == ResizeState::Stalled,
        };
        self.metrics.encode(&self.controller, watched)
    }

    fn subscribe(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }
}
