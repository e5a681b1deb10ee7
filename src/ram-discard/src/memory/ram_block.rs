//! RamBlock: a guest-physical range and the file that backs it.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;

use thiserror::Error;

use super::backing::{Backing, BackingError};
use crate::{FileRange, GpaRange};

/// Why a RAM block is refused.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RamBlockError {
    /// It has no bytes, or wraps the address space or the file.
    #[error("RAM block {id}: {size:#x} bytes at {gpa:#x}, file offset {fd_offset:#x}: not a range")]
    NoRange {
        /// Id of the block.
        id: String,
        /// Guest-physical address.
        gpa: u64,
        /// Size, bytes.
        size: u64,
        /// Offset in the backing file, bytes.
        fd_offset: u64,
    },
    /// Its memory could not be discarded.
    #[error("RAM block {id}: {source}")]
    Backing {
        /// Id of the block.
        id: String,
        /// The reason.
        source: BackingError,
    },
    /// The pool of huge pages has none for a block that is plugged.
    #[error("RAM block {id}: no memory for plugged blocks: {source}")]
    NoMemory {
        /// Id of the block.
        id: String,
        /// The reason.
        source: io::Error,
    },
}

/// A piece of guest RAM: guest-physical range, backing file and the offset in it.
#[derive(Debug)]
pub struct RamBlock {
    id: String,
    range: GpaRange,
    fd_offset: u64,
    backing: Backing,
}

impl RamBlock {
    /// A block of `size` bytes at guest-physical address `gpa`, backed by `file` from
    /// `fd_offset`.
    ///
    /// # Errors
    ///
    /// When it is not a range, or its memory could not be discarded.
    pub fn new(
        id: String,
        gpa: u64,
        size: u64,
        file: File,
        fd_offset: u64,
    ) -> Result<Self, RamBlockError> {
        let range = match (GpaRange::new(gpa, size), fd_offset.checked_add(size)) {
            (Some(range), Some(_)) => range,
            _ => return Err(RamBlockError::NoRange { id, gpa, size, fd_offset }),
        };
        let backing = match Backing::new(file) {
            Ok(backing) => backing,
            Err(source) => return Err(RamBlockError::Backing { id, source }),
        };
        Ok(Self { id, range, fd_offset, backing })
    }

    /// The id, unique among the blocks of a VM.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The guest-physical range.
    pub fn range(&self) -> GpaRange {
        self.range
    }

    /// The file behind it.
    pub fn backing(&self) -> &Backing {
        &self.backing
    }

    /// Page size of the backing, bytes.
    pub fn page_size(&self) -> u64 {
        self.backing.page_size()
    }

    /// Whether the other block is the same part of the same file, at the same guest-physical address.
    pub fn is_same_memory(&self, other: &Self) -> bool {
        let of =
            |block: &Self| block.backing.file().metadata().map(|file| (file.dev(), file.ino()));
        (self.range, self.fd_offset) == (other.range, other.fd_offset)
            && matches!((of(self), of(other)), (Ok(one), Ok(another)) if one == another)
    }

    /// The bytes of the file behind the part of `gpa_range` that this block covers.
    pub fn file_range(&self, gpa_range: GpaRange) -> Option<FileRange> {
        let part = self.range.intersection(gpa_range)?;
        part.in_block(self.range.start())?.in_file(self.fd_offset)
    }

    /// Checks that device blocks of `block_size` bytes that start at multiples of it from `addr`
    /// cover whole pages of the backing.
    ///
    /// # Errors
    ///
    /// What does not fit.
    pub fn check_block_size(&self, addr: u64, block_size: u64) -> Result<(), RamBlockError> {
        let page_size = self.page_size();
        // Where in the file the region would start, were the block to cover its start.
        let skew = addr.wrapping_sub(self.range.start()).wrapping_add(self.fd_offset);
        for (what, value) in
            [("block size", block_size), ("file offset of the region", skew % page_size)]
        {
            if !value.is_multiple_of(page_size) {
                let source = BackingError::PageSize { what, value, page_size };
                return Err(RamBlockError::Backing { id: self.id.clone(), source });
            }
        }
        Ok(())
    }
}
