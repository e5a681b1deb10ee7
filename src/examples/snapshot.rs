//! Saves a stopped guest to a file, and restores it from there.
//!
//!     cargo run --example snapshot

use std::error::Error;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;

use rustix::fs::{MemfdFlags, memfd_create};
use virtio_mem::controller::{InitialState, MemController};
use virtio_mem::device::{BlockSpan, Geometry, Request, Response, VirtioMem};
use virtio_mem::memory::RamBlock;
use virtio_mem::migration::progress::Progress;
use virtio_mem::migration::ram::{BlockOptions, MigrationBlock, RamBlocks};
use virtio_mem::migration::snapshot::{Restore, Snapshot, restore, save, write_image};
use virtio_mem::migration::stream::Configuration;
use virtio_mem::migration::virtio_mem::{properties, register};
use virtio_mem::migration::vmstate::DeviceRegistry;
use virtio_mem::ram_discard::RamDiscardManager;

const ADDR: u64 = 5 << 30;
const BLOCK: u64 = 2 << 20;
const REGION: u64 = 8 << 30;

struct Vm {
    file: File,
    controller: Arc<MemController>,
    blocks: RamBlocks,
    devices: DeviceRegistry,
}

fn vm() -> Result<Vm, Box<dyn Error>> {
    let file = File::from(memfd_create("region", MemfdFlags::CLOEXEC)?);
    file.set_len(REGION)?;
    let device = VirtioMem::new(Geometry::new(ADDR, REGION, BLOCK, None)?, REGION)?;
    let controller = Arc::new(MemController::new(InitialState::volatile(device)));
    let ram = Arc::new(RamBlock::new("vmem0".to_owned(), ADDR, REGION, file.try_clone()?, 0)?);
    controller.set_memory(vec![Arc::clone(&ram)])?;
    let block = MigrationBlock::map(ram, BlockOptions::migratable())?;
    // From here on the snapshot knows what is discarded, and freezes it for as long as it takes.
    let manager = Arc::clone(controller.manager()) as Arc<dyn RamDiscardManager>;
    block.set_discard_manager(0, manager)?;
    let mut blocks = RamBlocks::new();
    blocks.register(Arc::new(block))?;
    let mut devices = DeviceRegistry::new(properties());
    register(&mut devices, "vmem0", &controller)?;
    Ok(Vm { file, controller, blocks, devices })
}

/// QEMU's name of the capability decides on the layout of the file.
fn configuration() -> Configuration {
    Configuration::new("example")
}

fn main() -> Result<(), Box<dyn Error>> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("guest.image");

    let mut vm1 = vm()?;
    let plug = Request::Plug(BlockSpan { addr: ADDR, nb_blocks: 64 });
    assert_eq!(vm1.controller.execute(plug), Response::Ack);
    vm1.file.write_all_at(b"what the guest wrote", 5 * BLOCK)?;
    // Under its name the image is whole, or not there.
    write_image(&path, |file| {
        let snapshot = Snapshot {
            configuration: configuration(),
            blocks: &vm1.blocks,
            devices: &mut vm1.devices,
            progress: Arc::new(Progress::new()),
        };
        save(snapshot, file)
    })?;
    let image = File::open(&path)?;
    let seen = image.metadata()?;
    println!("an image of {} bytes takes {} on the disk", seen.len(), seen.blocks() * 512);

    let Vm { file, controller, blocks, mut devices } = vm()?;
    let guest = Restore {
        configuration: configuration(),
        blocks: Arc::new(blocks),
        devices: &mut devices,
        threads: 2,
        progress: Arc::new(Progress::new()),
    };
    restore(guest, &image)?;
    let mut bytes = [0; 20];
    file.read_exact_at(&mut bytes, 5 * BLOCK)?;
    assert_eq!(&bytes, b"what the guest wrote");
    assert_eq!(controller.ranges(true), vm1.controller.ranges(true));
    println!("restored: resident {:?} bytes", controller.resident_size());
    Ok(())
}
