//! A vhost-user connection at the level of messages: bytes and file descriptors out, bytes and file
//! descriptors in.
//!
//! A message goes out in one `sendmsg`, as real front-ends send it; [`Connection::send_raw`] sends
//! whatever bytes a test likes, in whatever pieces.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use crate::protocol::{FLAG_REPLY, HEADER_SIZE, VERSION, header, read32, read64};

/// The most file descriptors that one message may carry.
pub const MAX_FDS: usize = 64;
/// A reply longer than this is taken for garbage.
const MAX_PAYLOAD: u32 = 1 << 20;

/// What can go wrong on a connection.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The other side closed the connection.
    #[error("the connection was closed")]
    Closed,
    /// Nothing came in time.
    #[error("no message within {0:?}")]
    Timeout(Duration),
    /// The socket failed otherwise.
    #[error("socket: {0}")]
    Io(#[source] io::Error),
    /// A message arrived that is not the one that was waited for.
    #[error("expected a reply to message {expected}, got message {got} with flags {flags:#x}")]
    Unexpected {
        /// Number of the message that was sent.
        expected: u32,
        /// Number of the message that came.
        got: u32,
        /// Flags of the message that came.
        flags: u32,
    },
    /// The size of a payload makes no sense.
    #[error("message {request} has {size} bytes of payload")]
    Size {
        /// Number of the message.
        request: u32,
        /// Its size field.
        size: u32,
    },
    /// A request was acknowledged with an error.
    #[error("message {request} was refused with {value:#x}")]
    Refused {
        /// Number of the message.
        request: u32,
        /// The value of the acknowledgement.
        value: u64,
    },
}

impl Error {
    /// Whether the other side is gone.
    pub fn is_closed(&self) -> bool {
        matches!(self, Error::Closed)
    }
}

impl From<io::Error> for Error {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::BrokenPipe
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::UnexpectedEof => Error::Closed,
            _ => Error::Io(error),
        }
    }
}

impl From<rustix::io::Errno> for Error {
    fn from(error: rustix::io::Errno) -> Self {
        io::Error::from(error).into()
    }
}

type Result<T> = std::result::Result<T, Error>;

/// A message as it came.
#[derive(Debug)]
pub struct Message {
    /// Number of the message.
    pub request: u32,
    /// Its flags.
    pub flags: u32,
    /// Everything after the header.
    pub payload: Vec<u8>,
    /// The file descriptors that came with it.
    pub fds: Vec<OwnedFd>,
}

impl Message {
    /// The payload as one 64-bit number.
    pub fn value(&self) -> u64 {
        read64(&self.payload, 0)
    }
}

/// One vhost-user connection.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    timeout: Duration,
}

impl Connection {
    /// Connects to a back-end, waiting for it to listen for as long as `patience`.
    pub fn connect(path: &Path, patience: Duration) -> Result<Self> {
        let start = Instant::now();
        loop {
            match UnixStream::connect(path) {
                Ok(stream) => return Ok(Self::from_stream(stream)),
                Err(error) if start.elapsed() > patience => return Err(Error::Io(error)),
                Err(_) => thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    /// Takes over a connected socket.
    pub fn from_stream(stream: UnixStream) -> Self {
        Self { stream, timeout: Duration::from_secs(5) }
    }

    /// How long [`Connection::recv`] waits; 5 s unless set.
    pub fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    /// Sends one message with the right size and version.
    pub fn send(
        &self,
        request: impl Into<u32>,
        flags: u32,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<()> {
        let mut bytes = header(request.into(), VERSION | flags, payload.len() as u32).to_vec();
        bytes.extend_from_slice(payload);
        self.send_raw(&bytes, fds)
    }

    /// Sends any bytes, the file descriptors with the first of them.
    pub fn send_raw(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut sent = 0;
        while sent < bytes.len() {
            let mut control = SendAncillaryBuffer::new(&mut space);
            if sent == 0 && !fds.is_empty() {
                assert!(
                    control.push(SendAncillaryMessage::ScmRights(fds)),
                    "more than {MAX_FDS} file descriptors"
                );
            }
            match sendmsg(
                &self.stream,
                &[IoSlice::new(&bytes[sent..])],
                &mut control,
                SendFlags::NOSIGNAL,
            ) {
                Ok(count) => sent += count,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Receives the next message.
    pub fn recv(&self) -> Result<Message> {
        let mut fds = Vec::new();
        let mut header = [0; HEADER_SIZE];
        self.recv_exact(&mut header, &mut fds)?;
        let (request, flags, size) = (read32(&header, 0), read32(&header, 4), read32(&header, 8));
        if size > MAX_PAYLOAD {
            return Err(Error::Size { request, size });
        }
        let mut payload = vec![0; size as usize];
        self.recv_exact(&mut payload, &mut fds)?;
        Ok(Message { request, flags, payload, fds })
    }

    /// Receives the reply to `request`; anything else is an error.
    pub fn recv_reply(&self, request: impl Into<u32>) -> Result<Message> {
        let expected = request.into();
        let message = self.recv()?;
        if message.request != expected || message.flags & FLAG_REPLY == 0 {
            return Err(Error::Unexpected { expected, got: message.request, flags: message.flags });
        }
        Ok(message)
    }

    /// Waits until the other side closes the connection, dropping what else comes.
    pub fn wait_closed(&self) -> Result<()> {
        let start = Instant::now();
        loop {
            match self.recv() {
                Err(Error::Closed) => return Ok(()),
                Err(error) => return Err(error),
                Ok(_) if start.elapsed() > self.timeout => {
                    return Err(Error::Timeout(self.timeout));
                }
                Ok(_) => {}
            }
        }
    }

    /// Closes both directions; a thread that waits in [`Connection::recv`] returns.
    pub fn shutdown(&self) {
        // Fails only when the other side was faster, which is what was wanted.
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
    }

    fn recv_exact(&self, buffer: &mut [u8], fds: &mut Vec<OwnedFd>) -> Result<()> {
        self.stream.set_read_timeout(Some(self.timeout))?;
        let mut filled = 0;
        while filled < buffer.len() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut rest = [IoSliceMut::new(&mut buffer[filled..])];
            let count = match recvmsg(
                self.stream.as_fd(),
                &mut rest,
                &mut control,
                RecvFlags::CMSG_CLOEXEC,
            ) {
                Ok(received) => received.bytes,
                Err(rustix::io::Errno::INTR) => continue,
                Err(rustix::io::Errno::AGAIN) => return Err(Error::Timeout(self.timeout)),
                Err(error) => return Err(error.into()),
            };
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(received) = message {
                    fds.extend(received);
                }
            }
            if count == 0 {
                return Err(Error::Closed);
            }
            filled += count;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::Request;

    #[test]
    fn message_arrives_with_its_payload_and_file_descriptors() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (ours, theirs) = (Connection::from_stream(ours), Connection::from_stream(theirs));
        let file = tempfile::tempfile().unwrap();
        ours.send(Request::SetMemTable, FLAG_REPLY, &[1, 2, 3], &[file.as_fd(), file.as_fd()])
            .unwrap();
        let message = theirs.recv_reply(Request::SetMemTable).unwrap();
        assert_eq!((message.payload.as_slice(), message.fds.len()), ([1, 2, 3].as_slice(), 2));
    }

    #[test]
    fn silence_is_a_timeout_and_a_closed_peer_is_not() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut ours = Connection::from_stream(ours);
        ours.set_timeout(Duration::from_millis(10));
        assert!(matches!(ours.recv(), Err(Error::Timeout(_))));
        drop(theirs);
        assert!(ours.recv().unwrap_err().is_closed());
        ours.wait_closed().unwrap();
    }
}
