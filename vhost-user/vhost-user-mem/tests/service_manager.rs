//! The daemon under a service manager: what it tells, the sockets that it is passed, and those that are
//! kept for the daemon that comes after it.

mod common;

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::silent_file::{put_descriptors_into, silent_file};
use common::{ADDR, BLOCK, BOOT, PATIENCE, REGION, RING, gpa, ram};
use program::service_manager::fake::{FakeManager, Told};
use rustix::process::{Pid, Signal, kill_process};
use small_vmm::api::ApiClient;
use small_vmm::driver::{MemDriver, MemRequest, RequestType, ResponseType, Shape};
use small_vmm::frontend::{Frontend, USUAL_FEATURES, USUAL_PROTOCOL_FEATURES};
use tempfile::TempDir;

const DAEMON: &str = env!("CARGO_BIN_EXE_vhost-user-mem");

/// A daemon that the fake manager has started.
struct Unit {
    child: Child,
    dir: TempDir,
}

impl Unit {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn api(&self) -> ApiClient {
        ApiClient::new(self.path("api"))
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// How it has ended, and what it said.
    fn ended(&mut self) -> (Option<i32>, String) {
        let deadline = Instant::now() + PATIENCE;
        while self.child.try_wait().unwrap().is_none() {
            assert!(Instant::now() < deadline, "it still runs");
            std::thread::sleep(Duration::from_millis(2));
        }
        let mut said = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        (self.child.wait().unwrap().code(), said)
    }

    /// Ends it as a restart of its unit does, and leaves its files.
    fn stop(mut self) -> TempDir {
        self.signal(Signal::TERM);
        let (status, said) = self.ended();
        assert_eq!(status, Some(0), "{said}");
        std::mem::replace(&mut self.dir, tempfile::tempdir().unwrap())
    }
}

impl Drop for Unit {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Starts a daemon in `dir`, which is replaced in `args`.
fn start(
    manager: &FakeManager,
    dir: TempDir,
    passed: &[(&str, &OwnedFd)],
    args: &[&str],
    more: impl FnOnce(&mut Command),
) -> Unit {
    let (mut command, inheriting) = manager.command(OsStr::new(DAEMON), passed);
    command.args(["--addr", &ADDR.to_string(), "--region-size", &REGION.to_string()]);
    command.args(["--block-size", "2M", "--requested-size", "64M"]);
    for arg in args {
        command.arg(arg.replace("DIR", dir.path().to_str().unwrap()));
    }
    more(&mut command);
    let child = command.stderr(Stdio::piped()).spawn().unwrap();
    drop(inheriting);
    Unit { child, dir }
}

const ALL: [&str; 8] = [
    "--socket-path",
    "DIR/front-end",
    "--api-socket",
    "DIR/api",
    "--discard-socket",
    "DIR/discard",
    "--state-file",
    "DIR/state",
];

fn dir() -> TempDir {
    tempfile::tempdir().unwrap()
}

fn negotiate(unit: &Unit) -> Frontend {
    let frontend = Frontend::connect(&unit.path("front-end")).unwrap();
    frontend.negotiate(USUAL_FEATURES, USUAL_PROTOCOL_FEATURES).unwrap();
    frontend
}

/// What a manager that keeps descriptors has been sent.
fn stored(told: Vec<Told>) -> HashMap<String, OwnedFd> {
    let told = told.into_iter().filter(|told| told.value("FDSTORE") == Some("1"));
    told.map(|mut told| (told.value("FDNAME").unwrap().to_owned(), told.fds.remove(0))).collect()
}

#[test]
fn ready_is_told_when_all_sockets_listen_and_stopping_when_it_ends() {
    let manager = FakeManager::new();
    let mut unit = start(&manager, dir(), &[], &ALL, |_| {});
    let ready = manager.next();
    assert_eq!(ready.value("READY"), Some("1"));
    assert_eq!(ready.value("MAINPID"), Some(&*unit.child.id().to_string()));
    for name in ["front-end", "api", "discard"] {
        UnixStream::connect(unit.path(name)).unwrap();
    }
    unit.signal(Signal::TERM);
    assert_eq!(manager.next().text, "STOPPING=1\n");
    assert_eq!(unit.ended().0, Some(0));
    assert!(!unit.path("api").exists(), "nothing keeps it");
}

#[test]
fn a_start_that_fails_is_not_ready() {
    let manager = FakeManager::new();
    let place = dir();
    let _served = UnixListener::bind(place.path().join("discard")).unwrap();
    let mut unit = start(&manager, place, &[], &ALL, |_| {});
    assert_eq!(unit.ended().0, Some(1));
    assert!(manager.next_within(Duration::ZERO).is_none());
}

#[test]
fn a_manager_that_is_not_there_is_done_without() {
    let manager = FakeManager::new();
    let unit = start(&manager, dir(), &[], &ALL, |command| {
        command.env("NOTIFY_SOCKET", "/no/such/socket");
    });
    let deadline = Instant::now() + PATIENCE;
    while unit.api().device().is_err() {
        assert!(Instant::now() < deadline);
    }
    drop(unit.stop());
}

#[test]
fn a_reload_is_told_with_its_time_and_ends_nothing() {
    let manager = FakeManager::new();
    let unit = start(&manager, dir(), &[], &ALL, |_| {});
    manager.until("READY=1");
    unit.signal(Signal::HUP);
    let reloading = manager.next();
    assert_eq!(reloading.value("RELOADING"), Some("1"));
    assert!(reloading.value("MONOTONIC_USEC").unwrap().parse::<u64>().unwrap() > 0);
    assert_eq!(manager.next().text, "READY=1\n");
    negotiate(&unit);
    drop(unit.stop());
}

#[test]
fn the_watchdog_is_fed_with_and_without_a_front_end() {
    let manager = FakeManager::new();
    let unit = start(&manager, dir(), &[], &ALL, |command| {
        command.env("WATCHDOG_USEC", "200000");
    });
    manager.until("READY=1");
    let fed = || {
        for _ in 0..3 {
            assert_eq!(manager.next().text, "WATCHDOG=1\n");
        }
    };
    fed();
    let ram = ram();
    let frontend = negotiate(&unit);
    fed();
    frontend.set_mem_table(&ram).unwrap();
    let mut driver = MemDriver::at(&ram, RING, 128, true).unwrap();
    frontend.start_ring(0, driver.ring()).unwrap();
    assert_eq!(driver.plug(gpa(0), 1).unwrap().kind(), ResponseType::Ack);
    fed();
    frontend.disconnect();
    fed();
    // It is fed by the process, and by nothing else.
    unit.signal(Signal::STOP);
    while manager.next_within(Duration::from_secs(1)).is_some() {}
    unit.signal(Signal::CONT);
    fed();
}

/// Its memory is in a file whose owner does not answer: the worker waits in the kernel for good.
#[test]
fn a_stuck_worker_feeds_no_watchdog_and_a_start_anew_serves_with_all_state_kept() {
    let Some(mut silent) = silent_file(BOOT) else { return };
    let manager = FakeManager::new();
    let args = [&ALL[..], &["--allow-file-memory"]].concat();
    let watched = |command: &mut Command| {
        command.env("WATCHDOG_USEC", "400000");
    };
    let mut unit = start(&manager, dir(), &[], &args, watched);
    manager.until("READY=1");
    let ram = ram();
    let frontend = negotiate(&unit);
    frontend.set_mem_table(&ram).unwrap();
    let mut driver = MemDriver::at(&ram, RING, 128, true).unwrap();
    frontend.start_ring(0, driver.ring()).unwrap();
    assert_eq!(driver.plug(gpa(5), 1).unwrap().kind(), ResponseType::Ack);
    put_descriptors_into(&silent, &frontend, &ram, &driver);
    for _ in 0..3 {
        assert_eq!(manager.next().text, "WATCHDOG=1\n");
    }
    silent.fall_silent();
    let plug = MemRequest::new(RequestType::Plug, gpa(7), 1).to_bytes();
    driver.submit(&plug, &Shape::default()).unwrap();
    driver.ring_mut().kick().unwrap();
    silent.wait_asked();
    // Other threads live, and none of them feeds for it.
    let deadline = Instant::now() + 3 * PATIENCE;
    while manager.next_within(Duration::from_secs(1)).is_some() {
        assert!(Instant::now() < deadline, "it is fed");
    }
    assert_eq!(unit.api().device().unwrap()["plugged_size"], BLOCK);
    // What systemd does then.
    unit.signal(Signal::ABORT);
    unit.ended();
    let place = std::mem::replace(&mut unit.dir, dir());
    let unit = start(&manager, place, &[], &args, watched);
    manager.until("READY=1");
    let frontend = negotiate(&unit);
    frontend.set_mem_table(&ram).unwrap();
    assert_eq!(frontend.config().unwrap().plugged_size, BLOCK);
    let mut driver = MemDriver::at(&ram, RING, 128, true).unwrap();
    frontend.start_ring(0, driver.ring()).unwrap();
    assert_eq!(driver.plug(gpa(7), 1).unwrap().kind(), ResponseType::Ack);
    assert_eq!(manager.next().text, "WATCHDOG=1\n");
}

#[test]
fn sockets_of_the_manager_are_served_by_name_and_left() {
    let manager = FakeManager::new();
    // With their options, without, and those without in another order.
    for args in [&ALL[..], &["--state-file", "DIR/state"]] {
        let place = dir();
        let listen =
            |name| -> OwnedFd { UnixListener::bind(place.path().join(name)).unwrap().into() };
        let passed = ["discard", "metrics", "front-end", "api"].map(|name| (name, listen(name)));
        // A client is there before the daemon is.
        let waits = Frontend::connect(&place.path().join("front-end")).unwrap();
        let passed = passed.each_ref().map(|(name, fd)| (*name, fd));
        let unit = start(&manager, place, &passed, args, |_| {});
        manager.until("READY=1");
        waits.negotiate(USUAL_FEATURES, USUAL_PROTOCOL_FEATURES).unwrap();
        assert_eq!(waits.config().unwrap().addr, ADDR);
        assert_eq!(unit.api().device().unwrap()["requested_size"], 64 << 20);
        UnixStream::connect(unit.path("discard")).unwrap();
        let scraped = ApiClient::new(unit.path("metrics")).get("/metrics").unwrap();
        assert!(scraped.text.contains("virtio_mem_connected"), "{}", scraped.text);
        let place = unit.stop();
        for name in ["front-end", "api", "metrics", "discard"] {
            assert!(place.path().join(name).exists(), "{name} is the manager's");
            assert!(!place.path().join(format!("{name}.lock")).exists());
        }
        manager.until("STOPPING=1");
    }
}

#[test]
fn sockets_that_contradict_the_options_are_refused_by_name() {
    let manager = FakeManager::new();
    let refused = |name: &str, args: &[&str]| {
        let place = dir();
        let socket: OwnedFd = UnixListener::bind(place.path().join("passed")).unwrap().into();
        let mut unit = start(&manager, place, &[(name, &socket)], args, |_| {});
        let (status, said) = unit.ended();
        assert_eq!(status, Some(2), "{said}");
        said.lines().last().unwrap().to_owned()
    };
    let said = refused("api", &ALL);
    assert!(said.contains("--api-socket") && said.contains("passed"), "{said}");
    let said = refused("other", &["--api-socket", "DIR/api"]);
    assert!(said.contains("--socket-path") && said.contains("named front-end"), "{said}");
    let said = refused("front-end", &["--fd", "0"]);
    assert!(said.contains("--fd"), "{said}");
}

#[test]
fn over_an_upgrade_sockets_stay_clients_wait_and_blocks_are_kept() {
    let manager = FakeManager::new();
    let stores = |command: &mut Command| {
        command.env("FDSTORE", "16");
    };
    let unit = start(&manager, dir(), &[], &ALL, stores);
    let kept = stored(manager.until("READY=1"));
    let mut names: Vec<&str> = kept.keys().map(String::as_str).collect();
    names.sort_unstable();
    let all = ["api", "api.lock", "discard", "discard.lock", "front-end", "front-end.lock"];
    assert_eq!(names, all);
    let ram = ram();
    let frontend = negotiate(&unit);
    frontend.set_mem_table(&ram).unwrap();
    let mut driver = MemDriver::at(&ram, RING, 128, true).unwrap();
    frontend.start_ring(0, driver.ring()).unwrap();
    assert_eq!(driver.plug(gpa(3), 2).unwrap().kind(), ResponseType::Ack);
    assert!(unit.api().resize(96 << 20).unwrap().is_success());
    frontend.disconnect();
    let inode = |place: &TempDir| fs::metadata(place.path().join("front-end")).unwrap().ino();
    let before = inode(&unit.dir);
    let mut place = unit.stop();
    // Killed, stopped, and killed again: each time the next daemon serves who came in between.
    for kill in [true, false, true] {
        assert_eq!(inode(&place), before);
        let waits = Frontend::connect(&place.path().join("front-end")).unwrap();
        let passed: Vec<_> = kept.iter().map(|(name, fd)| (name.as_str(), fd)).collect();
        let mut unit = start(&manager, place, &passed, &ALL, stores);
        manager.until("READY=1");
        waits.negotiate(USUAL_FEATURES, USUAL_PROTOCOL_FEATURES).unwrap();
        let config = waits.config().unwrap();
        assert_eq!((config.plugged_size, config.requested_size), (2 * BLOCK, 96 << 20));
        assert_eq!(unit.api().device().unwrap()["connected"], true);
        place = if kill {
            unit.child.kill().unwrap();
            unit.ended();
            std::mem::replace(&mut unit.dir, dir())
        } else {
            unit.stop()
        };
    }
}

#[test]
fn what_was_kept_of_another_configuration_is_forgotten_and_bound_anew() {
    let manager = FakeManager::new();
    let stores = |command: &mut Command| {
        command.env("FDSTORE", "16");
    };
    let unit = start(&manager, dir(), &[], &ALL, stores);
    let kept = stored(manager.until("READY=1"));
    let place = unit.stop();
    manager.until("STOPPING=1");
    let other: Vec<String> = ALL.iter().map(|arg| arg.replace("DIR/api", "DIR/other")).collect();
    let args: Vec<&str> = other.iter().map(String::as_str).collect();
    let passed: Vec<_> = kept.iter().map(|(name, fd)| (name.as_str(), fd)).collect();
    let unit = start(&manager, place, &passed, &args, stores);
    let told = manager.until("READY=1");
    let forgotten: Vec<_> = told
        .iter()
        .filter(|told| told.value("FDSTOREREMOVE") == Some("1"))
        .map(|told| told.value("FDNAME").unwrap())
        .collect();
    assert_eq!(forgotten, ["api", "api.lock"]);
    assert_eq!(stored(told).len(), 6, "the new one among them");
    let api = ApiClient::new(unit.path("other"));
    assert_eq!(api.device().unwrap()["requested_size"], 64 << 20);
    negotiate(&unit);
}
