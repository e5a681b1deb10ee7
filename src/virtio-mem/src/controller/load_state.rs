//! Saved state of another process becomes the device's own: all of it, or nothing.

use std::io;
use std::ops::Range;

use ram_discard::memory::RamBlockError;
use ram_discard::{PopulateRefused, Section};
use thiserror::Error;

use super::served::Sweep;
use super::{BlockUpdate, JournalUpdate, MemController, StateRecord};
use crate::device::{BlockBitmap, DeviceState, DeviceStateError, VirtioMem};
use crate::region_memory::NotReady;

/// Why saved state was not taken over; nothing was changed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum LoadStateError {
    /// It breaks a rule.
    #[error(transparent)]
    State(#[from] DeviceStateError),
    /// Block state is frozen.
    #[error("block state is frozen: migration is active")]
    Frozen,
    /// Memory of blocks that would be unplugged cannot be discarded.
    #[error(transparent)]
    Memory(#[from] NotReady),
    /// There are not enough huge pages for the plugged blocks.
    #[error(transparent)]
    NoMemory(#[from] RamBlockError),
    /// A listener refuses the blocks that would be plugged.
    #[error(transparent)]
    Refused(#[from] PopulateRefused),
    /// The state could not be saved here.
    #[error("cannot save the device state: {0}")]
    Store(#[from] io::Error),
}

impl MemController {
    /// The device's state, of one moment.
    pub fn save_state(&self) -> DeviceState {
        self.state().device.state()
    }

    /// Becomes what `state` says. Listeners are told of every block that changes, those that
    /// become plugged first. Huge pages are taken for all that are plugged. What unplugged blocks
    /// hold is discarded now, or once it is mapped; what plugged ones hold is left alone, since it
    /// may have come before the state. The guest is told to read its configuration again.
    ///
    /// # Errors
    ///
    /// When the state breaks a rule, blocks are frozen, there are too few huge pages, a listener
    /// refuses or it cannot be saved.
    /// Nothing has changed then, and listeners have been told so.
    pub fn load_state(&self, state: DeviceState) -> Result<(), LoadStateError> {
        let device = VirtioMem::restore(self.geometry, state)?;
        let mut transaction = self.manager.begin();
        let (plugged, unplugged) = {
            if transaction.is_frozen_for_source() {
                return Err(LoadStateError::Frozen);
            }
            let state = self.state();
            let (old, new) = (state.device.blocks(), device.blocks());
            (self.difference(new, old), self.difference(old, new))
        };
        for &section in &unplugged {
            match self.memory.ready(section) {
                // It is swept when it comes.
                Ok(()) | Err(NotReady::NotMapped(_)) => {}
                Err(error) => return Err(error.into()),
            }
        }
        // Also of blocks that were plugged before: a stream that broke off may have taken theirs.
        self.reserve(&self.memory.blocks(), || self.sections(device.blocks()))?;
        let loading = self.memory.begin_load();
        let populated = transaction.notify_populate_all(self.source, &plugged);
        let loaded = populated.map_err(LoadStateError::from).and_then(|()| {
            let changed = !plugged.is_empty() || !unplugged.is_empty();
            Ok(self
                .commit_state(device, changed)
                .inspect_err(|_| transaction.notify_discard_all(self.source, &plugged))?)
        });
        drop(loading);
        loaded?;
        transaction.notify_discard_all(self.source, &unplugged);
        self.sweep_or(Sweep::WhenMapped);
        self.state().tell(|observer| observer.config_changed());
        Ok(())
    }

    /// Saves a whole state and then has it; `changed` says whether any block is another one.
    pub(super) fn commit_state(&self, device: VirtioMem, changed: bool) -> io::Result<()> {
        let mut state = self.state();
        let blocks = match changed {
            true => BlockUpdate::Replace(device.blocks().words()),
            false => BlockUpdate::Keep,
        };
        let record = StateRecord {
            requested_size: device.requested_size(),
            usable_region_size: device.usable_region_size(),
            // It was for what was here before.
            reset_pending: false,
            ..state.record(blocks, JournalUpdate::Forget)
        };
        state.save(&record)?;
        let requested_before = state.device.requested_size();
        state.device = device;
        state.journal = None;
        state.reset_pending = false;
        let (requested, plugged) = (state.device.requested_size(), state.device.plugged_size());
        state.tell(|observer| {
            if requested != requested_before {
                observer.requested_size(requested);
            }
            // Also when as many blocks are plugged, but others: it is the blocks that observers
            // look up then.
            if changed {
                observer.plugged_size(plugged);
            }
        });
        Ok(())
    }

    /// Maximal ranges of plugged blocks, ascending.
    fn sections(&self, blocks: &BlockBitmap) -> Vec<Section> {
        let runs = blocks.runs(0..blocks.nr_blocks(), true);
        runs.filter_map(|run| self.geometry.section_of(&run)).collect()
    }

    /// Maximal ranges of blocks that are plugged in one bitmap and not in the other, ascending.
    fn difference(&self, plugged: &BlockBitmap, other: &BlockBitmap) -> Vec<Section> {
        let runs = plugged.runs(0..plugged.nr_blocks(), true);
        let parts = runs.flat_map(|run: Range<usize>| other.runs(run, false));
        parts.filter_map(|blocks| self.geometry.section_of(&blocks)).collect()
    }
}
