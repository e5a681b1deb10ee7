//! Target pages as the host's pages, which are placed, registered and protected as a whole.

use super::{PageBitmap, bytes_of};
use ram_discard::ByteRange;

/// Gaps smaller than this are worth no range of their own, bytes: their page tables are there
/// anyway, and each range costs a call and splits the process's mapping.
pub(crate) const GAP_MIN: u64 = 2 << 20;

impl PageBitmap {
    /// Sets all pages of every host page of which one is set; a host page is `per_page` target
    /// pages, and may pass the end of the bitmap.
    pub(crate) fn widen_to(&mut self, per_page: u64) {
        if per_page <= 1 {
            return;
        }
        let runs: Vec<_> = self.runs(0..self.nr_pages).collect();
        for run in runs {
            let end = run.end.next_multiple_of(per_page).min(self.nr_pages);
            self.set_range(run.start / per_page * per_page..end);
        }
    }

    /// The runs of ones as bytes, widened to host pages of `page_size` bytes, ascending, with gaps
    /// below `gap_min` bytes closed.
    pub(crate) fn host_ranges(&self, page_size: u64, gap_min: u64) -> Vec<ByteRange> {
        let mut ranges: Vec<ByteRange> = Vec::new();
        for run in self.runs(0..self.nr_pages) {
            let run = bytes_of(run);
            let mut start = run.start() / page_size * page_size;
            if let Some(last) = ranges.last().filter(|last| start < last.end() + gap_min) {
                start = last.start();
                ranges.pop();
            }
            ranges.extend(ByteRange::from_bounds(start, run.end().next_multiple_of(page_size)));
        }
        ranges
    }
}
