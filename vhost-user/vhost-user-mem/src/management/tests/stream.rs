//! Server-sent events.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use management_api::Event;

use super::Fake;
use super::http::{connect, get};

fn open(dir: &Path) -> BufReader<UnixStream> {
    let mut stream = connect(dir);
    stream.write_all(b"GET /v1/events HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    BufReader::new(stream)
}

/// The next lines that start with one of these words; chunk lengths lie between.
fn lines(reader: &mut impl BufRead, count: usize) -> Vec<String> {
    let lines = reader.lines().map(Result::unwrap);
    let wanted = |line: &String| line.starts_with("event: ") || line.starts_with("data: ");
    lines.filter(wanted).take(count).collect()
}

#[test]
fn the_state_comes_first_then_every_change() {
    let fake = Fake::new();
    fake.device.lock().connected = true;
    let (_server, dir) = fake.serve();
    let mut reader = open(dir.path());
    let expected = [
        "event: requested-size",
        "data: {\"requested_size\":0}",
        "event: plugged-size",
        "data: {\"plugged_size\":0}",
        "event: migration",
        "data: {\"active\":false}",
        "event: connected",
        "data: {\"connected\":true}",
    ];
    assert_eq!(lines(&mut reader, 8), expected);
    fake.plug(2 << 20);
    let _ = fake.events.send(Event::Disconnected);
    let expected = [
        "event: plugged-size",
        "data: {\"plugged_size\":2097152}",
        "event: disconnected",
        "data: {\"connected\":false}",
    ];
    assert_eq!(lines(&mut reader, 4), expected);
}

#[test]
fn the_head_says_what_it_is() {
    let (_server, dir) = Fake::new().serve();
    let mut head = open(dir.path()).lines().map(Result::unwrap);
    assert_eq!(head.next().unwrap(), "HTTP/1.1 200 OK");
    assert!(head.any(|line| line == "content-type: text/event-stream"));
}

#[test]
fn a_slow_reader_is_told_that_it_missed_some() {
    let fake = Fake::new();
    let (_server, dir) = fake.serve();
    let mut reader = open(dir.path());
    lines(&mut reader, 8);
    // Far more than fits the socket and all buffers.
    for size in 1..=20_000 {
        fake.plug(size);
    }
    let mut missed = false;
    for line in reader.lines().map(Result::unwrap) {
        missed |= line.contains("events missed");
        if line == "data: {\"plugged_size\":20000}" {
            break;
        }
    }
    assert!(missed);
}

#[test]
fn readers_leave_room_for_others() {
    let (_server, dir) = Fake::new().serve();
    let mut readers: Vec<_> = (0..32).map(|_| open(dir.path())).collect();
    for reader in &mut readers {
        lines(reader, 8);
    }
    get(dir.path(), "/v1/events").problem(503);
    assert_eq!(get(dir.path(), "/v1/device").status, 200);
    drop(readers);
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        let mut line = String::new();
        open(dir.path()).read_line(&mut line).unwrap();
        if line.contains("200") {
            break;
        }
        assert!(Instant::now() < deadline, "places are not given back");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn shutdown_does_not_wait_for_readers() {
    let fake = Fake::new();
    let (server, dir) = fake.serve();
    let mut reader = open(dir.path());
    lines(&mut reader, 8);
    let _idle = connect(dir.path());
    let start = Instant::now();
    server.shutdown();
    assert!(start.elapsed() < Duration::from_secs(1));
    assert!(!dir.path().join("api").exists());
    // The stream ends as it should, with a last chunk.
    let rest: Vec<String> = reader.lines().map(Result::unwrap).collect();
    assert!(rest.contains(&"0".to_owned()), "{rest:?}");
}
