use std::io;
use std::os::unix::fs::FileExt;

use ram_discard::memory::{RamBlock, SEARCHES};
use rustix::fs::MemfdFlags;
use vmstate::wire::WireReader;

use super::*;
use crate::dirty::NeverWritten;
use crate::handler::SaveHandler;
use crate::huge_page_pool::Pool;
use crate::ram::{BlockOptions, RamSave};
use crate::sys::testing::Pinned;
use crate::test_support::{fill, memfd, migration_block};
use crate::test_utils::KeptStream;

const HUGE_PAGE: u64 = 2 << 20;

fn blocks_of(block: MigrationBlock) -> Arc<RamBlocks> {
    let mut blocks = RamBlocks::new();
    blocks.register(Arc::new(block)).unwrap();
    Arc::new(blocks)
}

/// The sections of a stopped guest with one block, of which `pages` hold content.
fn sections(size: u64, pages: &[u64]) -> [Vec<u8>; 2] {
    let file = memfd(size);
    pages.iter().for_each(|&page| fill(&file, page..page + 1, page as u8 + 1));
    let blocks = blocks_of(migration_block("vmem0", &file, size, BlockOptions::migratable()));
    let progress = Arc::new(Progress::new());
    let tracker =
        |_: &MigrationBlock| -> Box<dyn crate::dirty::DirtyTracker> { Box::new(NeverWritten) };
    let mut ram = RamSave::new(&blocks, ListOptions::default(), progress, tracker).unwrap();
    let (mut start, mut end) = (KeptStream::new().unwrap(), KeptStream::new().unwrap());
    ram.setup(&mut start).unwrap();
    ram.complete(&mut end).unwrap();
    [start, end].map(|stream| stream.bytes().unwrap())
}

fn handler(blocks: &Arc<RamBlocks>) -> RamLoad {
    RamLoad::new(Arc::clone(blocks), ListOptions::default(), Arc::new(Progress::new()))
}

fn load(ram: &mut RamLoad, kind: SectionKind, section: &[u8]) {
    ram.load(kind, RAM_VERSION, &mut WireReader::new(section)).unwrap();
}

fn keeping() -> BlockOptions {
    BlockOptions { keep_resident: true, ..BlockOptions::migratable() }
}

/// Memory of 8 pages with something in pages 1 to 3.
fn used_before(options: BlockOptions) -> (File, Arc<RamBlocks>) {
    let file = memfd(8 * 4096);
    fill(&file, 1..4, 0xaa);
    let blocks = blocks_of(migration_block("vmem0", &file, 8 * 4096, options));
    (file, blocks)
}

fn first_bytes(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; 8 * 4096];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes.into_iter().step_by(4096).collect()
}

#[test]
fn a_stream_that_ends_ram_without_a_list_of_blocks_is_refused() {
    let (_file, blocks) = used_before(BlockOptions::migratable());
    let error = handler(&blocks).complete().unwrap_err();
    assert!(matches!(error, MigrationError::NoRam), "{error}");
}

#[test]
fn a_pinned_page_of_a_block_that_keeps_its_pages_is_the_guests_page_after_a_load() {
    let [start, end] = sections(8 * 4096, &[2]);
    let (file, blocks) = used_before(keeping());
    let block = blocks.get("vmem0").unwrap();
    // One that comes, and one that is zero.
    let pinned = [Pinned::page(block.mapping(), 2 * 4096), Pinned::page(block.mapping(), 3 * 4096)];
    let mut ram = handler(&blocks);
    ram.load_setup().unwrap();
    load(&mut ram, SectionKind::Start, &start);
    load(&mut ram, SectionKind::End, &end);
    ram.complete().unwrap();
    assert_eq!(first_bytes(&file), [0, 0, 3, 0, 0, 0, 0, 0]);
    assert_eq!(pinned.map(|pinned| pinned.read()[0]), [3, 0], "the pins see the same pages");
}

#[test]
fn a_page_that_became_zero_keeps_its_place_in_a_block_that_keeps_its_pages() {
    let [start, end] = sections(8 * 4096, &[2]);
    let [_, mut zeroed] = sections(8 * 4096, &[]);
    let (file, blocks) = used_before(keeping());
    let mut ram = handler(&blocks);
    ram.load_setup().unwrap();
    load(&mut ram, SectionKind::Start, &start);
    load(&mut ram, SectionKind::Part, &end);
    let pinned = Pinned::page(blocks.get("vmem0").unwrap().mapping(), 2 * 4096);
    let mut record = Vec::new();
    put_zero_page(&mut record, "vmem0", 2 * 4096);
    record.append(&mut zeroed);
    load(&mut ram, SectionKind::End, &record);
    assert_eq!(first_bytes(&file), [0; 8]);
    assert_eq!(pinned.read()[0], 0);
}

/// A record of a page of zeros, as QEMU's.
fn put_zero_page(out: &mut Vec<u8>, block: &str, offset: u64) {
    const ZERO: u64 = 0x02;
    out.extend_from_slice(&(offset | ZERO).to_be_bytes());
    out.push(block.len() as u8);
    out.extend_from_slice(block.as_bytes());
    out.push(0);
}

#[test]
fn memory_is_discarded_before_any_device_can_pin_it_and_not_afterwards() {
    let [start, end] = sections(8 * 4096, &[2]);
    let (file, blocks) = used_before(BlockOptions::migratable());
    let mut ram = handler(&blocks);
    ram.load_setup().unwrap();
    assert_eq!(first_bytes(&file), [0; 8]);
    // As the listener of a device that loads its state early.
    fill(&file, 2..3, 0);
    let pinned = Pinned::page(blocks.get("vmem0").unwrap().mapping(), 2 * 4096);
    load(&mut ram, SectionKind::Start, &start);
    load(&mut ram, SectionKind::End, &end);
    assert_eq!((first_bytes(&file)[2], pinned.read()[0]), (3, 3));
}

#[test]
fn a_block_that_keeps_its_pages_is_refused_where_pages_must_be_missing() {
    let (file, blocks) = used_before(keeping());
    let block = blocks.get("vmem0").unwrap();
    let refused = block.discard(ByteRange::new(4096, 4096).unwrap()).unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::Unsupported);
    // Before anything comes, and before anything is written over.
    let options = ListOptions { postcopy: true, ..ListOptions::default() };
    let mut ram = RamLoad::new(Arc::clone(&blocks), options, Arc::new(Progress::new()));
    let error = ram.load_setup().unwrap_err().to_string();
    assert!(error.contains("cannot be the destination of postcopy"), "{error}");
    assert_eq!(first_bytes(&file)[1..4], [0xaa; 3]);
}

#[test]
fn pages_that_became_zero_are_discarded_without_a_search() {
    const PAGES: u64 = 4096;
    let all: Vec<u64> = (0..PAGES).filter(|page| page % 256 != 255).collect();
    let [start, end] = sections(PAGES * 4096, &all);
    let file = memfd(PAGES * 4096);
    let options = BlockOptions::migratable();
    let blocks = blocks_of(migration_block("vmem0", &file, PAGES * 4096, options));
    let mut ram = handler(&blocks);
    ram.load_setup().unwrap();
    load(&mut ram, SectionKind::Start, &start);
    load(&mut ram, SectionKind::Part, &end);
    let mut zeros = Vec::new();
    (0..PAGES).step_by(8).for_each(|page| put_zero_page(&mut zeros, "vmem0", page * 4096));
    let [_, empty] = sections(PAGES * 4096, &[]);
    zeros.extend_from_slice(&empty);
    SEARCHES.take();
    load(&mut ram, SectionKind::End, &zeros);
    let searches = SEARCHES.take();
    assert_eq!((searches.data, searches.holes), (0, 0));
    let mut bytes = vec![0; (PAGES * 4096) as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    for page in 0..PAGES {
        let content = if page % 8 == 0 || page % 256 == 255 { 0 } else { page as u8 + 1 };
        assert_eq!(bytes[page as usize * 4096], content, "{page}");
    }
}

#[test]
fn huge_pages_that_a_device_took_before_the_list_are_not_taken_again() {
    let pool = match Pool::with_free(HUGE_PAGE, 3) {
        Ok(pool) => pool,
        Err(error) => return eprintln!("skipped: {error}"),
    };
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    let file = File::from(rustix::fs::memfd_create("huge", flags).unwrap());
    file.set_len(2 * HUGE_PAGE).unwrap();
    let ram = RamBlock::new("vmem0".to_owned(), 0, 2 * HUGE_PAGE, file, 0).unwrap();
    let block = MigrationBlock::map(Arc::new(ram), BlockOptions::migratable()).unwrap();
    let blocks = blocks_of(block);
    let block = blocks.get("vmem0").unwrap();
    block.mapping().write(HUGE_PAGE, &[0xaa]);
    assert_eq!(pool.free(), 2);
    let mut ram = handler(&blocks);
    ram.load_setup().unwrap();
    assert_eq!(pool.free(), 3, "what was there before is gone");
    block.reserve(block.used().unwrap()).unwrap();
    // None is left, so whatever is discarded from here on could not be had again.
    pool.make_free(0).unwrap();
    let [start, end] = sections(2 * HUGE_PAGE, &[5]);
    load(&mut ram, SectionKind::Start, &start);
    assert_eq!(pool.free(), 0);
    load(&mut ram, SectionKind::End, &end);
    assert_eq!(pool.free(), 0);
    let mut bytes = [0; 2];
    block.mapping().read(5 * 4096, &mut bytes[..1]);
    block.mapping().read(HUGE_PAGE, &mut bytes[1..]);
    assert_eq!(bytes, [6, 0]);
}
