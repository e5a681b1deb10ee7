//! The daemon's sandbox, as it is seen from outside. That everything works in it, all other tests of the process show.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, chown};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::Duration;

use common::{BLOCK, PATIENCE, REGION, connect, gpa, options, ram};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, waitid};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};
use small_vmm::daemon::Daemon;
use small_vmm::driver::ResponseType;

const DAEMON: &str = env!("CARGO_BIN_EXE_vhost-user-mem");

/// A line of `/proc/PID/task/TID/status` of each thread, by the thread's name.
fn of_threads(daemon: &Daemon, key: &str) -> BTreeMap<String, String> {
    let tasks = fs::read_dir(format!("/proc/{}/task", daemon.pid())).unwrap();
    let status = |task: fs::DirEntry| {
        let text = fs::read_to_string(task.path().join("status")).unwrap();
        let value = |key: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(key)).unwrap();
            line.trim_start_matches(':').trim().to_owned()
        };
        (value("Name"), value(key))
    };
    tasks.map(|task| status(task.unwrap())).collect()
}

#[test]
fn every_thread_is_confined_and_has_no_capability() {
    let daemon = common::daemon(options().discard_socket().state_file());
    let (_frontend, _channel, mut driver) = connect(&daemon, &ram());
    assert_eq!(driver.plug(gpa(0), 1).unwrap().kind(), ResponseType::Ack);
    daemon.api().device().unwrap();
    let expected = [
        ("Seccomp", "2"),
        ("NoNewPrivs", "1"),
        ("CapEff", "0000000000000000"),
        ("CapPrm", "0000000000000000"),
        ("CapInh", "0000000000000000"),
    ];
    for (key, value) in expected {
        let found = of_threads(&daemon, key);
        for name in ["log", "signals", "config-change", "resize", "management", "discard-channel"] {
            assert!(found.contains_key(name), "{name}: {found:?}");
        }
        assert!(found.values().all(|found| found == value), "{key}: {found:?}");
    }
    let limits = fs::read_to_string(format!("/proc/{}/limits", daemon.pid())).unwrap();
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    assert_eq!(core.split_whitespace().nth(4), Some("0"), "{core}");
}

#[test]
fn the_metrics_of_the_process_can_be_read_in_the_sandbox() {
    let daemon = common::daemon(options());
    let value = |name: &str| -> f64 {
        let text = daemon.api().get("/metrics").unwrap().text;
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value.unwrap_or_else(|| panic!("{name}: {text}")).parse().unwrap()
    };
    let open = fs::read_dir(format!("/proc/{}/fd", daemon.pid())).unwrap().count() as f64;
    // A scraper's connection has a few of its own, and so may the one before.
    let told = value("process_open_fds");
    assert!((open - 8.0..=open + 8.0).contains(&told), "{told} {open}");
    let tasks = || fs::read_dir(format!("/proc/{}/task", daemon.pid())).unwrap().count() as f64;
    let (before, told, after) = (tasks(), value("process_threads"), tasks());
    assert!((before.min(after)..=before.max(after) + 3.0).contains(&told), "{before} {told}");
    assert!(value("process_max_fds") >= open);
    assert!(value("process_cpu_seconds_total") < PATIENCE.as_secs_f64() * 10.0);
    assert!(value("process_resident_memory_bytes") > 65536.0);
    assert!(value("virtio_mem_start_time_seconds") - value("process_start_time_seconds") < 60.0);
    // What only the whole daemon knows.
    assert_eq!((value("virtio_mem_workers"), value("virtio_mem_resize_stalled")), (0.0, 1.0));
    let (_frontend, _channel, mut driver) = connect(&daemon, &ram());
    for block in 0..REGION / BLOCK {
        assert_eq!(driver.plug(gpa(block), 1).unwrap().kind(), ResponseType::Ack);
    }
    assert_eq!((value("virtio_mem_workers"), value("virtio_mem_resize_stalled")), (1.0, 0.0));
    assert!(value("virtio_mem_resident_size_bytes") >= 0.0);
}

#[test]
fn without_the_sandbox_nothing_is_confined() {
    let daemon = common::daemon(options().arg("--sandbox").arg("off"));
    assert!(of_threads(&daemon, "Seccomp").values().all(|mode| mode == before("Seccomp")));
    assert!(of_threads(&daemon, "CapEff").values().all(|mode| mode == before("CapEff")));
}

/// What this process has, and what it starts inherits.
fn before(key: &str) -> &'static str {
    let text: &'static str = fs::read_to_string("/proc/self/status").unwrap().leak();
    text.lines().find_map(|line| line.strip_prefix(key)).unwrap().trim_start_matches(':').trim()
}

#[test]
fn a_log_of_what_would_be_refused_refuses_nothing_and_says_where_it_is() {
    let mut daemon = common::daemon(options().arg("--sandbox").arg("log"));
    let said = "logged by the kernel: look for type=1326 in dmesg";
    assert!(daemon.wait_logged(said, PATIENCE), "{}", daemon.stderr());
    assert!(of_threads(&daemon, "Seccomp").values().all(|mode| mode == "2"));
    let (_frontend, _channel, mut driver) = connect(&daemon, &ram());
    assert_eq!(driver.plug(gpa(0), 1).unwrap().kind(), ResponseType::Ack);
    assert!(daemon.terminate(PATIENCE).unwrap().success());
}

/// A daemon on a kernel where a system call fails as one that is not there.
fn without(call: libc::c_long, args: &[&str]) -> Output {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("vhost.sock");
    let mut command = Command::new(DAEMON);
    let region = ["--addr", "4G", "--region-size", "1G", "--api-socket"];
    command.arg("--socket-path").arg(&socket).args(region).arg(dir.path().join("api"));
    command.args(args);
    let start = move || {
        let errno = SeccompAction::Errno(libc::ENOSYS.cast_unsigned());
        let rules = [(call, Vec::new())].into_iter().collect();
        let arch = std::env::consts::ARCH.try_into().unwrap();
        let filter = SeccompFilter::new(rules, SeccompAction::Allow, errno, arch).unwrap();
        seccompiler::apply_filter(&BpfProgram::try_from(filter).unwrap()).unwrap();
        let child = command.stderr(Stdio::piped()).spawn().unwrap();
        let pid = Pid::from_child(&child);
        let ended = || {
            let how = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
            waitid(WaitId::Pid(pid), how).unwrap().is_some()
        };
        // Until then it may not be watching for signals, but one that comes earlier waits.
        while !ended() {
            if socket.exists() {
                let _ = kill_process(pid, Signal::TERM);
            }
            thread::sleep(Duration::from_millis(10));
        }
        child.wait_with_output().unwrap()
    };
    // The filter is the thread's, and of what it starts.
    thread::spawn(start).join().unwrap()
}

#[test]
fn a_kernel_that_lacks_a_part_is_refused_unless_that_is_optional() {
    let landlock = libc::SYS_landlock_create_ruleset;
    let output = without(landlock, &[]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("this kernel has no Landlock"), "{said}");
    assert!(said.contains("add --sandbox-optional landlock"), "{said}");

    let output = without(landlock, &["--sandbox-optional", "landlock"]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{said}");
    assert!(said.contains("running without it, since this kernel has no Landlock"), "{said}");

    let output = without(landlock, &["--sandbox", "off"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");

    let output = without(libc::SYS_seccomp, &["--sandbox-optional", "landlock"]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("add --sandbox-optional seccomp"), "{said}");
    let output = without(libc::SYS_seccomp, &["--sandbox-optional", "landlock,seccomp"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
}

#[test]
fn another_user_owns_the_sockets_and_serves_the_guest() {
    if !rustix::process::geteuid().is_root() {
        return eprintln!("skipped: only root can become another user");
    }
    let user = options().discard_socket().state_file().arg("--user").arg("65534");
    let owned = |folder: &Path| chown(folder, Some(65534), Some(65534));
    let mut daemon = Daemon::start_in(Path::new(DAEMON), user, owned).unwrap();
    for path in [daemon.socket(), daemon.discard_socket(), daemon.state_file()] {
        let metadata = fs::metadata(&path).unwrap();
        assert_eq!((metadata.uid(), metadata.gid()), (65534, 65534), "{}", path.display());
    }
    let users = of_threads(&daemon, "Uid");
    let is_that = |uids: &String| uids.split_whitespace().all(|uid| uid == "65534");
    assert!(users.values().all(is_that), "{users:?}");
    let (_frontend, _channel, mut driver) = connect(&daemon, &ram());
    assert_eq!(driver.plug(gpa(0), 1).unwrap().kind(), ResponseType::Ack);
    let sockets = [daemon.socket(), daemon.api_socket()];
    assert!(daemon.terminate(PATIENCE).unwrap().success(), "{}", daemon.stderr());
    assert!(sockets.iter().all(|socket| !socket.exists()));
}

#[test]
fn a_user_that_is_not_there_is_refused_by_name() {
    let args = ["--socket-path", "s", "--addr", "4G", "--region-size", "1G", "--user", "no-such"];
    let output = Command::new(DAEMON).args(args).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("--user no-such: there is no such user"), "{said}");
}
