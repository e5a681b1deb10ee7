//! The other end of a channel: what it says, and how it ends.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use crate::input::Input;

/// How long a silent peer keeps the channel open: longer than it takes to handle what it said, which
/// tests count on, and the fuzzer does not.
const SILENCE: Duration = Duration::from_millis(if cfg!(test) { 500 } else { 2 });

/// What follows the bytes of a peer. A guest is taken over only where the direction stays open, since
/// a source that closes it has given up; that costs time where more is waited for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Ending {
    /// The direction stays open: bytes that mean nothing follow, then silence.
    Open,
    /// Such bytes follow, and then the end.
    Garbage,
    /// The end.
    Closed,
}

impl Ending {
    pub(super) fn choose(input: &mut Input<'_>) -> Self {
        match input.u8() {
            0xc0.. => Ending::Open,
            byte if byte % 2 == 1 => Ending::Garbage,
            _ => Ending::Closed,
        }
    }
}

/// More than a page and the longest string: what waits for less fails by it, and not by silence.
const GARBAGE: [u8; 8 << 10] = [0xff; 8 << 10];

/// Has the other end of `stream` send `bytes`, and read what comes. Returns the end, to be held for
/// as long as it can be written to.
///
/// What fits the socket is there before anything is read of it, and takes no thread.
pub(super) fn converse(
    mut stream: UnixStream,
    mut bytes: Vec<u8>,
    ending: Ending,
) -> Option<UnixStream> {
    if ending != Ending::Closed {
        bytes.extend_from_slice(&GARBAGE);
    }
    stream.set_nonblocking(true).unwrap();
    let mut sent = 0;
    while sent < bytes.len() {
        match stream.write(&bytes[sent..]) {
            Ok(len) => sent += len,
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) => panic!("the channel is closed already: {error}"),
        }
    }
    if sent == bytes.len() && ending != Ending::Open {
        stream.shutdown(Shutdown::Write).unwrap();
        return Some(stream);
    }
    stream.set_nonblocking(false).unwrap();
    bytes.drain(..sent);
    hand_over(stream, bytes, ending);
    None
}

/// Leaves the rest to a thread. One serves all inputs: to start one takes longer than most do.
fn hand_over(stream: UnixStream, rest: Vec<u8>, ending: Ending) {
    type Job = (UnixStream, Vec<u8>, Ending);
    thread_local! {
        static PEER: mpsc::Sender<Job> = {
            let (jobs, next) = mpsc::channel::<Job>();
            thread::spawn(move || next.iter().for_each(|(stream, rest, ending)| finish(stream, &rest, ending)));
            jobs
        };
    }
    PEER.with(|peer| peer.send((stream, rest, ending)).unwrap());
}

fn finish(mut stream: UnixStream, rest: &[u8], ending: Ending) {
    // Each fails when the other side has seen enough.
    let _ = stream.write_all(rest);
    let mut heard = Vec::new();
    if ending == Ending::Open {
        stream.set_read_timeout(Some(SILENCE)).unwrap();
        let _ = stream.read_to_end(&mut heard);
        stream.set_read_timeout(None).unwrap();
    }
    let _ = stream.shutdown(Shutdown::Write);
    let _ = stream.read_to_end(&mut heard);
}
