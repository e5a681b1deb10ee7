//! The messages of the discard channel as bytes.
//!
//! All integers are little-endian. A frame is a header of 8 bytes, `kind` and `len` as u32, and
//! `len` bytes of payload. Each kind has one length, or a last field whose length is limited: a text,
//! or a list of sections. So a frame is at most [`FRAME_MAX`] bytes. What is not known, not of its length or not in its place
//! is an error.

mod client_message;
mod fields;
mod server_message;

use ram_discard::Section;
use smallvec::SmallVec;
use thiserror::Error;

use fields::Fields;

pub use client_message::ClientMessage;
pub use server_message::{Farewell, ServerMessage, Welcome};

use crate::device::GeometryError;

/// The first bytes of [`ClientMessage::Hello`] and [`ServerMessage::Welcome`].
pub const MAGIC: [u8; 8] = *b"VMEMDISC";

/// The newest version that is spoken. Version 1 told of one section at a time, and its freezes lasted as long
/// as their connection, without having to be renewed.
pub const VERSION: u16 = 3;

/// The oldest version that is spoken: version 3 without [`ClientMessage::Follow`] and [`ClientMessage::Serve`].
pub const MIN_VERSION: u16 = 2;

/// The first version with [`ClientMessage::Follow`] and [`ClientMessage::Serve`].
pub const VERSION_FOLLOW: u16 = 3;

/// Length of a frame's header, bytes.
pub const HEADER_LEN: usize = 8;

/// The most text that a message carries, bytes of UTF-8.
pub const TEXT_MAX: usize = 256;

/// The most sections that an event or [`ClientMessage::Follow`] carries.
pub const SECTIONS_MAX: usize = 255;

/// The longest frame, bytes.
pub const FRAME_MAX: usize = HEADER_LEN + 8 + SECTIONS_MAX * SECTION_LEN as usize;

/// The sections of an event, at least one and at most [`SECTIONS_MAX`], in the order in which
/// listeners are told; bytes from the start of the region.
pub type Sections = SmallVec<[Section; 1]>;

/// Why bytes are no message.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum MessageError {
    /// No message of this side has this number.
    #[error("unknown message {0:#x}")]
    UnknownKind(u32),
    /// The length is not one that the message can have.
    #[error("message {kind:#x} of {len} bytes")]
    Length {
        /// Number of the message.
        kind: u32,
        /// Length of the payload, bytes.
        len: u32,
    },
    /// The first bytes are not [`MAGIC`].
    #[error("not a discard channel: the magic is {0:02x?}")]
    Magic([u8; 8]),
    /// A field that must be 0 is not, or a flag or code has no meaning.
    #[error("field {field} of message {kind:#x} is {value:#x}")]
    Field {
        /// Number of the message.
        kind: u32,
        /// Its field.
        field: &'static str,
        /// What it is.
        value: u64,
    },
    /// A section without bytes, or one that wraps.
    #[error("message {kind:#x} names a section of {size:#x} bytes at {offset:#x}")]
    Section {
        /// Number of the message.
        kind: u32,
        /// Bytes from the start of the region.
        offset: u64,
        /// Bytes.
        size: u64,
    },
    /// The text is not UTF-8.
    #[error("the text of message {0:#x} is not UTF-8")]
    Text(u32),
    /// No device has this geometry.
    #[error("the device's geometry is impossible: {0}")]
    Geometry(#[from] GeometryError),
}

/// Lengths that the payload of a message can have, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lengths {
    /// The shortest.
    pub first: u32,
    /// The longest.
    pub last: u32,
    /// From one to the next.
    pub step: u32,
}

impl Lengths {
    fn one(len: u32) -> Self {
        Self { first: len, last: len, step: 1 }
    }

    fn with_text(fixed: u32) -> Self {
        Self { first: fixed, last: fixed + TEXT_MAX as u32, step: 1 }
    }

    fn with_sections(fixed: u32) -> Self {
        let last = fixed + SECTIONS_MAX as u32 * SECTION_LEN;
        Self { first: fixed + SECTION_LEN, last, step: SECTION_LEN }
    }

    fn contains(self, len: u32) -> bool {
        (self.first..=self.last).contains(&len) && (len - self.first).is_multiple_of(self.step)
    }
}

/// A message of one side.
pub trait Message: Sized {
    /// Lengths that the payload of message `kind` can have; `None` when this side has no such
    /// message.
    fn lengths(kind: u32) -> Option<Lengths>;

    /// Appends the frame.
    fn encode(&self, frame: &mut Vec<u8>);

    /// Reads a payload of one of the [`lengths`](Self::lengths).
    ///
    /// # Errors
    ///
    /// When it is not the payload of this message.
    fn decode_payload(kind: u32, payload: &[u8]) -> Result<Self, MessageError>;

    /// The frame.
    fn to_frame(&self) -> Vec<u8> {
        let mut frame = Vec::new();
        self.encode(&mut frame);
        frame
    }
}

/// Reads the message at the start of `bytes`, and its length in bytes; `None` when it is not there
/// in full.
///
/// # Errors
///
/// As soon as the bytes that are there cannot become a message.
pub fn decode<M: Message>(bytes: &[u8]) -> Result<Option<(M, usize)>, MessageError> {
    let Some((header, rest)) = bytes.split_first_chunk::<HEADER_LEN>() else { return Ok(None) };
    let mut header = Fields(header);
    let (kind, len) = (header.u32(), header.u32());
    let lengths = M::lengths(kind).ok_or(MessageError::UnknownKind(kind))?;
    if !lengths.contains(len) {
        return Err(MessageError::Length { kind, len });
    }
    let len = len as usize;
    match rest.get(..len) {
        None => Ok(None),
        Some(payload) => Ok(Some((M::decode_payload(kind, payload)?, HEADER_LEN + len))),
    }
}

mod kind {
    pub(super) const HELLO: u32 = 0x01;
    pub(super) const ACK: u32 = 0x02;
    pub(super) const REFUSE: u32 = 0x03;
    pub(super) const FREEZE: u32 = 0x04;
    pub(super) const THAW: u32 = 0x05;
    pub(super) const GET_SIZES: u32 = 0x06;
    pub(super) const RENEW: u32 = 0x07;
    pub(super) const FOLLOW_POPULATE: u32 = 0x08;
    pub(super) const FOLLOW_DISCARD: u32 = 0x09;
    pub(super) const SERVE: u32 = 0x0a;
    pub(super) const WELCOME: u32 = 0x81;
    pub(super) const GOODBYE: u32 = 0x82;
    pub(super) const POPULATE: u32 = 0x83;
    pub(super) const DISCARD: u32 = 0x84;
    pub(super) const DONE: u32 = 0x85;
    pub(super) const FAILED: u32 = 0x86;
    pub(super) const SIZES: u32 = 0x87;
    pub(super) const FROZEN: u32 = 0x88;
    pub(super) const THAWED: u32 = 0x89;
}

const HELLO_LEN: u32 = 16;
const WELCOME_LEN: u32 = 72;
const GOODBYE_LEN: u32 = 8;
const SECTION_LEN: u32 = 16;
const NUMBER_LEN: u32 = 8;
const SIZES_LEN: u32 = 32;
const FREEZE_LEN: u32 = 16;
const FROZEN_LEN: u32 = 32;

#[cfg(test)]
mod tests;
