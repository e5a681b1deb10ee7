//! The RAM blocks of the memory table that the device's region needs.

use std::io;
use std::sync::Arc;

use parking_lot::Mutex;
use ram_discard::GpaRange;
use ram_discard::memory::RamBlock;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

use crate::queue::Memory;

/// The blocks of the last memory table. Those that stay are kept: each has a descriptor of its own,
/// and a table of many regions would otherwise need all of them twice at each change.
#[derive(Default)]
pub struct RamBlocks {
    kept: Mutex<Vec<Kept>>,
}

/// A block, and where its region is mapped. A mapping that is in both the old and the new table is
/// the same: the new one is mapped before the old one is unmapped.
#[derive(Clone)]
pub struct Kept {
    mapped_at: usize,
    block: Arc<RamBlock>,
}

impl RamBlocks {
    /// The blocks of `memory` in `region` (guest-physical).
    ///
    /// # Errors
    ///
    /// When one cannot be had, or could never be discarded.
    pub fn of(&self, memory: &Memory, region: Option<GpaRange>) -> io::Result<Vec<Kept>> {
        let kept = self.kept.lock();
        let mut blocks = Vec::new();
        for entry in memory.iter() {
            let (gpa, size) = (entry.start_addr().raw_value(), entry.len());
            let range = GpaRange::new(gpa, size);
            if !range.zip(region).is_some_and(|(range, region)| range.overlaps(region)) {
                continue;
            }
            let mapped_at = entry.as_ptr().addr();
            let is_same =
                |kept: &&Kept| kept.mapped_at == mapped_at && Some(kept.block.range()) == range;
            if let Some(same) = kept.iter().find(is_same) {
                blocks.push(same.clone());
                continue;
            }
            let id = format!("mem@{gpa:#x}");
            let Some(file) = entry.file_offset() else {
                return Err(io::Error::other(format!("memory region {id} has no file")));
            };
            let block = RamBlock::new(id, gpa, size, file.file().try_clone()?, file.start());
            let block = Arc::new(block.map_err(io::Error::other)?);
            blocks.push(Kept { mapped_at, block });
        }
        Ok(blocks)
    }

    /// The device uses `blocks` from now on.
    pub fn keep(&self, blocks: Vec<Kept>) {
        *self.kept.lock() = blocks;
    }
}

impl Kept {
    /// The block itself.
    pub fn block(&self) -> Arc<RamBlock> {
        Arc::clone(&self.block)
    }
}
