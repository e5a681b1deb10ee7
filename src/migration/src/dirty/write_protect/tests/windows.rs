//! How a block is cut up to be scanned.

use super::*;

#[test]
fn a_sync_is_cut_into_windows_that_cover_it_once() {
    let cut_up: Vec<_> = cut(range(3 * SCAN - 4096, 5 * SCAN + 4096), SCAN).collect();
    let expected = [
        range(3 * SCAN - 4096, 3 * SCAN),
        range(3 * SCAN, 4 * SCAN),
        range(4 * SCAN, 5 * SCAN),
        range(5 * SCAN, 5 * SCAN + 4096),
    ];
    assert_eq!(cut_up, expected);
    if !supported() {
        return;
    }
    let block = Block::shmem(3 * SCAN);
    let mut tracker = block.tracker();
    block.mapping.write(SCAN + 5 * PAGE, &[1]);
    tracker.start(&[range(0, 3 * SCAN)]).unwrap();
    let scanned = windows(&tracker.populated, &tracker.armed, tracker.chunk, tracker.len);
    let scanned: Vec<_> = scanned.map(|(part, _)| part).collect();
    assert_eq!((scanned[0].start(), scanned.last().unwrap().end()), (0, 3 * SCAN));
    assert!(scanned.windows(2).all(|pair| pair[0].end() == pair[1].start()), "{scanned:?}");
    assert!(scanned.iter().all(|part| part.len() <= SCAN), "{scanned:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn segments_cover_the_block_once(
        cuts in prop::collection::btree_set(0u64..64, 0..12),
        armed in prop::collection::vec(any::<bool>(), 16),
        chunk in 1u64..6,
    ) {
        let cuts: Vec<u64> = cuts.into_iter().collect();
        let populated: Vec<_> =
            cuts.chunks_exact(2).map(|pair| range(pair[0], pair[1])).collect();
        let len = 64;
        let mut bits = PageBitmap::new(64u64.div_ceil(chunk));
        for at in 0..bits.nr_pages() {
            if armed[at as usize % 16] {
                bits.set(at);
            }
        }
        let mut at = 0;
        for (segment, written) in segments(&populated, &bits, chunk, len) {
            prop_assert_eq!(segment.start(), at);
            at = segment.end();
            for byte in segment.start()..segment.end() {
                let is_populated = populated.iter().any(|p| p.contains(range(byte, byte + 1)));
                let expected = is_populated && bits.test(byte / chunk);
                prop_assert_eq!(written == Written::Unprotected, expected);
            }
        }
        prop_assert_eq!(at, len);
    }
}
