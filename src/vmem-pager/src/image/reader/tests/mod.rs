mod hostile;

use std::collections::BTreeMap;

use proptest::prelude::*;
use tempfile::TempDir;

use super::sample::{Record, Sample, content};
use super::*;

const PAGE: u64 = TARGET_PAGE_SIZE;

fn open(sample: &Sample) -> (TempDir, Result<GuestImage, PagerError>) {
    open_bytes(|path| sample.write(path))
}

fn open_bytes(write: impl FnOnce(&Path)) -> (TempDir, Result<GuestImage, PagerError>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("guest.img");
    write(&path);
    let image = GuestImage::open(&path);
    (dir, image)
}

fn opened(sample: &Sample) -> GuestImage {
    open(sample).1.unwrap()
}

/// All that an image has, read in runs of at most `max` pages.
fn read_all(image: &GuestImage, max: u64) -> BTreeMap<(usize, u64), Vec<u8>> {
    let mut read = BTreeMap::new();
    let mut reader = PageReader::new(image);
    for (index, block) in image.blocks().iter().enumerate() {
        let mut from = 0;
        while let Some(run) = block.present().next_run(from, block.nr_pages(), max) {
            from = run.end;
            let mut expected = run.clone();
            // The same by runs, in which pages of zeros are left out.
            let mut by_runs = BTreeMap::new();
            let take_run = |first, bytes: &[u8]| {
                for (page, bytes) in (first..).zip(bytes.chunks(PAGE as usize)) {
                    assert!(by_runs.insert(page, bytes.to_vec()).is_none(), "page {page} twice");
                }
            };
            reader.read_runs(block, run.clone(), take_run).unwrap();
            // And each to its place, with room before it.
            let mut apart = vec![0xee; run.clone().count() * (8 + PAGE as usize)];
            reader.read_apart(block, run.clone(), &mut apart).unwrap();
            let mut apart = apart.chunks(8 + PAGE as usize);
            let take = |page, bytes: Option<&[u8]>| {
                assert_eq!(Some(page), expected.next());
                assert_eq!(by_runs.remove(&page).as_deref(), bytes);
                let bytes = bytes.map_or(vec![0; PAGE as usize], <[u8]>::to_vec);
                let (room, content) = apart.next().unwrap().split_at(8);
                assert!(room == [0xee; 8] && content == bytes);
                assert!(read.insert((index, page), bytes).is_none(), "page {page} twice");
            };
            reader.read(block, run, take).unwrap();
            assert_eq!(expected.next(), None);
            assert_eq!(by_runs.len(), 0);
        }
    }
    read
}

#[test]
fn a_file_of_either_layout_has_the_guest_in_it() {
    for mapped in [false, true] {
        let sample = Sample::new(mapped);
        let image = opened(&sample);
        assert_eq!(image.is_mapped(), mapped);
        assert_eq!(image.configuration(), &Configuration::new("pc-q35-11.1"));
        let blocks: Vec<_> = image.blocks().iter().map(|b| (b.id(), b.nr_pages())).collect();
        assert_eq!(blocks, [("vm0/vmem", 256), ("ram", 64)]);
        assert_eq!(image.early(), sample.early());
        assert_eq!(image.device_state(), sample.device_state());
        assert_eq!((image.ram_section(), image.runstate()), (7, Some("running")));
        assert_eq!(image.virtio_mem(), ["vm0"]);
        assert_eq!(image.warnings(), [""; 0]);
        assert_eq!(read_all(&image, 3), sample.contents());
        assert_eq!(image.present_bytes(), 7 * PAGE);
    }
}

#[test]
fn a_guest_that_was_paused_is_known_and_what_is_no_state_is_not() {
    for (runstate, expected, paused) in [
        ("running", Some("running"), false),
        ("paused", Some("paused"), true),
        ("", None, false),
        ("Not\u{1b}[31m", None, false),
    ] {
        let image = opened(&Sample { runstate, ..Sample::new(true) });
        assert_eq!((image.runstate(), image.is_paused()), (expected, paused));
    }
}

#[test]
fn pages_in_discarded_memory_are_left_out_and_told() {
    for mapped in [false, true] {
        let mut sample = Sample::new(mapped);
        // Blocks 0, 1, 2 and 8 are plugged.
        sample.records.push(Record { block: 0, page: 48, seed: Some(1) });
        sample.records.push(Record { block: 0, page: 143, seed: Some(1) });
        sample.records.push(Record { block: 0, page: 144, seed: Some(1) });
        let image = opened(&sample);
        let vmem = &image.blocks()[0];
        let there = [47, 48, 143, 144].map(|page| vmem.present().test(page));
        assert_eq!(there, [true, false, true, false]);
        assert!(image.warnings()[0].contains("2 normal"), "{:?}", image.warnings());
        let mut populated = Vec::new();
        vmem.discards().unwrap().populated(|run| populated.push(run));
        assert_eq!(populated, [0..48, 128..144]);
    }
}

#[test]
fn a_page_that_is_a_hole_of_the_file_or_zeros_is_read_as_zeros() {
    let mut sample = Sample::new(true);
    sample.records = (1..=20).map(|n| Record { block: 1, page: 2 + n, seed: Some(n) }).collect();
    let (dir, image) = open(&sample);
    drop(image);
    let path = dir.path().join("guest.img");
    let bytes = sample.bytes();
    let page = content(1);
    let at = bytes.windows(16).position(|bytes| *bytes == page[..16]).unwrap() as u64;
    let file = File::options().write(true).open(&path).unwrap();
    for hole in [false, true] {
        if hole {
            rustix::fs::fallocate(
                &file,
                rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE,
                at,
                PAGE,
            )
            .unwrap();
        } else {
            std::os::unix::fs::FileExt::write_all_at(&file, &[0; PAGE as usize], at).unwrap();
        }
        let image = GuestImage::open(&path).unwrap();
        // A page by itself, and with others.
        for end in [4, 23] {
            let mut pages = Vec::new();
            let take = |page, bytes: Option<&[u8]>| pages.push((page, bytes.is_some()));
            PageReader::new(&image).read(&image.blocks()[1], 3..end, take).unwrap();
            let expected: Vec<_> = (3..end).map(|page| (page, page != 3)).collect();
            assert_eq!(pages, expected, "hole: {hole}");
            let mut bytes = vec![1; (end as usize - 3) * PAGE as usize];
            PageReader::new(&image).read_apart(&image.blocks()[1], 3..end, &mut bytes).unwrap();
            let (zeros, others) = bytes.split_at(PAGE as usize);
            assert_eq!(zeros, [0; PAGE as usize], "hole: {hole}");
            assert_eq!(others, (2..=end - 3).flat_map(content).collect::<Vec<u8>>());
        }
    }
}

#[test]
fn a_file_that_becomes_shorter_is_an_error_and_not_zeros() {
    for mapped in [false, true] {
        let sample = Sample::new(mapped);
        let (dir, image) = open(&sample);
        let image = image.unwrap();
        let file = File::options().write(true).open(dir.path().join("guest.img")).unwrap();
        file.set_len(200).unwrap();
        let read = PageReader::new(&image).read(&image.blocks()[1], 0..2, |_, _| {});
        let mut bytes = [0; 2 * PAGE as usize];
        let apart = PageReader::new(&image).read_apart(&image.blocks()[1], 0..2, &mut bytes);
        for error in [read, apart].map(|read| read.unwrap_err().to_string()) {
            assert!(
                error.contains("cannot read a page from") && error.contains("guest.img"),
                "{error}"
            );
        }
    }
}

#[test]
fn a_large_region_that_is_mostly_absent_costs_nothing() {
    let mut sample = Sample::new(false);
    // 4 TiB, of which a block is plugged.
    sample.blocks[0].pages = 1 << 30;
    sample.plugged = None;
    sample.records.push(Record { block: 0, page: (1 << 30) - 1, seed: Some(3) });
    let image = opened(&sample);
    assert_eq!(image.blocks()[0].present().count(), 5);
    assert_eq!(read_all(&image, 16).len(), 8);
}

prop_compose! {
    fn any_record()(block in 0usize..2, page in 0u64..64, seed in 0u64..200, repeat in 1u64..12) -> Vec<Record> {
        (0..repeat)
            .map(|n| Record {
                block,
                page: (page + n) % 64,
                seed: (seed > 20).then_some(seed + n),
            })
            .collect()
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Against a table of the last content of each page.
    #[test]
    fn any_order_of_records_is_read_as_it_was_sent(
        mapped: bool,
        records in proptest::collection::vec(any_record(), 0..40),
        section_len in 1usize..9,
        plugged in 0u64..16,
        max in 1u64..40,
    ) {
        let mut sample = Sample::new(mapped);
        sample.records = records.concat();
        sample.section_len = section_len;
        sample.plugged = Some(plugged);
        let image = opened(&sample);
        let mut expected = sample.contents();
        expected.retain(|(block, page), _| *block != 0 || plugged >> (page / 16) & 1 != 0);
        prop_assert_eq!(image.present_bytes(), expected.len() as u64 * PAGE);
        prop_assert_eq!(read_all(&image, max), expected);
    }
}
