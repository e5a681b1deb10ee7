//! What scrapers are told of a save.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use migration::Progress;
use parking_lot::Mutex;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::registry::{Registry, Unit};

use crate::metrics::SharedRegistry;

/// What is measured of a save.
#[derive(Debug)]
pub struct SaveMetrics {
    registry: SharedRegistry,
    progress: Arc<Mutex<Option<Arc<Progress>>>>,
}

impl Default for SaveMetrics {
    fn default() -> Self {
        Self::new()
    }
}

impl SaveMetrics {
    /// All zero.
    pub fn new() -> Self {
        let progress = Arc::new(Mutex::new(None));
        let mut registry = Registry::with_prefix("vmem_pager_save");
        registry.register_collector(Box::new(Counts(Arc::clone(&progress))));
        Self { registry: Arc::new(Mutex::new(registry)), progress }
    }

    /// What scrapers are told.
    pub fn registry(&self) -> SharedRegistry {
        Arc::clone(&self.registry)
    }

    /// Tells of this save from now on.
    pub fn follow(&self, progress: &Arc<Progress>) {
        *self.progress.lock() = Some(Arc::clone(progress));
    }
}

/// Reads the engine's counters when it is asked.
#[derive(Debug)]
struct Counts(Arc<Mutex<Option<Arc<Progress>>>>);

impl Collector for Counts {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let progress = self.0.lock().clone().unwrap_or_default();
        let counters = &progress.counters;
        let counts: [(&str, &str, Option<Unit>, &AtomicU64); 4] = [
            ("written", "Pages written to the image", Some(Unit::Bytes), &counters.transferred),
            ("pages", "Pages that came with content", None, &counters.normal),
            ("zero_pages", "Pages that came as zeros", None, &counters.duplicate),
            (
                "discarded_pages",
                "Pages that came for discarded memory, and were left out",
                None,
                &counters.dirty_while_discarded,
            ),
        ];
        for (name, help, unit, counter) in counts {
            let counter = ConstCounter::new(counter.load(Ordering::Relaxed));
            let metric =
                encoder.encode_descriptor(name, help, unit.as_ref(), counter.metric_type())?;
            counter.encode(metric)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_of_the_engine_are_told() {
        let metrics = SaveMetrics::new();
        let progress = Arc::new(Progress::new());
        metrics.follow(&progress);
        progress.counters.normal.store(3, Ordering::Relaxed);
        progress.counters.transferred.store(3 * 4096, Ordering::Relaxed);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &metrics.registry().lock()).unwrap();
        for line in [
            "vmem_pager_save_pages_total 3\n",
            "vmem_pager_save_written_bytes_total 12288\n",
            "vmem_pager_save_discarded_pages_total 0\n",
        ] {
            assert!(text.contains(line), "{text}");
        }
    }
}
