//! The proxy over TCP, with a device behind it.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use vhost_user_mem::management::fake::Fake;

use super::guard::Guard;
use super::places::{CONNECTIONS, UNPROVEN};
use super::server::serve;
use super::{LISTEN, parse_listen};
use crate::Client;

const TOKEN: &str = "5ec2e7";

/// A proxy, which ends with it.
struct Proxy {
    address: SocketAddr,
    _runtime: Runtime,
}

impl Proxy {
    fn of(dir: &TempDir) -> Self {
        let runtime = Runtime::new().unwrap();
        let listener = runtime.block_on(TcpListener::bind(LISTEN)).unwrap();
        let address = listener.local_addr().unwrap();
        let client = Client::new(dir.path().join("api"));
        let guard = Arc::new(Guard::new(address, TOKEN.to_owned()));
        runtime.spawn(async move { serve(listener, &client, &guard).await });
        Self { address, _runtime: runtime }
    }

    /// Asks for a resource, and leaves the connection open.
    fn ask(&self, resource: &str, headers: &str) -> TcpStream {
        let mut stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let head = format!("GET {resource} HTTP/1.1\r\nHost: {}\r\n{headers}\r\n", self.address);
        let _ = stream.write_all(head.as_bytes());
        stream
    }

    fn get(&self, resource: &str, headers: &str) -> String {
        let mut text = String::new();
        let mut stream = self.ask(resource, &format!("Connection: close\r\n{headers}"));
        // One that is turned away is answered before its request is read, which may reset it.
        let _ = stream.read_to_string(&mut text);
        text
    }
}

fn token() -> String {
    format!("Authorization: Bearer {TOKEN}\r\n")
}

fn read_until(stream: &mut TcpStream, wanted: &str) {
    let (mut text, mut piece) = (String::new(), [0; 4096]);
    while !text.contains(wanted) {
        let length = stream.read(&mut piece).unwrap();
        assert_ne!(length, 0, "the stream ended without {wanted}: {text}");
        text += &String::from_utf8_lossy(&piece[..length]);
    }
}

#[test]
fn the_page_comes_with_its_rules_and_the_device_with_the_token() {
    let (_server, dir) = Fake::new().serve();
    let proxy = Proxy::of(&dir);
    let page = proxy.get("/", "");
    assert!(page.starts_with("HTTP/1.1 200 OK\r\n"), "{page}");
    assert!(page.contains("content-security-policy: default-src 'none'"), "{page}");
    assert!(page.contains("cache-control: no-store\r\n") && page.contains("</html>"), "{page}");
    assert!(!page.contains(TOKEN), "the secret is in the page");
    let device = proxy.get("/v1/device", &token());
    assert!(device.contains("\"region_size\":1073741824"), "{device}");
    let refused = proxy.get("/v1/device", "");
    assert!(refused.starts_with("HTTP/1.1 401 Unauthorized\r\n"), "{refused}");
    assert!(refused.contains("www-authenticate: Bearer\r\n"), "{refused}");
    assert!(!refused.contains("region_size"), "{refused}");
}

#[test]
fn what_changes_the_device_does_not_pass() {
    let fake = Fake::new();
    let (_server, dir) = fake.serve();
    let proxy = Proxy::of(&dir);
    let mut stream = TcpStream::connect(proxy.address).unwrap();
    let body = r#"{"requested_size":2097152}"#;
    let request = format!(
        "PUT /v1/device/requested-size HTTP/1.1\r\nHost: {}\r\n{}Content-Length: {}\r\n\r\n{body}",
        proxy.address,
        token(),
        body.len()
    );
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    // What was not read of the request may reset the connection after its answer.
    let _ = stream.read_to_string(&mut answer);
    assert!(answer.starts_with("HTTP/1.1 405 Method Not Allowed\r\n"), "{answer}");
    assert!(answer.contains("allow: GET\r\n"), "{answer}");
    assert_eq!(fake.device.lock().requested_size, 0);
}

#[test]
fn events_pass_as_they_come_and_end_with_the_browser() {
    let fake = Fake::new();
    let (_server, dir) = fake.serve();
    let proxy = Proxy::of(&dir);
    let mut events = proxy.ask("/v1/events", &token());
    read_until(&mut events, "event: disconnected");
    fake.plug(6 << 20);
    read_until(&mut events, r#"{"plugged_size":6291456}"#);
    drop(events);
    while fake.events.receiver_count() != 0 {
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_daemon_that_is_away_is_told_and_one_that_comes_back_is_used() {
    let fake = Fake::new();
    let (server, dir) = fake.serve();
    let proxy = Proxy::of(&dir);
    server.shutdown();
    let away = proxy.get("/v1/device", &token());
    assert!(away.starts_with("HTTP/1.1 502 Bad Gateway\r\n"), "{away}");
    assert!(away.contains("cannot reach the daemon"), "{away}");
    let path = dir.path().join("api");
    let server = vhost_user_mem::management::Server::bind(path, fake).unwrap();
    server.start().unwrap();
    assert!(proxy.get("/v1/device", &token()).starts_with("HTTP/1.1 200 OK\r\n"));
}

#[test]
fn one_connection_too_many_is_told_so_and_a_place_that_is_left_is_taken() {
    let (_server, dir) = Fake::new().serve();
    let proxy = Proxy::of(&dir);
    let mut open: Vec<TcpStream> = (0..CONNECTIONS)
        .map(|_| {
            let mut stream = proxy.ask("/v1/device", &token());
            read_until(&mut stream, "region_size");
            stream
        })
        .collect();
    let text = proxy.get("/v1/device", &token());
    assert!(text.starts_with("HTTP/1.1 503 Service Unavailable\r\n"), "{text}");
    assert!(proxy.get("/", "").starts_with("HTTP/1.1 200 OK\r\n"), "the page needs no place");
    open.pop().unwrap().shutdown(Shutdown::Both).unwrap();
    while !proxy.get("/v1/device", &token()).starts_with("HTTP/1.1 200 OK\r\n") {
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn connections_without_the_token_keep_no_place_from_one_that_has_it() {
    let (_server, dir) = Fake::new().serve();
    let proxy = Proxy::of(&dir);
    let silent = || {
        let stream = TcpStream::connect(proxy.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream
    };
    // Silent, half a head, and the wrong token.
    let mut open: Vec<TcpStream> = (0..CONNECTIONS + UNPROVEN).map(|_| silent()).collect();
    for stream in &mut open[CONNECTIONS..] {
        stream.write_all(b"GET /v1/device HTTP/1.1\r\n").unwrap();
    }
    let wrong = proxy.get("/v1/device", "Authorization: Bearer 5ec2e8\r\n");
    assert!(wrong.starts_with("HTTP/1.1 401 Unauthorized\r\n"), "{wrong}");
    let device = proxy.get("/v1/device", &token());
    assert!(device.starts_with("HTTP/1.1 200 OK\r\n"), "{device}");
    // The first have made room, and were told so.
    let mut text = String::new();
    open[0].read_to_string(&mut text).unwrap();
    assert!(text.starts_with("HTTP/1.1 503 Service Unavailable\r\n"), "{text}");
    // Those that stay are not waited for without end.
    let mut text = String::new();
    open.pop().unwrap().read_to_string(&mut text).unwrap();
    assert!(text.starts_with("HTTP/1.1 503 Service Unavailable\r\n"), "{text}");
}

#[test]
fn one_that_has_shown_the_token_stays_however_many_come() {
    let fake = Fake::new();
    let (_server, dir) = fake.serve();
    let proxy = Proxy::of(&dir);
    let mut events = proxy.ask("/v1/events", &token());
    read_until(&mut events, "event: disconnected");
    let others: Vec<_> = (0..2 * UNPROVEN).map(|_| TcpStream::connect(proxy.address)).collect();
    assert!(proxy.get("/v1/device", &token()).starts_with("HTTP/1.1 200 OK\r\n"));
    fake.plug(6 << 20);
    read_until(&mut events, r#"{"plugged_size":6291456}"#);
    drop(others);
}

#[test]
fn a_browser_that_does_not_read_loses_its_connection() {
    let fake = Fake::new();
    let (_server, dir) = fake.serve();
    let proxy = Proxy::of(&dir);
    let mut events = proxy.ask("/v1/events", &token());
    read_until(&mut events, "event: disconnected");
    // More than all buffers on the way hold.
    while fake.events.receiver_count() != 0 {
        fake.plug(2 << 20);
        thread::sleep(Duration::from_micros(20));
    }
    let mut rest = Vec::new();
    assert!(events.read_to_end(&mut rest).is_err(), "it was reset");
}

#[test]
fn only_addresses_of_this_host_are_served() {
    assert_eq!(parse_listen("127.0.0.1:0"), Ok(LISTEN));
    assert!(parse_listen("[::1]:8080").is_ok());
    for wrong in ["0.0.0.0:80", "[::]:80", "192.0.2.1:80", "8080", "localhost:80", ""] {
        assert!(parse_listen(wrong).is_err(), "{wrong}");
    }
    assert!(parse_listen("0.0.0.0:80").unwrap_err().contains("not a loopback address"));
}
