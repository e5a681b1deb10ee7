//! One bit a block: plugged or not.

use bitvec::prelude::*;
use std::ops::Range;

const WORD_BITS: usize = u64::BITS as usize;

/// The plugged blocks of a region. The number of plugged blocks is kept, not recounted; bits past
/// the last block are always unset.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockBitmap {
    bits: BitVec<u64, Lsb0>,
    plugged: usize,
}

impl BlockBitmap {
    /// `nr_blocks` unplugged blocks.
    pub fn new(nr_blocks: usize) -> Self {
        // From a zeroed vector, so that the pages of a large bitmap cost nothing until used.
        let mut bits = BitVec::from_vec(vec![0; nr_blocks.div_ceil(WORD_BITS)]);
        bits.truncate(nr_blocks);
        Self { bits, plugged: 0 }
    }

    /// Takes over saved words, block 0 in the lowest bit of word 0. `None` when the number of
    /// words does not fit `nr_blocks` or a bit past the last block is set.
    pub fn from_words(nr_blocks: usize, words: Vec<u64>) -> Option<Self> {
        if words.len() != nr_blocks.div_ceil(WORD_BITS) {
            return None;
        }
        let mut bits = BitVec::from_vec(words);
        if bits[nr_blocks..].any() {
            return None;
        }
        bits.truncate(nr_blocks);
        let plugged = bits.count_ones();
        Some(Self { bits, plugged })
    }

    /// The bits as words, block 0 in the lowest bit of word 0.
    pub fn words(&self) -> &[u64] {
        self.bits.as_raw_slice()
    }

    /// Number of blocks.
    pub fn nr_blocks(&self) -> usize {
        self.bits.len()
    }

    /// Number of plugged blocks.
    pub fn nr_plugged(&self) -> usize {
        self.plugged
    }

    /// Whether all of `blocks` are in the state `plugged`; true of no blocks at all.
    pub fn all(&self, blocks: Range<usize>, plugged: bool) -> bool {
        debug_assert!(blocks.end <= self.nr_blocks());
        self.find(blocks.clone(), !plugged).is_none()
    }

    /// Puts all of `blocks` into the state `plugged`.
    ///
    /// # Panics
    ///
    /// When a block is not in the region.
    pub fn set(&mut self, blocks: Range<usize>, plugged: bool) {
        let slice = &mut self.bits[blocks];
        let before = slice.count_ones();
        slice.fill(plugged);
        let after = if plugged { slice.len() } else { 0 };
        self.plugged = self.plugged - before + after;
    }

    /// Unplugs every block.
    pub fn clear(&mut self) {
        if self.plugged != 0 {
            self.bits.fill(false);
            self.plugged = 0;
        }
    }

    /// The first block of `blocks` that is in the state `plugged`. Reads a word at a time.
    pub fn find(&self, blocks: Range<usize>, plugged: bool) -> Option<usize> {
        let end = blocks.end.min(self.nr_blocks());
        if blocks.start >= end {
            return None;
        }
        let invert = if plugged { 0 } else { u64::MAX };
        let words = self.words();
        let first = blocks.start / WORD_BITS;
        let mut found = (words[first] ^ invert) & (u64::MAX << (blocks.start % WORD_BITS));
        let mut index = first;
        if found == 0 {
            let rest = &words[first + 1..end.div_ceil(WORD_BITS)];
            index = first + 1 + rest.iter().position(|&word| word ^ invert != 0)?;
            found = words[index] ^ invert;
        }
        let block = index * WORD_BITS + found.trailing_zeros() as usize;
        (block < end).then_some(block)
    }

    /// The first maximal run of blocks in the state `plugged` within `blocks`, clipped to it.
    pub fn next_run(&self, blocks: Range<usize>, plugged: bool) -> Option<Range<usize>> {
        self.runs(blocks, plugged).next()
    }

    /// The maximal runs of blocks in the state `plugged` within `blocks`, ascending.
    pub fn runs(&self, blocks: Range<usize>, plugged: bool) -> BlockRuns<'_> {
        let end = blocks.end.min(self.nr_blocks());
        let start = blocks.start.min(end);
        let words = &self.words()[..end.div_ceil(WORD_BITS)];
        let invert = if plugged { 0 } else { u64::MAX };
        let index = start / WORD_BITS;
        let first = words.get(index).map_or(0, |word| word ^ invert);
        BlockRuns { words, invert, index, rest: first & (u64::MAX << (start % WORD_BITS)), end }
    }
}

/// Maximal runs of blocks in one state, ascending. Holds the word it stands in, so that short runs
/// cost a few instructions and long ones an instruction for every 64 blocks.
#[derive(Clone, Debug)]
pub struct BlockRuns<'a> {
    words: &'a [u64],
    /// Makes the wanted state read as ones.
    invert: u64,
    index: usize,
    /// What is left of the word at `index`, wanted state as ones.
    rest: u64,
    /// The last word may have bits past this.
    end: usize,
}

impl Iterator for BlockRuns<'_> {
    type Item = Range<usize>;

    #[inline]
    fn next(&mut self) -> Option<Range<usize>> {
        while self.rest == 0 {
            self.index += 1;
            self.rest = self.words.get(self.index)? ^ self.invert;
        }
        let low = self.rest.trailing_zeros();
        let start = self.index * WORD_BITS + low as usize;
        if start >= self.end {
            self.rest = 0;
            self.index = self.words.len();
            return None;
        }
        // Ones up to the run's start, so that the run ends at the lowest zero.
        let filled = self.rest | ((1 << low) - 1);
        let mut end_in_word = filled.trailing_ones();
        while end_in_word == u64::BITS {
            self.index += 1;
            let Some(word) = self.words.get(self.index) else {
                self.rest = 0;
                return Some(start..self.end);
            };
            self.rest = word ^ self.invert;
            end_in_word = self.rest.trailing_ones();
        }
        self.rest &= u64::MAX << end_in_word;
        Some(start..(self.index * WORD_BITS + end_in_word as usize).min(self.end))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn naive_runs(model: &[bool], blocks: Range<usize>, plugged: bool) -> Vec<Range<usize>> {
        let mut runs: Vec<Range<usize>> = Vec::new();
        for block in blocks.filter(|&block| model[block] == plugged) {
            match runs.last_mut() {
                Some(run) if run.end == block => run.end += 1,
                _ => runs.push(block..block + 1),
            }
        }
        runs
    }

    #[test]
    fn runs_end_at_the_last_block_not_at_the_last_word() {
        let mut bitmap = BlockBitmap::new(70);
        bitmap.set(60..70, true);
        assert!(bitmap.runs(0..70, true).eq(std::iter::once(60..70)));
        assert!(bitmap.runs(0..70, false).eq(std::iter::once(0..60)));
        bitmap.set(0..70, true);
        assert_eq!(bitmap.find(0..70, false), None);
    }

    #[test]
    fn words_with_a_bit_past_the_last_block_are_refused() {
        assert!(BlockBitmap::from_words(70, vec![0, 1 << 6]).is_none());
        assert!(BlockBitmap::from_words(70, vec![0]).is_none());
        assert!(BlockBitmap::from_words(70, vec![0, 0, 0]).is_none());
        let bitmap = BlockBitmap::from_words(70, vec![0, 1 << 5]).unwrap();
        assert_eq!(bitmap.nr_plugged(), 1);
        assert_eq!(bitmap.find(0..70, true), Some(69));
    }

    #[test]
    fn a_region_without_blocks_has_no_runs() {
        let bitmap = BlockBitmap::new(0);
        assert_eq!(bitmap.runs(0..0, false).count(), 0);
        assert!(bitmap.all(0..0, true));
    }

    proptest! {
        #[test]
        fn agrees_with_the_naive_model(
            nr_blocks in 1usize..400,
            changes in prop::collection::vec((0usize..400, 0usize..400, any::<bool>()), 0..24),
            window in (0usize..400, 0usize..400),
        ) {
            let mut model = vec![false; nr_blocks];
            let mut bitmap = BlockBitmap::new(nr_blocks);
            let clip = |(a, b): (usize, usize)| {
                let (a, b) = (a.min(nr_blocks), b.min(nr_blocks));
                a.min(b)..a.max(b)
            };
            for (a, b, plugged) in changes {
                model[clip((a, b))].fill(plugged);
                bitmap.set(clip((a, b)), plugged);
            }
            let window = clip(window);
            prop_assert_eq!(bitmap.nr_plugged(), model.iter().filter(|&&p| p).count());
            for plugged in [true, false] {
                let runs: Vec<_> = bitmap.runs(window.clone(), plugged).collect();
                prop_assert_eq!(runs, naive_runs(&model, window.clone(), plugged));
                let all = model[window.clone()].iter().all(|&p| p == plugged);
                prop_assert_eq!(bitmap.all(window.clone(), plugged), all);
            }
            let copy = BlockBitmap::from_words(nr_blocks, bitmap.words().to_vec());
            prop_assert_eq!(copy, Some(bitmap));
        }
    }
}
