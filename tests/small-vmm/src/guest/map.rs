//! What is where in the region, as a row of cells.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::memory::{GuestRam, Result};

/// One part of the region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cell {
    /// The guest may not use it and the host holds nothing.
    Discarded,
    /// The guest may use it and has not yet.
    Untouched,
    /// The guest may use it and the host holds memory for it.
    Resident,
    /// The host holds memory that the guest may not use.
    Leaked,
}

/// The region in `cells` parts of the same size.
pub(super) fn draw(
    ram: &GuestRam,
    region: &Range<u64>,
    plugged: &[Range<u64>],
    cells: u64,
) -> Result<Vec<Cell>> {
    let resident = ram.resident_ranges(region.clone())?;
    let step = (region.end - region.start).div_ceil(cells);
    let meets = |ranges: &[Range<u64>], cell: &Range<u64>| {
        ranges.iter().any(|range| range.start < cell.end && cell.start < range.end)
    };
    Ok((0..cells)
        .map(|index| {
            let start = region.start + index * step;
            let cell = start..(start + step).min(region.end);
            match (meets(plugged, &cell), meets(&resident, &cell)) {
                (false, false) => Cell::Discarded,
                (true, false) => Cell::Untouched,
                (true, true) => Cell::Resident,
                (false, true) => Cell::Leaked,
            }
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Layout;

    #[test]
    fn map_tells_plugged_from_resident_and_shows_leaks() {
        let ram = GuestRam::new(Layout::new().memfd("ram", 0, 0x10000).unwrap()).unwrap();
        ram.write(0x0000, &[1]).unwrap();
        ram.write(0xf000, &[1]).unwrap();
        let plugged = vec![0..0x8000; 1];
        let map = draw(&ram, &(0..0x10000), &plugged, 4).unwrap();
        assert_eq!(map, [Cell::Resident, Cell::Untouched, Cell::Discarded, Cell::Leaked]);
    }
}
