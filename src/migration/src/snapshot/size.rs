//! How large an image becomes, told before it is taken.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;

use rustix::fs::MemfdFlags;

use super::save::{pages_of, put_end, put_ram_start, write_bitmap};
use super::sink::FileSink;
use super::with_mapped_ram;
use crate::error::MigrationError;
use crate::framing::Framing;
use crate::ram::{ListOptions, RamBlocks};
use crate::stream::{Configuration, TARGET_PAGE_SIZE};

/// The size of an image, bytes. The state of devices comes on top of both; pages begin at a multiple of
/// 1 MiB, so that state that is saved early may move them by whole ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageSize {
    /// What it takes of the disk at most; less by the pages that turn out to be zeros.
    pub on_disk: u64,
    /// Its length, as `ls -l` tells it: that of all RAM and more, though mostly holes. A file system that
    /// does not allow files of this length takes no image.
    pub length: u64,
}

/// What an image of a guest with `blocks` would take if it were taken now. No page is looked at; a guest
/// that runs may need more by the time it is stopped.
///
/// # Errors
///
/// When it cannot be found out which pages there are, or no file is as large.
pub fn image_size(
    blocks: &RamBlocks,
    configuration: &Configuration,
) -> Result<ImageSize, MigrationError> {
    // The image without its pages, by what writes images.
    let failed = || MigrationError::io("write the image without its pages");
    let memory = rustix::fs::memfd_create("image-size", MemfdFlags::CLOEXEC);
    let memory = File::from(memory.map_err(io::Error::from).map_err(failed())?);
    let mut out = FileSink::of_empty(&memory)?;
    let framing = Framing::begin(&mut out, &with_mapped_ram(configuration))?;
    let mut pages_len = 0;
    for (block, header) in put_ram_start(&mut out, blocks, ListOptions::of(configuration))? {
        let (pages, _) = pages_of(&block, block.discarded()?)?;
        pages_len += pages.count() * TARGET_PAGE_SIZE;
        write_bitmap(&pages, header, &memory).map_err(failed())?;
    }
    put_end(&mut out, framing, Vec::new())?;
    let metadata = memory.metadata().map_err(failed())?;
    Ok(ImageSize { on_disk: metadata.blocks() * 512 + pages_len, length: metadata.len() })
}
