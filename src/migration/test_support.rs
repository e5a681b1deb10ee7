//! Two sides with real memory, for the tests of whatever moves it.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;

use rustix::fs::MemfdFlags;

use super::ram::{BlockOptions, MigrationBlock, RamBlocks};
use crate::ByteRange;
use crate::device::BlockBitmap;
use crate::memory::RamBlock;
use crate::ram_discard::{LocalRamDiscardManager, RamDiscardManager, RamDiscardSource};

pub(super) const PAGE: u64 = 4096;
pub(super) const BLOCK: u64 = 64 * PAGE;

/// A source that never changes.
struct Fixed(BlockBitmap);

impl RamDiscardSource for Fixed {
    fn region_size(&self) -> u64 {
        self.0.nr_blocks() as u64 * BLOCK
    }

    fn granularity(&self) -> u64 {
        BLOCK
    }

    fn next_range(&self, section: ByteRange, populated: bool) -> Option<ByteRange> {
        let blocks = (section.start() / BLOCK) as usize..section.end().div_ceil(BLOCK) as usize;
        let run = self.0.next_run(blocks, populated)?;
        let range = ByteRange::from_bounds(run.start as u64 * BLOCK, run.end as u64 * BLOCK)?;
        range.intersection(section)
    }
}

/// One side: a region of blocks, some of them plugged, and boot memory.
pub(super) struct Side {
    pub(super) region: File,
    pub(super) boot: File,
    pub(super) blocks: Arc<RamBlocks>,
}

pub(crate) fn memfd(size: u64) -> File {
    let file = File::from(rustix::fs::memfd_create("precopy", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(size).unwrap();
    file
}

pub(crate) fn migration_block(
    id: &str,
    file: &File,
    size: u64,
    options: BlockOptions,
) -> MigrationBlock {
    let file = file.try_clone().unwrap();
    let ram = RamBlock::new(id.to_owned(), 1 << 32, size, file, 0).unwrap();
    MigrationBlock::map(Arc::new(ram), options).unwrap()
}

pub(super) fn manager(plugged: &[usize], nr_blocks: usize) -> Arc<dyn RamDiscardManager> {
    let mut bitmap = BlockBitmap::new(nr_blocks);
    plugged.iter().for_each(|&block| bitmap.set(block..block + 1, true));
    let manager = LocalRamDiscardManager::new(nr_blocks as u64 * BLOCK);
    manager.add_source(Arc::new(Fixed(bitmap))).unwrap();
    Arc::new(manager)
}

impl Side {
    pub(super) fn new(plugged: &[usize]) -> Self {
        let (region, boot) = (memfd(16 * BLOCK), memfd(BLOCK));
        let mut blocks = RamBlocks::new();
        let vmem = migration_block("vmem0", &region, 16 * BLOCK, BlockOptions::migratable());
        vmem.set_discard_manager(0, manager(plugged, 16));
        blocks.register(Arc::new(vmem)).unwrap();
        let ram = migration_block("ram", &boot, BLOCK, BlockOptions::migratable());
        blocks.register(Arc::new(ram)).unwrap();
        Self { region, boot, blocks: Arc::new(blocks) }
    }

    /// With a region of `size` bytes of which all is populated, and no boot memory to migrate.
    pub(super) fn of_region(size: u64) -> Self {
        let region = memfd(size);
        let mut blocks = RamBlocks::new();
        let vmem = migration_block("vmem0", &region, size, BlockOptions::migratable());
        blocks.register(Arc::new(vmem)).unwrap();
        Self { region, boot: memfd(BLOCK), blocks: Arc::new(blocks) }
    }

    pub(super) fn held(&self) -> (u64, u64) {
        let pages = |file: &File| file.metadata().unwrap().blocks() * 512 / PAGE;
        (pages(&self.region), pages(&self.boot))
    }

    pub(super) fn page(&self, page: u64) -> Vec<u8> {
        let mut bytes = vec![0; PAGE as usize];
        self.region.read_exact_at(&mut bytes, page * PAGE).unwrap();
        bytes
    }
}

pub(crate) fn fill(file: &File, pages: std::ops::Range<u64>, byte: u8) {
    for page in pages {
        file.write_all_at(&[byte; PAGE as usize], page * PAGE).unwrap();
    }
}

/// A connection over TCP within this host.
pub(super) fn tcp_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let far = listener.accept().unwrap().0;
    (near, far)
}

/// What is late after the destination's verdict.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Late {
    /// What the source says.
    There,
    /// What the destination says.
    Back,
}

/// Source and destination of a connection over TCP on which, after the destination's verdict, one
/// direction stands still until the source ends its own.
pub(super) fn late(late: Late) -> (OwnedFd, OwnedFd) {
    // PONG 1, and the PONG of the verdict.
    const VERDICT: u64 = 16;
    let (source, mut near) = tcp_pair();
    let (mut far, destination) = tcp_pair();
    let (mut back_from, mut back_to) = (far.try_clone().unwrap(), near.try_clone().unwrap());
    let decided = Arc::new(AtomicBool::new(false));
    let (tell_ended, ended) = mpsc::channel();
    let deciding = Arc::clone(&decided);
    thread::spawn(move || {
        let mut verdict = Vec::new();
        let _ = (&mut back_from).take(VERDICT).read_to_end(&mut verdict);
        deciding.store(true, Ordering::SeqCst);
        let _ = back_to.write_all(&verdict);
        if late == Late::Back {
            let _ = ended.recv();
        }
        let _ = io::copy(&mut back_from, &mut back_to);
        let _ = back_to.shutdown(Shutdown::Both);
    });
    thread::spawn(move || {
        let (mut buffer, mut kept) = (vec![0; 4096], Vec::new());
        while let Ok(read @ 1..) = near.read(&mut buffer) {
            if late == Late::There && decided.load(Ordering::SeqCst) {
                kept.extend_from_slice(&buffer[..read]);
            } else if far.write_all(&buffer[..read]).is_err() {
                break;
            }
        }
        // What was kept comes at once with the end.
        let _ = rustix::net::sockopt::set_tcp_cork(&far, true);
        let _ = far.write_all(&kept);
        let _ = far.shutdown(Shutdown::Write);
        let _ = tell_ended.send(());
    });
    (source.into(), destination.into())
}
