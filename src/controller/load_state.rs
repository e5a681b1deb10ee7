//! Saved state of another process becomes the device's own: all of it, or nothing.

use std::io;
use std::ops::Range;

use thiserror::Error;

use super::{BlockUpdate, FreezeHolder, JournalUpdate, MemController, StateRecord};
use crate::ByteRange;
use crate::device::{BlockBitmap, DeviceState, DeviceStateError, VirtioMem};
use crate::memory::NotReady;
use crate::ram_discard::{PopulateRefused, Transaction};

/// Why saved state was not taken over; nothing was changed.
#[derive(Debug, Error)]
pub enum LoadStateError {
    /// It breaks a rule.
    #[error(transparent)]
    State(#[from] DeviceStateError),
    /// Somebody holds block state frozen.
    #[error("block state is frozen: migration is active")]
    Frozen,
    /// Memory of blocks that would be unplugged cannot be given back.
    #[error(transparent)]
    Memory(#[from] NotReady),
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
    /// become plugged first. What unplugged blocks hold is given back now, or once it is mapped;
    /// what plugged ones hold is left alone, since it may have come before the state. The guest
    /// is told to read its configuration again.
    ///
    /// # Errors
    ///
    /// When the state breaks a rule, blocks are frozen, a listener refuses or it cannot be saved.
    /// Nothing has changed then, and listeners have been told so.
    pub fn load_state(&self, state: DeviceState) -> Result<(), LoadStateError> {
        let device = VirtioMem::restore(self.geometry, state)?;
        let mut transaction = self.manager.begin();
        let (plugged, unplugged) = {
            let state = self.state();
            if state.holders.iter().any(|&holder| holder != FreezeHolder::Incoming) {
                return Err(LoadStateError::Frozen);
            }
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
        for (told, &section) in plugged.iter().enumerate() {
            if let Err(refused) = transaction.notify_populate(self.source, section) {
                self.take_back(&mut transaction, &plugged[..told]);
                return Err(refused.into());
            }
        }
        let changed = !plugged.is_empty() || !unplugged.is_empty();
        if let Err(error) = self.commit_state(device, changed) {
            self.take_back(&mut transaction, &plugged);
            return Err(error.into());
        }
        self.take_back(&mut transaction, &unplugged);
        self.sweep();
        let mut state = self.state();
        state.sweep_pending = !self.memory.is_complete();
        state.tell(|observer| observer.config_changed());
        Ok(())
    }

    /// Tells listeners of sections that are discarded, in reverse.
    fn take_back(&self, transaction: &mut Transaction<'_>, sections: &[ByteRange]) {
        for &section in sections.iter().rev() {
            transaction.notify_discard(self.source, section);
        }
    }

    /// Saves a whole state and then has it; `changed` says whether any block is another one.
    fn commit_state(&self, device: VirtioMem, changed: bool) -> io::Result<()> {
        let mut state = self.state();
        let blocks = match changed {
            true => BlockUpdate::Replace(device.blocks().words()),
            false => BlockUpdate::Keep,
        };
        let record = StateRecord {
            requested_size: device.requested_size(),
            usable_region_size: device.usable_region_size(),
            ..state.record(blocks, JournalUpdate::Forget)
        };
        state.save(&record)?;
        let requested_before = state.device.requested_size();
        state.device = device;
        state.journal = None;
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

    /// Maximal ranges of blocks that are plugged in one bitmap and not in the other, ascending.
    fn difference(&self, plugged: &BlockBitmap, other: &BlockBitmap) -> Vec<ByteRange> {
        let runs = plugged.runs(0..plugged.nr_blocks(), true);
        let parts = runs.flat_map(|run: Range<usize>| other.runs(run, false));
        parts.filter_map(|blocks| self.geometry.section_of(&blocks)).collect()
    }
}
