//! What is told of a restore.

use std::sync::Arc;
use std::time::Duration;

use migration::lazy::Histogram as Latency;
use migration::stream::TARGET_PAGE_SIZE;
use parking_lot::Mutex;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};
use serde_json::{Value, json};

use crate::cli::report::Figures;
use crate::metrics::SharedRegistry;

/// Why a page was filled from the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// Before the guest runs.
    Before,
    /// It was asked for.
    Request,
    /// It follows one that was asked for.
    ReadAhead,
    /// It was touched early last time.
    Replay,
    /// Its turn has come.
    Background,
}

const SOURCES: [Source; 5] =
    [Source::Before, Source::Request, Source::ReadAhead, Source::Replay, Source::Background];

impl Source {
    fn name(self) -> &'static str {
        match self {
            Self::Before => "before",
            Self::Request => "request",
            Self::ReadAhead => "read-ahead",
            Self::Replay => "replay",
            Self::Background => "background",
        }
    }
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct By {
    source: &'static str,
}

/// What is measured of a restore.
#[derive(Clone)]
pub struct RestoreMetrics {
    registry: SharedRegistry,
    filled: Family<By, Counter>,
    zeroed: Counter,
    punched: Counter,
    requests: Counter,
    seconds: Histogram,
    latency: Arc<Mutex<Latency>>,
}

impl Default for RestoreMetrics {
    fn default() -> Self {
        Self::new()
    }
}

impl RestoreMetrics {
    /// All zero.
    pub fn new() -> Self {
        let mut registry = Registry::with_prefix("vmem_pager_restore");
        let filled: Family<By, Counter> = Family::default();
        for source in SOURCES {
            drop(filled.get_or_create(&By { source: source.name() }));
        }
        let help = "Pages filled from the image, by why they were filled";
        registry.register("pages", help, filled.clone());
        let counter = |registry: &mut Registry, name: &str, help: &str| {
            let counter = Counter::default();
            registry.register(name, help, counter.clone());
            counter
        };
        let zeroed = counter(
            &mut registry,
            "zero_pages",
            "Absent pages allocated since they were asked for",
        );
        let punched =
            counter(&mut registry, "punched_pages", "Pages of them that were discarded again");
        let requests = counter(&mut registry, "requests", "Pages asked for");
        let seconds = Histogram::new(exponential_buckets(1e-6, 2.0, 20));
        let help = "Time from a request to its answer";
        registry.register_with_unit("answer", help, Unit::Seconds, seconds.clone());
        let registry = Arc::new(Mutex::new(registry));
        Self { registry, filled, zeroed, punched, requests, seconds, latency: Arc::default() }
    }

    /// What scrapers are told.
    pub fn registry(&self) -> SharedRegistry {
        Arc::clone(&self.registry)
    }

    pub(super) fn filled(&self, source: Source, pages: u64) {
        self.filled.get_or_create(&By { source: source.name() }).inc_by(pages);
    }

    pub(super) fn zeroed(&self, pages: u64) {
        self.zeroed.inc_by(pages);
    }

    pub(super) fn punched(&self, pages: u64) {
        self.punched.inc_by(pages);
    }

    pub(super) fn answered(&self, took: Duration) {
        self.requests.inc();
        self.seconds.observe(took.as_secs_f64());
        self.latency.lock().add(took);
    }

    /// Pages filled, by why.
    pub(super) fn pages(&self, source: Source) -> u64 {
        self.filled.get_or_create(&By { source: source.name() }).get()
    }

    /// Pages that were allocated although the image does not have them, and are still there.
    pub(super) fn inflated(&self) -> u64 {
        self.zeroed.get() - self.punched.get()
    }

    fn all_pages(&self) -> u64 {
        SOURCES.into_iter().map(|source| self.pages(source)).sum()
    }

    pub(super) fn summary(&self) -> Value {
        let by = SOURCES.map(|source| (source.name().to_owned(), self.pages(source).into()));
        let latency = self.latency.lock();
        let micros = |share| latency.quantile(share).map(|time| time.as_micros() as u64);
        json!({
            "pages": self.all_pages(),
            "pages_by_source": Value::Object(by.into_iter().collect()),
            "requests": self.requests.get(),
            "service_p50_us": micros(0.5),
            "service_p99_us": micros(0.99),
            "zero_pages": self.zeroed.get(),
            "punched_pages": self.punched.get(),
            "inflated_bytes": self.inflated() * TARGET_PAGE_SIZE,
        })
    }

    pub(super) fn figures(&self, total: u64) -> Figures {
        Figures {
            done: self.all_pages() * TARGET_PAGE_SIZE,
            total: Some(total),
            message: format!("{} pages asked for", self.requests.get()),
            details: self.summary(),
        }
    }
}
