//! OpenMetrics on a Unix socket.

use std::convert::Infallible;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode, header};
use hyper_util::rt::{TokioIo, TokioTimer};
use parking_lot::Mutex;
use program::listener::{self, SocketFile};
use program::metrics::{Process, register_program};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, text};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::registry::Registry;
use tokio::net::{UnixListener, UnixStream};
use tokio::runtime::Runtime;
use tokio::sync::Semaphore;

use crate::cli::report::{Report, Untold};
use crate::error::PagerError;
use crate::socket::Address;

const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// Scrapers at a time; more wait to be accepted.
const CONNECTIONS: usize = 8;
/// For a request to come, and for its answer to be read.
const PATIENCE: Duration = Duration::from_secs(10);
/// Between two accepts when the first failed.
const PAUSE: Duration = Duration::from_millis(100);
/// Bytes of a request's head.
const HEAD_MAX: usize = 16 << 10;

/// What is measured; encoded when it is asked for.
pub type SharedRegistry = Arc<Mutex<Registry>>;

/// What every run tells: of the process, the program, and lines that were not told.
fn of_program(report: &Report) -> Registry {
    let mut root = Registry::default();
    root.register_collector(Box::new(Process));
    let own = root.sub_registry_with_prefix("vmem_pager");
    register_program(own, env!("CARGO_PKG_VERSION"));
    own.register_collector(Box::new(Lines(report.clone())));
    root
}

/// Counts lines when it is asked.
struct Lines(Report);

impl std::fmt::Debug for Lines {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Lines")
    }
}

impl Collector for Lines {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let Untold { lost, suppressed } = self.0.untold();
        let counts = [
            ("log_lines_lost", "Lines that stdout or stderr did not take in time", lost),
            (
                "log_lines_suppressed",
                "Lines that were only counted on stderr, as there were many of their kind",
                suppressed,
            ),
        ];
        for (name, help, count) in counts {
            let counter = ConstCounter::new(count);
            let metric = encoder.encode_descriptor(name, help, None, counter.metric_type())?;
            counter.encode(metric)?;
        }
        Ok(())
    }
}

/// What is measured of a run, with the registry that scrapers read it from.
#[derive(Debug)]
pub struct Measured<F> {
    registry: SharedRegistry,
    figures: Arc<F>,
}

/// Figures of a run.
pub trait RunFigures: Sized {
    /// How the names of its metrics begin.
    const PREFIX: &'static str;

    /// All zero, and told to `registry`.
    fn new(registry: &SharedRegistry) -> Arc<Self>;
}

impl<F: RunFigures> Default for Measured<F> {
    fn default() -> Self {
        Self::new()
    }
}

impl<F: RunFigures> Measured<F> {
    /// All zero.
    pub fn new() -> Self {
        let registry = Arc::new(Mutex::new(Registry::with_prefix(F::PREFIX)));
        let figures = F::new(&registry);
        Self { registry, figures }
    }

    /// What scrapers are told.
    pub fn registry(&self) -> SharedRegistry {
        Arc::clone(&self.registry)
    }

    /// What the run adds to.
    pub fn figures(&self) -> &Arc<F> {
        &self.figures
    }
}

/// Serves `GET /metrics` until it is dropped.
#[derive(Debug)]
pub struct MetricsServer {
    /// Ends, with all connections, when dropped.
    runtime: Option<Runtime>,
    _file: SocketFile,
}

impl MetricsServer {
    /// Serves `registry` at `path`, with what every process has, and what `report` could not tell.
    ///
    /// # Errors
    ///
    /// When the socket is in use or cannot be bound, or there is no thread to be had.
    pub fn start(
        path: &Path,
        registry: SharedRegistry,
        report: &Report,
    ) -> Result<Self, PagerError> {
        let failed = |source| PagerError::Socket {
            action: "cannot serve metrics on",
            socket: Address::Unix(path.to_owned()).to_string(),
            source,
        };
        let (listener, file) = listener::bind(path).map_err(failed)?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("metrics")
            .enable_all()
            .build()
            .map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let listener = {
            let _inside = runtime.enter();
            UnixListener::from_std(listener).map_err(failed)?
        };
        let of_program = Arc::new(Mutex::new(of_program(report)));
        runtime.spawn(serve(listener, Arc::new([of_program, registry])));
        Ok(Self { runtime: Some(runtime), _file: file })
    }
}

impl Drop for MetricsServer {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// What a scraper gets, one after the other.
type Registries = Arc<[SharedRegistry; 2]>;

async fn serve(listener: UnixListener, registries: Registries) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let registries = Arc::clone(&registries);
                tokio::spawn(async move {
                    // One that neither asks nor reads makes room for others.
                    let _ =
                        tokio::time::timeout(2 * PATIENCE, connection(stream, registries)).await;
                    drop(place);
                });
            }
            Err(_) => tokio::time::sleep(PAUSE).await,
        }
    }
}

async fn connection(stream: UnixStream, registries: Registries) {
    let service = service_fn(|request| {
        let answer = answer(&request, &registries[..]);
        async move { Ok::<_, Infallible>(answer) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE)
        .max_buf_size(HEAD_MAX)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    // A scraper that breaks off harms nothing.
    let _ = served.await;
}

fn answer(request: &Request<Incoming>, registries: &[SharedRegistry]) -> Response<String> {
    let (status, kind, body) = match (request.method(), request.uri().path()) {
        (&Method::GET, "/metrics") => {
            let mut encoded = String::new();
            let all = registries.iter();
            let mut each =
                all.map(|registry| text::encode_registry(&mut encoded, &registry.lock()));
            let done = each.try_for_each(|encoded| encoded);
            done.and_then(|()| text::encode_eof(&mut encoded)).expect("a String takes any text");
            (StatusCode::OK, OPENMETRICS, encoded)
        }
        (_, "/metrics") => (StatusCode::METHOD_NOT_ALLOWED, "text/plain", "only GET\n".to_owned()),
        _ => (StatusCode::NOT_FOUND, "text/plain", "only /metrics is served\n".to_owned()),
    };
    let mut response = Response::new(body);
    *response.status_mut() = status;
    let kind = header::HeaderValue::from_static(kind);
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use prometheus_client::metrics::counter::Counter;

    fn ask(path: &Path, request: &str) -> String {
        let mut stream = UnixStream::connect(path).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    #[test]
    fn scrapers_get_openmetrics_and_the_socket_goes_with_the_server() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics");
        let mut registry = Registry::with_prefix("vmem_pager");
        let counter: Counter = Counter::default();
        registry.register("faults", "Faults", counter.clone());
        let server = {
            let registry = Arc::new(Mutex::new(registry));
            MetricsServer::start(&path, registry, &Report::silent()).unwrap()
        };
        counter.inc_by(7);
        let answer = ask(&path, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        assert!(answer.contains(OPENMETRICS), "{answer}");
        assert!(answer.contains("vmem_pager_faults_total 7\n"), "{answer}");
        assert!(answer.ends_with("# EOF\n"), "{answer}");
        assert_eq!(answer.matches("# EOF").count(), 1, "{answer}");
        for name in [
            "vmem_pager_build_info{version=\"",
            "vmem_pager_start_time_seconds ",
            "vmem_pager_log_lines_lost_total 0\n",
            "vmem_pager_log_lines_suppressed_total 0\n",
            "process_start_time_seconds ",
            "process_cpu_seconds_total ",
            "process_resident_memory_bytes ",
            "process_open_fds ",
        ] {
            assert!(answer.contains(&format!("\n{name}")), "{name}: {answer}");
        }
        let answer = ask(&path, "POST /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
        assert!(answer.starts_with("HTTP/1.1 405"), "{answer}");
        let answer = ask(&path, "GET / HTTP/1.1\r\nHost: x\r\n\r\n");
        assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");
        drop(server);
        assert!(!path.exists());
    }
}
