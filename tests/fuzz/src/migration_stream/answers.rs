//! A source in postcopy under a hostile destination, which has the guest or says that it has: requests,
//! what it says was discarded, bitmaps, ends and bytes, over the first channels and those of recoveries.

use std::io::{self, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::{self, JoinHandle};

use migration::dirty::{DirtyTracker, NeverWritten};
use migration::page_bitmap::PageBitmap;
use migration::postcopy::{Channels, PostcopyOutgoing, Reconnect, SwitchWhen, put_received};
use migration::ram::{ListOptions, MigrationBlock, RamSave};
use migration::stream::ReturnMessage;
use migration::{Channel, Guest, GuestAfter, MigrationError, Outgoing, Parameters, Progress};
use vmstate::wire::WireWrite;

use super::devices::{Devices, State};
use super::side::{Sharing, with_source};
use super::{BLOCK, BLOCKS, PAGE, PATIENCE};
use crate::input::Input;

/// The ping that asks whether devices are loaded.
const PING_PACKAGE_LOADED: u32 = 0x42;
/// More steps only take longer.
const STEPS: usize = 64;
/// What the sockets of a channel take at once, less than that of any machine.
const SAID_MAX: usize = 64 << 10;

/// The source's guest. Its destination speaks once it is stopped.
struct Stops {
    stops: AtomicUsize,
    runs: AtomicUsize,
    then: Mutex<Option<mpsc::Sender<()>>>,
}

impl Guest for Stops {
    fn stop(&self) -> Result<(), String> {
        self.stops.fetch_add(1, Ordering::Relaxed);
        drop(self.then.lock().unwrap().take());
        Ok(())
    }

    fn run(&self) -> Result<(), String> {
        self.runs.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

/// The destination's ends of channels: what it says on each, and that it reads what comes.
#[derive(Default)]
struct Peers(Vec<JoinHandle<()>>);

impl Peers {
    /// A channel on which `bytes` are said after `stopped`, if there is that, and then the end.
    fn channel(&mut self, bytes: Vec<u8>, stopped: Option<mpsc::Receiver<()>>) -> UnixStream {
        let (near, mut far) = UnixStream::pair().unwrap();
        let mut reads = far.try_clone().unwrap();
        self.0.push(thread::spawn(move || {
            // Each fails when the source has seen enough.
            let _ = stopped.map(|stopped| stopped.recv());
            let _ = far.write_all(&bytes);
            let _ = far.shutdown(Shutdown::Write);
        }));
        self.0.push(thread::spawn(move || drop(io::copy(&mut reads, &mut io::sink()))));
        near
    }
}

/// New channels, on each of which something is said.
struct Recoveries<'a> {
    left: Vec<Vec<u8>>,
    peers: &'a mut Peers,
    progress: Arc<Progress>,
    nr: &'a mut usize,
}

impl Reconnect for Recoveries<'_> {
    fn reconnect(&mut self, _error: &MigrationError) -> Option<Channels> {
        let bytes = self.left.pop()?;
        *self.nr += 1;
        let channel = |stream| Channel::new(stream, Arc::clone(&self.progress)).unwrap();
        Some(Channels { main: channel(self.peers.channel(bytes, None)), urgent: None })
    }
}

fn name(how: u8) -> String {
    ["vmem0", "vmem0", "vmem0", "rom", "firmware", "none", "", "vmem"][usize::from(how % 8)].into()
}

/// A range: blocks, pages, bytes, or anything.
fn range(how: u8, input: &mut Input<'_>) -> (u64, u64) {
    match how / 8 % 4 {
        0 => (u64::from(input.u8() % 10) * BLOCK, u64::from(input.u8() % 10) * BLOCK),
        1 => (u64::from(input.u8()) * PAGE, u64::from(input.u8() % 64) * PAGE),
        2 => (u64::from(input.u16()) * 8, u64::from(input.u16()) * 8),
        _ => (input.u64(), input.u64()),
    }
}

/// What was received of a block, with that many pages more than it has.
fn bitmap(out: &mut Vec<u8>, input: &mut Input<'_>) {
    let how = input.u8();
    let pages = match name(how).as_str() {
        "vmem0" => BLOCKS as u64 * BLOCK / PAGE,
        "rom" => 3,
        _ => 2,
    };
    let mut outstanding = PageBitmap::new(pages + u64::from(how / 0xf0));
    for _ in 0..how / 16 % 4 {
        outstanding.set(u64::from(input.u8()) % pages);
    }
    put_received(out, &name(how), &outstanding);
}

/// What a destination says while memory is outstanding.
fn steps(out: &mut Vec<u8>, input: &mut Input<'_>) {
    for _ in 0..STEPS {
        if input.is_empty() || out.len() > SAID_MAX {
            break;
        }
        let step = input.u8();
        match step % 12 {
            0..=2 => {
                let (how, times) = (input.u8(), input.u8());
                let (start, len) = range(how, input);
                let message = ReturnMessage::Discarded { block: name(how), start, len };
                // Mostly once.
                (0..times.max(0xe0) - 0xdf).for_each(|_| message.put(out));
            }
            3 => {
                // Each page of a block, forwards or backwards, once or twice.
                let (block, how) = (u64::from(input.u8() % 9) * BLOCK, input.u8());
                for page in 0..BLOCK / PAGE * (1 + u64::from(how & 1)) {
                    let page = if how & 2 == 0 { page } else { !page } % (BLOCK / PAGE);
                    let (start, len) = (block + page * PAGE, PAGE);
                    ReturnMessage::Discarded { block: "vmem0".into(), start, len }.put(out);
                }
            }
            4 | 5 => {
                let how = input.u8();
                let (start, len) = range(how, input);
                let block = (step & 0x40 == 0).then(|| name(how));
                ReturnMessage::RequestPages { block, start, len: len as u32 }.put(out);
            }
            6 => ReturnMessage::Shut(u32::from(input.u8() / 0xc0)).put(out),
            7 => bitmap(out, input),
            8 => ReturnMessage::ResumeAck.put(out),
            9 => match input.u8() & 1 {
                0 => ReturnMessage::SwitchoverAck.put(out),
                _ => ReturnMessage::Pong(input.u8().into()).put(out),
            },
            10 => {
                let number = input.u8().into();
                ReturnMessage::BlockState { number, refused: None }.put(out);
            }
            // The end of what is said on this channel.
            _ if input.u8() & 1 == 0 => break,
            _ => {
                let len = usize::from(input.u8() % 32);
                out.put(input.bytes(len));
            }
        }
    }
}

/// Changes a few bytes.
fn edit(bytes: &mut [u8], input: &mut Input<'_>) {
    for _ in 0..input.u8() % 4 {
        let at = usize::from(input.u16()) % bytes.len().max(1);
        if let Some(byte) = bytes.get_mut(at) {
            *byte = input.u8();
        }
    }
}

/// Has a source hear what `input` says; whether the destination has all, and the recoveries. Both sides share
/// nothing, which excludes postcopy.
pub(super) fn answered(input: &mut Input<'_>) -> (bool, usize) {
    // How: 1: no urgent channel; 2: it does not say that it takes the guest; 4: bytes are changed;
    // 0xc0: how many recoveries.
    let how = input.u8();
    let mut first = Vec::new();
    if how & 2 == 0 {
        ReturnMessage::Pong(PING_PACKAGE_LOADED).put(&mut first);
        ReturnMessage::SwitchoverAck.put(&mut first);
    }
    let taken = first.len();
    steps(&mut first, input);
    let mut left: Vec<_> = (0..how >> 6).map(|_| Vec::new()).collect();
    left.iter_mut().for_each(|said| steps(said, input));
    left.reverse();
    if how & 4 != 0 {
        edit(&mut first[taken..], input);
    }
    let (mut peers, mut nr) = (Peers::default(), 0);
    let done = with_source(Sharing::Nothing, |side| {
        let progress = Arc::new(Progress::new());
        let (then, stopped) = mpsc::channel();
        let (stops, runs, then) =
            (AtomicUsize::new(0), AtomicUsize::new(0), Mutex::new(Some(then)));
        let guest = Stops { stops, runs, then };
        let channel = |stream| Channel::new(stream, Arc::clone(&progress)).unwrap();
        let main = channel(peers.channel(first, Some(stopped)));
        let urgent = (how & 1 == 0).then(|| channel(peers.channel(Vec::new(), None)));
        let tracker = |_: &MigrationBlock| -> Box<dyn DirtyTracker> { Box::new(NeverWritten) };
        let options = ListOptions { postcopy: true, ..side.sharing.options() };
        let ram = RamSave::new(&side.blocks, options, Arc::clone(&progress), tracker).unwrap();
        let mut parameters = Parameters::new(side.sharing.configuration());
        parameters.switchover_timeout = PATIENCE;
        let outgoing = Outgoing {
            parameters,
            guest: &guest,
            handlers: vec![Box::new(ram)],
            devices: &mut Devices::new(State::used()).registry,
            postcopy: Some(PostcopyOutgoing {
                when: SwitchWhen::AtOnce,
                urgent,
                reconnect: Box::new(Recoveries {
                    left,
                    peers: &mut peers,
                    progress: Arc::clone(&progress),
                    nr: &mut nr,
                }),
            }),
            progress: Arc::clone(&progress),
        };
        let sent = outgoing.run(main);
        let (stops, runs) = (guest.stops.into_inner(), guest.runs.into_inner());
        // Once, and not any more when the destination may have it.
        match &sent {
            Ok(()) => assert_eq!((stops, runs), (1, 0)),
            Err(failed) => match failed.guest {
                GuestAfter::RunsHere => assert_eq!(stops, runs, "{failed}"),
                GuestAfter::Gone => assert_eq!((stops, runs), (1, 0), "{failed}"),
                GuestAfter::StoppedHere => panic!("it could be let run: {failed}"),
            },
        }
        let seen = progress.snapshot();
        assert!(seen.remaining <= seen.total, "{seen:?}");
        sent.is_ok()
    });
    for thread in peers.0 {
        thread.join().unwrap();
    }
    (done, nr)
}

/// The rest of seeds: how, and steps.
pub(super) fn seeds() -> Vec<Vec<u8>> {
    let block = |first: u8, nr: u8| vec![0, 0, 0, first, nr];
    let all = [6, 0];
    let request = [4, 0, 2, 1];
    // Its bitmaps, of a block each, and that it continues.
    let resumed = [7, 0, 7, 3, 7, 4, 8];
    vec![
        [&[0][..], &all].concat(),
        // Whole blocks, twice, pages, and those that are asked for then.
        [&[0][..], &block(2, 1), &block(2, 1), &[3, 4, 3], &request, &all].concat(),
        [&[1][..], &request, &block(0, 8), &request, &all].concat(),
        // Parts of pages; past the end; empty; of no block; anything.
        [&[0][..], &[0, 16, 0, 1, 0, 1, 0], &all].concat(),
        [&[0][..], &block(7, 9), &all].concat(),
        [&[0][..], &block(3, 0), &all].concat(),
        [&[0][..], &[0, 5, 0, 0, 1], &all].concat(),
        [&[0][..], &[0, 24, 0], &[0xff; 16], &all].concat(),
        [&[0][..], &[0, 24, 0, 0, 0xf0], &[0xff; 6], &[0, 0x20, 0, 0, 0, 0, 0, 0], &all].concat(),
        // Thirty times, and page by page of all blocks.
        [&[0][..], &[0, 0, 0xff, 2, 1], &[3, 0, 1, 3, 2, 3, 3, 4, 1, 3, 6, 2], &all].concat(),
        // Before it has the guest, and from one that never says so.
        [&[2][..], &block(0, 1)].concat(),
        [&[2][..], &[9, 1, 0x42], &block(0, 1), &[9, 0], &all].concat(),
        // In a recovery, also within its handshake.
        [&[0x40][..], &block(0, 1), &[11, 0], &resumed, &block(2, 1), &all].concat(),
        [&[0x40][..], &block(0, 1), &[11, 0], &block(2, 1), &resumed, &all].concat(),
        [&[0x44][..], &block(0, 1), &[11, 0], &resumed, &all, &[11, 0], &[1, 30, 0, 9]].concat(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drive(bytes: &[u8]) -> (bool, usize) {
        answered(&mut Input::new(bytes))
    }

    #[test]
    fn whole_pages_of_a_block_can_have_been_discarded_and_nothing_else() {
        for (how, range, can_be) in [
            (0, &[2, 1][..], true),
            (0, &[0, 8], true),
            (0, &[7, 2], false),
            (0, &[1, 0], false),
            (8, &[3, 1], true),
            (8, &[127, 2], false),
            (16, &[0, 2, 0, 1], false),
            (16, &[0, 1, 0, 2], false),
            (24, &[0xff; 16], false),
            (5, &[0, 1], false),
        ] {
            // Thirty times, beside a channel for what is asked for and without.
            for (urgent, times) in [(0, 0), (0, 0xff), (1, 0)] {
                let said = [&[urgent, 0, how, times][..], range, &[6, 0]].concat();
                assert_eq!(drive(&said), (can_be, 0), "{said:?}");
            }
        }
    }

    #[test]
    fn a_destination_that_was_not_heard_of_the_guest_does_not_get_it() {
        assert_eq!(drive(&[2, 0, 0, 0, 0, 1]), (false, 0));
    }

    #[test]
    fn the_seeds_reach_the_end_with_and_without_a_recovery_and_failures() {
        let reached: Vec<_> = seeds().iter().map(|seed| drive(seed)).collect();
        for expected in [(true, 0), (false, 0), (true, 1), (false, 1)] {
            assert!(reached.contains(&expected), "{expected:?} is none of {reached:?}");
        }
    }
}
