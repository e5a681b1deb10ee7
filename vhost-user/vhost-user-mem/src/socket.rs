//! Where front-ends come from, and what ends the wait for them.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use parking_lot::Mutex;
use program::listener::{self, SocketFile};
use program::signals::{SIGINT, SIGTERM, Signals};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketType, sockopt};
use smallvec::{SmallVec, smallvec};

use crate::confinement;
use crate::connection::Connections;
use crate::reserve::{PAUSE, RESERVE};
use crate::supervision::Supervision;
use crate::watchdog::Watchdog;
use program::inherited;

/// A signal ends the daemon within 2 s; what has not ended by itself until then is left.
const GRACE: Duration = Duration::from_millis(1500);

/// The source of front-ends.
pub enum FrontEnds {
    /// A listening socket; one that the daemon bound is removed at the end.
    Listening {
        /// Where they connect.
        listener: UnixListener,
        /// Removed with this value.
        _socket: Option<SocketFile>,
    },
    /// The one front-end that was there at the start.
    Connected(Mutex<Option<UnixStream>>),
}

impl FrontEnds {
    /// Listens at `path`. A socket left there by a killed daemon is replaced; one that a process
    /// serves is not, nor is anything that is no socket.
    ///
    /// # Errors
    ///
    /// When the path is in use or cannot be bound.
    pub fn bind(path: &Path) -> io::Result<Self> {
        let (listener, socket) = listener::bind(path)?;
        Ok(Self::Listening { listener, _socket: Some(socket) })
    }

    /// Takes over an inherited descriptor.
    ///
    /// # Errors
    ///
    /// When it is no Unix stream socket, or one that neither listens nor is connected.
    pub fn inherit(fd: i32) -> io::Result<Self> {
        let refuse = |rule| Err(io::Error::other(rule));
        // A duplicate, since other code in this process may use the number.
        let fd = match inherited::duplicate(fd) {
            Err(error) if error.raw_os_error() == Some(Errno::BADF.raw_os_error()) => {
                return refuse("no such file descriptor");
            }
            other => other?,
        };
        let is_unix = sockopt::socket_domain(&fd) == Ok(AddressFamily::UNIX);
        if !is_unix || sockopt::socket_type(&fd) != Ok(SocketType::STREAM) {
            return refuse("not a Unix stream socket");
        }
        if sockopt::socket_acceptconn(&fd)? {
            let listener = UnixListener::from(fd);
            // Between poll and accept, a front-end may go again.
            listener.set_nonblocking(true)?;
            return Ok(Self::Listening { listener, _socket: None });
        }
        let stream = UnixStream::from(fd);
        if stream.peer_addr().is_err() {
            return refuse("a socket that neither listens nor is connected");
        }
        Ok(Self::Connected(Mutex::new(Some(stream))))
    }

    /// Whether there can be another front-end.
    pub fn may_bring_more(&self) -> bool {
        matches!(self, Self::Listening { .. })
    }

    /// The next front-end; `None` when there will be none.
    ///
    /// # Errors
    ///
    /// When the socket fails.
    pub fn next(
        &self,
        shutdown: &Shutdown,
        watchdog: Option<&Watchdog>,
    ) -> anyhow::Result<Option<UnixStream>> {
        match self {
            Self::Connected(stream) => Ok(stream.lock().take()),
            Self::Listening { listener, .. } => loop {
                if shutdown.is_requested() {
                    return Ok(None);
                }
                let mut fds: SmallVec<[PollFd<'_>; 3]> = smallvec![
                    PollFd::new(listener, PollFlags::IN),
                    PollFd::from_borrowed_fd(shutdown.wake.as_fd(), PollFlags::IN),
                ];
                fds.extend(watchdog.map(|watchdog| PollFd::new(watchdog, PollFlags::IN)));
                match poll(&mut fds, None) {
                    Ok(_) | Err(Errno::INTR) => {}
                    Err(errno) => return Err(errno).context("cannot wait for a front-end"),
                }
                if let (Some(watchdog), Some(timer)) = (watchdog, fds.get(2))
                    && !timer.revents().is_empty()
                {
                    watchdog.tick();
                }
                if fds[0].revents().is_empty() {
                    continue;
                }
                match RESERVE.admit("front-end", || listener.accept()) {
                    Ok(Some((stream, _))) => {
                        stream.set_nonblocking(false)?;
                        return Ok(Some(stream));
                    }
                    Ok(None) => {}
                    Err(_) => std::thread::sleep(PAUSE),
                }
            },
        }
    }
}

/// Becomes readable when the daemon is to end.
pub struct Shutdown {
    wake: UnixStream,
    state: Arc<State>,
}

struct State {
    signals: Signals,
    /// Locked from before a signal is read until it is seen to, so that none is lost when the
    /// process is replaced.
    requested: Mutex<bool>,
    supervision: Supervision,
}

impl Shutdown {
    /// Ends the daemon on SIGTERM and SIGINT: the connection at once, everything within 2 s.
    ///
    /// # Errors
    ///
    /// When there is no thread to be had.
    pub fn on_signals(
        signals: Signals,
        connections: Arc<Connections>,
        supervision: Supervision,
    ) -> io::Result<Self> {
        let (wake, waker) = UnixStream::pair()?;
        let state = Arc::new(State { signals, requested: Mutex::new(false), supervision });
        let watched = Arc::clone(&state);
        std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
            sandbox::confine_thread(confinement::SIGNALS);
            watched.wait_for_end();
            watched.supervision.stopping();
            drop(waker);
            // Not on this thread, which may wait for nothing.
            let ending = Arc::clone(&connections);
            let _ = std::thread::Builder::new()
                .name("ending".to_owned())
                .spawn(move || ending.end())
                .inspect_err(|_| connections.end());
            std::thread::sleep(GRACE);
            // The state file is good at every instruction, so there is nothing to wait for, and
            // nothing is told: the log says "ended" when all of it did.
            listener::remove_all();
            std::process::exit(0);
        })?;
        Ok(Self { wake, state })
    }

    /// Whether the daemon is to end.
    pub fn is_requested(&self) -> bool {
        *self.state.requested.lock()
    }

    /// Does what cannot be undone, unless the daemon is to end. A signal that comes meanwhile
    /// waits.
    pub fn unless_requested<T>(&self, act: impl FnOnce() -> T) -> Option<T> {
        let requested = self.state.requested.lock();
        (!*requested).then(act)
    }
}

impl State {
    /// Returns when a signal has come that ends the daemon.
    fn wait_for_end(&self) {
        loop {
            // An error may only be an interruption; a signal that is there is read in any case.
            let _ = poll(&mut [PollFd::new(&self.signals, PollFlags::IN)], None);
            let mut requested = self.requested.lock();
            match self.signals.next() {
                Ok(Some(SIGTERM | SIGINT)) => {
                    *requested = true;
                    return;
                }
                Ok(Some(_)) => {
                    drop(requested);
                    self.supervision.reload(reload);
                }
                Ok(None) => {}
                Err(error) => {
                    tracing::error!(%error, "cannot read signals");
                    std::thread::sleep(GRACE);
                }
            }
        }
    }
}

/// SIGHUP. All that the daemon is told is on its command line, which stays.
fn reload() {
    tracing::info!("ignoring a signal: nothing is read anew");
}
