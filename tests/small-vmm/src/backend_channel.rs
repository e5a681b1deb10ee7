//! The channel on which the back-end sends messages of its own: the front-end's end of it, in a
//! thread.
//!
//! A back-end must cope with any front-end here: one that acknowledges at once, one that first asks
//! for the configuration on the main connection, one that never answers, one that goes away.
//! [`Behaviour`] chooses.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::config::MemConfig;
use crate::connection::{Connection, Error, Message};
use crate::frontend::Frontend;
use crate::protocol::{BACKEND_CONFIG_CHANGE_MSG, FLAG_NEED_REPLY, FLAG_REPLY};

/// What is done with a message that wants to be acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Behaviour {
    /// Acknowledge it.
    AckAtOnce,
    /// Read the configuration on the main connection, then acknowledge it.
    AckAfterGetConfig,
    /// Leave it without an answer.
    NeverAck,
    /// Close the channel when the first message comes.
    Close,
}

#[derive(Debug, Default)]
struct Seen {
    config_changes: usize,
    other: Vec<u32>,
    last_config: Option<MemConfig>,
    closed: bool,
}

#[derive(Debug, Default)]
struct Shared {
    seen: Mutex<Seen>,
    changed: Condvar,
}

impl Shared {
    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The receiving end of the channel. Dropping it closes the channel.
#[derive(Debug)]
pub struct BackendChannel {
    shared: Arc<Shared>,
    behaviour: Behaviour,
    receiver: Mutex<Receiver>,
}

#[derive(Debug)]
struct Receiver {
    ours: Arc<Connection>,
    thread: JoinHandle<()>,
}

impl BackendChannel {
    /// Makes a socket pair, hands one end to the back-end and listens on the other.
    pub fn open(frontend: &Frontend, behaviour: Behaviour) -> Result<Self, Error> {
        let shared = Arc::new(Shared::default());
        let receiver = Mutex::new(listen(frontend, behaviour, &shared)?);
        Ok(Self { shared, behaviour, receiver })
    }

    /// Opens the channel anew, on a new connection of the front-end. Changes go on to be counted,
    /// the reconnection as one.
    pub fn reopen(&self, frontend: &Frontend) -> Result<(), Error> {
        let mut receiver = self.receiver();
        receiver.ours.shutdown();
        // The old thread may still be about to say that the channel is closed.
        while !receiver.thread.is_finished() {
            thread::sleep(Duration::from_millis(1));
        }
        let mut seen = self.shared.seen();
        seen.closed = false;
        seen.config_changes += 1;
        drop(seen);
        *receiver = listen(frontend, self.behaviour, &self.shared)?;
        self.shared.changed.notify_all();
        Ok(())
    }

    fn receiver(&self) -> MutexGuard<'_, Receiver> {
        self.receiver.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many configuration changes were announced so far.
    pub fn config_changes(&self) -> usize {
        self.shared.seen().config_changes
    }

    /// Numbers of the messages that were something else.
    pub fn other_messages(&self) -> Vec<u32> {
        self.shared.seen().other.clone()
    }

    /// The configuration read for the last message, with [`Behaviour::AckAfterGetConfig`].
    pub fn last_config(&self) -> Option<MemConfig> {
        self.shared.seen().last_config
    }

    /// Whether the channel has ended, from either side.
    pub fn is_closed(&self) -> bool {
        self.shared.seen().closed
    }

    /// Waits until more than `seen` changes were announced; says whether that came true in time.
    pub fn wait_beyond(&self, seen: usize, timeout: Duration) -> bool {
        let done = |state: &mut Seen| state.config_changes <= seen && !state.closed;
        let waited = self.shared.changed.wait_timeout_while(self.shared.seen(), timeout, done);
        waited.unwrap_or_else(PoisonError::into_inner).0.config_changes > seen
    }

    /// Closes the channel from this side.
    pub fn close(&self) {
        self.receiver().ours.shutdown();
    }
}

impl Drop for BackendChannel {
    fn drop(&mut self) {
        self.close();
        // Its end is waited for, so that the front-end's connection is not held any longer.
        while !self.receiver().thread.is_finished() {
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Makes a socket pair, hands one end to the back-end and listens on the other.
fn listen(
    frontend: &Frontend,
    behaviour: Behaviour,
    shared: &Arc<Shared>,
) -> Result<Receiver, Error> {
    let (ours, theirs) = UnixStream::pair()?;
    frontend.set_backend_req_fd(theirs.as_fd())?;
    drop(theirs);
    let mut ours = Connection::from_stream(ours);
    // Silence is normal here; the thread ends when the channel is closed.
    ours.set_timeout(Duration::from_secs(3600));
    let ours = Arc::new(ours);
    let (shared, channel, frontend) = (shared.clone(), ours.clone(), frontend.clone());
    let thread = thread::spawn(move || {
        // Whatever ends it, those who wait have to know.
        let _ = receive(&shared, &channel, &frontend, behaviour);
        channel.shutdown();
        shared.seen().closed = true;
        shared.changed.notify_all();
    });
    Ok(Receiver { ours, thread })
}

fn receive(
    shared: &Shared,
    ours: &Connection,
    frontend: &Frontend,
    behaviour: Behaviour,
) -> Result<(), Error> {
    loop {
        let message = ours.recv()?;
        let config = match behaviour {
            Behaviour::AckAfterGetConfig => Some(frontend.config()?),
            _ => None,
        };
        {
            let mut seen = shared.seen();
            match message.request {
                BACKEND_CONFIG_CHANGE_MSG => seen.config_changes += 1,
                other => seen.other.push(other),
            }
            seen.last_config = config.or(seen.last_config);
            shared.changed.notify_all();
        }
        match behaviour {
            Behaviour::AckAtOnce | Behaviour::AckAfterGetConfig => acknowledge(ours, &message)?,
            Behaviour::NeverAck => {}
            Behaviour::Close => return Ok(()),
        }
    }
}

fn acknowledge(ours: &Connection, message: &Message) -> Result<(), Error> {
    if message.flags & FLAG_NEED_REPLY == 0 {
        return Ok(());
    }
    ours.send(message.request, FLAG_REPLY, &0u64.to_le_bytes(), &[])
}
