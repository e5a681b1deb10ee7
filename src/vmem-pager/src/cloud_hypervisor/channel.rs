//! A connection to a Cloud Hypervisor: frames and descriptors, each with a bound on how long it may take.

use std::fs::File;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, IoSlice};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recv, recvmsg, send, sendmsg,
};

use super::protocol::{Answer, Command, FRAME_LEN, RANGE_LEN, Request, SLOT_LEN};
use crate::error::PagerError;
use crate::run::{POLL, Run};
use crate::sys::unread;

/// Bytes read at a time, so that a claimed length alone allocates nothing.
const PIECE: usize = 64 << 10;

/// What a peer did where something was waited for.
#[derive(Debug)]
pub enum Lost {
    /// It has closed the connection, between two messages.
    Closed,
    /// It has closed the connection amid a message.
    Cut,
    /// It neither sent nor read what it had to within the bound.
    Silent(Duration),
    /// It sent what is not of the protocol, which this says.
    Invalid(String),
    /// The run has ended.
    Ended(PagerError),
    /// The system failed.
    System(Errno),
}

impl Lost {
    /// As an error; `who` is the peer, as "the source", `what` what was waited for, as "its State".
    pub fn explain(self, who: &str, what: &str) -> PagerError {
        match self {
            Self::Closed | Self::Cut => {
                PagerError::Peer(format!("{who} closed the connection; {what} was waited for"))
            }
            Self::Silent(after) => PagerError::TimedOut {
                what: format!("{who} is silent; {what} was waited for"),
                after,
            },
            Self::Invalid(what) => PagerError::Protocol(format!("{who}: {what}")),
            Self::Ended(error) => error,
            Self::System(errno) => {
                PagerError::Peer(format!("the connection to {who} failed: {errno}"))
            }
        }
    }
}

/// What a peer has read of what was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reading {
    /// All of it.
    All,
    /// Not all, and it still may.
    Outstanding,
    /// Not all, and it has closed the connection.
    Closed,
}

/// A connection.
#[derive(Debug)]
pub struct Peer {
    fd: OwnedFd,
}

impl AsFd for Peer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Peer {
    /// Over a connected stream socket.
    ///
    /// # Errors
    ///
    /// When the system does not set it up.
    pub fn new(fd: OwnedFd) -> Result<Self, PagerError> {
        rustix::io::ioctl_fionbio(&fd, true)
            .map_err(|errno| PagerError::system("set up a connection")(errno.into()))?;
        Ok(Self { fd })
    }

    /// Whether the peer has gone, as far as can be seen without reading.
    pub fn is_closed(&self) -> bool {
        let mut byte = [0u8; 1];
        match recv(&self.fd, &mut byte[..], RecvFlags::PEEK | RecvFlags::DONTWAIT) {
            Ok((0, _)) => true,
            Ok(_) | Err(Errno::AGAIN | Errno::INTR) => false,
            Err(_) => true,
        }
    }

    /// Whether the peer has read all that was sent.
    pub fn reading(&self) -> Reading {
        // What is unread when the peer closes counts as read from then on, but the kernel says so in an error, once. So
        // of a connection that is open the count before counts, and of one without an error that after.
        let none = || unread::bytes(&self.fd).is_ok_and(|unread| unread == 0);
        let before = none();
        let mut byte = [0u8; 1];
        match recv(&self.fd, &mut byte[..], RecvFlags::PEEK | RecvFlags::DONTWAIT) {
            Ok((0, _)) if none() => Reading::All,
            // Shut down, which is not closed.
            Ok((0, _)) => Reading::Outstanding,
            Ok(_) | Err(Errno::AGAIN | Errno::INTR) if before => Reading::All,
            Ok(_) | Err(Errno::AGAIN | Errno::INTR) => Reading::Outstanding,
            Err(_) => Reading::Closed,
        }
    }

    /// Waits until the socket has one of `flags`, no longer than to `deadline`, which is `bound` after
    /// the start of the wait.
    fn wait(&self, flags: PollFlags, run: &Run, wait: Wait) -> Result<(), Lost> {
        loop {
            run.check(wait.what).map_err(Lost::Ended)?;
            let left = match wait.deadline {
                Some((deadline, bound)) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Err(Lost::Silent(bound));
                    }
                    left.min(POLL)
                }
                None => POLL,
            };
            let wait = Timespec { tv_sec: 0, tv_nsec: left.subsec_nanos().into() };
            match poll(&mut [PollFd::new(&self.fd, flags)], Some(&wait)) {
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => return Ok(()),
                Err(errno) => return Err(Lost::System(errno)),
            }
        }
    }

    fn read_exact(&self, bytes: &mut [u8], run: &Run, wait: Wait) -> Result<(), Lost> {
        let mut at = 0;
        while at < bytes.len() {
            match recv(&self.fd, &mut bytes[at..], RecvFlags::DONTWAIT) {
                Ok((0, _)) | Err(Errno::CONNRESET | Errno::PIPE) => {
                    return Err(if at == 0 { Lost::Closed } else { Lost::Cut });
                }
                Ok((count, _)) => at += count,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.wait(PollFlags::IN, run, wait)?,
                Err(errno) => return Err(Lost::System(errno)),
            }
        }
        Ok(())
    }

    fn write_all(&self, bytes: &[u8], run: &Run, wait: Wait) -> Result<(), Lost> {
        self.write_from(bytes, &mut 0, run, wait)
    }

    /// Writes bytes from `at` on, which is where it came to, also when it fails.
    fn write_from(&self, bytes: &[u8], at: &mut usize, run: &Run, wait: Wait) -> Result<(), Lost> {
        while *at < bytes.len() {
            match send(&self.fd, &bytes[*at..], SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(count) => *at += count,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.wait(PollFlags::OUT, run, wait)?,
                Err(Errno::CONNRESET | Errno::PIPE) => return Err(Lost::Closed),
                Err(errno) => return Err(Lost::System(errno)),
            }
        }
        Ok(())
    }

    /// The next request, without its payload.
    ///
    /// # Errors
    ///
    /// See [`Lost`].
    pub fn request(&self, run: &Run, wait: Wait) -> Result<Request, Lost> {
        let mut bytes = [0; FRAME_LEN];
        self.read_exact(&mut bytes, run, wait)?;
        Request::decode(&bytes).map_err(Lost::Invalid)
    }

    /// The next request for a page, with its range; other requests without what follows them, after which nothing
    /// more can be read. Its first byte is waited for as `first` says, and the rest for `bound`.
    ///
    /// # Errors
    ///
    /// See [`Lost`].
    pub fn page_request(
        &self,
        run: &Run,
        first: Wait,
        bound: Duration,
    ) -> Result<(Request, [u8; RANGE_LEN]), Lost> {
        // It comes in one piece, once the one before was answered: waited for first, it is read by one call.
        self.wait(PollFlags::IN, run, first)?;
        let rest = Wait::within(bound, "the rest of a request for a page");
        let (mut bytes, mut at) = ([0; FRAME_LEN + RANGE_LEN], 0);
        while at < FRAME_LEN {
            match recv(&self.fd, &mut bytes[at..], RecvFlags::DONTWAIT) {
                Ok((0, _)) | Err(Errno::CONNRESET | Errno::PIPE) => {
                    return Err(if at == 0 { Lost::Closed } else { Lost::Cut });
                }
                Ok((count, _)) => at += count,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.wait(PollFlags::IN, run, rest)?,
                Err(errno) => return Err(Lost::System(errno)),
            }
        }
        let (frame, range) = bytes.split_first_chunk_mut().expect("it begins with a frame");
        let request = Request::decode(frame).map_err(Lost::Invalid)?;
        if request.command == Command::PageFault {
            self.read_exact(&mut range[at - FRAME_LEN..], run, rest)?;
        }
        Ok((request, *range.first_chunk().expect("and has a range")))
    }

    /// A payload of `len` bytes, which the caller has limited.
    ///
    /// # Errors
    ///
    /// See [`Lost`].
    pub fn payload(&self, len: u64, run: &Run, wait: Wait) -> Result<Vec<u8>, Lost> {
        let mut bytes = Vec::new();
        while (bytes.len() as u64) < len {
            let from = bytes.len();
            let count = (len - from as u64).min(PIECE as u64) as usize;
            bytes.resize(from + count, 0);
            self.read_exact(&mut bytes[from..], run, wait)?;
        }
        Ok(bytes)
    }

    /// The payload of a MemoryFd: the slot, and the descriptor if exactly one came with it.
    ///
    /// # Errors
    ///
    /// See [`Lost`].
    pub fn slot(&self, run: &Run, wait: Wait) -> Result<(u32, Option<File>), Lost> {
        let mut bytes = [0; SLOT_LEN];
        let mut found = Vec::new();
        let mut at = 0;
        while at < SLOT_LEN {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut parts = [IoSliceMut::new(&mut bytes[at..])];
            let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
            match recvmsg(&self.fd, &mut parts, &mut control, flags) {
                Ok(message) => {
                    for part in control.drain() {
                        if let RecvAncillaryMessage::ScmRights(descriptors) = part {
                            found.extend(descriptors);
                        }
                    }
                    if message.bytes == 0 {
                        return Err(Lost::Closed);
                    }
                    // More than one came, and the kernel has closed the rest.
                    if message.flags.contains(ReturnFlags::CTRUNC) {
                        found.clear();
                    }
                    at += message.bytes;
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.wait(PollFlags::IN, run, wait)?,
                Err(Errno::CONNRESET | Errno::PIPE) => return Err(Lost::Closed),
                Err(errno) => return Err(Lost::System(errno)),
            }
        }
        let single = if found.len() == 1 { found.pop() } else { None };
        Ok((u32::from_le_bytes(bytes), single.map(File::from)))
    }

    /// Answers a request.
    ///
    /// # Errors
    ///
    /// See [`Lost`].
    pub fn answer(&self, answer: Answer, run: &Run, wait: Wait) -> Result<(), Lost> {
        self.write_all(&answer.encode(), run, wait)
    }

    /// Sends a request with its payload, or what a send that broke off has left of them: `at` is how many bytes have
    /// gone.
    ///
    /// # Errors
    ///
    /// See [`Lost`].
    pub fn send(
        &self,
        request: Request,
        payload: &[u8],
        at: &mut usize,
        run: &Run,
        wait: Wait,
    ) -> Result<(), Lost> {
        if *at < FRAME_LEN {
            self.write_from(&request.encode(), at, run, wait)?;
        }
        let mut within = *at - FRAME_LEN;
        let sent = self.write_from(payload, &mut within, run, wait);
        *at = FRAME_LEN + within;
        sent
    }

    /// Whether the peer has sent something that was not read.
    pub fn has_sent(&self) -> bool {
        let mut byte = [0u8; 1];
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        matches!(recv(&self.fd, &mut byte[..], flags), Ok((1.., _)))
    }

    /// Sends bytes that are no frame.
    ///
    /// # Errors
    ///
    /// See [`Lost`].
    pub fn send_bytes(&self, bytes: &[u8], run: &Run, wait: Wait) -> Result<(), Lost> {
        self.write_all(bytes, run, wait)
    }

    /// Sends the payload of a MemoryFd, with the descriptor, in one message.
    ///
    /// # Errors
    ///
    /// See [`Lost`].
    pub fn send_slot(&self, slot: u32, file: &File, run: &Run, wait: Wait) -> Result<(), Lost> {
        let bytes = slot.to_le_bytes();
        let fds = [file.as_fd()];
        loop {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            control.push(SendAncillaryMessage::ScmRights(&fds));
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match sendmsg(&self.fd, &[IoSlice::new(&bytes)], &mut control, flags) {
                // The kernel takes so few bytes whole.
                Ok(SLOT_LEN) => return Ok(()),
                Ok(_) => return Err(Lost::System(Errno::MSGSIZE)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.wait(PollFlags::OUT, run, wait)?,
                Err(Errno::CONNRESET | Errno::PIPE) => return Err(Lost::Closed),
                Err(errno) => return Err(Lost::System(errno)),
            }
        }
    }

    /// The peer's answer.
    ///
    /// # Errors
    ///
    /// See [`Lost`].
    pub fn read_answer(&self, run: &Run, wait: Wait) -> Result<Answer, Lost> {
        let mut bytes = [0; FRAME_LEN];
        self.read_exact(&mut bytes, run, wait)?;
        Answer::decode(&bytes).map_err(Lost::Invalid)
    }
}

/// How long something may take, and what it is.
#[derive(Clone, Copy, Debug)]
pub struct Wait<'a> {
    what: &'a str,
    deadline: Option<(Instant, Duration)>,
}

impl<'a> Wait<'a> {
    /// No longer than `bound` from now; `what` is what is waited for.
    pub fn within(bound: Duration, what: &'a str) -> Self {
        Self { what, deadline: Some((Instant::now() + bound, bound)) }
    }

    /// As long as the run lasts.
    pub fn for_the_run(what: &'a str) -> Self {
        Self { what, deadline: None }
    }
}
