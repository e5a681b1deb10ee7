//! The bitmap of received pages, as it goes over the return path in recovery.

use ram_discard::ByteRange;

use crate::error::MigrationError;
use crate::page_bitmap::{PageBitmap, bytes_of};
use crate::stream::ReturnMessage;
use vmstate::wire::{WireRead, WireWrite};

/// What follows the bits (QEMU's RAMBLOCK_RECV_BITMAP_ENDING).
const END: u64 = 0x0123_4567_89ab_cdef;

/// Appends the answer to RECV_BITMAP: all but `outstanding` pages of a block have been received.
pub fn put(out: &mut Vec<u8>, block: &str, outstanding: &PageBitmap) {
    ReturnMessage::RecvBitmap { block: block.to_owned() }.put(out);
    let words = outstanding.words();
    out.put_be64(words.len() as u64 * 8);
    out.reserve(words.len() * 8);
    let nr_pages = outstanding.nr_pages();
    for (index, word) in words.iter().enumerate() {
        let pages = (nr_pages - index as u64 * 64).min(64);
        let received = !word & (u64::MAX >> (64 - pages));
        out.put(&received.to_le_bytes());
    }
    out.put_be64(END);
}

/// Reads what follows the message RECV_BITMAP for a block of `nr_pages`: the pages that have not been
/// received.
///
/// # Errors
///
/// When it is not a bitmap of a block of this size, or the channel fails.
pub fn read(
    reader: &mut dyn WireRead,
    block: &str,
    nr_pages: u64,
) -> Result<PageBitmap, MigrationError> {
    let at = reader.offset();
    let expected = nr_pages.div_ceil(64) * 8;
    let len = reader.be64("the length of a bitmap")?;
    let wrong = |what: String| MigrationError::Page { at, what };
    if len != expected {
        return Err(wrong(format!(
            "a bitmap of {len} bytes for block {block:?}, which needs {expected}"
        )));
    }
    let bytes = reader.bytes(len, expected, "a bitmap")?;
    if reader.be64("the end of a bitmap")? != END {
        return Err(wrong(format!("the bitmap of block {block:?} does not end as it should")));
    }
    let words = bytes.chunks_exact(8).enumerate().map(|(index, word)| {
        let pages = (nr_pages - index as u64 * 64).min(64);
        let received = u64::from_le_bytes(word.try_into().unwrap_or_default());
        !received & (u64::MAX >> (64 - pages))
    });
    PageBitmap::from_words(nr_pages, words.collect())
        .ok_or_else(|| wrong(format!("the bitmap of block {block:?} is too long")))
}

/// What was outstanding when it was `told` and is not `now`: ranges in which nothing is outstanding, ascending. No more
/// of them than there are gaps between outstanding pages.
///
/// # Panics
///
/// When the two are not of the same block.
pub(super) fn no_longer_outstanding(mut told: PageBitmap, now: &PageBitmap) -> Vec<ByteRange> {
    told.and_not(now);
    let (mut ranges, mut page, end) = (Vec::new(), 0, told.nr_pages());
    while let Some(start) = told.next_set(page, end) {
        page = now.next_set(start, end).unwrap_or(end);
        let last = told.runs(start..page).last().map_or(page, |run| run.end);
        ranges.push(bytes_of(start..last));
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmstate::wire::WireReader;

    #[test]
    fn golden_bitmap() {
        let mut outstanding = PageBitmap::new(70);
        outstanding.set_range(1..69);
        let mut bytes = Vec::new();
        put(&mut bytes, "ram", &outstanding);
        let mut golden = b"\0\x05\0\x04\x03ram".to_vec();
        golden.extend(b"\0\0\0\0\0\0\0\x10");
        golden.extend([1, 0, 0, 0, 0, 0, 0, 0, 0x20, 0, 0, 0, 0, 0, 0, 0]);
        golden.extend([0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef]);
        assert_eq!(bytes, golden);
        let mut reader = WireReader::new(&bytes[..]);
        let message = ReturnMessage::read(&mut reader).unwrap();
        assert_eq!(message, ReturnMessage::RecvBitmap { block: "ram".to_owned() });
        assert_eq!(read(&mut reader, "ram", 70).unwrap(), outstanding);
        // 64 pages would do with the first word.
        let mut reader = WireReader::new(&bytes[8..]);
        assert!(read(&mut reader, "ram", 64).is_err());
        let mut cut = WireReader::new(&bytes[8..bytes.len() - 1]);
        assert!(read(&mut cut, "ram", 70).is_err());
    }

    #[test]
    fn what_is_no_longer_outstanding_is_told_in_as_few_ranges_as_there_are_gaps() {
        let pages = |runs: &[std::ops::Range<u64>]| {
            let mut bitmap = PageBitmap::new(200);
            for run in runs {
                bitmap.set_range(run.clone());
            }
            bitmap
        };
        let told = pages(&[3..5, 8..10, 64..130, 190..200]);
        let now = |runs: &[std::ops::Range<u64>]| {
            let ranges = no_longer_outstanding(told.clone(), &pages(runs));
            ranges.into_iter().map(crate::page_bitmap::pages_touched).collect::<Vec<_>>()
        };
        assert_eq!(now(&[3..5, 8..10, 64..130, 190..200]), []);
        assert_eq!(now(&[]), std::slice::from_ref(&(3..200)));
        assert_eq!(now(&[4..5, 64..66, 195..197]), [3..4, 8..10, 66..195, 197..200]);
    }
}
