//! The region drawn as a map.

use std::fmt::Write;

use management_api::{DeviceInfo, Range};
use program::size::format_size;

use super::range_stream::{Item, List};

/// Lines of a map at most.
const LINES: u64 = 16;

/// Columns that an address and the space after it take.
const MARGIN: usize = 20;

const RESIDENT: u8 = b'#';
const PLUGGED: u8 = b'+';
const DISCARDED: u8 = b'.';

/// The map of a region: each line starts with its address, each character stands for the same number
/// of blocks. Where it stands for several, the one that costs the host most decides, so that nothing
/// resident is overlooked.
///
/// It is as large as what is drawn, however many ranges the region has.
#[derive(Debug)]
pub(super) struct Map<'a> {
    device: &'a DeviceInfo,
    columns: usize,
    /// What a character stands for, bytes.
    cell: u64,
    cells: Vec<u8>,
    /// The list that is read.
    list: List,
    plugged: Total,
    discarded: Total,
    /// Whether it is told where memory is resident.
    told: bool,
}

/// What the ranges of a list are together.
#[derive(Debug, Default)]
struct Total {
    size: u64,
    ranges: u64,
}

impl<'a> Map<'a> {
    /// An empty map, as wide as `width` allows.
    pub(super) fn new(device: &'a DeviceInfo, width: usize) -> Self {
        let count = device.region_size.checked_div(device.block_size).unwrap_or(0);
        // Powers of two, so that lines start at round addresses.
        let columns = width.saturating_sub(MARGIN).max(1);
        let columns = 1 << columns.ilog2();
        let cell_blocks = count.div_ceil(columns as u64 * LINES).next_power_of_two();
        let cell = cell_blocks.saturating_mul(device.block_size).max(1);
        let cells = device.region_size.div_ceil(cell).min(columns as u64 * LINES);
        let cells = vec![DISCARDED; usize::try_from(cells).unwrap_or(0)];
        let (plugged, discarded) = Default::default();
        Self {
            device,
            columns,
            cell,
            cells,
            list: List::Discarded,
            plugged,
            discarded,
            told: false,
        }
    }

    /// Takes an item up.
    pub(super) fn take(&mut self, item: Item) {
        match (item, self.list) {
            (Item::Begin(list), _) => {
                self.list = list;
                self.told |= list == List::Resident;
            }
            (Item::Range(range), List::Plugged) => {
                self.plugged.add(range);
                self.mark(range, PLUGGED);
            }
            (Item::Range(range), List::Discarded) => self.discarded.add(range),
            (Item::Range(range), List::Resident) => self.mark(range, RESIDENT),
        }
    }

    fn mark(&mut self, range: Range, as_what: u8) {
        if range.size == 0 {
            return;
        }
        let index = |at: u64| usize::try_from(at / self.cell).unwrap_or(usize::MAX);
        let first = index(range.offset);
        let last = index(range.offset.saturating_add(range.size - 1));
        for cell in self.cells.iter_mut().take(last.saturating_add(1)).skip(first) {
            // Resident is told last or first, and is what shows.
            if *cell != RESIDENT {
                *cell = as_what;
            }
        }
    }

    /// The map with its legend and the sums.
    pub(super) fn draw(&self) -> String {
        let mut text = String::new();
        let line = self.columns as u64 * self.cell;
        for (number, cells) in self.cells.chunks(self.columns).enumerate() {
            let start = self.device.addr.saturating_add(number as u64 * line);
            let _ = write!(text, "{start:#018x}  ");
            text.extend(cells.iter().map(|&cell| char::from(cell)));
            text.push('\n');
        }
        text.push('\n');
        self.explain(&mut text);
        text
    }

    fn explain(&self, text: &mut String) {
        if self.told {
            text.push_str("# resident  ");
        }
        let cell = format_size(self.cell);
        let _ = write!(text, "+ plugged  . discarded; each character is {cell}");
        if self.cell > self.device.block_size {
            text.push_str(", the first of these that any of it is");
        }
        let resident = match self.device.resident_size {
            None => "unknown (not mapped)".to_owned(),
            Some(size) if self.told => format_size(size),
            Some(size) => format!("{} (the daemon does not tell where)", format_size(size)),
        };
        let (plugged, discarded) = (self.plugged.text(), self.discarded.text());
        let _ =
            write!(text, "\nplugged    {plugged}\nresident   {resident}\ndiscarded  {discarded}\n");
    }
}

impl Total {
    fn add(&mut self, range: Range) {
        self.size = self.size.saturating_add(range.size);
        self.ranges += 1;
    }

    fn text(&self) -> String {
        let plural = if self.ranges == 1 { "" } else { "s" };
        format!("{} in {} range{plural}", format_size(self.size), self.ranges)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use vhost_user_mem::management::fake::device;

    const BLOCK: u64 = 2 << 20;

    /// The ranges of blocks, each given as its character. `x` is resident without being plugged.
    fn items(blocks: &str) -> Vec<Item> {
        let list = |list, wanted: &[u8]| {
            let mut offset = 0;
            let wanted = |block: &u8| wanted.contains(block);
            let mut items = vec![Item::Begin(list)];
            for run in blocks.as_bytes().chunk_by(|a, b| wanted(a) == wanted(b)) {
                let range = Range { offset, size: run.len() as u64 * BLOCK };
                offset += range.size;
                items.extend(wanted(&run[0]).then_some(Item::Range(range)));
            }
            items
        };
        let plugged = list(List::Plugged, b"+#");
        [plugged, list(List::Discarded, b".x"), list(List::Resident, b"#x")].concat()
    }

    fn draw(items: &[Item], device: &DeviceInfo, width: usize) -> String {
        let mut map = Map::new(device, width);
        items.iter().for_each(|&item| map.take(item));
        map.draw()
    }

    fn device_of(blocks: usize) -> DeviceInfo {
        let region_size = blocks as u64 * BLOCK;
        DeviceInfo { region_size, resident_size: Some(4096), ..device() }
    }

    fn cells(map: &str) -> String {
        let lines = map.lines().take_while(|line| !line.is_empty());
        lines.map(|line| line.split("  ").nth(1).unwrap()).collect()
    }

    #[test]
    fn one_character_for_each_block() {
        let map = draw(&items("+#.+x"), &device_of(5), 80);
        assert_eq!(
            map,
            "0x0000000100000000  +#.+#\n\n\
             # resident  + plugged  . discarded; each character is 2 MiB\n\
             plugged    6 MiB in 2 ranges\n\
             resident   4 KiB\n\
             discarded  4 MiB in 2 ranges\n"
        );
    }

    #[test]
    fn resident_ranges_that_are_not_told_are_not_drawn() {
        let mut items = items("##..");
        items.truncate(4);
        let map = draw(&items, &device_of(4), 80);
        assert!(map.starts_with("0x0000000100000000  ++..\n\n+ plugged  . discarded;"), "{map}");
        assert!(map.contains("resident   4 KiB (the daemon does not tell where)\n"), "{map}");
        let map = draw(&items, &device(), 80);
        assert!(map.contains("resident   unknown (not mapped)\n"), "{map}");
    }

    #[test]
    fn nothing_to_draw() {
        assert!(draw(&items(""), &device_of(0), 0).starts_with("\n# resident"));
    }

    proptest! {
        #[test]
        fn agrees_with_each_block(blocks in "[#+.x]{1,3000}", width in 0usize..200) {
            let device = device_of(blocks.len());
            let map = draw(&items(&blocks), &device, width);
            prop_assert!(map.lines().take_while(|l| !l.is_empty()).count() <= LINES as usize);
            let cells = cells(&map);
            let per_cell = blocks.len().div_ceil(cells.len()).next_power_of_two();
            prop_assert_eq!(per_cell > 1, map.contains(", the first of these"));
            let expected: String = blocks.as_bytes().chunks(per_cell).map(|cell| {
                char::from(match cell {
                    _ if cell.iter().any(|block| b"#x".contains(block)) => RESIDENT,
                    _ if cell.contains(&b'+') => PLUGGED,
                    _ => DISCARDED,
                })
            }).collect();
            prop_assert_eq!(cells, expected);
        }
    }
}
