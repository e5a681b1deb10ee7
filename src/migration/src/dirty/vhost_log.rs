//! Dirty pages by the log that vhost-user back-ends write (VHOST_USER_SET_LOG_BASE), and the VMM for
//! its own I/O.
//!
//! The log is shared memory with one bit for each 4 KiB page of guest-physical memory: page `n` is
//! bit `n % 8` of byte `n / 8`. Back-ends set bits atomically after they wrote the page; we take
//! them out atomically.

use std::io;
use std::sync::Arc;

use ram_discard::memory::HostMapping;
use ram_discard::{ByteRange, Extent, GpaRange, Origin};

use super::{DirtyTracker, pages_within};
use crate::page_bitmap::{PageBitmap, bytes_of, pages_touched};
use crate::stream::TARGET_PAGE_SIZE;

/// Words that are taken out of the log before they are told, since to tell takes longer.
const TAKEN_WORDS: usize = 64;

/// A part of a block that is at a guest-physical address.
#[derive(Clone, Copy, Debug)]
pub struct LoggedRange {
    /// Guest-physical address of its first byte, at the start of a page.
    pub guest_addr: u64,
    /// Bytes of the block, whole pages.
    pub range: ByteRange,
}

/// Tracks a block by the log that vhost-user back-ends write, and [`mark`](Self::mark).
///
/// Logging is switched on and off by the front-end, with VHOST_F_LOG_ALL; starting the tracker
/// only forgets what is in the log for this block.
#[derive(Debug)]
pub struct VhostLog {
    log: Arc<HostMapping>,
    ranges: Vec<LoggedRange>,
}

impl VhostLog {
    /// Tracks the block whose parts are at the guest-physical addresses in `ranges`, by the log
    /// mapped at `log`. The log may be shared with the trackers of other blocks.
    ///
    /// # Errors
    ///
    /// `InvalidInput` when a part is not made of whole pages or lies past the end of the log.
    pub fn new(log: Arc<HostMapping>, ranges: Vec<LoggedRange>) -> io::Result<Self> {
        for LoggedRange { guest_addr, range } in &ranges {
            let whole = [*guest_addr, range.start(), range.len()]
                .iter()
                .all(|bytes| bytes.is_multiple_of(TARGET_PAGE_SIZE));
            let end = guest_addr.checked_add(range.len());
            // Words, since that is how it is read.
            let needed = end.map(|end| end.div_ceil(TARGET_PAGE_SIZE * 64) * 8);
            if !whole || needed.is_none_or(|needed| needed > log.len()) {
                return Err(not_in(&log, *range, *guest_addr));
            }
        }
        Ok(Self { log, ranges })
    }

    /// Marks guest-physical memory that was written, whole or in part, for all trackers of the log.
    ///
    /// For writes that no page table shows, such as DMA into pinned pages: a VMM keeps a log whether
    /// or not a back-end writes to it, and marks what an I/O wrote when that has completed, before
    /// the guest hears of it. A guest counts as stopped when none is under way any more. Marks that
    /// that are not asked for cost no more than that, so they need not wait for a migration.
    ///
    /// # Errors
    ///
    /// `InvalidInput` when the range lies past the end of the log. Nothing is marked then.
    pub fn mark(log: &HostMapping, written: GpaRange) -> io::Result<()> {
        let pages = pages_touched(written);
        if pages.end.div_ceil(64) * 8 > log.len() {
            return Err(not_in(log, written, written.start()));
        }
        let mut at = pages.start;
        while at < pages.end {
            let end = pages.end.min((at / 64 + 1) * 64);
            log.set_bits(at / 64 * 8, mask(at, end));
            at = end;
        }
        Ok(())
    }

    /// Takes out the bits of the block and tells `visit` pages of the block with their bits, of
    /// which at least one is set.
    fn take(&self, mut visit: impl FnMut(ByteRange, &[u64])) {
        let mut taken = [0; TAKEN_WORDS];
        for LoggedRange { guest_addr, range } in &self.ranges {
            let first = guest_addr / TARGET_PAGE_SIZE;
            let guest = first..first + range.len() / TARGET_PAGE_SIZE;
            let mut at = guest.start;
            while at < guest.end {
                let whole = if at.is_multiple_of(64) { (guest.end - at) / 64 } else { 0 };
                let (words, end) = match whole.min(TAKEN_WORDS as u64) {
                    0 => {
                        let end = guest.end.min((at / 64 + 1) * 64);
                        // Other bits of the word may belong to another block.
                        taken[0] = self.log.take_bits(at / 64 * 8, mask(at, end)) >> (at % 64);
                        (&taken[..1], end)
                    }
                    whole => {
                        let words = &mut taken[..whole as usize];
                        for (word, bits) in (at / 64..).zip(&mut *words) {
                            *bits = self.log.take_bits(word * 8, u64::MAX);
                        }
                        (&*words, at + whole * 64)
                    }
                };
                if words.iter().any(|bits| *bits != 0) {
                    let pages = bytes_of(at - guest.start..end - guest.start);
                    let pages = pages.of_part(range.start());
                    visit(pages.expect("a part of the block"), words);
                }
                at = end;
            }
        }
    }
}

impl DirtyTracker for VhostLog {
    fn start(&mut self, _populated: &[ByteRange]) -> io::Result<()> {
        self.take(|_, _| {});
        Ok(())
    }

    fn sync(&mut self, dirty: &mut PageBitmap) -> io::Result<()> {
        self.take(|part, bits| {
            let pages = pages_within(part, dirty);
            dirty.or_bits(pages, bits);
        });
        Ok(())
    }

    /// Nothing to do: what is reported is taken out of the log.
    fn clear(&mut self, _range: ByteRange) -> io::Result<()> {
        Ok(())
    }

    fn stop(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The bits of pages `at..end` in their word, of which there is one.
fn mask(at: u64, end: u64) -> u64 {
    (u64::MAX << (at % 64)) & (u64::MAX >> (63 - (end - 1) % 64))
}

fn not_in<O: Origin>(log: &HostMapping, range: Extent<O>, guest_addr: u64) -> io::Error {
    let what = format!("{range} at {guest_addr:#x} is not in a log of {:#x} bytes", log.len());
    io::Error::new(io::ErrorKind::InvalidInput, what)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::PATIENCE;
    use proptest::prelude::*;
    use std::fs::File;

    const PAGE: u64 = TARGET_PAGE_SIZE;

    fn log(bytes: u64) -> Arc<HostMapping> {
        let file = rustix::fs::memfd_create("log-test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(file);
        file.set_len(bytes).unwrap();
        Arc::new(HostMapping::map(&file, 0, bytes).unwrap())
    }

    /// What a back-end does, other than that it does it atomically.
    fn mark(log: &HostMapping, guest_page: u64) {
        let mut byte = [0];
        log.read(guest_page / 8, &mut byte);
        log.write(guest_page / 8, &[byte[0] | 1 << (guest_page % 8)]);
    }

    fn at(guest_page: u64, page: u64, pages: u64) -> LoggedRange {
        let range = ByteRange::new(page * PAGE, pages * PAGE).unwrap();
        LoggedRange { guest_addr: guest_page * PAGE, range }
    }

    #[test]
    fn pages_of_others_in_the_same_word_stay_logged() {
        let log = log(PAGE);
        let mut ours = VhostLog::new(Arc::clone(&log), vec![at(10, 0, 60)]).unwrap();
        let mut others =
            VhostLog::new(Arc::clone(&log), vec![at(0, 0, 10), at(70, 10, 30)]).unwrap();
        for guest_page in [9, 10, 63, 64, 69, 70, 99, 100] {
            mark(&log, guest_page);
        }
        let mut dirty = PageBitmap::new(60);
        ours.sync(&mut dirty).unwrap();
        assert!(dirty.runs(0..60).flatten().eq([0, 53, 54, 59]));
        let mut dirty = PageBitmap::new(40);
        others.sync(&mut dirty).unwrap();
        assert!(dirty.runs(0..40).flatten().eq([9, 10, 39]));
        // Page 100 belongs to no block.
        assert_eq!(log.take_bits(8, u64::MAX), 1 << 36);
        assert_eq!(log.take_bits(8, u64::MAX), 0);
    }

    #[test]
    fn what_was_logged_before_the_start_is_not_reported() {
        let log = log(PAGE);
        let mut tracker = VhostLog::new(Arc::clone(&log), vec![at(100, 0, 100)]).unwrap();
        mark(&log, 100);
        tracker.start(&[]).unwrap();
        mark(&log, 199);
        mark(&log, 150);
        // The block is shorter by now than the table of the front-end.
        let mut dirty = PageBitmap::new(90);
        tracker.sync(&mut dirty).unwrap();
        assert!(dirty.runs(0..90).flatten().eq([50]));
    }

    #[test]
    fn a_log_that_is_too_short_is_refused() {
        let log = log(PAGE);
        let pages = PAGE * 8;
        assert!(VhostLog::new(Arc::clone(&log), vec![at(0, 0, pages)]).is_ok());
        for wrong in [
            at(1, 0, pages),
            at(pages, 0, 1),
            at(u64::MAX / PAGE, 0, 1),
            LoggedRange { guest_addr: 1, ..at(0, 0, 1) },
            LoggedRange { guest_addr: 0, range: ByteRange::new(0, 100).unwrap() },
        ] {
            assert!(VhostLog::new(Arc::clone(&log), vec![wrong]).is_err());
        }
    }

    #[test]
    fn a_block_of_many_words_is_reported_whole() {
        let nr_pages = TAKEN_WORDS as u64 * 64 * 2 + 200;
        let log = log(4 * PAGE);
        let mut tracker = VhostLog::new(Arc::clone(&log), vec![at(5, 3, nr_pages)]).unwrap();
        let taken = TAKEN_WORDS as u64 * 64;
        let marked = [5, 63, 64, 63 + taken, 64 + taken, 64 + 2 * taken, 4 + nr_pages];
        marked.into_iter().for_each(|guest_page| mark(&log, guest_page));
        // Those of others.
        [4, 5 + nr_pages].into_iter().for_each(|guest_page| mark(&log, guest_page));
        let mut dirty = PageBitmap::new(nr_pages + 3);
        tracker.sync(&mut dirty).unwrap();
        assert!(dirty.runs(0..nr_pages + 3).flatten().eq(marked.map(|guest_page| guest_page - 2)));
        let mut dirty = PageBitmap::new(nr_pages + 3);
        tracker.sync(&mut dirty).unwrap();
        assert_eq!(dirty.count(), 0);
    }

    #[test]
    fn no_bit_is_lost_between_a_back_end_and_a_sync() {
        let log = log(PAGE);
        let mut tracker = VhostLog::new(Arc::clone(&log), vec![at(0, 0, 128)]).unwrap();
        let (mut seen, page) = (0, gpa(77, 1));
        std::thread::scope(|scope| {
            let marks = scope.spawn(|| {
                let begun = std::time::Instant::now();
                // Set again only when it was taken, so that it must be seen as often as it was
                // set.
                for _ in 0..2000 {
                    VhostLog::mark(&log, page).unwrap();
                    while is_marked(&log, 77) {
                        assert!(begun.elapsed() < PATIENCE, "nothing is synced any more");
                        std::thread::yield_now();
                    }
                }
            });
            while !marks.is_finished() {
                let mut dirty = PageBitmap::new(128);
                tracker.sync(&mut dirty).unwrap();
                seen += dirty.count();
            }
        });
        assert_eq!(seen, 2000);
    }

    #[test]
    fn what_is_marked_after_a_sync_is_in_the_next() {
        let log = log(PAGE);
        let mut tracker = VhostLog::new(Arc::clone(&log), vec![at(0, 0, 200)]).unwrap();
        let mut synced = || {
            let mut dirty = PageBitmap::new(200);
            tracker.sync(&mut dirty).unwrap();
            dirty.runs(0..200).flatten().collect::<Vec<_>>()
        };
        // Two bytes of two pages, in two words; then more words than that.
        VhostLog::mark(&log, GpaRange::new(64 * PAGE - 1, 2).unwrap()).unwrap();
        assert_eq!(synced(), [63, 64]);
        assert!(synced().is_empty());
        VhostLog::mark(&log, gpa(3, 190)).unwrap();
        VhostLog::mark(&log, gpa(64, 1)).unwrap();
        assert!(synced().into_iter().eq(3..193));
    }

    #[test]
    fn marks_of_many_threads_in_one_word_are_all_reported() {
        let log = log(PAGE);
        let mut tracker = VhostLog::new(Arc::clone(&log), vec![at(0, 0, 64)]).unwrap();
        for _ in 0..200 {
            let mut dirty = PageBitmap::new(64);
            std::thread::scope(|scope| {
                for first in 0..4 {
                    let log = &log;
                    scope.spawn(move || {
                        for page in (first..64).step_by(4) {
                            VhostLog::mark(log, gpa(page, 1)).unwrap();
                        }
                    });
                }
                tracker.sync(&mut dirty).unwrap();
            });
            tracker.sync(&mut dirty).unwrap();
            assert_eq!(dirty.count(), 64);
        }
    }

    #[test]
    fn what_is_behind_the_log_cannot_be_marked() {
        let log = log(PAGE);
        let end = PAGE * 8;
        assert!(VhostLog::mark(&log, gpa(end - 1, 1)).is_ok());
        for wrong in [gpa(end - 1, 2), GpaRange::new(u64::MAX - 2, 2).unwrap()] {
            assert!(VhostLog::mark(&log, wrong).is_err());
        }
        let marked = log.take_bits(PAGE - 8, u64::MAX);
        assert_eq!(marked, 1 << 63);
    }

    /// Guest-physical pages.
    fn gpa(page: u64, nr: u64) -> GpaRange {
        GpaRange::new(page * PAGE, nr * PAGE).unwrap()
    }

    fn is_marked(log: &HostMapping, guest_page: u64) -> bool {
        let mut byte = [0];
        log.read(guest_page / 8, &mut byte);
        byte[0] & 1 << (guest_page % 8) != 0
    }

    proptest! {
        #[test]
        fn pages_are_translated(
            guest in 0u64..300,
            block in 0u64..300,
            pages in 1u64..300,
            marked in prop::collection::btree_set(0u64..600, 0..100),
        ) {
            let log = log(PAGE);
            let mut tracker = VhostLog::new(Arc::clone(&log), vec![at(guest, block, pages)]).unwrap();
            for &guest_page in &marked {
                mark(&log, guest_page);
            }
            let mut dirty = PageBitmap::new(600);
            tracker.sync(&mut dirty).unwrap();
            let expected = marked
                .iter()
                .filter(|&&page| (guest..guest + pages).contains(&page))
                .map(|page| page - guest + block);
            prop_assert!(dirty.runs(0..600).flatten().eq(expected));
        }
    }
}
