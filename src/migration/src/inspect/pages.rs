//! Which pages of a block a file has.

use std::collections::BTreeMap;

use crate::stream::PageKind;

/// What is kept of a block's pages while a file is read: which there are, and whatever else its user
/// needs, as where they are.
pub trait PageIndex: Default {
    /// Which pages there are.
    fn map(&self) -> &PageMap;

    /// Notes a page by its number. Its bytes, of a page with content, are at `at` of the file. The
    /// same page may come again: the last record is the one that holds.
    fn note(&mut self, page: u64, kind: PageKind, at: u64);

    /// Notes 64 pages with content at once, from page `64 * index`, of a file in which pages have
    /// fixed places.
    fn note_normal(&mut self, index: u64, normal: u64);

    /// How many entries are held, which is limited.
    fn entries(&self) -> usize;
}

/// Pages of one block, in words of 64. Costs what the file holds, not what it claims.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PageMap {
    words: BTreeMap<u64, Word>,
}

/// 64 pages, the first in the lowest bit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Word {
    /// Pages with content.
    pub normal: u64,
    /// Pages of zeros.
    pub zero: u64,
}

impl PageMap {
    /// Notes a page by its number. The last word on a page is the one that holds.
    pub fn note(&mut self, page: u64, kind: PageKind) {
        let word = self.words.entry(page / 64).or_default();
        let bit = 1 << (page % 64);
        let (set, clear) = match kind {
            PageKind::Normal => (&mut word.normal, &mut word.zero),
            PageKind::Zero => (&mut word.zero, &mut word.normal),
        };
        *set |= bit;
        *clear &= !bit;
    }

    /// Notes 64 pages at once.
    pub fn note_normal(&mut self, index: u64, normal: u64) {
        if normal != 0 {
            self.words.entry(index).or_default().normal |= normal;
        }
    }

    /// The words that are not empty, ascending, with their index.
    pub fn words(&self) -> impl Iterator<Item = (u64, Word)> {
        self.words.iter().map(|(index, word)| (*index, *word))
    }

    /// How many pages have content, and how many are zeros.
    pub fn counts(&self) -> (u64, u64) {
        self.words.values().fold((0, 0), |(normal, zero), word| {
            (normal + u64::from(word.normal.count_ones()), zero + u64::from(word.zero.count_ones()))
        })
    }
}

/// Where the pages are is of no interest.
impl PageIndex for PageMap {
    fn map(&self) -> &PageMap {
        self
    }

    fn note(&mut self, page: u64, kind: PageKind, _at: u64) {
        Self::note(self, page, kind);
    }

    fn note_normal(&mut self, index: u64, normal: u64) {
        Self::note_normal(self, index, normal);
    }

    fn entries(&self) -> usize {
        self.words.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_word_on_a_page_holds() {
        let mut pages = PageMap::default();
        pages.note(3, PageKind::Zero);
        pages.note(64, PageKind::Zero);
        pages.note(3, PageKind::Normal);
        pages.note(u64::MAX >> 12, PageKind::Normal);
        assert_eq!(pages.counts(), (2, 1));
        pages.note(3, PageKind::Zero);
        assert_eq!(pages.counts(), (1, 2));
        assert_eq!(pages.entries(), 3);
    }
}
