//! The blocks of a migration: their block state frozen, and what was discarded when that began; or followed.

use std::sync::Arc;

use ram_discard::{
    ByteRange, FollowError, FollowedBlockState, FreezeFor, FreezeLost, FrozenBlockState,
    RamDiscardListener, RamDiscardManager,
};

use super::{InMigration, MigrationBlock};
use crate::error::MigrationError;

/// Holds the block state of all blocks frozen, and the blocks registered, until it is dropped.
#[derive(Default)]
pub(crate) struct FrozenBlocks {
    _held: Vec<InMigration>,
    /// Each manager once, whatever number of blocks it answers for.
    frozen: Vec<(Held, Arc<dyn RamDiscardManager>)>,
}

/// What a migration has of a manager.
enum Held {
    Frozen(FrozenBlockState),
    Followed(FollowedBlockState),
    /// Its freeze was lost.
    Lost(FreezeLost),
}

impl Held {
    fn check(&self) -> Result<(), FreezeLost> {
        match self {
            Self::Frozen(frozen) => frozen.check(),
            Self::Followed(followed) => followed.check(),
            Self::Lost(lost) => Err(lost.clone()),
        }
    }
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
            if !all.frozen.iter().any(|(_, other)| Arc::ptr_eq(other, &manager)) {
                all.frozen.push((Held::Frozen(manager.freeze(purpose)?), manager));
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

    /// Whether any manager can be followed, as far as that is known before.
    pub(crate) fn can_follow(&self) -> bool {
        let mut held = self.frozen.iter();
        held.any(|(held, _)| matches!(held, Held::Frozen(frozen) if frozen.can_follow()))
    }

    /// Whether block state of any manager is frozen.
    pub(crate) fn any_frozen(&self) -> bool {
        self.frozen.iter().any(|(held, _)| matches!(held, Held::Frozen(_)))
    }

    /// Has the listener of each manager that has one follow it, where it can.
    ///
    /// # Errors
    ///
    /// When a freeze was lost before.
    pub(crate) fn follow(
        &mut self,
        mut listener_of: impl FnMut(&Arc<dyn RamDiscardManager>) -> Option<Box<dyn RamDiscardListener>>,
    ) -> Result<(), MigrationError> {
        for (held, manager) in &mut self.frozen {
            if !matches!(held, Held::Frozen(frozen) if frozen.can_follow()) {
                continue;
            }
            let Some(listener) = listener_of(manager) else { continue };
            // Until there is another word.
            let gone = Held::Lost(FreezeLost("it was being given up".to_owned()));
            let Held::Frozen(frozen) = std::mem::replace(held, gone) else { continue };
            *held = match frozen.follow(listener) {
                Ok(followed) => Held::Followed(followed),
                Err(not) => {
                    if let FollowError::Lost(lost) = not.reason {
                        return Err(lost.into());
                    }
                    tracing::info!(reason = %not.reason, "block state stays frozen");
                    Held::Frozen(not.frozen)
                }
            };
        }
        Ok(())
    }

    /// Freezes again what is followed; what is discarded is then what the listeners were told.
    ///
    /// # Errors
    ///
    /// When one was not told of every change, or that cannot be known.
    pub(crate) fn freeze_again(&mut self) -> Result<(), MigrationError> {
        for (held, _) in &mut self.frozen {
            if !matches!(held, Held::Followed(_)) {
                continue;
            }
            let gone = Held::Lost(FreezeLost("it was being begun".to_owned()));
            let Held::Followed(followed) = std::mem::replace(held, gone) else { continue };
            match followed.freeze() {
                Ok(frozen) => *held = Held::Frozen(frozen),
                Err(lost) => {
                    *held = Held::Lost(lost.clone());
                    return Err(lost.into());
                }
            }
        }
        Ok(())
    }

    /// Whether block state has been frozen, or every change of it told, without a gap until now.
    ///
    /// # Errors
    ///
    /// When it has not, or that cannot be known.
    pub(crate) fn check(&self) -> Result<(), MigrationError> {
        self.frozen.iter().try_for_each(|(held, _)| Ok(held.check()?))
    }

    /// Ends all freezes, and says whether they had held without a gap until then.
    ///
    /// # Errors
    ///
    /// When one had not, or that cannot be known. All have ended in any case.
    pub(crate) fn thaw(mut self) -> Result<(), MigrationError> {
        let mut result = Ok(());
        for (held, _) in self.frozen.drain(..) {
            result = result.and(match held {
                Held::Frozen(frozen) => frozen.thaw(),
                Held::Followed(followed) => followed.check(),
                Held::Lost(lost) => Err(lost),
            });
        }
        Ok(result?)
    }

    fn of(&self, manager: &Arc<dyn RamDiscardManager>) -> Option<&FrozenBlockState> {
        let found = self.frozen.iter().find(|(_, other)| Arc::ptr_eq(other, manager));
        match found {
            Some((Held::Frozen(frozen), _)) => Some(frozen),
            _ => None,
        }
    }
}
