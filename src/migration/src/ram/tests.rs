use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::Duration;

use ram_discard::ByteRange;
use ram_discard::memory::{HostMapping, RamBlock};
use rustix::fs::MemfdFlags;

use super::*;
use crate::dirty::DirtyTracker;
use crate::handler::{PostcopySave, SaveHandler};
use crate::page_bitmap::{PageBitmap, pages_touched};
use crate::progress::Progress;
use crate::stream::{Configuration, PageHeader};
use crate::sys::GatherWrite;
use crate::test_support::{BLOCK, Side, TestManager, fill, memfd, migration_block};
use crate::test_utils::CountedStream;

mod elastic;

const HUGE_PAGE: u64 = 2 << 20;

/// Reports the pages that it is told, as KVM's log does: until they are cleared, and then also forgets that they
/// were written again meanwhile.
#[derive(Clone, Default)]
struct Told(Arc<Mutex<Vec<u64>>>, Arc<Mutex<BTreeSet<u64>>>);

impl DirtyTracker for Told {
    fn start(&mut self, _populated: &[ByteRange]) -> io::Result<()> {
        Ok(())
    }

    fn sync(&mut self, dirty: &mut PageBitmap) -> io::Result<()> {
        let mut reported = self.1.lock().unwrap();
        reported.extend(self.0.lock().unwrap().drain(..));
        for &page in &*reported {
            dirty.set(page);
        }
        Ok(())
    }

    fn clear(&mut self, range: ByteRange) -> io::Result<()> {
        let mut written = self.0.lock().unwrap();
        self.1.lock().unwrap().retain(|&page| {
            let cleared = pages_touched(range).contains(&page);
            written.retain(|&again| again != page || !cleared);
            !cleared
        });
        Ok(())
    }

    fn stop(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A block with huge pages, though what is mapped is other memory, which takes none of the pool.
fn block_of_huge_pages(size: u64) -> io::Result<MigrationBlock> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    let file = File::from(rustix::fs::memfd_create("huge", flags)?);
    file.set_len(size)?;
    let ram = RamBlock::new("vmem0".to_owned(), 0, size, file, 0).map_err(io::Error::other)?;
    let mapping = HostMapping::map(&memfd(size), 0, size)?;
    MigrationBlock::new(Arc::new(ram), Arc::new(mapping), BlockOptions::migratable())
}

#[test]
fn postcopy_starts_with_whole_host_pages_wherever_precopy_ended() {
    let block = match block_of_huge_pages(2 * HUGE_PAGE) {
        Ok(block) => block,
        Err(error) => return eprintln!("skipped: hugetlb: {error}"),
    };
    let mut blocks = RamBlocks::new();
    blocks.register(Arc::new(block)).unwrap();
    let (told, progress) = (Told::default(), Arc::new(Progress::new()));
    let tracker = |_: &MigrationBlock| -> Box<dyn DirtyTracker> { Box::new(told.clone()) };
    let mut ram = RamSave::new(&blocks, ListOptions::default(), progress, tracker).unwrap();
    ram.setup(&mut CountedStream::default()).unwrap();
    ram.iterate(&mut CountedStream::default(), u64::MAX).unwrap();
    // By itself: a tracker may tell smaller pages than the host has.
    told.0.lock().unwrap().push(3);
    assert_eq!(ram.pending_exact().unwrap(), 4096);
    ram.iterate(&mut CountedStream::default(), u64::MAX).unwrap();
    told.0.lock().unwrap().push(3);
    let postcopy = ram.postcopy().unwrap();
    let whole = ByteRange::new(0, HUGE_PAGE).unwrap();
    assert_eq!(postcopy.outstanding().unwrap(), [("vmem0".to_owned(), vec![whole])]);
    let mut gathered = GatherWrite::new();
    assert!(postcopy.next(1, &mut gathered).unwrap());
    let stream = memfd(0);
    gathered.write_at(&stream, 0).unwrap();
    let mut word = [0; 8];
    stream.read_exact_at(&mut word, 0).unwrap();
    match PageHeader::parse(u64::from_be_bytes(word), 0).unwrap() {
        PageHeader::Page { offset, .. } => assert_eq!(offset, 0),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_budget_holds_within_a_huge_page() {
    let block = match block_of_huge_pages(2 * HUGE_PAGE) {
        Ok(block) => block,
        Err(error) => return eprintln!("skipped: hugetlb: {error}"),
    };
    let mut blocks = RamBlocks::new();
    blocks.register(Arc::new(block)).unwrap();
    let progress = Arc::new(Progress::new());
    let tracker = |_: &MigrationBlock| -> Box<dyn DirtyTracker> { Box::<Told>::default() };
    let mut ram = RamSave::new(&blocks, ListOptions::default(), progress, tracker).unwrap();
    let block = blocks.get("vmem0").unwrap();
    for page in 0..2 * HUGE_PAGE / 4096 {
        block.mapping().write(page * 4096, &[1; 4096]);
    }
    ram.setup(&mut CountedStream::default()).unwrap();
    let all = ram.dirty_pages();
    ram.iterate(&mut CountedStream::default(), 64 << 10).unwrap();
    assert_eq!(all - ram.dirty_pages(), 16);
    // For postcopy host pages stay whole, also the one that was begun.
    let mut gathered = GatherWrite::new();
    let postcopy = ram.postcopy().unwrap();
    let whole = ByteRange::new(0, 2 * HUGE_PAGE).unwrap();
    assert_eq!(postcopy.outstanding().unwrap(), [("vmem0".to_owned(), vec![whole])]);
    assert!(postcopy.next(1, &mut gathered).unwrap());
    assert!(gathered.len_bytes() > HUGE_PAGE);
}

fn save_of(blocks: &RamBlocks) -> RamSave {
    let tracker = |_: &MigrationBlock| -> Box<dyn DirtyTracker> { Box::<Told>::default() };
    RamSave::new(blocks, ListOptions::default(), Arc::new(Progress::new()), tracker).unwrap()
}

#[test]
fn blocks_that_do_not_migrate_are_left_out_at_the_source() {
    let mut blocks = RamBlocks::new();
    for (id, participation) in [("rom", Participation::LeftOut), ("ram", Participation::Listed)] {
        let file = memfd(1 << 20);
        fill(&file, 0..4, 1);
        let options = BlockOptions { participation, ..BlockOptions::default() };
        blocks.register(Arc::new(migration_block(id, &file, 1 << 20, options))).unwrap();
    }
    let list = blocks.list(ListOptions::default()).unwrap();
    let ids: Vec<_> = list.entries.iter().map(|entry| &*entry.id).collect();
    assert_eq!(ids, ["ram"]);
    let mut ram = save_of(&blocks);
    ram.setup(&mut CountedStream::default()).unwrap();
    assert_eq!(ram.dirty_pages(), 4);
    let sent: Vec<_> = ram.outstanding().unwrap().into_iter().map(|(id, _)| id).collect();
    assert_eq!(sent, ["ram"]);
}

#[test]
fn a_block_has_one_manager_and_stays_registered_while_it_migrates() {
    let side = Side::new(&[1]);
    let block = side.blocks.get("vmem0").unwrap();
    let other = || TestManager::new(&[1, 2], 16);
    let twice = block.set_discard_manager(0, other()).unwrap_err();
    assert_eq!(twice, BlockError::ManagerTwice { id: "vmem0".to_owned() });
    assert_eq!(block.populated().unwrap(), [ByteRange::new(BLOCK, BLOCK).unwrap()]);

    let mut blocks = RamBlocks::new();
    blocks.register(Arc::clone(block)).unwrap();
    let migrating = BlockError::Migrating { id: "vmem0".to_owned() };
    let mut ram = save_of(&blocks);
    ram.freeze().unwrap();
    assert_eq!(blocks.unregister("vmem0").err(), Some(migrating.clone()));
    assert_eq!(block.unset_discard_manager(), Err(migrating));
    ram.thaw();
    drop(ram);
    block.unset_discard_manager().unwrap();
    block.set_discard_manager(0, other()).unwrap();
    blocks.unregister("vmem0").unwrap();
    assert!(blocks.get("vmem0").is_none());
    let unknown = blocks.unregister("vmem0").err();
    assert_eq!(unknown, Some(BlockError::NotRegistered { id: "vmem0".to_owned() }));
}

#[test]
fn what_a_peer_calls_missing_is_masked_again_in_recovery() {
    let side = Side::new(&[1, 4]);
    fill(&side.region, 0..16 * BLOCK / 4096, 1);
    let mut ram = save_of(&side.blocks);
    ram.setup(&mut CountedStream::default()).unwrap();
    let populated = 2 * BLOCK / 4096;
    assert_eq!(ram.dirty_pages(), populated);
    let mut all = PageBitmap::new(16 * BLOCK / 4096);
    all.set_range(0..all.nr_pages());
    ram.not_received("vmem0", all).unwrap();
    assert_eq!(ram.dirty_pages(), populated);
}

/// Two blocks that both sides share, at the addresses of their own.
fn shared_blocks() -> RamBlocks {
    let mut blocks = RamBlocks::new();
    for id in ["vmem0", "vmem1"] {
        let shared = BlockOptions { shared: true, ..BlockOptions::migratable() };
        let block = migration_block(id, &memfd(BLOCK), BLOCK, shared);
        blocks.register(Arc::new(block)).unwrap();
    }
    blocks
}

const SHARED: ListOptions = ListOptions { ignore_shared: true, postcopy: false };

fn addresses(blocks: &RamBlocks) -> Vec<Option<u64>> {
    blocks.list(SHARED).unwrap().entries.iter().map(|entry| entry.gpa).collect()
}

#[test]
fn addresses_are_of_the_memory_table_as_it_is_now() {
    let blocks = shared_blocks();
    let own = blocks.iter().next().unwrap().ram().range().start();
    assert_eq!(addresses(&blocks), [Some(own); 2]);
    // The VMM's table, which changes by itself: it is asked each time.
    let moved = Arc::new(Mutex::new(0x2_0000_0000));
    let table = Arc::clone(&moved);
    blocks.set_memory_table(move |id| (id == "vmem0").then(|| *table.lock().unwrap()));
    assert_eq!(addresses(&blocks), [Some(0x2_0000_0000), Some(0)]);
    *moved.lock().unwrap() = 0x3_0000_0000;
    assert_eq!(addresses(&blocks), [Some(0x3_0000_0000), Some(0)]);
    // Another table takes the place of the first.
    blocks.set_memory_table(|id| (id == "vmem1").then_some(0x4_0000_0000));
    assert_eq!(addresses(&blocks), [Some(0), Some(0x4_0000_0000)]);
    // Without shared memory, addresses are nothing that a stream tells.
    let list = blocks.list(ListOptions::default()).unwrap();
    assert!(list.entries.iter().all(|entry| entry.gpa.is_none()));
}

#[test]
fn a_region_that_moves_before_the_list_is_accepted_is_refused_and_after_it_is_not() {
    let blocks = shared_blocks();
    let at = |address: u64| move |id: &str| (id == "vmem0").then_some(address);
    blocks.set_memory_table(at(0x2_0000_0000));
    let list = blocks.list(SHARED).unwrap();
    blocks.set_memory_table(at(0x3_0000_0000));
    let error = blocks.accept(&list, SHARED).err().unwrap().to_string();
    let expected = "RAM block \"vmem0\": address 0x200000000 in the stream, 0x300000000 here";
    assert_eq!(error, expected);
    // Only what both sides share must be at the same address.
    let sent = blocks.accept(&blocks.list(ListOptions::default()).unwrap(), ListOptions::default());
    assert_eq!(sent.unwrap().len(), 2);

    blocks.set_memory_table(at(0x2_0000_0000));
    let accepted = blocks.accept(&list, SHARED).unwrap();
    blocks.set_memory_table(at(0x3_0000_0000));
    assert_eq!(accepted.iter().map(|block| block.id()).collect::<Vec<_>>(), ["vmem0", "vmem1"]);
    assert_eq!(blocks.address_of(&accepted[0]), 0x3_0000_0000);
}

#[test]
fn a_lookup_in_the_memory_table_may_replace_the_table() {
    let blocks = Arc::new(shared_blocks());
    let inner = Arc::downgrade(&blocks);
    blocks.set_memory_table(move |_| {
        inner.upgrade()?.set_memory_table(|_| Some(0x3_0000_0000));
        Some(0x2_0000_0000)
    });
    let (tell, told) = mpsc::channel();
    let asked = Arc::clone(&blocks);
    thread::spawn(move || tell.send(addresses(&asked)).unwrap());
    // The bound is for a lookup that waits for itself.
    let found = told.recv_timeout(Duration::from_secs(30)).unwrap();
    assert_eq!(found, [Some(0x2_0000_0000), Some(0x3_0000_0000)]);
}
