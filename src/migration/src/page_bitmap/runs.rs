//! Runs of ones.

use std::ops::Range;

use super::{PageBitmap, WORD_BITS, index};

/// Maximal runs of ones, ascending.
///
/// Keeps the places in one word at which zeroes and ones meet, so that a run costs taking two of
/// them however short it is, and a look at each word it fills.
#[derive(Clone, Debug)]
pub struct Runs<'a> {
    bitmap: &'a PageBitmap,
    /// Words up to the last page that is looked at.
    nr_words: usize,
    /// The word that is looked at, and its first page.
    word: usize,
    page: u64,
    /// In turn, the first page of a run and the first page behind it. When it has no page behind
    /// the last of them, the run goes on in the next word.
    edges: u64,
    /// The first page that is not looked at.
    end: u64,
}

impl<'a> Runs<'a> {
    #[inline]
    pub(super) fn new(bitmap: &'a PageBitmap, pages: Range<u64>) -> Self {
        let end = pages.end.min(bitmap.nr_pages);
        let nr_words = if pages.start < end { index(end.div_ceil(WORD_BITS)) } else { 0 };
        let mut runs = Self { bitmap, nr_words, word: 0, page: 0, edges: 0, end };
        runs.go_to(index(pages.start.min(end) / WORD_BITS));
        let first = runs.bits().unwrap_or(0) & (u64::MAX << (pages.start % WORD_BITS));
        runs.edges = first ^ (first << 1);
        runs
    }

    #[inline]
    fn go_to(&mut self, word: usize) {
        self.word = word;
        self.page = word as u64 * WORD_BITS;
    }

    /// The bits of the word, also those past the end; `None` past the last word.
    #[inline]
    fn bits(&self) -> Option<u64> {
        self.bitmap.words[..self.nr_words].get(self.word).copied()
    }

    /// Goes to the next word that may have ones.
    #[inline]
    fn go_on(&mut self) -> Option<u64> {
        self.go_to(self.word + 1);
        // Where memory is in use it is mostly the very next one. It is only read where its page
        // has been anyway: memory that was never set is not touched.
        if !self.word.is_multiple_of(64) {
            let next = self.bits()?;
            if next != 0 {
                return Some(next);
            }
        }
        self.go_to(self.bitmap.next_busy(self.word)?);
        self.bits()
    }

    /// Takes the next edge of the word.
    #[inline]
    fn take_edge(&mut self) -> u64 {
        let bit = self.edges.trailing_zeros();
        self.edges &= self.edges - 1;
        self.page + u64::from(bit)
    }
}

impl Iterator for Runs<'_> {
    type Item = Range<u64>;

    #[inline]
    fn next(&mut self) -> Option<Range<u64>> {
        while self.edges == 0 {
            let bits = self.go_on()?;
            self.edges = bits ^ (bits << 1);
        }
        let start = self.take_edge();
        if start >= self.end {
            // In the last word, and so is all that is left.
            (self.edges, self.nr_words) = (0, 0);
            return None;
        }
        while self.edges == 0 {
            self.go_to(self.word + 1);
            let Some(bits) = self.bits() else { return Some(start..self.end) };
            // The bit before its lowest is one.
            self.edges = bits ^ (bits << 1 | 1);
        }
        Some(start..self.take_edge().min(self.end))
    }
}
