//! Regions and blocks to work on.

use std::fs::File;
use std::io;
use std::sync::Arc;

use anyhow::Result;
use migration::Progress;
use migration::dirty::DirtyTracker;
use migration::page_bitmap::PageBitmap;
use migration::ram::{BlockOptions, ListOptions, MigrationBlock, RamBlocks, RamSave};
use ram_discard::memory::RamBlock;
use ram_discard::{ByteRange, RamDiscardManager};
use rustix::fs::MemfdFlags;
use virtio_mem::controller::{InitialState, MemController};
use virtio_mem::device::{BlockBitmap, DeviceState, Geometry, VirtioMem};

/// Guest-physical address of every region.
pub const ADDR: u64 = 1 << 40;

/// A device whose blocks are plugged as `plugged` says.
pub fn controller(
    region_size: u64,
    block_size: u64,
    plugged: impl Fn(usize) -> bool,
) -> Result<MemController> {
    let geometry = Geometry::new(ADDR, region_size, block_size, None)?;
    let mut blocks = BlockBitmap::new(geometry.nr_blocks());
    for block in (0..geometry.nr_blocks()).filter(|&block| plugged(block)) {
        blocks.set(block..block + 1, true);
    }
    let state = DeviceState {
        requested_size: region_size,
        usable_region_size: region_size,
        plugged: blocks.words().to_vec(),
    };
    Ok(MemController::new(InitialState::volatile(VirtioMem::restore(geometry, state)?)))
}

/// An empty file of its own for each.
pub fn memfd(size: u64) -> io::Result<File> {
    let file = File::from(rustix::fs::memfd_create("instructions", MemfdFlags::CLOEXEC)?);
    file.set_len(size)?;
    Ok(file)
}

/// The memory of a device, empty, as migration sees it.
pub fn migration_block(
    controller: &MemController,
    options: BlockOptions,
) -> Result<Arc<MigrationBlock>> {
    let size = controller.geometry().region_size();
    let ram = RamBlock::new("vmem0".to_owned(), ADDR, size, memfd(size)?, 0)?;
    let block = MigrationBlock::map(Arc::new(ram), options)?;
    block.set_discard_manager(0, Arc::clone(controller.manager()) as Arc<dyn RamDiscardManager>)?;
    Ok(Arc::new(block))
}

/// The blocks of a guest that has only this one.
pub fn only(block: Arc<MigrationBlock>) -> Result<RamBlocks> {
    let mut blocks = RamBlocks::new();
    blocks.register(block)?;
    Ok(blocks)
}

/// The source of a guest that has only this block, of which `written` is written after the setup.
pub fn source(
    block: Arc<MigrationBlock>,
    written: &PageBitmap,
    progress: Arc<Progress>,
) -> Result<RamSave> {
    let tracker = |_: &_| -> Box<dyn DirtyTracker> { Box::new(Written(written.clone())) };
    Ok(RamSave::new(&only(block)?, ListOptions::default(), progress, tracker)?)
}

/// A guest that always writes the same pages.
struct Written(PageBitmap);

impl DirtyTracker for Written {
    fn start(&mut self, _populated: &[ByteRange]) -> io::Result<()> {
        Ok(())
    }

    fn sync(&mut self, dirty: &mut PageBitmap) -> io::Result<()> {
        dirty.or(&self.0);
        Ok(())
    }

    fn clear(&mut self, _range: ByteRange) -> io::Result<()> {
        Ok(())
    }

    fn stop(&mut self) -> io::Result<()> {
        Ok(())
    }
}
