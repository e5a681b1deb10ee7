//! Metrics in the OpenMetrics text format.
//!
//! `store` counts what the state file does not take; [`program::metrics`] has what every process can tell.
//!
//! What is not known has no sample. `dist/prometheus` has rules and a dashboard that use the names.

mod store;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use parking_lot::Mutex;
use program::metrics::{Process, register_program};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};
use ram_discard::{RamDiscardListener, Section};
use virtio_mem::controller::MemController;
use virtio_mem::device::{BlockSpan, Request, Response};

pub use store::CountedStore;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    r#type: &'static str,
    response: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TypeLabel {
    r#type: &'static str,
}

/// What of the device's watchers is told with its metrics.
#[derive(Clone, Copy, Debug, Default)]
pub struct Watched {
    /// Whether a front-end is connected.
    pub connected: bool,
    /// Whether the guest stands still on its way to the requested size.
    pub resize_stalled: bool,
}

/// From 1 us, for STATE, to 17 s, for UNPLUG of much memory.
const LATENCY_BUCKETS: [f64; 13] =
    [1e-6, 4e-6, 16e-6, 64e-6, 256e-6, 1e-3, 4e-3, 16e-3, 66e-3, 0.26, 1.0, 4.2, 17.0];

/// A counter that is copied from one that is kept elsewhere.
struct CopiedCounter {
    counter: Counter,
    /// One at a time: two scrapes would add the same difference.
    copying: Mutex<()>,
}

impl CopiedCounter {
    fn new(counter: Counter) -> Self {
        Self { counter, copying: Mutex::default() }
    }

    fn copy(&self, total: u64) {
        let _one_at_a_time = self.copying.lock();
        self.counter.inc_by(total.saturating_sub(self.counter.get()));
    }
}

/// What is resident, bytes: no sample while guest memory is not mapped.
#[derive(Debug, Default)]
struct Resident(Mutex<Option<u64>>);

impl Collector for Resident {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let Some(size) = *self.0.lock() else { return Ok(()) };
        let gauge = ConstGauge::new(size);
        let (name, help) = ("resident_size", "Memory that is resident on the host");
        let unit = Some(&Unit::Bytes);
        gauge.encode(encoder.encode_descriptor(name, help, unit, gauge.metric_type())?)
    }
}

/// Types of requests, and of responses.
const TYPES: usize = 5;
const RESPONSES: usize = 4;

const NO_BLOCK: BlockSpan = BlockSpan { addr: 0, nb_blocks: 0 };

/// A request of each type.
const TYPES_TOLD: [Request; TYPES] = [
    Request::Plug(NO_BLOCK),
    Request::Unplug(NO_BLOCK),
    Request::UnplugAll,
    Request::State(NO_BLOCK),
    Request::Unsupported(u16::MAX),
];

/// A response of each type.
const RESPONSES_TOLD: [Response; RESPONSES] =
    [Response::Ack, Response::Nack, Response::Busy, Response::Error];

/// The daemon's counters. Sizes are read from the device when asked for.
pub struct Metrics {
    registry: Registry,
    /// The members of `requests` and `latency` that there are, found without hashing their labels.
    counted: [[OnceLock<Counter>; RESPONSES]; TYPES],
    timed: [OnceLock<Histogram>; TYPES],
    requests: Family<RequestLabels, Counter>,
    latency: Family<TypeLabel, Histogram>,
    malformed: Counter,
    connections: Counter,
    populated_bytes: Counter,
    discarded_bytes: Counter,
    stray_bytes: Counter,
    discard_failures: CopiedCounter,
    discard_clients_dropped: Counter,
    workers_lost: Counter,
    log_lines_lost: CopiedCounter,
    log_lines_suppressed: CopiedCounter,
    discard_clients_turned_away: Counter,
    discard_client_wait: Counter<f64, AtomicU64>,
    discard_freezes_expired: Counter,
    region: Gauge,
    usable: Gauge,
    plugged: Gauge,
    requested: Gauge,
    resident: Arc<Resident>,
    connected: Gauge,
    migration: Gauge,
    workers: Gauge,
    resize_stalled: Gauge,
    state_file_errors: Counter,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// All zero.
    pub fn new() -> Self {
        let mut root = Registry::default();
        root.register_collector(Box::new(Process));
        let registry = root.sub_registry_with_prefix("virtio_mem");
        register_program(registry, env!("CARGO_PKG_VERSION"));
        let requests: Family<RequestLabels, Counter> = Family::default();
        // A first increase is seen only of what was 0 before.
        for request in TYPES_TOLD {
            for response in RESPONSES_TOLD {
                let labels = RequestLabels { r#type: request.name(), response: response.name() };
                requests.get_or_create_owned(&labels);
            }
        }
        registry.register("requests", "Guest requests by type and response", requests.clone());
        let latency: Family<TypeLabel, Histogram> =
            Family::new_with_constructor(|| Histogram::new(LATENCY_BUCKETS));
        registry.register_with_unit(
            "request_duration",
            "From taking a guest request to answering it",
            Unit::Seconds,
            latency.clone(),
        );
        let mut counter = |name, help| {
            let counter = Counter::default();
            registry.register(name, help, counter.clone());
            counter
        };
        let malformed =
            counter("malformed_requests", "Descriptor chains returned unused as malformed");
        let connections = counter("connections", "Front-ends that connected");
        let discard_failures = CopiedCounter::new(counter(
            "discard_failures",
            "Times that memory of unplugged blocks could not be discarded",
        ));
        let discard_clients_dropped = counter(
            "discard_clients_dropped",
            "Clients of the discard channel dropped for silence or for breaking the protocol",
        );
        let workers_lost = counter(
            "workers_lost",
            "Connections ended because the worker of their ring ended by itself",
        );
        let log_lines_lost = CopiedCounter::new(counter(
            "log_lines_lost",
            "Lines of the log that stderr did not take in time",
        ));
        let log_lines_suppressed = CopiedCounter::new(counter(
            "log_lines_suppressed",
            "Lines of the log that were only counted there, as there were many of their kind",
        ));
        let discard_clients_turned_away = counter(
            "discard_clients_turned_away",
            "Connections to the discard channel that were refused as too many or too soon",
        );
        let state_file_errors = counter(
            "state_file_errors",
            "Times that the state file did not take a change, which was then refused, or the note \
             that a request was answered",
        );
        let discard_freezes_expired = counter(
            "discard_freezes_expired",
            "Freezes of discard-channel clients that ended since they were not renewed",
        );
        let discard_client_wait = Counter::default();
        registry.register_with_unit(
            "discard_client_wait",
            "Time for which changes of block state waited for clients of the discard channel",
            Unit::Seconds,
            discard_client_wait.clone(),
        );
        let mut bytes = |name, help| {
            let counter = Counter::default();
            registry.register_with_unit(name, help, Unit::Bytes, counter.clone());
            counter
        };
        let populated_bytes = bytes("populated", "Memory announced to the guest's use");
        let discarded_bytes = bytes("discarded", "Memory taken from the guest's use");
        let stray_bytes = bytes(
            "stray_swept",
            "Memory that the guest had in unplugged blocks, found by sweeps and discarded",
        );
        let mut size = |name, help| {
            let gauge = Gauge::default();
            registry.register_with_unit(name, help, Unit::Bytes, gauge.clone());
            gauge
        };
        let region = size("region_size", "Size of the region");
        let usable = size("usable_region_size", "Size of the part that requests may name");
        let plugged = size("plugged_size", "Sum of the plugged blocks");
        let requested = size("requested_size", "What the guest is asked to plug");
        let resident = Arc::new(Resident::default());
        registry.register_collector(Box::new(Arc::clone(&resident)));
        let mut flag = |name, help| {
            let gauge = Gauge::default();
            registry.register(name, help, gauge.clone());
            gauge
        };
        let connected = flag("connected", "Whether a front-end is connected");
        let migration = flag("migration_active", "Whether block state is frozen");
        let workers = flag(
            "workers",
            "Threads that serve the guest's queue: 1 from the first request of a connection to \
             its end",
        );
        let resize_stalled = flag(
            "resize_stalled",
            "Whether the guest stands still on its way to the requested size",
        );
        Self {
            registry: root,
            counted: Default::default(),
            timed: Default::default(),
            requests,
            latency,
            malformed,
            connections,
            populated_bytes,
            discarded_bytes,
            stray_bytes,
            discard_failures,
            discard_clients_dropped,
            workers_lost,
            log_lines_lost,
            log_lines_suppressed,
            discard_clients_turned_away,
            discard_client_wait,
            discard_freezes_expired,
            region,
            usable,
            plugged,
            requested,
            resident,
            connected,
            migration,
            workers,
            resize_stalled,
            state_file_errors,
        }
    }

    /// Counts an answered request.
    pub fn request(&self, request: Request, response: Response, took: Duration) {
        let kind = type_index(request);
        let counter = self.counted[kind][response_index(response)].get_or_init(|| {
            let labels = RequestLabels { r#type: request.name(), response: response.name() };
            self.requests.get_or_create_owned(&labels)
        });
        counter.inc();
        let histogram = self.timed[kind].get_or_init(|| {
            self.latency.get_or_create_owned(&TypeLabel { r#type: request.name() })
        });
        histogram.observe(took.as_secs_f64());
    }

    /// Counts what a sweep has discarded, bytes.
    pub fn stray(&self, size: u64) {
        self.stray_bytes.inc_by(size);
    }

    /// Counts a chain that was no request.
    pub fn malformed(&self) {
        self.malformed.inc();
    }

    /// A thread begins to serve a ring.
    pub fn worker_begins(&self) {
        self.workers.inc();
    }

    /// A thread that served a ring ends.
    pub fn worker_ends(&self) {
        self.workers.dec();
    }

    /// Threads that serve a ring now.
    #[cfg(test)]
    pub(crate) fn workers(&self) -> i64 {
        self.workers.get()
    }

    /// The worker of a ring ended by itself.
    pub fn worker_lost(&self) {
        self.workers_lost.inc();
    }

    /// Counts a front-end.
    pub fn connection(&self) {
        self.connections.inc();
    }

    /// Counts a client of the discard channel that was dropped.
    pub fn discard_client_dropped(&self) {
        self.discard_clients_dropped.inc();
    }

    /// Counts a client of the discard channel that was not let in.
    pub fn discard_client_turned_away(&self) {
        self.discard_clients_turned_away.inc();
    }

    /// Counts a freeze of a client that was not renewed.
    pub fn discard_freeze_expired(&self) {
        self.discard_freezes_expired.inc();
    }

    /// Adds the time for which a change has waited for clients of the discard channel.
    pub fn waited_for_discard_clients(&self, took: Duration) {
        self.discard_client_wait.inc_by(took.as_secs_f64());
    }

    /// Counts what the state file did not take.
    pub fn state_file_error(&self) {
        self.state_file_errors.inc();
    }

    /// The text of all metrics, with the sizes as they are now.
    pub fn encode(&self, controller: &MemController, watched: Watched) -> String {
        let config = controller.config();
        let gauge = |gauge: &Gauge, value: u64| {
            gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
        };
        gauge(&self.region, config.region_size);
        gauge(&self.usable, config.usable_region_size);
        gauge(&self.plugged, config.plugged_size);
        gauge(&self.requested, config.requested_size);
        *self.resident.0.lock() = controller.resident_size();
        self.connected.set(i64::from(watched.connected));
        self.resize_stalled.set(i64::from(watched.resize_stalled));
        self.migration.set(i64::from(controller.migration_active()));
        self.discard_failures.copy(controller.memory().discard_failures());
        self.log_lines_lost.copy(crate::log::lost());
        self.log_lines_suppressed.copy(crate::log::counted());
        let mut encoded = String::new();
        text::encode(&mut encoded, &self.registry).expect("a String takes any text");
        encoded
    }
}

fn type_index(request: Request) -> usize {
    match request {
        Request::Plug(_) => 0,
        Request::Unplug(_) => 1,
        Request::UnplugAll => 2,
        Request::State(_) => 3,
        Request::Unsupported(_) => 4,
    }
}

fn response_index(response: Response) -> usize {
    match response {
        Response::Ack | Response::AckState(_) => 0,
        Response::Nack => 1,
        Response::Busy => 2,
        Response::Error => 3,
    }
}

/// Counts what is populated and discarded, as the device's listeners see it.
pub struct MetricsListener(pub Arc<Metrics>);

impl RamDiscardListener for MetricsListener {
    fn name(&self) -> &str {
        "metrics"
    }

    fn notify_populate(&mut self, section: Section) -> Result<(), String> {
        self.0.populated_bytes.inc_by(section.len());
        Ok(())
    }

    fn notify_discard(&mut self, section: Section) {
        self.0.discarded_bytes.inc_by(section.len());
    }
}
