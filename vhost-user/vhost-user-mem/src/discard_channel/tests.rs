//! The server against raw sockets: what a client may do wrong.

mod follow;
mod freezes;
mod patience;
mod serve;

use super::*;
use ram_discard::memory::RamBlock;
use ram_discard::{FreezeFor, RamDiscardManager};
use rustix::fs::{MemfdFlags, memfd_create};
use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::time::Instant;
use tempfile::TempDir;
use virtio_mem::controller::InitialState;
use virtio_mem::device::{BlockSpan, Geometry, Request, Response, VirtioMem};
use virtio_mem::discard_channel::bitmap::BitmapReader;
use virtio_mem::discard_channel::wire::{ClientMessage, Message, SECTIONS_MAX};
use virtio_mem::discard_channel::{FrameReader, ReceiveError, RemoteRamDiscardManager};

const BLOCK: u64 = 1 << 20;
const ADDR: u64 = 1 << 32;
const NR: u64 = 64;
/// One after the other may be dropped without any being kept out for it.
const LIMITS: Limits = Limits {
    patience: Duration::from_secs(1),
    handshake: Duration::from_secs(5),
    freeze_expiry: Duration::from_secs(30),
    pause: Duration::ZERO,
};
/// For what happens at once unless it does not happen at all.
const SOON: Duration = Duration::from_secs(10);

struct Rig {
    controller: Arc<MemController>,
    metrics: Arc<Metrics>,
    channel: DiscardChannel,
    dir: TempDir,
}

fn rig() -> Rig {
    rig_with(NR, BLOCK, LIMITS)
}

fn rig_with(nr: u64, block: u64, limits: Limits) -> Rig {
    let geometry = Geometry::new(ADDR, nr * block, block, None).unwrap();
    let device = VirtioMem::new(geometry, nr * block).unwrap();
    let controller = Arc::new(MemController::new(InitialState::volatile(device)));
    let file = File::from(memfd_create("ram", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(nr * block).unwrap();
    let ram = RamBlock::new("mem".to_owned(), ADDR, nr * block, file, 0).unwrap();
    controller.set_memory(vec![Arc::new(ram)]).unwrap();
    let metrics = Arc::new(Metrics::new());
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("discard");
    let channel =
        DiscardChannel::bind_with(&path, Arc::clone(&controller), Arc::clone(&metrics), limits)
            .unwrap();
    channel.start().unwrap();
    Rig { controller, metrics, channel, dir }
}

fn span(first: u64, nb_blocks: u16) -> BlockSpan {
    BlockSpan { addr: ADDR + first * BLOCK, nb_blocks }
}

impl Rig {
    fn connect(&self) -> UnixStream {
        UnixStream::connect(self.dir.path().join("discard")).unwrap()
    }

    fn attach(&self) -> RemoteRamDiscardManager {
        RemoteRamDiscardManager::attach(self.connect(), SOON).unwrap()
    }

    fn plug(&self, first: u64, nb_blocks: u16) -> Response {
        self.controller.execute(Request::Plug(span(first, nb_blocks)))
    }

    fn metric(&self, name: &str) -> f64 {
        let text = self.metrics.encode(&self.controller, crate::metrics::Watched::default());
        let line = text.lines().find(|line| line.starts_with(&format!("virtio_mem_{name} ")));
        line.unwrap().rsplit(' ').next().unwrap().parse().unwrap()
    }

    fn dropped(&self) -> u64 {
        self.metric("discard_clients_dropped_total") as u64
    }
}

/// A client that says only what the test says.
struct Raw {
    stream: UnixStream,
    frames: FrameReader,
}

impl Raw {
    fn new(rig: &Rig) -> Self {
        let stream = rig.connect();
        stream.set_read_timeout(Some(SOON)).unwrap();
        Self { stream, frames: FrameReader::default() }
    }

    fn attached(rig: &Rig) -> Self {
        Self::attached_with_bitmap(rig).0
    }

    fn attached_with_bitmap(rig: &Rig) -> (Self, OwnedFd) {
        let mut raw = Self::new(rig);
        raw.say(&ClientMessage::Hello { min_version: 0, max_version: 7 });
        let (welcome, fd) = raw.hear_with_fd();
        assert!(matches!(welcome, ServerMessage::Welcome(_)), "{welcome:?}");
        (raw, fd.expect("the bitmap comes with the welcome"))
    }

    fn say(&self, message: &ClientMessage) {
        send(&self.stream, message).unwrap();
    }

    fn hear_with_fd(&mut self) -> (ServerMessage, Option<OwnedFd>) {
        self.frames.next_with_fd(&self.stream, Instant::now() + SOON).unwrap()
    }

    /// Asks for the sizes; whether it was these that it heard of, and not the end of freeze 1.
    fn hear_thawed_or_sizes(&mut self) -> bool {
        self.say(&ClientMessage::GetSizes { id: 9 });
        match self.hear() {
            ServerMessage::Sizes { .. } => true,
            ServerMessage::Thawed { freeze: 1 } => {
                assert!(matches!(self.hear(), ServerMessage::Sizes { .. }));
                false
            }
            other => panic!("{other:?}"),
        }
    }

    fn hear(&mut self) -> ServerMessage {
        self.hear_with_fd().0
    }

    /// The connection ends, for this cause.
    fn assert_left(mut self, expected: Farewell) {
        loop {
            match self.hear() {
                ServerMessage::Goodbye { cause, .. } => break assert_eq!(cause, expected),
                ServerMessage::Populate { .. } | ServerMessage::Discard { .. } => {}
                other => panic!("{other:?}"),
            }
        }
        let end = self.frames.next::<ServerMessage>(&self.stream);
        assert!(matches!(end, Err(ReceiveError::Closed | ReceiveError::Io(_))), "{end:?}");
    }
}

#[test]
fn versions_are_negotiated_and_others_refused() {
    let rig = rig();
    for (min_version, max_version, taken) in [(0, 7, 3), (2, 2, 2), (3, 3, 3), (1, 2, 2)] {
        let mut raw = Raw::new(&rig);
        raw.say(&ClientMessage::Hello { min_version, max_version });
        let (welcome, _) = raw.hear_with_fd();
        let ServerMessage::Welcome(welcome) = welcome else { panic!("{welcome:?}") };
        assert_eq!(welcome.version, taken);
    }
    for (min_version, max_version) in [(0, 0), (1, 1), (4, 9), (3, 2)] {
        let raw = Raw::new(&rig);
        raw.say(&ClientMessage::Hello { min_version, max_version });
        raw.assert_left(Farewell::Version);
    }
}

#[test]
fn what_breaks_the_protocol_ends_the_connection_and_nothing_else() {
    let rig = rig();
    let bystander = rig.attach();
    let no_hello = Raw::new(&rig);
    no_hello.say(&ClientMessage::Freeze { id: 1 });
    no_hello.assert_left(Farewell::Protocol);
    let mut garbage = Raw::new(&rig);
    garbage.stream.write_all(&[0xff; 64]).unwrap();
    garbage.assert_left(Farewell::Protocol);
    for wrong in [
        ClientMessage::Hello { min_version: 2, max_version: 2 },
        ClientMessage::Ack { event: 0 },
        ClientMessage::Ack { event: 1 },
        ClientMessage::Refuse { event: 1, reason: "no".to_owned() },
    ] {
        let raw = Raw::attached(&rig);
        raw.say(&wrong);
        raw.assert_left(Farewell::Protocol);
    }
    let mut unknown = Raw::attached(&rig);
    unknown.stream.write_all(&[0x63, 0, 0, 0, 0, 0, 0, 0]).unwrap();
    unknown.assert_left(Farewell::Protocol);
    assert_eq!(rig.dropped(), 7);
    bystander.freeze(FreezeFor::Source).unwrap().thaw().unwrap();
    assert_eq!(rig.plug(0, 1), Response::Ack);
}

#[test]
fn a_discard_cannot_be_refused() {
    let rig = rig();
    assert_eq!(rig.plug(0, 1), Response::Ack);
    let mut raw = Raw::attached(&rig);
    thread::scope(|scope| {
        let unplug = scope.spawn(|| rig.controller.execute(Request::Unplug(span(0, 1))));
        let ServerMessage::Discard { event, .. } = raw.hear() else { panic!() };
        raw.say(&ClientMessage::Refuse { event, reason: "mine".to_owned() });
        raw.assert_left(Farewell::Protocol);
        assert_eq!(unplug.join().unwrap(), Response::Ack);
    });
}

#[test]
fn clients_that_do_not_answer_are_dropped_all_within_one_bound() {
    let rig = rig();
    let silent: Vec<Raw> = (0..4).map(|_| Raw::attached(&rig)).collect();
    // Half an answer is none.
    let mut half = Raw::attached(&rig);
    half.stream.write_all(&ClientMessage::Ack { event: 1 }.to_frame()[..11]).unwrap();
    let start = Instant::now();
    assert_eq!(rig.plug(0, 1), Response::Ack, "a client that is dropped has no say");
    let took = start.elapsed();
    assert!(took < 4 * LIMITS.patience, "one after the other they would have taken {took:?}");
    silent.into_iter().for_each(|raw| raw.assert_left(Farewell::Silent));
    half.assert_left(Farewell::Silent);
    assert_eq!(rig.dropped(), 5);
    assert_eq!(rig.plug(1, 1), Response::Ack);
}

#[test]
fn a_client_that_asks_without_reading_is_dropped_without_a_wait() {
    let rig = rig();
    let raw = Raw::attached(&rig);
    raw.stream.set_write_timeout(Some(SOON)).unwrap();
    // Its answers fill the socket; then it is dropped, and what it says counts for nothing.
    let mut id = 0;
    while send(&raw.stream, &ClientMessage::GetSizes { id }).is_ok() || rig.dropped() == 0 {
        id += 1;
        assert!(id < 100_000_000, "the answers go somewhere");
    }
    assert_eq!(rig.plug(0, 1), Response::Ack);
}

#[test]
fn one_client_too_many_is_turned_away_until_another_leaves() {
    let rig = rig();
    // Also those that have not said anything take a place.
    let mut clients: Vec<Raw> = (0..CLIENTS_MAX - 1).map(|_| Raw::attached(&rig)).collect();
    let idle = rig.connect();
    let mut turned_away = Raw::new(&rig);
    assert!(matches!(turned_away.hear(), ServerMessage::Goodbye { cause: Farewell::TooMany, .. }));
    clients.clear();
    drop(idle);
    let start = Instant::now();
    while let Err(error) = RemoteRamDiscardManager::attach(rig.connect(), SOON) {
        assert!(start.elapsed() < SOON, "{error}");
    }
}

#[test]
fn shutdown_ends_connections_freezes_and_the_socket() {
    let rig = rig();
    let client = rig.attach();
    let frozen = client.freeze(FreezeFor::Source).unwrap();
    frozen.check().unwrap();
    assert!(rig.controller.migration_active());
    let idle = Raw::new(&rig);
    let raw = Raw::attached(&rig);
    rig.channel.shutdown();
    assert!(!rig.controller.migration_active());
    assert!(!rig.dir.path().join("discard").exists());
    raw.assert_left(Farewell::Ending);
    drop(idle);
    assert!(client.freeze(FreezeFor::Source).is_err());
    assert!(frozen.check().is_err());
    assert!(frozen.thaw().is_err());
    assert_eq!(rig.plug(0, 1), Response::Ack);
}

/// The order of the table in `hub.rs`, seen by a client that looks at each step.
#[test]
fn the_bitmap_shows_a_change_after_the_answers_and_before_the_guest_is_answered() {
    let rig = rig();
    let (mut raw, fd) = Raw::attached_with_bitmap(&rig);
    let bitmap = BitmapReader::open(fd, rig.controller.geometry()).unwrap();
    let shown = || {
        let snapshot = bitmap.try_copy(0..NR as usize).unwrap();
        (snapshot.blocks.nr_plugged(), snapshot.event)
    };
    let plugged = || rig.controller.config().plugged_size / BLOCK;
    let act = |raw: &mut Raw, request: Request, before: u64| {
        thread::scope(|scope| {
            let guest = scope.spawn(|| {
                let response = rig.controller.execute(request);
                (response, shown())
            });
            let event = match raw.hear() {
                ServerMessage::Populate { event, .. } | ServerMessage::Discard { event, .. } => {
                    event
                }
                other => panic!("{other:?}"),
            };
            let seen = (shown(), plugged());
            raw.say(&ClientMessage::Ack { event });
            let (response, after) = guest.join().unwrap();
            assert_eq!(response, Response::Ack);
            assert_eq!(seen.1, before, "what is committed when the client is told");
            (seen.0, after)
        })
    };
    assert_eq!(act(&mut raw, Request::Plug(span(0, 3)), 0), ((0, 0), (3, 1)));
    assert_eq!(act(&mut raw, Request::Unplug(span(1, 1)), 2), ((3, 1), (2, 2)));
}

#[test]
fn a_populate_that_another_client_refuses_is_a_discard_and_never_in_the_bitmap() {
    let rig = rig();
    let (mut first, fd) = Raw::attached_with_bitmap(&rig);
    let bitmap = BitmapReader::open(fd, rig.controller.geometry()).unwrap();
    let mut second = Raw::attached(&rig);
    thread::scope(|scope| {
        let guest = scope.spawn(|| rig.plug(0, 1));
        let ServerMessage::Populate { event, sections } = first.hear() else { panic!() };
        first.say(&ClientMessage::Ack { event });
        let ServerMessage::Populate { event, .. } = second.hear() else { panic!() };
        second.say(&ClientMessage::Refuse { event, reason: "no".to_owned() });
        let discard = ServerMessage::Discard { event: event + 1, sections };
        assert_eq!(first.hear(), discard);
        first.say(&ClientMessage::Ack { event: event + 1 });
        assert_eq!(guest.join().unwrap(), Response::Busy);
        let snapshot = bitmap.try_copy(0..NR as usize).unwrap();
        assert_eq!((snapshot.blocks.nr_plugged(), snapshot.event), (0, event + 1));
    });
}

#[test]
fn a_client_sees_what_was_plugged_before_it_came() {
    let rig = rig();
    assert_eq!(rig.plug(3, 2), Response::Ack);
    let client = rig.attach();
    assert_eq!(client.words().unwrap(), [0b11000]);
    assert_eq!(client.geometry(), rig.controller.geometry());
    assert_eq!(client.region_size(), NR * BLOCK);
    let sizes = client.sizes().unwrap();
    assert_eq!((sizes.plugged_size, sizes.requested_size), (2 * BLOCK, NR * BLOCK));
}

/// As many blocks as before, so that no size tells of the change.
#[test]
fn a_state_that_is_loaded_reaches_clients_and_the_bitmap() {
    let rig = rig();
    assert_eq!(rig.plug(0, 4), Response::Ack);
    let client = rig.attach();
    let mut state = rig.controller.save_state();
    state.plugged = vec![0b1010_0101];
    rig.controller.load_state(state).unwrap();
    assert_eq!(client.words().unwrap(), [0b1010_0101]);
    assert_eq!(rig.attach().words().unwrap(), [0b1010_0101]);
    assert_eq!(rig.controller.execute(Request::UnplugAll), Response::Ack);
    assert_eq!(client.words().unwrap(), [0]);
}

/// Blocks 0, 2, 4 and so on are plugged: as many ranges as there can be.
fn in_tatters(nr: u64) -> Vec<u64> {
    vec![0x5555_5555_5555_5555; usize::try_from(nr / 64).unwrap()]
}

/// As many as no event could carry, up to a refusal in the last one.
#[test]
fn a_state_of_many_ranges_is_taken_back_in_full_when_a_client_refuses_the_last() {
    const BLOCKS: u64 = 1024;
    let rig = rig_with(BLOCKS, 4096, LIMITS);
    let mut raw = Raw::attached(&rig);
    let mut state = rig.controller.save_state();
    state.plugged = in_tatters(BLOCKS);
    thread::scope(|scope| {
        let load = scope.spawn(|| rig.controller.load_state(state));
        let mut populated = Vec::new();
        let mut refused = false;
        while !refused || !populated.is_empty() {
            let answer = match raw.hear() {
                ServerMessage::Populate { event, sections } if sections.len() < SECTIONS_MAX => {
                    refused = true;
                    ClientMessage::Refuse { event, reason: "the last".to_owned() }
                }
                ServerMessage::Populate { event, sections } => {
                    populated.extend(sections);
                    ClientMessage::Ack { event }
                }
                ServerMessage::Discard { event, sections } => {
                    for section in sections {
                        assert_eq!(populated.pop(), Some(section), "in reverse");
                    }
                    ClientMessage::Ack { event }
                }
                other => panic!("{other:?}"),
            };
            raw.say(&answer);
        }
        let refused = load.join().unwrap().unwrap_err().to_string();
        assert!(refused.contains("the last"), "{refused}");
    });
    assert_eq!(rig.controller.config().plugged_size, 0);
    assert_eq!(rig.attach().words().unwrap(), vec![0; 16]);
}

#[test]
fn the_text_of_a_refusal_reaches_no_log_and_no_caller_raw() {
    let rig = rig();
    let mut raw = Raw::attached(&rig);
    let mut state = rig.controller.save_state();
    state.plugged = vec![1];
    thread::scope(|scope| {
        let load = scope.spawn(|| rig.controller.load_state(state));
        let ServerMessage::Populate { event, .. } = raw.hear() else { panic!() };
        let reason = "no\n2026-11-27T20:00:00Z  INFO forged \u{1b}[31mred".to_owned();
        raw.say(&ClientMessage::Refuse { event, reason });
        let refused = load.join().unwrap().unwrap_err().to_string();
        assert!(
            refused.contains(r"no\n2026-11-27T20:00:00Z  INFO forged \u{1b}[31mred"),
            "{refused}"
        );
    });
}
