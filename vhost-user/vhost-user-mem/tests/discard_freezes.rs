//! Freezes of block state by clients of the discard channel, in processes of their own.

mod common;

use std::io::{BufRead, BufReader, Lines, Read, Write};
use std::path::Path;
use std::process::{Child, ChildStderr, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use common::discard_channel::{all, attach, attach_at, channel_rig};
use common::{BLOCK, PATIENCE, REGION, Rig, gpa};
use ram_discard::memory::RamBlock;
use ram_discard::test_utils::{Calls, Recorder};
use ram_discard::{FreezeFor, RamDiscardManager};
use rustix::fs::MemfdFlags;
use rustix::process::{Pid, Signal, kill_process};
use small_vmm::driver::{RequestType, ResponseType};
use small_vmm::memory::memfd;
use vhost_user_mem::discard_channel::{DiscardChannel, Limits};
use vhost_user_mem::metrics::Metrics;
use virtio_mem::controller::{InitialState, MemController};
use virtio_mem::device::{BlockSpan, Geometry, Request, Response, VirtioMem};
use virtio_mem::discard_channel::RemoteRamDiscardManager;

fn assert_frozen(rig: &mut Rig) {
    assert_eq!(rig.plug(1, 1), ResponseType::Busy);
    assert_eq!(rig.unplug(0, 1), ResponseType::Busy);
    assert_eq!(rig.driver.unplug_all().unwrap().kind(), ResponseType::Busy);
    assert_eq!(rig.execute(RequestType::State, gpa(0), 1).kind(), ResponseType::Ack);
    assert_eq!(rig.daemon.api().device().unwrap()["migration_active"], true);
}

/// The guest is told to try again, and can.
fn assert_thawed_after(rig: &mut Rig, act: impl FnOnce()) {
    let seen = rig.channel.as_ref().unwrap().config_changes();
    act();
    assert!(rig.channel.as_ref().unwrap().wait_beyond(seen, PATIENCE));
    assert_eq!(rig.plug(1, 1), ResponseType::Ack);
    assert_eq!(rig.unplug(1, 1), ResponseType::Ack);
}

#[test]
fn frozen_block_state_is_busy_until_every_client_has_thawed() {
    let mut rig = channel_rig();
    rig.plug(0, 1);
    let (first, second) = (attach(&rig.daemon), attach(&rig.daemon));
    let freeze = |client: &RemoteRamDiscardManager| client.freeze(FreezeFor::Source).unwrap();
    let (of_first, of_second, again) = (freeze(&first), freeze(&second), freeze(&second));
    assert_frozen(&mut rig);
    of_first.thaw().unwrap();
    assert_frozen(&mut rig);
    of_second.thaw().unwrap();
    assert_frozen(&mut rig);
    again.check().unwrap();
    assert_thawed_after(&mut rig, || again.thaw().unwrap());
}

#[test]
fn a_freeze_ends_with_its_connection() {
    let mut rig = channel_rig();
    rig.plug(0, 1);
    let client = attach(&rig.daemon);
    let frozen = client.freeze(FreezeFor::Source).unwrap();
    assert_frozen(&mut rig);
    assert_thawed_after(&mut rig, || drop(client));
    assert!(frozen.check().is_err());
}

/// Set for the child of [`a_killed_client_holds_nothing`]: the socket.
const CHILD: &str = "DISCARD_CHANNEL_TEST_CHILD";

#[test]
#[ignore = "the child of a_killed_client_holds_nothing"]
fn child_that_freezes_until_it_is_killed() {
    let Some(socket) = std::env::var_os(CHILD) else { return };
    let client = attach_at(Path::new(&socket));
    client.register(all(), Recorder::boxed("child", &Calls::default())).unwrap();
    let frozen = client.freeze(FreezeFor::Source).unwrap();
    eprintln!("frozen");
    // Ends with the parent, should it not kill us.
    let _ = std::io::stdin().read(&mut [0]);
    eprintln!("{}", if frozen.check().is_ok() { "held" } else { "lost" });
}

fn child_that_has_frozen(socket: &Path) -> (Child, Lines<BufReader<ChildStderr>>) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child_that_freezes_until_it_is_killed", "--ignored", "--nocapture"])
        .env(CHILD, socket)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains("frozen")));
    (child, lines)
}

/// The guest is served again when the freeze has expired, without the client, which is not there to
/// answer; and the client, when it goes on, knows that its freeze did not hold.
#[test]
fn a_stopped_client_that_froze_holds_nothing_and_knows_it() {
    let geometry = Geometry::new(common::ADDR, REGION, BLOCK, None).unwrap();
    let device = VirtioMem::new(geometry, REGION).unwrap();
    let controller = Arc::new(MemController::new(InitialState::volatile(device)));
    let file = memfd("ram", REGION, MemfdFlags::empty()).unwrap();
    let ram = RamBlock::new("mem".to_owned(), common::ADDR, REGION, file, 0).unwrap();
    controller.set_memory(vec![Arc::new(ram)]).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("discard");
    let limits = Limits { freeze_expiry: Duration::from_secs(3), ..Limits::default() };
    let metrics = Arc::new(Metrics::new());
    let channel = DiscardChannel::bind_with(&path, Arc::clone(&controller), metrics, limits);
    let channel = channel.unwrap();
    channel.start().unwrap();
    let (mut child, mut lines) = child_that_has_frozen(&path);
    let plug =
        |block| controller.execute(Request::Plug(BlockSpan { addr: gpa(block), nb_blocks: 1 }));
    assert_eq!(plug(0), Response::Busy);
    let pid = Pid::from_child(&child);
    kill_process(pid, Signal::STOP).unwrap();
    let start = Instant::now();
    while plug(0) == Response::Busy {
        assert!(start.elapsed() < PATIENCE, "frozen by a client that does not run");
        thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(controller.config().plugged_size, BLOCK);
    assert_eq!(plug(1), Response::Ack, "it is not waited for again");
    kill_process(pid, Signal::CONT).unwrap();
    child.stdin.take().unwrap().write_all(b"\n").unwrap();
    assert_eq!(lines.next().unwrap().unwrap(), "lost");
    child.wait().unwrap();
}

#[test]
fn a_killed_client_holds_nothing() {
    let mut rig = channel_rig();
    rig.plug(0, 1);
    let (mut child, _) = child_that_has_frozen(&rig.daemon.discard_socket());
    assert_frozen(&mut rig);
    assert_thawed_after(&mut rig, || child.kill().unwrap());
    child.wait().unwrap();
}
