//! What is known about one connection, and the exchange of its messages.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use tracing::{debug, trace, warn};

use super::dirty_log::DirtyLog;
use super::error::RelayError;
use super::eventfd;
use super::link::{Link, Side, Stop};
use super::memory_table::MemoryTable;
use super::message::{FrontendRequest, Header, Message, Reply, protocol};
use super::notifier::Notifier;
use super::quiesced::Quiesced;
use super::relay::ConnectionEvents;
use super::rings::Rings;

/// VHOST_F_LOG_ALL.
pub(super) const LOG_ALL: u64 = 1 << 26;
/// VHOST_USER_F_PROTOCOL_FEATURES.
pub(super) const PROTOCOL_FEATURES: u64 = 1 << 30;

/// How long the crate may take to answer what does not touch guest memory. It never takes long,
/// unless there was no descriptor left for one in the message: then it drops the header, takes the
/// body for the next one, and waits for more.
const ANSWER_MAX: Duration = Duration::from_secs(10);

/// The state of one connection.
pub(super) struct Session<'a> {
    pub(super) link: &'a Link,
    pub(super) events: &'a dyn ConnectionEvents,
    pub(super) notifier: &'a Notifier,
    pub(super) rings: Rings,
    pub(super) table: MemoryTable,
    pub(super) owned: bool,
    /// Features that the crate has in force.
    pub(super) features: u64,
    /// Whether the front-end ever acknowledged VHOST_USER_F_PROTOCOL_FEATURES.
    pub(super) enables_rings: bool,
    pub(super) protocol_offered: u64,
    pub(super) protocol_acked: u64,
    pub(super) log: Option<DirtyLog>,
    pub(super) log_all: bool,
    /// Between POSTCOPY_LISTEN and POSTCOPY_END.
    pub(super) listening: bool,
    /// Memory that the front-end sent while listening and has not confirmed: no request is served.
    pub(super) unconfirmed: Option<Quiesced<'a>>,
    /// The channel of a front-end that cannot be told about configuration changes.
    pub(super) mute_channel: Option<OwnedFd>,
}

impl<'a> Session<'a> {
    pub(super) fn new(
        link: &'a Link,
        events: &'a dyn ConnectionEvents,
        notifier: &'a Notifier,
    ) -> Self {
        Self {
            link,
            events,
            notifier,
            rings: Rings::default(),
            table: MemoryTable::default(),
            owned: false,
            features: 0,
            enables_rings: false,
            protocol_offered: 0,
            protocol_acked: 0,
            log: None,
            log_all: false,
            listening: false,
            unconfirmed: None,
            mute_channel: None,
        }
    }

    /// Serves the connection; says which side closed it.
    pub(super) fn serve(&mut self) -> Result<Side, RelayError> {
        let stop = match self.prepare() {
            Ok(()) => loop {
                if let Err(stop) = self.serve_one() {
                    break stop;
                }
            },
            Err(stop) => stop,
        };
        match stop {
            Stop::Closed(side) => Ok(side),
            Stop::Late => Err(RelayError::Truncated),
            Stop::Failed(error) => Err(error),
        }
    }

    /// What ends with the connection.
    pub(super) fn finish(&mut self) {
        self.set_log_all(false);
    }

    /// Lets the crate acknowledge every message. It does so when it was asked for its features
    /// and REPLY_ACK was negotiated, and never tells the device about either.
    fn prepare(&mut self) -> Result<(), Stop> {
        self.inject(FrontendRequest::GET_FEATURES, &[], &[])?;
        let reply = self.inject(FrontendRequest::GET_PROTOCOL_FEATURES, &[], &[])?;
        self.protocol_offered = reply.u64_at(0);
        let ack = 1u64 << protocol::REPLY_ACK;
        self.inject(FrontendRequest::SET_PROTOCOL_FEATURES, &ack.to_le_bytes(), &[])?;
        Ok(())
    }

    fn serve_one(&mut self) -> Result<(), Stop> {
        let message = self.link.receive(Side::Front)?;
        let header = message.header;
        if header.is_reply() {
            let reason = "it is marked as a reply".into();
            return Err(RelayError::Header { request: header.request, reason }.into());
        }
        let outcome = match FrontendRequest::try_from(header.request) {
            Ok(request) => {
                trace!(%request, size = header.size, fds = message.fds.len(), "request");
                self.check(request, &message)
                    .map_err(Stop::from)
                    .and_then(|()| self.handle(request, message))
            }
            Err(unknown) => Err(RelayError::Unknown(unknown).into()),
        };
        if let Err(Stop::Failed(error)) = &outcome {
            // The front-end learns what it can before the connection ends.
            debug!(%error, "the connection ends");
            if self.wants_ack(header) && expects_ack(header.request) {
                let _ = self.answer(header, &1u64.to_le_bytes(), &[]);
            }
        }
        outcome
    }

    /// Refuses what the crate would refuse without saying why, or would not notice.
    fn check(&self, request: FrontendRequest, message: &Message) -> Result<(), RelayError> {
        let shape = request.shape();
        if shape.reply == Reply::Unsupported {
            return Err(RelayError::Unsupported(request));
        }
        if let Some(feature) = shape.feature.filter(|&feature| !self.negotiated(feature)) {
            return Err(RelayError::NotNegotiated { request, feature });
        }
        let size = message.body.len();
        if !shape.sizes.iter().any(|&(min, max)| (min..=max).contains(&size)) {
            return Err(RelayError::Size { request, size });
        }
        let count = message.fds.len();
        if count < shape.fds.0 || count > shape.fds.1 {
            return Err(RelayError::Fds { request, count });
        }
        use FrontendRequest as R;
        if let R::SET_VRING_KICK | R::SET_VRING_CALL | R::SET_VRING_ERR = request {
            eventfd::check(request, &message.fds)?;
        }
        Ok(())
    }

    /// Passes a message on and waits until the crate has handled it. The reply is the crate's:
    /// an acknowledgement of success, or what the request is answered with.
    pub(super) fn forward(
        &self,
        request: FrontendRequest,
        message: Message,
    ) -> Result<Message, Stop> {
        let Message { header, body, fds } = message;
        let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        self.exchange(request, header, &body, &borrowed)
    }

    /// Sends a message of the relay's own to the crate.
    pub(super) fn inject(
        &self,
        request: FrontendRequest,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<Message, Stop> {
        self.exchange(request, Header::request(request as u32, body.len()), body, fds)
    }

    fn exchange(
        &self,
        request: FrontendRequest,
        header: Header,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<Message, Stop> {
        // The crate's end of the socket needs as many descriptors as the message has, and the device
        // as many again.
        let twice = fds.iter().chain(fds);
        let room: Result<Vec<_>, _> = twice.map(BorrowedFd::try_clone_to_owned).collect();
        if room.map(drop).is_err() {
            return Err(RelayError::NoDescriptors.into());
        }
        let until = self.is_bounded(request).then(|| Instant::now() + ANSWER_MAX);
        let reply = self
            .link
            .send(Side::Crate, header.asking(), body, fds)
            .and_then(|()| self.link.receive_until(Side::Crate, until))
            .map_err(|stop| match stop {
                Stop::Closed(Side::Crate) => RelayError::Closed(request).into(),
                Stop::Late => RelayError::Silent(request).into(),
                other => other,
            })?;
        if reply.header.request != header.request || !reply.header.is_reply() {
            let reason = format!("message {} instead of a reply", reply.header.request);
            return Err(RelayError::Answer { request, reason }.into());
        }
        if request.shape().reply == Reply::Asked {
            match reply.body.len() {
                8 if reply.u64_at(0) == 0 => {}
                8 => return Err(RelayError::Refused(request).into()),
                size => {
                    let reason = format!("{size} bytes instead of an acknowledgement");
                    return Err(RelayError::Answer { request, reason }.into());
                }
            }
        }
        Ok(reply)
    }

    /// Whether the answer of the crate has a bound. In postcopy, a ring may be held by a request
    /// that waits for a page.
    fn is_bounded(&self, request: FrontendRequest) -> bool {
        use FrontendRequest as R;
        let with_one = [R::SET_VRING_KICK, R::SET_VRING_CALL, R::SET_VRING_ERR];
        !self.listening && (with_one.contains(&request) || request == R::SET_DEVICE_STATE_FD)
    }

    /// Sends a reply to the front-end.
    pub(super) fn answer(
        &self,
        header: Header,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), Stop> {
        self.link.send(Side::Front, Header::reply(header.request, body.len()), body, fds)
    }

    /// Passes the crate's reply on.
    pub(super) fn answer_with(&self, header: Header, reply: &Message) -> Result<(), Stop> {
        let fds: Vec<_> = reply.fds.iter().map(AsFd::as_fd).collect();
        self.answer(header, &reply.body, &fds)
    }

    /// Acknowledges a request if the front-end asked for it.
    pub(super) fn acknowledge(&self, header: Header, status: u64) -> Result<(), Stop> {
        if self.wants_ack(header) {
            self.answer(header, &status.to_le_bytes(), &[])?;
        }
        Ok(())
    }

    pub(super) fn wants_ack(&self, header: Header) -> bool {
        header.needs_reply() && self.negotiated(protocol::REPLY_ACK)
    }

    pub(super) fn negotiated(&self, feature: u32) -> bool {
        self.protocol_acked & 1 << feature != 0
    }

    pub(super) fn set_log_all(&mut self, active: bool) {
        if std::mem::replace(&mut self.log_all, active) != active {
            self.events.log_all(active);
        }
    }

    /// Tells the device what the driver has done.
    pub(super) fn tell_driver(&self) {
        self.events.driver(self.features, self.rings.runs(0));
    }

    /// Lets the notifier speak or not, as the rings say.
    pub(super) fn follow_rings(&self) {
        self.tell_driver();
        if self.rings.suspended() {
            self.notifier.suspend();
        } else {
            self.notifier.resume();
            self.events.running();
        }
    }

    /// Gives the log to memory that was added after it. Only while quiesced, so that no write in
    /// between goes unmarked.
    pub(super) fn replay_log(&mut self, added_by: FrontendRequest) -> Result<(), Stop> {
        let Some(log) = &self.log else {
            return Ok(());
        };
        let outcome =
            self.inject(FrontendRequest::SET_LOG_BASE, &log.body, &[log.fd.as_fd()]).map(drop);
        match outcome {
            Err(Stop::Failed(RelayError::Closed(_))) => {
                warn!(request = %added_by, "the dirty log does not cover the memory that was added");
                Err(RelayError::Log(added_by).into())
            }
            Err(other) => Err(other),
            Ok(()) => {
                crate::sys::guest_memory::keep_out_of_core_dumps();
                if let Some(log) = &mut self.log {
                    log.stale = false;
                }
                Ok(())
            }
        }
    }
}

/// Whether a failure can be told by an acknowledgement: other requests have replies of their own.
fn expects_ack(request: u32) -> bool {
    FrontendRequest::try_from(request).is_ok_and(|request| request.shape().reply != Reply::Always)
        || FrontendRequest::try_from(request).is_err()
}
