//! Byte ranges that are never empty and never wrap, a type for each place that they count from.
//!
//! ```text
//!   GpaRange   from guest-physical address 0
//!       | section(addr), gpa(addr)              addr: where the device's region starts
//!   Section    from the start of a region
//!       | in_block(start), section(start)       start: where the region starts in its RAM block
//!   ByteRange  from the start of a RAM block
//!       | in_file(base), in_block(base)         base: where the block starts in its file
//!   FileRange  from the start of a file
//! ```

use std::fmt;
use std::hash::Hash;
use std::marker::PhantomData;

/// What a range counts from.
pub trait Origin: Copy + Ord + Hash + fmt::Debug + Send + Sync + 'static {}

macro_rules! origins {
    ($($(#[$doc:meta])* $name:ident)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum $name {}
        impl Origin for $name {}
    )*};
}

origins! {
    /// The start of a RAM block.
    OfBlock
    /// The start of the region of a RamDiscardManager.
    OfRegion
    /// Guest-physical address 0.
    OfGuest
    /// The start of a file.
    OfFile
}

/// Bytes from the start of a RAM block.
pub type ByteRange = Extent<OfBlock>;

/// Bytes from the start of the region of a RamDiscardManager, which is that of a device.
pub type Section = Extent<OfRegion>;

/// Guest-physical addresses.
pub type GpaRange = Extent<OfGuest>;

/// Bytes from the start of a file.
pub type FileRange = Extent<OfFile>;

/// `len` bytes from `start`: never empty, and `start + len` never overflows. `O` is what `start` counts from.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Extent<O> {
    start: u64,
    len: u64,
    origin: PhantomData<O>,
}

impl<O: Origin> Extent<O> {
    /// The range `[start, start + len)`; `None` when it would be empty or wrap.
    #[inline]
    pub fn new(start: u64, len: u64) -> Option<Self> {
        let possible = len != 0 && start.checked_add(len).is_some();
        possible.then_some(Self { start, len, origin: PhantomData })
    }

    /// The range `[start, end)`; `None` when it would be empty.
    #[inline]
    pub fn from_bounds(start: u64, end: u64) -> Option<Self> {
        (start < end).then(|| Self { start, len: end - start, origin: PhantomData })
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

    /// The same bytes, counted from an origin `by` bytes below.
    #[inline]
    fn up<P: Origin>(self, by: u64) -> Option<Extent<P>> {
        Extent::new(self.start.checked_add(by)?, self.len)
    }

    /// The same bytes, counted from an origin `by` bytes above.
    #[inline]
    fn down<P: Origin>(self, by: u64) -> Option<Extent<P>> {
        Extent::new(self.start.checked_sub(by)?, self.len)
    }
}

impl Section {
    /// Its guest-physical addresses, where the region starts at `addr`; `None` past the last address.
    #[inline]
    pub fn gpa(self, addr: u64) -> Option<GpaRange> {
        self.up(addr)
    }

    /// The same bytes of the RAM block in which the region starts at byte `start`; `None` past all
    /// lengths.
    #[inline]
    pub fn in_block(self, start: u64) -> Option<ByteRange> {
        self.up(start)
    }
}

impl GpaRange {
    /// The same bytes of the region that starts at `addr`; `None` when they start before it.
    #[inline]
    pub fn section(self, addr: u64) -> Option<Section> {
        self.down(addr)
    }

    /// The same bytes of the RAM block that starts at `addr`; `None` when they start before it.
    #[inline]
    pub fn in_block(self, addr: u64) -> Option<ByteRange> {
        self.down(addr)
    }
}

impl ByteRange {
    /// The same bytes of the region that starts at byte `start` of the block; `None` when they start
    /// before it.
    #[inline]
    pub fn section(self, start: u64) -> Option<Section> {
        self.down(start)
    }

    /// Their guest-physical addresses, where the block is at `addr`; `None` past the last address.
    #[inline]
    pub fn gpa(self, addr: u64) -> Option<GpaRange> {
        self.up(addr)
    }

    /// The same bytes of the file in which the block starts at byte `base`; `None` past all lengths.
    #[inline]
    pub fn in_file(self, base: u64) -> Option<FileRange> {
        self.up(base)
    }

    /// The same bytes of the block that a part of this one, which starts at byte `start` of it, is seen
    /// as; `None` when they start before it.
    #[inline]
    pub fn in_part(self, start: u64) -> Option<Self> {
        self.down(start)
    }

    /// As bytes of the block, of bytes of a part of it that starts at byte `start`.
    #[inline]
    pub fn of_part(self, start: u64) -> Option<Self> {
        self.up(start)
    }
}

impl FileRange {
    /// The same bytes of the RAM block that starts at byte `base` of the file; `None` when they start
    /// before it.
    #[inline]
    pub fn in_block(self, base: u64) -> Option<ByteRange> {
        self.down(base)
    }
}

impl<O: Origin> fmt::Debug for Extent<O> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{:#x}, {:#x})", self.start, self.end())
    }
}

impl<O: Origin> fmt::Display for Extent<O> {
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
