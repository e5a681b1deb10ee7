//! Dirty pages by KVM's log: what vCPUs and in-kernel devices write.

use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;

use ram_discard::{ByteRange, try_all};

use super::{DirtyTracker, pages_within};
use crate::page_bitmap::PageBitmap;
use crate::stream::TARGET_PAGE_SIZE;
use crate::sys::kvm::{KvmSlot, enable_manual_protect};

/// How much of the log is cleared at once, words (64 MiB of memory in pages of 4 KiB): each call takes KVM's MMU
/// lock and flushes TLBs.
const CLEAR_WORDS: usize = 256;

/// Tracks a block by the log of the KVM slots that map it.
///
/// Pages stay reported until they are cleared. They are cleared in pieces of 64 MiB, of which only
/// what a sync has reported.
#[derive(Debug)]
pub struct KvmDirtyLog {
    vm: OwnedFd,
    slots: Vec<Slot>,
    /// Reading does not clear.
    manual: bool,
    logging: bool,
}

#[derive(Debug)]
struct Slot {
    slot: KvmSlot,
    /// Where the slot's memory lies in the block, bytes.
    range: ByteRange,
    log: Vec<u64>,
    /// What syncs have reported and was not cleared in KVM since.
    reported: Vec<u64>,
}

impl KvmDirtyLog {
    /// Tracks the block of `block_len` bytes that the `slots` of `vm` map, each with the offset in
    /// the block at which its memory starts.
    ///
    /// # Errors
    ///
    /// `InvalidInput` when a slot leaves the block or does not start at a page.
    pub fn new(vm: OwnedFd, block_len: u64, slots: Vec<(KvmSlot, u64)>) -> io::Result<Self> {
        let slots: Option<Vec<_>> = slots
            .into_iter()
            .map(|(slot, offset)| {
                let range = ByteRange::new(offset, slot.guest_range().len())?;
                let inside = range.end() <= block_len && offset.is_multiple_of(TARGET_PAGE_SIZE);
                let words = vec![0; slot.nr_words()];
                inside.then(|| Slot { slot, range, log: words.clone(), reported: words })
            })
            .collect();
        let slots = slots.ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidInput, "a slot is not in the block")
        })?;
        Ok(Self { vm, slots, manual: false, logging: false })
    }
}

impl DirtyTracker for KvmDirtyLog {
    fn start(&mut self, _: &[ByteRange]) -> io::Result<()> {
        self.stop()?;
        self.manual = enable_manual_protect(&self.vm)?;
        try_all(
            &mut self.vm,
            &self.slots,
            |vm, started| started.slot.set_logging(&*vm, true),
            // What cannot be stopped only costs.
            |vm, started| drop(started.slot.set_logging(&*vm, false)),
        )?;
        self.slots.iter_mut().for_each(|slot| slot.reported.fill(0));
        self.logging = true;
        Ok(())
    }

    fn sync(&mut self, dirty: &mut PageBitmap) -> io::Result<()> {
        if !self.logging {
            return Ok(());
        }
        for Slot { slot, range, log, reported } in &mut self.slots {
            slot.dirty_log(&self.vm, log)?;
            report(*range, slot.page_size(), log, dirty);
            if self.manual {
                reported.iter_mut().zip(log).for_each(|(reported, new)| *reported |= *new);
            }
        }
        Ok(())
    }

    fn clear(&mut self, range: ByteRange) -> io::Result<()> {
        if !self.logging || !self.manual {
            return Ok(());
        }
        for Slot { slot, range: own, reported, .. } in &mut self.slots {
            let part = own.intersection(range).and_then(|part| part.in_part(own.start()));
            let Some(words) = part.map(|part| words_of(part, slot.page_size())) else { continue };
            for piece in words.start / CLEAR_WORDS..words.end.div_ceil(CLEAR_WORDS) {
                let first = piece * CLEAR_WORDS;
                let piece = first..reported.len().min(first + CLEAR_WORDS);
                // The rest of a piece that is asked for has been reported as well, so it may be
                // cleared along; but not for nothing.
                let asked = piece.start.max(words.start)..piece.end.min(words.end);
                if reported[asked].iter().any(|&word| word != 0) {
                    slot.clear_dirty_log(&self.vm, piece.start, &reported[piece.clone()])?;
                    reported[piece].fill(0);
                }
            }
        }
        Ok(())
    }

    fn stop(&mut self) -> io::Result<()> {
        if !std::mem::take(&mut self.logging) {
            return Ok(());
        }
        let mut result = Ok(());
        for slot in &self.slots {
            result = result.and(slot.slot.set_logging(&self.vm, false));
        }
        result
    }
}

/// Adds what the log of a slot tells, whose memory lies at `range` of the block: each bit is a page of
/// `page_size` bytes.
fn report(range: ByteRange, page_size: u64, log: &[u64], dirty: &mut PageBitmap) {
    if page_size == TARGET_PAGE_SIZE {
        dirty.or_bits(pages_within(range, dirty), log);
        return;
    }
    for (word, &bits) in (0u64..).zip(log) {
        for bit in (0..64).filter(|bit| bits >> bit & 1 != 0) {
            let page = ByteRange::new((word * 64 + bit) * page_size, page_size);
            let page = page.and_then(|page| page.of_part(range.start())?.intersection(range));
            if let Some(page) = page {
                dirty.set_range(pages_within(page, dirty));
            }
        }
    }
}

/// The words of a log, of pages of `page_size` bytes, that tell of `part` of its slot.
fn words_of(part: ByteRange, page_size: u64) -> Range<usize> {
    let page = |at: u64| (at / page_size) as usize;
    page(part.start()) / 64..(page(part.end() - 1) + 1).div_ceil(64)
}

impl Drop for KvmDirtyLog {
    fn drop(&mut self) {
        // A log that is not read only costs.
        let _ = self.stop();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, end: u64) -> ByteRange {
        ByteRange::from_bounds(start, end).unwrap()
    }

    #[test]
    fn a_bit_of_the_log_is_a_page_of_the_host() {
        for (page_size, expected) in [
            (4 << 10, [16..18, 79..80]),
            (16 << 10, [16..24, 268..272]),
            (64 << 10, [16..48, 1024..1040]),
        ] {
            let mut dirty = PageBitmap::new(4096);
            // Pages 0, 1 and 63 of a slot that starts at page 16 of the block.
            let slot = range(16 << 12, (16 << 12) + 64 * page_size);
            report(slot, page_size, &[1 << 63 | 3], &mut dirty);
            assert!(dirty.runs(0..4096).eq(expected), "{page_size:#x}");
            assert_eq!(words_of(range(0, 64 * page_size), page_size), 0..1);
            assert_eq!(words_of(range(63 * page_size, 65 * page_size), page_size), 0..2);
            assert_eq!(words_of(range(64 * page_size, 64 * page_size + 4096), page_size), 1..2);
        }
    }
}
