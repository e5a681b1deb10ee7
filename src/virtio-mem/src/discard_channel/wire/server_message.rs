//! The messages of a server.

use super::fields::{Builder, Fields};
use super::{
    FROZEN_LEN, GOODBYE_LEN, Lengths, MAGIC, Message, MessageError, NUMBER_LEN, SIZES_LEN,
    Sections, WELCOME_LEN, kind,
};
use crate::device::Geometry;

/// Of [`Welcome`]: node_id means something.
const FLAG_NODE: u16 = 1;

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
        /// Why, in words, at most [`TEXT_MAX`](super::TEXT_MAX) bytes.
        reason: String,
    },
    /// The sections are about to be used; the guest waits for the answer, which is about all of
    /// them.
    Populate {
        /// Number of the event.
        event: u64,
        /// Where.
        sections: Sections,
    },
    /// The sections are no longer used; their memory goes when the answer is there.
    Discard {
        /// Number of the event.
        event: u64,
        /// Where.
        sections: Sections,
    },
    /// Block state is frozen, and no change is under way.
    Frozen {
        /// What the request carried.
        id: u64,
        /// Number of the freeze: the one before, when that has not ended.
        freeze: u64,
        /// Number of the last event, which the bitmap shows now.
        event: u64,
        /// When it ends unless it is renewed, milliseconds, not 0.
        expiry_ms: u32,
    },
    /// A freeze has ended, since it was not renewed in time.
    Thawed {
        /// Number of the freeze.
        freeze: u64,
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
        /// Why, at most [`TEXT_MAX`](super::TEXT_MAX) bytes.
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
    /// A number that no other connection has, of this server or of one before or after it.
    pub generation: u64,
    /// What never changes of the device.
    pub geometry: Geometry,
    /// Size of the file with the bitmap, bytes.
    pub bitmap_size: u64,
    /// Number of the last event that the bitmap shows; those that the client gets are greater.
    pub event: u64,
    /// For how long all clients together may keep a change waiting, milliseconds.
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
    /// The client was dropped before, and comes again too soon.
    Paused,
}

impl Message for ServerMessage {
    fn lengths(kind: u32) -> Option<Lengths> {
        match kind {
            kind::WELCOME => Some(Lengths::one(WELCOME_LEN)),
            kind::GOODBYE => Some(Lengths::with_text(GOODBYE_LEN)),
            kind::POPULATE | kind::DISCARD => Some(Lengths::with_sections(NUMBER_LEN)),
            kind::FROZEN => Some(Lengths::one(FROZEN_LEN)),
            kind::DONE | kind::THAWED => Some(Lengths::one(NUMBER_LEN)),
            kind::FAILED => Some(Lengths::with_text(NUMBER_LEN)),
            kind::SIZES => Some(Lengths::one(SIZES_LEN)),
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
            Self::Populate { event, sections } => {
                Builder::new(frame, kind::POPULATE).u64(*event).sections(sections)
            }
            Self::Discard { event, sections } => {
                Builder::new(frame, kind::DISCARD).u64(*event).sections(sections)
            }
            Self::Frozen { id, freeze, event, expiry_ms } => Builder::new(frame, kind::FROZEN)
                .u64(*id)
                .u64(*freeze)
                .u64(*event)
                .u32(*expiry_ms)
                .u32(0),
            Self::Thawed { freeze } => Builder::new(frame, kind::THAWED).u64(*freeze),
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

    fn decode_payload(kind: u32, payload: &[u8]) -> Result<Self, MessageError> {
        let mut fields = Fields(payload);
        Ok(match kind {
            kind::WELCOME => Self::Welcome(Welcome::decode(fields)?),
            kind::GOODBYE => {
                let code = fields.u32();
                let cause = Farewell::from_code(code).ok_or(MessageError::Field {
                    kind,
                    field: "cause",
                    value: code.into(),
                })?;
                let (min_version, max_version) = (fields.u16(), fields.u16());
                Self::Goodbye { cause, min_version, max_version, reason: fields.text(kind)? }
            }
            kind::POPULATE => {
                Self::Populate { event: fields.u64(), sections: fields.sections(kind)? }
            }
            kind::DISCARD => {
                Self::Discard { event: fields.u64(), sections: fields.sections(kind)? }
            }
            kind::FROZEN => {
                let (id, freeze, event) = (fields.u64(), fields.u64(), fields.u64());
                let expiry_ms = fields.u32();
                if expiry_ms == 0 {
                    return Err(MessageError::Field { kind, field: "expiry_ms", value: 0 });
                }
                fields.zero(kind, "reserved")?;
                Self::Frozen { id, freeze, event, expiry_ms }
            }
            kind::THAWED => Self::Thawed { freeze: fields.u64() },
            kind::DONE => Self::Done { id: fields.u64() },
            kind::FAILED => Self::Failed { id: fields.u64(), reason: fields.text(kind)? },
            kind::SIZES => Self::Sizes {
                id: fields.u64(),
                usable_region_size: fields.u64(),
                plugged_size: fields.u64(),
                requested_size: fields.u64(),
            },
            _ => return Err(MessageError::UnknownKind(kind)),
        })
    }
}

impl Welcome {
    fn encode<'a>(&self, frame: &'a mut Vec<u8>) -> Builder<'a> {
        let Self { version, generation, geometry, bitmap_size, event, patience_ms } = self;
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
            .u64(*generation)
    }

    fn decode(mut fields: Fields<'_>) -> Result<Self, MessageError> {
        const KIND: u32 = kind::WELCOME;
        let wrong =
            |field, value: u16| MessageError::Field { kind: KIND, field, value: value.into() };
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
        let generation = fields.u64();
        Ok(Self { version, generation, geometry, bitmap_size, event, patience_ms })
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
            Self::Paused => 6,
        }
    }

    fn from_code(code: u32) -> Option<Self> {
        let all = [
            Self::Version,
            Self::TooMany,
            Self::Protocol,
            Self::Silent,
            Self::Ending,
            Self::Paused,
        ];
        all.into_iter().find(|cause| cause.to_code() == code)
    }
}
