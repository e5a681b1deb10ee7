//! The pager as a process between the small VMM's Cloud Hypervisors: what it prints and serves, and how it ends.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, ChildStdout, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use small_vmm::cloud_hypervisor::faults::Asking;
use small_vmm::cloud_hypervisor::receiver::{Outcome, Receive};
use small_vmm::cloud_hypervisor::source::{self, Trap};
use small_vmm::cloud_hypervisor::{Command as Request, Guest};
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(60);

/// A pager that tells of itself in lines of JSON.
struct Pager {
    child: Child,
    out: BufReader<ChildStdout>,
    err: BufReader<ChildStderr>,
}

impl Pager {
    fn start(words: &[&str]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_vmem-pager"))
            .args(words)
            .arg("--json")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        let err = BufReader::new(child.stderr.take().unwrap());
        Self { child, out, err }
    }

    /// Reads what it tells up to an event.
    fn wait_for(&mut self, event: &str) -> Value {
        loop {
            let mut line = String::new();
            assert_ne!(self.out.read_line(&mut line).unwrap(), 0, "no {event}");
            let value: Value = serde_json::from_str(&line).unwrap();
            if value["event"] == event {
                return value;
            }
        }
    }

    /// The next line that it complains with, which it does while it continues.
    fn complaint(&mut self) -> String {
        let mut line = String::new();
        self.err.read_line(&mut line).unwrap();
        line
    }

    /// Its status, and what it complained of.
    fn end(mut self) -> (Option<i32>, String) {
        let mut rest = String::new();
        self.out.read_to_string(&mut rest).unwrap();
        let mut err = String::new();
        self.err.read_to_string(&mut err).unwrap();
        (self.child.wait().unwrap().code(), err)
    }
}

impl Drop for Pager {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

struct Folder(TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    fn save(&self, more: &[&str]) -> Pager {
        let (socket, image) = (self.text("save"), self.text("image"));
        let words = ["save", "--vmm", "cloud-hypervisor", "--socket", &socket, "--image", &image];
        Pager::start(&[&words, more].concat())
    }

    fn restore(&self, more: &[&str]) -> Pager {
        let (socket, image) = (self.text("restore"), self.text("image"));
        let words =
            ["restore", "--vmm", "cloud-hypervisor", "--socket", &socket, "--image", &image];
        Pager::start(&[&words, more].concat())
    }

    fn handover(&self, more: &[&str]) -> Pager {
        let (socket, to) = (self.text("save"), self.text("restore"));
        Pager::start(&[&["handover", "--socket", &socket, "--to", &to], more].concat())
    }

    /// What a Cloud Hypervisor listens on; it leaves the file behind.
    fn listen(&self) -> UnixListener {
        let _ = std::fs::remove_file(self.path("restore"));
        UnixListener::bind(self.path("restore")).unwrap()
    }

    fn send(&self, guest: &Guest, trap: Trap) -> source::Outcome {
        source::send(connect(&self.path("save")), guest, trap)
    }
}

fn connect(path: &Path) -> UnixStream {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => return stream,
            Err(error) => assert!(Instant::now() < deadline, "{}: {error}", path.display()),
        }
        thread::sleep(Duration::from_millis(5));
    }
}

fn scrape(path: &Path) -> String {
    let mut stream = connect(path);
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("# EOF\n"), "{answer}");
    answer
}

#[test]
fn a_guest_is_saved_restored_in_each_way_and_handed_over() {
    let folder = Folder::new();
    let guest = Guest::new();
    let metrics = folder.text("metrics");
    let mut pager = folder.save(&["--metrics-socket", &metrics, "--timeout", "60s"]);
    pager.wait_for("listening");
    let answer = scrape(&folder.path("metrics"));
    assert!(answer.contains("vmem_pager_save_"), "{answer}");
    assert_eq!(folder.send(&guest, Trap::None), source::Outcome::Ended);
    let paused = pager.wait_for("paused");
    assert_eq!((&paused["mappings"], &paused["plugged_bytes"]), (&3.into(), &(6 << 20).into()));
    assert_eq!(pager.wait_for("saved")["pages"], 9);
    assert_eq!(pager.end(), (Some(0), String::new()));

    let order = folder.text("order");
    for (more, postcopy) in [
        (vec!["--eager", "--bandwidth", "1G"], false),
        (vec!["--record", &order], true),
        (vec!["--replay", &order, "--bandwidth", "64M"], true),
    ] {
        let how = Receive::new(postcopy);
        // The metrics are looked at while the guest runs.
        let touches = vec![3 << 30, (3 << 30) + 4096];
        let how = how.asking(Asking { touches, ..Asking::default() });
        let listener = folder.listen();
        let words = [&["--metrics-socket", &metrics, "--timeout", "60s"], &more[..]].concat();
        let mut pager = folder.restore(&words);
        pager.wait_for("image");
        let answer = scrape(&folder.path("metrics"));
        assert!(answer.contains("vmem_pager_restore_pages_total{source=\"replay\"}"), "{answer}");
        let outcome = how.take(&listener);
        let Outcome::Has(found) = outcome else { panic!("{outcome:?}") };
        assert!(found.memory == guest.memory(), "{more:?}");
        pager.wait_for("running");
        let completed = pager.wait_for("completed");
        assert_eq!(completed["pages"], 9);
        assert_eq!(completed["requests"], if postcopy { 1536 } else { 0 });
        let (status, err) = pager.end();
        assert_eq!(status, Some(0), "{err}");
        // That absent memory was asked for is said.
        assert_eq!(err.contains("--eager leaves them holes"), postcopy, "{err}");
    }
    assert!(folder.path("order").exists());

    let listener = folder.listen();
    let mut pager = folder.handover(&["--timeout", "60s"]);
    thread::scope(|scope| {
        let receiving = scope.spawn(|| Receive::new(false).take(&listener));
        pager.wait_for("listening");
        assert_eq!(folder.send(&guest, Trap::None), source::Outcome::Ended);
        assert!(matches!(receiving.join().unwrap(), Outcome::Has(_)));
    });
    pager.wait_for("completed");
    assert_eq!(pager.end(), (Some(0), String::new()));
}

#[test]
fn a_peer_that_does_not_come_or_falls_silent_is_a_timeout() {
    let folder = Folder::new();
    let timed_out = |pager: Pager, what: &str| {
        let (status, err) = pager.end();
        assert_eq!(status, Some(3), "{err}");
        assert!(err.contains("timed out") && err.contains(what), "{err}");
    };
    let bound = ["--timeout", "1s"];
    timed_out(folder.save(&bound), "has connected");
    let mut pager = folder.save(&bound);
    pager.wait_for("listening");
    // The guest is told to continue.
    let outcome = folder.send(&Guest::new(), Trap::SilentBefore(Request::State));
    assert_eq!(outcome, source::Outcome::Continues);
    timed_out(pager, "State");
    assert!(!folder.path("image").exists());

    let mut pager = folder.save(&[]);
    pager.wait_for("listening");
    assert_eq!(folder.send(&Guest::new(), Trap::None), source::Outcome::Ended);
    assert_eq!(pager.end().0, Some(0));
    timed_out(folder.restore(&bound), "listens on");
    timed_out(folder.handover(&bound), "listens on");
    let _listener = folder.listen();
    timed_out(folder.handover(&bound), "has connected");
    // It connects, and nothing answers.
    timed_out(folder.restore(&bound), "answer to Start");
    timed_out(folder.restore(&["--eager", "--timeout", "1s"]), "answer to Start");
}

#[test]
fn a_socket_that_a_vmm_left_behind_is_told_and_another_that_listens_gets_the_guest() {
    let folder = Folder::new();
    let guest = Guest::new();
    let mut pager = folder.save(&["--timeout", "60s"]);
    pager.wait_for("listening");
    assert_eq!(folder.send(&guest, Trap::None), source::Outcome::Ended);
    assert_eq!(pager.end(), (Some(0), String::new()));

    drop(folder.listen());
    let mut pager = folder.restore(&["--eager", "--timeout", "60s"]);
    let told = pager.complaint();
    let path = folder.text("restore");
    assert!(told.contains("waiting for a VMM") && told.contains(&path), "{told}");
    assert!(told.contains("refused") && told.contains("remove it"), "{told}");
    let listener = folder.listen();
    let outcome = Receive::new(false).take(&listener);
    let Outcome::Has(found) = outcome else { panic!("{outcome:?}") };
    assert!(found.memory == guest.memory());
    pager.wait_for("completed");
    let (status, err) = pager.end();
    assert!(status == Some(0) && !err.contains("waiting for a VMM"), "told twice: {err}");
    drop(listener);

    let mut pager = folder.handover(&["--timeout", "60s"]);
    let told = pager.complaint();
    assert!(told.contains(&path) && told.contains("refused"), "{told}");
}

#[test]
fn options_that_cannot_be_are_wrong_usage() {
    let folder = Folder::new();
    for (more, what) in [
        (&["--eager", "--record", "x"][..], "--record and --replay"),
        (&["--eager", "--replay", "x"], "--record and --replay"),
        (&["--qmp", "x"], "--qmp"),
        (&["--recover"], "--recover"),
        (&["--supervise"], "--supervise"),
        (&["--memory-file", "x"], "--memory-file"),
    ] {
        let (status, err) = folder.restore(more).end();
        assert_eq!(status, Some(2), "{err}");
        assert!(err.contains(what), "{err}");
    }
}
