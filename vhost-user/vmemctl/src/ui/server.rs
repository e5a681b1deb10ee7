//! The proxy: HTTP/1.1 on a loopback address, and a connection to the daemon for each request.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::{Either, Full};
use hyper::body::{Bytes, Incoming};
use hyper::header::{self, HeaderName, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use management_api::{PROBLEM_JSON, Problem};
use tokio::net::{TcpListener, TcpStream};

use super::guard::{Guard, Pass};
use super::places::{CONNECTIONS, Place, Places};
use crate::{Client, Failure};

/// From the start of a connection to the end of an answer that needs no token, or to the token.
const UNPROVEN_TIMEOUT: Duration = Duration::from_secs(3);

/// From the start of a connection, or of waiting for the next request, to the end of its head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);

/// What is read ahead of a connection, at most; also bounds the head of a request.
const BUFFER: usize = 16 << 10;

/// How long an answer may make no progress at a browser.
const STALLED: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 60 });

/// After a connection could not be accepted: for want of descriptors, mostly.
const PAUSE: Duration = Duration::from_millis(100);

/// What passes from the daemon's head to the browser's.
const PASSED: [HeaderName; 4] = [
    header::CONTENT_TYPE,
    header::CONTENT_SECURITY_POLICY,
    header::REFERRER_POLICY,
    HeaderName::from_static("cross-origin-opener-policy"),
];

type Body = Either<Incoming, Full<Bytes>>;

/// Serves browsers without end.
pub(super) async fn serve(
    listener: TcpListener,
    client: &Client,
    guard: &Arc<Guard>,
) -> Result<(), Failure> {
    let places = Places::new();
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(_) => {
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        let (client, guard, place) = (client.clone(), Arc::clone(guard), places.enter());
        tokio::spawn(async move { connection(stream, &client, &guard, &place).await });
    }
}

async fn connection(stream: TcpStream, client: &Client, guard: &Guard, place: &Place) {
    let stalled = u32::try_from(STALLED.as_millis()).unwrap_or(u32::MAX);
    // Nothing else ends the writing to a browser that no longer reads.
    if rustix::net::sockopt::set_tcp_user_timeout(&stream, stalled).is_err() {
        return;
    }
    let service = service_fn(|request: Request<Incoming>| async move {
        Ok::<_, Infallible>(answer(&request, client, guard, place).await)
    });
    let mut connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(BUFFER)
        .serve_connection(TokioIo::new(stream), service);
    // How it ends is the browser's business.
    tokio::select! {
        _ = &mut connection => return,
        () = place.ousted() => {}
        () = tokio::time::sleep(UNPROVEN_TIMEOUT) => {}
    }
    if place.is_proven() {
        let _ = connection.await;
    } else if !place.is_answered() {
        turn_away(connection.into_parts().io.inner());
    }
}

async fn answer(
    request: &Request<Incoming>,
    client: &Client,
    guard: &Guard,
    place: &Place,
) -> Response<Body> {
    let mut response = judged(request, client, guard, place).await;
    place.answer();
    if !place.is_proven() {
        // What needs no token comes once.
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

async fn judged(
    request: &Request<Incoming>,
    client: &Client,
    guard: &Guard,
    place: &Place,
) -> Response<Body> {
    let resource = match guard.judge(request.method(), request.uri(), request.headers()) {
        Ok(Pass::Page) => "/",
        Ok(Pass::Read(resource)) if place.prove() => resource,
        Ok(Pass::Read(_)) => return refused(&too_many()),
        Err(problem) => return refused(&problem),
    };
    let told = match client.get(resource).await {
        Ok(told) => told,
        Err(Failure::Refused(problem)) if problem.status != 404 || resource != "/" => {
            return refused(&problem);
        }
        Err(failure) => {
            let detail = match failure {
                Failure::Refused(_) => "This daemon is older than its page.".to_owned(),
                failure => format!("{failure}."),
            };
            let status = StatusCode::BAD_GATEWAY;
            return refused(&Problem::new(status.as_u16(), "Bad Gateway", detail));
        }
    };
    let (head, body) = told.into_parts();
    let mut response = Response::new(Body::Left(body));
    *response.status_mut() = head.status;
    for name in PASSED {
        if let Some(value) = head.headers.get(&name) {
            response.headers_mut().insert(name, value.clone());
        }
    }
    protect(&mut response);
    response
}

/// An answer that is an error; the connection ends with it, which leaves its place to others.
fn refused(problem: &Problem) -> Response<Body> {
    let body = serde_json::to_vec(problem).unwrap_or_default();
    let mut response = Response::new(Body::Right(Full::new(body.into())));
    *response.status_mut() =
        StatusCode::from_u16(problem.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let asks_for = match response.status() {
        StatusCode::METHOD_NOT_ALLOWED => Some((header::ALLOW, "GET")),
        StatusCode::UNAUTHORIZED => Some((header::WWW_AUTHENTICATE, "Bearer")),
        _ => None,
    };
    let fixed = [(header::CONTENT_TYPE, PROBLEM_JSON), (header::CONNECTION, "close")];
    for (name, value) in fixed.into_iter().chain(asks_for) {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    protect(&mut response);
    response
}

/// Nothing of it is kept, guessed at, or read by other sites.
fn protect(response: &mut Response<Body>) {
    for (name, value) in [
        (header::CACHE_CONTROL, "no-store"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
    ] {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
}

fn too_many() -> Problem {
    let detail = format!("{CONNECTIONS} connections are open already; try again later.");
    Problem::new(503, "Service Unavailable", detail)
}

/// Answers one that was not answered yet, without reading, and without waiting for room to write.
fn turn_away(stream: &TcpStream) {
    let detail = "Others have come meanwhile, or the time is over; show the token at once.";
    let problem = Problem::new(503, "Service Unavailable", detail);
    let body = serde_json::to_string(&problem).unwrap_or_default();
    let answer = format!(
        "HTTP/1.1 503 Service Unavailable\r\n{}: {PROBLEM_JSON}\r\n{}: {}\r\n{}: close\r\n\r\n{body}",
        header::CONTENT_TYPE,
        header::CONTENT_LENGTH,
        body.len(),
        header::CONNECTION,
    );
    let _ = stream.try_write(answer.as_bytes());
}
