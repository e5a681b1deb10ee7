//! The client against a server with a fake device.

mod doctor;
mod resizes;

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use management_api::{Problem, Range, Resident};
use serde_json::{Value, json};
use tempfile::TempDir;
use vhost_user_mem::management::fake::Fake;
use vhost_user_mem::management::{Management, Server};

use super::{Console, run};

struct Outcome {
    status: u8,
    out: String,
    err: String,
}

fn vmemctl(dir: &TempDir, words: &[&str]) -> Outcome {
    let socket = dir.path().join("api").into_os_string();
    let mut line: Vec<OsString> = vec!["vmemctl".into(), "--api-socket".into(), socket];
    line.extend(words.iter().map(OsString::from));
    program(&line)
}

fn program(line: &[OsString]) -> Outcome {
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let status = run(line, &mut Console::plain(&mut out, &mut err));
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Outcome { status, out: text(out), err: text(err) }
}

#[test]
fn status_for_people_and_programs() {
    let fake = Fake::new();
    let (_server, dir) = fake.serve();
    let shown = vmemctl(&dir, &["status"]);
    assert_eq!((shown.status, shown.err.as_str()), (0, ""));
    assert!(shown.out.contains("region     1 GiB (1073741824 bytes)\n"), "{}", shown.out);
    let json: Value = serde_json::from_str(&vmemctl(&dir, &["status", "--json"]).out).unwrap();
    assert_eq!(json["block_size"], 2 << 20);
}

#[test]
fn resize_without_waiting() {
    let fake = Fake::new();
    let (_server, dir) = fake.serve();
    let done = vmemctl(&dir, &["resize", "64M"]);
    assert_eq!((done.status, done.out.as_str()), (0, "requested 64 MiB, plugged 0 B\n"));
    let refused = vmemctl(&dir, &["resize", "1"]);
    assert_eq!((refused.status, refused.out.as_str()), (1, ""));
    assert_eq!(refused.err, "vmemctl: Requested size refused: 1 breaks a rule\n");
    let refused = vmemctl(&dir, &["--json", "resize", "1"]);
    let error: Value = serde_json::from_str(&refused.err).unwrap();
    assert_eq!((refused.status, &error["problem"]["status"]), (1, &json!(422)));
}

#[test]
fn waiting_ends_when_the_guest_is_done() {
    let fake = Fake::new();
    let (_server, dir) = fake.serve();
    let guest = Arc::clone(&fake);
    let guest = thread::spawn(move || {
        for step in 1..=8 {
            thread::sleep(Duration::from_millis(30));
            guest.plug(step << 21);
        }
    });
    let done = vmemctl(&dir, &["resize", "16M", "--wait", "--timeout", "20s"]);
    assert_eq!((done.status, done.out.as_str()), (0, "requested 16 MiB, plugged 16 MiB\n"));
    assert!(done.err.lines().all(|line| line.starts_with("plugged ")), "{}", done.err);
    guest.join().unwrap();
    let again = vmemctl(&dir, &["--json", "resize", "16M", "--wait"]);
    let device: Value = serde_json::from_str(&again.out).unwrap();
    assert_eq!((again.status, &device["plugged_size"]), (0, &json!(16 << 20)));
}

#[test]
fn waiting_for_less() {
    let fake = Fake::new();
    fake.plug(16 << 20);
    let (_server, dir) = fake.serve();
    let guest = Arc::clone(&fake);
    let guest = thread::spawn(move || {
        thread::sleep(Duration::from_millis(100));
        guest.plug(0);
    });
    assert_eq!(vmemctl(&dir, &["resize", "0", "--wait", "--timeout", "20"]).status, 0);
    guest.join().unwrap();
}

#[test]
fn a_timeout_says_how_far_it_got() {
    let fake = Fake::new();
    fake.plug(2 << 20);
    let (_server, dir) = fake.serve();
    let late = vmemctl(&dir, &["resize", "16M", "--wait", "--timeout", "1s"]);
    assert_eq!((late.status, late.out.as_str()), (3, ""));
    let last = late.err.lines().last().unwrap();
    assert_eq!(
        last,
        "vmemctl: timed out after 1 s: plugged 2 MiB of the requested 16 MiB; \
         no front-end is connected"
    );
    let late = vmemctl(&dir, &["--json", "resize", "16M", "--wait", "--timeout", "0"]);
    let error: Value = serde_json::from_str(&late.err).unwrap();
    assert_eq!((late.status, &error["plugged_size"]), (3, &json!(2 << 20)));
}

#[test]
fn another_resize_ends_the_wait() {
    let fake = Fake::new();
    let (_server, dir) = fake.serve();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| vmemctl(&dir, &["resize", "16M", "--wait"]));
        while fake.device.lock().requested_size == 0 {
            thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(vmemctl(&dir, &["resize", "32M"]).status, 0);
        let superseded = waiting.join().unwrap();
        assert_eq!(superseded.status, 1);
        assert!(superseded.err.contains("superseded"), "{}", superseded.err);
        assert!(superseded.err.contains("32 MiB, no longer 16 MiB"), "{}", superseded.err);
    });
}

#[test]
fn waiting_outlives_the_daemon() {
    let fake = Fake::new();
    let (server, dir) = fake.serve();
    thread::scope(|scope| {
        let waiting =
            scope.spawn(|| vmemctl(&dir, &["resize", "16M", "--wait", "--timeout", "30s"]));
        while fake.device.lock().requested_size == 0 {
            thread::sleep(Duration::from_millis(5));
        }
        server.shutdown();
        thread::sleep(Duration::from_millis(500));
        let device = Arc::clone(&fake);
        let server = Server::bind(dir.path().join("api"), device).unwrap();
        server.start().unwrap();
        thread::sleep(Duration::from_millis(300));
        fake.plug(16 << 20);
        let done = waiting.join().unwrap();
        assert_eq!(done.status, 0, "{}", done.err);
        assert!(done.err.contains("the daemon is back"), "{}", done.err);
    });
}

#[test]
fn blocks_and_reset() {
    let fake = Fake::new();
    fake.plug(512 << 20);
    let (_server, dir) = fake.serve();
    let map = vmemctl(&dir, &["blocks"]);
    assert!(map.out.contains("plugged    512 MiB in 1 range\n"), "{}", map.out);
    let json = || serde_json::from_str::<Value>(&vmemctl(&dir, &["blocks", "--json"]).out).unwrap();
    let discarded = json!([{ "offset": 512 << 20, "size": 512 << 20 }]);
    assert_eq!((&json()["discarded"], &json()["resident"]), (&discarded, &Value::Null));
    let range = Range { offset: 2 << 20, size: 4 << 20 };
    *fake.resident.lock() = Resident { resident: Some(vec![range]) };
    assert_eq!(json()["resident"], json!([{ "offset": 2 << 20, "size": 4 << 20 }]));
    assert_eq!(json().as_object().unwrap().len(), 3);
    let map = vmemctl(&dir, &["blocks"]);
    assert!(map.out.starts_with("0x0000000100000000  +##+++"), "{}", map.out);
    let reset = vmemctl(&dir, &["system-reset"]);
    assert_eq!((reset.status, reset.out.as_str()), (0, "requested 0 B, plugged 0 B\n"));
}

#[test]
fn a_sweep_says_how_much_it_discarded_or_why_not() {
    let fake = Fake::new();
    let (_server, dir) = fake.serve();
    let swept = vmemctl(&dir, &["sweep"]);
    assert_eq!((swept.status, swept.out.as_str()), (0, "discarded 4 KiB\n"));
    fake.set_migration(true).unwrap();
    let refused = vmemctl(&dir, &["sweep"]);
    assert_eq!(refused.status, 1);
    assert_eq!(refused.err, "vmemctl: Sweep refused: migration is active\n");
}

#[test]
fn a_log_level_is_set_or_refused() {
    let fake = Fake::new();
    let (_server, dir) = fake.serve();
    let set = vmemctl(&dir, &["log-level", "debug"]);
    assert_eq!((set.status, set.out.as_str()), (0, "log level debug\n"));
    let set = vmemctl(&dir, &["--json", "log-level", "debug"]);
    let read: Value = serde_json::from_str(&set.out).unwrap();
    assert_eq!(read, json!({ "level": "debug" }));
    let refused = vmemctl(&dir, &["log-level", "inof"]);
    assert_eq!(refused.status, 1);
    assert_eq!(refused.err, "vmemctl: Log level refused: \"inof\" is not\n");
}

/// Lists are read as they come: no bound on other answers is one on them.
#[test]
fn lists_that_are_longer_than_any_other_answer_may_be_are_drawn_and_written_in_full() {
    let fake = Fake::new();
    let ranges: Vec<_> = (0..1 << 16).map(|n| Range { offset: n << 14, size: 4096 }).collect();
    *fake.resident.lock() = Resident { resident: Some(ranges.clone()) };
    let text = serde_json::to_string(&ranges).unwrap();
    assert!(text.len() > 2 << 20, "{} bytes", text.len());
    let (_server, dir) = fake.serve();
    let map = vmemctl(&dir, &["blocks"]);
    assert_eq!((map.status, map.err.as_str()), (0, ""));
    let cells = |c| {
        map.out
            .lines()
            .take_while(|line| !line.is_empty())
            .flat_map(str::chars)
            .filter(|&d| d == c)
            .count()
    };
    assert_eq!((cells('#'), cells('.'), cells('+')), (512, 0, 0), "{}", map.out);
    let json: Value = serde_json::from_str(&vmemctl(&dir, &["blocks", "--json"]).out).unwrap();
    assert_eq!(json["resident"], json!(ranges));
    assert_eq!(json["discarded"], json!([{ "offset": 0, "size": 1 << 30 }]));
}

/// Serves what a daemon served before it told where memory is resident.
fn serve_older(dir: &TempDir, requests: usize) -> thread::JoinHandle<()> {
    let listener = UnixListener::bind(dir.path().join("api")).unwrap();
    let fake = Fake::new();
    fake.plug(2 << 20);
    fake.device.lock().resident_size = Some(4096);
    thread::spawn(move || {
        for _ in 0..requests {
            let mut reader = BufReader::new(listener.accept().unwrap().0);
            let head: Vec<String> = (&mut reader)
                .lines()
                .map(Result::unwrap)
                .take_while(|line| !line.is_empty())
                .collect();
            let (status, body) = match head[0].split(' ').nth(1).unwrap() {
                "/v1/device" => ("200 OK", json!(fake.device())),
                "/v1/device/blocks" => ("200 OK", json!(fake.blocks_now())),
                path => {
                    let problem = Problem::new(404, "Not Found", format!("There is no {path}"));
                    ("404 Not Found", json!(problem))
                }
            };
            let body = body.to_string();
            let head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n", body.len());
            reader.get_mut().write_all((head + &body).as_bytes()).unwrap();
        }
    })
}

#[test]
fn the_map_of_a_daemon_that_does_not_tell_what_is_resident() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = serve_older(&dir, 5);
    let map = vmemctl(&dir, &["blocks"]);
    assert_eq!((map.status, map.err.as_str()), (0, ""));
    assert!(map.out.starts_with("0x0000000100000000  +....."), "{}", map.out);
    assert!(map.out.contains("resident   4 KiB (the daemon does not tell where)"), "{}", map.out);
    let blocks: Value = serde_json::from_str(&vmemctl(&dir, &["blocks", "--json"]).out).unwrap();
    assert_eq!(blocks["plugged"], json!([{ "offset": 0, "size": 2 << 20 }]));
    assert_eq!(blocks["resident"], Value::Null);
    daemon.join().unwrap();
}

#[test]
fn watching_ends_with_the_daemon() {
    let fake = Fake::new();
    let (server, dir) = fake.serve();
    thread::scope(|scope| {
        let watching = scope.spawn(|| vmemctl(&dir, &["watch", "--json"]));
        while fake.events.receiver_count() == 0 {
            thread::sleep(Duration::from_millis(5));
        }
        thread::sleep(Duration::from_millis(200));
        fake.plug(2 << 20);
        thread::sleep(Duration::from_millis(200));
        server.shutdown();
        let watched = watching.join().unwrap();
        assert_eq!(watched.status, 1);
        let lines: Vec<Value> =
            watched.out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.len(), 5, "{}", watched.out);
        assert_eq!(lines[4]["event"], "plugged-size");
        assert_eq!(lines[4]["plugged_size"], 2 << 20);
    });
}

#[test]
fn nobody_there() {
    let dir = tempfile::tempdir().unwrap();
    let start = Instant::now();
    for words in [&["status"][..], &["resize", "1G", "--wait"], &["watch"], &["ui"]] {
        let outcome = vmemctl(&dir, words);
        assert_eq!((outcome.status, outcome.out.as_str()), (1, ""));
        assert_eq!(outcome.err.lines().count(), 1);
        assert!(outcome.err.contains("cannot reach the daemon at /"), "{}", outcome.err);
    }
    assert!(start.elapsed() < Duration::from_secs(5));
}

#[test]
fn wrong_usage() {
    let dir = tempfile::tempdir().unwrap();
    for words in [
        &["resize"][..],
        &["resize", "-1"],
        &["resize", "1.5G"],
        &["resize", "1G", "--timeout", "3s"],
        &["resize", "1G", "--wait", "--timeout", "soon"],
        &["ui", "--listen", "0.0.0.0:8080"],
        &["grow"],
        &[],
    ] {
        assert_eq!(vmemctl(&dir, words).status, 2, "{words:?}");
    }
    let missing = program(&["vmemctl".into(), "status".into()]);
    assert_eq!(missing.status, 2);
    assert!(missing.err.contains("--api-socket"), "{}", missing.err);
    let error: Value =
        serde_json::from_str(&vmemctl(&dir, &["--json", "resize", "x"]).err).unwrap();
    assert!(error["error"].as_str().unwrap().contains("not a size"), "{error}");
}

#[test]
fn completions_and_manual() {
    let script = program(&["vmemctl".into(), "completions".into(), "bash".into()]);
    assert!(script.status == 0 && script.out.contains("system-reset"));
    assert!(script.out.contains("inspect"));
    let manual = program(&["vmemctl".into(), "man".into()]);
    assert!(manual.status == 0 && manual.out.contains(".TH vmemctl"));
    let dir = tempfile::tempdir().unwrap();
    let pages = dir.path().join("man1");
    let words = ["vmemctl".into(), "man".into(), pages.clone().into_os_string()];
    assert_eq!(program(&words).status, 0);
    for page in ["vmemctl.1", "vmemctl-inspect.1", "vmemctl-resize.1", "vmemctl-system-reset.1"] {
        assert!(pages.join(page).exists(), "{page}");
    }
}

#[test]
fn a_closed_pipe_is_no_error() {
    struct Closed;
    impl Write for Closed {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            Err(std::io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let mut err = Vec::new();
    let line: Vec<OsString> = vec!["vmemctl".into(), "man".into()];
    assert_eq!(run(&line, &mut Console::plain(&mut Closed, &mut err)), 0);
    assert!(err.is_empty());
}
