//! What the daemon says of a resize, as a front-end, a driver, clients and operators bring it about.

mod common;

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

use common::{ADDR, BLOCK, BOOT, PATIENCE, REGION, RING, Rig, daemon, gpa, options, ram, rig_with};
use ram_discard::test_utils::{Calls, Recorder};
use ram_discard::{RamDiscardManager, Section};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals};
use serde_json::Value;
use small_vmm::api::EventStream;
use small_vmm::daemon::Daemon;
use small_vmm::driver::{MemDriver, RequestType, ResponseType};
use small_vmm::frontend::{Frontend, USUAL_FEATURES, USUAL_PROTOCOL_FEATURES};
use small_vmm::memory::{GuestRam, Layout, memfd};
use virtio_mem::discard_channel::RemoteRamDiscardManager;

const REQUESTED: u64 = 64 * BLOCK;

fn small(requested: u64) -> Rig {
    rig_with(options().requested_size(requested).discard_socket(), ram())
}

fn resize(daemon: &Daemon) -> Value {
    daemon.api().device().unwrap()["resize"].clone()
}

fn kind(daemon: &Daemon) -> String {
    resize(daemon)["reason"]["kind"].as_str().unwrap_or("none").to_owned()
}

fn text(daemon: &Daemon) -> String {
    resize(daemon)["reason"]["text"].as_str().unwrap_or("none").to_owned()
}

/// The first event about the resize that has this state and kind of reason.
fn await_event(events: &mut EventStream, state: &str, kind: Option<&str>) -> Value {
    let deadline = Instant::now() + 3 * PATIENCE;
    while Instant::now() < deadline {
        let Some(event) = events.next(PATIENCE).unwrap() else { continue };
        let told = event.json();
        if event.name == "resize"
            && told["state"] == state
            && kind.is_none_or(|kind| told["reason"]["kind"] == kind)
        {
            return told;
        }
    }
    panic!("no event of a resize that is {state}, {kind:?}");
}

#[test]
fn a_guest_that_comes_up_is_told_of_step_by_step() {
    let (daemon, ram) = (daemon(options().requested_size(REQUESTED)), ram());
    let mut events = daemon.api().events().unwrap();
    assert_eq!(kind(&daemon), "no-front-end");
    await_event(&mut events, "stalled", Some("no-front-end"));
    let frontend = Frontend::connect(&daemon.socket()).unwrap();
    let agreed = frontend.negotiate(1 << 30, USUAL_PROTOCOL_FEATURES).unwrap();
    await_event(&mut events, "stalled", Some("no-memory"));
    assert!(text(&daemon).contains("0x140000000 to 0x180000000"), "{}", text(&daemon));
    frontend.set_mem_table(&ram).unwrap();
    await_event(&mut events, "stalled", Some("driver-absent"));
    frontend.set_features(agreed.offered & USUAL_FEATURES).unwrap();
    let mut driver = MemDriver::at(&ram, RING, 128, true).unwrap();
    frontend.start_ring(0, driver.ring()).unwrap();
    await_event(&mut events, "waiting", None);
    let plug = |driver: &mut MemDriver, block, count| {
        let request = small_vmm::driver::MemRequest::new(RequestType::Plug, gpa(block), count);
        assert_eq!(driver.execute(request).unwrap().kind(), ResponseType::Ack);
    };
    plug(&mut driver, 0, 16);
    let progressing = await_event(&mut events, "progressing", None);
    assert_eq!(progressing["remaining_size"], REQUESTED - 16 * BLOCK);
    frontend.get_vring_base(0).unwrap();
    await_event(&mut events, "stalled", Some("queue-stopped"));
    frontend.start_ring(0, driver.ring()).unwrap();
    plug(&mut driver, 16, 48);
    let done = await_event(&mut events, "done", None);
    assert_eq!((&done["reason"], &done["remaining_size"]), (&Value::Null, &0.into()));
    assert_eq!(done["last_request"]["response"], "ack");
}

#[test]
fn busy_names_the_client_that_refused_and_the_holder_of_a_freeze() {
    let mut rig = small(REQUESTED);
    let mut events = rig.daemon.api().events().unwrap();
    let stream = UnixStream::connect(rig.daemon.discard_socket()).unwrap();
    let client = RemoteRamDiscardManager::attach(stream, PATIENCE).unwrap();
    let all = Section::new(0, REGION).unwrap();
    let refuser = Recorder::refusing("vfio", &Calls::default(), all, "no IOMMU entries left");
    let listener = client.register(all, refuser).unwrap();
    assert_eq!(rig.plug(0, 1), ResponseType::Busy);
    await_event(&mut events, "stalled", Some("refused"));
    let told = text(&rig.daemon);
    assert!(told.starts_with("discard channel refused"), "{told}");
    assert!(told.contains("client ") && told.contains("no IOMMU entries left"), "{told}");
    client.unregister(listener).unwrap();
    assert!(rig.daemon.api().set_migration(true).unwrap().is_success());
    assert_eq!(rig.plug(0, 1), ResponseType::Busy);
    await_event(&mut events, "stalled", Some("migration"));
    let told = text(&rig.daemon);
    assert!(told.contains("the management API holds it"), "{told}");
    assert!(rig.daemon.api().set_migration(false).unwrap().is_success());
    assert_eq!(resize(&rig.daemon)["state"], "waiting");
    assert_eq!(rig.plug(0, 1), ResponseType::Ack);
    await_event(&mut events, "progressing", None);
    let size = (ADDR + REGION) / 4096 / 8;
    let log = memfd("log", size, MemfdFlags::CLOEXEC).unwrap();
    rig.frontend.set_log_base(&log, size, 0).unwrap();
    rig.frontend.set_features(rig.frontend.features() | 1 << 26).unwrap();
    assert!(text(&rig.daemon).contains("VHOST_F_LOG_ALL"), "{}", text(&rig.daemon));
}

#[test]
fn a_freeze_that_a_daemon_finds_when_it_starts_has_its_holder_too() {
    let mut rig = rig_with(options().requested_size(REQUESTED).state_file(), ram());
    assert!(rig.daemon.api().set_migration(true).unwrap().is_success());
    rig.daemon.kill().unwrap();
    rig.daemon.restart().unwrap();
    rig.reconnect();
    assert_eq!(kind(&rig.daemon), "migration");
    assert!(text(&rig.daemon).contains("the management API holds it"), "{}", text(&rig.daemon));
}

#[test]
fn an_error_is_one_that_breaks_the_driver() {
    let mut rig = small(REQUESTED);
    assert_eq!(rig.plug(0, 1), ResponseType::Ack);
    assert_eq!(rig.plug(0, 1), ResponseType::Error);
    assert_eq!(kind(&rig.daemon), "driver-broken");
    assert_eq!(resize(&rig.daemon)["last_request"]["response"], "error");
    assert_eq!(rig.plug(1, 1), ResponseType::Ack);
    assert_eq!(resize(&rig.daemon)["state"], "progressing");
}

#[test]
fn memory_that_is_plugged_and_unplugged_at_once_is_memory_that_the_guest_cannot_add() {
    let mut rig = small(REQUESTED);
    let mut events = rig.daemon.api().events().unwrap();
    assert_eq!(rig.plug(0, 32), ResponseType::Ack);
    assert_eq!(rig.unplug(0, 32), ResponseType::Ack);
    await_event(&mut events, "stalled", Some("guest-cannot-add"));
}

#[test]
fn a_guest_that_grows_no_more_is_told_of_once_it_is_quiet() {
    let mut rig = small(REQUESTED);
    assert_eq!(rig.plug(0, 16), ResponseType::Ack);
    let mut events = rig.daemon.api().events().unwrap();
    let quiet = await_event(&mut events, "stalled", Some("guest-silent"));
    assert_eq!(quiet["remaining_size"], REQUESTED - 16 * BLOCK);
    assert!(rig.daemon.wait_logged("stands still: the guest asks for nothing since", PATIENCE));
}

#[test]
fn a_shrink_that_stalls_names_how_much_is_left_and_since_when() {
    let mut rig = small(REQUESTED);
    assert_eq!(rig.plug(0, 64), ResponseType::Ack);
    let mut events = rig.daemon.api().events().unwrap();
    assert!(rig.daemon.api().resize(16 * BLOCK).unwrap().is_success());
    assert_eq!(rig.unplug(32, 32), ResponseType::Ack);
    await_event(&mut events, "progressing", None);
    let stalled = await_event(&mut events, "stalled", Some("unmovable"));
    assert_eq!(
        (&stalled["remaining_size"], &stalled["direction"]),
        (&(16 * BLOCK).into(), &"shrink".into())
    );
    let (since, told) =
        (stalled["since"].as_str().unwrap(), stalled["reason"]["text"].as_str().unwrap());
    assert!(told.contains("keeps 32 MiB more than requested since"), "{told}");
    assert!(since.ends_with('Z') && since.len() == 20, "{since}");
    assert_eq!(rig.unplug(16, 16), ResponseType::Ack);
    await_event(&mut events, "done", None);
}

#[test]
fn requests_at_full_speed_are_told_of_now_and_then() {
    let mut rig = small(REGION);
    let mut events = rig.daemon.api().events().unwrap();
    for block in 0..512 {
        assert_eq!(rig.plug(block, 1), ResponseType::Ack);
    }
    let mut told = 0;
    loop {
        let event = events.next(PATIENCE).unwrap().unwrap();
        told += usize::from(event.name == "resize");
        if event.name == "resize" && event.json()["state"] == "done" {
            break;
        }
    }
    assert!(told <= 8, "{told} events");
    assert_eq!(rig.plugged_size(), REGION);
}

#[test]
fn memory_that_the_host_cannot_serve_is_told_of_with_the_hosts_reason() {
    let file = memfd("device", REGION, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    let sealed = file.try_clone().unwrap();
    let layout = Layout::new().memfd("boot", 0, BOOT).unwrap().file(ADDR, REGION, file, 0);
    let ram = Arc::new(GuestRam::new(layout).unwrap());
    let mut rig = rig_with(options().requested_size(REQUESTED), ram);
    fcntl_add_seals(sealed, SealFlags::FUTURE_WRITE).unwrap();
    assert_eq!(rig.plug(0, 1), ResponseType::Busy);
    assert_eq!(kind(&rig.daemon), "host-memory");
    assert!(text(&rig.daemon).contains("F_SEAL_FUTURE_WRITE"), "{}", text(&rig.daemon));
}
