//! The file that a guest is restored from: an image of ours, or what `migrate file:` of QEMU wrote, with
//! mapped-ram or without.
//!
//! A file is hostile until it was checked: all of it is, before a VMM hears of it. What is held grows
//! with what the file has, not with what it claims, and nothing depends on the size of absent memory.

mod check;
mod discards;
mod places;
mod read;
#[cfg(test)]
pub(crate) mod sample;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::path::{Path, PathBuf};

use migration::page_bitmap::PageBitmap;
use migration::stream::{Configuration, TARGET_PAGE_SIZE};

pub use discards::Discards;
pub use read::PageReader;
pub(crate) use read::is_zero;

use crate::error::PagerError;
use places::Places;

/// A guest in a file, ready to be served.
#[derive(Debug)]
pub struct GuestImage {
    path: PathBuf,
    file: File,
    configuration: Configuration,
    mapped: bool,
    ram_section: u32,
    early: Vec<u8>,
    device_state: Vec<u8>,
    blocks: Vec<ImageBlock>,
    virtio_mem: Vec<String>,
    runstate: Option<String>,
    warnings: Vec<String>,
}

/// A RAM block of the guest.
#[derive(Debug)]
pub struct ImageBlock {
    id: String,
    used_length: u64,
    present: PageBitmap,
    discards: Option<Discards>,
    places: Places,
}

impl GuestImage {
    /// Opens and checks a file.
    ///
    /// # Errors
    ///
    /// When it cannot be read or is not the whole of a guest, with a sentence that says what is wrong.
    pub fn open(path: &Path) -> Result<Self, PagerError> {
        let file = File::open(path).map_err(PagerError::file("open", path))?;
        check::check(path, file)
    }

    /// The file's name.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Machine type, page size and UUID, as a destination compares them. Without capabilities: they say
    /// how the file is laid out, which is of no interest to who gets a stream.
    pub fn configuration(&self) -> &Configuration {
        &self.configuration
    }

    /// Whether pages have fixed places in the file (mapped-ram).
    pub fn is_mapped(&self) -> bool {
        self.mapped
    }

    /// The number of the RAM section, which no device has.
    pub fn ram_section(&self) -> u32 {
        self.ram_section
    }

    /// The sections of devices that go before RAM, as they are in the file.
    pub fn early(&self) -> &[u8] {
        &self.early
    }

    /// The sections of devices that follow RAM, as they are in the file.
    pub fn device_state(&self) -> &[u8] {
        &self.device_state
    }

    /// RAM blocks, in the order of the file.
    pub fn blocks(&self) -> &[ImageBlock] {
        &self.blocks
    }

    /// Paths of the virtio-mem devices whose blocks are known.
    pub fn virtio_mem(&self) -> &[String] {
        &self.virtio_mem
    }

    /// What the guest was when it was saved, in QEMU's words, as "running" or "paused"; `None` when the
    /// file does not say.
    pub fn runstate(&self) -> Option<&str> {
        self.runstate.as_deref()
    }

    /// Whether a plain load would leave the guest paused.
    pub fn is_paused(&self) -> bool {
        self.runstate().is_some_and(|state| state != "running")
    }

    /// Bytes of all pages that there are.
    pub fn present_bytes(&self) -> u64 {
        self.blocks.iter().map(|block| block.present.count() * TARGET_PAGE_SIZE).sum()
    }

    /// What is odd about the file and does not keep it from being restored.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }
}

impl ImageBlock {
    /// Its id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Bytes.
    pub fn used_length(&self) -> u64 {
        self.used_length
    }

    /// Target pages.
    pub fn nr_pages(&self) -> u64 {
        self.used_length / TARGET_PAGE_SIZE
    }

    /// Which pages there are. None of them is in discarded memory.
    pub fn present(&self) -> &PageBitmap {
        &self.present
    }

    /// What is discarded of it, when it is the memory of a virtio-mem device.
    pub fn discards(&self) -> Option<&Discards> {
        self.discards.as_ref()
    }
}
