//! The sender of VHOST_USER_BACKEND_CONFIG_CHANGE_MSG.
//!
//! The vhost crate has no way to send this message. A thread of its own does, because a front-end
//! may read the configuration over the main connection before it acknowledges the message:
//! the thread that serves that connection must never wait here.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use tracing::{debug, warn};

use super::channel::{Channel, Sent};
use crate::confinement;

/// A full socket is tried again at least this often, even if nothing says that it has room.
const RETRY: Duration = Duration::from_millis(100);

/// Tells the front-end that the configuration space has changed.
///
/// Several calls of [`notify`](Self::notify) may end in one message, but one is always sent after
/// the last call: what cannot be delivered now waits for a channel and for a running ring. A message
/// that was not acknowledged when its channel ended is sent again over the next one.
#[derive(Debug)]
pub struct Notifier {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Ends the thread's poll.
    wake: OwnedFd,
}

#[derive(Debug)]
struct State {
    pending: bool,
    suspended: bool,
    stopping: bool,
    channel: Option<Channel>,
}

impl Notifier {
    /// Starts the sending thread. There is no channel yet, and no ring runs.
    pub fn new() -> io::Result<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                pending: false,
                suspended: true,
                stopping: false,
                channel: None,
            }),
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        });
        let theirs = Arc::clone(&shared);
        let thread = Builder::new().name("config-change".into()).spawn(move || {
            sandbox::confine_thread(confinement::CONFIG_CHANGE);
            theirs.run();
        })?;
        Ok(Self { shared, thread: Mutex::new(Some(thread)) })
    }

    /// Says that the configuration has changed. Never waits.
    pub fn notify(&self) {
        let known = std::mem::replace(&mut self.shared.state.lock().pending, true);
        if !known {
            self.shared.wake();
        }
    }

    /// Sends over `socket` from now on, instead of any earlier one. With `reply_ack`, the
    /// front-end is asked to acknowledge.
    pub fn attach(&self, socket: OwnedFd, reply_ack: bool) {
        let mut state = self.shared.state.lock();
        state.close();
        state.channel = Some(Channel::new(socket, reply_ack));
        drop(state);
        self.shared.wake();
    }

    /// Closes the channel; what is pending stays so, and what was not acknowledged is again.
    pub fn detach(&self) {
        self.shared.state.lock().close();
        self.shared.wake();
    }

    /// Nothing is sent once this has returned, until [`resume`](Self::resume).
    pub fn suspend(&self) {
        // Messages are sent under the lock, without waiting: holding it once is enough.
        self.shared.state.lock().suspended = true;
    }

    /// Sends again, beginning with what is pending.
    pub fn resume(&self) {
        self.shared.state.lock().suspended = false;
        self.shared.wake();
    }

    /// Ends the thread, whatever the front-end does.
    pub fn shutdown(&self) {
        self.shared.state.lock().stopping = true;
        self.shared.wake();
        let thread = self.thread.lock().take();
        if thread.is_some_and(|thread| thread.join().is_err()) {
            warn!("the sender of configuration changes panicked");
        }
    }
}

impl Drop for Notifier {
    fn drop(&mut self) {
        self.shutdown();
    }
}

/// What the thread waits for.
enum Wait {
    Stop,
    For { readable: Option<Arc<OwnedFd>>, writable: bool, until: Option<Instant> },
}

impl Shared {
    fn wake(&self) {
        // Only a counter that is full already could refuse, and then the thread wakes anyway.
        let _ = rustix::io::write(&self.wake, &1u64.to_le_bytes());
    }

    fn run(&self) {
        loop {
            let Wait::For { readable, writable, until } = self.state.lock().step(Instant::now())
            else {
                return;
            };
            self.wait(readable.as_deref(), writable, until);
        }
    }

    fn wait(&self, channel: Option<&OwnedFd>, writable: bool, until: Option<Instant>) {
        let mut polled = vec![PollFd::new(&self.wake, PollFlags::IN)];
        if let Some(channel) = channel {
            let mut events = PollFlags::IN;
            events.set(PollFlags::OUT, writable);
            polled.push(PollFd::from_borrowed_fd(channel.as_fd(), events));
        }
        let timeout = until.map(|until| {
            // A millisecond more, so that the time has really passed on return.
            let left = until.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
            Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) }
        });
        match poll(&mut polled, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => {
                warn!(%error, "cannot wait for the front-end's configuration channel");
                std::thread::sleep(RETRY);
            }
        }
        let mut count = [0; 8];
        // Nothing to read when something else ended the poll.
        let _ = rustix::io::read(&self.wake, &mut count);
    }
}

impl State {
    /// Closes the channel. A message in it may never have been read.
    fn close(&mut self) {
        let channel = self.channel.take();
        self.pending |= channel.is_some_and(|channel| channel.may_have_lost());
    }

    /// Reads and sends what can be read and sent at once.
    fn step(&mut self, now: Instant) -> Wait {
        if self.stopping {
            return Wait::Stop;
        }
        let idle = Wait::For { readable: None, writable: false, until: None };
        let Some(channel) = &mut self.channel else {
            return idle;
        };
        if !channel.read(now) {
            debug!("the front-end closed the configuration channel");
            self.close();
            return idle;
        }
        let mut until = channel.deadline();
        let mut writable = false;
        if self.pending && !self.suspended && until.is_none() {
            match channel.send(now) {
                Sent::Whole => {
                    self.pending = false;
                    until = channel.deadline();
                }
                Sent::Full => {
                    writable = true;
                    until = Some(now + RETRY);
                }
                Sent::Closed => {
                    self.close();
                    return idle;
                }
            }
        }
        Wait::For { readable: Some(channel.socket()), writable, until }
    }
}
