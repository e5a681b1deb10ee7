//! A hostile daemon, and a client that asks and listens.

use std::fs::File;
use std::io::Write;
use std::ops::ControlFlow;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use ram_discard::{
    FreezeFor, MemoryState, RamDiscardListener, RamDiscardManager, Section, Unavailable,
};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use virtio_mem::device::Geometry;
use virtio_mem::discard_channel::bitmap::{BitmapWriter, LAYOUT_VERSION, MAGIC, file_size};
use virtio_mem::discard_channel::wire::{
    ClientMessage, Farewell, Lengths, Message, MessageError, Sections, ServerMessage, VERSION,
    Welcome,
};
use virtio_mem::discard_channel::{
    FrameReader, ReceiveError, RemoteRamDiscardManager, send, send_with_fd,
};

use super::{BLOCK, MOMENT, NR, PATIENCE, STEPS, blocks, frame, geometry};
use crate::input::Input;

/// How long the client waits for the daemon.
const TIMEOUT: Duration = Duration::from_millis(30);

/// A message that may be wrong, to be sent with the descriptor that only a right one would carry.
struct Raw(Vec<u8>);

impl Message for Raw {
    fn lengths(_kind: u32) -> Option<Lengths> {
        None
    }

    fn encode(&self, frame: &mut Vec<u8>) {
        frame.extend_from_slice(&self.0);
    }

    fn decode_payload(kind: u32, _payload: &[u8]) -> Result<Self, MessageError> {
        Err(MessageError::UnknownKind(kind))
    }
}

/// The file that comes with the welcome.
enum Bitmap {
    Good(BitmapWriter),
    Made(OwnedFd),
}

impl Bitmap {
    fn new(input: &mut Input<'_>) -> Self {
        let choice = input.u8();
        if choice & 1 == 0 {
            return Self::Good(BitmapWriter::new(&geometry()).unwrap());
        }
        let mut words = vec![MAGIC, LAYOUT_VERSION, NR as u64, BLOCK, 0, 0, 0, 0];
        words.extend((0..NR.div_ceil(64)).map(|_| u64::from(input.u16()) << 32));
        for _ in 0..choice >> 1 & 3 {
            let at = usize::from(input.u8()) % words.len();
            words[at] = input.u64();
        }
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(memfd_create("made", flags).unwrap());
        let bytes: Vec<_> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        file.write_all_at(&bytes, 0).unwrap();
        if choice & 8 == 0 {
            fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW).unwrap();
        }
        Self::Made(file.into())
    }

    fn file(&self) -> BorrowedFd<'_> {
        match self {
            Self::Good(writer) => writer.file(),
            Self::Made(file) => file.as_fd(),
        }
    }
}

/// Plays the daemon, until the input ends or the client ends the connection.
fn attack(mut stream: UnixStream, input: &mut Input<'_>) {
    let mut bitmap = Bitmap::new(input);
    let welcome = Welcome {
        version: VERSION,
        generation: 1,
        geometry: geometry(),
        bitmap_size: file_size(NR),
        event: 0,
        patience_ms: 1000,
    };
    let raw = Raw(frame(&ServerMessage::Welcome(welcome), input));
    let sent = match input.u8() % 8 {
        0 => send(&stream, &raw),
        _ => send_with_fd(&stream, &raw, bitmap.file()),
    };
    if sent.is_err() {
        return;
    }
    let mut frames = FrameReader::default();
    let mut event = 0;
    for _ in 0..STEPS {
        if input.is_empty() {
            return;
        }
        let choice = input.u8();
        let more = u64::from(choice >> 3);
        let message = match choice & 7 {
            0..=2 => {
                event += u64::from(more & 15 != 15);
                let mut sections = Sections::new();
                // Mostly one, sometimes several.
                for _ in 0..=(more >> 2).saturating_sub(4) {
                    let (start, len) = (u64::from(input.u8()), 1 + u64::from(input.u8()) % 64);
                    sections.push(Section::new(start * BLOCK, len * BLOCK).unwrap());
                }
                if choice & 1 == 0 {
                    ServerMessage::Populate { event, sections }
                } else {
                    ServerMessage::Discard { event, sections }
                }
            }
            3..=5 => match frames.next(&stream) {
                Ok(ClientMessage::Freeze { id }) => match more & 7 {
                    0 => ServerMessage::Failed { id, reason: "no".to_owned() },
                    1 => ServerMessage::Done { id },
                    2 => sizes(id, more),
                    _ => ServerMessage::Frozen {
                        id,
                        freeze: more >> 3,
                        event,
                        expiry_ms: 1 + u32::from(input.u8()),
                    },
                },
                Ok(ClientMessage::Thaw { id, .. } | ClientMessage::Renew { id, .. }) => {
                    match more & 7 {
                        0 => ServerMessage::Failed { id, reason: "no".to_owned() },
                        1 => ServerMessage::Done { id: id + 1 },
                        2 => sizes(id, more),
                        _ => ServerMessage::Done { id },
                    }
                }
                Ok(ClientMessage::GetSizes { id }) => match more & 7 {
                    0 => ServerMessage::Done { id },
                    _ => sizes(id, more),
                },
                Ok(_) => continue,
                Err(ReceiveError::Io(error)) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    continue;
                }
                Err(_) => return,
            },
            6 => {
                if let Bitmap::Good(writer) = &mut bitmap {
                    let first = usize::from(input.u8()) % NR;
                    writer.update(event, &[(first..NR, more & 1 == 0)]);
                }
                continue;
            }
            _ if more & 1 == 0 => ServerMessage::Thawed { freeze: more >> 3 },
            _ => ServerMessage::Goodbye {
                cause: Farewell::Ending,
                min_version: 1,
                max_version: 1,
                reason: "over".to_owned(),
            },
        };
        if stream.write_all(&frame(&message, input)).is_err() {
            return;
        }
    }
}

fn sizes(id: u64, more: u64) -> ServerMessage {
    let usable_region_size = more << 60;
    ServerMessage::Sizes { id, usable_region_size, plugged_size: more, requested_size: u64::MAX }
}

/// What the client's listener was told.
#[derive(Default)]
struct Seen {
    populated: Vec<bool>,
    /// Something that is no blocks of the region.
    wrong: Option<Section>,
    lost: usize,
}

#[derive(Clone)]
struct Watch {
    block_size: u64,
    seen: Arc<Mutex<Seen>>,
}

impl Watch {
    fn mark(&self, section: Section, state: MemoryState) {
        let seen = &mut *self.seen.lock();
        let aligned = |at: u64| at.is_multiple_of(self.block_size);
        let aligned = aligned(section.start()) && aligned(section.len());
        match seen.populated.get_mut(blocks(section, self.block_size)) {
            Some(blocks) if aligned => blocks.fill(state.is_populated()),
            _ => seen.wrong = Some(section),
        }
    }
}

impl RamDiscardListener for Watch {
    fn name(&self) -> &str {
        "watch"
    }

    fn notify_populate(&mut self, section: Section) -> Result<(), String> {
        self.mark(section, MemoryState::Populated);
        Ok(())
    }

    fn notify_discard(&mut self, section: Section) {
        self.mark(section, MemoryState::Discarded);
    }

    fn notify_lost(&mut self, _reason: &str) {
        self.seen.lock().lost += 1;
    }
}

/// One call of the client; what it says is in order, or the connection is lost.
fn call(manager: &RemoteRamDiscardManager, choice: u8, geometry: &Geometry) {
    let region = geometry.region_size();
    let start = u64::from(choice >> 3) * 7 * BLOCK % region;
    let section = Section::new(start, region - start).unwrap();
    let mut end = 0;
    let mut visit = |range: Section| {
        assert!(range.start() >= section.start() && range.end() <= section.end(), "{range}");
        assert!(end == 0 || range.start() > end, "{range} touches the one before");
        end = range.end();
        ControlFlow::Continue(())
    };
    let _: Result<(), Unavailable> = match choice & 7 {
        0 => manager.replay_populated(section, &mut visit).map(drop),
        1 => manager.replay_discarded(section, &mut visit).map(drop),
        2 => manager.is_populated(section).map(drop),
        3 => manager.sizes().map(drop),
        4 => manager.words().map(|words| {
            let nr = geometry.nr_blocks();
            assert_eq!(words.len(), nr.div_ceil(64));
            let tail = words[nr / 64..].iter().map(|word| word.count_ones()).sum::<u32>();
            assert!(!nr.is_multiple_of(64) || tail == 0);
        }),
        5 | 6 => {
            // Dropped, so thawed, at once.
            let _ = manager.freeze(FreezeFor::Source);
            Ok(())
        }
        _ => {
            if let Ok(frozen) = manager.freeze(FreezeFor::Source) {
                let mut end = 0;
                for range in frozen.discarded(section) {
                    assert!(range.start() >= end && range.end() <= region, "{range}");
                    end = range.end();
                }
                let held = frozen.check().is_ok();
                assert!(frozen.check().is_err() || held, "what was lost is lost for good");
                assert!(frozen.thaw().is_err() || held);
            }
            Ok(())
        }
    };
}

fn use_it(manager: &RemoteRamDiscardManager, calls: &[u8]) {
    let geometry = *manager.geometry();
    let all = Section::new(0, geometry.region_size()).unwrap();
    let watch = Watch { block_size: geometry.block_size(), seen: Arc::default() };
    watch.seen.lock().populated = vec![false; geometry.nr_blocks()];
    let registered = manager.register(all, Box::new(watch.clone())).ok();
    for &choice in calls {
        call(manager, choice, &geometry);
    }
    let mut told = usize::from(registered.is_some());
    if let Some(id) = registered
        && calls.len() % 2 == 1
        && manager.unregister(id).is_ok()
    {
        told = 0;
        assert!(watch.seen.lock().populated.iter().all(|populated| !populated), "left populated");
    }
    // The daemon ends the connection at the end of its input.
    let begin = Instant::now();
    while manager.lost().is_none() || watch.seen.lock().lost < told {
        assert!(begin.elapsed() < PATIENCE, "the end of the connection is not seen");
        thread::sleep(Duration::from_micros(100));
    }
    assert!(manager.is_populated(all).is_err() && manager.words().is_err());
    assert!(manager.freeze(FreezeFor::Source).is_err() && manager.sizes().is_err());
    let seen = watch.seen.lock();
    assert_eq!((seen.wrong, seen.lost), (None, told));
}

pub(super) fn run(input: &mut Input<'_>) {
    let (hostile, ours) = UnixStream::pair().unwrap();
    hostile.set_read_timeout(Some(MOMENT)).unwrap();
    let calls = input.u8() % 8;
    let calls = input.bytes(calls.into());
    thread::scope(|scope| {
        scope.spawn(move || attack(hostile, input));
        match RemoteRamDiscardManager::attach(ours, TIMEOUT) {
            Ok(manager) => use_it(&manager, calls),
            Err(error) => assert!(!error.to_string().is_empty()),
        }
    });
}
