//! `resize --wait`: reasons, and steps.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use management_api::{Direction, Event, Resize, ResizeState, StallKind, StallReason};
use parking_lot::Mutex;
use serde_json::{Value, json};
use vhost_user_mem::management::fake::Fake;

use super::vmemctl;

const BLOCK: u64 = 2 << 20;

pub(super) fn stalled() -> Resize {
    let reason = StallReason { kind: StallKind::DriverAbsent, text: "no \u{1b}[31mdriver".into() };
    Resize {
        state: ResizeState::Stalled,
        direction: Some(Direction::Grow),
        remaining_size: 14 << 20,
        rate: None,
        expected_seconds: None,
        since: Some("2026-01-31T23:59:59Z".to_owned()),
        reason: Some(reason),
        last_request: None,
    }
}

/// A guest that has at once what it is asked for, up to a limit; and the sizes it was asked for.
fn obedient(fake: &Arc<Fake>, limit: u64, run: impl FnOnce() + Send) -> Vec<(u64, Duration)> {
    let (asked, end) = (Mutex::new(Vec::new()), AtomicBool::new(false));
    let start = Instant::now();
    thread::scope(|scope| {
        scope.spawn(|| {
            while !end.load(Ordering::Relaxed) {
                let device = fake.device.lock().clone();
                let mut asked = asked.lock();
                let before = asked.last().map_or(0, |(size, _)| *size);
                if before != device.requested_size {
                    asked.push((device.requested_size, start.elapsed()));
                }
                drop(asked);
                let size = device.requested_size.min(limit);
                if size != device.plugged_size {
                    fake.plug(size);
                }
                thread::sleep(Duration::from_millis(2));
            }
        });
        run();
        end.store(true, Ordering::Relaxed);
    });
    asked.into_inner()
}

fn sizes(asked: &[(u64, Duration)]) -> Vec<u64> {
    asked.iter().map(|(size, _)| size / BLOCK).collect()
}

#[test]
fn a_timeout_and_the_status_say_why_the_guest_stands_still() {
    let fake = Fake::new();
    fake.plug(BLOCK);
    fake.device.lock().resize = Some(stalled());
    let (_server, dir) = fake.serve();
    let late = vmemctl(&dir, &["resize", "16M", "--wait", "--timeout", "1s"]);
    assert_eq!((late.status, late.out.as_str()), (3, ""));
    let why = r"stands still since 2026-01-31T23:59:59Z, 14 MiB to plug: no \u{1b}[31mdriver";
    let last = late.err.lines().last().unwrap();
    let expected =
        format!("vmemctl: timed out after 1 s: plugged 2 MiB of the requested 16 MiB; {why}");
    assert_eq!(last, expected);
    // And once before, while it waits.
    assert_eq!(late.err.lines().filter(|line| *line == why).count(), 1, "{}", late.err);
    let late = vmemctl(&dir, &["--json", "resize", "16M", "--wait", "--timeout", "1s"]);
    let error: Value = serde_json::from_str(&late.err).unwrap();
    assert_eq!((late.status, &error["plugged_size"]), (3, &json!(BLOCK)));
    assert_eq!(error["resize"]["reason"]["kind"], "driver-absent");
    let status = vmemctl(&dir, &["status"]).out;
    assert!(status.contains(&format!("resize     {why}\n")), "{status}");
}

#[test]
fn a_change_of_the_reason_is_told_as_it_comes() {
    let fake = Fake::new();
    let (_server, dir) = fake.serve();
    let guest = Arc::clone(&fake);
    let guest = thread::spawn(move || {
        while guest.events.receiver_count() == 0 {
            thread::sleep(Duration::from_millis(5));
        }
        guest.device.lock().resize = Some(stalled());
        let _ = guest.events.send(Event::Resize(Box::new(stalled())));
        thread::sleep(Duration::from_millis(300));
        guest.device.lock().resize = None;
        guest.plug(16 << 20);
    });
    let done = vmemctl(&dir, &["resize", "16M", "--wait", "--timeout", "20s"]);
    guest.join().unwrap();
    assert_eq!(done.status, 0, "{}", done.err);
    assert!(done.err.contains("stands still since 2026-01-31T23:59:59Z"), "{}", done.err);
}

#[test]
fn steps_go_up_and_down_and_each_waits_for_the_guest() {
    let fake = Fake::new();
    let (_server, dir) = fake.serve();
    let asked = obedient(&fake, u64::MAX, || {
        let grown = vmemctl(&dir, &["resize", "16M", "--wait", "--step", "5M"]);
        assert_eq!((grown.status, grown.out.as_str()), (0, "requested 16 MiB, plugged 16 MiB\n"));
        let shrunk = vmemctl(&dir, &["resize", "4M", "--wait", "--step", "8M"]);
        assert_eq!(shrunk.status, 0, "{}", shrunk.err);
    });
    assert_eq!(sizes(&asked), [2, 4, 6, 8, 4, 2]);
}

#[test]
fn a_rate_is_kept() {
    let fake = Fake::new();
    let (_server, dir) = fake.serve();
    let words = ["resize", "8M", "--wait", "--step", "4M", "--max-rate", "8M"];
    let asked = obedient(&fake, u64::MAX, || assert_eq!(vmemctl(&dir, &words).status, 0));
    assert_eq!(sizes(&asked), [2, 4]);
    // 4 MiB take half a second at least, whatever the machine is busy with.
    let (first, second) = (asked[0].1, asked[1].1);
    assert!(second - first >= Duration::from_millis(450), "{asked:?}");
}

#[test]
fn steps_that_end_early_leave_the_guest_with_a_size_on_the_way_and_say_which() {
    let fake = Fake::new();
    let (_server, dir) = fake.serve();
    let asked = obedient(&fake, 5 * BLOCK, || {
        let words = ["resize", "16M", "--wait", "--step", "4M", "--timeout", "2s"];
        let late = vmemctl(&dir, &words);
        assert_eq!(late.status, 3);
        let expected = "plugged 10 MiB of the requested 16 MiB; the guest is asked for 12 MiB";
        assert!(late.err.contains(expected), "{}", late.err);
    });
    assert_eq!(sizes(&asked), [2, 4, 6]);
    assert_eq!(fake.device.lock().requested_size, 6 * BLOCK);
}

#[test]
fn another_resize_ends_the_steps() {
    let fake = Fake::new();
    let (_server, dir) = fake.serve();
    thread::scope(|scope| {
        let stepping = scope.spawn(|| vmemctl(&dir, &["resize", "16M", "--wait", "--step", "4M"]));
        while fake.device.lock().requested_size == 0 {
            thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(vmemctl(&dir, &["resize", "32M"]).status, 0);
        let superseded = stepping.join().unwrap();
        assert_eq!(superseded.status, 1);
        assert!(superseded.err.contains("32 MiB, no longer 4 MiB"), "{}", superseded.err);
    });
    assert_eq!(fake.device.lock().requested_size, 32 << 20);
}

#[test]
fn steps_are_only_for_a_client_that_waits_and_more_than_nothing() {
    let dir = tempfile::tempdir().unwrap();
    for words in [
        &["resize", "16M", "--step", "4M"][..],
        &["resize", "16M", "--max-rate", "4M"],
        &["resize", "16M", "--wait", "--step", "0"],
        &["resize", "16M", "--wait", "--max-rate", "0"],
        &["resize", "16M", "--wait", "--step", "x"],
    ] {
        assert_eq!(vmemctl(&dir, words).status, 2, "{words:?}");
    }
}
