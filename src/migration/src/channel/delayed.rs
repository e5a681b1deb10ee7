//! A transport of a test's own, on which what was written arrives when the test says so.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use super::transport::{Ready, Transport};

/// One direction: any number of bytes, of which so many may be read.
#[derive(Debug, Default)]
pub(crate) struct Delayed {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    bytes: VecDeque<u8>,
    /// How many of them may be read.
    due: usize,
    /// All may, and what comes.
    open: bool,
    ended: bool,
}

impl State {
    fn readable(&self) -> usize {
        if self.open { self.bytes.len() } else { self.due.min(self.bytes.len()) }
    }
}

impl Delayed {
    /// Both ends. What the first one writes arrives at the second, and nothing goes back.
    pub(crate) fn pair() -> (Writes, Reads, Arc<Self>) {
        let way = Arc::new(Self::default());
        (Writes(Arc::clone(&way)), Reads(Arc::clone(&way)), way)
    }

    /// Has so many more bytes arrive.
    pub(crate) fn let_through(&self, bytes: usize) {
        let mut state = self.state.lock().unwrap();
        state.due = state.due.saturating_add(bytes).min(state.bytes.len());
        self.changed.notify_all();
    }

    /// Has all arrive at once while it is open.
    pub(crate) fn set_open(&self, open: bool) {
        self.state.lock().unwrap().open = open;
        self.changed.notify_all();
    }

    fn end(&self) {
        self.state.lock().unwrap().ended = true;
        self.changed.notify_all();
    }
}

/// The end that is written to.
#[derive(Debug)]
pub(crate) struct Writes(Arc<Delayed>);

/// The end that is read from.
#[derive(Debug)]
pub(crate) struct Reads(Arc<Delayed>);

impl Transport for Writes {
    fn is_encrypted(&self) -> bool {
        false
    }

    fn read(&self, _buf: &mut [u8]) -> io::Result<usize> {
        Ok(0)
    }

    fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        let mut state = self.0.state.lock().unwrap();
        if state.ended {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        state.bytes.extend(bytes);
        self.0.changed.notify_all();
        Ok(bytes.len())
    }

    fn wait(&self, _ready: Ready, _most: Duration) -> io::Result<bool> {
        Ok(true)
    }

    fn shutdown(&self) {
        self.0.end();
    }

    fn shutdown_write(&self) {
        self.0.end();
    }

    fn is_hung_up(&self) -> bool {
        self.0.state.lock().unwrap().ended
    }
}

impl Transport for Reads {
    fn is_encrypted(&self) -> bool {
        false
    }

    fn read(&self, buf: &mut [u8]) -> io::Result<usize> {
        let mut state = self.0.state.lock().unwrap();
        let count = state.readable().min(buf.len());
        if count == 0 && !buf.is_empty() {
            return if state.ended { Ok(0) } else { Err(io::ErrorKind::WouldBlock.into()) };
        }
        for (to, from) in buf.iter_mut().zip(state.bytes.drain(..count)) {
            *to = from;
        }
        state.due = state.due.saturating_sub(count);
        Ok(count)
    }

    fn write(&self, _bytes: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::BrokenPipe.into())
    }

    fn wait(&self, ready: Ready, most: Duration) -> io::Result<bool> {
        if ready == Ready::Write {
            return Ok(true);
        }
        let mut state = self.0.state.lock().unwrap();
        if state.readable() == 0 && !state.ended {
            state = self.0.changed.wait_timeout(state, most).unwrap().0;
        }
        Ok(state.readable() != 0 || state.ended)
    }

    fn shutdown(&self) {
        self.0.end();
    }

    fn shutdown_write(&self) {}

    fn is_hung_up(&self) -> bool {
        self.0.state.lock().unwrap().ended
    }
}
