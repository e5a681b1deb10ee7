//! Block state that follows the source's while memory comes.

use std::sync::Arc;

use ram_discard::{ByteRange, MemoryState, RamDiscardManager, Section};

use super::{LoadBlock, RamLoad};
use crate::error::MigrationError;
use crate::lazy::{ArrivalFollower, LazyRam};
use crate::page_bitmap::pages_touched;
use crate::stream::BlockStateChange;

impl RamLoad {
    /// The guest is about to run here: block state may change, and `memory` follows it.
    pub(super) fn follow_arrival(&mut self, memory: &Arc<LazyRam>) -> Result<(), MigrationError> {
        self.frozen.as_mut().map_or(Ok(()), |frozen| ArrivalFollower::follow(frozen, memory))
    }

    /// Whether block state of all blocks can follow that of the source.
    pub(super) fn can_follow_source(&self) -> bool {
        let managers = self.registry.iter().filter_map(|block| block.discard_region());
        let mut any = false;
        let all = managers.into_iter().all(|(_, manager)| {
            any = true;
            manager.follows_source()
        });
        any && all
    }

    /// Checks all of a change, and then makes it; of one that populates, why it is refused, if it is.
    pub(super) fn follow(
        &mut self,
        change: &BlockStateChange,
        at: u64,
    ) -> Result<Option<String>, MigrationError> {
        let BlockStateChange { number, state, block: id, ranges } = change;
        let refused = |what: String| MigrationError::BlockState { block: id.clone(), at, what };
        let due = self.changes.wrapping_add(1);
        if *number != due {
            return Err(refused(format!("change {number} of block state, where {due} is due")));
        }
        self.changes = *number;
        let options = self.options;
        let mut found = self.blocks.iter_mut().enumerate();
        let found = found.find(|(_, block)| block.block.id() == id);
        let Some((index, block)) = found.filter(|(_, block)| !options.leaves_out(&block.block))
        else {
            return Err(refused("it is not in the list of those whose pages are sent".to_owned()));
        };
        let Some((start, manager)) = block.block.discard_region() else {
            return Err(refused("nothing of it is ever discarded here".to_owned()));
        };
        let mut sections = Vec::with_capacity(ranges.len());
        for &range in ranges {
            let section = block.section(range, start, &*manager).map_err(refused)?;
            if let Some(wrong) = contradiction(&*manager, section, *state)? {
                return Err(refused(format!("{range} {wrong}")));
            }
            sections.push(section);
        }
        if *state == MemoryState::Populated {
            return Ok(populate(&*manager, &sections).err());
        }
        // A page that another channel brings too late is written before, or is refused.
        let _alone = self.by_channels.as_ref().map(|blocks| blocks.hold(index));
        for (&range, &section) in ranges.iter().zip(&sections) {
            let followed = manager.follow_source(section, MemoryState::Discarded);
            followed.map_err(|error| refused(format!("{range} cannot be discarded: {error}")))?;
            block.take_back(range)?;
            if let Some(blocks) = &self.by_channels {
                blocks.forget(index, range);
            }
        }
        Ok(None)
    }
}

impl LoadBlock {
    /// The section that `range` is, which is whole granules of the region.
    fn section(
        &self,
        range: ByteRange,
        start: u64,
        manager: &dyn RamDiscardManager,
    ) -> Result<Section, String> {
        let used = self.block.used_length();
        if range.end() > used {
            return Err(format!("{range} is past its end: {used:#x} bytes are in use"));
        }
        let section = range.section(start);
        let section = section.filter(|section| section.end() <= manager.region_size());
        let Some(section) = section.filter(|_| range.start() >= start) else {
            return Err(format!("{range} is not in the region that can be discarded"));
        };
        let granularity = manager.granularity();
        let whole = |at: u64| at.is_multiple_of(granularity);
        if !whole(section.start()) || !whole(section.len()) {
            return Err(format!("{range} is not made of units of {granularity:#x} bytes"));
        }
        Ok(section)
    }

    /// Discards what came of `range`.
    fn take_back(&mut self, range: ByteRange) -> Result<(), MigrationError> {
        self.received.clear_range(pages_touched(range));
        self.populated = None;
        let swept = self.block.sweep(range);
        swept.map_err(MigrationError::memory(self.block.id(), "discard what came of it"))
    }
}

/// How a change contradicts what is known: a part of the section is in that state already.
fn contradiction(
    manager: &dyn RamDiscardManager,
    section: Section,
    state: MemoryState,
) -> Result<Option<&'static str>, MigrationError> {
    let mut any = false;
    let mut visit = |_| {
        any = true;
        std::ops::ControlFlow::Break(())
    };
    let what = match state {
        MemoryState::Populated => {
            let _ = manager.replay_populated(section, &mut visit)?;
            "is to be populated, and a part of it is already"
        }
        MemoryState::Discarded => {
            let _ = manager.replay_discarded(section, &mut visit)?;
            "was discarded, and a part of it was before"
        }
    };
    Ok(any.then_some(what))
}

/// Populates all of `sections`, or none.
fn populate(manager: &dyn RamDiscardManager, sections: &[Section]) -> Result<(), String> {
    ram_discard::try_all(
        &mut (),
        sections,
        |(), &section| {
            manager
                .follow_source(section, MemoryState::Populated)
                .map_err(|error| error.to_string())
        },
        |(), &section| {
            if let Err(error) = manager.follow_source(section, MemoryState::Discarded) {
                // The source does not have it populated, and so the guest does not use it.
                tracing::warn!(%error, %section, "cannot take back what was populated");
            }
        },
    )
}
