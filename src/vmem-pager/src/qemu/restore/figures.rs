//! What is measured of a restore, and how it is told.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use migration::lazy::Histogram;
use migration::stream::TARGET_PAGE_SIZE;
use parking_lot::Mutex;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram as Buckets;
use prometheus_client::registry::{Registry, Unit};
use serde_json::{Value, json};

use super::supply::{Answer, Source};
use crate::cli::report;
use crate::metrics::{RunFigures, SharedRegistry};

/// Upper bounds of the time that a request takes, seconds.
const BUCKETS: [f64; 12] = [
    0.000_032, 0.000_064, 0.000_128, 0.000_256, 0.000_512, 0.001, 0.002, 0.004, 0.008, 0.032,
    0.128, 1.0,
];

/// Counters that the threads of a restore add to.
#[derive(Debug)]
pub struct Figures {
    begun: Mutex<Instant>,
    requests: Counter,
    crossed: Counter,
    ahead_hits: Counter,
    pages: Family<By, Counter>,
    bytes: Family<By, Counter>,
    service: Buckets,
    latency: Mutex<Histogram>,
    /// Bytes of the image that were sent, and in all.
    done: AtomicU64,
    total: AtomicU64,
    present: Gauge,
    running: Gauge<f64, AtomicU64>,
    complete: Gauge<f64, AtomicU64>,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct By {
    source: &'static str,
}

impl Source {
    fn name(self) -> &'static str {
        match self {
            Self::Request => "request",
            Self::ReadAhead => "read-ahead",
            Self::Replay => "replay",
            Self::Background => "background",
            Self::Hole => "hole",
        }
    }
}

const SOURCES: [Source; 5] =
    [Source::Request, Source::ReadAhead, Source::Replay, Source::Background, Source::Hole];

impl RunFigures for Figures {
    const PREFIX: &'static str = "vmem_pager_restore";

    fn new(registry: &SharedRegistry) -> Arc<Self> {
        let figures = Self {
            begun: Mutex::new(Instant::now()),
            requests: Counter::default(),
            crossed: Counter::default(),
            ahead_hits: Counter::default(),
            pages: Family::default(),
            bytes: Family::default(),
            service: Buckets::new(BUCKETS),
            latency: Mutex::default(),
            done: AtomicU64::new(0),
            total: AtomicU64::new(0),
            present: Gauge::default(),
            running: Gauge::default(),
            complete: Gauge::default(),
        };
        figures.register(&mut registry.lock());
        Arc::new(figures)
    }
}

impl Figures {
    fn register(&self, to: &mut Registry) {
        let Self { requests, crossed, ahead_hits, pages, bytes, service, .. } = self;
        for source in SOURCES {
            drop(pages.get_or_create(&By { source: source.name() }));
            drop(bytes.get_or_create(&By { source: source.name() }));
        }
        to.register("requests", "Pages that QEMU asked for", requests.clone());
        let help = "Requests for pages that were on their way already";
        to.register("requests_crossed", help, crossed.clone());
        let help = "Requests for pages that were on their way since they were read ahead";
        to.register("read_ahead_hits", help, ahead_hits.clone());
        to.register("pages", "Pages sent, by why they were sent", pages.clone());
        let help = "Bytes of pages sent, headers included, by why they were sent";
        to.register_with_unit("sent", help, Unit::Bytes, bytes.clone());
        let help = "From reading a request to having written its answer";
        to.register_with_unit("service_time", help, Unit::Seconds, service.clone());
        let help = "Memory in the image";
        to.register_with_unit("present", help, Unit::Bytes, self.present.clone());
        let help = "From connecting to the guest being able to run; 0 before";
        to.register_with_unit("running", help, Unit::Seconds, self.running.clone());
        let help = "From connecting to all memory being with the VMM; 0 before";
        to.register_with_unit("complete", help, Unit::Seconds, self.complete.clone());
    }

    /// Begins to count the time, with what there is in the image, bytes.
    pub fn begin(&self, present: u64) {
        *self.begun.lock() = Instant::now();
        self.total.store(present, Ordering::Relaxed);
        self.present.set(i64::try_from(present).unwrap_or(i64::MAX));
    }

    /// So many bytes are at the destination already.
    pub fn skip(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
    }

    /// A page was asked for.
    pub(super) fn request(&self, answer: Answer) {
        self.requests.inc();
        if let Answer::OnItsWay { ahead } = answer {
            self.crossed.inc();
            if ahead {
                self.ahead_hits.inc();
            }
        }
    }

    /// Pages were sent, in so many bytes.
    pub(super) fn sent(&self, source: Source, pages: u64, bytes: u64) {
        let by = By { source: source.name() };
        self.pages.get_or_create(&by).inc_by(pages);
        self.bytes.get_or_create(&by).inc_by(bytes);
        // Answers with zeros are 9 bytes.
        if bytes > TARGET_PAGE_SIZE {
            self.done.fetch_add(pages * TARGET_PAGE_SIZE, Ordering::Relaxed);
        }
    }

    /// A request was answered within so long.
    pub fn served(&self, took: Duration) {
        self.service.observe(took.as_secs_f64());
        self.latency.lock().add(took);
    }

    /// The guest can run.
    pub fn running(&self) {
        if !self.is_running() {
            self.running.set(self.elapsed());
        }
    }

    /// Whether the guest can run.
    pub fn is_running(&self) -> bool {
        self.running.get() != 0.0
    }

    /// How long the guest has been able to run, if it is.
    pub fn running_for(&self) -> Option<Duration> {
        let running = self.running.get();
        let since = self.elapsed() - running;
        (running != 0.0).then(|| Duration::try_from_secs_f64(since).unwrap_or_default())
    }

    /// All memory is with the VMM.
    pub fn complete(&self) {
        self.complete.set(self.elapsed());
    }

    fn elapsed(&self) -> f64 {
        self.begun.lock().elapsed().as_secs_f64()
    }

    /// For a bar, and lines of JSON.
    pub fn progress(&self) -> report::Figures {
        let seconds = self.elapsed().max(0.001);
        let requests = self.requests.get();
        let message = format!("{:.0} faults a second", requests as f64 / seconds);
        let total = Some(self.total.load(Ordering::Relaxed));
        let done = self.done.load(Ordering::Relaxed);
        report::Figures { done, total, message, details: json!({ "requests": requests }) }
    }

    /// Everything, at the end.
    pub fn summary(&self) -> Value {
        let of = |family: &Family<By, Counter>| {
            let of = |source: Source| {
                let count = family.get_or_create(&By { source: source.name() }).get();
                (source.name().to_owned(), count.into())
            };
            Value::Object(SOURCES.map(of).into_iter().collect())
        };
        let latency = self.latency.lock();
        let micros = |share| latency.quantile(share).map(|time| time.as_micros() as u64);
        json!({
            "present_bytes": self.total.load(Ordering::Relaxed),
            "running_seconds": self.running.get(),
            "complete_seconds": self.complete.get(),
            "requests": self.requests.get(),
            "requests_crossed": self.crossed.get(),
            "read_ahead_hits": self.ahead_hits.get(),
            "pages": of(&self.pages),
            "sent_bytes": of(&self.bytes),
            "service_p50_us": micros(0.5),
            "service_p99_us": micros(0.99),
        })
    }
}
