//! Guest memory of every kind, and which of it is discarded.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use migration::ram::{BlockOptions, MigrationBlock, RamBlocks};
use ram_discard::memory::RamBlock;
use ram_discard::{
    ByteRange, LocalRamDiscardManager, RamDiscardManager, RamDiscardSource, Section,
};
use rustix::fs::{MemfdFlags, Mode, OFlags};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, FsPickFlags, MountAttrFlags, fsconfig_create, fsconfig_reconfigure,
    fsconfig_set_string, fsmount, fsopen, fspick,
};
use virtio_mem::device::BlockBitmap;

/// Size of a device block: a huge page. Blocks of larger pages are as large as these.
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
    /// hugetlb pages of 1 GiB.
    Gigantic,
}

impl Kind {
    pub const ALL: [Self; 5] =
        [Self::Memfd, Self::HugeShmem, Self::Tmpfs, Self::Hugetlb, Self::Gigantic];

    /// Size of a device block on this memory.
    pub fn block_size(self) -> u64 {
        if self == Self::Gigantic { 1 << 30 } else { BLOCK }
    }

    /// Whether pages are taken from a pool of a fixed size.
    pub fn has_pool(self) -> bool {
        matches!(self, Self::Hugetlb | Self::Gigantic)
    }

    /// An empty file, or why there is none of this kind.
    fn file(self, size: u64) -> io::Result<File> {
        let memfd = |flags| -> io::Result<File> {
            Ok(rustix::fs::memfd_create("matrix", MemfdFlags::CLOEXEC | flags)?.into())
        };
        let file = match self {
            Self::Memfd => memfd(MemfdFlags::empty())?,
            Self::Hugetlb => memfd(MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB)?,
            Self::Gigantic => memfd(MemfdFlags::HUGETLB | MemfdFlags::HUGE_1GB)?,
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
struct Frozen {
    plugged: BlockBitmap,
    block_size: u64,
}

impl RamDiscardSource for Frozen {
    fn region_size(&self) -> u64 {
        self.plugged.nr_blocks() as u64 * self.block_size
    }

    fn granularity(&self) -> u64 {
        self.block_size
    }

    fn next_range(&self, section: Section, populated: bool) -> Option<Section> {
        let size = self.block_size;
        let first = usize::try_from(section.start() / size).ok()?;
        let end = usize::try_from(section.end().div_ceil(size)).ok()?;
        let run = self.plugged.next_run(first..end, populated)?;
        Section::from_bounds(run.start as u64 * size, run.end as u64 * size)?.intersection(section)
    }
}

/// One side's memory.
pub struct Side {
    pub block: Arc<MigrationBlock>,
    pub blocks: Arc<RamBlocks>,
}

impl Side {
    pub fn new(kind: Kind, plugged: &BlockBitmap) -> io::Result<Self> {
        let block_size = kind.block_size();
        Self::on(kind.file(plugged.nr_blocks() as u64 * block_size)?, plugged, block_size)
    }

    /// With memory of which there is only so much.
    pub fn with_room(bytes: u64, plugged: &BlockBitmap) -> io::Result<(Self, Room)> {
        let (file, mount) = own_tmpfs("size", &bytes.to_string())?;
        file.set_len(plugged.nr_blocks() as u64 * BLOCK)?;
        Ok((Self::on(file, plugged, BLOCK)?, Room(mount)))
    }

    fn on(file: File, plugged: &BlockBitmap, block_size: u64) -> io::Result<Self> {
        let size = plugged.nr_blocks() as u64 * block_size;
        let ram =
            RamBlock::new("vmem0".into(), 4 << 30, size, file, 0).map_err(io::Error::other)?;
        let block = MigrationBlock::map(Arc::new(ram), BlockOptions::migratable())?;
        let manager = LocalRamDiscardManager::new(size);
        let source = Frozen { plugged: plugged.clone(), block_size };
        manager.add_source(Arc::new(source)).map_err(io::Error::other)?;
        block
            .set_discard_manager(0, Arc::new(manager) as Arc<dyn RamDiscardManager>)
            .map_err(io::Error::other)?;
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
        if !self.block.tells_holes() {
            let held = self.block.ram().backing().file().metadata().unwrap().blocks() * 512;
            let populated = self.populated().iter().map(|range| range.len()).sum();
            leaked = held.saturating_sub(populated);
        }
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
