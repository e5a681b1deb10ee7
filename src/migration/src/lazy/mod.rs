//! Memory that arrives while the guest already runs: from a source that still has it (postcopy),
//! or from a file (lazy restore).
//!
//! Of each block a bitmap says which pages are *outstanding*: they exist where they come from and
//! have not arrived. Nothing else is waited for. Memory that is discarded, or that was never
//! touched where it comes from, is not even registered for faults where that can be avoided, so
//! the kernel fills it with zeros by itself; what is registered all the same is
//! answered with zeros on the spot, and never asked for.

mod block;
mod follower;
mod handler;
mod latency;
mod shared;

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};
use ram_discard::ByteRange;

pub(crate) use follower::ArrivalFollower;
pub use handler::{FaultHandler, HandlerFailed};
pub use latency::{FaultStatistics, Histogram};
pub use shared::{SharedFaults, SharedRange};

pub use crate::sys::shared_faults::{ClientFaults, OfferedFaults};
pub use crate::sys::vmm_faults;

use super::error::MigrationError;
use super::page_bitmap::PageBitmap;
use super::ram::MigrationBlock;
use crate::sys::page_faults::{FaultKind, PageFaults};
use block::LazyBlock;
use shared::Client;

/// Where pages come from that a vCPU, or another thread, waits for.
pub trait PageSource: Send + Sync {
    /// A thread waits for the pages of `range`, whole host pages of a block. They are to be
    /// [placed](LazyRam::place) soon, by whatever thread.
    ///
    /// # Errors
    ///
    /// When they cannot be had now. They stay outstanding; the thread continues to wait, and they are
    /// requested anew by [`LazyRam::request_again`].
    fn request(&self, lazy: &LazyRam, block: usize, range: ByteRange) -> io::Result<()>;

    /// What was outstanding of `range` has been discarded: it need not be brought any more, and is dropped when it
    /// is. Must not wait for long.
    fn discarded(&self, _lazy: &LazyRam, _block: usize, _range: ByteRange) {}

    /// Whether a request that failed is made again by itself, several times a second, because what
    /// it failed for may pass: there is no memory, or a file cannot be read. Without,
    /// [`LazyRam::request_again`] makes it.
    fn is_retried(&self) -> bool {
        false
    }
}

/// How often a request is made again before [`HandlerFailed`] is told, unless there is only no
/// memory, which is waited for. Twenty a second.
const TRIES_MAX: u32 = 100;

/// A request that failed, of a source that is asked again.
struct FailedRequest {
    range: ByteRange,
    tries: u32,
}

/// Blocks whose pages arrive on demand.
///
/// However it ends, a page that is outstanding never becomes zeros under a guest: dropped before
/// all has arrived, the value leaves its userfaultfd open until the process ends, and accesses to
/// what is missing wait until then. Only [`abandon`](Self::abandon) lets them continue, with zeros.
pub struct LazyRam {
    // Shared with nothing but the leak in `drop`.
    faults: Arc<PageFaults>,
    blocks: Arc<[LazyBlock]>,
    statistics: Arc<Mutex<FaultStatistics>>,
    source: RwLock<Option<Arc<dyn PageSource>>>,
    /// Other processes that share the memory and wait for its pages.
    clients: RwLock<Vec<Arc<Client>>>,
    /// By block and start.
    failed_requests: Mutex<BTreeMap<(usize, u64), FailedRequest>>,
    /// Whom to tell of requests that fail for long.
    failure: RwLock<Option<Arc<handler::Failure>>>,
}

impl LazyRam {
    /// Prepares `blocks` so that accesses to outstanding pages wait. None of these pages may be
    /// there: it was never touched, or it was discarded.
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
            faults: Arc::new(faults),
            blocks: lazy.into(),
            statistics: Arc::default(),
            source: RwLock::new(None),
            clients: RwLock::default(),
            failed_requests: Mutex::default(),
            failure: RwLock::default(),
        };
        // What was there when faults were registered would have been taken for arrived.
        if let Err(error) = lazy.refuse_present() {
            lazy.abandon();
            return Err(error);
        }
        Ok(lazy)
    }

    /// Whether accesses to these blocks can be made to wait: what [`new`](Self::new) would find only
    /// when the guest is stopped. Nothing is left registered.
    ///
    /// # Errors
    ///
    /// What the kernel lacks or forbids, or which block's memory is of a kind that cannot.
    pub fn check(blocks: &[Arc<MigrationBlock>]) -> Result<(), MigrationError> {
        let mut faults =
            PageFaults::open(FaultKind::Missing).map_err(MigrationError::io("use userfaultfd"))?;
        for block in blocks {
            let Some(first) = ByteRange::new(0, block.page_size()) else { continue };
            let index = faults.add(Arc::clone(block.mapping()));
            let what = "have accesses to its memory wait, which postcopy needs and memfd, tmpfs and \
                        hugetlbfs can";
            faults.register(index, first).map_err(MigrationError::memory(block.id(), what))?;
        }
        Ok(())
    }

    /// Gives up on what is outstanding, in memory that no guest runs on and none will: accesses
    /// that wait continue and find zeros, those of clients as well.
    pub fn abandon(&self) {
        for (index, block) in self.blocks.iter().enumerate() {
            if let Err(error) = block.unregister(&self.faults) {
                // What is still registered ends with the value.
                tracing::warn!(block = block.id(), %error, "cannot end waiting for its pages");
            }
            // A client faults again, and is then answered with zeros.
            if let Some(range) = ByteRange::new(0, block.block().mapping().len()) {
                self.wake_clients(index, range);
            }
        }
    }

    /// Whether accesses wait for pages that have not arrived.
    pub fn is_awaited(&self) -> bool {
        self.blocks.iter().any(LazyBlock::is_awaited)
    }

    /// To be called again when others have had to do with the memory before the guest runs.
    ///
    /// # Errors
    ///
    /// That a page which is outstanding is there already.
    pub(crate) fn refuse_present(&self) -> Result<(), MigrationError> {
        self.blocks.iter().try_for_each(LazyBlock::refuse_present)
    }

    /// Has pages asked of `source` from now on; without one, a thread that needs a page waits.
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
    /// When there is no memory for them, or there is a page that was not placed here. What was placed
    /// before is not outstanding any more, so the same pages may come again.
    pub fn place(&self, block: usize, offset: u64, bytes: &[u8]) -> Result<(), MigrationError> {
        let mut arrived = block::Arrived::default();
        let placed = self.blocks[block].place(&self.faults, offset, bytes, &mut arrived);
        self.arrived(arrived);
        // A thread that waits for a page which was not placed faults again.
        if let Some(range) = ByteRange::new(offset, bytes.len() as u64) {
            self.wake_clients(block, range);
        }
        placed
    }

    /// Pages of zeros arrived. They take no memory before they are touched.
    ///
    /// # Errors
    ///
    /// When the threads that wait cannot be woken.
    pub fn place_zeros(&self, block: usize, range: ByteRange) -> Result<(), MigrationError> {
        let placed = self.blocks[block].place_zeros(&self.faults, range)?;
        self.arrived(placed);
        self.wake_clients(block, range);
        Ok(())
    }

    /// Asks again for the pages that threads wait for, after the source was gone.
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

    /// The same, to be looked at also when all has arrived and this is gone.
    pub(super) fn shared_statistics(&self) -> Arc<Mutex<FaultStatistics>> {
        Arc::clone(&self.statistics)
    }

    /// Ends it, when nothing is outstanding: faults are the kernel's again, and what discarded
    /// ranges hold is discarded. What cannot be discarded is logged and counted
    /// ([`FaultStatistics::unswept`]): it costs memory, and no guest misses it. Must not be called within a
    /// transaction or a listener of a block's manager.
    ///
    /// # Errors
    ///
    /// `EBUSY` when something is outstanding; or that the kernel refuses to end faults, which end
    /// with the value then.
    pub fn finish(&self) -> Result<(), MigrationError> {
        if self.outstanding() != 0 {
            let source = io::ErrorKind::ResourceBusy.into();
            return Err(MigrationError::Io { what: "end with pages outstanding", source });
        }
        let mut result = Ok(());
        for block in &*self.blocks {
            result = result.and(block.unregister(&self.faults));
            let unswept = block.sweep_discarded();
            if unswept != 0 {
                self.statistics.lock().unswept += unswept;
            }
        }
        result
    }

    fn request(&self, block: usize, range: ByteRange) -> io::Result<()> {
        let source = self.source.read().clone();
        match source {
            Some(source) => source.request(self, block, range),
            None => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    /// Asks for a page. When that fails, it is made again, by [`retry_requests`](Self::retry_requests)
    /// or once there is a source again.
    fn request_or_note(&self, block: usize, range: ByteRange) {
        if let Err(error) = self.request(block, range) {
            tracing::debug!(%error, %range, "cannot ask for a page now");
            if self.source.read().as_ref().is_some_and(|source| source.is_retried()) {
                let mut failed = self.failed_requests.lock();
                if failed.is_empty() {
                    tracing::warn!(%error, %range, "a page cannot be had now; it is tried again");
                }
                failed.insert((block, range.start()), FailedRequest { range, tries: 0 });
            }
        }
    }

    /// The guest discards `range` of a block: nothing of it is outstanding when this returns.
    fn discard(&self, block: usize, range: ByteRange) -> Result<(), MigrationError> {
        let was_outstanding = self.blocks[block].is_outstanding(range);
        // As pages of zeros that arrive: those who wait for them find zeros.
        self.place_zeros(block, range)?;
        let source = self.source.read().clone();
        if let (true, Some(source)) = (was_outstanding, source) {
            source.discarded(self, block, range);
        }
        Ok(())
    }

    fn has_failed_requests(&self) -> bool {
        !self.failed_requests.lock().is_empty()
    }

    /// Makes requests again that failed. One that has failed for long is told, and still made: the
    /// guest may be stopped until what it needs can be had.
    fn retry_requests(&self) {
        let failed = std::mem::take(&mut *self.failed_requests.lock());
        for ((block, start), mut request) in failed {
            // Background reading may have brought it meanwhile.
            if !self.blocks[block].is_outstanding(request.range) {
                continue;
            }
            let Err(error) = self.request(block, request.range) else { continue };
            if !block::is_no_memory(&error) {
                request.tries = request.tries.saturating_add(1);
            }
            if request.tries == TRIES_MAX
                && let Some(failure) = &*self.failure.read()
            {
                failure.tell(&MigrationError::io("bring a page that is waited for")(error));
            }
            self.failed_requests.lock().insert((block, start), request);
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

impl Drop for LazyRam {
    fn drop(&mut self) {
        if self.is_awaited() {
            tracing::error!(
                pages = self.outstanding(),
                "memory is dropped before it has arrived; accesses to it wait until the process ends"
            );
            // Closing the descriptor would turn each missing page into zeros, and so would a huge
            // page beside it, which the blocks forbid for as long as they live.
            std::mem::forget((Arc::clone(&self.faults), Arc::clone(&self.blocks)));
        }
    }
}

#[cfg(test)]
mod tests;
