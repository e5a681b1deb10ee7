//! The discard channel between processes: the daemon, and clients with the library's
//! `RemoteRamDiscardManager`.

mod common;

use std::io::{BufRead, BufReader, Lines, Read, Write};
use std::ops::ControlFlow;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, ChildStderr, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use common::{BLOCK, PATIENCE, REGION, Rig, gpa, options, ram, rig_with};
use ram_discard::memory::RamBlock;
use ram_discard::{ByteRange, FreezeFor, RamDiscardListener, RamDiscardManager, RegisterError};
use rustix::fs::MemfdFlags;
use rustix::process::{Pid, Signal, kill_process};
use small_vmm::daemon::Daemon;
use small_vmm::driver::{RequestType, ResponseType};
use small_vmm::memory::memfd;
use vhost_user_mem::discard_channel::{DiscardChannel, Limits};
use vhost_user_mem::metrics::Metrics;
use virtio_mem::controller::{InitialState, MemController};
use virtio_mem::device::{BlockSpan, Geometry, Request, Response, VirtioMem};
use virtio_mem::discard_channel::{AttachError, FrameReader, RemoteRamDiscardManager, send, wire};
use wire::{ClientMessage, ServerMessage};

fn channel_rig() -> Rig {
    rig_with(options().discard_socket(), ram())
}

fn attach(daemon: &Daemon) -> RemoteRamDiscardManager {
    attach_at(&daemon.discard_socket())
}

fn attach_at(socket: &Path) -> RemoteRamDiscardManager {
    let start = Instant::now();
    loop {
        let stream = UnixStream::connect(socket).unwrap();
        match RemoteRamDiscardManager::attach(stream, PATIENCE) {
            Ok(manager) => return manager,
            // Clients that have left keep their place until the change under way has ended.
            Err(AttachError::Refused { cause: wire::Farewell::TooMany, .. })
                if start.elapsed() < PATIENCE => {}
            Err(error) => panic!("{error}"),
        }
    }
}

fn section(first: u64, end: u64) -> ByteRange {
    ByteRange::from_bounds(first * BLOCK, end * BLOCK).unwrap()
}

fn all() -> ByteRange {
    ByteRange::new(0, REGION).unwrap()
}

fn replay(manager: &RemoteRamDiscardManager, populated: bool) -> Vec<ByteRange> {
    let mut ranges = Vec::new();
    let mut collect = |range| {
        ranges.push(range);
        ControlFlow::Continue(())
    };
    let _ = if populated {
        manager.replay_populated(all(), &mut collect).unwrap()
    } else {
        manager.replay_discarded(all(), &mut collect).unwrap()
    };
    ranges
}

/// What the management API calls plugged, or discarded.
fn blocks(daemon: &Daemon, populated: bool) -> Vec<ByteRange> {
    let blocks = daemon.api().get("/v1/device/blocks").unwrap().json();
    let ranges = blocks[if populated { "plugged" } else { "discarded" }].as_array().unwrap();
    let number = |range: &serde_json::Value, name: &str| range[name].as_u64().unwrap();
    let range = |range| ByteRange::new(number(range, "offset"), number(range, "size")).unwrap();
    ranges.iter().map(range).collect()
}

fn wait_logged(daemon: &Daemon, text: &str) {
    assert!(daemon.wait_logged(text, PATIENCE), "not logged: {text}\n{}", daemon.stderr());
}

type Calls = Arc<Mutex<Vec<(&'static str, bool, ByteRange)>>>;

/// Writes down what it is told, and refuses what overlaps a range.
struct Recorder {
    name: &'static str,
    calls: Calls,
    refuses: Option<ByteRange>,
}

impl Recorder {
    fn boxed(name: &'static str, calls: &Calls) -> Box<Self> {
        Box::new(Self { name, calls: Arc::clone(calls), refuses: None })
    }
}

impl RamDiscardListener for Recorder {
    fn name(&self) -> &str {
        self.name
    }

    fn notify_populate(&mut self, section: ByteRange) -> Result<(), String> {
        if self.refuses.is_some_and(|range| range.overlaps(section)) {
            return Err("no IOMMU entries left".to_owned());
        }
        self.calls.lock().unwrap().push((self.name, true, section));
        Ok(())
    }

    fn notify_discard(&mut self, section: ByteRange) {
        self.calls.lock().unwrap().push((self.name, false, section));
    }
}

fn taken(calls: &Calls) -> Vec<(&'static str, bool, ByteRange)> {
    std::mem::take(&mut *calls.lock().unwrap())
}

#[test]
fn replays_equal_the_blocks_of_the_api() {
    let mut rig = channel_rig();
    rig.plug(0, 1);
    rig.plug(63, 2);
    let early = attach(&rig.daemon);
    rig.plug(100, 200);
    rig.unplug(150, 7);
    rig.plug(511, 1);
    rig.unplug(0, 1);
    let late = attach(&rig.daemon);
    for manager in [&early, &late] {
        for populated in [true, false] {
            assert_eq!(replay(manager, populated), blocks(&rig.daemon, populated));
        }
        assert!(manager.is_populated(section(157, 300)).unwrap());
        assert!(!manager.is_populated(section(156, 158)).unwrap());
    }
    assert_eq!(early.words().unwrap(), late.words().unwrap());
    let config = rig.frontend.config().unwrap();
    let sizes = early.sizes().unwrap();
    assert_eq!(sizes.plugged_size, config.plugged_size);
    assert_eq!(sizes.requested_size, config.requested_size);
    assert_eq!(sizes.usable_region_size, config.usable_region_size);
    let geometry = early.geometry();
    assert_eq!((geometry.addr(), geometry.block_size()), (config.addr, BLOCK));
    assert_eq!((geometry.region_size(), geometry.node_id()), (REGION, None));
}

#[test]
fn events_come_in_order_to_every_client() {
    let mut rig = channel_rig();
    let (first, second) = (attach(&rig.daemon), attach(&rig.daemon));
    let (one, other) = (Calls::default(), Calls::default());
    first.register(all(), Recorder::boxed("a", &one)).unwrap();
    first.register(section(2, 4), Recorder::boxed("b", &one)).unwrap();
    second.register(all(), Recorder::boxed("c", &other)).unwrap();
    assert_eq!(rig.plug(1, 2), ResponseType::Ack);
    assert_eq!(rig.plug(8, 1), ResponseType::Ack);
    assert_eq!(rig.unplug(2, 1), ResponseType::Ack);
    let range = section;
    let expected = [
        ("a", true, range(1, 3)),
        ("b", true, range(2, 3)),
        ("a", true, range(8, 9)),
        ("b", false, range(2, 3)),
        ("a", false, range(2, 3)),
    ];
    assert_eq!(taken(&one), expected);
    let events = [(true, range(1, 3)), (true, range(8, 9)), (false, range(2, 3))];
    assert_eq!(taken(&other), events.map(|(populated, range)| ("c", populated, range)));
}

#[test]
fn unplug_all_and_a_system_reset_are_discards() {
    let mut rig = channel_rig();
    let client = attach(&rig.daemon);
    let calls = Calls::default();
    client.register(all(), Recorder::boxed("dma", &calls)).unwrap();
    for reset in [false, true] {
        rig.plug(0, 2);
        rig.plug(4, 1);
        taken(&calls);
        if reset {
            assert!(rig.daemon.api().system_reset().unwrap().is_success());
        } else {
            assert_eq!(rig.driver.unplug_all().unwrap().kind(), ResponseType::Ack);
        }
        let expected = [("dma", false, section(4, 5)), ("dma", false, section(0, 2))];
        assert_eq!(taken(&calls), expected);
        assert_eq!(replay(&client, true), []);
    }
}

#[test]
fn a_refusal_makes_the_guest_busy_and_is_taken_back_everywhere() {
    let mut rig = channel_rig();
    rig.plug(0, 1);
    let clients = [attach(&rig.daemon), attach(&rig.daemon), attach(&rig.daemon)];
    let calls = Calls::default();
    for (client, names) in clients.iter().zip([["a1", "a2"], ["b1", "b2"], ["c1", "c2"]]) {
        for name in names {
            client.register(all(), Recorder::boxed(name, &calls)).unwrap();
        }
    }
    let refuses = Some(section(4, 5));
    let refuser = Recorder { name: "refuser", calls: Arc::clone(&calls), refuses };
    let refuser = clients[1].register(all(), Box::new(refuser)).unwrap();
    taken(&calls);
    let before = rig.frontend.config().unwrap();
    assert_eq!(rig.plug(2, 4), ResponseType::Busy);
    assert_eq!(rig.frontend.config().unwrap(), before);
    assert_eq!(rig.held(1, REGION / BLOCK), 0);
    let told = taken(&calls);
    assert!(told.iter().all(|call| call.2 == section(2, 6)));
    for names in [["a1", "a2"], ["b1", "b2"], ["c1", "c2"]] {
        let own = told.iter().filter(|call| names.contains(&call.0));
        let own: Vec<_> = own.map(|call| (call.0, call.1)).collect();
        let [first, second] = names;
        assert_eq!(own, [(first, true), (second, true), (second, false), (first, false)]);
    }
    for client in &clients {
        assert_eq!(replay(client, true), [section(0, 1)]);
    }
    wait_logged(&rig.daemon, "no IOMMU entries left");
    clients[1].unregister(refuser).unwrap();
    assert_eq!(rig.plug(2, 4), ResponseType::Ack);
    assert_eq!(replay(&clients[0], true), blocks(&rig.daemon, true));
}

/// Looks at the memory while it is told.
struct Looker(Box<dyn Fn() -> u64 + Send>, Arc<Mutex<Vec<u64>>>);

impl RamDiscardListener for Looker {
    fn name(&self) -> &str {
        "looker"
    }

    fn notify_populate(&mut self, _section: ByteRange) -> Result<(), String> {
        Ok(())
    }

    fn notify_discard(&mut self, _section: ByteRange) {
        self.1.lock().unwrap().push((self.0)());
    }
}

#[test]
fn memory_goes_only_after_the_acknowledgement() {
    let mut rig = channel_rig();
    let client = attach(&rig.daemon);
    let (ram, seen) = (Arc::clone(&rig.ram), Arc::default());
    let held = move || ram.resident_bytes(gpa(0)..gpa(4)).unwrap();
    client.register(all(), Box::new(Looker(Box::new(held), Arc::clone(&seen)))).unwrap();
    rig.plug(0, 4);
    rig.stamp(0, 4);
    assert_eq!(rig.unplug(1, 2), ResponseType::Ack);
    assert_eq!(*seen.lock().unwrap(), [4 * BLOCK]);
    assert_eq!(rig.held(0, 4), 2 * BLOCK);
}

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

#[test]
fn a_client_killed_while_the_guest_waits_for_it_lets_the_guest_go_on() {
    let mut rig = channel_rig();
    let (stream, mut frames) = raw_client(&rig.daemon);
    let killer = thread::spawn(move || {
        let message: ServerMessage = frames.next(&stream).unwrap();
        assert!(matches!(message, ServerMessage::Populate { .. }));
        // And the connection is gone.
    });
    assert_eq!(rig.plug(0, 1), ResponseType::Ack);
    killer.join().unwrap();
}

/// A client that says nothing any more.
fn raw_client(daemon: &Daemon) -> (UnixStream, FrameReader) {
    let stream = UnixStream::connect(daemon.discard_socket()).unwrap();
    let hello = ClientMessage::Hello { min_version: wire::VERSION, max_version: wire::VERSION };
    send(&stream, &hello).unwrap();
    let mut frames = FrameReader::default();
    let (message, fd) = frames.next_with_fd(&stream, Instant::now() + PATIENCE).unwrap();
    assert!(matches!(message, ServerMessage::Welcome(_)) && fd.is_some());
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    (stream, frames)
}

#[test]
fn a_silent_client_is_dropped_and_the_guest_answered() {
    let mut rig = channel_rig();
    let other = attach(&rig.daemon);
    let (stream, mut frames) = raw_client(&rig.daemon);
    send(&stream, &ClientMessage::Freeze { id: 1 }).unwrap();
    let frozen = frames.next::<ServerMessage>(&stream).unwrap();
    assert!(matches!(frozen, ServerMessage::Frozen { id: 1, freeze: 1, .. }), "{frozen:?}");
    assert_eq!(rig.plug(0, 1), ResponseType::Busy, "frozen, so no client is asked");
    send(&stream, &ClientMessage::Thaw { id: 2, freeze: 1 }).unwrap();
    assert_eq!(frames.next::<ServerMessage>(&stream).unwrap(), ServerMessage::Done { id: 2 });
    assert_eq!(rig.plug(0, 1), ResponseType::Ack);
    let event = frames.next::<ServerMessage>(&stream).unwrap();
    assert!(matches!(event, ServerMessage::Populate { .. }), "{event:?}");
    let goodbye = frames.next::<ServerMessage>(&stream).unwrap();
    let ServerMessage::Goodbye { cause: wire::Farewell::Silent, .. } = goodbye else {
        panic!("{goodbye:?}")
    };
    wait_logged(&rig.daemon, "it did not answer in time");
    let metrics = rig.daemon.api().get("/metrics").unwrap().text;
    assert!(metrics.contains("virtio_mem_discard_clients_dropped_total 1"), "{metrics}");
    assert_eq!(other.lost(), None);
    assert_eq!(replay(&other, true), blocks(&rig.daemon, true));
}

/// Knows for each block whether it was told of it, and counts what it is told twice.
struct Exact {
    told: Arc<Mutex<Vec<bool>>>,
    twice: Arc<Mutex<u64>>,
}

impl Exact {
    fn turn(&self, section: ByteRange, populated: bool) {
        let mut told = self.told.lock().unwrap();
        for block in section.start() / BLOCK..section.end() / BLOCK {
            let block = &mut told[usize::try_from(block).unwrap()];
            *self.twice.lock().unwrap() += u64::from(*block == populated);
            *block = populated;
        }
    }
}

impl RamDiscardListener for Exact {
    fn name(&self) -> &str {
        "exact"
    }

    fn notify_populate(&mut self, section: ByteRange) -> Result<(), String> {
        self.turn(section, true);
        Ok(())
    }

    fn notify_discard(&mut self, section: ByteRange) {
        self.turn(section, false);
    }
}

#[test]
fn a_registration_against_requests_tells_each_block_once() {
    let mut rig = channel_rig();
    let socket = rig.daemon.discard_socket();
    let done = AtomicBool::new(false);
    let nr_blocks = usize::try_from(REGION / BLOCK).unwrap();
    thread::scope(|scope| {
        let clients: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(|| {
                    let mut rounds = 0;
                    loop {
                        // The last round has no requests against it.
                        let last = done.load(Ordering::Acquire);
                        let client = attach_at(&socket);
                        let told = Arc::new(Mutex::new(vec![false; nr_blocks]));
                        let twice = Arc::default();
                        let exact = Exact { told: Arc::clone(&told), twice: Arc::clone(&twice) };
                        let id = client.register(all(), Box::new(exact)).unwrap();
                        if last {
                            let told = told.lock().unwrap();
                            let plugged = blocks_told(&told);
                            assert_eq!(plugged, replay(&client, true));
                            return rounds;
                        }
                        client.unregister(id).unwrap();
                        assert!(told.lock().unwrap().iter().all(|told| !told));
                        assert_eq!(*twice.lock().unwrap(), 0);
                        rounds += 1;
                    }
                })
            })
            .collect();
        for round in 0..400u64 {
            let first = round * 37 % 500;
            let nb_blocks = u16::try_from(1 + round % 12).unwrap();
            assert_eq!(rig.plug(first, nb_blocks), ResponseType::Ack);
            if round < 395 {
                assert_eq!(rig.unplug(first, nb_blocks), ResponseType::Ack);
            } else {
                rig.unplug(first, 1);
            }
        }
        done.store(true, Ordering::Release);
        for client in clients {
            assert!(client.join().unwrap() > 0);
        }
    });
}

fn blocks_told(told: &[bool]) -> Vec<ByteRange> {
    let mut ranges: Vec<ByteRange> = Vec::new();
    for (block, _) in told.iter().enumerate().filter(|(_, told)| **told) {
        let block = block as u64;
        match ranges.last_mut() {
            Some(last) if last.end() == block * BLOCK => {
                *last = section(last.start() / BLOCK, block + 1);
            }
            _ => ranges.push(section(block, block + 1)),
        }
    }
    ranges
}

#[test]
fn a_daemon_that_is_killed_is_unavailable_and_its_successor_knows_the_blocks() {
    let mut rig = rig_with(options().discard_socket().state_file(), ram());
    rig.plug(3, 4);
    let client = attach(&rig.daemon);
    client.register(all(), Recorder::boxed("dma", &Calls::default())).unwrap();
    let frozen = client.freeze(FreezeFor::Source).unwrap();
    frozen.check().unwrap();
    rig.daemon.restart().unwrap();
    assert!(frozen.check().is_err(), "a daemon that was restarted has not held it");
    let start = Instant::now();
    while client.lost().is_none() {
        assert!(start.elapsed() < PATIENCE);
        thread::yield_now();
    }
    assert!(client.is_populated(all()).is_err());
    assert!(client.replay_populated(all(), &mut |_| ControlFlow::Continue(())).is_err());
    assert!(client.freeze(FreezeFor::Source).is_err() && client.sizes().is_err());
    assert!(frozen.check().is_err());
    let late = client.register(all(), Recorder::boxed("late", &Calls::default()));
    assert!(matches!(late, Err(RegisterError::Unavailable(_))));
    let successor = attach(&rig.daemon);
    assert_ne!(successor.generation(), client.generation());
    let frozen_again = successor.freeze(FreezeFor::Source).unwrap();
    assert!(frozen.check().is_err(), "the freeze of one daemon is not that of the next");
    frozen_again.thaw().unwrap();
    assert!(frozen.thaw().is_err());
    assert_eq!(replay(&successor, true), [section(3, 7)]);
    assert_eq!(rig.daemon.api().device().unwrap()["migration_active"], false);
}

#[test]
fn the_daemon_ends_in_time_while_the_guest_waits_for_a_silent_client() {
    let mut rig = channel_rig();
    let (stream, mut frames) = raw_client(&rig.daemon);
    let kind = RequestType::Plug as u16;
    let request = small_vmm::driver::MemRequest { kind, addr: gpa(0), nb_blocks: 1, padding: 0 };
    rig.driver.submit(&request.to_bytes(), &small_vmm::driver::Shape::default()).unwrap();
    rig.driver.ring_mut().kick().unwrap();
    let event = frames.next::<ServerMessage>(&stream).unwrap();
    assert!(matches!(event, ServerMessage::Populate { .. }), "{event:?}");
    let status = rig.daemon.terminate(Duration::from_secs(2)).unwrap();
    assert!(status.success(), "{status}");
    assert!(!rig.daemon.discard_socket().exists());
}

#[test]
fn a_region_without_blocks_has_a_channel_with_nothing_on_it() {
    let options = small_vmm::daemon::DaemonOptions::new(common::ADDR, 0).block_size(BLOCK);
    let daemon = common::daemon(options.discard_socket());
    let client = attach(&daemon);
    assert!(client.words().unwrap().is_empty());
    let outside = client.register(section(0, 1), Recorder::boxed("dma", &Calls::default()));
    assert!(matches!(outside, Err(RegisterError::OutsideRegion { .. })));
    client.freeze(FreezeFor::Source).unwrap().thaw().unwrap();
}
