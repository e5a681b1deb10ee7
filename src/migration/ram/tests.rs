use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};

use rustix::fs::MemfdFlags;

use super::*;
use crate::ByteRange;
use crate::memory::RamBlock;
use crate::migration::channel::Sink;
use crate::migration::dirty::DirtyTracker;
use crate::migration::handler::SaveHandler;
use crate::migration::page_bitmap::PageBitmap;
use crate::migration::progress::Progress;
use crate::migration::stream::PageHeader;
use crate::migration::test_support::memfd;
use crate::sys::{GatherWrite, HostMapping};

const HUGE_PAGE: u64 = 2 << 20;

/// Reports the pages that it is told.
#[derive(Clone, Default)]
struct Told(Arc<Mutex<Vec<u64>>>);

impl DirtyTracker for Told {
    fn start(&mut self, _populated: &[ByteRange]) -> io::Result<()> {
        Ok(())
    }

    fn sync(&mut self, dirty: &mut PageBitmap) -> io::Result<()> {
        for page in self.0.lock().unwrap().drain(..) {
            dirty.set(page);
        }
        Ok(())
    }

    fn clear(&mut self, _range: ByteRange) -> io::Result<()> {
        Ok(())
    }

    fn stop(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Takes everything and keeps nothing.
struct Nowhere;

impl Sink for Nowhere {
    fn write(&mut self, _bytes: &[u8]) -> io::Result<()> {
        Ok(())
    }

    fn write_gathered(&mut self, gathered: &mut GatherWrite) -> io::Result<()> {
        gathered.clear();
        Ok(())
    }

    fn written(&self) -> u64 {
        0
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
    ram.setup(&mut Nowhere).unwrap();
    ram.iterate(&mut Nowhere, u64::MAX).unwrap();
    // By itself: a tracker may tell smaller pages than the host has.
    told.0.lock().unwrap().push(3);
    assert_eq!(ram.pending_exact().unwrap(), 4096);
    ram.iterate(&mut Nowhere, u64::MAX).unwrap();
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
