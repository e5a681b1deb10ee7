use super::*;
use proptest::prelude::*;

#[test]
fn a_bitmap_of_16_tib_is_searched_and_cleared_at_once() {
    let nr = (16 << 40) / TARGET_PAGE_SIZE;
    let mut bitmap = PageBitmap::new(nr);
    assert_eq!(bitmap.next_run(0, nr, u64::MAX), None);
    bitmap.set_range(nr - 70..nr);
    bitmap.set(5);
    assert!(bitmap.runs(0..nr).eq([5..6, nr - 70..nr]));
    assert_eq!(bitmap.clear_range(0..nr), 71);
    assert_eq!(bitmap.count(), 0);
}

#[test]
fn runs_are_no_longer_than_asked() {
    let mut bitmap = PageBitmap::new(300);
    bitmap.set_range(10..290);
    assert_eq!(bitmap.next_run(0, 300, 64), Some(10..74));
    assert_eq!(bitmap.next_run(74, 300, 128), Some(74..202));
    assert_eq!(bitmap.next_run(74, 100, 128), Some(74..100));
    assert_eq!(bitmap.next_run(74, 100, 0), Some(74..75));
    assert_eq!(bitmap.next_run(202, u64::MAX, u64::MAX), Some(202..290));
    assert_eq!(bitmap.next_run(290, u64::MAX, u64::MAX), None);
}

#[test]
fn runs_end_once_and_for_all() {
    let mut bitmap = PageBitmap::new(64 * 130);
    for page in (0..64 * 130).step_by(3) {
        bitmap.set(page);
    }
    for window in [0..0, 5..5, 6..7, 1..64, 60..64 * 65, 0..64 * 64 + 1, 64 * 129..64 * 131] {
        let mut runs = bitmap.runs(window.clone());
        let expected = window.clone().filter(|page| page % 3 == 0 && *page < 64 * 130);
        assert!(runs.by_ref().eq(expected.map(|page| page..page + 1)), "{window:?}");
        assert!((0..200).all(|_| runs.next().is_none()), "{window:?}");
    }
}

#[test]
fn words_with_a_bit_past_the_last_page_are_refused() {
    assert_eq!(PageBitmap::from_words(70, vec![0, 1 << 6]), None);
    assert_eq!(PageBitmap::from_words(70, vec![0]), None);
    assert_eq!(PageBitmap::from_words(70, vec![0; 3]), None);
    assert_eq!(PageBitmap::from_words(70, vec![0, 1 << 5]).unwrap().count(), 1);
    assert_eq!(PageBitmap::from_words(0, vec![]).unwrap().count(), 0);
}

#[test]
#[should_panic(expected = "pages 60..71 of 70")]
fn a_range_past_the_last_page_panics() {
    PageBitmap::new(70).set_range(60..71);
}

#[test]
fn bytes_and_pages() {
    let range = ByteRange::from_bounds(4095, 4097).unwrap();
    assert_eq!(pages_touched(range), 0..2);
    assert_eq!(bytes_of(1..3), ByteRange::new(4096, 8192).unwrap());
}

#[derive(Clone, Debug)]
enum Op {
    SetRange(u64, u64),
    ClearRange(u64, u64),
    Set(u64),
    Clear(u64),
    OrBits(u64, u64, Vec<u64>),
    Invert,
    Or(Vec<u64>),
    AndNot(Vec<u64>),
}

fn op() -> impl Strategy<Value = Op> {
    let page = || 0u64..10_000;
    // Mostly zeroes, so that there are runs of both kinds.
    let word = || prop_oneof![Just(0), Just(0), Just(u64::MAX), any::<u64>()];
    let words = move |max| prop::collection::vec(word(), 0..max);
    prop_oneof![
        4 => (page(), page()).prop_map(|(a, b)| Op::SetRange(a, b)),
        4 => (page(), page()).prop_map(|(a, b)| Op::ClearRange(a, b)),
        1 => page().prop_map(Op::Set),
        1 => page().prop_map(Op::Clear),
        2 => (page(), page(), words(40)).prop_map(|(a, b, bits)| Op::OrBits(a, b, bits)),
        1 => Just(Op::Invert),
        1 => words(157).prop_map(Op::Or),
        1 => words(157).prop_map(Op::AndNot),
    ]
}

/// A bitmap of `nr` pages from words that need not fit.
fn fit(nr: u64, mut words: Vec<u64>) -> PageBitmap {
    words.resize(index(nr.div_ceil(64)), 0);
    *words.last_mut().unwrap() &= last_mask(nr);
    PageBitmap::from_words(nr, words).unwrap()
}

proptest! {
    #[test]
    fn agrees_with_the_naive_model(
        nr in 1u64..10_000,
        ops in prop::collection::vec(op(), 0..24),
        window in (0u64..10_000, 0u64..10_000),
        max_len in 1u64..300,
    ) {
        let mut model = vec![false; nr as usize];
        let mut bitmap = PageBitmap::new(nr);
        let clip = |a: u64, b: u64| a.min(b).min(nr)..a.max(b).min(nr);
        let part = |r: Range<u64>| r.start as usize..r.end as usize;
        for op in ops {
            let before = model.iter().filter(|&&bit| bit).count() as i64;
            let changed = match op {
                Op::SetRange(a, b) => {
                    model[part(clip(a, b))].fill(true);
                    bitmap.set_range(clip(a, b)) as i64
                }
                Op::ClearRange(a, b) => {
                    model[part(clip(a, b))].fill(false);
                    -(bitmap.clear_range(clip(a, b)) as i64)
                }
                Op::Set(page) => {
                    model[(page % nr) as usize] = true;
                    i64::from(bitmap.set(page % nr))
                }
                Op::Clear(page) => {
                    model[(page % nr) as usize] = false;
                    -i64::from(bitmap.clear(page % nr))
                }
                Op::OrBits(a, b, bits) => {
                    let pages = clip(a, b);
                    let pages = pages.start..pages.end.min(pages.start + bits.len() as u64 * 64);
                    for (i, bit) in model[part(pages.clone())].iter_mut().enumerate() {
                        *bit |= bits[i / 64] >> (i % 64) & 1 != 0;
                    }
                    bitmap.or_bits(pages, &bits) as i64
                }
                Op::Invert => {
                    model.iter_mut().for_each(|bit| *bit = !*bit);
                    bitmap.invert();
                    nr as i64 - 2 * before
                }
                Op::Or(words) => {
                    let other = fit(nr, words);
                    for (page, bit) in model.iter_mut().enumerate() {
                        *bit |= other.test(page as u64);
                    }
                    bitmap.or(&other) as i64
                }
                Op::AndNot(words) => {
                    let other = fit(nr, words);
                    for (page, bit) in model.iter_mut().enumerate() {
                        *bit &= !other.test(page as u64);
                    }
                    -(bitmap.and_not(&other) as i64)
                }
            };
            let after = model.iter().filter(|&&bit| bit).count() as i64;
            prop_assert_eq!(changed, after - before);
            prop_assert_eq!(bitmap.count() as i64, after);
        }
        for (page, &bit) in model.iter().enumerate() {
            prop_assert_eq!(bitmap.test(page as u64), bit);
        }
        let window = clip(window.0, window.1);
        let mut runs: Vec<Range<u64>> = Vec::new();
        for page in window.clone().filter(|&page| model[page as usize]) {
            match runs.last_mut() {
                Some(run) if run.end == page => run.end += 1,
                _ => runs.push(page..page + 1),
            }
        }
        prop_assert!(bitmap.runs(window.clone()).eq(runs.iter().cloned()));
        let first = runs.first().map(|run| run.start..run.end.min(run.start + max_len));
        prop_assert_eq!(bitmap.next_run(window.start, window.end, max_len), first);
        let copy = PageBitmap::from_words(nr, bitmap.words().to_vec());
        prop_assert_eq!(copy, Some(bitmap));
    }
}

/// A bitmap of these pages, and the pages one by one.
fn bits(pages: &[bool]) -> PageBitmap {
    let mut bitmap = PageBitmap::new(pages.len() as u64);
    for page in (0..).zip(pages).filter_map(|(page, set)| set.then_some(page)) {
        bitmap.set(page);
    }
    bitmap
}

proptest! {
    #[test]
    fn the_mask_clears_what_is_discarded_and_nothing_else(
        pages in prop::collection::vec((any::<bool>(), any::<bool>()), 1..300),
    ) {
        let (set, discarded): (Vec<_>, Vec<_>) = pages.iter().copied().unzip();
        let found = bits(&set);
        let runs: Vec<_> = bits(&discarded).runs(0..pages.len() as u64).collect();
        let mask = DiscardMask::new(runs.iter().cloned().map(bytes_of));
        prop_assert_eq!(mask.runs(), &runs[..]);
        prop_assert_eq!(mask.nr_pages(), discarded.iter().filter(|page| **page).count() as u64);
        let both = |page: &usize| set[*page] && discarded[*page];
        let strays: Vec<_> = (0..pages.len()).filter(both).collect();
        prop_assert_eq!(mask.first_set(&found), strays.first().map(|page| *page as u64));
        let left: Vec<_> = pages.iter().map(|(set, discarded)| *set && !*discarded).collect();
        let mut masked = found.clone();
        prop_assert_eq!(mask.apply(&mut masked), strays.len() as u64);
        prop_assert_eq!(&masked, &bits(&left));
        let mut told = Vec::new();
        let mut again = found;
        let cleared = mask.try_apply(&mut again, |run| {
            told.push(run);
            Ok::<_, ()>(())
        });
        prop_assert_eq!((cleared, &again), (Ok(strays.len() as u64), &masked));
        let with_strays = |run: &Range<u64>| strays.iter().any(|page| run.contains(&(*page as u64)));
        prop_assert!(told.into_iter().eq(runs.into_iter().filter(with_strays)));
    }

    #[test]
    fn a_mask_that_changes_is_maximal_runs_of_what_is_discarded(
        changes in prop::collection::vec((0u64..60, 0u64..20, any::<bool>()), 0..30),
    ) {
        let (mut mask, mut naive) = (DiscardMask::default(), vec![false; 80]);
        for (start, len, discarded) in changes {
            let pages = start..start + len;
            if discarded { mask.add(pages.clone()) } else { mask.remove(pages.clone()) }
            naive[pages.start as usize..pages.end as usize].fill(discarded);
            let runs: Vec<_> = bits(&naive).runs(0..80).collect();
            prop_assert_eq!(mask.runs(), &runs[..]);
            let rest: Vec<_> = naive.iter().map(|discarded| !discarded).collect();
            let populated: Vec<_> = bits(&rest).runs(pages.clone()).collect();
            prop_assert_eq!(mask.populated(pages), populated);
        }
    }

    #[test]
    fn host_pages_are_whole_and_only_small_gaps_are_closed(
        pages in prop::collection::vec(prop::bool::weighted(0.1), 1..300),
        shift in 0u32..5,
        gap in 1u64..20,
    ) {
        let (per_page, nr) = (1u64 << shift, pages.len() as u64);
        let bitmap = bits(&pages);
        let of_host_page = |page: u64| {
            let first = page / per_page * per_page;
            (first..nr.min(first + per_page)).any(|page| bitmap.test(page))
        };
        let mut wide = bitmap.clone();
        wide.widen_to(per_page);
        prop_assert!((0..nr).all(|page| wide.test(page) == of_host_page(page)));

        let page_size = per_page * TARGET_PAGE_SIZE;
        let ranges = bitmap.host_ranges(page_size, gap * TARGET_PAGE_SIZE);
        let whole = |range: &ByteRange| {
            range.start().is_multiple_of(page_size) && range.end().is_multiple_of(page_size)
        };
        prop_assert!(ranges.iter().all(whole));
        let mut at = 0;
        for range in &ranges {
            let pages = pages_touched(*range);
            // Before it a gap without ones that is not small; at its ends there are ones.
            prop_assert!(at == 0 || pages.start >= at + gap);
            prop_assert!((at..pages.start).all(|page| !bitmap.test(page)));
            prop_assert!(of_host_page(pages.start) && of_host_page(pages.end - 1));
            at = pages.end;
        }
        prop_assert!((at..nr).all(|page| !bitmap.test(page)));
    }
}
