//! The discard channel: tells VMMs in other processes what is populated and discarded.
//!
//! `spec-notes/discard-channel.md` draws the wire and says who waits for whom; the client is
//! [`RemoteRamDiscardManager`](virtio_mem::ram_discard::channel::RemoteRamDiscardManager).
//!
//! - `hub`: the device's listener, which tells all clients and keeps the shared bitmap.
//! - `peer`: one client as the hub sees it: told, waited for, dropped.
//! - `session`: the threads of one connection, from the first message to the thaw at its end.

mod hub;
mod peer;
mod session;

use std::collections::HashMap;
use std::io;
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use virtio_mem::controller::MemController;
use virtio_mem::ram_discard::channel::send;
use virtio_mem::ram_discard::channel::wire::{Farewell, ServerMessage, VERSION};

use crate::listener::{self, SocketFile};
use crate::metrics::Metrics;
use hub::Hub;
use session::Session;

/// Connections at a time, with those that have not yet said what they are; one more is told that
/// there are too many.
pub const CLIENTS_MAX: usize = 16;

/// For how long a client may keep the guest waiting. It regains what it used as time passes in
/// which nobody waits for it, so that many events in a row cannot add up to more.
pub const PATIENCE: Duration = Duration::from_secs(1);

/// From the start of a connection to the end of its first message.
const HANDSHAKE: Duration = Duration::from_secs(5);

/// After an error of accept that is not the client's, such as no descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// The discard channel on its socket. Dropping it shuts it down.
pub struct DiscardChannel {
    shared: Arc<Shared>,
    state: Mutex<State>,
}

struct Shared {
    controller: Arc<MemController>,
    hub: Arc<Hub>,
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
        let (listener, file) = listener::bind(path)?;
        let hub = Hub::listen(&controller, metrics)?;
        let shared = Arc::new(Shared { controller, hub, connections: Mutex::default() });
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
        let thread = thread::Builder::new()
            .name("discard-channel".to_owned())
            .spawn(move || shared.serve(&listener, &woken))?;
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
            match listener.accept().and_then(|(stream, _)| self.welcome(stream)) {
                Ok(thread) => threads.extend(thread),
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a discard-channel client");
                    thread::sleep(ACCEPT_PAUSE);
                }
            }
        }
        for thread in threads {
            let _ = thread.join();
        }
    }

    /// Starts the thread of a connection, or turns it away.
    fn welcome(self: &Arc<Self>, stream: UnixStream) -> io::Result<Option<JoinHandle<()>>> {
        let id = {
            let mut connections = self.connections.lock();
            if connections.ended {
                return Ok(None);
            }
            if connections.streams.len() >= CLIENTS_MAX {
                let reason = format!("{CLIENTS_MAX} clients are connected already");
                let _ = send(&stream, &goodbye(Farewell::TooMany, reason));
                tracing::warn!("turned a discard-channel client away: there are too many");
                return Ok(None);
            }
            connections.last_id += 1;
            let id = connections.last_id;
            connections.streams.insert(id, stream.try_clone()?);
            id
        };
        let shared = Arc::clone(self);
        let spawned = thread::Builder::new().name(format!("discard-{id}")).spawn(move || {
            Session { id, controller: &shared.controller, hub: &shared.hub }.run(stream);
            shared.connections.lock().streams.remove(&id);
        });
        if spawned.is_err() {
            self.connections.lock().streams.remove(&id);
        }
        spawned.map(Some)
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
    ServerMessage::Goodbye { cause, min_version: VERSION, max_version: VERSION, reason }
}

#[cfg(test)]
mod tests;
