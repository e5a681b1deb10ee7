//! The region drawn as a map.

use std::fmt::Write;

use crate::management::{Blocks, DeviceInfo, Range};
use crate::size::format_size;

/// Lines of a map at most.
const LINES: u64 = 16;

/// Columns that an address and the space after it take.
const MARGIN: usize = 20;

const PLUGGED: char = '#';
const PARTLY: char = '+';
const DISCARDED: char = '.';

/// Draws the region, as wide as `width` allows: each line starts with its address, each
/// character stands for the same number of blocks.
pub(super) fn draw(blocks: &Blocks, device: &DeviceInfo, width: usize) -> String {
    let mut text = String::new();
    let count = device.region_size.checked_div(device.block_size).unwrap_or(0);
    // Powers of two, so that lines start at round addresses.
    let columns = width.saturating_sub(MARGIN).max(1);
    let columns = 1u64 << columns.ilog2();
    let cell_blocks = count.div_ceil(columns * LINES).next_power_of_two();
    let cell = cell_blocks.saturating_mul(device.block_size);
    let mut plugged = Overlap::new(&blocks.plugged);
    let mut start = 0;
    while start < device.region_size {
        let _ = write!(text, "{:#018x}  ", device.addr.saturating_add(start));
        for _ in 0..columns {
            if start >= device.region_size {
                break;
            }
            let end = start.saturating_add(cell).min(device.region_size);
            text.push(match plugged.within(start, end) {
                0 => DISCARDED,
                bytes if bytes == end - start => PLUGGED,
                _ => PARTLY,
            });
            start = end;
        }
        text.push('\n');
    }
    let sum = |ranges: &[Range]| ranges.iter().map(|range| range.size).sum::<u64>();
    let total = |ranges: &[Range]| {
        let plural = if ranges.len() == 1 { "" } else { "s" };
        format!("{} in {} range{plural}", format_size(sum(ranges)), ranges.len())
    };
    let populated =
        device.populated_size.map_or_else(|| "unknown (not mapped)".to_owned(), format_size);
    let _ = write!(
        text,
        "\n{PLUGGED} plugged  {PARTLY} partly plugged  {DISCARDED} discarded; \
         each character is {}\n\
         plugged    {}\npopulated  {populated}\ndiscarded  {}\n",
        format_size(cell),
        total(&blocks.plugged),
        total(&blocks.discarded),
    );
    text
}

/// How much of ascending windows is covered by ascending ranges, in one pass over both.
struct Overlap<'a> {
    ranges: &'a [Range],
}

impl<'a> Overlap<'a> {
    fn new(ranges: &'a [Range]) -> Self {
        Self { ranges }
    }

    fn within(&mut self, start: u64, end: u64) -> u64 {
        let mut covered = 0;
        while let Some((first, rest)) = self.ranges.split_first() {
            let range_end = first.offset.saturating_add(first.size);
            covered += range_end.min(end).saturating_sub(first.offset.max(start));
            if range_end > end {
                break;
            }
            self.ranges = rest;
        }
        covered
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::management::tests::device;
    use proptest::prelude::*;

    fn blocks_of(plugged: &[bool], size: u64) -> Blocks {
        let mut blocks = Blocks::default();
        let mut offset = 0;
        for run in plugged.chunk_by(|a, b| a == b) {
            let range = Range { offset, size: run.len() as u64 * size };
            if run[0] { &mut blocks.plugged } else { &mut blocks.discarded }.push(range);
            offset += range.size;
        }
        blocks
    }

    fn cells(map: &str) -> String {
        let lines = map.lines().take_while(|line| !line.is_empty());
        lines.map(|line| line.split("  ").nth(1).unwrap()).collect()
    }

    #[test]
    fn one_character_for_each_block() {
        let plugged = [true, true, false, true];
        let device = DeviceInfo { region_size: 8 << 20, ..device() };
        let map = draw(&blocks_of(&plugged, 2 << 20), &device, 80);
        assert!(map.starts_with("0x0000000100000000  ##.#\n"), "{map}");
        assert!(map.contains("each character is 2 MiB"), "{map}");
        assert!(map.contains("plugged    6 MiB in 2 ranges"), "{map}");
        assert!(map.contains("discarded  2 MiB in 1 range\n"), "{map}");
    }

    #[test]
    fn nothing_to_draw() {
        let device = DeviceInfo { region_size: 0, ..device() };
        assert!(draw(&Blocks::default(), &device, 0).starts_with("\n# plugged"));
    }

    proptest! {
        #[test]
        fn agrees_with_each_block(
            plugged in prop::collection::vec(any::<bool>(), 1..3000),
            width in 0usize..200,
        ) {
            let size = 2 << 20;
            let device =
                DeviceInfo { region_size: plugged.len() as u64 * size, ..device() };
            let map = draw(&blocks_of(&plugged, size), &device, width);
            prop_assert!(map.lines().take_while(|l| !l.is_empty()).count() <= LINES as usize);
            let cells = cells(&map);
            let per_cell = plugged.len().div_ceil(cells.len()).next_power_of_two();
            let expected: String = plugged.chunks(per_cell).map(|chunk| {
                match chunk.iter().filter(|plugged| **plugged).count() {
                    0 => DISCARDED,
                    n if n == chunk.len() => PLUGGED,
                    _ => PARTLY,
                }
            }).collect();
            prop_assert_eq!(cells, expected);
        }
    }
}
