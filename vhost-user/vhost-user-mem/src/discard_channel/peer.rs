//! One client as the hub sees it.

use std::io::{self, ErrorKind};
use std::net::Shutdown;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use virtio_mem::discard_channel::wire::{Farewell, ServerMessage, Welcome};
use virtio_mem::discard_channel::{send, send_with_fd};
use vmstate::printable;

use super::admission::Admission;
use super::goodbye;
use crate::metrics::Metrics;
use crate::sys::peer_cred::PeerCred;

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
    /// Its process, where the kernel tells.
    cred: Option<PeerCred>,
    admission: Arc<Admission>,
    metrics: Arc<Metrics>,
    /// Also has one frame sent after the other.
    link: Mutex<Link>,
    changed: Condvar,
    /// Set within the link, so that a thread that has it need not look again; read anywhere, since a
    /// session that took the link for this would be in the way of the thread it has just woken.
    gone: AtomicBool,
}

#[derive(Default)]
struct Link {
    waiting: Option<Waiting>,
    /// For how long it has kept changes waiting; forgotten as time passes without a change.
    kept_waiting: Duration,
}

struct Waiting {
    event: u64,
    may_refuse: bool,
    since: Instant,
    reply: Option<Reply>,
}

impl Peer {
    pub(super) fn new(
        id: u64,
        stream: UnixStream,
        cred: Option<PeerCred>,
        admission: Arc<Admission>,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self {
            id,
            stream,
            cred,
            admission,
            metrics,
            link: Mutex::default(),
            changed: Condvar::new(),
            gone: AtomicBool::new(false),
        }
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
        if self.is_gone() {
            return false;
        }
        let sent = send(&self.stream, message);
        self.keep(&link, sent)
    }

    /// Sends an event, for which [`outcome`](Self::outcome) waits; false when the client is gone.
    pub(super) fn tell(&self, event: u64, message: &ServerMessage) -> bool {
        let mut link = self.link.lock();
        if self.is_gone() {
            return false;
        }
        let may_refuse = matches!(message, ServerMessage::Populate { .. });
        link.waiting = Some(Waiting { event, may_refuse, since: Instant::now(), reply: None });
        let sent = send(&self.stream, message);
        self.keep(&link, sent)
    }

    /// Waits for the reply to the event that was told; `None` when the client is gone, which it
    /// also is when it has not answered by the `deadline`.
    pub(super) fn outcome(&self, deadline: Instant) -> Option<Reply> {
        let mut link = self.link.lock();
        loop {
            if self.is_gone() {
                return None;
            }
            if let Some(reply) = link.waiting.as_mut()?.reply.take() {
                link.waiting = None;
                return Some(reply);
            }
            if Instant::now() >= deadline {
                let reason = "it did not answer in time".to_owned();
                self.drop_locked(&link, Farewell::Silent, reason);
                return None;
            }
            let _ = self.changed.wait_until(&mut link, deadline);
        }
    }

    /// For how long it has kept changes waiting.
    pub(super) fn kept_waiting(&self) -> Duration {
        self.link.lock().kept_waiting
    }

    /// Time has passed without a change.
    pub(super) fn forgive(&self, idle: Duration) {
        let mut link = self.link.lock();
        link.kept_waiting = link.kept_waiting.saturating_sub(idle);
    }

    /// Hands a reply over. The text of a refusal is made printable: it goes to the log and to other
    /// clients.
    ///
    /// # Errors
    ///
    /// When it is not the reply to what was told.
    pub(super) fn reply(&self, event: u64, reply: Reply) -> Result<(), String> {
        let reply = match reply {
            Reply::Ack => Reply::Ack,
            Reply::Refuse(reason) => Reply::Refuse(printable(&reason)),
        };
        let mut link = self.link.lock();
        let link = &mut *link;
        match &mut link.waiting {
            Some(waiting) if waiting.event == event && waiting.reply.is_none() => {
                if !waiting.may_refuse && reply != Reply::Ack {
                    return Err(format!("it refused event {event}, a discard"));
                }
                waiting.reply = Some(reply);
                link.kept_waiting = link.kept_waiting.saturating_add(waiting.since.elapsed());
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

    /// The connection has ended: no thread waits for the client any more.
    pub(super) fn leave(&self) {
        self.leave_locked(&self.link.lock());
    }

    fn leave_locked(&self, _link: &Link) {
        if !self.gone.swap(true, Ordering::AcqRel) {
            tracing::info!(client = self.id, "discard-channel client left");
        }
        self.changed.notify_all();
    }

    fn keep(&self, link: &Link, sent: io::Result<()>) -> bool {
        match sent {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                self.drop_locked(link, Farewell::Silent, "it does not read".to_owned());
            }
            // It has closed its end, which is no fault.
            Err(_) => self.leave_locked(link),
        }
        !self.is_gone()
    }

    fn drop_locked(&self, _link: &Link, cause: Farewell, reason: String) {
        if self.gone.swap(true, Ordering::AcqRel) {
            return;
        }
        if let (Farewell::Silent | Farewell::Protocol, Some(cred)) = (cause, self.cred) {
            self.admission.dropped(cred, Instant::now());
        }
        self.metrics.discard_client_dropped();
        let (pid, uid) = self.cred.map(|cred| (cred.pid, cred.uid)).unzip();
        tracing::warn!(client = self.id, pid, uid, reason, "dropped a discard-channel client");
        let _ = send(&self.stream, &goodbye(cause, reason));
        // Ends the session's read, and with it the freeze.
        let _ = self.stream.shutdown(Shutdown::Both);
        self.changed.notify_all();
    }
}
