//! The messages of a client.

use ram_discard::MemoryState;

use super::fields::{Builder, Fields};
use super::{
    FREEZE_LEN, HELLO_LEN, Lengths, MAGIC, Message, MessageError, NUMBER_LEN, Sections, kind,
};

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
        /// Why, at most [`TEXT_MAX`](super::TEXT_MAX) bytes.
        reason: String,
    },
    /// Block state is to be frozen.
    Freeze {
        /// Comes back in the answer.
        id: u64,
    },
    /// The freeze is to end. It was held without a gap when that is done.
    Thaw {
        /// Comes back in the answer.
        id: u64,
        /// Number of the freeze.
        freeze: u64,
    },
    /// The freeze is to continue. It was held without a gap when that is done.
    Renew {
        /// Comes back in the answer.
        id: u64,
        /// Number of the freeze.
        freeze: u64,
    },
    /// The guest is about to run while its memory arrives, and this client knows of block state for what brings the
    /// memory: requests of the guest are to be served, and nothing is populated that this client does not
    /// acknowledge. From version 3 on.
    Serve {
        /// Comes back in the answer.
        id: u64,
    },
    /// The sizes that change are wanted.
    GetSizes {
        /// Comes back in the answer.
        id: u64,
    },
    /// The device is to populate or discard the sections, all of them or none, because the device did from which
    /// the guest comes. From version 3 on.
    Follow {
        /// Comes back in the answer.
        id: u64,
        /// What they become.
        state: MemoryState,
        /// Where.
        sections: Sections,
    },
}

impl Message for ClientMessage {
    fn lengths(kind: u32) -> Option<Lengths> {
        match kind {
            kind::HELLO => Some(Lengths::one(HELLO_LEN)),
            kind::ACK | kind::FREEZE | kind::GET_SIZES | kind::SERVE => {
                Some(Lengths::one(NUMBER_LEN))
            }
            kind::THAW | kind::RENEW => Some(Lengths::one(FREEZE_LEN)),
            kind::REFUSE => Some(Lengths::with_text(NUMBER_LEN)),
            kind::FOLLOW_POPULATE | kind::FOLLOW_DISCARD => {
                Some(Lengths::with_sections(NUMBER_LEN))
            }
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
            Self::Thaw { id, freeze } => Builder::new(frame, kind::THAW).u64(*id).u64(*freeze),
            Self::Renew { id, freeze } => Builder::new(frame, kind::RENEW).u64(*id).u64(*freeze),
            Self::Serve { id } => Builder::new(frame, kind::SERVE).u64(*id),
            Self::GetSizes { id } => Builder::new(frame, kind::GET_SIZES).u64(*id),
            Self::Follow { id, state, sections } => {
                let kind = match state {
                    MemoryState::Populated => kind::FOLLOW_POPULATE,
                    MemoryState::Discarded => kind::FOLLOW_DISCARD,
                };
                Builder::new(frame, kind).u64(*id).sections(sections)
            }
        };
    }

    fn decode_payload(kind: u32, payload: &[u8]) -> Result<Self, MessageError> {
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
            kind::THAW => Self::Thaw { id: fields.u64(), freeze: fields.u64() },
            kind::RENEW => Self::Renew { id: fields.u64(), freeze: fields.u64() },
            kind::SERVE => Self::Serve { id: fields.u64() },
            kind::GET_SIZES => Self::GetSizes { id: fields.u64() },
            kind::FOLLOW_POPULATE | kind::FOLLOW_DISCARD => {
                let state = match kind {
                    kind::FOLLOW_POPULATE => MemoryState::Populated,
                    _ => MemoryState::Discarded,
                };
                Self::Follow { id: fields.u64(), state, sections: fields.sections(kind)? }
            }
            _ => return Err(MessageError::UnknownKind(kind)),
        })
    }
}
