//! The blocks of a migration: their block state frozen, and what was discarded when that began.

use std::sync::Arc;

use ram_discard::{ByteRange, FreezeFor, FrozenBlockState, RamDiscardManager};

use super::{InMigration, MigrationBlock};
use crate::error::MigrationError;

/// Holds the block state of all blocks frozen, and the blocks registered, until it is dropped.
#[derive(Default)]
pub(crate) struct FrozenBlocks {
    _held: Vec<InMigration>,
    /// Each manager once, whatever number of blocks it answers for.
    frozen: Vec<(FrozenBlockState, Arc<dyn RamDiscardManager>)>,
}

impl FrozenBlocks {
    /// Freezes the block state of the managers of `blocks`.
    ///
    /// # Errors
    ///
    /// When one cannot be frozen; none is then.
    pub(crate) fn new(
        blocks: impl IntoIterator<Item = Arc<MigrationBlock>>,
        purpose: FreezeFor,
    ) -> Result<Self, MigrationError> {
        let mut all = Self::default();
        for block in blocks {
            all._held.push(InMigration::new(&block));
            let Some((_, manager)) = block.discard_region() else { continue };
            if all.of(&manager).is_none() {
                all.frozen.push((manager.freeze(purpose)?, manager));
            }
        }
        Ok(all)
    }

    /// The used bytes of a block that were discarded when the freeze began: maximal ranges,
    /// ascending.
    pub(crate) fn discarded(&self, block: &MigrationBlock) -> Vec<ByteRange> {
        let Some((start, manager)) = block.discard_region() else { return Vec::new() };
        let region = ByteRange::new(start, manager.region_size());
        let section = region
            .zip(block.used())
            .and_then(|(region, used)| region.intersection(used)?.section(start));
        let (Some(section), Some(frozen)) = (section, self.of(&manager)) else { return Vec::new() };
        frozen.discarded(section).filter_map(|range| range.in_block(start)).collect()
    }

    /// Whether block state has been frozen without a gap until now.
    ///
    /// # Errors
    ///
    /// When it has not, or that cannot be known.
    pub(crate) fn check(&self) -> Result<(), MigrationError> {
        self.frozen.iter().try_for_each(|(frozen, _)| Ok(frozen.check()?))
    }

    /// Ends all freezes, and says whether they had held without a gap until then.
    ///
    /// # Errors
    ///
    /// When one had not, or that cannot be known. All have ended in any case.
    pub(crate) fn thaw(mut self) -> Result<(), MigrationError> {
        let mut result = Ok(());
        for (frozen, _) in self.frozen.drain(..) {
            result = result.and(frozen.thaw());
        }
        Ok(result?)
    }

    fn of(&self, manager: &Arc<dyn RamDiscardManager>) -> Option<&FrozenBlockState> {
        let found = self.frozen.iter().find(|(_, other)| Arc::ptr_eq(other, manager));
        found.map(|(frozen, _)| frozen)
    }
}
