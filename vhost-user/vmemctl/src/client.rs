//! The client's side of the management API.

use std::path::PathBuf;
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::{Method, Request, Response, StatusCode, header};
use hyper_util::rt::TokioIo;
use management_api::{DeviceInfo, Event, LogLevel, Problem, Swept};
use serde::de::DeserializeOwned;
use serde_json::json;
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio::task::spawn_blocking;
use tokio::time::error::Elapsed;
use tokio::time::timeout;

use super::Failure;
use super::range_stream::{self, Item};
use super::sse::SseParser;

/// What is done with each item of the lists of an answer.
pub type Take<'a> = dyn FnMut(Item) -> Result<(), Failure> + 'a;

/// For what answers at once unless something is stuck.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// Several keep-alive comments of the daemon.
const SILENCE: Duration = Duration::from_secs(60);

/// Far more than any answer but lists of ranges has; those are read as they come.
const LARGEST_ANSWER: usize = 1 << 20;

/// Pieces of an answer, and batches of what is in it, that wait to be taken up.
const AHEAD: usize = 2;

/// Speaks to one daemon, with a new connection for each request.
#[derive(Clone, Debug)]
pub struct Client {
    path: PathBuf,
}

impl Client {
    /// A client of the daemon at this socket.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// The device.
    ///
    /// # Errors
    ///
    /// When the daemon cannot be reached or does not answer.
    pub async fn device(&self) -> Result<DeviceInfo, Failure> {
        in_time(self.call(Method::GET, "/v1/device", None)).await
    }

    /// Asks the guest to plug this much.
    ///
    /// # Errors
    ///
    /// When the daemon refuses, cannot be reached or does not answer.
    pub async fn resize(&self, requested_size: u64) -> Result<DeviceInfo, Failure> {
        let body = json!({ "requested_size": requested_size }).to_string();
        in_time(self.call(Method::PUT, "/v1/device/requested-size", Some(body))).await
    }

    /// What is plugged, and what is not: the lists of one moment, as they come.
    ///
    /// # Errors
    ///
    /// When the daemon cannot be reached or does not answer, or `take` fails.
    pub async fn blocks(&self, take: &mut Take<'_>) -> Result<(), Failure> {
        self.ranges("/v1/device/blocks", take).await
    }

    /// Where the host holds memory: a list, as it comes. There is none when guest memory is not
    /// mapped, and of daemons before this resource, which do not tell.
    ///
    /// # Errors
    ///
    /// As [`Client::blocks`].
    pub async fn resident(&self, take: &mut Take<'_>) -> Result<(), Failure> {
        match self.ranges("/v1/device/resident", take).await {
            Err(Failure::Refused(problem)) if problem.status == StatusCode::NOT_FOUND => Ok(()),
            told => told,
        }
    }

    /// Unplugs and discards everything, however long that takes.
    ///
    /// # Errors
    ///
    /// When the daemon refuses or cannot be reached.
    pub async fn system_reset(&self) -> Result<DeviceInfo, Failure> {
        self.call(Method::POST, "/v1/device/system-reset", None).await
    }

    /// Discards what the guest has in unplugged memory, however long that takes.
    ///
    /// # Errors
    ///
    /// When the daemon refuses or cannot be reached.
    pub async fn sweep(&self) -> Result<Swept, Failure> {
        self.call(Method::POST, "/v1/device/sweep", None).await
    }

    /// Has this logged from now on; what the daemon has taken.
    ///
    /// # Errors
    ///
    /// When the daemon refuses, cannot be reached or does not answer.
    pub async fn set_log_level(&self, level: String) -> Result<LogLevel, Failure> {
        let body = json!({ "level": level }).to_string();
        in_time(self.call(Method::PUT, "/v1/log-level", Some(body))).await
    }

    /// The state, and changes as they happen.
    ///
    /// # Errors
    ///
    /// When the daemon refuses, cannot be reached or does not answer.
    pub async fn events(&self) -> Result<Events, Failure> {
        let response = in_time(self.send(Method::GET, "/v1/events", None)).await?;
        Ok(Events { body: response.into_body(), parser: SseParser::default() })
    }

    /// Any resource, its body as it comes.
    ///
    /// # Errors
    ///
    /// When the daemon refuses, cannot be reached or does not answer.
    pub(super) async fn get(&self, resource: &str) -> Result<Response<Incoming>, Failure> {
        in_time(self.send(Method::GET, resource, None)).await
    }

    /// Reads lists of ranges, however long, in bounded memory.
    async fn ranges(&self, resource: &str, take: &mut Take<'_>) -> Result<(), Failure> {
        let mut body = in_time(self.send(Method::GET, resource, None)).await?.into_body();
        let (chunks, text) = mpsc::channel(AHEAD);
        let (items, mut batches) = mpsc::channel(AHEAD);
        let reader = spawn_blocking(move || range_stream::read(text, items));
        let feed = async move {
            while let Some(frame) = timeout(ANSWER_TIMEOUT, body.frame()).await.map_err(silent)? {
                if let Ok(bytes) = frame.map_err(broken)?.into_data()
                    && chunks.send(bytes).await.is_err()
                {
                    // The reader says why.
                    break;
                }
            }
            Ok::<_, Failure>(())
        };
        let take_up = async {
            while let Some(batch) = batches.recv().await {
                batch.into_iter().try_for_each(&mut *take)?;
            }
            Ok(())
        };
        tokio::try_join!(feed, take_up)?;
        let read = reader.await.map_err(|error| Failure::Protocol(error.to_string()))?;
        read.map_err(|error| not_understood(resource, &error))
    }

    async fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        resource: &str,
        body: Option<String>,
    ) -> Result<T, Failure> {
        let response = self.send(method, resource, body).await?;
        let body = collect(response.into_body()).await?;
        serde_json::from_slice(&body).map_err(|error| not_understood(resource, &error))
    }

    /// Sends a request; an answer that is an error is an error here.
    async fn send(
        &self,
        method: Method,
        resource: &str,
        body: Option<String>,
    ) -> Result<Response<Incoming>, Failure> {
        let stream = UnixStream::connect(&self.path)
            .await
            .map_err(|source| Failure::Unreachable { path: self.path.clone(), source })?;
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
        tokio::spawn(connection);
        let mut request =
            Request::builder().method(method).uri(resource).header(header::HOST, "localhost");
        if body.is_some() {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        let request = request
            .body(Full::new(Bytes::from(body.unwrap_or_default())))
            .map_err(|error| Failure::Protocol(error.to_string()))?;
        let response = sender.send_request(request).await.map_err(broken)?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let body = collect(response.into_body()).await?;
        Err(match serde_json::from_slice::<Problem>(&body) {
            Ok(problem) => Failure::Refused(problem),
            Err(_) => Failure::Protocol(format!("the daemon answered {resource} with {status}")),
        })
    }
}

/// Events from the daemon.
pub struct Events {
    body: Incoming,
    parser: SseParser,
}

impl Events {
    /// The next event; `None` when the daemon ends the stream.
    ///
    /// # Errors
    ///
    /// When the connection breaks, or is silent for so long that it must have.
    pub async fn next(&mut self) -> Result<Option<Event>, Failure> {
        loop {
            if let Some(event) = self.parser.pop() {
                return Ok(Some(event));
            }
            let frame = timeout(SILENCE, self.body.frame())
                .await
                .map_err(|_| Failure::Protocol("the stream of events fell silent".to_owned()))?;
            let Some(frame) = frame else { return Ok(None) };
            if let Some(bytes) = frame.map_err(broken)?.data_ref() {
                self.parser.push(bytes).map_err(|_| {
                    Failure::Protocol("the stream of events is not understood".to_owned())
                })?;
            }
        }
    }
}

async fn in_time<T>(answer: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    timeout(ANSWER_TIMEOUT, answer).await.map_err(silent)?
}

fn silent(_: Elapsed) -> Failure {
    let seconds = ANSWER_TIMEOUT.as_secs();
    Failure::Protocol(format!("the daemon did not answer within {seconds} s"))
}

fn not_understood(resource: &str, error: &serde_json::Error) -> Failure {
    Failure::Protocol(format!("the answer to {resource} is not understood: {error}"))
}

async fn collect(body: Incoming) -> Result<Bytes, Failure> {
    match Limited::new(body, LARGEST_ANSWER).collect().await {
        Ok(body) => Ok(body.to_bytes()),
        Err(error) => Err(Failure::Protocol(format!("the answer cannot be read: {error}"))),
    }
}

fn broken(error: hyper::Error) -> Failure {
    Failure::Protocol(format!("the connection to the daemon broke: {error}"))
}
