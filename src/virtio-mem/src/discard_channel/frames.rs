//! Frames over a Unix stream.

use std::io::{self, IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use thiserror::Error;

use super::wire::{FRAME_MAX, Message, MessageError, decode};

/// Why no message came.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ReceiveError {
    /// The other side has closed the connection.
    #[error("the other side has closed the connection")]
    Closed,
    /// There was none in time.
    #[error("no answer in time")]
    TimedOut,
    /// The connection failed.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// What came is no message.
    #[error(transparent)]
    Wire(#[from] MessageError),
}

/// Cuts what comes from a stream into messages; holds at most one frame and what came with it.
#[derive(Debug)]
pub struct FrameReader {
    buffer: [u8; 2 * FRAME_MAX],
    filled: usize,
}

impl Default for FrameReader {
    fn default() -> Self {
        Self { buffer: [0; 2 * FRAME_MAX], filled: 0 }
    }
}

impl FrameReader {
    /// Waits for the next message. Descriptors that come with it are closed.
    ///
    /// # Errors
    ///
    /// When there will be none. After that nothing can be read any more.
    pub fn next<M: Message>(&mut self, stream: &UnixStream) -> Result<M, ReceiveError> {
        loop {
            if let Some(message) = self.take()? {
                return Ok(message);
            }
            let mut stream = stream;
            match stream.read(&mut self.buffer[self.filled..]) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => self.fill(other?)?,
            }
        }
    }

    /// As [`next`](Self::next), until `deadline`, with the descriptor that came with it. Leaves the
    /// stream without a timeout.
    ///
    /// # Errors
    ///
    /// As [`next`](Self::next), and when the message is not there in full in time.
    pub fn next_with_fd<M: Message>(
        &mut self,
        stream: &UnixStream,
        deadline: Instant,
    ) -> Result<(M, Option<OwnedFd>), ReceiveError> {
        let mut fd = None;
        loop {
            if let Some(message) = self.take()? {
                stream.set_read_timeout(None)?;
                return Ok((message, fd));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ReceiveError::TimedOut);
            }
            stream.set_read_timeout(Some(left))?;
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut data = [IoSliceMut::new(&mut self.buffer[self.filled..])];
            let read = match recvmsg(stream, &mut data, &mut control, RecvFlags::CMSG_CLOEXEC) {
                Err(Errno::INTR | Errno::AGAIN) => continue,
                other => other.map_err(io::Error::from)?.bytes,
            };
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(rights) = message {
                    fd = fd.or(rights.last());
                }
            }
            self.fill(read)?;
        }
    }

    fn take<M: Message>(&mut self) -> Result<Option<M>, MessageError> {
        let Some((message, len)) = decode(&self.buffer[..self.filled])? else { return Ok(None) };
        self.buffer.copy_within(len..self.filled, 0);
        self.filled -= len;
        Ok(Some(message))
    }

    fn fill(&mut self, read: usize) -> Result<(), ReceiveError> {
        self.filled += read;
        if read == 0 { Err(ReceiveError::Closed) } else { Ok(()) }
    }
}

/// Sends a message, without waiting: the socket has room for thousands, so one that has none for
/// another has a peer that does not read.
///
/// # Errors
///
/// When there is no room, or the other end is closed. The stream is of no use then.
pub fn send(stream: &UnixStream, message: &impl Message) -> io::Result<()> {
    send_frame(stream, message, &[])
}

/// As [`send`], with a descriptor.
///
/// # Errors
///
/// As [`send`].
pub fn send_with_fd(
    stream: &UnixStream,
    message: &impl Message,
    fd: BorrowedFd<'_>,
) -> io::Result<()> {
    send_frame(stream, message, &[fd])
}

fn send_frame(
    stream: &UnixStream,
    message: &impl Message,
    fds: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let frame = message.to_frame();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    let sent = loop {
        match sendmsg(stream, &[IoSlice::new(&frame)], &mut control, flags) {
            Err(Errno::INTR) => {}
            other => break other?,
        }
    };
    if sent == frame.len() { Ok(()) } else { Err(io::ErrorKind::WouldBlock.into()) }
}
