//! Streams of any content, and good streams with edits: loaded from a channel, restored from a
//! file, inspected, and answered by a hostile destination, in precopy and in postcopy.
//!
//! What is promised: no panic and no end without an end; the guest runs only where the migration
//! succeeded, and on the source again where it did not; nothing gets where memory is discarded, not
//! in use, or shared by both sides; a migration that has ended holds no block and no freeze.

mod answers;
mod changes;
mod devices;
mod edits;
mod good;
mod peer;
mod seeds;
mod side;

use std::fs::File;
use std::io::{Cursor, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use migration::dirty::{DirtyTracker, NeverWritten};
use migration::inspect::inspect;
use migration::ram::{MigrationBlock, RamLoad, RamSave};
use migration::snapshot::{FileIo, Restore, restore};
use migration::{Channel, Guest, Incoming, MigrationError, Outgoing, Parameters, Progress};
use ram_discard::{MemoryState, RamDiscardSource, Section};
use virtio_mem::device::BlockBitmap;

use crate::input::Input;
use changes::with_changes;
use devices::{Devices, State};
use edits::edited;
use good::{good_stream, with_edited_file};
use peer::{Ending, Said};
pub(crate) use seeds::seeds;
use side::{Sharing, Side, with_destination, with_source};

pub(crate) const PAGE: u64 = 4096;
pub(crate) const BLOCK: u64 = 16 * PAGE;
pub(crate) const BLOCKS: usize = 8;

/// How long a source waits for a hostile destination's verdict: longer than it takes, which tests count
/// on, and the fuzzer does not.
const PATIENCE: Duration = Duration::from_millis(if cfg!(test) { 10_000 } else { 30 });

/// What an input may be: its first byte.
const KINDS: u8 = 8;

/// Counts what is asked of it.
#[derive(Default)]
struct Witness {
    runs: AtomicUsize,
    stops: AtomicUsize,
    /// What the peer says once the guest is stopped.
    then: Mutex<Option<Said>>,
    /// The peer's end after that.
    said: Mutex<Option<UnixStream>>,
}

impl Guest for Witness {
    fn stop(&self) -> Result<(), String> {
        self.stops.fetch_add(1, Ordering::Relaxed);
        if let Some(then) = self.then.lock().unwrap().take() {
            *self.said.lock().unwrap() = then.say();
        }
        Ok(())
    }

    fn run(&self) -> Result<(), String> {
        self.runs.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

/// Every other block is plugged.
pub(crate) struct Plugged(pub(crate) BlockBitmap);

impl RamDiscardSource for Plugged {
    fn region_size(&self) -> u64 {
        BLOCKS as u64 * BLOCK
    }

    fn granularity(&self) -> u64 {
        BLOCK
    }

    fn next_range(&self, section: Section, state: MemoryState) -> Option<Section> {
        let blocks = (section.start() / BLOCK) as usize..section.end().div_ceil(BLOCK) as usize;
        let run = self.0.next_run(blocks, state.is_populated())?;
        Section::from_bounds(run.start as u64 * BLOCK, run.end as u64 * BLOCK)?
            .intersection(section)
    }
}

pub(crate) fn plugged() -> Plugged {
    let mut plugged = BlockBitmap::new(BLOCKS);
    (0..BLOCKS).step_by(2).for_each(|block| plugged.set(block..block + 1, true));
    Plugged(plugged)
}

pub(crate) fn memfd(name: &str) -> File {
    File::from(rustix::fs::memfd_create(name, rustix::fs::MemfdFlags::CLOEXEC).unwrap())
}

fn outgoing(
    side: &Side,
    guest: &Witness,
    stream: UnixStream,
    patience: Duration,
) -> Result<(), MigrationError> {
    let progress = Arc::new(Progress::new());
    let tracker = |_: &MigrationBlock| -> Box<dyn DirtyTracker> { Box::new(NeverWritten) };
    let options = side.sharing.options();
    let ram = RamSave::new(&side.blocks, options, Arc::clone(&progress), tracker)?;
    let mut parameters = Parameters::new(side.sharing.configuration());
    parameters.switchover_timeout = patience;
    let outgoing = Outgoing {
        parameters,
        guest,
        handlers: vec![Box::new(ram)],
        devices: &mut Devices::new(State::used()).registry,
        postcopy: None,
        progress: Arc::clone(&progress),
    };
    outgoing.run(Channel::new(stream, progress).unwrap()).map_err(|failed| failed.error)
}

fn incoming(
    side: &Side,
    guest: &Witness,
    devices: &mut Devices,
    stream: UnixStream,
) -> Result<(), MigrationError> {
    let progress = Arc::new(Progress::new());
    let (blocks, options) = (Arc::clone(&side.blocks), side.sharing.options());
    let ram = RamLoad::new(blocks, options, Arc::clone(&progress));
    let incoming = Incoming {
        configuration: side.sharing.configuration(),
        guest,
        handlers: vec![Box::new(ram)],
        devices: &mut devices.registry,
        postcopy: None,
        progress: Arc::clone(&progress),
    };
    incoming.run(Channel::new(stream, progress).unwrap())
}

/// Feeds `bytes` to a destination; whether the guest was taken over.
fn load(bytes: Vec<u8>, ending: Ending, sharing: Sharing) -> bool {
    let guest = Witness::default();
    with_destination(sharing, |side| {
        let (near, far) = UnixStream::pair().unwrap();
        let _near = Said { stream: near, bytes, ending }.say();
        let mut devices = Devices::new(State::fresh());
        let loaded = incoming(side, &guest, &mut devices, far);
        assert_eq!(guest.runs.load(Ordering::Relaxed), usize::from(loaded.is_ok()), "{loaded:?}");
        devices.assert_all_or_none(loaded.is_ok());
        loaded.is_ok()
    })
}

/// Restores a guest from `file`; whether it was there.
fn restored(file: &File, sharing: Sharing) -> bool {
    with_destination(sharing, |side| {
        let mut devices = Devices::new(State::fresh());
        let what = Restore {
            configuration: sharing.configuration(),
            blocks: Arc::clone(&side.blocks),
            devices: &mut devices.registry,
            io: FileIo { threads: 1, direct: false },
            progress: Arc::new(Progress::new()),
        };
        let restored = restore(what, file);
        devices.assert_all_or_none(restored.is_ok());
        restored.is_ok()
    })
}

/// A source that hears `first`, and once its guest is stopped `then`, whatever it sends; whether the
/// guest has left.
fn answered(first: &[u8], then: &[u8], ending: Ending, sharing: Sharing) -> bool {
    let guest = Witness::default();
    with_source(sharing, |side| {
        let (near, mut far) = UnixStream::pair().unwrap();
        far.write_all(first).unwrap();
        let then = Said { stream: far, bytes: then.to_vec(), ending };
        *guest.then.lock().unwrap() = Some(then);
        let sent = outgoing(side, &guest, near, PATIENCE);
        let runs = guest.runs.load(Ordering::Relaxed);
        let stops = guest.stops.load(Ordering::Relaxed);
        assert_eq!(runs + usize::from(sent.is_ok()), stops, "{sent:?}");
        sent.is_ok()
    })
}

/// The body of the target.
pub fn run(data: &[u8]) {
    drive(data);
}

/// Also returns whether all went well on the side that the bytes came to.
fn drive(data: &[u8]) -> bool {
    let mut input = Input::new(data);
    let kind = input.u8();
    let sharing = if kind & 0x80 == 0 { Sharing::Nothing } else { Sharing::Firmware };
    match kind % 0x80 % KINDS {
        kind @ (0 | 1 | 5 | 6) => {
            let ending = Ending::choose(&mut input);
            match kind {
                6 => load(with_changes(sharing, &mut input), ending, sharing),
                0 => load(edited(good_stream(sharing), &mut input), ending, sharing),
                1 => load(input.rest().to_vec(), ending, sharing),
                _ => {
                    let len = usize::from(input.u8());
                    let first = input.bytes(len);
                    answered(first, input.rest(), ending, sharing)
                }
            }
        }
        2 => with_edited_file(sharing, &mut input, |_, file| restored(file, sharing)),
        3 => with_edited_file(sharing, &mut input, |bytes, _| inspected(bytes)),
        7 => answers::answered(&mut input).0,
        _ => inspected(&edited(good_stream(sharing), &mut input)),
    }
}

fn inspected(bytes: &[u8]) -> bool {
    inspect(Cursor::new(bytes)).error.is_none()
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPEN: u8 = 0xff;

    #[test]
    fn what_is_not_edited_arrives_from_a_stream_and_from_a_file() {
        for sharing in [0, 0x80] {
            assert!(drive(&[sharing, OPEN]), "a stream");
            for kind in 2..5 {
                assert!(drive(&[sharing | kind]), "kind {kind}");
            }
        }
    }

    #[test]
    fn the_seeds_reach_the_outcomes_of_each_kind() {
        let driven: Vec<_> = seeds()
            .into_iter()
            .map(|seed| (seed[0] & 0x80, seed[0] % 0x80 % KINDS, drive(&seed)))
            .collect();
        // Bytes alone make no guest.
        for sharing in [0, 0x80] {
            for (kind, well) in [
                (0, true),
                (0, false),
                (2, true),
                (2, false),
                (5, true),
                (5, false),
                (6, true),
                (6, false),
                (7, true),
                (7, false),
            ] {
                assert!(driven.contains(&(sharing, kind, well)), "{:?}", (sharing, kind, well));
            }
        }
    }

    #[test]
    fn changes_that_fit_are_followed_and_others_refused() {
        // One range of `vmem0`: block 6 has no pages, 1 is discarded.
        let range = 1 << 3;
        assert!(drive(&[6, OPEN, range, 1, 6, 1]), "block 6 is discarded");
        assert!(drive(&[6, OPEN, range, 0, 1, 1]), "block 1 is populated");
        assert!(drive(&[6, OPEN, range, 0, 7, 1]), "block 7 has no memory, which is no error");
        assert!(drive(&[6, OPEN, range, 1, 6, 1, range, 0, 6, 1]), "and populated again");
        for wrong in [
            &[range, 0, 6, 1][..],
            &[range, 1, 1, 1],
            &[range, 1, 2, 1],
            &[range, 2, 6, 1],
            &[range, 1, 6, 8],
            &[range | 2, 1, 0, 1],
            &[range | 6, 1, 6, 1],
            &[0, 1],
            &[range | 1, 9, 0, 0, 0, 1, 6, 1],
        ] {
            assert!(!drive(&[&[6, OPEN], wrong].concat()), "{wrong:?}");
        }
    }

    #[test]
    fn a_resizable_block_becomes_as_long_as_the_stream_says() {
        let resized = seeds()
            .into_iter()
            .filter(|seed| seed.len() == 10 && seed[..2] == [seed[0] & 0x80, OPEN]);
        let taken: Vec<_> = resized.map(|seed| drive(&seed)).collect();
        // One page longer fits; shorter than a page that comes, or longer than the block, does not.
        assert_eq!(taken, [true, true, false, false].repeat(2));
    }

    #[test]
    fn edits_reach_every_kind_of_header_and_no_page() {
        for sharing in [Sharing::Nothing, Sharing::Firmware] {
            let good = good_stream(sharing);
            let mut kinds: Vec<&[u8]> = vec![b"QEVM", b"\x04fuzz", b"\x05vmem0", b"\x03rom"];
            // Sections of devices, footers, and the description with its end.
            kinds.extend([&b"virtio-mem-device-early"[..], b"\x05board", b"\x0bboard/extra"]);
            kinds.extend([&b"\x7e\0\0\0\0"[..], b"vmsd_name"]);
            kinds.push(&good.bytes[good.bytes.len() - 3..]);
            if sharing == Sharing::Firmware {
                kinds.extend([&b"x-ignore-shared"[..], b"\xff\xff\xe0\0"]);
            }
            for kind in kinds {
                let all = good.bytes.windows(kind.len()).enumerate();
                let found: Vec<_> = all.filter(|(_, bytes)| *bytes == kind).collect();
                assert!(!found.is_empty(), "{kind:?} is not in the stream");
                for (at, _) in found {
                    let reached = (at..at + kind.len()).all(|at| good.headers.contains(&at));
                    assert!(reached, "{kind:?} at {at:#x}");
                }
            }
            assert!(good.headers.len() < PAGE as usize, "{}", good.headers.len());
        }
    }
}
