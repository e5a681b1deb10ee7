//! Clients that are hostile, broken or many.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::Fake;
use super::http::{connect, get, raw};

#[test]
fn a_long_reset_blocks_nobody_and_no_shutdown() {
    let fake = Fake::new();
    *fake.reset_takes.lock() = Duration::from_secs(3);
    let (server, dir) = fake.serve();
    let mut stream = connect(dir.path());
    stream.write_all(b"POST /v1/device/system-reset HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    let start = Instant::now();
    assert_eq!(get(dir.path(), "/v1/device").status, 200);
    server.shutdown();
    assert!(start.elapsed() < Duration::from_secs(1));
}

#[test]
fn calls_that_outlive_their_connections_are_bounded() {
    let fake = Fake::new();
    let (_server, dir) = fake.serve();
    let waits = fake.reset_waits.lock();
    let request = b"POST /v1/device/system-reset HTTP/1.1\r\nHost: x\r\n\r\n";
    for _ in 0..10 {
        let mut clients: Vec<_> = (0..16).map(|_| connect(dir.path())).collect();
        clients.iter_mut().for_each(|client| client.write_all(request).unwrap());
        // Needs no call; once it is answered, what came before was read.
        assert_eq!(get(dir.path(), "/openapi.json").status, 200);
    }
    let begun = || fake.resets.load(Ordering::Relaxed);
    let deadline = Instant::now() + Duration::from_secs(5);
    while begun() < 16 {
        assert!(Instant::now() < deadline, "{} calls", begun());
        std::thread::sleep(Duration::from_millis(5));
    }
    // Time for what was read to be begun, were there a place.
    assert_eq!(get(dir.path(), "/openapi.json").status, 200);
    assert_eq!(begun(), 16);
    drop(waits);
    assert_eq!(get(dir.path(), "/v1/device").status, 200);
}

#[test]
fn one_connection_serves_many_requests() {
    let (_server, dir) = Fake::new().serve();
    let mut stream = connect(dir.path());
    for _ in 0..3 {
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
        let mut text = String::new();
        while !text.ends_with("# EOF\n") {
            let mut bytes = [0; 512];
            let count = stream.read(&mut bytes).unwrap();
            assert_ne!(count, 0, "{text}");
            text.push_str(str::from_utf8(&bytes[..count]).unwrap());
        }
    }
}

#[test]
fn clients_that_ask_for_nothing_keep_no_other_from_being_served() {
    let (_server, dir) = Fake::new().serve();
    let mut idle: Vec<_> = (0..64).map(|_| connect(dir.path())).collect();
    for _ in 0..3 {
        assert_eq!(get(dir.path(), "/v1/device").status, 200);
    }
    // The first has lost its place, and the last has not.
    assert_eq!(idle[0].read(&mut [0]).unwrap(), 0);
    idle[63].write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    let mut status = [0; 12];
    idle[63].read_exact(&mut status).unwrap();
    assert_eq!(&status, b"HTTP/1.1 200");
}

#[test]
fn a_client_is_told_when_requests_are_served_on_all_connections() {
    let fake = Fake::new();
    let (_server, dir) = fake.serve();
    let waits = fake.reset_waits.lock();
    let begin = || {
        let mut client = connect(dir.path());
        client.write_all(b"POST /v1/device/system-reset HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
        client
    };
    let mut clients: Vec<_> = (0..63).map(|_| begin()).collect();
    // Once it is answered, what came before was read; and the next takes its place.
    assert_eq!(get(dir.path(), "/openapi.json").status, 200);
    clients.push(begin());
    let deadline = Instant::now() + Duration::from_secs(30);
    let refused = loop {
        let answer = get(dir.path(), "/openapi.json");
        if answer.status == 503 {
            break answer;
        }
        // The last client's request was not read yet, and its place was lost.
        clients.truncate(63);
        clients.push(begin());
        assert!(Instant::now() < deadline, "served: {}", answer.status);
        std::thread::sleep(Duration::from_millis(5));
    };
    assert!(refused.problem(503).contains("64"));
    drop(waits);
    for client in &mut clients {
        let mut status = [0; 10];
        client.read_exact(&mut status).unwrap();
        assert_eq!(&status, b"HTTP/1.1 2", "what is served is answered");
    }
    assert_eq!(get(dir.path(), "/v1/device").status, 200);
}

#[test]
fn slow_clients_are_dropped() {
    let (_server, dir) = Fake::new().serve();
    // Both wait at the same time, since each takes as long as its bound.
    let body = {
        let mut stream = connect(dir.path());
        stream
            .write_all(b"PUT /v1/migration HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
            .unwrap();
        stream
    };
    let mut head = connect(dir.path());
    head.write_all(b"GET /v1/dev").unwrap();
    for (mut stream, said) in [(body, "408"), (head, "")] {
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.contains(said), "{answer}");
    }
}

#[test]
fn a_head_is_bounded() {
    let (_server, dir) = Fake::new().serve();
    let request = format!("GET /{} HTTP/1.1\r\nHost: x\r\n\r\n", "x".repeat(1 << 20));
    let status = raw(dir.path(), request.as_bytes()).status;
    assert!(status == 0 || (400..500).contains(&status), "{status}");
    assert_eq!(get(dir.path(), "/v1/device").status, 200);
}

/// Pieces of requests, so that the bytes get further than the first line.
fn bytes() -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        prop::collection::vec(any::<u8>(), 0..64),
        prop::sample::select(vec![
            b"PUT /v1/device/requested-size HTTP/1.1\r\n".to_vec(),
            b"POST /v1/device/system-reset HTTP/1.1\r\n".to_vec(),
            b"GET /v1/events HTTP/1.1\r\n".to_vec(),
            b"Host: x\r\n".to_vec(),
            b"Content-Length: 30\r\n".to_vec(),
            b"Content-Length: -1\r\n".to_vec(),
            b"Transfer-Encoding: chunked\r\n".to_vec(),
            b"Expect: 100-continue\r\n".to_vec(),
            b"\r\n".to_vec(),
            b"ffffffffffffffff\r\n".to_vec(),
            b"{\"requested_size\": ".to_vec(),
            b"18446744073709551616}".to_vec(),
        ]),
    ];
    prop::collection::vec(piece, 0..10).prop_map(|pieces| pieces.concat())
}

#[test]
fn garbage_hurts_nobody() {
    let (_server, dir) = Fake::new().serve();
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        cases: 300,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    let outcome = runner.run(&bytes(), |bytes| {
        let mut stream = connect(dir.path());
        let _ = stream.write_all(&bytes);
        let _ = stream.shutdown(Shutdown::Write);
        drop(stream);
        prop_assert_eq!(get(dir.path(), "/v1/device").status, 200);
        Ok(())
    });
    outcome.unwrap();
}
