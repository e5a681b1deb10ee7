//! The discard channel: tells VMMs in other processes what is populated and discarded.
//!
//! `spec-notes/discard-channel.md` draws the wire and says who waits for whom; the client is
//! [`RemoteRamDiscardManager`](virtio_mem::discard_channel::RemoteRamDiscardManager).
//!
//! - `admission`: which clients were dropped, and when they may come again.
//! - `budget`: for how long clients may keep the guest waiting.
//! - `hub`: the device's listener, which tells all clients and keeps the shared bitmap.
//! - `lease`: the freeze of a client, which ends unless it is renewed.
//! - `peer`: one client as the hub sees it: told, waited for, dropped.
//! - `session`: the threads of one connection, from the first message to the thaw at its end.

mod admission;
mod budget;
mod hub;
mod lease;
mod peer;
mod session;

use std::collections::HashMap;
use std::io;
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use program::listener::{self, SocketFile};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use virtio_mem::controller::MemController;
use virtio_mem::discard_channel::send;
use virtio_mem::discard_channel::wire::{Farewell, MIN_VERSION, ServerMessage, VERSION};

use crate::confinement;
use crate::metrics::Metrics;
use crate::reserve::{PAUSE, RESERVE};
use crate::sys::peer_cred::peer_cred;
use admission::Admission;
use hub::Hub;
use peer::Peer;
use session::Session;

/// Connections at a time, with those that have not yet said what they are; one more is told that
/// there are too many.
pub const CLIENTS_MAX: usize = 16;

/// How long things may take.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// For how long all clients together may keep a change waiting. It is regained as time passes in
    /// which no change is under way. The clients that used it up are dropped, and those that are left
    /// have half of it, then a quarter and so on: so no change waits for much more than twice as long.
    pub patience: Duration,
    /// From the start of a connection to the end of its first message.
    pub handshake: Duration,
    /// From the last renewal of a freeze of a client to its end, at least a millisecond.
    pub freeze_expiry: Duration,
    /// Before a process that had a client dropped for a fault may have another one; doubled each
    /// time. Zero for none.
    pub pause: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            patience: Duration::from_secs(1),
            handshake: Duration::from_secs(5),
            freeze_expiry: Duration::from_secs(30),
            pause: Duration::from_secs(1),
        }
    }
}

/// The discard channel on its socket. Dropping it shuts it down.
pub struct DiscardChannel {
    shared: Arc<Shared>,
    state: Mutex<State>,
}

struct Shared {
    controller: Arc<MemController>,
    hub: Arc<Hub>,
    limits: Limits,
    admission: Arc<Admission>,
    /// The streams of all connections, to end them.
    connections: Mutex<Connections>,
}

#[derive(Default)]
struct Connections {
    last_id: u64,
    streams: HashMap<u64, UnixStream>,
    ended: bool,
}

enum State {
    Bound(UnixListener, SocketFile),
    Running { thread: JoinHandle<()>, file: SocketFile, wake: UnixStream },
    Ended,
}

impl DiscardChannel {
    /// Binds the socket and listens to the device. A socket file left by a killed daemon is
    /// replaced. Clients that connect before [`start`](Self::start) are served once it runs.
    ///
    /// # Errors
    ///
    /// When the socket cannot be bound, or there is no memory for the bitmap.
    pub fn bind(
        path: &Path,
        controller: Arc<MemController>,
        metrics: Arc<Metrics>,
    ) -> io::Result<Self> {
        Self::bind_with(path, controller, metrics, Limits::default())
    }

    /// As [`bind`](Self::bind), with other limits.
    ///
    /// # Errors
    ///
    /// As [`bind`](Self::bind).
    pub fn bind_with(
        path: &Path,
        controller: Arc<MemController>,
        metrics: Arc<Metrics>,
        limits: Limits,
    ) -> io::Result<Self> {
        let (listener, file) = listener::bind(path)?;
        let hub = Hub::listen(&controller, metrics, limits.patience)?;
        let admission = Arc::new(Admission::new(limits.pause));
        let connections = Mutex::default();
        let shared = Arc::new(Shared { controller, hub, limits, admission, connections });
        Ok(Self { shared, state: Mutex::new(State::Bound(listener, file)) })
    }

    /// Serves the socket on threads of its own. Does nothing when that was done before.
    ///
    /// # Errors
    ///
    /// When there is no thread to be had; the socket is closed then.
    pub fn start(&self) -> io::Result<()> {
        let mut state = self.state.lock();
        let (listener, file) = match std::mem::replace(&mut *state, State::Ended) {
            State::Bound(listener, file) => (listener, file),
            other => {
                *state = other;
                return Ok(());
            }
        };
        let (wake, woken) = UnixStream::pair()?;
        let shared = Arc::clone(&self.shared);
        let thread =
            thread::Builder::new().name("discard-channel".to_owned()).spawn(move || {
                sandbox::confine_thread(confinement::DISCARD_CHANNEL);
                shared.serve(&listener, &woken);
            })?;
        *state = State::Running { thread, file, wake };
        Ok(())
    }

    /// Ends all connections, and with them their freezes, and removes the socket.
    pub fn shutdown(&self) {
        let state = std::mem::replace(&mut *self.state.lock(), State::Ended);
        self.shared.end();
        match state {
            State::Bound(listener, file) => drop((listener, file)),
            State::Running { thread, file, wake } => {
                drop((file, wake));
                let _ = thread.join();
            }
            State::Ended => {}
        }
    }
}

impl Drop for DiscardChannel {
    fn drop(&mut self) {
        self.shutdown();
    }
}

impl Shared {
    /// Accepts clients until `woken` is closed, and waits for their threads.
    fn serve(self: &Arc<Self>, listener: &UnixListener, woken: &UnixStream) {
        let mut threads: Vec<JoinHandle<()>> = Vec::new();
        loop {
            let mut fds = [PollFd::new(listener, PollFlags::IN), PollFd::new(woken, PollFlags::IN)];
            match poll(&mut fds, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => {
                    tracing::error!(%error, "cannot wait for discard-channel clients");
                    break;
                }
            }
            if !fds[1].revents().is_empty() {
                break;
            }
            threads.retain(|thread| !thread.is_finished());
            if fds[0].revents().is_empty() {
                continue;
            }
            match RESERVE.admit("discard-channel client", || listener.accept()) {
                Ok(Some((stream, _))) => match self.welcome(stream) {
                    Ok(thread) => threads.extend(thread),
                    Err(error) => tracing::warn!(%error, "cannot serve a discard-channel client"),
                },
                Ok(None) => {}
                Err(_) => thread::sleep(PAUSE),
            }
        }
        for thread in threads {
            let _ = thread.join();
        }
    }

    /// Starts the thread of a connection, or turns it away.
    fn welcome(self: &Arc<Self>, stream: UnixStream) -> io::Result<Option<JoinHandle<()>>> {
        let cred = peer_cred(&stream).ok();
        let pause = cred.and_then(|cred| self.admission.pause(cred, Instant::now()));
        if let Some(left) = pause {
            let reason = format!("a client like this was dropped; try again in {left:.1?}");
            self.turn_away(&stream, Farewell::Paused, reason);
            return Ok(None);
        }
        let id = {
            let mut connections = self.connections.lock();
            if connections.ended {
                return Ok(None);
            }
            if connections.streams.len() >= CLIENTS_MAX {
                let reason = format!("{CLIENTS_MAX} clients are connected already");
                self.turn_away(&stream, Farewell::TooMany, reason);
                return Ok(None);
            }
            connections.last_id += 1;
            let id = connections.last_id;
            connections.streams.insert(id, stream.try_clone()?);
            id
        };
        let shared = Arc::clone(self);
        let (admission, metrics) = (Arc::clone(&self.admission), Arc::clone(self.hub.metrics()));
        let peer = Arc::new(Peer::new(id, stream, cred, admission, metrics));
        let spawned = thread::Builder::new().name(format!("discard-{id}")).spawn(move || {
            let Shared { controller, hub, limits, .. } = &*shared;
            Session::new(controller, hub, *limits, peer).run();
            shared.connections.lock().streams.remove(&id);
        });
        if spawned.is_err() {
            self.connections.lock().streams.remove(&id);
        }
        spawned.map(Some)
    }

    /// Says why a client is not let in. It is counted but not logged: a client that tries again at
    /// once would fill the log.
    fn turn_away(&self, stream: &UnixStream, cause: Farewell, reason: String) {
        tracing::debug!(reason, "turned a discard-channel client away");
        self.hub.metrics().discard_client_turned_away();
        let _ = send(stream, &goodbye(cause, reason));
    }

    fn end(&self) {
        let mut connections = self.connections.lock();
        connections.ended = true;
        for stream in connections.streams.values() {
            let _ = send(stream, &goodbye(Farewell::Ending, "the daemon ends".to_owned()));
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

/// The last message of a connection.
fn goodbye(cause: Farewell, reason: String) -> ServerMessage {
    ServerMessage::Goodbye { cause, min_version: MIN_VERSION, max_version: VERSION, reason }
}

#[cfg(test)]
mod tests;
