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

/// What the other end of a channel says.
pub(super) struct Said {
    pub(super) stream: UnixStream,
    pub(super) bytes: Vec<u8>,
    pub(super) ending: Ending,
}

impl Said {
    /// Sends it, and reads what comes. Returns the end, to be held for as long as it can be written to.
    ///
    /// What fits the socket is there when this returns, and takes no thread.
    pub(super) fn say(self) -> Option<UnixStream> {
        let Self { mut stream, mut bytes, ending } = self;
        if ending != Ending::Closed {
            bytes.extend_from_slice(&GARBAGE);
        }
        stream.set_nonblocking(true).unwrap();
        let mut sent = 0;
        while sent < bytes.len() {
            match stream.write(&bytes[sent..]) {
                Ok(len) => sent += len,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                // The other side has seen enough.
                Err(_) => return None,
            }
        }
        if sent == bytes.len() && ending != Ending::Open {
            // Fails when the other side has gone.
            let _ = stream.shutdown(Shutdown::Write);
            return Some(stream);
        }
        stream.set_nonblocking(false).unwrap();
        bytes.drain(..sent);
        hand_over(Self { stream, bytes, ending });
        None
    }

    /// Sends the rest, and reads until the channel is closed.
    fn finish(mut self) {
        // Each fails when the other side has seen enough.
        let _ = self.stream.write_all(&self.bytes);
        let mut heard = Vec::new();
        if self.ending == Ending::Open {
            self.stream.set_read_timeout(Some(SILENCE)).unwrap();
            let _ = self.stream.read_to_end(&mut heard);
            self.stream.set_read_timeout(None).unwrap();
        }
        let _ = self.stream.shutdown(Shutdown::Write);
        let _ = self.stream.read_to_end(&mut heard);
    }
}

/// Leaves it to a thread. One serves all inputs: to start one takes longer than most do.
fn hand_over(said: Said) {
    thread_local! {
        static PEER: mpsc::Sender<Said> = {
            let (jobs, next) = mpsc::channel::<Said>();
            thread::spawn(move || next.iter().for_each(Said::finish));
            jobs
        };
    }
    PEER.with(|peer| peer.send(said).unwrap());
}
