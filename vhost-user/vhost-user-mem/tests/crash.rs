//! The daemon is killed and started again: nothing is lost, nothing is done twice.

mod common;

use std::fs;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use common::{ADDR, BLOCK, connect, gpa, options, ram};
use rustix::net::{AddressFamily, SocketType};
use rustix::process::{Pid, Resource, Rlimit, Signal, kill_process, prlimit};
use small_vmm::backend_channel::{BackendChannel, Behaviour};
use small_vmm::daemon::Daemon;
use small_vmm::driver::{MemDriver, MemRequest, RequestType, ResponseType, Shape};
use small_vmm::frontend::{Frontend, USUAL_FEATURES, USUAL_PROTOCOL_FEATURES};
use small_vmm::memory::GuestRam;
use small_vmm::protocol::Request;

/// Connects again: the ring continues from `base`.
fn resume_from(daemon: &Daemon, ram: &GuestRam, driver: &MemDriver, base: u16) -> Frontend {
    let frontend = Frontend::connect(&daemon.socket()).unwrap();
    frontend.negotiate(USUAL_FEATURES, USUAL_PROTOCOL_FEATURES).unwrap();
    frontend.set_mem_table(ram).unwrap();
    let ring = driver.ring();
    frontend.set_vring_num(0, u32::from(ring.size())).unwrap();
    frontend.set_vring_base(0, u32::from(base)).unwrap();
    frontend.set_vring_addr(0, ring, None).unwrap();
    frontend.set_vring_fd(Request::SetVringCall, 0, Some(ring.call_fd())).unwrap();
    frontend.set_vring_fd(Request::SetVringKick, 0, Some(ring.kick_fd())).unwrap();
    frontend.enable(0, true).unwrap();
    frontend
}

/// Connects again as QEMU does: the ring continues from the used index.
fn resume(daemon: &Daemon, ram: &GuestRam, driver: &MemDriver) -> Frontend {
    resume_from(daemon, ram, driver, driver.ring().used_idx().unwrap())
}

/// Connects again as Cloud Hypervisor does: the ring continues from the available index, whatever
/// was answered. It does not kick.
fn resume_blindly(daemon: &Daemon, ram: &GuestRam, driver: &MemDriver) -> Frontend {
    resume_from(daemon, ram, driver, driver.ring().next_avail())
}

#[test]
fn killed_at_any_moment_every_request_is_done_once_and_answered() {
    let mut daemon = common::daemon(options().state_file());
    let ram = ram();
    let (_first, _channel, mut driver) = connect(&daemon, &ram);
    let mut plugged = [false; 16];
    let mut seed = 0x2545_f491_4f6c_dd1du64;
    let mut unanswered = 0;
    for round in 0..60u64 {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        let block = usize::try_from(seed >> 8).unwrap_or(0) % plugged.len();
        let kind = if plugged[block] { RequestType::Unplug } else { RequestType::Plug };
        let request = MemRequest::new(kind, gpa(block as u64), 1).to_bytes();
        driver.submit(&request, &Shape::default()).unwrap();
        driver.ring().force_kick().unwrap();
        // From before the request is seen to after it was answered.
        let start = Instant::now();
        while start.elapsed() < Duration::from_micros(seed % 400) {
            std::hint::spin_loop();
        }
        daemon.restart().unwrap();
        let answered = driver.ring().used_idx().unwrap() != driver.ring().next_used();
        unanswered += usize::from(!answered);
        let frontend = if round % 3 == 1 {
            resume_blindly(&daemon, &ram, &driver)
        } else if answered || round % 3 == 2 {
            let frontend = resume(&daemon, &ram, &driver);
            driver.ring().force_kick().unwrap();
            frontend
        } else {
            // A front-end that starts over: a fresh ring, and the same request again.
            let (frontend, _, fresh) = connect(&daemon, &ram);
            driver = fresh;
            driver.submit(&request, &Shape::default()).unwrap();
            driver.ring().force_kick().unwrap();
            frontend
        };
        assert_eq!(driver.complete().unwrap().kind(), ResponseType::Ack, "round {round}");
        plugged[block] = !plugged[block];
        let count = plugged.iter().filter(|plugged| **plugged).count() as u64;
        assert_eq!(frontend.config().unwrap().plugged_size, count * BLOCK, "round {round}");
        for (block, plugged) in plugged.iter().enumerate() {
            if *plugged {
                ram.write_stamps(gpa(block as u64)..gpa(block as u64 + 1), 1).unwrap();
            } else {
                let range = gpa(block as u64)..gpa(block as u64 + 1);
                assert_eq!(ram.resident_bytes(range).unwrap(), 0, "memory and bitmap agree");
            }
        }
    }
    assert!(unanswered > 0, "no kill came before an answer");
}

#[test]
fn requests_that_no_daemon_has_seen_are_served_without_a_kick() {
    let mut daemon = common::daemon(options().state_file());
    let ram = ram();
    let (_first, _channel, mut driver) = connect(&daemon, &ram);
    for _ in 0..3 {
        assert_eq!(driver.plug(ADDR, 1).unwrap().kind(), ResponseType::Ack);
        assert_eq!(driver.unplug(ADDR, 1).unwrap().kind(), ResponseType::Ack);
    }
    daemon.kill().unwrap();
    for block in 0..4 {
        let request = MemRequest::new(RequestType::Plug, gpa(block), 1).to_bytes();
        driver.submit(&request, &Shape::default()).unwrap();
    }
    daemon.restart().unwrap();
    let frontend = resume_blindly(&daemon, &ram, &driver);
    for _ in 0..4 {
        assert_eq!(driver.complete().unwrap().kind(), ResponseType::Ack);
    }
    assert_eq!(frontend.config().unwrap().plugged_size, 4 * BLOCK);
    assert_eq!(driver.plug(gpa(4), 1).unwrap().kind(), ResponseType::Ack);
}

#[test]
fn an_interrupt_that_was_lost_with_the_daemon_comes_when_the_ring_starts() {
    let mut daemon = common::daemon(options().state_file());
    let ram = ram();
    let (_frontend, _channel, mut driver) = connect(&daemon, &ram);
    let request = MemRequest::new(RequestType::Plug, ADDR, 1).to_bytes();
    driver.submit(&request, &Shape::default()).unwrap();
    driver.ring_mut().kick().unwrap();
    let deadline = Instant::now() + common::PATIENCE;
    while driver.ring().used_idx().unwrap() == driver.ring().next_used() {
        assert!(Instant::now() < deadline, "no answer");
        std::thread::yield_now();
    }
    daemon.kill().unwrap();
    // As if it had been killed before it signalled the answer.
    driver.ring().calls().unwrap();
    daemon.restart().unwrap();
    let _frontend = resume(&daemon, &ram, &driver);
    assert!(driver.ring().wait_call(common::PATIENCE).unwrap(), "the driver waits for ever");
    assert_eq!(driver.complete().unwrap().kind(), ResponseType::Ack);
}

#[test]
fn a_change_that_the_killed_daemon_did_not_tell_is_told_by_the_next() {
    let mut daemon = common::daemon(options().state_file());
    let ram = ram();
    for sent in [false, true] {
        let (frontend, channel, driver) = connect(&daemon, &ram);
        if sent {
            let seen = channel.config_changes();
            assert!(daemon.api().resize(5 * BLOCK).unwrap().is_success());
            assert!(channel.wait_beyond(seen, common::PATIENCE));
        } else {
            frontend.get_vring_base(0).unwrap();
            assert!(daemon.api().resize(7 * BLOCK).unwrap().is_success());
        }
        daemon.restart().unwrap();
        let frontend = resume(&daemon, &ram, &driver);
        let channel = BackendChannel::open(&frontend, Behaviour::AckAfterGetConfig).unwrap();
        assert!(channel.wait_beyond(0, common::PATIENCE), "sent before: {sent}");
        let requested = channel.last_config().unwrap().requested_size;
        assert_eq!(requested, if sent { 5 } else { 7 } * BLOCK);
    }
}

#[test]
fn a_change_that_was_not_acknowledged_is_told_to_the_next_front_end() {
    let daemon = common::daemon(options());
    let ram = ram();
    let (frontend, first, _) = connect(&daemon, &ram);
    drop(first);
    let silent = BackendChannel::open(&frontend, Behaviour::NeverAck).unwrap();
    assert!(daemon.api().resize(5 * BLOCK).unwrap().is_success());
    assert!(silent.wait_beyond(0, common::PATIENCE));
    frontend.disconnect();
    let (_frontend, channel, _) = connect(&daemon, &ram);
    assert!(channel.wait_beyond(0, common::PATIENCE));
}

#[test]
fn what_the_api_set_wins_over_the_command_line() {
    let mut daemon = common::daemon(options().requested_size(BLOCK).state_file());
    assert!(daemon.api().resize(7 * BLOCK).unwrap().is_success());
    assert!(daemon.api().set_migration(true).unwrap().is_success());
    daemon.restart().unwrap();
    let device = daemon.api().device().unwrap();
    assert_eq!(device["requested_size"], 7 * BLOCK);
    assert_eq!(device["migration_active"], true);
}

#[test]
fn a_usable_region_that_did_not_shrink_survives() {
    let mut daemon = common::daemon(options().requested_size(512 << 20).state_file());
    assert!(daemon.api().resize(0).unwrap().is_success());
    let before = daemon.api().device().unwrap();
    assert_eq!(before["usable_region_size"], 768u64 << 20);
    daemon.restart().unwrap();
    assert_eq!(daemon.api().device().unwrap(), before);
}

fn run(args: &[&str]) -> (Option<i32>, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_vhost-user-mem")).args(args).output().unwrap();
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn bad_state_files_are_refused_and_left_untouched() {
    let mut daemon = common::daemon(options().state_file());
    assert!(daemon.api().resize(BLOCK).unwrap().is_success());
    daemon.kill().unwrap();
    let path = daemon.state_file();
    let good = fs::read(&path).unwrap();
    let (state, socket) = (path.to_str().unwrap(), daemon.socket());
    let base = ["--socket-path", socket.to_str().unwrap(), "--state-file", state];
    let region = ["--addr", "0x140000000", "--region-size", "1G", "--block-size", "2M"];
    let mut garbled = good.clone();
    garbled[4096 + 8] ^= 1;
    let mut newer = good.clone();
    newer[8] = 99;
    for (bytes, says) in [
        (&good[..good.len() - 1], "bytes"),
        (&good[..100], "bytes"),
        (&[][..], "bytes"),
        (&garbled[..], "checksum"),
        (&newer[..], "version"),
        (&b"something else altogether"[..], ""),
    ] {
        fs::write(&path, bytes).unwrap();
        let (status, stderr) = run(&[&base[..], &region[..]].concat());
        assert_eq!(status, Some(1), "{stderr}");
        assert!(stderr.contains(says) && stderr.contains(state), "{stderr}");
        assert_eq!(fs::read(&path).unwrap(), bytes);
    }
    fs::write(&path, &good).unwrap();
    for (option, value, field) in
        [(1, "0x180000000", "addr"), (3, "2G", "region_size"), (5, "4M", "block_size")]
    {
        let mut region = region;
        region[option] = value;
        let (status, stderr) = run(&[&base[..], &region[..]].concat());
        assert_eq!(status, Some(1), "{stderr}");
        assert!(stderr.contains(field), "{stderr}");
        assert_eq!(fs::read(&path).unwrap(), good);
    }
    daemon.restart().unwrap();
    assert_eq!(daemon.api().device().unwrap()["requested_size"], BLOCK);
}

#[test]
fn sigterm_ends_it_in_time_with_its_sockets_removed() {
    let mut daemon = common::daemon(options());
    let ram = ram();
    let (_frontend, _channel, mut driver) = connect(&daemon, &ram);
    driver.plug(ADDR, 1).unwrap();
    let _events = daemon.api().events().unwrap();
    let status = daemon.terminate(Duration::from_secs(2)).unwrap();
    assert!(status.success());
    assert!(!daemon.socket().exists() && !daemon.api_socket().exists());
}

/// A host that was started anew has another boot id, and nothing of the guest.
#[test]
fn after_a_start_of_the_host_the_requested_size_is_left_and_nothing_else() {
    let mut daemon = common::daemon(options().state_file());
    let ram = ram();
    let (_frontend, _channel, mut driver) = connect(&daemon, &ram);
    assert_eq!(driver.plug(gpa(3), 2).unwrap().kind(), ResponseType::Ack);
    assert!(daemon.api().resize(7 * BLOCK).unwrap().is_success());
    assert!(daemon.api().set_migration(true).unwrap().is_success());
    daemon.kill().unwrap();
    let mut bytes = fs::read(daemon.state_file()).unwrap();
    // The head, with another boot id (spec-notes/state-file.md), and a bitmap that never got to
    // the disk.
    bytes[48] ^= 1;
    let crc = u64::from(crc32fast::hash(&bytes[..64])).to_le_bytes();
    bytes[64..72].copy_from_slice(&crc);
    bytes[24576..].fill(0);
    fs::write(daemon.state_file(), bytes).unwrap();
    for _ in 0..2 {
        daemon.restart().unwrap();
        let device = daemon.api().device().unwrap();
        assert_eq!(device["requested_size"], 7 * BLOCK);
        assert_eq!(device["usable_region_size"], (256 << 20) + 7 * BLOCK);
        assert_eq!(
            (&device["plugged_size"], &device["migration_active"]),
            (&0.into(), &false.into())
        );
        let said = "the host was started anew";
        assert!(daemon.wait_logged(said, common::PATIENCE), "{}", daemon.stderr());
    }
    let (_frontend, _channel, mut driver) = connect(&daemon, &ram);
    assert_eq!(driver.plug(gpa(0), 1).unwrap().kind(), ResponseType::Ack);
    assert!(daemon.api().resize(6 * BLOCK).unwrap().is_success());
    daemon.restart().unwrap();
    let device = daemon.api().device().unwrap();
    assert_eq!(
        (&device["plugged_size"], &device["requested_size"]),
        (&BLOCK.into(), &(6 * BLOCK).into())
    );
}

/// New files beside the state file that are not under its name yet.
fn unfinished(dir: &Path) -> usize {
    let names = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name());
    names.filter(|name| name.to_string_lossy().contains(".new-")).count()
}

#[test]
fn killed_while_its_state_file_is_replaced_it_leaves_nothing_beside_it_after_the_next_start() {
    let mut daemon = common::daemon(options().state_file());
    let ram = ram();
    let state = {
        let (frontend, _channel, mut driver) = connect(&daemon, &ram);
        assert_eq!(driver.plug(gpa(1), 1).unwrap().kind(), ResponseType::Ack);
        frontend.get_vring_base(0).unwrap();
        let state = small_vmm::device_state::save(&frontend).unwrap().unwrap();
        frontend.start_ring(0, driver.ring()).unwrap();
        assert_eq!(driver.unplug(gpa(1), 1).unwrap().kind(), ResponseType::Ack);
        state
    };
    let dir = daemon.state_file().parent().unwrap().to_owned();
    for _ in 0..3 {
        // The system kills it (SIGXFSZ) where it gives the new file its full size.
        let size = fs::metadata(daemon.state_file()).unwrap().len();
        let limit = Rlimit { current: Some(size - 1), maximum: None };
        let pid = i32::try_from(daemon.pid()).ok().and_then(Pid::from_raw);
        prlimit(pid, Resource::Fsize, limit).unwrap();
        let frontend = Frontend::connect(&daemon.socket()).unwrap();
        frontend.negotiate(USUAL_FEATURES, USUAL_PROTOCOL_FEATURES).unwrap();
        frontend.set_mem_table(&ram).unwrap();
        let _ = small_vmm::device_state::load(&frontend, &state);
        // Which has the state come into force.
        let driver = MemDriver::at(&ram, common::RING, 128, true).unwrap();
        let _ = frontend.start_ring(0, driver.ring());
        let _ = driver.ring().force_kick();
        let deadline = Instant::now() + common::PATIENCE;
        while daemon.is_running() {
            assert!(Instant::now() < deadline, "it was not killed: {}", daemon.stderr());
            std::thread::sleep(Duration::from_millis(2));
        }
        assert_eq!(unfinished(&dir), 1);
        daemon.restart().unwrap();
        assert_eq!(unfinished(&dir), 0, "{}", daemon.stderr());
        assert_eq!(daemon.api().device().unwrap()["plugged_size"], 0);
    }
}

#[test]
fn new_state_files_at_once_in_separate_process_namespaces_are_not_mixed_up() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let spawn = |name: &str| {
        Command::new("unshare")
            .args(["--pid", "--fork", "--kill-child", env!("CARGO_BIN_EXE_vhost-user-mem")])
            .args(["--addr", "0x140000000", "--region-size", "1G", "--socket-path"])
            .arg(dir.path().join(name))
            .arg("--state-file")
            .arg(&state)
            .stderr(std::process::Stdio::piped())
            .spawn()
    };
    if !Command::new("unshare")
        .args(["--pid", "--fork", "true"])
        .status()
        .is_ok_and(|s| s.success())
    {
        return eprintln!("skipped: no process namespaces in this environment");
    }
    for round in 0..5 {
        let _ = fs::remove_file(&state);
        let mut daemons: Vec<_> = (0..3).map(|n| spawn(&format!("{round}-{n}")).unwrap()).collect();
        let deadline = Instant::now() + common::PATIENCE;
        let running = loop {
            let ended = daemons.iter_mut().filter_map(|d| d.try_wait().unwrap()).count();
            if ended == 2 {
                break 1;
            }
            assert!(Instant::now() < deadline, "two share a file");
            std::thread::sleep(Duration::from_millis(2));
        };
        assert_eq!(running, 1);
        let size = fs::metadata(&state).unwrap().len();
        assert!(size > 24576, "{size}");
        assert_eq!(unfinished(dir.path()), 0);
        for daemon in &mut daemons {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
    }
}

#[test]
fn sigterm_during_the_start_leaves_no_socket() {
    for socket in ["vhost.sock", "api.sock"] {
        let dir = tempfile::tempdir().unwrap();
        let path = |name| dir.path().join(name);
        let mut child = Command::new(env!("CARGO_BIN_EXE_vhost-user-mem"))
            .args(["--addr", "0x140000000", "--region-size", "1G"])
            .arg("--socket-path")
            .arg(path("vhost.sock"))
            .arg("--api-socket")
            .arg(path("api.sock"))
            .spawn()
            .unwrap();
        while !path(socket).exists() {
            assert!(child.try_wait().unwrap().is_none(), "it ended before it had a socket");
        }
        kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(0));
        assert!(!path("vhost.sock").exists() && !path("api.sock").exists());
    }
}

#[test]
fn a_descriptor_that_is_no_stream_of_or_to_a_front_end_is_a_wrong_option() {
    let unconnected =
        || rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
    let sockets: [(OwnedFd, &str); 4] = [
        (UnixDatagram::pair().unwrap().0.into(), "not a Unix stream socket"),
        (TcpListener::bind("127.0.0.1:0").unwrap().into(), "not a Unix stream socket"),
        (fs::File::open("/dev/null").unwrap().into(), "not a Unix stream socket"),
        (unconnected(), "neither listens nor is connected"),
    ];
    for (socket, says) in sockets {
        let output = Command::new(env!("CARGO_BIN_EXE_vhost-user-mem"))
            .args(["--fd", "0", "--addr", "0x140000000", "--region-size", "1G"])
            .stdin(socket)
            .output()
            .unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{stderr}");
        assert!(stderr.contains("--fd 0: ") && stderr.contains(says), "{stderr}");
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
    }
    let (status, stderr) = run(&["--fd", "99", "--addr", "0x140000000", "--region-size", "1G"]);
    assert_eq!(status, Some(2), "{stderr}");
    assert!(stderr.contains("--fd 99: no such file descriptor"), "{stderr}");
}

#[test]
fn sockets_left_by_a_killed_daemon_do_not_block_a_start_but_live_ones_do() {
    let mut daemon = common::daemon(options());
    daemon.kill().unwrap();
    assert!(daemon.socket().exists());
    daemon.restart().unwrap();
    let socket = daemon.socket();
    let (status, stderr) = run(&[
        "--socket-path",
        socket.to_str().unwrap(),
        "--addr",
        "0x140000000",
        "--region-size",
        "1G",
    ]);
    assert_eq!(status, Some(1));
    assert!(stderr.contains("--socket-path"), "{stderr}");
    assert!(daemon.api().device().is_ok());
}

#[test]
fn wrong_options_end_with_status_2_and_one_line() {
    let good = ["--socket-path", "s", "--addr", "0x140000000", "--region-size", "1G"];
    for (more, names) in [
        (&["--block-size", "3M"][..], "--block-size 3M"),
        (&["--block-size", "0"], "--block-size 0"),
        (&["--block-size", "1K"], "--block-size 1K"),
        (&["--requested-size", "2G"], "--requested-size 2G"),
        (&["--requested-size", "1"], "--requested-size 1"),
        (&["--requested-size", "-1"], "--requested-size -1: a size must not be negative"),
        (&["--api-socket", "s"], "--api-socket s"),
        (&["--node-id", "70000"], "--node-id 70000"),
        (&["--fd", "7"], "--fd"),
        (&["--no-such-option"], "--no-such-option"),
    ] {
        let (status, stderr) = run(&[&good[..], more].concat());
        assert_eq!(status, Some(2), "{more:?} {stderr}");
        assert!(stderr.contains(names), "{stderr}");
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
    }
    assert_eq!(run(&[]).0, Some(2));
    assert_eq!(run(&["--bogus", "--print-capabilities"]).0, Some(0));
}
