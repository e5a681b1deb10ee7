//! The part of a VMM that migration and snapshots need: memory, a device, and their registers.

use std::error::Error;
use std::fs::File;
use std::sync::Arc;

use migration::DeviceRegistry;
use migration::ram::{BlockOptions, MigrationBlock, RamBlocks};
use ram_discard::RamDiscardManager;
use ram_discard::memory::RamBlock;
use rustix::fs::{MemfdFlags, memfd_create};
use virtio_mem::controller::{InitialState, MemController};
use virtio_mem::device::{Geometry, VirtioMem};
use virtio_mem::sections;

/// Where the guest sees the region.
pub const ADDR: u64 = 5 << 30;
pub const BLOCK: u64 = 2 << 20;

pub struct Vm {
    /// The guest's memory.
    pub file: File,
    pub controller: Arc<MemController>,
    /// Memory that moves.
    pub blocks: RamBlocks,
    /// Device state that moves.
    pub devices: DeviceRegistry,
}

impl Vm {
    /// With a region of `size` bytes, all of which the guest may plug.
    pub fn new(size: u64) -> Result<Self, Box<dyn Error + Send + Sync>> {
        let file = File::from(memfd_create("region", MemfdFlags::CLOEXEC)?);
        file.set_len(size)?;
        let device = VirtioMem::new(Geometry::new(ADDR, size, BLOCK, None)?, size)?;
        let controller = Arc::new(MemController::new(InitialState::volatile(device)));
        let ram = Arc::new(RamBlock::new("vmem0".to_owned(), ADDR, size, file.try_clone()?, 0)?);
        controller.set_memory(vec![Arc::clone(&ram)])?;

        let block = MigrationBlock::map(ram, BlockOptions::migratable())?;
        // From here on the engine knows what is discarded, and freezes it for as long as it takes.
        let manager = Arc::clone(controller.manager()) as Arc<dyn RamDiscardManager>;
        block.set_discard_manager(0, manager)?;
        let mut blocks = RamBlocks::new();
        blocks.register(Arc::new(block))?;

        let mut devices = DeviceRegistry::new(sections::properties());
        for (idstr, section) in sections::of("vmem0", &controller) {
            devices.register(&idstr, 0, section)?;
        }
        Ok(Self { file, controller, blocks, devices })
    }
}
