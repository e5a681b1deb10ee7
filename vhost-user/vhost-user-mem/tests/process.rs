//! The daemon as a process: signals, sockets, what it is started with.

mod common;

use std::fs;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{ADDR, BOOT, PATIENCE, connect, gpa, options, ram};
use rustix::process::{Pid, Signal, kill_process};
use small_vmm::connection::Connection;
use small_vmm::driver::{MemDriver, ResponseType};
use small_vmm::frontend::{Frontend, USUAL_FEATURES, USUAL_PROTOCOL_FEATURES};

const DAEMON: &str = env!("CARGO_BIN_EXE_vhost-user-mem");
const REGION: [&str; 4] = ["--addr", "0x140000000", "--region-size", "1G"];

/// A daemon that a test has started by itself.
struct Started(Child);

impl Started {
    fn wait_for(&mut self, path: &Path) {
        let deadline = Instant::now() + PATIENCE;
        while UnixStream::connect(path).is_err() {
            assert!(self.0.try_wait().unwrap().is_none(), "it ended");
            assert!(Instant::now() < deadline, "it does not listen");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn wait(&mut self) -> Option<i32> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status.code();
            }
            assert!(Instant::now() < deadline, "it still runs");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.0), signal).unwrap();
    }

    /// What it has said, once it has ended.
    fn said(&mut self) -> String {
        let mut said = String::new();
        self.0.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        said
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_terminal_that_closes_ends_nothing() {
    let mut daemon = common::daemon(options());
    daemon.signal(Signal::HUP).unwrap();
    assert!(daemon.wait_logged("ignoring a signal", PATIENCE), "{}", daemon.stderr());
    let (_frontend, _channel, mut driver) = connect(&daemon, &ram());
    assert_eq!(driver.plug(gpa(0), 1).unwrap().kind(), ResponseType::Ack);
    assert!(daemon.terminate(PATIENCE).unwrap().success());
}

#[test]
fn signals_that_the_launcher_blocked_or_ignored_are_seen_to() {
    let block = "--block-signal=TERM,INT,BUS";
    if !Command::new("env").args([block, "true"]).status().is_ok_and(|status| status.success()) {
        return eprintln!("skipped: env(1) cannot block signals here");
    }
    let blocked = &["env", block][..];
    let ignored = &["sh", "-c", "trap '' TERM INT HUP; exec \"$@\"", "sh"];
    let cases = [(blocked, Signal::TERM), (blocked, Signal::INT), (ignored, Signal::TERM)];
    for (launcher, signal) in cases {
        let dir = tempfile::tempdir().unwrap();
        let (socket, api) = (dir.path().join("vhost.sock"), dir.path().join("api.sock"));
        let mut daemon = Command::new(launcher[0]);
        daemon.args(&launcher[1..]).arg(DAEMON).args(REGION).arg("--socket-path").arg(&socket);
        let daemon = daemon.arg("--api-socket").arg(&api).stderr(Stdio::null()).spawn().unwrap();
        let mut daemon = Started(daemon);
        daemon.wait_for(&api);
        // Memory that is taken away raises SIGBUS.
        let frontend = Frontend::connect(&socket).unwrap();
        frontend.negotiate(USUAL_FEATURES, USUAL_PROTOCOL_FEATURES).unwrap();
        let ram = ram();
        frontend.set_mem_table(&ram).unwrap();
        let driver = MemDriver::at(&ram, common::RING, 128, true).unwrap();
        frontend.start_ring(0, driver.ring()).unwrap();
        ram.region(0).unwrap().file.set_len(0).unwrap();
        driver.ring().force_kick().unwrap();
        frontend.connection().wait_closed().unwrap();
        UnixStream::connect(&api).unwrap();
        daemon.signal(signal);
        assert_eq!(daemon.wait(), Some(0));
        assert!(!socket.exists() && !api.exists());
    }
}

#[test]
fn a_host_without_proc_is_refused_by_name() {
    let hide = "mount -t tmpfs none /proc";
    let unshare = |script: &str| {
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", script, "sh", DAEMON]);
        command
    };
    if !unshare(hide).stderr(Stdio::null()).status().is_ok_and(|status| status.success()) {
        return eprintln!("skipped: /proc cannot be hidden in this environment");
    }
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("vhost.sock");
    let script = format!("{hide} && exec \"$1\" {} --socket-path \"$2\"", REGION.join(" "));
    let output = unshare(&script).arg(&socket).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("/proc") && said.contains("mount"), "{said}");
    assert!(!socket.exists());
}

#[test]
fn sockets_have_the_mode_and_the_group_that_were_asked_for() {
    let gid = rustix::process::getgid().as_raw();
    // Only root may give files to any group.
    let group = if rustix::process::geteuid().is_root() { 12345 } else { gid };
    let cases: [(&[&str], u32, u32); 3] = [
        (&[], 0o600, gid),
        (&["--socket-mode", "0660", "--socket-group", &group.to_string()], 0o660, group),
        (&["--socket-mode", "666"], 0o666, gid),
    ];
    for umask in ["0", "077"] {
        for (more, mode, group) in &cases {
            let dir = tempfile::tempdir().unwrap();
            let paths =
                ["vhost.sock", "discard.sock", "api.sock"].map(|name| dir.path().join(name));
            let script = format!("umask {umask}; exec \"$@\"");
            let mut daemon = Command::new("sh");
            daemon.args(["-c", &script, "sh", DAEMON]).args(REGION).args(*more);
            daemon.args(["--state-file"]).arg(dir.path().join("state"));
            for (option, path) in
                ["--socket-path", "--discard-socket", "--api-socket"].iter().zip(&paths)
            {
                daemon.arg(option).arg(path);
            }
            let mut daemon = Started(daemon.stderr(Stdio::piped()).spawn().unwrap());
            daemon.wait_for(&paths[2]);
            for path in &paths {
                let metadata = fs::metadata(path).unwrap();
                let found = (metadata.permissions().mode() & 0o777, metadata.gid());
                assert_eq!(found, (*mode, *group), "{}", path.display());
            }
            let state = fs::metadata(dir.path().join("state")).unwrap();
            assert_eq!(state.permissions().mode() & 0o777, 0o600);
            daemon.signal(Signal::TERM);
            assert_eq!(daemon.wait(), Some(0), "{}", daemon.said());
        }
    }
}

/// Daemons that are started at once on the same sockets.
#[test]
fn of_daemons_started_at_once_one_is_served_and_the_others_say_why_not() {
    for round in 0..5 {
        let dir = tempfile::tempdir().unwrap();
        let (socket, api) = (dir.path().join("vhost.sock"), dir.path().join("api.sock"));
        if round % 2 == 1 {
            // Left by daemons that were killed.
            drop((UnixListener::bind(&socket).unwrap(), UnixListener::bind(&api).unwrap()));
        }
        let start = || {
            let mut daemon = Command::new(DAEMON);
            daemon.args(REGION).arg("--socket-path").arg(&socket).arg("--api-socket").arg(&api);
            Started(daemon.stderr(Stdio::piped()).spawn().unwrap())
        };
        let mut daemons: Vec<Started> = (0..4).map(|_| start()).collect();
        let deadline = Instant::now() + PATIENCE;
        while daemons.len() > 1 {
            let ended =
                daemons.iter_mut().position(|daemon| daemon.0.try_wait().unwrap().is_some());
            if let Some(ended) = ended {
                let mut refused = daemons.swap_remove(ended);
                assert_eq!(refused.wait(), Some(1));
                let said = refused.said();
                assert!(said.contains("--socket-path") && said.contains("in use"), "{said}");
            }
            assert!(Instant::now() < deadline, "more than one is served");
        }
        let [daemon] = &mut daemons[..] else { panic!("all ended") };
        daemon.wait_for(&api);
        let frontend = Frontend::connect(&socket).unwrap();
        frontend.negotiate(USUAL_FEATURES, USUAL_PROTOCOL_FEATURES).unwrap();
        assert_eq!(frontend.config().unwrap().addr, ADDR);
        daemon.signal(Signal::TERM);
        assert_eq!(daemon.wait(), Some(0));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}

#[test]
fn an_inherited_socket_is_used() {
    // Also where pidfd_getfd is forbidden, as in many containers.
    let strace = Command::new("strace").arg("-V").stdout(Stdio::null()).status();
    let traced = strace.is_ok_and(|status| status.success());
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut daemon = if traced {
        let mut strace = Command::new("strace");
        let forbidden = "inject=pidfd_getfd,pidfd_open:error=EPERM";
        strace.args([
            "-f",
            "-o",
            "/dev/null",
            "-e",
            "trace=pidfd_getfd,pidfd_open",
            "-e",
            forbidden,
        ]);
        strace.arg(DAEMON);
        strace
    } else {
        Command::new(DAEMON)
    };
    daemon.args(["--fd", "0"]).args(REGION).stdin(OwnedFd::from(theirs)).stderr(Stdio::piped());
    let mut daemon = Started(daemon.spawn().unwrap());
    let frontend = Frontend::new(Connection::from_stream(ours));
    frontend.negotiate(USUAL_FEATURES, USUAL_PROTOCOL_FEATURES).unwrap();
    assert_eq!(frontend.config().unwrap().addr, ADDR);
    frontend.disconnect();
    let status = daemon.wait();
    assert_eq!(status, Some(0), "{}", daemon.said());
}

#[test]
fn capabilities_are_what_the_schema_has_for_a_type_without_features() {
    let output = Command::new(DAEMON).arg("--print-capabilities").output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty());
    let value: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(value, serde_json::json!({ "type": "mem" }));
}

#[test]
fn no_mapping_of_what_a_front_end_shares_is_in_a_core_dump() {
    let daemon = common::daemon(options().discard_socket());
    let ram = ram();
    let (frontend, _channel, mut driver) = connect(&daemon, &ram);
    let size = (ADDR + common::REGION) / 4096 / 8;
    let log = small_vmm::memory::memfd("log", size, rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    frontend.set_log_base(&log, size, 0).unwrap();
    assert_eq!(driver.state(gpa(0), 1).unwrap().kind(), ResponseType::Ack);
    let smaps = fs::read_to_string(format!("/proc/{}/smaps", daemon.pid())).unwrap();
    let (mut shared, mut size) = (Vec::new(), 0);
    let mut mapping = "";
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("Size:") => size = words.next().unwrap().parse::<u64>().unwrap() << 10,
            Some("VmFlags:") if mapping.split(' ').nth(1).unwrap().ends_with('s') => {
                assert!(line.split(' ').any(|flag| flag == "dd"), "{mapping}\n{line}");
                shared.push(size);
            }
            Some(first) if !first.ends_with(':') => mapping = line,
            _ => {}
        }
    }
    assert!(shared.contains(&BOOT) && shared.contains(&common::REGION), "{shared:?}");
    assert!(smaps.contains("memfd:log"));
    let filter = fs::read_to_string(format!("/proc/{}/coredump_filter", daemon.pid())).unwrap();
    let shared_kinds = 1 << 1 | 1 << 3 | 1 << 6 | 1 << 8;
    assert_eq!(u32::from_str_radix(filter.trim(), 16).unwrap() & shared_kinds, 0, "{filter}");
}
