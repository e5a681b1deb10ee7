//! A RamDiscardListener that maps memory for DMA while it is populated, as VFIO's does.
//!
//!     cargo run --example map_for_dma

use std::collections::BTreeSet;
use std::error::Error;
use std::fs::File;
use std::sync::{Arc, Mutex};

use ram_discard::memory::RamBlock;
use ram_discard::{RamDiscardListener, Section};
use rustix::fs::{MemfdFlags, memfd_create};
use virtio_mem::controller::{InitialState, MemController};
use virtio_mem::device::{BlockSpan, Geometry, Request, Response, VirtioMem};

const ADDR: u64 = 5 << 30;
const BLOCK: u64 = 2 << 20;
const REGION: u64 = 64 * BLOCK;

/// An IOMMU with room for few mappings, each of which can only be undone as a whole.
struct Iommu {
    granularity: u64,
    limit: usize,
    mapped: Arc<Mutex<BTreeSet<u64>>>,
}

impl RamDiscardListener for Iommu {
    fn name(&self) -> &str {
        "iommu"
    }

    /// Granule by granule: a later discard may be narrower than this section.
    fn notify_populate(&mut self, section: Section) -> Result<(), String> {
        let granules = (section.start()..section.end()).step_by(self.granularity as usize);
        let mut mapped = self.mapped.lock().map_err(|error| error.to_string())?;
        if mapped.len() + granules.clone().count() > self.limit {
            // The manager has those that were told before discard again; the guest is answered BUSY.
            return Err(format!("no more than {} mappings can be had", self.limit));
        }
        // VFIO_IOMMU_MAP_DMA would be here.
        mapped.extend(granules);
        Ok(())
    }

    /// May be wider than what is mapped, and come twice. Memory goes when this has returned.
    fn notify_discard(&mut self, section: Section) {
        let mut mapped = self.mapped.lock().unwrap_or_else(|error| error.into_inner());
        // VFIO_IOMMU_UNMAP_DMA would be here.
        mapped.retain(|granule| !(section.start()..section.end()).contains(granule));
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let file = File::from(memfd_create("region", MemfdFlags::CLOEXEC)?);
    file.set_len(REGION)?;
    let geometry = Geometry::new(ADDR, REGION, BLOCK, None)?;
    let controller = MemController::new(InitialState::volatile(VirtioMem::new(geometry, REGION)?));
    let ram = RamBlock::new("region".to_owned(), ADDR, REGION, file, 0)?;
    controller.set_memory(vec![Arc::new(ram)])?;
    let request = |kind: fn(BlockSpan) -> Request, first: u64, nb_blocks| {
        controller.execute(kind(BlockSpan { addr: ADDR + first * BLOCK, nb_blocks }))
    };

    // Two blocks are plugged before the device comes; it is told of them when it registers.
    assert_eq!(request(Request::Plug, 0, 2), Response::Ack);
    let mapped = Arc::new(Mutex::new(BTreeSet::new()));
    let granularity = controller.manager().granularity();
    let iommu = Iommu { granularity, limit: 4, mapped: Arc::clone(&mapped) };
    controller.listen(Box::new(iommu))?;
    let show = |what| println!("{what}: {:x?}", mapped.lock().unwrap());
    show("registered");

    assert_eq!(request(Request::Plug, 8, 2), Response::Ack);
    show("two more");
    // The fifth mapping is refused: BUSY, and nothing is plugged.
    assert_eq!(request(Request::Plug, 16, 1), Response::Busy);
    assert_eq!(controller.config().plugged_size, 4 * BLOCK);
    assert_eq!(request(Request::Unplug, 1, 1), Response::Ack);
    show("one less");
    assert_eq!(request(Request::Plug, 16, 1), Response::Ack);
    show("and the refused one");
    Ok(())
}
