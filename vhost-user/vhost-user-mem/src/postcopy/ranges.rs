//! Which ranges of guest memory are waited for.

use ram_discard::{GpaRange, Section};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::queue::Memory;

/// The most plugged sections that are followed: each splits a mapping, of which the kernel allows
/// some ten thousands.
pub(super) const RANGES_MAX: usize = 8192;

/// Guest-physical ranges of `memory` without what is discarded in `region`, of which the `plugged`
/// sections are not; all of `memory` when these are not followed.
pub(super) fn wanted(
    memory: &Memory,
    region: Option<GpaRange>,
    plugged: Option<&[Section]>,
) -> Vec<GpaRange> {
    let entries = memory.iter();
    let entries = entries.filter_map(|entry| GpaRange::new(entry.start_addr().0, entry.len()));
    select(entries.collect(), region, plugged)
}

fn select(
    entries: Vec<GpaRange>,
    region: Option<GpaRange>,
    plugged: Option<&[Section]>,
) -> Vec<GpaRange> {
    let (Some(region), Some(plugged)) = (region, plugged) else { return entries };
    let plugged = plugged.iter().filter_map(|section| section.gpa(region.start()));
    let plugged: Vec<_> = plugged.collect();
    let parts = entries.iter().flat_map(|&entry| {
        let inside = plugged.iter().filter_map(move |range| range.intersection(entry));
        entry.subtract(region).into_iter().flatten().chain(inside)
    });
    parts.collect()
}

/// Adds a range to ascending ones that are apart; what is in one already is replaced.
pub(super) fn add(ranges: &mut Vec<Section>, range: Section) {
    remove(ranges, range);
    let at = ranges.partition_point(|other| other.start() < range.start());
    ranges.insert(at, range);
}

/// Takes a range out of ascending ones.
pub(super) fn remove(ranges: &mut Vec<Section>, range: Section) {
    let first = ranges.partition_point(|other| other.end() <= range.start());
    let end = ranges.partition_point(|other| other.start() < range.end());
    let rest: Vec<_> =
        ranges[first..end].iter().flat_map(|other| other.subtract(range)).flatten().collect();
    ranges.splice(first..end, rest);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, end: u64) -> GpaRange {
        GpaRange::from_bounds(start, end).unwrap()
    }

    fn section(start: u64, end: u64) -> Section {
        Section::from_bounds(start, end).unwrap()
    }

    #[test]
    fn ranges_are_added_and_taken_out() {
        let mut ranges = Vec::new();
        for (start, end) in [(40, 50), (0, 10), (20, 30), (25, 27)] {
            add(&mut ranges, section(start, end));
        }
        let wanted = [(0, 10), (20, 25), (25, 27), (27, 30), (40, 50)];
        assert_eq!(ranges, wanted.map(|(start, end)| section(start, end)));
        remove(&mut ranges, section(5, 45));
        assert_eq!(ranges, [section(0, 5), section(45, 50)]);
        remove(&mut ranges, section(10, 20));
        remove(&mut ranges, section(0, 100));
        assert_eq!(ranges, []);
    }

    #[test]
    fn only_the_discarded_parts_of_the_region_are_left_out() {
        let region = Some(range(1 << 20, 2 << 20));
        let plugged = [section(0x1000, 0x3000), section(0x4000, 0x5000)];
        let entries = vec![range(0, 0x8000), range(1 << 20, (1 << 20) + 0x2000)];
        let start = 1 << 20;
        let expected = [range(0, 0x8000), range(start + 0x1000, start + 0x2000)];
        assert_eq!(select(entries.clone(), region, Some(&plugged)), expected);
        assert_eq!(select(entries.clone(), region, None), entries);
        // An entry that goes beyond the region on both sides.
        let entries = vec![range(0, 3 << 20)];
        let expected = [
            range(0, start),
            range(2 << 20, 3 << 20),
            range(start + 0x1000, start + 0x3000),
            range(start + 0x4000, start + 0x5000),
        ];
        assert_eq!(select(entries, region, Some(&plugged)), expected);
    }
}
