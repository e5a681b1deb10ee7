//! What is told of a restore.

use std::sync::Arc;

use migration::stream::TARGET_PAGE_SIZE;
use parking_lot::Mutex;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};
use serde_json::{Value, json};

use crate::cli::report::Figures;
use crate::metrics::SharedRegistry;

/// What is measured of a restore.
#[derive(Clone)]
pub struct RestoreMetrics {
    registry: SharedRegistry,
    filled: Counter,
    zeroed: Counter,
    punched: Counter,
    requests: Counter,
    seconds: Histogram,
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
        let counter = |registry: &mut Registry, name: &str, help: &str| {
            let counter = Counter::default();
            registry.register(name, help, counter.clone());
            counter
        };
        let filled = counter(&mut registry, "pages", "Pages filled from the image");
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
        Self { registry, filled, zeroed, punched, requests, seconds }
    }

    /// What scrapers are told.
    pub fn registry(&self) -> SharedRegistry {
        Arc::clone(&self.registry)
    }

    pub(super) fn filled(&self, pages: u64) {
        self.filled.inc_by(pages);
    }

    pub(super) fn zeroed(&self, pages: u64) {
        self.zeroed.inc_by(pages);
    }

    pub(super) fn punched(&self, pages: u64) {
        self.punched.inc_by(pages);
    }

    pub(super) fn answered(&self, seconds: f64) {
        self.requests.inc();
        self.seconds.observe(seconds);
    }

    /// Pages that were allocated although the image does not have them, and are still there.
    pub(super) fn inflated(&self) -> u64 {
        self.zeroed.get() - self.punched.get()
    }

    pub(super) fn summary(&self) -> Value {
        json!({
            "pages": self.filled.get(),
            "requests": self.requests.get(),
            "zero_pages": self.zeroed.get(),
            "punched_pages": self.punched.get(),
            "inflated_bytes": self.inflated() * TARGET_PAGE_SIZE,
        })
    }

    pub(super) fn figures(&self, total: u64) -> Figures {
        Figures {
            done: self.filled.get() * TARGET_PAGE_SIZE,
            total: Some(total),
            message: format!("{} pages asked for", self.requests.get()),
            details: self.summary(),
        }
    }
}
