//! In which order a guest touches its memory, as far as it can be seen.

use std::ops::Range;

use migration::page_bitmap::PageBitmap;

use crate::working_set::WorkingSet;

/// Tells what the guest touches from what Cloud Hypervisor asks for on its own: all of its memory, ascending, range
/// by range, without what was asked for before.
///
/// What the guest touches just where that sweep is, is taken for the sweep's; and what the sweep has passed is
/// not asked for when the guest touches it.
pub(super) struct Touches {
    mappings: Vec<Asked>,
    /// The mapping that the sweep is in.
    sweep: Option<usize>,
    touched: WorkingSet,
}

struct Asked {
    pages: PageBitmap,
    /// The first page that was not asked for.
    next: u64,
    /// Its RAM block in the image.
    block: usize,
    /// Pages that are in the working set.
    known: PageBitmap,
}

impl Asked {
    fn is_complete(&self) -> bool {
        self.next == self.pages.nr_pages()
    }
}

impl Touches {
    /// Of mappings, each with its RAM block in the image and so many pages; what was touched before is `known`.
    pub fn new(mappings: impl Iterator<Item = (usize, u64)>, known: WorkingSet) -> Self {
        let mappings = mappings.map(|(block, pages)| {
            let mut known_pages = PageBitmap::new(pages);
            for (_, run) in known.runs().filter(|(of, _)| *of == block) {
                known_pages.set_range(run.start.min(pages)..run.end.min(pages));
            }
            Asked { pages: PageBitmap::new(pages), next: 0, block, known: known_pages }
        });
        Self { mappings: mappings.collect(), sweep: None, touched: known }
    }

    /// Pages of a mapping were asked for; whether by the guest.
    pub fn asked(&mut self, mapping: usize, pages: Range<u64>) -> bool {
        let may_enter = self.sweep.is_none_or(|sweep| self.mappings[sweep].is_complete());
        let asked = &mut self.mappings[mapping];
        let is_sweep = pages.start == asked.next && (may_enter || self.sweep == Some(mapping));
        asked.pages.set_range(pages.clone());
        while !asked.is_complete() && asked.pages.test(asked.next) {
            asked.next += 1;
        }
        if is_sweep {
            self.sweep = Some(mapping);
        } else if asked.known.set_range(pages.clone()) != 0 {
            self.touched.push(asked.block, pages);
        }
        !is_sweep
    }

    /// Pages of a mapping that were not asked for.
    pub fn left(&self, mapping: usize) -> u64 {
        let Asked { pages, .. } = &self.mappings[mapping];
        pages.nr_pages() - pages.count()
    }

    /// What the guest has touched, in this order.
    pub fn touched(&self) -> &WorkingSet {
        &self.touched
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Two mappings of eight pages, the RAM blocks 10 and 11.
    fn touches(asked: &[(usize, u64)], known: WorkingSet) -> Touches {
        let mut touches = Touches::new([(10, 8), (11, 8)].into_iter(), known);
        for &(mapping, page) in asked {
            touches.asked(mapping, page..page + 1);
        }
        touches
    }

    fn touched(asked: &[(usize, u64)]) -> Vec<(usize, Range<u64>)> {
        touches(asked, WorkingSet::default()).touched().runs().collect()
    }

    #[test]
    fn what_the_guest_touches_is_told_from_the_sweep() {
        let pages = |mapping| (0..8).map(move |page| (mapping, page));
        let sweep: Vec<_> = pages(1).chain(pages(0)).collect();
        assert_eq!(touched(&sweep), []);
        // Pages that are asked for out of turn, and left out by the sweep then.
        let mut asked =
            vec![(0, 0), (0, 5), (0, 1), (1, 3), (0, 2), (0, 3), (0, 4), (0, 6), (0, 7)];
        assert_eq!(touched(&asked), [(10, 5..6), (11, 3..4)]);
        asked.extend([(1, 0), (1, 1), (1, 2), (1, 4), (1, 5), (1, 6), (1, 7)]);
        assert_eq!(touched(&asked), [(10, 5..6), (11, 3..4)]);
        // The first page of a mapping where the sweep is not.
        assert_eq!(touched(&[(0, 0), (1, 0)]), [(11, 0..1)]);
        // A page that is asked for again was discarded meanwhile; it was touched once.
        assert_eq!(touched(&[(0, 0), (0, 6), (0, 6)]), [(10, 6..7)]);
    }

    #[test]
    fn what_was_known_comes_first_and_not_again() {
        let mut known = WorkingSet::default();
        known.push(11, 2..5);
        // Of another size than what was recorded.
        known.push(10, 7..12);
        let touches = touches(&[(1, 3), (0, 7), (0, 4)], known);
        let runs: Vec<_> = touches.touched().runs().collect();
        assert_eq!(runs, [(11, 2..5), (10, 7..12), (10, 4..5)]);
    }

    proptest! {
        #[test]
        fn every_page_that_is_asked_for_is_counted_once(
            asked in proptest::collection::vec((0..2usize, 0..8u64), 0..40),
        ) {
            let touches = touches(&asked, WorkingSet::default());
            let seen: std::collections::BTreeSet<_> = asked.into_iter().collect();
            prop_assert_eq!(touches.left(0) + touches.left(1), 16 - seen.len() as u64);
            let runs = touches.touched().runs();
            let touched: Vec<_> = runs.flat_map(|(of, run)| run.map(move |page| (of - 10, page))).collect();
            let once: std::collections::BTreeSet<_> = touched.iter().copied().collect();
            prop_assert_eq!(once.len(), touched.len());
            prop_assert!(once.is_subset(&seen));
        }
    }
}
