//! The messages of the discard channel as bytes.
//!
//! All integers are little-endian. A frame is a header of 8 bytes, `kind` and `len` as u32, and
//! `len` bytes of payload. Each kind has one length, or a last field of text that is limited, so a
//! frame is at most [`FRAME_MAX`] bytes. What is not known, not of its length or not in its place
//! is an error.

mod fields;

use thiserror::Error;

use fields::{Builder, Fields};

use crate::ByteRange;
use crate::device::{Geometry, GeometryError};

/// The first bytes of [`ClientMessage::Hello`] and [`ServerMessage::Welcome`].
pub const MAGIC: [u8; 8] = *b"VMEMDISC";

/// The only version there is.
pub const VERSION: u16 = 1;

/// Length of a frame's header, bytes.
pub const HEADER_LEN: usize = 8;

/// The most text that a message carries, bytes of UTF-8.
pub const TEXT_MAX: usize = 256;

/// The longest frame, bytes.
pub const FRAME_MAX: usize = HEADER_LEN + 8 + TEXT_MAX;

/// Why bytes are no message.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum WireError {
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

/// A message of one side.
pub trait Message: Sized {
    /// Lengths that the payload of message `kind` can have, bytes, first and last; `None` when
    /// this side has no such message.
    fn lengths(kind: u32) -> Option<(u32, u32)>;

    /// Appends the frame.
    fn encode(&self, frame: &mut Vec<u8>);

    /// Reads a payload of one of the [`lengths`](Self::lengths).
    ///
    /// # Errors
    ///
    /// When it is not the payload of this message.
    fn decode_payload(kind: u32, payload: &[u8]) -> Result<Self, WireError>;

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
pub fn decode<M: Message>(bytes: &[u8]) -> Result<Option<(M, usize)>, WireError> {
    let Some((header, rest)) = bytes.split_first_chunk::<HEADER_LEN>() else { return Ok(None) };
    let mut header = Fields(header);
    let (kind, len) = (header.u32(), header.u32());
    let (first, last) = M::lengths(kind).ok_or(WireError::UnknownKind(kind))?;
    if len < first || len > last {
        return Err(WireError::Length { kind, len });
    }
    let len = len as usize;
    match rest.get(..len) {
        None => Ok(None),
        Some(payload) => Ok(Some((M::decode_payload(kind, payload)?, HEADER_LEN + len))),
    }
}

/// What a client says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClientMessage {
    /// The first message, the same in all versions: the versions that the client speaks.
    Hello {
        /// The oldest.
        min_version: u16,
        /// The newest.
        max_version: u16,
    },
    /// The event was dealt with.
    Ack {
        /// Its number.
        event: u64,
    },
    /// The populate is refused; whatever the client did for it is undone.
    Refuse {
        /// Its number.
        event: u64,
        /// Why, at most [`TEXT_MAX`] bytes.
        reason: String,
    },
    /// Block state is to be frozen.
    Freeze {
        /// Comes back in the answer.
        id: u64,
    },
    /// The freeze is to end.
    Thaw {
        /// Comes back in the answer.
        id: u64,
    },
    /// The sizes that change are wanted.
    GetSizes {
        /// Comes back in the answer.
        id: u64,
    },
}

/// What a server says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServerMessage {
    /// The client is one from now on. Carries the bitmap's descriptor.
    Welcome(Welcome),
    /// The last message: the connection ends.
    Goodbye {
        /// Why.
        cause: Farewell,
        /// The oldest version that the server speaks.
        min_version: u16,
        /// The newest.
        max_version: u16,
        /// Why, in words, at most [`TEXT_MAX`] bytes.
        reason: String,
    },
    /// The section is about to be used; the guest waits for the answer.
    Populate {
        /// Number of the event.
        event: u64,
        /// Bytes from the start of the region.
        section: ByteRange,
    },
    /// The section is no longer used; its memory goes when the answer is there.
    Discard {
        /// Number of the event.
        event: u64,
        /// Bytes from the start of the region.
        section: ByteRange,
    },
    /// The request was done.
    Done {
        /// What the request carried.
        id: u64,
    },
    /// The request was not done.
    Failed {
        /// What the request carried.
        id: u64,
        /// Why, at most [`TEXT_MAX`] bytes.
        reason: String,
    },
    /// The sizes that were asked for, bytes.
    Sizes {
        /// What the request carried.
        id: u64,
        /// Size of the part that requests may name.
        usable_region_size: u64,
        /// Sum of the plugged blocks.
        plugged_size: u64,
        /// What the guest is asked to plug.
        requested_size: u64,
    },
}

/// What a client learns at first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Welcome {
    /// The version that both speak.
    pub version: u16,
    /// What never changes of the device.
    pub geometry: Geometry,
    /// Size of the file with the bitmap, bytes.
    pub bitmap_size: u64,
    /// Number of the last event that the bitmap shows; those that the client gets are greater.
    pub event: u64,
    /// For how long a client may keep the guest waiting, milliseconds.
    pub patience_ms: u32,
}

/// Why a server ends a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Farewell {
    /// There is no version that both speak.
    Version,
    /// There are as many clients as there can be.
    TooMany,
    /// The client broke the protocol.
    Protocol,
    /// The client kept the guest waiting for too long.
    Silent,
    /// The server ends.
    Ending,
}

mod kind {
    pub(super) const HELLO: u32 = 0x01;
    pub(super) const ACK: u32 = 0x02;
    pub(super) const REFUSE: u32 = 0x03;
    pub(super) const FREEZE: u32 = 0x04;
    pub(super) const THAW: u32 = 0x05;
    pub(super) const GET_SIZES: u32 = 0x06;
    pub(super) const WELCOME: u32 = 0x81;
    pub(super) const GOODBYE: u32 = 0x82;
    pub(super) const POPULATE: u32 = 0x83;
    pub(super) const DISCARD: u32 = 0x84;
    pub(super) const DONE: u32 = 0x85;
    pub(super) const FAILED: u32 = 0x86;
    pub(super) const SIZES: u32 = 0x87;
}

const HELLO_LEN: u32 = 16;
const WELCOME_LEN: u32 = 64;
const GOODBYE_LEN: u32 = 8;
const SECTION_LEN: u32 = 24;
const NUMBER_LEN: u32 = 8;
const SIZES_LEN: u32 = 32;

/// Of [`Welcome`]: node_id means something.
const FLAG_NODE: u16 = 1;

impl Message for ClientMessage {
    fn lengths(kind: u32) -> Option<(u32, u32)> {
        match kind {
            kind::HELLO => Some((HELLO_LEN, HELLO_LEN)),
            kind::ACK | kind::FREEZE | kind::THAW | kind::GET_SIZES => {
                Some((NUMBER_LEN, NUMBER_LEN))
            }
            kind::REFUSE => Some(with_text(NUMBER_LEN)),
            _ => None,
        }
    }

    fn encode(&self, frame: &mut Vec<u8>) {
        match self {
            Self::Hello { min_version, max_version } => Builder::new(frame, kind::HELLO)
                .bytes(&MAGIC)
                .u16(*min_version)
                .u16(*max_version)
                .u32(0),
            Self::Ack { event } => Builder::new(frame, kind::ACK).u64(*event),
            Self::Refuse { event, reason } => {
                Builder::new(frame, kind::REFUSE).u64(*event).text(reason)
            }
            Self::Freeze { id } => Builder::new(frame, kind::FREEZE).u64(*id),
            Self::Thaw { id } => Builder::new(frame, kind::THAW).u64(*id),
            Self::GetSizes { id } => Builder::new(frame, kind::GET_SIZES).u64(*id),
        };
    }

    fn decode_payload(kind: u32, payload: &[u8]) -> Result<Self, WireError> {
        let mut fields = Fields(payload);
        Ok(match kind {
            kind::HELLO => {
                fields.magic()?;
                let (min_version, max_version) = (fields.u16(), fields.u16());
                fields.zero(kind, "reserved")?;
                Self::Hello { min_version, max_version }
            }
            kind::ACK => Self::Ack { event: fields.u64() },
            kind::REFUSE => Self::Refuse { event: fields.u64(), reason: fields.text(kind)? },
            kind::FREEZE => Self::Freeze { id: fields.u64() },
            kind::THAW => Self::Thaw { id: fields.u64() },
            kind::GET_SIZES => Self::GetSizes { id: fields.u64() },
            _ => return Err(WireError::UnknownKind(kind)),
        })
    }
}

impl Message for ServerMessage {
    fn lengths(kind: u32) -> Option<(u32, u32)> {
        match kind {
            kind::WELCOME => Some((WELCOME_LEN, WELCOME_LEN)),
            kind::GOODBYE => Some(with_text(GOODBYE_LEN)),
            kind::POPULATE | kind::DISCARD => Some((SECTION_LEN, SECTION_LEN)),
            kind::DONE => Some((NUMBER_LEN, NUMBER_LEN)),
            kind::FAILED => Some(with_text(NUMBER_LEN)),
            kind::SIZES => Some((SIZES_LEN, SIZES_LEN)),
            _ => None,
        }
    }

    fn encode(&self, frame: &mut Vec<u8>) {
        match self {
            Self::Welcome(welcome) => welcome.encode(frame),
            Self::Goodbye { cause, min_version, max_version, reason } => {
                Builder::new(frame, kind::GOODBYE)
                    .u32(cause.to_code())
                    .u16(*min_version)
                    .u16(*max_version)
                    .text(reason)
            }
            Self::Populate { event, section } => {
                Builder::new(frame, kind::POPULATE).u64(*event).section(*section)
            }
            Self::Discard { event, section } => {
                Builder::new(frame, kind::DISCARD).u64(*event).section(*section)
            }
            Self::Done { id } => Builder::new(frame, kind::DONE).u64(*id),
            Self::Failed { id, reason } => Builder::new(frame, kind::FAILED).u64(*id).text(reason),
            Self::Sizes { id, usable_region_size, plugged_size, requested_size } => {
                Builder::new(frame, kind::SIZES)
                    .u64(*id)
                    .u64(*usable_region_size)
                    .u64(*plugged_size)
                    .u64(*requested_size)
            }
        };
    }

    fn decode_payload(kind: u32, payload: &[u8]) -> Result<Self, WireError> {
        let mut fields = Fields(payload);
        Ok(match kind {
            kind::WELCOME => Self::Welcome(Welcome::decode(fields)?),
            kind::GOODBYE => {
                let code = fields.u32();
                let cause = Farewell::from_code(code).ok_or(WireError::Field {
                    kind,
                    field: "cause",
                    value: code.into(),
                })?;
                let (min_version, max_version) = (fields.u16(), fields.u16());
                Self::Goodbye { cause, min_version, max_version, reason: fields.text(kind)? }
            }
            kind::POPULATE => {
                Self::Populate { event: fields.u64(), section: fields.section(kind)? }
            }
            kind::DISCARD => Self::Discard { event: fields.u64(), section: fields.section(kind)? },
            kind::DONE => Self::Done { id: fields.u64() },
            kind::FAILED => Self::Failed { id: fields.u64(), reason: fields.text(kind)? },
            kind::SIZES => Self::Sizes {
                id: fields.u64(),
                usable_region_size: fields.u64(),
                plugged_size: fields.u64(),
                requested_size: fields.u64(),
            },
            _ => return Err(WireError::UnknownKind(kind)),
        })
    }
}

impl Welcome {
    fn encode<'a>(&self, frame: &'a mut Vec<u8>) -> Builder<'a> {
        let Self { version, geometry, bitmap_size, event, patience_ms } = self;
        let node = geometry.node_id();
        Builder::new(frame, kind::WELCOME)
            .bytes(&MAGIC)
            .u16(*version)
            .u16(if node.is_some() { FLAG_NODE } else { 0 })
            .u16(node.unwrap_or(0))
            .u16(0)
            .u64(geometry.addr())
            .u64(geometry.region_size())
            .u64(geometry.block_size())
            .u64(*bitmap_size)
            .u64(*event)
            .u32(*patience_ms)
            .u32(0)
    }

    fn decode(mut fields: Fields<'_>) -> Result<Self, WireError> {
        const KIND: u32 = kind::WELCOME;
        let wrong = |field, value: u16| WireError::Field { kind: KIND, field, value: value.into() };
        fields.magic()?;
        let (version, flags) = (fields.u16(), fields.u16());
        let (node, reserved) = (fields.u16(), fields.u16());
        if flags & !FLAG_NODE != 0 {
            return Err(wrong("flags", flags));
        }
        let has_node = flags & FLAG_NODE != 0;
        if !has_node && node != 0 {
            return Err(wrong("node_id", node));
        }
        if reserved != 0 {
            return Err(wrong("reserved", reserved));
        }
        let (addr, region_size, block_size) = (fields.u64(), fields.u64(), fields.u64());
        let geometry = Geometry::new(addr, region_size, block_size, has_node.then_some(node))?;
        let (bitmap_size, event, patience_ms) = (fields.u64(), fields.u64(), fields.u32());
        fields.zero(KIND, "reserved")?;
        Ok(Self { version, geometry, bitmap_size, event, patience_ms })
    }
}

impl Farewell {
    fn to_code(self) -> u32 {
        match self {
            Self::Version => 1,
            Self::TooMany => 2,
            Self::Protocol => 3,
            Self::Silent => 4,
            Self::Ending => 5,
        }
    }

    fn from_code(code: u32) -> Option<Self> {
        let all = [Self::Version, Self::TooMany, Self::Protocol, Self::Silent, Self::Ending];
        all.into_iter().find(|cause| cause.to_code() == code)
    }
}

fn with_text(fixed: u32) -> (u32, u32) {
    (fixed, fixed + TEXT_MAX as u32)
}

#[cfg(test)]
mod tests;
