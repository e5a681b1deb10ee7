//! A byte range that is never empty and never wraps.

use std::fmt;

/// `len` bytes from `start`: never empty, and `start + len` never overflows.
///
/// What `start` counts from is said where the range is used: the start of the device's region
/// (sections), guest-physical address 0, or the start of a file.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ByteRange {
    start: u64,
    len: u64,
}

impl ByteRange {
    /// The range `[start, start + len)`; `None` when it would be empty or wrap.
    #[inline]
    pub fn new(start: u64, len: u64) -> Option<Self> {
        (len != 0 && start.checked_add(len).is_some()).then_some(Self { start, len })
    }

    /// The range `[start, end)`; `None` when it would be empty.
    #[inline]
    pub fn from_bounds(start: u64, end: u64) -> Option<Self> {
        (start < end).then(|| Self { start, len: end - start })
    }

    /// First byte.
    #[inline]
    pub fn start(self) -> u64 {
        self.start
    }

    /// Length in bytes, never 0.
    #[expect(clippy::len_without_is_empty, reason = "a range is never empty")]
    #[inline]
    pub fn len(self) -> u64 {
        self.len
    }

    /// One past the last byte.
    #[inline]
    pub fn end(self) -> u64 {
        self.start + self.len
    }

    /// What both ranges cover.
    #[inline]
    pub fn intersection(self, other: Self) -> Option<Self> {
        Self::from_bounds(self.start.max(other.start), self.end().min(other.end()))
    }

    /// Whether the ranges share a byte.
    #[inline]
    pub fn overlaps(self, other: Self) -> bool {
        self.intersection(other).is_some()
    }

    /// Whether every byte of `other` is in this range.
    #[inline]
    pub fn contains(self, other: Self) -> bool {
        self.start <= other.start && other.end() <= self.end()
    }

    /// The same bytes counted from an origin that lies `by` bytes lower; `None` on overflow.
    #[inline]
    pub fn shifted_up(self, by: u64) -> Option<Self> {
        Self::new(self.start.checked_add(by)?, self.len)
    }

    /// The same bytes counted from an origin that lies `by` bytes higher; `None` when the range
    /// starts below it.
    #[inline]
    pub fn shifted_down(self, by: u64) -> Option<Self> {
        Self::new(self.start.checked_sub(by)?, self.len)
    }

    /// The parts of this range before and after `hole`.
    #[inline]
    pub fn subtract(self, hole: Self) -> [Option<Self>; 2] {
        [
            Self::from_bounds(self.start, self.end().min(hole.start)),
            Self::from_bounds(self.start.max(hole.end()), self.end()),
        ]
    }

    /// Consecutive pieces of at most `size` bytes.
    ///
    /// # Panics
    ///
    /// When `size` is 0.
    #[inline]
    pub fn chunks(self, size: u64) -> impl Iterator<Item = Self> {
        assert_ne!(size, 0, "chunks of no bytes would never end");
        let mut at = self.start;
        std::iter::from_fn(move || {
            let chunk = Self::from_bounds(at, self.end().min(at.saturating_add(size)))?;
            at = chunk.end();
            Some(chunk)
        })
    }
}

impl fmt::Debug for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{:#x}, {:#x})", self.start, self.end())
    }
}

impl fmt::Display for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn empty_and_wrapping_ranges_do_not_exist() {
        assert_eq!(ByteRange::new(1, 0), None);
        assert_eq!(ByteRange::new(u64::MAX, 1), None);
        assert_eq!(ByteRange::new(u64::MAX - 1, 1).unwrap().end(), u64::MAX);
        assert_eq!(ByteRange::from_bounds(5, 5), None);
    }

    #[test]
    fn subtract_leaves_what_lies_outside_the_hole() {
        let range = ByteRange::from_bounds(10, 20).unwrap();
        let hole = |a, b| ByteRange::from_bounds(a, b).unwrap();
        assert_eq!(range.subtract(hole(12, 15)), [Some(hole(10, 12)), Some(hole(15, 20))]);
        assert_eq!(range.subtract(hole(0, 15)), [None, Some(hole(15, 20))]);
        assert_eq!(range.subtract(hole(0, 30)), [None, None]);
        assert_eq!(range.subtract(hole(20, 30)), [Some(range), None]);
        assert_eq!(range.subtract(hole(0, 10)), [None, Some(range)]);
    }

    #[test]
    fn chunks_cover_the_range_once() {
        let range = ByteRange::from_bounds(3, 20).unwrap();
        let chunks: Vec<_> = range.chunks(8).map(|c| (c.start(), c.end())).collect();
        assert_eq!(chunks, [(3, 11), (11, 19), (19, 20)]);
    }
}
