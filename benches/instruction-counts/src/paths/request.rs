//! A guest request from the kick to the interrupt, by the daemon's own back-end on a split ring in
//! memory: the chain is walked and checked, the request executed (memory is given back by the
//! device's listener, the request counted in the metrics), the answer written, the chain returned
//! and the guest signalled. Not counted are the driver, the socket that set it up, the epoll loop
//! that the back-end is called from, and the kernel.
//!
//! One request a kick: with more, how often the guest is signalled in between depends on the time.

use std::fs::File;
use std::sync::Arc;

use anyhow::{Result, ensure};
use small_vmm::driver::{MemDriver, MemRequest, RequestType, ResponseType, Shape};
use small_vmm::memory::{GuestRam, Layout};
use vhost_user_backend::{VhostUserBackend, VringT};
use vhost_user_mem::backend::{MAX_QUEUE_SIZE, MemBackend};
use vhost_user_mem::gate::Gate;
use vhost_user_mem::metrics::{Metrics, MetricsListener};
use vhost_user_mem::queue::{AtomicMemory, Memory};
use vhost_user_mem::vring::Vring;
use vm_memory::{FileOffset, GuestAddress};
use vmm_sys_util::epoll::EventSet;

use super::region::{ADDR, controller};
use super::{GIB, MIB};
use crate::counted::counted;

const BOOT: u64 = 16 * MIB;
const RING: u64 = 0x1000;
const REGION: u64 = GIB;
const BLOCK: u64 = 2 * MIB;
const ROUNDS: u64 = 1000;

/// A driver and a back-end on the same memory.
struct Guest {
    driver: MemDriver,
    backend: MemBackend,
    vrings: [Vring; 1],
}

impl Guest {
    fn new() -> Result<Self> {
        let ram = Arc::new(GuestRam::new(Layout::boot_and_device(BOOT, ADDR, REGION)?)?);
        let driver = MemDriver::at(&ram, RING, MAX_QUEUE_SIZE as u16, true)?;
        let regions = ram.regions().iter().map(|region| {
            let file = FileOffset::from_arc(Arc::clone(&region.file), region.offset);
            (GuestAddress(region.gpa), region.size as usize, Some(file))
        });
        let memory = AtomicMemory::new(Memory::from_ranges_with_files(regions)?);

        let controller = Arc::new(controller(REGION, BLOCK, |_| false)?);
        let metrics = Arc::new(Metrics::new());
        controller.listen(Box::new(MetricsListener(Arc::clone(&metrics))))?;
        let gate = Arc::new(Gate::default());
        let backend = MemBackend::new(controller, metrics, gate, memory.clone())?;
        backend.update_memory(memory.clone())?;

        let vring = Vring::new(memory, MAX_QUEUE_SIZE as u16)?;
        let ring = driver.ring();
        vring.set_queue_size(ring.size());
        vring.set_queue_info(ring.desc_addr(), ring.avail_addr(), ring.used_addr())?;
        vring.set_queue_event_idx(true);
        vring.set_call(Some(File::from(ring.call_fd().try_clone_to_owned()?)));
        vring.set_queue_ready(true);
        vring.set_enabled(true);
        Ok(Self { driver, backend, vrings: [vring] })
    }

    fn execute(&mut self, kind: RequestType) -> Result<()> {
        let request = MemRequest::new(kind, ADDR + 100 * BLOCK, 1);
        self.driver.submit(&request.to_bytes(), &Shape::default())?;
        let Self { backend, vrings, .. } = self;
        counted(|| backend.handle_event(0, EventSet::IN, vrings, 0))?;
        let response = self.driver.complete()?;
        ensure!(response.kind() == ResponseType::Ack, "{response:?}");
        Ok(())
    }
}

/// STATE of a block.
pub fn state() -> Result<u64> {
    let mut guest = Guest::new()?;
    for _ in 0..ROUNDS {
        guest.execute(RequestType::State)?;
    }
    Ok(ROUNDS)
}

/// PLUG and UNPLUG of a block in turn.
pub fn plug_and_unplug() -> Result<u64> {
    let mut guest = Guest::new()?;
    for _ in 0..ROUNDS / 2 {
        guest.execute(RequestType::Plug)?;
        guest.execute(RequestType::Unplug)?;
    }
    Ok(ROUNDS)
}
