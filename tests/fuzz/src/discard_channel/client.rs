//! A hostile client of the daemon, while a guest asks and a good client watches.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, LazyLock};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use ram_discard::memory::RamBlock;
use ram_discard::{FreezeFor, MemoryState, RamDiscardListener, RamDiscardManager, Section};
use rustix::fs::MemfdFlags;
use small_vmm::memory::memfd;
use tempfile::TempDir;
use vhost_user_mem::discard_channel::{DiscardChannel, Limits};
use vhost_user_mem::metrics::Metrics;
use virtio_mem::controller::{InitialState, MemController};
use virtio_mem::device::{BlockSpan, Request, Response, VirtioMem};
use virtio_mem::discard_channel::wire::{
    ClientMessage, Farewell, Sections, ServerMessage, VERSION,
};
use virtio_mem::discard_channel::{
    AttachError, FrameReader, ReceiveError, RemoteRamDiscardManager,
};

use super::{ADDR, BLOCK, MOMENT, NR, PATIENCE, STEPS, blocks, frame, geometry};
use crate::input::Input;

/// The device that serves all inputs, and its channel.
struct Daemon {
    controller: Arc<MemController>,
    path: PathBuf,
    _channel: DiscardChannel,
    _dir: TempDir,
}

static DAEMON: LazyLock<Daemon> = LazyLock::new(|| {
    let device = VirtioMem::new(geometry(), geometry().region_size()).unwrap();
    let controller = Arc::new(MemController::new(InitialState::volatile(device)));
    let ram = memfd("ram", geometry().region_size(), MemfdFlags::empty()).unwrap();
    let ram = RamBlock::new("mem".to_owned(), ADDR, geometry().region_size(), ram, 0).unwrap();
    controller.set_memory(vec![Arc::new(ram)]).unwrap();
    // What the guest has is its own: no client changes it.
    controller.set_guest_runs(true);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("discard");
    let metrics = Arc::new(Metrics::new());
    // Hostile clients come one after the other, from this process as the good one does.
    let limits = Limits {
        pause: Duration::ZERO,
        freeze_expiry: Duration::from_millis(20),
        ..Limits::default()
    };
    let channel =
        DiscardChannel::bind_with(&path, Arc::clone(&controller), metrics, limits).unwrap();
    channel.start().unwrap();
    Daemon { controller, path, _channel: channel, _dir: dir }
});

impl Daemon {
    /// Has the guest ask until a freeze, which ends with its connection, has ended.
    fn execute(&self, request: Request) -> Response {
        let begin = Instant::now();
        loop {
            match self.controller.execute(request) {
                Response::Busy if begin.elapsed() < PATIENCE => thread::yield_now(),
                response => return response,
            }
        }
    }

    fn connect(&self) -> UnixStream {
        UnixStream::connect(&self.path).unwrap()
    }

    /// A good client, once those of the inputs before have left.
    fn attach(&self) -> RemoteRamDiscardManager {
        let begin = Instant::now();
        loop {
            match RemoteRamDiscardManager::attach(self.connect(), PATIENCE) {
                Err(AttachError::Refused { cause: Farewell::TooMany, .. })
                    if begin.elapsed() < PATIENCE =>
                {
                    thread::yield_now();
                }
                attached => return attached.unwrap(),
            }
        }
    }
}

/// What a good client was told.
#[derive(Clone)]
struct Watch(Arc<Mutex<Vec<bool>>>);

impl RamDiscardListener for Watch {
    fn name(&self) -> &str {
        "watch"
    }

    fn notify_populate(&mut self, section: Section) -> Result<(), String> {
        self.0.lock()[blocks(section, BLOCK)].fill(true);
        Ok(())
    }

    fn notify_discard(&mut self, section: Section) {
        self.0.lock()[blocks(section, BLOCK)].fill(false);
    }
}

fn guest_request(choice: u8, input: &mut Input<'_>) -> Request {
    let (first, nr) = (u64::from(input.u8()), u64::from(input.u8()));
    let first = first % NR as u64;
    let nb_blocks = u16::try_from(1 + nr % (NR as u64 - first)).unwrap();
    let span = BlockSpan { addr: ADDR + first * BLOCK, nb_blocks };
    match choice % 3 {
        0 => Request::Plug(span),
        1 => Request::Unplug(span),
        _ => Request::UnplugAll,
    }
}

/// Says what the input has, until it ends or the daemon ends the connection.
fn attack(mut stream: UnixStream, requests: &Sender<Request>, input: &mut Input<'_>) {
    let mut frames = FrameReader::default();
    let mut last_event = 0;
    if input.u8() & 3 != 0 {
        let hello = ClientMessage::Hello { min_version: VERSION, max_version: VERSION };
        let _ = stream.write_all(&frame(&hello, input));
    }
    for _ in 0..STEPS {
        if input.is_empty() {
            return;
        }
        let choice = input.u8();
        let more = choice >> 4;
        let message = match choice & 7 {
            0 => {
                requests.send(guest_request(more, input)).unwrap();
                continue;
            }
            1 | 2 => {
                match frames.next_with_fd(&stream, Instant::now() + MOMENT) {
                    Ok((
                        ServerMessage::Populate { event, .. }
                        | ServerMessage::Discard { event, .. },
                        _,
                    )) => last_event = event,
                    Ok(_) | Err(ReceiveError::TimedOut) => {}
                    Err(_) => return,
                }
                continue;
            }
            3 | 4 => ClientMessage::Ack { event: last_event + u64::from(more & 7 == 7) },
            5 => ClientMessage::Refuse { event: last_event, reason: "no".repeat(more.into()) },
            6 if more & 3 == 0 => ClientMessage::Freeze { id: u64::from(more) },
            6 if more & 3 == 1 => {
                ClientMessage::Renew { id: u64::from(more), freeze: u64::from(more >> 2) }
            }
            6 => ClientMessage::Thaw { id: u64::from(more), freeze: u64::from(more >> 2) },
            _ if more & 1 == 1 => {
                let state = match more & 2 {
                    0 => MemoryState::Discarded,
                    _ => MemoryState::Populated,
                };
                let (start, len) = (u64::from(input.u8()), 1 + u64::from(input.u8()) % 64);
                let sections =
                    Sections::from_elem(Section::new(start * BLOCK, len * BLOCK).unwrap(), 1);
                ClientMessage::Follow { id: u64::from(more), state, sections }
            }
            _ if more & 4 == 4 => ClientMessage::Serve { id: u64::from(more) },
            _ => ClientMessage::GetSizes { id: u64::from(more) },
        };
        if stream.write_all(&frame(&message, input)).is_err() {
            return;
        }
    }
}

/// What the guest has by what it was answered.
fn apply(model: &mut [bool], request: Request, response: Response) {
    let range = |span: BlockSpan| {
        let first = usize::try_from((span.addr - ADDR) / BLOCK).unwrap();
        first..first + usize::from(span.nb_blocks)
    };
    match (request, response) {
        (Request::Plug(span), Response::Ack) => model[range(span)].fill(true),
        (Request::Unplug(span), Response::Ack) => model[range(span)].fill(false),
        (Request::UnplugAll, Response::Ack) => model.fill(false),
        (_, Response::Nack | Response::Busy | Response::Error) => {}
        other => panic!("{other:?}"),
    }
}

pub(super) fn run(input: &mut Input<'_>) {
    let daemon = &*DAEMON;
    assert_eq!(daemon.execute(Request::UnplugAll), Response::Ack);
    let watch = Watch(Arc::new(Mutex::new(vec![false; NR])));
    let bystander = daemon.attach();
    let all = Section::new(0, bystander.region_size()).unwrap();
    bystander.register(all, Box::new(watch.clone())).unwrap();

    let hostile = daemon.connect();
    let (requests, asked) = channel();
    let answers: Vec<_> = thread::scope(|scope| {
        let execute = |request| (request, daemon.controller.execute(request));
        let guest = scope.spawn(move || asked.into_iter().map(execute).collect());
        attack(hostile, &requests, input);
        drop(requests);
        guest.join().unwrap()
    });
    let mut model = vec![false; NR];
    answers.into_iter().for_each(|(request, response)| apply(&mut model, request, response));

    // An event that is open when the guest is answered is none.
    assert_eq!(bystander.lost(), None);
    if *watch.0.lock() != model {
        // One that was dropped for silence, on a busy machine, learns it from its socket.
        thread::sleep(MOMENT);
        panic!("told the bystander {:?}, not {model:?}; {:?}", watch.0.lock(), bystander.lost());
    }
    for client in [&bystander, &daemon.attach()] {
        let words = client.words().unwrap();
        let plugged = |block: usize| words[block / 64] >> (block % 64) & 1 == 1;
        assert!((0..NR).all(|block| plugged(block) == model[block]), "shown in the bitmap");
    }
    let frozen = bystander.freeze(FreezeFor::Source).unwrap();
    let block = BlockSpan { addr: ADDR, nb_blocks: 1 };
    let change = if model[0] { Request::Unplug(block) } else { Request::Plug(block) };
    // On a busy machine a freeze may not be renewed in time, but then its guard says so.
    let response = daemon.controller.execute(change);
    let held = frozen.thaw().is_ok();
    assert!(response == Response::Busy || !held, "a freeze that held let {response:?} through");
}
