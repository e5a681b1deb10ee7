//! The guest's programs: they take memory that is plugged, and leave it again.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::PoisonError;

use crate::machine::Machine;
use crate::memory::PAGE_SIZE;
use crate::soak::host::{ADDR, BLOCK};
use crate::soak::random::Random;
use crate::soak::world::{World, lock};

/// The most that programs use, bytes.
const MOST: u64 = 32 << 20;
/// The most that one takes at a time, in pages.
const PART: u64 = 1024;

pub(super) fn turn(world: &World, random: &mut Random) {
    let Ok(_settled) = world.settled.read().map_err(PoisonError::into_inner) else { return };
    let machine = world.machine();
    let given = machine.vcpus().given();
    let used: u64 = given.iter().map(|range| range.end - range.start).sum();
    if !given.is_empty() && (used > MOST || random.percent(30)) {
        let range = given[random.below(given.len() as u64) as usize].clone();
        world.journal.did("guest leaves memory", format_args!("{range:x?}"));
        machine.vcpus().take(range);
        return;
    }
    let taken = machine.with_driver(|driver| {
        let plugged = driver.plugged_ranges().map_err(|error| error.to_string())?;
        take_some(world, &machine, &plugged, random)
    });
    if let Err(error) = taken {
        world.journal.violated("memory that was never written is zeros", error);
    }
}

/// Takes a part of what is plugged, no request being on its way. An error is a page that is not
/// zeros though the guest has not written it since it was plugged.
fn take_some(
    world: &World,
    machine: &Machine,
    plugged: &[Range<u64>],
    random: &mut Random,
) -> Result<(), String> {
    let blocks: BTreeSet<u64> =
        plugged.iter().flat_map(|range| block_of(range.start)..block_of(range.end)).collect();
    let mut used = lock(&world.used);
    used.retain(|block| blocks.contains(block));
    if plugged.is_empty() {
        return Ok(());
    }
    let run = plugged[random.below(plugged.len() as u64) as usize].clone();
    let pages = (run.end - run.start) / PAGE_SIZE;
    let start = run.start + PAGE_SIZE * random.below(pages);
    let end = run.end.min(start + PAGE_SIZE * (1 + random.below(PART)));
    let in_use = machine.vcpus().given();
    if in_use.iter().any(|range| range.start < end && start < range.end) {
        return Ok(());
    }
    for page in (start..end).step_by(PAGE_SIZE as usize) {
        if used.contains(&block_of(page)) {
            continue;
        }
        for addr in [page, page + PAGE_SIZE - 8] {
            let found: u64 = machine.ram().load(addr).map_err(|error| error.to_string())?;
            if found != 0 {
                return Err(format!("{addr:#x} holds {found:#x}"));
            }
        }
    }
    used.extend(block_of(start)..block_of(end - 1) + 1);
    world.journal.did("guest takes memory", format_args!("{:x?}", start..end));
    machine.vcpus().give(start..end);
    Ok(())
}

fn block_of(addr: u64) -> u64 {
    (addr - ADDR) / BLOCK
}
