//! The device as it is served: one change at a time, durable, all or nothing.
//!
//! This is the one place where device, listeners, memory and saved state meet. Every change goes
//! the same way, so that whatever can refuse it is asked before anything is done:
//!
//! | step | PLUG | UNPLUG, UNPLUG_ALL |
//! | --- | --- | --- |
//! | 1 | the device judges the request | the device judges the request |
//! | 2 | block state is not frozen, memory is mapped and can be given back | the same |
//! | 3 | listeners populate, memory first; a refusal is undone in reverse | state is committed |
//! | 4 | state is committed; a failure is undone in reverse | listeners discard, memory last |
//! | 5 | the guest is answered | the guest is answered |
//!
//! A process killed between two steps leaves a state from which the next one can go on: blocks
//! that are committed as unplugged are swept when memory is mapped again, and a request that was
//! committed but not answered is recognised when it comes again.

mod load_state;
mod store;

use std::collections::BTreeSet;
use std::io;
use std::ops::{ControlFlow, Range};
use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};
use thiserror::Error;

pub use load_state::LoadStateError;
pub use store::{BlockUpdate, JournalUpdate, StateRecord, StateStore, Volatile};

use crate::ByteRange;
use crate::device::{
    Change, ConfigSpace, Geometry, Request, RequestedSizeError, Response, Verdict, VirtioMem,
};
use crate::memory::{MemoryListener, NotReady, RamBlock, RamBlockError, RegionMemory};
use crate::ram_discard::{
    ListenerId, LocalRamDiscardManager, RamDiscardListener, RamDiscardSource, RegisterError,
    SourceId, Transaction,
};

/// Who holds block state frozen while memory migrates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum FreezeHolder {
    /// The front-end logs writes to guest memory (VHOST_F_LOG_ALL).
    Log,
    /// The management API says so.
    Api,
    /// Another party, such as a client of the discard channel.
    Client(u64),
    /// Memory arrives here while the guest runs (postcopy). The state that belongs to it may
    /// still be loaded: it comes by the same migration.
    Incoming,
}

/// Is told after the device changed. Called with the device locked: must not block, and must not
/// call back. Sizes in bytes.
pub trait DeviceObserver: Send + Sync {
    /// The requested size was set.
    fn requested_size(&self, _size: u64) {}
    /// Blocks were plugged or unplugged.
    fn plugged_size(&self, _size: u64) {}
    /// Migration began or ended.
    fn migration(&self, _active: bool) {}
    /// The guest must be told to read its configuration again.
    fn config_changed(&self) {}
}

/// Why the requested size was not set; nothing was changed.
#[derive(Debug, Error)]
pub enum ResizeError {
    /// It breaks a rule.
    #[error(transparent)]
    Size(#[from] RequestedSizeError),
    /// The state could not be saved.
    #[error("cannot save the device state: {0}")]
    Store(#[from] io::Error),
}

/// Why a system reset was not done; nothing was changed.
#[derive(Debug, Error)]
pub enum ResetError {
    /// Memory cannot be given back.
    #[error(transparent)]
    Memory(#[from] NotReady),
    /// The state could not be saved.
    #[error("cannot save the device state: {0}")]
    Store(#[from] io::Error),
}

/// What became of a system reset that was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reset {
    /// Everything is unplugged.
    Done,
    /// Migration is active; it is done when that ends.
    Deferred,
}

/// A virtio-mem device with its listeners, its memory and its saved state.
pub struct MemController {
    geometry: Geometry,
    served: Arc<Served>,
    manager: Arc<LocalRamDiscardManager>,
    source: SourceId,
    memory: Arc<RegionMemory>,
}

/// What requests change. Locked for moments only, so that the configuration can be read while
/// memory is given back; changes are serialised by the manager's transaction.
struct Served {
    geometry: Geometry,
    state: Mutex<State>,
}

struct State {
    device: VirtioMem,
    store: Box<dyn StateStore>,
    journal: Option<Request>,
    holders: BTreeSet<FreezeHolder>,
    /// A freeze has ended, but the store could not take that: what it has still names the holder.
    thaw_unsaved: bool,
    reset_pending: bool,
    sweep_pending: bool,
    observers: Vec<Arc<dyn DeviceObserver>>,
}

/// How a controller starts: what a state store found, or a new device.
pub struct Start {
    /// The device.
    pub device: VirtioMem,
    /// Where its state is kept.
    pub store: Box<dyn StateStore>,
    /// The last request that was executed and may not have been answered.
    pub journal: Option<Request>,
    /// Whether the management API held migration active.
    pub api_migration: bool,
    /// Whether unplugged blocks may still hold memory, because the process before was killed:
    /// they are swept when memory is mapped.
    pub sweep: bool,
}

impl Start {
    /// A new device whose state ends with the process.
    pub fn volatile(device: VirtioMem) -> Self {
        Self {
            device,
            store: Box::new(Volatile),
            journal: None,
            api_migration: false,
            sweep: false,
        }
    }
}

impl MemController {
    /// A controller without memory.
    pub fn new(start: Start) -> Self {
        let Start { device, store, journal, api_migration, sweep } = start;
        let geometry = *device.geometry();
        let memory = RegionMemory::new(geometry);
        let holders = api_migration.then_some(FreezeHolder::Api).into_iter().collect();
        let state = State {
            device,
            store,
            journal,
            holders,
            thaw_unsaved: false,
            reset_pending: false,
            sweep_pending: sweep,
            observers: Vec::new(),
        };
        let served = Arc::new(Served { geometry, state: Mutex::new(state) });
        let manager = Arc::new(LocalRamDiscardManager::new(geometry.region_size()));
        let source = manager
            .add_source(Arc::clone(&served) as Arc<dyn RamDiscardSource>)
            .expect("the source is about the manager's region");
        if let Some(section) = geometry.section() {
            // Memory is not mapped yet, so there is nothing it could refuse.
            manager
                .register(section, Box::new(MemoryListener(Arc::clone(&memory))))
                .expect("memory that is not mapped refuses nothing");
        }
        Self { geometry, served, manager, source, memory }
    }

    /// What never changes.
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// The configuration space as it is now.
    pub fn config(&self) -> ConfigSpace {
        self.state().device.config()
    }

    /// The manager that holds the listeners of this device's region.
    pub fn manager(&self) -> &Arc<LocalRamDiscardManager> {
        &self.manager
    }

    /// The memory behind the region.
    pub fn memory(&self) -> &RegionMemory {
        &self.memory
    }

    /// Adds an observer.
    pub fn observe(&self, observer: Arc<dyn DeviceObserver>) {
        self.state().observers.push(observer);
    }

    /// Adds a listener for the whole region; see [`LocalRamDiscardManager::register`].
    ///
    /// # Errors
    ///
    /// When the listener refuses what is populated now, or the region has no bytes.
    pub fn listen(
        &self,
        listener: Box<dyn RamDiscardListener>,
    ) -> Result<ListenerId, RegisterError> {
        let section = self.geometry.section().ok_or(RegisterError::NotRegistered)?;
        self.manager.register(section, listener)
    }

    /// Whether anybody holds block state frozen.
    pub fn migration_active(&self) -> bool {
        !self.state().holders.is_empty()
    }

    /// Maximal ranges of plugged blocks (`plugged` true) or of discarded ones, bytes from the
    /// start of the region, ascending.
    pub fn ranges(&self, plugged: bool) -> Vec<ByteRange> {
        let mut ranges = Vec::new();
        if let Some(section) = self.geometry.section() {
            let collect = |range| {
                ranges.push(range);
                ControlFlow::Continue(())
            };
            let _ = if plugged {
                self.manager.replay_populated(section, collect)
            } else {
                self.manager.replay_discarded(section, collect)
            };
        }
        ranges
    }

    /// Bytes the host really holds for the region; `None` while nothing is mapped. hugetlb files
    /// do not tell their holes: there, plugged blocks count, which are reserved as a whole.
    pub fn populated_size(&self) -> Option<u64> {
        let section = self.geometry.section()?;
        let populated = self.memory.populated(section)?;
        Some(if self.memory.has_hugetlb() {
            populated.max(self.state().device.plugged_size())
        } else {
            populated
        })
    }

    /// Where the host really holds memory for the region: maximal ascending ranges, bytes from its
    /// start. `None` while nothing is mapped.
    ///
    /// `granularity` (bytes, rounded up to a multiple of the block size) is the resolution: ranges
    /// consist of whole units of that size, counted from the start of the region and cut off at
    /// its end, of which the host holds any byte. So their sum may be more than
    /// [`populated_size`](Self::populated_size), and memory that is populated page by page costs
    /// no more than a few searches a unit. In hugetlb memory, plugged blocks count, as they do
    /// there.
    pub fn populated_ranges(&self, granularity: u64) -> Option<Vec<ByteRange>> {
        let section = self.geometry.section()?;
        let granularity = granularity.clamp(1, self.geometry.region_size());
        let unit = granularity.next_multiple_of(self.geometry.block_size());
        let plugged = if self.memory.has_hugetlb() { self.served.ranges(true) } else { Vec::new() };
        self.memory.populated_units(section, unit, &plugged)
    }

    /// Whether all of a guest-physical range may be used by the guest: what lies in the region is
    /// plugged. Looked up before the device reads or writes a guest buffer, since touching
    /// unplugged memory would allocate it.
    pub fn is_usable(&self, gpa_range: ByteRange) -> bool {
        let in_region = self.geometry.region().and_then(|region| region.intersection(gpa_range));
        let section = in_region.and_then(|range| range.shifted_down(self.geometry.addr()));
        section.is_none_or(|section| self.served.is_populated(section))
    }

    /// The guest-physical range that a request would take away from the guest, if any.
    pub fn unplugged_by(&self, request: Request) -> Option<ByteRange> {
        match self.state().device.evaluate(request) {
            Verdict::Change(Change::UnplugAll) => self.geometry.region(),
            Verdict::Change(Change::Unplug(blocks)) => {
                self.geometry.section_of(&blocks)?.shifted_up(self.geometry.addr())
            }
            Verdict::Change(Change::Plug(_)) | Verdict::Answer(_) => None,
        }
    }

    /// Executes a guest request. The answer is given to the guest, and [`answered`] called then.
    ///
    /// [`answered`]: Self::answered
    pub fn execute(&self, request: Request) -> Response {
        // What changes nothing does not wait for a change under way. An error may be a request
        // whose work was done before, which only the transaction can tell.
        if let Verdict::Answer(response) = self.state().device.evaluate(request)
            && response != Response::Error
        {
            return response;
        }
        let mut transaction = self.manager.begin();
        let state = self.state();
        if state.journal == Some(request) && state.device.is_done(request) {
            drop(state);
            return self.answer_again(request);
        }
        let change = match state.device.evaluate(request) {
            Verdict::Answer(response) => return response,
            Verdict::Change(change) => change,
        };
        let frozen = !state.holders.is_empty();
        let nothing_plugged = state.device.plugged_size() == 0;
        drop(state);
        let done = match change {
            Change::UnplugAll if nothing_plugged => self.commit(&change, JournalUpdate::Forget),
            _ if frozen => return Response::Busy,
            Change::Plug(blocks) => self.plug(&mut transaction, request, blocks),
            Change::Unplug(blocks) => self.unplug(&mut transaction, request, blocks),
            Change::UnplugAll => self.unplug_all(&mut transaction).map_err(|error| match error {
                ResetError::Memory(error) => busy(request, &error),
                ResetError::Store(error) => busy(request, &error),
            }),
        };
        if done.is_ok() { Response::Ack } else { Response::Busy }
    }

    /// Notes that the guest has the answer to the last request.
    pub fn answered(&self) {
        let mut state = self.state();
        if state.journal.take().is_some()
            && let Err(error) = state.store.mark_answered()
        {
            tracing::warn!(%error, "cannot note that a request was answered");
        }
    }

    /// Sets the requested size, bytes, and has the guest told.
    ///
    /// # Errors
    ///
    /// When it breaks a rule or cannot be saved; nothing was changed.
    pub fn resize(&self, requested_size: u64) -> Result<(), ResizeError> {
        let mut state = self.state();
        let usable_region_size = state.device.usable_after_resize(requested_size)?;
        let record = StateRecord {
            requested_size,
            usable_region_size,
            ..state.record(BlockUpdate::Keep, JournalUpdate::Keep)
        };
        state.save(&record)?;
        state.device.set_requested_size(requested_size)?;
        state.tell(|observer| {
            observer.requested_size(requested_size);
            observer.config_changed();
        });
        Ok(())
    }

    /// Unplugs and discards everything, as the reset of the whole VM does (5.15.5.2). While
    /// migration is active it is put off until that ends.
    ///
    /// # Errors
    ///
    /// When memory cannot be given back or the state not saved; nothing was changed.
    pub fn system_reset(&self) -> Result<Reset, ResetError> {
        let mut transaction = self.manager.begin();
        {
            let mut state = self.state();
            if !state.holders.is_empty() {
                state.reset_pending = true;
                return Ok(Reset::Deferred);
            }
        }
        self.reset_now(&mut transaction)?;
        Ok(Reset::Done)
    }

    /// Freezes block state: PLUG, UNPLUG and UNPLUG_ALL are answered with BUSY until nobody holds
    /// it any more. When this returns, no change is under way.
    ///
    /// # Errors
    ///
    /// When the state could not be saved; nothing was changed.
    pub fn freeze(&self, holder: FreezeHolder) -> io::Result<()> {
        let _no_change_under_way = self.manager.begin();
        let mut state = self.state();
        let was_active = !state.holders.is_empty();
        if state.holders.insert(holder)
            && let Err(error) = state.save_holders()
        {
            state.holders.remove(&holder);
            return Err(error);
        }
        if !was_active {
            state.tell(|observer| observer.migration(true));
        }
        Ok(())
    }

    /// Ends the freeze of one holder. With the last one, the guest is told to try again, and a
    /// system reset that was put off is done.
    ///
    /// # Errors
    ///
    /// When the state could not be saved; the freeze then still ends. Called again, it is tried
    /// again to save that.
    pub fn thaw(&self, holder: FreezeHolder) -> io::Result<()> {
        let mut transaction = self.manager.begin();
        let mut state = self.state();
        if !state.holders.remove(&holder) {
            return if state.thaw_unsaved { state.save_holders() } else { Ok(()) };
        }
        let saved = state.save_holders();
        state.thaw_unsaved = saved.is_err();
        if state.holders.is_empty() {
            let reset = std::mem::take(&mut state.reset_pending);
            drop(state);
            if reset && let Err(error) = self.reset_now(&mut transaction) {
                tracing::error!(%error, "cannot do the system reset that migration put off");
            }
            // Linux would otherwise wait 50 s before it tries again.
            self.state().tell(|observer| {
                observer.migration(false);
                observer.config_changed();
            });
        }
        saved
    }

    /// Takes over the VMM's memory; blocks outside the region are of no interest. Requests use
    /// the new memory from now on; what unplugged blocks may have been left with is given back.
    ///
    /// # Errors
    ///
    /// When memory of the region could not serve its blocks; the memory before is kept.
    pub fn set_memory(&self, blocks: Vec<Arc<RamBlock>>) -> Result<(), RamBlockError> {
        blocks.iter().try_for_each(|block| self.memory.check(block))?;
        let _no_change_under_way = self.manager.begin();
        self.memory.replace(blocks);
        if self.state().sweep_pending && self.memory.is_mapped() {
            self.sweep();
            self.state().sweep_pending = !self.memory.is_complete();
        }
        Ok(())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.served.state.lock()
    }

    /// Answers a request whose work was done by a process that could not answer it any more.
    fn answer_again(&self, request: Request) -> Response {
        let done = match request {
            Request::Unplug(span) => {
                let offset = span.addr - self.geometry.addr();
                let len = u64::from(span.nb_blocks) * self.geometry.block_size();
                ByteRange::new(offset, len).is_none_or(|section| {
                    self.memory.ready(section).is_ok() && self.memory.sweep(section).is_ok()
                })
            }
            _ => true,
        };
        if done { Response::Ack } else { Response::Busy }
    }

    fn plug(
        &self,
        transaction: &mut Transaction<'_>,
        request: Request,
        blocks: Range<usize>,
    ) -> Result<(), ()> {
        let Some(section) = self.geometry.section_of(&blocks) else { return Err(()) };
        self.memory.ready(section).map_err(|error| busy(request, &error))?;
        transaction
            .notify_populate(self.source, section)
            .map_err(|refused| busy(request, &refused))?;
        self.commit(&Change::Plug(blocks), JournalUpdate::Record(request))
            .inspect_err(|()| transaction.notify_discard(self.source, section))
    }

    fn unplug(
        &self,
        transaction: &mut Transaction<'_>,
        request: Request,
        blocks: Range<usize>,
    ) -> Result<(), ()> {
        let Some(section) = self.geometry.section_of(&blocks) else { return Err(()) };
        self.memory.ready(section).map_err(|error| busy(request, &error))?;
        self.commit(&Change::Unplug(blocks), JournalUpdate::Record(request))?;
        transaction.notify_discard(self.source, section);
        Ok(())
    }

    fn unplug_all(&self, transaction: &mut Transaction<'_>) -> Result<(), ResetError> {
        let plugged = self.served.ranges(true);
        if self.memory.is_mapped() {
            plugged.iter().try_for_each(|&section| self.memory.ready(section))?;
        } else if let Some(&section) = plugged.first() {
            self.memory.ready(section)?;
        }
        self.commit_or(&Change::UnplugAll, JournalUpdate::Forget)?;
        plugged.iter().rev().for_each(|&s| transaction.notify_discard(self.source, s));
        Ok(())
    }

    fn reset_now(&self, transaction: &mut Transaction<'_>) -> Result<(), ResetError> {
        if self.memory.is_mapped() {
            self.unplug_all(transaction)?;
        } else {
            // The memory is gone with the VM; what comes next is swept.
            let plugged = self.served.ranges(true);
            self.commit_or(&Change::UnplugAll, JournalUpdate::Forget)?;
            plugged.iter().rev().for_each(|&s| transaction.notify_discard(self.source, s));
        }
        // Unlike UNPLUG ALL, a reset also takes what the guest touched without plugging it.
        self.sweep();
        let mut state = self.state();
        state.sweep_pending = !self.memory.is_complete();
        state.tell(|observer| observer.config_changed());
        Ok(())
    }

    /// Gives back what discarded ranges hold.
    fn sweep(&self) {
        for section in self.served.ranges(false) {
            if let Err(error) = self.memory.sweep(section) {
                tracing::error!(%section, %error, "cannot give back memory of unplugged blocks");
            }
        }
    }

    fn commit(&self, change: &Change, journal: JournalUpdate) -> Result<(), ()> {
        self.commit_or(change, journal).map_err(|error| {
            tracing::error!(%error, "cannot save the device state; answering BUSY");
        })
    }

    /// Saves a change and then makes it.
    fn commit_or(&self, change: &Change, journal: JournalUpdate) -> io::Result<()> {
        let mut state = self.state();
        let mut record = state.record(BlockUpdate::Change(change), journal);
        if *change == Change::UnplugAll {
            record.usable_region_size = state.device.usable_after_unplug_all();
        }
        state.save(&record)?;
        let before = state.device.plugged_size();
        state.device.apply(change);
        state.journal = match journal {
            JournalUpdate::Keep => state.journal,
            JournalUpdate::Forget => None,
            JournalUpdate::Record(request) => Some(request),
        };
        let after = state.device.plugged_size();
        if before != after {
            state.tell(|observer| observer.plugged_size(after));
        }
        Ok(())
    }
}

/// Says why a request is answered with BUSY.
fn busy(request: Request, reason: &dyn std::fmt::Display) {
    tracing::warn!(request = request.name(), %reason, "answering BUSY");
}

impl State {
    /// The state as it is, with a change to come.
    fn record<'a>(&self, blocks: BlockUpdate<'a>, journal: JournalUpdate) -> StateRecord<'a> {
        StateRecord {
            requested_size: self.device.requested_size(),
            usable_region_size: self.device.usable_region_size(),
            api_migration: self.holders.contains(&FreezeHolder::Api),
            blocks,
            journal,
        }
    }

    fn save_holders(&mut self) -> io::Result<()> {
        let record = self.record(BlockUpdate::Keep, JournalUpdate::Keep);
        self.save(&record)
    }

    fn save(&mut self, record: &StateRecord<'_>) -> io::Result<()> {
        self.store.commit(record)?;
        // Every record has all that is known of holders.
        self.thaw_unsaved = false;
        Ok(())
    }

    fn tell(&self, event: impl Fn(&dyn DeviceObserver)) {
        self.observers.iter().for_each(|observer| event(&**observer));
    }
}

impl Served {
    /// The blocks that a section touches.
    fn blocks_of(&self, section: ByteRange) -> Range<usize> {
        let block_size = self.geometry.block_size();
        let index = |block: u64| {
            usize::try_from(block).unwrap_or(usize::MAX).min(self.geometry.nr_blocks())
        };
        index(section.start() / block_size)..index(section.end().div_ceil(block_size))
    }

    fn ranges(&self, populated: bool) -> Vec<ByteRange> {
        let mut ranges = Vec::new();
        if let Some(section) = self.geometry.section() {
            let _ = self.replay(section, populated, &mut |range| {
                ranges.push(range);
                ControlFlow::Continue(())
            });
        }
        ranges
    }
}

impl RamDiscardSource for Served {
    fn region_size(&self) -> u64 {
        self.geometry.region_size()
    }

    fn granularity(&self) -> u64 {
        self.geometry.block_size()
    }

    fn next_range(&self, section: ByteRange, populated: bool) -> Option<ByteRange> {
        let run = self.state.lock().device.blocks().next_run(self.blocks_of(section), populated);
        self.geometry.section_of(&run?)?.intersection(section)
    }

    fn replay(
        &self,
        section: ByteRange,
        populated: bool,
        visit: &mut dyn FnMut(ByteRange) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        // Runs are fetched in batches, since `visit` may need the lock that guards them.
        const BATCH: usize = 512;
        let mut batch = Vec::with_capacity(BATCH);
        let mut blocks = self.blocks_of(section);
        loop {
            {
                let state = self.state.lock();
                let runs = state.device.blocks().runs(blocks.clone(), populated);
                batch.extend(runs.take(BATCH));
            }
            for run in &batch {
                let range =
                    self.geometry.section_of(run).and_then(|range| range.intersection(section));
                visit(range.expect("a run of a section's blocks lies in the section"))?;
            }
            match batch.last() {
                Some(last) if batch.len() == BATCH => blocks.start = last.end,
                _ => return ControlFlow::Continue(()),
            }
            batch.clear();
        }
    }
}

#[cfg(test)]
mod tests;
