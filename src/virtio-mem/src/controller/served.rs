//! What requests change, and the source it is for the RamDiscardManager.

use std::collections::BTreeMap;
use std::io;
use std::ops::{ControlFlow, Range};
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};
use ram_discard::{FreezeId, MemoryState, RamDiscardSource, Section};

use super::{BlockUpdate, DeviceObserver, FreezeHolder, JournalUpdate, StateRecord, StateStore};
use crate::device::{ConfigSpace, Geometry, Request, VirtioMem};

/// What requests change. Locked for moments only, so that the configuration can be read while
/// memory is discarded; changes are serialised by the manager's transaction.
pub(super) struct DeviceSource {
    pub(super) geometry: Geometry,
    pub(super) state: Mutex<State>,
    /// The configuration space as observers know it. It can be read while a change is saved, which takes
    /// as long as a disk does.
    pub(super) shown: Arc<Mutex<ConfigSpace>>,
    /// Read while an answer is written to the guest, written while a system reset takes memory away.
    /// Taken after the manager, before the state.
    pub(super) answers: RwLock<()>,
}

pub(super) struct State {
    pub(super) device: VirtioMem,
    pub(super) store: Box<dyn StateStore>,
    pub(super) journal: Option<Request>,
    /// Those that froze block state through the controller; the manager has all freezes.
    pub(super) holders: BTreeMap<FreezeHolder, FreezeId>,
    /// A freeze has ended, but the store could not take that: what it has still names the holder.
    pub(super) thaw_unsaved: bool,
    pub(super) reset_pending: bool,
    pub(super) sweep: Sweep,
    /// The guest's queue runs, so that block state follows no other device.
    pub(super) guest_runs: bool,
    pub(super) observers: Vec<Arc<dyn DeviceObserver>>,
    pub(super) shown: Arc<Mutex<ConfigSpace>>,
}

/// When memory that unplugged blocks may have been left with is discarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sweep {
    /// There is none.
    Done,
    /// When the guest runs: until then a state may come that says that blocks are plugged, and the
    /// memory that belongs to it may be there before.
    WhenRunning,
    /// When it is mapped: the state has come.
    WhenMapped,
}

impl State {
    /// The state as it is, with a change to come.
    pub(super) fn record<'a>(
        &self,
        blocks: BlockUpdate<'a>,
        journal: JournalUpdate,
    ) -> StateRecord<'a> {
        StateRecord {
            requested_size: self.device.requested_size(),
            usable_region_size: self.device.usable_region_size(),
            api_migration: self.holders.contains_key(&FreezeHolder::Api),
            reset_pending: self.reset_pending,
            blocks,
            journal,
        }
    }

    pub(super) fn save_holders(&mut self) -> io::Result<()> {
        let record = self.record(BlockUpdate::Keep, JournalUpdate::Keep);
        self.save(&record)
    }

    pub(super) fn save(&mut self, record: &StateRecord<'_>) -> io::Result<()> {
        self.store.commit(record)?;
        // Every record has all that is known of holders.
        self.thaw_unsaved = false;
        Ok(())
    }

    /// Tells observers of a change, which they may look up at once.
    pub(super) fn tell(&self, event: impl Fn(&dyn DeviceObserver)) {
        *self.shown.lock() = self.device.config();
        self.observers.iter().for_each(|observer| event(&**observer));
    }
}

impl DeviceSource {
    /// The blocks that a section touches.
    fn blocks_of(&self, section: Section) -> Range<usize> {
        let block_size = self.geometry.block_size();
        let index = |block: u64| {
            usize::try_from(block).unwrap_or(usize::MAX).min(self.geometry.nr_blocks())
        };
        index(section.start() / block_size)..index(section.end().div_ceil(block_size))
    }

    /// Maximal ranges of plugged blocks, ascending.
    pub(super) fn plugged_ranges(&self) -> Vec<Section> {
        self.ranges(MemoryState::Populated)
    }

    /// Maximal ranges of unplugged blocks, ascending.
    pub(super) fn unplugged_ranges(&self) -> Vec<Section> {
        self.ranges(MemoryState::Discarded)
    }

    fn ranges(&self, state: MemoryState) -> Vec<Section> {
        let mut ranges = Vec::new();
        if let Some(section) = self.geometry.section() {
            let _ = self.replay(section, state, &mut |range| {
                ranges.push(range);
                ControlFlow::Continue(())
            });
        }
        ranges
    }
}

impl RamDiscardSource for DeviceSource {
    fn region_size(&self) -> u64 {
        self.geometry.region_size()
    }

    fn granularity(&self) -> u64 {
        self.geometry.block_size()
    }

    fn next_range(&self, section: Section, state: MemoryState) -> Option<Section> {
        let (blocks, plugged) = (self.blocks_of(section), state.is_populated());
        let run = self.state.lock().device.blocks().next_run(blocks, plugged);
        self.geometry.section_of(&run?)?.intersection(section)
    }

    fn replay(
        &self,
        section: Section,
        state: MemoryState,
        visit: &mut dyn FnMut(Section) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        // Runs are fetched in batches, since `visit` may need the lock that guards them.
        const BATCH: usize = 128;
        let mut batch = [const { 0..0 }; BATCH];
        let mut blocks = self.blocks_of(section);
        loop {
            let fetched = {
                let locked = self.state.lock();
                let runs = locked.device.blocks().runs(blocks.clone(), state.is_populated());
                batch.iter_mut().zip(runs).map(|(slot, run)| *slot = run).count()
            };
            for run in &batch[..fetched] {
                let range =
                    self.geometry.section_of(run).and_then(|range| range.intersection(section));
                visit(range.expect("a run of a section's blocks lies in the section"))?;
            }
            if fetched < BATCH {
                return ControlFlow::Continue(());
            }
            blocks.start = batch[BATCH - 1].end;
        }
    }
}
