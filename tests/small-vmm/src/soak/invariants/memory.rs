//! Guest memory against what vCPUs wrote, blocks against what the driver plugged, and what the
//! host holds against both.

use std::ops::Range;

use crate::soak::host::{ADDR, REGION};
use crate::soak::world::World;

/// No vCPU has found a page with anything but what it wrote there.
pub(super) fn look(world: &World) {
    let machine = world.machine();
    if machine.vcpus().is_halted() {
        world.journal.violated("guest memory equals its model", "memory was lost");
    }
    if !machine.vcpus().is_healthy() {
        let found = machine.vcpus().clone().stop().map(drop);
        let detail =
            found.err().map_or_else(|| "a vCPU ended".to_owned(), |error| error.to_string());
        world.journal.violated("guest memory equals its model", detail);
    }
}

/// The device's blocks are the driver's, and nothing is held of what is discarded. To be called
/// while the guest is settled.
pub(super) fn look_at_blocks(world: &World) {
    let (host, journal) = (world.host(), &world.journal);
    let machine = world.machine();
    if let Some(lost) = machine.lost() {
        journal.violated("the device works", format!("host {}: {lost}", host.name));
        return;
    }
    // No request is on its way, and none is made meanwhile.
    machine.with_driver(|driver| {
        let Some(plugged) = host.blocks(journal) else { return };
        let model: Vec<Range<u64>> = match driver.plugged_ranges() {
            Ok(ranges) => ranges.iter().map(|range| range.start - ADDR..range.end - ADDR).collect(),
            Err(error) => return journal.violated("the device works", error),
        };
        // Before it has unplugged what it did not plug, it knows nothing.
        let known = driver.state().is_ok_and(|state| state.probed);
        if known && plugged != model {
            let detail = format!("{plugged:x?} is plugged, {model:x?} by the driver");
            journal.violated("the plugged bitmap equals the driver's", detail);
        }
        let mut at = 0;
        for range in plugged.iter().chain([&(REGION..REGION)]) {
            let held = machine.ram().resident_ranges(ADDR + at..ADDR + range.start);
            match held {
                Ok(held) if held.is_empty() => {}
                Ok(held) => {
                    let detail = format!("{held:x?} is held, {:x?} is discarded", at..range.start);
                    journal.violated("nothing is held of discarded ranges", detail);
                }
                Err(error) => journal.violated("guest memory can be examined", error),
            }
            at = range.end;
        }
    });
}
