//! One client as the hub sees it.

use std::net::Shutdown;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use virtio_mem::ram_discard::channel::wire::{Farewell, ServerMessage, Welcome};
use virtio_mem::ram_discard::channel::{send, send_with_fd};

use super::{PATIENCE, goodbye};
use crate::metrics::Metrics;

/// What a client answers to an event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Reply {
    /// It has dealt with it.
    Ack,
    /// It does not want the populate, with the reason.
    Refuse(String),
}

/// A client that is told, waited for, and dropped when it is not worth that.
pub(super) struct Peer {
    id: u64,
    stream: UnixStream,
    metrics: Arc<Metrics>,
    /// Also has one frame sent after the other.
    link: Mutex<Link>,
    changed: Condvar,
    /// Set within the link, so that who has it need not look again; read anywhere, since a session
    /// that took the link for this would be in the way of whom it has just woken.
    gone: AtomicBool,
}

struct Link {
    waiting: Option<Waiting>,
    patience: Patience,
}

struct Waiting {
    event: u64,
    may_refuse: bool,
    deadline: Instant,
    reply: Option<Reply>,
}

impl Peer {
    pub(super) fn new(id: u64, stream: UnixStream, metrics: Arc<Metrics>) -> Self {
        let patience = Patience::new(PATIENCE, Instant::now());
        let link = Mutex::new(Link { waiting: None, patience });
        Self { id, stream, metrics, link, changed: Condvar::new(), gone: AtomicBool::new(false) }
    }

    pub(super) fn id(&self) -> u64 {
        self.id
    }

    pub(super) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    pub(super) fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }

    /// Sends the first message, with the bitmap.
    pub(super) fn welcome(&self, welcome: Welcome, bitmap: BorrowedFd<'_>) -> bool {
        let link = self.link.lock();
        let sent = send_with_fd(&self.stream, &ServerMessage::Welcome(welcome), bitmap);
        self.keep(&link, sent)
    }

    /// Sends an answer; false when the client is gone.
    pub(super) fn answer(&self, message: &ServerMessage) -> bool {
        let link = self.link.lock();
        let sent = send(&self.stream, message);
        self.keep(&link, sent)
    }

    /// Sends an event, for which [`outcome`](Self::outcome) waits; false when the client is gone.
    pub(super) fn tell(&self, event: u64, message: &ServerMessage) -> bool {
        let mut link = self.link.lock();
        if self.is_gone() {
            return false;
        }
        let deadline = link.patience.begin(Instant::now());
        let may_refuse = matches!(message, ServerMessage::Populate { .. });
        link.waiting = Some(Waiting { event, may_refuse, deadline, reply: None });
        let sent = send(&self.stream, message);
        self.keep(&link, sent)
    }

    /// Waits for the reply to the event that was told; `None` when the client is gone, which it
    /// also is after it let its patience run out.
    pub(super) fn outcome(&self) -> Option<Reply> {
        let mut link = self.link.lock();
        loop {
            if self.is_gone() {
                return None;
            }
            let waiting = link.waiting.as_mut()?;
            if let Some(reply) = waiting.reply.take() {
                link.waiting = None;
                return Some(reply);
            }
            let deadline = waiting.deadline;
            if Instant::now() >= deadline {
                let reason = "it did not answer in time".to_owned();
                self.drop_locked(&link, Farewell::Silent, reason);
                return None;
            }
            let _ = self.changed.wait_until(&mut link, deadline);
        }
    }

    /// Hands a reply over.
    ///
    /// # Errors
    ///
    /// When it is not the reply to what was told.
    pub(super) fn reply(&self, event: u64, reply: Reply) -> Result<(), String> {
        let mut link = self.link.lock();
        let link = &mut *link;
        match &mut link.waiting {
            Some(waiting) if waiting.event == event && waiting.reply.is_none() => {
                if !waiting.may_refuse && reply != Reply::Ack {
                    return Err(format!("it refused event {event}, a discard"));
                }
                waiting.reply = Some(reply);
                link.patience.end(Instant::now());
                self.changed.notify_all();
                Ok(())
            }
            _ => Err(format!("it answered event {event}, which is not open")),
        }
    }

    /// Ends the connection for a fault of the client.
    pub(super) fn drop_for(&self, cause: Farewell, reason: String) {
        self.drop_locked(&self.link.lock(), cause, reason);
    }

    /// Nobody waits for the client any more, whose connection has ended.
    pub(super) fn leave(&self) {
        let _link = self.link.lock();
        if !self.gone.swap(true, Ordering::AcqRel) {
            tracing::info!(client = self.id, "discard-channel client left");
        }
        self.changed.notify_all();
    }

    fn keep(&self, link: &Link, sent: std::io::Result<()>) -> bool {
        if let Err(error) = sent {
            self.drop_locked(link, Farewell::Silent, format!("it does not read: {error}"));
        }
        !self.is_gone()
    }

    fn drop_locked(&self, _link: &Link, cause: Farewell, reason: String) {
        if self.gone.swap(true, Ordering::AcqRel) {
            return;
        }
        self.metrics.discard_client_dropped();
        tracing::warn!(client = self.id, reason, "dropped a discard-channel client");
        let _ = send(&self.stream, &goodbye(cause, reason));
        // Ends the session's read, and with it the freeze.
        let _ = self.stream.shutdown(Shutdown::Both);
        self.changed.notify_all();
    }
}

/// What is left of the time that a client may keep the guest waiting. It is used up while somebody
/// waits and regained as fast while nobody does, up to the bound.
#[derive(Debug)]
struct Patience {
    bound: Duration,
    left: Duration,
    /// Since when nobody, or somebody, waits.
    since: Instant,
}

impl Patience {
    fn new(bound: Duration, now: Instant) -> Self {
        Self { bound, left: bound, since: now }
    }

    /// Somebody waits from now on; gives back until when.
    fn begin(&mut self, now: Instant) -> Instant {
        let idle = now.saturating_duration_since(self.since);
        self.left = self.left.saturating_add(idle).min(self.bound);
        self.since = now;
        now + self.left
    }

    /// Nobody waits any more.
    fn end(&mut self, now: Instant) {
        self.left = self.left.saturating_sub(now.saturating_duration_since(self.since));
        self.since = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_slow_answers_add_up_to_the_bound_and_idle_time_gives_it_back() {
        let ms = Duration::from_millis;
        let start = Instant::now();
        let mut patience = Patience::new(ms(1000), start);
        assert_eq!(patience.begin(start + ms(5000)), start + ms(6000), "never more than the bound");
        patience.end(start + ms(5700));
        assert_eq!(patience.begin(start + ms(5700)), start + ms(6000), "300 ms are left");
        patience.end(start + ms(5900));
        assert_eq!(patience.begin(start + ms(6400)), start + ms(7000), "100 ms and 500 ms idle");
        patience.end(start + ms(9000));
        assert_eq!(patience.begin(start + ms(9000)), start + ms(9000));
    }
}
