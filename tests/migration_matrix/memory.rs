//! Guest memory of every kind, and which of it is discarded.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, RwLock, Weak};

use migration::ram::{BlockOptions, MigrationBlock, RamBlocks};
use ram_discard::memory::RamBlock;
use ram_discard::{
    ByteRange, LocalRamDiscardManager, MemoryState, RamDiscardListener, RamDiscardManager,
    RamDiscardSource, Section, SourceFollower, SourceId, SourceNotFollowed,
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

/// A file on a tmpfs that has room for so many bytes.
pub fn file_with_room(bytes: u64) -> io::Result<File> {
    Ok(own_tmpfs("size", &bytes.to_string())?.0)
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

/// Block state.
struct Blocks {
    plugged: RwLock<BlockBitmap>,
    nr_blocks: usize,
    block_size: u64,
}

impl RamDiscardSource for Blocks {
    fn region_size(&self) -> u64 {
        self.nr_blocks as u64 * self.block_size
    }

    fn granularity(&self) -> u64 {
        self.block_size
    }

    fn next_range(&self, section: Section, state: MemoryState) -> Option<Section> {
        let size = self.block_size;
        let first = usize::try_from(section.start() / size).ok()?;
        let end = usize::try_from(section.end().div_ceil(size)).ok()?;
        let run = self.plugged.read().unwrap().next_run(first..end, state.is_populated())?;
        Section::from_bounds(run.start as u64 * size, run.end as u64 * size)?.intersection(section)
    }
}

/// Discards what is unplugged: the first listener, and so the last to be told.
struct Discarder(Arc<RamBlock>);

impl RamDiscardListener for Discarder {
    fn name(&self) -> &str {
        "memory"
    }

    fn notify_populate(&mut self, _section: Section) -> Result<(), String> {
        Ok(())
    }

    fn notify_discard(&mut self, section: Section) {
        let range = section.gpa(self.0.range().start()).and_then(|gpa| self.0.file_range(gpa));
        self.0.backing().discard(range.unwrap()).unwrap();
    }
}

/// The device of one side.
pub struct Device {
    manager: Arc<LocalRamDiscardManager>,
    source: SourceId,
    blocks: Arc<Blocks>,
}

impl Device {
    /// Plugs a block that is not plugged, or unplugs one that is; false when it is busy.
    pub fn change(&self, block: usize, plug: bool) -> bool {
        let mut transaction = self.manager.begin();
        let size = self.blocks.block_size;
        let section = Section::new(block as u64 * size, size).unwrap();
        let set = |plugged| self.blocks.plugged.write().unwrap().set(block..block + 1, plugged);
        if transaction.is_frozen() {
            return false;
        }
        if plug {
            if transaction.notify_populate(self.source, section).is_err() {
                return false;
            }
            set(true);
        } else {
            set(false);
            transaction.notify_discard(self.source, section);
        }
        true
    }

    /// Plugs and unplugs what another one has plugged and unplugged, from which the guest comes.
    pub fn take_over(&self, plugged: &BlockBitmap) {
        let before = self.plugged();
        let size = self.blocks.block_size;
        for block in 0..before.nr_blocks() {
            let is_plugged = |blocks: &BlockBitmap| blocks.all(block..block + 1, true);
            let section = Section::new(block as u64 * size, size).unwrap();
            if is_plugged(&before) != is_plugged(plugged) {
                let manager: &dyn RamDiscardManager = &*self.manager;
                let state = match is_plugged(plugged) {
                    true => MemoryState::Populated,
                    false => MemoryState::Discarded,
                };
                manager.follow_source(section, state).unwrap();
            }
        }
    }

    /// What is plugged.
    pub fn plugged(&self) -> BlockBitmap {
        self.blocks.plugged.read().unwrap().clone()
    }
}

/// Has a device do what that of the source did.
struct Follower {
    manager: Weak<LocalRamDiscardManager>,
    source: SourceId,
    blocks: Arc<Blocks>,
}

impl SourceFollower for Follower {
    fn follow_source(&self, section: Section, state: MemoryState) -> Result<(), SourceNotFollowed> {
        let manager = self.manager.upgrade().expect("it is the one that asks");
        let mut transaction = manager.begin();
        if state == MemoryState::Populated {
            let told = transaction.notify_populate(self.source, section);
            told.map_err(|refused| SourceNotFollowed(refused.to_string()))?;
        }
        let block = |at: u64| (at / self.blocks.block_size) as usize;
        let blocks = block(section.start())..block(section.end());
        self.blocks.plugged.write().unwrap().set(blocks, state.is_populated());
        if state == MemoryState::Discarded {
            transaction.notify_discard(self.source, section);
        }
        Ok(())
    }
}

/// One side's memory.
pub struct Side {
    pub block: Arc<MigrationBlock>,
    pub blocks: Arc<RamBlocks>,
    pub device: Arc<Device>,
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
        let ram = Arc::new(ram);
        let block = MigrationBlock::map(Arc::clone(&ram), BlockOptions::migratable())?;
        let manager = Arc::new(LocalRamDiscardManager::new(size));
        let (plugged, nr_blocks) = (RwLock::new(plugged.clone()), plugged.nr_blocks());
        let state = Arc::new(Blocks { plugged, nr_blocks, block_size });
        let source = manager.add_source(Arc::clone(&state) as Arc<dyn RamDiscardSource>);
        let source = source.map_err(io::Error::other)?;
        let region = Section::new(0, size).ok_or(io::ErrorKind::InvalidInput)?;
        manager.register(region, Box::new(Discarder(ram))).map_err(io::Error::other)?;
        let (weak, blocks) = (Arc::downgrade(&manager), Arc::clone(&state));
        manager.set_source_follower(Box::new(Follower { manager: weak, source, blocks }));
        block
            .set_discard_manager(0, Arc::clone(&manager) as Arc<dyn RamDiscardManager>)
            .map_err(io::Error::other)?;
        let device = Arc::new(Device { manager, source, blocks: state });
        let block = Arc::new(block);
        let mut blocks = RamBlocks::new();
        blocks.register(Arc::clone(&block)).map_err(io::Error::other)?;
        Ok(Self { block, blocks: Arc::new(blocks), device })
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
