//! Changes of block state: what the source tells between the pages, and what the destination answers.
//!
//! QEMU knows none of it. Both are sent only between ends that both know it, which a ping tells.

use ram_discard::{ByteRange, MemoryState};
use vmstate::wire::{WireRead, WireWrite};

use super::FormatError;

/// The value of a PING that asks whether block state may change while memory comes.
pub const PING_BLOCK_STATE: u32 = 0x564d_0001;

/// The value of the PONG that says so. A destination that does not know of it answers with the value of the PING.
pub const PONG_BLOCK_STATE: u32 = 0x564d_0002;

/// The value of a PING by which a source of postcopy says that it is to be told what the guest unplugs of the pages
/// that are outstanding. Any destination answers it as any other.
pub const PING_DISCARDED: u32 = 0x564d_0003;

/// The value of a PING by which a source says that it is to be told why a SHUT is not 0. Any destination answers it as
/// any other.
pub const PING_REASON: u32 = 0x564d_0004;

/// The most ranges of a change, so that it stays short.
pub const BLOCK_STATE_RANGES_MAX: usize = 256;

/// The most bytes of a reason on the return path.
const REASON_MAX: usize = 255;

const POPULATE: u8 = 1;
const DISCARD: u8 = 2;

const ACCEPTED: u8 = 0;
const REFUSED: u8 = 1;

/// Ranges of a RAM block have become populated, or discarded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockStateChange {
    /// Counts the changes of a migration, from 1.
    pub number: u32,
    /// What they become: a change that populates is asked for and answered, one that discards has been made.
    pub state: MemoryState,
    /// Id of the RAM block.
    pub block: String,
    /// Bytes from the start of the block, ascending and apart; at most 256 of them.
    pub ranges: Vec<ByteRange>,
}

impl BlockStateChange {
    pub(super) fn put(&self, out: &mut Vec<u8>) {
        assert!(self.ranges.len() <= BLOCK_STATE_RANGES_MAX, "too many ranges in one change");
        out.put_be32(self.number);
        out.put_u8(match self.state {
            MemoryState::Populated => POPULATE,
            MemoryState::Discarded => DISCARD,
        });
        out.put_name(&self.block);
        for range in &self.ranges {
            out.put_be64(range.start());
            out.put_be64(range.len());
        }
    }

    /// Reads one of `len` bytes.
    pub(super) fn read(reader: &mut dyn WireRead, len: u64) -> Result<Self, FormatError> {
        let at = reader.offset();
        let number = reader.be32("the number of a change of block state")?;
        let state = match reader.u8("the kind of a change of block state")? {
            POPULATE => MemoryState::Populated,
            DISCARD => MemoryState::Discarded,
            kind => return Err(FormatError::value(at, "kind of a change of block state", kind)),
        };
        let block = reader.name("the id of a block")?;
        let bytes = len.checked_sub(reader.offset() - at);
        let count = bytes.filter(|bytes| bytes.is_multiple_of(16)).map_or(0, |bytes| bytes / 16);
        if count == 0 || count > BLOCK_STATE_RANGES_MAX as u64 {
            return Err(FormatError::value(at, "length of a change of block state", len));
        }
        let mut ranges: Vec<ByteRange> = Vec::new();
        for _ in 0..count {
            let (start, len) = (reader.be64("the start of a range")?, reader.be64("its length")?);
            let after = ranges.last().map_or(0, |last| last.end());
            let range = ByteRange::new(start, len).filter(|range| range.start() >= after);
            let Some(range) = range else {
                return Err(FormatError::value(at, "range of a change of block state", start));
            };
            ranges.push(range);
        }
        Ok(Self { number, state, block, ranges })
    }
}

/// Appends the answer to a change: refused for this reason, or accepted.
pub(super) fn put_answer(out: &mut Vec<u8>, number: u32, refused: Option<&str>) {
    out.put_be32(number);
    match refused {
        None => out.put_u8(ACCEPTED),
        Some(reason) => {
            out.put_u8(REFUSED);
            put_reason(out, reason);
        }
    }
}

/// Appends as much of a reason as is sent.
pub(super) fn put_reason(out: &mut Vec<u8>, reason: &str) {
    let end = (0..=REASON_MAX.min(reason.len())).rev().find(|&at| reason.is_char_boundary(at));
    out.put_name(&reason[..end.unwrap_or(0)]);
}

/// Reads an answer: its number, and why the change is refused, if it is.
pub(super) fn read_answer(reader: &mut dyn WireRead) -> Result<(u32, Option<String>), FormatError> {
    let at = reader.offset();
    let number = reader.be32("the number of a change of block state")?;
    match reader.u8("the answer to a change of block state")? {
        ACCEPTED => Ok((number, None)),
        REFUSED => Ok((number, Some(reader.name("a reason")?))),
        answer => Err(FormatError::value(at, "answer to a change of block state", answer)),
    }
}
