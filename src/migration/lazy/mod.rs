//! Memory that arrives while the guest already runs: from a source that still has it (postcopy),
//! or from a file (lazy restore).
//!
//! Of each block a bitmap says which pages are *outstanding*: they exist where they come from and
//! have not arrived. Nothing else is waited for. Memory that is discarded, or that was never
//! touched where it comes from, is not even registered for faults where that can be avoided, so
//! the kernel fills it with zeros without anybody's help; what is registered all the same is
//! answered with zeros on the spot, and never asked for.

mod block;
mod handler;
mod latency;
mod shared;

use std::io;
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};

pub use handler::{FaultHandler, HandlerFailed};
pub use latency::{FaultStatistics, Histogram};
pub use shared::{SharedFaults, SharedRange};

use super::error::MigrationError;
use super::page_bitmap::PageBitmap;
use super::ram::MigrationBlock;
use crate::ByteRange;
use crate::sys::page_faults::{FaultKind, PageFaults};
use block::LazyBlock;
use shared::Client;

/// Where pages come from when somebody waits for them.
pub trait PageSource: Send + Sync {
    /// Somebody waits for the pages of `range`, whole host pages of a block. They are to be
    /// [placed](LazyRam::place) soon, by whatever thread.
    ///
    /// # Errors
    ///
    /// When they cannot be had now. They stay outstanding; whoever waits goes on waiting until
    /// somebody calls [`LazyRam::request_again`].
    fn request(&self, lazy: &LazyRam, block: usize, range: ByteRange) -> io::Result<()>;
}

/// Blocks whose pages arrive on demand.
///
/// Must live until nothing is outstanding: when it is dropped before, what is missing becomes
/// zeros, so the guest must not run any more then.
pub struct LazyRam {
    faults: PageFaults,
    blocks: Vec<LazyBlock>,
    statistics: Arc<Mutex<FaultStatistics>>,
    source: RwLock<Option<Arc<dyn PageSource>>>,
    /// Other processes that share the memory and wait for its pages.
    clients: RwLock<Vec<Arc<Client>>>,
}

impl LazyRam {
    /// Prepares `blocks` so that accesses to outstanding pages wait. None of these pages may be
    /// there: it was never touched, or it was given back.
    ///
    /// # Errors
    ///
    /// What kernel or memory lack, or that a page which is outstanding is there already. Nothing
    /// waits then.
    pub fn new(blocks: Vec<(Arc<MigrationBlock>, PageBitmap)>) -> Result<Self, MigrationError> {
        let mut faults =
            PageFaults::open(FaultKind::Missing).map_err(MigrationError::io("use userfaultfd"))?;
        let mut lazy = Vec::with_capacity(blocks.len());
        for (block, outstanding) in blocks {
            let index = faults.add(Arc::clone(block.mapping()));
            lazy.push(LazyBlock::new(block, index, outstanding)?);
        }
        for block in &lazy {
            block.register(&faults)?;
        }
        let lazy = Self {
            faults,
            blocks: lazy,
            statistics: Arc::default(),
            source: RwLock::new(None),
            clients: RwLock::default(),
        };
        // Whatever was there when faults were registered would have been taken for arrived.
        lazy.refuse_present()?;
        Ok(lazy)
    }

    /// To be called again when others have had to do with the memory before the guest runs.
    ///
    /// # Errors
    ///
    /// That a page which is outstanding is there already.
    pub(crate) fn refuse_present(&self) -> Result<(), MigrationError> {
        self.blocks.iter().try_for_each(LazyBlock::refuse_present)
    }

    /// Has pages asked of `source` from now on; without one, whoever needs a page waits.
    pub fn set_source(&self, source: Option<Arc<dyn PageSource>>) {
        *self.source.write() = source;
    }

    /// Pages that have not arrived.
    pub fn outstanding(&self) -> u64 {
        // Asked of those that change it: a count beside them would lag behind what they have placed.
        self.blocks.iter().map(LazyBlock::outstanding).sum()
    }

    /// Number of the block of that id.
    pub fn find(&self, id: &str) -> Option<usize> {
        self.blocks.iter().position(|block| block.id() == id)
    }

    /// The block of that number.
    pub fn block(&self, index: usize) -> &Arc<MigrationBlock> {
        self.blocks[index].block()
    }

    /// Number of blocks.
    pub fn nr_blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Places pages that arrived: `bytes` are whole host pages, at `offset` of a block. Those that
    /// are not outstanding are dropped, since the guest may have written there.
    ///
    /// # Errors
    ///
    /// When there is no memory for them, or somebody else put something there. What was placed
    /// before is not outstanding any more, so the same pages may come again.
    pub fn place(&self, block: usize, offset: u64, bytes: &[u8]) -> Result<(), MigrationError> {
        let mut arrived = block::Arrived::default();
        let placed = self.blocks[block].place(&self.faults, offset, bytes, &mut arrived);
        self.arrived(arrived);
        // Whoever waits for a page that was not placed faults again.
        if let Some(range) = ByteRange::new(offset, bytes.len() as u64) {
            self.wake_clients(block, range);
        }
        placed
    }

    /// Pages of zeros arrived. They take no memory before somebody touches them.
    ///
    /// # Errors
    ///
    /// When those who wait cannot be woken.
    pub fn place_zeros(&self, block: usize, range: ByteRange) -> Result<(), MigrationError> {
        let placed = self.blocks[block].place_zeros(&self.faults, range)?;
        self.arrived(placed);
        self.wake_clients(block, range);
        Ok(())
    }

    /// Asks again for the pages that somebody waits for, after the source was gone.
    ///
    /// # Errors
    ///
    /// When the source is gone again.
    pub fn request_again(&self) -> io::Result<()> {
        for (index, block) in self.blocks.iter().enumerate() {
            for range in block.requested() {
                self.request(index, range)?;
            }
        }
        Ok(())
    }

    /// The pages of a block that have not arrived.
    pub fn outstanding_of(&self, block: usize) -> PageBitmap {
        self.blocks[block].outstanding_bitmap()
    }

    /// The next pages of a block, from `page` on, that have not arrived: at most `max` of them.
    pub fn next_outstanding(
        &self,
        block: usize,
        page: u64,
        max: u64,
    ) -> Option<std::ops::Range<u64>> {
        self.blocks[block].next_outstanding(page, max)
    }

    /// How faults were resolved so far.
    pub fn statistics(&self) -> FaultStatistics {
        self.statistics.lock().clone()
    }

    /// The same for whoever looks at it later, also when all has arrived and this is gone.
    pub(super) fn shared_statistics(&self) -> Arc<Mutex<FaultStatistics>> {
        Arc::clone(&self.statistics)
    }

    /// Ends it, when nothing is outstanding: faults are the kernel's again, and what discarded
    /// ranges hold is given back.
    ///
    /// # Errors
    ///
    /// `EBUSY` when something is outstanding; or when the kernel refuses.
    pub fn finish(&self) -> Result<(), MigrationError> {
        if self.outstanding() != 0 {
            let source = io::ErrorKind::ResourceBusy.into();
            return Err(MigrationError::Io { what: "end with pages outstanding", source });
        }
        for block in &self.blocks {
            block.unregister(&self.faults)?;
            block.sweep_discarded()?;
        }
        Ok(())
    }

    fn request(&self, block: usize, range: ByteRange) -> io::Result<()> {
        let source = self.source.read().clone();
        match source {
            Some(source) => source.request(self, block, range),
            None => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    fn arrived(&self, placed: block::Arrived) {
        if !placed.waited.is_empty() {
            let mut statistics = self.statistics.lock();
            placed.waited.into_iter().for_each(|waited| statistics.remote(waited));
        }
    }

    fn wake_clients(&self, block: usize, range: ByteRange) {
        for client in &*self.clients.read() {
            client.arrived(self, block, range);
        }
    }
}

#[cfg(test)]
mod tests;
