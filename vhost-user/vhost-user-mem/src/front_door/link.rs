//! The two sockets of a connection, and whole messages over them.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use super::error::RelayError;
use super::message::{FDS_MAX, HEADER_SIZE, Header, Message};
use crate::sys::lost_memory;

/// One end of the relay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    /// The front-end.
    Front,
    /// The vhost-user crate that serves the device.
    Crate,
}

/// Why nothing more can be read or written.
#[derive(Debug)]
pub(super) enum Stop {
    /// A side closed its end between two messages.
    Closed(Side),
    /// Nothing came in time.
    Late,
    /// Something went wrong.
    Failed(RelayError),
}

impl From<RelayError> for Stop {
    fn from(error: RelayError) -> Self {
        Self::Failed(error)
    }
}

/// The front-end's socket and the crate's. Every wait watches both, so that the end of one is
/// never missed while the other is silent; and the front-end's memory, which may go at any time.
#[derive(Debug)]
pub(super) struct Link {
    front: UnixStream,
    crate_side: UnixStream,
}

impl Link {
    pub(super) fn new(front: UnixStream, crate_side: UnixStream) -> Self {
        Self { front, crate_side }
    }

    fn stream(&self, side: Side) -> &UnixStream {
        match side {
            Side::Front => &self.front,
            Side::Crate => &self.crate_side,
        }
    }

    /// Ends both connections, for holders of a duplicate too.
    pub(super) fn shutdown(&self) {
        for stream in [&self.front, &self.crate_side] {
            // Fails only when the other end was faster.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Reads one message, however it was cut into writes.
    pub(super) fn receive(&self, side: Side) -> Result<Message, Stop> {
        self.receive_until(side, None)
    }

    /// The same, but for no longer than `until`.
    pub(super) fn receive_until(
        &self,
        side: Side,
        until: Option<Instant>,
    ) -> Result<Message, Stop> {
        let mut bytes = [0; HEADER_SIZE];
        let mut fds = Vec::new();
        self.fill(side, &mut bytes, &mut fds, true, until)?;
        let header = Header::parse(&bytes)?;
        let mut body = vec![0; header.size as usize];
        self.fill(side, &mut body, &mut fds, false, until)?;
        Ok(Message { header, body, fds })
    }

    /// Reads exactly `buffer`: a byte more would take the descriptors of the next message.
    fn fill(
        &self,
        side: Side,
        buffer: &mut [u8],
        fds: &mut Vec<OwnedFd>,
        between_messages: bool,
        until: Option<Instant>,
    ) -> Result<(), Stop> {
        let mut done = 0;
        while done < buffer.len() {
            match receive_some(self.stream(side).as_fd(), &mut buffer[done..], fds) {
                Ok(0) | Err(Stop::Closed(_)) if between_messages && done == 0 => {
                    return Err(Stop::Closed(side));
                }
                Ok(0) | Err(Stop::Closed(_)) => return Err(RelayError::Truncated.into()),
                Ok(count) => done += count,
                Err(Stop::Failed(RelayError::Io { source, .. }))
                    if source.kind() == std::io::ErrorKind::WouldBlock =>
                {
                    self.wait(side, PollFlags::IN, until)?;
                }
                Err(stop) => return Err(stop),
            }
        }
        Ok(())
    }

    /// Sends one message; its descriptors go with the first bytes.
    pub(super) fn send(
        &self,
        side: Side,
        header: Header,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), Stop> {
        let mut bytes = header.to_bytes().to_vec();
        bytes.extend_from_slice(body);
        let mut done = 0;
        while done < bytes.len() {
            let attached = if done == 0 { fds } else { &[] };
            match send_some(self.stream(side).as_fd(), &bytes[done..], attached) {
                Ok(count) => done += count,
                Err(Errno::AGAIN) => self.wait(side, PollFlags::OUT, None)?,
                Err(Errno::INTR) => {}
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(Stop::Closed(side)),
                Err(error) => return Err(RelayError::io("cannot send a message", error).into()),
            }
        }
        Ok(())
    }

    /// Waits until `side` is ready, or until the other side has gone.
    fn wait(&self, side: Side, what: PollFlags, until: Option<Instant>) -> Result<(), Stop> {
        // While the front-end is expected to speak, the crate has nothing to say. The other way
        // round, the front-end may well have sent its next request, or closed its sending half
        // after the last one and still wait for the answer.
        let (other, watched) = match side {
            Side::Front if what == PollFlags::IN => (Side::Crate, PollFlags::IN),
            Side::Front => (Side::Crate, PollFlags::empty()),
            Side::Crate => (Side::Front, PollFlags::empty()),
        };
        let gone = PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL;
        loop {
            // Without a descriptor for losses, one of the sockets again: a wait for nothing.
            let lost = lost_memory::lost();
            let lost_events = if lost.is_some() { PollFlags::IN } else { PollFlags::empty() };
            let lost = lost.unwrap_or(self.stream(side).as_fd());
            let mut polled = [
                PollFd::new(self.stream(side), what),
                PollFd::new(self.stream(other), watched),
                PollFd::from_borrowed_fd(lost, lost_events),
            ];
            // A duration that is none of the kernel's is long enough to be none at all.
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            let timeout = left.and_then(|left| Timespec::try_from(left).ok());
            match poll(&mut polled, timeout.as_ref()) {
                Ok(0) if left.is_some_and(|left| left.is_zero()) => return Err(Stop::Late),
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(error) => {
                    return Err(RelayError::io("cannot wait for a message", error).into());
                }
            }
            if polled[2].revents().contains(PollFlags::IN) {
                return Err(RelayError::MemoryLost.into());
            }
            let (ready, elsewhere) = (polled[0].revents(), polled[1].revents());
            // The crate may have answered and closed at once: its answer comes first.
            if side == Side::Crate && ready.intersects(what | gone) {
                return Ok(());
            }
            if elsewhere.intersects(gone) {
                return Err(Stop::Closed(other));
            }
            if elsewhere.intersects(PollFlags::IN) {
                return Err(self.unexpected(other));
            }
            if ready.intersects(what | gone) {
                return Ok(());
            }
        }
    }

    /// Whether `side` has closed its end for good.
    pub(super) fn has_gone(&self, side: Side) -> bool {
        let mut polled = [PollFd::new(self.stream(side), PollFlags::empty())];
        let gone = PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL;
        poll(&mut polled, Some(&Timespec::default())).is_ok()
            && polled[0].revents().intersects(gone)
    }

    /// What it means that `side` is readable although nothing was asked of it.
    fn unexpected(&self, side: Side) -> Stop {
        match receive_some(self.stream(side).as_fd(), &mut [0], &mut Vec::new()) {
            Ok(0) | Err(Stop::Closed(_)) => Stop::Closed(side),
            Ok(_) => RelayError::Unsolicited.into(),
            Err(stop) => stop,
        }
    }
}

/// Receives at most `buffer`, without waiting.
fn receive_some(
    socket: BorrowedFd<'_>,
    buffer: &mut [u8],
    fds: &mut Vec<OwnedFd>,
) -> Result<usize, Stop> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let received = loop {
        match recvmsg(socket, &mut [IoSliceMut::new(buffer)], &mut control, flags) {
            Ok(received) => break received,
            Err(Errno::INTR) => {}
            // What a peer leaves behind that closes with unread bytes.
            Err(Errno::CONNRESET) => return Ok(0),
            Err(error) => return Err(RelayError::io("cannot receive a message", error).into()),
        }
    };
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    let truncated = received.flags.contains(ReturnFlags::CTRUNC);
    if truncated && fds.len() < FDS_MAX {
        return Err(RelayError::NoDescriptors.into());
    }
    if truncated || fds.len() > FDS_MAX {
        return Err(RelayError::TooManyFds.into());
    }
    Ok(received.bytes)
}

/// Sends at most `bytes`, without waiting and without a signal when the peer has gone.
pub(super) fn send_some(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    fds: &[BorrowedFd<'_>],
) -> Result<usize, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(Errno::TOOMANYREFS);
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags)
}
