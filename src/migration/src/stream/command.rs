//! Commands: what the source has the destination do.

use super::{BlockStateChange, FormatError};
use vmstate::wire::{WireRead, WireWrite};

const OPEN_RETURN_PATH: u16 = 1;
const PING: u16 = 2;
const POSTCOPY_ADVISE: u16 = 3;
const POSTCOPY_LISTEN: u16 = 4;
const POSTCOPY_RUN: u16 = 5;
const POSTCOPY_RAM_DISCARD: u16 = 6;
const PACKAGED: u16 = 7;
const POSTCOPY_RESUME: u16 = 9;
const RECV_BITMAP: u16 = 10;
const SWITCHOVER_START: u16 = 11;
/// Ours, far from those that QEMU may still add.
const BLOCK_STATE: u16 = 0x564d;

/// Version byte of a discard command.
const DISCARD_VERSION: u8 = 0;
/// The most ranges of a discard command, so that it stays short.
pub(crate) const DISCARD_RANGES_MAX: usize = 12;

/// A command of the source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// The destination may send messages back from now on.
    OpenReturnPath,
    /// To be answered with a PONG once all before it has been handled.
    Ping(u32),
    /// Postcopy may follow. `None` when only device state, no RAM, takes part.
    PostcopyAdvise(Option<AdvisedSizes>),
    /// Faults are served from now on.
    PostcopyListen,
    /// The guest runs on the destination from now on.
    PostcopyRun,
    /// These pages are stale: they are discarded, and faults on them asked for.
    PostcopyRamDiscard {
        /// Id of the RAM block.
        block: String,
        /// Start and length, bytes from the start of the block; at most 12 of them.
        ranges: Vec<(u64, u64)>,
    },
    /// That many bytes of a stream of their own follow, to be read whole before any is handled.
    Packaged {
        /// Bytes.
        len: u32,
    },
    /// Goes on after a broken channel.
    PostcopyResume,
    /// Asks for the bitmap of pages received of a RAM block.
    RecvBitmap {
        /// Id of the RAM block.
        block: String,
    },
    /// The guest is stopped; what follows is final.
    SwitchoverStart,
    /// Block state of the source has changed.
    BlockState(BlockStateChange),
}

/// The page sizes that must be alike for postcopy, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AdvisedSizes {
    /// All page sizes of the RAM blocks, or'ed together.
    pub page_sizes: u64,
    /// Size of a target page.
    pub target_page_size: u64,
}

impl Command {
    pub(super) fn put(&self, out: &mut Vec<u8>) {
        let mut data = Vec::new();
        let code = match self {
            Self::OpenReturnPath => OPEN_RETURN_PATH,
            Self::Ping(value) => {
                data.put_be32(*value);
                PING
            }
            Self::PostcopyAdvise(sizes) => {
                if let Some(sizes) = sizes {
                    data.put_be64(sizes.page_sizes);
                    data.put_be64(sizes.target_page_size);
                }
                POSTCOPY_ADVISE
            }
            Self::PostcopyListen => POSTCOPY_LISTEN,
            Self::PostcopyRun => POSTCOPY_RUN,
            Self::PostcopyRamDiscard { block, ranges } => {
                assert!(ranges.len() <= DISCARD_RANGES_MAX, "too many ranges in one command");
                data.put_u8(DISCARD_VERSION);
                data.put_name(block);
                data.put_u8(0);
                for &(start, len) in ranges {
                    data.put_be64(start);
                    data.put_be64(len);
                }
                POSTCOPY_RAM_DISCARD
            }
            Self::Packaged { len } => {
                data.put_be32(*len);
                PACKAGED
            }
            Self::PostcopyResume => POSTCOPY_RESUME,
            Self::RecvBitmap { block } => {
                data.put_name(block);
                RECV_BITMAP
            }
            Self::SwitchoverStart => SWITCHOVER_START,
            Self::BlockState(change) => {
                change.put(&mut data);
                BLOCK_STATE
            }
        };
        out.put_be16(code);
        out.put_be16(u16::try_from(data.len()).expect("commands are short"));
        out.put(&data);
    }

    pub(super) fn read(reader: &mut dyn WireRead) -> Result<Self, FormatError> {
        let offset = reader.offset();
        let code = reader.be16("a command")?;
        let len = u64::from(reader.be16("the length of a command")?);
        let start = reader.offset();
        let command = match (code, len) {
            (OPEN_RETURN_PATH, 0) => Self::OpenReturnPath,
            (PING, 4) => Self::Ping(reader.be32("the value of a ping")?),
            (POSTCOPY_ADVISE, 0) => Self::PostcopyAdvise(None),
            (POSTCOPY_ADVISE, 16) => Self::PostcopyAdvise(Some(AdvisedSizes {
                page_sizes: reader.be64("page sizes")?,
                target_page_size: reader.be64("the target page size")?,
            })),
            (POSTCOPY_LISTEN, 0) => Self::PostcopyListen,
            (POSTCOPY_RUN, 0) => Self::PostcopyRun,
            (POSTCOPY_RAM_DISCARD, 20..) => Self::read_discard(reader, len)?,
            (PACKAGED, 4) => Self::Packaged { len: reader.be32("the length of a package")? },
            (POSTCOPY_RESUME, 0) => Self::PostcopyResume,
            (RECV_BITMAP, 1..) => Self::RecvBitmap { block: reader.name("the id of a block")? },
            (SWITCHOVER_START, 0) => Self::SwitchoverStart,
            (BLOCK_STATE, _) => Self::BlockState(BlockStateChange::read(reader, len)?),
            (1..=11, _) => return Err(FormatError::value(offset, "length of a command", len)),
            _ => return Err(FormatError::value(offset, "command", code)),
        };
        if reader.offset() - start != len {
            return Err(FormatError::value(offset, "length of a command", len));
        }
        Ok(command)
    }

    fn read_discard(reader: &mut dyn WireRead, len: u64) -> Result<Self, FormatError> {
        let offset = reader.offset();
        let version = reader.u8("the version of a discard command")?;
        if version != DISCARD_VERSION {
            return Err(FormatError::value(offset, "version of a discard command", version));
        }
        let block = reader.name("the id of a block")?;
        let end = reader.u8("the end of a block's id")?;
        let rest = len.checked_sub(3 + block.len() as u64);
        let (0, Some(rest)) = (end, rest) else {
            return Err(FormatError::value(offset, "id of a block in a discard command", end));
        };
        if !rest.is_multiple_of(16) || rest / 16 > DISCARD_RANGES_MAX as u64 {
            return Err(FormatError::value(offset, "length of a discard command", len));
        }
        let mut ranges = Vec::new();
        for _ in 0..rest / 16 {
            ranges.push((reader.be64("the start of a range")?, reader.be64("its length")?));
        }
        Ok(Self::PostcopyRamDiscard { block, ranges })
    }
}
