//! Whatever happens to the log, the daemon serves, and a signal ends it.

mod common;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{ADDR, BOOT, PATIENCE, REGION, RING, gpa};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::process::{Pid, Signal, kill_process};
use small_vmm::api::ApiClient;
use small_vmm::driver::{MemDriver, ResponseType};
use small_vmm::frontend::{Frontend, USUAL_FEATURES, USUAL_PROTOCOL_FEATURES};
use small_vmm::memory::{GuestRam, Layout};
use tempfile::TempDir;

const DAEMON: &str = env!("CARGO_BIN_EXE_vhost-user-mem");

/// A daemon whose stderr is the test's.
struct Daemon {
    child: Child,
    dir: TempDir,
}

impl Daemon {
    fn start(stderr: impl Into<Stdio>) -> Self {
        Self::start_logging("info", stderr)
    }

    fn start_logging(filter: &str, stderr: impl Into<Stdio>) -> Self {
        Self::start_with(filter, stderr, &[], None)
    }

    fn start_with(
        filter: &str,
        stderr: impl Into<Stdio>,
        options: &[&str],
        journal: Option<&str>,
    ) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let child = Command::new(DAEMON)
            .args(["--addr", &ADDR.to_string(), "--region-size", &REGION.to_string()])
            .args(["--block-size", "2M", "--requested-size", &REGION.to_string()])
            .arg("--socket-path")
            .arg(dir.path().join("vhost.sock"))
            .arg("--api-socket")
            .arg(dir.path().join("api.sock"))
            .args(options)
            .env("RUST_LOG", filter)
            .envs(journal.map(|stream| ("JOURNAL_STREAM", stream)))
            .stderr(stderr)
            .spawn()
            .unwrap();
        let mut daemon = Self { child, dir };
        let deadline = Instant::now() + PATIENCE;
        while daemon.api().device().is_err() {
            assert!(daemon.child.try_wait().unwrap().is_none(), "it ended");
            assert!(Instant::now() < deadline, "it does not answer");
            std::thread::sleep(Duration::from_millis(2));
        }
        daemon
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn api(&self) -> ApiClient {
        ApiClient::new(self.path("api.sock"))
    }

    fn frontend(&self) -> Frontend {
        let frontend = Frontend::connect(&self.path("vhost.sock")).unwrap();
        frontend.negotiate(USUAL_FEATURES, USUAL_PROTOCOL_FEATURES).unwrap();
        frontend
    }

    /// A guest that has memory, but none in the region: every PLUG is BUSY.
    fn guest_without_region(&self) -> (Frontend, MemDriver) {
        let layout = Layout::new().memfd("boot", 0, BOOT).unwrap();
        let ram = Arc::new(GuestRam::new(layout).unwrap());
        let frontend = self.frontend();
        frontend.set_mem_table(&ram).unwrap();
        let driver = MemDriver::at(&ram, RING, 128, true).unwrap();
        frontend.start_ring(0, driver.ring()).unwrap();
        (frontend, driver)
    }

    /// Serves front-ends, each of which is told of in the log, and a guest that is refused again
    /// and again; then ends as it should.
    fn serves_and_ends(mut self) {
        for _ in 0..30 {
            self.frontend();
        }
        let (frontend, mut driver) = self.guest_without_region();
        for _ in 0..300 {
            assert_eq!(driver.plug(gpa(0), 1).unwrap().kind(), ResponseType::Busy);
        }
        assert_eq!(frontend.config().unwrap().region_size, REGION);
        assert_eq!(self.api().device().unwrap()["connected"], true);
        assert!(self.terminate().success());
    }

    /// SIGTERM; the sockets must be gone then.
    fn terminate(&mut self) -> ExitStatus {
        kill_process(Pid::from_child(&self.child), Signal::TERM).unwrap();
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < deadline, "it still runs");
            std::thread::sleep(Duration::from_millis(2));
        };
        assert!(!self.path("vhost.sock").exists() && !self.path("api.sock").exists());
        status
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The writing end of a pipe that takes nothing more, with the reading end.
fn full_pipe() -> (io::PipeReader, OwnedFd) {
    let (reader, writer) = io::pipe().unwrap();
    let writer = OwnedFd::from(writer);
    let flags = fcntl_getfl(&writer).unwrap();
    fcntl_setfl(&writer, flags | OFlags::NONBLOCK).unwrap();
    for size in [4096, 1] {
        while rustix::io::write(writer.as_fd(), &vec![b'.'; size]).is_ok() {}
    }
    fcntl_setfl(&writer, flags).unwrap();
    (reader, writer)
}

#[test]
fn a_log_that_is_not_read_holds_nothing_up() {
    let (_reader, writer) = full_pipe();
    Daemon::start(writer).serves_and_ends();
}

#[test]
fn a_log_whose_reader_has_gone_ends_nothing() {
    let (reader, writer) = io::pipe().unwrap();
    drop(reader);
    Daemon::start(writer).serves_and_ends();
}

#[test]
fn a_log_on_a_full_file_system_ends_nothing() {
    Daemon::start(OpenOptions::new().write(true).open("/dev/full").unwrap()).serves_and_ends();
}

#[test]
fn lines_that_were_lost_are_told_of() {
    let (mut reader, writer) = full_pipe();
    // An operator who wants to see everything gets no counts instead.
    let mut daemon = Daemon::start_logging("trace", writer);
    let lost = |daemon: &Daemon| -> u64 {
        let metrics = daemon.api().get("/metrics").unwrap().text;
        let name = "virtio_mem_log_lines_lost_total ";
        metrics.lines().find_map(|line| line.strip_prefix(name)).unwrap().parse().unwrap()
    };
    let deadline = Instant::now() + PATIENCE;
    while lost(&daemon) == 0 {
        daemon.frontend().config().unwrap();
        assert!(Instant::now() < deadline, "nothing is lost");
    }
    // What is told of them is told while the daemon runs: its end waits for no line.
    let said = Arc::new(Mutex::new(Vec::new()));
    let reading = {
        let said = Arc::clone(&said);
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = reader.read(&mut bytes) {
                said.lock().unwrap().extend_from_slice(&bytes[..count]);
            }
        })
    };
    let deadline = Instant::now() + PATIENCE;
    while !String::from_utf8_lossy(&said.lock().unwrap()).contains("lines were lost") {
        // The count comes before the next line.
        daemon.frontend().config().unwrap();
        assert!(Instant::now() < deadline, "it is not told");
    }
    assert!(daemon.terminate().success());
    reading.join().unwrap();
}

#[test]
fn a_guest_and_a_front_end_that_cause_lines_without_end_are_counted() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let mut daemon = Daemon::start(file.reopen().unwrap());
    let (frontend, mut driver) = daemon.guest_without_region();
    for _ in 0..2000 {
        assert_eq!(driver.plug(gpa(0), 1).unwrap().kind(), ResponseType::Busy);
    }
    // A ring that claims more entries than it has: said by the crate at each kick.
    driver.ring().set_avail_idx(driver.ring().next_avail().wrapping_add(1000)).unwrap();
    for _ in 0..500 {
        driver.ring().force_kick().unwrap();
        frontend.sync().unwrap();
    }
    frontend.disconnect();
    for _ in 0..100 {
        daemon.frontend();
    }
    let metrics = daemon.api().get("/metrics").unwrap().text;
    let name = "virtio_mem_log_lines_suppressed_total ";
    let count = metrics.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    assert!(count.parse::<u64>().unwrap() >= 1970 + 70, "{count}");
    assert!(daemon.terminate().success());
    let said = fs::read_to_string(file.path()).unwrap();
    assert!(said.lines().count() < 180, "{said}");
    assert!(said.contains("1970 more like this: answering BUSY"), "{said}");
    assert!(said.contains("71 more like this: front-end connected"), "{said}");
    let crates = said.lines().filter(|line| line.contains("virtio_queue::queue"));
    let (counts, first): (Vec<_>, Vec<_>) =
        crates.partition(|line| line.contains("more like this"));
    assert!(first.len() == 30 && !counts.is_empty(), "{said}");
    assert!(said.lines().any(|line| line.ends_with(": ended")), "{said}");
}

#[test]
fn every_line_of_a_daemon_that_logs_json_is_an_object() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let json = &["--log-format", "json"];
    let mut daemon = Daemon::start_with("info", file.reopen().unwrap(), json, None);
    let (frontend, mut driver) = daemon.guest_without_region();
    for _ in 0..100 {
        assert_eq!(driver.plug(gpa(0), 1).unwrap().kind(), ResponseType::Busy);
    }
    drop(frontend);
    assert!(daemon.terminate().success());
    let said = fs::read_to_string(file.path()).unwrap();
    let read = |line| serde_json::from_str::<serde_json::Value>(line).unwrap();
    let lines: Vec<_> = said.lines().map(read).collect();
    let with = |text: &str| {
        let is_it = |line: &&serde_json::Value| {
            line["fields"]["message"].as_str().is_some_and(|message| message.contains(text))
        };
        lines.iter().find(is_it).unwrap_or_else(|| panic!("{text}: {said}"))
    };
    let ready = with("ready");
    assert_eq!((&ready["level"], &ready["fields"]["addr"]), (&"INFO".into(), &ADDR.into()));
    assert_eq!(with("70 more like this: answering BUSY")["fields"]["count"], 70);
    assert!(lines.iter().all(|line| line["target"].is_string() && line["timestamp"].is_string()));
}

#[test]
fn a_daemon_that_cannot_start_says_so_in_the_format_of_its_log() {
    let args = ["--socket-path", "/no/such/folder", "--addr", "4G", "--region-size", "1G"];
    let failed = |more: &[&str]| {
        let output = Command::new(DAEMON).args(args).args(more).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8(output.stderr).unwrap()
    };
    let said = failed(&["--log-format", "json"]);
    let line = said.lines().last().unwrap();
    let read: serde_json::Value = serde_json::from_str(line).unwrap();
    assert_eq!(read["level"], "ERROR");
    let message = read["fields"]["message"].as_str().unwrap();
    assert!(message.contains("--socket-path /no/such/folder"), "{said}");
    let said = failed(&[]);
    assert!(said.lines().last().unwrap().starts_with("vhost-user-mem: --socket-path"), "{said}");
}

#[test]
fn the_journal_gets_the_level_of_each_line_and_another_file_does_not() {
    for is_it in [true, false] {
        let file = tempfile::NamedTempFile::new().unwrap();
        let metadata = file.as_file().metadata().unwrap();
        let inode = metadata.ino() + u64::from(!is_it);
        let stream = format!("{}:{inode}", metadata.dev());
        let stderr = file.reopen().unwrap();
        let mut daemon = Daemon::start_with("info", stderr, &[], Some(&stream));
        let (frontend, mut driver) = daemon.guest_without_region();
        assert_eq!(driver.plug(gpa(0), 1).unwrap().kind(), ResponseType::Busy);
        drop(frontend);
        assert!(daemon.terminate().success());
        let said = fs::read_to_string(file.path()).unwrap();
        assert!(said.lines().count() > 2, "{said}");
        for line in said.lines() {
            let level = line.split_whitespace().nth(1).unwrap();
            let priority = if level == "INFO" { "<6>2" } else { "<4>2" };
            assert_eq!(line.starts_with(priority), is_it, "{line}");
            assert_eq!(line.starts_with('2'), !is_it, "{line}");
        }
    }
}

#[test]
fn the_level_is_changed_while_the_daemon_runs() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let mut daemon = Daemon::start(file.reopen().unwrap());
    let set = |level: &str| {
        daemon.api().put("/v1/log-level", &serde_json::json!({ "level": level })).unwrap()
    };
    let said = || fs::read_to_string(file.path()).unwrap();
    // Lines come by way of a queue.
    let wait = |text: &str, times: usize| {
        let deadline = Instant::now() + PATIENCE;
        while said().matches(text).count() != times {
            assert!(Instant::now() < deadline, "{text}, {times} times: {}", said());
            std::thread::sleep(Duration::from_millis(2));
        }
    };
    daemon.frontend();
    wait("front-end disconnected", 1);
    for wrong in ["inof", "", "vhost_user_mem"] {
        assert_eq!(set(wrong).status, 422, "{wrong}");
    }
    // Not told any more, but what it is set to is.
    assert!(set("warn").is_success());
    wait("the level of the log is set", 1);
    for _ in 0..3 {
        daemon.frontend();
    }
    let (frontend, mut driver) = daemon.guest_without_region();
    assert_eq!(driver.plug(gpa(0), 1).unwrap().kind(), ResponseType::Busy);
    frontend.disconnect();
    wait("answering BUSY", 1);
    assert_eq!(said().matches("front-end connected").count(), 1, "{}", said());
    assert!(!said().contains("TRACE") && !said().contains("DEBUG"), "{}", said());
    assert!(set("trace").is_success());
    wait("the level of the log is set", 1);
    let (frontend, mut driver) = daemon.guest_without_region();
    assert_eq!(driver.plug(gpa(0), 1).unwrap().kind(), ResponseType::Busy);
    frontend.disconnect();
    wait("front-end connected", 2);
    wait("TRACE vhost_user_mem::backend: request=Plug", 1);
    assert!(daemon.terminate().success());
}

#[test]
fn crates_that_log_in_another_way_follow_the_level() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let daemon = Daemon::start_logging("off", file.reopen().unwrap());
    let body = serde_json::json!({ "level": "error" });
    assert!(daemon.api().put("/v1/log-level", &body).unwrap().is_success());
    let (frontend, driver) = daemon.guest_without_region();
    driver.ring().set_avail_idx(driver.ring().next_avail().wrapping_add(1000)).unwrap();
    let deadline = Instant::now() + PATIENCE;
    while !fs::read_to_string(file.path()).unwrap().contains("ERROR virtio_queue::queue") {
        driver.ring().force_kick().unwrap();
        frontend.sync().unwrap();
        assert!(Instant::now() < deadline, "nothing is said");
    }
}

#[test]
fn a_filter_that_cannot_be_read_is_told() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let mut daemon = Daemon::start_logging("info,=,x=y=z", file.reopen().unwrap());
    assert!(daemon.terminate().success());
    let said = fs::read_to_string(file.path()).unwrap();
    assert!(said.contains("RUST_LOG is not used") && said.contains("ready"), "{said}");
}

fn daemon_with(args: &[&str], stdout: impl Into<Stdio>, stderr: impl Into<Stdio>) -> ExitStatus {
    Command::new(DAEMON).args(args).stdout(stdout).stderr(stderr).status().unwrap()
}

#[test]
fn output_that_cannot_be_written_is_a_failure_with_a_message() {
    let full = || OpenOptions::new().write(true).open("/dev/full").unwrap();
    for option in ["--print-capabilities", "--help", "--version"] {
        let output = Command::new(DAEMON).arg(option).stdout(full()).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{option}: {said}");
        assert!(said.starts_with("vhost-user-mem: cannot write to stdout: "), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
        assert_eq!(daemon_with(&[option], full(), full()).code(), Some(1));
        assert_eq!(daemon_with(&[option], Stdio::null(), full()).code(), Some(0));
    }
}

#[test]
fn a_wrong_option_has_its_status_whatever_becomes_of_the_message() {
    let full = File::options().write(true).open("/dev/full").unwrap();
    let (reader, gone) = io::pipe().unwrap();
    drop(reader);
    for args in [&["--no-such-option"][..], &["--socket-path", "s", "--addr", "x"]] {
        let args = [args, &["--region-size", "1G"]].concat();
        assert_eq!(daemon_with(&args, Stdio::null(), full.try_clone().unwrap()).code(), Some(2));
        assert_eq!(daemon_with(&args, Stdio::null(), gone.try_clone().unwrap()).code(), Some(2));
        assert_eq!(daemon_with(&args, Stdio::null(), full_pipe().1).code(), Some(2));
    }
    let shell = format!("exec {DAEMON} --no-such-option 2>&-");
    assert_eq!(Command::new("sh").args(["-c", &shell]).status().unwrap().code(), Some(2));
}
