use super::*;
use rustix::fs::MemfdFlags;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};

const BLOCK: u64 = 1 << 20;
const ADDR: u64 = 1 << 30;

fn memfd(size: u64) -> File {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = File::from(rustix::fs::memfd_create("region-test", flags).unwrap());
    file.set_len(size).unwrap();
    file
}

fn block(gpa: u64, size: u64, file: &File, fd_offset: u64) -> Arc<RamBlock> {
    let id = format!("mem@{gpa:#x}");
    let file = file.try_clone().unwrap();
    Arc::new(RamBlock::new(id, gpa, size, file, fd_offset).unwrap())
}

fn section(from: u64, to: u64) -> Section {
    Section::from_bounds(from * BLOCK, to * BLOCK).unwrap()
}

fn region() -> Arc<RegionMemory> {
    RegionMemory::new(Geometry::new(ADDR, 16 * BLOCK, BLOCK, None).unwrap())
}

fn resident(file: &File) -> u64 {
    file.metadata().unwrap().blocks() * 512
}

#[test]
fn a_section_over_several_blocks_is_discarded_at_the_right_offsets() {
    let (low, high) = (memfd(32 * BLOCK), memfd(32 * BLOCK));
    for file in [&low, &high] {
        file.write_all_at(&vec![1; 32 << 20], 0).unwrap();
    }
    let memory = region();
    // The first block also covers RAM before the region.
    memory.replace(vec![
        block(ADDR + 8 * BLOCK, 8 * BLOCK, &high, 3 * BLOCK + 4096),
        block(ADDR - 4 * BLOCK, 12 * BLOCK, &low, 5 * BLOCK),
    ]);
    assert!(memory.is_complete());
    memory.ready(section(6, 10)).unwrap();
    MemoryListener(memory).notify_discard(section(6, 10));
    assert_eq!((resident(&low), resident(&high)), (30 * BLOCK, 30 * BLOCK));
    let byte = |file: &File, at: u64| {
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        byte[0]
    };
    // Section 6 lies 4 + 6 blocks into the first RAM block, section 8 at the second's start.
    assert_eq!(byte(&low, 15 * BLOCK - 1), 1);
    assert_eq!(byte(&low, 15 * BLOCK), 0);
    assert_eq!(byte(&low, 17 * BLOCK), 1);
    assert_eq!(byte(&high, 3 * BLOCK + 4095), 1);
    assert_eq!(byte(&high, 3 * BLOCK + 4096), 0);
    assert_eq!(byte(&high, 5 * BLOCK + 4096), 1);
}

#[test]
fn gaps_are_named() {
    let memory = region();
    assert!(matches!(memory.ready(section(0, 1)), Err(NotReady::NotMapped(_))));
    let file = memfd(16 * BLOCK);
    memory.replace(vec![block(ADDR + 4 * BLOCK, 4 * BLOCK, &file, 0)]);
    memory.ready(section(4, 8)).unwrap();
    let Err(NotReady::NotMapped(gap)) = memory.ready(section(6, 10)) else { panic!() };
    assert_eq!(gap, GpaRange::new(ADDR + 8 * BLOCK, 2 * BLOCK).unwrap());
    let Err(NotReady::NotMapped(gap)) = memory.ready(section(2, 6)) else { panic!() };
    assert_eq!(gap, GpaRange::new(ADDR + 2 * BLOCK, 2 * BLOCK).unwrap());
    assert!(!memory.is_complete());
}

#[test]
fn memory_sealed_after_it_was_mapped_is_not_ready() {
    let memory = region();
    let file = memfd(16 * BLOCK);
    memory.replace(vec![block(ADDR, 16 * BLOCK, &file, 0)]);
    memory.ready(section(0, 16)).unwrap();
    rustix::fs::fcntl_add_seals(&file, rustix::fs::SealFlags::FUTURE_WRITE).unwrap();
    assert!(matches!(memory.ready(section(0, 1)), Err(NotReady::Backing { .. })));
}

#[test]
fn what_could_not_be_discarded_is_tried_again_until_it_can_or_is_plugged() {
    let memory = region();
    let sealed = memfd(16 * BLOCK);
    memory.replace(vec![block(ADDR, 16 * BLOCK, &sealed, 0)]);
    rustix::fs::fcntl_add_seals(&sealed, rustix::fs::SealFlags::FUTURE_WRITE).unwrap();
    let mut listener = MemoryListener(Arc::clone(&memory));
    listener.notify_discard(section(0, 4));
    assert_eq!(memory.discard_failures(), 1);
    listener.notify_populate(section(1, 2)).unwrap();
    let file = memfd(16 * BLOCK);
    file.write_all_at(&vec![1; 16 << 20], 0).unwrap();
    memory.replace(vec![block(ADDR, 16 * BLOCK, &file, 0)]);
    assert_eq!(resident(&file), 13 * BLOCK);
    assert_eq!(memory.resident(section(0, 4)), Some(BLOCK));
}

#[test]
fn finding_resident_units_takes_a_search_each_however_full_they_are() {
    use ram_discard::memory::{SEARCHES, Searches};
    let memory = region();
    let file = memfd(16 * BLOCK);
    memory.replace(vec![block(ADDR, 16 * BLOCK, &file, 0)]);
    file.write_all_at(&vec![1; 8 << 20], BLOCK).unwrap();
    file.write_all_at(&[1], 12 * BLOCK).unwrap();
    for (unit, expected, data) in [
        // The last one finds nothing.
        (BLOCK, vec![section(1, 9), section(12, 13)], 10),
        (4 * BLOCK, vec![section(0, 16)], 4),
        (64 * BLOCK, vec![section(0, 16)], 1),
    ] {
        SEARCHES.take();
        let found = memory.resident_units(section(0, 16), unit, &[]);
        assert_eq!(found, Some(expected));
        assert_eq!(SEARCHES.take(), Searches { data, holes: 0 }, "{unit:#x}");
    }
}

#[test]
fn what_a_part_of_a_file_holds_is_counted_once_however_often_it_is_asked_for() {
    const BIG: u64 = 128 << 20;
    let mut memory = RegionMemory::new(Geometry::new(ADDR, BIG, BLOCK, None).unwrap());
    // However slow the machine is.
    Arc::get_mut(&mut memory).unwrap().resident = Recent::new(Duration::from_secs(3600));
    let file = memfd(2 * BIG);
    memory.replace(vec![block(ADDR, BIG, &file, 0)]);
    let whole = Section::new(0, BIG).unwrap();
    file.write_all_at(&vec![1; 65 << 20], 0).unwrap();
    assert_eq!(memory.resident(whole), Some(65 << 20));
    file.write_all_at(&[1], 66 << 20).unwrap();
    assert_eq!(memory.resident(whole), Some(65 << 20), "as it was a moment ago");
    // Other memory is another count.
    memory.replace(vec![block(ADDR, BIG, &file, BIG)]);
    assert_eq!(memory.resident(whole), Some(0));
    file.write_all_at(&[1], BIG).unwrap();
    assert_eq!(memory.resident(whole), Some(4096), "little is counted each time");
}

#[test]
fn pages_larger_than_blocks_are_refused() {
    let file = memfd(16 * BLOCK);
    let block = block(ADDR, 16 * BLOCK, &file, 0);
    assert!(block.check_block_size(ADDR, 4096).is_ok());
    assert!(block.check_block_size(ADDR, 512).is_err());
    assert!(block.check_block_size(ADDR + 512, 4096).is_err());
}
