//! Metrics that every program has, by the names that exporters of Prometheus agree on.

mod process;

use std::sync::atomic::AtomicU64;
use std::time::{SystemTime, UNIX_EPOCH};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

pub use process::Process;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct BuildLabels {
    version: &'static str,
}

/// Registers `build_info` and `start_time_seconds`, which is now, with the program's own metrics.
pub fn register_program(registry: &mut Registry, version: &'static str) {
    registry.register("build", "The program", Info::new(BuildLabels { version }));
    let start_time: Gauge<f64, AtomicU64> = Gauge::default();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    start_time.set(now.as_secs_f64());
    registry.register_with_unit(
        "start_time",
        "When counters began at 0, since 1970: later than the process where the program has started itself anew",
        Unit::Seconds,
        start_time,
    );
}
