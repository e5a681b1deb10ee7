//! What a guest has in memory that it does not have plugged.

use std::io;

use ram_discard::{MemoryState, RamDiscardSource, Section};
use thiserror::Error;

use super::MemController;
use super::served::Sweep;

/// Why nothing more was discarded.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SweepRefused {
    /// A migration relies on memory as it is.
    #[error("migration is active: block state is frozen")]
    Frozen,
    /// A state may still be loaded to which memory belongs that is there already.
    #[error("the guest has not run yet, and its memory may be there before its state")]
    NotRunning,
    /// The memory could not be searched or discarded.
    #[error("cannot discard memory of unplugged blocks: {0}")]
    Memory(#[from] io::Error),
}

impl MemController {
    /// Discards what the host holds for unplugged blocks of `section`, which only a guest can have
    /// brought about that writes, or reads, what it may not use. How many bytes were resident.
    ///
    /// No request comes in between: what is plugged, before or after, is not touched. Cost follows
    /// what is stray; a guest may have to wait for it, so that much is better swept in parts.
    ///
    /// # Errors
    ///
    /// When memory must stay as it is now, or cannot be discarded.
    pub fn sweep_stray(&self, section: Section) -> Result<u64, SweepRefused> {
        let transaction = self.manager.begin();
        if transaction.is_frozen() {
            return Err(SweepRefused::Frozen);
        }
        if self.state().sweep != Sweep::Done {
            return Err(SweepRefused::NotRunning);
        }
        let (mut rest, mut swept) = (Some(section), 0);
        while let Some(part) = rest
            && let Some(range) = self.served.next_range(part, MemoryState::Discarded)
        {
            swept += self.memory.sweep_counted(range)?;
            rest = Section::from_bounds(range.end(), section.end());
        }
        Ok(swept)
    }
}
