//! A guest in a file, and back.
//!
//! The file has QEMU's mapped-ram layout: every page has a fixed place, a bitmap per block says
//! which are there, and what is absent is a hole in the file. So a page costs no header, blocks
//! are written and read in large pieces and by several threads, and only what the guest holds
//! takes room.

mod background;
mod file_io;
mod huge_pages;
mod image;
mod lazy;
mod load;
mod save;
mod sink;
mod size;
mod stream;

pub use background::{RunningGuest, save_in_background};
pub use file_io::FileIo;
pub use image::{NewImage, write_image};
pub use lazy::{LazyRestore, restore_lazily};
pub use load::{Restore, restore};
pub use save::{StoppedGuest, save, write_bitmap};
pub use size::{ImageSize, image_size};

use super::stream::TARGET_PAGE_SIZE;
use crate::stream::{CAPABILITY_MAPPED_RAM, Configuration, MAPPED_RAM_ALIGNMENT, MappedRamHeader};

/// Memory is moved in pieces of this many bytes at most: few system calls, and still in the cache
/// between being read and being written.
const PIECE: u64 = 1 << 20;

/// The configuration of a snapshot file.
pub fn with_mapped_ram(configuration: &Configuration) -> Configuration {
    let mut configuration = configuration.clone();
    if !configuration.has(CAPABILITY_MAPPED_RAM) {
        configuration.capabilities.push(CAPABILITY_MAPPED_RAM.to_owned());
    }
    configuration
}

/// Bytes of the bitmap of a block of `used_length` bytes.
pub(crate) fn bitmap_len(used_length: u64) -> u64 {
    (used_length / TARGET_PAGE_SIZE).div_ceil(64) * 8
}

/// Where a block's bitmap and pages are, when its mapped-ram header begins `offset` bytes from the start
/// of the file. `None` where no file reaches.
pub fn place(offset: u64, used_length: u64) -> Option<MappedRamHeader> {
    let bitmap_offset = offset.checked_add(MappedRamHeader::LEN)?;
    let pages_offset = bitmap_offset
        .checked_add(bitmap_len(used_length))?
        .checked_next_multiple_of(MAPPED_RAM_ALIGNMENT)?;
    pages_offset.checked_add(used_length)?;
    Some(MappedRamHeader { page_size: TARGET_PAGE_SIZE, bitmap_offset, pages_offset })
}

#[cfg(test)]
mod tests;
