//! The server: accepts connections, and ends them when told to.

use std::future::poll_fn;
use std::io;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::task::Poll;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::{Request, StatusCode, header};
use axum::response::IntoResponse;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use management_api::PROBLEM_JSON;
use parking_lot::Mutex;
use program::listener::{self, SocketFile};
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::audit::Audit;
use super::caller::CALLS;
use super::hangup::Hangup;
use super::places::{Place, Places};
use super::router::{Api, LISTS, metrics_router, router};
use super::stream::PatientStream;
use super::{ErrorAnswer, Management};
use crate::confinement;
use crate::reserve::{PAUSE, RESERVE};
use crate::sys::peer_cred::peer_cred;

/// Connections at a time. One more takes the place of the one that is idle for longest; when a
/// request is served on each, it is told that there are too many.
const CONNECTIONS: usize = 64;

/// From the start of a connection, or of waiting for the next request, to the end of its head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a client may keep an answer waiting, in all; what it reads buys time back.
const WRITE_PATIENCE: Duration = Duration::from_secs(10);

/// What is read ahead of a connection, at most; also bounds the head of a request.
const BUFFER: usize = 64 << 10;

/// What connections have to end by themselves at shutdown.
const GRACE: Duration = Duration::from_millis(300);

/// The management API on its socket.
///
/// Clients that connect between [`Server::bind`] and [`Server::start`] are served once it runs.
/// Dropping it shuts it down.
pub struct Server {
    management: Arc<dyn Management>,
    offers: Offers,
    state: Mutex<State>,
    shutdown: watch::Sender<bool>,
}

/// Which resources are served.
#[derive(Clone, Copy)]
enum Offers {
    /// All of the API.
    Everything,
    /// The metrics alone, to clients that need not be able to change anything.
    Metrics,
}

enum State {
    Bound(UnixListener, SocketFile),
    Running(JoinHandle<()>, SocketFile),
    Ended,
}

impl Server {
    /// Binds the socket. A socket file left by a killed daemon is replaced.
    ///
    /// # Errors
    ///
    /// When the socket is served already, when the path is something else than a socket, or when
    /// it cannot be bound.
    pub fn bind(path: impl AsRef<Path>, management: Arc<dyn Management>) -> io::Result<Self> {
        Self::bind_for(Offers::Everything, path.as_ref(), management)
    }

    /// As [`Server::bind`], for a socket that serves the metrics alone.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn bind_metrics(
        path: impl AsRef<Path>,
        management: Arc<dyn Management>,
    ) -> io::Result<Self> {
        Self::bind_for(Offers::Metrics, path.as_ref(), management)
    }

    fn bind_for(offers: Offers, path: &Path, management: Arc<dyn Management>) -> io::Result<Self> {
        let (listener, file) = listener::bind(path)?;
        let state = Mutex::new(State::Bound(listener, file));
        Ok(Self { management, offers, state, shutdown: watch::Sender::new(false) })
    }

    /// Serves the socket on a thread of its own. Does nothing when that was done before.
    ///
    /// # Errors
    ///
    /// When there is no thread to be had; the socket is closed then.
    pub fn start(&self) -> io::Result<()> {
        let mut state = self.state.lock();
        let (listener, file) = match std::mem::replace(&mut *state, State::Ended) {
            State::Bound(listener, file) => (listener, file),
            other => {
                *state = other;
                return Ok(());
            }
        };
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            // A place is free a moment before its thread is: else another thread would be started,
            // and with requests all the time none would ever end.
            .max_blocking_threads(CALLS + LISTS)
            .thread_name("management")
            .on_thread_start(|| sandbox::confine_thread(confinement::MANAGEMENT))
            .enable_all()
            .build()?;
        let shutdown = self.shutdown.subscribe();
        let api = Api::new(Arc::clone(&self.management), shutdown.clone());
        let router = match self.offers {
            Offers::Everything => router(api),
            Offers::Metrics => metrics_router(api),
        };
        let listener = {
            let _inside = runtime.enter();
            tokio::net::UnixListener::from_std(listener)?
        };
        let thread = thread::Builder::new().name("management".to_owned()).spawn(move || {
            sandbox::confine_thread(confinement::MANAGEMENT);
            runtime.block_on(serve(listener, router, shutdown));
            // A call to the device may still block; it ends with the process.
            runtime.shutdown_background();
        })?;
        *state = State::Running(thread, file);
        Ok(())
    }

    /// Ends all connections and removes the socket, within a second.
    pub fn shutdown(&self) {
        let state = std::mem::replace(&mut *self.state.lock(), State::Ended);
        self.shutdown.send_replace(true);
        match state {
            State::Bound(listener, file) => drop((listener, file)),
            State::Running(thread, file) => {
                drop(file);
                let _ = thread.join();
            }
            State::Ended => {}
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shutdown();
    }
}

async fn serve(
    listener: tokio::net::UnixListener,
    router: Router,
    mut shutdown: watch::Receiver<bool>,
) {
    let mut connections = JoinSet::new();
    let mut places = Places::new(CONNECTIONS);
    loop {
        let accepted = tokio::select! {
            accepted = accept(&listener) => accepted,
            Some(_) = connections.join_next() => continue,
            _ = shutdown.wait_for(|end| *end) => break,
        };
        match accepted {
            Ok(Some(stream)) => match places.take() {
                Some(place) => {
                    let served = connection(stream, place, router.clone(), shutdown.clone());
                    connections.spawn(served);
                }
                None => turn_away(&stream),
            },
            Ok(None) => {}
            Err(_) => tokio::time::sleep(PAUSE).await,
        }
    }
    drop(listener);
    let all_ended = async { while connections.join_next().await.is_some() {} };
    // Those that are left end with the set.
    let _ = tokio::time::timeout(GRACE, all_ended).await;
}

/// The next client; `None` when it was refused.
async fn accept(listener: &tokio::net::UnixListener) -> io::Result<Option<UnixStream>> {
    poll_fn(|cx| {
        let mut none_waits = false;
        let admitted = RESERVE.admit("management client", || match listener.poll_accept(cx) {
            Poll::Ready(accepted) => accepted,
            Poll::Pending => {
                none_waits = true;
                Err(io::ErrorKind::WouldBlock.into())
            }
        });
        // Then the next one wakes this task.
        if none_waits {
            return Poll::Pending;
        }
        Poll::Ready(admitted.map(|client| client.map(|(stream, _)| stream)))
    })
    .await
}

async fn connection(
    stream: UnixStream,
    place: Arc<Place>,
    router: Router,
    mut shutdown: watch::Receiver<bool>,
) {
    let hangup = Hangup::of(&stream);
    let peer = peer_cred(&stream).ok();
    let io = TokioIo::new(PatientStream::new(stream, WRITE_PATIENCE));
    let router = TowerToHyperService::new(router);
    let service = service_fn(|request: Request<Incoming>| {
        let audit = Audit::of(&request, peer);
        let serving = place.serve();
        let answer = serving.is_some().then(|| router.call(request));
        async move {
            // The answer's body is a part of the service: it may be a stream of events.
            let answer = match answer {
                Some(answer) => answer.await?,
                None => too_many().into_response(),
            };
            if let Some(audit) = audit {
                audit.answered(&answer);
            }
            Ok::<_, std::convert::Infallible>(answer.map(|body| {
                Body::new(body.map_frame(move |frame| {
                    let _serving = &serving;
                    frame
                }))
            }))
        }
    });
    let connection = http1::Builder::new()
        // A client that has nothing more to ask may say so before it reads its answer.
        .half_close(true)
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(BUFFER)
        .serve_connection(io, service);
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        // What a client asked for before it left is begun first.
        biased;
        ended = connection.as_mut() => ended,
        // What it returns holds a lock and must not live across the await below.
        () = async { drop(shutdown.wait_for(|end| *end).await) } => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
        // With half-closed connections served, reading does not tell.
        () = hangup.gone() => return,
        () = place.lost() => return,
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "management connection ended");
    }
}

/// Answers without reading, and without waiting for room to write.
fn turn_away(stream: &UnixStream) {
    let body = serde_json::to_string(&too_many().problem).unwrap_or_default();
    let answer = format!(
        "HTTP/1.1 503 Service Unavailable\r\n{}: {PROBLEM_JSON}\r\n{}: {}\r\n{}: close\r\n\r\n{body}",
        header::CONTENT_TYPE,
        header::CONTENT_LENGTH,
        body.len(),
        header::CONNECTION,
    );
    let _ = stream.try_write(answer.as_bytes());
}

/// Requests are served on all connections.
fn too_many() -> ErrorAnswer {
    let detail =
        format!("Requests of {CONNECTIONS} clients are being answered already; try again later.");
    ErrorAnswer::new(StatusCode::SERVICE_UNAVAILABLE, detail)
}
