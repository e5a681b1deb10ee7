//! Where front-ends come from, and what ends the wait for them.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context;
use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketType, sockopt};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};
use tokio::signal::unix::{SignalKind, signal};

use crate::connection::Connections;
use crate::listener::{self, SocketFile};

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
    /// Listens at `path`. A socket left there by a killed daemon is replaced; one that somebody
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
        // A duplicate, since nothing tells that nobody else in this process uses the number.
        let myself = pidfd_open(getpid(), PidfdFlags::empty())?;
        let fd: OwnedFd = match pidfd_getfd(myself, fd, PidfdGetfdFlags::empty()) {
            Err(Errno::BADF) => return refuse("no such file descriptor"),
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

    /// The next front-end; `None` when there will be none.
    ///
    /// # Errors
    ///
    /// When the socket fails.
    pub fn next(&self, shutdown: &Shutdown) -> anyhow::Result<Option<UnixStream>> {
        match self {
            Self::Connected(stream) => Ok(stream.lock().take()),
            Self::Listening { listener, .. } => loop {
                if shutdown.requested.load(Ordering::Acquire) {
                    return Ok(None);
                }
                let mut fds = [
                    PollFd::new(listener, PollFlags::IN),
                    PollFd::from_borrowed_fd(shutdown.wake.as_fd(), PollFlags::IN),
                ];
                match poll(&mut fds, None) {
                    Ok(_) | Err(Errno::INTR) => {}
                    Err(errno) => return Err(errno).context("cannot wait for a front-end"),
                }
                if fds[0].revents().is_empty() {
                    continue;
                }
                match listener.accept() {
                    Ok((stream, _)) => {
                        stream.set_nonblocking(false)?;
                        return Ok(Some(stream));
                    }
                    Err(error) => {
                        // Gone again, or out of descriptors: neither is a reason to end.
                        tracing::warn!(%error, "cannot accept a front-end");
                        std::thread::sleep(Duration::from_millis(50));
                    }
                }
            },
        }
    }
}

/// Becomes readable when the daemon is to end.
pub struct Shutdown {
    wake: UnixStream,
    requested: Arc<AtomicBool>,
}

impl Shutdown {
    /// Ends the daemon on SIGTERM and SIGINT: the connection at once, everything within 2 s.
    ///
    /// # Errors
    ///
    /// When signals cannot be watched.
    pub fn on_signals(connections: Arc<Connections>) -> anyhow::Result<Self> {
        let (wake, waker) = UnixStream::pair()?;
        let requested = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&requested);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        // Registered before anything else starts, so that no signal finds the default action.
        let (mut term, mut int) = {
            let _inside = runtime.enter();
            (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?)
        };
        std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
            runtime.block_on(async {
                tokio::select! {
                    _ = term.recv() => {}
                    _ = int.recv() => {}
                }
            });
            flag.store(true, Ordering::Release);
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
            connections.remove_sockets();
            std::process::exit(0);
        })?;
        Ok(Self { wake, requested })
    }
}
