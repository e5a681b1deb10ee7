//! The daemon is killed and started again: nothing is lost, nothing is done twice.

mod common;

use std::fs;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::process::Command;
use std::time::{Duration, Instant};

use common::{ADDR, BLOCK, connect, gpa, options, ram};
use rustix::net::{AddressFamily, SocketType};
use rustix::process::{Pid, Signal, kill_process};
use test_vmm::driver::{MemDriver, MemRequest, RequestType, ResponseType, Shape};
use test_vmm::frontend::{Frontend, USUAL_FEATURES, USUAL_PROTOCOL_FEATURES};
use test_vmm::memory::GuestRam;
use test_vmm::protocol::Request;

/// Connects again as QEMU does: the ring goes on from the used index.
fn resume(daemon: &test_vmm::daemon::Daemon, ram: &GuestRam, driver: &MemDriver) -> Frontend {
    let frontend = Frontend::connect(&daemon.socket()).unwrap();
    frontend.negotiate(USUAL_FEATURES, USUAL_PROTOCOL_FEATURES).unwrap();
    frontend.set_mem_table(ram).unwrap();
    let ring = driver.ring();
    frontend.set_vring_num(0, u32::from(ring.size())).unwrap();
    frontend.set_vring_base(0, u32::from(ring.used_idx().unwrap())).unwrap();
    frontend.set_vring_addr(0, ring, None).unwrap();
    frontend.set_vring_fd(Request::SetVringCall, 0, Some(ring.call_fd())).unwrap();
    frontend.set_vring_fd(Request::SetVringKick, 0, Some(ring.kick_fd())).unwrap();
    frontend.enable(0, true).unwrap();
    frontend
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
        let frontend = if answered || round % 3 != 0 {
            resume(&daemon, &ram, &driver)
        } else {
            // A front-end that starts over: a fresh ring, and the same request again.
            let (frontend, _, fresh) = connect(&daemon, &ram);
            driver = fresh;
            driver.submit(&request, &Shape::default()).unwrap();
            frontend
        };
        driver.ring().force_kick().unwrap();
        assert_eq!(driver.complete().unwrap().kind(), ResponseType::Ack, "round {round}");
        plugged[block] = !plugged[block];
        let count = plugged.iter().filter(|plugged| **plugged).count() as u64;
        assert_eq!(frontend.config().unwrap().plugged_size, count * BLOCK, "round {round}");
        for (block, plugged) in plugged.iter().enumerate() {
            if *plugged {
                ram.write_stamps(gpa(block as u64)..gpa(block as u64 + 1), 1).unwrap();
            } else {
                let range = gpa(block as u64)..gpa(block as u64 + 1);
                assert_eq!(ram.populated_bytes(range).unwrap(), 0, "memory and bitmap agree");
            }
        }
    }
    assert!(unanswered > 0, "no kill came before an answer");
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
