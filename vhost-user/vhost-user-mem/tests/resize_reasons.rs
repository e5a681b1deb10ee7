//! What the management API and `vmemctl resize --wait` say of a guest that stands still, and that they say so no
//! longer once it moves.

mod common;

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use common::{ADDR, BLOCK, BOOT, PATIENCE, RING, Rig, daemon, gpa, options, ram, rig_with};
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use small_vmm::daemon::{Daemon, DaemonOptions};
use small_vmm::driver::{MemDriver, MemRequest, RequestType, ResponseType};
use small_vmm::frontend::{Frontend, USUAL_FEATURES, USUAL_PROTOCOL_FEATURES};
use small_vmm::memory::{GuestRam, Layout};
use small_vmm::process::find_program;

const GIB: u64 = 1 << 30;
const REQUESTED: u64 = 64 * BLOCK;
/// VHOST_USER_F_PROTOCOL_FEATURES, which is not the driver's.
const PROTOCOL_FEATURES: u64 = 1 << 30;
/// A guest is taken to stand still after 10 s.
const LONG: Duration = Duration::from_secs(60);

/// `vmemctl resize --wait`, and what it says, line by line.
struct Client {
    child: Child,
    lines: Receiver<String>,
}

impl Client {
    /// Asks for `size` and waits until the device has it.
    fn resize(daemon: &Daemon, size: u64) -> Self {
        let vmemctl = find_program(env!("CARGO_BIN_EXE_vhost-user-mem").as_ref(), "vmemctl");
        let mut command = Command::new(vmemctl.unwrap());
        command.arg("--api-socket").arg(daemon.api_socket());
        command.args(["resize", &size.to_string(), "--wait", "--timeout", "5m"]);
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let (say, lines) = channel();
        let said = BufReader::new(child.stderr.take().unwrap());
        thread::spawn(move || {
            said.lines()
                .map_while(Result::ok)
                .take_while(|line| say.send(line.clone()).is_ok())
                .count()
        });
        let deadline = Instant::now() + PATIENCE;
        while daemon.api().device().unwrap()["requested_size"] != size {
            assert!(Instant::now() < deadline, "nothing is asked for");
            thread::sleep(Duration::from_millis(2));
        }
        Self { child, lines }
    }

    /// The first line that says that the guest stands still, and why.
    fn says_why(&self, text: &str) -> String {
        let (deadline, mut others) = (Instant::now() + LONG, Vec::new());
        loop {
            match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) if line.starts_with("stands still") && line.contains(text) => return line,
                Ok(line) => others.push(line),
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    panic!("it does not say {text:?}, but {others:?}")
                }
            }
        }
    }

    /// Ends by itself, as the guest is done.
    fn ends(mut self) {
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            match self.child.try_wait().unwrap() {
                Some(status) => break status,
                None => assert!(Instant::now() < deadline, "it still waits"),
            }
            thread::sleep(Duration::from_millis(2));
        };
        let said: Vec<String> = self.lines.try_iter().collect();
        assert!(status.success(), "{status}: {said:?}");
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Both say that the guest stands still for a reason of this kind, with this text.
#[track_caller]
fn both_say(daemon: &Daemon, client: &Client, kind: &str, text: &str) {
    let said = client.says_why(text);
    let resize = daemon.api().device().unwrap()["resize"].clone();
    assert_eq!((&resize["state"], &resize["reason"]["kind"]), (&"stalled".into(), &kind.into()));
    let told = resize["reason"]["text"].as_str().unwrap();
    assert!(told.contains(text) && said.ends_with(told), "{told:?} and {said:?}");
}

#[test]
fn a_legacy_driver_is_one_that_has_not_accepted_the_features() {
    let (daemon, ram) = (daemon(options()), ram());
    let frontend = Frontend::connect(&daemon.socket()).unwrap();
    frontend.negotiate(PROTOCOL_FEATURES, USUAL_PROTOCOL_FEATURES).unwrap();
    frontend.set_mem_table(&ram).unwrap();
    let legacy = MemDriver::at(&ram, RING, 128, false).unwrap();
    frontend.start_ring(0, legacy.ring()).unwrap();
    let client = Client::resize(&daemon, REQUESTED);
    both_say(&daemon, &client, "features-not-accepted", "without VIRTIO_F_VERSION_1");
    frontend.get_vring_base(0).unwrap();
    frontend.set_features(frontend.get_features().unwrap() & USUAL_FEATURES).unwrap();
    let mut driver = MemDriver::at(&ram, RING, 128, true).unwrap();
    frontend.start_ring(0, driver.ring()).unwrap();
    assert_eq!(driver.plug(ADDR, 64).unwrap().kind(), ResponseType::Ack);
    client.ends();
}

/// Starts a daemon that is not ended (SIGXFSZ) by a file that may not be as long as it makes it.
fn daemon_that_outlives_full_files(options: DaemonOptions, place: &Path) -> Daemon {
    let script = place.join("start");
    let program = env!("CARGO_BIN_EXE_vhost-user-mem");
    fs::write(&script, format!("#!/bin/sh\ntrap '' XFSZ\nexec '{program}' \"$@\"\n")).unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o700)).unwrap();
    Daemon::start(&script, options).unwrap()
}

#[test]
fn a_state_that_cannot_be_saved_is_told_with_the_systems_reason() {
    let place = tempfile::tempdir().unwrap();
    let daemon = daemon_that_outlives_full_files(options().state_file(), place.path());
    let ram = ram();
    let (_frontend, _channel, mut driver) = common::connect(&daemon, &ram);
    let client = Client::resize(&daemon, REQUESTED);
    let pid = Pid::from_raw(daemon.pid().cast_signed()).unwrap();
    let may_write = |size| {
        let before = prlimit(Some(pid), Resource::Fsize, Rlimit { current: size, maximum: None });
        before.unwrap();
    };
    may_write(Some(0));
    assert_eq!(driver.plug(ADDR, 1).unwrap().kind(), ResponseType::Busy);
    both_say(&daemon, &client, "state-not-saved", "could not be saved");
    assert!(daemon.wait_logged("cannot save the device state; answering BUSY", PATIENCE));
    let metrics = daemon.api().get("/metrics").unwrap().text;
    assert!(metrics.contains("virtio_mem_state_file_errors_total 1\n"), "{metrics}");
    may_write(None);
    assert_eq!(driver.plug(ADDR, 64).unwrap().kind(), ResponseType::Ack);
    client.ends();
}

#[test]
fn a_guest_that_leaves_it_at_a_nack_is_one_that_asked_for_too_much() {
    let mut rig = rig_with(options(), ram());
    let client = Client::resize(&rig.daemon, REQUESTED);
    assert_eq!(rig.plug(0, 65), ResponseType::Nack);
    both_say(&rig.daemon, &client, "rejected", "a plug request was answered with NACK");
    assert_eq!(rig.plug(0, 64), ResponseType::Ack);
    client.ends();
}

/// A device somewhere else than usual, with a front-end.
fn rig_at(addr: u64, size: u64) -> Rig {
    let ram = GuestRam::new(Layout::boot_and_device(BOOT, addr, size).unwrap()).unwrap();
    rig_with(DaemonOptions::new(addr, size).block_size(BLOCK), Arc::new(ram))
}

#[track_caller]
fn plug(rig: &mut Rig, addr: u64, size: u64) {
    let blocks = u16::try_from(size / BLOCK).unwrap();
    let request = MemRequest::new(RequestType::Plug, addr, blocks);
    assert_eq!(rig.driver.execute(request).unwrap().kind(), ResponseType::Ack);
}

/// Linux adds memory in blocks of 128 MiB at multiples of that.
#[test]
fn a_region_whose_ends_the_guest_cannot_use_is_out_of_its_reach() {
    let (block, addr, size) = (128 << 20, ADDR + BLOCK, 512 << 20);
    let mut rig = rig_at(addr, size);
    let client = Client::resize(&rig.daemon, size);
    plug(&mut rig, ADDR + block, 3 * block);
    both_say(&rig.daemon, &client, "out-of-reach", "128 MiB are out of the guest's reach");
    let first = ADDR + block - addr;
    plug(&mut rig, addr, first);
    plug(&mut rig, ADDR + 4 * block, block - first);
    client.ends();
}

#[test]
fn a_guest_that_stops_where_linux_does_is_asked_to_have_its_memory_online() {
    let mut rig = rig_at(ADDR, 4 * GIB);
    let client = Client::resize(&rig.daemon, 2 * GIB);
    plug(&mut rig, gpa(0), GIB);
    both_say(&rig.daemon, &client, "not-online", "/sys/devices/system/memory/auto_online_blocks");
    plug(&mut rig, gpa(512), GIB);
    client.ends();
}
