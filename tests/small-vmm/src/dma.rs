//! A DMA user of guest memory, as VFIO is: it maps what is populated, and pins what it maps.
//!
//! As QEMU's VFIO listener it maps a populated range granule by granule, since a later discard may
//! be narrower and a mapping goes as a whole; it refuses what goes beyond its limit of mappings
//! (`dma_entry_limit`) and takes back what it had mapped of a range that it refuses; what it has not
//! mapped it need not unmap.
//!
//! A page of each mapping is really pinned. When the mapping goes, the guest and the device must
//! still see the same memory there: if not, memory was discarded while it was mapped.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ram_discard::{RamDiscardListener, Section};

use crate::memory::GuestRam;
use crate::sys::Pinned;

/// Where in a page the guest and the device are compared; vCPUs write the ends of pages only.
const MARK: usize = 2048;

/// The mappings of a DMA user, to be looked at while its listener is registered.
#[derive(Clone, Debug)]
pub struct DmaMappings {
    shared: Arc<Mutex<Mappings>>,
}

#[derive(Debug)]
struct Mappings {
    ram: Arc<GuestRam>,
    /// Guest-physical address of the region.
    gpa: u64,
    granularity: u64,
    limit: usize,
    /// By the offset of their granule in the region.
    mapped: BTreeMap<u64, Pinned>,
    marks: u64,
    faults: Vec<String>,
}

impl DmaMappings {
    /// None yet, of a region at `gpa` whose manager has this granularity; `limit` mappings at most.
    pub fn new(ram: Arc<GuestRam>, gpa: u64, granularity: u64, limit: usize) -> Self {
        let mappings = Mappings {
            ram,
            gpa,
            granularity,
            limit,
            mapped: BTreeMap::new(),
            marks: 0,
            faults: Vec::new(),
        };
        Self { shared: Arc::new(Mutex::new(mappings)) }
    }

    /// The listener that keeps them.
    pub fn listener(&self) -> Box<dyn RamDiscardListener> {
        Box::new(DmaListener { mappings: self.clone() })
    }

    /// Offsets of the granules that are mapped, ascending.
    pub fn mapped(&self) -> Vec<u64> {
        self.lock().mapped.keys().copied().collect()
    }

    /// What was against the contract, and memory that went while it was mapped.
    pub fn faults(&self) -> Vec<String> {
        self.lock().faults.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Mappings> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct DmaListener {
    mappings: DmaMappings,
}

impl RamDiscardListener for DmaListener {
    fn name(&self) -> &str {
        "dma"
    }

    fn notify_populate(&mut self, section: Section) -> Result<(), String> {
        self.mappings.lock().map(section)
    }

    fn notify_discard(&mut self, section: Section) {
        self.mappings.lock().unmap(section);
    }
}

impl Mappings {
    fn map(&mut self, section: Section) -> Result<(), String> {
        let mut done = Vec::new();
        for granule in self.granules(section) {
            let result = self.map_granule(granule);
            if let Err(reason) = result {
                done.into_iter().rev().for_each(|granule| self.unmap_granule(granule));
                return Err(reason);
            }
            done.push(granule);
        }
        Ok(())
    }

    fn map_granule(&mut self, granule: u64) -> Result<(), String> {
        if self.mapped.contains_key(&granule) {
            self.faults.push(format!("{granule:#x} is populated, and was before"));
        }
        if self.mapped.len() == self.limit {
            return Err(format!("all {} DMA mappings are in use", self.limit));
        }
        let pinned =
            Pinned::page(&self.ram, self.gpa + granule).map_err(|error| error.to_string())?;
        self.mapped.insert(granule, pinned);
        Ok(())
    }

    fn unmap(&mut self, section: Section) {
        for granule in self.granules(section) {
            self.unmap_granule(granule);
        }
    }

    /// What is not mapped, or not any more, needs nothing.
    fn unmap_granule(&mut self, granule: u64) {
        let Some(pinned) = self.mapped.remove(&granule) else { return };
        self.marks += 1;
        let mark = self.marks.to_le_bytes();
        let seen = self
            .ram
            .write(self.gpa + granule + MARK as u64, &mark)
            .map_err(|error| error.to_string())
            .and_then(|()| pinned.unpin().map_err(|error| error.to_string()));
        match seen {
            Ok(page) if page[MARK..MARK + mark.len()] == mark => {}
            Ok(_) => self.faults.push(format!("{granule:#x} was discarded while it was mapped")),
            Err(error) => self.faults.push(format!("{granule:#x}: {error}")),
        }
    }

    /// The granules of a section, which is made of whole ones.
    fn granules(&mut self, section: Section) -> impl Iterator<Item = u64> + use<> {
        let granularity = self.granularity;
        if !section.start().is_multiple_of(granularity)
            || !section.end().is_multiple_of(granularity)
        {
            self.faults.push(format!("{section} is not made of granules of {granularity:#x}"));
        }
        (section.start() / granularity..section.end().div_ceil(granularity))
            .map(move |number| number * granularity)
    }
}
