//! QEMU's migration stream, version 3: what is on the wire, byte by byte.
//!
//! Pure encoding and decoding: nothing here touches guest memory or decides anything. The stream
//! is drawn in `spec-notes/stream.md`; names are those of QEMU's `migration/savevm.c`, `ram.c` and
//! `migration.c`.

mod block_list;
mod block_state;
mod command;
mod configuration;
mod multifd;
mod page;
mod page_records;
mod record;
mod return_path;

pub use block_list::{
    BlockEntry, BlockList, ListLimits, MAPPED_RAM_ALIGNMENT, MappedRamHeader, RAM_SECTION,
    RAM_VERSION, entry_len, put_entry, put_list, put_list_start,
};
pub use block_state::BlockStateChange;
pub(crate) use block_state::{
    BLOCK_STATE_RANGES_MAX, PING_BLOCK_STATE, PING_DISCARDED, PING_REASON, PONG_BLOCK_STATE,
};
pub(crate) use command::DISCARD_RANGES_MAX;
pub use command::{AdvisedSizes, Command};
pub use configuration::{
    CAPABILITY_IGNORE_SHARED, CAPABILITY_MAPPED_RAM, CAPABILITY_MULTIFD, CAPABILITY_MULTIFD_ZSTD,
    Configuration,
};
pub use multifd::{Encoding, Greeting, MULTIFD_MAGIC, PACKET_PAGES, PacketHead, Packets};
pub use page::{PageHeader, PageKind, put_end_of_section, put_multifd_flush};
pub use page_records::{PageBlocks, PageRecord, PageRecords};
pub use record::{
    Record, SectionHeader, SectionKind, make_findable, put_command, put_continued, put_description,
    put_eof, put_footer, put_header, put_section, read_footer, read_header, read_record,
};
pub use return_path::ReturnMessage;

use thiserror::Error;
use vmstate::wire::WireError;

/// The unit of migration, bytes: one page on the stream, one bit in a
/// [`PageBitmap`](crate::page_bitmap::PageBitmap).
pub const TARGET_PAGE_SIZE: u64 = 4096;

/// log2 of [`TARGET_PAGE_SIZE`].
pub const TARGET_PAGE_BITS: u32 = TARGET_PAGE_SIZE.trailing_zeros();

/// The longest JSON description that is read, bytes.
pub const DESCRIPTION_MAX: u64 = 16 << 20;

/// Why bytes are not a migration stream.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum FormatError {
    /// The stream ends, or fails, or a length is impossible.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// It does not start as a migration stream.
    #[error("not a migration stream: it starts with {found:#010x}, not with \"QEVM\"")]
    Magic {
        /// What it starts with.
        found: u32,
    },
    /// The other side speaks TLS.
    #[error(
        "what came is a record of TLS: the other side encrypts this channel, and this side does not; have both do \
         it, or neither"
    )]
    Tls,
    /// It is of another version.
    #[error("migration stream of version {found}; only version 3 is understood")]
    Version {
        /// Its version.
        found: u32,
    },
    /// A value is impossible where it stands.
    #[error("{what} at byte {offset:#x}: {found:#x} is not possible")]
    Value {
        /// Bytes from the start of the stream.
        offset: u64,
        /// What it is.
        what: &'static str,
        /// Its value.
        found: u64,
    },
    /// A section ends with the footer of another, or with none.
    #[error("section {section_id} at byte {offset:#x}: its footer is missing or another's")]
    Footer {
        /// Bytes from the start of the stream.
        offset: u64,
        /// Id of the section.
        section_id: u32,
    },
    /// A part of the configuration is not understood.
    #[error("unknown configuration {name:?} at byte {offset:#x}")]
    Configuration {
        /// Bytes from the start of the stream.
        offset: u64,
        /// Its name.
        name: String,
    },
    /// Something that QEMU can write, and this does not read.
    #[error("byte {offset:#x}: {what} are not supported")]
    Unsupported {
        /// Bytes from the start of the stream.
        offset: u64,
        /// What, in the plural.
        what: &'static str,
    },
    /// A page without the id of its block, and no page of a block before it.
    #[error("byte {offset:#x} of the stream: a page that continues no block")]
    NoBlock {
        /// Bytes from the start of the stream.
        offset: u64,
    },
    /// A page that its block does not have.
    #[error(
        "byte {offset:#x} of the stream: a page at {page:#x} of block {id:?} is past its end: \
         the block has {used_length:#x} bytes"
    )]
    PagePastEnd {
        /// Bytes from the start of the stream.
        offset: u64,
        /// Id of the block.
        id: String,
        /// Bytes from the start of the block.
        page: u64,
        /// Bytes of the block that are used.
        used_length: u64,
    },
    /// A page that is filled with another byte than 0.
    #[error("byte {offset:#x} of the stream: a page that is filled with {fill:#x}: only zeros are")]
    Fill {
        /// Bytes from the start of the stream.
        offset: u64,
        /// The byte.
        fill: u8,
    },
}

/// Whether a record of TLS 1.0 to 1.3 begins so. Nothing that is said in the clear does.
pub(crate) fn is_tls(start: [u8; 2]) -> bool {
    matches!(start, [0x14..=0x17, 3])
}

impl FormatError {
    fn value(offset: u64, what: &'static str, found: impl Into<u64>) -> Self {
        Self::Value { offset, what, found: found.into() }
    }
}

#[cfg(test)]
mod tests;
