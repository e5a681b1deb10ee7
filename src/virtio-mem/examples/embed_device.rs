//! Embeds the device in a VMM: memory, guest requests, a resize, and what is discarded.
//!
//!     cargo run --example embed_device

use std::error::Error;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use ram_discard::memory::RamBlock;
use rustix::fs::{MemfdFlags, memfd_create};
use virtio_mem::controller::{DeviceObserver, InitialState, MemController};
use virtio_mem::device::{BlockSpan, Geometry, Request, Response, VirtioMem};

const MIB: u64 = 1 << 20;
/// Where the guest sees the region.
const ADDR: u64 = 5 << 30;
const REGION: u64 = 1 << 30;
const BLOCK: u64 = 2 * MIB;

/// Tells the guest that its configuration space changed; a VMM raises the interrupt here.
struct Interrupt;

impl DeviceObserver for Interrupt {
    fn requested_size(&self, size: u64) {
        println!("{} MiB are requested", size / MIB);
    }

    fn config_changed(&self) {
        println!("config change: the driver reads the requested size");
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    // One file is the guest's memory, mapped by the VMM as usual, and shared.
    let file = File::from(memfd_create("region", MemfdFlags::CLOEXEC)?);
    file.set_len(REGION)?;

    let geometry = Geometry::new(ADDR, REGION, BLOCK, None)?;
    // Without a state store, block state ends with the process.
    let controller = MemController::new(InitialState::volatile(VirtioMem::new(geometry, 0)?));
    controller.observe(Arc::new(Interrupt));
    let ram = RamBlock::new("region".to_owned(), ADDR, REGION, file.try_clone()?, 0)?;
    controller.set_memory(vec![Arc::new(ram)])?;

    // The orchestrator asks for 64 MiB; the guest's driver plugs block by block.
    controller.resize(64 * MIB)?;
    for block in 0..64 * MIB / BLOCK {
        // A transport hands over the 24 bytes of a descriptor chain, and returns 10.
        let plug = Request::Plug(BlockSpan { addr: ADDR + block * BLOCK, nb_blocks: 1 }).to_bytes();
        let response = controller.execute(Request::from_bytes(&plug));
        assert_eq!(response.to_bytes(), Response::Ack.to_bytes());
        controller.answered();
    }
    assert_eq!(controller.config().plugged_size, 64 * MIB);
    // Plugged costs nothing; what the guest writes is resident.
    file.write_all_at(&[1; 4096], 0)?;
    println!(
        "plugged {:?}, resident {:?}",
        controller.plugged_ranges(),
        controller.resident_size()
    );

    // More than was asked for is refused, and an unplugged block's memory is gone at once.
    let more = Request::Plug(BlockSpan { addr: ADDR + 64 * MIB, nb_blocks: 1 });
    assert_eq!(controller.execute(more), Response::Nack);
    let unplug = Request::Unplug(BlockSpan { addr: ADDR, nb_blocks: 1 });
    assert_eq!(controller.execute(unplug), Response::Ack);
    assert_eq!(controller.resident_size(), Some(0));
    println!("unplugged: discarded {:?}", controller.unplugged_ranges());
    Ok(())
}
