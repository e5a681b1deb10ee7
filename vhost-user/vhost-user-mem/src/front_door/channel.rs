//! One channel to the front-end for configuration changes, and the acknowledgements on it.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use tracing::{debug, warn};

use super::link::send_some;
use super::message::{HEADER_SIZE, Header, u64_at};

const CONFIG_CHANGE_MSG: u32 = 2;
/// An acknowledgement: a header and a 64-bit number.
const ACK_SIZE: usize = HEADER_SIZE + 8;
/// How long a front-end may take to acknowledge before it is no longer asked to.
const ACK_TIMEOUT: Duration = Duration::from_secs(1);

/// What became of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sent {
    /// It is in the socket.
    Whole,
    /// There was no room.
    Full,
    /// There is no front-end to send it to.
    Closed,
}

/// A socket of SET_BACKEND_REQ_FD. No method of it waits.
#[derive(Debug)]
pub(super) struct Channel {
    /// Shared with the poll of the sending thread, so that its number cannot be reused meanwhile.
    socket: Arc<OwnedFd>,
    ask: bool,
    /// Until when the acknowledgement of the last message is waited for.
    deadline: Option<Instant>,
    answer: Vec<u8>,
    /// A message was sent, and the front-end has not said that it took it.
    unconfirmed: bool,
}

impl Channel {
    pub(super) fn new(socket: OwnedFd, reply_ack: bool) -> Self {
        Self {
            socket: Arc::new(socket),
            ask: reply_ack,
            deadline: None,
            answer: Vec::new(),
            unconfirmed: false,
        }
    }

    pub(super) fn socket(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.socket)
    }

    /// Whether a message may have been lost in the channel: it was not acknowledged, or the
    /// front-end does not acknowledge any.
    pub(super) fn may_have_lost(&self) -> bool {
        self.unconfirmed
    }

    /// When the wait for an acknowledgement ends, if there is one.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Sends one message.
    pub(super) fn send(&mut self, now: Instant) -> Sent {
        let mut header = Header::request(CONFIG_CHANGE_MSG, 0);
        if self.ask {
            header = header.asking();
        }
        match send_some(self.socket.as_fd(), &header.to_bytes(), &[]) {
            Ok(HEADER_SIZE) => {
                self.unconfirmed = true;
                self.deadline = self.ask.then(|| now + ACK_TIMEOUT);
                Sent::Whole
            }
            Ok(count) => {
                warn!(count, "only a part of a configuration change could be sent");
                Sent::Closed
            }
            Err(Errno::AGAIN | Errno::INTR) => Sent::Full,
            Err(error) => {
                debug!(%error, "the front-end's configuration channel is closed");
                Sent::Closed
            }
        }
    }

    /// Takes what the front-end sent, and ends an overdue wait. False when it closed its end.
    pub(super) fn read(&mut self, now: Instant) -> bool {
        let mut bytes = [0; 256];
        // Late answers must not fill the socket, so that they are read even when unwanted; once
        // only, so that a front-end that never stops writing cannot keep the caller here.
        match recv(&*self.socket, &mut bytes[..], RecvFlags::DONTWAIT) {
            Ok((0, _)) => return false,
            Ok((count, _)) => self.take(&bytes[..count]),
            Err(Errno::INTR | Errno::AGAIN) => {}
            Err(_) => return false,
        }
        if self.deadline.is_some_and(|deadline| deadline <= now) {
            self.stop_asking("it does not acknowledge them");
        }
        true
    }

    fn take(&mut self, bytes: &[u8]) {
        if self.deadline.is_none() {
            return;
        }
        self.answer.extend_from_slice(bytes);
        if self.answer.len() < ACK_SIZE {
            return;
        }
        let header: [u8; HEADER_SIZE] = std::array::from_fn(|i| self.answer[i]);
        let wanted = Header::reply(CONFIG_CHANGE_MSG, 8);
        if Header::parse(&header).is_ok_and(|header| header == wanted) {
            if u64_at(&self.answer, HEADER_SIZE) != 0 {
                debug!("the front-end could not handle a configuration change");
            }
            self.deadline = None;
            self.unconfirmed = false;
        } else {
            self.stop_asking("its acknowledgement is malformed");
        }
        self.answer.clear();
    }

    fn stop_asking(&mut self, why: &str) {
        warn!("the front-end gets configuration changes without being asked to answer: {why}");
        self.ask = false;
        self.deadline = None;
        self.answer.clear();
    }
}
