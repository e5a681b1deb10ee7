//! What tracking costs in memory and page tables.

use super::*;

/// Page tables of this process, bytes.
fn page_tables() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmPTE:")).unwrap();
    line.trim().strip_suffix(" kB").unwrap().trim().parse::<u64>().unwrap() * 1024
}

#[test]
fn discarded_and_untouched_memory_costs_nothing() {
    if !supported() {
        return;
    }
    let len = 256 << 30;
    let block = Block::shmem(len);
    block.mapping.write(1 << 30, &[1; 4096]);
    let (before, tables) = (block.resident(), page_tables());
    let mut tracker = block.tracker();
    // 16 GiB of it populated, in pieces, of which one page was ever touched.
    let populated: Vec<_> = (0..256).map(|at| range(at << 30, (at << 30) + (64 << 20))).collect();
    tracker.start(&populated).unwrap();
    assert_eq!(dirty_pages(&mut tracker), []);
    // Of other tests of this process there may be some.
    assert!(page_tables() < tables + (8 << 20), "{tables} {}", page_tables());
    assert_eq!(block.resident(), before);
    block.mapping.write((3 << 30) + 5 * PAGE, &[1]);
    let page = (3 << 30) / PAGE + 5;
    assert_eq!(dirty_pages(&mut tracker), [page..page + 1]);
    assert_eq!(block.resident(), before + PAGE);
}

#[test]
fn what_is_populated_and_not_touched_costs_nothing() {
    if !supported() {
        return;
    }
    let block = Block::shmem(64 << 20);
    let mut tracker = block.tracker();
    tracker.start(&[]).unwrap();
    let before = page_tables();
    tracker.populate(range(0, 32 << 20)).unwrap();
    assert_eq!(dirty_pages(&mut tracker), []);
    assert_eq!((block.resident(), page_tables()), (0, before));
    block.mapping.write(5 * PAGE, &[1]);
    assert_eq!(dirty_pages(&mut tracker), [5..6]);
}
