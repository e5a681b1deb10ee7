//! What the destination sends back.

use super::FormatError;
use super::block_state::{put_answer, put_reason, read_answer};
use vmstate::wire::{WireRead, WireWrite};

const SHUT: u16 = 1;
const PONG: u16 = 2;
const REQ_PAGES_ID: u16 = 3;
const REQ_PAGES: u16 = 4;
const RECV_BITMAP: u16 = 5;
const RESUME_ACK: u16 = 6;
const SWITCHOVER_ACK: u16 = 7;
/// Ours, far from those that QEMU may still add.
const BLOCK_STATE: u16 = 0x564d;
const DISCARDED: u16 = 0x564e;
const REASON: u16 = 0x564f;

/// The only value a resume may be acknowledged with.
const RESUMED: u32 = 1;

/// A message on the return path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReturnMessage {
    /// The destination is done: 0 when it has all, an error number otherwise.
    Shut(u32),
    /// All before the PING of this value has been handled.
    Pong(u32),
    /// Pages that the destination waits for.
    RequestPages {
        /// Id of the RAM block; `None` for the block of the last request.
        block: Option<String>,
        /// Bytes from the start of the block.
        start: u64,
        /// Bytes.
        len: u32,
    },
    /// The bitmap of pages received of a block follows: its size in bytes (be64), the bits, first
    /// page in the lowest bit of the first byte, and an end marker (be64).
    RecvBitmap {
        /// Id of the RAM block.
        block: String,
    },
    /// The destination goes on after a broken channel.
    ResumeAck,
    /// The destination is ready for the switchover.
    SwitchoverAck,
    /// The answer to a change of block state that populates.
    BlockState {
        /// Number of the change.
        number: u32,
        /// Why it is refused, if it is: nothing was populated then. At most 255 bytes are sent.
        refused: Option<String>,
    },
    /// In postcopy: the guest has unplugged pages that are outstanding, which need not be sent any more. Only to a
    /// source that said with a PING that it knows of this.
    Discarded {
        /// Id of the RAM block.
        block: String,
        /// Bytes from the start of the block.
        start: u64,
        /// Bytes.
        len: u64,
    },
    /// Why the SHUT that follows is not 0, of which at most 255 bytes are sent. Only to a source that said with a PING
    /// that it knows of this.
    Reason(String),
}

impl ReturnMessage {
    /// Appends the message.
    pub fn put(&self, out: &mut Vec<u8>) {
        let mut data = Vec::new();
        let code = match self {
            Self::Shut(value) => {
                data.put_be32(*value);
                SHUT
            }
            Self::Pong(value) => {
                data.put_be32(*value);
                PONG
            }
            Self::RequestPages { block, start, len } => {
                data.put_be64(*start);
                data.put_be32(*len);
                match block {
                    Some(block) => {
                        data.put_name(block);
                        REQ_PAGES_ID
                    }
                    None => REQ_PAGES,
                }
            }
            Self::RecvBitmap { block } => {
                data.put_name(block);
                RECV_BITMAP
            }
            Self::ResumeAck => {
                data.put_be32(RESUMED);
                RESUME_ACK
            }
            Self::SwitchoverAck => SWITCHOVER_ACK,
            Self::BlockState { number, refused } => {
                put_answer(&mut data, *number, refused.as_deref());
                BLOCK_STATE
            }
            Self::Discarded { block, start, len } => {
                data.put_be64(*start);
                data.put_be64(*len);
                data.put_name(block);
                DISCARDED
            }
            Self::Reason(reason) => {
                put_reason(&mut data, reason);
                REASON
            }
        };
        out.put_be16(code);
        out.put_be16(u16::try_from(data.len()).expect("messages are short"));
        out.put(&data);
    }

    /// Reads the next message.
    ///
    /// # Errors
    ///
    /// When it is none that is known.
    pub fn read(reader: &mut dyn WireRead) -> Result<Self, FormatError> {
        let offset = reader.offset();
        let code = reader.be16("a message of the return path")?;
        let len = u64::from(reader.be16("its length")?);
        let start = reader.offset();
        let message = match (code, len) {
            (SHUT, 4) => Self::Shut(reader.be32("the outcome")?),
            (PONG, 4) => Self::Pong(reader.be32("the value of a pong")?),
            (REQ_PAGES, 12) | (REQ_PAGES_ID, 13..) => {
                let (start, len) = (reader.be64("the start of pages")?, reader.be32("a length")?);
                let block = match code {
                    REQ_PAGES_ID => Some(reader.name("the id of a block")?),
                    _ => None,
                };
                Self::RequestPages { block, start, len }
            }
            (RECV_BITMAP, 1..) => Self::RecvBitmap { block: reader.name("the id of a block")? },
            (RESUME_ACK, 4) => {
                let value = reader.be32("the answer to a resume")?;
                if value != RESUMED {
                    return Err(FormatError::value(start, "answer to a resume", value));
                }
                Self::ResumeAck
            }
            (SWITCHOVER_ACK, 0) => Self::SwitchoverAck,
            (BLOCK_STATE, 5..) => {
                let (number, refused) = read_answer(reader)?;
                Self::BlockState { number, refused }
            }
            (DISCARDED, 18..) => {
                let (start, len) =
                    (reader.be64("the start of a range")?, reader.be64("its length")?);
                Self::Discarded { block: reader.name("the id of a block")?, start, len }
            }
            (REASON, 1..) => Self::Reason(reader.name("a reason")?),
            (1..=7 | BLOCK_STATE | DISCARDED | REASON, _) => {
                return Err(FormatError::value(offset, "length of a message", len));
            }
            _ if super::is_tls(code.to_be_bytes()) => return Err(FormatError::Tls),
            _ => return Err(FormatError::value(offset, "message of the return path", code)),
        };
        if reader.offset() - start != len {
            return Err(FormatError::value(offset, "length of a message", len));
        }
        Ok(message)
    }
}
