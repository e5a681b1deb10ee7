//! Frames of Cloud Hypervisor's local migration, little-endian: a request of 16 bytes with its payload, and an
//! answer of 16 bytes.

use std::fs::File;
use std::io::{IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use rustix::io::{Errno, IoSlice};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// Bytes of a request, and of an answer.
pub const FRAME_LEN: usize = 16;

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Command {
    /// A guest is coming.
    Start = 1,
    /// Configuration and layout: JSON.
    Config = 2,
    /// State of devices and vCPUs: JSON.
    State = 3,
    /// Taken, and runs.
    Complete = 5,
    /// Stays with its sender.
    Abandon = 6,
    /// A descriptor of a mapping.
    MemoryFd = 7,
    /// Taken, and stays paused.
    CompletePaused = 8,
    /// A page.
    PageFault = 9,
}

impl Command {
    /// Those that hand a guest over, in their order; a guest that was paused has
    /// [`CompletePaused`](Self::CompletePaused) as its last.
    pub const ORDER: [Self; 5] =
        [Self::Start, Self::MemoryFd, Self::Config, Self::State, Self::Complete];

    /// Its number.
    pub fn number(self) -> u16 {
        self as u16
    }

    /// The command of a number.
    pub fn of(number: u16) -> Option<Self> {
        let all = [
            Self::Start,
            Self::Config,
            Self::State,
            Self::Complete,
            Self::Abandon,
            Self::MemoryFd,
            Self::CompletePaused,
            Self::PageFault,
        ];
        all.into_iter().find(|command| command.number() == number)
    }
}

/// A request's frame.
pub fn request(number: u16, length: u64) -> [u8; FRAME_LEN] {
    let mut bytes = [0; FRAME_LEN];
    bytes[..2].copy_from_slice(&number.to_le_bytes());
    bytes[8..].copy_from_slice(&length.to_le_bytes());
    bytes
}

/// An answer's frame: status 1 is Ok, 2 is Error.
pub fn answer(status: u16, length: u64) -> [u8; FRAME_LEN] {
    request(status, length)
}

/// Reads a request: its number and the length of its payload; `None` at the end of the connection.
pub fn read_request(stream: &mut UnixStream) -> Option<(u16, u64)> {
    let mut bytes = [0; FRAME_LEN];
    stream.read_exact(&mut bytes).ok()?;
    let number = u16::from_le_bytes([bytes[0], bytes[1]]);
    Some((number, u64::from_le_bytes(*bytes.last_chunk()?)))
}

/// Reads a payload, as far as it comes.
pub fn read_payload(stream: &mut UnixStream, length: u64) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    stream.take(length).read_to_end(&mut bytes).ok()?;
    (bytes.len() as u64 == length).then_some(bytes)
}

/// Reads an answer; whether it is Ok, `None` when none comes.
pub fn read_answer(stream: &mut UnixStream) -> Option<bool> {
    let mut bytes = [0; FRAME_LEN];
    stream.read_exact(&mut bytes).ok()?;
    Some(bytes == answer(1, 0))
}

/// Answers.
pub fn send_answer(stream: &mut UnixStream, ok: bool) {
    // One that has gone is noticed at its next request.
    let _ = stream.write_all(&answer(if ok { 1 } else { 2 }, 0));
}

/// Reads a slot, and the descriptor that came in the same message.
pub fn read_slot(stream: &UnixStream) -> Option<(u32, Option<File>)> {
    let mut bytes = [0; 4];
    let (mut at, mut file) = (0, None);
    while at < bytes.len() {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(&mut bytes[at..])];
        match recvmsg(stream, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Ok(message) if message.bytes == 0 => return None,
            Ok(message) => {
                for part in control.drain() {
                    if let RecvAncillaryMessage::ScmRights(mut descriptors) = part {
                        file = descriptors.next().map(File::from);
                    }
                }
                at += message.bytes;
            }
            Err(Errno::INTR) => {}
            Err(_) => return None,
        }
    }
    Some((u32::from_le_bytes(bytes), file))
}

/// Sends bytes and at most two descriptors in one message.
pub fn send_with_fds(stream: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(fds));
    }
    // A peer that has gone is noticed at the answer.
    let _ = sendmsg(stream.as_fd(), &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL);
}

/// Waits until a peer closes the connection, or says something.
pub fn wait_for_end(stream: &mut UnixStream) {
    // An error is its end, too.
    let _ = stream.read(&mut [0]);
}
