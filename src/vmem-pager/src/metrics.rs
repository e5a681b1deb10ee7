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
use prometheus_client::encoding::text;
use prometheus_client::registry::Registry;
use tokio::net::{UnixListener, UnixStream};
use tokio::runtime::Runtime;
use tokio::sync::Semaphore;

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

/// Serves `GET /metrics` until it is dropped.
#[derive(Debug)]
pub struct MetricsServer {
    /// Ends, with all connections, when dropped.
    runtime: Option<Runtime>,
    _file: SocketFile,
}

impl MetricsServer {
    /// Serves `registry` at `path`.
    ///
    /// # Errors
    ///
    /// When the socket is in use or cannot be bound, or there is no thread to be had.
    pub fn start(path: &Path, registry: SharedRegistry) -> Result<Self, PagerError> {
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
        runtime.spawn(serve(listener, registry));
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

async fn serve(listener: UnixListener, registry: SharedRegistry) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let registry = Arc::clone(&registry);
                tokio::spawn(async move {
                    // One that neither asks nor reads makes room for others.
                    let _ = tokio::time::timeout(2 * PATIENCE, connection(stream, registry)).await;
                    drop(place);
                });
            }
            Err(_) => tokio::time::sleep(PAUSE).await,
        }
    }
}

async fn connection(stream: UnixStream, registry: SharedRegistry) {
    let service = service_fn(|request| {
        let answer = answer(&request, &registry);
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

fn answer(request: &Request<Incoming>, registry: &Mutex<Registry>) -> Response<String> {
    let (status, kind, body) = match (request.method(), request.uri().path()) {
        (&Method::GET, "/metrics") => {
            let mut encoded = String::new();
            text::encode(&mut encoded, &registry.lock()).expect("a String takes any text");
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
        let server = MetricsServer::start(&path, Arc::new(Mutex::new(registry))).unwrap();
        counter.inc_by(7);
        let answer = ask(&path, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        assert!(answer.contains(OPENMETRICS), "{answer}");
        assert!(answer.contains("vmem_pager_faults_total 7\n"), "{answer}");
        assert!(answer.ends_with("# EOF\n"), "{answer}");
        let answer = ask(&path, "POST /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
        assert!(answer.starts_with("HTTP/1.1 405"), "{answer}");
        let answer = ask(&path, "GET / HTTP/1.1\r\nHost: x\r\n\r\n");
        assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");
        drop(server);
        assert!(!path.exists());
    }
}
