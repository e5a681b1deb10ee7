//! The device as it is served: one change at a time, durable, all or nothing.
//!
//! This is the one place where device, listeners, memory and saved state meet. Every change goes
//! the same way, so that whatever can refuse it is asked before anything is done:
//!
//! | step | PLUG | UNPLUG, UNPLUG_ALL |
//! | --- | --- | --- |
//! | 1 | the device judges the request | the device judges the request |
//! | 2 | block state is not frozen, memory is mapped and can be discarded | the same |
//! | 3 | listeners populate, memory first; a refusal is undone in reverse | state is committed |
//! | 4 | state is committed; a failure is undone in reverse | listeners discard, memory last |
//! | 5 | the guest is answered | the guest is answered |
//!
//! A process killed between two steps leaves a state from which the next one can go on: blocks
//! that are committed as unplugged are swept when memory is mapped again, and a request that was
//! committed but not answered is recognised when it comes again.

mod busy;
mod follow_source;
mod freeze;
mod load_state;
mod requests;
mod served;
mod store;
mod stray;

use std::collections::BTreeMap;
use std::io;
use std::ops::ControlFlow;
use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard, RwLock};
use ram_discard::memory::{BackingKind, RamBlock, RamBlockError};
use ram_discard::{
    FreezeFor, ListenerId, LocalRamDiscardManager, RamDiscardListener, RamDiscardSource,
    RegisterError, Section, SourceId, Transaction, Visit,
};
use thiserror::Error;

pub use busy::Busy;
pub use freeze::FreezeHolder;
pub use load_state::LoadStateError;
use served::{DeviceSource, State, Sweep};
pub use store::{BlockUpdate, JournalUpdate, NoStateStore, StateRecord, StateStore};
pub use stray::SweepRefused;

use crate::device::{
    BlockBitmap, Change, ConfigSpace, Geometry, Request, RequestedSizeError, VirtioMem,
};
use crate::region_memory::{MemoryListener, NotReady, RegionMemory};

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
    /// A holder has frozen block state, or has ended that. Other parties may still have it frozen:
    /// [`migration`](Self::migration) tells. An observer that comes later is told of those there are.
    fn frozen_by(&self, _holder: FreezeHolder, _active: bool) {}
    /// Memory that was arriving ([`FreezeHolder::Incoming`]) does so no more.
    fn memory_arrived(&self) {}
    /// A request is answered with BUSY for this reason.
    fn busy(&self, _request: Request, _reason: &Busy) {}
}

/// Why the requested size was not set; nothing was changed.
#[derive(Debug, Error)]
#[non_exhaustive]
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
#[non_exhaustive]
pub enum ResetError {
    /// Memory cannot be discarded.
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
    served: Arc<DeviceSource>,
    manager: Arc<LocalRamDiscardManager>,
    source: SourceId,
    memory: Arc<RegionMemory>,
}

/// How a controller starts: what a state store found, or a new device.
pub struct InitialState {
    /// The device.
    pub device: VirtioMem,
    /// Where its state is kept.
    pub store: Box<dyn StateStore>,
    /// The last request that was executed and may not have been answered.
    pub journal: Option<Request>,
    /// Whether the management API held migration active.
    pub api_migration: bool,
    /// Whether a system reset was put off until migration ends.
    pub reset_pending: bool,
    /// Whether unplugged blocks may hold memory, because the process before was killed or because the
    /// memory was used before there was this device: it is discarded when the guest runs.
    pub sweep: bool,
}

impl InitialState {
    /// A new device whose state ends with the process. What its memory held before, in blocks that it
    /// does not have plugged, is discarded when the guest runs.
    pub fn volatile(device: VirtioMem) -> Self {
        Self {
            device,
            store: Box::new(NoStateStore),
            journal: None,
            api_migration: false,
            reset_pending: false,
            sweep: true,
        }
    }
}

impl MemController {
    /// A controller without memory.
    pub fn new(start: InitialState) -> Self {
        let InitialState { device, store, journal, api_migration, reset_pending, sweep } = start;
        let geometry = *device.geometry();
        let memory = RegionMemory::new(geometry);
        let shown = Arc::new(Mutex::new(device.config()));
        let state = State {
            device,
            store,
            journal,
            holders: BTreeMap::new(),
            thaw_unsaved: false,
            reset_pending: reset_pending && api_migration,
            sweep: if sweep { Sweep::WhenRunning } else { Sweep::Done },
            guest_runs: false,
            observers: Vec::new(),
            shown: Arc::clone(&shown),
        };
        let (state, answers) = (Mutex::new(state), RwLock::new(()));
        let served = Arc::new(DeviceSource { geometry, state, shown, answers });
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
        let controller = Self { geometry, served, manager, source, memory };
        controller.attach_to_manager();
        if api_migration {
            let id = controller.manager.begin().freeze(FreezeFor::Source);
            controller.state().holders.insert(FreezeHolder::Api, id);
        }
        // What held migration active then has left with the process.
        if reset_pending
            && !api_migration
            && let Err(error) = controller.system_reset()
        {
            tracing::error!(%error, "cannot do the system reset that migration put off");
        }
        controller
    }

    /// What never changes.
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// The configuration space as observers know it. Does not wait for a change that is being saved.
    pub fn config(&self) -> ConfigSpace {
        *self.served.shown.lock()
    }

    /// Which blocks are plugged, at one moment.
    pub fn blocks(&self) -> BlockBitmap {
        self.state().device.blocks().clone()
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
        let mut state = self.state();
        state.holders.keys().for_each(|&holder| observer.frozen_by(holder, true));
        state.observers.push(observer);
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

    /// Whether block state is frozen, by this controller's holders or at the manager.
    pub fn migration_active(&self) -> bool {
        self.manager.is_frozen()
    }

    /// Maximal ranges of plugged blocks, bytes from the start of the region, ascending.
    pub fn plugged_ranges(&self) -> Vec<Section> {
        self.collect(|section, collect| self.manager.replay_populated(section, collect))
    }

    /// Maximal ranges of unplugged blocks, whose memory is discarded: bytes from the start of the region,
    /// ascending.
    pub fn unplugged_ranges(&self) -> Vec<Section> {
        self.collect(|section, collect| self.manager.replay_discarded(section, collect))
    }

    /// What a replay over the whole region visits.
    fn collect(
        &self,
        replay: impl FnOnce(Section, &mut Visit<'_>) -> ControlFlow<()>,
    ) -> Vec<Section> {
        let mut ranges = Vec::new();
        if let Some(section) = self.geometry.section() {
            let _ = replay(section, &mut |range| {
                ranges.push(range);
                ControlFlow::Continue(())
            });
        }
        ranges
    }

    /// Bytes the host really holds for the region; `None` while nothing is mapped. hugetlb files
    /// do not tell their holes: there, plugged blocks count, which are reserved as a whole.
    pub fn resident_size(&self) -> Option<u64> {
        let section = self.geometry.section()?;
        let resident = self.memory.resident(section)?;
        Some(if self.memory.has_hugetlb() {
            resident.max(self.config().plugged_size)
        } else {
            resident
        })
    }

    /// Where the host really holds memory for the region: maximal ascending ranges, bytes from its
    /// start. `None` while nothing is mapped.
    ///
    /// `granularity` (bytes, rounded up to a multiple of the block size) is the resolution: ranges
    /// consist of whole units of that size, counted from the start of the region and cut off at
    /// its end, of which the host holds any byte. So their sum may be more than
    /// [`resident_size`](Self::resident_size). Each unit that counts costs one short search, so
    /// `granularity` bounds the cost in a region of very many blocks. In hugetlb memory, plugged
    /// blocks count, as they do there.
    pub fn resident_ranges(&self, granularity: u64) -> Option<Vec<Section>> {
        let section = self.geometry.section()?;
        let granularity = granularity.clamp(1, self.geometry.region_size());
        let unit = granularity.next_multiple_of(self.geometry.block_size());
        let plugged =
            if self.memory.has_hugetlb() { self.served.plugged_ranges() } else { Vec::new() };
        self.memory.resident_units(section, unit, &plugged)
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
    /// When memory cannot be discarded or the state not saved; nothing was changed.
    pub fn system_reset(&self) -> Result<Reset, ResetError> {
        let mut transaction = self.manager.begin();
        {
            let mut state = self.state();
            if transaction.is_frozen() {
                let before = std::mem::replace(&mut state.reset_pending, true);
                if let Err(error) = state.save_holders() {
                    state.reset_pending = before;
                    return Err(error.into());
                }
                return Ok(Reset::Deferred);
            }
        }
        self.reset_now(&mut transaction)?;
        Ok(Reset::Done)
    }

    /// Takes over the VMM's memory; blocks outside the region are of no interest. Requests use
    /// the new memory from now on. What unplugged blocks hold in memory that was not there before is
    /// discarded: after a [`load_state`](Self::load_state) at once, else when the guest
    /// [runs](Self::running). Blocks that are plugged already get their huge pages.
    ///
    /// # Errors
    ///
    /// When memory of the region could not serve its blocks, or there are not enough huge pages; the
    /// memory before is kept.
    pub fn set_memory(&self, blocks: Vec<Arc<RamBlock>>) -> Result<(), RamBlockError> {
        blocks.iter().try_for_each(|block| self.memory.check(block))?;
        let _no_change_under_way = self.manager.begin();
        self.reserve(&blocks, || self.served.plugged_ranges())?;
        let before = self.memory.replace(blocks);
        let is_new = |block: &Arc<RamBlock>| !before.iter().any(|old| old.is_same_memory(block));
        let sweep = self.state().sweep;
        if sweep == Sweep::WhenMapped {
            self.sweep_or(Sweep::WhenMapped);
        } else if sweep == Sweep::Done && self.memory.blocks().iter().any(is_new) {
            self.state().sweep = Sweep::WhenRunning;
        }
        Ok(())
    }

    /// The guest runs, or is about to: no state can come any more. What unplugged blocks may have
    /// been left with is discarded. A request of the guest says so, too.
    pub fn running(&self) {
        // Asked with every change of the rings, which need not wait for a change of blocks.
        if self.state().sweep == Sweep::Done {
            return;
        }
        let _no_change_under_way = self.manager.begin();
        self.sweep_or(Sweep::WhenMapped);
    }

    /// Takes huge pages for all plugged blocks that have none, where the memory is hugetlb. To be
    /// called when memory that was to come ([`FreezeHolder::Incoming`]) has come: a page that never
    /// came, since it is zeros, is then there before the guest touches it.
    ///
    /// # Errors
    ///
    /// When the pool has none; those that were taken stay.
    pub fn reserve_memory(&self) -> Result<(), RamBlockError> {
        let _no_change_under_way = self.manager.begin();
        self.reserve(&self.memory.blocks(), || self.served.plugged_ranges())
    }

    /// `plugged` is asked for where that matters.
    fn reserve(
        &self,
        blocks: &[Arc<RamBlock>],
        plugged: impl FnOnce() -> Vec<Section>,
    ) -> Result<(), RamBlockError> {
        let no_pool = |block: &Arc<RamBlock>| block.backing().kind() != BackingKind::Hugetlb;
        if self.memory.is_incoming() || blocks.iter().all(no_pool) {
            return Ok(());
        }
        let plugged = plugged();
        blocks.iter().try_for_each(|block| self.memory.reserve(block, &plugged))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.served.state.lock()
    }

    fn reset_now(&self, transaction: &mut Transaction<'_>) -> Result<(), ResetError> {
        let _no_answer_is_written = self.served.answers.write();
        if self.memory.is_mapped() {
            self.unplug_all(transaction)?;
        } else {
            // The memory is gone with the VM; what comes next is swept.
            let plugged = self.served.plugged_ranges();
            self.commit_or(&Change::UnplugAll, JournalUpdate::Forget)?;
            transaction.notify_discard_all(self.source, &plugged);
        }
        // Unlike UNPLUG ALL, a reset also takes what the guest touched without plugging it.
        self.sweep_or(Sweep::WhenRunning);
        self.state().tell(|observer| observer.config_changed());
        Ok(())
    }

    /// Discards what unplugged blocks hold; of what is not mapped, `later`.
    fn sweep_or(&self, later: Sweep) {
        if self.memory.may_be_resident()
            && let Err(error) = self.memory.sweep(&self.served.unplugged_ranges())
        {
            tracing::error!(%error, "cannot discard what unplugged blocks were left with");
        }
        let complete = self.memory.is_complete();
        self.state().sweep = if complete { Sweep::Done } else { later };
    }
}

#[cfg(test)]
mod tests;
