//! A good stream and a good file of the source, one for each that both sides may share.

use std::cell::RefCell;
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Duration;

use migration::Progress;
use migration::snapshot::{FileIo, StoppedGuest, save};

use super::devices::{Devices, State};
use super::edits::{Good, edit, undo};
use super::side::{Sharing, with_destination, with_source};
use super::{PAGE, Witness, incoming, memfd, outgoing};
use crate::input::Input;

/// More than a good destination takes, however busy the machine is.
const PATIENCE: Duration = Duration::from_secs(60);

/// A stream as it went from a source to a destination.
pub(super) fn good_stream(sharing: Sharing) -> &'static Good {
    static STREAMS: [OnceLock<Good>; 2] = [const { OnceLock::new() }; 2];
    STREAMS[sharing as usize].get_or_init(|| Good::new(record_stream(sharing)))
}

fn record_stream(sharing: Sharing) -> Vec<u8> {
    let (near, relay_near) = UnixStream::pair().unwrap();
    let (relay_far, far) = UnixStream::pair().unwrap();
    let there = thread::spawn(move || {
        let mut devices = Devices::new(State::fresh());
        with_destination(sharing, |side| incoming(side, &Witness::default(), &mut devices, far))
    });
    let (mut back_from, mut back_to) =
        (relay_far.try_clone().unwrap(), relay_near.try_clone().unwrap());
    let back = thread::spawn(move || std::io::copy(&mut back_from, &mut back_to));
    let recorder = thread::spawn(move || {
        let (mut from, mut to, mut all) = (relay_near, relay_far, Vec::new());
        let mut buffer = [0; 4096];
        while let Ok(read @ 1..) = from.read(&mut buffer) {
            all.extend_from_slice(&buffer[..read]);
            if to.write_all(&buffer[..read]).is_err() {
                break;
            }
        }
        let _ = to.shutdown(std::net::Shutdown::Both);
        all
    });
    let sent = with_source(sharing, |side| outgoing(side, &Witness::default(), near, PATIENCE));
    sent.unwrap();
    there.join().unwrap().unwrap();
    let all = recorder.join().unwrap();
    let _ = back.join().unwrap();
    all
}

/// A file that the source was saved to.
fn saved_file(sharing: Sharing) -> Vec<u8> {
    let mut file = memfd("snapshot");
    with_source(sharing, |side| {
        let stopped = StoppedGuest {
            configuration: sharing.configuration(),
            blocks: &side.blocks,
            devices: &mut Devices::new(State::used()).registry,
            io: FileIo { threads: 1, direct: false },
            progress: Arc::new(Progress::new()),
        };
        save(stopped, &file).unwrap();
    });
    let mut bytes = Vec::new();
    file.rewind().unwrap();
    file.read_to_end(&mut bytes).unwrap();
    bytes
}

/// A good file with edits, in memory and as a file. What is edited is undone afterwards, since
/// most of it is holes, which would cost more than the rest of an input does.
struct Edited {
    good: Good,
    /// Where its pages are that are not holes.
    data: Vec<usize>,
    file: File,
}

impl Edited {
    fn new(sharing: Sharing) -> Self {
        let good = Good::new(saved_file(sharing));
        let page = PAGE as usize;
        let holds_data = |at: &usize| good.bytes[*at..].iter().take(page).any(|byte| *byte != 0);
        let data = (0..good.bytes.len()).step_by(page).filter(holds_data).collect();
        let edited = Self { good, data, file: memfd("file") };
        edited.write_from(0);
        edited
    }

    /// Makes the file what the bytes are, from a place on.
    fn write_from(&self, from: usize) {
        let bytes = &self.good.bytes;
        self.file.set_len(bytes.len() as u64).unwrap();
        for &at in &self.data {
            let end = (at + PAGE as usize).min(bytes.len());
            if end > from {
                self.file.write_all_at(&bytes[at..end], at as u64).unwrap();
            }
        }
    }

    fn write_byte(&self, at: usize) {
        self.file.write_all_at(&self.good.bytes[at..=at], at as u64).unwrap();
    }

    fn with<T>(&mut self, input: &mut Input<'_>, action: impl FnOnce(&[u8], &File) -> T) -> T {
        let (before, rest) = edit(&mut self.good.bytes, &self.good.headers, input);
        before.iter().for_each(|&(at, _)| self.write_byte(at));
        self.file.set_len(rest as u64).unwrap();
        let done = action(&self.good.bytes[..rest], &self.file);
        undo(&mut self.good.bytes, &before);
        if rest < self.good.bytes.len() {
            self.write_from(rest);
        }
        before.iter().for_each(|&(at, _)| self.write_byte(at));
        done
    }
}

/// Does something with the good file with edits.
pub(super) fn with_edited_file<T>(
    sharing: Sharing,
    input: &mut Input<'_>,
    action: impl FnOnce(&[u8], &File) -> T,
) -> T {
    thread_local! {
        static EDITED: [RefCell<Option<Edited>>; 2] = const { [const { RefCell::new(None) }; 2] };
    }
    EDITED.with(|edited| {
        let mut edited = edited[sharing as usize].borrow_mut();
        edited.get_or_insert_with(|| Edited::new(sharing)).with(input, action)
    })
}
