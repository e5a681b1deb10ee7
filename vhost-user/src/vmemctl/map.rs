//! The region drawn as a map.

use std::fmt::Write;

use serde::Serialize;

use crate::management::{Blocks, DeviceInfo, Populated, Range};
use crate::size::format_size;

/// Lines of a map at most.
const LINES: u64 = 16;

/// Columns that an address and the space after it take.
const MARGIN: usize = 20;

const POPULATED: char = '#';
const PLUGGED: char = '+';
const DISCARDED: char = '.';

/// What is known of the region; as JSON, one object with the fields of both.
#[derive(Debug, Serialize)]
pub(super) struct Region {
    #[serde(flatten)]
    pub(super) blocks: Blocks,
    #[serde(flatten)]
    pub(super) populated: Populated,
}

impl Region {
    /// Draws the region, as wide as `width` allows: each line starts with its address, each
    /// character stands for the same number of blocks. Where it stands for several, the one that
    /// costs the host most decides, so that nothing populated is overlooked.
    pub(super) fn draw(&self, device: &DeviceInfo, width: usize) -> String {
        let mut text = String::new();
        let count = device.region_size.checked_div(device.block_size).unwrap_or(0);
        // Powers of two, so that lines start at round addresses.
        let columns = width.saturating_sub(MARGIN).max(1);
        let columns = 1u64 << columns.ilog2();
        let cell_blocks = count.div_ceil(columns * LINES).next_power_of_two();
        let cell = cell_blocks.saturating_mul(device.block_size);
        let mut plugged = Overlap::new(&self.blocks.plugged);
        let mut populated = Overlap::new(self.populated.populated.as_deref().unwrap_or_default());
        let mut start = 0;
        while start < device.region_size {
            let _ = write!(text, "{:#018x}  ", device.addr.saturating_add(start));
            for _ in 0..columns {
                if start >= device.region_size {
                    break;
                }
                let end = start.saturating_add(cell).min(device.region_size);
                text.push(if populated.within(start, end) {
                    POPULATED
                } else if plugged.within(start, end) {
                    PLUGGED
                } else {
                    DISCARDED
                });
                start = end;
            }
            text.push('\n');
        }
        text.push('\n');
        self.explain(&mut text, device, cell);
        text
    }

    /// The legend and the sums.
    fn explain(&self, text: &mut String, device: &DeviceInfo, cell: u64) {
        let told = self.populated.populated.is_some();
        if told {
            let _ = write!(text, "{POPULATED} populated  ");
        }
        let _ = write!(
            text,
            "{PLUGGED} plugged  {DISCARDED} discarded; each character is {}",
            format_size(cell)
        );
        if cell > device.block_size {
            text.push_str(", the first of these that any of it is");
        }
        let populated = match device.populated_size {
            None => "unknown (not mapped)".to_owned(),
            Some(size) if told => format_size(size),
            Some(size) => format!("{} (the daemon does not tell where)", format_size(size)),
        };
        let _ = write!(
            text,
            "\nplugged    {}\npopulated  {populated}\ndiscarded  {}\n",
            total(&self.blocks.plugged),
            total(&self.blocks.discarded),
        );
    }
}

fn total(ranges: &[Range]) -> String {
    let size = ranges.iter().map(|range| range.size).fold(0, u64::saturating_add);
    let plural = if ranges.len() == 1 { "" } else { "s" };
    format!("{} in {} range{plural}", format_size(size), ranges.len())
}

/// Which of ascending windows ascending ranges meet, in one pass over both.
struct Overlap<'a> {
    ranges: &'a [Range],
}

impl<'a> Overlap<'a> {
    fn new(ranges: &'a [Range]) -> Self {
        Self { ranges }
    }

    fn within(&mut self, start: u64, end: u64) -> bool {
        let past = |range: &Range| range.offset.saturating_add(range.size) <= start;
        while let Some((first, rest)) = self.ranges.split_first()
            && past(first)
        {
            self.ranges = rest;
        }
        self.ranges.first().is_some_and(|range| range.offset < end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::management::tests::device;
    use proptest::prelude::*;

    const BLOCK: u64 = 2 << 20;

    /// What a block is, as its character.
    fn region(blocks: &str) -> Region {
        let chars: Vec<char> = blocks.chars().collect();
        let ranges = |wanted: fn(char) -> bool| {
            let mut offset = 0;
            let runs = chars.chunk_by(|a, b| wanted(*a) == wanted(*b)).map(|run| {
                let range = Range { offset, size: run.len() as u64 * BLOCK };
                offset += range.size;
                wanted(run[0]).then_some(range)
            });
            runs.flatten().collect::<Vec<_>>()
        };
        // `x` is populated without being plugged.
        let discarded = ranges(|c| c == DISCARDED || c == 'x');
        let plugged = ranges(|c| c == PLUGGED || c == POPULATED);
        let populated = Some(ranges(|c| c == POPULATED || c == 'x'));
        Region { blocks: Blocks { plugged, discarded }, populated: Populated { populated } }
    }

    fn device_of(blocks: usize) -> DeviceInfo {
        let region_size = blocks as u64 * BLOCK;
        DeviceInfo { region_size, populated_size: Some(4096), ..device() }
    }

    fn cells(map: &str) -> String {
        let lines = map.lines().take_while(|line| !line.is_empty());
        lines.map(|line| line.split("  ").nth(1).unwrap()).collect()
    }

    #[test]
    fn one_character_for_each_block() {
        let map = region("+#.+x").draw(&device_of(5), 80);
        assert_eq!(
            map,
            "0x0000000100000000  +#.+#\n\n\
             # populated  + plugged  . discarded; each character is 2 MiB\n\
             plugged    6 MiB in 2 ranges\n\
             populated  4 KiB\n\
             discarded  4 MiB in 2 ranges\n"
        );
    }

    #[test]
    fn populated_ranges_that_are_not_told_are_not_drawn() {
        let mut region = region("##..");
        region.populated = Populated::default();
        let map = region.draw(&device_of(4), 80);
        assert!(map.starts_with("0x0000000100000000  ++..\n\n+ plugged  . discarded;"), "{map}");
        assert!(map.contains("populated  4 KiB (the daemon does not tell where)\n"), "{map}");
        let map = region.draw(&device(), 80);
        assert!(map.contains("populated  unknown (not mapped)\n"), "{map}");
    }

    #[test]
    fn nothing_to_draw() {
        assert!(region("").draw(&device_of(0), 0).starts_with("\n# populated"));
    }

    proptest! {
        #[test]
        fn agrees_with_each_block(blocks in "[#+.x]{1,3000}", width in 0usize..200) {
            let device = device_of(blocks.len());
            let map = region(&blocks).draw(&device, width);
            prop_assert!(map.lines().take_while(|l| !l.is_empty()).count() <= LINES as usize);
            let cells = cells(&map);
            let per_cell = blocks.len().div_ceil(cells.len()).next_power_of_two();
            prop_assert_eq!(per_cell > 1, map.contains(", the first of these"));
            let expected: String = blocks.as_bytes().chunks(per_cell).map(|cell| {
                match cell {
                    _ if cell.iter().any(|block| b"#x".contains(block)) => POPULATED,
                    _ if cell.contains(&b'+') => PLUGGED,
                    _ => DISCARDED,
                }
            }).collect();
            prop_assert_eq!(cells, expected);
        }
    }
}
