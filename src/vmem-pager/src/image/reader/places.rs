//! Where the pages of a block are in the file.

use std::collections::BTreeMap;

use migration::inspect::{PageIndex, PageMap};
use migration::stream::{PageKind, TARGET_PAGE_SIZE};

/// Where the pages of a block are.
#[derive(Debug)]
pub(super) enum Places {
    /// Page `n` is `n` pages past this byte of the file.
    Fixed(u64),
    /// Each is in its last record.
    Recorded(Records),
}

/// Pages that are in the file at equal distances.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Placed {
    /// Where the first is, bytes from the start of the file.
    pub at: u64,
    /// Bytes from one to the next.
    pub stride: u64,
    /// How many.
    pub pages: u64,
}

impl Places {
    /// Where `page` is, and as many of those that follow it as are found in one step, at most `max`.
    /// `None` when it is not in the file.
    pub fn find(&self, page: u64, max: u64) -> Option<Placed> {
        match self {
            Self::Fixed(start) => {
                let at = start + page * TARGET_PAGE_SIZE;
                Some(Placed { at, stride: TARGET_PAGE_SIZE, pages: max })
            }
            Self::Recorded(records) => records.find(page, max),
        }
    }
}

/// The pages of a block while a file is read, and afterwards.
#[derive(Debug, Default)]
pub(super) struct BlockPages {
    pub map: PageMap,
    pub records: Records,
}

impl PageIndex for BlockPages {
    fn map(&self) -> &PageMap {
        &self.map
    }

    fn note(&mut self, page: u64, kind: PageKind, at: u64) {
        self.map.note(page, kind);
        self.records.remove(page);
        if kind == PageKind::Normal {
            self.records.insert(page, at);
        }
    }

    fn note_normal(&mut self, index: u64, normal: u64) {
        self.map.note_normal(index, normal);
    }

    fn entries(&self) -> usize {
        self.map.entries() + self.records.runs.len()
    }
}

/// The last record of each page, as runs: a stream sends most pages one after the other.
#[derive(Debug, Default)]
pub(super) struct Records {
    /// By the first page.
    runs: BTreeMap<u64, Placed>,
}

impl Records {
    fn find(&self, page: u64, max: u64) -> Option<Placed> {
        let (&first, run) = self.runs.range(..=page).next_back()?;
        let skipped = page - first;
        let left = run.pages.checked_sub(skipped).filter(|left| *left != 0)?;
        Some(Placed { at: run.at + skipped * run.stride, pages: left.min(max), ..*run })
    }

    /// Forgets a page.
    fn remove(&mut self, page: u64) {
        let Some((&first, run)) = self.runs.range_mut(..=page).next_back() else { return };
        let skipped = page - first;
        if skipped >= run.pages {
            return;
        }
        let after = Placed {
            at: run.at + (skipped + 1) * run.stride,
            pages: run.pages - skipped - 1,
            ..*run
        };
        run.pages = skipped;
        if skipped == 0 {
            self.runs.remove(&first);
        }
        if after.pages != 0 {
            self.runs.insert(page + 1, after);
        }
    }

    /// Adds a page that is not there.
    fn insert(&mut self, page: u64, at: u64) {
        if let Some((&first, run)) = self.runs.range_mut(..page).next_back()
            && first + run.pages == page
        {
            let last = run.at + (run.pages - 1) * run.stride;
            // Two pages make a distance; records come one after the other.
            let stride = at.checked_sub(last).filter(|stride| *stride >= TARGET_PAGE_SIZE);
            let fits = |stride| run.pages == 1 || stride == run.stride;
            if let Some(stride) =
                stride.filter(|stride| *stride < 2 * TARGET_PAGE_SIZE && fits(*stride))
            {
                *run = Placed { stride, pages: run.pages + 1, ..*run };
                return;
            }
        }
        self.runs.insert(page, Placed { at, stride: TARGET_PAGE_SIZE, pages: 1 });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Against a table of the last record of each page.
        #[test]
        fn the_last_record_of_a_page_is_found(
            records in proptest::collection::vec((0u64..40, any::<bool>(), 0u64..3), 0..200),
        ) {
            let (mut pages, mut model) = (BlockPages::default(), BTreeMap::new());
            let mut at = 1000;
            let mut next = 0;
            for (page, zero, kind) in records {
                // Mostly the page after the one before.
                let page = if kind == 0 { page } else { next % 40 };
                next = page + 1;
                at += if kind == 1 { 8 } else { 12 };
                if zero && kind == 0 {
                    pages.note(page, PageKind::Zero, at);
                    model.remove(&page);
                    at += 1;
                } else {
                    pages.note(page, PageKind::Normal, at);
                    model.insert(page, at);
                    at += TARGET_PAGE_SIZE;
                }
                prop_assert_eq!(pages.map.counts().0, model.len() as u64);
            }
            let places = Places::Recorded(pages.records);
            for page in 0..45 {
                let found = places.find(page, 7);
                prop_assert_eq!(found.map(|found| found.at), model.get(&page).copied());
                let Some(found) = found else { continue };
                prop_assert!((1..=7).contains(&found.pages));
                for nth in 0..found.pages {
                    let at = found.at + nth * found.stride;
                    prop_assert_eq!(Some(&at), model.get(&(page + nth)));
                }
            }
        }
    }

    #[test]
    fn pages_that_follow_each_other_cost_one_entry() {
        let mut pages = BlockPages::default();
        for page in 0..1000 {
            pages.note(page, PageKind::Normal, 50 + page * (TARGET_PAGE_SIZE + 8));
        }
        assert_eq!(pages.records.runs.len(), 1);
        // One that is written again leaves two runs and itself.
        pages.note(500, PageKind::Normal, 1 << 40);
        assert_eq!(pages.records.runs.len(), 3);
    }
}
