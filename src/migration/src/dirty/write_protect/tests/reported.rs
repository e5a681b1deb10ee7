//! Which pages are reported.

use super::*;

#[test]
fn a_page_is_reported_for_each_write_after_the_last_sync() {
    if !supported() {
        return;
    }
    let block = Block::shmem(8 << 20);
    block.mapping.write(0, &vec![1; 3 << 20]);
    let mut tracker = block.tracker();
    tracker.start(&[range(0, 8 << 20)]).unwrap();
    assert_eq!(dirty_pages(&mut tracker), []);
    // Into memory that is mapped, into a hole beside it, and into a hole far away.
    block.mapping.write(5 * PAGE + 1, &[2]);
    block.mapping.write(900 * PAGE, &[2]);
    block.mapping.write(7 << 20, &[2]);
    assert_eq!(dirty_pages(&mut tracker), [5..6, 900..901, 1792..1793]);
    assert_eq!(dirty_pages(&mut tracker), []);
    for page in [5, 6, 900, 1792, 1793, 1000] {
        block.mapping.write(page * PAGE, &[3]);
    }
    assert_eq!(dirty_pages(&mut tracker), [5..7, 900..901, 1000..1001, 1792..1794]);
    // Not reported yet, so not to be forgotten with what is cleared.
    block.mapping.write(5 * PAGE, &[0; 3 * 4096]);
    tracker.clear(range(6 * PAGE, 7 * PAGE)).unwrap();
    assert_eq!(dirty_pages(&mut tracker), [5..8]);
    tracker.stop().unwrap();
    block.mapping.write(0, &[4]);
    assert_eq!(dirty_pages(&mut tracker), []);
    tracker.start(&[range(0, 8 << 20)]).unwrap();
    assert_eq!(dirty_pages(&mut tracker), []);
}

#[test]
fn memory_of_somebody_elses_making_is_armed_though_it_is_not_mapped_here() {
    if !supported() {
        return;
    }
    let block = Block::shmem(4 << 20);
    block.file.write_all_at(&[1; 8 * 4096], 16 * PAGE).unwrap();
    let mut tracker = block.tracker();
    tracker.start(&[range(0, 4 << 20)]).unwrap();
    assert_eq!(dirty_pages(&mut tracker), []);
    // A read maps the page; only the write is reported.
    block.mapping.read(2 * PAGE, &mut [0]);
    block.mapping.write(3 * PAGE, &[2]);
    assert_eq!(dirty_pages(&mut tracker), [3..4]);
}

#[test]
fn writes_by_system_calls_are_seen() {
    if !supported() {
        return;
    }
    let block = Block::shmem(4 << 20);
    block.mapping.write(0, &[1; 64 * 4096]);
    let mut tracker = block.tracker();
    tracker.start(&[range(0, 4 << 20)]).unwrap();
    crate::sys::testing::read_from_file(&block.mapping, 9 * PAGE, &block.file, 16 * PAGE);
    assert_eq!(dirty_pages(&mut tracker), [9..10]);
}

#[test]
fn a_write_to_a_discarded_range_is_reported_once() {
    if !supported() {
        return;
    }
    let block = Block::shmem(8 << 20);
    let mut tracker = block.tracker();
    tracker.start(&[range(0, 1 << 20), range(6 << 20, 8 << 20)]).unwrap();
    let stray = (3 << 20) / PAGE;
    block.mapping.write(3 << 20, &[1; 2 * 4096]);
    assert_eq!(dirty_pages(&mut tracker), [stray..stray + 2]);
    assert_eq!(dirty_pages(&mut tracker), []);
    block.mapping.write(3 << 20, &[2]);
    assert_eq!(dirty_pages(&mut tracker), [stray..stray + 1]);
    // Discarded again, and written again.
    block
        .block
        .backing()
        .discard(range(16 * PAGE + (3 << 20), 16 * PAGE + (4 << 20)).in_file(0).unwrap())
        .unwrap();
    assert_eq!(dirty_pages(&mut tracker), []);
    block.mapping.write(3 << 20, &[2]);
    assert_eq!(dirty_pages(&mut tracker), [stray..stray + 1]);
}

#[test]
fn a_block_that_shares_a_chunk_with_a_discarded_one_is_armed_as_a_whole() {
    if !supported() {
        return;
    }
    let block = Block::shmem(2 << 20);
    let mut tracker = block.tracker();
    // Blocks of 64 KiB, every other one populated, all in one chunk.
    let populated: Vec<_> = (0..16).map(|at| range(at << 17, (at << 17) + (1 << 16))).collect();
    tracker.start(&populated).unwrap();
    block.mapping.write(0, &[1]);
    assert_eq!(dirty_pages(&mut tracker), [0..1]);
    for at in 0..16 {
        block.mapping.write(at << 17, &[1]);
    }
    let expected: Vec<_> = (0..16).map(|at| at * 32..at * 32 + 1).collect();
    assert_eq!(dirty_pages(&mut tracker), expected);
    assert_eq!(dirty_pages(&mut tracker), []);
}

#[test]
fn what_lies_behind_a_short_bitmap_is_left_out() {
    if !supported() {
        return;
    }
    let block = Block::shmem(4 << 20);
    let mut tracker = block.tracker();
    tracker.start(&[range(0, 1 << 20)]).unwrap();
    block.mapping.write(PAGE, &[1]);
    block.mapping.write(3 << 20, &[1]);
    let mut dirty = PageBitmap::new(256);
    tracker.sync(&mut dirty).unwrap();
    assert!(dirty.runs(0..256).eq([1..2]));
}

#[test]
fn a_transparent_huge_page_is_reported_by_the_page() {
    let Some(file) = or_skip("tmpfs with huge pages", huge_tmpfs()) else { return };
    if !supported() {
        return;
    }
    let block = Block::of(file, 0, 8 << 20).unwrap();
    block.mapping.write(0, &[1]);
    let mut tracker = block.tracker();
    tracker.start(&[range(0, 8 << 20)]).unwrap();
    assert_eq!(dirty_pages(&mut tracker), []);
    for _ in 0..2 {
        block.mapping.write(7 * PAGE, &[1]);
        assert_eq!(dirty_pages(&mut tracker), [7..8]);
    }
    // A huge page that is new is data as a whole, and told by the page from then on.
    block.mapping.write(4 << 20, &[1]);
    assert!(synced(&mut tracker).test(1024));
    block.mapping.write((4 << 20) + PAGE, &[1]);
    assert_eq!(dirty_pages(&mut tracker), [1025..1026]);
}
