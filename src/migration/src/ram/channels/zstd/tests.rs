//! Streams of packets against what was compressed, and payloads that a source should not send.

use super::*;
use proptest::prelude::*;

const PAGE: usize = TARGET_PAGE_SIZE as usize;

/// Numbers without a pattern.
fn numbers(seed: u64) -> impl Iterator<Item = u32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    std::iter::repeat_with(move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u32
    })
}

/// Bytes without a pattern.
fn noise(len: usize, seed: u64) -> Vec<u8> {
    numbers(seed).map(|number| number as u8).take(len).collect()
}

/// Words that come again, as in a guest's memory.
fn text(pages: usize, seed: usize) -> Vec<u8> {
    let words = numbers(seed as u64).map(|number| format!("word {} of {seed}, ", number % 1013));
    words.flat_map(String::into_bytes).take(pages * PAGE).collect()
}

fn compress(compressor: &mut Compressor, level: u8, pages: &[u8]) -> Option<Vec<u8>> {
    let copy = |to: &mut [u8]| to.copy_from_slice(pages);
    let len = compressor.compress(level, pages.len(), copy).unwrap()?;
    Some(compressor.compressed(len).to_vec())
}

fn decompress(from: &mut Decompressor, payload: &[u8], len: usize) -> Result<Vec<u8>, String> {
    let mut pages = Vec::new();
    from.payload(payload.len()).copy_from_slice(payload);
    from.decompress(&mut pages, len).map(|()| pages)
}

/// What a decompressor of its own says of a payload for so many pages.
fn refused(payload: &[u8], pages: usize) -> String {
    decompress(&mut Decompressor::new().unwrap(), payload, pages * PAGE).unwrap_err()
}

#[test]
fn a_packet_is_a_part_of_its_channels_stream_and_refers_to_those_before_it() {
    let (mut from, mut to) = (Compressor::new().unwrap(), Decompressor::new().unwrap());
    // Without a pattern, but as it was before.
    let pages = [text(1, 1), noise(7 * PAGE, 1)].concat();
    let first = compress(&mut from, 1, &pages).unwrap();
    let again = compress(&mut from, 1, &pages).unwrap();
    assert!(again.len() * 20 < first.len(), "{} after {}", again.len(), first.len());
    assert_eq!(decompress(&mut to, &first, pages.len()).unwrap(), pages);
    assert_eq!(decompress(&mut to, &again, pages.len()).unwrap(), pages);
    // zstd's number is in front of the first alone.
    assert_eq!(first[..4], [0x28, 0xb5, 0x2f, 0xfd]);
    assert!(refused(&again, 8).contains("zstd: "));
}

#[test]
fn pages_that_do_not_shrink_are_not_compressed_and_the_next_begin_a_stream() {
    let (mut from, mut to) = (Compressor::new().unwrap(), Decompressor::new().unwrap());
    let pages = text(4, 1);
    let first = compress(&mut from, 1, &pages).unwrap();
    assert_eq!(decompress(&mut to, &first, pages.len()).unwrap(), pages);
    for len in [PAGE, PACKET_BYTES] {
        assert_eq!(compress(&mut from, 1, &noise(len, 3)), None);
    }
    let next = compress(&mut from, 1, &pages).unwrap();
    assert_eq!(next[..4], [0x28, 0xb5, 0x2f, 0xfd]);
    to.restart();
    assert_eq!(decompress(&mut to, &next, pages.len()).unwrap(), pages);
}

#[test]
fn a_level_that_was_changed_holds_from_the_packet_after_the_next() {
    let pages = text(PACKET_PAGES, 5);
    let sizes = |levels: &[u8]| {
        let (mut from, mut to) = (Compressor::new().unwrap(), Decompressor::new().unwrap());
        let compress_at = |level: &u8| {
            let payload = compress(&mut from, *level, &pages).unwrap();
            assert_eq!(decompress(&mut to, &payload, pages.len()).unwrap(), pages);
            payload
        };
        levels.iter().map(compress_at).collect::<Vec<_>>()
    };
    let (fast, dense) = (sizes(&[1, 1]), sizes(&[19]));
    assert!(dense[0].len() < fast[0].len());
    let changed = sizes(&[1, 19, 19, 1, 1]);
    // The packet that ends a stream is as those before it, but for a bit that says so.
    assert_eq!((&changed[0], changed[1].len()), (&fast[0], fast[1].len()));
    assert_eq!((&changed[2], &changed[4]), (&dense[0], &fast[0]));
}

#[test]
fn payloads_that_are_not_the_pages_of_their_packet_are_refused_by_name() {
    let mut compressor = Compressor::new().unwrap();
    let pages = text(4, 2);
    let good = compress(&mut compressor, 3, &pages).unwrap();
    let with = |more: &[u8]| [&good, more].concat();
    let mut frame = vec![0; 8 * PACKET_BYTES];
    let mut whole = |bytes: &[u8], set: &[CParameter]| {
        let mut context = CCtx::create();
        set.iter().for_each(|&parameter| {
            context.set_parameter(parameter).unwrap();
        });
        let len = context.compress2(&mut frame[..], bytes).unwrap();
        frame[..len].to_vec()
    };
    let zeros = whole(&vec![0; 64 << 20], &[]);
    let far =
        whole(&text(1024, 1), &[CParameter::WindowLog(22), CParameter::ContentSizeFlag(false)]);
    let checked = whole(&pages, &[CParameter::ChecksumFlag(true)]);
    let mut wrong_sum = checked.clone();
    *wrong_sum.last_mut().unwrap() ^= 1;
    let zstd = |what: &str| format!("zstd: {what}");
    for (payload, pages, expected) in [
        (noise(300, 1), 4, zstd("Unknown frame descriptor")),
        (vec![0; 300], 4, zstd("Unknown frame descriptor")),
        // Of another number of pages.
        (good.clone(), 3, "more than its 12288 bytes of pages".to_owned()),
        (good.clone(), 5, "end within a block, after 16384 of 20480 bytes".to_owned()),
        // A bomb, of which a page is made.
        (zeros.clone(), 1, "more than its 4096 bytes of pages".to_owned()),
        (zeros, PACKET_PAGES, "more than its 524288 bytes of pages".to_owned()),
        // Cut: nothing of it, or all but the last byte of it.
        (good[..5].to_vec(), 4, "end within a block, after 0 of 16384 bytes".to_owned()),
        (good[..good.len() - 1].to_vec(), 4, "end within a block, after 0 of".to_owned()),
        (checked[..checked.len() - 1].to_vec(), 4, "end within a block, after 16384".to_owned()),
        // Something behind it: of a block, a block without bytes that is cut, and one with some.
        (with(&[0]), 4, "end within a block, after 16384 of 16384 bytes".to_owned()),
        (with(&[0, 0]), 4, "end within a block, after 16384 of 16384 bytes".to_owned()),
        (with(&[0x08, 0, 0, 1]), 4, "more than its 16384 bytes of pages".to_owned()),
        (with(&[0xff; 9]), 4, zstd("Data corruption detected")),
        (far, PACKET_PAGES, zstd("Frame requires too much memory for decoding")),
        (wrong_sum, 4, zstd("Restored data doesn't match checksum")),
    ] {
        let error = refused(&payload, pages);
        assert!(error.contains(&expected), "{expected}: {error}");
    }
    // Blocks without bytes are of no use, and do no harm.
    let empty = [with(&[0; 3 * 1000]), checked].concat();
    assert_eq!(
        decompress(&mut Decompressor::new().unwrap(), &empty[..good.len() + 3000], pages.len())
            .unwrap(),
        pages
    );
}

#[test]
fn no_packet_allocates() {
    let (mut from, mut to) = (Compressor::new().unwrap(), Decompressor::new().unwrap());
    let mut pages = Vec::with_capacity(PACKET_BYTES + 1);
    let mut held = None;
    for round in 0..20 {
        let bytes = text(PACKET_PAGES, round);
        let payload = compress(&mut from, 1, &bytes).unwrap();
        to.payload(payload.len()).copy_from_slice(&payload);
        to.decompress(&mut pages, bytes.len()).unwrap();
        let holds = (
            from.context.sizeof() + to.context.sizeof(),
            [from.pages.capacity(), from.out.capacity(), to.payload.capacity(), pages.capacity()],
        );
        assert_eq!(*held.get_or_insert(holds), holds, "round {round}");
    }
    let (held, _) = held.unwrap();
    assert!(held < 8 << 20, "{held} bytes a channel");
}

/// Packets of pages that are of some pattern, or of none, at any levels.
fn packets() -> impl Strategy<Value = Vec<(u8, Vec<u8>)>> {
    let pages = (1..=8usize, any::<u64>(), 0..3u8).prop_map(|(pages, seed, kind)| match kind {
        0 => noise(pages * PAGE, seed),
        1 => text(pages, seed as usize % 3),
        _ => [text(pages - 1, seed as usize % 3), noise(PAGE, seed % 3)].concat(),
    });
    prop::collection::vec((1..=6u8, pages), 1..12)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_is_compressed_is_decompressed_whatever_went_plain_between(packets in packets()) {
        let (mut from, mut to) = (Compressor::new().unwrap(), Decompressor::new().unwrap());
        for (level, pages) in packets {
            match compress(&mut from, level, &pages) {
                Some(payload) => {
                    prop_assert!(payload.len() < pages.len());
                    prop_assert!(decompress(&mut to, &payload, pages.len()).unwrap() == pages);
                }
                None => to.restart(),
            }
        }
    }

    #[test]
    fn any_change_is_refused_or_has_as_many_bytes(
        at in any::<prop::sample::Index>(),
        byte in any::<u8>(),
        cut in any::<prop::sample::Index>(),
        cuts in any::<bool>(),
    ) {
        let pages = text(3, 1);
        let mut payload = compress(&mut Compressor::new().unwrap(), 3, &pages).unwrap();
        match cuts {
            true => payload.truncate(cut.index(payload.len())),
            false => *at.get_mut(&mut payload) = byte,
        }
        match decompress(&mut Decompressor::new().unwrap(), &payload, pages.len()) {
            Ok(found) => prop_assert!(!cuts && found.len() == pages.len()),
            Err(wrong) => prop_assert!(!wrong.is_empty()),
        }
    }
}
