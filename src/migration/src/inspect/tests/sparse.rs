//! Files with holes where nothing was saved, as those of large regions are.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;

use proptest::prelude::*;

use super::sample::{PAGE, section};
use super::*;
use crate::inspect::ram::hole;
use crate::stream::*;
use crate::test_support::memfd;

/// The bitmap of so large a block has 2 MiB.
const REGION: u64 = 64 << 30;
const WORDS: u64 = REGION / PAGE / 64;

/// A mapped-ram file of one block, with these words in its bitmap.
fn file_of(words: &BTreeMap<u64, u64>) -> File {
    let file = memfd(0);
    let mut out = Vec::new();
    let mut configuration = Configuration::new("pc-q35-11.1");
    configuration.capabilities.push(CAPABILITY_MAPPED_RAM.into());
    put_header(&mut out, &configuration);
    section(&mut out, SectionKind::Start, 1, RAM_SECTION, RAM_VERSION);
    let mut entry = BlockEntry {
        id: "ram".into(),
        used_length: REGION,
        page_size: None,
        gpa: None,
        mapped: None,
    };
    let mut list = BlockList { entries: vec![entry.clone()] };
    put_list_start(&mut out, &list);
    let bitmap_offset = out.len() as u64 + entry_len(&entry) + MappedRamHeader::LEN;
    let pages_offset = (bitmap_offset + WORDS * 8).next_multiple_of(MAPPED_RAM_ALIGNMENT);
    entry.mapped = Some(MappedRamHeader { page_size: PAGE, bitmap_offset, pages_offset });
    put_entry(&mut out, &entry);
    list.entries = vec![entry];
    file.write_all_at(&out, 0).unwrap();
    for (index, word) in words {
        file.write_all_at(&word.to_le_bytes(), bitmap_offset + index * 8).unwrap();
    }
    out.clear();
    put_end_of_section(&mut out);
    put_footer(&mut out, 1);
    put_continued(&mut out, SectionKind::End, 1);
    put_end_of_section(&mut out);
    put_footer(&mut out, 1);
    put_eof(&mut out);
    file.write_all_at(&out, pages_offset + REGION).unwrap();
    file
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn what_is_found_between_holes_is_what_is_found_by_reading_all(
        words in proptest::collection::btree_map(
            prop_oneof![0..WORDS, WORDS - 4..WORDS, 0..2u64, 8190..8195u64], 1..=u64::MAX, 0..12,
        ),
    ) {
        let file = file_of(&words);
        let (seen, pages) = inspect_file::<PageMap>(&file);
        prop_assert!(seen.error.is_none(), "{:?}", seen.error);
        let found: BTreeMap<u64, u64> =
            pages[0].words().map(|(index, word)| (index, word.normal)).collect();
        prop_assert_eq!(&found, &words);
        let (all, pages_of_all) = inspect_pages::<PageMap>(&file);
        prop_assert_eq!(pages, pages_of_all);
        prop_assert_eq!(seen.blocks, all.blocks);
    }
}

#[test]
fn a_hole_is_passed_over_up_to_the_data_behind_it_and_no_further() {
    use std::io::Seek;
    const MIB: u64 = 1 << 20;
    let file = memfd(8 * MIB);
    file.write_all_at(&[1], 4 * MIB + 5).unwrap();
    (&file).seek(SeekFrom::Start(77)).unwrap();
    // Whole words, from wherever they start.
    assert_eq!(hole(&file, 3..8 * MIB), Some(4 * MIB - 8));
    assert_eq!(hole(&file, 3..MIB), Some(MIB - 8));
    assert_eq!(hole(&file, 4 * MIB..8 * MIB), None);
    assert_eq!(hole(&file, 5 * MIB..8 * MIB), Some(3 * MIB));
    // Little is read rather than asked for.
    assert_eq!(hole(&file, 0..4096), None);
    assert_eq!((&file).stream_position().unwrap(), 77);
}

#[test]
fn a_bitmap_that_the_file_ends_in_is_an_error_although_it_is_a_hole() {
    let file = file_of(&BTreeMap::from([(0, 1)]));
    // In the middle of the bitmap.
    file.set_len(1 << 20).unwrap();
    let (seen, _) = inspect_file::<PageMap>(&file);
    assert!(matches!(seen.error, Some(InspectError::Format(_))), "{:?}", seen.error);
}
