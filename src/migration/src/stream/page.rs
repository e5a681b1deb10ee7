//! The "ram" section: the header of each page, and the end of the section.

use super::{FormatError, TARGET_PAGE_SIZE};
use vmstate::wire::{WireRead, WireWrite};

const ZERO: u64 = 0x02;
pub(super) const MEM_SIZE: u64 = 0x04;
const PAGE: u64 = 0x08;
const EOS: u64 = 0x10;
const CONTINUE: u64 = 0x20;
const XBZRLE: u64 = 0x40;
const HOOK: u64 = 0x80;
const MULTIFD_FLUSH: u64 = 0x200;
const FLAGS: u64 = TARGET_PAGE_SIZE - 1;

/// What stands at a page header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageKind {
    /// A page of zeros; the byte it is filled with follows, always 0.
    Zero,
    /// A page's bytes follow.
    Normal,
}

/// The header of a page, or what stands in its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageHeader {
    /// A page. When it does not continue the block of the page before, the block's id follows.
    Page {
        /// Zeros, or bytes that follow.
        kind: PageKind,
        /// Bytes from the start of the block.
        offset: u64,
        /// Whether it is of the same block as the page before.
        continued: bool,
    },
    /// A list of blocks of that many bytes in all.
    List {
        /// Sum of the used lengths, bytes.
        total: u64,
    },
    /// Pages on other channels are to be waited for. Nothing to do with a single channel.
    Flush,
    /// The section ends.
    EndOfSection,
}

impl PageHeader {
    /// Bytes of an encoded header, without the block's id.
    pub const LEN: usize = 8;

    /// The header of a page as it is on the wire.
    pub fn page_word(kind: PageKind, offset: u64, continued: bool) -> u64 {
        debug_assert_eq!(offset & FLAGS, 0);
        let kind = if kind == PageKind::Zero { ZERO } else { PAGE };
        offset | kind | if continued { CONTINUE } else { 0 }
    }

    /// Reads a header where none but that of a list, a flush or an end is expected. Pages are read by
    /// [`PageRecords`](super::PageRecords).
    ///
    /// # Errors
    ///
    /// When its flags are impossible, or the stream ends or fails.
    pub fn read(reader: &mut dyn WireRead) -> Result<Self, FormatError> {
        let at = reader.offset();
        Self::parse(reader.be64("the list of RAM blocks")?, at)
    }

    /// What a header says.
    ///
    /// # Errors
    ///
    /// When its flags are impossible, or are of an encoding that is not read; `at` is where it stands on
    /// the stream.
    #[inline]
    pub fn parse(word: u64, at: u64) -> Result<Self, FormatError> {
        let (offset, flags) = (word & !FLAGS, word & FLAGS);
        let page = |kind| Self::Page { kind, offset, continued: flags & CONTINUE != 0 };
        Ok(match flags & !CONTINUE {
            PAGE => page(PageKind::Normal),
            ZERO => page(PageKind::Zero),
            MEM_SIZE if flags == MEM_SIZE => Self::List { total: offset },
            EOS if word == EOS => Self::EndOfSection,
            MULTIFD_FLUSH if word == MULTIFD_FLUSH => Self::Flush,
            _ => return Err(refused(flags, at)),
        })
    }

    /// What page it is, if it is of the same block as the one before, and its offset.
    #[inline]
    pub(super) fn continued_page(word: u64) -> Option<(PageKind, u64)> {
        let (offset, flags) = (word & !FLAGS, word & FLAGS);
        if flags == PAGE | CONTINUE {
            Some((PageKind::Normal, offset))
        } else if flags == ZERO | CONTINUE {
            Some((PageKind::Zero, offset))
        } else {
            None
        }
    }
}

#[cold]
fn refused(flags: u64, offset: u64) -> FormatError {
    match flags {
        flags if flags & XBZRLE != 0 => FormatError::Unsupported { offset, what: "XBZRLE pages" },
        flags if flags & HOOK != 0 => FormatError::Unsupported { offset, what: "RDMA pages" },
        _ => FormatError::value(offset, "flags of a page", flags),
    }
}

/// Ends a section of RAM.
pub fn put_end_of_section(out: &mut Vec<u8>) {
    out.put_be64(EOS);
}

/// Has the pages of all multifd channels waited for.
pub fn put_multifd_flush(out: &mut Vec<u8>) {
    out.put_be64(MULTIFD_FLUSH);
}
