//! What is measured of a restore, and how it is told.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use migration::lazy::Histogram;
use parking_lot::Mutex;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram as Buckets;
use prometheus_client::registry::{Registry, Unit};
use serde_json::{Value, json};

use crate::cli::report;
use crate::metrics::{RunFigures, SharedRegistry};

/// Upper bounds of the time that a fault takes, seconds.
const BUCKETS: [f64; 12] = [
    0.000_008, 0.000_016, 0.000_032, 0.000_064, 0.000_128, 0.000_256, 0.001, 0.004, 0.016, 0.064,
    0.256, 1.0,
];

/// Why memory was placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// A vCPU waited for it.
    Fault,
    /// It was touched first last time.
    Replay,
    /// It came next.
    Background,
    /// A vCPU waited for zeros.
    Zeros,
}

/// All of them, in the order of their numbers.
const SOURCES: [Source; 4] = [Source::Fault, Source::Replay, Source::Background, Source::Zeros];

impl Source {
    fn name(self) -> &'static str {
        match self {
            Self::Fault => "fault",
            Self::Replay => "replay",
            Self::Background => "background",
            Self::Zeros => "zeros",
        }
    }
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct By {
    source: &'static str,
}

/// Counters that the threads of a restore add to.
#[derive(Debug)]
pub struct Figures {
    begun: Mutex<Instant>,
    /// Faults that were read.
    pub faults: Counter,
    /// How often nothing could be placed, since a removal was outstanding.
    pub busy: Counter,
    /// Bytes that the VMM discarded.
    pub discarded: Counter,
    placed: Family<By, Counter>,
    /// The same, looked up: by source.
    of: [Counter; SOURCES.len()],
    service: Buckets,
    latency: Mutex<Histogram>,
    done: AtomicU64,
    total: AtomicU64,
}

impl RunFigures for Figures {
    const PREFIX: &'static str = "vmem_pager_firecracker";

    fn new(registry: &SharedRegistry) -> Arc<Self> {
        let placed = Family::<By, Counter>::default();
        let of = SOURCES.map(|source| placed.get_or_create(&By { source: source.name() }).clone());
        let figures = Self {
            begun: Mutex::new(Instant::now()),
            faults: Counter::default(),
            busy: Counter::default(),
            discarded: Counter::default(),
            placed,
            of,
            service: Buckets::new(BUCKETS),
            latency: Mutex::default(),
            done: AtomicU64::new(0),
            total: AtomicU64::new(0),
        };
        figures.register(&mut registry.lock());
        Arc::new(figures)
    }
}

impl Figures {
    fn register(&self, to: &mut Registry) {
        to.register("faults", "Faults that were read", self.faults.clone());
        let help = "Times that nothing could be placed, since a removal was outstanding";
        to.register("busy", help, self.busy.clone());
        let help = "Memory that the VMM discarded while it was restored";
        to.register_with_unit("discarded", help, Unit::Bytes, self.discarded.clone());
        let help = "Memory that was placed, by why it was";
        to.register_with_unit("placed", help, Unit::Bytes, self.placed.clone());
        let help = "From reading a fault to its page being there";
        to.register_with_unit("service_time", help, Unit::Seconds, self.service.clone());
    }

    /// Begins to count the time, with so many bytes to be placed.
    pub fn begin(&self, total: u64) {
        *self.begun.lock() = Instant::now();
        self.total.store(total, Ordering::Relaxed);
    }

    /// So many bytes are with the VMM now.
    pub fn placed(&self, source: Source, bytes: u64) {
        self.of[source as usize].inc_by(bytes);
        if source != Source::Zeros {
            self.done.fetch_add(bytes, Ordering::Relaxed);
        }
    }

    /// Bytes that were placed for a reason.
    pub fn bytes(&self, source: Source) -> u64 {
        self.of[source as usize].get()
    }

    /// A fault was served within so long.
    pub fn served(&self, took: Duration) {
        self.service.observe(took.as_secs_f64());
        self.latency.lock().add(took);
    }

    /// For a bar, and lines of JSON.
    pub fn progress(&self) -> report::Figures {
        let seconds = self.begun.lock().elapsed().as_secs_f64().max(0.001);
        let faults = self.faults.get();
        report::Figures {
            done: self.done.load(Ordering::Relaxed),
            total: Some(self.total.load(Ordering::Relaxed)),
            message: format!("{:.0} faults a second", faults as f64 / seconds),
            details: json!({ "faults": faults }),
        }
    }

    /// Everything, at the end.
    pub fn summary(&self) -> Value {
        let placed = SOURCES.map(|source| (source.name().to_owned(), self.bytes(source).into()));
        let latency = self.latency.lock();
        let micros = |share| latency.quantile(share).map(|time| time.as_micros() as u64);
        json!({
            "complete_seconds": self.begun.lock().elapsed().as_secs_f64(),
            "faults": self.faults.get(),
            "busy": self.busy.get(),
            "discarded_bytes": self.discarded.get(),
            "placed_bytes": Value::Object(placed.into_iter().collect()),
            "service_p50_us": micros(0.5),
            "service_p99_us": micros(0.99),
        })
    }
}
