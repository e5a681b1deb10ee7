//! Replays: what is populated or discarded, range by range.

use std::hint::black_box;
use std::ops::ControlFlow;

use anyhow::{Context, Result, ensure};
use ram_discard::{MemoryState, RamDiscardManager};
use virtio_mem::controller::MemController;

use super::region::controller;
use super::{GIB, MIB};
use crate::counted::counted;

const REGION: u64 = 64 * GIB;
const BLOCK: u64 = 2 * MIB;

/// As many ranges as there can be.
pub fn every_other(state: MemoryState) -> Result<u64> {
    let ranges = replay(&controller(REGION, BLOCK, |block| block % 2 == 0)?, state)?;
    ensure!(ranges == REGION / BLOCK / 2, "every other block is a range");
    Ok(ranges)
}

/// 64 blocks of 128, neither of which begin at a word of the bitmap.
pub fn long_runs() -> Result<u64> {
    replay(&controller(REGION, BLOCK, |block| (block + 5) % 128 < 64)?, MemoryState::Populated)
}

fn replay(controller: &MemController, state: MemoryState) -> Result<u64> {
    let section = controller.geometry().section().context("no region")?;
    // As a trait, which is how migration has it.
    let manager: &dyn RamDiscardManager = &**controller.manager();
    let mut ranges = 0;
    let mut visit = |range| {
        black_box(range);
        ranges += 1;
        ControlFlow::Continue(())
    };
    let _ = counted(|| match state {
        MemoryState::Populated => manager.replay_populated(section, &mut visit),
        MemoryState::Discarded => manager.replay_discarded(section, &mut visit),
    })?;
    Ok(ranges)
}
