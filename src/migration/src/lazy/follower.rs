//! Block state that changes while memory arrives and the guest runs.

use std::sync::{Arc, Weak};

use ram_discard::{ByteRange, RamDiscardListener, Section};

use super::LazyRam;
use crate::error::MigrationError;
use crate::ram::FrozenBlocks;

/// Where the region of a manager lies in a block that arrives.
struct Part {
    /// Number of the block.
    block: usize,
    /// Where the region starts in it, bytes.
    start: u64,
    used: ByteRange,
}

/// What is plugged is zeros here, and nothing of it comes from elsewhere. What is unplugged is not waited for any
/// more: late pages of it are dropped, also when it has been plugged again.
pub(crate) struct ArrivalFollower {
    // It must not keep memory that is given up.
    memory: Weak<LazyRam>,
    parts: Vec<Part>,
}

impl ArrivalFollower {
    /// Has `memory` follow the block state of its blocks, which is `frozen` until now, where it can be followed.
    ///
    /// # Errors
    ///
    /// When a freeze was lost before.
    pub(crate) fn follow(
        frozen: &mut FrozenBlocks,
        memory: &Arc<LazyRam>,
    ) -> Result<(), MigrationError> {
        frozen.follow(|manager| {
            let regions = (0..memory.nr_blocks()).filter_map(|index| {
                let (start, other) = memory.block(index).discard_region()?;
                Arc::ptr_eq(&other, manager).then_some((index, start))
            });
            let parts = regions.filter_map(|(block, start)| {
                let used = memory.block(block).used()?;
                Some(Part { block, start, used })
            });
            let follower = Self { memory: Arc::downgrade(memory), parts: parts.collect() };
            Some(Box::new(follower) as Box<dyn RamDiscardListener>)
        })
    }

    fn each(&self, section: Section, act: impl Fn(&LazyRam, usize, ByteRange)) {
        let Some(memory) = self.memory.upgrade() else { return };
        for part in &self.parts {
            let range =
                section.in_block(part.start).and_then(|range| range.intersection(part.used));
            if let Some(range) = range {
                act(&memory, part.block, range);
            }
        }
    }
}

impl RamDiscardListener for ArrivalFollower {
    fn name(&self) -> &str {
        "migration"
    }

    /// Nothing of it is outstanding since it was discarded.
    fn notify_populate(&mut self, _section: Section) -> Result<(), String> {
        Ok(())
    }

    fn notify_discard(&mut self, section: Section) {
        self.each(section, |memory, block, range| {
            if let Err(error) = memory.discard(block, range) {
                let block = memory.block(block).id();
                tracing::warn!(block, %range, %error, "cannot wake who waits for what is discarded");
            }
        });
    }
}
