//! One bit a page of a RAM block: dirty, received, or whatever the user says.

mod host_pages;
mod mask;
mod runs;

use std::ops::Range;

pub(crate) use host_pages::GAP_MIN;
pub(crate) use mask::DiscardMask;
pub use runs::Runs;

use ram_discard::{ByteRange, Extent, Origin};

use crate::stream::TARGET_PAGE_SIZE;

const WORD_BITS: u64 = u64::BITS as u64;

/// One bit for each target page of a RAM block. Page 0 is the lowest bit of word 0; bits past the
/// last page are always zero. The number of ones is kept, not recounted.
///
/// A summary has a bit for each word of the bitmap. Where it is zero the word is zero, so that
/// searching and clearing the bitmap of a large and mostly empty block reads 1/64 of it. Memory that
/// was never set is never touched and costs nothing.
///
/// Ranges of pages that leave the block are a bug of the caller and panic, unless said otherwise.
#[derive(Clone, Debug)]
pub struct PageBitmap {
    words: Vec<u64>,
    /// A one where the word may be non-zero.
    summary: Vec<u64>,
    nr_pages: u64,
    ones: u64,
}

impl PageBitmap {
    /// `nr_pages` zeroes.
    pub fn new(nr_pages: u64) -> Self {
        let nr_words = index(nr_pages.div_ceil(WORD_BITS));
        Self {
            words: vec![0; nr_words],
            summary: vec![0; nr_words.div_ceil(u64::BITS as usize)],
            nr_pages,
            ones: 0,
        }
    }

    /// Takes over words, page 0 in the lowest bit of word 0. `None` when the number of words does
    /// not fit `nr_pages` or a bit past the last page is set.
    pub fn from_words(nr_pages: u64, words: Vec<u64>) -> Option<Self> {
        if words.len() as u64 != nr_pages.div_ceil(WORD_BITS) {
            return None;
        }
        if words.last().is_some_and(|last| last & !last_mask(nr_pages) != 0) {
            return None;
        }
        let mut bitmap = Self { words, summary: Vec::new(), nr_pages, ones: 0 };
        bitmap.summarize();
        Some(bitmap)
    }

    /// The bits as words, page 0 in the lowest bit of word 0.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// Number of pages.
    pub fn nr_pages(&self) -> u64 {
        self.nr_pages
    }

    /// Number of ones.
    pub fn count(&self) -> u64 {
        self.ones
    }

    /// Whether the page's bit is one.
    pub fn test(&self, page: u64) -> bool {
        assert!(page < self.nr_pages, "page {page} of {}", self.nr_pages);
        self.words[index(page / WORD_BITS)] & (1 << (page % WORD_BITS)) != 0
    }

    /// Sets the page's bit; whether it was zero before.
    pub fn set(&mut self, page: u64) -> bool {
        assert!(page < self.nr_pages, "page {page} of {}", self.nr_pages);
        self.or_word(index(page / WORD_BITS), 1 << (page % WORD_BITS)) != 0
    }

    /// Clears the page's bit; whether it was one before.
    pub fn clear(&mut self, page: u64) -> bool {
        assert!(page < self.nr_pages, "page {page} of {}", self.nr_pages);
        self.clear_word(index(page / WORD_BITS), 1 << (page % WORD_BITS)) != 0
    }

    /// Sets the bits of `pages`; how many of them were zero.
    pub fn set_range(&mut self, pages: Range<u64>) -> u64 {
        let Split { parts, body } = self.split(pages);
        let mut set = 0;
        for (word, mask) in parts.into_iter().flatten() {
            set += self.or_word(word, mask);
        }
        let mut before = 0;
        for word in &mut self.words[body.clone()] {
            before += u64::from(word.count_ones());
            *word = u64::MAX;
        }
        let new = body.len() as u64 * WORD_BITS - before;
        let mut at = body.start;
        while at < body.end {
            let end = body.end.min((at / 64 + 1) * 64);
            self.summary[at / 64] |= summary_mask(at..end);
            at = end;
        }
        self.ones += new;
        set + new
    }

    /// Clears the bits of `pages`; how many of them were one. Only reads and writes where there
    /// are ones.
    #[inline]
    pub fn clear_range(&mut self, pages: Range<u64>) -> u64 {
        // Small device blocks are part of a word.
        let last = pages.end.wrapping_sub(1);
        if pages.start <= last && pages.start ^ last < WORD_BITS && last < self.nr_pages {
            return self.clear_part(pages);
        }
        self.clear_words(pages)
    }

    /// As [`clear_range`](Self::clear_range), for pages of which all are in one word.
    #[inline]
    fn clear_part(&mut self, pages: Range<u64>) -> u64 {
        let len = pages.end - pages.start;
        let mask = (u64::MAX >> (WORD_BITS - len)) << (pages.start % WORD_BITS);
        let gone = self.take_bits(index(pages.start / WORD_BITS), mask);
        // Seen at once where whole device blocks are set and cleared.
        let nr = if gone == mask { len } else { count(gone) };
        self.ones -= nr;
        nr
    }

    /// As [`clear_range`](Self::clear_range), for pages of more than one word.
    fn clear_words(&mut self, pages: Range<u64>) -> u64 {
        if pages.is_empty() {
            return 0;
        }
        assert!(pages.end <= self.nr_pages, "pages {pages:?} of {}", self.nr_pages);
        let start = pages.start.next_multiple_of(WORD_BITS);
        let end = pages.end / WORD_BITS * WORD_BITS;
        let mut cleared = 0;
        if pages.start < start {
            cleared += self.clear_part(pages.start..start);
        }
        if end < pages.end {
            cleared += self.clear_part(end..pages.end);
        }
        let body = index(start / WORD_BITS)..index(end / WORD_BITS);
        let mut ones = 0;
        let mut at = body.start;
        while at < body.end {
            let word = at / 64;
            let end = body.end.min((word + 1) * 64);
            let mask = summary_mask(at..end);
            at = end;
            let busy = self.summary[word] & mask;
            if busy == 0 {
                continue;
            }
            self.summary[word] &= !mask;
            // From the first to the last busy word; single idle ones between cost less than
            // they would to skip.
            let first = word * 64 + busy.trailing_zeros() as usize;
            let last = word * 64 + 63 - busy.leading_zeros() as usize;
            ones += take_ones(&mut self.words[first..=last]);
        }
        self.ones -= ones;
        cleared + ones
    }

    /// Clears all bits.
    pub fn clear_all(&mut self) {
        self.clear_range(0..self.nr_pages);
    }

    /// Turns ones into zeroes and zeroes into ones. Touches the whole bitmap.
    pub fn invert(&mut self) {
        for word in &mut self.words {
            *word = !*word;
        }
        if let Some(last) = self.words.last_mut() {
            *last &= last_mask(self.nr_pages);
        }
        self.summarize();
    }

    /// Sets the bits of `pages` that are one in `bits`, whose lowest bit of word 0 stands for
    /// `pages.start`; how many of them were zero. Bits behind the last of `pages` are ignored.
    ///
    /// # Panics
    ///
    /// Also when `bits` has fewer bits than `pages`.
    pub fn or_bits(&mut self, pages: Range<u64>, bits: &[u64]) -> u64 {
        if pages.is_empty() {
            return 0;
        }
        assert!(pages.end <= self.nr_pages, "pages {pages:?} of {}", self.nr_pages);
        let len = pages.end - pages.start;
        let bits = &bits[..index(len.div_ceil(WORD_BITS))];
        let (first, shift) = (index(pages.start / WORD_BITS), pages.start % WORD_BITS);
        let mut set = 0;
        for (i, &value) in bits.iter().enumerate() {
            let value = if i + 1 == bits.len() { value & last_mask(len) } else { value };
            if value == 0 {
                continue;
            }
            set += self.or_word(first + i, value << shift);
            if shift != 0 && value >> (WORD_BITS - shift) != 0 {
                set += self.or_word(first + i + 1, value >> (WORD_BITS - shift));
            }
        }
        set
    }

    /// Sets the bits that are one in `other`; how many of them were zero.
    ///
    /// # Panics
    ///
    /// When the two are not of the same number of pages.
    pub fn or(&mut self, other: &Self) -> u64 {
        assert_eq!(self.nr_pages, other.nr_pages, "bitmaps of different blocks");
        other.busy_words().map(|(word, bits)| self.or_word(word, bits)).sum()
    }

    /// Clears the bits that are one in `other`; how many of them were one.
    ///
    /// # Panics
    ///
    /// When the two are not of the same number of pages.
    pub fn and_not(&mut self, other: &Self) -> u64 {
        assert_eq!(self.nr_pages, other.nr_pages, "bitmaps of different blocks");
        other.busy_words().map(|(word, bits)| self.clear_word(word, bits)).sum()
    }

    /// The first page of `from..end` whose bit is one.
    pub fn next_set(&self, from: u64, end: u64) -> Option<u64> {
        let end = end.min(self.nr_pages);
        if from >= end {
            return None;
        }
        let mut word = index(from / WORD_BITS);
        let mut bits = self.words[word] & (u64::MAX << (from % WORD_BITS));
        while bits == 0 {
            word = self.next_busy(word + 1).filter(|&word| word as u64 * WORD_BITS < end)?;
            bits = self.words[word];
        }
        let page = word as u64 * WORD_BITS + u64::from(bits.trailing_zeros());
        (page < end).then_some(page)
    }

    /// The first run of ones in `from..end`, no longer than `max_len` pages.
    pub fn next_run(&self, from: u64, end: u64, max_len: u64) -> Option<Range<u64>> {
        let start = self.next_set(from, end)?;
        let end = end.min(self.nr_pages).min(start.saturating_add(max_len.max(1)));
        let mut word = index(start / WORD_BITS);
        let mut zeroes = !self.words[word] & (u64::MAX << (start % WORD_BITS));
        while zeroes == 0 {
            word += 1;
            if word as u64 * WORD_BITS >= end {
                return Some(start..end);
            }
            zeroes = !self.words[word];
        }
        Some(start..end.min(word as u64 * WORD_BITS + u64::from(zeroes.trailing_zeros())))
    }

    /// The maximal runs of ones within `pages`, ascending, clipped to it.
    #[inline]
    pub fn runs(&self, pages: Range<u64>) -> Runs<'_> {
        Runs::new(self, pages)
    }

    /// The words that may be non-zero, with their index.
    fn busy_words(&self) -> impl Iterator<Item = (usize, u64)> {
        let mut word = 0;
        std::iter::from_fn(move || {
            let at = self.next_busy(word)?;
            word = at + 1;
            Some((at, self.words[at]))
        })
    }

    /// The first word from `word` on that may be non-zero.
    fn next_busy(&self, word: usize) -> Option<usize> {
        let mut at = word / 64;
        let mut busy = self.summary.get(at)? & (u64::MAX << (word % 64));
        while busy == 0 {
            at += 1;
            busy = *self.summary.get(at)?;
        }
        Some(at * 64 + busy.trailing_zeros() as usize)
    }

    /// Sets `bits` of a word; how many were zero.
    fn or_word(&mut self, word: usize, bits: u64) -> u64 {
        let new = u64::from((bits & !self.words[word]).count_ones());
        if new != 0 {
            self.words[word] |= bits;
            self.summary[word / 64] |= 1 << (word % 64);
            self.ones += new;
        }
        new
    }

    /// Clears `bits` of a word; how many were one.
    fn clear_word(&mut self, word: usize, bits: u64) -> u64 {
        let gone = count(self.take_bits(word, bits));
        self.ones -= gone;
        gone
    }

    /// Clears `bits` of a word; those that were one, which the caller takes from the count.
    #[inline]
    fn take_bits(&mut self, word: usize, bits: u64) -> u64 {
        let before = self.words[word];
        let gone = before & bits;
        if gone != 0 {
            self.words[word] = before ^ gone;
            if before == gone {
                self.summary[word / 64] &= !(1 << (word % 64));
            }
        }
        gone
    }

    /// Builds the summary and the count from the words.
    fn summarize(&mut self) {
        self.ones = 0;
        self.summary.clear();
        for words in self.words.chunks(64) {
            let mut busy = 0;
            for (i, word) in words.iter().enumerate() {
                busy |= u64::from(*word != 0) << i;
                self.ones += u64::from(word.count_ones());
            }
            self.summary.push(busy);
        }
    }

    /// `pages` as words.
    #[inline]
    fn split(&self, pages: Range<u64>) -> Split {
        if pages.is_empty() {
            return Split { parts: [None, None], body: 0..0 };
        }
        assert!(pages.end <= self.nr_pages, "pages {pages:?} of {}", self.nr_pages);
        let start = pages.start.next_multiple_of(WORD_BITS);
        let end = pages.end / WORD_BITS * WORD_BITS;
        if start > end {
            return Split { parts: [part_of_word(pages), None], body: 0..0 };
        }
        Split {
            parts: [part_of_word(pages.start..start), part_of_word(end..pages.end)],
            body: index(start / WORD_BITS)..index(end / WORD_BITS),
        }
    }
}

/// Equal when of the same pages with the same bits.
impl PartialEq for PageBitmap {
    fn eq(&self, other: &Self) -> bool {
        // Summaries may differ: they are conservative.
        self.nr_pages == other.nr_pages && self.ones == other.ones && self.words == other.words
    }
}

impl Eq for PageBitmap {}

/// A range of pages: whole words, and the words at its ends of which it covers a part.
struct Split {
    parts: [Option<(usize, u64)>; 2],
    body: Range<usize>,
}

/// The word and its bits for pages that lie in one word; `None` when there are none.
#[inline]
fn part_of_word(pages: Range<u64>) -> Option<(usize, u64)> {
    if pages.is_empty() {
        return None;
    }
    let mask = (u64::MAX << (pages.start % WORD_BITS)) & last_mask(pages.end);
    Some((index(pages.start / WORD_BITS), mask))
}

/// Clears words; how many ones they had. Where whole device blocks are set and cleared, nearly all
/// lines of 8 words are all ones or all zeroes, and seeing that is quicker than counting.
#[inline]
fn take_ones(words: &mut [u64]) -> u64 {
    let (lines, rest) = words.as_chunks_mut::<8>();
    let mut ones = 0;
    for line in lines {
        if line.iter().fold(u64::MAX, |all, word| all & word) == u64::MAX {
            ones += 8 * WORD_BITS;
        } else if line.iter().fold(0, |any, word| any | word) != 0 {
            ones += count_all(line);
        }
        *line = [0; 8];
    }
    if !rest.is_empty() {
        ones += count_all(rest);
        rest.fill(0);
    }
    ones
}

/// How many ones there are, which is not worth much code where it is rarely asked.
#[inline(never)]
fn count(bits: u64) -> u64 {
    u64::from(bits.count_ones())
}

/// As [`count`].
#[inline(never)]
fn count_all(words: &[u64]) -> u64 {
    words.iter().map(|word| u64::from(word.count_ones())).sum()
}

/// The bits of a range of words in the word of the summary that has them all.
#[inline]
fn summary_mask(words: Range<usize>) -> u64 {
    (u64::MAX << (words.start % 64)) & (u64::MAX >> (63 - (words.end - 1) % 64))
}

/// The bits that `nr` bits use of the last of the words they fill; all when they fill it, or none
/// are there.
#[inline]
fn last_mask(nr: u64) -> u64 {
    u64::MAX >> (nr.wrapping_neg() % WORD_BITS)
}

/// An index of a bitmap in memory, which fits.
#[inline]
fn index(n: u64) -> usize {
    usize::try_from(n).expect("a bitmap fits in memory")
}

/// The pages that a range of bytes touches, also in part, counted from where the range counts from.
#[inline]
pub fn pages_touched<O: Origin>(range: Extent<O>) -> Range<u64> {
    range.start() / TARGET_PAGE_SIZE..range.end().div_ceil(TARGET_PAGE_SIZE)
}

/// The bytes of a run of pages.
///
/// # Panics
///
/// When the run is empty or its end in bytes does not fit 64 bits.
pub fn bytes_of(pages: Range<u64>) -> ByteRange {
    let bounds = |page: u64| page.checked_mul(TARGET_PAGE_SIZE);
    let range = bounds(pages.start).zip(bounds(pages.end));
    range.and_then(|(start, end)| ByteRange::from_bounds(start, end)).expect("a run of pages")
}

#[cfg(test)]
mod tests;
