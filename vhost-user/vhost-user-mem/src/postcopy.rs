//! Postcopy of the guest's memory: the part of the back-end (PAGEFAULT).
//!
//! From POSTCOPY_LISTEN on, memory is mapped before all of it has arrived, and a thread here that misses
//! a page waits until the front-end has put it there. Who can wait is the worker, in rings and
//! request buffers, and the thread that serves messages, which reads the used index. Neither
//! passes guest memory to system calls, so no privilege is needed.
//!
//! Only what the front-end may have to fill is waited for: not the discarded parts of the device's
//! region. Nothing comes for those, so faults there stay the kernel's. Which parts these are may
//! still change, when the device's state is loaded, and when the guest is served meanwhile; so this is a listener of
//! the manager.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use migration::lazy::OfferedFaults;
use parking_lot::Mutex;
use ram_discard::{GpaRange, ListenerId, RamDiscardListener, Section};
use virtio_mem::controller::{FreezeHolder, MemController};
use virtio_mem::device::Geometry;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::queue::Memory;
use crate::sys::guest_memory;

mod ranges;

/// Whether PAGEFAULT can be offered.
///
/// # Errors
///
/// What the kernel lacks, or why it refuses.
pub fn probe() -> io::Result<()> {
    OfferedFaults::open().map(drop)
}

/// Postcopy on one connection.
pub struct Postcopy {
    controller: Arc<MemController>,
    faults: Arc<Mutex<Faults>>,
    listener: Mutex<Option<ListenerId>>,
    advised: AtomicBool,
}

struct Faults {
    geometry: Geometry,
    offered: Option<OfferedFaults>,
    listening: bool,
    /// What is mapped in the place of memory that does not arrive.
    zeros: Option<OwnedFd>,
    /// The front-end's memory while it is registered. Keeps it mapped.
    memory: Option<Arc<Memory>>,
    /// Sections of the region that are plugged, ascending and apart. `None` from when they are too
    /// many to be followed: all of the region is waited for then.
    plugged: Option<Vec<Section>>,
}

impl Postcopy {
    /// Nothing is advised yet.
    pub fn new(controller: Arc<MemController>) -> Self {
        let geometry = *controller.geometry();
        let faults = Arc::new(Mutex::new(Faults::new(geometry)));
        Self { controller, faults, listener: Mutex::default(), advised: AtomicBool::new(false) }
    }

    /// POSTCOPY_ADVISE: opens a userfaultfd and gives a copy for the front-end.
    ///
    /// # Errors
    ///
    /// When the kernel refuses, or postcopy is under way.
    pub fn advise(&self) -> io::Result<OwnedFd> {
        let mut faults = self.faults.lock();
        if faults.listening {
            return Err(io::Error::other("postcopy is under way"));
        }
        let (offered, zeros) = (OfferedFaults::open()?, guest_memory::zeros()?);
        let copy = offered.copy()?;
        (faults.offered, faults.zeros) = (Some(offered), Some(zeros));
        self.advised.store(true, Ordering::Relaxed);
        Ok(copy)
    }

    /// Whether the front-end was given a userfaultfd of this process.
    pub fn was_advised(&self) -> bool {
        self.advised.load(Ordering::Relaxed)
    }

    /// POSTCOPY_LISTEN: memory that is mapped from now on may have missing pages; there must be
    /// none yet. The guest changes no block until the [end](Self::end), since memory that was
    /// discarded could be filled again by what still arrives; or until a client of the discard channel says that it
    /// follows for what brings the memory.
    ///
    /// # Errors
    ///
    /// When it comes out of order, or block state cannot be frozen.
    pub fn listen(&self, memory: &Memory) -> io::Result<()> {
        {
            let mut faults = self.faults.lock();
            if faults.listening || faults.offered.is_none() {
                return Err(io::Error::other("POSTCOPY_ADVISE has not come just before"));
            }
            if memory.iter().next().is_some() {
                // It may have been touched, and missing pages been taken for zeros.
                return Err(io::Error::other("memory was mapped before POSTCOPY_LISTEN"));
            }
            faults.listening = true;
            faults.plugged = Some(Vec::new());
        }
        self.controller.freeze(FreezeHolder::Incoming)?;
        if self.controller.geometry().region_size() != 0 {
            let listener = Box::new(Listener(Arc::clone(&self.faults)));
            let id = self.controller.listen(listener).map_err(io::Error::other)?;
            *self.listener.lock() = Some(id);
        }
        Ok(())
    }

    /// The front-end's memory was mapped, and is not used yet.
    ///
    /// # Errors
    ///
    /// When its faults cannot be had.
    pub fn map(&self, memory: Arc<Memory>) -> io::Result<()> {
        let mut faults = self.faults.lock();
        if !faults.listening {
            return Ok(());
        }
        guest_memory::forbid_huge_pages(&memory);
        let wanted = ranges::wanted(&memory, faults.geometry.region(), faults.plugged.as_deref());
        // Whatever was registered before and is mapped no more is forgotten by the kernel.
        faults.memory = Some(memory);
        wanted.into_iter().try_for_each(|range| faults.register(range))
    }

    /// Where a region of the memory table that starts at `gpa` is mapped here.
    pub fn mapped_at(&self, gpa: u64) -> Option<u64> {
        guest_memory::start_of(self.faults.lock().memory.as_deref()?, gpa)
    }

    /// POSTCOPY_END: everything has arrived. Threads that still wait continue, and what is missing is
    /// zeros.
    ///
    /// # Errors
    ///
    /// When it was not advised, or the kernel refuses.
    pub fn end(&self) -> io::Result<()> {
        let result = {
            let mut faults = self.faults.lock();
            let Some(offered) = faults.offered.take() else {
                return Err(io::Error::other("no POSTCOPY_ADVISE has come"));
            };
            faults.listening = false;
            let memory = faults.memory.take();
            // Closing is not enough: the front-end has a copy.
            mapped(memory.as_deref()).try_for_each(|(at, len)| offered.unregister(at, len))
        };
        self.close();
        // Pages of zeros did not come. The guest runs already: it cannot be refused any more.
        if let Err(error) = self.controller.reserve_memory() {
            tracing::error!(%error, "the guest may miss a huge page");
        }
        result
    }

    /// Whether the connection is between LISTEN and END.
    pub fn is_listening(&self) -> bool {
        self.faults.lock().listening
    }

    /// The connection is gone before the [end](Self::end): what is missing will never come. A thread that
    /// waits goes on with memory that is not the guest's any more: a page of zeros in the guest's
    /// file would be taken for one that has arrived.
    ///
    /// # Errors
    ///
    /// When memory could not be replaced. Who waits still waits then.
    pub fn abandon(&self) -> io::Result<()> {
        let mut faults = self.faults.lock();
        faults.listening = false;
        let (offered, memory) = (faults.offered.take(), faults.memory.take());
        let zeros = faults.zeros.take();
        let (Some(offered), Some(memory), Some(zeros)) = (offered, memory, zeros) else {
            return Ok(());
        };
        // All of it before any thread continues, since it may miss another page next.
        guest_memory::replace_by_zeros(&memory, &zeros)?;
        mapped(Some(&memory)).try_for_each(|(at, len)| offered.wake(at, len))
    }

    /// What ends with postcopy or with the connection, once its memory is not used any more.
    pub fn close(&self) {
        if let Some(id) = self.listener.lock().take()
            && let Err(error) = self.controller.manager().unregister(id)
        {
            tracing::error!(%error, "cannot end listening for what is discarded");
        }
        if let Err(error) = self.controller.thaw(FreezeHolder::Incoming) {
            tracing::error!(%error, "cannot save that migration ended");
        }
    }
}

/// Start and length of each mapping.
fn mapped(memory: Option<&Memory>) -> impl Iterator<Item = (u64, u64)> {
    let regions = memory.into_iter().flat_map(|memory| memory.iter());
    regions.map(|region| (region.as_ptr().addr() as u64, region.len()))
}

impl Faults {
    fn new(geometry: Geometry) -> Self {
        let plugged = Some(Vec::new());
        Self { geometry, offered: None, listening: false, zeros: None, memory: None, plugged }
    }

    /// Follows a change of `section`, unless all of the region is waited for, or is from now on.
    fn follow(
        &mut self,
        section: Section,
        change: impl Fn(&mut Vec<Section>, Section),
        call: impl Fn(&OfferedFaults, u64, u64) -> io::Result<()>,
    ) -> io::Result<()> {
        let Some(plugged) = &mut self.plugged else { return Ok(()) };
        change(plugged, section);
        if plugged.len() <= ranges::RANGES_MAX {
            let range = section.gpa(self.geometry.addr());
            return range.map_or(Ok(()), |range| self.for_each_mapped(range, call));
        }
        // One mapping again, where there were thousands.
        self.geometry.region().map_or(Ok(()), |region| self.register(region))?;
        self.plugged = None;
        Ok(())
    }

    /// Registers guest-physical `range`, as far as it is mapped.
    fn register(&self, range: GpaRange) -> io::Result<()> {
        self.for_each_mapped(range, OfferedFaults::register)
    }

    fn for_each_mapped(
        &self,
        range: GpaRange,
        call: impl Fn(&OfferedFaults, u64, u64) -> io::Result<()>,
    ) -> io::Result<()> {
        let (Some(offered), Some(memory)) = (&self.offered, &self.memory) else { return Ok(()) };
        for region in memory.iter() {
            let entry = GpaRange::new(region.start_addr().0, region.len());
            if let Some(part) = entry.and_then(|entry| entry.intersection(range)) {
                let start = region.as_ptr().addr() as u64 + (part.start() - region.start_addr().0);
                call(offered, start, part.len())?;
            }
        }
        Ok(())
    }
}

/// Keeps what is registered in step with what is plugged.
struct Listener(Arc<Mutex<Faults>>);

impl RamDiscardListener for Listener {
    fn name(&self) -> &str {
        "postcopy"
    }

    fn notify_populate(&mut self, section: Section) -> Result<(), String> {
        let mut faults = self.0.lock();
        faults.follow(section, ranges::add, OfferedFaults::register).map_err(|error| {
            if let Some(plugged) = &mut faults.plugged {
                ranges::remove(plugged, section);
            }
            format!("cannot wait for its pages: {error}")
        })
    }

    fn notify_discard(&mut self, section: Section) {
        let followed = self.0.lock().follow(section, ranges::remove, OfferedFaults::unregister);
        if let Err(error) = followed {
            tracing::error!(%section, %error, "discarded memory is still waited for");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: u64 = 4096;
    const MAX: u64 = ranges::RANGES_MAX as u64;

    fn listener() -> Listener {
        let geometry = Geometry::new(1 << 32, 1 << 30, BLOCK, None).unwrap();
        Listener(Arc::new(Mutex::new(Faults::new(geometry))))
    }

    fn blocks(start: u64, end: u64) -> Section {
        Section::from_bounds(start * BLOCK, end * BLOCK).unwrap()
    }

    #[test]
    fn a_region_in_tatters_is_not_followed() {
        let mut listener = listener();
        let followed = |listener: &Listener| listener.0.lock().plugged.as_ref().map(Vec::len);
        for block in 0..MAX {
            listener.notify_populate(blocks(2 * block, 2 * block + 1)).unwrap();
        }
        assert_eq!(followed(&listener), Some(ranges::RANGES_MAX));
        listener.notify_populate(blocks(2 * MAX, 2 * MAX + 1)).unwrap();
        assert_eq!(followed(&listener), None);
        listener.notify_discard(blocks(0, 2 * MAX + 1));
        listener.notify_populate(blocks(0, 1)).unwrap();
        assert_eq!(followed(&listener), None, "it may be registered in part only");
    }

    #[test]
    fn a_region_that_is_torn_by_discards_is_not_followed() {
        let mut listener = listener();
        listener.notify_populate(blocks(0, 2 * MAX + 1)).unwrap();
        for block in (1..=MAX).rev() {
            assert!(listener.0.lock().plugged.is_some());
            listener.notify_discard(blocks(2 * block - 1, 2 * block));
        }
        assert!(listener.0.lock().plugged.is_none());
    }
}
