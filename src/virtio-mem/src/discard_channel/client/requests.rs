//! Requests of any thread, and their answers; also who knows whether there is a connection.

use std::collections::HashMap;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::OnceLock;
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use ram_discard::Unavailable;

use super::DeviceSizes;
use crate::discard_channel::send;
use crate::discard_channel::wire::ClientMessage;

/// What a server answers.
#[derive(Debug)]
pub(super) enum Answer {
    Done,
    Frozen { freeze: u64, event: u64, expiry: Duration },
    Failed(String),
    Sizes(DeviceSizes),
}

/// Requests that wait for their answers.
#[derive(Default)]
pub(super) struct Requests {
    inner: Mutex<Inner>,
    changed: Condvar,
    /// The thread that brings answers, and so cannot wait for one.
    reader: OnceLock<ThreadId>,
    /// One frame after the other.
    sending: Mutex<()>,
}

#[derive(Default)]
struct Inner {
    last_id: u64,
    waiting: HashMap<u64, Option<Answer>>,
    lost: Option<String>,
}

impl Inner {
    fn check(&self) -> Result<(), Unavailable> {
        match &self.lost {
            None => Ok(()),
            Some(reason) => Err(Unavailable(reason.clone())),
        }
    }
}

impl Requests {
    pub(super) fn set_reader(&self, reader: ThreadId) {
        let _ = self.reader.set(reader);
    }

    pub(super) fn lost(&self) -> Option<String> {
        self.inner.lock().lost.clone()
    }

    /// Fails when the connection is lost.
    pub(super) fn check(&self) -> Result<(), Unavailable> {
        self.inner.lock().check()
    }

    /// Fails on the thread that brings answers.
    pub(super) fn check_thread(&self) -> Result<(), Unavailable> {
        if self.reader.get() == Some(&thread::current().id()) {
            return Err(Unavailable("a listener must not call back".to_owned()));
        }
        Ok(())
    }

    pub(super) fn send(&self, stream: &UnixStream, message: &ClientMessage) -> io::Result<()> {
        let _one_frame_at_a_time = self.sending.lock();
        send(stream, message)
    }

    /// The number of a new request.
    pub(super) fn begin(&self) -> Result<u64, Unavailable> {
        self.check_thread()?;
        let mut inner = self.inner.lock();
        inner.check()?;
        inner.last_id += 1;
        let id = inner.last_id;
        inner.waiting.insert(id, None);
        Ok(id)
    }

    /// Hands an answer over; false when no thread waits for it.
    pub(super) fn answer(&self, id: u64, answer: Answer) -> bool {
        let mut inner = self.inner.lock();
        let Some(slot @ None) = inner.waiting.get_mut(&id) else { return false };
        *slot = Some(answer);
        self.changed.notify_all();
        true
    }

    /// Waits for an answer; `None` when it does not come in time.
    pub(super) fn wait(&self, id: u64, timeout: Duration) -> Result<Option<Answer>, Unavailable> {
        let deadline = Instant::now() + timeout;
        let mut inner = self.inner.lock();
        loop {
            if let Some(slot @ Some(_)) = inner.waiting.get_mut(&id) {
                let answer = slot.take();
                inner.waiting.remove(&id);
                return Ok(answer);
            }
            inner.check()?;
            if Instant::now() >= deadline {
                return Ok(None);
            }
            let _ = self.changed.wait_until(&mut inner, deadline);
        }
    }

    /// Notes why the connection is lost, unless that is known, and wakes who waits.
    pub(super) fn lose(&self, reason: &str) -> Unavailable {
        let mut inner = self.inner.lock();
        let reason = inner.lost.get_or_insert_with(|| reason.to_owned()).clone();
        self.changed.notify_all();
        Unavailable(reason)
    }
}
