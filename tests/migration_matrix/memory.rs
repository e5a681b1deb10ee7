//! Guest memory of every kind, and which of it is discarded.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, Mode, OFlags};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, FsPickFlags, MountAttrFlags, fsconfig_create, fsconfig_reconfigure,
    fsconfig_set_string, fsmount, fsopen, fspick,
};
use virtio_mem::ByteRange;
use virtio_mem::device::BlockBitmap;
use virtio_mem::memory::RamBlock;
use virtio_mem::migration::ram::{BlockOptions, MigrationBlock, RamBlocks};
use virtio_mem::ram_discard::{LocalRamDiscardManager, RamDiscardManager, RamDiscardSource};

/// Size of a device block: a huge page.
pub const BLOCK: u64 = 2 << 20;

/// What the guest's memory is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A memfd with pages of 4 KiB.
    Memfd,
    /// A tmpfs that takes transparent huge pages wherever it can.
    HugeShmem,
    /// A file on a tmpfs.
    Tmpfs,
    /// hugetlb pages of 2 MiB.
    Hugetlb,
}

impl Kind {
    pub const ALL: [Self; 4] = [Self::Memfd, Self::HugeShmem, Self::Tmpfs, Self::Hugetlb];

    /// An empty file, or why there is none of this kind.
    fn file(self, size: u64) -> io::Result<File> {
        let memfd = |flags| -> io::Result<File> {
            Ok(rustix::fs::memfd_create("matrix", MemfdFlags::CLOEXEC | flags)?.into())
        };
        let file = match self {
            Self::Memfd => memfd(MemfdFlags::empty())?,
            Self::Hugetlb => memfd(MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB)?,
            Self::Tmpfs => tempfile::tempfile_in("/dev/shm")?,
            Self::HugeShmem => huge_shmem()?,
        };
        file.set_len(size)?;
        Ok(file)
    }
}

/// A file on a tmpfs of its own with huge pages.
fn huge_shmem() -> io::Result<File> {
    Ok(own_tmpfs("huge", "always")?.0)
}

/// A file on a tmpfs of its own, mounted nowhere, and the mount.
fn own_tmpfs(option: &str, value: &str) -> io::Result<(File, OwnedFd)> {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&context, option, value)?;
    fsconfig_create(&context)?;
    let mount = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC;
    Ok((File::from(rustix::fs::openat(&mount, "ram", flags, Mode::RWXU)?), mount))
}

/// How much a tmpfs has room for.
pub struct Room(OwnedFd);

impl Room {
    /// Changes it, bytes.
    pub fn set(&self, bytes: u64) -> io::Result<()> {
        let flags = FsPickFlags::FSPICK_EMPTY_PATH | FsPickFlags::FSPICK_CLOEXEC;
        let context = fspick(&self.0, "", flags)?;
        fsconfig_set_string(&context, "size", bytes.to_string())?;
        Ok(fsconfig_reconfigure(&context)?)
    }
}

/// The machine's pool of huge pages, raised for as long as the value lives.
pub struct Pool {
    setting: File,
    before: u64,
}

impl Pool {
    const DIR: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

    /// A pool with `pages` free pages; the reason when there is none.
    pub fn with_free(pages: u64) -> io::Result<Self> {
        let path = format!("{}/nr_hugepages", Self::DIR);
        let setting = File::options().read(true).write(true).open(path)?;
        rustix::fs::flock(&setting, rustix::fs::FlockOperation::LockExclusive)?;
        let before = Self::read("nr_hugepages")?;
        let pool = Self { setting, before };
        pool.make_free(pages)?;
        Ok(pool)
    }

    /// Changes how many pages are free.
    pub fn make_free(&self, pages: u64) -> io::Result<()> {
        self.set(Self::read("nr_hugepages")? - Self::read("free_hugepages")? + pages)?;
        match Self::read("free_hugepages")? {
            free if free >= pages => Ok(()),
            free => Err(io::Error::other(format!("{free} of {pages} huge pages are to be had"))),
        }
    }

    fn read(file: &str) -> io::Result<u64> {
        let text = std::fs::read_to_string(format!("{}/{file}", Self::DIR))?;
        text.trim().parse().map_err(io::Error::other)
    }

    fn set(&self, pages: u64) -> io::Result<()> {
        self.setting.write_all_at(pages.to_string().as_bytes(), 0)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let _ = self.set(self.before);
    }
}

/// Which blocks are discarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    Alternating,
    Random,
    All,
    None,
}

impl Pattern {
    pub const ALL: [Self; 4] = [Self::Alternating, Self::Random, Self::All, Self::None];

    /// The plugged blocks of `nr_blocks`.
    pub fn plugged(self, nr_blocks: usize) -> BlockBitmap {
        let mut bitmap = BlockBitmap::new(nr_blocks);
        let mut random = 0x9e37_79b9_7f4a_7c15_u64;
        for block in 0..nr_blocks {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let plugged = match self {
                Self::Alternating => block % 2 == 0,
                Self::Random => !random.is_multiple_of(3),
                Self::All => false,
                Self::None => true,
            };
            if plugged {
                bitmap.set(block..block + 1, true);
            }
        }
        bitmap
    }
}

/// A source of block state that never changes, as while migration runs.
struct Frozen(BlockBitmap);

impl RamDiscardSource for Frozen {
    fn region_size(&self) -> u64 {
        self.0.nr_blocks() as u64 * BLOCK
    }

    fn granularity(&self) -> u64 {
        BLOCK
    }

    fn next_range(&self, section: ByteRange, populated: bool) -> Option<ByteRange> {
        let first = usize::try_from(section.start() / BLOCK).ok()?;
        let end = usize::try_from(section.end().div_ceil(BLOCK)).ok()?;
        let run = self.0.next_run(first..end, populated)?;
        ByteRange::from_bounds(run.start as u64 * BLOCK, run.end as u64 * BLOCK)?
            .intersection(section)
    }
}

/// One side's memory.
pub struct Side {
    pub block: Arc<MigrationBlock>,
    pub blocks: Arc<RamBlocks>,
}

impl Side {
    pub fn new(kind: Kind, plugged: &BlockBitmap) -> io::Result<Self> {
        Self::on(kind.file(plugged.nr_blocks() as u64 * BLOCK)?, plugged)
    }

    /// With memory of which there is only so much.
    pub fn with_room(bytes: u64, plugged: &BlockBitmap) -> io::Result<(Self, Room)> {
        let (file, mount) = own_tmpfs("size", &bytes.to_string())?;
        file.set_len(plugged.nr_blocks() as u64 * BLOCK)?;
        Ok((Self::on(file, plugged)?, Room(mount)))
    }

    fn on(file: File, plugged: &BlockBitmap) -> io::Result<Self> {
        let size = plugged.nr_blocks() as u64 * BLOCK;
        let ram =
            RamBlock::new("vmem0".into(), 4 << 30, size, file, 0).map_err(io::Error::other)?;
        let block = MigrationBlock::map(Arc::new(ram), BlockOptions::migratable())?;
        let manager = LocalRamDiscardManager::new(size);
        manager.add_source(Arc::new(Frozen(plugged.clone()))).map_err(io::Error::other)?;
        block.set_discard_manager(0, Arc::new(manager) as Arc<dyn RamDiscardManager>);
        let block = Arc::new(block);
        let mut blocks = RamBlocks::new();
        blocks.register(Arc::clone(&block)).map_err(io::Error::other)?;
        Ok(Self { block, blocks: Arc::new(blocks) })
    }

    /// The plugged bytes.
    pub fn populated(&self) -> Vec<ByteRange> {
        self.block.populated().unwrap()
    }

    /// Bytes that the host holds for discarded ranges.
    pub fn leaked(&self) -> u64 {
        let mut leaked = 0;
        if self.block.tells_holes() {
            for range in self.block.discarded().unwrap() {
                self.block.for_each_data(range, |data| leaked += data.len()).unwrap();
            }
        }
        leaked
    }
}

/// Past the test harness, which shows the output of failed tests only.
pub fn say(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}
