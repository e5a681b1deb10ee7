//! vhost-user messages, as far as one who only passes them on must know them.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// Requests that matter to the relay.
pub mod request {
    #![allow(missing_docs)]
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_LOG_BASE: u32 = 6;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const SET_BACKEND_REQ_FD: u32 = 21;
    pub const GET_CONFIG: u32 = 24;
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
}

const HEADER: usize = 12;
const MAX_FDS: usize = 8;
const MAX_PAYLOAD: usize = 4096;
const VERSION: u32 = 1;
const NEED_REPLY: u32 = 1 << 3;

/// One message with its descriptors.
#[derive(Debug)]
pub struct Message {
    /// What it is.
    pub request: u32,
    flags: u32,
    /// Its content.
    pub payload: Vec<u8>,
    /// Its descriptors.
    pub fds: Vec<OwnedFd>,
}

impl Message {
    /// A message without descriptors that no one answers.
    pub fn new(request: u32, payload: Vec<u8>) -> Self {
        Self { request, flags: VERSION, payload, fds: Vec::new() }
    }

    /// Whether the other side answers.
    pub fn wants_reply(&self) -> bool {
        use request::*;
        let always = [
            GET_FEATURES,
            SET_LOG_BASE,
            GET_VRING_BASE,
            GET_PROTOCOL_FEATURES,
            GET_QUEUE_NUM,
            GET_CONFIG,
            GET_MAX_MEM_SLOTS,
        ];
        always.contains(&self.request) || self.flags & NEED_REPLY != 0
    }

    /// The `index`th 64-bit number of the payload.
    pub fn number(&self, index: usize) -> Option<u64> {
        let bytes = self.payload.get(index * 8..index * 8 + 8)?;
        Some(u64::from_le_bytes(bytes.try_into().ok()?))
    }

    /// Reads one message.
    pub fn receive(stream: &mut UnixStream) -> io::Result<Self> {
        let mut header = [0; HEADER];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::WAITALL;
        let got = recvmsg(&*stream, &mut [IoSliceMut::new(&mut header)], &mut control, flags)?;
        if got.bytes < HEADER {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut fds = Vec::new();
        for part in control.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = part {
                fds.extend(received);
            }
        }
        let word = |at: usize| {
            u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
        };
        let size = usize::try_from(word(8)).unwrap_or(usize::MAX);
        if size > MAX_PAYLOAD {
            return Err(io::Error::other(format!("a vhost-user message of {size} bytes")));
        }
        let mut payload = vec![0; size];
        stream.read_exact(&mut payload)?;
        Ok(Self { request: word(0), flags: word(4), payload, fds })
    }

    /// Writes it.
    pub fn send(&self, stream: &mut UnixStream) -> io::Result<()> {
        let size = u32::try_from(self.payload.len()).map_err(io::Error::other)?;
        let mut bytes: Vec<u8> =
            [self.request, self.flags, size].into_iter().flat_map(u32::to_le_bytes).collect();
        bytes.extend_from_slice(&self.payload);
        let fds: Vec<_> = self.fds.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&fds)) {
            return Err(io::Error::other("too many descriptors in one message"));
        }
        let slice = [IoSlice::new(&bytes)];
        let sent = sendmsg(&*stream, &slice, &mut control, SendFlags::NOSIGNAL)?;
        stream.write_all(&bytes[sent..])
    }
}
